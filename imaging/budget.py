"""How much memory decoding may take in all: images wait for each other rather than for the kernel's
killer.
"""

import contextlib
import ctypes
import threading
from collections.abc import Iterator

DECODE_BYTES = 4 * 2**30
"""For all threads of a process. One image more than that, the largest, is decoded alone."""

BYTES_PER_PIXEL = 14
"""At most, while any picture is decoded: Pillow's own copy and one in another mode (4 each), rows
being joined, and the result (3 each). Measured in `benchmarks/hostile.py`.
"""

LARGE_PIXELS = 2**25
"""From here on an image counts as large: beside builders of several processes, one at a time."""


class ByteBudget:
    """A number of bytes that threads share; who asks for more than is left waits, in no order."""

    def __init__(self, total: int):
        self.total, self.used = total, 0
        self._freed = threading.Condition()

    @contextlib.contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Hold `size` bytes until the block ends; more than there are count as all of them."""
        size = min(size, self.total)
        with self._freed:
            self._freed.wait_for(lambda: self.used + size <= self.total)
            self.used += size
        try:
            yield
        finally:
            with self._freed:
                self.used -= size
                self._freed.notify_all()


_budget = ByteBudget(DECODE_BYTES)
_one_large: contextlib.AbstractContextManager = contextlib.nullcontext()


def share_large(lock: contextlib.AbstractContextManager) -> None:
    """Let the processes that have `lock` decode one large image at a time between them."""
    global _one_large
    _one_large = lock


@contextlib.contextmanager
def decoding(pixels: int) -> Iterator[None]:
    """Wait until there is memory to decode a picture of so many pixels, and hold it."""
    large = _one_large if pixels >= LARGE_PIXELS else contextlib.nullcontext()
    with _budget.of(pixels * BYTES_PER_PIXEL), large:
        if pixels >= LARGE_PIXELS:
            give_back_freed()
        yield


def give_back_freed() -> None:
    """Let the system have what is free in this process. glibc keeps it for the thread that freed
    it, all of it where prediction asks for that (`model/device.py`): of 16 threads, 16 pictures.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
