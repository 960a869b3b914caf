"""A Python file with `predict(images: list[PIL.Image.Image]) -> list[float]` as a detector."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.adapters.detector import DetectorError, OtherDetector, meta_of
from model.inference.prediction import band_from
from storage import sha256_of

FUNCTION = "predict"


@dataclass(frozen=True, eq=False)
class FileJudge:
    """The function `predict` of a file, and what it gives held against what it promises."""

    file: Path
    predict: Callable[[list[Image.Image]], Any]
    fixed_batches: bool = False

    def prepare(self, image: Image.Image) -> Image.Image:
        """The image itself: the file has its own preprocessing."""
        return image

    def score(self, prepared: Sequence[Image.Image]) -> np.ndarray:
        """The probability of fake of each image.

        Raises:
            DetectorError: the function failed, or gave something else than a number from 0 to 1 for
                each.
        """
        try:
            given = self.predict(list(prepared))
        except Exception as error:
            raise DetectorError(
                f"{self.file}: {FUNCTION} failed on {len(prepared)} images: {_said(error)}"
            ) from error
        try:
            values = np.asarray(given, np.float64)
        except (TypeError, ValueError) as error:
            raise DetectorError(self._expected(len(prepared), type(given).__name__)) from error
        if values.shape != (len(prepared),):
            raise DetectorError(self._expected(len(prepared), f"an array of {values.shape}"))
        outside = values[(values < 0) | (values > 1)]  # NaN is neither
        if len(outside):
            raise DetectorError(self._expected(len(prepared), f"{outside[0]:g} among them"))
        return values

    def _expected(self, count: int, found: str) -> str:
        return (
            f"{self.file}: {FUNCTION} of {count} images gave {found}; expected {count} numbers "
            "from 0 to 1, the probability that each is AI-generated"
        )


def open_file(path: Path, *, trust: bool, threshold: float | None = None) -> OtherDetector:
    """Run a Python file and take its function `predict`.

    Raises:
        DetectorError: it is not trusted, not there, fails, or has no such function.
    """
    if not path.is_file():
        raise DetectorError(f"there is no file {path}; name a Python file with `{FUNCTION}`")
    if not trust:
        raise DetectorError(
            f"{path} is a program, which would run with all your rights; read it, then say --trust"
        )
    spec = importlib.util.spec_from_file_location(f"detector_{path.stem}", path)
    assert spec and spec.loader  # by its ending it is Python
    module = importlib.util.module_from_spec(spec)
    # As with `python FILE`: what lies beside it can be imported.
    if (folder := str(path.parent.absolute())) not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise DetectorError(f"{path} cannot be run: {_said(error)}") from error
    function = getattr(module, FUNCTION, None)
    if not callable(function):
        raise DetectorError(
            f"{path} has no function `{FUNCTION}`; expected {FUNCTION}(images: list[PIL.Image]) -> "
            "list[float]"
        )
    meta = meta_of("file", path.name, sha256=sha256_of(path))
    reason = f"{path.name}, a program of others that is trusted"
    return OtherDetector(path, FileJudge(path, function), meta, band_from(threshold), reason)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
