"""`train.py --dry-run`: it prints what a run would do, and writes nothing."""

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import recipes
import train as command
from model.launch import dry_run as trying
from model.network import build
from model.recipe import Recipe
from model.training.run import train
from storage import sha256_of
from tests import forked

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("no_workers"),
]


def dry_run(recipe: Path, data: Path, runs: Path, *settings: str, **options: object) -> Result:
    arguments = ["--recipe", recipe, "--data", data, "--runs", runs, "--dry-run"]
    arguments += [word for setting in settings for word in ("--set", setting)]
    arguments += [word for name, value in options.items() for word in (f"--{name}", value)]
    return CliRunner().invoke(command.main, [str(word) for word in arguments])


def files_below(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_describes_the_run_and_writes_nothing(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    result = dry_run(tiny_recipe, data, tmp_path / "runs")
    assert result.exit_code == 0, result.output
    said = result.stdout
    assert "first weights: random, not pretrained" in said
    assert "2 epochs, 10 steps of 16" in said
    rows = [re.split(r"\s*[│|]\s*", line) for line in said.splitlines() if "alpha" in line]
    assert [row[1:5] for row in rows] == [["training", "alpha", "25", "15"]]
    assert re.search(r"validation val +│ gamma", said)
    assert "13,690 of 13,690 parameters are trained" in said
    assert re.search(r"tried 4 steps of 16 images.*: first loss 0\.\d+; the first step took", said)
    assert re.search(r"peak memory \d+\.\d+ GiB a process", said)
    assert re.search(r"estimate: [\d.e+-]+ \w+ for 10 steps, 2 validations of ", said)
    assert "batches measured for the estimate: 3." in said
    assert not (tmp_path / "runs").exists()


def test_a_resumed_phase_2_run(
    tiny_recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two batches when time is short; the metrics before training are counted as a
    validation.
    """
    monkeypatch.setattr(trying, "ENOUGH_S", 0.0)
    settings = [
        'name="second"', 'run.init_from="tiny"', 'data.train=["new"]', 'replay.sets=["old"]',
        "replay.ratio=1:8", "replay.distill_weight=0.5", "optim.ema_decay=0.9",
    ]  # fmt: skip
    runs = tmp_path / "runs"
    best = train(recipes.load(Recipe, tiny_recipe, ["run.epochs=1"]), data, runs)
    train(recipes.load(Recipe, tiny_recipe, settings), data, runs, stop_at=4)
    before = files_below(runs)
    result = dry_run(tiny_recipe, data, runs, *settings)
    assert result.exit_code == 0, result.output
    digest = sha256_of(best / "weights.safetensors")[:12]
    assert f"first weights: checkpoint tiny/{best.name} (sha256 {digest})" in result.stdout
    assert f"resuming from {runs / 'second/step_0000004'}" in result.stdout
    assert re.search(r"replay candidates +│ beta +│ +15 │ +15", result.stdout)
    assert "tried 2 steps of 16" in result.stdout
    assert "for 8 steps, 2 validations" in result.stdout  # of 12 steps and both epochs
    result = dry_run(tiny_recipe, data, runs, "run.epochs=1")
    assert (result.exit_code, "is finished" in result.stdout) == (0, True)
    assert files_below(runs) == before


def test_stored_features_that_are_missing_are_estimated_and_not_stored(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipes.load(Recipe, tiny_recipe)
    weights, store = tmp_path / "weights.safetensors", tmp_path / "store"
    state = build(recipe.network, pretrained=False).backbone.state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, weights)
    settings = [
        "network.freeze_backbone=true", "network.drop_path_rate=0", "features.views=2",
        f'features.store="{store}"', "optim.lr=0.02",
    ]  # fmt: skip
    options = {"init-from": weights}
    result = dry_run(tiny_recipe, data, tmp_path / "runs", *settings, **options)
    assert result.exit_code == 0, result.output
    # Two views of 80 images, and the center crops of val.
    images = (
        2 * 80
        + int(re.search(r"gamma +│ +(\d+)", result.stdout)[1])
        + int(re.search(r"gamma +│ +\d+ │ +(\d+)", result.stdout)[1])
    )
    assert f"10 steps, the features of {images} images (" in result.stdout
    assert "file weights.safetensors" in result.stdout
    assert not store.exists() and not (tmp_path / "runs").exists()
    torch.manual_seed(0)
    train(
        recipes.load(Recipe, tiny_recipe, settings), data, tmp_path / "runs",
        init_from=weights, stop_at=5,
    )  # fmt: skip
    result = dry_run(tiny_recipe, data, tmp_path / "runs", *settings, **options)
    assert result.exit_code == 0, result.output
    assert "the features of" not in result.stdout
    assert re.search(r"for 5 steps$", result.stdout, re.MULTILINE)
    settings += ['optim.solver="lbfgs"', "features.views=0"]
    result = dry_run(tiny_recipe, data, tmp_path / "fits", *settings, **options)
    assert result.exit_code == 0, result.output
    assert "at most 100 iterations over about 80 features; the estimate does not" in result.stdout
    assert "estimate: all features are stored\n" in result.stdout


def test_what_would_stop_the_run_stops_the_dry_run(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    for setting, said in (
        ("network.std=[1e-30, 1e-30, 1e-30]", "the loss is nan at step 1; lower optim.lr"),
        ('data.train=["odl"]', "no shard set at"),
    ):
        result = dry_run(tiny_recipe, data, tmp_path / "runs", setting)
        assert result.exit_code == 1
        assert said in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_of_several_ranks_only_the_first_prints(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    arguments = ["--recipe", tiny_recipe, "--data", data, "--runs", tmp_path / "runs", "--dry-run"]
    arguments += ["--set", "loading.batch_size=8"]
    first, second = [rank.wait() for rank in forked.start_ranks(2, arguments, tmp_path)]
    assert (first.status, second.status) == (0, 0), first.stderr + second.stderr
    assert "tried 4 steps of 16 images" in first.stdout
    assert second.stdout == ""
    assert not (tmp_path / "runs").exists()
