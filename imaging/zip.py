"""List and read the files in a zip archive without unpacking the archive to disk.

Main entries: `members(archive, name)` yields a `ZipMember` for each file, sorted by name, and
`read_member(archive, where, version)` returns the bytes of one file.

- `archive`: the path of the archive (a `Path`, or the `UPath` of an address). If the archive has
  several volumes (X.z01, X.z02, ...), it is the path of the last one, X.zip.
- `name`: a text, what error messages call the archive (default: its path).
- `where`: the `where` of the file's `ZipMember`.
- `version`: any text that changes when the archive changes (default ""). `read_member()` remembers
  the volumes and sizes of each archive and version in this process; with the same `version`, it
  does not notice a change. "" is right for an archive that stays as it is.

A `ZipMember` has the file's `name`, its location `where` (a text), its `size` in bytes, and
`excluded`: the reason if the file is not read (`HIDDEN`, encrypted, an unsafe path, ...), or "".

`members()` raises `ZipError` (a `ValueError`) if the archive is damaged or incomplete, or if its
files claim to unpack to more than 1 MiB plus `MAX_RATIO` times its size. `read_member()` raises
`DecodeError` (a `ValueError`, of imaging/decode.py) if the file in the archive is damaged. Both
raise `OSError` if the archive cannot be read.
"""

import contextlib
import io
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from escape import as_utf8
from imaging.decode import MAX_BYTES, DecodeError
from imaging.names import HIDDEN, is_hidden, kind_of, leaves_archive
from storage import AnyPath, any_path, is_local

MAX_RATIO = 1032
"""Highest compression ratio of Deflate. An archive that claims more is damaged or a zip bomb."""


class ZipError(ValueError):
    """An archive that cannot be read; the message says what to do."""


class ZipMember(NamedTuple):
    """File in an archive. `excluded` is the reason why it is not read, or empty."""

    name: str
    where: str  # position, packed size, size, method and CRC-32, for `read_member`
    size: int  # bytes
    excluded: str = ""  # why the file is not read


class _Volumes(io.RawIOBase):
    """The volumes of an archive (X.z01, X.z02, ..., X.zip) as one file, for reading.

    `overlay` maps an offset to a few bytes that replace those of the file; see `_single`.
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
        """Read up to `size` bytes from `offset` on. The call does not use the file position, so
        threads can share the object.
        """
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
    """Return `_volumes`, cached in each process until the archive changes."""
    return _volumes(any_path(archive))


def _volumes(archive: AnyPath) -> _Volumes:
    """Open an archive with its other volumes."""
    stem = archive.name[:-4]
    number = re.compile(re.escape(stem) + r"\.z(\d+)", re.IGNORECASE)
    volumes = {
        int(match[1]): sibling
        for sibling in archive.parent.iterdir()
        if (match := number.fullmatch(sibling.name))
    }
    return _Volumes([*(volumes[i] for i in sorted(volumes)), archive])


_END = struct.Struct("<4s4H2LH")  # end of central directory (APPNOTE.TXT 4.3.16)
_LOCATOR = struct.Struct("<4sLQL")  # zip64 end of central directory locator (4.3.15)
_LOCAL = struct.Struct("<4s5H3L2H")  # local file header (4.3.7)


def _single(volumes: _Volumes, name: str) -> int:
    """Prepare a split archive for `zipfile`, which reads only single ones: patch the zip64 locator
    to say "one disk". Returns the number of the volume in which the central directory starts.

    Raises:
        ZipError: not a zip archive, volumes are missing, or it names one that it does not have.
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
    is_zip64 = locator_at >= 0 and tail[locator_at : locator_at + 4] == b"PK\6\7"
    if is_zip64:
        _, zip64_disk, offset, disks = _LOCATOR.unpack_from(tail, locator_at)
        disk = max(disks - 1, 0)
    if disk + 1 != len(volumes.paths):
        raise ZipError(
            f"{name} has {disk + 1} volumes, found {len(volumes.paths)} "
            f"({', '.join(path.name for path in volumes.paths[:3])}, ...); fetch the missing ones"
        )
    if is_zip64 and disk:
        volumes.overlay[tail_at + locator_at] = _LOCATOR.pack(b"PK\6\7", 0, offset, 1)
        end64 = volumes.read_at(volumes.starts[min(zip64_disk, disk)] + offset, 24)
        directory_disk = struct.unpack_from("<L", end64, 20)[0] if len(end64) == 24 else 0
    if disk and directory_disk > disk:
        raise ZipError(
            f"{name} is damaged: its central directory begins in volume {directory_disk + 1}, but "
            f"it has {disk + 1} volumes; fetch it again"
        )
    return directory_disk


def members(archive: AnyPath, name: str = "") -> Iterator[ZipMember]:
    """Yield the files in an archive, sorted by name. Messages call the archive `name`.

    Hidden files have the reason HIDDEN. Of members that share bytes, only the first is read.

    Raises:
        ZipError: the archive is damaged, volumes are missing, or it claims more than it can
        contain.
        OSError: the archive cannot be opened.
    """
    name = name or str(archive)
    volumes = _volumes(archive)
    directory_disk = _single(volumes, name)
    try:
        with zipfile.ZipFile(io.BufferedReader(volumes, 1 << 20)) as opened:
            entries, start = opened.infolist(), opened.start_dir
        for entry in entries:
            if not entry.flag_bits & 0x800:  # many programs write UTF-8 without this flag
                with contextlib.suppress(UnicodeError):
                    entry.filename = entry.filename.encode("cp437").decode("utf-8")
    except (
        zipfile.BadZipFile, NotImplementedError, OSError, struct.error, ValueError, OverflowError,
        IndexError, RuntimeError,
    ) as error:  # fmt: skip
        raise ZipError(f"{name} is not a readable zip archive: {error}") from error
    claimed = sum(entry.file_size for entry in entries)
    if claimed > MAX_RATIO * len(volumes) + 2**20:
        raise ZipError(
            f"{name} claims {claimed:,} bytes in {len(volumes):,}, more than {MAX_RATIO:,} times "
            "its size: its members overlap or state wrong sizes; it is not read"
        )
    # zipfile adds the difference between the directory's real and its stated offset to all offsets.
    moved = volumes.starts[directory_disk] if len(volumes.paths) > 1 else 0
    seen: set[str] = set()
    plain = len(volumes.paths) == 1 and len(volumes) <= 2**32  # its stated offsets are right
    overlapping = _overlapping(entries) if plain else set()
    for entry in sorted(entries, key=lambda entry: (entry.filename, entry.header_offset)):
        if entry.filename.endswith(("/", "\\")):
            continue
        offset = entry.header_offset - moved
        if len(volumes.paths) > 1:
            offset += volumes.starts[min(entry.volume, len(volumes.paths) - 1)]
        elif len(volumes) > 2**32 and start > 2**32:
            # Offsets in archives above 4 GiB without zip64 records (macOS writes such) are modulo
            # 2**32; `read_member` tries all possible ones.
            offset %= 2**32
        excluded = _refuse_member(entry)
        if not excluded or excluded == HIDDEN:
            entry.filename = entry.filename.replace("\\", "/")  # old Windows programs write "\\"
        if not excluded and entry.header_offset in overlapping:
            excluded = "shares bytes with another member"
        if not excluded and entry.filename in seen:
            excluded = "listed twice in the archive"
        seen.add(entry.filename)
        where = (offset, entry.compress_size, entry.file_size, entry.compress_type, entry.CRC)
        yield ZipMember(
            as_utf8(entry.filename), ":".join(map(str, where)), entry.file_size, excluded
        )


def _overlapping(entries: Sequence[zipfile.ZipInfo]) -> set[int]:
    """Return the header offsets of members that start inside an earlier one. Identical entries do
    not count.
    """
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


def _refuse_member(entry: zipfile.ZipInfo) -> str:
    """Return the reason why a member is not read, or "" if it is."""
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
    """Read a member and check it against the archive's CRC-32. `where` is from `ZipMember`.
    `version` must change when the archive changes.

    Raises:
        DecodeError: the member is damaged.
        OSError: the archive cannot be read.
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
                # One byte more than the stated size is enough to detect a bomb.
                data = zlib.decompressobj(-15).decompress(data, size + 1)
            except zlib.error:
                continue
        if len(data) == size and zlib.crc32(data) == crc:
            return data
    raise DecodeError("damaged in the archive: its checksum or length is not the listed one")
