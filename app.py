"""The web page: `make app`. Drop images, read verdicts; the same calls as `predict.py`."""

import os
from pathlib import Path

import streamlit as st

from model import ImageDetector, load_detector
from model.checkpoint import CheckpointError

RUNS = Path(os.environ.get("DETECTOR_RUNS", "runs"))
"""Where checkpoints are looked for; the demo's are in demo/runs."""


@st.cache_resource(show_spinner="Loading the detector")
def detector() -> ImageDetector:
    """The newest run's best checkpoint, loaded once."""
    return load_detector(runs=RUNS)


def main() -> None:
    """Draw the page."""
    st.set_page_config(page_title="Real or AI-generated?")
    st.title("Real or AI-generated?")
    try:
        found = detector()
    except CheckpointError as error:
        st.error(str(error))
        return
    files = st.file_uploader("Images", accept_multiple_files=True)
    for file in files:
        (result,) = found.predict([file.getvalue()])
        left, right = st.columns([1, 2])
        if result.error:
            right.error(f"{file.name}: {result.error}")
            continue
        left.image(file.getvalue())
        right.subheader(result.verdict.capitalize())
        right.progress(result.probability, f"probability of AI-generated: {result.probability:.1%}")
        right.caption(file.name)
    st.caption(
        f"Model {found.checkpoint}. The probability is not calibrated, and a detector can be wrong "
        "on images unlike those it was trained on. Uploaded images are not kept."
    )


main()
