"""Decoders speak through exceptions: their warnings, log lines and lines on standard error are
kept from the terminal, and nobody else's.
"""

import contextlib
import ctypes
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from PIL import Image


def silence_pillow() -> None:
    """Errors are raised; Pillow also logs them, which Python prints where nothing handles it, and
    its libtiff prints them. `_imaging` is linked to libtiff, so that its symbols are found there.
    """
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with contextlib.suppress(AttributeError, OSError):  # without libtiff, or without symbols
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


_silence = threading.Lock()
_silent: list[warnings.catch_warnings] = []  # what was caught first, then one for each block inside


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """No warnings until the block ends, in any number of threads: `catch_warnings` alone, entered
    and left by several in no order, leaves the filters of one of them behind.
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

_CHATTER = re.compile(
    # nvImageCodec
    rb"\[(ERROR|WARNING|FATAL)\] ?(\x1b\[0m)?\[[\w-]*(decoder|parser|ext|imgcodec)\w*\]"
    rb"|\[ ?(ERROR|WARN|INFO):\d+@[\d.]+\]"  # OpenCV
    rb"|^(Corrupt JPEG data: |Premature end of JPEG|Invalid SOS parameters for sequential JPEG"
    rb"|Inconsistent progression sequence for component|Unknown Adobe color transform"
    rb"|Warning: unknown JFIF revision|Bogus |Unsupported marker type 0x|Invalid JPEG file struct"
    rb"|Invalid progressive|Quantization table 0x|Huffman table 0x|Didn't expect more than one scan"
    rb"|Unsupported JPEG |Not a JPEG file|Sorry, there are legal|Empty JPEG image"
    rb"|Invalid component ID \d|Input file read error"
    rb"|libpng (warning|error): )"
    rb"|^> |^\s*'[^']*' (is|where) |^Unsupported number of channels"  # OpenCV's second lines
)


class _Filter:
    """Standard error of the process through a pipe, without the lines of decoders."""

    def __init__(self) -> None:
        sys.stderr.flush()
        self.real = os.dup(2)
        reading, writing = os.pipe()
        os.dup2(writing, 2)
        os.close(writing)
        self.before = sys.stderr
        if _is_native(sys.stderr):  # Python's own lines need no look, and a bar needs the terminal
            sys.stderr = os.fdopen(os.dup(self.real), "w", buffering=1, errors="backslashreplace")
        self.thread = threading.Thread(target=self._copy, args=(reading,), daemon=True)
        self.thread.start()

    def _copy(self, reading: int) -> None:
        with os.fdopen(reading, "rb") as lines:
            for line in lines:
                if line.strip() and not _CHATTER.search(line):
                    os.write(self.real, line)

    def close(self) -> None:
        """As it was before; returns when the last line is through."""
        if sys.stderr is not self.before:
            sys.stderr.close()
            sys.stderr = self.before
        os.dup2(self.real, 2)
        self.thread.join(timeout=1)  # a child that inherited the pipe may hold it open
        if not self.thread.is_alive():
            os.close(self.real)


def _is_native(stream: Any) -> bool:
    try:
        return stream.fileno() == 2
    except (AttributeError, OSError, ValueError):  # a test's, or none
        return False


_filtering = threading.Lock()
_filters: list[_Filter] = []
_users = 0


@contextlib.contextmanager
def without_chatter() -> Iterator[None]:
    """Until the block ends, lines that native decoders write to standard error are dropped, in any
    number of threads. For decoders whose own switches do not reach all of them: nvImageCodec
    prints every error, and libjpeg inside it every warning.
    """
    global _users
    with _filtering:
        if not _users:
            _filters.append(_Filter())
        _users += 1
    try:
        yield
    finally:
        with _filtering:
            _users -= 1
            if not _users:
                _filters.pop().close()
