// Speaks the results to screen readers, in a region that stays on the page, and scrolls to new
// results that are not in the window, as on a phone. Used by `uploads.py`.

export default function ({ parentElement, data }) {
  const region = parentElement.querySelector("[role=status]");
  if (region.textContent !== data.text) region.textContent = data.text;

  const before = JSON.parse(region.dataset.files ?? "[]");
  region.dataset.files = JSON.stringify(data.files);
  if (data.files.every((file) => before.includes(file))) return;
  const show = (triesLeft) => {
    const results = document.querySelector(".st-key-results");
    const first = results?.querySelector(".images tbody tr, .verdict, .refused li");
    if (!first) { // Streamlit draws the parts of the page one after another
      if (triesLeft) setTimeout(show, 100, triesLeft - 1);
      return;
    }
    const { top, bottom } = first.getBoundingClientRect();
    if (top < 0 || bottom > innerHeight) results.scrollIntoView();
  };
  show(50);
}
