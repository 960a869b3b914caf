"""Draw the web page from top to bottom; Streamlit calls this again after every change of an input.

Main entry: `main()` takes and returns nothing. It is called from the script that Streamlit runs. It
loads the detector, shows the uploader, scores the uploaded images, and shows the results, or the
first screen if there are none. If the detector cannot be loaded, the page shows its title, the
reason, and nothing else.

`show_results(detector, files, scored)` shows a table (of two or more images), one image (the one
that is chosen in the table) and the threshold slider. It returns a text for screen readers. Of a
refused image only the reason is shown, and if all images were refused, there is no slider.

- `detector`: the `ImageDetector` that `page.detector.loaded_detector()` returns.
- `files`: a dict, file id -> uploaded file (Streamlit's `UploadedFile`).
- `scored`: a dict, file id -> `Scored` (a prediction or a refusal), which `page.scored.score_all()`
  returns for these files. It has at least one entry.

`show_image(detector, file, result, said, level)` shows one image with its verdict. It returns a
sentence on what was kept if the visitor reported the verdict as wrong, else "".

- `detector`: the detector with the threshold of the slider, which `page.cost.at_slider()` returns.
- `file`, `result`: the uploaded file and its `Scored`, which was not refused.
- `said`: the verdict, "likely AI", "uncertain" or "no sign of AI".
- `level`: level of the HTML heading, an int such as 2.

`sentence(detector, result, verdict)` returns the result of one image, or its refusal, as text for
screen readers. `STYLE` is the path of the style sheet, `ICON` the icon of the browser tab (SVG).
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import streamlit as st
from markupsafe import Markup
from streamlit.runtime.uploaded_file_manager import UploadedFile

from model.inference import fitness
from model.inference.detector import ImageDetector
from model.verdict import capital, percent
from page.about import about
from page.cost import at_slider, show_threshold
from page.detector import loaded_detector, why_not
from page.html import icon, show
from page.mistakes import show_mistake
from page.photo import show_photo
from page.scored import Scored, score_all
from page.session import this_session
from page.start import show_examples, show_figures, show_lead, show_notices
from page.table import show_table, summary
from page.uploads import announce, uploads
from page.verdict import evidence_html, refused_html, verdict_html

log = logging.getLogger("ai_images_detector")

STYLE = Path(__file__).with_name("style.css")

# Icon of the browser tab, as SVG: Streamlit's named icons would be fetched from another host.
ICON = """<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32" viewBox="0 0 32 32">
<rect x="2" y="5" width="28" height="22" rx="5" fill="#1a5fd0"/>
<path d="M16 5h9a5 5 0 0 1 5 5v12a5 5 0 0 1-5 5h-9z" fill="#b94707"/>
<circle cx="16" cy="16" r="6" fill="none" stroke="#fff" stroke-width="3"/></svg>"""


def main() -> None:
    """Draw the page."""
    st.set_page_config(page_title="Real or AI-generated?", page_icon=ICON)
    st.html(STYLE)
    show(Markup("<h1>Real or AI-generated?</h1>"))
    try:
        detector = loaded_detector()
    except Exception as error:  # loading a damaged checkpoint can raise any type
        log.warning("no detector", exc_info=True)
        show(
            Markup('<div class="card refused" role="alert">{}<p>{}</p></div>').format(
                icon("refused"), why_not(error)
            )
        )
        return
    this_session()
    lead = st.empty()
    show_notices(detector.notices)
    files = {file.file_id: file for file in uploads()}
    start = st.empty()
    if files:  # empty it now: it would stay visible during scoring
        lead.empty()
        start.empty()
    else:
        show_lead(lead)
        with start.container():
            show_figures(detector.meta)
            show_examples()
    scored = score_all(detector, list(files.values()))
    text = ""
    if scored:
        with st.container(key="results"):  # live.js finds the results by this key
            text = show_results(detector, files, scored)
    announce(text, scored)
    about(detector)


def show_results(
    detector: ImageDetector, files: Mapping[str, UploadedFile], scored: Mapping[str, Scored]
) -> str:
    """Show the results and the threshold slider; returns a sentence for screen readers."""
    ours = at_slider(detector)
    verdicts = {
        key: result.prediction.verdict if result.prediction.probability is None
        else ours.verdict(result.prediction.probability)
        for key, result in scored.items()
    }  # fmt: skip
    many = len(scored) > 1
    chosen = show_table(ours, scored, verdicts) if many else next(iter(scored))
    kept = ""
    if not scored[chosen].prediction.error:
        level = 3 if many else 2
        kept = show_image(ours, files[chosen], scored[chosen], verdicts[chosen], level)
    elif not many:
        show(refused_html([scored[chosen]]))
    if not all(result.prediction.error for result in scored.values()):
        show_threshold(detector)
    said = f"{summary(scored, verdicts)}. Details: " if many else ""
    return f"{said}{sentence(ours, scored[chosen], verdicts[chosen])} {kept}".strip()


def show_image(
    detector: ImageDetector, file: UploadedFile, result: Scored, said: str, level: int
) -> str:
    """Show one image with its verdict. `level` is the HTML heading level of the verdict. Return a
    sentence on what was written about a mistake, or an empty string.
    """
    left, right = st.columns([1, 1], gap="medium")
    with left:
        show(verdict_html(detector, result, said, level))
        show(evidence_html(result.evidence, level))
        kept = show_mistake(detector, file, result, said)
    with right:
        show_photo(detector, file, result)
    return kept


def sentence(detector: ImageDetector, result: Scored, verdict: str) -> str:
    """Return the result of one image as a sentence for screen readers."""
    probability = result.prediction.probability
    if probability is None:
        return f"{result.printable_name} was refused: {result.prediction.error}."
    label = capital(fitness.score_label(detector.meta))
    return (
        f"{result.printable_name}: {capital(verdict)}. {label}: "
        f"{percent(probability)}. {'The file itself names AI. ' if result.names_ai else ''}"
        f"{'The file has an invalid signature. ' if result.is_badly_signed else ''}"
        f"{capital(fitness.disclaimer(detector.meta))}."
    )
