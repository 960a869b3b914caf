"""Define the base class of all detectors, and helpers without torch that read images, group them in
batches for a detector to score, and make predictions from the scores.

Main entry: `AnyDetector.predict(images, batch_size)`, a method of each loaded detector, such as
that of `load_detector()` (see `docs/python.md`).

- `images`: one image or an iterable of images. An image (type `Picture`) is a path (text or
  `Path`), the bytes of a file, a Pillow image, a uint8 array (height, width, 3) in RGB or (height,
  width) in gray, or an `ImageFile` (a name and a function that reads the bytes).
- `batch_size`: the largest number of images that are scored together (default 32).

It returns a `Prediction`, or a list of them for an iterable: `name`, `probability` of fake (0 to 1,
or None), `verdict` ("no sign of AI", "uncertain", "likely AI" or `UNREADABLE`) and `error` (why an
image is unreadable or its score is not finite, else ""). `TypeError` is raised for a wrong type;
`ValueError` for a wrong array, or, with an iterable, a `batch_size` below 1. `stream(images,
batch_size, start)` takes only an iterable (one image raises `TypeError`) and yields the predictions
one by one.

`DecisionRule` has the `threshold`, `band` (low, high), `identity` (a text: detector and band) and
`verdict(probability)` of a detector. Its `at_rates(max_fpr, max_miss)` returns a copy of the
detector with the band for these highest error rates. `max_fpr` sets the upper end, `max_miss` the
lower one; None (the default) leaves this end as it is. `at_rates()` raises `ValueError` if a rate
is not above 0 and below 0.5, if the detector has no threshold for it, or if only one rate is given
and a threshold was requested. `band_from(threshold)` returns the band (threshold, threshold), in
which no verdict is *uncertain*. For None it returns None: the detector keeps its own band (each
detector has one). It raises `ValueError` if the threshold is not 0 to 1.

`as_source(image, index)` turns a `Picture` into a `Source`: an `ImageFile`, or decoded
`DecodedImage`. An image that has no name is called `image <index>`. `as_file(image, index)` turns a
path or bytes into an `ImageFile`. `pixels_of(source)` is a context manager that yields RGB uint8
(height, width, 3).

`ahead(files, work, batch_size, start)` calls `work(file)` in threads and yields (names, results) of
each batch. The result for an unreadable file is the reason as text, as `done_or_reason(work, file)`
returns it. The batch sizes are those of `group_sizes(batch_size, start)`, which yields 1, 4, 16,
..., then `batch_size`. `start` is the number of images that were done before (default 0), and
`files` are the images after these. If no batch begins at `start`, `ValueError` is raised.
`in_groups(files, work, sizes)` is `ahead()` with the batch sizes `sizes`. `preprocess_ahead(files,
preprocess_file, shape, ...)` calls `preprocess_file(file)` and yields (names, pixels uint8 (B,
*shape, 3), failures row -> reason). `predictions(names, probabilities, failures, band)` yields the
`Prediction` of each row.
"""

import functools
import hashlib
import itertools
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

from devices import cores
from escape import reason_of
from imaging.decode import DecodeError, ImageFile, decoded, read_file
from imaging.opened import bytes_or_pixels
from model.inference.fitness import Notice, notices, score_word
from model.inference.inputs import unreadable
from model.verdict import NOT_FINITE, band_at, band_of, verdict

UNREADABLE = "unreadable"
"""Verdict for a file that is not an image, is damaged, or has a side below `MIN_SIDE_PX`."""

MIN_SIDE_PX = 32
"""Shortest side that gets a verdict, in pixels: no known set has smaller images."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Result for one image.

    `probability` is the probability of fake (AI-generated), 0 to 1, after the temperature. It is
    None if `error` (one line) is set. `verdict` is one of `VERDICTS`, or `UNREADABLE`.
    """

    name: str
    probability: float | None
    verdict: str
    error: str = ""

    def __repr__(self) -> str:
        what = f"error={self.error!r}" if self.error else f"probability={self.probability:.3f}"
        return f"Prediction({self.name!r}, {self.verdict!r}, {what})"


class DecodedImage(NamedTuple):
    """A decoded image: uint8 (height, width, 3) RGB, upright."""

    name: str
    pixels: np.ndarray


Picture: TypeAlias = (
    Path | str | bytes | bytearray | memoryview | Image.Image | np.ndarray | ImageFile
)
"""Accepted types of an image: a path, the bytes of a file, a PIL image, a uint8 array (height,
width, 3) in RGB or (height, width) in gray, or an `ImageFile`, which is read later."""

Source: TypeAlias = ImageFile | DecodedImage
"""One image before preprocessing: a file to read, or decoded pixels."""


Scored: TypeAlias = tuple[Sequence[str], np.ndarray, Mapping[int, str]]
"""A batch: names, probabilities of fake, and failures (row -> reason)."""


class Named(Protocol):
    """An item of `in_groups`: anything with a name."""

    @property
    def name(self) -> str:
        """Name of the item in results."""


def as_source(image: Picture, index: int = 0) -> Source:
    """Convert an image to a `Source`. An image without a name is called `image <index>`.

    An array counts as upright. A PIL image is read as its file if it is not loaded yet; else it is
    turned upright according to its EXIF orientation (`imaging/opened.py`).

    Raises:
        TypeError: not one of the types of `Picture`.
        ValueError: an array of another shape or dtype.
    """
    if isinstance(image, np.ndarray):
        return DecodedImage(f"image {index}", _rgb_of(image))
    if isinstance(image, Image.Image):
        name = str(getattr(image, "filename", "") or f"image {index}")
        try:
            content = bytes_or_pixels(image)
        except DecodeError as error:
            return unreadable(name, _one_line(error))
        if isinstance(content, bytes):
            return ImageFile(name, lambda: content)
        return DecodedImage(name, content)
    if isinstance(image, Picture):
        return as_file(image, index)
    raise _unknown(image)


def _unknown(image: object) -> TypeError:
    return TypeError(
        "an image is a path, the bytes of a file, a PIL image or a NumPy array; got "
        f"{type(image).__name__}"
    )


def as_file(
    image: Path | str | bytes | bytearray | memoryview | ImageFile, index: int = 0
) -> ImageFile:
    """Convert a path or the bytes of a file to an `ImageFile`. Bytes are called `image <index>`."""
    if isinstance(image, ImageFile):
        return image
    if isinstance(image, bytes | bytearray | memoryview):
        data = bytes(image)  # a copy: the caller may reuse the buffer
        return ImageFile(f"image {index}", lambda: data)
    return ImageFile(str(image), lambda: read_file(image))


def _rgb_of(array: np.ndarray) -> np.ndarray:
    """Check an array given by a caller and return it as uint8 (height, width, 3) RGB.

    Raises:
        ValueError: a shape or dtype that `Picture` does not allow.
    """
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not is_image or not array.size:
        raise ValueError(
            f"an array of shape {array.shape} and dtype {array.dtype}, expected uint8 of (height, "
            "width, 3) in RGB or (height, width) in gray; convert it first, and pass several "
            "images as a list"
        )
    if array.ndim == 2:
        return np.repeat(array[:, :, None], 3, axis=2)
    # A copy: torch takes no negative strides, such as those of `bgr[:, :, ::-1]`, and the caller
    # may reuse the array for the next frame of a video.
    return np.array(array, order="C")


@contextmanager
def pixels_of(source: Source) -> Iterator[np.ndarray]:
    """Yield the pixels of an image, uint8 (height, width, 3) RGB, upright. The pixels are valid
    only inside the `with` block.

    Raises:
        DecodeError, OSError: the image cannot be read.
    """
    if isinstance(source, DecodedImage):
        yield source.pixels
        return
    with decoded(source.read()) as pixels:
        yield pixels


def check_side(width: int, height: int) -> None:
    """Refuse an image that is too small for a verdict.

    Raises:
        DecodeError: a side is below `MIN_SIDE_PX`.
    """
    if min(width, height) < MIN_SIDE_PX:
        least = f"each side needs at least {MIN_SIDE_PX} pixels"
        raise DecodeError(f"{width} x {height} pixels: too small to judge; {least}")


def band_from(threshold: float | None) -> tuple[float, float] | None:
    """Return (threshold, threshold), a band without *uncertain*. Return None for None.

    Raises:
        ValueError: the threshold is no number from 0 to 1.
    """
    if threshold is None:
        return None
    if not isinstance(threshold, int | float | np.number) or not 0.0 <= threshold <= 1.0:
        raise ValueError(f"a threshold is a probability, a number from 0 to 1, got {threshold!r}")
    return threshold, threshold


class DecisionRule:
    """Threshold, band and verdict of a detector: from its `meta`, or as requested.

    `checkpoint` is the folder or file of the detector. `asked` is the requested band (low,
    high) or None.
    """

    checkpoint: Path
    meta: Mapping[str, Any]
    asked: tuple[float, float] | None

    def at_rates(self, max_fpr: float | None = None, max_miss: float | None = None) -> Self:
        """Return the same detector with the band for requested error rates.

        At most the share `max_fpr` of real images is called likely AI, and at most the share
        `max_miss` of fakes is called no sign of AI, on images like those of the calibration. None
        keeps the present end of the band. See `model.verdict.band_at`.

        Raises:
            ValueError: a rate is outside 0 to 0.5, the detector has no threshold for it, or only
                one rate is given and a threshold was requested.
        """
        if self.asked and self.asked[0] == self.asked[1] and None in (max_fpr, max_miss):
            raise ValueError(
                f"the threshold {self.asked[1]:g} is in use for both ends of the band, and one "
                "rate moves only one of them: load the detector without a threshold, or give "
                "max_fpr and max_miss in one call"
            )
        band = band_at(self.meta, self.band, max_fpr, max_miss)
        return replace(self, asked=band)  # type: ignore[type-var]

    @property
    def threshold(self) -> float:
        """Probability of fake at or above which an image counts as AI-generated."""
        return float(self.meta["threshold"]) if self.asked is None else self.asked[1]

    @property
    def band(self) -> tuple[float, float]:
        """Band `(low, high)`: below low the verdict is *no sign of AI*, at or above high *likely
        AI*, in between *uncertain*. Both equal the threshold if the detector is not calibrated or a
        threshold was requested.
        """
        return band_of(self.meta) if self.asked is None else self.asked

    @functools.cached_property
    def identity(self) -> str:
        """Identifier of the checkpoint and its band: run, step, and a hash of meta and band."""
        content = json.dumps([self.meta, self.band], sort_keys=True, default=str)
        short = hashlib.sha256(content.encode()).hexdigest()[:8]
        folder = self.checkpoint.absolute()  # `clip` may be a local folder
        return f"{folder.parent.name}/{folder.name} {short}"

    def verdict(self, probability: float) -> str:
        """Return the verdict, one of `VERDICTS`, for a probability of fake."""
        return verdict(probability, self.band)


class AnyDetector(DecisionRule, ABC):
    """Base class of detectors: `predict` and `stream` take images and return predictions."""

    backend: str
    """What decodes the images, such as "pil"."""
    reason: str
    """What computes the score, or why this backend; for the log."""

    def stream(
        self, images: Iterable[Picture], batch_size: int = 32, start: int = 0
    ) -> Generator[Prediction, None, None]:
        """Yield one prediction per image, in order. An unreadable image gets an `error`.

        Threads read and decode at most two batches ahead of the network, so `images` may be
        endless. The first batches are small (1, 4, 16, ...), so that the first prediction comes
        early. `start` is the number of images that the caller skipped; a batch must begin there.
        Then batches and scores are, to the last bit, those of a run over the whole list.

        Raises:
            TypeError: `images` is one image, or cannot be iterated; or, later, an image is not of
                the types of `Picture`.
            ValueError: later, an array has another shape or dtype.
        """
        if isinstance(images, Picture):  # iterating an array would give its rows
            raise TypeError(
                "stream() takes a list of images or another iterable, got one "
                f"{type(images).__name__}; pass it to predict(), or in a list"
            )
        many = hasattr(images, "__iter__") or hasattr(images, "__getitem__")
        # Iterating an open file gives lines, and a mapping keys: no images.
        if not many or hasattr(images, "read") or isinstance(images, Mapping):
            raise _unknown(images)
        return self._stream(images, batch_size, start)

    def _stream(
        self, images: Iterable[Picture], batch_size: int, start: int
    ) -> Generator[Prediction, None, None]:
        files = map(as_source, images, itertools.count())
        for names, probabilities, failures in self._scored(files, batch_size, start):
            yield from predictions(names, probabilities.tolist(), failures, self.band)

    def preprocess_file(self, image: Picture | DecodedImage) -> Any:
        """Return the network's input for an image: uint8 (*preprocess.shape, 3) RGB, or the input
        of a third-party detector.

        Raises:
            DecodeError, OSError: the image cannot be read, or is too small for a verdict.
        """
        with pixels_of(image if isinstance(image, DecodedImage) else as_source(image)) as pixels:
            check_side(*pixels.shape[1::-1])
            return self.prepare(pixels)

    @abstractmethod
    def _scored(self, files: Iterable[Source], batch_size: int, start: int) -> Iterator[Scored]:
        """Yield the scores of each batch of `group_sizes(batch_size, start)`."""

    @abstractmethod
    def prepare(self, pixels: np.ndarray) -> Any:
        """Preprocess an image, uint8 (height, width, 3) RGB, of any size. The pixels are valid only
        during this call.
        """

    # The overloads overlap (a str is an iterable of str, an array of arrays): the first match wins.
    @overload
    def predict(self, images: Picture, batch_size: int = 32) -> Prediction: ...  # type: ignore[overload-overlap]

    @overload
    def predict(self, images: Iterable[Picture], batch_size: int = 32) -> list[Prediction]: ...

    def predict(
        self, images: Picture | Iterable[Picture], batch_size: int = 32
    ) -> Prediction | list[Prediction]:
        """Return the prediction of one image, or a list of predictions in the order of the images.

        A file that cannot be read gives a prediction with an `error` and no probability. Use
        `stream` if a list of all predictions would be too long.

        Raises:
            TypeError: not one of the types of `Picture`.
            ValueError: an array of another shape or dtype.
        """
        if isinstance(images, Picture):
            (prediction,) = self.stream([images], 1)
            return prediction
        return list(self.stream(images, batch_size))

    def __repr__(self) -> str:
        """Return one line: the checkpoint, and the score or probability of *likely AI*."""
        low, high = self.band
        doubt = f", uncertain from {low:.3g}" if low != high else ""
        return (
            f"{type(self).__name__}({self.identity!r}, likely AI from a {score_word(self.meta)} of "
            f"{high:.3g}{doubt})"
        )

    @property
    def notices(self) -> list[Notice]:
        """Known reasons not to rely on this detector; may be empty."""
        return notices(self.meta, self.band)


def predictions(
    names: Sequence[str],
    probabilities: Sequence[float],
    failures: Mapping[int, str],
    band: tuple[float, float],
) -> Iterator[Prediction]:
    """Yield the predictions of a batch. A row in `failures` (row -> reason) gets its reason as
    `error`; a row whose score is not finite gets `NOT_FINITE`.
    """
    for row, (name, value) in enumerate(zip(names, probabilities, strict=True)):
        error = failures.get(row) or ("" if math.isfinite(value) else NOT_FINITE)
        if error:
            yield Prediction(name=name, probability=None, verdict=UNREADABLE, error=error)
        else:
            yield Prediction(name=name, probability=value, verdict=verdict(value, band))


def threads() -> int:
    """Return the number of worker threads: one per CPU core, at most 16."""
    return min(16, cores())


def group_sizes(batch_size: int, start: int = 0) -> Iterator[int]:
    """Yield batch sizes without end: 1, 4, 16, ..., then always `batch_size`. The first batches are
    small so that the first verdict comes early.

    `start` skips that many images; a batch must begin there.

    Raises:
        ValueError: no batch begins at `start`, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
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
    """Apply `work` to each file in threads. Yield batches of `group_sizes`: (names, results).

    The result for a file that cannot be read is the reason, a string. The threads work at most two
    batches ahead.
    """
    yield from in_groups(files, work, group_sizes(batch_size, start))


def in_groups(
    files: Iterable[Named], work: Callable[[Any], Any], sizes: Iterable[int]
) -> Iterator[tuple[list[str], list[Any]]]:
    """Apply `work` to items in threads. Yield (names, results) in batches of the given `sizes`."""
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
    shape: tuple[int, int],
    batch_size: int,
    start: int = 0,
) -> Iterator[tuple[list[str], np.ndarray, dict[int, str]]]:
    """Preprocess images in threads, ahead of the network. Yield batches: names, pixels uint8
    (B, *shape, 3), and failures (row -> reason), whose rows are black.
    """
    for names, images in ahead(files, preprocess_file, batch_size, start):
        failures = {row: image for row, image in enumerate(images) if isinstance(image, str)}
        pixels = np.zeros((len(images), *shape, 3), np.uint8)
        for row, image in enumerate(images):
            if row not in failures:
                pixels[row] = image
        yield names, pixels, failures


def done_or_reason(work: Callable[[Any], Any], file: Named) -> Any:
    """Return `work(file)`, or the reason (a string of one line) if the image cannot be read or
    preprocessed.
    """
    try:
        return work(file)
    except (ValueError, OSError) as error:  # ValueError: preprocessing failed
        return _one_line(error)
    except MemoryError:
        return "not enough memory to read it"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return reason_of(error, longest=1000)
