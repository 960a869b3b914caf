"""Put HTML on the web page (Streamlit), with untrusted text escaped by `Markup.format`.

Main entry: `show(html, where)` takes HTML as `Markup`, and the page element to fill (`where`, a
Streamlit element such as `st.empty()`; default None: the HTML goes to the end of the page). It
returns nothing. `icon(kind)` returns the HTML of an icon, for a kind of `style.css`: a value of
`KINDS` or "warning". `KINDS` maps each verdict to its CSS class.
"""

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
"""CSS class of each verdict. The colors differ for color-blind readers too: no red next to green.
"""


def icon(kind: str) -> Markup:
    """Return an icon drawn by `style.css`, hidden from screen readers: the text next to it has the
    same meaning.
    """
    return Markup('<span class="icon icon-{}" aria-hidden="true"></span>').format(kind)


def show(html: Markup, where: DeltaGenerator | None = None) -> None:
    """Put HTML on the page, or into the element `where`."""
    (where or st).html(str(html))
