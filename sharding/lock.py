"""Lock the output folder of a build, so that only one process writes to it.

Main entry: `with locked(work, what):`, a context manager that yields nothing. Both arguments are a
`Path`, or a `UPath` for a folder in a bucket (s3://...).

- `work`: the folder for temporary files in the output, such as `OUT/.build`, which gets the lock
  file. On a local disk it must exist.
- `what`: the locked folder, such as `OUT`; it is only named in the error message.

It raises `BlockingIOError` if another process has the lock, and `OSError` if the lock file cannot
be written. On a local disk the lock is `flock` and ends with the process. In a bucket it is an
object that is renewed while the process lives, and expires `LEASE_SECONDS` after the last renewal.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator

from upath import UPath

from storage import AnyPath, is_local

LEASE_SECONDS = 120
"""Seconds without renewal after which the lease of a build expires."""


@contextlib.contextmanager
def locked(work: AnyPath, what: AnyPath) -> Iterator[None]:
    """Lock `what` for one writer, with a lock file in `work`, until the block ends.

    A local lock also ends when the process is killed; a lease in a bucket then expires.

    Raises:
        OSError: another process has the lock.
    """
    busy = f"another build is writing {what}; wait for it to end"
    if not is_local(work):
        with _leased(work / "lock.json", busy):
            yield
        return
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(busy) from None
        yield


@contextlib.contextmanager
def _leased(path: UPath, busy: str) -> Iterator[None]:
    """Lock a bucket by an object that a thread renews, because buckets have no process locks."""
    owner = f"{socket.gethostname()}:{os.getpid()}"

    def content() -> bytes:
        return json.dumps({"owner": owner, "renewed": time.time()}).encode()

    try:
        path.fs.pipe_file(path.path, content(), mode="create")
    except FileExistsError:
        holder = json.loads(path.read_bytes())
        age = time.time() - holder["renewed"]
        if age < LEASE_SECONDS:
            held = f"held by {holder['owner']}, renewed {age:.0f} s ago"
            raise BlockingIOError(f"{busy} ({held})") from None
        path.write_bytes(content())  # expired: its process has died
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path.parent} cannot be written: {error}") from error
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(LEASE_SECONDS / 4):
            path.write_bytes(content())

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)
