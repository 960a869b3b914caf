"""What a run writes down while it goes: `metrics.jsonl` and TensorBoard, one row at a time."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

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


class History:
    """The history of a run in `folder`, from step `done` on; a context manager.

    Rows that an interrupted run wrote after its last checkpoint are dropped: they come again.
    """

    def __init__(self, folder: Path, done: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / HISTORY_FILE
        if self.path.exists():
            kept = [f"{json.dumps(row)}\n" for row in rows_of(folder) if row["step"] <= done]
            write_text(self.path, "".join(kept))
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *_error: object) -> None:
        self.writer.close()

    def write(self, step: int, kind: str, row: Mapping[str, Any]) -> None:
        """One row; TensorBoard shows it as `kind/name`."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, "kind": kind, **row}) + "\n")
        for name, value in row.items():
            if value is not None:
                self.writer.add_scalar(f"{kind}/{name}", value, step)

    def sync(self) -> None:
        """Have the disk keep the rows so far, before a checkpoint says that they were written."""
        with self.path.open("a", encoding="utf-8") as stream:
            os.fsync(stream.fileno())
