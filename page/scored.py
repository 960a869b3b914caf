"""Score each uploaded image once, and keep the result in the memory of the browser session until
the file is removed from the page.

Main entry: `score_all(detector, files)` returns a dict, file id -> `Scored`, for all `files`. The
results are stored in `st.session_state["scored"]`, so only new files are scored; the results of
files that are not in `files` are dropped.

- `detector`: the `ImageDetector` that `page.detector.loaded_detector()` returns.
- `files`: a list of the uploaded files (Streamlit's `UploadedFile`), as `page.uploads.uploads()`
  returns it.

Fields of a `Scored`:

- `name`: the file name; `printable_name` is the text to show for it.
- `prediction`: a `Prediction`: `probability` of fake (0 to 1), or None and the reason in `error`
  (else "").
- `evidence`: the statements in the file about its origin, a sequence of `Evidence` of
  model/inference/provenance.py.
- `preview`, `thumbnail`: small JPEG files as bytes.
- `size`: (width, height) in pixels.
- `is_example`: True if the file is one of the page's own examples (`page/examples.py`).

A file is refused if it cannot be decoded, if it is too small for a verdict, or if the program is
too busy. Its `Scored` has the reason in `prediction.error`; `evidence`, `preview` and `thumbnail`
are empty, `size` is (0, 0) and `is_example` is False. Only a damaged list of trusted C2PA signers
raises an error (`TrustListError`).

`score(detector, name, data)` scores one image file without Streamlit and returns its `Scored`.
`name` is the file name to show, `data` the bytes of the file. `as_jpeg(picture)` encodes a Pillow
image (RGB) as a JPEG file, as bytes; `data_url(jpeg)` makes a data: URL (text) of the file.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import streamlit as st
from PIL import Image
from streamlit.runtime.uploaded_file_manager import UploadedFile

from escape import markdown, printable
from imaging.decode import ImageFile, decoded
from imaging.decode_lock import Busy, decode_lock, hold
from model.c2pa import signatures
from model.inference.detector import ImageDetector
from model.inference.prediction import (
    UNREADABLE,
    DecodedImage,
    Prediction,
    done_or_reason,
    predictions,
)
from model.inference.provenance import Evidence, read_evidence
from page.examples import is_example

# Longer side of the shown pictures, in pixels. The detector gets the original file.
PREVIEW_PX, THUMBNAIL_PX = 768, 96


@dataclass(frozen=True)
class Scored:
    """Result for one image of `size` (width, height) in pixels; `preview` and `thumbnail` are small
    JPEG files, empty if the image was refused.
    """

    name: str
    prediction: Prediction
    evidence: Sequence[Evidence] = ()
    preview: bytes = b""
    thumbnail: bytes = b""
    size: tuple[int, int] = (0, 0)
    is_example: bool = False
    was_busy: bool = False  # not scored, because others were; try again

    @property
    def printable_name(self) -> str:
        """The name, with visible escapes for invisible characters and for marks of the writing
        direction, which could reverse the text next to the name.
        """
        return printable(self.name)

    @property
    def names_ai(self) -> bool:
        """Whether a statement in the file suggests that the image is AI-generated."""
        return any(map(names_ai, self.evidence))

    @property
    def is_badly_signed(self) -> bool:
        """Whether the file has a C2PA signature that is invalid."""
        return any(item.state == "invalid" for item in self.evidence)


def names_ai(item: Evidence) -> bool:
    """Return whether a statement suggests that the image is AI-generated. A statement with an
    invalid signature does not: it may be from another file.
    """
    return item.suggests == "AI" and item.state != "invalid"


def score_all(detector: ImageDetector, files: Sequence[UploadedFile]) -> dict[str, Scored]:
    """Return file id -> result for all files; only new files are scored."""
    before = st.session_state.get("scored", {})
    scored = {file.file_id: before[file.file_id] for file in files if file.file_id in before}
    maps = st.session_state.get("heatmaps", {})
    st.session_state["scored"] = scored  # drops results of removed files
    st.session_state["heatmaps"] = {key: maps[key] for key in maps.keys() & scored.keys()}
    reports = st.session_state.get("kept", {})
    st.session_state["kept"] = {key: reports[key] for key in reports if key[0] in scored}
    fresh = [file for file in files if file.file_id not in scored]
    bar = st.empty()
    for index, file in enumerate(fresh):
        bar.progress(index / len(fresh), f"Scoring {markdown(file.name)}")
        scored[file.file_id] = score(detector, file.name, file.getvalue())
    bar.empty()
    st.session_state["scored"] = {key: one for key, one in scored.items() if not one.was_busy}
    return {file.file_id: scored[file.file_id] for file in files}


def score(detector: ImageDetector, name: str, data: bytes) -> Scored:
    """Score one image; the result has a probability, or the reason why the image is refused.

    The wait for another visitor's image is limited. The detector is not locked during decoding,
    which can take ten seconds.
    """

    def read(file: ImageFile) -> tuple[np.ndarray, Image.Image, tuple[int, int]]:
        """Return the network's input, a small picture to show, and the size of the image."""
        with decoded(file.read()) as pixels:
            picture = Image.fromarray(pixels)
            size = picture.size
            picture.thumbnail((PREVIEW_PX, PREVIEW_PX))
            return detector.preprocess_file(DecodedImage(file.name, pixels)), picture.copy(), size

    probability, failures = math.nan, {}
    try:
        with decode_lock(data):
            done = done_or_reason(read, ImageFile("image 0", lambda: data))
            if isinstance(done, str):
                failures[0] = done
            else:
                with hold(detector.lock):
                    (probability,) = detector.score(done[0][None]).tolist()
    except Busy as error:
        refused = Prediction(name=name, probability=None, verdict=UNREADABLE, error=str(error))
        return Scored(name, refused, was_busy=True)
    prediction = next(predictions(["image 0"], [probability], failures, detector.band))
    if prediction.error:
        return Scored(name, prediction)
    _, picture, size = done
    preview = as_jpeg(picture)
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    evidence = read_evidence(data, signatures.usual_trust_list())
    return Scored(
        name, prediction, evidence, preview, as_jpeg(picture), size, is_example(name, data)
    )


def as_jpeg(picture: Image.Image) -> bytes:
    """Encode a picture as JPEG for display."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def data_url(jpeg: bytes) -> str:
    """Encode a JPEG file as a data: URL, so that the browser fetches nothing."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
