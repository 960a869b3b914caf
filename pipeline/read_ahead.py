"""Read batches of encoded images in a background thread, up to `QUEUE_BATCHES` + 1 batches ahead of
the decoder.

Main entry: `ReadAhead(requests, status, start, stall_error_s)`, a context manager: `with
ReadAhead(...) as ahead:` starts the thread, and `ahead.next()` returns the next request.

- `requests`: an iterable of `Request`s of pipeline/batch.py. Each is one batch: `data` (a list of
  encoded images), `formats`, `orientations`, `params` (the augmentation parameters) and more. The
  images of a batch are read when the thread takes its request from the iterable.
- `status`: `WorkerStatus(["reader", "decoder"])` of pipeline/monitor.py, in which the thread writes
  its stage. `READER` (0) and `DECODER` (1) are the numbers of these two workers.
- `start`: number of the first step, for the status.
- `stall_error_s`: time limit of `next()` in seconds.

`next()` raises StopIteration after the last request, `StallError` (pipeline/monitor.py) if none
came in `stall_error_s` seconds, or the error that ended the thread. The property `ready` is the
number of batches that wait, already read (the end counts as one). The end of the `with` block stops
the thread and waits for it for at most a second.
"""

import contextlib
import queue
import threading
from collections.abc import Iterable
from typing import Any

from pipeline.batch import Request
from pipeline.monitor import WAITS, StallError, WorkerStatus, stalled

QUEUE_BATCHES = 4
"""Batches of encoded bytes that are read ahead of the decoder."""

READER, DECODER = 0, 1
"""Rows of the backend's `WorkerStatus`."""


class ReadAhead:
    """Runs an iterable in a background thread, up to `QUEUE_BATCHES` ahead. An error in the thread
    is raised by `next`.
    """

    def __init__(
        self, requests: Iterable[Request], status: WorkerStatus, start: int, stall_error_s: float
    ):
        self._requests, self._status, self._start = requests, status, start
        self._stall_error_s = stall_error_s
        self._queue: queue.Queue = queue.Queue(QUEUE_BATCHES)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name="shard-reader", daemon=True)

    def __enter__(self) -> "ReadAhead":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stopped.set()
        self._thread.join(1)  # seconds; a read may hang forever
        # Drop a queued error: its traceback refers to the frames of `next` and its caller, so the
        # caller's pipeline would only be freed by the garbage collector.
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()

    @property
    def ready(self) -> int:
        """Batches of encoded bytes that wait to be decoded."""
        return self._queue.qsize()

    def next(self) -> Request:
        """Return the next request.

        Raises:
            StopIteration: there are no more requests.
            StallError: no request came for `stall_error_s` seconds.
        """
        for _ in range(WAITS):
            with contextlib.suppress(queue.Empty):
                item = self._queue.get(timeout=self._stall_error_s / WAITS)
                break
        else:
            raise StallError(stalled(self._stall_error_s, self._status.describe()))
        if isinstance(item, BaseException):
            self._put(item)  # DALI's graph may call `next` again
            try:
                raise item
            finally:
                del item  # breaks a cycle: error, traceback, this frame
        return item

    def _read(self) -> None:
        requests = iter(self._requests)
        step = self._start
        try:
            while not self._stopped.is_set():
                with self._status.at(READER, "reading", step):
                    request = next(requests)
                self._put(request)
                self._status.finished(READER)
                step += 1
        except Exception as error:  # StopIteration too: `next` raises it to end the run
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
