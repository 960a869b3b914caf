"""Members of tar archives, one after another and without unpacking; only what was asked for is
kept in memory. Plain tars are read where a member lies, from any thread; compressed ones can only
be read from front to end, so their members come with their bytes.
"""

import contextlib
import lzma
import os
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from imaging.decode import MAX_BYTES, DecodeError
from imaging.zip import HIDDEN, is_hidden, leaves_archive, printable

MAX_RATIO, MAX_SLACK = 200, 256 * 2**20
"""A compressed archive may unpack to so many times its size, and so many bytes more."""

MAX_HEADER = 2**20
"""Bytes that a member's extended header may have; names have 255."""

MAX_NESTED = 16
"""Extended headers that may stand before one member."""

MAX_XZ_MEMORY = 256 * 2**20
"""Bytes of memory that an xz archive may ask for, by the dictionary that it names; the largest that
`xz -9` writes takes 65 MiB.
"""

WAITING_BYTES = 256 * 2**20
"""Bytes of a compressed archive's members that may wait to be read."""


# typeshed has not got these two.
_InvalidHeader = tarfile.InvalidHeaderError  # type: ignore[attr-defined]
_EndOfArchive = tarfile.EOFHeaderError  # type: ignore[attr-defined]


class TarMember(NamedTuple):
    """A member that may be read. Either `excluded` says why it is not, or `read` gives its bytes
    (or raises `DecodeError` or `OSError`).
    """

    name: str
    excluded: str
    read: Callable[[], bytes] | None


class _Archive(tarfile.TarFile):
    """An archive that counts extended headers, and remembers what was damaged."""

    nested = 0
    damage = ""
    members: list[tarfile.TarInfo]


class _Info(tarfile.TarInfo):
    """tarfile takes a damaged header for the end; here the archive remembers that it was none.
    Extended headers are bounded, since tarfile reads them whole and one inside the other; the maps
    of sparse members, which are not read, are passed over.
    """

    # Of tarfile, whose published types leave them out.
    _sparse_structs: Any
    _block: Callable[[int], int]
    sparse: Any

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Info":
        assert isinstance(archive, _Archive)
        archive.nested += 1
        try:
            if archive.nested > MAX_NESTED:
                raise _InvalidHeader("too many extended headers of one member")
            return super().fromtarfile(archive)
        except _EndOfArchive:
            raise
        except tarfile.HeaderError as error:
            archive.damage = archive.damage or str(error) or type(error).__name__
            raise
        finally:
            archive.nested -= 1

    def _proc_member(self, archive: tarfile.TarFile) -> "_Info":
        extended = self.type in (
            tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
        )  # fmt: skip
        if extended and not 0 <= self.size <= MAX_HEADER:
            raise _InvalidHeader(f"an extended header of {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]  # typeshed has not got it

    def _proc_sparse(self, archive: tarfile.TarFile) -> "_Info":
        _structs, extended, size = self._sparse_structs
        del self._sparse_structs
        read = 0
        while extended:
            block = archive.fileobj.read(tarfile.BLOCKSIZE)
            read += tarfile.BLOCKSIZE
            if len(block) < tarfile.BLOCKSIZE or read > MAX_HEADER:
                raise _InvalidHeader("a sparse member without an end of its map")
            extended = bool(block[504])
        self.sparse = []
        self.offset_data = archive.fileobj.tell()
        archive.offset = self.offset_data + self._block(self.size)
        self.size = size
        return self

    def _proc_gnusparse_00(self, member: "_Info", *_: object) -> None:
        member.sparse = []

    _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_gnusparse_00


class _Xz:
    """What an xz file unpacks to, within `MAX_XZ_MEMORY`; tarfile sets it no bound."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._packed = b""
        self._unpacker = self._next_unpacker()

    @staticmethod
    def _next_unpacker() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_MEMORY)

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, none only at the end; several xz files in a row are one.

        Raises:
            DecodeError: it asks for more memory.
            LZMAError, EOFError: it is damaged, or cut off.
        """
        while True:
            if self._unpacker.eof:
                # Zeros may stand behind a file (section 2.2 of the format).
                rest = self._unpacker.unused_data.lstrip(b"\0")
                self._packed = rest or self._more().lstrip(b"\0")
                if not self._packed:
                    return b""
                self._unpacker = self._next_unpacker()
            elif self._unpacker.needs_input and not self._packed:
                self._packed = self._more()
                if not self._packed:
                    raise EOFError("it ends within the compressed data")
            try:
                data = self._unpacker.decompress(self._packed, size)
            except lzma.LZMAError as error:
                if "limit" not in str(error):
                    raise
                raise DecodeError(
                    f"its xz asks for more memory than {MAX_XZ_MEMORY // 2**20} MiB; unpack it "
                    "yourself"
                ) from error
            self._packed = b""
            if data:
                return data

    def _more(self) -> bytes:
        return self._stream.read(2**16)


_XZ = b"\xfd7zXZ\x00"


def is_compressed(path: Path) -> bool:
    """Whether a tar can only be read from front to end, by its first bytes."""
    return _start_of(path).startswith((b"\x1f\x8b", b"BZh", _XZ, b"\x28\xb5\x2f\xfd"))


def _start_of(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(6)


def _open(path: Path, packed: bool) -> AbstractContextManager[_Archive]:
    """A tar, from front to end where it is compressed."""
    if _start_of(path) != _XZ:
        return _Archive.open(path, "r|*" if packed else "r:", tarinfo=_Info)
    return _open_xz(path)


@contextlib.contextmanager
def _open_xz(path: Path) -> Iterator[_Archive]:
    with path.open("rb") as stream:
        unpacked: Any = _Xz(stream)  # all that tarfile asks of a stream is `read`
        with _Archive.open(fileobj=unpacked, mode="r|", tarinfo=_Info) as archive:
            yield archive


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
        with _open(path, packed) as archive:
            end = MAX_RATIO * path.stat().st_size + MAX_SLACK if packed else sys.maxsize
            reached = 0
            while (member := _next(archive, reached, end)) is not None:
                reached = archive.offset
                if member.isdir() or not wanted(member.name):
                    continue
                name = printable(member.name)
                excluded = _refuse(member)
                if excluded:
                    yield TarMember(name, excluded, None)
                    if packed and member.size > MAX_BYTES:
                        raise DecodeError("the members after it are out of reach; unpack it")
                elif packed:
                    stream = archive.extractfile(member)
                    assert stream is not None  # a regular member has one
                    yield TarMember(name, "", waiting.put(stream.read()))
                else:
                    yield TarMember(name, "", _Place(path, member.offset_data, member.size))
            if archive.damage:
                raise DecodeError(f"damaged or cut off: {archive.damage}; members may be missing")
    except DecodeError:
        raise
    except (
        tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError,
        IndexError, RecursionError,
    ) as error:  # fmt: skip
        raise DecodeError(f"damaged or cut off: {error}; members may be missing") from error


def _next(archive: _Archive, reached: int, end: int) -> tarfile.TarInfo | None:
    """The next member, which ends behind `reached` and before `end`."""
    member = archive.next()
    archive.members = []  # it would keep every header it has seen
    if member is None:
        return None
    if member.size < 0 or archive.offset <= reached:
        raise DecodeError("damaged: a member of negative size; members may be missing")
    if archive.offset > end:
        raise DecodeError(
            f"unpacks to more than {MAX_RATIO} times its size; the members after it are not read"
        )
    return member


def _refuse(member: tarfile.TarInfo) -> str:
    if not member.name.strip("/"):
        return "without a name"
    if is_hidden(member.name) and not leaves_archive(member.name):
        return HIDDEN
    if leaves_archive(member.name):
        return "a path that leaves the archive"
    if member.issym() or member.islnk():
        return "a link, which is not followed"
    if member.issparse():
        return "a sparse file, which is not read; unpack it yourself"
    if not member.isreg():
        return "no plain file"
    if member.size > MAX_BYTES:
        return f"{member.size:,} bytes, more than the limit of {MAX_BYTES:,}"
    return ""


@dataclass(frozen=True)
class _Place:
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
