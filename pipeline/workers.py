"""Loading processes: how many of them shared memory holds, and which signals reach them."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("ai_images_detector")

SHARED_MEMORY = Path("/dev/shm")
"""Where Linux keeps the shared memory through which a worker hands over its batches."""

QUEUED_BATCHES = 2
"""Batches that each worker has made or is making, torch's `prefetch_factor`."""

HELD_BATCHES = 3
"""Batches that the consumer holds: the one that it works on, and those that it takes over."""

RESERVED_BYTES = 2**20
"""Shared memory left to what else needs some: queues, locks, the status of the workers."""


def free_shared_memory(folder: Path = SHARED_MEMORY) -> int | None:
    """Bytes free in shared memory: 0 where it cannot be written, None where nothing bounds it."""
    if sys.platform != "linux":
        return None
    if not os.access(folder, os.W_OK):
        return 0
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize if space.f_blocks else None


def fitting_workers(wanted: int, batch_bytes: int, free: int | None) -> int:
    """How many of `wanted` workers have room for their batches in `free` bytes (None: no bound)."""
    if free is None:
        return wanted
    batches = (free - RESERVED_BYTES) // batch_bytes
    return max(0, min(wanted, (batches - HELD_BATCHES) // QUEUED_BATCHES))


@contextlib.contextmanager
def stop_signals_held() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the block ends; processes that are forked in it never get them,
    until `answer_parent_only` takes them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_STOPS = {signal.SIGINT, signal.SIGTERM}


def answer_parent_only(_worker: int = 0) -> None:
    """Make this worker end by SIGTERM only when its parent sends it: a signal to the whole process
    group (a terminal, `timeout`, systemd, a batch system) is for the parent, which saves with the
    help of its workers and ends them itself.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    if hasattr(signal, "sigwaitinfo"):  # macOS does not say who sent a signal
        threading.Thread(target=_end_by_parent, name="signals", daemon=True).start()


def _end_by_parent() -> None:
    while True:
        received = signal.sigwaitinfo(_STOPS)
        if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
            os._exit(0)
