"""The first screen: what the page does and how well, and pictures to try it with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import streamlit as st
from markupsafe import Markup
from streamlit.delta_generator import DeltaGenerator

from model.inference.fitness import Notice
from model.verdict import capital
from page.examples import ABOUT, examples
from page.figures import Measured, Rates, of_hundred, rates
from page.html import icon, show
from page.scored import data_url

HERE = Path(__file__).parent

LEAD = (
    "A network looks at how the pixels of a picture were made and calls it likely AI, uncertain or "
    "without a sign of AI. Beside that stands what its file tells of where it comes from."
)

PRIVATE = "Images stay in the memory of the machine that this page runs on, while it shows them."

_examples = st.components.v2.component(
    "examples",
    html='<h2>Or try one of these</h2><div class="examples"></div><p class="quiet"></p>',
    js=(HERE / "examples.js").read_text(encoding="utf-8"),
    isolate_styles=False,
)


def show_notices(notices: Sequence[Notice]) -> None:
    """What speaks against the detector: it stays as long as the page is open."""
    if not notices:
        return
    items = Markup().join(Markup("<li>{}.</li>").format(capital(notice.text)) for notice in notices)
    show(
        Markup(
            '<section class="warning" aria-label="What speaks against this detector">{}<ul>{}</ul>'
            "</section>"
        ).format(icon("warning"), items)
    )


def show_lead(where: DeltaGenerator) -> None:
    """What the page does."""
    show(Markup('<p class="lead">{} {}</p>').format(LEAD, PRIVATE), where)


def show_figures(meta: Mapping[str, Any]) -> None:
    """How well it does it, false positives beside recall."""
    show(
        Markup('<section class="well"><h2>How often it is right</h2>{}</section>').format(
            figures_html(rates(meta))
        )
    )


def figures_html(measured: Rates | None) -> Markup:
    """The cards with the rates, or that there are none."""
    if measured is None:
        return Markup(
            '<p class="card">Nobody knows: this detector is not calibrated, so what it finds and '
            "what it calls AI by mistake was not measured. Its numbers are scores.</p>"
        )
    cards = [
        _card("likely", "of 100 fakes are called likely AI", measured.recall, "fakes"),
        _card(
            "none", "of 100 real photographs are too", measured.false_positives,
            "real images",
        ),
    ]  # fmt: skip
    if measured.uncertain is not None:
        cards.append(
            Markup(
                '<div class="rate"><span class="value">{}</span><span>of 100 images are left '
                '<em>uncertain</em></span><span class="quiet">a third answer, in place of a guess'
                "</span></div>"
            ).format(of_hundred(measured.uncertain))
        )
    sets = ", ".join(measured.fitted_on)
    how = (
        f"Measured on {sets}, each source while it was left out of training: kinds of images that "
        "were new to it, as yours may be."
        if measured.left_out
        else f"Measured on {sets}, which are of the kinds that it learned from. With kinds that "
        "are new to it, expect more of both mistakes."
    )
    return Markup('<div class="card rates">{}</div><p class="quiet">{}</p>').format(
        Markup().join(cards), how
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
    """Three pictures; `examples.js` hands the one that is chosen to the uploader."""
    pictures = [
        {"name": example.name, "title": example.title, "source": data_url(example.data)}
        for example in examples()
    ]
    _examples(key="examples", data={"pictures": pictures, "about": ABOUT})
