// Passes all files to Streamlit's uploader, so that one set of limits applies: files that are pasted
// anywhere on the page, dropped outside the drop zone, or chosen as an example. Used by `uploads.py`.

export default function ({ parentElement }) {
  const button = parentElement.querySelector("button");
  const status = parentElement.querySelector("span");
  let pasted = 0;
  const upload = (files) => {
    const input = document.querySelector(".st-key-images input[type=file]");
    if (!input || input.disabled) return;
    const all = new DataTransfer();
    for (const file of files) {
      const type = file.type.split("/")[1];
      const name = /^(image\.\w+)?$/.test(file.name ?? "") ? `pasted-${++pasted}.${type}` : file.name;
      all.items.add(new File([file], name, { type: file.type }));
    }
    input.files = all.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
    status.textContent = "";
  };
  const onFiles = (event) => {
    upload(event.detail);
    document.querySelector(".st-key-images section button")?.focus(); // the example button disappears
  };
  // Screen readers skip Streamlit's drop zone, because its role is "presentation", and they would read
  // its icons aloud, because these are letters of a font. Both are corrected here.
  const mend = () => {
    document.querySelectorAll(".st-key-images section[role=presentation]")
      .forEach((zone) => zone.setAttribute("role", "group"));
    document.querySelectorAll("[data-testid=stIconMaterial]:not([aria-hidden])").forEach((icon) => {
      icon.setAttribute("aria-hidden", "true");
      icon.removeAttribute("role");
      icon.removeAttribute("aria-label");
    });
  };
  const watcher = new MutationObserver(mend);
  watcher.observe(document.body, { childList: true, subtree: true });
  mend();
  const onPaste = (event) => {
    const files = [...event.clipboardData.files];
    if (files.length) { event.preventDefault(); upload(files); }
    else status.textContent = "There is no image on the clipboard.";
  };
  const ours = (event) => event.dataTransfer.types.includes("Files")
    && !event.target.closest?.(".st-key-images section");
  const onOver = (event) => { if (ours(event)) event.preventDefault(); };
  const onDrop = (event) => {
    if (ours(event)) { event.preventDefault(); upload([...event.dataTransfer.files]); }
  };
  const onClick = async () => {
    try {
      const files = [];
      for (const item of await navigator.clipboard.read())
        for (const type of item.types.filter((type) => type.startsWith("image/")).slice(0, 1))
          files.push(await item.getType(type));
      if (files.length) upload(files);
      else status.textContent = "There is no image on the clipboard.";
    } catch {
      status.textContent = "The browser did not allow access to the clipboard; press Ctrl+V (or Cmd+V).";
    }
  };
  button.hidden = !navigator.clipboard?.read;
  button.onclick = onClick;
  document.addEventListener("page-files", onFiles);
  document.addEventListener("paste", onPaste);
  document.addEventListener("dragover", onOver);
  document.addEventListener("drop", onDrop);
  return () => {
    watcher.disconnect();
    document.removeEventListener("page-files", onFiles);
    document.removeEventListener("paste", onPaste);
    document.removeEventListener("dragover", onOver);
    document.removeEventListener("drop", onDrop);
  };
}
