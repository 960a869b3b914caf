"""Warnings of a plan: settings that have no effect, or not the intended one."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from model.network import build
from model.recipe import Recipe
from model.training.plan import plan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Load = Callable[..., Recipe]


@pytest.mark.parametrize(("epochs", "count"), [(1, 1), (4, 1), (5, 0), (9, 0)])
def test_views_that_no_epoch_reads_are_a_warning(
    load: Load, data: Path, tmp_path: Path, epochs: int, count: int
) -> None:
    recipe = load("network.freeze_backbone=true", "features.views=4", f"run.epochs={epochs}")
    weights = build(recipe.network, pretrained=False).backbone.state_dict()
    file = tmp_path / "weights.safetensors"
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file)
    warnings = plan(recipe, data, tmp_path, init_from=file).warnings
    assert [line for line in warnings if "views" in line] == [
        f"run.epochs={epochs} reads only {epochs} of 5 views; set 5 or more"
    ] * count
