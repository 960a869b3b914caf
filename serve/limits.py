"""Define the limits of the HTTP API and the error of a refused request.

Main entries: `Limits(...)`, a frozen dataclass. All fields may be left out (the defaults are in
parentheses) and are not checked:

- `max_bytes`: bytes of the body of one request (50 MB).
- `max_files`: images in one request (64).
- `queue`: images of all requests that wait or are scored (256).
- `held_bytes`: bytes of the bodies of all requests in memory (1024 MB).
- `timeout_s`: seconds until a request is answered (60.0).
- `batch_size`: the largest number of images that are scored at once (32).
- `allow_urls`: whether images are downloaded from URLs of public hosts (False).
- `allow_private_urls`: with `allow_urls`, whether the hosts may be private (False).

`Refused(status, detail, retry_after)` is an exception with an HTTP status (such as 413), one
sentence for the client, and the seconds after which to try again, an integer (0, the default:
trying again cannot help). `MB` is 2**20 bytes, and `MAX_JSON_BYTES` the largest body with a list of
addresses, which `max_bytes` cannot raise.
"""

from dataclasses import dataclass

MB = 2**20
MAX_JSON_BYTES = MB // 4
"""Largest body of a request with a list of addresses."""


@dataclass(frozen=True)
class Limits:
    """Limits of one request, and of all requests together.

    One request: `max_bytes` bytes of body, `max_files` images, and an answer within `timeout_s`
    seconds. All requests: `queue` images that wait or are scored, and `held_bytes` bytes of bodies
    in memory. `batch_size` is the largest number of images per batch. `allow_urls` accepts URLs
    of public hosts, `allow_private_urls` also URLs of private hosts.
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
    """Error for a request that is refused: an HTTP `status` and one sentence, `detail`.

    `retry_after` is the number of seconds after which to try again; 0 if trying again cannot help.
    """

    def __init__(self, status: int, detail: str, retry_after: int = 0):
        super().__init__(detail)
        self.status, self.detail, self.retry_after = status, detail, retry_after
