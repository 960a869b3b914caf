import numpy as np
import pytest

from model.metrics import auroc, measure, measure_generators, what_is_missing
from model.score import probability

LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1])
SCORES = np.array([0.1, 0.2, 0.3, 0.6, 0.4, 0.7, 0.8, 0.9])


def test_figures_worked_out_by_hand() -> None:
    found = measure(LABELS, SCORES)
    assert (found.count, found.reals, found.fakes) == (8, 4, 4)
    assert found.accuracy == pytest.approx(6 / 8)
    assert found.balanced_accuracy == pytest.approx((3 / 4 + 3 / 4) / 2)
    assert found.recall == pytest.approx(3 / 4)
    assert found.false_positive_rate == pytest.approx(1 / 4)
    assert found.f1 == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert found.auroc == pytest.approx(15 / 16)


def test_the_threshold_itself_counts_as_fake() -> None:
    assert measure(np.array([1]), np.array([0.5])).recall == 1.0
    assert measure(np.array([1]), np.array([0.5]), threshold=0.51).recall == 0.0


def test_auroc_is_the_share_of_ordered_pairs_ties_counting_half() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 200), rng.integers(0, 30, 200) / 7.0
    above = scores[labels == 1][:, None] - scores[labels == 0][None]
    assert auroc(labels, scores) == pytest.approx(((above > 0) + 0.5 * (above == 0)).mean())


def test_large_logits_do_not_tie() -> None:
    """A sigmoid in float32 would make 40 and 60 equal."""
    assert auroc(np.array([0, 1]), np.array([40.0, 60.0])) == 1.0


def test_with_one_class_only_the_metrics_that_exist() -> None:
    fakes = measure(np.ones(4, int), np.array([0.2, 0.6, 0.7, 0.8]))
    assert (fakes.recall, fakes.accuracy) == (0.75, 0.75)
    assert fakes.false_positive_rate is None
    assert fakes.auroc is None
    assert fakes.f1 is None
    assert "no real images here" in what_is_missing(fakes)
    reals = measure(np.zeros(4, int), np.array([0.2, 0.6, 0.7, 0.8]))
    assert reals.false_positive_rate == 0.75
    assert reals.recall is None
    assert "no fake images here" in what_is_missing(reals)
    assert "no images here" in what_is_missing(measure(np.array([]), np.array([])))
    assert what_is_missing(measure(LABELS, SCORES)) is None


def test_each_generator_is_held_against_all_reals() -> None:
    generators = ["cam", "cam", "cam", "cam", "a", "a", "b", "b"]
    found = measure_generators(LABELS, SCORES, generators)
    assert list(found) == ["a", "b"]
    assert (found["a"].reals, found["a"].fakes) == (4, 2)
    assert found["a"].auroc == pytest.approx(7 / 8)
    assert found["b"].auroc == 1.0


def test_probability_is_the_softmax_at_a_temperature() -> None:
    assert probability(np.array([0.0]))[0] == 0.5
    assert probability(np.array([np.log(3.0)]))[0] == pytest.approx(0.75)
    assert probability(np.array([2 * np.log(3.0)]), temperature=2.0)[0] == pytest.approx(0.75)
