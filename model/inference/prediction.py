"""What every detector shares, with torch or without: images to read, verdicts to give."""

import functools
import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imaging.decode import DecodeError, ImageFile, read_file
from model.verdict import NOT_FINITE, band_of, verdict
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


def as_file(image: Path | str | bytes | ImageFile, index: int = 0) -> ImageFile:
    """A path or the bytes of a file as an `ImageFile`; bytes are called by their `index`."""
    if isinstance(image, ImageFile):
        return image
    if isinstance(image, bytes):
        return ImageFile(f"image {index}", lambda: image)
    return ImageFile(str(image), lambda: read_file(image))


def check_threshold(asked: float | None) -> None:
    """A threshold that a person asks for is a probability.

    Raises:
        ValueError: it is outside 0 to 1.
    """
    if asked is not None and not 0.0 <= asked <= 1.0:
        raise ValueError(f"a threshold is a probability, 0 to 1, got {asked}")


class DecisionRule:
    """What a detector decides by, with torch or without: its `meta`, or a threshold that was asked
    for instead. `checkpoint` is the folder or file that it came from.
    """

    checkpoint: Path
    meta: dict[str, Any]
    asked: float | None

    @property
    def threshold(self) -> float:
        """From this probability of fake on, an image counts as AI-generated."""
        return float(self.meta["threshold"] if self.asked is None else self.asked)

    @property
    def band(self) -> tuple[float, float]:
        """`(low, high)`: below low an image is no sign of AI, from high on likely AI, and between
        them uncertain. Both are the threshold where nothing is calibrated, or one was asked for.
        """
        return band_of(self.meta) if self.asked is None else (self.asked, self.asked)

    @functools.cached_property
    def identity(self) -> str:
        """Which checkpoint with which band: run, step, and a hash of its meta and the band."""
        content = json.dumps([self.meta, self.band], sort_keys=True, default=str)
        short = hashlib.sha256(content.encode()).hexdigest()[:8]
        return f"{self.checkpoint.parent.name}/{self.checkpoint.name} {short}"

    def verdict(self, probability: float) -> str:
        """One of `VERDICTS`."""
        return verdict(probability, self.band)


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
    files: Iterable[ImageFile], work: Callable[[ImageFile], Any], batch_size: int, start: int = 0
) -> Iterator[tuple[list[str], list[Any]]]:
    """Names and what `work` made of each file, in groups of `group_sizes`; an error is its reason,
    a string. Threads work ahead, on at most two groups.
    """
    files, waiting = iter(files), deque[tuple[str, Future]]()
    pool = ThreadPoolExecutor(threads(), thread_name_prefix="decode")
    more = True
    try:
        for size in group_sizes(batch_size, start):
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
    files: Iterable[ImageFile],
    preprocess_file: Callable[[ImageFile], np.ndarray],
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


def done_or_reason(work: Callable[[ImageFile], Any], file: ImageFile) -> Any:
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
