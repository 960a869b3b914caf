"""Define the disk format of a shard set (images packed in tars), and read its `index.json` and its
table of samples.

Main entries: `open_shards(folders)` takes a list of the folders of one or more sets, each a path or
an address such as `s3://...`, as a text, `Path` or `UPath`. It returns them as one `ShardSet`, the
rows in the order of `folders`. A sample is a row number of its `table`, a pyarrow table;
`len(shard_set)` is the number of samples. The columns are those of `SAMPLES_SCHEMA`, but
`shard_code`, the position of a tar in the tuple `shards`, replaces `shard`, its name.
`column(name)` returns a column of numbers as a NumPy array (such as `label`: 0 real, 1 fake),
`codes(name)` a column of names as (int32 codes, names), and `text(name, sample)` one value of a
text column. `names(column, samples)` returns the names of some samples, `shard_path(sample)` the
path of the tar with a sample, and `take(samples)` a `ShardSet` of these samples: a list or an array
of row numbers (`TypeError` for a mask of booleans; `np.flatnonzero(mask)` has its row numbers). A
`ShardSet` also has:

- `folders`, `shards`, `shard_samples`, `shard_bytes`, `shard_sha256`: one entry per tar: folder,
  file name, number of samples, size and hash.
- `sources`: a dict, source -> its entry in the index (license, policy, ...).
- `sha256`: a hash of the indexes.

`read_index(folder)` takes such a folder of one set and returns its `index.json` as an
`Index` (a dict; sharding/index.py has the fields). Both raise `ShardError` if `index.json` is
missing, damaged or of another format version; `open_shards()` also if `samples.parquet` does not
match it, if two sets give a source another policy or other facts that training depends on, and for
an empty list. Both raise `OSError` for a file that cannot be read, such as a missing
`samples.parquet`. A set is a folder with these files:

    <source>-<split>-<NNNNN>.tar    per sample `<key>.<jpg|png|webp>` (original bytes), `<key>.json`
    <source>-<split>-<NNNNN>.idx    positions in the tar, for DALI's reader
    samples.parquet                 one row per sample
    _info.json                      shard lengths, for timm's reader
    excluded.csv                    images that are not in the set, with reasons
    index.json                      written last: a folder without it is not a set

`join_sets(parts)` concatenates a list of `ShardSet`s; an empty list is a `ShardError`.
`hashes_of(sets)` returns the `sha256` of each `ShardSet` of a dict, by the same names.
`member_metadata(row)` returns the content of `<key>.json` for a row (a dict) of the table, and
`timm_info(index)` that of `_info.json`, as dicts. `content_sha256(index)` is a hash of an index.
`range_fault(table)` checks the numbers of such a table. `numbers_of(column)` and
`codes_of(column)` convert a pyarrow column as `ShardSet` does, and `table_from(data)` reads a table
from the bytes of a parquet file. `docs/shards.md` describes the format without this code.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from escape import reason_of, text_fault
from installed import DEMO
from sharding.index import Index, SourceEntry, Versioned, index_fault
from sharding.rows import row_numbers
from storage import (
    MAX_TABLE_BYTES,
    AnyPath,
    RefusedFileError,
    any_path,
    is_local,
    parse_json,
    read_plain,
    read_text,
    remote_fault,
)

FORMAT_VERSION = 5
CLASSES = ("real", "fake")
"""Class names; a label is an index into this tuple: 0 real, 1 fake."""

CALIBRATION_FEWEST = 20
"""Images of each class that a calibration needs: 5 % of fewer is less than one image."""

UNKNOWN = "unknown"
"""Generator of fakes of which nobody has named it."""

IMAGE_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Image formats allowed in a shard, with the file extension of their members."""

SAMPLES_FILE = "samples.parquet"
INDEX_FILE = "index.json"
EXCLUDED_FILE = "excluded.csv"
TIMM_FILE = "_info.json"

ROW_GROUP = 65536
"""Rows per row group of the samples table; a row group is read as a whole."""

_name = pa.dictionary(pa.int32(), pa.string())
SAMPLES_SCHEMA = pa.schema(
    [
        ("shard", _name),
        ("key", pa.string()),
        ("offset", pa.int64()),  # of the image's first byte in the tar
        ("size", pa.int32()),  # bytes of the image
        ("sha256", pa.binary(32)),  # of the bytes of the image
        ("label", pa.int8()),
        ("source", _name),
        ("generator", _name),
        ("split", _name),
        ("group", pa.string()),  # pair, prompt or video; a group never crosses a split
        ("width", pa.int32()),  # pixels, upright: after the EXIF orientation
        ("height", pa.int32()),
        ("format", _name),
        ("chroma", _name),  # 420, 422, 444, ...; Gray; empty if not a JPEG
        ("jpeg_quality", pa.int8()),  # estimate, 1 to 100; 0 if not a JPEG
        ("jpeg_tables", _name),  # hash of the quantization tables; empty if not a JPEG
        ("exif", pa.bool_()),  # whether the published file carried EXIF
        ("orientation", pa.int8()),  # EXIF, 1 to 8
        ("phash", pa.uint64()),  # perceptual hash
        ("transcoded_from", _name),  # format before packing; empty if bytes are original
        ("origin", pa.string()),  # path below the raw folder
    ]
)
SAMPLES_SCHEMA = pa.schema([field.with_nullable(False) for field in SAMPLES_SCHEMA])

RANGES: Mapping[str, tuple[float, float]] = {
    "label": (0, len(CLASSES) - 1), "offset": (0, 2**63 - 1), "size": (1, 2**31 - 1),
    "width": (1, 2**31 - 1), "height": (1, 2**31 - 1), "jpeg_quality": (0, 100),
    "orientation": (1, 8),
}  # fmt: skip
"""Smallest and largest value of each column with a range."""


def range_fault(table: pa.Table, ranges: Mapping[str, tuple[float, float]] = RANGES) -> str:
    """Return as words the first value that is out of `ranges`, NaN or null; "" if there is none.

    The table has a column `key`, and any of the columns with a range.
    """
    for name, (least, most) in ranges.items():
        if name in table.column_names:
            column = table.column(name)
            inside = pc.and_(pc.greater_equal(column, least), pc.less_equal(column, most))
            row = pc.index(pc.fill_null(inside, False), False).as_py()
            if row >= 0:
                key, value = (table.column(of)[row].as_py() for of in ("key", name))
                return f"{name} of {key[:60]!r} is {value}, expected {least:.3g} to {most:.3g}"
    return ""


_SHARD_NAME = re.compile(r"[\w-][\w.-]*\.tar", re.ASCII)


class ShardError(ValueError):
    """Error of an unusable shard set; the message says what was found and what to do."""


def shard_name(source: str, split: str, number: int) -> str:
    """Return the file name of a shard: `<source>-<split>-<NNNNN>.tar`."""
    return f"{source}-{split}-{number:05d}.tar"


def member_metadata(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `<key>.json`; `cls` is the label as a number, which timm needs."""
    names = {name: row[name] for name in ("source", "generator", "origin")}
    return {"label": CLASSES[row["label"]], "cls": int(row["label"]), **names}


def timm_info(index: Index) -> dict[str, Any]:
    """Return the content of `_info.json`, for timm's webdataset reader, from a set's index."""
    shards = index["shards"]
    split = {
        "name": index["split"],
        "num_samples": index["samples"],
        "filenames": [shard["name"] for shard in shards],
        "shard_lengths": [shard["samples"] for shard in shards],
        "alt_label": "cls",
    }
    return {"splits": {index["split"]: split}}


_ANEW = "the file is damaged; copy the set again, or build it again"


def content_sha256(index: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an index without its key `content_sha256`."""
    content = {key: value for key, value in index.items() if key != "content_sha256"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, eq=False)
class ShardSet:
    """One or more shard sets, opened as one table; a sample is a row number.

    Shard number `code` is the file `shards[code]` in `folders[code]`, with `shard_samples[code]`
    samples, `shard_bytes[code]` bytes and the hash `shard_sha256[code]`. The table's column
    `shard_code` gives the shard of each row. `sources` are the entries of the sources in the index:
    license, augmentation policy, replay and more. `sha256` is a hash of the indexes, which contain
    the hashes of the tables and tars.
    """

    folders: tuple[AnyPath, ...]
    shards: tuple[str, ...]
    shard_samples: tuple[int, ...]
    shard_bytes: tuple[int, ...]
    shard_sha256: tuple[str, ...]
    table: pa.Table
    sources: Mapping[str, SourceEntry]
    sha256: str
    _columns: dict[str, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> np.ndarray:
        """Return a numeric column as an array (n,) of the table's dtype."""
        if name not in self._columns:
            self._columns[name] = numbers_of(self.table.column(name))
        return self._columns[name]

    def codes(self, name: str) -> tuple[np.ndarray, list[str]]:
        """Return a column of names as (int32 codes (n,), names); `names[codes[i]]` is the value."""
        if name not in self._columns:
            self._columns[name] = codes_of(self.table.column(name))
        return self._columns[name]

    def rows_of_shards(self) -> dict[int, np.ndarray]:
        """Return the rows of each shard in the order of its tar: shard code -> int64 (n,). They are
        sorted once, so the cost does not grow with rows times shards.
        """
        codes = self.column("shard_code")
        order = np.lexsort((self.column("offset"), codes))
        present, starts = np.unique(codes[order], return_index=True)
        return dict(zip(present.tolist(), np.split(order, starts)[1:], strict=True))

    def names(self, column: str, samples: np.ndarray) -> list[str]:
        """Return the values of a column of names for `samples`."""
        codes, names = self.codes(column)
        return [names[code] for code in codes[samples]]

    def generators(self, samples: np.ndarray | slice = slice(None)) -> list[str]:
        """Return the generators of the fakes (among `samples`), sorted, without those that have no
        name: their class, or `UNKNOWN`, stands for it.
        """
        codes, names = self.codes("generator")
        of_fakes = np.unique(codes[samples][self.column("label")[samples] == 1])
        return sorted({names[code] for code in of_fakes} - {*CLASSES, UNKNOWN})

    def text(self, name: str, sample: int) -> str:
        """Return one value of a text column."""
        return self.table.column(name)[int(sample)].as_py()

    def shard_path(self, sample: int) -> AnyPath:
        """Return the path of the tar with a sample."""
        code = int(self.column("shard_code")[sample])
        return self.folders[code] / self.shards[code]

    def name(self, sample: int) -> str:
        """Name a sample for messages: set, shard and key."""
        path = self.shard_path(sample)
        return f"{path.parent.name}/{path.name}:{self.text('key', sample)}"

    def take(self, samples: Sequence[int] | np.ndarray) -> "ShardSet":
        """Return a `ShardSet` of these samples, in this order, with another `sha256`."""
        rows = row_numbers(samples)
        digest = hashlib.sha256(self.sha256.encode() + rows.astype("<i8").tobytes())
        return replace(self, table=self.table.take(rows), sha256=digest.hexdigest(), _columns={})

    def describe(self) -> str:
        """List the folders for messages."""
        return ", ".join(dict.fromkeys(str(folder) for folder in self.folders))


def numbers_of(column: pa.ChunkedArray) -> np.ndarray:
    """Convert a column without nulls to an array. pyarrow's `to_numpy` would import pandas."""
    if pa.types.is_boolean(column.type):  # dlpack does not support packed bits
        column = pc.cast(column, pa.uint8())
        return numbers_of(column).astype(np.bool_)
    chunks = [np.from_dlpack(chunk) for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.empty(0, column.type.to_pandas_dtype())


def hashes_of(sets: Mapping[str, ShardSet]) -> dict[str, str]:
    """Return the hash of the index of each set, by the names of `sets`."""
    return {name: shards.sha256 for name, shards in sets.items()}


def codes_of(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Return codes and names of a text column; its chunks may have different dictionaries."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    chunks = column.unify_dictionaries().chunks
    if not chunks:
        return np.empty(0, np.int32), []
    codes = numbers_of(pa.chunked_array([chunk.indices for chunk in chunks]))
    return codes, chunks[0].dictionary.to_pylist()


def read_index(folder: str | AnyPath) -> Index:
    """Read and check the `index.json` of a set.

    Raises:
        ShardError: no folder, no `index.json` (the build did not finish), another format version,
            or a damaged index.
    """
    folder = any_path(folder)
    with _explained(folder):
        return _read_index(folder)


@contextlib.contextmanager
def _explained(folder: AnyPath) -> Iterator[None]:
    """Turn the different errors of remote storage clients into a `ShardError` with the address."""
    try:
        yield
    except (ShardError, RefusedFileError):
        raise
    except Exception as error:
        if is_local(folder):
            raise
        raise ShardError(remote_fault(folder, "cannot be read", error)) from error


def _where_sets_are(folder: AnyPath) -> str:
    """Return what to do if a folder holds no shard set."""
    for start in range(1, len(folder.parts) - 1):  # was a path given instead of a name?
        if Path(*(tail := folder.parts[start:]), INDEX_FILE).is_file():
            return f"name the set without its folder: {tail[-1]} instead of {'/'.join(tail)}"
    beside = sorted(path.parent.name for path in folder.parent.glob(f"*/{INDEX_FILE}"))
    if beside:
        return f"{folder.parent} has the sets {', '.join(beside)}"
    return f"make one with `python -m sharding build`, or try `{DEMO}`"


def _read_index(folder: AnyPath) -> Index:
    path = folder / INDEX_FILE
    if not path.exists():
        tars = len(list(folder.glob("*.tar"))) if folder.is_dir() else 0
        if tars:
            raise ShardError(
                f"{folder} has tar files but no {INDEX_FILE}, so its build did not finish; run "
                "`python -m sharding build` again to resume it"
            )
        raise ShardError(f"no shard set at {folder}; {_where_sets_are(folder)}")
    try:
        index = parse_json(read_text(path))
    except ValueError as error:
        raise ShardError(f"{path} is not JSON ({text_fault(error)}); {_ANEW}") from error
    for kind in (Versioned, Index):  # another version has other fields
        if fault := index_fault(index, kind):
            raise ShardError(f"{path}: {fault}; {_ANEW}")
        if index["format_version"] != FORMAT_VERSION:
            raise ShardError(
                f"{path} has format version {index['format_version']}, expected {FORMAT_VERSION}; "
                "build the set again with `python -m sharding build`"
            )
    if tuple(index["classes"]) != CLASSES:
        raise ShardError(f"{path} has classes {index['classes']}, expected {list(CLASSES)}")
    for number, entry in enumerate(index["shards"]):
        if not _SHARD_NAME.fullmatch(entry["name"]):
            raise ShardError(f"{path}: shards.{number}.name is {entry['name']!r}; {_ANEW}")
    return index


_FACTS = ("policy", "replay", "synthetic")
"""Facts of a source that change training or the record in a checkpoint."""


def _refuse_other_facts(
    sources: Mapping[str, SourceEntry],
    more: Mapping[str, SourceEntry],
    homes: Mapping[str, AnyPath],
    folder: AnyPath,
) -> None:
    """Refuse a set in `folder` with the sources `more` if one of them has other facts in an earlier
    set, in its folder of `homes`: facts are stored by the name of the source, so the facts of one
    set would be lost.
    """
    for name in sorted(sources.keys() & more.keys()):
        for fact in _FACTS:
            before, now = (json.dumps(entry[name].get(fact, False)) for entry in (sources, more))
            if before != now:
                raise ShardError(
                    f"source {name} has {fact} {before} in {homes[name]}, but {now} in {folder}; "
                    "give it the same in both catalogs, or another name in one, and build that set "
                    "again"
                )


def open_shards(folders: Sequence[str | AnyPath]) -> ShardSet:
    """Open sets as one `ShardSet`, with the rows in the order of `folders`.

    Raises:
        ShardError: see `read_index`; a samples table does not match its index; sets give a source
            other facts; or `folders` is empty.
        TypeError: `folders` is one folder, not a list.
    """
    if isinstance(folders, str | AnyPath):
        raise TypeError(f"expected a list of folders, got one; use open_shards([{str(folders)!r}])")
    if not folders:
        raise ShardError("no shard sets to open; name at least one folder")
    tables, counts, sizes, hashes, homes = [], [], [], [], []
    shards: list[str] = []
    sources: dict[str, SourceEntry] = {}
    home_of: dict[str, AnyPath] = {}
    digest = hashlib.sha256()
    for folder in map(any_path, folders):
        index = read_index(folder)
        with _explained(folder):
            data = read_plain(folder / SAMPLES_FILE, MAX_TABLE_BYTES)
            digest.update(read_plain(folder / INDEX_FILE))
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != index["samples_sha256"]:
            raise ShardError(
                f"{folder / SAMPLES_FILE} has sha256 {sha256[:12]}, {INDEX_FILE} says "
                f"{index['samples_sha256'][:12]}; build the set again"
            )
        names = [shard["name"] for shard in index["shards"]]
        try:
            table = table_from(data).select(SAMPLES_SCHEMA.names).cast(SAMPLES_SCHEMA)
            if fault := range_fault(table):
                raise ValueError(fault)
            tables.append(_number_shards(table, names, len(shards)))
        except (KeyError, OSError, ValueError, pa.ArrowException) as error:
            reason = reason_of(error)
            raise ShardError(
                f"{folder / SAMPLES_FILE} is not a samples table ({reason}); {_ANEW}"
            ) from error
        shards += names
        counts += [shard["samples"] for shard in index["shards"]]
        sizes += [shard["bytes"] for shard in index["shards"]]
        hashes += [shard["sha256"] for shard in index["shards"]]
        homes += [folder] * len(names)
        _refuse_other_facts(sources, index["sources"], home_of, folder)
        sources |= index["sources"]
        home_of |= dict.fromkeys(index["sources"], folder)
    return ShardSet(
        tuple(homes),
        tuple(shards),
        tuple(counts),
        tuple(sizes),
        tuple(hashes),
        pa.concat_tables(tables),
        sources,
        digest.hexdigest(),
    )


def join_sets(parts: Sequence[ShardSet]) -> ShardSet:
    """Concatenate sets, or parts of sets, into one.

    Raises:
        ShardError: `parts` is empty.
    """
    if not parts:
        raise ShardError("no shard sets to join; expected at least one")
    tables, first = [], 0
    for part in parts:
        code = pc.add(part.table.column("shard_code"), pa.scalar(first, pa.int32()))
        index = part.table.schema.get_field_index("shard_code")
        tables.append(part.table.set_column(index, "shard_code", code))
        first += len(part.shards)
    return ShardSet(
        tuple(folder for part in parts for folder in part.folders),
        tuple(name for part in parts for name in part.shards),
        tuple(count for part in parts for count in part.shard_samples),
        tuple(size for part in parts for size in part.shard_bytes),
        tuple(sha256 for part in parts for sha256 in part.shard_sha256),
        pa.concat_tables(tables),
        {name: facts for part in parts for name, facts in part.sources.items()},
        hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest(),
    )


def table_from(data: bytes) -> pa.Table:
    """Read a table from the bytes of a parquet file.

    `pyarrow.parquet.read_table` is not used: it imports pandas if installed (most of a second). The
    bytes are copied to memory of Arrow: a thread of Arrow that frees memory of Python a moment
    after the read, while the interpreter exits, aborts the process (pyarrow 26).
    """
    memory = pa.allocate_buffer(len(data))
    memoryview(memory).cast("B")[:] = data
    file = pq.ParquetFile(pa.BufferReader(memory))
    groups = []
    for group_index in range(file.num_row_groups):
        groups.append(file.read_row_group(group_index))
        pa.default_memory_pool().release_unused()  # otherwise all groups' buffers stay allocated
    return pa.concat_tables(groups) if groups else file.read()


def _number_shards(table: pa.Table, names: list[str], first: int) -> pa.Table:
    """Replace the column `shard` by `shard_code`: the number of the shard, counted from `first`.

    The numbers distinguish shards of two sets that have the same name.
    """
    codes, used = codes_of(table.column("shard"))
    position = {name: first + index for index, name in enumerate(names)}
    numbered = np.array([position[name] for name in used], np.int32)[codes]
    column = pa.Array.from_buffers(pa.int32(), len(numbered), [None, pa.py_buffer(numbered)])
    return table.set_column(table.schema.get_field_index("shard"), "shard_code", column)
