"""What is found about an image once, and kept in memory as long as the page shows it."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import streamlit as st
from PIL import Image
from streamlit.runtime.uploaded_file_manager import UploadedFile

from escape import markdown
from imaging.decode import decode
from imaging.turns import Busy, turn
from model.inference import signatures
from model.inference.detector import ImageDetector
from model.inference.prediction import UNREADABLE, Prediction
from model.inference.provenance import Evidence, read_evidence
from page.examples import is_example

MIN_SIDE_PX = 32
"""A shorter side is refused: no known set has smaller images, and a guess looks like a finding."""

# The longer side of what is shown; the detector sees the whole file.
PREVIEW_PX, THUMBNAIL_PX = 768, 96


@dataclass(frozen=True)
class Scored:
    """What was found about an image of `size` (width, height); `preview` and `thumbnail` are small
    JPEG files.
    """

    name: str
    prediction: Prediction
    evidence: Sequence[Evidence] = ()
    preview: bytes = b""
    thumbnail: bytes = b""
    size: tuple[int, int] = (0, 0)
    is_example: bool = False


def score_all(detector: ImageDetector, files: Sequence[UploadedFile]) -> dict[str, Scored]:
    """What is known of each file, by its id; only new files are scored."""
    before = st.session_state.get("scored", {})
    scored = {file.file_id: before[file.file_id] for file in files if file.file_id in before}
    maps = st.session_state.get("heatmaps", {})
    st.session_state["scored"] = scored  # what is no longer shown is gone
    st.session_state["heatmaps"] = {key: maps[key] for key in maps.keys() & scored.keys()}
    reports = st.session_state.get("kept", {})
    st.session_state["kept"] = {key: reports[key] for key in reports if key[0] in scored}
    fresh = [file for file in files if file.file_id not in scored]
    bar = st.empty()
    for index, file in enumerate(fresh):
        bar.progress(index / len(fresh), f"Looking at {markdown(file.name)}")
        scored[file.file_id] = score(detector, file.name, file.getvalue())
    bar.empty()
    return {file.file_id: scored[file.file_id] for file in files}


def score(detector: ImageDetector, name: str, data: bytes) -> Scored:
    """One image: its probability, or why it is refused."""
    try:
        with turn(data):
            prediction = detector.predict(data)
            if prediction.error:
                return Scored(name, prediction)
            picture = Image.fromarray(decode(data))
    except Busy as error:
        refused = Prediction(name=name, probability=None, verdict=UNREADABLE, error=str(error))
        return Scored(name, refused)
    size = picture.size
    if min(size) < MIN_SIDE_PX:
        reason = (
            f"{size[0]} x {size[1]} pixels: too small to judge; at least {MIN_SIDE_PX} are needed "
            "each way"
        )
        return Scored(name, replace(prediction, probability=None, verdict=UNREADABLE, error=reason))
    picture.thumbnail((PREVIEW_PX, PREVIEW_PX))
    preview = as_jpeg(picture)
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    evidence = read_evidence(data, signatures.usual_trust_list())
    return Scored(
        name, prediction, evidence, preview, as_jpeg(picture), size, is_example(name, data)
    )


def as_jpeg(picture: Image.Image) -> bytes:
    """For showing only."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def data_url(jpeg: bytes) -> str:
    """The address of a picture that is fetched from nowhere."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
