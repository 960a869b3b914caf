"""Compute 95 % confidence intervals of metrics by the bootstrap, over resampled groups of images.

Main entry: `resample(probabilities, images, groups, threshold, *, resamples, seed, on_resamples)`
computes the metrics in many resamples, for each selection of images.

- `probabilities`, float64 (N,): the probability of fake of each image.
- `images`: a dict with an entry for each selection whose metrics are wanted, such as one source.
  The key is any hashable value of the caller's choice (type `Line`). The value is `Images(reals,
  fakes)`: the positions of its real and of its fake images among the N, int64 arrays, one of which
  may be empty.
- `groups`: the `Groups` of the N images, from `group_rows()`.
- `threshold`: 0 to 1. An image is called fake if its probability is at least the threshold.
- `resamples`, `seed`: number of resamples (default `RESAMPLES`) and random seed (default `SEED`).
- `on_resamples`: None (default) or a function that is called from time to time with the number of
  resamples since its last call.

It returns a dict, key -> metric -> values in all resamples: float64 (resamples,), NaN where
undefined. The metrics are named as in `Metrics` of model/metrics.py. Every selection has
`accuracy`, `nll` and `brier`; one with fakes has `recall`; one with reals has
`false_positive_rate`; one with both also has `balanced_accuracy`, `precision`, `f1`, `auroc`,
`average_precision`, `eer`, `tpr_at_fpr_1` and `tpr_at_fpr_5`. There is no `ece`. `resample()`
raises no errors of its own.

`group_rows(groups, sources, labels)` takes three int64 arrays (N,): numbers that stand for the
group and the source of each image, and 0 real, 1 fake. `intervals(images, groups, resamples)` takes
the `Images` of one key, the `Groups`, and the entry of this key in the result of `resample()` (a
dict, metric -> values). It returns a dict, metric -> [low, high], the middle 95 %.

`interval(values, independent, ends)` does this for one metric. It takes the metric's values, the
number of groups that it depends on (`independent_groups(images, groups)` returns a function, metric
-> number), and its lowest and highest possible value (default 0 and 1; () for a difference, see
`interval_of_change()` of compare.py). It returns None if there is no interval; `intervals()` leaves
out such a metric.

Images are not independent: twenty images of one prompt, the frames of a video. So whole groups are
resampled with replacement (Davison and Hinkley, "Bootstrap Methods and their Application", 1997,
section 3.8). This is done separately for each source, and within a source for the groups with only
reals, with only fakes, and with both. Resamples of a part with n groups have (n - 1) / n of the
variance that other images have; so all parts of fewer than `FEWEST_GROUPS` groups, of any source,
form one part for each of the three. If that part has too few groups as well, it joins the largest
part of its kind, as collapsed strata do (Cochran, "Sampling Techniques", 1977, section 5A.12).
docs/evaluation.md says how often intervals then contain the truth.

The interval of `accuracy`, `recall` and `false_positive_rate` contains the score interval of Wilson
(1927), for the number of independent images that has the variance of the resamples, or for the
number of groups where all resamples agree. `wilson(share, count)` returns its two ends; both
arguments are floats, or arrays of one shape. An interval [0, 0] or [1, 1] at a bound of the metric
is replaced by the exact one (Clopper and Pearson, 1934): [0, d] or [1 - d, 1], where d is
1 - (0.05 / 2) ** (1 / groups). Where no group has both classes, the interval of `accuracy` and
`balanced_accuracy` contains the one that follows from those of recall and of false positives.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

import numpy as np

from model.metrics import given_to_truth

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0

Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
"""Half the width of a normal interval of `LEVEL`, in standard deviations: 1.96."""

FEWEST_GROUPS = 10
"""Smallest number of groups of a source that are resampled by themselves."""

_SAME = 1e-6
"""Smallest difference that counts: float32 sums over many weights are rounded."""

_AT_A_TIME = 2_000_000
"""Weights (resamples x images) in memory at a time. More would not fit in the processor's cache."""

Line = TypeVar("Line", bound=Hashable)
Shares = TypeVar("Shares", float, np.ndarray)

Resamples = dict[str, np.ndarray]
"""Values of each metric in all resamples: name -> float64 (resamples,), NaN where undefined."""


@dataclass(frozen=True, eq=False)
class Images:
    """Images of one line of a table: row indices of its reals and of its fakes, int64.

    Lines with the same reals should share one array object: its part of the work is done once.
    """

    reals: np.ndarray
    fakes: np.ndarray


@dataclass(frozen=True, eq=False)
class Groups:
    """Assignment of rows to groups. `of_row`, int64 (N,), is the group index of each row.

    Groups of one stratum have consecutive indices. `strata` is the number of groups per stratum.
    """

    of_row: np.ndarray
    strata: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.strata)

    def count(self, rows: np.ndarray) -> int:
        """Count the groups that contain at least one of `rows`."""
        there = np.zeros(len(self), np.bool_)
        there[self.of_row[rows]] = True
        return int(np.count_nonzero(there))

    def vary(self, rows: np.ndarray) -> bool:
        """Return whether all groups of `rows` vary in resamples. A stratum of one does not."""
        held = np.repeat(self.strata, self.strata)
        return bool((held[self.of_row[rows]] > 1).all())


def group_rows(groups: np.ndarray, sources: np.ndarray, labels: np.ndarray) -> Groups:
    """Build `Groups` from the group, source and label of each row, int64 (N,).

    A stratum is a source and the classes in a group. Strata of fewer than `FEWEST_GROUPS` groups
    are merged by class, because a stratum of one group cannot vary, and one of two groups varies
    half as much as it should. If these are still too few, they join the largest stratum of the same
    classes. Without such a stratum they stay by themselves, but a single group joins the largest
    stratum that has one of its classes.
    """
    names, of_row = np.unique(groups, return_inverse=True)
    classes, source = np.zeros(len(names), np.int64), np.zeros(len(names), np.int64)
    for label in (0, 1):
        classes[of_row[labels == label]] |= 1 << label
    source[of_row] = sources
    _, stratum, sizes = np.unique(source * 4 + classes, return_inverse=True, return_counts=True)
    stratum = np.where(sizes[stratum] < FEWEST_GROUPS, len(sizes) + classes, stratum)
    for kind in range(1, 4):
        _join_largest(stratum, len(sizes) + kind, FEWEST_GROUPS, classes == kind)
    for kind in range(1, 4):
        _join_largest(stratum, len(sizes) + kind, 2, classes & kind > 0)
    order = np.argsort(stratum, kind="stable")
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    return Groups(position[of_row], tuple(np.unique(stratum, return_counts=True)[1].tolist()))


def _join_largest(stratum: np.ndarray, few: int, enough: int, alike: np.ndarray) -> None:
    """Merge stratum `few`, if it has fewer than `enough` groups, into the largest other stratum
    within the mask `alike`, if there is one. Changes `stratum`.
    """
    own = stratum == few
    others = stratum[alike & ~own]
    if 0 < np.count_nonzero(own) < enough and len(others):
        stratum[own] = np.bincount(others).argmax()


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
    """Compute the metrics of each line of `images` in `resamples` resamples of the groups. All
    lines use the same resamples.

    A line with one class gets only the metrics that one class has. Deterministic for equal
    arguments. `on_resamples(n)` is called after every n resamples.
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
    """Yield how often each group is in each resample, in blocks: float32 (B, groups), or float64
    from 2 ** 24 rows on, where float32 sums would not be exact.
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
    """Weighted reals in a block of B resamples. `below` (B, n + 1) is the total weight before each
    position, in order of score. `total` (B,) is the weight of all reals, `called` (B,) of the reals
    called fake. `errors` (2, B) are the weighted sums of NLL and of squared error.
    """

    below: np.ndarray
    total: np.ndarray
    called: np.ndarray
    errors: np.ndarray


class _Reals:
    """Real images in order of score. `scores` are the sorted scores of all images, and `places` are
    the positions of the reals in that order.
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
    """Fake images in order of score, with the position of each fake's score among the reals."""

    def __init__(self, scores: np.ndarray, places: np.ndarray, reals: _Reals, threshold: float):
        self.places = np.sort(places)
        scores = scores[self.places]
        self.first_called = int(np.searchsorted(scores, threshold, "left"))
        self.errors = _errors(scores, 1)
        # For each fake: start and end of the run of equal scores, among the fakes (first, end) and
        # among the reals (left, right).
        self.first, self.end = (np.searchsorted(scores, scores, side) for side in ("left", "right"))
        self.left, self.right = (
            np.searchsorted(reals.scores, scores, side) for side in ("left", "right")
        )
        self.tied = np.flatnonzero(self.left != self.right)
        self.own_ties = bool((np.diff(scores) == 0).any())
        self.have_reals = len(reals.scores) > 0

    def measure(self, reals: _Weighed, weights: np.ndarray) -> Resamples:
        """Compute every metric in every resample of a block. A metric is NaN where a resample lacks
        a class that the metric needs.
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
        """Compute the metrics without a threshold, from the weights of reals and of fakes below
        each fake's score. `test_bootstrap.py` checks that `model.metrics` gives the same values.
        """
        below = _running(own_weights)
        fakes = below[:, -1].astype(np.float64)
        lower = np.take(reals.below, self.left, axis=1)
        ordered = np.vecdot(own_weights, lower, dtype=np.float64)  # exact: sums <= number of pairs
        if len(self.tied):
            level = reals.below[:, self.right[self.tied]] - lower[:, self.tied]
            ordered += np.vecdot(own_weights[:, self.tied], level, dtype=np.float64) / 2
        metrics = {"auroc": ordered / (fakes * reals.total)}
        row = np.arange(len(below))
        for name, rate in (("tpr_at_fpr_1", 0.01), ("tpr_at_fpr_5", 0.05)):
            # The lowest score of a fake at or above which the weight of reals is within the rate.
            least = (reals.total - np.floor(rate * reals.total + 1e-9)).astype(lower.dtype)
            at = _count(lambda *of, least=least: lower[of] < least[:, None], lower.shape)
            metrics[name] = 1 - below[row, at] / fakes
        before = np.take(below, self.first, axis=1) if self.own_ties else below[:, :-1]
        metrics["eer"] = self._equal_error_rate(reals, below, lower, before)
        true = below[:, -1:] - before  # weight of fakes at or above each score
        either = np.subtract(reals.below[:, -1:], lower, out=lower)  # weight of reals
        either += true
        either += 1e-30  # avoids 0 / 0 where the weight is 0
        metrics["average_precision"] = (
            np.vecdot(own_weights, np.divide(true, either, out=true)) / fakes
        )
        return metrics

    def _equal_error_rate(
        self, reals: _Weighed, below: np.ndarray, lower: np.ndarray, before: np.ndarray
    ) -> np.ndarray:
        """Compute the equal error rate in every resample, (B,). Only the two corners of the ROC
        curve at the score of each fake are needed: between two such scores the curve is flat.
        """
        row = np.arange(len(below))
        fakes = below[:, -1].astype(np.float64)

        def misses_less(*at: np.ndarray) -> np.ndarray:  # FNR <= FPR, in integers
            missed, passed = before[at] * reals.total[:, None], lower[at] * fakes[:, None]
            return missed + passed <= (reals.total * fakes)[:, None]

        # The highest score at which FNR <= FPR.
        at = np.maximum(_count(misses_less, lower.shape) - 1, 0)
        corners = (
            (reals.below[row, self.right[at]], below[row, self.end[at]]),
            (lower[row, at], before[row, at]),
        )
        # FPR and FPR - FNR, at the corner before and at the corner after.
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
    """Return, per row, the length of the prefix on which the monotone predicate `holds` is True:
    int64 (B,). `shape` is (B, n); `holds(rows (B, 1), places)` returns bool (B, k). The block
    search evaluates about 2 B sqrt(n) places.
    """
    resamples, count = shape
    row, step = np.arange(resamples)[:, None], math.isqrt(count) + 1
    passed = np.count_nonzero(holds(row, np.arange(0, count, step)[None]), axis=1)
    start = step * np.maximum(passed - 1, 0)
    places = start[:, None] + np.arange(step)
    held = holds(row, np.minimum(places, count - 1)) & (places < count)
    return start + np.count_nonzero(held, axis=1)


def _running(weights: np.ndarray) -> np.ndarray:
    """Compute running sums with a leading 0: (B, n) -> (B, n + 1). Weights are whole numbers, and
    integer sums take a fifth of the time of float sums.
    """
    whole = np.int32 if weights.dtype == np.float32 else np.int64
    sums = np.zeros((len(weights), weights.shape[1] + 1), whole)
    np.cumsum(weights.astype(whole), axis=1, dtype=whole, out=sums[:, 1:])
    return sums.astype(weights.dtype)


def _weighed(weights: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Sum both errors in each resample of a block: (B, n), (2, n) -> (2, B)."""
    return np.stack([np.vecdot(weights, row) for row in errors.astype(weights.dtype, copy=False)])


def _errors(probabilities: np.ndarray, label: int) -> np.ndarray:
    """Compute NLL and squared error of each image: (2, n)."""
    given = given_to_truth(np.full(len(probabilities), label), probabilities)
    return np.stack([-np.log(given), np.square(probabilities - label)])


_SHARES = ("accuracy", "recall", "false_positive_rate")
_ENDS = {"nll": (math.inf,)}
"""Bounds of the metrics that are not from 0 to 1."""


def intervals(images: Images, groups: Groups, resamples: Resamples) -> dict[str, list[float]]:
    """Return the interval [low, high] of each metric in `resamples`.

    A metric is omitted if it is computed from fewer than two groups, or from a group that is the
    same in all resamples, if the metric is undefined in more than half of the resamples, or if it
    has the same value in all of them, is not at a bound and is no share of images.
    """
    independent = independent_groups(images, groups)
    counts = {"recall": len(images.fakes), "false_positive_rate": len(images.reals)}
    every = len(images.reals) + len(images.fakes)
    intervals_of = {}
    for name, values in resamples.items():
        if name in _SHARES:
            low_high = _interval_of_share(values, independent(name), counts.get(name, every))
        else:
            low_high = interval(values, independent(name), _ENDS.get(name, (0.0, 1.0)))
        if low_high is not None:
            intervals_of[name] = low_high
    together = groups.count(np.concatenate([images.reals, images.fakes]))
    if independent("recall") + independent("false_positive_rate") == together:
        _widen(intervals_of, resamples, images)
    return intervals_of


def _widen(ends_of: dict[str, list[float]], resamples: Resamples, images: Images) -> None:
    """Widen accuracy and balanced accuracy to what follows from the intervals of recall and of
    false positives, if these are independent: distances to the ends are squared and added (Zou and
    Donner, "Construction of confidence limits", Statistics in Medicine 27, 2008). Changes
    `ends_of`. Reason: if all fakes of three groups are found, no resample misses one, so accuracy
    would vary only with the reals.
    """
    names = ("recall", "false_positive_rate")
    if not all(name in ends_of for name in names):
        return
    (low, high), (recall, alarms) = ends_of[names[1]], (np.nanmean(resamples[n]) for n in names)
    means, ends = np.array([recall, 1 - alarms]), np.array([ends_of["recall"], [1 - high, 1 - low]])
    share = len(images.fakes) / (len(images.reals) + len(images.fakes))
    for name, weight in (("accuracy", share), ("balanced_accuracy", 0.5)):
        if name in ends_of:
            weights = np.array([weight, 1 - weight])
            down, up = np.sqrt(weights**2 @ np.square(ends - means[:, None])).tolist()
            (low, high), middle = ends_of[name], float(weights @ means)
            ends_of[name] = [min(low, middle - down), max(high, middle + up)]


def independent_groups(images: Images, groups: Groups) -> Callable[[str], int]:
    """Return a function that gives the number of groups that a metric of `images` depends on. For
    accuracy, NLL and Brier: all groups (1 if one group is in all resamples); for recall and false
    positives: the groups of the class; for other metrics: the groups of the class with fewer.
    """
    every = np.concatenate([images.reals, images.fakes])
    reals, fakes, both = map(groups.count, (images.reals, images.fakes, every))
    both = both if groups.vary(every) else 1
    of_metric = {"recall": fakes, "false_positive_rate": reals}
    of_metric |= dict.fromkeys(("accuracy", "nll", "brier"), both)
    return lambda metric: of_metric.get(metric, min(reals, fakes))


def _interval_of_share(values: np.ndarray, independent: int, images: int) -> list[float] | None:
    """Return the interval of a share of `images` images: the percentiles of its resamples, widened
    to the score interval of Wilson (see the module docstring), or None as `interval` does.
    Percentiles alone are too narrow for rare events: the upper end for one error in 490 images
    would be below the one for no error.
    """
    low_high = interval(values, independent) or _percentiles(values, independent)
    if low_high is None:
        return None
    share, variance = float(np.nanmean(values)), float(np.nanvar(values))
    if variance >= _SAME**2:
        low, high = wilson(share, min(images, share * (1 - share) / variance))
    elif _SAME < share < 1 - _SAME:
        low, high = wilson(share, independent)
    else:
        return low_high
    return [min(low_high[0], low), max(low_high[1], high)]


def wilson(share: Shares, count: Shares) -> tuple[Shares, Shares]:
    """Return the ends of the 95 % score interval of a share of `count` images (E. B. Wilson, 1927).
    Both are numbers or arrays of one shape.
    """
    z2 = Z**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = (share * (1 - share) / count + z2 / (4 * count**2)) ** 0.5 * Z / (1 + z2 / count)
    return middle - reach, middle + reach


def interval(
    values: np.ndarray, independent: int, ends: tuple[float, ...] = (0.0, 1.0)
) -> list[float] | None:
    """Return the interval [low, high] of one metric from its values in all resamples, or None.

    `independent` is the number of groups from which the metric is computed. `ends` are the bounds
    of the metric's range: if all resamples have this value, the interval is exact (see the module
    docstring). If all have another value, their variation is unknown. None: equal values that are
    not a bound, fewer than two groups, or more than half of the values are NaN.
    """
    percentiles = _percentiles(values, independent)
    if percentiles is None or percentiles[1] - percentiles[0] >= _SAME:
        return percentiles
    reach = 1 - ((1 - LEVEL) / 2) ** (1 / independent)
    exact = {0.0: [0.0, reach], 1.0: [1 - reach, 1.0]}
    return next((exact[end] for end in ends if abs(percentiles[0] - end) < _SAME), None)


def _percentiles(values: np.ndarray, independent: int) -> list[float] | None:
    """Return the middle 95 %; None for fewer than two groups, or if more than half are NaN."""
    known = values[~np.isnan(values)]
    if independent < 2 or 2 * len(known) < len(values):
        return None
    return [float(q) for q in np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]
