"""Show the first screen of the web page: its purpose, the detector's error rates, example images.

Main entries, which put HTML on the page (Streamlit) and return nothing:

- `show_lead(where)` shows the purpose (`LEAD`, `PRIVATE`) in a page element, such as `st.empty()`.
- `show_notices(notices)` takes `detector.notices` of an `ImageDetector`, a list of `Notice`s
  (reasons not to rely on the detector, as text), and lists them. Nothing is shown for an empty
  list.
- `show_figures(meta)` takes `detector.meta`, the content of the detector's `meta.json` (a dict),
  and shows the error rates in it, or that they were not measured.
- `show_examples()` takes nothing and shows three images. A click on one uploads it to the uploader,
  which `page.uploads.uploads()` must have shown on the same page.

`figures_html(measured, images)` takes the `CalibratedRates` that `page.figures.rates(meta)`
returns, or None, and the text of `page.figures.measured_on(meta)`, and returns the error rates as
HTML (`Markup`). `HERE` is the folder of this module.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import streamlit as st
from markupsafe import Markup
from streamlit.delta_generator import DeltaGenerator

from model.inference.fitness import Notice
from model.verdict import capital
from page.examples import ABOUT, examples
from page.figures import CalibratedRates, Measured, measured_on, of_hundred, rates
from page.html import icon, show
from page.scored import data_url

HERE = Path(__file__).parent

LEAD = (
    "A neural network examines the pixels of an image. Its verdict is likely AI, uncertain or no "
    "sign of AI. The page also shows what is stored in the file about its origin."
)

PRIVATE = "Images stay in the memory of the machine that runs this page, while the page shows them."

_examples = st.components.v2.component(
    "examples",
    html='<h2>Or try an example</h2><div class="examples"></div><p class="quiet"></p>',
    js=(HERE / "examples.js").read_text(encoding="utf-8"),
    isolate_styles=False,
)


def show_notices(notices: Sequence[Notice]) -> None:
    """Show the reasons not to rely on the detector; they stay visible while the page is open."""
    if not notices:
        return
    items = Markup().join(Markup("<li>{}.</li>").format(capital(notice.text)) for notice in notices)
    show(
        Markup(
            '<section class="warning" aria-label="Reasons not to rely on this detector">{}'
            "<ul>{}</ul></section>"
        ).format(icon("warning"), items)
    )


def show_lead(where: DeltaGenerator) -> None:
    """Show what the page does, in the element `where`."""
    show(Markup('<p class="lead">{} {}</p>').format(LEAD, PRIVATE), where)


def show_figures(meta: Mapping[str, Any]) -> None:
    """Show the error rates of the detector: recall together with false positives."""
    show(
        Markup('<section class="well"><h2>How often the detector is right</h2>{}</section>').format(
            figures_html(rates(meta), measured_on(meta) if meta["calibration"] else "")
        )
    )


def figures_html(measured: CalibratedRates | None, images: str) -> Markup:
    """Return the cards with the rates as HTML, or a card that says that there are none. `images` is
    a text on the images on which they were measured.
    """
    if measured is None:
        return Markup(
            '<p class="card">Not known: the error rates of this detector were not measured.</p>'
        )
    cards = [
        _card("likely", "of 100 fakes are called likely AI", measured.recall, "fakes"),
        _card(
            "none", "of 100 real images are called likely AI", measured.false_positives,
            "real images",
        ),
    ]  # fmt: skip
    if measured.uncertain is not None:
        cards.append(
            Markup(
                '<div class="rate"><span class="value">{}</span><span>of 100 images are left '
                '<em>uncertain</em></span><span class="quiet">a third answer, instead of a guess'
                "</span></div>"
            ).format(of_hundred(measured.uncertain))
        )
    return Markup('<div class="card rates">{}</div><p class="quiet">{}</p>').format(
        Markup().join(cards), images
    )


def _card(kind: str, what: str, measured: Measured, images: str) -> Markup:
    sources = ""
    if measured.lowest is not None and measured.highest is not None:
        ends = of_hundred(measured.lowest), of_hundred(measured.highest)
        sources = f", by source {ends[0]} to {ends[1]}"
    return Markup(
        '<div class="rate {}"><span class="value">{}</span><span>{}</span>'
        '<span class="quiet">{} {}{}</span></div>'
    ).format(kind, of_hundred(measured.share), what, f"{measured.images:,}", images, sources)


def show_examples() -> None:
    """Show the example images; `examples.js` passes the chosen one to the uploader."""
    pictures = [
        {"name": example.name, "title": example.title, "source": data_url(example.data)}
        for example in examples()
    ]
    _examples(key="examples", data={"pictures": pictures, "about": ABOUT})
