"""Read the requests of a backend in a thread of its own, some batches ahead of the decoder."""

import queue
import threading
from collections.abc import Iterable
from typing import Any

from pipeline.batch import Request
from pipeline.monitor import WorkerStatus

QUEUE_BATCHES = 4
"""Batches of encoded bytes read ahead of the decoder."""

READER, DECODER = 0, 1
"""Rows of the backend's `WorkerStatus`."""


class ReadAhead:
    """Runs an iterable in a thread, `QUEUE_BATCHES` ahead; an error there is raised here."""

    def __init__(self, requests: Iterable[Request], status: WorkerStatus, start: int):
        self._requests, self._status, self._start = requests, status, start
        self._queue: queue.Queue = queue.Queue(QUEUE_BATCHES)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name="shard-reader", daemon=True)

    def __enter__(self) -> "ReadAhead":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stopped.set()
        self._thread.join()

    @property
    def ready(self) -> int:
        """Batches of encoded bytes that wait to be decoded."""
        return self._queue.qsize()

    def next(self) -> Request:
        """The next request; `StopIteration` after the last."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._put(item)  # the graph may ask again while it drains
            raise item
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
        except Exception as error:  # StopIteration too: it ends the run on the other side
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
