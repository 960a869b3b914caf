"""The installed command `ai-images-detector`, and commands named in messages of the wheel."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import ai_images_detector
import installed
from ai_images_detector import COMMANDS, main
from tests.builders import ROOT


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_installed_command_is_a_command_of_the_checkout(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert isinstance(command, click.Command)
    done = invoke(name, "--help")
    assert done.exit_code == 0
    assert f"ai-images-detector {name}" in done.output
    assert COMMANDS[name][-1] in " ".join(invoke("--help").output.split())


def test_version_prints_the_version_of_the_program() -> None:
    done = invoke("--version")
    assert done.exit_code == 0
    assert done.output == f"{installed.NAME}, version {installed.program_version()}\n"


def test_an_unknown_command_is_refused() -> None:
    assert "No such command 'predct'" in invoke("predct").output


def test_an_error_of_a_subcommand_is_one_line(tmp_path: Path) -> None:
    done = invoke("train", "--recipe", tmp_path / "none.toml")
    assert done.exit_code == 1
    assert done.output.startswith(f"Error: no recipe at {tmp_path / 'none.toml'}")


def test_the_app_command_passes_its_options_to_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr("streamlit.web.cli.main", started.append)
    for name in ("DETECTOR_RUNS", "DETECTOR_CHECKPOINT"):
        monkeypatch.setenv(name, "before")
    assert invoke("app").exit_code == 0
    assert os.environ["DETECTOR_RUNS"] == os.environ["DETECTOR_CHECKPOINT"] == "before"
    options = ["--runs", tmp_path, "--checkpoint", "clip", "--host", "0.0.0.0", "--port", 80]
    assert invoke("app", *options).exit_code == 0
    assert os.environ["DETECTOR_RUNS"] == str(tmp_path)
    assert os.environ["DETECTOR_CHECKPOINT"] == "clip"
    assert invoke("app", "--runs", tmp_path).exit_code == 0
    assert "DETECTOR_CHECKPOINT" not in os.environ  # the newest of these runs, as --help says
    script = str(Path(ai_images_detector.__file__).with_name("app_server.py"))
    assert started[1] == ["run", script, "--server.address=0.0.0.0", "--server.port=80"]
    assert "page: http://[::1]:8734 " in invoke("app", "--host", "::1", "--port", 8734).stdout


def test_the_app_command_refuses_a_file_as_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamlit.web.cli.main", lambda _arguments: pytest.fail("started"))
    (tmp_path / "mine.onnx").touch()
    done = invoke("app", "--checkpoint", tmp_path / "mine.onnx")
    assert done.exit_code == 1 and "is neither a checkpoint nor a run" in done.output


def test_without_streamlit_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ai_images_detector, "find_spec", lambda _name: None)
    monkeypatch.setattr("streamlit.web.cli.main", lambda _arguments: None)
    done = invoke("app")
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert "streamlit is not installed; install the extra `app`" in done.output


def test_messages_name_the_commands_of_a_checkout_or_an_installation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert installed.command("train") == "python train.py"
    missing, broken = ModuleNotFoundError("no"), ImportError("libcudart.so.12:\nno such file")
    assert installed.why_not_imported(missing, "app") == installed.install_extra("app")
    assert installed.why_not_imported(broken, "app") == (
        "it is installed, but cannot be imported: libcudart.so.12: no such file"
    )
    monkeypatch.setattr(installed, "CHECKOUT", False)
    assert installed.command("train") == "ai-images-detector train"


def test_another_folder_than_the_checkout_gets_the_path_of_the_script(tmp_path: Path) -> None:
    """As in an editable installation; `make demo` has no rule there. The folder may be gone."""
    code = "import os, sys, installed\nprint(installed.command('train'), installed.DEMO)"
    gone = "import os; os.rmdir(os.getcwd())\n"
    for program in (code, gone + code):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        script = shlex.quote(str(ROOT / "train.py"))
        assert done.stdout == f"python {script} python -m sharding demo demo\n"


@pytest.mark.parametrize("checkout", [True, False])
@pytest.mark.parametrize("with_pip", [True, False])
def test_an_extra_is_installed_into_the_environment_that_runs(
    checkout: bool, with_pip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It named `make setup` in environments that it does not fill. uv makes none with pip."""
    monkeypatch.setattr(installed, "CHECKOUT", checkout)
    monkeypatch.setattr(installed, "find_spec", lambda _name: with_pip or None)
    monkeypatch.setattr(sys, "executable", "/my env/bin/python")
    said = installed.install_extra("app").removeprefix("install the extra `app`: ")
    *line, what = shlex.split(said)
    python = "/my env/bin/python"
    editable = ["-e"] if checkout else []
    assert what == (f"{ROOT}[app]" if checkout else "ai-images-detector[app]")
    if with_pip:
        assert line == [python, "-m", "pip", "install", *editable]
    else:
        assert line == ["uv", "pip", "install", "--python", python, *editable]


def texts_in(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each text of a program that a user can read: all but docstrings of
    which no `--help` is made.
    """
    nodes = [*ast.walk(ast.parse(source))]
    helps = {
        node.body[0]
        for node in nodes
        if isinstance(node, ast.FunctionDef) and re.search("command|group", decorators_of(node))
    }
    silent = {node.value for node in nodes if isinstance(node, ast.Expr) and node not in helps}
    texts = (node for node in nodes if isinstance(node, ast.Constant) and node not in silent)
    return ((node.lineno, node.value) for node in texts if isinstance(node.value, str))


def decorators_of(function: ast.FunctionDef) -> str:
    return " ".join(map(ast.unparse, function.decorator_list))


def test_no_text_names_a_script_that_an_installation_lacks() -> None:
    """`installed.command()` knows how to start it, in a checkout and in an installation."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wheel = tomllib.loads(text)["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    files = [path for name in wheel for path in (ROOT / name, *(ROOT / name).rglob("*.py"))]
    product = [path for path in files if path.suffix == ".py"]
    assert {ROOT / "train.py", ROOT / "model/export/hub.py"} <= {*product}
    script = re.compile(r"\b(train|predict|evaluate)\.py")
    assert not [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in product
        if script.search(source := path.read_text(encoding="utf-8"))  # parsing takes longer
        for line, text in texts_in(source)
        if script.search(text)
    ]


def test_the_help_of_a_command_is_a_text_but_other_docstrings_are_none() -> None:
    source = """
"a.py"
@main.command("b")
def b():
    "help of b"
    return f"c {x}"
D = 1
"about D"
"""
    assert {text for _, text in texts_in(source)} == {"b", "help of b", "c "}


def new_repository(folder: Path) -> str:
    """Make a Git repository with one empty commit, and return the name of the commit."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    folder.mkdir()
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", folder.name]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    return subprocess.check_output(
        [*git, "rev-parse", "--short=12", "HEAD"], cwd=folder, text=True
    ).strip()


def test_only_the_commit_of_the_program_itself_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of a repository around a copy, nor of the one that a hook of Git works on."""
    around = new_repository(tmp_path / "around")
    own = new_repository(tmp_path / "own")
    (tmp_path / "around" / "copy").mkdir()
    monkeypatch.setattr(installed, "__file__", str(tmp_path / "around/copy/installed.py"))
    assert installed.git_commit.__wrapped__() == ""
    monkeypatch.setattr(installed, "__file__", str(tmp_path / "own/installed.py"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "around/.git"))
    assert installed.git_commit.__wrapped__() == own != around


ON_WINDOWS = """
import asyncio, multiprocessing.util, runpy, sys
import click, rich.progress, upath  # what is not of this program works there
sys.platform = "win32"
sys.modules |= {"fcntl": None, "resource": None, "torch": None}
for name in sys.argv[1:]:
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        print(name, ended.code)
"""


def test_on_windows_every_command_says_in_one_line_that_it_does_not_run_there() -> None:
    """Simulated, with the modules that only POSIX systems have taken away."""
    scripts = ["ai_images_detector", "predict", "train", "evaluate"]
    names = [*scripts, "model", "model.inference.detector", "pipeline", "serve", "sharding"]
    done = subprocess.run(
        [sys.executable, "-c", ON_WINDOWS, *names], cwd=ROOT, capture_output=True, text=True
    )
    said = done.stdout.splitlines()
    assert len(said) == len(names), done.stderr
    for name, line in zip(names, said, strict=True):
        assert line.startswith(f"{name} Error: this program does not run on Windows itself")


def test_modules_next_to_the_command_are_imported(tmp_path: Path) -> None:
    (tmp_path / "console.py").write_text("raise SystemExit('the wrong module')")
    code = "import sys; sys.path.append(sys.argv[1]); import ai_images_detector"
    subprocess.run([sys.executable, "-c", code, ROOT], cwd=tmp_path, check=True)
