"""Write one shard of a set: a tar of images, its `.idx` file for DALI, and its rows of the index.

Main entry: `write_shard(raw, folder, marks, name, fingerprint, samples)` returns a `Written` about
the tar (`name`, number of `samples`, size in `bytes`, `sha256`).

- `raw`, `folder` and `marks`: three existing folders as texts: of the raw data, of the set, and of
  the marks of finished shards.
- `name` and `fingerprint`: file name of the tar, and hash of everything that determines the shard's
  bytes and rows; both are fields of a `ShardPlan` (`plan_shards()` of sharding/plan.py).
- `samples`: the rows of this shard, a pyarrow table with two kinds of columns. First, those of the
  index (`SAMPLES_SCHEMA` of sharding/format.py), but not `shard`, `offset` and `size`: the function
  sets these. Second, five columns that locate the raw bytes: `path`, `member`, `size`, `version`
  and `excluded`, from a `RawFile` (sharding/raw.py). Here `size` is the size of the raw file; the
  index gets the size in the tar. Further columns are ignored.

The function deletes the index of the set just before it writes the tar `folder/name`: an old index
would not fit the new tar. Then it writes the `.idx` next to the tar and, last, the rows and the
fingerprint to `marks/<name>.parquet`: a shard with this parquet file is done.

It raises `ChangedError` (a `ShardError` with the texts `source` and `path`) if a raw file has
changed since the build decoded it: its SHA-256 is not that of the row. It raises `ShardError` if
the name of an image in the tar, `key` and its suffix, has more than 100 bytes, and `RawError` or
`OSError` if a file cannot be read or written. The same samples give the same bytes, and the tar
gets its final name only when complete.

`read_done(plans, folder, marks)` takes a list of `ShardPlan` and the two folders as paths, and
compares the stored fingerprints with those of the plans. For each plan it yields the `Written` of
the shard that an earlier build finished, or None if the shard is missing, damaged or out of date
(of the tar, only the size is checked). `read_rows(plans, marks)` yields the rows of each finished
shard, a table with the columns `SAMPLES_SCHEMA`; it raises `ShardError` if a mark is that of
another plan.
"""

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from imaging.decode import DecodeError, prepare
from sharding.format import (
    IMAGE_FORMATS,
    INDEX_FILE,
    SAMPLES_SCHEMA,
    ShardError,
    member_metadata,
    table_from,
)
from sharding.index import ShardEntry
from sharding.plan import ShardPlan
from sharding.raw import read_all
from sharding.remote import in_order, read_bytes, sizes_in
from storage import AnyPath, any_path, parse_json, write_atomically, write_text


@dataclass(frozen=True)
class Written:
    """Finished shard: its file name, number of samples, size and hash."""

    name: str
    samples: int
    bytes: int
    sha256: str

    def entry(self) -> ShardEntry:
        """Return the entry of the shard in `index.json`."""
        return {
            "name": self.name, "samples": self.samples, "bytes": self.bytes, "sha256": self.sha256,
        }  # fmt: skip


class ChangedError(ShardError):
    """Raw file that no longer has the bytes that the build decoded. Its four arguments are texts,
    so that a worker process can send it.
    """

    def __init__(self, source: str, path: str, origin: str, reason: str) -> None:
        super().__init__(source, path, origin, reason)
        self.source, self.path, self.origin, self.reason = source, path, origin, reason

    def __str__(self) -> str:
        """Name the image and the reason, and say what to do."""
        return (
            f"{self.origin} has changed since this build decoded it ({self.reason}); run the build "
            "again once the raw files no longer change"
        )


def write_shard(
    raw: str, folder: str, marks: str, name: str, fingerprint: str, samples: pa.Table
) -> Written:
    """Pack `samples` into the tar `folder/name`, and write their rows to `marks`.

    Runs in a worker process.

    Raises:
        ChangedError: a raw file has changed since it was decoded.
        ShardError: a file name is too long.
        OSError: a raw file cannot be read, or the output cannot be written.
    """
    rows = samples.to_pylist()
    written: list[Written] = []
    lines: list[str] = []

    def pack(partial: Path) -> None:
        lines[:], sha256 = _pack(partial, any_path(raw), rows)
        written.append(Written(name, len(rows), partial.stat().st_size, sha256))
        with contextlib.suppress(FileNotFoundError):  # or another worker deleted it
            (any_path(folder) / INDEX_FILE).unlink()

    write_atomically(any_path(folder) / name, pack)
    index = "\n".join([f"v1.2 {len(rows)}", *lines]) + "\n"
    write_text(any_path(folder) / Path(name).with_suffix(".idx").name, index)
    table = pa.Table.from_pylist([{**row, "shard": name} for row in rows], SAMPLES_SCHEMA)
    mark = {"fingerprint": fingerprint, **asdict(written[0])}
    table = table.replace_schema_metadata({"shard": json.dumps(mark)})
    write_atomically(
        any_path(marks) / f"{name}.parquet", lambda partial: pq.write_table(table, partial)
    )
    return written[0]


class _Tar:
    """Replacement for the `tarfile.TarFile` of `webdataset.TarWriter`, three times as fast.

    The bytes are the same. The position and the hash are updated with each write.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.offset, self.hash = stream, 0, hashlib.sha256()

    def addfile(self, info: tarfile.TarInfo, content: io.BytesIO) -> None:
        """Write one member: a header of 512 bytes, and the content padded to a multiple of 512."""
        self._write(_header(info))
        self._write(content.getvalue())
        self._write(bytes(-info.size % tarfile.BLOCKSIZE))

    def close(self) -> None:
        """Write the end of the tar: two empty blocks, then padding to a whole number of records."""
        end = self.offset + 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -end % tarfile.RECORDSIZE - self.offset))

    def _write(self, data: bytes) -> None:
        self.stream.write(data)
        self.hash.update(data)
        self.offset += len(data)


def _header(info: tarfile.TarInfo) -> bytes:
    """Return `info.tobuf()` of a plain file (POSIX.1-1988, ustar), but faster.

    Only the name, the size and the checksum are new; the rest of the header is cached.
    """
    name = info.name.encode()
    if len(name) > 100:
        raise ShardError(f"{info.name} has {len(name)} bytes, more than the 100 of a name in a tar")
    blank = _blank_header(info.mode, info.mtime, info.uname, info.gname)
    header = name.ljust(100, b"\0") + blank[100:124] + b"%011o" % info.size + blank[135:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


@lru_cache
def _blank_header(mode: int, mtime: float, user: str, group: str) -> bytes:
    """Return a header without name and size, with eight spaces in place of the checksum."""
    info = tarfile.TarInfo()
    info.mode, info.mtime, info.uname, info.gname = mode, mtime, user, group
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header[:148] + b" " * 8 + header[156:]


def _pack(path: Path, raw: AnyPath, rows: list[dict[str, Any]]) -> tuple[list[str], str]:
    """Write the tar, and set `offset` and `size` of `rows`.

    Returns the lines of the `.idx` for DALI's reader (version 1.2), and the SHA-256 of the tar. A
    line has the extension, offset, size and name of each member of a sample.
    """
    # Imported here, because webdataset imports torch, which takes seconds: only workers that write
    # wait. A preload for all workers would delay the reaction to an interrupt.
    import webdataset

    lines = []
    with path.open("wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0) as writer:
        writer.tarstream = tar = _Tar(stream)  # nothing was written yet
        for row, data in zip(rows, read_all(raw, rows), strict=True):
            data = _checked_bytes(row, data)
            row["offset"], row["size"] = 0, len(data)
            meta = json.dumps(member_metadata(row), sort_keys=True).encode()
            members = {IMAGE_FORMATS[row["format"]]: data, "json": meta}
            offset = tar.offset
            writer.write({"__key__": row["key"], **members})
            line = []
            for extension in sorted(members):  # as TarWriter sorts them
                size = len(members[extension])
                offset += tarfile.BLOCKSIZE
                line.append(f"{extension} {offset} {size} {row['key']}.{extension}")
                if extension != "json":
                    row["offset"] = offset
                offset += size + -size % tarfile.BLOCKSIZE
            if offset != tar.offset:
                raise RuntimeError(f"{row['key']} is not where its index says")
            lines.append(" ".join(line))
    return lines, tar.hash.hexdigest()


def _checked_bytes(row: dict[str, Any], data: bytes | DecodeError) -> bytes:
    """Return the bytes to store, after a check that they have the hash in `row`."""
    try:
        if isinstance(data, DecodeError):
            raise data
        stored = prepare(data).data if row["transcoded_from"] else data
        if hashlib.sha256(stored).digest() == row["sha256"]:
            return stored
        reason = "other bytes"
    except DecodeError as error:
        reason = str(error)
    raise ChangedError(row["source"], row["path"], row["origin"], reason)


def read_done(
    plans: Sequence[ShardPlan], folder: AnyPath, marks: AnyPath
) -> Iterator[Written | None]:
    """Yield an earlier run's shard for each plan, or None if missing, damaged or out of date."""
    packed, marked = sizes_in(folder), sizes_in(marks)

    def read(plan: ShardPlan) -> Written | None:
        if f"{plan.name}.parquet" not in marked:
            return None
        try:
            table = table_from(read_bytes(marks / f"{plan.name}.parquet"))
            mark = parse_json(table.schema.metadata[b"shard"])
            if mark.pop("fingerprint") != plan.fingerprint or table.num_rows != len(plan.rows):
                return None
            written = Written(**mark)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            return None
        whole = packed.get(plan.name) == written.bytes
        return written if whole and Path(plan.name).with_suffix(".idx").name in packed else None

    yield from in_order(read, plans, marks)


def read_rows(plans: Sequence[ShardPlan], marks: AnyPath) -> Iterator[pa.Table]:
    """Yield the rows of each finished shard.

    Raises:
        ShardError: a mark is of another plan: another process has replaced it.
    """

    def read(plan: ShardPlan) -> pa.Table:
        path = marks / f"{plan.name}.parquet"
        table = table_from(read_bytes(path))
        if parse_json(table.schema.metadata[b"shard"])["fingerprint"] != plan.fingerprint:
            raise ShardError(
                f"another process has replaced {path} during this build; make sure that no other "
                "build writes here, and run the build again"
            )
        return table.select(SAMPLES_SCHEMA.names).cast(SAMPLES_SCHEMA)

    yield from in_order(read, plans, marks)
