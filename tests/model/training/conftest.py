"""Fixtures of the training tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

import recipes
from model.recipe import Recipe

Load = Callable[..., Recipe]


@pytest.fixture
def load(tiny_recipe: Path) -> Load:
    """Return a loader of the tiny recipe with changes: `load("optim.lr=1e-3", ...)`."""
    return lambda *changes: recipes.load(Recipe, tiny_recipe, changes)
