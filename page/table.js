// Table with one row per image. A click on a row, or on its button with the keyboard, shows the image
// in full. A click on a heading sorts; the order is stored in the browser only. Used by `table.py`.

const orders = {
  name: (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }),
  verdict: (a, b) => (b.probability ?? -1) - (a.probability ?? -1),
  number: (a, b) => (b.probability ?? -1) - (a.probability ?? -1),
};

const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

export default function ({ parentElement, data, setStateValue }) {
  const table = parentElement.querySelector("table");
  const headings = { picture: "Image", name: "File", verdict: "Verdict", number: data.number };
  table.caption.textContent = `Verdicts of ${data.rows.length} images. Select a heading to sort, or a row to see its image.`;

  const draw = () => {
    const { by = "", way = "" } = table.dataset;
    const focused = table.contains(document.activeElement)
      && document.activeElement.closest("[data-key]").dataset.key; // redrawing loses the focus
    const rows = data.rows.map((row, index) => ({ ...row, index }));
    if (by) rows.sort((a, b) => orders[by](a, b) * (way === "down" ? -1 : 1) || a.index - b.index);
    table.tBodies[0].replaceChildren(...rows.map(line));
    table.tHead.rows[0].replaceChildren(...Object.entries(headings).map(heading));
    if (focused) table.querySelector(`[data-key="${CSS.escape(focused)}"] button`)?.focus();
  };

  const heading = ([key, title]) => {
    if (!orders[key]) return element("th", { scope: "col" }, title);
    const current = table.dataset.by === key;
    const down = table.dataset.way === "down";
    const button = element("button", { type: "button" }, title);
    button.onclick = () => {
      table.dataset.way = current && !down ? "down" : "up";
      table.dataset.by = current && down ? "" : key; // the third click restores the upload order
      draw();
    };
    const cell = element("th", { scope: "col" }, button);
    cell.dataset.key = key;
    const falls = (key === "name") === down; // the first click on numbers sorts the largest first
    cell.ariaSort = current ? (falls ? "descending" : "ascending") : "none";
    return cell;
  };

  const line = (row) => {
    const image = row.picture
      ? element("img", { src: row.picture, alt: "" }) : element("span", { className: "blank" });
    const open = element("button", { type: "button" }, row.name);
    const verdict = element("span", {}, element("span", { className: `mark ${row.kind}` }, row.verdict));
    for (const [text, kind] of row.marks) verdict.append(" ", element("span", { className: `state ${kind}` }, text));
    const number = element("td", { className: "number" });
    if (row.probability !== null) {
      const fill = element("i");
      fill.style.width = `${100 * row.probability}%`;
      number.append(element("span", { className: `bar ${row.kind}` }, fill), row.said);
      number.firstChild.ariaHidden = "true";
    } else number.append("-");
    const tr = element("tr", {},
      element("td", {}, image), element("td", { className: "name" }, open),
      element("td", {}, verdict), number);
    tr.dataset.key = row.id;
    if (row.id === data.chosen) { tr.className = "chosen"; open.ariaCurrent = "true"; }
    tr.onclick = () => {
      setStateValue("chosen", row.id);
      data = { ...data, chosen: row.id };
      draw();
      if (row.probability !== null) document.querySelector(".verdict")?.scrollIntoView({ block: "nearest" });
    };
    return tr;
  };

  draw();
}
