"""Run a network over batches: the one place where images become scores."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from model.distributed import Ranks, gather
from pipeline.batch import Batch
from pipeline.loader import Loader
from pipeline.stream import evaluation_batches

DEFAULT_THRESHOLD = 0.5
"""From this probability of fake on an image is called fake, until a calibration says otherwise."""


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
    """The probability of fake, float64: the softmax of the two logits at a temperature. NaN stays
    NaN.
    """
    with np.errstate(invalid="ignore"):
        # Not 1 / (1 + exp(-x)), which overflows on the way to 0.
        return np.exp(-np.logaddexp(0.0, -np.asarray(logits, np.float64) / temperature))


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision on `device`, or nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def score_batches(
    net: nn.Module, batches: Iterable[Batch], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Each batch with its logits, float32 (B,); rows that are not valid are NaN."""
    training = net.training
    net.eval()
    try:
        for batch in batches:
            with torch.inference_mode(), autocast(device, dtype):
                real, fake = net(batch.images).float().unbind(1)
            logits = (fake - real).masked_fill(~batch.valid, float("nan"))
            yield batch, logits.cpu().numpy()
    finally:
        net.train(training)


def score(
    net: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    on_images: Callable[[int], None] | None = None,
) -> Scores:
    """Score every valid image of `batches`; `on_images(n)` is called as they come."""
    samples, labels, logits, failures = [], [], [], {}
    for batch, found in score_batches(net, batches, device, dtype):
        rows = batch.valid.cpu().numpy()
        samples.append(batch.samples[rows])
        labels.append(batch.labels.cpu().numpy()[rows])
        logits.append(found[rows])
        failures |= {int(batch.samples[row]): why for row, why in batch.failures.items()}
        if on_images:
            on_images(int(rows.sum()))
    return Scores(np.concatenate(samples), np.concatenate(labels), np.concatenate(logits), failures)


def score_set(
    net: nn.Module,
    loader: Loader,
    dtype: torch.dtype = torch.float32,
    on_images: Callable[[int], None] | None = None,
    ranks: Ranks | None = None,
) -> Scores:
    """Score every sample of the loader's shard set exactly once, over all ranks; the scores, in the
    order of the index, are then known to each of them.

    Raises:
        RuntimeError: scored and failed samples together are not those of the index (our bug).
    """
    own = score(net, evaluation_batches(loader), loader.device, dtype, on_images)
    scores = _joined(gather(ranks or Ranks(), own))
    covered = np.sort(np.concatenate([scores.samples, [*scores.failures]]).astype(np.int64))
    if not np.array_equal(covered, np.arange(len(loader.shards))):
        raise RuntimeError(
            f"{len(covered)} samples came out of {loader.shards.describe()}, which has "
            f"{len(loader.shards)}"
        )
    return scores


def _joined(parts: list[Scores]) -> Scores:
    """The scores of all ranks in the order of the index."""
    columns = ("samples", "labels", "logits")
    samples, labels, logits = (np.concatenate([getattr(p, n) for p in parts]) for n in columns)
    order = np.argsort(samples, kind="stable")
    failures = {sample: reason for part in parts for sample, reason in part.failures.items()}
    return Scores(samples[order], labels[order], logits[order], dict(sorted(failures.items())))
