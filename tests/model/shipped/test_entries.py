"""Checkpoints of strangers: each value of a wrong type is one error, before any image is read."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import predict
from model import checkpoint
from model.checkpoint import CheckpointError, DamagedError
from tests.builders import encode, photo

FIRST_WEIGHTS = {"kind": "file", "name": "a", "sha256": "", "license": None, "first_weights": None}

GONE = object()
"""Value of an entry that is missing."""


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of a checkpoint, which a stranger may change."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "theirs" / tiny_checkpoint.name)


def forged(folder: Path, changes: Mapping[str, Any]) -> Path:
    """Change entries of a checkpoint's meta.json, with hashes that fit. The key `a.b` is `b` in the
    object `a`.
    """
    meta = json.loads((folder / "meta.json").read_text())
    for key, value in changes.items():
        *outer, last = key.split(".")
        entries = meta
        for name in outer:
            entries = entries[name]
        entries[last] = value
        if value is GONE:
            del entries[last]
    checkpoint.seal(folder, meta)
    return folder


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("preprocess.interpolation", "nearest", "preprocess.interpolation"),
        ("preprocess.resize_size", 60.5, "preprocess.resize_size takes a whole number, got 60.5"),
        ("preprocess.crop_size", "48", 'preprocess.crop_size takes a whole number, got "48"'),
        ("preprocess.crop_size", 2**20, "must satisfy 16 <= crop_size <= resize_size"),
        ("preprocess.later", 1, "unknown key 'preprocess.later'"),
        ("preprocess", None, "preprocess"),
        ("preprocess", GONE, "preprocess is missing"),
        ("recipe", GONE, "recipe is missing"),
        ("recipe", [], "recipe takes an object"),
        ("recipe.network", "x", "recipe.network takes an object"),
        ("recipe.network.name", 7, "recipe.network.name takes a text, got 7"),
        ("data", "x", "data takes an object"),
        ("backbone_inside", 5, "backbone_inside takes an object, got 5"),
        ("backbone", {"name": 5}, "backbone.name takes a text, got 5"),
        ("recipe.run", [], "recipe.run takes an object, got []"),
        ("metrics", [], "metrics takes an object, got []"),
        ("calibrated_metrics", 5, "calibrated_metrics takes an object, got 5"),
        ("data.sources", "x", "data.sources takes a list"),
        ("data.titles", {"a": 1}, "data.titles.a takes a text"),
        ("refused", -1, "refused takes a list, got -1"),
        ("step", "seven", "step takes a whole number"),
        ("created", GONE, "created is missing"),
        ("selection", "best", 'selection takes a number, got "best"'),
        ("first_weights", "x", "first_weights takes an object"),
        ("first_weights", {"kind": "file", "name": "a"}, "first_weights.sha256 is missing"),
        ("first_weights", FIRST_WEIGHTS | {"sets": []}, "first_weights.sets takes an object"),
        ("first_weights", FIRST_WEIGHTS | {"first_weights": {"kind": 1}}, "weights.kind takes"),
    ],
)
def test_an_entry_of_a_wrong_type_is_named(
    key: str, value: object, said: str, folder: Path
) -> None:
    forged(folder, {key: value})
    with pytest.raises(DamagedError, match=r"meta.json cannot be used: ") as caught:
        checkpoint.load_network(folder)
    assert said in str(caught.value)


def test_whole_numbers_may_be_written_as_floats(folder: Path) -> None:
    _, before, _ = checkpoint.load_network(folder)
    forged(folder, {"preprocess.crop_size": float(before.crop_size)})
    _, preprocess, meta = checkpoint.load_network(folder)
    assert preprocess == before and isinstance(meta["preprocess"]["crop_size"], int)


def test_no_image_is_blamed_for_a_wrong_filter(folder: Path, tmp_path: Path) -> None:
    forged(folder, {"preprocess.interpolation": "nearest"})
    (tmp_path / "p.jpg").write_bytes(encode(photo(1)))
    line = [str(tmp_path / "p.jpg"), "--checkpoint", str(folder)]
    result = CliRunner().invoke(predict.main, line)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert "preprocess.interpolation" in result.stderr and "unreadable" not in result.output


@pytest.mark.parametrize("kept", [0, 5000])
def test_weights_that_were_damaged_before_they_were_sealed_are_one_error(
    kept: int, folder: Path
) -> None:
    file = folder / checkpoint.WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:kept] or bytes(100))
    forged(folder, {})
    with pytest.raises(DamagedError, match=r"weights.safetensors is no readable .safetensors file"):
        checkpoint.load_network(folder)


def test_only_files_of_the_checkpoint_are_compared_with_their_hashes(folder: Path) -> None:
    (folder.parent / "mine.txt").write_text("mine")
    meta = json.loads((folder / "meta.json").read_text())
    meta["sha256"]["../mine.txt"] = "ab" * 32
    checkpoint._write_meta(folder, meta)
    assert checkpoint.verify(folder)["step"] == 7
    (folder / checkpoint.WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint.verify(folder)
