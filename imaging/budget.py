"""Limit the memory of decoding: an image is decoded only when the memory for it is free.

Main entry: `decoding(pixels)`, a context manager around the decoding of one image of `pixels`
pixels (width x height). It waits until `pixels * BYTES_PER_PIXEL` of the `DECODE_BYTES` bytes that
all threads of the process share are free, and reserves them until the block ends. An image that
needs more than `LARGEST_SHARE` reserves this share, so that small images need not wait for it.
Nothing is yielded or raised.

`share_large(lock)` takes a lock that several processes share, such as a `multiprocessing.Lock`, and
returns nothing. Each of the processes calls it once. Then `decoding()` holds the lock while it
decodes a large image (`LARGE_PIXELS` or more), so only one of the processes does so at a time.

`ByteBudget(total)` is a number of bytes that threads share. Its `of(size)` is a context manager
that waits until `size` bytes are free and reserves them until the block ends. `give_back_freed()`
takes no arguments and returns nothing: it gives the memory that this process has freed back to the
operating system.
"""

import contextlib
import ctypes
import threading
from collections.abc import Iterator

DECODE_BYTES = 4 * 2**30
"""Bytes for decoding, over all threads of a process."""

LARGEST_SHARE = DECODE_BYTES * 3 // 4
"""Largest number of these bytes that one image reserves. The largest image takes up to 5 GB, with
the rest for small images beside it.
"""

BYTES_PER_PIXEL = 25
"""Largest number of bytes per pixel while an image is decoded: the decoder's own copies, Pillow's
copy and one in another mode (4 each), and the result (3). Measured on 36 million pixels: JPEG 2000
24, lossless WebP 22, AVIF with transparency 19, lossy WebP 18, all others at most 14.
"""

LARGE_PIXELS = 2**25
"""Pixels from which an image is large. Builders with several processes, the page and the server
decode one large image at a time.
"""


class ByteBudget:
    """A number of bytes that threads share. A thread waits until the bytes that it needs are free;
    waiting threads are served in no fixed order.
    """

    def __init__(self, total: int):
        self.total, self.used = total, 0
        self._freed = threading.Condition()

    @contextlib.contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Reserve `size` bytes until the block ends. A size above the total reserves everything."""
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
    """Let all processes that share `lock` decode one large image at a time."""
    global _one_large
    _one_large = lock


@contextlib.contextmanager
def decoding(pixels: int) -> Iterator[None]:
    """Wait until there is memory to decode an image of this many pixels, and reserve it until the
    block ends.
    """
    large = _one_large if pixels >= LARGE_PIXELS else contextlib.nullcontext()
    with _budget.of(min(pixels * BYTES_PER_PIXEL, LARGEST_SHARE)), large:
        if pixels >= LARGE_PIXELS:
            give_back_freed()
        yield


def give_back_freed() -> None:
    """Return free memory of this process to the system.

    glibc keeps freed memory for the thread that freed it; where prediction configures it so
    (`model/device.py`), glibc keeps all of it. 16 threads could then keep the memory of 16 images.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no `malloc_trim`
        ctypes.CDLL(None).malloc_trim(0)
