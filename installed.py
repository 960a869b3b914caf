"""How the program is installed: what a message tells a person to type for a command, or for a
library that is missing.
"""

from pathlib import Path

NAME = "ai-images-detector"
"""Of the distribution and of its console command (`pyproject.toml`)."""

CHECKOUT = (Path(__file__).parent / "pyproject.toml").is_file()
"""Whether this is a checkout; otherwise the wheel is installed, which has no pyproject.toml."""

DEMO = "make demo" if CHECKOUT else "python -m sharding demo demo"
"""What makes the synthetic images to try everything with."""


def command(name: str) -> str:
    """What starts a command: `python train.py` in a checkout, else `ai-images-detector train`."""
    return f"python {name}.py" if CHECKOUT else f"{NAME} {name}"


def install_extra(extra: str) -> str:
    """What brings the libraries of an extra, as the last part of a message."""
    if CHECKOUT:
        return f"install the extra `{extra}`, as `make setup` does"
    return f'install the extra `{extra}`: pip install "{NAME}[{extra}]"'
