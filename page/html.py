"""Put HTML on the web page, which Streamlit draws.

Main entry: `show(html, where)` puts HTML on the page and returns nothing. It escapes nothing;
scripts do not run.

- `html`: the HTML as `Markup` (of markupsafe), not empty. The caller escapes untrusted text with
  `Markup.format()`, such as `Markup("<p>{}</p>").format(name)`.
- `where`: the page element to fill, such as `st.empty()` of Streamlit. None, the default, puts the
  HTML at the end of the container whose `with` block is open, or else of the page.

`icon(kind)` returns the HTML of an icon as `Markup`. `kind` is a CSS class of `style.css`: a value
of `KINDS`, or "warning". `KINDS` maps each verdict ("likely AI", "uncertain", "no sign of AI", and
"unreadable" for a refused file) to its CSS class.
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
