"""Give a third-party detector the interface of this project's detectors: this project decodes the
images, and the third party's code preprocesses and scores them.

Main entry: `OtherDetector(checkpoint, judge, meta, asked, reason, backend)`.

- `checkpoint`: the name that the user typed, as a `Path`, such as `Path("hf:OWNER/NAME")`.
- `judge`: a `Judge`, any object with these methods and this attribute:
  - `prepare(image)` converts an upright RGB Pillow image to the detector's input. Several threads
    call it.
  - `score(prepared)` converts a list of such inputs to the probabilities of AI-generated, float64
    (B,), 0 to 1 or NaN.
  - `fixed_batches` is True if the last bits of a score depend on the batch size.
- `meta`: a dict with the identity, threshold, temperature and more, from `meta_of()`.
- `asked`: a band (low, high) that is used in place of the one in `meta`; None: the one in `meta`.
- `reason`: a text for the log about the computation, such as "hf on cuda:0, AI-generated: fake".
- `backend`: a text, the image decoder that the log names (default "pil").

`meta_of(kind, name, ...)` returns a `meta` with the threshold 0.5, temperature 1 and no
calibration. Its band is then (0.5, 0.5). `kind` is `hf`, `timm` or `file`. `name` is a text that
reports show and the output folder is named after: OWNER/NAME without `hf:`, or the name of a local
folder or file, without its path. Further keywords, such as `sha256="..."`, identify the weights.
`model/adapters/open.py` opens a detector by name.

`predict(images, batch_size)`, inherited from `AnyDetector`, takes one image and returns a
`Prediction`, or takes an iterable of images and returns a list. `stream(images, batch_size, start)`
takes an iterable and yields one `Prediction` at a time. The batches have 1, 4, 16, ... images, then
always `batch_size` (default 32). To continue an interrupted list, pass the remaining images, and as
`start` (default 0) how many were done. `start` must be the position at which a batch begins, else
`ValueError` is raised. An image is a path, the bytes of a file, a Pillow image, an `ImageFile`, or
a uint8 array (height, width, 3) in RGB or (height, width) in gray. Another type raises `TypeError`,
another array `ValueError`.

Fields of a `Prediction`: `name`, `probability` (0 to 1), `verdict` ("no sign of AI" below the band,
"uncertain" in it, "likely AI" from its upper end on) and `error` ("": none). For an unreadable
image or a score of NaN, `error` has the reason, `probability` is None and `verdict` is
"unreadable".

`logits_from()` converts an array of probabilities to logits, float64. `DetectorError` (a
`ValueError`) is raised by the other modules of this package: for a missing or damaged detector, a
failed download, a library that is not installed, or labels that do not say which of them mean
AI-generated. This module does not import torch.
"""

import functools
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from model.inference.prediction import AnyDetector, Scored, Source, ahead
from model.verdict import probability
from storage import file_name


class DetectorError(ValueError):
    """Raised for a third-party detector that cannot be used; the message says what to do."""


class Judge(Protocol):
    """Interface of the computation: images in, probabilities of AI-generated out."""

    @property
    def fixed_batches(self) -> bool:
        """Whether the last bits of a score depend on the batch size. If so, an evaluation pads its
        last batch.
        """

    def prepare(self, image: Image.Image) -> Any:
        """Return the input of `score` for an upright RGB image. Must be thread-safe."""

    def score(self, prepared: Sequence[Any]) -> np.ndarray:
        """Return the probability of fake of each image: float64 (B,), 0 to 1 or NaN. Called by one
        thread at a time.
        """


@dataclass(frozen=True, eq=False, repr=False)
class OtherDetector(AnyDetector):
    """A loaded third-party detector, with the prediction methods of
    `model.inference.detector.ImageDetector`.

    `checkpoint` is the requested name. `meta` has those keys of a checkpoint's meta that verdicts
    and reports need, and the key `detector`: `kind` (hf, timm, file), `name`, and where they exist
    `revision`, `sha256` (of weights or file) and `fake_labels`. `asked` is a band (low,
    high) that replaces the one of the detector. `reason` describes the computation, for the log.
    `lock` is held while `judge` scores.
    """

    checkpoint: Path
    judge: Judge
    meta: Mapping[str, Any]
    asked: tuple[float, float] | None
    reason: str
    backend: str = "pil"
    lock: threading.RLock = field(default_factory=threading.RLock)

    # Pickled for another process, which has its own copy of the network and needs its own lock.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock())

    def prepare(self, pixels: np.ndarray) -> Any:
        """Return what the detector makes of an image, uint8 (height, width, 3) RGB."""
        # A copy, because the detector may keep the image, and the memory of `pixels` may be reused.
        return self.judge.prepare(Image.fromarray(np.array(pixels)))

    def _scored(self, files: Iterable[Source], batch_size: int, start: int) -> Iterator[Scored]:
        for names, prepared in ahead(files, self.preprocess_file, batch_size, start):
            failures = {row: item for row, item in enumerate(prepared) if isinstance(item, str)}
            rows = [row for row in range(len(prepared)) if row not in failures]
            probabilities = np.full(len(prepared), np.nan)
            if rows:
                probabilities[rows] = self.score([prepared[row] for row in rows])
            yield names, probabilities, failures

    def score(self, prepared: Sequence[Any]) -> np.ndarray:
        """Return the probability of fake of preprocessed images, after the temperature: float64
        (B,), NaN where the detector returns no finite number.

        With a temperature other than 1, it is computed from `logits`, as in a calibration, so that
        an image at a threshold gets the same verdict here and in an evaluation.
        """
        temperature = self.meta["temperature"]
        if temperature == 1:
            return self._judged(prepared)
        return probability(self.logits(prepared), temperature)

    def logits(self, prepared: Sequence[Any]) -> np.ndarray:
        """Return the logit of fake minus the logit of real, before temperature: float32 (B,)."""
        return logits_from(self._judged(prepared)).astype(np.float32)

    def _judged(self, prepared: Sequence[Any]) -> np.ndarray:
        with self.lock:
            return self.judge.score(prepared)

    @property
    def fixed_batches(self) -> bool:
        """See `Judge`."""
        return self.judge.fixed_batches

    @functools.cached_property
    def identity(self) -> str:
        """Identifier of the detector, its weights or file, and its band: name and hash."""
        return f"{self.checkpoint} {super().identity.rpartition(' ')[2]}"

    @property
    def folder_name(self) -> str:
        """Name of the folder, below the runs folder, for this detector's output."""
        detector, typed = self.meta["detector"], str(self.checkpoint)
        path = Path(typed if detector["kind"] == "file" else typed.partition(":")[2])
        return output_name(detector["kind"], detector["name"], path)


def output_name(kind: str, name: str, path: Path) -> str:
    """Return the name of the folder for a detector's output. For a local file or folder, `path`,
    the result contains the name of its folder (many files are called `detector.py`), or for an ONNX
    file in a folder `onnx` the name of the folder above. Letters of all scripts stay.
    """
    place = path.resolve().parent
    place = place.parent if kind == "onnx" and place.name == "onnx" else place
    named = f"{kind}-{place.name}-{name}" if path.exists() else f"{kind}-{name}"
    return file_name(re.sub(r"[^\w.\x80-\U0010ffff]+", "-", named, flags=re.ASCII).strip("-."), "")


def logits_from(probabilities: np.ndarray) -> np.ndarray:
    """Convert probabilities to logits, float64. 0 and 1 give finite logits, the smallest and the
    largest possible.
    """
    inside = np.clip(probabilities, _LEAST, 1 - _LEAST)
    return np.log(inside) - np.log1p(-inside)


_LEAST = 2.0**-53
"""Difference between 1 and the next smaller float64 number."""


def meta_of(kind: str, name: str, **identity: Any) -> dict[str, Any]:
    """Return the `meta` of a third-party detector without calibration."""
    return {
        "detector": {"kind": kind, "name": name, **identity},
        "run": name,
        "step": 0,
        "temperature": 1.0,
        "threshold": 0.5,
        "calibration": None,
        "data": {},
    }
