"""The bytes of raw images: whole files, members of zip archives, cells of parquet tables.

Nothing is unpacked to disk. `walk` lists a dataset, archives as the folders they hold; `read_all`
gives the bytes of what was listed. What an archive should not hold is listed with a reason.
"""

import io
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sharding.decode import MAX_BYTES
from sharding.format import DecodeError
from sharding.storage import AnyPath, any_path, is_local


class RawError(ValueError):
    """A raw dataset that cannot be read; the message says what to do."""


class RawFile(NamedTuple):
    """One file of a raw dataset, on disk or in an archive."""

    inside: str  # below the source's root, with '/'
    path: str  # of the file that holds the bytes, below the raw folder
    member: str  # where in it; empty: all of it
    size: int  # bytes
    version: str  # changes when the bytes may have changed
    refused: str = ""  # why it is not read


def walk(raw: AnyPath, root: str) -> Iterator[RawFile]:
    """Every file below `raw/root`, archives opened, sorted by path. Links are listed as refused.

    Raises:
        RawError: a broken or incomplete archive.
        OSError: a folder that cannot be read.
    """
    listing = _walk_local if is_local(raw) else _walk_remote
    volume = re.compile(r"\.z\d+$", re.IGNORECASE)
    for file in listing(raw, root):
        if not file.refused and file.inside.lower().endswith(".zip"):
            yield from _members(raw, file)
        elif not volume.search(file.inside):  # volumes are read with the archive they belong to
            yield file


def members(archive: Path) -> Iterator[RawFile]:
    """The files in one zip archive of this machine, sorted by name.

    Raises:
        RawError, OSError: it is broken or incomplete, or cannot be opened.
    """
    facts = archive.stat()
    version = str(facts.st_mtime_ns)
    return _members(archive.parent, RawFile(archive.name, archive.name, "", facts.st_size, version))


def read_one(raw: AnyPath, file: RawFile) -> bytes:
    """The bytes of one file that was listed.

    Raises:
        DecodeError: it is refused, or damaged in its archive.
        OSError: it cannot be read.
    """
    data = _read_one(raw, file._asdict())
    if isinstance(data, DecodeError):
        raise data
    return data


def _walk_local(raw: AnyPath, root: str) -> Iterator[RawFile]:
    yield from _walk_folder(str(raw / root), "", root)


def _walk_folder(folder: str, prefix: str, root: str) -> Iterator[RawFile]:
    # Strings and scandir: a million Path objects would take most of a minute.
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name.startswith("."):
            continue
        inside = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _walk_folder(entry.path, f"{inside}/", root)
            continue
        facts = entry.stat(follow_symlinks=False)
        refused = "" if stat.S_ISREG(facts.st_mode) else _kind(facts.st_mode)
        yield RawFile(
            inside, f"{root}/{inside}", "", facts.st_size, str(facts.st_mtime_ns), refused
        )


def _kind(mode: int) -> str:
    link = "a symbolic link, which is not followed"
    return link if stat.S_ISLNK(mode) else "neither a file nor a folder"


def _walk_remote(raw: AnyPath, root: str) -> Iterator[RawFile]:
    top = (raw / root).path.rstrip("/")
    for path, info in sorted(raw.fs.find(top, detail=True).items()):
        inside = path.removeprefix(top).lstrip("/")
        if any(part.startswith(".") for part in inside.split("/")):
            continue
        stamp = info.get("ETag") or info.get("LastModified") or info.get("mtime") or ""
        yield RawFile(inside, f"{root}/{inside}", "", info["size"], str(stamp))


# --- zip archives ---------------------------------------------------------------------------------


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
def _opened(raw: str, path: str, _version: str) -> _Volumes:
    """`_volumes`, looked up once in a process for as long as the archive does not change."""
    return _volumes(raw, path)


def _volumes(raw: str, path: str) -> _Volumes:
    """The archive at `raw/path` with its other volumes."""
    archive = any_path(raw) / path
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
        RawError: no archive, or volumes are missing.
    """
    tail_at = max(0, len(volumes) - _END.size - 0xFFFF)
    tail = volumes.read_at(tail_at, len(volumes) - tail_at)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > len(tail):
        raise RawError(
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
        raise RawError(
            f"{name} has {disk + 1} volumes, found {len(volumes.paths)} "
            f"({', '.join(path.name for path in volumes.paths[:3])}, ...); fetch the missing ones"
        )
    return directory_disk


def _members(raw: AnyPath, archive: RawFile) -> Iterator[RawFile]:
    """The files in an archive, sorted by name."""
    volumes = _volumes(str(raw), archive.path)
    directory_disk = _single(volumes, archive.path)
    try:
        with zipfile.ZipFile(io.BufferedReader(volumes, 1 << 20)) as opened:
            entries, start = opened.infolist(), opened.start_dir
    except (zipfile.BadZipFile, NotImplementedError, OSError, struct.error) as error:
        raise RawError(f"{archive.path} is not a readable zip archive: {error}") from error
    # zipfile adds the distance between where the directory is and where it says it is.
    moved = volumes.starts[directory_disk] if len(volumes.paths) > 1 else 0
    seen: set[str] = set()
    for entry in sorted(entries, key=lambda entry: (entry.filename, entry.header_offset)):
        hidden = any(p.startswith((".", "__MACOSX")) for p in entry.filename.split("/"))
        if entry.is_dir() or (hidden and ".." not in entry.filename.split("/")):
            continue
        offset = entry.header_offset - moved
        if len(volumes.paths) > 1:
            offset += volumes.starts[min(entry.volume, len(volumes.paths) - 1)]
        elif len(volumes) > 2**32 and start > 2**32:
            # Archives past 4 GiB without zip64 records (macOS writes such) count modulo 2**32;
            # `_read_member` tries the places this may mean.
            offset %= 2**32
        refused = _refuse_member(entry)
        if not refused and entry.filename in seen:
            refused = "listed twice in the archive"
        seen.add(entry.filename)
        where = (offset, entry.compress_size, entry.file_size, entry.compress_type, entry.CRC)
        yield RawFile(
            f"{archive.inside}/{entry.filename}", archive.path, ":".join(map(str, where)),
            entry.file_size, archive.version, refused,
        )  # fmt: skip


def leaves_archive(name: str) -> bool:
    """Whether unpacking a member of this name would write outside the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or bool(re.match(r"[A-Za-z]:", name))


def _refuse_member(entry: zipfile.ZipInfo) -> str:
    """Why an archive's member is not read; empty if it is."""
    if leaves_archive(entry.filename):
        return "a path that leaves the archive"
    mode = entry.external_attr >> 16
    if mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
        return _kind(mode)
    if entry.flag_bits & 1:
        return "encrypted"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"compression method {entry.compress_type}, which is not read; unpack it yourself"
    if max(entry.file_size, entry.compress_size) > MAX_BYTES:
        return f"{entry.file_size:,} bytes, more than the limit of {MAX_BYTES:,}"
    return ""


def _read_member(raw: AnyPath, row: Mapping[str, Any]) -> bytes:
    """The bytes of a member, checked against the archive's CRC-32."""
    volumes = _opened(str(raw), row["path"], row["version"])
    offset, packed, size, method, crc = map(int, row["member"].split(":"))
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


# --- parquet tables -------------------------------------------------------------------------------


def _read_cells(raw: AnyPath, rows: Sequence[Mapping[str, Any]]) -> Iterator[bytes | DecodeError]:
    """Image cells of one row group, in rising order of rows, a few rows in memory at a time."""
    wanted = [row["member"].split(":", 2) for row in rows]
    columns = sorted({column for _, _, column in wanted})
    with (raw / rows[0]["path"]).open("rb") as stream:
        table = pq.ParquetFile(stream, pre_buffer=False)
        start, following = 0, 0
        for batch in table.iter_batches(32, row_groups=[int(wanted[0][0])], columns=columns):
            while following < len(wanted) and int(wanted[following][1]) < start + len(batch):
                _, row, column = wanted[following]
                yield _cell(batch, int(row) - start, column)
                following += 1
            start += len(batch)
            if following == len(wanted):
                return
    raise RawError(f"{rows[0]['path']} has become shorter since it was listed; run again")


def _cell(batch: pa.RecordBatch, row: int, column: str) -> bytes | DecodeError:
    """An image as Hugging Face stores it: bytes, or a struct of bytes and path."""
    value = batch.column(column)[row].as_py()
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else DecodeError("the cell holds no image")


# --- reading --------------------------------------------------------------------------------------


def read_all(raw: AnyPath, rows: Sequence[Mapping[str, Any]]) -> Iterator[bytes | DecodeError]:
    """The bytes of each row (an `Item` as a mapping), or why there are none.

    Cells of one parquet row group should stand together and in order: the group is read once.

    Raises:
        OSError: a file that cannot be read.
    """
    for block, run in groupby(rows, key=_block):
        if block:
            yield from _read_cells(raw, list(run))
        else:
            for row in run:
                yield _read_one(raw, row)


def _block(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """File and row group of a parquet cell; None for everything else."""
    if row["path"].lower().endswith(".parquet") and row["member"]:
        return row["path"], row["member"].split(":", 1)[0]
    return None


def _read_one(raw: AnyPath, row: Mapping[str, Any]) -> bytes | DecodeError:
    if row["refused"]:
        return DecodeError(row["refused"])
    if row["size"] > MAX_BYTES:
        return DecodeError(f"{row['size']:,} bytes, more than the limit of {MAX_BYTES:,}")
    try:
        if row["member"]:
            return _read_member(raw, row)
        return (raw / row["path"]).read_bytes()
    except DecodeError as error:
        return error
