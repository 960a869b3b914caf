"""Read the files in a tar archive one after another, without unpacking the archive to disk.

Main entry: `members(path, wanted)` is a generator.

- `path`: the `Path` of a plain or compressed tar (gzip, bzip2, xz);
- `wanted`: a function that takes the name of a file in the archive and returns whether the file is
  wanted, such as `lambda name: name.endswith(".jpg")`.

It yields a `TarMember` for each wanted file, in the order of the archive: its `name`; `excluded`,
the reason why the file is not read (a link, an unsafe path, too large, ...), or ""; and `read`, a
function without arguments that returns the bytes of the file, or raises `DecodeError` or `OSError`.
For an excluded file, `read` is None. Folders are not yielded. An archive that is damaged or beyond
one of the limits below raises `DecodeError` (a `ValueError`, of imaging/decode.py) during the loop;
the members before the error are good. An archive that cannot be opened raises `OSError`.

`is_tar(path)` returns whether a file begins as a tar, plain or compressed.

`headers(stream)` takes a plain tar that is open for reading, and yields the pair (`TarInfo`, reason
why the member is not read, or "") of each member, folders and hidden files too. The caller may read
a member from `stream`, at its `offset_data`. It raises the same errors during the loop.

In a plain tar, `read` reads the file at its offset, at any time and from any thread. A compressed
tar (`is_compressed(path)`) is read from front to end: the bytes of each member stay in memory until
its `read` is called. The loop stops when the next member would bring the bytes in memory above
`WAITING_BYTES`. It goes on when another thread has called a `read`. So call each `read` in the
loop, or in other threads: a loop that only collects the members could wait forever. The `MAX_...`
constants limit the memory and the work that a hostile archive can cause.
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

from escape import as_utf8
from imaging.decode import MAX_BYTES, DecodeError
from imaging.names import HIDDEN, is_hidden, leaves_archive
from storage import open_plain

MAX_RATIO, MAX_SLACK = 200, 256 * 2**20
"""A compressed archive may unpack to `MAX_RATIO` times its size plus `MAX_SLACK` bytes."""

MAX_HEADER = 2**20
"""Largest size of a member's extended header in bytes. File names have at most 255 bytes."""

MAX_NESTED = 16
"""Largest number of extended headers before one member."""

MAX_XZ_MEMORY = 256 * 2**20
"""Bytes of memory that an xz archive may need, by the dictionary size in its header. The largest
that `xz -9` writes needs 65 MiB.
"""

WAITING_BYTES = 256 * 2**20
"""Bytes of a compressed archive's members that may be in memory before their `read` is called."""


# Two exceptions that typeshed lacks.
_InvalidHeader = tarfile.InvalidHeaderError  # type: ignore[attr-defined]
_EndOfArchive = tarfile.EOFHeaderError  # type: ignore[attr-defined]


class TarMember(NamedTuple):
    """Member of an archive. Either `excluded` is the reason why it is not read, or `read` returns
    its bytes (or raises `DecodeError` or `OSError`).
    """

    name: str
    excluded: str
    read: Callable[[], bytes] | None


class _Archive(tarfile.TarFile):
    """Tar archive that counts nested extended headers and remembers the first damage."""

    nested = 0
    damage = ""
    members: list[tarfile.TarInfo]


class _Info(tarfile.TarInfo):
    """Member header that reports damage and limits extended headers.

    tarfile takes a damaged header for the end of the archive; this class records the damage in the
    archive. tarfile also reads extended headers whole and nested, so their size and number are
    limited here. The maps of sparse members are skipped, because sparse members are not read.
    """

    # Attributes of tarfile that typeshed lacks.
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
        return super()._proc_member(archive)  # type: ignore[misc]  # typeshed lacks it

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
    """Decompresses an xz file within `MAX_XZ_MEMORY`. tarfile sets no limit."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._packed = b""
        self._unpacker = self._next_unpacker()

    @staticmethod
    def _next_unpacker() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_MEMORY)

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, and b"" only at the end. Several xz streams in a row count as
        one.

        Raises:
            DecodeError: the archive needs more memory.
            LZMAError, EOFError: the archive is damaged or cut off.
        """
        while True:
            if self._unpacker.eof:
                # Zeros may follow a stream (section 2.2 of the xz format).
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
                    f"its xz data needs more than {MAX_XZ_MEMORY // 2**20} MiB of memory; unpack "
                    "it yourself"
                ) from error
            self._packed = b""
            if data:
                return data

    def _more(self) -> bytes:
        return self._stream.read(2**16)


_XZ = b"\xfd7zXZ\x00"


def is_compressed(path: Path) -> bool:
    """Return whether a tar is compressed, and so readable only from front to end, by its first
    bytes.
    """
    return _start_of(path).startswith((b"\x1f\x8b", b"BZh", _XZ, b"\x28\xb5\x2f\xfd"))


def _start_of(path: Path) -> bytes:
    with open_plain(path) as stream:
        return stream.read(6)


def _open(path: Path, packed: bool) -> AbstractContextManager[_Archive]:
    """Open a tar, as a stream if it is compressed."""
    if _start_of(path) != _XZ:
        return _Archive.open(path, "r|*" if packed else "r:", tarinfo=_Info)
    return _open_xz(path)


@contextlib.contextmanager
def _open_xz(path: Path) -> Iterator[_Archive]:
    with path.open("rb") as stream:
        unpacked: Any = _Xz(stream)  # tarfile calls only `read`
        with _Archive.open(fileobj=unpacked, mode="r|", tarinfo=_Info) as archive:
            yield archive


def is_tar(path: Path) -> bool:
    """Return whether a file begins as a tar, also a compressed one, within the limits above."""
    try:
        with _damage_named(), _open(path, is_compressed(path)) as archive:
            _next(archive, 0, sys.maxsize)
            return not archive.damage
    except DecodeError:
        return False


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[TarMember]:
    """Yield the files of an archive whose names are `wanted`, in the order of the archive.

    Links, devices, paths outside the archive and too large files are returned with `excluded` set.

    Raises:
        DecodeError: the archive is damaged, cut off, or no tar. Members before the error are good.
        OSError: the archive cannot be read.
    """
    packed = is_compressed(path)
    waiting = Waiting()
    with _damage_named(), _open(path, packed) as archive:
        end = MAX_RATIO * path.stat().st_size + MAX_SLACK if packed else sys.maxsize
        reached = 0
        while (member := _next(archive, reached, end)) is not None:
            reached = archive.offset
            if member.isdir() or not wanted(member.name):
                continue
            name = as_utf8(member.name)
            excluded = _refuse(member)
            if excluded:
                yield TarMember(name, excluded, None)
                if packed and member.size > MAX_BYTES:
                    raise DecodeError(
                        "a member is too large to skip in a compressed archive; unpack the "
                        "archive to read the members after it"
                    )
            elif packed:
                stream = archive.extractfile(member)
                assert stream is not None  # None only for members that are no regular file
                yield TarMember(name, "", waiting.put(stream.read()))
            else:
                read = _MemberReader(path, member.offset_data, member.size)
                yield TarMember(name, "", read)
        if archive.damage:
            raise DecodeError(f"damaged or cut off: {archive.damage}; members may be missing")


def headers(stream: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yield the header of each member of a plain tar, with the reason why the member is not read or
    "".

    Raises:
        DecodeError: the archive is damaged, cut off, or no tar. Members before the error are good.
        OSError: the archive cannot be read.
    """
    with _damage_named(), _Archive.open(fileobj=stream, mode="r:", tarinfo=_Info) as archive:
        reached = 0
        while (member := _next(archive, reached, sys.maxsize)) is not None:
            reached = archive.offset
            yield member, _refuse(member)
        if archive.damage:
            raise DecodeError(f"damaged or cut off: {archive.damage}; members may be missing")


@contextlib.contextmanager
def _damage_named() -> Iterator[None]:
    """Raise DecodeError for the errors that tarfile and the decompressors raise for damage."""
    try:
        yield
    except DecodeError:
        raise
    except (
        tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError,
        IndexError, RecursionError,
    ) as error:  # fmt: skip
        raise DecodeError(f"damaged or cut off: {error}; members may be missing") from error


def _next(archive: _Archive, reached: int, end: int) -> tarfile.TarInfo | None:
    """Return the next member, which must end after offset `reached` and before `end`; None after
    the last.
    """
    member = archive.next()
    archive.members = []  # otherwise tarfile keeps every header in memory
    if member is None:
        return None
    if member.size < 0 or archive.offset <= reached:
        raise DecodeError("damaged: a member of negative size; members may be missing")
    if archive.offset > end:
        raise DecodeError(
            f"unpacks to more than {MAX_RATIO} times its size; the remaining members are not read"
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
class _MemberReader:
    """Position of a member in a plain tar. Calling the object reads the member."""

    path: Path
    offset: int
    size: int

    def __call__(self) -> bytes:
        with self.path.open("rb", buffering=0) as stream:
            data = os.pread(stream.fileno(), self.size, self.offset)
        if len(data) != self.size:
            raise DecodeError(f"the archive ends early: {len(data):,} of {self.size:,} bytes")
        return data


class Waiting:
    """Members that are in memory before they are read. `put` blocks while there are too many."""

    def __init__(self) -> None:
        self._bytes = 0
        self._changed = threading.Condition()

    def put(self, data: bytes) -> Callable[[], bytes]:
        """Store `data` and return a function that returns `data`. Its first call releases the share
        of the memory budget; later calls return the same bytes.
        """
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
