"""ORDER: (index, seed, epoch, position) -> sample, as a pure function. No iterator state anywhere.

An epoch is an array of sample numbers by global position. Rank r of `world_size` takes, at a step,
the positions from (step * world + r) * batch on, so 2 ranks x 12 see what 1 rank x 24 sees, and a
run resumes at any step from a handful of integers.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.replay import interleave

Shuffle = Literal["global", "block"]

ORDER_VERSION = 1
"""Grows whenever the same seed gives another order; a state of another version is refused."""

BLOCK = 256
WINDOW = 64
"""A block shuffle permutes runs of `BLOCK` samples and then samples inside `WINDOW` open runs."""

# Philox counters are 4 x 64 bits: the last word keeps independent uses of one key apart
# (0: the parameters of samples).
_SHUFFLE, _REPLAY, _REPEAT = 1, 2, 3


class OrderError(ValueError):
    """An order that cannot be made or resumed."""


@dataclass(frozen=True, eq=False)
class Epoch:
    """One epoch: which sample stands at each global position, and which of them count.

    `samples` int64, `replayed` bool (old samples, phase 2) and `valid` bool (False: padding) are
    all of length `steps * global_batch`. So is `repeat_index`: how often each sample came before in
    this epoch, so that an image that comes twice is augmented in two ways.
    """

    seed: int
    number: int
    global_batch: int
    samples: np.ndarray
    replayed: np.ndarray
    valid: np.ndarray

    @functools.cached_property
    def repeat_index(self) -> np.ndarray:
        """0 where a sample comes for the first time, 1 for the second, and so on."""
        order = np.argsort(self.samples, kind="stable")
        ordered = self.samples[order]
        begins = np.r_[True, ordered[1:] != ordered[:-1]]
        position = np.arange(len(order))
        repeat_index = np.empty(len(order), np.int64)
        repeat_index[order] = position - np.maximum.accumulate(np.where(begins, position, 0))
        return repeat_index

    @property
    def steps(self) -> int:
        """Batches in this epoch, the same on every rank."""
        return len(self.samples) // self.global_batch

    def positions(self, step: int, rank: int = 0, world_size: int = 1) -> slice:
        """The global positions of one rank's batch."""
        batch = self.global_batch // world_size
        first = (step * world_size + rank) * batch
        return slice(first, first + batch)


def training_epoch(
    new: np.ndarray,
    *,
    seed: int,
    number: int,
    global_batch: int,
    shuffle: Shuffle = "global",
    old: np.ndarray | None = None,
) -> Epoch:
    """Shuffle the sample numbers `new` and spread the old ones (see `replay`) among them.

    Only the last partial global batch is dropped; another epoch drops other samples.

    Raises:
        OrderError: fewer samples than one global batch.
    """
    rng = rng_of(seed, number, _SHUFFLE)
    fresh = new[rng.permutation(len(new)) if shuffle == "global" else _blocks(len(new), rng)]
    samples, replayed = interleave(fresh, np.empty(0, np.int64) if old is None else old)
    count = len(samples) // global_batch * global_batch
    if count == 0:
        raise OrderError(
            f"{len(samples)} training samples do not fill one batch of {global_batch}; "
            "use a smaller loading.batch_size"
        )
    valid = np.ones(count, np.bool_)
    return Epoch(seed, number, global_batch, samples[:count], replayed[:count], valid)


def repeat(
    samples: np.ndarray, sources: np.ndarray, times: Mapping[int, float], rng: np.random.Generator
) -> np.ndarray:
    """The samples of an epoch in which each source comes a stated number of times.

    `sources` is the source code of each sample, `times` code -> how often (1 where it is not
    named): 2.5 takes every sample twice and half of them, chosen by `rng`, once more. Exact, unlike
    weights in a sampler: an epoch's length and its shares follow from the index.
    """
    parts = []
    for code in np.unique(sources):
        source_samples = samples[sources == code]
        whole, part = divmod(float(times.get(int(code), 1.0)), 1.0)
        parts += [source_samples] * int(whole)
        parts.append(np.sort(rng.permutation(source_samples)[: round(part * len(source_samples))]))
    return np.concatenate(parts) if parts else samples


def repeat_rng(seed: int, epoch: int) -> np.random.Generator:
    """The generator that chooses which samples of a source come once more in an epoch."""
    return rng_of(seed, epoch, _REPEAT)


class Mixing(NamedTuple):
    """How well an order is shuffled: 1 is as well as by chance, for both figures.

    `distance` is how far samples end from where they lie on disk, against the mean of a random
    order, a third of its length; 0 is not at all. `batches` is how evenly sources fall into
    batches: the chi-squared statistic of their counts per batch over its degrees of freedom; more
    than 1 means that batches hold more of one source than chance gives them.
    """

    distance: float
    batches: float


def mixing_of(samples: np.ndarray, sources: np.ndarray, batch: int) -> Mixing:
    """Measure an order: sample numbers by position, and the source code of each position."""
    count = len(samples)
    position = np.argsort(np.argsort(samples, kind="stable"), kind="stable")
    distance = float(np.abs(position - np.arange(count)).mean() / (count / 3))
    rows = count // batch
    codes, compact = np.unique(sources, return_inverse=True)
    cells = np.repeat(np.arange(rows), batch) * len(codes) + compact[: rows * batch]
    seen = np.bincount(cells, minlength=rows * len(codes)).reshape(rows, len(codes))
    expected = seen.sum(axis=0) / max(rows, 1)
    freedom = (rows - 1) * (len(codes) - 1)
    if freedom < 1:
        return Mixing(distance, 1.0)
    return Mixing(distance, float((((seen - expected) ** 2) / expected).sum() / freedom))


def evaluation_epoch(count: int, global_batch: int) -> Epoch:
    """Samples 0 .. count-1 in order, each exactly once, padded to whole global batches.

    Every rank makes the same number of steps; padding repeats sample 0 with `valid` False.

    Raises:
        OrderError: nothing to evaluate.
    """
    if count == 0:
        raise OrderError("there is no sample to evaluate")
    padded = -(-count // global_batch) * global_batch
    samples = np.zeros(padded, np.int64)
    samples[:count] = np.arange(count)
    valid = np.arange(padded) < count
    return Epoch(0, 0, global_batch, samples, np.zeros(padded, np.bool_), valid)


def rng_of(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    """The generator of one purpose in one epoch; `philox.uniform` makes the numbers of a sample."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, purpose]))


def replay_rng(seed: int, epoch: int) -> np.random.Generator:
    """The generator that chooses the old samples of an epoch."""
    return rng_of(seed, epoch, _REPLAY)


def _blocks(count: int, rng: np.random.Generator) -> np.ndarray:
    """A shuffle for remote shards: reads stay in runs, samples mix over `WINDOW` runs."""
    starts = rng.permutation(-(-count // BLOCK)) * BLOCK
    order = (starts[:, None] + np.arange(BLOCK)).ravel()
    order = order[order < count]
    span = BLOCK * WINDOW
    return np.concatenate(
        [rng.permutation(order[first : first + span]) for first in range(0, count, span)]
    )


def state_of(epoch: Epoch, step: int, index_sha256: str) -> dict[str, Any]:
    """What must be saved to go on before `step` of `epoch`."""
    return {
        "order_version": ORDER_VERSION,
        "seed": epoch.seed,
        "epoch": epoch.number,
        "step": step,
        "global_batch": epoch.global_batch,
        "index_sha256": index_sha256,
    }


_CHANGED = {
    "order_version": "this version of the program has another order of samples",
    "seed": "the seed is not the one that this run began with",
    "global_batch": "the batch over all processes is not the one that this run began with",
    "index_sha256": "the shard set has been built again since this run began",
}


def check_state(
    state: Mapping[str, Any], *, seed: int, global_batch: int, index_sha256: str
) -> tuple[int, int]:
    """The (epoch, step) to go on from.

    Raises:
        OrderError: the state belongs to other shards, another seed, batch or version of the order.
    """
    expected = {
        "order_version": ORDER_VERSION,
        "seed": seed,
        "global_batch": global_batch,
        "index_sha256": index_sha256,
    }
    for name, value in expected.items():
        if state[name] != value:
            raise OrderError(
                f"cannot resume: {_CHANGED[name]} ({name} was {str(state[name])[:16]} and is "
                f"{str(value)[:16]}), so the samples would come in another order; put it back, or "
                "start a new run with --run NAME"
            )
    return int(state["epoch"]), int(state["step"])
