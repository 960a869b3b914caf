"""What the detector cannot know, and which one it is."""

import os
import tomllib
from pathlib import Path

import streamlit as st
from markupsafe import Markup

from model.inference.detector import ImageDetector
from model.shipped.backbone import is_shipped
from page.detector import CHECKPOINT
from page.html import show

ROOT = Path(__file__).parent.parent

LIMITS = """
- **A probability is not a proof.** Do not accuse anybody on the strength of this page alone.
- **It knows what it was trained on.** A newer generator, an unusual camera, a screenshot, heavy
  filters, or a picture that was compressed many times can mislead it, in both directions.
- **It looks at the middle of the image**, scaled to a few hundred pixels. A small edited spot in a
  real photograph can go unseen.
- **It judges how pixels were made**, not whether what they show is true.
- **A pasted picture has lost what its file said about itself**; upload the file to read that.
"""


def about(detector: ImageDetector) -> None:
    """The last lines of the page."""
    with st.expander("What this page can and cannot tell"):
        st.markdown(LIMITS)
    show(Markup('<footer class="quiet">{}</footer>').format(which(detector)))


def which(detector: ImageDetector) -> str:
    """The detector and the program by name and date."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    network, created = detector.meta["recipe"]["network"]["name"], detector.meta["created"][:10]
    shipped = not os.environ.get(CHECKPOINT) and is_shipped(detector.checkpoint)
    first = f"There is no trained run: this is {detector.checkpoint.name}, which ships. "
    return (
        f"{first if shipped else ''}Model {network}, {detector.identity}, {created}. Program "
        f"{project['version']}. Images stay in memory while this page shows them; nothing is "
        "kept but what you ask to keep."
    )
