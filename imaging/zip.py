"""Members of zip archives, read where they lie and without unpacking; archives of several volumes
(X.z01, X.z02, ..., X.zip) too. What an archive should not hold is listed with a reason.
"""

import io
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from imaging.decode import MAX_BYTES, DecodeError
from storage import AnyPath, any_path, is_local

MAX_RATIO = 1032
"""Deflate holds at most so many bytes in one; an archive that claims more lies or is a bomb."""

HIDDEN = "hidden"
"""Why files are not read that file managers hide, in folders, zips and tars alike."""


class ZipError(ValueError):
    """An archive that cannot be read; the message says what to do."""


class ZipMember(NamedTuple):
    """One file in an archive."""

    name: str
    where: str  # position, packed size, size, method and CRC-32, for `read_member`
    size: int  # bytes
    excluded: str = ""  # why it is not read


class _Volumes(io.RawIOBase):
    """The volumes of an archive (X.z01, X.z02, ..., X.zip) as one file, for reading.

    `overlay` replaces a few bytes: see `_single`.
    """

    def __init__(self, paths: Sequence[AnyPath]) -> None:
        self.paths = paths
        self.starts = [0]
        for path in paths:
            self.starts.append(self.starts[-1] + path.stat().st_size)
        self.overlay: dict[int, bytes] = {}
        self._position = 0

    def __len__(self) -> int:
        return self.starts[-1]

    def read_at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on; each call stands alone, so workers share nothing."""
        pieces = []
        for path, start, end in zip(self.paths, self.starts, self.starts[1:], strict=False):
            first, last = max(offset, start), min(offset + size, end)
            if first < last:
                pieces.append(_read_range(path, first - start, last - first))
        data = b"".join(pieces)
        for at, patch in self.overlay.items():
            if offset <= at and at + len(patch) <= offset + len(data):
                data = data[: at - offset] + patch + data[at - offset + len(patch) :]
        return data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, len(self))[whence]
        if self._position < 0:
            raise OSError("before the beginning of the archive")
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self.read_at(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _read_range(path: AnyPath, offset: int, size: int) -> bytes:
    if not is_local(path):
        return path.fs.cat_file(path.path, offset, offset + size)
    with path.open("rb", buffering=0) as stream:
        return os.pread(stream.fileno(), size, offset)


@lru_cache(maxsize=64)
def _opened(archive: str, _version: str) -> _Volumes:
    """`_volumes`, looked up once in a process for as long as the archive does not change."""
    return _volumes(any_path(archive))


def _volumes(archive: AnyPath) -> _Volumes:
    """The archive with its other volumes."""
    stem = archive.name[:-4]
    number = re.compile(re.escape(stem) + r"\.z(\d+)", re.IGNORECASE)
    found = {
        int(match[1]): beside
        for beside in archive.parent.iterdir()
        if (match := number.fullmatch(beside.name))
    }
    return _Volumes([*(found[i] for i in sorted(found)), archive])


_END = struct.Struct("<4s4H2LH")  # end of central directory (APPNOTE.TXT 4.3.16)
_LOCATOR = struct.Struct("<4sLQL")  # zip64 end of central directory locator (4.3.15)
_LOCAL = struct.Struct("<4s5H3L2H")  # local file header (4.3.7)


def _single(volumes: _Volumes, name: str) -> int:
    """Prepare a split archive for `zipfile`, which reads single ones: the number of the volume in
    which the central directory begins. The zip64 locator then says "one disk".

    Raises:
        ZipError: no archive, or volumes are missing.
    """
    tail_at = max(0, len(volumes) - _END.size - 0xFFFF)
    tail = volumes.read_at(tail_at, len(volumes) - tail_at)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > len(tail):
        raise ZipError(
            f"{name} is not a whole zip archive: it has no central directory. The download is "
            "incomplete, or a last volume is missing; fetch it again"
        )
    disk, directory_disk = _END.unpack_from(tail, at)[1:3]
    locator_at = at - _LOCATOR.size
    if locator_at >= 0 and tail[locator_at : locator_at + 4] == b"PK\6\7":
        _, zip64_disk, offset, disks = _LOCATOR.unpack_from(tail, locator_at)
        disk = max(disks - 1, 0)
        if disk:
            volumes.overlay[tail_at + locator_at] = _LOCATOR.pack(b"PK\6\7", 0, offset, 1)
            end64 = volumes.read_at(volumes.starts[min(zip64_disk, disk)] + offset, 24)
            directory_disk = struct.unpack_from("<L", end64, 20)[0] if len(end64) == 24 else 0
    if disk + 1 != len(volumes.paths):
        raise ZipError(
            f"{name} has {disk + 1} volumes, found {len(volumes.paths)} "
            f"({', '.join(path.name for path in volumes.paths[:3])}, ...); fetch the missing ones"
        )
    return directory_disk


def members(archive: AnyPath, name: str = "") -> Iterator[ZipMember]:
    """The files in an archive, sorted by name. Messages call the archive `name`. Hidden files have
    the reason HIDDEN; of members that share bytes with another only the first is read.

    Raises:
        ZipError: it is broken, volumes are missing, or it claims more than it can hold.
        OSError: it cannot be opened.
    """
    name = name or str(archive)
    volumes = _volumes(archive)
    directory_disk = _single(volumes, name)
    try:
        with zipfile.ZipFile(io.BufferedReader(volumes, 1 << 20)) as opened:
            entries, start = opened.infolist(), opened.start_dir
    except (
        zipfile.BadZipFile, NotImplementedError, OSError, struct.error, ValueError, OverflowError,
        IndexError, RuntimeError,
    ) as error:  # fmt: skip
        raise ZipError(f"{name} is not a readable zip archive: {error}") from error
    claimed = sum(entry.file_size for entry in entries)
    if claimed > MAX_RATIO * len(volumes) + 2**20:
        raise ZipError(
            f"{name} claims {claimed:,} bytes in {len(volumes):,}, more than {MAX_RATIO:,} times "
            "its size: its members overlap or lie; it is not read"
        )
    # zipfile adds the distance between where the directory is and where it says it is.
    moved = volumes.starts[directory_disk] if len(volumes.paths) > 1 else 0
    seen: set[str] = set()
    plain = len(volumes.paths) == 1 and len(volumes) <= 2**32  # offsets are then what they say
    overlapping = _overlapping(entries) if plain else set()
    for entry in sorted(entries, key=lambda entry: (entry.filename, entry.header_offset)):
        if entry.filename.endswith(("/", "\\")):
            continue
        offset = entry.header_offset - moved
        if len(volumes.paths) > 1:
            offset += volumes.starts[min(entry.volume, len(volumes.paths) - 1)]
        elif len(volumes) > 2**32 and start > 2**32:
            # Archives past 4 GiB without zip64 records (macOS writes such) count modulo 2**32;
            # `read_member` tries the places this may mean.
            offset %= 2**32
        excluded = _refuse_member(entry)
        if not excluded or excluded == HIDDEN:
            entry.filename = entry.filename.replace("\\", "/")  # as old Windows programs write it
        if not excluded and entry.header_offset in overlapping:
            excluded = "shares bytes with another member"
        if not excluded and entry.filename in seen:
            excluded = "listed twice in the archive"
        seen.add(entry.filename)
        where = (offset, entry.compress_size, entry.file_size, entry.compress_type, entry.CRC)
        yield ZipMember(
            printable(entry.filename), ":".join(map(str, where)), entry.file_size, excluded
        )


def _overlapping(entries: Sequence[zipfile.ZipInfo]) -> set[int]:
    """The offsets of members that begin inside an earlier one; whole copies of one entry do not."""
    overlapping, end = set(), 0
    spans = sorted(
        {
            (e.header_offset, e.compress_size)
            for e in entries
            if not e.filename.endswith(("/", "\\"))
        }
    )
    for offset, size in spans:
        if offset < end:
            overlapping.add(offset)
        else:
            end = offset + _LOCAL.size + size
    return overlapping


def is_hidden(name: str) -> bool:
    """Whether file managers hide a file or folder of this path: `.x`, `._x`, `__MACOSX`."""
    return any(
        part == "__MACOSX" or (part.startswith(".") and part not in (".", ".."))
        for part in name.split("/")
    )


def printable(name: str) -> str:
    """A name with bytes that are not UTF-8 as escapes, so that it can be printed and stored."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def kind_of(mode: int) -> str:
    """Why what is no plain file is not read, by its mode."""
    link = "a symbolic link, which is not followed"
    return link if stat.S_ISLNK(mode) else "neither a file nor a folder"


def leaves_archive(name: str) -> bool:
    """Whether unpacking a member of this name would write outside the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or bool(re.match(r"[A-Za-z]:", name))


def _refuse_member(entry: zipfile.ZipInfo) -> str:
    """Why an archive's member is not read; empty if it is."""
    if not entry.filename:
        return "without a name"
    if leaves_archive(entry.filename):
        return "a path that leaves the archive"
    if is_hidden(entry.filename.replace("\\", "/")):
        return HIDDEN
    mode = entry.external_attr >> 16
    if mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
        return kind_of(mode)
    if entry.flag_bits & 1:
        return "encrypted"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"compression method {entry.compress_type}, which is not read; unpack it yourself"
    if max(entry.file_size, entry.compress_size) > MAX_BYTES:
        return f"{entry.file_size:,} bytes, more than the limit of {MAX_BYTES:,}"
    return ""


def read_member(archive: AnyPath, where: str, version: str = "") -> bytes:
    """The bytes of a member, checked against the archive's CRC-32. `version` changes when the
    archive does.

    Raises:
        DecodeError: damaged in its archive.
        OSError: it cannot be read.
    """
    volumes = _opened(str(archive), version)
    offset, packed, size, method, crc = map(int, where.split(":"))
    for start in range(offset, len(volumes), 2**32):
        header = volumes.read_at(start, _LOCAL.size)
        if len(header) < _LOCAL.size or not header.startswith(b"PK\3\4"):
            continue
        name_size, extra_size = _LOCAL.unpack(header)[9:]
        data = volumes.read_at(start + _LOCAL.size + name_size + extra_size, packed)
        if method == zipfile.ZIP_DEFLATED:
            try:
                # One byte more than promised is enough to see a bomb.
                data = zlib.decompressobj(-15).decompress(data, size + 1)
            except zlib.error:
                continue
        if len(data) == size and zlib.crc32(data) == crc:
            return data
    raise DecodeError("damaged in the archive: its checksum or length is not the listed one")
