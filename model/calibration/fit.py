"""Fit a temperature, decision thresholds and an uncertain band (the scores whose verdict is
"uncertain") to the scores of a validation set.

Main entries, which write nothing:

- `calibrate(labels, logits, threshold_at)` fits to all images together. The band ends at the
  decision threshold. It begins at the smallest of three: 0.5; the decision threshold; the score
  that about 5 % of the fakes are below.
- `calibrate_sources(scores, calibrating, origin)` fits to two error rates. `scores` is a dict,
  source -> (labels, logits).
- `calibrate_by(rule, labels, logits, sources, earlier)` calls the first if `rule` is one of the
  texts for `threshold_at`, the second if it is a `Calibrating`. `earlier` is the temperature of the
  detector's calibration until now, or None (default).

Their arguments:

- `labels`, int (N,): 0 real, 1 fake.
- `logits`, float (N,): of fake minus real, before any temperature.
- `sources`, str array (N,): the source of each image.
- `threshold_at`: the decision threshold, as a text. `"0.5"`, `"fpr5"` or `"fpr1"` (at most 5 % or 1
  % false positives), or `"auto"` (default: the larger of 0.5 and `fpr5`).
- `calibrating`: a `Calibrating` of `model/recipe.py`. Its `max_fpr` is the highest share of real
  images at or above the upper end of the band, which is the decision threshold; its `max_miss` is
  the highest share of fakes below the lower end (both above 0 and below 0.5). Its `threshold` is
  one of three texts, which says for which images the two shares hold: `"pooled"`: for all images
  together; `"worst_source"`: for every source; `"most_sources"`: for three quarters of the sources.
  Except for `"pooled"`, a source is left out for a class if it has fewer than `FEWEST` images of
  that class, or too few for the rate. At least half of the sources with `FEWEST` must have enough.
  If all sources have fewer than `FEWEST`, they are joined as one source.
- `origin`: a text for the record that says how the scores were made (default "sources left out").

All three return a `Calibration`: `temperature`, `threshold`, `band` (low, high: "likely AI" from
high on, "no sign of AI" below low) and tables, lists of tuples: `roc` (threshold, false-positive
rate, recall), `at_fpr` and `at_miss` (error rate, threshold). Thresholds and band are probabilities
of fake, after the temperature. Its `entries(fitted_on)` takes a dict, set name -> hash of the set's
index, and returns the dict for a checkpoint's `meta.json`. All three raise `CalibrationError` (a
`ValueError`) if a class has fewer than `FEWEST` images, if a class or more than half of its sources
have too few for a requested rate, if a score is not finite, or if no temperature fits.
`check_images(labels, rule, sources)` raises this error before anything is scored, if there are too
few images for `calibrate_by()`. `check_validation_sets(folders)` takes the paths (`Path` or
`UPath`) of packed sets and raises it if a set is not of the split `val`.

`TEMPERATURES`, `RATES` and `ROC_THRESHOLDS` are the range of temperatures, the tabulated error
rates and the points of the ROC curve. The other functions compute single parts of the result.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from installed import command
from model.metrics import expected_calibration_error, negative_log_likelihood
from model.recipe import Calibrating
from model.score import DEFAULT_THRESHOLD
from model.verdict import LEFT_OUT, probability
from sharding.format import CALIBRATION_FEWEST, CLASSES, read_index
from storage import AnyPath

ThresholdAt = Literal["auto", "fpr5", "fpr1", "0.5"]
Over = Literal["pooled", "most_sources", "worst_source"]

FEWEST = CALIBRATION_FEWEST
"""Minimum number of images of each class, and of a class in a source that counts by itself."""

TEMPERATURES = 0.02, 50.0
"""Search range of the temperature. Scores that separate the classes give a temperature well inside
this range."""

ROC_THRESHOLDS = (0.01, 0.02, *(step / 20 for step in range(1, 20)), 0.98, 0.99)
"""Thresholds at which the two error rates are stored, besides both ends of the band."""

RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
"""Error rates whose thresholds are stored, for `--max-fpr` and `--max-miss` of a later command."""


class CalibrationError(ValueError):
    """Scores that no calibration can be fitted to. The message names the cause."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Result of a calibration. Thresholds and the band are probabilities of fake, after the
    temperature.

    `threshold` is the decision threshold, `threshold_at` the rule that chose it: `max_fpr` if it is
    from `calibrate_sources`.

    `band` is (low, high): "no sign of AI" below low, "likely AI" at or above high, "uncertain"
    between. `roc` lists (threshold, false-positive rate, recall) on the same images, by rising
    threshold.

    `at_fpr` lists (rate, lowest threshold at which at most that share of real images is called
    fake). `at_miss` lists (rate, highest threshold below which at most that share of fakes lies).
    Both contain only the `RATES` for which there are enough images. A lower rate never has a less
    strict threshold than a higher one.

    `before` and `after` are NLL and ECE on the same images at temperature 1 and at the fitted one.
    `earlier` is the temperature of the detector's calibration until now, with NLL and ECE at it;
    empty without one. It is not stored.
    `method` names the images that the calibration was fitted to. `calibrate_sources` fills the
    last two: `sources` has counts and error rates of each source. `sources_used` maps "real" (for
    the threshold) and "fake" (for the lower end of the band) to the number of sources that have
    enough images of the class, 0 if all were joined, and of those that have any. It is empty if the
    rates hold for all images together.
    """

    temperature: float
    threshold: float
    threshold_at: ThresholdAt | Literal["max_fpr"]
    reals: int
    fakes: int
    band: tuple[float, float]
    roc: list[tuple[float, float, float]]
    before: dict[str, float]
    after: dict[str, float]
    method: str = "validation"
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources_used: dict[str, tuple[int, int]] = field(default_factory=dict)
    at_fpr: list[tuple[float, float]] = field(default_factory=list)
    at_miss: list[tuple[float, float]] = field(default_factory=list)
    earlier: dict[str, float] = field(default_factory=dict)

    def entries(self, fitted_on: Mapping[str, str]) -> dict[str, Any]:
        """Return the entries for `meta.json`, as `checkpoint.annotate` takes them. `fitted_on` maps
        the name of each scored set to the hash of its index.
        """
        rest = asdict(self)
        del rest["earlier"]
        decision = {name: rest.pop(name) for name in ("temperature", "threshold")}
        sets = {"fitted_on": list(fitted_on), "index_sha256": dict(fitted_on)}
        return decision | {"calibration": sets | rest | {"band": list(self.band)}}


def check_validation_sets(folders: Sequence[AnyPath]) -> None:
    """Refuse sets that are not validation sets, and two sets of one name.

    Raises:
        CalibrationError: a set has another split than `val`, or two sets have the same name, under
            which their figures would be stored.
    """
    for number, folder in enumerate(folders):
        if folder.name in [earlier.name for earlier in folders[:number]]:
            raise CalibrationError(
                f"two sets have the name {folder.name}, expected one of each name, because their "
                "figures are stored by name; rename one, or give each once"
            )
        split = read_index(folder)["split"]
        if split != "val":
            raise CalibrationError(
                f"{folder.name} is of the split {split}; calibration takes validation sets only, "
                "because error rates on training or test images would be too optimistic"
            )


def check_images(
    labels: np.ndarray,
    rule: ThresholdAt | Calibrating = "auto",
    sources: np.ndarray | None = None,
) -> tuple[int, int]:
    """Return the numbers of real (0) and fake (1) images, if they are enough for a calibration by
    `rule`. `sources` (N,) contains the source of each image, a name or number (None: one source).

    Raises:
        CalibrationError: a class has fewer than `FEWEST` images, or too few for its error rate.
    """
    reals, fakes = int((labels == 0).sum()), int((labels == 1).sum())
    if min(reals, fakes) < FEWEST:
        raise CalibrationError(
            f"{reals} real and {fakes} fake images: calibration needs at least {FEWEST} of each; "
            "add images, or a validation set that has them, or choose a threshold without "
            f"calibrating (`{command('predict')} --threshold`)"
        )
    if rule == "fpr1" and reals < _needed(0.01):
        raise CalibrationError(
            f"{reals} real images are too few for a threshold at 1 % (needs {_needed(0.01)})"
        )
    if isinstance(rule, Calibrating):
        names = np.zeros(len(labels)) if sources is None else sources
        for number, rate in enumerate((rule.max_fpr, rule.max_miss)):
            of_class = names[labels == number]
            groups = [of_class[of_class == name] for name in np.unique(of_class)]
            _check_enough(_large(groups, rule.threshold), rate, CLASSES[number])
    return reals, fakes


def calibrate(
    labels: np.ndarray, logits: np.ndarray, threshold_at: ThresholdAt = "auto"
) -> Calibration:
    """Fit the temperature, the thresholds and the band to validation scores: `labels` 0 real, 1
    fake; `logits` of fake minus real, before any temperature.

    The decision threshold `auto` is the larger of 0.5 and the threshold for 5 % false positives.
    The 5 % threshold alone can be far below 0.5: a good detector has few false positives on a
    validation set that resembles its training data. On other data a threshold below 0.5 would give
    many more.

    The band starts at 0.5, or lower if more than 5 % of the fakes would be below it, and ends at
    the decision threshold.

    Raises:
        CalibrationError: a class has fewer than `FEWEST` images, a score is not finite, or no
            temperature fits.
    """
    labels, logits = np.asarray(labels), np.asarray(logits, np.float64)
    reals, fakes = check_images(labels, threshold_at)
    if not np.isfinite(logits).all():
        raise CalibrationError(
            "some scores are NaN or infinite; the checkpoint cannot be calibrated"
        )
    temperature = fit_temperature(labels, logits)
    probabilities = probability(logits, temperature)
    at_5 = threshold_at_fpr(probabilities[labels == 0], 0.05)
    at_1 = threshold_at_fpr(probabilities[labels == 0], 0.01)
    below = np.sort(probabilities[labels == 1])[math.floor(0.05 * (fakes + 1) + 1e-9) - 1]
    assert at_5 is not None  # not None: `FEWEST` suffice for 5 %
    thresholds: dict[ThresholdAt, float] = {
        "auto": max(DEFAULT_THRESHOLD, at_5), "fpr5": at_5, "0.5": DEFAULT_THRESHOLD,
    }  # fmt: skip
    if at_1 is not None:
        thresholds["fpr1"] = at_1
    high = thresholds[threshold_at]
    band = float(min(DEFAULT_THRESHOLD, below, high)), high
    return Calibration(
        temperature=temperature,
        threshold=high,
        threshold_at=threshold_at,
        reals=reals,
        fakes=fakes,
        band=band,
        roc=roc_at(labels, probabilities, {*ROC_THRESHOLDS, *band}),
        at_fpr=thresholds_at_rates([probabilities[labels == 0]], "pooled"),
        at_miss=_from_above([probabilities[labels == 1]], "pooled"),
        before=_fit_of(labels, probability(logits)),
        after=_fit_of(labels, probabilities),
    )


def calibrate_by(
    rule: ThresholdAt | Calibrating,
    labels: np.ndarray,
    logits: np.ndarray,
    sources: np.ndarray,
    earlier: float | None = None,
) -> Calibration:
    """Fit to validation scores by a rule: the name of a threshold (`calibrate`) or two error rates
    (`calibrate_sources`). `sources` (N,) contains the name of each image's source. `earlier` is the
    temperature of the detector's calibration until now, None without one.

    Raises:
        CalibrationError: as `calibrate` and `calibrate_sources`.
    """
    if isinstance(rule, Calibrating):
        by_source = {
            str(name): (labels[sources == name], logits[sources == name])
            for name in np.unique(sources)
        }
        fitted = calibrate_sources(by_source, rule, "validation sets by source")
    else:
        fitted = calibrate(labels, logits, rule)
    if earlier is None:
        return fitted
    fit = _fit_of(labels, probability(logits, earlier))
    return replace(fitted, earlier={"temperature": earlier, **fit})


def calibrate_sources(
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]],
    calibrating: Calibrating,
    origin: str = LEFT_OUT,
) -> Calibration:
    """Fit to scores source by source. `scores` maps a source to (labels 0 real, 1 fake; logits of
    fake minus real). `origin` describes the scores; by default, each source was left out of
    training.

    At most `max_fpr` of the real images have a score at or above the upper end of the band, which
    is the decision threshold. At most `max_miss` of the fakes have a score below its lower end.
    `calibrating.threshold` says whether the two rates hold for all images together or source by
    source. In the second case, a source with fewer than `FEWEST` images of a class is ignored for
    that class, unless all sources are that small.

    Raises:
        CalibrationError: a class has fewer than `FEWEST` images in all, it or more than half of
            its sources have too few for its rate, a score is not finite, or no temperature fits.
    """
    labels, logits = (np.concatenate([pair[part] for pair in scores.values()]) for part in (0, 1))
    fitted = calibrate(labels, logits, "0.5")
    by_source = {
        name: (of_source, probability(of_logits, fitted.temperature))
        for name, (of_source, of_logits) in scores.items()
    }
    over = calibrating.threshold
    rates = (calibrating.max_fpr, calibrating.max_miss)
    groups = [
        [p[own == label] for own, p in by_source.values() if (own == label).any()]
        for label in (0, 1)
    ]
    used = {
        name: (sum(len(p) >= max(FEWEST, _needed(rate)) for p in of_class), len(of_class))
        for name, of_class, rate in zip(CLASSES, groups, rates, strict=True)
    }
    reals, fakes = (_large(of_class, over) for of_class in groups)
    high = threshold_over_sources(reals, calibrating.max_fpr, over)
    missed = [1 - of_source for of_source in fakes]  # misses are false positives of 1 - p
    low = 1 - threshold_over_sources(missed, calibrating.max_miss, over, "fake")
    low = min(low, high)
    sources = {
        name: {
            "reals": int((own == 0).sum()),
            "fakes": int((own == 1).sum()),
            "false_positive_rate": _share(p[own == 0] >= high),
            "recall": _share(p[own == 1] >= high),
            "uncertain": _share(uncertain := (p >= low) & (p < high)),
            "uncertain_real": _share(uncertain[own == 0]),
            "uncertain_fake": _share(uncertain[own == 1]),
        }
        for name, (own, p) in by_source.items()
    }
    return replace(
        fitted,
        threshold=high,
        threshold_at="max_fpr",
        band=(low, high),
        method=f"{origin}, {over}",
        sources=sources,
        sources_used={} if over == "pooled" else used,
        at_fpr=thresholds_at_rates(reals, over),
        at_miss=_from_above(fakes, over),
        roc=roc_at(labels, probability(logits, fitted.temperature), {*ROC_THRESHOLDS, low, high}),
    )


def threshold_over_sources(
    reals: Sequence[np.ndarray],
    rate: float,
    over: Over,
    label: Literal["real", "fake"] = "real",
) -> float:
    """Return a threshold that at most `rate` of the images reach: of all images together
    (`pooled`), of each source (`worst_source`), or of each of three quarters of the sources
    (`most_sources`). `reals` are probabilities of fake, one array (N,) per source; for a miss rate
    they are 1 - p of the fakes, and `label` is the class that an error names.

    A source can have too few images for a rate. At least half of the sources must have enough,
    because a threshold from fewer sources would not hold for the others. Since a lower rate then
    has other sources, its own threshold can be lower than that of a higher rate of `RATES`; it gets
    the higher one.

    Raises:
        CalibrationError: more than half of the sources have too few images for this rate.
    """
    groups = [np.concatenate(list(reals))] if over == "pooled" else reals
    _check_enough(groups, rate, label)
    highest = 0.0
    for each in (rate, *(higher for higher in RATES if higher > rate)):
        known = [t for group in groups if (t := threshold_at_fpr(group, each)) is not None]
        last = math.ceil(0.75 * len(known)) if over == "most_sources" else len(known)
        highest = max(highest, sorted(known)[last - 1])
    return highest


def _large(groups: Sequence[np.ndarray], over: Over) -> list[np.ndarray]:
    """Return the images of one class, source by source, that a rate holds for: of all sources with
    `FEWEST` images. Without such a source, or for a rate over all images (`pooled`), join them.
    """
    large = [] if over == "pooled" else [group for group in groups if len(group) >= FEWEST]
    return large or [np.concatenate(groups)]


def _check_enough(groups: Sequence[np.ndarray], rate: float, label: str) -> None:
    """Refuse a rate for which more than half of the sources, `groups`, have too few images."""
    enough = sum(_is_enough(group, rate) for group in groups)
    if not enough or 2 * enough < len(groups):
        needed = f"at least {_needed(rate):,} are needed"
        few = f"all sources together have {max(map(len, groups)):,}, {needed}"
        mend = "ask for a higher rate, or give more images"
        if len(groups) > 1:
            few = f"{enough:,} of {len(groups):,} sources have enough, expected half ({needed})"
            mend = "ask for a higher rate, or for one over all images (pooled), or give more images"
        raise CalibrationError(
            f"too few {label} images for a threshold at a rate of {rate:.3g}: {few}; {mend}"
        )


def thresholds_at_rates(reals: Sequence[np.ndarray], over: Over) -> list[tuple[float, float]]:
    """Return (rate, threshold) for each of `RATES` that has enough images, by
    `threshold_over_sources`. A lower rate never has a lower threshold.
    """
    rows = []
    for rate in RATES:
        with suppress(CalibrationError):
            rows.append((rate, threshold_over_sources(reals, rate, over)))
    return rows


def _from_above(fakes: Sequence[np.ndarray], over: Over) -> list[tuple[float, float]]:
    """Return (rate, threshold below which at most that share of fakes lies) for each of `RATES`
    that has enough images, by `thresholds_at_rates`.
    """
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
    """Return (threshold, false-positive rate, recall) for each of `thresholds`, sorted. Both
    classes must have images.
    """
    reals, fakes = probabilities[labels == 0], probabilities[labels == 1]
    return [(t, float((reals >= t).mean()), float((fakes >= t).mean())) for t in sorted(thresholds)]


def fit_temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """Return the temperature with the lowest negative log-likelihood (Guo et al., "On Calibration
    of Modern Neural Networks", 2017).

    The targets are Platt's (1999): (n + 1) / (n + 2) instead of 1. Without them, scores that
    separate the classes perfectly would give a temperature of 0. No bias is fitted, so 0.5 stays
    0.5.

    Raises:
        CalibrationError: the best temperature is not within `TEMPERATURES`.
    """
    fakes = int((labels == 1).sum())
    reals = len(labels) - fakes
    target = np.where(labels == 1, (fakes + 1) / (fakes + 2), 1 / (reals + 2))

    def slope(inverse: float) -> float:  # slope of the NLL, convex in 1 / temperature
        return float(((probability(logits, 1 / inverse) - target) * logits).mean())

    low, high = (math.log(1 / t) for t in reversed(TEMPERATURES))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)) > 0 else (middle, high)
    temperature = math.exp(-(low + high) / 2)
    if not TEMPERATURES[0] * 1.01 < temperature < TEMPERATURES[1] / 1.01:
        raise CalibrationError(
            "no temperature fits: the scores of real and fake images hardly differ; the checkpoint "
            "is not calibrated"
        )
    return temperature


def threshold_at_fpr(reals: np.ndarray, rate: float) -> float | None:
    """Return the lowest threshold at which at most `rate` of real images are called fake, fitted to
    their probabilities of fake `reals`; None if there are too few of them (fewer than 1 / rate -
    1).

    The threshold is just above the k-th highest of the n values, with k = floor(rate * (n + 1)). A
    new image of the same distribution then exceeds the threshold with a probability of at most k /
    (n + 1), whatever the distribution (the argument of conformal prediction; Laxhammar and Falkman,
    "Inductive conformal anomaly detection", 2015). With k = floor(rate * n), few images would
    exceed the rate.
    """
    if not _is_enough(reals, rate):
        return None
    count = math.floor(rate * (len(reals) + 1) + 1e-9)
    return float(np.nextafter(np.sort(reals)[-count], math.inf))


def _needed(rate: float) -> int:
    """Return the smallest number of images that has a threshold for an error rate."""
    return math.ceil(1 / rate - 1e-9) - 1


def _is_enough(images: np.ndarray, rate: float) -> bool:
    return len(images) >= _needed(rate)
