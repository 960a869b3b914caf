"""Define the data classes that are passed between the loader and its two decoding backends (Pillow
and DALI).

Main entry: `Batch`, which the loader yields for each step. Its images, uint8 (B, 3, size, size),
its labels (0 real, 1 fake) and `valid` (False for padding and for images that cannot be decoded)
are tensors on the device. On the CPU are `samples` (the images' row numbers in the shard set),
`sources` (int32 numbers of their sources in the set), `replayed` (True for old samples) and
`failures` (position in the batch -> reason).

A backend takes a `Request` (encoded images of one batch and the augmentation parameters of each)
and returns `Pixels` (uint8 (B, size, size, 3) RGB, and a dict, position in the batch -> reason, for
images that cannot be decoded). `BatchTiming` has the seconds of reading and decoding a batch.
`LoadError` means that no batches can be made. `PLACEHOLDER` (bytes, format and orientation of a
black PNG) replaces a sample that cannot be read.
"""

import io
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from pipeline.augment import AugmentBatch


class LoadError(ValueError):
    """Batches cannot be made; the message says why and what to do."""


def _black_pixel() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


PLACEHOLDER = _black_pixel(), "PNG", 1
"""Data, format and orientation that replace a sample whose bytes cannot be read."""


@dataclass(frozen=True, kw_only=True)
class BatchTiming:
    """Time of one batch, for `LoaderStats`: seconds of reading and of decoding, and `ready`, the
    number of finished batches in the queue when this one was requested.

    With Pillow, both times are a worker's own. With DALI, `read_s` is the time that DALI waited for
    bytes, and `decode_s` the rest of the time until the batch was finished.
    """

    read_s: float = 0.0
    decode_s: float = 0.0
    ready: int = 0


@dataclass(frozen=True, eq=False)
class Request:
    """Encoded images of one batch and the parameters of each.

    `formats` and `orientations` are from the index. `failures` maps the row of a sample that could
    not be read to the reason; the row's data is `PLACEHOLDER`. `read_s` is seconds.
    """

    data: list[bytes]
    formats: list[str]
    orientations: list[int]
    params: AugmentBatch
    failures: dict[int, str] = field(default_factory=dict)
    read_s: float = 0.0


@dataclass(frozen=True, eq=False)
class Pixels:
    """Decoded batch: `images` uint8 (B, size, size, 3) RGB, black in the rows of `failures` (row ->
    reason).
    """

    images: torch.Tensor
    failures: dict[int, str]
    timing: BatchTiming = field(default_factory=BatchTiming)

    def pin_memory(self) -> "Pixels":
        """Copy to page-locked memory. torch's DataLoader calls this method."""
        return Pixels(self.images.pin_memory(), self.failures, self.timing)


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of one step, on one device.

    - `images`: uint8 (B, 3, size, size), channels_last strides. The network normalizes them.
    - `labels`: int64 (B,), 0 real, 1 fake.
    - `valid`: bool (B,), False for padding and for images that could not be decoded. Those images
      are black (padding repeats sample 0) and must not count.

    On the CPU:

    - `samples`: int64 (B,), row numbers in the shard set.
    - `sources`: int32 (B,), the source code of each sample.
    - `replayed`: bool (B,), True for old samples.
    - `failures`: row -> the reason why it could not be decoded.
    """

    images: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    samples: np.ndarray
    sources: np.ndarray
    replayed: np.ndarray
    failures: dict[int, str]
    timing: BatchTiming = field(default_factory=BatchTiming)

    def __len__(self) -> int:
        return len(self.samples)
