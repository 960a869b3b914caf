"""Run a network over batches: the one place where images become scores."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from model.distributed import DistEnv, all_gather_object
from pipeline.batch import Batch
from pipeline.stream import BatchLoader, evaluation_batches

DEFAULT_THRESHOLD = 0.5
"""From this probability of fake on an image is called fake, until a calibration says otherwise."""


class ScoreError(ValueError):
    """Scores that say nothing; the message says of which images."""


@dataclass(frozen=True, eq=False)
class Scores:
    """One row per image that was scored.

    `samples` int64 are row numbers of the shard set, `labels` int64, `logits` float32: the logit
    of fake minus that of real, before any temperature. `failures` are rows that could not be
    decoded: sample -> reason.
    """

    samples: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    failures: dict[int, str]


def probability(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """The probability of fake, float64: the softmax of the two logits at a temperature; NaN of a
    logit that is not finite, for it says nothing.
    """
    logits = np.asarray(logits, np.float64)
    finite = np.where(np.isfinite(logits), logits, np.nan)
    with np.errstate(invalid="ignore"):
        # Not 1 / (1 + exp(-x)), which overflows on the way to 0.
        return np.exp(-np.logaddexp(0.0, -finite / temperature))


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision on `device`, or nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def logits_of(
    net: nn.Module, images: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """The logit of fake minus that of real of each image, float32 (B,), on the device."""
    with torch.inference_mode(), autocast(device, dtype):
        real, fake = net(images).float().unbind(1)
        return fake - real


def score_batches(
    net: nn.Module, batches: Iterable[Batch], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Each batch with its logits, float32 (B,); rows that are not valid are NaN."""
    with evaluating(net):
        for batch in batches:
            logits = logits_of(net, batch.images, device, dtype)
            yield batch, logits.masked_fill(~batch.valid, float("nan")).cpu().numpy()


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """The network in evaluation mode, and back as it was."""
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
    """Score every valid image of `batches`; `on_images(n)` is called as they come.

    The network sees `AT_A_TIME` images at a time, however many a batch has.
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
"""Images that the network scores at a time, always: the shape of its input decides how products are
summed up, and so the last bits of a score, which must not depend on the batches of a loader.
"""


def in_parts(images: Iterable[torch.Tensor], size: int = AT_A_TIME) -> Iterator[torch.Tensor]:
    """The same images, (`size`, 3, H, W) in channels_last, or features, (`size`, D), in the same
    order; the last part is filled up with zeros.
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
    """Score every sample of the loader's shard set exactly once, over all ranks; the scores, in the
    order of the index, are then known to each of them.

    Raises:
        ScoreError: a score is not finite.
        RuntimeError: scored and failed samples together are not those of the index (our bug).
    """
    rank_scores = score(net, evaluation_batches(loader), loader.device, dtype, on_images)
    scores = join_ranks(all_gather_object(dist or DistEnv(), rank_scores))
    covered = np.sort(np.concatenate([scores.samples, [*scores.failures]]).astype(np.int64))
    if not np.array_equal(covered, np.arange(len(loader.shards))):
        raise RuntimeError(
            f"{len(covered)} samples came out of {loader.shards.describe()}, which has "
            f"{len(loader.shards)}"
        )
    bad = scores.samples[~np.isfinite(scores.logits)]
    if len(bad):
        raise ScoreError(
            f"{len(bad)} of {len(scores.samples)} scores of {loader.shards.describe()} are not "
            f"finite, the first that of {loader.shards.name(bad[0])}: the weights or the precision "
            "are at fault; nothing is measured or chosen by such scores"
        )
    return scores


def join_ranks(parts: list[Scores]) -> Scores:
    """The scores of all ranks in the order of the index."""
    columns = ("samples", "labels", "logits")
    samples, labels, logits = (np.concatenate([getattr(p, n) for p in parts]) for n in columns)
    order = np.argsort(samples, kind="stable")
    failures = {sample: reason for part in parts for sample, reason in part.failures.items()}
    return Scores(samples[order], labels[order], logits[order], dict(sorted(failures.items())))
