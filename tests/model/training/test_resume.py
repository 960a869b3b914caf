"""Resuming a run: what it began with stays, and what cannot be read is kept."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model import checkpoint
from model.recipe import Recipe
from model.training.plan import plan
from model.training.run import train
from pipeline.order import OrderError
from sharding.format import open_shards
from tests.builders import build_all, write_raw

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Load = Callable[..., Recipe]


def test_a_checkpoint_that_cannot_be_read_is_not_deleted(
    load: Load, data: Path, tmp_path: Path
) -> None:
    """The disk may only have failed for a moment."""
    recipe = load("run.epochs=1", "run.save_every=1")
    train(recipe, data, tmp_path, stop_at=1)
    older = shutil.copytree(tmp_path / "tiny/step_0000001", tmp_path / "older")
    train(recipe, data, tmp_path, stop_at=2)
    older = older.rename(tmp_path / "tiny/step_0000001")
    (older / "weights.safetensors").write_bytes(b"unreadable")
    train(recipe, data, tmp_path, stop_at=3)
    assert (older / "weights.safetensors").read_bytes() == b"unreadable"


def test_a_run_that_is_resumed_without_init_from_keeps_its_gate(
    load: Load, data: Path, tmp_path: Path
) -> None:
    train(load('name="first"', "run.epochs=1", "run.seed=4"), data, tmp_path, stop_at=1)
    start = tmp_path / "first/step_0000001"
    recipe = load("run.epochs=1", "run.save_every=1")
    train(recipe, data, tmp_path, init_from=start, stop_at=2)
    planned = plan(recipe, data, tmp_path)
    assert planned.baseline == tmp_path / "tiny/baseline_metrics.json"
    assert planned.baseline.exists()


def test_an_optimizer_of_other_groups_is_one_clear_error(
    load: Load, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load("run.epochs=1", "run.save_every=1")
    train(recipe, data, tmp_path, stop_at=1)
    every = lambda _backbone: ["*"]  # noqa: E731
    monkeypatch.setattr("timm.models.ConvNeXt.no_weight_decay", every, raising=False)
    said = r"step_0000001 cannot be resumed: an earlier version .* new run with --run NAME"
    with pytest.raises(checkpoint.CheckpointError, match=said):
        train(recipe, data, tmp_path, stop_at=2)


def test_a_training_state_of_somebody_else_is_one_clear_refusal(
    load: Load, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load("run.epochs=1", "run.save_every=1")
    train(recipe, data, tmp_path, stop_at=1)
    good = checkpoint.load_state(tmp_path / "tiny/step_0000001")
    order = good["order"]
    for wrong, said in (
        ([], "no training state"),
        ({}, "no training state"),
        ({"order": [1]}, "no training state"),
        ({"order": {}}, "no training state"),
        (good | {"gain": {"best": 1}}, "no training state"),
        (good | {"gain": [1]}, "no training state"),
        (good | {"gain": {"highest": "1"}}, "no training state"),
        (good | {"validation_content": ["val"]}, "no training state"),
        (good | {"validation_content": {"other": "1"}}, "no training state"),
        (good | {"order": order | {"step": "x"}}, "names epoch 0 and step 'x'"),
        (good | {"order": order | {"epoch": -1}}, "names epoch -1 and step 1"),
        (good | {"order": order | {"seed": torch.zeros(2)}}, "the seed has changed"),
        (good | {"replayed": {"epochs": 1}}, "record of replayed samples"),
    ):
        monkeypatch.setattr(checkpoint, "load_state", lambda *_, state=wrong, **__: state)
        with pytest.raises(ValueError, match=said) as error:
            plan(recipe, data, tmp_path)
        assert type(error.value) in (checkpoint.CheckpointError, OrderError)
        assert "start a new run with --run NAME" in str(error.value)


def test_without_the_metrics_before_training_a_run_is_not_concluded(
    load: Load, data: Path, tmp_path: Path
) -> None:
    """Nobody can measure them again: the run has other weights now."""
    train(load('name="first"', "run.epochs=1", "run.seed=4"), data, tmp_path, stop_at=1)
    recipe, start = load("run.epochs=1"), tmp_path / "first/step_0000001"
    best = train(recipe, data, tmp_path, init_from=start)
    checkpoint.annotate(best, {"compared": None})  # as if killed before the gate
    file = tmp_path / "tiny/baseline_metrics.json"
    said = r"baseline_metrics.json has no readable metrics .*restore .*--run NAME"
    for content in ("", "{}", None):
        file.unlink() if content is None else file.write_text(content)
        with pytest.raises(ValueError, match=said):
            train(recipe, data, tmp_path)


def test_a_validation_set_that_was_built_again_is_refused(
    load: Load, data: Path, tmp_path: Path
) -> None:
    """The best checkpoint would be chosen by figures of different images. A finished run, of which
    the calibration may be missing, is refused too.
    """
    recipe, shards, runs = load("run.epochs=1"), tmp_path / "data", tmp_path / "runs"
    shards.mkdir()
    for name in ("old", "val"):
        (shards / name).symlink_to(data / name)
    for stop_at in (2, None):
        train(recipe, shards, runs, stop_at=stop_at)
        assert plan(recipe, shards, runs).done == (stop_at or 5)
        (shards / "val").unlink()
        (shards / "val").symlink_to(data / "new")
        said = r"cannot resume: validation set val has been built again .* --run NAME"
        with pytest.raises(ValueError, match=said):
            plan(recipe, shards, runs)
        (shards / "val").unlink()
        (shards / "val").symlink_to(data / "val")


SWAPPED = 'real = [{ folder = "fake" }]\nfake = [{ folder = "real" }]'


def with_catalog(raw: Path, before: str, after: str) -> None:
    """Change a text of the catalog of `write_raw`."""
    file = raw / "catalog.toml"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


def test_a_run_goes_on_after_a_build_that_changes_only_other_facts(
    load: Load, tmp_path: Path
) -> None:
    """Generators are in the tars, too, but in no batch. Labels, images and policies are refused."""
    raw, data, runs = write_raw(tmp_path / "raw"), tmp_path / "shards", tmp_path / "runs"
    recipe = load("run.epochs=1")
    train(recipe, build_all(raw, data), runs, stop_at=2)
    before = {name: open_shards([data / name]).sha256 for name in ("old", "val")}
    with_catalog(raw, 'license = "test"', 'license = "CC0-1.0"')
    with_catalog(raw, 'generator = "camera"', 'generator = "Canon"')
    build_all(raw, data)
    assert all(open_shards([data / name]).sha256 != before[name] for name in before)
    train(recipe, data, runs, stop_at=3)
    assert plan(recipe, data, runs).done == 3
    catalog = (raw / "catalog.toml").read_text()
    for old, new, said in (
        ('policy = "dda"', 'policy = "train"', "the shard set has been built again since this run"),
        (catalog.split('set = "old"\n')[1].partition("\n\n")[0], SWAPPED, "the shard set has been"),
        (catalog.split("val = 0.2 }\n")[1].rstrip(), SWAPPED, "validation set val has been built"),
    ):
        with_catalog(raw, old, new)
        build_all(raw, data)
        with pytest.raises(ValueError, match=f"cannot resume: {said}"):
            plan(recipe, data, runs)
        (raw / "catalog.toml").write_text(catalog)


def test_a_resumed_run_keeps_its_teacher(load: Load, data: Path, tmp_path: Path) -> None:
    train(load('name="first"', "run.epochs=1", "run.seed=4"), data, tmp_path, stop_at=1)
    start = tmp_path / "first/step_0000001"
    train(load("run.epochs=1", "run.save_every=1", "run.seed=9"), data, tmp_path, stop_at=1)
    (tmp_path / "tiny").rename(tmp_path / "other")
    distilled = ['replay.sets=["new"]', "replay.ratio=1:8", "replay.distill_weight=1"]
    recipe = load('run.init_from="other"', *distilled, "run.save_every=1")
    train(recipe, data, tmp_path, init_from=start, stop_at=2)
    with pytest.raises(ValueError, match="the teacher is the checkpoint that the run began from"):
        plan(recipe, data, tmp_path)
    assert plan(recipe, data, tmp_path, init_from=start).teacher.path == start


def test_a_resumed_run_names_the_teacher_that_it_needs(
    load: Load, data: Path, tmp_path: Path
) -> None:
    train(load('name="first"', "run.epochs=1", "run.seed=4"), data, tmp_path, stop_at=1)
    start = tmp_path / "first/step_0000001"
    distilled = ['replay.sets=["new"]', "replay.ratio=1:8", "replay.distill_weight=1"]
    recipe = load(*distilled)
    train(recipe, data, tmp_path, init_from=start, stop_at=1)
    said = r"the run began from, checkpoint first/step_0000001 \(sha256 \w+\); give it with --init"
    with pytest.raises(ValueError, match=said):
        plan(recipe, data, tmp_path)


def test_machines_without_a_common_runs_folder_are_refused(
    load: Load, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one of them has the checkpoint: they would train on at different steps."""
    recipe, runs = load("run.epochs=1", "run.save_every=1"), tmp_path / "a"
    train(recipe, data, runs, stop_at=1)
    ranks: list[dict[str, str]] = []
    monkeypatch.setattr(
        "model.distributed.all_gather_object", lambda _dist, seen: ranks.append(seen) or ranks
    )
    train(load("run.epochs=1", "run.save_every=1"), data, tmp_path / "b", stop_at=1)
    with pytest.raises(ValueError, match=r"none on rank 0, but step_0000001 on rank 1; give all"):
        train(recipe, data, runs, stop_at=2)
    assert not (runs / "tiny/step_0000002").exists()
