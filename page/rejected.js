// Lists the files that Streamlit's uploader or the server rejected, with the reasons. The uploader
// has them only in tooltips, which a phone does not show, and in a list of which two rows are
// visible. Used by `uploads.py`.

const reasons = [
  [/status code 503/, "the memory for images is full; remove images, or try again later"],
  [/status code 408|Network Error/, "the upload was interrupted; remove the file and try again"],
];

const reasonOf = (text) => reasons.find(([pattern]) => pattern.test(text))?.[1]
  ?? text.replace(/^(Error: )+/, "");

export default function ({ parentElement }) {
  const card = parentElement.querySelector(".card");
  const list = card.querySelector("ul");
  const show = () => {
    const chips = document.querySelectorAll(".st-key-images [data-testid=stFileChip][aria-invalid=true]");
    const lines = [...chips].map((chip) => {
      const alert = chip.querySelector("[role=alert]"); // for screen readers
      const reason = reasonOf(alert?.textContent ?? "");
      if (alert && alert.textContent !== reason) alert.textContent = reason;
      return { name: chip.querySelector("[data-testid=stFileChipName]")?.title ?? "", reason };
    });
    const key = JSON.stringify(lines);
    if (list.dataset.key === key) return;
    list.dataset.key = key;
    list.replaceChildren(...lines.map(({ name, reason }) => {
      const line = document.createElement("li");
      const bold = Object.assign(document.createElement("b"), { textContent: name, dir: "auto" });
      line.append(bold, `: ${reason}`); // `dir` keeps marks in the name from turning the reason
      return line;
    }));
    card.hidden = !lines.length;
  };
  const watcher = new MutationObserver(show);
  watcher.observe(document.body, {
    childList: true, subtree: true, characterData: true, attributeFilter: ["aria-invalid"],
  });
  show();
  return () => watcher.disconnect();
}
