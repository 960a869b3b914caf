"""Any number of runs on the same images side by side: one table, with paired intervals.

`side_by_side` gives, as JSON, for each set that all runs measured

    {set: {"images": n, "reals": n, "fakes": n, "reference": set of the reals or null,
           "best": name of the run with the highest AUROC,
           "common": {"1": p, "5": p},     # one threshold for all; see `common_threshold`
           "runs": [RUN, ...],             # the best AUROC first
           "sources": {source: {run: AUROC or null}},
           "generators": {generator: {run: recall or null}},
           "stability": {"sources": n, "mean": rho, "least": rho} or null}}   # see `stability`

A RUN has its `name` and FIGURES, each
`{"value": v, "low": l, "high": h, "behind": [low, high] or null}` (`behind` is the 95 % interval of
its difference to the best run, on the same resamples): `auroc`; `recall` and `false_positive_rate`
at its decision `threshold`; `recall_at_1` and `recall_at_5`, at its own threshold that calls so
many of these reals fake. Then `common`: recall and false positives at each common threshold; `ece`;
`worst_source` (AUROC), `worst_generator` (recall at 5 % false positives) and `worst_perturbation`
(AUROC), each with a name or null; `ranks`, the best and the worst of its ranks over sources;
`images_per_s` or null.

A source's AUROC is that of its images against all images of the class that it lacks, so that a
source of photographs alone has one too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from model.evaluation.bootstrap import Images, Resamples, interval, intervals, resample
from model.evaluation.report import Rows, lines_of, rows_of_set
from model.evaluation.scores import ScoresError, ScoreTable
from model.metrics import measure
from model.score import DEFAULT_THRESHOLD

MEAN = "mean of all"
"""What the row of the mean probability of all runs is called."""

FIGURES = {
    "auroc": "auroc", "recall": "recall", "false_positive_rate": "false_positive_rate",
    "recall_at_1": "tpr_at_fpr_1", "recall_at_5": "tpr_at_fpr_5",
}  # fmt: skip
"""The figures with intervals, and their names in `model.metrics`."""

RATES = (1, 5)
"""Percent of false positives."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run: its name in the table, its scores (of `shared_samples`), and how fast it was."""

    name: str
    scores: ScoreTable
    images_per_s: float | None = None


def named_runs(names: Sequence[str]) -> list[str]:
    """The same names, none of them twice: a second `a` is `a (2)`."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique


def mean_of(runs: Sequence[Run]) -> Run:
    """A run that gives each image the mean of all probabilities, and decides at 0.5; it takes as
    long as all of them together.
    """
    probabilities = np.mean([run.scores.numbers("probability") for run in runs], axis=0)
    table = runs[0].scores.table
    index = table.column_names.index("probability")
    table = table.set_column(index, table.schema.field(index), pa.array(probabilities.tolist()))
    about = runs[0].scores.evaluation
    sets = {name: {**entry, "robustness": None} for name, entry in about["sets"].items()}
    evaluation = {**about, "sets": sets, "threshold": DEFAULT_THRESHOLD, "temperature": 1.0,
                  "calibration": None}  # fmt: skip
    speeds = [run.images_per_s for run in runs]
    together = None
    if all(speeds):
        together = 1 / sum(1 / speed for speed in speeds if speed)
    return Run(MEAN, ScoreTable(table, evaluation), together)


def side_by_side(runs: Sequence[Run]) -> dict[str, Any]:
    """The figures of all runs and of their mean; see the module.

    Raises:
        ScoresError: they have no set in common, or other reference reals.
    """
    runs = [*runs, mean_of(runs)]
    sets = {}
    for name in runs[0].scores.evaluation["sets"]:
        if all(name in run.scores.evaluation["sets"] for run in runs):
            rows = [rows_of_set(run.scores, name) for run in runs]
            if any(not np.array_equal(rows[0].own, other.own) for other in rows[1:]):
                raise ScoresError(
                    f"{name} has other reference reals in some of the runs; measure all with the "
                    "same --reference-reals"
                )
            sets[name] = _set(name, runs, rows)
    if not sets:
        raise ScoresError("the runs have no set in common; measure all on the same --shards")
    return sets


def _set(name: str, runs: Sequence[Run], rows: Sequence[Rows]) -> dict[str, Any]:
    """The figures of one set."""
    lines = lines_of(rows[0])
    whole = lines.get("reference", lines["overall"])
    sources = {key[1]: images for key, images in lines.items() if key[0] == "sources"}
    generators = {key[1]: images for key, images in lines.items() if key[0] == "generators"}
    measured = [
        _measured(run, of_run, whole) for run, of_run in zip(runs, rows, strict=True)
    ]  # fmt: skip
    order = sorted(range(len(runs)), key=lambda i: -(measured[i][0]["auroc"] or 0))
    best = order[0]
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
    # The mean is made of the others; it ranks with nobody.
    ranked = np.array([values[:-1] for values in aurocs.values() if None not in values], float)
    entries = []
    for index in order:
        figures = measured[index][0]
        entries.append(
            {
                "name": runs[index].name,
                "threshold": runs[index].scores.evaluation["threshold"],
                **_with_intervals(rows[index], whole, measured[index], measured[best]),
                "common": {
                    str(rate): _rates(rows[index], whole, threshold)
                    for rate, threshold in common.items()
                },
                "ece": figures["ece"],
                "worst_source": _worst({n: values[index] for n, values in aurocs.items()}),
                "worst_generator": _worst({n: values[index] for n, values in recalls.items()}),
                "worst_perturbation": _worst_perturbation(runs[index], name),
                "ranks": _range_of_ranks(ranked, index),
                "images_per_s": runs[index].images_per_s,
            }
        )
    names = [run.name for run in runs]
    reference = runs[0].scores.evaluation["reference_reals"]
    return {
        "images": len(whole.reals) + len(whole.fakes),
        "reals": len(whole.reals),
        "fakes": len(whole.fakes),
        "reference": reference["set"] if "reference" in lines else None,
        "best": names[best],
        "common": {str(rate): threshold for rate, threshold in common.items()},
        "runs": entries,
        "sources": {n: dict(zip(names, values, strict=True)) for n, values in aurocs.items()},
        "generators": {n: dict(zip(names, values, strict=True)) for n, values in recalls.items()},
        "stability": stability(ranked) if len(ranked) > 1 else None,
    }


def _measured(run: Run, rows: Rows, whole: Images) -> tuple[dict[str, Any], Resamples]:
    """The metrics of a run on the whole of a set, and their resamples, which are the same images
    for every run.
    """
    threshold = run.scores.evaluation["threshold"]
    chosen = np.concatenate([whole.reals, whole.fakes])
    metrics = measure(rows.labels[chosen], rows.probability[chosen], threshold)
    resamples = resample(rows.probability, {"": whole}, rows.groups, threshold)[""]
    return vars(metrics), resamples


def _with_intervals(
    rows: Rows,
    whole: Images,
    own: tuple[dict[str, Any], Resamples],
    best: tuple[dict[str, Any], Resamples],
) -> dict[str, Any]:
    """`FIGURES` of one run: value, interval, and that of the difference to the best one."""
    ends = intervals(whole, rows.groups, own[1])
    groups = [rows.groups.count(images) for images in (whole.reals, whole.fakes)]
    result = {}
    for name, metric in FIGURES.items():
        low, high = ends.get(metric) or (None, None)
        behind = None
        if own is not best and metric in own[1] and metric in best[1]:
            of_metric = {"recall": groups[1], "false_positive_rate": groups[0]}
            independent = of_metric.get(metric, min(groups))
            behind = interval(own[1][metric] - best[1][metric], independent, ends=())
        value = own[0][metric]
        result[name] = {"value": value, "low": low, "high": high, "behind": behind}
    return result


def completed(images: Images, whole: Images) -> Images:
    """The images of a line, with all of the set's of the class that it lacks."""
    return Images(
        images.reals if len(images.reals) else whole.reals,
        images.fakes if len(images.fakes) else whole.fakes,
    )


def _auroc(rows: Rows, images: Images) -> float | None:
    chosen = np.concatenate([images.reals, images.fakes])
    return measure(rows.labels[chosen], rows.probability[chosen]).auroc


def _recall_at_5(rows: Rows, fakes: np.ndarray, reals: np.ndarray) -> float | None:
    """The recall of some fakes at a run's own threshold for 5 % of the reals of the set."""
    if not len(reals) or not len(fakes):
        return None
    chosen = np.concatenate([reals, fakes])
    return measure(rows.labels[chosen], rows.probability[chosen]).tpr_at_fpr_5


def common_threshold(reals: Sequence[np.ndarray], rate: float) -> float | None:
    """The lowest threshold that calls at most a share `rate` of all real images of all runs taken
    together fake; None without reals. What it calls of each run's says whether 0.9 means the same
    to them.
    """
    pooled = np.sort(np.concatenate(reals))
    if not len(pooled):
        return None
    allowed = int(np.floor(rate * len(pooled) + 1e-9))
    # Just above the highest score that may not be called.
    return float(np.nextafter(pooled[len(pooled) - 1 - allowed], np.inf))


def _rates(rows: Rows, whole: Images, threshold: float | None) -> dict[str, float | None]:
    """Recall and false positives at a threshold."""
    rates: dict[str, float | None] = {"recall": None, "false_positive_rate": None}
    for name, images in (("recall", whole.fakes), ("false_positive_rate", whole.reals)):
        if threshold is not None and len(images):
            rates[name] = float((rows.probability[images] >= threshold).mean())
    return rates


def _worst(values: Mapping[str, float | None]) -> dict[str, Any] | None:
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        return None
    name = min(known, key=lambda key: (known[key], key))
    return {"name": name, "value": known[name]}


def _worst_perturbation(run: Run, name: str) -> dict[str, Any] | None:
    robustness = run.scores.evaluation["sets"][name].get("robustness")
    if not robustness:
        return None
    return _worst({row["name"]: row["auroc"] for row in robustness["perturbations"]})


def ranks(values: np.ndarray) -> np.ndarray:
    """1 for the highest, float64 (N,); those that are equal share the mean of their ranks."""
    _, inverse, counts = np.unique(-values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's rank correlation; None where one of them has all runs alike."""
    centered = [of - of.mean() for of in (ranks(first), ranks(second))]
    norm = float(np.sqrt(np.prod([np.square(of).sum() for of in centered])))
    return float(centered[0] @ centered[1]) / norm if norm else None


def stability(values: np.ndarray) -> dict[str, Any] | None:
    """How alike sources rank the runs: `values` is a figure, (sources, runs). The mean and the
    least rank correlation of two sources: 1 where all rank them alike, near 0 where the choice of
    images decides who wins.
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
    """The best and the worst rank of a run over sources; none of the mean."""
    if not len(values) or index >= values.shape[1]:
        return None
    own = [float(ranks(row)[index]) for row in values]
    return [min(own), max(own)]
