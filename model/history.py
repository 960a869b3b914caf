"""What a run writes down while it goes: `metrics.jsonl` and TensorBoard, one row at a time."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from pipeline.batch import Batch


class History:
    """The history of a run in `folder`, from step `done` on; a context manager.

    Rows that an interrupted run wrote after its last checkpoint are dropped: they come again.
    """

    def __init__(self, folder: Path, done: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= done]
            self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self.reset()

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *_error: object) -> None:
        self.board.close()

    def reset(self) -> None:
        """Start counting afresh."""
        self.images = self.replayed = self.unreadable = 0
        self.waited, self.since = 0.0, time.perf_counter()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, counted; notes how long the loop waited for each."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            self.images += len(batch)
            self.replayed += int(batch.replayed.sum())
            self.unreadable += len(batch.failures)
            yield batch

    def since_last(self) -> dict[str, float]:
        """Rates and shares since the last call, and start counting afresh."""
        passed = time.perf_counter() - self.since
        row = {
            "images_per_s": self.images / passed,
            "wait_share": self.waited / passed,
            "replay_share": self.replayed / max(1, self.images),
            "unreadable": self.unreadable,
        }
        self.reset()
        return row

    def write(self, step: int, kind: str, row: Mapping[str, Any]) -> None:
        """One row; TensorBoard shows it as `kind/name`."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, "kind": kind, **row}) + "\n")
        for name, value in row.items():
            if value is not None:
                self.board.add_scalar(f"{kind}/{name}", value, step)
