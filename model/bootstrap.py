"""Intervals by the bootstrap: what the metrics would be on other images of the same kind.

Images are not independent: twenty of one prompt, the frames of a video, a photo and its
reconstruction. So whole groups (`group` of the index) are drawn with replacement, not images
(Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8). They are drawn
within strata, by source and by the classes that a group holds, because how many of each there are
was decided by who made the set and is not chance. The interval holds the middle 95 % of the draws.

Where every draw gives 0 or 1 (no false positive among 45 photographs), the draws say nothing: the
other end is then the exact one for as many groups, 1 - (0.05 / 2) ** (1 / groups) away (Clopper and
Pearson, 1934). `ece` has no interval: resampling biases it upwards.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from model.metrics import given_to_truth

DRAWS = 1000
LEVEL = 0.95
SEED = 0

_AT_A_TIME = 1_000_000
"""Weights, draws times images, that are held at a time."""

Draws = dict[str, np.ndarray]
"""A metric's value in every draw: float64 (draws,), NaN where the draw left it undefined."""


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
        return len(np.unique(self.of_row[rows]))


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
    images: Mapping[Hashable, Images],
    groups: Groups,
    threshold: float,
    *,
    draws: int = DRAWS,
    seed: int = SEED,
    on_draws: Callable[[int], None] | None = None,
) -> dict[Hashable, Draws]:
    """The metrics of each of `images` in `draws` draws of the groups, the same draws for all.

    `probabilities` are those of fake, float64 (N,). A line of one class has the metrics of
    `model.metrics.measure` that exist for it. Fully determined by the arguments; `on_draws(n)` is
    called as draws are done.
    """
    shared = {id(one.reals): one.reals for one in images.values()}
    reals = {
        which: _Reals(probabilities, rows, groups, threshold) for which, rows in shared.items()
    }
    fakes = {
        key: _Fakes(probabilities, one.fakes, groups, reals[id(one.reals)], threshold)
        for key, one in images.items()
    }
    blocks: dict[Hashable, list[Draws]] = {key: [] for key in images}
    with ThreadPoolExecutor() as pool:  # NumPy works on long rows without Python's lock
        for weights in _weights(groups, len(probabilities), draws, seed):
            found = pool.map(lambda one, weights=weights: one.weigh(weights), reals.values())
            weighed = dict(zip(reals, found, strict=True))
            of_each = [(fakes[key], weighed[id(one.reals)]) for key, one in images.items()]
            measured = pool.map(lambda pair, w=weights: pair[0].measure(pair[1], w), of_each)
            for key, block in zip(images, measured, strict=True):
                blocks[key].append(block)
            if on_draws:
                on_draws(len(weights))
    return {
        key: {name: np.concatenate([block[name] for block in found]) for name in found[0]}
        for key, found in blocks.items()
    }


def _weights(groups: Groups, rows: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each group is drawn, float32 (B, groups), block after block of draws. Sums of them
    are exact up to 2 ** 24 images; beyond, float64.
    """
    dtype = np.float32 if rows < 2**24 else np.float64
    rng = np.random.default_rng(seed)
    size = max(1, _AT_A_TIME // max(1, rows))
    for start in range(0, draws, size):
        count = min(size, draws - start)
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
    """The reals of a block of draws: `below` (B, n + 1) is the weight of those before a position in
    the order of their scores; the rest are sums, (B,).
    """

    below: np.ndarray
    total: np.ndarray
    called: np.ndarray
    errors: np.ndarray


class _Reals:
    """Real images in the order of their scores."""

    def __init__(
        self, probabilities: np.ndarray, rows: np.ndarray, groups: Groups, threshold: float
    ):
        rows = rows[np.argsort(probabilities[rows], kind="stable")]
        self.scores = probabilities[rows]
        self.groups = groups.of_row[rows]
        self.first_called = int(np.searchsorted(self.scores, threshold, "left"))
        self.errors = _errors(self.scores, 0)

    def weigh(self, weights: np.ndarray) -> _Weighed:
        own = np.take(weights, self.groups, axis=1)
        below = _running(own)
        total = below[:, -1].astype(np.float64)
        errors = own @ self.errors.astype(own.dtype)
        return _Weighed(below, total, total - below[:, self.first_called], errors)


class _Fakes:
    """Fake images in the order of their scores, and where these fall among those of the reals."""

    def __init__(
        self,
        probabilities: np.ndarray,
        rows: np.ndarray,
        groups: Groups,
        reals: _Reals,
        threshold: float,
    ):
        rows = rows[np.argsort(probabilities[rows], kind="stable")]
        scores = probabilities[rows]
        self.groups = groups.of_row[rows]
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

    def measure(self, reals: _Weighed, weights: np.ndarray) -> Draws:
        """Every metric in every draw of a block. What is left undefined by a draw that has none of
        a class is NaN.
        """
        own = np.take(weights, self.groups, axis=1)
        below = _running(own)
        fakes = below[:, -1].astype(np.float64)
        count = fakes + reals.total
        true, false = fakes - below[:, self.first_called], reals.called
        with np.errstate(divide="ignore", invalid="ignore"):
            nll, brier = ((own @ self.errors.astype(own.dtype) + reals.errors) / count[:, None]).T
            found = {"accuracy": (true + reals.total - false) / count, "nll": nll, "brier": brier}
            if len(self.groups):
                found["recall"] = true / fakes
            if self.have_reals:
                found["false_positive_rate"] = false / reals.total
            if not (len(self.groups) and self.have_reals):
                return found
            found["balanced_accuracy"] = (found["recall"] + 1 - found["false_positive_rate"]) / 2
            found["precision"] = true / (true + false)
            found["f1"] = 2 * true / (true + false + fakes)
            found |= self._over_thresholds(reals, own, below)
        return found

    def _over_thresholds(self, reals: _Weighed, own: np.ndarray, below: np.ndarray) -> Draws:
        """The metrics that have no threshold, from the weights of reals and of fakes below each
        fake's score: as `model.metrics`, and `tests/model/test_bootstrap.py` holds them together.
        """
        fakes = below[:, -1].astype(np.float64)
        lower = np.take(reals.below, self.left, axis=1)
        ordered = _dot(own, lower).astype(np.float64)
        if len(self.tied):
            level = reals.below[:, self.right[self.tied]] - lower[:, self.tied]
            ordered += _dot(own[:, self.tied], level) / 2
        found = {"auroc": ordered / (fakes * reals.total)}
        false = np.subtract(reals.below[:, -1:], lower, out=lower)  # reals as high or higher
        draw = np.arange(len(below))
        for name, rate in (("tpr_at_fpr_1", 0.01), ("tpr_at_fpr_5", 0.05)):
            allowed = np.floor(rate * reals.total + 1e-9).astype(own.dtype)
            too_low = np.count_nonzero(false > allowed[:, None], axis=1)
            found[name] = 1 - below[draw, too_low] / fakes
        before = np.take(below, self.first, axis=1) if self.own_ties else below[:, :-1]
        true = below[:, -1:] - before  # fakes as high or higher
        found["eer"] = self._equal_error_rate(reals, below, false, true)
        false += true
        false += 1e-30  # where there are neither
        found["average_precision"] = _dot(own, np.divide(true, false, out=true)) / fakes
        return found

    def _equal_error_rate(
        self, reals: _Weighed, below: np.ndarray, false: np.ndarray, true: np.ndarray
    ) -> np.ndarray:
        """The ROC curve bends only where there are fakes, so it is known from its two corners at
        each of their scores.
        """
        draw = np.arange(len(below))
        fakes = below[:, -1].astype(np.float64)
        gap = false / reals.below[:, -1:]  # FPR less FNR
        gap += true / below[:, -1:]
        # The highest score from which on FPR >= FNR; it falls as scores rise.
        at = np.maximum(np.count_nonzero(gap >= 1, axis=1) - 1, 0)
        false_before = (reals.total - reals.below[draw, self.right[at]]) / reals.total
        true_before = 1 - below[draw, self.end[at]] / fakes
        false_after, true_after = false[draw, at] / reals.total, true[draw, at] / fakes
        before, after = false_before + true_before - 1, false_after + true_after - 1
        share = np.where(after > before, -before / (after - before), 0)
        inside = false_before + share * (false_after - false_before)
        return np.where(before >= 0, 1 - true_before, inside)


def _running(weights: np.ndarray) -> np.ndarray:
    """Running sums with a 0 in front: (B, n) -> (B, n + 1)."""
    sums = np.empty((len(weights), weights.shape[1] + 1), weights.dtype)
    sums[:, 0] = 0
    np.cumsum(weights, axis=1, out=sums[:, 1:])
    return sums


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sums of products along each row: (B, n), (B, n) -> (B,)."""
    return np.vecdot(a, b)


def _errors(probabilities: np.ndarray, label: int) -> np.ndarray:
    """NLL and squared error of each image: (n, 2)."""
    given = given_to_truth(np.full(len(probabilities), label), probabilities)
    return np.stack([-np.log(given), np.square(probabilities - label)], axis=1)


# Metrics by the classes whose groups they rest on.
_OF_FAKES = ("recall",)
_OF_REALS = ("false_positive_rate",)
_OF_ALL = ("accuracy", "nll", "brier")
_UNBOUNDED = ("nll",)


def intervals(images: Images, groups: Groups, draws: Draws) -> dict[str, list[float]]:
    """[low, high] for every metric that `draws` allow to say something about.

    A metric is left out where it rests on fewer than two groups, or where half of the draws left it
    undefined.
    """
    reals, fakes = groups.count(images.reals), groups.count(images.fakes)
    both = groups.count(np.concatenate([images.reals, images.fakes]))
    found = {}
    for name, values in draws.items():
        independent = min(reals, fakes)
        if name in _OF_ALL:
            independent = both
        elif name in (*_OF_FAKES, *_OF_REALS):
            independent = fakes if name in _OF_FAKES else reals
        ends = () if name in _UNBOUNDED else (0.0, 1.0)
        if (one := interval(values, independent, ends)) is not None:
            found[name] = one
    return found


def interval(
    values: np.ndarray, independent: int, ends: tuple[float, ...] = (0.0, 1.0)
) -> list[float] | None:
    """[low, high] from a metric's values in all draws, resting on `independent` groups; `ends` are
    values at which draws that all agree do not mean certainty. None where there is none.
    """
    known = values[~np.isnan(values)]
    if independent < 2 or 2 * len(known) < len(values):
        return None
    low, high = (float(q) for q in np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    reach = 1 - ((1 - LEVEL) / 2) ** (1 / independent)
    if low == high and low in ends:
        return [0.0, reach] if low == 0 else [1 - reach, 1.0]
    return [low, high]
