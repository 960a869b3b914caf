"""Checkpoints that tests look at."""

from pathlib import Path

from model.checkpoint import checkpoints_of


def last_of(run: Path) -> Path | None:
    """Return the checkpoint of a run with the most steps, or None."""
    return next(reversed(checkpoints_of(run)), None)
