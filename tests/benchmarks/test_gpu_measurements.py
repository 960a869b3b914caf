"""What the benchmarks of the GPU path measure is what they name, as far as a CPU can show it."""

from pathlib import Path

import pytest
import torch

from benchmarks import step as step_benchmark
from benchmarks.gpu_selftest import damaged_png
from benchmarks.step import Way, measure
from imaging.decode import DecodeError, decode_image
from model.backbones.resolve import resolved
from model.recipe import Recipe
from pipeline.dali import _may_reach_graph
from recipes import load


def test_the_damaged_png_reaches_dalis_decoder() -> None:
    assert _may_reach_graph(damaged_png(), "PNG")
    with pytest.raises(DecodeError):
        decode_image(damaged_png(), "PNG", 1)


def test_operations_are_counted_before_the_peak_of_memory_is_reset(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting runs an uncompiled step, which needs more memory than the compiled one."""
    happened: list[str] = []
    count, reset = step_benchmark.operations, step_benchmark.begin_memory

    def counted(state: object, batch: object, recipe: object) -> int:
        happened.append(f"counted on {len(batch)}")
        return count(state, batch, recipe)

    def begun(device: torch.device) -> None:
        happened.append("reset")
        reset(device)

    monkeypatch.setattr(step_benchmark, "operations", counted)
    monkeypatch.setattr(step_benchmark, "begin_memory", begun)
    recipe = resolved(load(Recipe, tiny_recipe))
    way = Way(batch=16, dtype="fp32")
    whole = measure(way, recipe, torch.device("cpu"), 0.01, {"fp32": 1.0})
    assert happened == ["reset", "counted on 8", "reset"]
    half = measure(Way(batch=8, dtype="fp32"), recipe, torch.device("cpu"), 0.01, {"fp32": 1.0})
    assert whole["operations"] == 2 * half["operations"]
