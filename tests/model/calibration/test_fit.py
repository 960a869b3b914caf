import json
import math
from typing import get_args

import numpy as np
import pytest

from checked import checked
from model.calibration.fit import (
    CalibrationError,
    Over,
    ThresholdAt,
    calibrate,
    calibrate_by,
    calibrate_sources,
    fit_temperature,
    threshold_at_fpr,
    threshold_over_sources,
    thresholds_at_rates,
)
from model.metrics import measure
from model.recipe import Calibrating
from model.shipped.calibration import Calibrated
from model.verdict import band_of, probability, verdict
from page.figures import verdict_shares
from sharding.format import CLASSES


def calibrated_scores(count: int, seed: int = 0, scale: float = 2.0):
    """Return labels, and logits that are exactly the log-odds of fake: temperature 1 is right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    return labels, (2 * labels - 1) * scale**2 / 2 + scale * rng.normal(size=count)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_fit_temperature_recovers_the_applied_temperature(temperature: float) -> None:
    labels, logits = calibrated_scores(20_000)
    assert fit_temperature(labels, logits * temperature) == pytest.approx(temperature, rel=0.05)


def test_calibration_repairs_overconfidence_and_keeps_the_order() -> None:
    labels, logits = calibrated_scores(5_000)
    calibration = calibrate(labels, 5 * logits)
    assert calibration.after["ece"] < 0.03 < 0.08 < calibration.before["ece"]
    assert calibration.after["nll"] < calibration.before["nll"]
    assert (probability(logits, calibration.temperature) >= 0.5).tolist() == (logits >= 0).tolist()


def test_thresholds_keep_their_rate_on_new_images() -> None:
    """Over 400 validation sets of 60 reals, another real exceeds the threshold at the promised
    rate.
    """
    rng = np.random.default_rng(1)
    chances = [1 - threshold_at_fpr(rng.uniform(size=60), 0.05) for _ in range(400)]
    assert 0.04 < np.mean(chances) <= 0.053
    assert threshold_at_fpr(rng.uniform(size=98), 0.01) is None
    reals = rng.uniform(size=99)
    assert (reals >= threshold_at_fpr(reals, 0.01)).sum() == 0


def test_the_decision_threshold_and_the_band() -> None:
    labels, logits = calibrated_scores(4_000, scale=2.0)
    weak = calibrate(labels, logits)
    fake = probability(logits, weak.temperature)
    low, high = weak.band
    assert low < 0.5 < high == weak.threshold == dict(weak.at_fpr)[0.05]
    assert (fake[labels == 0] >= high).mean() == pytest.approx(0.05, abs=0.001)
    assert (fake[labels == 1] < low).mean() == pytest.approx(0.05, abs=0.001)
    strong = calibrate(*calibrated_scores(4_000, scale=5.0))
    assert dict(strong.at_fpr)[0.05] < 0.5
    assert strong.band == (0.5, 0.5)
    assert strong.threshold == 0.5
    assert calibrate(labels, logits, "0.5").threshold == 0.5
    assert calibrate(labels, logits, "fpr1").threshold == dict(weak.at_fpr)[0.01] > weak.threshold


def test_stored_roc_points_match_the_scores() -> None:
    labels, logits = calibrated_scores(2_000)
    calibration = calibrate(labels, logits)
    fake = probability(logits, calibration.temperature)
    thresholds = [t for t, _, _ in calibration.roc]
    assert thresholds == sorted(thresholds)
    assert {0.01, 0.5, 0.99, *calibration.band} < set(thresholds)
    for threshold, false_positive_rate, recall in calibration.roc:
        measured = measure(labels, fake, threshold)
        assert (false_positive_rate, recall) == (measured.false_positive_rate, measured.recall)
    assert 0.01 not in dict(calibrate(*calibrated_scores(80)).at_fpr)  # too few images


@pytest.mark.parametrize(
    "rule", ["auto", Calibrating(threshold="pooled", max_fpr=0.03, max_miss=0.07)]
)
def test_shares_of_each_verdict_are_those_of_the_scores(rule: ThresholdAt | Calibrating) -> None:
    """The page takes them from `roc`, so both ends of the band are among its thresholds."""
    labels, logits = calibrated_scores(2_000)
    calibration = calibrate_by(rule, labels, logits, np.full(len(labels), "a"))
    low, high = calibration.band
    assert low < high
    fake = probability(logits, calibration.temperature)
    for label, of in enumerate(verdict_shares(calibration.roc, calibration.band)):
        own = fake[labels == label]
        measured = (own < low).mean(), ((own >= low) & (own < high)).mean(), (own >= high).mean()
        assert (of.no_sign, of.uncertain, of.likely) == pytest.approx(measured)
        for rates in calibration.sources.values():  # of `calibrate_sources`
            assert rates[f"uncertain_{CLASSES[label]}"] == measured[1]


def test_the_fit_is_compared_with_the_calibration_until_now() -> None:
    labels, logits = calibrated_scores(400)
    sources = np.full(len(labels), "a")
    for rule in ("auto", Calibrating(threshold="pooled")):
        fitted = calibrate_by(rule, labels, logits, sources, 2.0)
        assert fitted.earlier == {
            "temperature": 2.0,
            "nll": pytest.approx(measure(labels, probability(logits, 2.0)).nll),
            "ece": pytest.approx(measure(labels, probability(logits, 2.0)).ece),
        }
        assert not calibrate_by(rule, labels, logits, sources).earlier


def test_entries_of_the_meta_file() -> None:
    fitted = calibrate(*calibrated_scores(400))
    entries = json.loads(json.dumps(fitted.entries({"val": "abc"})))
    assert entries["temperature"] == fitted.temperature
    assert entries["threshold"] == fitted.threshold
    calibration = entries["calibration"]
    assert calibration["fitted_on"] == ["val"]
    assert calibration["index_sha256"] == {"val": "abc"}
    assert calibration["reals"] + calibration["fakes"] == 400
    assert band_of(entries) == fitted.band
    assert set(calibration) == {
        "fitted_on", "index_sha256", "reals", "fakes", "threshold_at", "band", "roc",
        "before", "after", "method", "sources", "sources_used", "at_fpr", "at_miss",
    }  # fmt: skip


def test_verdicts() -> None:
    assert [verdict(p, (0.2, 0.7)) for p in (0.19, 0.2, 0.69, 0.7)] == [
        "no sign of AI", "uncertain", "uncertain", "likely AI",
    ]  # fmt: skip
    assert band_of({"threshold": 0.5, "calibration": None}) == (0.5, 0.5)
    assert [verdict(p, (0.5, 0.5)) for p in (0.49, 0.5)] == ["no sign of AI", "likely AI"]


def test_separated_classes_do_not_get_probability_0_or_1() -> None:
    labels = np.repeat([0, 1], 50)
    calibration = calibrate(labels, np.where(labels == 1, 4.0, -4.0))
    assert probability(np.array([4.0]), calibration.temperature)[0] == pytest.approx(
        51 / 52, abs=0.001
    )
    assert 0.01 not in dict(calibration.at_fpr)  # 50 reals are too few for 1 %


@pytest.mark.parametrize(
    ("labels", "logits", "said"),
    [
        (np.ones(100, int), np.ones(100), "0 real and 100 fake images"),
        (np.repeat([0, 1], 19), np.ones(38), "at least 20 of each"),
        (np.repeat([0, 1], 50), np.full(100, np.nan), "NaN or infinite"),
        (np.repeat([0, 1], 50), np.repeat([1.0, -1.0], 50), "no temperature fits"),
        (np.repeat([0, 1], 50), np.zeros(100), "no temperature fits"),
    ],
)
def test_scores_that_cannot_be_calibrated_are_refused(
    labels: np.ndarray, logits: np.ndarray, said: str
) -> None:
    with pytest.raises(CalibrationError, match=said):
        calibrate(labels, logits)


def test_a_threshold_at_1_percent_needs_99_reals() -> None:
    labels, logits = calibrated_scores(120)
    with pytest.raises(CalibrationError, match="too few for a threshold at 1 %"):
        calibrate(labels, logits, "fpr1")


def test_a_lower_error_rate_never_has_a_lower_threshold() -> None:
    """Sources with few images, here the hard ones, do not count for low rates."""
    rng = np.random.default_rng(0)
    easy = [rng.uniform(0, 0.6, 2000) for _ in range(6)]
    hard = [rng.uniform(0.5, 0.9, 60) for _ in range(5)]
    reals = [*easy, *hard]
    for over in get_args(Over):
        rates, thresholds = zip(*thresholds_at_rates(reals, over), strict=True)
        assert list(rates) == sorted(rates)
        assert list(thresholds) == sorted(thresholds, reverse=True)
    few = thresholds_at_rates(reals, "most_sources")
    alone = threshold_over_sources(easy, 0.01, "most_sources")
    assert dict(few)[0.01] == dict(few)[0.02] > alone


@pytest.mark.parametrize("count", [2, 4, 5, 7])
def test_a_rate_over_most_sources_holds_for_three_quarters_of_them(count: int) -> None:
    """Three quarters are rounded up: 4 of 5. Each source has higher scores than the one before."""
    reals = [np.linspace(0, 0.5, 100) + 0.05 * number for number in range(count)]
    threshold = threshold_over_sources(reals, 0.05, "most_sources")
    kept = sum((of_source >= threshold).mean() <= 0.05 for of_source in reals)
    assert kept == math.ceil(0.75 * count)


def test_the_band_of_a_strong_detector_has_its_lower_end_first() -> None:
    """Here the miss rate alone would put it above the upper end, and such a file is refused."""
    labels, logits = calibrated_scores(4_000, scale=5.0)
    fitted = calibrate_by(Calibrating(threshold="pooled"), labels, logits, np.full(4_000, "a"))
    low, high = fitted.band
    assert low == high == fitted.threshold
    assert checked(Calibrated, json.loads(json.dumps(fitted.entries({}))))


@pytest.mark.parametrize("over", ["most_sources", "worst_source"])
def test_a_source_of_few_images_decides_no_threshold(over: Over) -> None:
    """A source of 19 reals, all called fake, is only listed in the table of the sources."""
    labels, logits = calibrated_scores(3_000)
    odd = np.array([0] * 19), np.full(19, 9.0)
    fitted = calibrate_sources({"a": (labels, logits), "odd": odd}, Calibrating(threshold=over))
    assert fitted.threshold < probability(np.array([8.0]), fitted.temperature)
    assert fitted.sources["odd"]["false_positive_rate"] == 1.0
    assert fitted.sources_used["real"] == (1, 2)


@pytest.mark.parametrize("rule", ["auto", Calibrating(threshold="pooled")])
def test_thresholds_for_error_rates_are_those_of_their_own_class(
    rule: ThresholdAt | Calibrating,
) -> None:
    """`--max-fpr` takes them from `at_fpr`, `--max-miss` from `at_miss`."""
    labels, logits = calibrated_scores(4_000)
    fitted = calibrate_by(rule, labels, logits, np.full(4_000, "a"))
    fake = probability(logits, fitted.temperature)
    assert len(fitted.at_fpr) == len(fitted.at_miss) == 9
    for rate, threshold in fitted.at_fpr:
        assert (fake[labels == 0] >= threshold).mean() == pytest.approx(rate, abs=0.001)
    for rate, threshold in fitted.at_miss:
        assert (fake[labels == 1] < threshold).mean() == pytest.approx(rate, abs=0.001)


def test_targets_of_the_temperature_depend_on_the_images_of_their_class() -> None:
    """Of Platt's targets: 201 / 202 for 200 reals, 21 / 22 for 20 fakes. At the best temperature
    the mean probability of the true class is their mean, because all scores are -4 or 4.
    """
    labels = np.repeat([0, 1], [200, 20])
    temperature = fit_temperature(labels, np.where(labels == 1, 4.0, -4.0))
    wanted = (20 * 21 / 22 + 200 * 201 / 202) / 220
    assert probability(np.array([4.0]), temperature)[0] == pytest.approx(wanted, abs=1e-5)


def test_the_band_of_20_fakes_begins_at_the_lowest() -> None:
    """A new fake is below it in 1 of 21 cases, below the second lowest in 2."""
    labels = np.repeat([0, 1], [200, 20])
    logits = np.append(np.linspace(-4, 1, 200), np.linspace(-2, 4, 20))
    fitted = calibrate(labels, logits)
    fake = probability(logits, fitted.temperature)[labels == 1]
    assert fitted.band[0] == min(0.5, fake.min()) < 0.5
