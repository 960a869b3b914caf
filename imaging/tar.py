"""Members of tar archives, one after another and without unpacking; only what was asked for is
kept in memory. Plain tars are read where a member lies, from any thread; compressed ones can only
be read from front to end, so their members come with their bytes.
"""

import lzma
import os
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from imaging.decode import MAX_BYTES, DecodeError
from imaging.zip import leaves_archive

WAITING_BYTES = 256 * 2**20
"""Bytes of a compressed archive's members that may wait to be read."""


class TarMember(NamedTuple):
    """A member that may be read. Either `excluded` says why it is not, or `read` gives its bytes
    (or raises `DecodeError` or `OSError`).
    """

    name: str
    excluded: str
    read: Callable[[], bytes] | None


class _Info(tarfile.TarInfo):
    """tarfile takes a damaged header for the end; here the archive remembers that it was none."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Info":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            archive.damage = str(error) or type(error).__name__
            raise


def is_compressed(path: Path) -> bool:
    """Whether a tar can only be read from front to end, by its first bytes."""
    with path.open("rb") as stream:
        start = stream.read(6)
    return start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"))


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[TarMember]:
    """The files of an archive whose names are `wanted`, in the order of the archive; what it should
    not hold (links, devices, paths that leave it, too large files) comes refused.

    Raises:
        DecodeError: the archive is damaged, cut off, or no tar; what came before is good.
        OSError: it cannot be read.
    """
    packed = is_compressed(path)
    waiting = _Waiting()
    try:
        with tarfile.open(path, "r|*" if packed else "r:", tarinfo=_Info) as archive:
            archive.damage = ""
            while (member := archive.next()) is not None:
                archive.members = []  # it would keep every header it has seen
                if member.isdir() or not wanted(member.name):
                    continue
                excluded = _refuse(member)
                if excluded:
                    yield TarMember(member.name, excluded, None)
                    if packed and member.size > MAX_BYTES:
                        raise DecodeError("the members after it are out of reach; unpack it")
                elif packed:
                    data = archive.extractfile(member).read()
                    yield TarMember(member.name, "", waiting.put(data))
                else:
                    yield TarMember(member.name, "", _Place(path, member.offset_data, member.size))
            if archive.damage:
                raise DecodeError(f"damaged or cut off: {archive.damage}; members may be missing")
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DecodeError(f"damaged or cut off: {error}; members may be missing") from error


def _refuse(member: tarfile.TarInfo) -> str:
    if leaves_archive(member.name):
        return "a path that leaves the archive"
    if member.issym() or member.islnk():
        return "a link, which is not followed"
    if not member.isreg() or member.issparse():
        return "no plain file"
    if member.size > MAX_BYTES:
        return f"{member.size:,} bytes, more than the limit of {MAX_BYTES:,}"
    return ""


class _Place(NamedTuple):
    """Where in a plain tar a member lies; called, it reads it."""

    path: Path
    offset: int
    size: int

    def __call__(self) -> bytes:
        with self.path.open("rb", buffering=0) as stream:
            data = os.pread(stream.fileno(), self.size, self.offset)
        if len(data) != self.size:
            raise DecodeError(f"the archive ends early: {len(data):,} of {self.size:,} bytes")
        return data


class _Waiting:
    """Bytes that were read before they are wanted: `put` waits while there are too many."""

    def __init__(self) -> None:
        self._bytes = 0
        self._changed = threading.Condition()

    def put(self, data: bytes) -> Callable[[], bytes]:
        """Something that gives `data`, once or more; the first time it stops to count."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._bytes or self._bytes + len(data) < WAITING_BYTES
            )
            self._bytes += len(data)
        counted = [len(data)]

        def take() -> bytes:
            with self._changed:
                self._bytes -= counted.pop() if counted else 0
                self._changed.notify_all()
            return data

        return take
