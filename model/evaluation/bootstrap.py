"""Intervals by the bootstrap: what the metrics would be on other images of the same kind.

Images are not independent: twenty of one prompt, the frames of a video, a photo and its
reconstruction. So whole groups (`group` of the index) are resampled with replacement, not images
(Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8). They are
resampled within strata, by source and by the classes that a group holds, because how many of each
there are was decided by who made the set and is not chance. The interval holds the middle 95 % of
the resamples.

Where every resample gives 0 or 1 (no false positive among 45 photographs), they say nothing: the
other end is then the exact one for as many groups, 1 - (0.05 / 2) ** (1 / groups) away (Clopper and
Pearson, 1934). `ece` has no interval: resampling biases it upwards.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from model.metrics import given_to_truth

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0

_AT_A_TIME = 2_000_000
"""Weights, resamples times images, that are held at a time. (More leave the processor's cache.
Threads would wait for each other between NumPy's calls: two took as long as one.)
"""

Line = TypeVar("Line", bound=Hashable)

Resamples = dict[str, np.ndarray]
"""A metric's value in every resample: float64 (resamples,), NaN where it is undefined."""


@dataclass(frozen=True, eq=False)
class Images:
    """What one line of a table is about: row numbers of its reals and of its fakes, int64. Lines
    that share their reals share the array, and with it most of the work.
    """

    reals: np.ndarray
    fakes: np.ndarray


@dataclass(frozen=True, eq=False)
class Groups:
    """Which rows belong together: `of_row` int64 (N,), the number of each one's group. Groups of
    one stratum have consecutive numbers; `strata` are how many each has.
    """

    of_row: np.ndarray
    strata: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.strata)

    def count(self, rows: np.ndarray) -> int:
        """How many groups these rows are of."""
        there = np.zeros(len(self), np.bool_)
        there[self.of_row[rows]] = True
        return int(np.count_nonzero(there))


def group_rows(groups: np.ndarray, sources: np.ndarray, labels: np.ndarray) -> Groups:
    """Rows by their group's number, int64 (N,), with strata by source and by the classes in a
    group. Strata of a single group, which could not vary, are put together.
    """
    names, of_row = np.unique(groups, return_inverse=True)
    classes, source = np.zeros(len(names), np.int64), np.zeros(len(names), np.int64)
    for label in (0, 1):
        classes[of_row[labels == label]] |= 1 << label
    source[of_row] = sources
    _, stratum, sizes = np.unique(source * 4 + classes, return_inverse=True, return_counts=True)
    stratum = np.where(sizes[stratum] > 1, stratum, len(sizes))
    order = np.argsort(stratum, kind="stable")
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    return Groups(position[of_row], tuple(np.unique(stratum, return_counts=True)[1].tolist()))


def resample(
    probabilities: np.ndarray,
    images: Mapping[Line, Images],
    groups: Groups,
    threshold: float,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    on_resamples: Callable[[int], None] | None = None,
) -> dict[Line, Resamples]:
    """The metrics of each of `images` in `resamples` resamples of the groups, the same ones for
    all.

    `probabilities` are those of fake, float64 (N,). A line of one class has the metrics of
    `model.metrics.measure` that exist for it. Fully determined by the arguments; `on_resamples(n)`
    is called as resamples are done.
    """
    order = np.argsort(probabilities, kind="stable")
    scores, group_of_rank = probabilities[order], groups.of_row[order]
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    shared = {id(line.reals): line.reals for line in images.values()}
    reals = {which: _Reals(scores, rank[rows], threshold) for which, rows in shared.items()}
    fakes = {
        key: _Fakes(scores, rank[line.fakes], reals[id(line.reals)], threshold)
        for key, line in images.items()
    }
    blocks: dict[Line, list[Resamples]] = {key: [] for key in images}
    for times in _weights(groups, len(scores), resamples, seed):
        weights = np.take(times, group_of_rank, axis=1)
        weighed = {which: line.weigh(weights) for which, line in reals.items()}
        with np.errstate(divide="ignore", invalid="ignore"):
            for key, line in fakes.items():
                blocks[key].append(line.measure(weighed[id(images[key].reals)], weights))
        if on_resamples:
            on_resamples(len(weights))
    return {
        key: {name: np.concatenate([block[name] for block in parts]) for name in parts[0]}
        for key, parts in blocks.items()
    }


def _weights(groups: Groups, rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each group is in each resample, float32 (B, groups), block after block. Sums of
    them are exact up to 2 ** 24 images; beyond, float64.
    """
    dtype = np.float32 if rows < 2**24 else np.float64
    rng = np.random.default_rng(seed)
    size = max(1, _AT_A_TIME // max(1, rows))
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        weights = np.empty((count, len(groups)), dtype)
        first = 0
        for held in groups.strata:
            chosen = rng.integers(held, size=(count, held))
            chosen += held * np.arange(count)[:, None]
            times = np.bincount(chosen.ravel(), minlength=count * held)
            weights[:, first : first + held] = times.reshape(count, held)
            first += held
        yield weights


@dataclass(frozen=True, eq=False)
class _Weighed:
    """The reals of a block of resamples: `below` (B, n + 1) is the weight of those before a
    position in the order of their scores, `total` and `called` (B,) are sums, `errors` (2, B) those
    of NLL and of squared error.
    """

    below: np.ndarray
    total: np.ndarray
    called: np.ndarray
    errors: np.ndarray


class _Reals:
    """Real images in the order of their scores; `scores` are those of all images in that order, and
    `places` tells which of them these are.
    """

    def __init__(self, scores: np.ndarray, places: np.ndarray, threshold: float):
        self.places = np.sort(places)
        self.scores = scores[self.places]
        self.first_called = int(np.searchsorted(self.scores, threshold, "left"))
        self.errors = _errors(self.scores, 0)

    def weigh(self, weights: np.ndarray) -> _Weighed:
        own_weights = np.take(weights, self.places, axis=1)
        below = _running(own_weights)
        total = below[:, -1].astype(np.float64)
        called = total - below[:, self.first_called]
        return _Weighed(below, total, called, _weighed(own_weights, self.errors))


class _Fakes:
    """Fake images in the order of their scores, and where these fall among those of the reals."""

    def __init__(self, scores: np.ndarray, places: np.ndarray, reals: _Reals, threshold: float):
        self.places = np.sort(places)
        scores = scores[self.places]
        self.first_called = int(np.searchsorted(scores, threshold, "left"))
        self.errors = _errors(scores, 1)
        # Of each fake: where the run of fakes with its score begins and ends, and that of reals.
        self.first, self.end = (np.searchsorted(scores, scores, side) for side in ("left", "right"))
        self.left, self.right = (
            np.searchsorted(reals.scores, scores, side) for side in ("left", "right")
        )
        self.tied = np.flatnonzero(self.left != self.right)
        self.own_ties = bool((np.diff(scores) == 0).any())
        self.have_reals = len(reals.scores) > 0

    def measure(self, reals: _Weighed, weights: np.ndarray) -> Resamples:
        """Every metric in every resample of a block. A metric of a class that a resample lacks is
        NaN.
        """
        own_weights = np.take(weights, self.places, axis=1)
        fakes = own_weights.sum(axis=1).astype(np.float64)
        count = fakes + reals.total
        true, false = own_weights[:, self.first_called :].sum(axis=1), reals.called
        nll, brier = (_weighed(own_weights, self.errors) + reals.errors) / count
        metrics = {"accuracy": (true + reals.total - false) / count, "nll": nll, "brier": brier}
        if len(self.places):
            metrics["recall"] = true / fakes
        if self.have_reals:
            metrics["false_positive_rate"] = false / reals.total
        if not (len(self.places) and self.have_reals):
            return metrics
        metrics["balanced_accuracy"] = (metrics["recall"] + 1 - metrics["false_positive_rate"]) / 2
        metrics["precision"] = true / (true + false)
        metrics["f1"] = 2 * true / (true + false + fakes)
        return metrics | self._over_thresholds(reals, own_weights)

    def _over_thresholds(self, reals: _Weighed, own_weights: np.ndarray) -> Resamples:
        """The metrics that have no threshold, from the weights of reals and of fakes below each
        fake's score: as `model.metrics`; `test_bootstrap.py` holds them together.
        """
        below = _running(own_weights)
        fakes = below[:, -1].astype(np.float64)
        lower = np.take(reals.below, self.left, axis=1)
        ordered = np.vecdot(own_weights, lower).astype(np.float64)
        if len(self.tied):
            level = reals.below[:, self.right[self.tied]] - lower[:, self.tied]
            ordered += np.vecdot(own_weights[:, self.tied], level) / 2
        metrics = {"auroc": ordered / (fakes * reals.total)}
        row = np.arange(len(below))
        for name, rate in (("tpr_at_fpr_1", 0.01), ("tpr_at_fpr_5", 0.05)):
            # The lowest score that leaves no more reals than that as high or higher.
            least = (reals.total - np.floor(rate * reals.total + 1e-9)).astype(lower.dtype)
            at = _count(lambda *of, least=least: lower[of] < least[:, None], lower.shape)
            metrics[name] = 1 - below[row, at] / fakes
        before = np.take(below, self.first, axis=1) if self.own_ties else below[:, :-1]
        metrics["eer"] = self._equal_error_rate(reals, below, lower, before)
        true = below[:, -1:] - before  # fakes as high or higher
        either = np.subtract(reals.below[:, -1:], lower, out=lower)  # reals as high or higher
        either += true
        either += 1e-30  # where there are none
        metrics["average_precision"] = (
            np.vecdot(own_weights, np.divide(true, either, out=true)) / fakes
        )
        return metrics

    def _equal_error_rate(
        self, reals: _Weighed, below: np.ndarray, lower: np.ndarray, before: np.ndarray
    ) -> np.ndarray:
        """The ROC curve bends only where there are fakes, so it is known from its two corners at
        each of their scores.
        """
        row = np.arange(len(below))
        fakes = below[:, -1].astype(np.float64)

        def misses_less(*at: np.ndarray) -> np.ndarray:  # FNR <= FPR, in whole numbers
            missed, passed = before[at] * reals.total[:, None], lower[at] * fakes[:, None]
            return missed + passed <= (reals.total * fakes)[:, None]

        # The highest score from which on that holds.
        at = np.maximum(_count(misses_less, lower.shape) - 1, 0)
        corners = (
            (reals.below[row, self.right[at]], below[row, self.end[at]]),
            (lower[row, at], before[row, at]),
        )
        # Of the corners before and after: FPR, and FPR less FNR.
        (false, gap), (false_after, gap_after) = (
            (1 - real / reals.total, 1 - real / reals.total - fake / fakes)
            for real, fake in corners
        )
        share = np.where(gap_after > gap, -gap / (gap_after - gap), 0)
        inside = false + share * (false_after - false)
        return np.where(gap >= 0, below[row, self.end[at]] / fakes, inside)


def _count(
    holds: Callable[[np.ndarray, np.ndarray], np.ndarray], shape: tuple[int, int]
) -> np.ndarray:
    """At how many places of each row, (B,), something holds that holds up to some place and not
    beyond: `holds(rows (B, 1), places)` is bool (B, k). It is asked about 2 B sqrt(n) places.
    """
    resamples, count = shape
    row, step = np.arange(resamples)[:, None], math.isqrt(count) + 1
    passed = np.count_nonzero(holds(row, np.arange(0, count, step)[None]), axis=1)
    start = step * np.maximum(passed - 1, 0)
    places = start[:, None] + np.arange(step)
    held = holds(row, np.minimum(places, count - 1)) & (places < count)
    return start + np.count_nonzero(held, axis=1)


def _running(weights: np.ndarray) -> np.ndarray:
    """Running sums with a 0 in front: (B, n) -> (B, n + 1). Weights are whole numbers, and adding
    those up as such takes a fifth of the time.
    """
    whole = np.int32 if weights.dtype == np.float32 else np.int64
    sums = np.zeros((len(weights), weights.shape[1] + 1), whole)
    np.cumsum(weights.astype(whole), axis=1, dtype=whole, out=sums[:, 1:])
    return sums.astype(weights.dtype)


def _weighed(weights: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """The sums of both errors over a block of resamples: (B, n), (2, n) -> (2, B)."""
    return np.stack([np.vecdot(weights, row) for row in errors.astype(weights.dtype, copy=False)])


def _errors(probabilities: np.ndarray, label: int) -> np.ndarray:
    """NLL and squared error of each image: (2, n)."""
    given = given_to_truth(np.full(len(probabilities), label), probabilities)
    return np.stack([-np.log(given), np.square(probabilities - label)])


# Metrics by the classes whose groups they rest on.
_OF_FAKES = ("recall",)
_OF_REALS = ("false_positive_rate",)
_OF_ALL = ("accuracy", "nll", "brier")
_UNBOUNDED = ("nll",)


def intervals(images: Images, groups: Groups, resamples: Resamples) -> dict[str, list[float]]:
    """[low, high] for every metric that `resamples` allow to say something about.

    A metric is left out where it rests on fewer than two groups, or where half of the resamples
    left it undefined.
    """
    reals, fakes = groups.count(images.reals), groups.count(images.fakes)
    both = groups.count(np.concatenate([images.reals, images.fakes]))
    intervals_of = {}
    for name, values in resamples.items():
        independent = min(reals, fakes)
        if name in _OF_ALL:
            independent = both
        elif name in (*_OF_FAKES, *_OF_REALS):
            independent = fakes if name in _OF_FAKES else reals
        ends = () if name in _UNBOUNDED else (0.0, 1.0)
        if (low_high := interval(values, independent, ends)) is not None:
            intervals_of[name] = low_high
    return intervals_of


def interval(
    values: np.ndarray, independent: int, ends: tuple[float, ...] = (0.0, 1.0)
) -> list[float] | None:
    """[low, high] from a metric's values in all resamples, resting on `independent` groups; `ends`
    are values at which resamples that all agree do not mean certainty. None where there is none.
    """
    known = values[~np.isnan(values)]
    if independent < 2 or 2 * len(known) < len(values):
        return None
    low, high = (float(q) for q in np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    reach = 1 - ((1 - LEVEL) / 2) ** (1 / independent)
    if low == high and low in ends:
        return [0.0, reach] if low == 0 else [1 - reach, 1.0]
    return [low, high]
