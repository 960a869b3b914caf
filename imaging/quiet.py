"""Keep the warnings and log lines of image decoders off the terminal; exceptions are not affected.

Main entries, all without arguments: `silence_pillow()` stops Pillow and its libtiff from printing,
for the rest of the process. `without_warnings()` and `without_chatter()` are context managers that
yield nothing. Each acts on the whole process; if several threads have its block open, it ends with
the last of these blocks. The first hides Python's warnings. The second drops the lines that native
decoders (libjpeg, libpng, OpenCV, nvImageCodec) write to standard error, and empty lines; other
lines are printed.
"""

import contextlib
import ctypes
import logging
import os
import select
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from PIL import Image

from imaging import chatter


def silence_pillow() -> None:
    """Stop Pillow and its libtiff from printing errors, which are also raised as exceptions.
    Pillow's log lines would be printed by Python where no log handler is set. `_imaging` is linked
    to libtiff, so its symbols are found there.
    """
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with contextlib.suppress(AttributeError, OSError):  # no libtiff, or no symbols
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


_silence = threading.Lock()
_silent: list[warnings.catch_warnings] = []  # one per open block, and the saved filters


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Thread-safe `warnings.catch_warnings`: filters are saved once and restored when the last
    thread leaves its block. `catch_warnings` alone, used by several threads, may restore the wrong
    filters.
    """
    with _silence:
        if not _silent:
            _silent.append(warnings.catch_warnings())
            _silent[0].__enter__()
            warnings.simplefilter("ignore")
        _silent.append(_silent[0])
    try:
        yield
    finally:
        with _silence:
            _silent.pop()
            if len(_silent) == 1:
                _silent.pop().__exit__(None, None, None)


# --- lines that native code writes ----------------------------------------------------------------

ANSWER_S = 60.0
"""Seconds to wait until the last line was copied: on a busy machine the filter may not run before.
Later lines are copied too, but after those that follow.
"""

END_S = 0.1
"""Seconds to wait for the end of a filter. It lives on while another process writes through it."""

_ending: list[subprocess.Popen] = []
"""Filters that had not ended by then. Without a reference Python would warn of each."""


class _Filter:
    """Sends standard error of the process through `imaging/chatter.py`, which drops the lines of
    decoders.

    The filter is another process, because a thread would die in a crash, before the last lines were
    printed, and would wait for the GIL, which the crashing thread may hold while it writes.
    """

    def __init__(self) -> None:
        if sys.stderr:
            sys.stderr.flush()
        self.real = os.dup(2)
        try:
            self.process = subprocess.Popen(
                [sys.executable or "", "-I", "-S", chatter.__file__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
            )  # fmt: skip
        except OSError:
            os.close(self.real)
            raise
        assert self.process.stdin
        with self.process.stdin as writing:
            os.dup2(writing.fileno(), 2)
        self.before = sys.stderr
        if _is_native(sys.stderr):  # unfiltered: progress bars need a terminal
            sys.stderr = os.fdopen(os.dup(self.real), "w", buffering=1, errors="backslashreplace")

    def close(self) -> None:
        """Restore standard error. Returns after the last line was copied."""
        if sys.stderr is not self.before:
            sys.stderr.close()
            sys.stderr = self.before
        with contextlib.suppress(OSError):  # the filter was killed
            os.write(2, chatter.END)
        os.dup2(self.real, 2)
        os.close(self.real)
        _ending.append(self.process)
        assert self.process.stdout
        with self.process.stdout as answer:
            poll = select.poll()  # unlike `select`, for any number of open files
            poll.register(answer, select.POLLIN)
            poll.poll(1000 * ANSWER_S)  # returns, too, when the filter has died
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        _ending[:] = [process for process in _ending if process.poll() is None]


def _is_native(stream: Any) -> bool:
    try:
        return stream.fileno() == 2
    except (AttributeError, OSError, ValueError):  # None, or replaced by a test
        return False


_filtering = threading.Lock()
_filters: list[_Filter] = []
_users = 0


@contextlib.contextmanager
def without_chatter() -> Iterator[None]:
    """Drop the lines that native decoders write to standard error until the block ends, in any
    number of threads.

    This is for decoders that cannot be silenced by their own options: nvImageCodec prints every
    error, and the libjpeg inside it every warning.
    """
    global _users
    with _filtering:
        if not _users:
            with contextlib.suppress(OSError):  # no filter process: nothing is dropped
                _filters.append(_Filter())
        _users += 1
    try:
        yield
    finally:
        with _filtering:
            _users -= 1
            if not _users and _filters:
                _filters.pop().close()
