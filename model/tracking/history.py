"""Write the history of a training run (loss, rates, validation metrics) to `metrics.jsonl`,
TensorBoard and a tracker, and read it.

Main entry: `History(folder, done, tracker, validated=True)`, a context manager.

- `folder`: the `Path` of the run's folder (made if missing). It gets `metrics.jsonl` and the folder
  `tensorboard`, and after an interruption `removed.jsonl`.
- `done`: the number of finished steps, 0 for a new run. Rows of later steps, left by an interrupted
  run, are removed from `metrics.jsonl` first; step and kind of each go to `removed.jsonl`.
- `validated`: False if the validation of step `done` is still to be done. Its rows are then removed
  as those of later steps are: the run may have ended between writing them and saving.
- `tracker`: an open `Tracker` of `model/tracking/tracker.py` (sender to a service such as MLflow),
  or None (the default).

Its `write(step, kind, row)` appends a row to `metrics.jsonl` and sends its numbers to TensorBoard
and the tracker. After an interruption, the tracker does not get again what it already has. `step`
is the step's number, `kind` a text such as "train" or "validate/SET", and `row` a dict, name ->
number or None. `sync()` flushes the rows to the disk. On several ranks, only rank 0 makes a
`History`.

`rows_of(folder)` yields the rows of `metrics.jsonl`, dicts that also have `step` and `kind`. It
raises `FileNotFoundError` if there is no file. `rows_of()` and `History` raise
`ValueError` if the file does not begin with a row with `step` and `kind`, or if rows follow a
damaged line. `History` raises it, too, if `removed.jsonl` is damaged in the same way. An incomplete
end, left by a kill, is ignored. `scalars_of(kind, row)` returns a dict, `kind/name` -> value, as
TensorBoard and the tracker get it; values that are None are left out.
"""

import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from model.lean_import import without
from model.tracking.tracker import Tracker
from storage import MAX_FILE_BYTES, open_plain, parse_json, write_atomically, write_text

with without("boto3"):  # not needed for local folders
    from torch.utils.tensorboard import SummaryWriter

HISTORY_FILE = "metrics.jsonl"

REMOVED_FILE = "removed.jsonl"
"""File in the folder of a run with step and kind of the rows that were sent to the tracker and are
no longer in `HISTORY_FILE`. Without this file, a run that is interrupted twice would send them
again.
"""


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows that a run in `folder` has written, each with `step` and `kind`. An incomplete
    end, left by a kill or a power cut, is ignored. A long run has more rows than fit into memory.

    Raises:
        ValueError: the file does not start with such a row, or rows follow a damaged line.
    """
    return (row for _line, row in _rows_in(folder / HISTORY_FILE))


def _rows_in(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each row of a file, with its line before it."""
    damaged = b""
    count = 0  # lines before the damaged one
    with open_plain(path) as opened, io.BufferedReader(opened) as stream:
        for line in iter(lambda: stream.readline(MAX_FILE_BYTES), b""):
            row = _row_in(line)
            if row and damaged:
                raise ValueError(
                    f"{path}, line {count + 1}: {damaged[:40]!r} is no row, and rows follow it; "
                    "restore the file from a copy, or move it away"
                )
            if row:
                count += 1
                yield line, row
            damaged = damaged or (b"" if row else line)
    if not count and damaged.endswith(b"\n") and damaged.strip(b"\0\n"):
        raise ValueError(
            f"{path} is no history of a run (it begins with {damaged[:40]!r}); move it away, or "
            "use --run NAME for another folder"
        )


def _row_in(line: bytes) -> dict[str, Any] | None:
    """Return the row in a complete line of the file, or None if there is none."""
    try:
        row = parse_json(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    return row if type(row.get("step")) is int and isinstance(row.get("kind"), str) else None


def scalars_of(kind: str, row: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalars of a row for TensorBoard and a tracker: `kind/name` -> value."""
    return {f"{kind}/{name}": value for name, value in row.items() if value is not None}


class History:
    """Writer of a run's history in `folder`, from step `done` on; a context manager. An open
    `tracker` receives the same scalars as TensorBoard.

    After an interruption, rows later than the last checkpoint are dropped, because resuming repeats
    their steps. The tracker keeps such rows, so they are not sent to it again, also after further
    interruptions.
    """

    def __init__(
        self, folder: Path, done: int, tracker: Tracker | None = None, *, validated: bool = True
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.tracker = folder / HISTORY_FILE, tracker
        self.done, self.validated = done, validated
        self.sent: set[tuple[int, str]] = set()
        if self.path.exists():
            self._drop_later(folder / REMOVED_FILE)
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def _is_done(self, row: Mapping[str, Any]) -> bool:
        """Return whether the run goes on after this row, and does not write it again."""
        is_left = row["kind"].startswith("validate") and not self.validated
        return row["step"] < self.done or (row["step"] == self.done and not is_left)

    def _drop_later(self, removed: Path) -> None:
        size = 0  # bytes of the rows that stay
        for line, row in _rows_in(self.path):
            if self._is_done(row):
                size += len(line)
            else:
                self.sent.add((row["step"], row["kind"]))
        if removed.exists():
            rows = (row for _line, row in _rows_in(removed) if not self._is_done(row))
            self.sent |= {(row["step"], row["kind"]) for row in rows}
        if self.sent:  # before removing the rows: a kill between loses nothing
            keys = ({"step": step, "kind": kind} for step, kind in sorted(self.sent))
            write_text(removed, "".join(f"{json.dumps(key)}\n" for key in keys))
        if size < self.path.stat().st_size:
            write_atomically(self.path, self._copy_done)

    def _copy_done(self, partial: Path) -> None:
        with partial.open("wb") as stream:
            stream.writelines(line for line, row in _rows_in(self.path) if self._is_done(row))

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *_error: object) -> None:
        self.writer.close()

    def write(self, step: int, kind: str, row: Mapping[str, Any]) -> None:
        """Append one row."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, "kind": kind, **row}) + "\n")
        scalars = scalars_of(kind, row)
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        if self.tracker and (step, kind) not in self.sent:
            self.tracker.log(step, scalars)

    def sync(self) -> None:
        """Flush the rows to the disk, before a checkpoint of the same step is written."""
        with self.path.open("a", encoding="utf-8") as stream:
            os.fsync(stream.fileno())
