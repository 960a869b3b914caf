"""Option types of `console`: which paths, addresses and numbers they accept and refuse."""

import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from upath import UPath

import cli
import evaluate
import predict
import train
from model.__main__ import main as model
from pipeline.__main__ import main as pipeline
from sharding.__main__ import main as sharding

COMMANDS = [
    train.main, predict.main, evaluate.main, *evaluate.main.commands.values(),
    *sharding.commands.values(), *pipeline.commands.values(), *model.commands.values(),
]  # fmt: skip
PARAMETERS = [
    pytest.param(command, parameter, id=f"{command.name} {parameter.name}")
    for command in COMMANDS
    for parameter in command.params
]
PATH_WORDS = {"data", "runs", "raw", "out", "folder", "folders", "checkpoint", "heatmap", "watch"}


def said_of(kind: click.ParamType, value: object) -> str:
    """Return the error message of a type for a refused value."""
    with pytest.raises(click.BadParameter) as caught:
        kind.convert(value, None, None)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(("command", "parameter"), PARAMETERS)
def test_every_path_is_local_or_any_address(
    command: object, parameter: click.Parameter, tmp_path: Path
) -> None:
    kind = parameter.type
    assert not isinstance(kind, click.Path) or isinstance(kind, cli.LocalPath)
    assert not isinstance(kind, click.types.FloatParamType) or isinstance(kind, cli.FiniteRange)
    if parameter.name in PATH_WORDS:
        assert isinstance(kind, cli.LocalPath | cli.AnyAddress)
    if (
        parameter.name in {"out", "flips", "sample_file"}
        and getattr(kind, "dir_okay", True) is False
    ):
        link, target = tmp_path / "link", tmp_path / "target"
        link.symlink_to("target")  # the file of a large or shared disk is replaced, not the link
        assert kind.convert(str(link), None, None) == target
        table = tmp_path / "table.csv"
        table.symlink_to("target")
        with pytest.raises(click.BadParameter, match=r"a link to .*target, of another suffix"):
            kind.convert(str(table), None, None)
    if isinstance(kind, cli.LocalPath):
        assert "is an address" in said_of(kind, "s3://bucket/x")
        assert "empty path" in said_of(kind, "")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (train.main, ["--phase", "1", "--runs", "s3://bucket/runs"]),
        (train.main, ["--phase", "1", "--runs", "s3:/bucket/runs"]),
        (sharding, ["fetch", "--raw", "hf://datasets/x"]),
        (sharding, ["audit", "data/shards", "--out", "s3://bucket/audit"]),
        (predict.main, ["x.jpg", "--heatmap", "gs://bucket/heatmaps"]),
    ],
)
def test_an_address_for_a_local_path_is_refused_and_nothing_is_created(
    command: click.Command, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2
    assert f"{arguments[-1]} is an address" in result.output
    assert not list(tmp_path.iterdir())


def test_addresses_and_folders_become_paths(tmp_path: Path) -> None:
    kind = cli.AnyAddress()
    assert kind.convert(str(tmp_path), None, None) == tmp_path
    assert kind.convert("memory://bucket/x", None, None) == UPath("memory://bucket/x")
    assert cli.LocalPath().convert(f"{tmp_path}/a:b", None, None) == tmp_path / "a:b"
    assert "names no bucket" in said_of(kind, "s3://")
    assert "names no bucket" in said_of(kind, "http://")
    assert "empty path" in said_of(kind, " ")
    assert "is not a folder" in said_of(kind, __file__)


def test_an_http_address_is_refused_for_writing() -> None:
    kind = cli.AnyAddress(writes=True)
    assert "can only be read" in said_of(kind, "http://here.org/shards")
    result = CliRunner().invoke(sharding, ["build", "--out", "http://here.org"])
    assert result.exit_code == 2
    assert "can only be read" in result.output


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "pipe or a device" in said_of(cli.LocalPath(), str(tmp_path / "pipe"))
    assert "pipe or a device" in said_of(cli.LocalPath(), "/dev/null")
    result = CliRunner().invoke(sharding, ["build", "--catalog", str(tmp_path / "pipe")])
    assert result.exit_code == 2
    assert "pipe or a device" in result.output


@pytest.mark.parametrize("value", ["nan", "NaN", "-nan"])
def test_numbers_must_be_finite(value: str) -> None:
    assert "not a finite number" in said_of(cli.FiniteRange(0, 1), value)
    result = CliRunner().invoke(sharding, ["build", "--max-bad", value])
    assert result.exit_code == 2
