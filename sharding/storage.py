"""Where bytes lie: folders of this machine, or an address such as `s3://bucket/shards` (fsspec).

Everything here takes a `pathlib.Path` or a `UPath` and treats both alike.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from upath import UPath

AnyPath = Path | UPath


def any_path(text: str | os.PathLike) -> AnyPath:
    """A `Path` for a folder of this machine, a `UPath` for an address.

    Raises:
        ValueError: an address whose file system is not installed.
    """
    try:
        path = UPath(text)
        return Path(path) if isinstance(path, Path) else path
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{text}: {error}; for s3:// addresses install the extra `s3`, as `make setup` does"
        ) from error


def check_reachable(path: AnyPath) -> None:
    """Ask an address for anything at all, before work begins that needs it.

    Raises:
        OSError: no answer, or no right to one. The clients behind addresses raise errors of kinds
            of their own; here they become one.
    """
    if is_local(path):
        return
    try:
        path.exists()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"{path} does not answer: {reason}; check the address, your credentials for it and the "
            "network"
        ) from error


def is_local(path: AnyPath) -> bool:
    """Whether `path` is on this machine's file system."""
    return isinstance(path, Path)


def make_folder(path: AnyPath) -> None:
    """Make a folder and what is above it. Object stores have none, and a bucket that is not there
    was most likely misspelt: it is not made.
    """
    if is_local(path) or path.protocol not in ("s3", "s3a", "gs", "gcs", "abfs", "az"):
        path.mkdir(parents=True, exist_ok=True)


def write_atomically(path: AnyPath, write: Callable[[Path], object]) -> None:
    """`write(temporary file)`, then rename or upload: `path` is either absent, old or whole.

    The temporary name is this process's own, so two writers never write into one file.
    """
    if is_local(path):
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            write(partial)
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        partial = Path(folder) / path.name
        write(partial)
        # An object appears when its upload is complete, and not before.
        path.fs.put_file(str(partial), path.path)


def write_text(path: AnyPath, text: str) -> None:
    """`write_atomically` for a text."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def size_of(path: AnyPath) -> int | None:
    """Bytes of a file, or None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return None


def files_in(folder: AnyPath) -> list[AnyPath]:
    """The files directly in a folder, by name; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.is_file()), key=lambda p: p.name)


def sha256_of(path: AnyPath) -> str:
    """The hash of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
def _leased(path: AnyPath, busy: str) -> Iterator[None]:
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
