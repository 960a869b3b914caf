"""List raw images and read their bytes: files, members of zip archives, cells of parquet tables.

Main entries, two generators: `walk(raw, root)` takes the folder of all raw datasets (a `Path` or
`UPath`) and the name of a folder in it, a text. It yields a `RawFile` for each file below
`raw/root`, sorted by path, with each zip archive as a folder. Left out are hidden files, and the
volumes X.z01, ... of a split archive, which is read as X.zip; without X.zip they come at the end,
`excluded` as a `VOLUME`. A broken archive raises `RawError` (a `ValueError`), an unreadable folder
`OSError`. The fields of a `RawFile`:

- `inside`: path below `raw/root`.
- `path`: path of the file with the bytes, below `raw`.
- `member`: location in that file if it is an archive, else "".
- `size`: in bytes.
- `version`: a text that changes with the file; with any volume, if it is a split archive.
- `excluded`: the reason if it is not read (such as a link, a name that is not UTF-8, or an
  encrypted member of an archive), else "".

`read_all(raw, rows)` takes the same folder and a list of dicts, one per image, with the keys
`path`, `member`, `size`, `version` and `excluded` of a `RawFile`. For each image it yields the
bytes, or a `DecodeError` (not raised) if `excluded` is not "" (the reason), if `size` is above
`MAX_BYTES` of `imaging/decode.py`, if the file in a zip archive is damaged or not the listed one
(its checksum), or if a cell of a table holds no bytes. It raises `OSError` if a file cannot be
read. Nothing is unpacked to disk. Files at an address are read ahead, many at a time.

`version` is not compared with the file: a file outside of archives that has changed since it was
listed is read as it is now. Only a zip archive with another version is opened anew in this process.

To read a cell of a parquet table, `member` is "<row group>:<row in the group>:<column>", as
sharding/listing.py lists cells. Cells of one table that follow each other in `rows` are read from
one opened file, those of one row group together. Only `path` and `member` count for a cell.
`read_all()` raises `RawError` if the cells are not sorted by the row in the group, and if a table
is damaged or has fewer rows than when it was listed.

For other readers of tables, `rows_of(table, group, leaves)` yields each row of a row group of a
`pq.ParquetFile` as a batch, `leaf_of(schema, column)` returns the leaf of an image column, and
`cell_of(row, column)` the image in such a batch. `is_bytes(kind)` tells whether values are bytes.

`row_group_of(row)` returns the path and the row group of such a dict, a pair of texts, or None if
it is no cell of a table.

`nfc(name)` returns a name with composed characters (Unicode NFC). `folder_of(raw, root)` returns
the name of the folder `root` below `raw` as it is on disk, where macOS may have decomposed its
accents; if there is no such folder, `root` itself.
"""

import functools
import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from escape import as_utf8, reason_of
from imaging import zip
from imaging.decode import MAX_BYTES, DecodeError
from imaging.names import HIDDEN, is_hidden, kind_of
from sharding.remote import in_order, read_bytes
from storage import AnyPath, is_local, remote_errors

PIECE = 65_536
"""Bytes of a table on disk per read; else pyarrow reads the whole column of a row group."""

VOLUME = "a volume of a split archive, whose last volume, the .zip, is not beside it"


class RawError(ValueError):
    """Error of a raw dataset that cannot be read; the message says what to do."""


class RawFile(NamedTuple):
    """One file of a raw dataset, on disk or in an archive."""

    inside: str  # path below the source's root, with '/'
    path: str  # file with the bytes, below the raw folder
    member: str  # location in that file; empty for the whole file
    size: int  # bytes
    version: str  # changes when the bytes may have changed
    excluded: str = ""  # why the file is not read


def nfc(name: str) -> str:
    """Return a name in composed form (NFC), as people type it; macOS decomposes file names."""
    return unicodedata.normalize("NFC", name)


def folder_of(raw: AnyPath, root: str) -> str:
    """Return the folder below `raw` whose composed name (NFC) equals `root`, or `root` if none."""
    if not is_local(raw) or (raw / root).exists():
        return root
    path = raw
    for part in PurePosixPath(root).parts:
        names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
        same = [name for name in sorted(names) if nfc(name) == nfc(part)]
        if not same:
            return root
        path /= same[0]
    return path.relative_to(raw).as_posix()


def walk(raw: AnyPath, root: str) -> Iterator[RawFile]:
    """Yield every file below `raw/root`, sorted by path, and the files in archives.

    Links are yielded as excluded.

    Raises:
        RawError: an archive is broken or incomplete.
        OSError: a folder cannot be read.
    """
    listed = _walk_local(raw, root) if is_local(raw) else _walk_remote(raw, root)
    volume = re.compile(r"(.+)\.z\d+", re.IGNORECASE | re.DOTALL)
    volumes: dict[str, list[RawFile]] = {}  # name of a split archive -> its other volumes
    archives = set[str]()
    for file in listed:
        if match := volume.fullmatch(file.inside):  # volumes come before their archive (.zip)
            volumes.setdefault(match[1].lower(), []).append(file)
        elif file.inside.lower().endswith(".zip"):
            stem = file.inside[:-4].lower()
            archives.add(stem)
            if others := volumes.pop(stem, []):
                versions = (f"{other.size} {other.version}" for other in others)
                text = "\n".join([file.version, *versions])
                file = file._replace(version=hashlib.sha256(text.encode()).hexdigest()[:16])
            if file.excluded:
                yield file
            else:
                yield from _members(raw, file)
        else:
            yield file
    for stem in sorted(volumes.keys() - archives):  # X.ZIP comes before X.z01
        # Without a volume X.z01 it is no split archive, but files such as `game.z64`.
        is_split = any(re.search(r"\.z0*1$", file.inside, re.IGNORECASE) for file in volumes[stem])
        for file in volumes[stem]:
            yield file._replace(excluded=VOLUME) if is_split and not file.excluded else file


def _members(raw: AnyPath, archive: RawFile) -> Iterator[RawFile]:
    """Yield the files in a zip archive, sorted by name."""
    path = raw / archive.path
    try:
        with remote_errors(path, "could not be read"):
            for member in zip.members(path, archive.path):
                if member.excluded == HIDDEN:
                    continue
                yield RawFile(
                    f"{archive.inside}/{member.name}", archive.path, member.where, member.size,
                    archive.version, member.excluded,
                )  # fmt: skip
    except zip.ZipError as error:
        raise RawError(str(error)) from error


def _walk_local(raw: AnyPath, root: str) -> Iterator[RawFile]:
    # Strings and scandir, because a million Path objects take most of a minute. A stack, because
    # folders may be nested deeper than the recursion limit of Python.
    top = str(raw / root)
    stack = [_sorted_entries(top)]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
        elif is_hidden(entry.name):
            continue
        elif entry.is_dir(follow_symlinks=False):
            stack.append(_sorted_entries(entry.path))
        else:
            facts = entry.stat(follow_symlinks=False)
            name = entry.path[len(top.rstrip("/")) + 1 :]
            inside = as_utf8(name)
            excluded = "" if stat.S_ISREG(facts.st_mode) else kind_of(facts.st_mode)
            if inside != name and not excluded:
                excluded = "a name that is not UTF-8; rename it"
            yield RawFile(
                inside, f"{root}/{inside}", "", facts.st_size, str(facts.st_mtime_ns), excluded
            )


def _sorted_entries(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return iter(sorted(entries, key=lambda entry: entry.name))


def _walk_remote(raw: UPath, root: str) -> Iterator[RawFile]:
    top = (raw / root).path.rstrip("/")
    with remote_errors(raw / root, "could not be listed"):
        files = raw.fs.find(top, detail=True)
    for path, info in sorted(files.items()):
        inside = path.removeprefix(top).lstrip("/")
        if is_hidden(inside):
            continue
        stamp = info.get("ETag") or info.get("LastModified") or info.get("mtime") or ""
        yield RawFile(inside, f"{root}/{inside}", "", info["size"], str(stamp))


# --- parquet tables -------------------------------------------------------------------------------


def leaf_of(schema: pa.Schema, column: str) -> str:
    """Return the parquet column to read for an image column: of a struct, its field `bytes`.

    Raises:
        KeyError: no column has this name, or several have it.
    """
    index = schema.get_field_index(column)
    if index < 0:
        raise KeyError(f"{schema.names.count(column)} columns named {column!r}")
    return f"{column}.bytes" if _bytes_index(schema.field(index).type) >= 0 else column


def is_bytes(kind: pa.DataType) -> bool:
    """Return whether the values of a type are bytes, not texts."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    known = ("binary", "large_binary", "binary_view")
    return str(kind) in known or pa.types.is_fixed_size_binary(kind)


def _bytes_index(kind: pa.DataType) -> int:
    return int(kind.get_field_index("bytes")) if pa.types.is_struct(kind) else -1


def rows_of(table: pq.ParquetFile, group: int, leaves: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a row group, each as a batch of one row, with the columns `leaves`."""
    # Row by row, because each row of a file of 2 kB may refer to one cell of 60 MB. Without
    # threads, because a thread of Arrow may free the Python stream after the reader has ended.
    yield from table.iter_batches(1, row_groups=[group], columns=leaves, use_threads=False)


def cell_of(row: pa.RecordBatch, column: str) -> bytes | DecodeError:
    """Return the bytes of an image cell: Hugging Face stores bytes, or a struct with bytes."""
    value = row.column(column)[0]
    if value.is_valid and _bytes_index(value.type) >= 0:
        value = value["bytes"]
    if not (value.is_valid and is_bytes(value.type)):  # not a list of numbers, which is slow
        return DecodeError("the cell holds no image")
    value = value.value if pa.types.is_dictionary(value.type) else value
    size = value.as_buffer().size if value.is_valid else 0
    if size > MAX_BYTES:
        return DecodeError(f"{size:,} bytes, more than the limit of {MAX_BYTES:,}")
    return bytes(value.as_py()) if value.is_valid else DecodeError("the cell holds no image")


def _read_cells(raw: AnyPath, rows: Sequence[Mapping[str, Any]]) -> Iterator[bytes | DecodeError]:
    """Yield image cells of one table, in ascending order of rows in each row group.

    Raises:
        RawError: the rows are not in ascending order, or the table is damaged or has too few rows.
        OSError: the file cannot be read.
    """
    path = rows[0]["path"]
    try:
        with (raw / path).open("rb") as stream:
            # One `ParquetFile` for all rows, because each reads the footer, which can be long.
            piece = PIECE if is_local(raw) else 0
            table = pq.ParquetFile(stream, pre_buffer=False, buffer_size=piece)
            for group, run in groupby(
                (row["member"].split(":", 2) for row in rows), lambda member: member[0]
            ):
                yield from _cells(table, path, int(group), [(int(at), c) for _, at, c in run])
    except (KeyError, UnicodeDecodeError, OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise  # disk or network; pyarrow raises a plain OSError without errno
        reason = reason_of(error)
        raise RawError(
            f"{path} is damaged, or not the table that was listed ({reason}); fetch it again"
        ) from error


def _cells(
    table: pq.ParquetFile, path: str, group: int, wanted: Sequence[tuple[int, str]]
) -> Iterator[bytes | DecodeError]:
    """Yield the cells (row, column) of one row group, in ascending order of rows."""
    # Rows are read once: one that comes too early would count as missing.
    for (before, _), (after, _) in pairwise([(0, ""), *wanted]):
        if after < before:
            raise RawError(
                f"{path}: row {after} of row group {group} is asked for after row {before}, "
                "expected ascending rows; sort the cells by their row"
            )
    schema = table.schema_arrow
    leaves = [leaf_of(schema, column) for column in sorted({column for _, column in wanted})]
    following = 0
    for at, row in enumerate(rows_of(table, group, leaves)):
        while following < len(wanted) and wanted[following][0] == at:
            yield cell_of(row, wanted[following][1])
            following += 1
        if following == len(wanted):
            return
    raise RawError(f"{path} has fewer rows than when it was listed; run again")


# --- reading --------------------------------------------------------------------------------------


def read_all(raw: AnyPath, rows: Sequence[Mapping[str, Any]]) -> Iterator[bytes | DecodeError]:
    """Yield the bytes of each row (an `Item` as a mapping), or the error of an unreadable image.

    Cells of one parquet row group must be in ascending order of rows, and should be adjacent: the
    group is then read once.

    Raises:
        RawError: the cells of a row group are not in ascending order, or a parquet table is damaged
            or has fewer rows than when it was listed.
        OSError: a file cannot be read.
    """
    read = functools.partial(_read_one, raw)
    for (path, is_file), run in groupby(rows, lambda row: (_table_of(row), not row["member"])):
        if path:
            with remote_errors(raw / path, "could not be read"):
                yield from _read_cells(raw, list(run))
        elif is_file:
            yield from in_order(read, run, raw, lambda row: row["size"])
        else:
            yield from map(read, run)


def row_group_of(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the file and row group of a parquet cell; None for other files."""
    path = _table_of(row)
    return (path, row["member"].split(":", 1)[0]) if path else None


def _table_of(row: Mapping[str, Any]) -> str:
    """Return the file of a parquet cell; "" for other files."""
    is_cell = row["path"].lower().endswith(".parquet") and row["member"]
    return str(row["path"]) if is_cell else ""


def _read_one(raw: AnyPath, row: Mapping[str, Any]) -> bytes | DecodeError:
    if row["excluded"]:
        return DecodeError(row["excluded"])
    if row["size"] > MAX_BYTES:
        return DecodeError(f"{row['size']:,} bytes, more than the limit of {MAX_BYTES:,}")
    path = raw / row["path"]
    try:
        with remote_errors(path, "could not be read"):
            if row["member"]:
                return zip.read_member(path, row["member"], row["version"])
            return read_bytes(path)
    except DecodeError as error:
        return error
