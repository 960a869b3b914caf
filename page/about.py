"""Show the foot of the web page: what the detector cannot tell, and its name and date (Streamlit).

Main entry: `about(detector)` puts the text `LIMITS` (Markdown) and the line of `detector_line()` on
the page, and returns nothing. `detector` is the loaded detector, an `ImageDetector`, which
`page.detector.loaded_detector()` returns. It is called while Streamlit draws the page.

`detector_line(detector)` returns one line of text. It states the network, identity and date of the
detector, the version of the program, and that images stay in memory. For a shipped detector that is
used because there is no trained run, it says so.
"""

import os

import streamlit as st
from markupsafe import Markup

from installed import program_version
from model.inference.detector import ImageDetector
from model.shipped.backbone import is_shipped
from page.detector import CHECKPOINT
from page.html import show

LIMITS = """
- **A probability is not a proof.** Do not accuse anybody because of this page alone.
- **The probability assumes that about half of such images are AI-generated**, as in the
  calibration. Where they are rare, many of the images called *likely AI* are real.
- **The detector knows only kinds of images that it was trained on.** A newer generator, an unusual
  camera, a screenshot, heavy filters or repeated compression can cause errors in both directions.
- **The detector sees a center crop of the image**, scaled to a few hundred pixels (some detectors
  see a small part at full resolution too). A small edited area in a real photograph can be missed.
- **The verdict is about how the pixels were made**, not about whether the scene is true.
- **A pasted image contains no file information.** Upload the file to see statements about its
  origin.
"""


def about(detector: ImageDetector) -> None:
    """Show the limits and the name of the detector at the foot of the page."""
    with st.expander("What this page can and cannot tell"):
        st.markdown(LIMITS)
    show(Markup('<footer class="quiet">{}</footer>').format(detector_line(detector)))


def detector_line(detector: ImageDetector) -> str:
    """Return one line with the name, identity and date of the detector, and the program version."""
    network, created = detector.meta["recipe"]["network"]["name"], detector.meta["created"][:10]
    shipped = not os.environ.get(CHECKPOINT) and is_shipped(detector.checkpoint)
    first = f"There is no trained run, so this is the shipped detector {detector.checkpoint.name}. "
    return (
        f"{first if shipped else ''}Model {network}, {detector.identity}, {created}. Program "
        f"{program_version()}. Images stay in memory while this page shows them; nothing is "
        "kept but what you ask to keep."
    )
