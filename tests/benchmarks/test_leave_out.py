"""Tests of the figures of `benchmarks.leave_out`."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.leave_out import interval, main, of_pairs, within_subjects


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


def test_a_recipe_without_stored_features_is_refused(tiny_recipe: Path) -> None:
    result = CliRunner().invoke(main, ["--recipe", str(tiny_recipe)])
    assert result.exit_code == 2
    assert "has no stored features; give a recipe with a frozen backbone" in result.output
