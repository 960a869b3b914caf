"""Calibration: from scores of a validation set to a temperature, thresholds and a band of doubt.

Pure functions; `evaluate.py calibrate` stores what `calibrate` finds in a checkpoint's `meta.json`.
Never on a test set: a threshold that has seen the test set reports what it was fitted to.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from model.metrics import expected_calibration_error, negative_log_likelihood
from model.recipe import Calibrating
from model.score import DEFAULT_THRESHOLD, probability
from sharding.format import read_index
from storage import AnyPath

ThresholdAt = Literal["auto", "fpr5", "fpr1", "0.5"]
Over = Literal["pooled", "most_sources", "worst_source"]

FEWEST = 20
"""Images of each class below which nothing is fitted: 5 % of fewer is less than one image."""

TEMPERATURES = 0.02, 50.0
"""Where the temperature is looked for; for scores that tell the classes apart it lies well inside.
"""

ROC_THRESHOLDS = (0.01, 0.02, *(step / 20 for step in range(1, 20)), 0.98, 0.99)
"""Where the trade-off is kept, beside the thresholds that were fitted."""

RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
"""Error rates for which thresholds are kept, so that a person can ask for one of them later."""


class CalibrationError(ValueError):
    """Scores that nothing can be fitted to; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was fitted, on what. Thresholds and the band are probabilities of fake, after the
    temperature.

    `threshold` is the decision threshold. `threshold_fpr_1` and `threshold_fpr_5` are those from
    which on at most 1 % and 5 % of real images are called fake (None: too few reals to promise
    it). `band` is (low, high): below low no sign of AI, from high on likely AI, uncertain between.
    `roc` is (threshold, share of reals called fake from it on, share of fakes found) on the same
    images, by rising threshold: what another threshold costs.
    `at_fpr` is (rate, the lowest threshold at which at most that share of real images is called
    fake), `at_miss` (rate, the highest threshold below which at most that share of fakes lies),
    for those of `RATES` that the number of images allows.
    `before` and `after` are NLL and ECE on the same images at temperature 1 and at the fitted one.
    `method` is what was fitted to, and `sources` what each source would see at the threshold and
    the band, where it was left out of training (`calibrate_sources`).
    """

    temperature: float
    threshold: float
    threshold_at: ThresholdAt
    reals: int
    fakes: int
    threshold_fpr_1: float | None
    threshold_fpr_5: float
    band: tuple[float, float]
    roc: list[tuple[float, float, float]]
    before: dict[str, float]
    after: dict[str, float]
    method: str = "validation"
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    at_fpr: list[tuple[float, float]] = field(default_factory=list)
    at_miss: list[tuple[float, float]] = field(default_factory=list)

    def entries(self, fitted_on: Mapping[str, str]) -> dict[str, Any]:
        """The entries of `meta.json`, for `checkpoint.annotate`; `fitted_on` is the hash of the
        index of every set that the scores are of.
        """
        rest = asdict(self)
        decision = {name: rest.pop(name) for name in ("temperature", "threshold")}
        sets = {"fitted_on": list(fitted_on), "index_sha256": dict(fitted_on)}
        return decision | {"calibration": sets | rest | {"band": list(self.band)}}


def check_validation_sets(folders: Sequence[AnyPath]) -> None:
    """What is calibrated on is a validation set.

    Raises:
        CalibrationError: a set is of another split.
    """
    for folder in folders:
        split = read_index(folder)["split"]
        if split != "val":
            raise CalibrationError(
                f"{folder.name} is of the split {split}; calibration takes validation sets only: "
                "fitted to what it is tested on or was trained on, it would promise too much"
            )


def calibrate(
    labels: np.ndarray, logits: np.ndarray, threshold_at: ThresholdAt = "auto"
) -> Calibration:
    """Fit everything to validation scores: `labels` 0 real, 1 fake; `logits` of fake minus real,
    before any temperature.

    The decision threshold `auto` is 0.5, or the threshold for 5 % false positives where that is
    higher. Not that threshold alone: on a validation set of its own kind a good detector reaches
    5 % only far below 0.5, and deciding there would spend on false alarms, which elsewhere are many
    more, what it gained. The band begins at 0.5 or lower, where at most 5 % of fakes lie below it,
    and ends at the decision threshold.

    Raises:
        CalibrationError: fewer than `FEWEST` images of a class, or scores that say nothing.
    """
    labels, logits = np.asarray(labels), np.asarray(logits, np.float64)
    reals, fakes = int((labels == 0).sum()), int((labels == 1).sum())
    if min(reals, fakes) < FEWEST:
        raise CalibrationError(
            f"{reals} real and {fakes} fake images: calibration needs at least {FEWEST} of each"
        )
    if not np.isfinite(logits).all():
        raise CalibrationError("some scores are not finite; the checkpoint cannot be calibrated")
    temperature = fit_temperature(labels, logits)
    probabilities = probability(logits, temperature)
    at_5 = threshold_at_fpr(probabilities[labels == 0], 0.05)
    at_1 = threshold_at_fpr(probabilities[labels == 0], 0.01)
    below = np.sort(probabilities[labels == 1])[math.floor(0.05 * (fakes + 1) + 1e-9) - 1]
    assert at_5 is not None  # `FEWEST` real images are enough for it
    thresholds: dict[ThresholdAt, float] = {
        "auto": max(DEFAULT_THRESHOLD, at_5), "fpr5": at_5, "0.5": DEFAULT_THRESHOLD,
    }  # fmt: skip
    if at_1 is not None:
        thresholds["fpr1"] = at_1
    elif threshold_at == "fpr1":
        raise CalibrationError(f"{reals} real images are too few for a threshold at 1 % (99 do)")
    high = thresholds[threshold_at]
    return Calibration(
        temperature=temperature,
        threshold=high,
        threshold_at=threshold_at,
        reals=reals,
        fakes=fakes,
        threshold_fpr_1=at_1,
        threshold_fpr_5=at_5,
        band=(float(min(DEFAULT_THRESHOLD, below, high)), high),
        roc=roc_at(labels, probabilities, {*ROC_THRESHOLDS, at_5, at_1 or at_5}),
        at_fpr=thresholds_at_rates([probabilities[labels == 0]], "pooled"),
        at_miss=_from_above([probabilities[labels == 1]], "pooled"),
        before=_fit_of(labels, probability(logits)),
        after=_fit_of(labels, probabilities),
    )


def calibrate_by(
    rule: ThresholdAt | Calibrating, labels: np.ndarray, logits: np.ndarray, sources: np.ndarray
) -> Calibration:
    """Fit to validation scores by a rule: `calibrate` for a name of a threshold,
    `calibrate_sources` for error rates. `sources` (N,) names the source of each image.

    Raises:
        CalibrationError: fewer than `FEWEST` images of a class, or scores that say nothing.
    """
    if not isinstance(rule, Calibrating):
        return calibrate(labels, logits, rule)
    by_source = {
        str(name): (labels[sources == name], logits[sources == name]) for name in np.unique(sources)
    }
    return calibrate_sources(by_source, rule, "validation sets by source")


def calibrate_sources(
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]],
    calibrating: Calibrating,
    origin: str = "sources left out",
) -> Calibration:
    """Fit to scores source by source: source -> (labels 0 real, 1 fake; logits of fake minus real).
    `origin` says where the scores are from; by default each source was left out of training.

    The band ends at the threshold, from which on at most `max_fpr` of the real images are called
    likely AI, and begins where at most `max_miss` of the fakes lie below it; `threshold` says over
    which images, for both. A source of fewer than `FEWEST` images of a class is not counted in it,
    unless all are so small.

    Raises:
        CalibrationError: fewer than `FEWEST` images of a class, or scores that say nothing.
    """
    labels, logits = (np.concatenate([pair[part] for pair in scores.values()]) for part in (0, 1))
    fitted = calibrate(labels, logits, "0.5")
    by_source = {
        name: (of_source, probability(of_logits, fitted.temperature))
        for name, (of_source, of_logits) in scores.items()
    }
    reals, fakes = (
        [p[own == label] for own, p in by_source.values() if (own == label).sum() >= FEWEST]
        or [np.concatenate([p[own == label] for own, p in by_source.values()])]
        for label in (0, 1)
    )
    high = threshold_over_sources(reals, calibrating.max_fpr, calibrating.threshold)
    missed = [1 - of_source for of_source in fakes]  # the same question from the other side
    low = 1 - threshold_over_sources(missed, calibrating.max_miss, calibrating.threshold)
    low = min(low, high)
    sources = {
        name: {
            "reals": int((own == 0).sum()),
            "fakes": int((own == 1).sum()),
            "false_positive_rate": _share(p[own == 0] >= high),
            "recall": _share(p[own == 1] >= high),
            "uncertain": _share((p >= low) & (p < high)),
        }
        for name, (own, p) in by_source.items()
    }
    return replace(
        fitted,
        threshold=high,
        band=(low, high),
        method=f"{origin}, {calibrating.threshold}",
        sources=sources,
        at_fpr=thresholds_at_rates(reals, calibrating.threshold),
        at_miss=_from_above(fakes, calibrating.threshold),
        roc=roc_at(labels, probability(logits, fitted.temperature), {*ROC_THRESHOLDS, low, high}),
    )


def threshold_over_sources(
    reals: Sequence[np.ndarray],
    rate: float,
    over: Over,
) -> float:
    """The threshold from which on at most `rate` of some images lie: of all together, of each
    source, or of three sources of four. `reals` are probabilities of fake, by source.

    Raises:
        CalibrationError: too few real images for such a rate.
    """
    groups = [np.concatenate(list(reals))] if over == "pooled" else reals
    own = [threshold_at_fpr(group, rate) for group in groups]
    known = [threshold for threshold in own if threshold is not None]
    if not known:
        raise CalibrationError(
            f"no source has images enough for a threshold that {rate:.0%} of them exceed"
        )
    if over == "most_sources":
        return sorted(known)[math.ceil(0.75 * len(known)) - 1]
    return max(known)


def thresholds_at_rates(reals: Sequence[np.ndarray], over: Over) -> list[tuple[float, float]]:
    """(rate, threshold) for each of `RATES` that so many images allow, by `threshold_over_sources`.
    A source that is too small for a rate would make it a promise over other sources than the rest,
    so over sources a rate is kept only where half of them are large enough.
    """
    groups = [np.concatenate(list(reals))] if over == "pooled" else reals
    rows = []
    for rate in RATES:
        enough = [g for g in groups if threshold_at_fpr(g, rate) is not None]
        if enough and 2 * len(enough) >= len(groups):
            rows.append((rate, threshold_over_sources(enough, rate, over)))
    return rows


def _from_above(fakes: Sequence[np.ndarray], over: Over) -> list[tuple[float, float]]:
    """(rate, threshold below which at most that share of fakes lies), by `thresholds_at_rates`."""
    mirrored = thresholds_at_rates([1 - of_source for of_source in fakes], over)
    return [(rate, 1 - threshold) for rate, threshold in mirrored]


def _share(marks: np.ndarray) -> float | None:
    return float(marks.mean()) if len(marks) else None


def _fit_of(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    return {
        "nll": negative_log_likelihood(labels, probabilities),
        "ece": expected_calibration_error(labels, probabilities),
    }


def roc_at(
    labels: np.ndarray, probabilities: np.ndarray, thresholds: Iterable[float]
) -> list[tuple[float, float, float]]:
    """(threshold, false-positive rate, recall) at each of `thresholds`, rising; both classes must
    be there.
    """
    reals, fakes = probabilities[labels == 0], probabilities[labels == 1]
    return [(t, float((reals >= t).mean()), float((fakes >= t).mean())) for t in sorted(thresholds)]


def fit_temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """The temperature with the lowest negative log-likelihood (Guo et al., "On Calibration of
    Modern Neural Networks", 2017), with Platt's targets (1999): (n + 1) / (n + 2) instead of 1, so
    that classes which the scores separate do not ask for a temperature of 0.

    It has no bias, so that what was 0.5 stays 0.5.

    Raises:
        CalibrationError: the best temperature is not within `TEMPERATURES`.
    """
    fakes = int((labels == 1).sum())
    reals = len(labels) - fakes
    target = np.where(labels == 1, (fakes + 1) / (fakes + 2), 1 / (reals + 2))

    def slope(inverse: float) -> float:  # of the NLL, which is convex in 1 / temperature
        return float(((probability(logits, 1 / inverse) - target) * logits).mean())

    low, high = (math.log(1 / t) for t in reversed(TEMPERATURES))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)) > 0 else (middle, high)
    temperature = math.exp(-(low + high) / 2)
    if not TEMPERATURES[0] * 1.01 < temperature < TEMPERATURES[1] / 1.01:
        raise CalibrationError(
            "no temperature fits these scores, which hardly depend on the class; the checkpoint is "
            "not calibrated"
        )
    return temperature


def threshold_at_fpr(reals: np.ndarray, rate: float) -> float | None:
    """The lowest threshold from which on at most `rate` of real images like these (probabilities of
    fake) are called fake; None where there are too few of them to say (fewer than 1 / rate - 1).

    It lies above the k-th highest of n with k = floor(rate * (n + 1)): then a further image of the
    same kind lies there with a chance of at most k / (n + 1), whatever their distribution (the
    argument of conformal prediction; Laxhammar and Falkman, "Inductive conformal anomaly
    detection", 2015). Counting k of n instead would promise too much for few images.
    """
    count = math.floor(rate * (len(reals) + 1) + 1e-9)
    if count < 1:
        return None
    return float(np.nextafter(np.sort(reals)[-count], math.inf))
