"""Fit the number of loading processes to the free shared memory, shield them from signals and from
the garbage of the process that starts them, and end them.

Main entries: `fitting_workers(wanted, batch_bytes, free)` returns how many processes have room for
their batches, from 0 to `wanted`.

- `wanted`: the wanted number of processes.
- `batch_bytes`: the bytes of one batch (above 0).
- `free`: the free bytes of shared memory; None: no limit.

`free_shared_memory(folder)` returns the free bytes for `free`: 0 if the folder (a `Path`,
`/dev/shm` by default) is not writable, None if there is no limit (also on systems other than
Linux).

`stop_signals_held()` is a context manager without arguments. It delays SIGINT, SIGTERM and SIGHUP
until its block ends. Processes that are started in the block never get these signals.

`garbage_held()` is a context manager without arguments. Processes that are forked in its block
never collect objects that are garbage in this process.

`killed_at_the_end()` takes no arguments and returns what torch's `DataLoader` expects as its
`multiprocessing_context`. Its processes are forked on Linux. They are ended by SIGKILL, which needs
no answer, where Python and torch would send SIGTERM. Before that, each has `END_S` seconds to end
by itself, where torch would wait 5.
"""

import atexit
import contextlib
import copy
import functools
import gc
import logging
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from storage import make_socket_folder

log = logging.getLogger("ai_images_detector")

SHARED_MEMORY = Path("/dev/shm")
"""Folder of Linux's shared memory, through which a worker passes its batches."""

QUEUED_BATCHES = 2
"""Batches that each worker prepares ahead: torch's `prefetch_factor`."""

HELD_BATCHES = 3
"""Batches that the consumer keeps: the current one, and those being received."""

END_S = 0.1
"""Longest time in seconds that torch waits for a worker to end by itself. A worker that hangs does
not, and torch waits for the workers one after another.
"""

RESERVED_BYTES = 2**20
"""Bytes of shared memory reserved for queues, locks and the status of the workers."""


def free_shared_memory(folder: Path = SHARED_MEMORY) -> int | None:
    """Return the free bytes of shared memory: 0 if it is not writable, None if it has no limit."""
    if sys.platform != "linux":
        return None
    if not os.access(folder, os.W_OK):
        return 0
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize if space.f_blocks else None


def fitting_workers(wanted: int, batch_bytes: int, free: int | None) -> int:
    """Return how many of `wanted` workers have room for their batches in `free` bytes (None: no
    limit).
    """
    if free is None:
        return wanted
    batches = (free - RESERVED_BYTES) // batch_bytes
    return max(0, min(wanted, (batches - HELD_BATCHES) // QUEUED_BATCHES))


@contextlib.contextmanager
def stop_signals_held() -> Iterator[None]:
    """Delay SIGINT, SIGTERM and SIGHUP until the block ends. Processes that are started in the
    block never receive these signals.

    A signal to the whole process group (from a terminal, `timeout`, systemd or a batch system) is
    meant for the parent. The parent saves with the help of its workers and then ends them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def garbage_held() -> Iterator[None]:
    """Keep processes that are forked in the block from collecting garbage of this process.

    A pipeline of DALI has threads, which a fork does not copy. The garbage collector of the new
    process would destroy a pipeline that is part of a cycle, and wait for its threads forever.
    """
    was_frozen = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()


_STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}

_Process: Any = (
    multiprocessing.get_context("fork").Process
    if sys.platform == "linux"
    else multiprocessing.Process
)


class _KilledProcess(_Process):
    """Process that `terminate()` ends by SIGKILL.

    SIGTERM is not enough: a stuck process does not handle it, and a process cannot distinguish a
    SIGTERM of its parent from one that was sent to the whole group.
    """

    def start(self) -> None:
        super().start()
        self._popen.terminate = self._popen.kill  # called by multiprocessing at exit

    def join(self, timeout: float | None = None) -> None:
        super().join(None if timeout is None else min(timeout, END_S))


class _Queue(multiprocessing.queues.Queue):
    """Queue that sends the error of an item that cannot be sent. Python's own only prints the error
    and drops the item, for which torch would wait.
    """

    def _on_queue_feeder_error(self, error: Exception, item: Any) -> None:
        from torch._utils import ExceptionWrapper

        caught = (type(error), error, error.__traceback__)
        self.put((item[0], ExceptionWrapper(caught, "in DataLoader worker process")))


@functools.cache
def killed_at_the_end() -> Any:
    """Return a `multiprocessing` context whose processes are ended by SIGKILL. On Linux they are
    forked.
    """
    make_socket_folder()  # a SIGKILL would leave one that a worker makes
    if hasattr(signal, "SIGCHLD"):
        # While Python exits, torch would report the end of these processes as an error.
        atexit.register(signal.signal, signal.SIGCHLD, signal.SIG_DFL)
    context = copy.copy(multiprocessing.get_context("fork" if sys.platform == "linux" else None))
    vars(context).update(Process=_KilledProcess, Queue=functools.partial(_Queue, ctx=context))
    return context
