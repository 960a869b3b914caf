"""Score the images of all requests in one queue: threads decode, one thread scores in batches.

Main entry: `BackgroundScorer(detector, limits, metrics)`, which starts the threads. A damaged list
of trusted C2PA signers raises `TrustListError`.

- `detector`: an `ImageDetector`, from `load_detector()` of `model`.
- `limits`: the `Limits` of `serve/limits.py`; `queue` and `batch_size` are used.
- `metrics`: the `ServerMetrics` of `serve/metrics.py` to update.

`submit(files)` takes the images of one request, a list of `ImageFile(name, read)` of
`imaging/decode.py` (`read()` returns the bytes). It returns a list with a `Job` for each, at once.
If the queue has no room for all of them, it raises `Refused` (status 429).

`Job.done` is a future (of `concurrent.futures`) of the image's row, a dict with the columns of
`predict.py`: path, probability, verdict, error, provenance, checkpoint. An image that cannot be
read gets a row with the error. An unexpected error is raised by the future. The caller cancels the
futures of a request that has ended; these images are not scored.

`close()` still scores the images whose decoding is finished or under way, drops the others and
stops the threads. The future of a dropped image raises `Refused` (status 503). After `close()`,
`submit()` raises RuntimeError.

Three properties: `is_full` tells whether the queue is full, `works` whether the scoring thread
runs, and `retry_after` estimates the seconds until all waiting images are scored (1 to
`MAX_RETRY_S`).
"""

import contextlib
import math
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

import console
from imaging.budget import LARGE_PIXELS
from imaging.decode import ImageFile
from imaging.decode_lock import pixels_of
from model.c2pa.signatures import usual_trust_list
from model.inference import results
from model.inference.detector import ImageDetector
from model.inference.prediction import done_or_reason, predictions, threads
from model.inference.provenance import Evidence, read_evidence
from serve.limits import Limits, Refused
from serve.metrics import ServerMetrics

BATCH_WAIT_S = 0.01
"""Seconds that a batch that is not full waits for images that are being decoded."""

MAX_RETRY_S = 60


@dataclass(eq=False)
class Job:
    """One image of a request.

    `done` is a future for its row; it is cancelled if the request has ended, and the image then
    leaves the queue at once. `data` is the encoded image while it waits to be decoded, `pixels` the
    preprocessed image, None until it is decoded. `left` is true when the job has left the queue:
    then `data` is empty and `pixels` is None.
    """

    file: ImageFile
    done: "Future[dict[str, Any]]" = field(default_factory=Future)
    provenance: list[Evidence] = field(default_factory=list)
    data: bytes = b""
    pixels: np.ndarray | None = None
    left: bool = False


class BackgroundScorer:
    """Score images in background threads, with at most `limits.queue` images in the queue.

    Raises:
        TrustListError: the C2PA trust list cannot be used.
    """

    def __init__(self, detector: ImageDetector, limits: Limits, metrics: ServerMetrics):
        self.detector, self.limits, self.metrics = detector, limits, metrics
        self.trust = usual_trust_list()
        self.waiting = 0  # images in the queue that have no row yet
        self.unread = 0  # images in the queue that are not decoded yet
        self._seconds = 0.1  # seconds per image, moving average
        self._lock = threading.Lock()
        self._decoded: queue.Queue[Job | None] = queue.Queue()
        self._readers = ThreadPoolExecutor(threads(), thread_name_prefix="decode")
        # Decoding the largest images takes gigabytes and seconds. They are decoded one at a time,
        # in their own thread, so that small images do not wait.
        self._large_reader = ThreadPoolExecutor(1, thread_name_prefix="decode-large")
        self._thread = threading.Thread(target=self._score_all, name="score", daemon=True)
        self._thread.start()

    @property
    def is_full(self) -> bool:
        """Return whether the queue is full."""
        return self.waiting >= self.limits.queue

    @property
    def works(self) -> bool:
        """Return whether the scoring thread is running."""
        return self._thread.is_alive()

    @property
    def retry_after(self) -> int:
        """Estimate the seconds until all waiting images are scored, from 1 to 60."""
        return min(MAX_RETRY_S, max(1, math.ceil(self.waiting * self._seconds)))

    def submit(self, files: Iterable[ImageFile]) -> list[Job]:
        """Put all images of a request into the queue, or none.

        Raises:
            Refused: the queue has no room for all of them (status 429).
        """
        jobs = [Job(file) for file in files]
        with self._lock:
            if self.waiting + len(jobs) > self.limits.queue:
                raise Refused(
                    429,
                    f"the queue is full: {self.waiting} images of at most {self.limits.queue}; "
                    "try again later",
                    self.retry_after,
                )
            self.waiting += len(jobs)
            self.unread += len(jobs)
        self.metrics.waiting.set(self.waiting)
        for job in jobs:
            job.done.add_done_callback(partial(self._forget, job))
            self._readers.submit(self._read, job).add_done_callback(partial(self._drop, job))
        return jobs

    def close(self) -> None:
        """Score the decoded images, drop the others, then stop the threads."""
        self._readers.shutdown(cancel_futures=True)
        self._large_reader.shutdown(cancel_futures=True)
        self._decoded.put(None)
        self._thread.join()

    # --- decoding threads -------------------------------------------------------------------------

    def _read(self, job: Job) -> None:
        """Read an image, then decode it here or pass it to the thread for large images."""
        with self._failing([job]):
            if job.left:
                return
            data = done_or_reason(lambda file: file.read(), job.file)
            if isinstance(data, str):
                self._finish(job, math.nan, data)
                return
            job.provenance = read_evidence(data, self.trust)
            is_large = pixels_of(data) >= LARGE_PIXELS
            with self._lock:
                if _has_left(job):
                    return
                job.data = data
            if is_large:
                decoding = self._large_reader.submit(self._decode, job)
                decoding.add_done_callback(partial(self._drop, job))
            else:
                self._decode(job)

    def _decode(self, job: Job) -> None:
        with self._failing([job]):
            data = job.data
            if job.left:
                return
            image = ImageFile(job.file.name, lambda: data)
            pixels = done_or_reason(self.detector.preprocess_file, image)
            if isinstance(pixels, str):
                self._finish(job, math.nan, pixels)
                return
            with self._lock:
                if _has_left(job):
                    return
                job.data, job.pixels = b"", pixels
                self.unread -= 1
            self._decoded.put(job)

    # --- scoring thread ---------------------------------------------------------------------------

    def _score_all(self) -> None:
        while group := self._group():
            with self._failing(group):
                self._score(group)

    def _group(self) -> list[Job]:
        """Return the decoded images, at most one batch; an empty list means stop. The batch waits
        only for images that are being decoded, so a single image is scored at once.
        """
        if (first := self._decoded.get()) is None:
            return []
        group, until = [first], time.monotonic() + BATCH_WAIT_S
        while len(group) < self.limits.batch_size:
            left = until - time.monotonic() if self.unread else 0.0
            try:
                job = self._decoded.get(timeout=left) if left > 0 else self._decoded.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._decoded.put(None)  # stop signal for the next call
                break
            group.append(job)
        return group

    def _score(self, group: Sequence[Job]) -> None:
        # Requests may end at any time; their jobs then have no pixels.
        held = [(job, pixels) for job in group if (pixels := job.pixels) is not None]
        if not held:
            return
        began = time.monotonic()
        probabilities = self.detector.score(np.stack([pixels for _, pixels in held])).tolist()
        passed = time.monotonic() - began
        self._seconds += 0.2 * (passed / len(held) - self._seconds)
        self.metrics.batch_images.observe(len(held))
        self.metrics.batch_seconds.observe(passed)
        for (job, _), probability in zip(held, probabilities, strict=True):
            self._finish(job, probability)

    # --- all threads ------------------------------------------------------------------------------

    def _finish(self, job: Job, probability: float, reason: str = "") -> None:
        """Set the row of a job and remove the job from the queue."""
        failures = {0: reason} if reason else {}
        (said,) = predictions([job.file.name], [probability], failures, self.detector.band)
        row = results.row(
            path=said.name,
            probability=said.probability,
            verdict=said.verdict,
            error=said.error,
            provenance=[asdict(evidence) for evidence in job.provenance],
            checkpoint=self.detector.identity,
        )
        if self._leave(job) and job.done.set_running_or_notify_cancel():
            self.metrics.images.labels(said.verdict).inc()
            job.done.set_result(row)

    def _drop(self, job: Job, reading: "Future[None]") -> None:
        """Refuse a job whose decoding `close()` has canceled: otherwise the request would wait
        until its time limit.
        """
        if reading.cancelled() and self._leave(job) and job.done.set_running_or_notify_cancel():
            job.done.set_exception(Refused(503, "the server is stopping; try again later", 1))

    @contextlib.contextmanager
    def _failing(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Catch unexpected errors (a bug, or a lack of memory on the device), so that the thread
        goes on. The requests of these jobs are answered with status 500.
        """
        try:
            yield
        except Exception as error:
            console.log.exception("images could not be scored")
            for job in jobs:
                if self._leave(job) and job.done.set_running_or_notify_cancel():
                    job.done.set_exception(error)

    def _forget(self, job: Job, _done: "Future[dict[str, Any]]") -> None:
        """Remove a job whose request has ended."""
        self._leave(job)

    def _leave(self, job: Job) -> bool:
        """Remove a job from the queue; returns whether it was still in the queue."""
        with self._lock:
            if job.left:
                return False
            job.left = True
            self.waiting -= 1
            self.unread -= job.pixels is None
            job.data, job.pixels = b"", None
        job.file = ImageFile(job.file.name, bytes)  # frees the bytes
        self.metrics.waiting.set(self.waiting)
        return True


def _has_left(job: Job) -> bool:
    """Return whether a job is out of the queue. Another thread may have removed it at any time."""
    return job.left
