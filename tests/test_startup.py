"""`--help` and wrong command lines are answered before torch or other slow libraries are loaded."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parent.parent  # tests.builders loads torch

HEAVY = (
    "torch", "torchvision", "timm", "pyarrow", "nvidia", "transformers", "matplotlib", "onnx",
    "onnxruntime", "streamlit", "pandas", "sklearn", "scipy",
    "diffusers",
)  # fmt: skip
"""Libraries that take from a large part of a second to several seconds to load."""


def commands() -> dict[str, click.Command]:
    """Return every command by the name that a person types."""
    import ai_images_detector
    import evaluate
    import predict
    import train
    from model.__main__ import main as model
    from pipeline.__main__ import main as pipeline
    from serve.__main__ import main as serve
    from sharding.__main__ import main as sharding

    tops = {
        "train.py": train.main, "evaluate.py": evaluate.main, "predict.py": predict.main,
        "-m sharding": sharding, "-m pipeline": pipeline, "-m model": model, "-m serve": serve,
        "ai-images-detector": ai_images_detector.main,
    }  # fmt: skip
    below = {
        f"{name} {child}": command
        for name, group in tops.items()
        for child, command in getattr(group, "commands", {}).items()
    }
    nested = {
        f"{name} {child}": command
        for name, group in below.items()
        for child, command in getattr(group, "commands", {}).items()
    }
    return tops | below | nested


def lines_of(command: click.Command) -> Iterator[list[str]]:
    """Yield `--help`, and a command line for each kind of error that click detects."""
    yield ["--help"]
    yield ["--no-such-option"]
    if isinstance(command, click.Group):
        yield ["no-such-command"]
        return
    for parameter in command.params:
        kind = parameter.type
        refused = isinstance(kind, click.Choice | click.IntRange | click.FloatRange) or getattr(
            kind, "exists", False
        )
        if refused and isinstance(parameter, click.Option):
            yield [parameter.opts[0], "nowhere"]
        if refused and isinstance(parameter, click.Argument):
            yield ["nowhere"]


EXTRA = {
    "train.py": [
        [], ["--phase", "1", "--set", "optim.rate=1"], ["--phase", "1", "--set", "optim.lr=-1"],
        ["--phase", "1", "--set", "run"], ["--recipe", "nowhere.toml"], ["--phase", "3"],
        ["--phase", "1", "--run", "../elsewhere"],
        ["--phase", "1", "--no-pretrained", "--init-from", "recipes"],
        ["--folder", "docs", "--no-pretrained"], ["--phase", "2", "--no-pretrained"],
    ],
    "evaluate.py": [
        [], ["--shards", "val", "--device", "gpu"], ["--scores", "README.md", "--shards", "val"],
        ["--robustness", "0"], ["--shards"], ["--regressions", "nowhere"], ["--images", "docs"],
        ["--regressions", "docs", "--shards", "val"],
    ],
    "predict.py": [
        [], ["nowhere.jpg"], ["README.md", "--watch", "docs"], ["README.md", "--resume"],
        ["README.md", "--device", "tpu"], ["README.md", "--onnx", "x.onnx", "--heatmap", "x"],
        ["nowhere.jpg", "--report-mistake", "real"], ["README.md", "--keep-image"],
        ["README.md", "--report-mistake", "real", "--out", "x.csv"],
    ],
    "-m serve": [["--device", "gpu"], ["--port", "65536"]],
    "-m model export": [[], ["--hub", "x", "--hub-place", "nowhere"]],
    "-m model embed": [
        ["--recipe", "recipes/clip.toml", "--set", "a.b=1"], ["--recipe", "nowhere.toml"],
    ],
    "-m model average": [["recipes", "recipes", "--run", "../x"]],
    "-m sharding describe": [["docs", "--out", "README.md"]],
    "ai-images-detector": [
        ["train"], ["predict", "nowhere.jpg"], ["evaluate"], ["build", "--jobs", "0"],
        ["serve", "--port", "-1"], ["app", "--port", "0"], ["fetch", "--no-such-option"],
    ],
}  # fmt: skip
"""Errors that click alone cannot detect: combinations of options, recipes, paths."""


def walk() -> Iterator[tuple[str, list[str], int, list[str]]]:
    """Invoke each line; yields command, line, exit code and the slow libraries that it loaded."""
    from click.testing import CliRunner

    for name, command in commands().items():
        for line in [*lines_of(command), *EXTRA.get(name, [])]:
            code = CliRunner().invoke(command, line).exit_code
            yield name, line, code, [module for module in HEAVY if module in sys.modules]


@pytest.fixture(scope="module")
def outcomes() -> list[tuple[str, list[str], int, list[str]]]:
    """Outcomes of all lines, run in another process because this one has loaded torch."""
    code = "import json; from tests.test_startup import walk; print(json.dumps([*walk()]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_help_and_refusals_load_nothing_heavy(outcomes: list) -> None:
    assert len({name for name, *_ in outcomes}) == len(commands())
    for name, line, code, loaded in outcomes:
        assert not loaded, f"{name} {' '.join(line)} loads {', '.join(loaded)}"
        assert (code == 0) == (line == ["--help"]), f"{name} {' '.join(line)} exits with {code}"


def test_the_process_that_distributes_tests_loads_nothing_heavy() -> None:
    """Its workers start after it has loaded `tests/conftest.py`."""
    code = f"import sys, tests.conftest; print([n for n in {HEAVY} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
