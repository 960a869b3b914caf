"""Fixtures for heads on stored features."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.network import build
from model.recipe import Recipe


@pytest.fixture
def weights(recipe: Recipe, tmp_path: Path) -> Path:
    """Write random weights of the backbone of a module's fixture `recipe`, and return the file."""
    torch.manual_seed(11)
    state = build(recipe.network, pretrained=False).backbone.state_dict()
    path = tmp_path / "w.safetensors"
    save_file({n: w.contiguous() for n, w in state.items() if "stage_head" not in n}, path)
    return path
