"""Name commands in messages so that they work where this program runs: in the folder of a checkout,
with a checkout elsewhere (an editable installation), and in an installed wheel.

Main entry: `command(name)` takes the name of a command, such as "train" (not checked), and returns
how to start it: `python train.py` in the folder of a checkout, `python /there/train.py` for a
checkout elsewhere, else `ai-images-detector train`.
`install_extra(extra)` takes the name of a group of optional libraries, such as "ray", and returns
the end of a message: how to install them. `why_not_imported(error, extra)` returns it only if one
is missing, else the `error` (an ImportError). `install_command(packages)` takes the arguments of
pip as one text and returns the whole command. `program_version()` returns the version,
`git_commit()` the commit. All return text. `versions()` returns those of the libraries that affect
results. `CHECKOUT` is True in a checkout, `IN_CHECKOUT` if it is also the working folder. `DEMO` is
the command that makes synthetic demo images.

On Windows, where locks and atomic writes of this program do not work, importing this module ends
the process with one line. All commands and `model` import it before they need what Windows lacks.
"""

import functools
import os
import platform
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

if sys.platform == "win32":
    raise SystemExit(
        "Error: this program does not run on Windows itself, only on Linux and macOS; run it in "
        "WSL (`wsl --install`) or in a Docker container"
    )

NAME = "ai-images-detector"
"""Name of the distribution and of its console command (`pyproject.toml`)."""

FOLDER = Path(__file__).resolve().parent
"""Folder of the program."""

CHECKOUT = (FOLDER / "pyproject.toml").is_file()
"""True in a checkout, false in an installed wheel, which has no pyproject.toml."""

try:
    IN_CHECKOUT = CHECKOUT and Path().samefile(FOLDER)
except OSError:  # this user may not enter the working folder
    IN_CHECKOUT = False
"""True if the working folder of this process, when it starts, is that of the checkout."""

DEMO = "make demo" if IN_CHECKOUT else "python -m sharding demo demo"
"""Command that makes the synthetic demo images."""


def command(name: str) -> str:
    """Return how to start a command: `python train.py` in the folder of the checkout, with the path
    of the file in another one, and `ai-images-detector train` without a checkout.
    """
    if not CHECKOUT:
        return f"{NAME} {name}"
    return f"python {name}.py" if IN_CHECKOUT else f"python {shlex.quote(f'{FOLDER}/{name}.py')}"


def program_version() -> str:
    """Return the version of the program: that of the checkout, else that of the wheel."""
    if CHECKOUT:
        text = (Path(__file__).parent / "pyproject.toml").read_text(encoding="utf-8")
        return str(tomllib.loads(text)["project"]["version"])
    return version(NAME)


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect the results."""
    names = ("torch", "timm", "pillow", "simplejpeg", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


@functools.cache
def git_commit() -> str:
    """Return the commit of this program, '-dirty' appended if files differ; '' if its folder is no
    Git repository.
    """
    here = Path(__file__).parent  # told to git, or it takes a repository around it
    git = ["git", "--git-dir", str(here / ".git"), "--work-tree", str(here)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here, env=environment, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def why_not_imported(error: ImportError, extra: str) -> str:
    """Return why a library of an extra cannot be used, as the last part of a message: the library,
    or one that it needs, is missing, or importing it fails.
    """
    if isinstance(error, ModuleNotFoundError):
        return install_extra(extra)
    return f"it is installed, but cannot be imported: {' '.join(str(error).split())[:300]}"


def install_extra(extra: str) -> str:
    """Return how to install the libraries of an extra into this environment, as the last part of a
    message.
    """
    what = f"-e {shlex.quote(f'{FOLDER}[{extra}]')}" if CHECKOUT else f'"{NAME}[{extra}]"'
    return f"install the extra `{extra}`: {install_command(what)}"


def install_command(packages: str) -> str:
    """Return the command that installs packages into this environment. One of uv has no pip."""
    python = shlex.quote(sys.executable)
    pip = f"{python} -m pip install" if find_spec("pip") else f"uv pip install --python {python}"
    return f"{pip} {packages}"
