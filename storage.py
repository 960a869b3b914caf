"""Read and write files and folders, on this machine or at an address such as `s3://bucket/shards`.

Functions take an `AnyPath` where nothing else is said: a `pathlib.Path` of this machine, or a
`UPath` (fsspec) for an address. Main entries:

- `any_path(text)` returns an `AnyPath` for a text (a `Path` for `file://`). It refuses an empty
  text, a zero byte, an address without bucket or host, and one whose file system is not installed.
  `local_path(text)` returns a `Path`; it also refuses addresses, except `file://`. Both raise
  `ValueError` for what they refuse.
- `write_atomically(path, write)` writes a file, whose folder must exist (except in an object
  store). It calls `write(partial)` with the `Path` of a temporary file, which `write` fills, then
  renames or uploads the file, so that `path` is missing, old or complete, never partial. It raises
  `OSError` if writing fails (for an address, any error of its client becomes an `OSError`). An
  error of `write` itself is passed on.
- `write_text(path, text)` and `write_bytes(path, data)` write a whole file in this way.
- `atomic_folder(path, *, replace=False)` is a context manager for a `Path`: it yields a temporary
  folder to fill, and publishes it as `path` if the block ends without an error.
- `publish(partial, path, *, replace=False)` takes two `Path`s. It syncs the file or folder
  `partial` to the disk and renames it to `path`. A file replaces an older file, and a folder an
  empty one, or with `replace` any other, which has the name `<name>.old.<number>.partial` while it
  is removed. Without `replace`, a folder with files is kept, and `OSError` is raised.
- `temporary_folder(path)` is a context manager for a `Path`: it yields a folder next to `path` and
  removes it at the end. First it removes those that killed processes left, or renames an `.old.`
  one to `path`. It and `atomic_folder()` raise `BlockingIOError` if another process writes `path`.

`partial_of(path)` takes a `Path` and returns a temporary path, another one at each call.
`whole_name(name)` is the reverse: the final name, or None if `name` is not a temporary one.
`file_name(stem, suffix)` joins both texts to a file name, cut if it is too long. `naming(path)` is
a context manager that names the path in errors of a full disk or a temporary file.
`check_reachable(path)` raises `OSError` if an address does not answer. `remote_errors(path, fault)`
is a context manager that raises `OSError` for errors of an address's client. `check_inside(path,
folder)` raises `ValueError` if the path is outside the folder. `read_plain(path, most)` returns the
bytes of a whole file, `read_text(path, most)` its UTF-8 text. Both raise `RefusedFileError` (an
`OSError`) for pipes, devices and more than `most` bytes. `open_plain(path)` is a context manager
that opens a file, but no pipe and no device. `size_of(path)` returns bytes, or None if there is no
file. `parse_json(text)` returns the value of a JSON text; it raises `ValueError`, also for one that
is nested too deeply. `cache_folder()` returns the folder for downloaded weights (`ValueError`:
none). `make_socket_folder()` prepares this process for starting others.
"""

import contextlib
import errno
import hashlib
import io
import json
import multiprocessing.util
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
from upath import UPath

from escape import reason_of, too_many_files, typed_reason_of
from installed import why_not_imported
from locks import locked
from web_addresses import proxy_fault, web_path

if TYPE_CHECKING:
    from typing_extensions import TypeIs  # typing has it from Python 3.13 on

AnyPath = Path | UPath

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # a single letter is a drive of Windows
READ_ONLY = ("http", "https")  # protocols of addresses to which nothing can be written
_OF_THIS_MACHINE = ("", "file", "local")


def any_path(text: str | os.PathLike | UPath) -> AnyPath:
    """Convert a text to a `Path` (this machine) or a `UPath` (an address such as s3://...). A
    `UPath` of an address keeps its options. A web address is prepared by `web_path`.

    Raises:
        ValueError: an empty text, a zero byte, an address of an unknown kind, without bucket or
            host, with a query (`?`), or one whose library or proxy cannot be used.
    """
    if not str(text).strip():
        raise ValueError("an empty path; name a file or folder, or . for this folder")
    if "\0" in str(text):
        raise ValueError("a path contains a zero byte, which no file system allows")
    if ":" not in str(text):
        return Path(str(text))
    scheme, _, rest = str(text).partition(":")
    if not isinstance(text, UPath) and _ADDRESS.match(str(text)):
        text = f"{scheme.lower()}:{rest}"
    expected = "expected an address like s3://bucket/folder, or a path on this machine"
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+:/*", str(text)) or (
        scheme.lower() in READ_ONLY and not re.match("//[^/]", rest)
    ):
        raise ValueError(f"{text} names no bucket or host; {expected}")
    try:
        path = UPath(text)
        if path.protocol in _OF_THIS_MACHINE:
            return Path(path.path)
        fsspec.get_filesystem_class(path.protocol)
    except ImportError as error:
        cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        how = f" a library: {error}"  # "Please install gcsfs to access ..."
        if scheme.lower() in ("s3", "s3a"):
            how = f" the library s3fs; {why_not_imported(cause, 's3')}"
        raise ValueError(f"{text} needs{how}") from error
    except ValueError as error:
        is_known = scheme.lower() in fsspec.available_protocols()
        fault = "names no bucket or host" if is_known else "is of no known kind of address"
        raise ValueError(f"{text} {fault}; {expected}") from error
    return web_path(path) if path.protocol in READ_ONLY else path


def local_path(text: str | os.PathLike) -> Path:
    """Convert a text to a `Path` of this machine.

    Raises:
        ValueError: an address, or an empty text.
    """
    is_address = _ADDRESS.match(str(text)) and not str(text).startswith("file://")
    path = None if is_address else any_path(text)
    if path is None or not is_local(path):
        raise ValueError(f"{text} is an address; expected a path on this machine")
    return path


def check_reachable(path: AnyPath) -> None:
    """Check that an address answers, before work begins that needs it. Does nothing for a `Path`.

    Raises:
        OSError: no answer, or (except for http) no permission. Every error type of the fsspec
            clients is converted to OSError.
    """
    if is_local(path):
        return
    is_http = path.protocol in READ_ONLY
    try:
        if path.exists():
            return
        # `exists` of some clients is False also without an answer of the server; these requests
        # raise an error then. `info` of HTTP clients hides the reason.
        if is_http:
            path.fs.cat_file(path.path, 0, 1)
        else:
            path.fs.info(path.path)
    except FileNotFoundError:
        return
    except Exception as error:
        # An HTTP server that answers with an error may still have files: many refuse to list.
        if not (is_http and getattr(error, "status", None)):
            raise OSError(remote_fault(path, "does not answer", error)) from error


@contextlib.contextmanager
def remote_errors(path: AnyPath, fault: str) -> Iterator[None]:
    """Raise OSError (`path`, `fault` such as "could not be read", the reason) for any error of an
    address's client: some are no OSErrors (HTTP, botocore), or only name it. ValueError passes.
    """
    try:
        yield
    except Exception as error:
        if is_local(path) or isinstance(error, ValueError):
            raise
        raise OSError(remote_fault(path, fault, error)) from error


def remote_fault(path: AnyPath, fault: str, error: BaseException) -> str:
    """Return the line for an error of an address's client: what failed, why, and what to check."""
    # For a missing file, fsspec raises an error with the address from one with the reason.
    missing = isinstance(error, FileNotFoundError)
    reason = reason_of(error.__cause__ or error if missing else error)
    if advice := too_many_files(error) or proxy_fault(typed_reason_of(error)):
        return f"{path} {fault}: {advice}"
    is_proxied = not is_local(path) and "proxy" in path.storage_options
    network = ", the network and its proxy" if is_proxied else " and the network"
    return f"{path} {fault}: {reason}; check the address, your credentials for it{network}"


def is_local(path: AnyPath) -> "TypeIs[Path]":
    """Return whether `path` is on the file system of this machine."""
    return isinstance(path, Path)


def check_inside(path: AnyPath, folder: AnyPath) -> None:
    """Check that `path` is inside `folder` after links are resolved.

    Raises:
        ValueError: `path` is outside `folder`.
    """
    if is_local(path) and is_local(folder):
        inside = path.resolve().is_relative_to(folder.resolve())
    elif is_local(path) or is_local(folder):
        inside = False
    else:
        inside = path.path.startswith(folder.path.rstrip("/") + "/") and ".." not in path.parts
    if not inside:
        raise ValueError(f"{path} is outside of {folder}; nothing was written or removed")


def make_folder(path: AnyPath) -> None:
    """Create a folder and its parents; not on an object store, whose bucket may be misspelled."""
    if is_local(path) or path.protocol not in ("s3", "s3a", "gs", "gcs", "abfs", "az"):
        path.mkdir(parents=True, exist_ok=True)


def partial_of(path: Path) -> Path:
    """Return a temporary name for one writer of `path`. It is random: containers share ids."""
    return path.with_name(f"{path.name}.{int.from_bytes(os.urandom(6))}.partial")


def is_partial(path: Path) -> bool:
    """Return whether `path` is the temporary name of a file or folder."""
    return path.name.endswith(".partial")


_TEMPORARY = re.compile(r"(.+)\.\d+\.partial", re.DOTALL)


def whole_name(name: str, *, is_folder: bool = False) -> str | None:
    """Return the name that the file or folder with the temporary name `name` gets or had, or None
    if `name` is not temporary: `a` for `a.123.partial`, and for a folder `a.old.123.partial`.
    """
    match = _TEMPORARY.fullmatch(name)
    if match is None:
        return None
    return match[1].removesuffix(".old") if is_folder else match[1]


def remove_leftovers(folder: Path, unchanged_s: float = 3600) -> None:
    """Remove temporary files in `folder` that killed processes left: those that have not changed
    for `unchanged_s` seconds. Another process may be writing a younger one.
    """
    for left in folder.glob("*.partial"):
        with contextlib.suppress(FileNotFoundError, PermissionError):  # may be of another user
            is_temporary = whole_name(left.name) is not None
            if is_temporary and time.time() - left.stat().st_mtime > unchanged_s:
                left.unlink()


MAX_NAME_BYTES = 255 - len(f".{2**48}.partial")
"""Longest file name in bytes: 255, the limit of usual file systems, less the temporary suffix."""


def file_name(stem: str, suffix: str) -> str:
    """Join `stem` and `suffix` to a file name of at most `MAX_NAME_BYTES` bytes. A `stem` that is
    too long is cut, and a hash is added.
    """
    encoded = os.fsencode(stem + suffix)
    if len(encoded) <= MAX_NAME_BYTES:
        return stem + suffix
    end = f"-{hashlib.sha256(encoded).hexdigest()[:16]}{suffix}"
    return encoded[: MAX_NAME_BYTES - len(end)].decode("utf-8", "ignore") + end


def write_atomically(path: AnyPath, write: Callable[[Path], object]) -> None:
    """Call `write(temporary file)`, then rename the file to `path`, or upload it.

    After any failure, a power cut included, `path` is missing, old or complete, but never partial.
    Its mode follows the umask.

    Raises:
        OSError: from `write`, or an upload failed.
    """
    if not is_local(path):
        with naming(path), tempfile.TemporaryDirectory() as folder:
            partial = Path(folder) / path.name
            write(partial)
            # An object store shows an object only when its upload is complete.
            with remote_errors(path, "could not be written"):
                path.fs.put_file(str(partial), path.path)
        return
    partial = partial_of(path)
    try:
        with naming(path):
            partial.write_bytes(b"")
            mode = partial.stat().st_mode
            write(partial)
            partial.chmod(mode)  # some libraries write files that only their owner may read
            publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: AnyPath) -> Iterator[None]:
    """Put the name `path` into errors of a full disk, which have none, and of a temporary file."""
    try:
        yield
    except OSError as error:
        full = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and not str(error.filename).endswith(".partial"):
            raise
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def write_bytes(path: AnyPath, data: bytes) -> None:
    """Write bytes to a file by `write_atomically`."""
    write_atomically(path, lambda partial: partial.write_bytes(data))


def write_text(path: AnyPath, text: str) -> None:
    """Write text to a UTF-8 file by `write_atomically`."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Create a temporary folder next to `path`, lock `path`, and remove the folder at the end.
    Temporary folders that killed processes left for `path` are removed first. An old folder that
    such a process had renamed away, and not replaced, gets its name back.

    Raises:
        BlockingIOError: another process is writing `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    busy = BlockingIOError(f"another process is writing {path}; wait for it to end")
    with locked(path.with_name(f".{path.name}.lock"), busy, remove=True):
        own = re.compile(rf"{re.escape(path.name)}\.(old\.)?\d+\.partial")
        for folder in path.parent.glob("*.partial"):
            if not (match := own.fullmatch(folder.name)):
                continue
            if match[1] and not path.exists():  # killed between two renames in `publish`
                folder.rename(path)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        partial = partial_of(path)
        try:
            partial.mkdir()
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill, and rename it to `path` if the block ends without an error.
    `path` is missing, old or complete, but never partial. File modes follow the umask. With
    `replace`, an existing folder at `path` is renamed away just before, and removed at the end.
    """
    with temporary_folder(path) as partial:
        mode = partial.stat().st_mode & 0o666
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        publish(partial, path, replace=replace)


def publish(partial: Path, path: Path, *, replace: bool = False) -> None:
    """Sync a complete file or folder to the disk, then rename it to `path`. A file replaces an
    older file. A folder replaces an empty folder, or with `replace` any folder.
    """
    if partial.is_dir():
        for folder, _folders, files in os.walk(partial, topdown=False):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
    else:
        _sync(partial)
    old = partial_of(path.with_name(f"{path.name}.old"))
    if replace and partial.is_dir() and path.is_dir():
        path.rename(old)
    partial.replace(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Call fsync on a file, or on a folder to make its entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not support fsync on folders and do not need it.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


MAX_FILE_BYTES, MAX_TABLE_BYTES = 256 * 2**20, 16 * 2**30
"""Bytes of the largest file that is read whole: of text (an index, a catalog), of parquet."""


class RefusedFileError(OSError):
    """A file that is not read: it is no plain file, or too large."""


@contextlib.contextmanager
def open_plain(path: Path | str) -> Iterator[io.FileIO]:
    """Open a file of this machine for reading, unbuffered.

    Raises:
        RefusedFileError: a pipe, a device or the like; reading it may wait forever or never end.
        OSError: the file cannot be opened, or is a folder.
    """
    # Without O_NONBLOCK, opening a pipe waits for a writer. Regular files ignore the flag.
    extra = getattr(os, "O_NONBLOCK", 0)
    with io.FileIO(str(path), opener=lambda name, flags: os.open(name, flags | extra)) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):  # opening a folder raises
            reason = "not a plain file, but a pipe, a device or the like"
            raise RefusedFileError(errno.EINVAL, reason, str(path))
        yield stream


def read_plain(path: AnyPath | str, most: int = MAX_FILE_BYTES) -> bytes:
    """Read a whole plain file, or the file at an address, even if it grows. Use this in place of
    `read_bytes` for a file that may be a stranger's.

    Raises:
        RefusedFileError: no plain file, or more than `most` bytes.
        OSError: the file cannot be read.
    """
    remote = None if isinstance(path, str) or is_local(path) else path
    pieces, left = [], most + 1
    with remote.open("rb") if remote else open_plain(str(path)) as stream:
        size = most if remote else os.fstat(stream.fileno()).st_size
        while left and size <= most and (piece := stream.read(min(left, max(size, 65_536)))):
            pieces.append(piece)
            left -= len(piece)
    if (count := max(size, most + 1 - left)) > most:
        reason = f"{count:,} bytes, more than the limit of {most:,}"
        raise RefusedFileError(errno.EINVAL, reason, str(path))
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_text(path: AnyPath, most: int = MAX_FILE_BYTES) -> str:
    """Read a UTF-8 text file by `read_plain`. Other bytes raise `UnicodeDecodeError`."""
    return read_plain(path, most).decode("utf-8")


def size_of(path: AnyPath) -> int | None:
    """Return the size of a file in bytes, or None if it does not exist."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return None


def sha256_of(path: AnyPath) -> str:
    """Return the SHA-256 of a file as 64 hex digits, read in pieces. It raises as `open_plain`."""
    with open_plain(path) if is_local(path) else path.open("rb") as stream:
        # Streams of fsspec have `readinto`, but the type BinaryIO does not declare it.
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def parse_json(text: str | bytes, *, strict: bool = True) -> Any:
    """Return the value of a JSON text, which may come from a stranger.

    `strict=False` allows control characters in strings. Use this in place of `json.loads`, which
    ends a deeply nested text with RecursionError, and reads numbers that no float can hold.

    Raises:
        ValueError: no JSON, not UTF-8, nested too deeply, or a whole number of over 300 digits.
    """
    try:
        return json.loads(text, strict=strict, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _whole(digits: str) -> int:
    if len(digits) > 300:
        raise ValueError("a number in it has more than 300 digits")
    return int(digits)


OWN_CACHE = "Set DETECTOR_CACHE to a folder of yours"
"""Advice to a user who may not read `cache_folder()`."""


def cache_folder() -> Path:
    """Return the folder for fetched backbones: `DETECTOR_CACHE`, or `ai-images-detector/backbones`
    in the user's cache folder (XDG_CACHE_HOME or ~/.cache).

    Raises:
        ValueError: this user has no home folder, or `DETECTOR_CACHE` is an address.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        if own := os.environ.get("DETECTOR_CACHE"):
            return local_path(own).expanduser()
        return Path(caches).expanduser() / "ai-images-detector" / "backbones"
    except ValueError as error:
        raise ValueError(f"DETECTOR_CACHE: {error}") from error
    except RuntimeError as error:
        raise ValueError("this user has no home folder; set DETECTOR_CACHE to a folder") from error


def make_socket_folder() -> None:
    """Create the folder in which multiprocessing makes sockets in this process and in those that it
    starts: in /tmp if TMPDIR is too long. The name of a socket has at most 103 bytes (macOS).
    """
    before = tempfile.gettempdir()
    if os.name == "posix" and len(os.fsencode(before)) + len("/pymp-/listener-") + 2 * 8 > 103:
        tempfile.tempdir = "/tmp"
    try:
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = before
