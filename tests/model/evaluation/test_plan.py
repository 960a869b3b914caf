"""Plan of an evaluation: chosen samples and refused input, before a network is loaded."""

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import evaluate
from locks import locked
from model.backbones.pretrained import NetworkError
from model.checkpoint import CheckpointError, annotate, read_meta
from model.evaluation import run
from model.evaluation.plan import Options, choose_references, maybe_trained_on, plan, trained_on
from model.export.average import average
from model.export.onnx import fitness_of
from model.inference.fitness import generators_seen, sets_seen
from pipeline.loader import LoadError
from pipeline.loading import Loading
from pipeline.subset import Subset
from sharding.catalog import Catalog
from sharding.format import ShardError, open_shards


def test_a_plan_lists_measured_sets_and_reference_reals(data: Path, tiny_checkpoint: Path) -> None:
    planned = plan(tiny_checkpoint, data, ["new", "old"], Options(reference_reals="val"))
    assert list(planned.sets) == ["new", "old", "val"]
    assert list(planned.measured) == ["new", "old"]
    val = {"set": "val", "why": "--reference-reals"}
    assert planned.references == {"new": val, "old": val}
    whole = open_shards([data / "val"])
    reals = planned.sets["val"].shards
    assert 0 < len(reals) == (whole.column("label") == 0).sum() < len(whole)
    assert planned.sets["val"].index_sha256 == whole.sha256
    assert (planned.sets["new"].split, planned.sets["val"].split) == ("train", "val")
    assert planned.dtype == torch.float32
    assert planned.meta["step"] == 7


def test_each_set_gets_the_reference_that_the_catalog_names_for_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the reference of another set is packed, and `real` or `asked` decide first."""
    labels = open_shards([data / "val"]).column("label")
    opened = {
        name: open_shards([data / "val"]).take(np.flatnonzero(labels == label))
        for name, label in (("a", 1), ("b", 1), ("c", 1), ("photos", 0), ("alone", 1))
    }
    named = Catalog(reference={"a": "new", "b": "photos", "c": "gone", "photos": "new"})
    monkeypatch.setattr("model.evaluation.plan.read_catalog", lambda _files: named)
    for name in ("new", "photos"):
        shutil.copytree(data / "new", tmp_path / name)
    why = "the catalog's default"
    chosen = choose_references(tmp_path, opened, None)
    assert chosen == {"a": {"set": "new", "why": why}, "b": {"set": "photos", "why": why}}
    asked = choose_references(tmp_path, opened, "photos")
    assert {name: reals["set"] for name, reals in asked.items()} == dict.fromkeys(
        opened.keys() - {"photos"}, "photos"
    )


def test_sets_of_earlier_runs_count_as_trained_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As of a run that was fine-tuned, of an average, and of an ONNX file."""
    folders = [tmp_path / name / tiny_checkpoint.name for name in ("first", "last")]
    for folder, (name, sha256) in zip(folders, (("val", "a"), ("new", "b")), strict=True):
        shutil.copytree(tiny_checkpoint, folder)
        annotate(folder, {"data": {"train": [name], "replay": [], "set_sha256": {name: sha256}}})
    meta = read_meta(folders[1])
    first = {"kind": "checkpoint", "first_weights": None, "sets": sets_seen(read_meta(folders[0]))}
    tuned = meta | {"first_weights": first}
    mean = read_meta(average(*folders, 0.5, tmp_path / "mean"))
    hashes = {"new": "b", "renamed": "a", "old": "c"}
    assert trained_on(meta, hashes) == ["new"]
    for later in (tuned, mean, {"data": fitness_of(tuned)}):
        assert trained_on(later, hashes) == ["new", "renamed"]
    # Packed again under its name: the earlier state of the set still counts.
    again = tuned | {"data": {"set_sha256": {"val": "d"}}}
    assert trained_on(again, {"now": "d", "before": "a"}) == ["now", "before"]
    # A set of this name with a hash that training had not: perhaps built again since.
    for later in (tuned, mean, {"data": fitness_of(tuned)}):
        assert maybe_trained_on(later, {"new": "b", "renamed": "a", "old": "c"}) == []
        assert maybe_trained_on(later, {"new": "e", "val": "a", "old": "c"}) == ["new"]
        assert maybe_trained_on(later, {"new": "e", "val": "f"}) == ["new", "val"]
    assert maybe_trained_on(again, {"val": "a", "old": "c"}) == []
    assert maybe_trained_on({"data": None}, {"new": "b"}) == []


def test_generators_that_training_had_other_images_of_are_known(
    data: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """As of a run that was fine-tuned, of an average, and of an ONNX file; only of test sets."""
    names = open_shards([data / "new"]).generators()
    assert names and not {"fake", "unknown"} & {*names}
    folders = [tmp_path / name / tiny_checkpoint.name for name in ("first", "last")]
    for folder, learned in zip(folders, (names[0].upper() + "-", "other"), strict=True):
        shutil.copytree(tiny_checkpoint, folder)
        annotate(folder, {"data": read_meta(folder)["data"] | {"generators": [learned]}})
    first, last = (read_meta(folder) for folder in folders)
    began = {"kind": "checkpoint", "first_weights": None, "generators": generators_seen(first)}
    tuned = last | {"first_weights": began}
    mean = read_meta(average(*folders, 0.5, tmp_path / "mean"))
    planned = plan(tiny_checkpoint, data, ["new"], Options())
    test_set = replace(planned, sets={"new": replace(planned.sets["new"], split="test")})
    for meta, known in (
        (first, names[:1]), (last, []), (tuned, names[:1]), (mean, names[:1]),
        (first | {"data": fitness_of(tuned)}, names[:1]),
    ):  # fmt: skip
        assert replace(test_set, meta=meta).known_generators == {"new": known}
    assert replace(planned, meta=first).known_generators == {}


def test_stored_features_are_of_the_precision_of_the_run(
    data: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """In another precision all features would be computed again."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / tiny_checkpoint.name)
    recipe = read_meta(folder)["recipe"]
    annotate(folder, {"recipe": recipe | {"run": recipe["run"] | {"precision": "bf16"}}})
    planned = plan(folder, data, ["val"], Options(features=tmp_path / "store"))
    assert (planned.dtype, planned.dtype_reason[:24]) == (
        torch.bfloat16,
        "the precision of the run",
    )
    assert plan(folder, data, ["val"], Options()).dtype == torch.float32


def test_a_subset_is_scored_with_the_hash_of_the_whole_set(
    data: Path, tiny_checkpoint: Path
) -> None:
    whole = open_shards([data / "val"])
    keys = whole.table.column("key").to_pylist()[:3]
    subset = Subset("list.csv", "0" * 64, {"val": keys})
    planned = plan(tiny_checkpoint, data, ["val"], Options(subset=subset))
    assert planned.sets["val"].shards.table.column("key").to_pylist() == keys
    assert planned.sets["val"].index_sha256 == whole.sha256


@pytest.mark.parametrize(
    ("names", "options", "error", "said"),
    [
        (["vall"], Options(), ShardError, r"no shard set at .*vall; .* has the sets new, old, val"),
        (["val"], Options(reference_reals="nope"), ShardError, "no shard set at .*nope"),
        (["val"], Options(device="gpu"), ValueError, "no such device: gpu"),
        (
            ["val"], Options(subset=Subset("list.csv", "", {"old": ["x"]})),
            ValueError, "list.csv lists no sample of val, only of old",
        ),
        (
            ["val"], Options(subset=Subset("list.csv", "", {"val": ["x"]})),
            ValueError, "are not in that set",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_loading(
    data: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    names: list[str], options: Options, error: type[ValueError], said: str,
) -> None:  # fmt: skip
    """`evaluate` raises before it loads or writes anything."""
    monkeypatch.setattr(run, "load_network", lambda _folder: pytest.fail("loaded"))
    with pytest.raises(error, match=said):
        run.evaluate(tiny_checkpoint, data, names, tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_another_evaluation_writes_is_refused_before_scoring(
    data: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would print the figures of the one that writes last as its own."""
    out, options = tmp_path / "out", Options(device="cpu")
    monkeypatch.setattr(run, "score_sets", lambda *_: pytest.fail("scored"))
    out.mkdir()
    with (
        locked(out / ".evaluation.lock"),
        pytest.raises(BlockingIOError, match=r"another evaluation is writing .*out; wait for it"),
    ):
        run.evaluate(tiny_checkpoint, data, ["val"], out, options=options)
    monkeypatch.undo()
    with contextlib.ExitStack() as held:
        run.evaluate(tiny_checkpoint, data, ["val"], out, options=options, held=held)
        with pytest.raises(BlockingIOError, match="another evaluation is writing"):
            run.evaluate(tiny_checkpoint, data, ["val"], out, options=options)
        said = CliRunner().invoke(evaluate.main, ["--scores", str(out / "scores.parquet")])
        assert said.exit_code == 1 and "another evaluation is writing" in said.stderr
    assert sorted(path.name for path in out.iterdir()) == ["scores.parquet", "speed.json"]


def test_a_reference_without_real_images_in_the_subset_is_refused(
    data: Path, tiny_checkpoint: Path
) -> None:
    table = open_shards([data / "val"]).table.to_pydict()
    fakes = [key for key, label in zip(table["key"], table["label"], strict=True) if label == 1]
    options = Options(subset=Subset("list.csv", "", {"val": fakes}), reference_reals="val")
    with pytest.raises(ValueError, match="val: this set has no real images to score; name a set"):
        plan(tiny_checkpoint, data, ["val"], options)


def test_an_unavailable_backend_is_refused(
    data: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.loader._is_installed", lambda _module: False)
    with pytest.raises(LoadError, match=r"backend dali: .* is not installed"):
        plan(tiny_checkpoint, data, ["val"], Options(loading=Loading(backend="dali")))


def test_a_checkpoint_that_cannot_be_loaded_is_refused(
    data: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"is no checkpoint \(it has no meta"):
        plan(tmp_path, data, ["val"], Options())
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (copy / "weights.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(NetworkError, match=r"weights\.safetensors is no readable \.safetensors"):
        plan(copy, data, ["val"], Options())
