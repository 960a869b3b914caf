"""Use the function `predict(images: list[PIL.Image.Image]) -> list[float]` of a Python file as a
detector.

Main entry: `open_file(path, *, trust, threshold)` runs a Python file and returns an
`OtherDetector`.

- `path`: the `Path` of the file, whatever its suffix.
- `trust`: must be True: the user allows the file to run.
- `threshold`: from 0 to 1. An image with this probability or more is "likely AI", any other "no
  sign of AI". It also holds after a calibration is loaded. None (the default): 0.5, until
  `with_calibration()` (calibration.py) loads thresholds.

The detector's `predict(images, batch_size)` takes one image (a path, the bytes of a file, a Pillow
image or a uint8 RGB array) and returns a `Prediction` (name, probability of fake, verdict, error),
or takes an iterable of images and returns a list. Its `stream(images, batch_size)` takes an
iterable and yields the predictions. `batch_size` is the largest number of images in a call of the
function (default 32). An image that cannot be read, or for which the function returns NaN, has an
`error`, the verdict "unreadable" and the probability None.

`open_file()` raises `DetectorError` (a `ValueError`, of detector.py) if `trust` is false, or if the
file is missing, fails or has no such function. It raises another `ValueError` for a threshold
outside 0 to 1.

`FileJudge` calls the function on upright RGB images and checks the result: one number per image,
the probability of AI-generated, 0 to 1, or NaN. Any other result, or an exception, raises
`DetectorError`, also out of `predict()` of the detector.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
from PIL import Image

import console
from escape import typed_reason_of
from model.adapters.detector import DetectorError, OtherDetector, meta_of
from model.inference.prediction import band_from

FUNCTION = "predict"


@dataclass(frozen=True, eq=False)
class FileJudge:
    """The function `predict` of a file, as a `Judge` that checks the returned values."""

    file: Path
    predict: Callable[[list[Image.Image]], Any]
    fixed_batches: bool = False

    def prepare(self, image: Image.Image) -> Image.Image:
        """Return the image unchanged: preprocessing is part of the file's `predict`."""
        return image

    def score(self, prepared: Sequence[Image.Image]) -> np.ndarray:
        """Return the probability of fake of each image: float64 (B,), 0 to 1 or NaN.

        Raises:
            DetectorError: `predict` failed, or did not return one number from 0 to 1 (or NaN) per
                image.
        """
        try:
            given = self.predict(list(prepared))
        except (Exception, SystemExit) as error:  # SystemExit would end this program silently
            raise DetectorError(
                f"{self.file}: {FUNCTION} failed on {console.counted(len(prepared), 'image')}: "
                f"{typed_reason_of(error)}"
            ) from error
        try:
            values = np.asarray(given, np.float64)
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor with grad
            given_as = f"{type(given).__name__} ({typed_reason_of(error)})"
            raise DetectorError(self._expected(len(prepared), given_as)) from error
        if values.shape != (len(prepared),):
            raise DetectorError(self._expected(len(prepared), f"an array of shape {values.shape}"))
        outside = values[(values < 0) | (values > 1)]  # NaN is in neither
        if len(outside):
            raise DetectorError(self._expected(len(prepared), f"the value {outside[0]:g}"))
        return values

    def _expected(self, count: int, returned: str) -> str:
        images, numbers = console.counted(count, "image"), console.counted(count, "number")
        return (
            f"{self.file}: {FUNCTION} returned {returned} for {images}; expected {numbers} from 0 "
            "to 1, the probability that each image is AI-generated"
        )


class UncachedLoader(SourceFileLoader):
    """Loader that compiles the file each time; `sha256` is the hash of the bytes that ran. Python's
    own loader may run cached code of an earlier file of the same size and time.
    """

    sha256 = ""

    def get_code(self, _fullname: str) -> CodeType:
        """Return the code of the file as it is now."""
        source = Path(self.path).read_bytes()
        self.sha256 = hashlib.sha256(source).hexdigest()
        return self.source_to_code(source, self.path)


def open_file(path: Path, *, trust: bool, threshold: float | None = None) -> OtherDetector:
    """Run a Python file and return its function `predict` as a detector.

    Raises:
        DetectorError: the file is missing, is not trusted, fails, or has no function `predict`.
    """
    if not path.is_file():
        raise DetectorError(f"there is no file {path}; name a Python file that has `{FUNCTION}`")
    if not trust:
        raise DetectorError(
            f"{path} is a program, which would run with all your rights; read it, then add --trust"
        )
    # Without a loader, Python accepts files that end in .py, but not in .PY.
    loader = UncachedLoader(f"detector_{path.stem}", str(path))
    spec = importlib.util.spec_from_file_location(loader.name, path, loader=loader)
    assert spec is not None  # a loader is given
    module = importlib.util.module_from_spec(spec)
    # As with `python FILE`, modules in the same folder can be imported.
    if (folder := str(path.parent.absolute())) not in sys.path:
        sys.path.insert(0, folder)
    # Registered as by an import: dataclasses, pickle and worker processes look modules up by name.
    sys.modules[loader.name] = module
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[loader.name]
        raise DetectorError(f"{path} cannot be run: {typed_reason_of(error)}") from error
    function = getattr(module, FUNCTION, None)
    if not callable(function):
        raise DetectorError(
            f"{path} has no function `{FUNCTION}`; expected {FUNCTION}(images: list[PIL.Image]) -> "
            "list[float]"
        )
    meta = meta_of("file", path.name, sha256=loader.sha256)
    reason = f"{path.name}, a trusted third-party program"
    return OtherDetector(path, FileJudge(path, function), meta, band_from(threshold), reason)
