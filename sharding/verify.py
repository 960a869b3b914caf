"""Verify shard sets (tars of images) against their index (`index.json` and a table of samples):
bytes, images, counts, splits and the other files of a set.

Main entry: `verify(folders, *, jobs, on_images)` returns all faults as a list of lines, empty if
there are none. It writes nothing. It raises `ShardError` or `OSError` if `open_shards()` of
sharding/format.py does for a set (such as a missing or damaged index), and `ValueError` if `jobs`
is too large for this machine (checked only for sets of two or more tars).

- `folders`: list of the folders of sets, each a `Path` or `UPath`.
- `jobs`: number of processes (default 0: one per core). Unless it is 1, a script must call
  `verify()` inside `if __name__ == "__main__":`.
- `on_images`: a function that is called after each checked tar with the number of images that the
  index lists for it (default: does nothing).

Tars are read again, images are decoded again and samples are counted again, and all is compared
with the index. So are the list of excluded images, the `.idx` files and `_info.json`. Over all the
sets, no file may occur twice, and no image (perceptual hash) and no group of related images may be
in two splits (train, val, test).

`verify_shard(folder, entry, rows)` checks one tar, in a worker process. It takes the set's folder
as a text, the tar's entry in `shards` of the index (a dict) and its rows of the table of samples (a
pyarrow table), and returns (number of images, list of faults).

`sets_in(folder)` returns a list of folders of sets: `[folder]` if this is a set, else the sets
directly below it. It raises `ShardError` if there is none, or if the set is a whole bucket or host.
`unfinished_in(folder)` returns a fault, a line, for each folder directly below it that has tars but
no index, none if `folder` is a set.
"""

import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from imaging import tar
from imaging.decode import DecodeError, prepare
from imaging.fingerprint import fingerprints, green_grid
from sharding.executor import run_all
from sharding.format import (
    CLASSES,
    EXCLUDED_FILE,
    IMAGE_FORMATS,
    INDEX_FILE,
    TIMM_FILE,
    ShardError,
    ShardSet,
    codes_of,
    content_sha256,
    member_metadata,
    numbers_of,
    open_shards,
    read_index,
    timm_info,
)
from sharding.index import Index
from sharding.lock import reading
from sharding.remote import files_in
from storage import (
    AnyPath,
    any_path,
    is_local,
    parse_json,
    read_plain,
    read_text,
    sha256_of,
)


def sets_in(folder: AnyPath) -> list[AnyPath]:
    """Return the set at `folder`, or the sets directly below it. A folder of this machine such as
    `.` is returned as an absolute path, because a set has the name of its folder.

    Raises:
        ShardError: there is no set, or it is not in a folder of its bucket or host.
    """
    if is_local(folder) and folder.name in ("", ".."):
        folder = folder.resolve()
    if (folder / INDEX_FILE).exists():
        if not folder.name:
            raise ShardError(
                f"{folder} is a whole bucket or host, expected a folder that has the name of the "
                "set; move the set to such a folder"
            )
        return [folder]
    below = sorted(path.parent for path in folder.glob(f"*/{INDEX_FILE}"))
    if not below:
        read_index(next(iter(_unfinished(folder)), folder))  # raises the ShardError
    return below


def unfinished_in(folder: AnyPath) -> list[str]:
    """Return one fault for each set directly below `folder` whose build did not finish."""
    if (folder / INDEX_FILE).exists():
        return []
    return [
        f"{path.name}: tar files but no {INDEX_FILE}: its build did not finish; run it again"
        for path in _unfinished(folder)
    ]


def _unfinished(folder: AnyPath) -> list[AnyPath]:
    # Look for `.idx`: only a build writes it next to a tar. Other programs write tars too.
    packed = sorted({path.parent for path in folder.glob("*/*.idx")})
    return [path for path in packed if not (path / INDEX_FILE).exists()]


def verify(
    folders: Sequence[AnyPath],
    *,
    jobs: int = 0,
    on_images: Callable[[int], None] = lambda _count: None,
) -> list[str]:
    """Return all faults of the sets, one line each; an empty list if there are none.

    Raises:
        ShardError: a set cannot be opened.
        BlockingIOError: a build is changing a set.
    """
    faults: list[str] = []
    opened = []
    for folder in folders:
        shards = open_shards([folder])
        opened.append(shards)
        index = read_index(folder)
        faults += _check_totals(folder, index, shards)
        entries, rows_of = index["shards"], shards.rows_of_shards()
        tasks = (
            (str(folder), entry, _copied(shards.table, rows_of.get(code, np.empty(0, np.int64))))
            for code, entry in enumerate(entries)
        )
        with reading(shards):  # or a build could replace a shard meanwhile
            for count, new_faults in run_all(
                verify_shard, tasks, "local", jobs if len(entries) > 1 else 1
            ):
                faults += new_faults
                on_images(count)
    return sorted(faults) + _check_splits(folders, opened)


def _copied(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Copy rows of the table: pickling a slice for a process would send the whole table. `take`
    copies all chunks of its input first, so its input is a slice: rows of one shard are adjacent.
    """
    first, end = (rows.min(), rows.max() + 1) if len(rows) else (0, 0)
    return table.slice(first, end - first).take(rows - first)


def verify_shard(folder: str, entry: dict[str, Any], rows: pa.Table) -> tuple[int, list[str]]:
    """Check one shard: hash, members and images. Return its number of images and its faults."""
    path = any_path(folder) / entry["name"]
    where = f"{any_path(folder).name}/{entry['name']}"
    if not path.is_file():  # opening a named pipe would wait forever
        return len(rows), [f"{where}: missing"]
    faults = []
    if path.stat().st_size != entry["bytes"]:
        faults.append(f"{where}: {path.stat().st_size:,} bytes, the index says {entry['bytes']:,}")
    elif sha256_of(path) != entry["sha256"]:
        faults.append(f"{where}: its sha256 is not the one in the index")
    if len(rows) != entry["samples"]:
        faults.append(f"{where}: {len(rows):,} rows, the index says {entry['samples']:,}")
    listed = {row["key"]: row for row in rows.to_pylist()}
    try:
        with path.open("rb") as stream:
            seen, lines = _check_members(stream, listed, faults, where)
    except (DecodeError, OSError) as error:
        return len(rows), [*faults, f"{where}: incomplete or damaged tar: {error}"]
    for key in sorted(listed.keys() - seen):
        faults.append(f"{where}:{key}: in the index but not in the tar")
    idx = path.with_suffix(".idx")
    expected = "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"
    if not idx.exists() or read_plain(idx) != expected.encode():
        faults.append(f"{where}: its .idx is missing or has wrong positions")
    return len(rows), faults


def _check_members(
    stream: BinaryIO, listed: dict[str, dict[str, Any]], faults: list[str], where: str
) -> tuple[set[str], list[str]]:
    """Check members against their rows; return the keys with an image, and the `.idx` lines."""
    seen: set[str] = set()
    parts: dict[str, list[str]] = {}
    for member, refused in tar.headers(stream):
        key, _, extension = member.name.partition(".")
        name = f"{where}:{member.name}"
        row = listed.get(key)
        if row is None or not member.isreg():
            faults.append(f"{name}: a member that is not in the index")
            continue
        if refused:  # not read: a sparse member may claim any size
            faults.append(f"{name}: {refused}")
            continue
        parts.setdefault(key, []).append(
            f"{extension} {member.offset_data} {member.size} {member.name}"
        )
        stream.seek(member.offset_data)
        data = stream.read(member.size)
        if extension == "json":
            faults += [f"{name}: {fault}" for fault in _check_metadata(data, row)]
        elif key in seen:
            faults.append(f"{name}: a second image of one sample")
        else:
            seen.add(key)
            if (member.offset_data, member.size) != (row["offset"], row["size"]):
                faults.append(f"{name}: another offset or size than in the index")
            faults += [f"{name}: {fault}" for fault in _check_image(data, extension, row)]
    return seen, [" ".join(part) for part in parts.values()]


def _check_metadata(data: bytes, row: dict[str, Any]) -> Iterator[str]:
    try:
        meta = parse_json(data)
    except ValueError as error:
        yield f"not JSON: {error}"
        return
    if not isinstance(meta, dict):
        yield f"not the facts of an image: {type(meta).__name__}, expected a JSON object"
        return
    for name, value in member_metadata(row).items():
        if meta.get(name) != value:
            yield f"{name} is {meta.get(name)!r}, the index says {value!r}"


def _check_image(data: bytes, extension: str, row: dict[str, Any]) -> Iterator[str]:
    if hashlib.sha256(data).digest() != row["sha256"]:
        yield "the bytes do not match the sha256 in the index"
    if IMAGE_FORMATS.get(row["format"]) != extension:
        yield f"a .{extension}, the index says {row['format']}"
    try:
        prepared = prepare(data)
    except DecodeError as error:
        yield str(error)
        return
    pixels = prepared.pixels
    facts = (
        _FACTS[:1] if row["transcoded_from"] else _FACTS
    )  # the other facts describe the published file
    for name in facts:
        value = getattr(prepared.facts, name)
        if value != row[name]:
            yield f"{name} is {value!r}, the index says {row[name]!r}"
    if pixels.shape[:2] != (row["height"], row["width"]):
        yield (
            f"{pixels.shape[1]} x {pixels.shape[0]} pixels, the index says "
            f"{row['width']} x {row['height']}"
        )
    if fingerprints(green_grid(pixels)[None])[0][0] != row["phash"]:
        yield "another perceptual hash than in the index"


_FACTS = ("format", "chroma", "jpeg_quality", "jpeg_tables", "exif", "orientation")


def _check_totals(folder: AnyPath, index: Index, shards: ShardSet) -> Iterator[str]:
    """Check counts and keys, and find files that the index does not list."""
    where = folder.name
    if content_sha256(index) != index["content_sha256"]:
        yield (
            f"{where}/{INDEX_FILE}: changed after the build: its content_sha256 does not match; "
            "do not trust its license, policy, replay and counts"
        )
    yield from _check_left_out(folder, index)
    splits = [index["split"]] if index["samples"] else []
    for name, values in (("source", index["sources"]), ("split", splits)):
        present = {shards.codes(name)[1][code] for code in np.unique(shards.codes(name)[0])}
        if present != set(values):
            yield f"{where}: {name}s are {sorted(present)}, the index says {sorted(values)}"
    if index["set"] != where:
        yield f"{where}: the index belongs to set {index['set']}"
    if len(shards) != index["samples"]:
        yield f"{where}: {len(shards):,} rows, the index says {index['samples']:,}"
    again = Counter(first for _row, first in _repeated(shards.table.column("key")))
    for row, count in again.items():
        yield f"{where}:{shards.text('key', row)}: {1 + count} samples have this key"
    of_labels = np.bincount(shards.column("label")).tolist()
    labels = {CLASSES[label]: count for label, count in enumerate(of_labels) if count}
    if labels != index["totals"]["label"]:
        yield f"{where}: labels are {labels}, the index says {index['totals']['label']}"
    totals = {"source": index["totals"]["source"], "generator": index["totals"]["generator"]}
    for name, total in totals.items():
        codes, names = shards.codes(name)
        counts = {names[code]: int(count) for code, count in enumerate(np.bincount(codes)) if count}
        if counts != total:
            yield f"{where}: the counts per {name} differ from the index"
    info = folder / TIMM_FILE
    if not info.exists() or _json_of(info) != timm_info(index):
        yield f"{where}/{TIMM_FILE}: missing, or not as the index requires"
    listed = {entry["name"] for entry in index["shards"]}
    for path in files_in(folder):
        shard = Path(path.name).with_suffix(".tar").name
        if path.suffix in (".tar", ".idx") and shard not in listed:
            yield f"{where}/{path.name}: a file that the index does not list"


def _json_of(path: AnyPath) -> Any:
    try:
        return parse_json(read_text(path))
    except ValueError:
        return None


def _check_left_out(folder: AnyPath, index: Index) -> Iterator[str]:
    """Check the list of excluded images: its bytes, and its counts by reason."""
    path, where = folder / EXCLUDED_FILE, f"{folder.name}/{EXCLUDED_FILE}"
    if not path.exists():
        yield f"{where}: missing"
        return
    if sha256_of(path) != index["excluded_sha256"]:
        yield f"{where}: its sha256 is not the one in the index"
    with path.open("r", encoding="utf-8", errors="replace", newline="") as stream:
        try:
            counts = Counter(row.get("reason") for row in csv.DictReader(stream))
        except csv.Error as error:
            yield f"{where}: not a table: {error}"
            return
    if dict(counts) != index["excluded"]:
        yield f"{where}: its counts by reason differ from the index"


def _check_splits(folders: Sequence[AnyPath], opened: Sequence[ShardSet]) -> list[str]:
    """Check that no group, bytes or perceptual hash is in two splits of the given sets."""
    if not opened:
        return []
    table = pa.concat_tables([shards.table.drop_columns("shard_code") for shards in opened])
    home = np.repeat(np.arange(len(opened)), [len(shards) for shards in opened])
    splits, _names = codes_of(table.column("split"))

    def name(row: int) -> str:
        key, origin = (table.column(column)[row].as_py() for column in ("key", "origin"))
        return f"{folders[home[row]].name}:{key} ({origin})"

    faults = []
    for column, what in _TIES:
        for a, b in _repeated(table.column(column)):
            if splits[a] != splits[b] or column == "sha256":
                is_packed_anew = any(table.column("transcoded_from")[row].as_py() for row in (a, b))
                part = "pixels" if is_packed_anew else "bytes"
                faults.append(f"{name(a)}: {what.format(part=part)} {name(b)}")
    return faults


_TIES = (
    ("sha256", "the same {part} as"),
    ("group", "in another split than an image of the same group,"),
    ("phash", "in another split than an image with the same perceptual hash,"),
)


def _repeated(column: pa.ChunkedArray) -> Iterator[tuple[int, int]]:
    """Yield each row with a repeated value, and the first row with that value. Values are not
    converted to Python objects, which would need 100 GB for a hundred million images.
    """
    if not pa.types.is_integer(column.type):  # texts may exceed 2 GiB
        column = column.cast(pa.large_binary())
    encoded = [chunk.indices for chunk in column.dictionary_encode().chunks]
    codes = numbers_of(pa.chunked_array(encoded, pa.int32()))
    rows = np.arange(len(codes))
    first = np.empty_like(rows)
    first[codes[::-1]] = rows[::-1]  # reversed, so that the first row of a code is kept
    again = np.flatnonzero(first[codes] != rows)
    yield from zip(again.tolist(), first[codes[again]].tolist(), strict=True)
