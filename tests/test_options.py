"""Every option of every command with useless or accidental values: the result is one line with the
reason and the documented exit code, never a traceback.
"""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import evaluate
import predict
import train
from ai_images_detector import app
from model.__main__ import main as model
from pipeline.__main__ import main as pipeline
from serve.__main__ import main as serve
from sharding.__main__ import main as sharding
from tests.builders import encode, photo

pytestmark = pytest.mark.filterwarnings("ignore")

COMMANDS: dict[str, click.Command] = {
    "train": train.main,
    "predict": predict.main,
    "serve": serve,
    "evaluate": evaluate.main,
    **{f"evaluate {name}": one for name, one in evaluate.main.commands.items()},
    **{f"sharding {name}": one for name, one in sharding.commands.items()},
    **{f"pipeline {name}": one for name, one in pipeline.commands.items()},
    **{f"model {name}": one for name, one in model.commands.items()},
}

TEXTS = {
    "empty": "",
    "blank": " ",
    "NaN": "nan",
    "infinity": "inf",
    "huge": "9" * 30,
    "many": "100000000",
    "negative": "-1",
    "fraction": "0.5",
    "setting": "network.options.depths=[0]",
    "rate": "optim.lr=nan",
    "escape": "\x1b[2J[/x]",
    "zero byte": "a\0b",
    "not UTF-8": os.fsdecode(b"caf\xe9"),
    "nothing there": "no/such/thing",
    "very long": "x" * 5000,
    "below a file": "text.txt/x",
    "bare s3": "s3://",
    "bare http": "http://",
    "bucket": "s3://no-such-bucket/x",
    "web": "http://127.0.0.1:9/x",
    "odd scheme": "nosuch://x/y",
}
FILES = ("fifo", "folder", "text.txt", "empty.txt", "unreadable.txt", "closed", "device")
"""Names in the folder in which the commands run; `closed` is a folder without permissions."""

CODES = {"predict": {0, 1, 2}}
"""Allowed exit codes. Other commands: 0, 1 for a later error, 2 for a wrong command line."""


@pytest.fixture
def base(
    raw: Path,
    data: Path,
    small_runs: Path,
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, list[str]]:
    """Return a working (or soon ending) command line per command; make `FILES` in the folder."""
    (tmp_path / "photo.jpg").write_bytes(encode(photo(1)))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/full")
    for name in ("text.txt", "unreadable.txt"):
        (tmp_path / name).write_text("remember the milk\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "unreadable.txt").chmod(0)
    monkeypatch.chdir(tmp_path)
    checkpoint = str(small_runs / "small" / "step_0000001")
    runs, sets, val = ["--runs", str(small_runs)], ["--data", str(data)], str(data / "val")
    catalog = ["--catalog", str(raw / "catalog.toml")]
    return {
        "train": ["--recipe", str(tiny_recipe), *sets, "--runs", "trained"],
        "predict": ["photo.jpg", *runs],
        "serve": ["--checkpoint", "folder", "--port", "0", *runs],  # invalid, so it ends
        "evaluate": ["--shards", "val", "--out", "report", *sets, *runs],
        "evaluate calibrate": ["--shards", "none", *sets, *runs],
        "evaluate compare": ["folder", "folder"],
        "sharding fetch": ["dummy", "--raw", "fetched", *catalog],
        "sharding build": ["--raw", str(raw), "--out", "built", "--jobs", "1", *catalog],
        "sharding show": [val],
        "sharding list": ["--raw", str(raw), "--out", str(data), *catalog],
        "sharding verify": [val, "--jobs", "1"],
        "sharding diff": [val, val],
        "sharding describe": [str(raw / "alpha"), "--out", "described.toml"],
        "sharding audit": [val, "--out", "audit"],
        "sharding pairs": [val, "--decoder", "vae", "--out", "pairs"],
        "sharding demo": ["demo"],
        "pipeline preview": [val, "--out", "grid.png"],
        "pipeline order": [val],
        "model import": ["text.txt", "--runs", "imported"],
        "model fetch": ["original", "--runs", "imported"],
        "model embed": ["--recipe", str(tiny_recipe), *sets, "--runs", "embedded"],
        "model curves": [str(small_runs / "small"), "--out", "curves.png"],
        "model average": [checkpoint, checkpoint, "--run", "mean", "--runs", "averaged"],
        "model export": ["--hub", "hub", *runs, *sets],
        "model push": ["folder", "owner/name"],
    }  # fmt: skip


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every address fail at once, and disable downloads and the slow demo."""
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1", "HF_HUB_OFFLINE": "1", "NO_PROXY": "*",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)

    def refuse(*_arguments: object, **_keywords: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr("model.export.import_original.fetch", refuse)
    monkeypatch.setattr("sharding.demo.render.make_demo", refuse)


def parameters() -> Iterator[tuple[str, click.Parameter]]:
    for name, command in COMMANDS.items():
        for parameter in command.params:
            if not getattr(parameter, "is_flag", False) or parameter.name == "robustness":
                yield name, parameter


def with_value(base: list[str], command: str, parameter: click.Parameter, value: str) -> list[str]:
    """Return the line of `base` with another value of one option or argument."""
    if isinstance(parameter, click.Option):
        kept, flag = list(base), parameter.opts[0]
        if flag in kept and not parameter.multiple:
            at = kept.index(flag)
            del kept[at : at + 2]
        return [*kept, f"{flag}={value}"]
    arguments = [p for p in COMMANDS[command].params if isinstance(p, click.Argument)]
    at = arguments.index(parameter)
    replaced = base[:at] + base[at + 1 :]
    options = replaced[len(arguments) - 1 :]
    words = replaced[: len(arguments) - 1]
    words.insert(at, value)
    return [*options, "--", *words]


def check(name: str, line: list[str]) -> Result:
    result = CliRunner().invoke(COMMANDS[name], line)
    if result.exc_info and not isinstance(result.exception, SystemExit | None):
        raise AssertionError(f"{name} {line}: {result.exception!r}") from result.exception
    assert result.exit_code in CODES.get(name, {0, 1, 2}), (name, line, result.output)
    assert "Traceback" not in result.output
    assert "\x1b" not in result.output and "[Errno" not in result.stderr, result.stderr
    assert "Aborted" not in result.stderr
    if result.exit_code:
        last = result.stderr.strip().splitlines() or [result.stdout.strip().splitlines()[-1]]
        assert len(last[-1]) > len("Error: "), (name, line, result.output)
    return result


CASES = [
    pytest.param(name, parameter, value, id=f"{name}-{parameter.name}-{what}")
    for name, parameter in parameters()
    for what, value in [*TEXTS.items(), *zip(FILES, FILES, strict=True)]
]


def is_refused(parameter: click.Parameter, value: str) -> bool:
    """Return whether the type of an option refuses a value, so that the command does not start."""
    try:
        parameter.type.convert(value, parameter, None)
    except click.BadParameter:
        return True
    return False


def test_a_value_refused_by_its_type_is_one_line_and_exit_code_2(
    base: dict[str, list[str]],
) -> None:
    """Quick part of the matrix: values that the option types refuse."""
    tried = set()
    for name, parameter in parameters():
        for value in ("", "nan", "-1", "s3://", "a\0b", "x" * 5000, "fifo", "device", "text.txt"):
            if is_refused(parameter, value):
                tried.add((name, parameter.name))
                result = check(name, with_value(base[name], name, parameter, value))
                assert result.exit_code == 2, (name, parameter.name, value)
    typed = {(n, p.name) for n, p in parameters() if p.type is not click.STRING}
    assert typed - tried <= {("sharding demo", "seed")}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("serve", ["--images", "--rounds"]), ("step", ["--rounds"]), ("embedding", ["--rounds"]),
        ("predict", ["--images", "--rounds"]), ("packing", ["--images", "--repeats"]),
        ("loader", ["--images", "--repeats", "--batch-size", "--epochs"]),
        ("evaluation", ["--scores"]),
        ("features", ["--images", "--width", "--batch-size"]), ("end_to_end", ["--batch-size"]),
        ("gpu_loader", ["--batches"]),
    ],
)  # fmt: skip
def test_a_benchmark_of_nothing_is_refused(name: str, options: list[str]) -> None:
    if name == "gpu_loader":
        pytest.importorskip("nvidia.dali")
    command = importlib.import_module(f"benchmarks.{name}").main
    for option in options:
        result = CliRunner().invoke(command, [f"{option}=0"])
        assert result.exit_code == 2, result.output
        assert f"Invalid value for '{option}': 0 is not in the range" in result.stderr


def test_the_help_of_checkpoint_names_the_default(tmp_path: Path) -> None:
    """Only `predict`, `serve` and `app` take the shipped detector where there is no run."""
    runs = ["--runs", str(tmp_path), "--data", str(tmp_path)]
    lines = {
        "evaluate": ["--shards", "val"], "evaluate calibrate": ["--shards", "val"],
        "model export": ["--hub", str(tmp_path / "hub")],
    }  # fmt: skip
    options = {
        name: option
        for name, command in [*COMMANDS.items(), ("app", app)]
        for option in command.params
        if isinstance(option, click.Option) and option.name == "checkpoint"
    }
    assert {*options} == {"predict", "serve", "app", *lines}
    for name, option in options.items():
        assert option.help
        default = "run" if name in lines else "run, else the shipped detector"
        assert option.help.endswith(f"Default: the newest {default}."), name
    for name, line in lines.items():
        assert "no checkpoint below" in check(name, [*line, *runs]).stderr
    (regressions,) = [one for one in evaluate.main.params if one.name == "regressions"]
    assert "by the shipped detector" in getattr(regressions, "help", "")


@pytest.mark.parametrize("device", ["mps", "meta", "cuda:99", "cuda:-1", "cuda:", "cpu:x", "gpu"])
def test_a_missing_device_is_one_line(base: dict[str, list[str]], device: str) -> None:
    for name in ("predict", "evaluate"):
        result = check(name, [*base[name], "--device", device])
        assert result.exit_code and "device" in result.stderr and device in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameter", "value"), CASES)
def test_the_whole_matrix(
    base: dict[str, list[str]], name: str, parameter: click.Parameter, value: str
) -> None:
    check(name, with_value(base[name], name, parameter, value))
