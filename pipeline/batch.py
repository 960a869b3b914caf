"""Define the data classes that are passed between the loader and its two decoding backends (Pillow
and DALI).

Main entry: `Batch`, which `Loader.batches()` of `pipeline/loader.py` yields for each step, with B
images of (height, width) = `preprocess.shape`. Three fields are tensors on the device:

- `images`: uint8 (B, 3, height, width), RGB.
- `labels`: int64 (B,), 0 real, 1 fake.
- `valid`: bool (B,). False for padding and for images that cannot be decoded, which must not count.

The others are on the CPU, the first three as NumPy arrays:

- `samples`: row numbers of the images in the shard set, int64 (B,).
- `sources`: codes of their sources, int32 (B,): positions in `shards.codes("source")[1]`.
- `replayed`: bool (B,), True for a sample of an old set, which phase 2 mixes with the new ones
  (`pipeline/replay.py`).
- `failures`: a dict, position in the batch -> reason why the image cannot be read or decoded.
- `timing`: a `BatchTiming`: `read_s` and `decode_s`, the seconds of reading and of decoding, and
  `ready`, how many batches were waiting in the queue when this one was taken. With Pillow, waiting
  batches are decoded; with DALI, they are only read. Near 0: loading is slower than the use of the
  batches.

A backend takes a `Request`, the encoded images of one batch, and returns `DecodedBatch`: `images`,
a tensor uint8 (B, height, width, 3) RGB, black where an image failed, and `failures` and `timing`
as above. A `Request` has

- `data`: a list of B image files as bytes.
- `formats`: a list of B names, "JPEG", "PNG" or "WEBP".
- `orientations`: a list of B EXIF orientations, 1 to 8 (1: upright).
- `params`: an `AugmentBatch`, the augmentation parameters of the B images.
- `failures`: as above, for images that cannot be read (default {}). At the position of such an
  image, `data`, `formats` and `orientations` have the values of `PLACEHOLDER`.
- `read_s`: seconds that reading took (default 0).

`labeled_batch(shards, epoch, rows, images, failures, timing)` makes the `Batch` of images that are
on the device, or of their stored features. `epoch` is an `Epoch` of `pipeline/order.py`, `rows` its
`positions()` of a step, and `failures` may hold padding too.

`PLACEHOLDER` is the (bytes, format, orientation) of a black PNG. `LoadError`, a ValueError, means
that no batches can be made.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from imaging.decode import png_of
from pipeline.augment import AugmentBatch
from pipeline.order import Epoch
from sharding.format import ShardSet


class LoadError(ValueError):
    """Batches cannot be made; the message says why and what to do."""


PLACEHOLDER = png_of(np.zeros((1, 1, 3), np.uint8)), "PNG", 1
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
class DecodedBatch:
    """Decoded batch: `images` uint8 (B, height, width, 3) RGB, black in the rows of `failures` (row
    -> reason).
    """

    images: torch.Tensor
    failures: dict[int, str]
    timing: BatchTiming = field(default_factory=BatchTiming)

    def pin_memory(self) -> "DecodedBatch":
        """Copy to page-locked memory. torch's DataLoader calls this method."""
        return DecodedBatch(self.images.pin_memory(), self.failures, self.timing)


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of one step, on one device.

    - `images`: uint8 (B, 3, height, width), channels_last strides. The network normalizes them.
    - `labels`: int64 (B,), 0 real, 1 fake.
    - `valid`: bool (B,), False for padding and for images that could not be decoded. Those images
      are black (padding repeats sample 0) and must not count.

    On the CPU:

    - `samples`: int64 (B,), row numbers in the shard set.
    - `sources`: int32 (B,), the source code of each sample.
    - `replayed`: bool (B,), True for old samples.
    - `failures`: row -> the reason why it could not be decoded. Padding is not in it: sample 0 may
      have been read well before.
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


def labeled_batch(
    shards: ShardSet,
    epoch: Epoch,
    rows: slice,
    images: torch.Tensor,
    failures: Mapping[int, str],
    timing: BatchTiming | None = None,
) -> Batch:
    """Return the batch of the positions `rows` of an epoch, with its labels and sources. `images`
    are on the device. `failures` are by row, also those of padding, which are left out.
    """
    samples, counts = epoch.samples[rows], epoch.valid[rows]
    counted = {row: reason for row, reason in failures.items() if counts[row]}
    valid = counts.copy()
    valid[list(counted)] = False
    labels = shards.column("label")[samples].astype(np.int64)
    return Batch(
        images=images,
        labels=torch.from_numpy(labels).to(images.device, non_blocking=True),
        valid=torch.from_numpy(valid).to(images.device, non_blocking=True),
        samples=samples,
        sources=shards.codes("source")[0][samples],
        replayed=epoch.replayed[rows],
        failures=counted,
        timing=timing or BatchTiming(),
    )
