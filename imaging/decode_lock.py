"""Limit decoding in this process to one small and one large image at the same time, for all users
of the web page together.

Main entry: `with decode_lock(data):`, a context manager around the decoding of an image file. It
takes `data`, the bytes of the file, and yields nothing.

There are two size classes: images of `LARGE_PIXELS` (`imaging/budget.py`) or more, and smaller
ones. The block starts when no other image of the same class is being decoded. Until it ends, other
images of this class wait. After `WAIT_S` seconds of waiting, `Busy` (an `Exception`) is raised.

`hold(lock)` waits for any lock in the same way. `LOCKS` are the locks of the two classes.
`pixels_of(data)` returns the number of pixels that decoding works on, by the header, or 0 if the
header cannot be read; such a file counts as small.
"""

import contextlib
import threading
from collections.abc import Iterator

from imaging.budget import LARGE_PIXELS
from imaging.decode import open_image, without_warnings, work_pixels

WAIT_S = 60.0
"""Seconds that an image waits for others before it is refused."""


class Busy(Exception):
    """Other images were being decoded for all of `WAIT_S`; the message says what to do."""


LOCKS = threading.Lock(), threading.Lock()
"""Locks of the process: one for small images, one for large ones."""


@contextlib.contextmanager
def decode_lock(data: bytes) -> Iterator[None]:
    """Wait until no other image of the same size class (small or large) is being decoded, and make
    others wait until the block ends. The largest image takes up to 5 GB and several seconds.

    Raises:
        Busy: the wait took longer than `WAIT_S`.
    """
    with hold(LOCKS[pixels_of(data) >= LARGE_PIXELS]):
        yield


@contextlib.contextmanager
def hold(lock: "threading.Lock | threading.RLock") -> Iterator[None]:
    """Hold a lock in the block.

    Raises:
        Busy: the wait took longer than `WAIT_S`.
    """
    if not lock.acquire(timeout=WAIT_S):
        raise Busy("the server is busy with other images; try this one again later")
    try:
        yield
    finally:
        lock.release()


def pixels_of(data: bytes) -> int:
    """Return the number of pixels that decoding works on, or 0 if the header cannot be read."""
    try:
        with without_warnings(), open_image(data) as image:
            return work_pixels(image, data)
    except Exception:  # hostile bytes cause any exception; decoding reports it
        return 0
