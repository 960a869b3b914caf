"""Where bytes lie: folders of this machine, or an address such as `s3://bucket/shards` (fsspec).

Everything here takes a `pathlib.Path` or a `UPath` and treats both alike.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from upath import UPath

from installed import install_extra

if TYPE_CHECKING:
    from typing_extensions import TypeIs  # typing has it from Python 3.13 on

AnyPath = Path | UPath


_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
_READ_ONLY = ("http", "https")
_OF_THIS_MACHINE = ("", "file", "local")


def any_path(text: str | os.PathLike) -> AnyPath:
    """A `Path` for a folder of this machine, a `UPath` for an address.

    Raises:
        ValueError: an empty text, an address of nothing, or one whose file system is not installed.
    """
    if not str(text).strip():
        raise ValueError("an empty path; name a file or folder, or . for this folder")
    if "\0" in str(text):
        raise ValueError("a path with a zero byte, which no file system has")
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:/*", str(text)):
        raise ValueError(f"{text} names no bucket or host; expected such as s3://bucket/folder")
    if ":" not in str(text):
        return Path(text)
    try:
        path = UPath(text)
        return Path(path.path) if path.protocol in _OF_THIS_MACHINE else path
    except (ImportError, ValueError) as error:
        raise ValueError(f"{text}: {error}; for s3:// addresses {install_extra('s3')}") from error


def local_path(text: str | os.PathLike) -> Path:
    """A `Path` of this machine, where an address would be of no use.

    Raises:
        ValueError: an address, or an empty text.
    """
    is_address = _ADDRESS.match(str(text)) and not str(text).startswith("file://")
    path = None if is_address else any_path(text)
    if path is None or not is_local(path):
        raise ValueError(f"{text} is an address; this takes a path of this machine only")
    return path


def writable_path(text: str | os.PathLike) -> AnyPath:
    """As `any_path`, for what is to be written.

    Raises:
        ValueError: also an address that can only be read.
    """
    scheme = _ADDRESS.match(str(text))
    if scheme and scheme[1].lower() in _READ_ONLY:
        raise ValueError(f"{text} can only be read; write to a folder or to s3://bucket/folder")
    return any_path(text)


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


def is_local(path: AnyPath) -> "TypeIs[Path]":
    """Whether `path` is on this machine's file system."""
    return isinstance(path, Path)


def check_inside(path: AnyPath, folder: AnyPath) -> None:
    """Check that what is written to `path` lies below `folder`, links followed.

    Raises:
        ValueError: it does not.
    """
    if is_local(path) and is_local(folder):
        inside = path.resolve().is_relative_to(folder.resolve())
    elif is_local(path) or is_local(folder):
        inside = False
    else:
        inside = path.path.startswith(folder.path.rstrip("/") + "/") and ".." not in path.parts
    if not inside:
        raise ValueError(f"{path} leads out of {folder}; nothing is written or removed there")


def make_folder(path: AnyPath) -> None:
    """Make a folder and what is above it. Object stores have none, and a bucket that is not there
    was most likely misspelled: it is not made.
    """
    if is_local(path) or path.protocol not in ("s3", "s3a", "gs", "gcs", "abfs", "az"):
        path.mkdir(parents=True, exist_ok=True)


def partial_of(path: Path) -> Path:
    """The name of a file or folder while this process writes it: two writers never share one."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def is_partial(path: Path) -> bool:
    """Whether this is the temporary name of a file or folder."""
    return path.name.endswith(".partial")


MAX_NAME_BYTES = 255 - len(".4194304.partial")
"""The longest name that the usual file systems take, with room for that of a temporary file."""


def file_name(stem: str, suffix: str) -> str:
    """`stem` and `suffix` as the name of a file; where that is too long for one, the beginning of
    `stem` and a hash.
    """
    encoded = os.fsencode(stem + suffix)
    if len(encoded) <= MAX_NAME_BYTES:
        return stem + suffix
    end = f"-{hashlib.sha256(encoded).hexdigest()[:16]}{suffix}"
    return encoded[: MAX_NAME_BYTES - len(end)].decode("utf-8", "ignore") + end


def write_atomically(path: AnyPath, write: Callable[[Path], object]) -> None:
    """Call `write(temporary file)`, then rename or upload it: `path` is absent, old or whole,
    whatever fails and whenever the power does. Its mode follows the umask.

    Raises:
        OSError: as `write` does; where there is no room the message names `path`.
    """
    with naming(path):
        _write_atomically(path, write)


@contextlib.contextmanager
def naming(path: AnyPath) -> Iterator[None]:
    """Put the name of the file into errors of a full disk, which come without one."""
    try:
        yield
    except OSError as error:
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if error.errno not in full or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def _write_atomically(path: AnyPath, write: Callable[[Path], object]) -> None:
    if not is_local(path):
        with tempfile.TemporaryDirectory() as folder:
            partial = Path(folder) / path.name
            write(partial)
            # An object appears when its upload is complete, and not before.
            path.fs.put_file(str(partial), path.path)
        return
    partial = partial_of(path)
    try:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)  # some libraries write files that only their owner may read
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: AnyPath, data: bytes) -> None:
    """Write a file of these bytes by `write_atomically`."""
    write_atomically(path, lambda partial: partial.write_bytes(data))


def write_text(path: AnyPath, text: str) -> None:
    """Write a UTF-8 file of this text by `write_atomically`."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that is gone when the block ends, and with it what killed processes
    left of theirs: `path` has one writer at a time.
    """
    partial = partial_of(path)
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder to fill, which is renamed to `path` when the block ends well: `path` is
    absent, old or whole. Modes follow the umask. With `replace` an old folder makes way for it.
    """
    with temporary_folder(path) as partial:
        mode = partial.stat().st_mode & 0o666
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        publish(partial, path, replace=replace)


def publish(partial: Path, path: Path, *, replace: bool = False) -> None:
    """Give a complete file or folder its name, once its bytes are on the disk. A file takes the
    place of an older one; a folder that of an empty one, or with `replace` of any.
    """
    if partial.is_dir():
        for folder, _folders, files in os.walk(partial, topdown=False):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
        if replace:
            shutil.rmtree(path, ignore_errors=True)
    else:
        _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Have the disk keep a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems keep the names in a folder by themselves.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


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
        # What fsspec opens has `readinto`, which BinaryIO does not promise.
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def text_fault(error: ValueError) -> str:
    """What is wrong with a text or JSON file, by the error of reading it: a byte, or a place."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is {error.object[error.start]:#04x}, which is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        place = f"{error.msg} in line {error.lineno}, column {error.colno}"
        return place if error.doc.strip() else "it is empty"
    return " ".join(str(error).split())[:200] or type(error).__name__


CACHE_VARIABLE = "DETECTOR_CACHE"


def cache_folder() -> Path:
    """The folder of what was fetched for detectors on this machine: `DETECTOR_CACHE`, or
    `ai-images-detector/backbones` in the user's folder of caches.
    """
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "ai-images-detector" / "backbones"


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
