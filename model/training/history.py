"""What a run writes down while it goes: `metrics.jsonl`, TensorBoard and a tracker, row by row."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from model.tracking.tracker import Tracker
from storage import write_text

HISTORY_FILE = "metrics.jsonl"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows that a run in `folder` wrote so far, each with `step` and `kind`. What a kill or a
    power cut left at the end, and is no row, is left out.

    Raises:
        ValueError: the file begins with something else.
    """
    path = folder / HISTORY_FILE
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if not (isinstance(row, dict) and row.keys() >= {"step", "kind"}):
            if not rows and line.endswith(b"\n") and line.strip(b"\0\n"):
                raise ValueError(
                    f"{path} is no history of a run (it begins with {line[:40]!r}); move it away, "
                    "or use --run NAME for another folder"
                )
            break
        rows.append(row)
    return rows


def scalars_of(kind: str, row: Mapping[str, Any]) -> dict[str, float]:
    """What TensorBoard and a tracker get of a row: `kind/name` -> value."""
    return {f"{kind}/{name}": value for name, value in row.items() if value is not None}


class History:
    """The history of a run in `folder`, from step `done` on; a context manager. A `tracker` that is
    open gets what TensorBoard gets.

    Rows that an interrupted run wrote after its last checkpoint are dropped: they come again. The
    tracker, which keeps them, does not get those a second time.
    """

    def __init__(self, folder: Path, done: int, tracker: Tracker | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.tracker = folder / HISTORY_FILE, tracker
        self.sent: set[tuple[int, str]] = set()
        if self.path.exists():
            rows = rows_of(folder)
            kept = [f"{json.dumps(row)}\n" for row in rows if row["step"] <= done]
            self.sent = {(row["step"], row["kind"]) for row in rows}
            write_text(self.path, "".join(kept))
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *_error: object) -> None:
        self.writer.close()

    def write(self, step: int, kind: str, row: Mapping[str, Any]) -> None:
        """One row."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, "kind": kind, **row}) + "\n")
        scalars = scalars_of(kind, row)
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        if self.tracker and (step, kind) not in self.sent:
            self.tracker.log(step, scalars)

    def sync(self) -> None:
        """Have the disk keep the rows so far, before a checkpoint says that they were written."""
        with self.path.open("a", encoding="utf-8") as stream:
            os.fsync(stream.fileno())
