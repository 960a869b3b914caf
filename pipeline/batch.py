"""THE MEMORY CONTRACT: what a backend is asked for, what it answers, and what leaves the loader."""

import io
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from pipeline.augment import AugmentBatch


class LoadError(ValueError):
    """Batches cannot be had; the message says why and what to do."""


def _black_pixel() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


PLACEHOLDER = _black_pixel(), "PNG", 1
"""Data, format and orientation that stand in for a sample whose bytes cannot be read."""


@dataclass(frozen=True, kw_only=True)
class BatchTiming:
    """What a batch took, for `LoaderStats`: seconds spent reading and decoding it, and how many
    batches were waiting, ready, when it was asked for.

    With DALI, reading is the time that its feed waited for bytes, and decoding the rest of the
    time that it was waited for; with Pillow both are a worker's own time.
    """

    read_s: float = 0.0
    decode_s: float = 0.0
    ready: int = 0


@dataclass(frozen=True, eq=False)
class Request:
    """Encoded images of one batch with the parameters of each.

    `formats` and `orientations` are what the index says of the bytes. `failures` names samples
    that could not be read (row -> reason); in their rows stands `PLACEHOLDER`.
    """

    data: list[bytes]
    formats: list[str]
    orientations: list[int]
    params: AugmentBatch
    failures: dict[int, str] = field(default_factory=dict)
    read_s: float = 0.0


@dataclass(frozen=True, eq=False)
class Pixels:
    """A decoded batch: uint8 (B, size, size, 3) RGB, black where `failures` (row -> reason)."""

    images: torch.Tensor
    failures: dict[int, str]
    timing: BatchTiming = field(default_factory=BatchTiming)

    def pin_memory(self) -> "Pixels":
        """The same in page-locked memory; torch's DataLoader looks for this method."""
        return Pixels(self.images.pin_memory(), self.failures, self.timing)


@dataclass(frozen=True, eq=False)
class Batch:
    """The images of one step, on one device.

    `images` is uint8 (B, 3, size, size) with channels_last strides; normalization happens inside
    the model. `labels` is int64 (B,), 0 real, 1 fake. `valid` is bool (B,), False for padding and
    for images that could not be decoded: they are black and must not count. On the host stay
    `samples` int64 (B,), the row numbers of the shard set, `sources` int32 (B,), the code of each
    one's source, `replayed` bool (B,), True for old samples, and `failures`, which names what could
    not be decoded (row -> reason).
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
