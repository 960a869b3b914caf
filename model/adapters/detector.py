"""A detector of others: its own preprocessing and its own verdict, our reading of files.

No torch here: what computes is a `Judge`, which `model/adapters/open.py` chooses by a name.
"""

import functools
import re
import sys
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from model.inference.prediction import (
    AnyDetector,
    Picture,
    Pixels,
    Prediction,
    ahead,
    as_source,
    pixels_of,
    predictions,
)


class DetectorError(ValueError):
    """A detector of others that cannot be used; the message says what to do."""


class Judge(Protocol):
    """What makes of images the probability that they are AI-generated.

    `prepare` is called by many threads at once, `score` by one. With `fixed_batches` the last bits
    of a score depend on how many images are scored together, and an evaluation fills up its last
    batch.
    """

    @property
    def fixed_batches(self) -> bool:
        """See the class."""

    def prepare(self, image: Image.Image) -> Any:
        """What `score` takes of an upright RGB image."""

    def score(self, prepared: Sequence[Any]) -> np.ndarray:
        """The probability of fake of each, float64 (B,), 0 to 1 or NaN."""


@dataclass(frozen=True, eq=False, repr=False)
class OtherDetector(AnyDetector):
    """A loaded detector of others, with what `model.inference.detector.ImageDetector` offers for
    prediction.

    `checkpoint` is its name as it was asked for. `meta` has the keys of a checkpoint's that
    verdicts and reports need, and `detector`: the `kind` (hf, timm, file), `name`, and `revision`,
    `sha256` of weights or file and `fake_labels`, where it has them. `asked` is a band (low, high)
    to decide by instead of its own; `reason` says what computes.
    """

    checkpoint: Path
    judge: Judge
    meta: dict[str, Any]
    asked: tuple[float, float] | None
    reason: str
    backend: str = "pil"

    def stream(
        self, images: Iterable[Picture], batch_size: int = 32, start: int = 0
    ) -> Generator[Prediction, None, None]:
        """One prediction per image, in order; an unreadable one carries its reason. `start` as
        `ImageDetector.stream` has it.
        """
        files = map(as_source, images, range(sys.maxsize))
        for names, prepared in ahead(files, self.preprocess_file, batch_size, start):
            failures = {row: item for row, item in enumerate(prepared) if isinstance(item, str)}
            rows = [row for row in range(len(prepared)) if row not in failures]
            probabilities = np.full(len(prepared), np.nan)
            if rows:
                probabilities[rows] = self.score([prepared[row] for row in rows])
            yield from predictions(names, probabilities.tolist(), failures, self.band)

    def preprocess_file(self, image: Picture | Pixels) -> Any:
        """What the detector itself makes of an image, upright and RGB, before it is scored.

        Raises:
            DecodeError, OSError: it cannot be read.
        """
        with pixels_of(image if isinstance(image, Pixels) else as_source(image)) as pixels:
            # A copy: the pixels may be memory that is given back, and the detector may keep it.
            return self.judge.prepare(Image.fromarray(np.array(pixels)))

    def score(self, prepared: Sequence[Any]) -> np.ndarray:
        """The probability of fake of what `preprocess_file` made, after the temperature; float64
        (B,), NaN where the detector gives no finite number.
        """
        return probability_at(self.judge.score(prepared), self.meta["temperature"])

    def logits(self, prepared: Sequence[Any]) -> np.ndarray:
        """The same before the temperature, as the logit of fake minus that of real, float32."""
        return logits_from(self.judge.score(prepared)).astype(np.float32)

    @property
    def fixed_batches(self) -> bool:
        """See `Judge`."""
        return self.judge.fixed_batches

    @functools.cached_property
    def identity(self) -> str:
        """Which detector with which weights or file, and which band: its name and a hash."""
        return f"{self.checkpoint} {super().identity.rpartition(' ')[2]}"

    @property
    def folder_name(self) -> str:
        """What the folder below the runs is called that holds what is made of it."""
        detector = self.meta["detector"]
        return re.sub(r"[^A-Za-z0-9._]+", "-", f"{detector['kind']}-{detector['name']}").strip("-.")


def logits_from(probabilities: np.ndarray) -> np.ndarray:
    """The logits of probabilities, float64; those of 0 and 1 are finite, and the outermost."""
    inside = np.clip(probabilities, _LEAST, 1 - _LEAST)
    return np.log(inside) - np.log1p(-inside)


_LEAST = 2.0**-53
"""The distance of 1 from the float64 number below it."""


def probability_at(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities at a temperature; at 1 they are the detector's own to the last bit."""
    if temperature == 1:
        return probabilities
    return 1 / (1 + np.exp(-logits_from(probabilities) / temperature))


def meta_of(kind: str, name: str, **identity: Any) -> dict[str, Any]:
    """The `meta` of a detector of others that nothing was fitted to."""
    return {
        "detector": {"kind": kind, "name": name, **identity},
        "run": name,
        "step": 0,
        "temperature": 1.0,
        "threshold": 0.5,
        "calibration": None,
        "data": {},
    }
