"""What every detector shares, with torch or without: images to read, verdicts to give.

`docs/python.md` is the page about it.
"""

import functools
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeAlias, overload

import numpy as np
from PIL import Image

from imaging.decode import DecodeError, ImageFile, decoded, read_file
from imaging.orientation import orientation_left, upright
from imaging.rgb import PixelError, to_rgb
from model.inference.fitness import Notice, notices, word_for
from model.verdict import NOT_FINITE, band_at, band_of, verdict
from storage import cores

UNREADABLE = "unreadable"
"""The verdict of a file that is no image, or a damaged one."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """`probability` is that of fake (AI-generated), 0 to 1, after the checkpoint's temperature;
    None with an `error` (one line) instead. `verdict` is one of `VERDICTS`, or `UNREADABLE`.
    """

    name: str
    probability: float | None
    verdict: str
    error: str = ""

    def __repr__(self) -> str:
        what = f"error={self.error!r}" if self.error else f"probability={self.probability:.3f}"
        return f"Prediction({self.name!r}, {self.verdict!r}, {what})"


class Pixels(NamedTuple):
    """An image that is decoded already: uint8 (height, width, 3) RGB, upright."""

    name: str
    pixels: np.ndarray


Picture: TypeAlias = Path | str | bytes | Image.Image | np.ndarray | ImageFile
"""What a detector takes as one image: a path, the bytes of a file, an image of Pillow, a uint8
array (height, width, 3) of RGB or (height, width) of gray, or what is read when its turn comes."""

Source: TypeAlias = ImageFile | Pixels
"""One image on its way to the network: to be read, or decoded already."""


class Named(Protocol):
    """What is worked on ahead of time."""

    @property
    def name(self) -> str:
        """What it is called in a result."""


def as_source(image: Picture, index: int = 0) -> Source:
    """An image as a `Source`; what has no name is called by its `index`.

    An array is taken as it is, upright. An image of Pillow is turned upright by the EXIF that it
    carries, if any.

    Raises:
        TypeError: it is no image of a known kind.
        ValueError: an array of another shape or dtype.
    """
    if isinstance(image, np.ndarray):
        return Pixels(f"image {index}", _rgb_of(image))
    if isinstance(image, Image.Image):
        name = str(getattr(image, "filename", "") or f"image {index}")
        try:
            image.load()
            return Pixels(
                name, np.ascontiguousarray(upright(to_rgb(image), orientation_left(image)))
            )
        except (PixelError, OSError) as error:
            return ImageFile(name, functools.partial(_refuse, _one_line(error)))
    if isinstance(image, Path | str | bytes | ImageFile):
        return as_file(image, index)
    raise _unknown(image)


def _unknown(image: object) -> TypeError:
    return TypeError(
        "an image is a path, the bytes of a file, a PIL image or a NumPy array; got "
        f"{type(image).__name__}"
    )


def as_file(image: Path | str | bytes | ImageFile, index: int = 0) -> ImageFile:
    """A path or the bytes of a file as an `ImageFile`; bytes are called by their `index`."""
    if isinstance(image, ImageFile):
        return image
    if isinstance(image, bytes):
        return ImageFile(f"image {index}", lambda: image)
    return ImageFile(str(image), lambda: read_file(image))


def _refuse(reason: str) -> bytes:
    raise DecodeError(reason)


def _rgb_of(array: np.ndarray) -> np.ndarray:
    """The pixels of an array that a person gave.

    Raises:
        ValueError: another shape or dtype than `Picture` says.
    """
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not is_image or not array.size:
        raise ValueError(
            f"an array of shape {array.shape} and dtype {array.dtype}, expected uint8 of (height, "
            "width, 3) in RGB or (height, width) in gray; convert it first, many as a list of them"
        )
    return np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else array


@contextmanager
def pixels_of(source: Source) -> Iterator[np.ndarray]:
    """The pixels of an image, uint8 (height, width, 3) RGB, upright, as long as the block lasts.

    Raises:
        DecodeError, OSError: it cannot be read.
    """
    if isinstance(source, Pixels):
        yield source.pixels
        return
    with decoded(source.read()) as pixels:
        yield pixels


def band_from(threshold: float | None) -> tuple[float, float] | None:
    """The band without *uncertain* that a threshold means; None for none.

    Raises:
        ValueError: the threshold is outside 0 to 1.
    """
    if threshold is None:
        return None
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"a threshold is a probability, 0 to 1, got {threshold}")
    return threshold, threshold


class DecisionRule:
    """What a detector decides by, with torch or without: its `meta`, or `asked`, a band (low, high)
    that a person asked for instead. `checkpoint` is the folder or file that it came from.
    """

    checkpoint: Path
    meta: dict[str, Any]
    asked: tuple[float, float] | None

    def at_rates(self, max_fpr: float | None = None, max_miss: float | None = None) -> Self:
        """The same detector, which decides so that at most the share `max_fpr` of real images is
        called likely AI and at most the share `max_miss` of fakes no sign of AI, on images like
        those of its calibration; see `model.verdict.band_at`.

        Raises:
            ValueError: a rate is outside 0 to 0.5, or the detector has no threshold for it.
        """
        return replace(self, asked=band_at(self.meta, max_fpr, max_miss))  # type: ignore[type-var]

    @property
    def threshold(self) -> float:
        """From this probability of fake on, an image counts as AI-generated."""
        return float(self.meta["threshold"]) if self.asked is None else self.asked[1]

    @property
    def band(self) -> tuple[float, float]:
        """`(low, high)`: below low an image is no sign of AI, from high on likely AI, and between
        them uncertain. Both are the threshold where nothing is calibrated, or one was asked for.
        """
        return band_of(self.meta) if self.asked is None else self.asked

    @functools.cached_property
    def identity(self) -> str:
        """Which checkpoint with which band: run, step, and a hash of its meta and the band."""
        content = json.dumps([self.meta, self.band], sort_keys=True, default=str)
        short = hashlib.sha256(content.encode()).hexdigest()[:8]
        return f"{self.checkpoint.parent.name}/{self.checkpoint.name} {short}"

    def verdict(self, probability: float) -> str:
        """One of `VERDICTS`."""
        return verdict(probability, self.band)


class AnyDetector(DecisionRule, ABC):
    """A detector, with torch or without: images in, predictions out."""

    @abstractmethod
    def stream(
        self, images: Iterable[Picture], batch_size: int = 32
    ) -> Generator[Prediction, None, None]:
        """One prediction per image, in order; an unreadable one carries its reason."""

    # A text is an iterable of texts too, an array one of arrays: the first one that fits counts.
    @overload
    def predict(self, images: Picture, batch_size: int = 32) -> Prediction: ...  # type: ignore[overload-overlap]

    @overload
    def predict(self, images: Iterable[Picture], batch_size: int = 32) -> list[Prediction]: ...

    def predict(
        self, images: Picture | Iterable[Picture], batch_size: int = 32
    ) -> Prediction | list[Prediction]:
        """The prediction of one image, or of many a list in their order.

        A file that cannot be read is a prediction with an `error` and no probability. `stream` is
        for more images than a list should hold.

        Raises:
            TypeError: no image of a known kind (see `Picture`).
            ValueError: an array of another shape or dtype.
        """
        if isinstance(images, Path | str | bytes | Image.Image | np.ndarray | ImageFile):
            (prediction,) = self.stream([images], 1)
            return prediction
        if not hasattr(images, "__iter__"):
            raise _unknown(images)
        return list(self.stream(images, batch_size))

    def __repr__(self) -> str:
        """One line: which checkpoint, where likely AI begins, and what its number is."""
        low, high = self.band
        doubt = f", uncertain from {low:.3g}" if low != high else ""
        return (
            f"{type(self).__name__}({self.identity!r}, likely AI from a {word_for(self.meta)} of "
            f"{high:.3g}{doubt})"
        )

    @property
    def notices(self) -> list[Notice]:
        """What speaks against relying on it; often nothing."""
        return notices(self.meta)


def predictions(
    names: Sequence[str],
    probabilities: Sequence[float],
    failures: Mapping[int, str],
    band: tuple[float, float],
) -> Iterator[Prediction]:
    """A group's predictions; of the rows in `failures` (row -> reason), and of those whose score is
    not finite, the reason.
    """
    for row, (name, value) in enumerate(zip(names, probabilities, strict=True)):
        error = failures.get(row) or ("" if math.isfinite(value) else NOT_FINITE)
        if error:
            yield Prediction(name=name, probability=None, verdict=UNREADABLE, error=error)
        else:
            yield Prediction(name=name, probability=value, verdict=verdict(value, band))


def threads() -> int:
    """One per processor core, up to 16."""
    return min(16, cores())


def group_sizes(batch_size: int, start: int = 0) -> Iterator[int]:
    """How many images are scored together: 1, 4, 16, ... and then always `batch_size`, so that the
    first verdict comes early. `start` is the position in the list at which to begin, the first one
    of a group.

    Raises:
        ValueError: no group begins at `start`.
    """
    position, size = 0, 1
    while True:
        if position >= start:
            if position > start:
                raise ValueError(f"no group of {batch_size} begins at image {start}")
            yield size
            start += size
        position += size
        size = min(4 * size, batch_size)


def ahead(
    files: Iterable[Source], work: Callable[[Any], Any], batch_size: int, start: int = 0
) -> Iterator[tuple[list[str], list[Any]]]:
    """Names and what `work` made of each file, in groups of `group_sizes`; an error is its reason,
    a string. Threads work ahead, on at most two groups.
    """
    yield from in_groups(files, work, group_sizes(batch_size, start))


def in_groups(
    files: Iterable[Named], work: Callable[[Any], Any], sizes: Iterable[int]
) -> Iterator[tuple[list[str], list[Any]]]:
    """As `ahead`, in groups of `sizes`, of anything that has a name."""
    files, waiting = iter(files), deque[tuple[str, Future]]()
    pool = ThreadPoolExecutor(threads(), thread_name_prefix="decode")
    more = True
    try:
        for size in sizes:
            while more and len(waiting) < 2 * size:
                if (file := next(files, None)) is None:
                    more = False
                else:
                    waiting.append((file.name, pool.submit(done_or_reason, work, file)))
            group = [waiting.popleft() for _ in range(min(size, len(waiting)))]
            if not group:
                return
            yield [name for name, _ in group], [future.result() for _, future in group]
    finally:
        pool.shutdown(cancel_futures=True)


def preprocess_ahead(
    files: Iterable[Source],
    preprocess_file: Callable[[Any], np.ndarray],
    size: int,
    batch_size: int,
    start: int = 0,
) -> Iterator[tuple[list[str], np.ndarray, dict[int, str]]]:
    """Groups of images as a network sees them, ahead of time: names, uint8 (B, size, size, 3), and
    the rows that could not be read (row -> reason), which stay black. `preprocess_file` makes one.
    """
    for names, images in ahead(files, preprocess_file, batch_size, start):
        failures = {row: image for row, image in enumerate(images) if isinstance(image, str)}
        pixels = np.zeros((len(images), size, size, 3), np.uint8)
        for row, image in enumerate(images):
            if row not in failures:
                pixels[row] = image
        yield names, pixels, failures


def done_or_reason(work: Callable[[Any], Any], file: Named) -> Any:
    """What `work` makes of a file; where it cannot be read, the reason, a string of one line."""
    try:
        return work(file)
    except (DecodeError, OSError) as error:
        return _one_line(error)
    except MemoryError:
        return "more memory would be needed than there is"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
