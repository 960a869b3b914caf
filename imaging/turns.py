"""Take turns: one small image and one large one at a time, whoever sent them."""

import contextlib
import io
import threading
from collections.abc import Iterator

from PIL import Image

from imaging.decode import READABLE, without_warnings

LARGE_PIXELS = 2**25
"""From here on an image waits for other large ones, and no small one waits for it."""

WAIT_S = 60.0
"""How long an image waits for others before the page says that it could not be looked at."""


class Busy(Exception):
    """Others were looked at for all of `WAIT_S`."""


LANES = threading.Lock(), threading.Lock()
"""Locks of the process: for small images and for large ones."""


@contextlib.contextmanager
def turn(data: bytes) -> Iterator[None]:
    """One small image and one large one at a time, whoever sent them: the largest takes 2.8 GB and
    seconds, which nobody else's small one is to wait for.

    Raises:
        Busy: the turn did not come.
    """
    lane = LANES[pixels_of(data) >= LARGE_PIXELS]
    if not lane.acquire(timeout=WAIT_S):
        raise Busy("the server is busy with other images; try this one again later")
    try:
        yield
    finally:
        lane.release()


def pixels_of(data: bytes) -> int:
    """How many pixels the header of an image promises; 0 where it cannot be read."""
    try:
        with without_warnings(), Image.open(io.BytesIO(data), formats=READABLE) as image:
            return image.width * image.height
    except Exception:  # whatever hostile bytes make a parser raise; decoding says what is wrong
        return 0
