"""Tests of the figures of `benchmarks.leave_out`."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.leave_out import interval, main, of_pairs, robustness, within_subjects
from model.export.new_kinds import AfterPerturbation
from pipeline.perturb import PERTURBATIONS


def test_the_figure_within_subjects_ignores_what_the_subject_tells() -> None:
    """Two subjects, one mostly fake. Logits that tell only the subject give 0.5 within them."""
    rng = np.random.default_rng(0)
    subject = np.repeat(np.arange(2), 3000)
    features = rng.normal(0, 0.01, (6000, 8)) + np.eye(8)[subject]
    labels = (rng.random(6000) < np.where(subject == 0, 0.2, 0.8)).astype(int)
    of_subject, clusters = within_subjects(features, labels, subject + rng.normal(0, 0.01, 6000))
    assert of_subject == pytest.approx(0.5, abs=0.06)
    assert clusters > 20
    assert within_subjects(features, labels, labels.astype(float))[0] == 1.0
    assert within_subjects(features, np.zeros(6000, int), subject.astype(float)) == (None, 0)


def test_pairs_and_their_interval() -> None:
    real = {"a": np.array([0.0, 1.0]), "b": np.array([2.0, 3.0])}
    values = of_pairs(real, {"f": np.array([1.5, 2.5])})
    assert values == {"a | f": 1.0, "b | f": 0.25}
    low, high = interval(values)
    assert (low, high) == (0.25, 1.0)


def test_sources_of_one_group_are_resampled_together() -> None:
    """A source that is split into four of one group does not make the interval narrower."""
    rng = np.random.default_rng(0)
    real = {name: rng.normal(-1, 1, 50) for name in "abcd"}
    fake = {name: rng.normal(place, 1, 50) for place, name in enumerate("fgh")}
    copies = {**fake, **{f"{name}{i}": z for name, z in fake.items() for i in (1, 2, 3)}}
    expected = interval(of_pairs(real, fake))
    assert interval(of_pairs(real, copies), lambda name: name[0]) == pytest.approx(expected)
    low, high = interval(of_pairs(real, copies))
    assert high - low < 0.8 * (expected[1] - expected[0])


def test_perturbed_figures_state_how_many_images_they_rest_on() -> None:
    ways = len(PERTURBATIONS)
    logits = {"a": np.full((ways, 3), -1.0), "f": np.full((ways, 2), 1.0)}
    logits["f"][1, 0] = np.nan  # one image that the second perturbation cannot change
    figures = list(robustness(logits, {"a": 0, "f": 1}, 0.0).values())
    assert [after.fakes for after in figures[:3]] == [2, 1, 2]
    assert figures[0] == AfterPerturbation(
        auroc=1.0, false_positive_rate=0.0, recall=1.0, reals=3, fakes=2
    )


def test_a_recipe_without_stored_features_is_refused(tiny_recipe: Path) -> None:
    result = CliRunner().invoke(main, ["--recipe", str(tiny_recipe)])
    assert result.exit_code == 2
    assert "has no stored features; give a recipe with a frozen backbone" in result.output
