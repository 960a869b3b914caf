"""Measure the speed of the loader, and report the stage of each worker when no batch arrives.

Main entries: `LoaderStats(sources, ranks)` takes the names of the sources, in the order of their
codes (`shards.codes("source")[1]` of a `ShardSet`), and the number of ranks of the run (default:
1). It sees the batches of its own rank; the ranks take steps together. Its `timed(batches)` takes
an iterable of `Batch`es and yields the same batches, counted and timed. Three methods return
figures since the last `row()`:

- `row()`: a dict, name -> number, as in `metrics.jsonl`. It sets all counts to 0. The names:
  - those of `rates()`;
  - `stall_p50_ms`, `stall_p99_ms`, `stall_max_ms`: median, 99th percentile, maximum of the waits;
  - `ready`: mean number of batches that were waiting when one was taken (near 0: loader too slow);
  - `read_ms`, `decode_ms`: mean times of reading and of decoding a batch;
  - `replay_share`: share of replayed images, 0 to 1; `unreadable`, `images/SOURCE`: image counts.
    These are of this rank alone.
- `rates()`: a dict with `images_per_s`, the speed of all ranks together, and the shares (0 to 1) of
  the time in which the consumer waited: for anything (`wait_share`), for bytes to be read
  (`wait_read`), for pixels to be decoded (`wait_decode`).
- `note()`: the same as a short text for a progress bar.

`WorkerStatus(workers, *, shared=False)` is a table of the workers' stages.

- `workers`: the names of the workers, a list of texts; a worker's number is its position.
- `shared`: True if the workers are processes, False (the default) for threads.

`status.at(worker, stage, step)` is a context manager, in which a worker does its work. It takes
`worker`, the worker's number; `stage`, "reading" or "decoding"; and `step`, the number of the
batch. At the end of the block the stage becomes "idle". The worker calls `finished(worker)` after a
batch. `made()` returns the number of finished batches of all workers, and `describe()` a text with
each worker's stage.

`Watchdog(describe, stall_warning_s)` is a context manager that logs a warning when a batch takes
too long. Inside `with Watchdog(status.describe) as watchdog:`, each wait for a batch is done inside
`with watchdog.waiting(step):`.

- `describe`: a function without arguments that returns the text about the workers.
- `stall_warning_s`: seconds of waiting after which the warning is logged (default 60).

`StallError` means that no batch came within a longer limit. This module does not raise it:
`ReadAhead` (`pipeline/read_ahead.py`) does, and the loader turns it into a `LoadError`.
`stalled(seconds, status)` returns its message. Here `status` is the text that `describe()`
returned.
"""

import contextlib
import logging
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.batch import Batch
from pipeline.loading import STALL_WARNING_S

log = logging.getLogger("ai_images_detector.rank")  # `rank_log` of console.py

STAGES = ("idle", "reading", "decoding")


WAITS = 4
"""Parts into which a wait for a batch is divided. While this process is stopped (by Ctrl-Z, `docker
pause` or a batch system), the clock runs on: only one part of the wait then times out, not the
whole wait.
"""


class StallError(ValueError):
    """No batch came in time; the message gives each worker's stage."""


def stalled(seconds: float, status: str) -> str:
    """Return the message of a `StallError` after `seconds` without a batch. `status` is the text of
    `WorkerStatus.describe`.
    """
    return (
        f"no batch for {seconds:g} s (loading.stall_error_s): {status}; check that the disk or "
        "address with the shards responds, then run the same command again"
    )


class WorkerStatus:
    """Status of each worker: a stage of `STAGES`, a step, and how many batches it has finished.

    If workers are processes, `shared` must be True: the status is then in shared memory.
    """

    def __init__(self, workers: Sequence[str], *, shared: bool = False):
        self.workers = list(workers)
        with torch.inference_mode(False):  # tensors of inference mode cannot be changed outside it
            self._cells = torch.zeros((len(self.workers), 3), dtype=torch.int64)
        if shared:
            self._cells.share_memory_()

    @contextlib.contextmanager
    def at(self, worker: int, stage: str, step: int) -> Iterator[None]:
        """Set the stage of `worker` to `stage` of batch `step` until the context ends."""
        cell = self._cells[worker]
        cell[1], cell[0] = step, STAGES.index(stage)
        try:
            yield
        finally:
            cell[0] = 0

    def finished(self, worker: int) -> None:
        """Count one more finished batch of `worker`."""
        self._cells[worker, 2] += 1

    def made(self) -> int:
        """Return the number of batches finished so far, by all workers."""
        return int(self._cells[:, 2].sum())

    def describe(self) -> str:
        """Describe the stage of each worker: `reader 1 reading step 12, reader 2 idle`."""
        return ", ".join(
            f"{name} {STAGES[stage]}" + (f" step {step}" if stage else "")
            for name, (stage, step, _) in zip(self.workers, self._cells.tolist(), strict=True)
        )


class Watchdog:
    """Context manager that logs a warning when the consumer waits for one batch longer than
    `stall_warning_s` seconds.
    """

    def __init__(self, describe: Callable[[], str], stall_warning_s: float = STALL_WARNING_S):
        self.describe, self.stall_warning_s = describe, stall_warning_s
        self._asked: tuple[int, float] | None = None
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()

    @contextlib.contextmanager
    def waiting(self, step: int) -> Iterator[None]:
        """Mark that the consumer waits for batch `step` until the context ends."""
        self._asked = step, time.monotonic()
        try:
            yield
        finally:
            self._asked = None

    def _watch(self) -> None:
        waited: tuple[int, float] | None = None
        parts = 0
        while not self._ended.wait(self.stall_warning_s / WAITS):
            asked = self._asked
            parts = parts + 1 if asked is waited else 0
            waited = asked
            if asked and parts == WAITS:
                parts = 0
                log.warning(
                    "no batch for %.0f s at step %d: %s",
                    *(time.monotonic() - asked[1], asked[0], self.describe()),
                )
                log.debug("threads of this process:\n%s", _stacks())


def _stacks() -> str:
    """Format the stack of every thread of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )


class LoaderStats:
    """Loader statistics between two calls of `row`, from the batches that the consumer sees.

    `sources` are the names of the source codes in `Batch.sources`, `ranks` the ranks of the run.
    """

    def __init__(self, sources: Sequence[str], ranks: int = 1):
        self.sources, self.ranks = list(sources), ranks
        self.reset()

    def reset(self) -> None:
        """Set all counts to 0."""
        self.stalls: list[float] = []
        self.images = self.replayed = self.unreadable = self.ready = 0
        self.read_s = self.decode_s = 0.0
        self.seen: Counter[int] = Counter()
        self.since = time.perf_counter()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the same batches, count them, and measure how long the consumer waits for each."""
        batches = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.stalls.append(time.perf_counter() - asked)
            self.images += len(batch)
            self.replayed += int(batch.replayed.sum())
            self.unreadable += len(batch.failures)
            self.ready += batch.timing.ready
            self.read_s += batch.timing.read_s
            self.decode_s += batch.timing.decode_s
            self.seen.update(batch.sources.tolist())
            yield batch

    def rates(self) -> dict[str, float]:
        """Compute images per second, and the share of time, 0 to 1, that the consumer waited: in
        all, for bytes and for pixels.

        The images are those of all ranks: each step has a batch of the same size on every rank. The
        waiting time is divided between reading and decoding in the ratio of the batches' own
        times.
        """
        passed = max(time.perf_counter() - self.since, 1e-9)
        waited = sum(self.stalls) / passed
        reading = self.read_s / max(self.read_s + self.decode_s, 1e-9)
        return {
            "images_per_s": self.images * self.ranks / passed,
            "wait_share": waited,
            "wait_read": waited * reading,
            "wait_decode": waited * (1 - reading),
        }

    def row(self) -> dict[str, Any]:
        """Return the statistics since the last row, with the names of `metrics.jsonl`, and reset
        the counts.
        """
        count = max(1, len(self.stalls))
        stalls = 1000 * np.array(self.stalls or [0.0])
        row = self.rates() | {
            "stall_p50_ms": float(np.percentile(stalls, 50)),
            "stall_p99_ms": float(np.percentile(stalls, 99)),
            "stall_max_ms": float(stalls.max()),
            "ready": self.ready / count,
            "read_ms": 1000 * self.read_s / count,
            "decode_ms": 1000 * self.decode_s / count,
            "replay_share": self.replayed / max(1, self.images),
            "unreadable": self.unreadable,
        }
        row |= {f"images/{self.sources[code]}": count for code, count in sorted(self.seen.items())}
        self.reset()
        return row

    def note(self) -> str:
        """Format the rates for a progress bar."""
        rates = self.rates()
        return (
            f"{rates['images_per_s']:,.0f} images/s, waits {rates['wait_share']:.0%} "
            f"(read {rates['wait_read']:.0%}, decode {rates['wait_decode']:.0%})"
        )
