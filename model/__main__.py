"""`python -m model import | fetch | between`: parses, calls, prints."""

from pathlib import Path

import click

import console
from model import original
from model.between import between
from model.checkpoint import find


@click.group(cls=console.Group)
def main() -> None:
    """Bring a trained model in, or average two."""


NAME = click.option(
    "--run", "name", default="original", show_default=True, help="Name of the run that holds it."
)


@main.command("import")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@NAME
@console.options("runs")
def import_command(file: Path, name: str, runs: Path) -> None:
    """Turn FILE, a checkpoint_phase2.pth of the original project, into a checkpoint."""
    _say(original.import_file(file, runs / name))


@main.command("fetch")
@NAME
@console.options("runs")
def fetch_command(name: str, runs: Path) -> None:
    """Download the original project's published checkpoint (1 GB), check it, and import it."""
    _say(original.import_file(original.fetch(), runs / name))


@main.command("between")
@click.argument("first", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("last", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--share", default=0.5, show_default=True, help="How far from FIRST to LAST, 0 to 1.")
@click.option("--run", "name", required=True, help="Name of the run that holds it.")
@console.options("runs")
def between_command(first: Path, last: Path, share: float, name: str, runs: Path) -> None:
    """Average the weights of two checkpoints, or of the best ones of two runs: phase 1 and 2."""
    folder = between(find(runs, first), find(runs, last), share, runs / name)
    console.say(f"checkpoint: {folder}")
    console.say(f"measure and calibrate it: python evaluate.py --checkpoint {folder} --help")


def _say(folder: Path) -> None:
    console.say(f"checkpoint: {folder}")
    console.say("its score is not calibrated, and outside users report many false alarms on photos")
    console.say(f"try it: python predict.py DIR --checkpoint {folder}")


if __name__ == "__main__":
    main()
