"""Compare the evaluations of any number of detectors on the same images: one table per set, with
paired 95 % intervals.

Main entry: `side_by_side(runs)` takes a list of `ComparedRun(name, scores, images_per_s)`:

- `name`: a text, different for each run (`named_runs(names)` makes names unique: a second `a`
  becomes `a (2)`, and none is named `MEAN`).
- `scores`: a `ScoreTable`. The tables of all runs come from one call of `shared_samples()` of
  `compare.py`.
- `images_per_s`: the speed, or None (default).

It returns the dict below (null is None), with the sets that all runs measured. One more run is in
it: `mean_of(runs)`, named `MEAN`, whose probability is the mean of all runs (threshold 0.5). It
raises `ScoresError` (a `ValueError`) if there is no such set, or if the runs borrowed the real
images of a set (its reference reals) from different sets, of equal size or not.

    {set: {"images": n, "reals": n, "fakes": n, "reference": set of the reference reals or null,
           "best": name of the run with the highest AUROC or null (no run has an AUROC),
           "common": {"1": threshold or null, "5": threshold or null},
           "runs": [RUN, ...],             # by AUROC, the highest first; else as given
           "sources": {source: {run: AUROC or null}},
           "generators": {generator: {run: recall at 5 % false positives, or null}},
           "perturbed_alike": whether all runs with perturbations have them of the same images,
           "stability": {"sources": n, "mean": rho, "least": rho} or null}}

- `best`: may be `MEAN`.
- `common`: thresholds that are the same for all runs. Each is the lowest at which at most 1 % (5 %)
  of the real images, counted over all runs together, are called fake; a single run can have more.
  It is null if the set has no real images. `MEAN` does not count.
- `stability`: whether the sources agree on the order of the runs without `MEAN`. For each pair of
  sources, rho is the rank correlation (Spearman) of the runs' AUROCs; `mean` and `least` are over
  all pairs. It is null if no pair has a rho, such as with one source or one run.

A RUN has `name`, its decision `threshold`, `trained_on` (whether it was trained on the set or on
its reference), `maybe_trained_on` (whether it was trained on another set with one of these names),
`ece` (calibration error; null if the set has only one class), `images_per_s` or null, and:

- `auroc`, `recall` and `false_positive_rate` (at `threshold`), `recall_at_1` and `recall_at_5` (at
  the run's own threshold for 1 % and 5 % false positives). Each is {"value", "low", "high",
  "behind"}. `value` is null if the set lacks a class that the figure needs. `low` and `high` are
  the ends of its interval, null if it depends on fewer than two groups (images that are resampled
  together), or is undefined in most resamples. `behind` is the interval [low, high] of this value
  minus that of the best run. It is null for the best run itself, without one, where `low` is null,
  and for AUROC and recall at a rate where the difference is the same in all resamples;
- `common`: {"1": {"recall", "false_positive_rate"}, "5": ...}, at the common thresholds; null
  without such images or without a threshold;
- `worst_source`, `worst_perturbation` (AUROC), `worst_generator`: each {"name", "value", "images"}
  or null. `images` counts those of the source (its own), the perturbation or the generator.
  `worst_perturbation` is null for all runs unless `perturbed_alike`;
- `ranks`: [best, worst] rank of the run over the sources, or null. `MEAN` has no ranks.

A source that has only reals is measured against all fakes of the set, and a source that has only
fakes against all reals (`completed()`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa

from model.evaluation.bootstrap import (
    Images,
    intervals,
    resample,
)
from model.evaluation.compare import Resampled, interval_of_change
from model.evaluation.report import Rows, lines_of, rows_of_set
from model.evaluation.scores import ScoresError, ScoreTable
from model.metrics import measure
from model.score import DEFAULT_THRESHOLD

MEAN = "mean of all"
"""Name of the table row for the mean probability of all runs."""

FIGURES = {
    "auroc": "auroc", "recall": "recall", "false_positive_rate": "false_positive_rate",
    "recall_at_1": "tpr_at_fpr_1", "recall_at_5": "tpr_at_fpr_5",
}  # fmt: skip
"""Metrics with intervals: name in the result -> name in `model.metrics`."""

RATES = (1, 5)
"""False-positive rates of the common thresholds, in percent."""

_SEEN = ("trained_on", "maybe_trained_on")
"""Entries of an evaluation with the sets whose images the detector has, or may have, learned."""


@dataclass(frozen=True, eq=False)
class ComparedRun:
    """One run: its name in the table, its scores (from `shared_samples`) and its speed."""

    name: str
    scores: ScoreTable
    images_per_s: float | None = None


def named_runs(names: Sequence[str]) -> list[str]:
    """Make names unique: the second `a` becomes `a (2)`, or `a (3)` if a run has that name."""
    taken, unique = {MEAN}, []
    for name in names:
        numbered = (f"{name} ({number})" for number in count(2))
        free = (other for other in numbered if other not in taken and other not in names)
        unique.append(next(free) if name in taken else name)
        taken.add(unique[-1])
    return unique


def mean_of(runs: Sequence[ComparedRun]) -> ComparedRun:
    """Build the run of the ensemble: the mean of all probabilities for each image, threshold 0.5.

    Its time per image is the sum over all runs; its speed is None if one run has no speed.
    """
    probabilities = np.mean([run.scores.numbers("probability") for run in runs], axis=0)
    table = runs[0].scores.table
    index = table.column_names.index("probability")
    table = table.set_column(index, table.schema.field(index), pa.array(probabilities.tolist()))
    about = runs[0].scores.evaluation
    sets = {name: {**entry, "robustness": None} for name, entry in about["sets"].items()}
    seen = {
        key: sorted({name for run in runs for name in run.scores.evaluation.get(key, [])})
        for key in _SEEN
    }
    evaluation = {**about, "sets": sets, "threshold": DEFAULT_THRESHOLD, "temperature": 1.0,
                  "calibration": None, **seen}  # fmt: skip
    speeds = [run.images_per_s for run in runs]
    together = None
    if all(speeds):
        together = 1 / sum(1 / speed for speed in speeds if speed)
    return ComparedRun(MEAN, ScoreTable(table, evaluation), together)


def side_by_side(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """Compute the table of all runs and of their mean; layout in the module docstring.

    Raises:
        ScoresError: the runs have no set in common, or different reference reals.
    """
    runs = [*runs, mean_of(runs)]
    sets = {}
    for name in runs[0].scores.evaluation["sets"]:
        if all(name in run.scores.evaluation["sets"] for run in runs):
            rows = [rows_of_set(run.scores, name) for run in runs]
            if not all(rows[0].same_references(other) for other in rows[1:]):
                raise ScoresError(
                    f"{name} has different reference reals in some of the runs; measure all runs "
                    "with the same --reference-reals"
                )
            sets[name] = _set(name, runs, rows)
    if not sets:
        raise ScoresError("the runs have no set in common; measure all runs on the same --shards")
    return sets


def _set(name: str, runs: Sequence[ComparedRun], rows: Sequence[Rows]) -> dict[str, Any]:
    """Compute the entry of one set."""
    lines = lines_of(rows[0])
    whole = lines.get("reference", lines["overall"])
    sources = {key[1]: images for key, images in lines.items() if key[0] == "sources"}
    generators = {key[1]: images for key, images in lines.items() if key[0] == "generators"}
    measured = [
        _measured(run, of_run, whole) for run, of_run in zip(runs, rows, strict=True)
    ]  # fmt: skip
    order = sorted(range(len(runs)), key=lambda i: -(measured[i][0]["auroc"] or 0))
    best = order[0] if measured[order[0]][0]["auroc"] is not None else None
    aurocs = {
        source: [_auroc(of_run, completed(images, whole)) for of_run in rows]
        for source, images in sorted(sources.items())
    }
    recalls = {
        generator: [_recall_at_5(of_run, images.fakes, whole.reals) for of_run in rows]
        for generator, images in sorted(generators.items())
    }
    common = {
        rate: common_threshold([r.probability[whole.reals] for r in rows[:-1]], rate / 100)
        for rate in RATES
    }
    # The mean is not ranked: it is not independent of the other runs.
    ranked = np.array([values[:-1] for values in aurocs.values() if None not in values], float)
    known = {name, rows[0].reference}
    of = {name: len(images.reals) + len(images.fakes) for name, images in sources.items()}
    by_generator = {name: len(images.fakes) for name, images in generators.items()}
    robustness = [run.scores.evaluation["sets"][name]["robustness"] for run in runs]
    alike = _perturbed_alike([entry for entry in robustness if entry])
    entries = []
    for index in order:
        figures = measured[index][0]
        entries.append(
            {
                "name": runs[index].name,
                "threshold": runs[index].scores.evaluation["threshold"],
                **{
                    key: not known.isdisjoint(runs[index].scores.evaluation.get(key, []))
                    for key in _SEEN
                },
                **_with_intervals(
                    rows[index], whole, measured[index], None if best is None else measured[best]
                ),
                "common": {
                    str(rate): _rates(rows[index], whole, threshold)
                    for rate, threshold in common.items()
                },
                "ece": figures["ece"],
                "worst_source": _worst({n: values[index] for n, values in aurocs.items()}, of),
                "worst_generator": _worst(
                    {n: values[index] for n, values in recalls.items()}, by_generator
                ),
                "worst_perturbation": _worst_perturbation(robustness[index]) if alike else None,
                "ranks": _range_of_ranks(ranked, index),
                "images_per_s": runs[index].images_per_s,
            }
        )
    names = [run.name for run in runs]
    return {
        "images": len(whole.reals) + len(whole.fakes),
        "reals": len(whole.reals),
        "fakes": len(whole.fakes),
        "reference": rows[0].reference or None,
        "best": None if best is None else names[best],
        "common": {str(rate): threshold for rate, threshold in common.items()},
        "runs": entries,
        "sources": {n: dict(zip(names, values, strict=True)) for n, values in aurocs.items()},
        "generators": {n: dict(zip(names, values, strict=True)) for n, values in recalls.items()},
        "perturbed_alike": alike,
        "stability": stability(ranked) if len(ranked) > 1 else None,
    }


def _measured(run: ComparedRun, rows: Rows, whole: Images) -> tuple[dict[str, Any], Resampled]:
    """Compute the metrics of a run on a whole set, and their values in all resamples. The resamples
    are the same for every run.
    """
    threshold = run.scores.evaluation["threshold"]
    chosen = np.concatenate([whole.reals, whole.fakes])
    metrics = measure(rows.labels[chosen], rows.probability[chosen], threshold)
    resamples = resample(rows.probability, {"": whole}, rows.groups, threshold)[""]
    return vars(metrics), Resampled(rows.probability, threshold, resamples)


def _with_intervals(
    rows: Rows,
    whole: Images,
    own: tuple[dict[str, Any], Resampled],
    best: tuple[dict[str, Any], Resampled] | None,
) -> dict[str, Any]:
    """Return the `FIGURES` of one run: value, interval, interval of the difference to the best."""
    ends = intervals(whole, rows.groups, own[1].metrics)
    result = {}
    for name, metric in FIGURES.items():
        low, high = ends.get(metric) or (None, None)
        behind = None
        if best and own is not best:
            behind = interval_of_change(metric, whole, rows.groups, best[1], own[1])
        value = own[0][metric]
        result[name] = {"value": value, "low": low, "high": high, "behind": behind}
    return result


def completed(images: Images, whole: Images) -> Images:
    """Return the images of a line. A missing class is filled with all images of the set."""
    return Images(
        images.reals if len(images.reals) else whole.reals,
        images.fakes if len(images.fakes) else whole.fakes,
    )


def _auroc(rows: Rows, images: Images) -> float | None:
    chosen = np.concatenate([images.reals, images.fakes])
    return measure(rows.labels[chosen], rows.probability[chosen]).auroc


def _recall_at_5(rows: Rows, fakes: np.ndarray, reals: np.ndarray) -> float | None:
    """Return the recall of `fakes` at the run's own threshold for 5 % false positives on `reals`;
    None without reals or fakes.
    """
    if not len(reals) or not len(fakes):
        return None
    chosen = np.concatenate([reals, fakes])
    return measure(rows.labels[chosen], rows.probability[chosen]).tpr_at_fpr_5


def common_threshold(reals: Sequence[np.ndarray], rate: float) -> float | None:
    """Return one threshold for all runs: the lowest at which at most the share `rate` (0 to 1) of
    the pooled reals of all runs is called fake. None without reals.

    `reals` are the probabilities of fake of the real images, one array per run. False-positive
    rates that differ between runs at this threshold show that their probabilities have different
    scales.
    """
    pooled = np.sort(np.concatenate(reals))
    if not len(pooled):
        return None
    allowed = int(np.floor(rate * len(pooled) + 1e-9))
    # Just above the highest score that must not be called fake.
    return float(np.nextafter(pooled[len(pooled) - 1 - allowed], np.inf))


def _rates(rows: Rows, whole: Images, threshold: float | None) -> dict[str, float | None]:
    """Return recall and false-positive rate at a threshold, None where there are no images."""
    rates: dict[str, float | None] = {"recall": None, "false_positive_rate": None}
    for name, images in (("recall", whole.fakes), ("false_positive_rate", whole.reals)):
        if threshold is not None and len(images):
            rates[name] = float((rows.probability[images] >= threshold).mean())
    return rates


def _worst(values: Mapping[str, float | None], images: Mapping[str, int]) -> dict[str, Any] | None:
    """Return the lowest value with its name and its number of images; None without values."""
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        return None
    name = min(known, key=lambda key: (known[key], key))
    return {"name": name, "value": known[name], "images": images[name]}


def _perturbed_alike(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the same images were perturbed, and equally many could be scored."""
    images = {
        (entry["images_sha256"], *((row["name"], row["images"]) for row in entry["perturbations"]))
        for entry in entries
    }
    return len(images) < 2


def _worst_perturbation(robustness: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not robustness:
        return None
    rows = robustness["perturbations"]
    return _worst(
        {row["name"]: row["auroc"] for row in rows}, {row["name"]: row["images"] for row in rows}
    )


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks, float64 (N,): 1 for the highest value. Equal values get their mean rank."""
    _, inverse, counts = np.unique(-values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return Spearman's rank correlation; None if all values of one input are equal."""
    centered = [of - of.mean() for of in (ranks(first), ranks(second))]
    norm = float(np.sqrt(np.prod([np.square(of).sum() for of in centered])))
    return float(centered[0] @ centered[1]) / norm if norm else None


def stability(values: np.ndarray) -> dict[str, Any] | None:
    """Measure how similarly the sources rank the runs. `values` is a metric, (sources, runs).

    Returns the mean and the least rank correlation over all pairs of sources, or None without a
    pair. 1: all sources rank the runs alike. Near 0: the choice of images decides which run wins.
    """
    pairs = [
        rho
        for i in range(len(values))
        for j in range(i)
        if (rho := spearman(values[i], values[j])) is not None
    ]
    if not pairs:
        return None
    return {"sources": len(values), "mean": float(np.mean(pairs)), "least": min(pairs)}


def _range_of_ranks(values: np.ndarray, index: int) -> list[float] | None:
    """Return [best, worst] rank of a run over the sources. None for the mean or without sources."""
    if not len(values) or index >= values.shape[1]:
        return None
    own = [float(ranks(row)[index]) for row in values]
    return [min(own), max(own)]
