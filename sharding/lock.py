"""Lock the output folder of a build, so that only one process writes to it, and the sets that
a command reads, so that no build changes them meanwhile.

Main entry: `with locked(work, what):`, a context manager that yields nothing. Both arguments are a
`Path`, or a `UPath` for a folder in a bucket (s3://...).

- `work`: the folder for temporary files in the output, such as `OUT/.build`, which gets the lock
  file. On a local disk it must exist.
- `what`: the locked folder, such as `OUT`; it is only named in the error message.

It raises `BlockingIOError` if another process has the lock, and `OSError` if the lock file is a
link, cannot be created or, in a bucket, is not the JSON of a lock. On a local disk the lock ends
with the process (`locks.py`). In a bucket it is an object that is renewed while the process
lives, and expires `LEASE_SECONDS` after the last renewal. If a renewal fails, it is logged as a
warning and tried again. Of several processes that find an expired object, one gets the lock. What a
bucket cannot exclude:

- The age of the object is measured with the clocks of two machines, which must agree within a
  minute. An object from later than `LEASE_SECONDS` after now is refused.
- A process that is halted, or cut off from the bucket, for longer than `LEASE_SECONDS` may lose the
  lock and go on writing. It notices at its next renewal, logs a warning and leaves the object of
  the other process alone. If that process takes the lock in the middle of this renewal, its object
  may be overwritten.
- A process that is killed while it takes an expired lock leaves the object `takeover.json`. The
  error of the next build says when to remove it.

`with reading(*shard_sets):` is for a command that reads opened `ShardSet`s for long, and
`with changing(folder, names, writes=...):` for a build of the set in `folder` (`Path` or `UPath`).
They exclude each other if the build writes shards, or removes those that are not among `names`: the
second one raises `BlockingIOError`. Only sets on a local disk are locked (by `locks.py`, without a
file), and on a network disk perhaps only on one machine: readers notice also by themselves that a
set was built again (pipeline/read.py).
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from reprlib import repr as short
from typing import Any

from upath import UPath

import console
import locks
from sharding.format import ShardSet
from storage import AnyPath, is_local, parse_json

LEASE_SECONDS = 120
"""Seconds without renewal after which the lease of a build expires."""

LATEST = 1e11
"""Largest time in a lease, in the year 5138."""


@contextlib.contextmanager
def locked(work: AnyPath, what: AnyPath) -> Iterator[None]:
    """Lock `what` for one writer, with a lock file in `work`, until the block ends.

    A local lock also ends when the process is killed; a lease in a bucket then expires.

    Raises:
        OSError: another process has the lock, or the lock file is damaged or cannot be written.
    """
    busy = f"another build is writing {what}; wait for it to end"
    if not is_local(work):
        with _leased(work / "lock.json", busy):
            yield
        return
    with locks.locked(work / "lock", BlockingIOError(busy)):
        yield


@contextlib.contextmanager
def reading(*shard_sets: ShardSet) -> Iterator[None]:
    """Keep builds from changing the shards of these sets until the block ends.

    Raises:
        BlockingIOError: a build is changing them.
    """
    with contextlib.ExitStack() as held:
        for folder in dict.fromkeys(folder for each in shard_sets for folder in each.folders):
            if is_local(folder) and os.access(folder, os.R_OK):
                busy = BlockingIOError(f"a build is changing {folder}; wait for it to end")
                held.enter_context(locks.locked(folder, busy, shared=True, is_folder=True))
        yield


@contextlib.contextmanager
def changing(folder: AnyPath, names: Collection[str], *, writes: bool) -> Iterator[None]:
    """Lock a set until the block ends, for a build that `writes` shards, or removes shards that are
    not among `names`. A build that does neither needs no lock.

    Raises:
        BlockingIOError: another process reads the set.
    """
    removes = is_local(folder) and any(path.name not in names for path in folder.glob("*.tar"))
    if not (is_local(folder) and (writes or removes)):
        yield
        return
    busy = BlockingIOError(
        f"the shards of {folder} would change, and another process reads them (such as a "
        "training); wait for it to end, then run the command again"
    )
    with locks.locked(folder, busy, is_folder=True):
        yield


@contextlib.contextmanager
def _leased(path: UPath, busy: str) -> Iterator[None]:
    """Lock a bucket by an object that a thread renews, because buckets have no process locks."""
    token = uuid.uuid4().hex  # process numbers repeat in containers
    try:
        path.fs.pipe_file(path.path, _content(token), mode="create")
    except FileExistsError:
        _take_over(path, token, busy)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path.parent} cannot be written: {error}") from error
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, token, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _release(path, token)


def _content(token: str) -> bytes:
    owner = f"{socket.gethostname()}:{os.getpid()}"
    return json.dumps({"owner": owner, "token": token, "renewed": time.time()}).encode()


def _take_over(path: UPath, token: str, busy: str) -> None:
    """Replace an expired lease.

    Several processes may try this at once. Only the process that creates `takeover.json` continues.
    It reads the lease again, because another process may have just replaced the lease.

    Raises:
        OSError: the lease is not expired, is being replaced by another process, or is damaged.
    """
    claim = path.with_name("takeover.json")
    _refuse_unless_expired(path, busy)
    try:
        path.fs.pipe_file(claim.path, _content(token), mode="create")
    except FileExistsError:
        raise BlockingIOError(f"{busy} (if no build is running, remove {claim})") from None
    try:
        _refuse_unless_expired(path, busy)
        path.fs.pipe_file(path.path, _content(token))
    finally:
        claim.unlink(missing_ok=True)


def _refuse_unless_expired(path: UPath, busy: str) -> None:
    lease = _read(path)
    if lease is None:
        raise BlockingIOError(f"{busy} (it has just ended; run the command again)")
    age = time.time() - lease["renewed"]
    if age < -LEASE_SECONDS:  # it would not expire before that time
        raise OSError(
            f"{path} of {lease['owner']} was renewed {-age:,.0f} s after now; if no build is "
            "running, remove it, else correct the clock of that machine or of this one"
        )
    if age < LEASE_SECONDS:
        raise BlockingIOError(f"{busy} (held by {lease['owner']}, renewed {age:.0f} s ago)")


def _read(path: UPath) -> dict[str, Any] | None:
    """Return the content of a lease, or None if there is none.

    Raises:
        OSError: the object is damaged or cannot be read.
    """
    try:
        # Not `open`, which may use an old size of the object from a cached listing.
        lease = parse_json(path.fs.cat_file(path.path))
        renewed = lease["renewed"]
        if type(renewed) not in (int, float) or not 0 <= renewed <= LATEST:  # NaN is neither
            raise ValueError(f"renewed is {short(renewed)}, expected seconds since 1970")
        return {"token": "", **lease, "owner": str(lease["owner"])[:100]}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path} is damaged ({error!r}); remove it if no build is running") from error


def _is_ours(path: UPath, token: str) -> bool:
    lease = _read(path)
    return lease is not None and lease["token"] == token


def _renew(path: UPath, token: str, ended: threading.Event) -> None:
    """Renew the lease until the block ends. After a failure, try again at the next interval."""
    failed = False
    while not ended.wait(LEASE_SECONDS / 4):
        try:
            if not _is_ours(path, token):
                console.log.warning(
                    "%s is no longer the lock of this build, so another build may write to the "
                    "same folder; check it with `python -m sharding verify`", path,
                )  # fmt: skip
                return
            path.fs.pipe_file(path.path, _content(token))
            failed = False
        except Exception as error:  # clients of stores raise any exception
            if not failed:
                console.log.warning(
                    "%s could not be renewed (%s) and is tried again; %s seconds after the last "
                    "renewal another build can take the lock", path, error, LEASE_SECONDS,
                )  # fmt: skip
            failed = True


def _release(path: UPath, token: str) -> None:
    """Remove the lease, unless it is that of another process."""
    try:
        if _is_ours(path, token):
            path.unlink(missing_ok=True)
    except Exception as error:  # only a warning: the lease expires by itself
        console.log.warning(
            "%s could not be removed (%s); the next build can start in %s seconds",
            path, error, LEASE_SECONDS,
        )  # fmt: skip
