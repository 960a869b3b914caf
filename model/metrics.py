"""Compute the metrics of a group of images from their labels and probabilities.

Main entry: `measure(labels, probabilities, threshold)` returns a `Metrics`.

- `labels`: an array of ints (N,), 0 real and 1 fake.
- `probabilities`: an array of floats (N,), the probability of fake of each image.
- `threshold`: an image counts as fake if its probability is at least this (0.5 by default).

The fields of `Metrics` are `count`, `reals`, `fakes` (numbers of images), `accuracy`,
`balanced_accuracy`, `recall`, `false_positive_rate`, `precision`, `f1`, `auroc`,
`average_precision`, `eer` (equal error rate), `tpr_at_fpr_1`, `tpr_at_fpr_5` (recall at 1 % and 5 %
false positives), `nll` (negative log-likelihood), `brier` (mean squared error of the probability)
and `ece` (expected calibration error). Rates are 0 to 1. A metric that cannot be computed, such as
AUROC with one class only, is None; accuracy is then the accuracy on one class.

`measure_sources(labels, probabilities, sources, threshold)` also takes a list with the name of each
image's source and returns a dict, source -> `Metrics`. `accuracy_of(metrics)` returns the balanced
accuracy, or with one class the accuracy.

`measure_sets(scored, temperature, threshold)` takes a dict, name of a set -> a pair of its
`ShardSet` and its `Scores`, and returns a `Validation`: `sets` (name -> `Metrics`), `sources`
("set/source" -> `Metrics`) and `selection`, the mean of `accuracy_of` over the sets.

`what_is_missing(reals, fakes, unscored)` takes the numbers of real and fake images, and the pair of
these numbers for images without a score (default: none). It returns a sentence for the reader if a
class is missing, else None.

The other functions compute one metric each from the same arrays. `roc(labels, scores)` takes any
scores that are higher for fakes. It returns the numbers of false and of true positives at every
threshold, two int64 arrays. `tpr_at_fpr(false, true, rate)` and `equal_error_rate(false, true)`
take these arrays. The first returns the highest recall at a false-positive rate of at most `rate`;
the second returns the rate at which false positives and false negatives are equally frequent.
`area_under_roc(false, true)` and `average_precision(false, true)` take them too.
`given_to_truth()` returns the probability of each image's true class. `ECE_BINS` is the number of
bins of the ECE.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from reprlib import repr as short
from typing import Any

import numpy as np
import torch

import console
from model.lean_import import import_part
from model.score import DEFAULT_THRESHOLD, Scores
from model.verdict import probability
from sharding.format import ShardSet

classification = import_part("torchmetrics", "functional.classification")

ECE_BINS = 15


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Figures of a group of images. *Fake* is the positive class; rates are 0 to 1.

    With one class only, a figure that needs both is None.
    """

    count: int
    """Images that could be read."""
    reals: int
    """Real images."""
    fakes: int
    """Fake images."""
    accuracy: float | None
    """Share of all images that are classified correctly."""
    balanced_accuracy: float | None
    """Mean of recall and of 1 - false-positive rate."""
    recall: float | None
    """Share of the fake images called fake."""
    false_positive_rate: float | None
    """Share of the real images called fake."""
    f1: float | None
    """Harmonic mean of precision and recall."""
    auroc: float | None
    """Area under the ROC curve."""
    precision: float | None
    """Share of fakes among the images called fake. None if no image is called fake."""
    average_precision: float | None
    """Area under the precision-recall curve."""
    eer: float | None
    """Error rate at the threshold where both error rates are equal."""
    tpr_at_fpr_1: float | None
    """Highest recall of any threshold with at most 1 % false positives."""
    tpr_at_fpr_5: float | None
    """Highest recall of any threshold with at most 5 % false positives."""
    nll: float | None
    """Negative log-likelihood, natural logarithm."""
    brier: float | None
    """Mean squared error of the probability."""
    ece: float | None
    """Expected calibration error, over 15 bins."""

    @classmethod
    def from_json(cls, saved: Any, where: str = "it") -> "Metrics":
        """Rebuild metrics from JSON. A figure that an earlier version did not compute is None; one
        that is no longer computed is ignored.

        Raises:
            ValueError: `saved` is no object, or a figure no number. `where` is named in the error.
        """
        saved = _object(saved, f"{where} has metrics")
        values: dict[str, Any] = {field.name: saved.get(field.name) for field in fields(cls)}
        for name, value in values.items():
            kinds = (int,) if name in ("count", "reals", "fakes") else (int, float, type(None))
            if type(value) not in kinds:
                raise ValueError(f"{where} has {name} {short(value)}, expected a number")
        return cls(**values)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} {short(value)}, expected an object")
    return value


def measure(
    labels: np.ndarray, probabilities: np.ndarray, threshold: float = DEFAULT_THRESHOLD
) -> Metrics:
    """Compute all metrics of one group of images. An image is called fake if its probability is at
    least `threshold`.
    """
    labels = np.asarray(labels, np.int64)
    probabilities = np.asarray(probabilities, np.float64)
    is_fake = labels == 1
    called = probabilities >= threshold
    count, fakes = len(labels), int(is_fake.sum())
    reals = count - fakes
    recall = float(called[is_fake].mean()) if fakes else None
    false_positive_rate = float(called[~is_fake].mean()) if reals else None
    metrics = {
        "accuracy": float((called == is_fake).mean()) if count else None,
        "recall": recall,
        "false_positive_rate": false_positive_rate,
        "nll": negative_log_likelihood(labels, probabilities) if count else None,
        "brier": float(np.square(probabilities - labels).mean()) if count else None,
    }
    if recall is not None and false_positive_rate is not None:
        curve = roc(labels, probabilities)
        true, positives = int(called[is_fake].sum()), int(called.sum())
        metrics |= {
            "balanced_accuracy": (recall + 1 - false_positive_rate) / 2,
            "precision": true / positives if positives else None,
            "f1": 2 * true / (positives + fakes),
            "auroc": area_under_roc(*curve),
            "average_precision": average_precision(*curve),
            "eer": equal_error_rate(*curve),
            "tpr_at_fpr_1": tpr_at_fpr(*curve, 0.01),
            "tpr_at_fpr_5": tpr_at_fpr(*curve, 0.05),
            "ece": expected_calibration_error(labels, probabilities),
        }
    values: dict[str, Any] = dict.fromkeys(field.name for field in fields(Metrics))
    values |= {"count": count, "reals": reals, "fakes": fakes} | metrics
    return Metrics(**values)


def roc(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the counts of false positives and of true positives, int64, at every threshold from
    the highest score down: the corners of the ROC curve, from (0, 0) to (reals, fakes).
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # True at the last of equal scores
    true = np.cumsum(labels[order] == 1)[last]
    false = np.flatnonzero(last) + 1 - true
    return np.append(0, false), np.append(0, true)


def area_under_roc(false: np.ndarray, true: np.ndarray) -> float:
    """Return the share of pairs of a fake and a real image in which the fake has the higher score;
    a tie counts as half a pair. Computed from the whole numbers of `roc`: a perfect ranking is
    exactly 1. torchmetrics adds up in float32, where it can be 1.0000001.
    """
    twice = int(np.sum(np.diff(false) * (true[1:] + true[:-1])))
    return twice / (2 * int(false[-1]) * int(true[-1]))


def average_precision(false: np.ndarray, true: np.ndarray) -> float:
    """Return the mean, over the fakes, of the precision at the threshold that is the fake's score;
    `false` and `true` as from `roc`. A perfect ranking is exactly 1.
    """
    precision = true[1:] / (true[1:] + false[1:])
    return float(np.sum(np.diff(true) * precision) / true[-1])


def tpr_at_fpr(false: np.ndarray, true: np.ndarray, rate: float) -> float:
    """Return the highest recall at a false-positive rate of at most `rate`, without interpolation
    between the thresholds of `roc`.
    """
    return float(true[false <= rate * false[-1] + 1e-9].max() / true[-1])


def equal_error_rate(false: np.ndarray, true: np.ndarray) -> float:
    """Return the rate at which the false-positive rate equals the false-negative rate, on the curve
    of `roc` with its corners joined by straight lines. torchmetrics takes the nearest corner
    instead, which makes the result jump.
    """
    fpr, fnr = false / false[-1], 1 - true / true[-1]
    after = int(np.argmax(fpr >= fnr))  # not 0: at index 0 fpr is 0, fnr is 1
    gap_before, gap_after = (fpr - fnr)[after - 1], (fpr - fnr)[after]
    share = -gap_before / (gap_after - gap_before)
    return float(fpr[after - 1] + share * (fpr[after] - fpr[after - 1]))


def negative_log_likelihood(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean of -ln of the probability of the true class."""
    return float(-np.log(given_to_truth(labels, probabilities)).mean())


def given_to_truth(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the probability of each image's true class, at least 2.2e-16 (the epsilon of float64),
    so that one image cannot make the NLL infinite.
    """
    given = np.where(np.asarray(labels) == 1, probabilities, 1 - probabilities)
    return np.maximum(given, np.finfo(np.float64).eps)


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the ECE (Guo et al., 2017) of the probability of fake: over 15 bins of equal width,
    the mean difference between the mean probability and the share of fakes, weighted by images.
    """
    # torchmetrics would put a probability of 1 into a 16th bin.
    preds = torch.from_numpy(np.minimum(probabilities, np.nextafter(1.0, 0.0)))
    target = torch.from_numpy(np.asarray(labels, np.int64))
    return float(classification.binary_calibration_error(preds, target, n_bins=ECE_BINS, norm="l1"))


def measure_sources(
    labels: np.ndarray,
    probabilities: np.ndarray,
    sources: Sequence[str],
    threshold: float = DEFAULT_THRESHOLD,
) -> dict[str, Metrics]:
    """Compute the metrics of each source, from the images of that source alone."""
    source_of = np.asarray(sources, object)
    result = {}
    for name in sorted(set(sources)):
        rows = source_of == name
        result[name] = measure(labels[rows], probabilities[rows], threshold)
    return result


def accuracy_of(metrics: Metrics) -> float:
    """Return the balanced accuracy, or the accuracy if there is one class only."""
    accuracy = metrics.accuracy if metrics.balanced_accuracy is None else metrics.balanced_accuracy
    assert accuracy is not None  # each source has images
    return accuracy


@dataclass(frozen=True)
class Validation:
    """Metrics per set and per `set/source`, and the figure that selects the best checkpoint."""

    sets: dict[str, Metrics]
    sources: dict[str, Metrics]
    selection: float

    @classmethod
    def from_json(cls, saved: Any, where: object = "it") -> "Validation":
        """Rebuild a validation from the JSON in `meta.json` and `baseline_metrics.json`.

        Raises:
            ValueError: a value is missing or of another type. `where` is named in the error.
        """
        saved = _object(saved, f"{where} has metrics")
        sets, sources = (
            {
                name: Metrics.from_json(metrics, f"{where}: {name}")
                for name, metrics in _object(saved.get(kind), f"{where} has {kind}").items()
            }
            for kind in ("sets", "sources")
        )
        if type(selection := saved.get("selection")) not in (int, float):
            raise ValueError(f"{where} has selection {short(selection)}, expected a number")
        return cls(sets, sources, selection)


def measure_sets(
    scored: Mapping[str, tuple[ShardSet, Scores]],
    temperature: float = 1.0,
    threshold: float = DEFAULT_THRESHOLD,
) -> Validation:
    """Compute the metrics of scored sets, with probabilities at `temperature`.

    AUROC does not select a checkpoint, because it can be high for one that calls every image fake.
    """
    by_set: dict[str, Metrics] = {}
    sources: dict[str, Metrics] = {}
    for name, (shards, scores) in scored.items():
        probabilities = probability(scores.logits, temperature)
        by_set[name] = measure(scores.labels, probabilities, threshold)
        by_source = measure_sources(
            scores.labels, probabilities, shards.names("source", scores.samples), threshold
        )
        sources |= {f"{name}/{source}": metrics for source, metrics in by_source.items()}
    return Validation(by_set, sources, float(np.mean([accuracy_of(m) for m in by_set.values()])))


def what_is_missing(reals: int, fakes: int, unscored: tuple[int, int] = (0, 0)) -> str | None:
    """Return a sentence for the reader if a class is missing, else None. `unscored` is the number
    of reals and of fakes that are there, but have no score.
    """
    if not reals and not fakes:
        return f"{_none_of('image', sum(unscored))}."
    if not reals:
        return (
            f"{_none_of('real image', unscored[0])}: recall gives the share of fakes found and "
            "nothing about false alarms. Read it together with a false-positive rate on real "
            "images."
        )
    if not fakes:
        none = _none_of("fake image", unscored[1])
        return f"{none}: only the false-positive rate can be measured."
    return None


def _none_of(what: str, unscored: int) -> str:
    if unscored:
        return f"None of {console.counted(unscored, what)} could be scored"
    return f"There are no {what}s here"
