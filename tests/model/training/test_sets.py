"""Warnings of a plan: settings that have no effect, or not the intended one."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from model import checkpoint
from model.backbones.resolve import resolved
from model.recipe import Calibrating, Features, Recipe
from model.training.plan import plan
from model.training.resume import as_saved
from model.training.run import train
from model.training.sets import warnings_of
from pipeline.replay import Replay
from sharding.format import INDEX_FILE, ShardError, open_shards

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Load = Callable[..., Recipe]


@pytest.fixture
def recipe(load: Load) -> Recipe:
    return load("network.freeze_backbone=true", "features.views=4")


@pytest.mark.parametrize(("epochs", "count"), [(4, 1), (5, 0)])
def test_views_that_no_epoch_reads_are_a_warning(
    recipe: Recipe, weights: Path, data: Path, tmp_path: Path, epochs: int, count: int
) -> None:
    recipe = replace(recipe, run=replace(recipe.run, epochs=epochs))
    warnings = plan(recipe, data, tmp_path, init_from=weights).warnings
    assert [line for line in warnings if "views" in line] == [
        f"run.epochs={epochs} reads only {epochs} of 5 views; set 5 or more"
    ] * count


@pytest.mark.parametrize(("setting", "count"), [
    ("loading.cache_gb=4", 1), ("loading.cache_gb=9", 0), ("loading.shuffle=block", 0),
])  # fmt: skip
def test_a_global_shuffle_of_large_sets_at_an_address_is_a_warning(
    load: Load, weights: Path, data: Path, tmp_path: Path, setting: str, count: int
) -> None:
    recipe = load("loading.cache_gb=4", setting)
    stream = plan(recipe, data, tmp_path, init_from=weights).stream
    assert not warnings_of(recipe, stream)  # on disk
    shards = stream.pool.shards
    far = replace(
        shards,
        folders=(UPath("memory://bucket/shards"),) * len(shards.folders),
        shard_bytes=(8 * 10**9, *[0] * (len(shards.shard_bytes) - 1)),
    )
    stream = replace(stream, pool=replace(stream.pool, shards=far))
    assert [line[:47] for line in warnings_of(recipe, stream)] == [
        "the sets at an address have 8 GB, more than loa"
    ] * count
    frozen = replace(recipe.network, freeze_backbone=True)
    stored = replace(recipe, network=frozen, features=Features())
    assert not warnings_of(stored, stream)  # each image is read once, in order


def test_sources_of_a_group_that_the_sets_lack_are_a_warning(
    recipe: Recipe, weights: Path, data: Path, tmp_path: Path
) -> None:
    """A recipe that ships may name more sources than a user has."""
    groups = {"a": ["alpha", "nosuch"], "b": ["d", "c", "b"]}
    recipe = replace(recipe, calibration=Calibrating(on="left_out", together=groups))
    warnings = plan(recipe, data, tmp_path, init_from=weights).warnings
    assert [line for line in warnings if "together" in line] == [
        "calibration.together names sources that the training sets lack: b, c, d and 1 more"
    ]
    groups = {"a": ["alpha", "gamma", "nosuch"]}
    recipe = replace(
        recipe,
        calibration=Calibrating(on="left_out", together=groups),
        replay=Replay(sets=["new"], ratio=0.5),
    )
    warnings = plan(recipe, data, tmp_path, init_from=weights).warnings
    assert [line[-17:] for line in warnings if "together" in line] == ["sets lack: nosuch"]


def test_limits_of_the_gate_that_nothing_can_judge_are_refused_at_the_start(
    load: Load, data: Path, tmp_path: Path
) -> None:
    """A run that began before is told, and can go on."""
    train(load('name="first"', "run.epochs=1"), data, tmp_path, stop_at=1)
    start, limit = tmp_path / "first", "gate.max_forgetting=0.05"
    blind = load(limit, 'data.train=["new"]')  # the only source of `val` is in it
    said = "max_forgetting cannot be judged, because no validation set holds an old source"
    with pytest.raises(ValueError, match=f"gate.{said}: add such a set to data.validate"):
        plan(blind, data, tmp_path, init_from=start)
    assert plan(load('data.train=["new"]'), data, tmp_path, init_from=start)
    seeing = load(limit, 'data.train=["new"]', 'data.validate=["val", "old"]')
    assert not any(
        "gate." in line for line in plan(seeing, data, tmp_path, init_from=start).warnings
    )
    train(load('data.train=["new"]'), data, tmp_path, init_from=start, stop_at=1)
    state = tmp_path / "tiny/step_0000001"
    checkpoint.annotate(state, {"recipe": as_saved(resolved(blind))})
    (line,) = [one for one in plan(blind, data, tmp_path).warnings if "gate" in one]
    assert line == f"gate.{said}: the gate will refuse the checkpoint"


def copy_with(original: Path, copy: Path, **facts: object) -> None:
    """Copy a set, with other facts of its source gamma."""
    shutil.copytree(original, copy)
    index = json.loads((copy / INDEX_FILE).read_text())
    index["sources"]["gamma"] |= facts
    (copy / INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("fact", "before", "now"),
    [("policy", '""', '"dda"'), ("replay", "true", "false"), ("synthetic", "false", "true")],
)
def test_sets_that_give_a_source_other_facts_are_refused(
    load: Load, data: Path, tmp_path: Path, fact: str, before: str, now: str
) -> None:
    """Facts are kept by name: those of the set that is named last would hold for both."""
    (tmp_path / "one").symlink_to(data / "new")
    copy_with(data / "val", tmp_path / "two", **{fact: json.loads(now)})
    (tmp_path / "val").symlink_to(data / "old")
    said = rf"source gamma has {fact} {before} in .*one, but {now} in .*two; give it the same"
    replayed = ['data.train=["one"]', 'replay.sets=["two"]', "replay.ratio=1:8"]
    for changes in (['data.train=["one", "two"]'], replayed):
        with pytest.raises(ShardError, match=said):
            plan(load(*changes), tmp_path, tmp_path / "runs")
    assert open_shards([tmp_path / "two", tmp_path / "two"]).sources["gamma"]["license"] == "test"


def test_a_source_in_both_roles_is_a_warning(load: Load, data: Path, tmp_path: Path) -> None:
    for name, original in (("mine", "val"), ("mine2", "new"), ("val", "old")):
        (tmp_path / name).symlink_to(data / original)
    both = ['data.train=["mine2"]', 'replay.sets=["mine"]', "data.allow_shared_images=true"]
    warnings = plan(load(*both, "replay.ratio=1:8"), tmp_path, tmp_path / "runs").warnings
    assert warnings == (
        "new samples (in mine2) and replayed ones (in mine) are of the same source: gamma; it "
        "counts as new, so its forgetting is not measured",
    )
    assert not plan(load(*both, "replay.ratio=0"), tmp_path, tmp_path / "runs").warnings


def test_a_set_is_either_new_or_old(load: Load, data: Path, tmp_path: Path) -> None:
    both = ['data.train=["old", "new"]', 'replay.sets=["./old"]']
    with pytest.raises(ValueError, match=r"data\.train and replay\.sets both name old, so its im"):
        plan(load(*both, "replay.ratio=1:8"), data, tmp_path)
    assert plan(load(*both, "replay.ratio=0"), data, tmp_path)


def test_a_repeat_that_takes_no_image_is_refused(load: Load, data: Path, tmp_path: Path) -> None:
    """It rounds to 0 in every epoch, so the source would be left out without a word."""
    old = open_shards([data / "old"])
    count = old.names("source", np.arange(len(old))).count("alpha")
    said = (
        rf"data\.repeats\.alpha is 0\.01, so .* has {count} images; set (\S+) to take one in each "
        "epoch, or 0 to leave the source out"
    )
    with pytest.raises(ValueError, match=said) as refused:
        plan(load("data.repeats.alpha=0.01"), data, tmp_path)
    advised = re.search(said, str(refused.value))[1]
    for repeat, images in (("0", 0), (advised, 1)):
        stream = plan(load(f"data.repeats.alpha={repeat}"), data, tmp_path).stream
        assert old.names("source", stream.new(0)).count("alpha") == images


def test_a_ratio_that_replays_no_image_is_refused(load: Load, data: Path, tmp_path: Path) -> None:
    """It rounds to 0 in every epoch, so replay would be off without a word."""
    count = len(open_shards([data / "new"]))
    phase_2 = ['data.train=["new"]', 'replay.sets=["old"]']
    said = f"replay.ratio is 1:200, .* it has {count} new images; set 1:{count} to replay one in"
    with pytest.raises(ValueError, match=said):
        plan(load(*phase_2, "replay.ratio=1:200"), data, tmp_path)
    for ratio, images in (("0", 0), (f"1:{count}", 1)):
        stream = plan(load(*phase_2, f"replay.ratio={ratio}"), data, tmp_path).stream
        assert np.count_nonzero(stream.epoch(0, whole=True).replayed) == images


def test_sources_that_are_not_replayed_are_not_looked_up_without_replay(
    load: Load, data: Path, tmp_path: Path
) -> None:
    off = load('replay.sets=["old"]', "replay.ratio=0", 'replay.exclude_sources=["alpha"]')
    assert plan(replace(off, data=replace(off.data, train=["new"])), data, tmp_path)


def test_a_refused_checkpoint_is_first_weights_only_by_name(
    load: Load, data: Path, tmp_path: Path
) -> None:
    train(load('name="first"', "run.epochs=1"), data, tmp_path, stop_at=1)
    first = tmp_path / "first/step_0000001"
    checkpoint.annotate(first, {"refused": ["val has 40.0% false positives"]})
    with pytest.raises(
        checkpoint.CheckpointError, match=r"step_0000001 was refused: val has 40.0% .*--init-from"
    ):
        plan(load('run.init_from="first"'), data, tmp_path)
    warnings = plan(load(), data, tmp_path, init_from=tmp_path / "first").warnings
    assert warnings[0].endswith("step_0000001, which was refused: val has 40.0% false positives")


def test_an_unfinished_run_gives_first_weights_only_by_name(
    load: Load, data: Path, tmp_path: Path
) -> None:
    """Neither it nor a gate has seen all of its training."""
    first = load('name="first"', "run.epochs=1", "run.save_every=1")
    train(first, data, tmp_path, stop_at=2)
    start, second = tmp_path / "first/step_0000002", load('run.init_from="first"')
    with pytest.raises(
        checkpoint.CheckpointError,
        match=r"first, which is not finished \(its last checkpoint is step_0000002\); .*--init-f",
    ):
        plan(second, data, tmp_path)
    said = f"this run starts from {start}, of a run that is not finished"
    assert plan(load(), data, tmp_path, init_from=start).warnings[0].startswith(said)
    train(second, data, tmp_path, init_from=start, stop_at=1)
    assert not any("not finished" in line for line in plan(second, data, tmp_path).warnings)
    (tmp_path / "tiny").rename(tmp_path / "begun")
    older = shutil.copytree(start, tmp_path / "older")
    train(first, data, tmp_path)
    older.rename(start)  # a checkpoint before the end, such as the best one
    for init_from in (None, start, tmp_path / "first"):
        planned = plan(second, data, tmp_path, init_from=init_from)
        assert not any("not finished" in line for line in planned.warnings)
