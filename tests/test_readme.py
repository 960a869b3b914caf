"""Commands in the README and docs exist and parse, links resolve, and versions match the code."""

import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path

import click
import pytest

import ai_images_detector
import evaluate
import predict
import train
from model.__main__ import main as model
from pipeline.__main__ import main as pipeline
from serve.__main__ import main as serve
from sharding.__main__ import main as sharding
from sharding.format import FORMAT_VERSION
from tests.builders import ROOT

# The log keeps old commands that no longer exist.
PAGES = [
    ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name != "log.md"),
]  # fmt: skip
COMMANDS = {
    "train.py": train.main, "evaluate.py": evaluate.main, "predict.py": predict.main,
    "-m sharding": sharding, "-m pipeline": pipeline, "-m model": model, "-m serve": serve,
}  # fmt: skip


def typed(prefix: str) -> list[str]:
    """Return the lines in code blocks of the pages that begin with `prefix`."""
    blocks = [b for page in PAGES for b in re.findall(r"```\w*\n(.*?)```", page.read_text(), re.S)]
    indented = [re.findall(r"^    (\S.*)$", page.read_text(), re.M) for page in PAGES]
    lines = [
        line for block in [*blocks, *("\n".join(i) for i in indented)] for line in block.split("\n")
    ]
    return sorted(
        {line.split(" #")[0].strip() for line in lines if line.strip().startswith(prefix)}
    )


@pytest.mark.parametrize("line", typed("make "))
def test_make_targets_exist(line: str) -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    for target in shlex.split(line)[1:]:
        assert "=" in target or target in targets, line


@pytest.mark.parametrize("line", typed("python "))
def test_python_commands_parse(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = next((name for name in COMMANDS if line.startswith(f"python {name}")), None)
    if benchmark := re.match(r"python (-m (benchmarks\.\w+))", line):
        name = benchmark[1]
    if name is None:
        assert (ROOT / shlex.split(line)[1]).exists(), line
        return
    arguments = shlex.split(line.removeprefix(f"python {name}"))
    for argument in arguments:  # create the files that the command needs
        if re.search(r"[/.]", argument) and not argument.startswith("-") and "=" not in argument:
            path = tmp_path / argument
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("") if path.suffix else path.mkdir(exist_ok=True)
    command: click.Command = COMMANDS.get(name) or import_module(benchmark[2]).main
    if isinstance(command, click.Group) and arguments and arguments[0] in command.commands:
        command = command.commands[arguments.pop(0)]
    command.make_context(name, arguments)


@pytest.mark.parametrize("line", typed("detector/bin/ai-images-detector "))
def test_installed_commands_parse(line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    command = ai_images_detector.main.get_command(click.Context(ai_images_detector.main), name)
    command.make_context(name, arguments)


def test_the_four_commands_are_shown() -> None:
    text = PAGES[0].read_text()
    for command in (
        "make demo", "make test", "python -m sharding build", "python train.py --phase 2",
        "python evaluate.py --shards evalgen", "python predict.py dir/",
    ):  # fmt: skip
        assert command in text


def test_linked_pages_exist() -> None:
    for page in [*PAGES, ROOT / "docs/log.md"]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def versions_stated(text: str) -> list[str]:
    """Return every version number in a page, in order."""
    return re.findall(r"\b(?:[Vv]ersions?|Python) (\d[\d.]*\d|\d)", text)


def test_the_versions_in_the_documents_are_those_of_the_code(data: Path) -> None:
    """A page with another version number fails until the number is added to this test."""
    index = next((data / "old").glob("*.idx")).read_text(encoding="utf-8")
    python = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    expected = {
        "README.md": [python["requires-python"].removeprefix(">=")],
        "shards.md": [str(FORMAT_VERSION), index.split()[0].removeprefix("v")],
    }
    for page in PAGES:
        stated = versions_stated(page.read_text(encoding="utf-8"))
        assert stated == expected.get(page.name, []), page.name


def test_version_numbers_are_found_in_text() -> None:
    assert versions_stated("Version 5. A report has version 12, Python 3.11 or newer") == [
        "5", "12", "3.11",
    ]  # fmt: skip
    assert versions_stated("`format_version`, and the versions of two libraries") == []
