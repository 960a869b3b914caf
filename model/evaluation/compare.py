"""Compare two evaluations of the same images: differences of the metrics with 95 % intervals, and
images whose verdict changed.

Main entries: `shared_samples(*tables, intersect=False)` takes two or more `ScoreTable`, one
argument each (from `read_scores(path)` of `scores.py`: a row per image, with label and
probability). It returns a tuple with a reduced copy of each table. The copies have the same images
in the same order: those that every evaluation could read. It raises `ScoresError` (a `ValueError`)
in three cases:

- The tables have different images (with `intersect=True`, those in all tables are kept instead).
- There is no image that all evaluations could read.
- An image is real in one table and fake in another.

`compare(before, after)` takes two of these copies. It returns a list with a `Line` for each set
that both evaluations measured, for each of its sources (if it has several) and for each generator.
Fields of a `Line`:

- `set`: the name of the set.
- `kind`: `sources` or `generators`; for a whole set `overall`, or `reference` if the real images
  come from another set.
- `name`: the name of the source or generator, "" for a whole set.
- `images`: the number of images.
- `changes`: a dict, metric of `COMPARED` -> `MetricChange`, or None if a table lacks the metric. A
  `MetricChange` has the values `before` and `after`, and the interval `low` to `high` of after -
  before (both None: no interval). The intervals come from bootstrap resamples that are the same for
  both evaluations, so the variation between images does not widen them. `interval_of_change`
  computes them from one `Resampled` for each run.

`compare()` raises `ScoresError` if the false-positive rates of a set come from different real
images (reference reals).

`flips(before, after)` takes the same two tables. It returns a list with a `Flip` for each image
whose verdict (fake or not, at each table's own threshold) changed, the largest change of the
probability first. A `Flip` has the texts `set`, `key`, `source` and `generator`; `label` (0 real, 1
fake); `before` and `after`, the probabilities of fake; and `fixed`, True if the verdict was wrong
and is right now.

`count_flips(before, changed)` takes the earlier table and the list from `flips()`. It returns a
list with a tuple per set and class: (set, "real" or "fake", images, flips to wrong, flips to
right).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from model.evaluation.bootstrap import (
    Groups,
    Images,
    Resamples,
    independent_groups,
    interval,
    intervals,
    resample,
)
from model.evaluation.report import LineKey, Rows, lines_of, rows_of_set
from model.evaluation.scores import ScoresError, ScoreTable
from model.metrics import measure
from sharding.format import CLASSES

COMPARED = ("auroc", "recall", "false_positive_rate")


@dataclass(frozen=True)
class MetricChange:
    """A metric in both runs, and the 95 % interval of the difference `after - before` (`low` and
    `high` are None if there is no interval).
    """

    before: float
    after: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Line:
    """One line of the comparison: a whole set, one source or one generator.

    `kind` is overall, reference, sources or generators. `changes` maps each metric of `COMPARED` to
    a `MetricChange`, or to None if one run lacks the metric.
    """

    set: str
    kind: str
    name: str
    images: int
    changes: Mapping[str, MetricChange | None]


@dataclass(frozen=True)
class Flip:
    """An image whose verdict changed. `fixed` is True if wrong became right, False if right became
    wrong. `before` and `after` are probabilities of fake.
    """

    set: str
    key: str
    source: str
    generator: str
    label: int
    before: float
    after: float
    fixed: bool


def shared_samples(*tables: ScoreTable, intersect: bool = False) -> tuple[ScoreTable, ...]:
    """Restrict all tables to the images that every run could read, in the order of the first table.

    Raises:
        ScoresError: the tables have different samples, or other files under the same key, and
            `intersect` is off; they share no sample or none that all runs could read; or an image
            is real in one table and fake in another.
    """
    runs = {2: "the two runs"}.get(len(tables), f"the {len(tables)} runs")
    keys = [
        list(zip(*(table.table.column(name).to_pylist() for name in ("set", "key")), strict=True))
        for table in tables
    ]
    row_of_key = [{key: row for row, key in enumerate(of_run)} for of_run in keys]
    common = [key for key in keys[0] if all(key in of_run for of_run in row_of_key)]
    if not common:
        raise ScoresError(f"{runs} have no image in common; nothing can be compared")
    if not intersect and any(len(common) != len(table) for table in tables):
        counts = [f"{len(table):,}" for table in tables]
        every = "both" if len(tables) == 2 else "all"
        raise ScoresError(
            f"{runs} are on different samples: {', '.join(counts[:-1])} and {counts[-1]} images, "
            f"{len(common):,} of them in {every}; measure {every} on the same sets and the same "
            "--subset, or compare only the shared images with --intersection"
        )
    rows = [np.array([of_run[key] for key in common]) for of_run in row_of_key]
    labels, valid = (
        np.array([t.numbers(name)[of] for t, of in zip(tables, rows, strict=True)])
        for name in ("label", "valid")
    )
    if (labels != labels[0]).any():
        other = "the other" if len(tables) == 2 else "another"
        first = common[int(np.argmax((labels != labels[0]).any(axis=0)))]
        raise ScoresError(f"{first[0]}:{first[1]} is real in one run and fake in {other}")
    hashes = [t.table.column("sha256").to_pylist() for t in tables]
    same = np.array([len({h[of[row]] for h, of in zip(hashes, rows, strict=True)}) == 1
                     for row in range(len(common))])  # fmt: skip
    if not intersect and not same.all():
        first = common[int(np.argmin(same))]
        raise ScoresError(
            f"{first[0]}:{first[1]} and {int((~same).sum()) - 1:,} more are other files in each of "
            f"{runs} (other SHA-256), so the set was packed again in between; measure all on the "
            "same set, or compare only equal files with --intersection"
        )
    kept = valid.astype(bool).all(axis=0) & same
    if not kept.any():
        raise ScoresError(
            f"{runs} have no image that all of them could read; nothing can be compared"
        )
    return tuple(
        ScoreTable(table.table.take(of[kept]), table.evaluation)
        for table, of in zip(tables, rows, strict=True)
    )


def compare(before: ScoreTable, after: ScoreTable) -> list[Line]:
    """Compare all sets that both runs measured. The tables must come from `shared_samples`.

    A set with a single source gets no source lines.
    """
    lines = []
    for name in before.evaluation["sets"]:
        if name not in after.evaluation["sets"]:
            continue
        rows = rows_of_set(before, name), rows_of_set(after, name)
        if not rows[0].same_references(rows[1]):
            raise ScoresError(
                f"{name} has different reference reals in the second run; measure both runs with "
                "the same --reference-reals"
            )
        if len(rows[0].labels):
            lines += _compare_set(name, rows, before.evaluation, after.evaluation)
    return lines


def _compare_set(
    name: str, rows: tuple[Rows, Rows], before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[Line]:
    images = lines_of(rows[0])
    if sum(key[0] == "sources" for key in images) < 2:
        images = {key: line_images for key, line_images in images.items() if key[0] != "sources"}
    images = {key: line_images for key, line_images in images.items() if key[0] != "classes"}
    if "reference" in images:  # "reference" replaces "overall", which may lack real images
        del images["overall"]
    thresholds = before["threshold"], after["threshold"]
    resamples = [
        resample(run.probability, images, rows[0].groups, threshold)
        for run, threshold in zip(rows, thresholds, strict=True)
    ]
    lines = []
    for key in sorted(images, key=_order):
        line_images = images[key]
        chosen = np.concatenate([line_images.reals, line_images.fakes])
        figures = [
            asdict(measure(run.labels[chosen], run.probability[chosen], threshold))
            for run, threshold in zip(rows, thresholds, strict=True)
        ]
        resampled = [
            Resampled(run.probability, threshold, of_run[key])
            for run, threshold, of_run in zip(rows, thresholds, resamples, strict=True)
        ]
        changes = {
            metric: _change(
                metric, figures, interval_of_change(metric, line_images, rows[0].groups, *resampled)
            )
            for metric in COMPARED
        }
        kind, own_name = (key, "") if isinstance(key, str) else key
        lines.append(Line(name, kind, own_name, len(chosen), changes))
    return lines


def _order(key: LineKey) -> tuple[int, str]:
    """Return the sort key of a line: the whole set, then sources, then generators, by name."""
    return (0, "") if isinstance(key, str) else (1 + (key[0] == "generators"), key[1])


def _change(
    metric: str, figures_of_runs: Sequence[Mapping[str, Any]], ends: list[float] | None
) -> MetricChange | None:
    before, after = (figures[metric] for figures in figures_of_runs)
    if before is None or after is None:
        return None
    low, high = ends if ends else (None, None)
    return MetricChange(before, after, low, high)


class Resampled(NamedTuple):
    """One run: probabilities of fake (N,) of all rows, decision threshold, and metrics of the
    images of a line in all resamples.
    """

    probability: np.ndarray
    threshold: float
    metrics: Resamples


def interval_of_change(
    metric: str, images: Images, groups: Groups, before: Resampled, after: Resampled
) -> list[float] | None:
    """Return the 95 % interval [low, high] of a metric of `after` minus that of `before`, from the
    values in the same resamples of the groups. None: a run has no such values, or there is no
    interval.

    It is [0, 0] if all scores are the same. Otherwise equal differences in all resamples say
    nothing about the variation: two runs without a false positive in 32 images can differ on other
    images. So the interval of recall and of false positives contains the interval that follows from
    those of both runs (`_square_and_add`).
    """
    if metric not in before.metrics or metric not in after.metrics:
        return None
    values = before.metrics[metric], after.metrics[metric]
    independent = independent_groups(images, groups)(metric)
    of_class = {"recall": images.fakes, "false_positive_rate": images.reals}
    rows = of_class.get(metric, np.concatenate([images.reals, images.fakes]))
    same_threshold = before.threshold == after.threshold or metric not in of_class
    if same_threshold and np.array_equal(before.probability[rows], after.probability[rows]):
        return [0.0, 0.0] if independent > 1 else None
    low_high = interval(values[1] - values[0], independent, ends=())
    own = [intervals(images, groups, {metric: of_run}).get(metric) for of_run in values]
    if metric not in of_class or own[0] is None or own[1] is None:
        return low_high
    low, high = _square_and_add((values[0], own[0]), (values[1], own[1]))
    if low_high:
        low, high = min(low, low_high[0]), max(high, low_high[1])
    return [low, high]


def _square_and_add(
    first: tuple[np.ndarray, list[float]], second: tuple[np.ndarray, list[float]]
) -> tuple[float, float]:
    """Return the interval of the difference of two shares, second minus first, from the values of
    each in the same resamples and its own interval: distances to the ends are squared and added,
    less what the correlation explains (Newcombe, "Improved confidence intervals for the difference
    between binomial proportions based on paired data", Statistics in Medicine 17, 1998, method 10).
    """
    (values, (low, high)), (others, (other_low, other_high)) = first, second
    share, other = float(np.nanmean(values)), float(np.nanmean(others))
    spread = math.sqrt(float(np.nanvar(values) * np.nanvar(others)))
    rho = 0.0
    if spread > 0:
        rho = float(np.nanmean((values - share) * (others - other))) / spread
        # Newcombe's correction for continuity, for the number of images that would vary as much.
        product = share * (1 - share) * other * (1 - other)
        rho = max(0.0, rho - spread / (2 * product)) if rho > 0 else max(rho, -1.0)

    def reach(down: float, up: float) -> float:
        return math.sqrt(max(0.0, down**2 + up**2 - 2 * rho * down * up))

    change = other - share
    return (
        change - reach(other - other_low, high - share),
        change + reach(other_high - other, share - low),
    )


def flips(before: ScoreTable, after: ScoreTable) -> list[Flip]:
    """Return all images whose verdict changed, the largest change of probability first.

    Each run uses its own decision threshold. The tables must come from `shared_samples`.
    """
    run_probabilities = [table.numbers("probability") for table in (before, after)]
    called = [
        probabilities >= table.evaluation["threshold"]
        for probabilities, table in zip(run_probabilities, (before, after), strict=True)
    ]
    labels = before.numbers("label").astype(np.int64)
    sets, names = before.codes("set")
    measured = [name in before.evaluation["sets"] for name in names]
    rows = np.flatnonzero((called[0] != called[1]) & np.array(measured, np.bool_)[sets])
    rows = rows[
        np.argsort(-np.abs(run_probabilities[1] - run_probabilities[0])[rows], kind="stable")
    ]
    columns = before.table.select(["set", "key", "source", "generator", "label"]).take(rows)
    return [
        Flip(
            **entry,
            before=float(run_probabilities[0][row]),
            after=float(run_probabilities[1][row]),
            fixed=bool(called[1][row] == (labels[row] == 1)),
        )
        for row, entry in zip(rows.tolist(), columns.to_pylist(), strict=True)
    ]


def count_flips(
    before: ScoreTable, changed: Sequence[Flip]
) -> list[tuple[str, str, int, int, int]]:
    """Return (set, class, images, broken, fixed) for each class of each measured set."""
    labels = before.numbers("label")
    counts = []
    for name in before.evaluation["sets"]:
        for label, said in enumerate(CLASSES):
            chosen = before.of_set(name) & (labels == label)
            if chosen.any():
                of_class = [
                    flip.fixed for flip in changed if flip.set == name and flip.label == label
                ]
                fixed = sum(of_class)
                counts.append((name, said, int(chosen.sum()), len(of_class) - fixed, fixed))
    return counts
