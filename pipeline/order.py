"""Compute the order of the samples in an epoch, as a pure function of the seed.

Main entries: `training_epoch(new, seed=..., number=..., global_batch=..., shuffle=..., old=...)`
shuffles the samples and drops a last partial batch. All arguments after the first are keywords.

- `new`: the row numbers of the new samples in the opened shard set, int64 (N,).
- `seed`, `number`: the seed and the number of the epoch, ints from 0 on; each epoch has another
  order.
- `global_batch`: samples per step over all ranks.
- `shuffle`: "global" (the default) or "block", which reads runs of samples and suits remote shards.
- `old`: row numbers of the old samples (replay), int64, in the same opened shard set. All of them
  are spread evenly among the new ones. None (default): there are none.

`evaluation_epoch(samples, global_batch)` lists row numbers once and in order, padded to whole
batches. Both return an `Epoch`: `samples`, the row number (int64) at each global position, `valid`,
False for padding, `replayed`, True for old samples, and `steps`, the number of batches. They raise
`OrderError` if there is no sample or, in training, less than a batch, and `TypeError` for a mask of
booleans instead of row numbers. `epoch.positions(step, rank, world_size)` returns the slice of one
rank's batch. The number of ranks does not change the samples of a step: 2 ranks with 12 each see
together the same 24 as one rank.

A run resumes from a dict: `state_of(seed=..., number=..., step=..., global_batch=...,
index_sha256=..., content_sha256=..., shuffle=..., settings=...)` returns it for the next step of
epoch `number` and two hashes: of the indexes (`ShardSet.sha256`), and of what batches are made of
(`pipeline/contents.py`). `settings` has all else that decides the order: a dict, name of a setting
-> its value as text. `check_state(state, ...)` takes the same keywords without `number` and `step`,
and returns the (epoch, step) in the state. It raises `OrderError` if the state has another value
than one of these arguments, or another version than that of `shuffle` in `ORDER_VERSIONS`. The hash
of the indexes, which have other facts too, is only compared for states of earlier versions, which
lack the other one. They also lack the shuffle and the settings, which are then not compared.
`repeat()` lists the samples of a source several times, `mixing_of()` measures how well an order is
shuffled (`Mixing`), and `rng_of(seed, number, purpose)` returns a NumPy generator, with `REPLAY` or
`REPEAT` as purpose.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from pipeline.replay import interleave, rows_by_code
from sharding.rows import row_numbers

Shuffle = Literal["global", "block"]

ORDER_VERSIONS: Mapping[Shuffle, int] = {"global": 1, "block": 2}
"""Versions of the orders. A version increases whenever the same seed gives another order. A saved
state of another version is refused.
"""

BLOCK = 256
WINDOW = 64
"""Sizes of the block shuffle, which permutes runs of `BLOCK` samples, then samples within `WINDOW`
runs. In each global batch, the samples are then sorted by run.
"""

# A Philox counter has 4 x 64 bits. The last word separates independent uses of one key; 0 is for
# augmentation parameters (`philox.uniform`).
_SHUFFLE, REPLAY, REPEAT = 1, 2, 3


class OrderError(ValueError):
    """An order that cannot be made or resumed."""


@dataclass(frozen=True, eq=False)
class Epoch:
    """One epoch: the sample at each global position.

    All arrays have length `steps * global_batch`: `samples` int64 sample numbers, `replayed` bool
    (True: an old sample, phase 2), `valid` bool (False: padding, which must not count).
    """

    seed: int
    number: int
    global_batch: int
    samples: np.ndarray
    replayed: np.ndarray
    valid: np.ndarray

    @functools.cached_property
    def repeat_index(self) -> np.ndarray:
        """How many times each sample appeared before in this epoch, int64: 0 for the first time.
        With this index, an image that appears twice gets two different augmentations.
        """
        seen = np.zeros(self.samples.max(initial=-1) + 1, np.bool_)
        seen[self.samples] = True
        if np.count_nonzero(seen) == len(self.samples):  # no sample twice: skip the slow sort
            return np.zeros(len(self.samples), np.int64)
        order = np.argsort(self.samples, kind="stable")
        ordered = self.samples[order]
        begins = np.r_[True, ordered[1:] != ordered[:-1]]
        position = np.arange(len(order))
        repeat_index = np.empty(len(order), np.int64)
        repeat_index[order] = position - np.maximum.accumulate(np.where(begins, position, 0))
        return repeat_index

    @property
    def steps(self) -> int:
        """Batches per rank in this epoch, the same on every rank."""
        return len(self.samples) // self.global_batch

    def positions(self, step: int, rank: int = 0, world_size: int = 1) -> slice:
        """Return the global positions of one rank's batch at `step`.

        Raises:
            OrderError: the ranks do not divide the global batch.
        """
        if self.global_batch % world_size:
            raise OrderError(
                f"a global batch of {self.global_batch} images cannot be shared by {world_size} "
                "ranks; use a multiple of their number"
            )
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
    """Shuffle the sample numbers `new` and spread the `old` ones evenly among them
    (`pipeline/replay.py`).

    Both are int64. `number` is the number of the epoch; each has another order. The last partial
    global batch is dropped, so each epoch drops other samples.

    Raises:
        OrderError: fewer samples than one global batch, or an unknown `shuffle`.
        TypeError: a mask of booleans instead of numbers.
    """
    if shuffle not in get_args(Shuffle):
        known = " or ".join(get_args(Shuffle))
        raise OrderError(f"the order is shuffled by {known}, got {shuffle!r}")
    rng = rng_of(seed, number, _SHUFFLE)
    new, old = row_numbers(new), row_numbers(() if old is None else old)
    if shuffle == "global":
        samples, replayed = interleave(new[rng.permutation(len(new))], old)
    else:
        order, runs = _blocks(len(new), rng)
        samples, replayed = interleave(new[order], old)
        # A rank gets the same few runs in each step of a window. In a mixed batch, it would get
        # samples of all runs, and every machine would fetch the whole set.
        positions = np.flatnonzero(~replayed)
        by_run = np.argsort(positions // global_batch * WINDOW + runs, kind="stable")
        samples[positions] = new[order[by_run]]
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
    """Repeat the samples of each source a given number of times.

    `sources` is the source code of each sample, `times` maps a source code to the number of times
    (1 if missing). 2.5 takes every sample twice and a half of them, chosen by `rng`, a third time.
    The counts are exact, unlike with a weighted sampler, so an epoch's length and its shares follow
    from the index.
    """
    parts = []
    for code, rows in rows_by_code(sources).items():
        source_samples = samples[rows]
        whole, part = divmod(float(times.get(code, 1.0)), 1.0)
        parts += [source_samples] * int(whole)
        parts.append(np.sort(rng.permutation(source_samples)[: round(part * len(source_samples))]))
    return np.concatenate(parts) if parts else samples


class Mixing(NamedTuple):
    """How well an order is shuffled. Both figures are 1 for a random order.

    `distance` is the mean distance between a sample's position in the order and its position on
    disk, divided by that of a random order (a third of the length). 0 means not shuffled. `batches`
    is the chi-squared statistic of the counts of each source per batch, divided by its degrees of
    freedom. More than 1 means that batches have more of one source than chance gives them.
    """

    distance: float
    batches: float


def mixing_of(samples: np.ndarray, sources: np.ndarray, batch: int) -> Mixing:
    """Measure how well an order is shuffled. `samples` are sample numbers, `sources` source codes,
    both by position; `batch` is the batch size.
    """
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


def evaluation_epoch(samples: np.ndarray, global_batch: int) -> Epoch:
    """Return `samples` in order, each exactly once, padded to whole global batches.

    Every rank makes the same number of steps. Padding is sample 0 with `valid` False.

    Raises:
        OrderError: there are no samples.
        TypeError: a mask of booleans instead of numbers.
    """
    if not len(samples):
        raise OrderError("there is no sample to evaluate")
    padded = np.pad(row_numbers(samples), (0, -len(samples) % global_batch))
    valid = np.arange(len(padded)) < len(samples)
    return Epoch(0, 0, global_batch, padded, np.zeros(len(padded), np.bool_), valid)


def rng_of(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    """Return the generator of one purpose in one epoch: `REPLAY` chooses the old samples, `REPEAT`
    those for the fractional part of `repeat`. The random numbers of single samples come from
    `philox.uniform` instead.
    """
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, purpose]))


def _blocks(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle for remote shards: reads stay in runs of `BLOCK`, samples are mixed over `WINDOW`
    runs. Returns the order, and for each position the number of its run within the window.
    """
    starts = rng.permutation(-(-count // BLOCK)) * BLOCK
    order = (starts[:, None] + np.arange(BLOCK)).ravel()
    order = order[order < count]
    span = BLOCK * WINDOW
    for first in range(0, count, span):
        rng.shuffle(order[first : first + span])
    runs = np.empty(len(starts), np.int64)
    runs[starts // BLOCK] = np.arange(len(starts)) % WINDOW
    return order, runs[order // BLOCK]


def state_of(
    *, seed: int, number: int, step: int, global_batch: int, index_sha256: str,
    content_sha256: str, shuffle: Shuffle, settings: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Return what `check_state` needs to resume before `step` of epoch `number`: integers and short
    texts. The order itself is not needed.
    """
    return {
        "order_version": ORDER_VERSIONS[shuffle],
        "seed": seed,
        "epoch": number,
        "step": step,
        "global_batch": global_batch,
        "index_sha256": index_sha256,
        "content_sha256": content_sha256,
        "loading.shuffle": shuffle,
        **settings,
    }


_CHANGED = {
    "order_version": "this version of the program orders samples in another way",
    "seed": "the seed has changed since this run began",
    "global_batch": "the batch size over all processes has changed since this run began",
    "index_sha256": "the shard set has been built again since this run began",
    "content_sha256": "the shard set has been built again since this run began, with other images, "
    "labels, sources, groups or policies",
}


def check_state(
    state: Mapping[str, Any], *, seed: int, global_batch: int, index_sha256: str,
    content_sha256: str, shuffle: Shuffle, settings: Mapping[str, str],
) -> tuple[int, int]:  # fmt: skip
    """Return the (epoch, step) to resume from.

    Raises:
        OrderError: the state belongs to other shards, another seed, global batch or order version,
            or other `settings`, or its epoch or step is no whole number from 0 on.
    """
    sets = {"content_sha256": content_sha256}
    if "content_sha256" not in state:  # written by an earlier version
        sets = {"index_sha256": index_sha256}
    expected = {
        "loading.shuffle": shuffle,  # first: shuffles have different versions
        "order_version": ORDER_VERSIONS[shuffle],
        "seed": seed,
        **sets,  # before the batch size, which `--folder` derives from the sets
        **settings,
        "global_batch": global_batch,
    }
    newer = {"loading.shuffle", *settings}  # keys that states of earlier versions lack
    for name, value in expected.items():
        before = state.get(name, value) if name in newer else state[name]
        if type(before) is not type(value) or before != value:
            if name in sets:
                before, value = before[:16], sets[name][:16]
            raise OrderError(
                f"cannot resume: {_CHANGED.get(name, f'{name} has changed since this run began')} "
                f"({name} was {before} and is {value}), so the order of samples would change; "
                "undo the change, or start a new run with --run NAME"
            )
    epoch, step = state["epoch"], state["step"]
    if type(epoch) is not int or type(step) is not int or min(epoch, step) < 0:
        raise OrderError(
            f"the training state names epoch {epoch!r:.40} and step {step!r:.40}: expected whole "
            "numbers from 0 on; restore the checkpoint, or start a new run with --run NAME"
        )
    return epoch, step
