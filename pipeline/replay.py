"""Choose samples of old shard sets (replay) and spread them among the new ones, so that training
phase 2 does not forget phase 1.

Main entries: `Replay(...)`, the settings of a recipe (by keyword; the defaults mean no replay):

- `sets`: list of the names of the old sets.
- `ratio`: old to new samples, such as "1:8" (2,500 old for 20,000 new samples) or 0.125.
- `exclude_sources`: list of the names of old sources. The caller leaves them out of `pool`.
- `weight`: weight of an old sample in the loss; a new one has 1.
- `distill_weight`: weight of the loss that keeps the logits of old samples near those of the
  initial network.

Its `fraction` is the number of old samples per new one, exact (a `Fraction`); the caller computes
`count` from it. Its `used_sets` are `sets`, or empty if the ratio is 0, and its `unused` names the
weights that are set although the ratio is 0.
ValueError is raised for a wrong ratio, a ratio above 0 without sets, a negative `distill_weight`,
or a `weight` that is not above 0.

`sample_old(pool, sources, labels, count, rng)` returns `count` sample numbers of the pool,
shuffled, in an array of its dtype (int64 if `count` is 0). Each source gives an equal share, half
of it real and half fake where possible; smaller sources give all their samples. If the pool has
fewer than `count`, samples are used several times. ValueError is raised if `count` is positive and
the pool is empty.

- `pool`, `sources`, `labels`: int arrays of the same length, one entry for each old sample: its
  number, the code of its source, and 0 (real) or 1 (fake).
- `count`: how many to choose.
- `rng`: a NumPy `Generator`.

`share_out(count, sizes, rng)` splits `count` as equally as the list `sizes` (samples of each
source) allows and returns a list, the number for each source. `interleave(new, old)` takes two
arrays of sample numbers and returns a pair: all of them in one int64 array, the old ones evenly
spread, and a bool array that is True where a sample is old. `rows_by_code(codes)` returns a dict
from each number in an int array to its row numbers there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Old sets, and the number of their samples that are mixed with the new ones."""

    sets: list[str] = field(default_factory=list)
    """Old shard sets. Sources whose index entry has `replay = false` are left out."""
    ratio: str | float = "0"
    """Ratio of old to new samples, such as `1:8` or 0.125. 0: no replay. Range: at least 0"""
    exclude_sources: list[str] = field(default_factory=list)
    """Sources of the old sets that are not replayed."""
    weight: float = 1.0
    """Weight of an old sample in the loss; a new sample has 1. With the ratio 1:8 and a weight of
    8, old and new samples count alike. Range: above 0"""
    distill_weight: float = 0.0
    """Weight of the loss that keeps the logits of old samples near those of the initial network. 0:
    off; without replay it has no effect. Range: at least 0"""

    def __post_init__(self) -> None:
        if self.fraction > 0 and not self.sets:
            raise ValueError(f"ratio is {self.ratio}, but `sets` is empty; name the old sets there")
        if self.weight <= 0:
            raise ValueError(f"weight must be above 0, got {self.weight}")
        if self.distill_weight < 0:
            raise ValueError(f"distill_weight must not be negative, got {self.distill_weight}")

    @property
    def fraction(self) -> Fraction:
        """Old samples per new one, exact.

        Raises:
            ValueError: `ratio` is no number or fraction, or negative.
        """
        try:
            fraction = Fraction(str(self.ratio).replace(":", "/"))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"ratio must look like 1:8 or 0.125, got {self.ratio!r}") from None
        if fraction < 0:
            raise ValueError(f"ratio must not be negative, got {self.ratio!r}")
        return fraction

    @property
    def used_sets(self) -> list[str]:
        """Old sets that samples are replayed from; none if the ratio is 0."""
        return self.sets if self.fraction else []

    @property
    def unused(self) -> list[str]:
        """Names of the weights that are set but have no effect, because the ratio is 0."""
        changed = {"weight": self.weight != 1, "distill_weight": self.distill_weight > 0}
        return [name for name, is_set in changed.items() if is_set and not self.fraction]


def sample_old(
    pool: np.ndarray,
    sources: np.ndarray,
    labels: np.ndarray,
    count: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Choose `count` samples of `pool`, stratified by source and, within a source, by class.

    `pool`, `sources` and `labels` are int, one entry per old sample. A source with fewer samples
    than its quota gives all of them, and the other sources share the rest, as in the original. A
    pool smaller than `count` is used several times, so that the ratio stays exact.

    Returns:
        (count,) int64 sample numbers, shuffled.

    Raises:
        ValueError: `count` is positive but `pool` is empty.
    """
    if count and not len(pool):
        raise ValueError("replay is on, but there is no old sample to choose")
    chosen: list[np.ndarray] = []
    rows_of = rows_by_code(sources)
    strata = [pool[rows] for rows in rows_of.values()]
    classes = [labels[rows] for rows in rows_of.values()]
    while (missing := count - sum(map(len, chosen))) > 0:
        quotas = share_out(missing, [len(stratum) for stratum in strata], rng)
        for stratum, label, quota in zip(strata, classes, quotas, strict=True):
            chosen.append(_balanced(stratum, label, quota, rng))
    return rng.permutation(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)


def rows_by_code(codes: np.ndarray) -> dict[int, np.ndarray]:
    """Return the row numbers of each code, both ascending. One sort, because comparing all rows
    with each code would take codes x rows steps.
    """
    order = np.argsort(codes, kind="stable")
    present, starts = np.unique(codes[order], return_index=True)
    parts = np.split(order, starts[1:]) if len(starts) else []
    return dict(zip(present.tolist(), parts, strict=True))


def share_out(count: int, sizes: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Split `count` into quotas as equal as `sizes` allow. The remainder goes to random entries.

    The quotas sum to `min(count, sum(sizes))`, and no quota is larger than its size.
    """
    room = np.array(sizes, np.int64)
    quotas = np.zeros(len(sizes), np.int64)
    left = min(count, int(room.sum()))
    while left:
        unfilled = np.flatnonzero(room)
        each, rest = divmod(left, len(unfilled))
        small = unfilled[room[unfilled] <= each]
        if len(small):  # small sources give all their samples; the others share the rest
            quotas[small] = room[small]
            left -= int(room[small].sum())
            room[small] = 0
            continue
        quotas[unfilled] = each
        quotas[rng.permutation(unfilled)[:rest]] += 1
        left = 0
    return quotas.tolist()


def _balanced(
    samples: np.ndarray, labels: np.ndarray, quota: int, rng: np.random.Generator
) -> np.ndarray:
    """Choose `quota` samples without repetition, half of each class if the source has both."""
    by_class = [samples[labels == label] for label in np.unique(labels)]
    quotas = share_out(quota, [len(members) for members in by_class], rng)
    return np.concatenate(
        [rng.permutation(members)[:take] for members, take in zip(by_class, quotas, strict=True)]
    )


def interleave(new: np.ndarray, old: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spread `old` evenly among `new` by error diffusion over the global position.

    Position p is old exactly where floor((p + 1) * share) exceeds floor(p * share), with share =
    old / (old + new). So every b successive positions have b * share old samples, plus or minus
    one.

    Returns:
        samples (new + old,) int64, and a bool array that is True where a sample is old.
    """
    total = len(new) + len(old)
    passed = np.arange(total + 1, dtype=np.int64) * len(old) // max(total, 1)
    replayed = np.diff(passed) > 0
    samples = np.empty(total, np.int64)
    samples[replayed], samples[~replayed] = old, new
    return samples, replayed
