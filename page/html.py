"""HTML of the page's own: `Markup.format` escapes whatever comes from outside."""

import streamlit as st
from markupsafe import Markup
from streamlit.delta_generator import DeltaGenerator

from model.inference.prediction import UNREADABLE

KINDS = {
    "likely AI": "likely",
    "uncertain": "uncertain",
    "no sign of AI": "none",
    UNREADABLE: "refused",
}
"""The class of a verdict, by which `style.css` colors it; told apart without red from green."""


def icon(kind: str) -> Markup:
    """A line drawing of `style.css` beside words that say the same; no reader hears it."""
    return Markup('<span class="icon icon-{}" aria-hidden="true"></span>').format(kind)


def show(html: Markup, where: DeltaGenerator | None = None) -> None:
    """Put HTML of `Markup.format` on the page."""
    (where or st).html(str(html))
