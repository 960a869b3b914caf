import re
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from model.metrics import Metrics, Validation, measure, what_is_missing
from model.verdict import probability

LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1])
SCORES = np.array([0.1, 0.2, 0.3, 0.6, 0.4, 0.7, 0.8, 0.9])


def test_figures_worked_out_by_hand() -> None:
    metrics = measure(LABELS, SCORES)
    assert (metrics.count, metrics.reals, metrics.fakes) == (8, 4, 4)
    assert metrics.accuracy == pytest.approx(6 / 8)
    assert metrics.balanced_accuracy == pytest.approx((3 / 4 + 3 / 4) / 2)
    assert metrics.recall == pytest.approx(3 / 4)
    assert metrics.false_positive_rate == pytest.approx(1 / 4)
    assert metrics.f1 == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert metrics.auroc == pytest.approx(15 / 16)


def test_the_threshold_itself_counts_as_fake() -> None:
    assert measure(np.array([1]), np.array([0.5])).recall == 1.0
    assert measure(np.array([1]), np.array([0.5]), threshold=0.51).recall == 0.0


def test_auroc_is_the_share_of_ordered_pairs_ties_counting_half() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 200), rng.integers(0, 30, 200) / 30
    above = scores[labels == 1][:, None] - scores[labels == 0][None]
    auroc = measure(labels, scores).auroc
    assert auroc == pytest.approx(((above > 0) + 0.5 * (above == 0)).mean())


def test_a_perfect_and_a_reversed_ranking_are_exactly_1_and_0() -> None:
    """Whatever the numbers of images. In float32 some perfect rankings were 1.0000001."""
    for reals in range(1, 26):
        for fakes in range(1, 26):
            labels = np.repeat([0, 1], [reals, fakes])
            rising = np.linspace(0, 1, len(labels))
            perfect = measure(labels, rising, threshold=rising[reals])
            rates = (perfect.auroc, perfect.average_precision, perfect.precision, perfect.f1)
            assert rates == (1.0, 1.0, 1.0, 1.0)
            assert (perfect.tpr_at_fpr_1, perfect.eer, perfect.balanced_accuracy) == (1.0, 0.0, 1.0)
            assert measure(labels, 1 - rising).auroc == 0.0


def test_probabilities_near_one_do_not_tie() -> None:
    """In float32 both would be equal to 1."""
    assert measure(np.array([0, 1]), 1 - np.array([2.0**-52, 2.0**-53])).auroc == 1.0


def test_metrics_that_need_both_classes_are_none_without_one() -> None:
    fakes = measure(np.ones(4, int), np.array([0.2, 0.6, 0.7, 0.8]))
    assert (fakes.recall, fakes.accuracy) == (0.75, 0.75)
    assert fakes.false_positive_rate is None
    assert fakes.auroc is None
    assert fakes.f1 is None
    assert "no real images here" in what_is_missing(0, 4)
    reals = measure(np.zeros(4, int), np.array([0.2, 0.6, 0.7, 0.8]))
    assert reals.false_positive_rate == 0.75
    assert reals.recall is None
    assert "no fake images here" in what_is_missing(4, 0)
    assert "no images here" in what_is_missing(0, 0)
    assert what_is_missing(4, 4) is None
    assert what_is_missing(0, 4, (1, 0)).startswith("None of 1 real image could be scored: recall")
    assert what_is_missing(4, 0, (0, 9)).startswith("None of 9 fake images could be scored: only")
    assert what_is_missing(0, 0, (2, 3)) == "None of 5 images could be scored."


def test_probability_is_the_softmax_at_a_temperature() -> None:
    assert probability(np.array([0.0]))[0] == 0.5
    assert probability(np.array([np.log(3.0)]))[0] == pytest.approx(0.75)
    assert probability(np.array([2 * np.log(3.0)]), temperature=2.0)[0] == pytest.approx(0.75)


def test_extreme_logits_neither_warn_nor_tie() -> None:
    probabilities = probability(np.array([-2000.0, -700.0, 0.0, 700.0, 2000.0, np.nan]))
    assert probabilities[:3].tolist() == [0.0, pytest.approx(np.exp(-700.0)), 0.5]
    assert probabilities[3:5].tolist() == [1.0, 1.0]
    assert np.isnan(probabilities[5])


def cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return labels and probabilities, random and degenerate."""
    rng = np.random.default_rng(5)
    by_name = {}
    for seed in range(5):
        labels = rng.integers(0, 2, 150)
        labels[:2] = 0, 1
        noise = rng.normal(0, 1 + seed, 150)
        by_name[f"random {seed}"] = labels, probability((2 * labels - 1) + noise)
        by_name[f"ties {seed}"] = labels, np.round(probability(labels + noise / 3), 1)
    half = np.repeat([0, 1], 30)
    return by_name | {
        "all equal": (half, np.full(60, 0.4)),
        "all certain": (half, np.ones(60)),
        "two samples, right": (np.array([0, 1]), np.array([0.2, 0.8])),
        "two samples, wrong": (np.array([0, 1]), np.array([0.8, 0.2])),
        "two samples, tied": (np.array([0, 1]), np.array([0.5, 0.5])),
        "perfect": (half, np.linspace(0, 1, 60)),
        "reversed": (half, np.linspace(1, 0, 60)),
        "extreme logits": (half, probability(rng.normal(0, 400, 60))),
        "one fake": (np.append(np.zeros(50, int), 1), rng.uniform(size=51)),
        "one real": (np.append(np.ones(50, int), 0), rng.uniform(size=51)),
        "only reals": (np.zeros(9, int), rng.uniform(size=9)),
        "only fakes": (np.ones(9, int), rng.uniform(size=9)),
        "one image": (np.array([1]), np.array([0.7])),
    }


def by_scikit_learn(labels: np.ndarray, fake: np.ndarray, threshold: float) -> dict[str, object]:
    import sklearn.metrics as sk  # slow to import: only the process that runs these tests needs it

    called = (fake >= threshold).astype(int)
    reals, fakes = int((labels == 0).sum()), int((labels == 1).sum())
    eps = np.finfo(np.float64).eps
    figures = {
        "count": len(labels), "reals": reals, "fakes": fakes,
        "accuracy": sk.accuracy_score(labels, called),
        "recall": sk.recall_score(labels, called) if fakes else None,
        "false_positive_rate": 1 - sk.recall_score(labels, called, pos_label=0) if reals else None,
        "brier": sk.brier_score_loss(labels, fake, pos_label=1),
        # (scikit-learn takes 1 - clipped probability, which for 1 - eps is not exactly eps)
        "nll": sk.log_loss(labels, np.stack([1 - fake, fake], 1).clip(eps, 1), labels=[0, 1])
        if ((fake > eps) & (fake < 1 - eps)).all() else None,
    }  # fmt: skip
    if not (reals and fakes):
        return figures
    fpr, tpr, _ = sk.roc_curve(labels, fake, drop_intermediate=False)
    at = np.argmax(fpr + tpr - 1 >= 0)
    before, after = (fpr + tpr - 1)[at - 1 : at + 1]
    share = -before / (after - before)
    return figures | {
        "balanced_accuracy": sk.balanced_accuracy_score(labels, called),
        "precision": sk.precision_score(labels, called) if called.any() else None,
        "f1": sk.f1_score(labels, called, zero_division=0),
        "auroc": sk.roc_auc_score(labels, fake),
        "average_precision": sk.average_precision_score(labels, fake),
        "tpr_at_fpr_1": tpr[fpr <= 0.01 + 1e-12].max(),
        "tpr_at_fpr_5": tpr[fpr <= 0.05 + 1e-12].max(),
        "eer": fpr[at - 1] + share * (fpr[at] - fpr[at - 1]),
        "ece": sum(
            abs(fake[rows].mean() - labels[rows].mean()) * rows.mean()
            for edge in range(15)
            if (rows := np.minimum(np.floor(fake * 15 + 1e-12), 14) == edge).any()
        ),
    }


@pytest.mark.parametrize("name", cases())
def test_metrics_equal_those_of_scikit_learn(name: str) -> None:
    labels, fake = cases()[name]
    for threshold in (0.5, 0.3):
        figures = asdict(measure(labels, fake, threshold))
        expected = by_scikit_learn(labels, fake, threshold)
        for metric, wanted in expected.items():
            if metric == "nll" and wanted is None:
                assert 0 <= figures["nll"] < 37  # finite for every probability
            else:
                assert figures[metric] == pytest.approx(wanted, abs=1e-12), metric
        missing = figures.keys() - expected.keys()
        assert all(figures[metric] is None for metric in missing)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, (labels, _) in cases().items() if {*labels} == {0, 1}])
def test_metrics_equal_those_of_torchmetrics(name: str) -> None:
    """Within float32, in which torchmetrics computes. It gets ranks, since scores that differ only
    in float64 would tie there.
    """
    import torchmetrics.functional.classification as tm

    labels, fake = cases()[name]
    metrics = measure(labels, fake)
    ranks = np.unique(fake, return_inverse=True)[1] / len(fake)
    truth, scores, called = map(torch.from_numpy, (labels, ranks, (fake >= 0.5).astype(int)))
    for ours, theirs in (
        (metrics.auroc, tm.binary_auroc(scores, truth)),
        (metrics.average_precision, tm.binary_average_precision(scores, truth)),
        (metrics.precision or 0.0, tm.binary_precision(called, truth)),
        (metrics.f1, tm.binary_f1_score(called, truth)),
    ):
        assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_a_probability_of_1_is_in_the_last_bin_of_the_calibration_error() -> None:
    """0.95 of a fake and 1 of a real are one bin: |0.975 - 0.5|."""
    assert measure(np.array([1, 0]), np.array([0.95, 1.0])).ece == pytest.approx(0.475)


def test_equal_error_rate_interpolates_between_thresholds() -> None:
    """At one threshold 1 of 3 reals and 0 of 2 fakes are wrong, at the next 0 of 3 and 1 of 2: the
    lines cross at 0.2.
    """
    labels, fake = np.array([0, 0, 0, 1, 1]), np.array([0.1, 0.2, 0.7, 0.7, 0.9])
    assert measure(labels, fake).eer == pytest.approx(0.2)


def test_tpr_at_fpr_counts_ties_at_the_threshold() -> None:
    """100 reals: one at 0.9 ties with fakes, so a threshold of 0.9 has 1 % false positives."""
    labels = np.append(np.zeros(100, int), np.ones(4, int))
    fake = np.concatenate([np.linspace(0, 0.5, 98), [0.8, 0.9], [0.9, 0.9, 0.8, 0.95]])
    assert measure(labels, fake).tpr_at_fpr_1 == 0.75
    assert measure(labels, fake).tpr_at_fpr_5 == 1.0


def test_metrics_of_other_versions_are_read() -> None:
    """A checkpoint of an earlier version lacks a new figure, and has one that is gone."""
    saved = asdict(Validation({"val": measure(LABELS, SCORES)}, {}, 0.75))
    del saved["sets"]["val"]["eer"]
    saved["sets"]["val"]["sharpness"] = 0.5
    metrics = Validation.from_json(saved).sets["val"]
    assert (metrics.count, metrics.recall, metrics.eer) == (8, 0.75, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([], "it has metrics [], expected an object"),
        ({"sets": []}, "it has sets [], expected an object"),
        ({"sets": {"a": []}}, "it: a has metrics [], expected an object"),
        ({"sets": {"a": {"count": "x"}}}, "it: a has count 'x', expected a number"),
        ({"sets": {"a": {"count": True}}}, "it: a has count True, expected a number"),
        ({"sources": None}, "it has sources None, expected an object"),
        ({"selection": []}, "it has selection [], expected a number"),
        ({"selection": None}, "it has selection None, expected a number"),
    ],
)
def test_damaged_metrics_are_a_value_error(changes: Any, said: str) -> None:
    """They ended a training or `model curves` with a traceback, or were believed."""
    whole = asdict(Validation({"val": measure(LABELS, SCORES)}, {}, 0.75))
    with pytest.raises(ValueError, match=re.escape(said)):
        Validation.from_json(whole | changes if isinstance(changes, dict) else changes)
    with pytest.raises(ValueError, match=r"m\.json has auroc 'x', expected a number"):
        Metrics.from_json(whole["sets"]["val"] | {"auroc": "x"}, "m.json")
