"""Score images with a network: take batches of images or stored features, and return one logit
each.

Main entry: `score_set(net, loader, dtype, on_images, dist)` scores every sample of a shard set
(packed images) once. With several ranks, all call it; they share the work, and each gets all
scores.

- `net`: a torch module on the loader's device, such as a `Detector`; returns logits (B, 2), real
  and fake. It is set to evaluation mode, and back at the end.
- `loader`: a `BatchLoader` of the set, made by `open_scored()` in `model/features/loader.py`.
- `dtype`: the torch dtype of mixed precision (default `torch.float32`: no mixed precision).
- `on_images`: None (the default), or a function that is called as `on_images(n)` after each batch
  of this rank; n counts the decodable images of this batch only.
- `dist`: a `DistEnv` (from `init_distributed()`), or None (the default) for one process.

It returns `Scores`, sorted by sample: the arrays `samples` (row numbers in the set), `labels` (0
real, 1 fake) and `logits` (float32, fake minus real, before any temperature), and `failures`, a
dict, row number -> why the image could not be decoded. An image in `failures` is not in the arrays.
It raises `ScoreError` for a score that is not finite, and what the loader raises for a set that
cannot be scored (`LoadError`, `OrderError`, `FeatureError`). All are `ValueError`s. After a
signal to one rank in a block of `interrupts.stop_signals()`, every rank raises `Stopped`
(interrupts.py).

`score(net, batches, device, dtype, on_images)` returns the `Scores` of an iterable of `Batch`,
finite or not; it sets the evaluation mode too. `logits_of(net, images, device, dtype)` does not; it
returns the logits of one batch as a tensor.

`join_ranks(parts)` merges the `Scores` of all ranks, `join_failures(parts)` their failures.
`in_parts(images, size)` regroups tensors into parts of `size` rows (`AT_A_TIME` by default; the
last is padded with zeros). `autocast(device, dtype)` returns a context for mixed precision.
`evaluating(net)` is the context manager for the evaluation mode. `DEFAULT_THRESHOLD` is the
decision threshold without calibration. `probability()` of `model/verdict.py` converts logits to
probabilities.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import interrupts
from model.distributed import DistEnv, all_gather_object
from pipeline.batch import Batch
from pipeline.stream import BatchLoader, evaluation_batches

DEFAULT_THRESHOLD = 0.5
"""Decision threshold on the probability of fake for uncalibrated checkpoints."""


class ScoreError(ValueError):
    """Scores that are not finite. The message names the images."""


@dataclass(frozen=True, eq=False)
class Scores:
    """One row per scored image.

    `samples` are row indices in the shard set (int64), `labels` are int64, `logits` are float32:
    the logit of fake minus the logit of real, before any temperature. `failures` maps each sample
    that could not be decoded to the reason.
    """

    samples: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    failures: dict[int, str]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Return a context for mixed precision on `device`. For float32 it does nothing."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def logits_of(
    net: nn.Module, images: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Return the logit of fake minus the logit of real per image, float32 (B,), on the device."""
    with torch.inference_mode(), autocast(device, dtype):
        real, fake = net(images).float().unbind(1)
        return fake - real


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Set the network to evaluation mode and restore its mode when the block ends."""
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)


def score(
    net: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    on_images: Callable[[int], None] | None = None,
) -> Scores:
    """Score every valid image of `batches`. `on_images(n)` is called with the number of valid
    images of each batch.

    The network gets `AT_A_TIME` images at a time, whatever the size of a batch.
    """
    samples, labels, valid, failures = [], [], [], {}

    def noted() -> Iterator[torch.Tensor]:
        for batch in batches:
            samples.append(batch.samples)
            labels.append(batch.labels.cpu().numpy())
            valid.append(batch.valid.cpu().numpy())
            failures.update({int(batch.samples[row]): why for row, why in batch.failures.items()})
            yield batch.images
            if on_images:
                on_images(int(valid[-1].sum()))

    with evaluating(net):
        parts = [logits_of(net, images, device, dtype).cpu() for images in in_parts(noted())]
    rows = np.concatenate(valid)
    logits = torch.cat(parts).numpy()[: len(rows)][rows]
    return Scores(np.concatenate(samples)[rows], np.concatenate(labels)[rows], logits, failures)


AT_A_TIME = 32
"""Number of images per forward pass, always the same. The shape of the input decides the order of
floating-point sums, and so the last bits of a score; they must not depend on a loader's batch size.
"""


def in_parts(images: Iterable[torch.Tensor], size: int = AT_A_TIME) -> Iterator[torch.Tensor]:
    """Regroup images, (`size`, 3, H, W) in channels_last, or features, (`size`, D), into parts of
    `size` rows in the same order. The last part is padded with zeros.
    """
    held: torch.Tensor | None = None
    for more in images:
        held = more if held is None else torch.cat([held, more])
        while len(held) >= size:
            yield _contiguous(held[:size])
            held = held[size:]
    if held is not None and len(held):
        filling = held.new_zeros((size - len(held), *held.shape[1:]))
        yield _contiguous(torch.cat([held, filling]))


def _contiguous(images: torch.Tensor) -> torch.Tensor:
    layout = torch.channels_last if images.ndim == 4 else torch.contiguous_format
    return images.contiguous(memory_format=layout)


def score_set(
    net: nn.Module,
    loader: BatchLoader,
    dtype: torch.dtype = torch.float32,
    on_images: Callable[[int], None] | None = None,
    dist: DistEnv | None = None,
) -> Scores:
    """Score every sample of the loader's shard set exactly once, shared by all ranks. Every rank
    returns the scores of all samples, in the order of the index.

    Raises:
        ScoreError: a score is not finite.
        Stopped: a signal to stop came to a rank in a block of `interrupts.stop_signals()`.
        RuntimeError: the scored and failed samples are not those of the index (a bug of this
            program).
    """
    rank_scores: Scores | None
    try:  # without exchanges between ranks; all ranks raise `Stopped` below
        with interrupts.stoppable():
            rank_scores = score(net, evaluation_batches(loader), loader.device, dtype, on_images)
    except interrupts.Stopped:
        rank_scores = None
    parts = all_gather_object(dist or DistEnv(), rank_scores)
    if None in parts:
        raise interrupts.Stopped
    scores = join_ranks([part for part in parts if part])
    covered = np.sort(np.concatenate([scores.samples, [*scores.failures]]).astype(np.int64))
    if not np.array_equal(covered, np.arange(len(loader.shards))):
        raise RuntimeError(
            f"{len(covered)} samples were scored in {loader.shards.describe()}, expected "
            f"{len(loader.shards)}"
        )
    bad = scores.samples[~np.isfinite(scores.logits)]
    if len(bad):
        raise ScoreError(
            f"{len(bad)} of {len(scores.samples)} scores of {loader.shards.describe()} are not "
            f"finite, first: {loader.shards.name(bad[0])}. The weights or the precision cause "
            "this: use another checkpoint or, in training, --set run.precision=fp32"
        )
    return scores


def join_ranks(parts: list[Scores]) -> Scores:
    """Merge the scores of all ranks, sorted in the order of the index."""
    columns = ("samples", "labels", "logits")
    samples, labels, logits = (np.concatenate([getattr(p, n) for p in parts]) for n in columns)
    order = np.argsort(samples, kind="stable")
    failures = join_failures(part.failures for part in parts)
    return Scores(samples[order], labels[order], logits[order], failures)


def join_failures(parts: Iterable[Mapping[int, str]]) -> dict[int, str]:
    """Merge the failures of all ranks, sample -> reason, in the order of the index. So the first
    failure does not depend on the number of ranks.
    """
    return dict(sorted((sample, why) for part in parts for sample, why in part.items()))
