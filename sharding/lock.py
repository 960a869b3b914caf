"""The lock of a build, by which one process writes a set: `flock` here, a lease in a bucket."""

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
"""How long a lock on a bucket holds after its builder last renewed it."""


@contextlib.contextmanager
def locked(work: AnyPath, what: AnyPath) -> Iterator[None]:
    """Hold `what` for one writer by a lock in `work`; it goes with the process, however it ends.

    Raises:
        OSError: another process holds it.
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
    """A bucket has no locks that die with their holder: an object, renewed while the build runs."""
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
        path.write_bytes(content())  # its builder has died
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
