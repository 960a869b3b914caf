"""Phase 2 as continual learning, many ranks, and what an interruption may cost."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import recipes
import train as script
from model import checkpoint
from model.forgetting import Change, Gate, forgetting, refusals
from model.metrics import measure
from pipeline import Replay, open_pool
from tests.sharding.test_robust import _can_mount
from train import Recipe, Refused, train

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def losses_of(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def torchrun(ranks: int, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(ranks), "train.py", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


@pytest.fixture
def phase2(tiny_recipe: Path) -> Path:
    path = tiny_recipe.with_name("tiny2.toml")
    path.write_text(
        f"""
extends = ["{tiny_recipe}"]
name = "tiny2"
[data]
train = ["new"]
validate = ["val", "old"]
[replay]
sets = ["old"]
old_per_new = "1:4"
[run]
epochs = 2
start = "tiny"
"""
    )
    return path


def test_two_ranks_learn_as_one_with_the_same_batch(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    common = ["--recipe", tiny_recipe, "--data", data, "--set", "network.drop_path=0",
              "--set", "run.log_every=1", "--set", "optim.clip=0.5"]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    result = CliRunner().invoke(script.main, [*map(str, common), "--runs", str(one)])
    assert result.exit_code == 0, result.output
    result = torchrun(2, *common, "--runs", two, "--set", "loading.batch_size=8")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("best checkpoint:") == 1  # one of them speaks
    np.testing.assert_allclose(losses_of(two / "tiny"), losses_of(one / "tiny"), rtol=2e-3)
    metas = [checkpoint.read_meta(checkpoint.last_of(run / "tiny")) for run in (one, two)]
    counts = [meta["metrics"]["sets"]["val"]["count"] for meta in metas]
    assert counts[0] == counts[1]
    aurocs = [meta["metrics"]["sets"]["val"]["auroc"] for meta in metas]
    assert abs(aurocs[0] - aurocs[1]) < 0.02


def test_a_run_of_two_ranks_goes_on_with_one(tiny_recipe: Path, data: Path, tmp_path: Path) -> None:
    common = ["--recipe", tiny_recipe, "--data", data, "--runs", tmp_path]
    common += ["--set", "run.save_every=2"]
    result = torchrun(2, *common, "--set", "loading.batch_size=8", "--set", "run.epochs=1")
    assert result.returncode == 0, result.stderr
    last = checkpoint.last_of(tmp_path / "tiny")
    state = checkpoint.load_state(last)
    assert len(state["rng"]) == 2
    assert state["order"]["global_batch"] == 16


@pytest.mark.parametrize("pieces", [2, 5, 16])
def test_accumulation_changes_only_memory(
    tiny_recipe: Path, data: Path, tmp_path: Path, pieces: int
) -> None:
    found = []
    for name, accumulate in (("whole", 1), ("pieces", pieces)):
        settings = ["network.drop_path=0", "run.log_every=1", f"run.accumulate={accumulate}"]
        recipe = recipes.load(Recipe, tiny_recipe, settings)
        train(recipe, data, tmp_path / name, stop_at=4)
        found.append(losses_of(tmp_path / name / "tiny"))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)


def test_averaged_weights_are_saved_and_the_run_resumes_from_the_others(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipes.load(Recipe, tiny_recipe, ["optim.ema=0.9", "run.epochs=2"])
    whole = train(recipe, data, tmp_path / "whole")
    train(recipe, data, tmp_path / "parts", stop_at=3)
    half = checkpoint.last_of(tmp_path / "parts/tiny")
    raw = checkpoint.load_state(half)["net"]
    shown = checkpoint.read_weights(half)
    assert raw.keys() == shown.keys()
    assert not torch.equal(raw["head.fc.weight"], shown["head.fc.weight"])
    again = train(recipe, data, tmp_path / "parts")
    one, other = checkpoint.read_weights(whole), checkpoint.read_weights(again)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_phase_2_says_what_was_forgotten_and_keeps_its_manifest(
    tiny_recipe: Path, phase2: Path, data: Path, tmp_path: Path
) -> None:
    train(recipes.load(Recipe, tiny_recipe, ["run.epochs=4"]), data, tmp_path)
    result = CliRunner().invoke(
        script.main, ["--recipe", str(phase2), "--data", str(data), "--runs", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    assert "forgetting:" in result.output
    best = checkpoint.best_of(tmp_path / "tiny2")
    meta = checkpoint.read_meta(best)
    compared = {row["name"]: row for row in meta["compared"]["sources"]}
    assert compared["old/alpha"]["old"] and not compared["val/gamma"]["old"]
    before = json.loads((tmp_path / "tiny2/before.json").read_text())
    start = checkpoint.read_meta(checkpoint.best_of(tmp_path / "tiny"))
    assert before["sets"]["val"] == start["metrics"]["sets"]["val"]
    assert meta["refused"] == []
    rows = list(csv.DictReader((best / "replayed.csv").read_text().splitlines()))
    old = set(open_pool(data, ["old"], Replay()).shards.table.column("key").to_pylist())
    assert {row["key"] for row in rows} <= old
    assert {row["epoch"] for row in rows} <= {"0", "1"}
    new = len(open_pool(data, ["new"], Replay()).shards)
    assert 0 < sum(row["epoch"] == "0" for row in rows) <= new // 4


def test_the_gate_marks_and_keeps_what_it_refuses(
    tiny_recipe: Path, phase2: Path, data: Path, tmp_path: Path
) -> None:
    train(recipes.load(Recipe, tiny_recipe), data, tmp_path)
    recipe = recipes.load(Recipe, phase2, ["gate.max_fpr=0.0", "optim.lr=1e-2"])
    with pytest.raises(Refused, match=r"is refused: .* more than gate.max_fpr 0.0%"):
        train(recipe, data, tmp_path)
    best = checkpoint.best_of(tmp_path / "tiny2")
    assert checkpoint.read_meta(best)["refused"]
    assert checkpoint.best_of(tmp_path / "tiny")
    result = CliRunner().invoke(
        script.main,
        ["--recipe", str(phase2), "--data", str(data), "--runs", str(tmp_path / "again"),
         "--init", str(checkpoint.best_of(tmp_path / "tiny")), "--set", "gate.max_fpr=0.0",
         "--set", "optim.lr=1e-2"],
    )  # fmt: skip
    assert result.exit_code == 1
    assert "It is kept, and so is its start" in result.output


def metrics(accuracy: float, fpr: float = 0.0):
    fakes = round(100 * accuracy)
    labels = np.repeat([1, 0], [100, 100])
    called = np.r_[np.arange(100) < fakes, np.arange(100) < round(100 * fpr)].astype(float)
    return measure(labels, called)


def test_the_gate_looks_at_old_sources_and_false_positives() -> None:
    rows = [
        Change(name="val/a", old=True, images=10, before=0.9, after=0.82),
        Change(name="val/b", old=True, images=10, before=0.5, after=0.7),
        Change(name="val/c", old=False, images=10, before=0.9, after=0.1),
    ]
    assert forgetting(rows) == pytest.approx(0.04)
    sets = {"val": metrics(0.9, 0.12)}
    assert refusals(Gate(), rows, sets) == []
    (one,) = refusals(Gate(max_forgetting=0.05), rows, sets)
    assert one.startswith("val/a lost 8.0%")
    (one,) = refusals(Gate(max_fpr=0.1), rows, sets)
    assert one.startswith("val has 12.0% false positives")


def test_distillation_holds_the_logits_of_old_samples(
    tiny_recipe: Path, phase2: Path, data: Path, tmp_path: Path
) -> None:
    """Of two runs that differ in nothing else, the held one stays nearer to its teacher."""
    train(recipes.load(Recipe, tiny_recipe), data, tmp_path)
    away = []
    for name, weight in (("free", 0.0), ("held", 50.0)):
        settings = [f"name={name}", f"replay.distill={weight}", "optim.lr=3e-3",
                    'replay.old_per_new="1:1"', "run.epochs=3"]  # fmt: skip
        recipe = recipes.load(Recipe, phase2, settings)
        train(recipe, data, tmp_path)
        teacher, _, _ = checkpoint.load_network(checkpoint.best_of(tmp_path / "tiny"))
        student, _, _ = checkpoint.load_network(checkpoint.last_of(tmp_path / name))
        images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
        with torch.inference_mode():
            away.append(float((teacher(images) - student(images)).square().mean()))
    assert away[1] < 0.5 * away[0]
    with pytest.raises(ValueError, match="needs a run that starts from a trained checkpoint"):
        train(recipes.load(Recipe, tiny_recipe, ["name=x", "replay.distill=1"]), data, tmp_path)


@pytest.mark.skipif(not _can_mount(), reason="mounting a small file system needs root")
def test_a_full_disk_keeps_the_last_good_checkpoint(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    """On a real file system that has room for one checkpoint and not for two."""
    small = tmp_path / "small"
    small.mkdir()
    run = (
        f"{sys.executable} train.py --recipe {tiny_recipe} --data {data} --runs {small} "
        "--set run.save_every=1"
    )
    script_text = f"""
        mount -t tmpfs -o size=260k none {small} || exit 99
        {run}; echo "first: $?"
        ls {small}/tiny | grep step_
        mount -o remount,size=64m {small}
        {run}; echo "second: $?"
        cp -r {small} {tmp_path / "kept"}
    """
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", script_text],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "first: 1" in result.stdout, result.stdout + result.stderr
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr
    assert "second: 0" in result.stdout, result.stdout + result.stderr
    best = checkpoint.best_of(tmp_path / "kept/tiny")
    whole = train(recipes.load(Recipe, tiny_recipe, ["run.save_every=1"]), data, tmp_path / "w")
    one, other = checkpoint.read_weights(best), checkpoint.read_weights(whole)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_first_bad_loss_ends_the_run_with_its_step_and_samples(
    tiny_recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found at the next look, and named by the step in which it happened."""
    step = script.train_step
    seen: list[list[str]] = []

    def poisoned(trainer, forward: Callable, batch, *arguments, **options):
        table = open_pool(data, ["old"], Replay()).shards.table
        seen.append(table.column("key").take(batch.samples).to_pylist())
        if options["step"] == 2:
            with torch.no_grad():
                next(trainer.net.parameters()).fill_(float("nan"))
        return step(trainer, forward, batch, *arguments, **options)

    monkeypatch.setattr(script, "train_step", poisoned)
    recipe = recipes.load(Recipe, tiny_recipe, ["run.log_every=5", "run.epochs=2"])
    with pytest.raises(ValueError, match=r"not finite at step 3 \(first samples: ") as caught:
        train(recipe, data, tmp_path)
    assert all(key in str(caught.value) for key in seen[2][:8])
    assert checkpoint.last_of(tmp_path / "tiny") is None
