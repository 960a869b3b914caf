"""Fit the number of loading processes to the free shared memory, and shield them from signals and
from the garbage of the process that starts them.

Main entries: `fitting_workers(wanted, batch_bytes, free)` returns how many processes have room for
their batches, from 0 to `wanted`.

- `wanted`: the wanted number of processes.
- `batch_bytes`: the bytes of one batch (above 0).
- `free`: the free bytes of shared memory; None: no limit.

`free_shared_memory(folder)` returns the free bytes for `free`: 0 if the folder (a `Path`,
`/dev/shm` by default) is not writable, None if there is no limit (also on systems other than
Linux).

`stop_signals_held()` is a context manager without arguments. It delays SIGINT and SIGTERM until its
block ends. Processes that are forked in the block never get these signals, unless they call
`answer_parent_only()`.

`garbage_held()` is a context manager without arguments. Processes that are forked in its block
never collect objects that are garbage in this process.

`answer_parent_only()` is called in each new process, for example as the `worker_init_fn` of torch's
`DataLoader`. It takes the number of the process (default 0), which is not used, and returns
nothing. The process then ends on a SIGTERM of its parent process. It ignores SIGINT, and a SIGTERM
of any other sender, such as a batch system. On macOS, where the sender is not known, it ignores
both signals.
"""

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("ai_images_detector")

SHARED_MEMORY = Path("/dev/shm")
"""Folder of Linux's shared memory, through which a worker passes its batches."""

QUEUED_BATCHES = 2
"""Batches that each worker prepares ahead: torch's `prefetch_factor`."""

HELD_BATCHES = 3
"""Batches that the consumer keeps: the current one, and those being received."""

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
    """Delay SIGINT and SIGTERM until the block ends. Processes that are forked in the block never
    receive these signals, unless they call `answer_parent_only`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def garbage_held() -> Iterator[None]:
    """Keep processes that are forked in the block from collecting what is garbage here.

    A pipeline of DALI has threads, which a fork does not copy. Where one is part of a cycle, the
    collector of the new process would destroy it, and wait for these threads forever.
    """
    was_frozen = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()


_STOPS = {signal.SIGINT, signal.SIGTERM}


def answer_parent_only(_worker: int = 0) -> None:
    """Make this worker process end on a SIGTERM only if its parent sent it.

    A signal to the whole process group (from a terminal, `timeout`, systemd or a batch system) is
    meant for the parent. The parent saves with the help of its workers and then ends them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    if hasattr(signal, "sigwaitinfo"):  # macOS does not tell the sender of a signal
        threading.Thread(target=_end_by_parent, name="signals", daemon=True).start()


def _end_by_parent() -> None:
    while True:
        received = signal.sigwaitinfo(_STOPS)
        if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
            os._exit(0)
