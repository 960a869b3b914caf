"""The web page: `make app`. Drop images, read verdicts; the same calls as `predict.py`."""

import os
from pathlib import Path

import streamlit as st

from model import ImageDetector, load_detector
from model.checkpoint import CheckpointError
from sharding.decode import prepare

# Where checkpoints are looked for: `DETECTOR_RUNS=demo/runs make app` shows the demo's.
RUNS = Path(os.environ.get("DETECTOR_RUNS", "runs"))


@st.cache_resource(show_spinner="Loading the detector")
def detector() -> ImageDetector:
    """The newest run's best checkpoint, loaded once."""
    return load_detector(runs=RUNS)


def show(found: ImageDetector, name: str, data: bytes) -> None:
    """One image with its verdict, or with the reason why it cannot be read."""
    (result,) = found.predict([data])
    left, right = st.columns([1, 2])
    if result.error:
        right.error(f"{name}: {result.error}")
        return
    left.image(prepare(data).pixels)  # decoded here: a browser knows fewer formats
    right.subheader(result.verdict[:1].upper() + result.verdict[1:])
    right.progress(result.probability, f"probability of AI-generated: {result.probability:.1%}")
    right.caption(name)


def main() -> None:
    """Draw the page."""
    st.set_page_config(page_title="Real or AI-generated?")
    st.title("Real or AI-generated?")
    try:
        found = detector()
    except CheckpointError as error:
        st.error(str(error))
        return
    for file in st.file_uploader("Images", accept_multiple_files=True):
        show(found, file.name, file.getvalue())
    st.caption(
        f"Model {found.checkpoint}. The probability is not calibrated, and a detector can be wrong "
        "on images unlike those it was trained on. Uploaded images are not kept."
    )


main()
