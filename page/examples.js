// Shows the three images of `examples.py` as buttons; a click sends the file to `paste.js`.

export default function ({ parentElement, data }) {
  const list = parentElement.querySelector(".examples");
  parentElement.querySelector("p").textContent = data.about;
  list.replaceChildren(...data.pictures.map(({ name, title, source }) => {
    const button = document.createElement("button");
    const image = Object.assign(document.createElement("img"), { src: source, alt: "" });
    const text = Object.assign(document.createElement("span"), { textContent: title });
    button.type = "button";
    button.append(image, text);
    button.onclick = async (event) => {
      if (event.detail > 1) return; // the second click of a double click
      const bytes = await (await fetch(source)).arrayBuffer();
      const file = new File([bytes], name, { type: "image/jpeg" });
      document.dispatchEvent(new CustomEvent("page-files", { detail: [file] }));
    };
    return button;
  }));
}
