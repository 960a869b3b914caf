"""`make setup` and the Python that it makes the environment with."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.builders import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def stand_in(path: Path, version: str) -> Path:
    """Make a Python that says that it is of this version, and only writes down how it makes an
    environment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    patched = f"import sys; sys.version_info = ({version}); exec(sys.argv[1])"
    path.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then exec {sys.executable} -c "{patched}" "$2"; fi\n'
        f'[ "$2" = venv ] && echo "$@" >> {path.parent}/made\n'
    )
    path.chmod(0o755)
    return path


def setup(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    command = ["make", "setup", *arguments]
    # Those of `make test` would make it a make within make, which prints its folder.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_an_old_python_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    old = stand_in(tmp_path / "old", "3, 10, 13")
    before = {*tmp_path.iterdir()}
    done = setup(tmp_path, f"PYTHON={old}")
    line = (
        f"Error: {old} is Python 3.10, expected 3.11 or newer; type: make setup PYTHON=python3.12"
    )
    assert done.stderr.splitlines()[0] == line and not done.stdout
    files = {tmp_path / name for name in ("Makefile", "pyproject.toml", "constraints.txt")}
    assert {*tmp_path.iterdir()} == before | files
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert needed == ">=3.11"


@pytest.mark.parametrize(
    ("there", "made"),
    [("3, 10, 13", "--clear .venv"), ("3, 12, 9", ".venv"), ("", "--clear .venv")],
    ids=["older", "same", "gone"],
)
def test_an_environment_of_another_python_is_made_anew(
    there: str, made: str, tmp_path: Path
) -> None:
    """`venv` without --clear keeps the links to that Python."""
    new = stand_in(tmp_path / "bin/new", "3, 12, 1")
    if there:
        stand_in(tmp_path / ".venv/bin/python", there)
    setup(tmp_path, f"PYTHON={new}")
    assert (tmp_path / "bin/made").read_text().strip() == f"-m venv {made}"


def test_without_a_name_the_python_of_the_environment_is_used(tmp_path: Path) -> None:
    """Else an older `python3` would be refused although the environment has a newer one."""
    own = stand_in(tmp_path / ".venv/bin/python", "3, 12, 1")
    setup(tmp_path)
    assert (own.parent / "made").read_text().strip() == "-m venv .venv"
