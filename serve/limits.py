"""What the HTTP API takes at most."""

from dataclasses import dataclass

MB = 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds of one request, and of all that wait together.

    `max_bytes` is the body of one request, `max_files` the images in it; `queue` is how many images
    may wait or be looked at, of all requests; `held_bytes` the bodies that are in memory. A request
    has an answer after `timeout_s` seconds. `batch_size` images are scored at a time.
    """

    max_bytes: int = 50 * MB
    max_files: int = 64
    queue: int = 256
    held_bytes: int = 1024 * MB
    timeout_s: float = 60.0
    batch_size: int = 32
    allow_urls: bool = False
    allow_private_urls: bool = False


class Refused(Exception):
    """A request that is not answered with scores: an HTTP `status`, and one sentence.

    `retry_after` is in how many seconds to try again; 0 where that would not help.
    """

    def __init__(self, status: int, detail: str, retry_after: int = 0):
        super().__init__(detail)
        self.status, self.detail, self.retry_after = status, detail, retry_after
