"""Choice of the best checkpoint, and early stopping: a run ends after validations without a gain,
at the same step after any interruptions.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import recipes
from model import checkpoint
from model.metrics import Validation, measure_sets
from model.recipe import Recipe
from model.score import Scores
from model.tracking.history import rows_of
from model.training.run import train
from model.training.validation import Best, Gain, better
from sharding.format import ShardSet
from tests.builders import ends_alike
from tests.checkpoints import last_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NO_GAIN = ["run.epochs=6", "optim.lr=1e-12", "optim.weight_decay=0", "run.stop_after_no_gain=2"]
"""Settings that make all validations equal: the first is a gain, the next two are not."""


def test_an_equal_figure_is_no_gain() -> None:
    gain = Gain()
    seen = []
    for step, selection in enumerate([0.5, 0.5, 0.6, 0.55, 0.6, 0.59], 1):
        gain = gain.after(step, selection)
        seen.append((gain.highest, gain.step, gain.validations_since))
    assert seen == [(0.5, 1, 0), (0.5, 1, 1), (0.6, 3, 0), (0.6, 3, 1), (0.6, 3, 2), (0.6, 3, 3)]


def test_early_stopping_ends_at_the_same_step_after_interruptions(
    tiny_recipe: Path, data: Path, tmp_path: Path, logged: list[str]
) -> None:
    recipe = recipes.load(Recipe, tiny_recipe, [*NO_GAIN, "run.log_every=1"])
    best = train(recipe, data, tmp_path / "whole")
    run = tmp_path / "whole/tiny"
    last = last_of(run)
    assert last.name == "step_0000015"
    selections = [row["selection"] for row in rows_of(run) if row["kind"] == "validate"]
    assert len(selections) == 3 and len(set(selections)) == 1
    reason = f"no gain in 2 validations over {selections[0]:.4f} of step 5 (run.stop_after_no_gain)"
    assert checkpoint.read_meta(last)["ended"] == reason
    assert f"stopped at step 15 of 30: {reason}" in logged
    logged.clear()
    assert train(recipe, data, tmp_path / "whole") == best
    assert logged[0].endswith(f"is finished after 15 of 30 steps: {reason}; nothing to do")
    assert last_of(run) == last
    for stop_at in (7, 10):
        train(recipe, data, tmp_path / "parts", stop_at=stop_at)
        stopped = last_of(tmp_path / "parts/tiny")
        assert checkpoint.read_meta(stopped)["ended"] is None
        torch.manual_seed(99)  # other code may have used the generator
    train(recipe, data, tmp_path / "parts")
    assert last_of(tmp_path / "parts/tiny").name == "step_0000015"
    ends_alike(run, tmp_path / "parts/tiny")


def test_a_complete_run_records_that_every_step_is_done(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipes.load(Recipe, tiny_recipe, ["run.epochs=1"])
    last = train(recipe, data, tmp_path)
    assert checkpoint.read_meta(last)["ended"] == "every step is done"


def test_a_negative_number_is_refused(tiny_recipe: Path) -> None:
    with pytest.raises(recipes.RecipeError, match="must not be negative"):
        recipes.load(Recipe, tiny_recipe, ["run.stop_after_no_gain=-1"])


def test_better_prefers_the_higher_figure_then_the_later_checkpoint() -> None:
    def at(step: int, selection: float | None) -> Best:
        validation = None if selection is None else Validation({}, {}, selection)
        return Best(path=Path(f"step_{step:07d}"), validation=validation)

    low, high, later, none = at(1, 0.5), at(2, 0.6), at(3, 0.6), at(4, None)
    assert better(None, none) is none
    assert better(none, low) is low
    assert better(low, none) is low
    assert better(low, high) is high
    assert better(high, low) is high
    assert better(high, later) is later
    assert better(none, at(5, None)).path.name == "step_0000005"


def test_a_checkpoint_is_selected_by_the_mean_balanced_accuracy_of_the_sets(old: ShardSet) -> None:
    """If all images are called fake, a set of 10 reals and 30 fakes has a balanced accuracy of 0.5
    and an accuracy of 0.75. A set of fakes alone counts with its accuracy, 1.
    """
    labels = old.column("label")
    rows = np.r_[np.flatnonzero(labels == 0)[:10], np.flatnonzero(labels == 1)[:30]]
    scored = {}
    for name, shards in (("mixed", old.take(rows)), ("fakes", old.take(rows[10:]))):
        samples, fives = np.arange(len(shards)), np.full(len(shards), 5.0, np.float32)
        own = Scores(samples, shards.column("label").astype(np.int64), fives, {})
        scored[name] = shards, own
    assert measure_sets(scored).selection == (0.5 + 1.0) / 2
