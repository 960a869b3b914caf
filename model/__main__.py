"""`python -m model import | fetch | curves`: parses, calls, prints."""

from pathlib import Path

import click

import console
from model import curves, original


@click.group(cls=console.Group)
def main() -> None:
    """Bring a trained model in, and look at how one was trained."""


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


@main.command("curves")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("curves.png"),
    show_default=True,
    help="PNG to write.",
)
@console.options()
def curves_command(run: Path, out: Path) -> None:
    """Draw loss, learning rate and validation of RUN, a folder such as runs/phase1."""
    step = curves.draw(run, out)
    console.say(f"{run} until step {step}: {out}")


def _say(folder: Path) -> None:
    console.say(f"checkpoint: {folder}")
    console.say("its score is not calibrated, and outside users report many false alarms on photos")
    console.say(f"try it: python predict.py DIR --checkpoint {folder}")


if __name__ == "__main__":
    main()
