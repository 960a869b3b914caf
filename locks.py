"""Lock files and folders of this machine, so that only one process or thread writes to a place.

Main entry: `with locked(path, busy):`, a context manager that yields nothing. Arguments:

- `path`: the `Path` of the lock file, in an existing folder. It is created if it is missing, and
  nothing is written to it. With `is_folder`, it is a folder, which must exist, and itself is
  locked: no file is made, but a network file system may exclude processes of one machine only.
- `busy`: the exception to raise if another process or thread has the lock. None (the default): wait
  for it, and first log the text `waiting`, if there is one.
- `shared`: several may have the lock at once, but not while one has it unshared.
- `remove`: the file is removed at the end.

The lock ends with the block, and with the process; children that it forked do not hold it. Threads
of one process exclude each other, too. A thread that already has the lock would wait for itself. A
file system without locks is one warning for each folder, and the block runs unlocked. `OSError` is
raised if the lock file is a link or cannot be created.
"""

import contextlib
import errno
import fcntl
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("ai_images_detector")  # `log` of console.py

_held: set[int] = set()
"""Descriptors of this process that hold locks."""


@contextlib.contextmanager
def locked(
    path: Path,
    busy: Exception | None = None,
    *,
    waiting: str = "",
    shared: bool = False,
    is_folder: bool = False,
    remove: bool = False,
) -> Iterator[None]:
    """Lock a file or folder until the block ends. If another process or thread has the lock, raise
    `busy`, or, if `busy` is None, log `waiting` and wait.

    Raises:
        OSError: the lock file is a link or cannot be created, or the folder is missing.
    """
    descriptor = _acquire(path, busy, waiting, shared, is_folder)
    try:
        yield
    finally:
        if remove:  # before the lock ends: later, another process may have locked the file
            with contextlib.suppress(OSError):
                path.unlink()
        _release(descriptor)


def _acquire(
    path: Path, busy: Exception | None, waiting: str, shared: bool, is_folder: bool
) -> int:
    """Return the descriptor that holds the lock."""
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        with contextlib.ExitStack() as undo:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY) if is_folder else _open(path)
            _held.add(descriptor)
            undo.callback(_release, descriptor)
            if not _lock(descriptor, kind | fcntl.LOCK_NB, path):
                if busy is not None:
                    raise busy
                if waiting:
                    log.info("%s", waiting)
                    waiting = ""
                _lock(descriptor, kind, path)
            with contextlib.suppress(FileNotFoundError):  # the last holder may have removed it
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    undo.pop_all()
                    return descriptor


def _open(path: Path) -> int:
    """Open a lock file. Its folder may come from a stranger: links are not followed, and the file
    is not truncated.
    """
    try:  # NFS locks only files that are open for writing
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(f"{path} is a link, expected a file; remove it") from error
        if not (isinstance(error, PermissionError) and path.exists()):
            raise OSError(error.errno, error.strerror, str(path.parent)) from error
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)  # read-only: another user owns the lock file


def _lock(descriptor: int, operation: int, path: Path) -> bool:
    """Lock the descriptor. Return False if another one has the lock, True also on a file system
    without locks.
    """
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        _warn(path.parent, error.strerror)
    return True


def _release(descriptor: int) -> None:
    if descriptor in _held:  # a forked child has closed it already
        _held.remove(descriptor)
        os.close(descriptor)


@functools.cache
def _warn(folder: Path, reason: str) -> None:
    log.warning(
        "%s: its file system has no locks (%s); make sure that no other process writes there",
        folder, reason,
    )  # fmt: skip


def _close_in_child() -> None:
    """Close the lock files of the parent process in a forked child, which would keep them locked
    after the parent ends.
    """
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_close_in_child)
