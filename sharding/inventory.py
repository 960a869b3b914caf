"""Decode every raw image once and store one row of facts per image in a table, the inventory.

Main entry: `take_inventory(raw, folder, name, items)` writes a row of facts for each image
(SHA-256, size, format, perceptual hash, ...) to the parquet file `folder/name` and returns the
number of rows. If an image cannot be decoded, its row has the reason in `error`. If a file cannot
be read, `OSError` or `RawError` is raised.

- `raw`: the folder of all raw datasets, as a text.
- `folder`: the existing folder of the inventory (`.build/inventory` below a build's output), as a
  text.
- `name`: the file name, a text.
- `items`: a table of images. `missing_chunks()` yields pairs (name, items), with `CHUNK` images,
  or whole row groups of parquet tables with at most `LARGEST_CHUNK`.

A build decodes only new and changed images. In the other functions `source` is the name of a
source, and `folder` a path:

- `item_table(items)` makes a table of a list of `Item`s (`list_source()` of sharding/listing.py).
- `files_by_source(folder)` lists the folder once: it returns a dict from the name of each source to
  the paths of its files, complete or partial (an empty list by default).
- `known_facts(files)` takes those of one source and returns a table of the rows of earlier builds
  (those of this `FACTS_VERSION`), or None if there are none.
- `missing_chunks(source, items, facts)` takes the tables of `item_table()` and `known_facts()`. It
  yields the pairs for `take_inventory()`: the images of which `facts` has no row.
- `join_facts(name, files, items)` then joins all rows of a source (its name, and its paths of a new
  `files_by_source()`). It returns a table with the columns `SCHEMA`, and raises RuntimeError if an
  image has no row.
- `finish_source(folder, name, files, source, table, listing)` writes this table to
  `<name>.parquet`, with the notes of the `Listing` (what was excluded) and the rules for the images
  in `source`, its `Source` in the catalog. It deletes the files of `take_inventory()`.
- `forget(folder, source, path)` deletes the rows of the raw file `path` from `<source>.parquet`:
  the next build decodes it again.
- `packed_prints(folder, source)` returns the columns `origin`, `group` and `thumbnail` of
  `<source>.parquet`, a table, or None if there is no such file of this `FACTS_VERSION`.
- `packed_originals(folder, source)` returns the items of the images there that can be decoded, with
  the column `original` (SHA-256 of the raw bytes), or None, likewise.
- `read_source(folder, name, source)` returns (table, `Listing`) of a source whose raw files are
  gone, or None if there is no `<name>.parquet`. It raises `ShardError` for a file with another
  `FACTS_VERSION`, or packed for other sets or by other rules than those of the catalog.
- `describe(prepared, data)` returns the facts of a good image as a dict (a `Prepared` of
  imaging/decode.py, and the bytes of its file), and `refuse(reason)` those of a bad one; the
  perceptual hash is not among them.
A damaged file of the inventory raises `ShardError`.
"""

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from escape import reason_of
from imaging.decode import DecodeError, Facts, Prepared, prepare
from imaging.fingerprint import GRID, fingerprints, green_grid
from sharding.catalog import Source, shares
from sharding.format import CLASSES, SAMPLES_SCHEMA, ShardError, table_from
from sharding.listing import Item, Listing
from sharding.raw import read_all, row_group_of
from sharding.remote import files_in, in_order, read_bytes, remove_files
from storage import AnyPath, any_path, parse_json, whole_name, write_atomically

FACTS_VERSION = "6"
"""Version of the facts. Change it when `prepare` changes; older rows are then computed again."""

CHUNK = 256
"""Images per task, about one second of work. A kill loses at most one task per process, and at the
end the last process works alone for at most one task."""

LARGEST_CHUNK = 2048
"""Largest number of images per task. Above `CHUNK` a task only completes a row group of a parquet
table, because each task reads a row group from its beginning."""

_name = pa.dictionary(pa.int32(), pa.string())

ITEM_SCHEMA = pa.schema(
    [
        ("source", _name), ("origin", pa.string()), ("path", pa.string()), ("member", pa.string()),
        ("size", pa.int64()), ("version", pa.string()), ("label", pa.int8()),
        ("generator", _name), ("group", pa.string()), ("destination", _name),
        ("excluded", pa.string()),
    ]
)  # fmt: skip

FACT_SCHEMA = pa.schema(
    [
        ("error", pa.string()),  # reason, if the image cannot be used
        SAMPLES_SCHEMA.field("sha256"), ("stored", pa.int32()),  # of the packed bytes
        ("original", pa.binary(32)),  # SHA-256 of the bytes that were read
        ("thumbnail", pa.binary(256)),
        SAMPLES_SCHEMA.field("phash"),
        *(SAMPLES_SCHEMA.field(fact.name) for fact in dataclasses.fields(Facts)),
    ]
)  # fmt: skip

SCHEMA = pa.schema([*ITEM_SCHEMA, *FACT_SCHEMA])

_KEY = ["origin", "member", "size", "version", "excluded"]
"""Columns that identify a version of a file; the facts of a file are valid while all are equal."""

_NO_FACTS = Facts(
    width=0, height=0, format="", chroma="", jpeg_quality=0, jpeg_tables="", exif=False,
    orientation=1, transcoded_from="",
)  # fmt: skip


def item_table(items: Sequence[Item]) -> pa.Table:
    """Convert items to a table, which takes a hundred bytes per item instead of a thousand."""
    columns = zip(*items, strict=True) if items else [[] for _ in ITEM_SCHEMA]
    arrays = [
        pa.array(column, field.type) for column, field in zip(columns, ITEM_SCHEMA, strict=True)
    ]
    return pa.table(arrays, schema=ITEM_SCHEMA)


def describe(prepared: Prepared, data: bytes) -> dict[str, Any]:
    """Return the row of an image that can be decoded; `data` is its file as it was read."""
    return {
        "error": "",
        "original": hashlib.sha256(data).digest(),
        "sha256": hashlib.sha256(prepared.data).digest(),
        "stored": len(prepared.data),
        **vars(prepared.facts),
    }


def refuse(reason: str) -> dict[str, Any]:
    """Return the row of an image that cannot be decoded."""
    return {
        "error": reason or "unknown",
        "original": bytes(32),
        "sha256": bytes(32),
        "stored": 0,
        **vars(_NO_FACTS),
    }


def take_inventory(raw: str, folder: str, name: str, items: pa.Table) -> int:
    """Decode `items` and write their rows to `folder/name`. Runs in a worker.

    Returns the number of rows. The row of an image that cannot be decoded contains the reason.

    Raises:
        OSError: a file cannot be read.
    """
    rows = items.to_pylist()
    facts = []
    grids = np.zeros((len(rows), GRID, GRID), np.uint8)
    for grid, data in zip(grids, read_all(any_path(raw), rows), strict=True):
        try:
            if isinstance(data, DecodeError):
                raise data
            prepared = prepare(data)
            grid[:] = green_grid(prepared.pixels)
            facts.append(describe(prepared, data))
        except DecodeError as error:
            facts.append(refuse(str(error)))
    prints = zip(*fingerprints(grids), strict=True)
    table = pa.Table.from_pylist(
        [
            {**row, "phash": phash, "thumbnail": thumbnail.tobytes()}
            for row, (phash, thumbnail) in zip(facts, prints, strict=True)
        ],
        FACT_SCHEMA,
    )
    for key in _KEY:
        table = table.append_column(key, items.column(key))
    table = table.replace_schema_metadata({"facts": FACTS_VERSION})
    write_atomically(any_path(folder) / name, lambda path: pq.write_table(table, path))
    return len(rows)


def files_by_source(folder: AnyPath) -> dict[str, list[AnyPath]]:
    """List the files of each source, complete or partial."""
    files = defaultdict[str, list[AnyPath]](list)
    for path in files_in(folder):
        stem = (whole_name(path.name) or path.name).removesuffix(".parquet")
        files[stem.partition("+")[0]].append(path)
    return files


def known_facts(files: Sequence[AnyPath]) -> pa.Table | None:
    """Read the rows that earlier runs wrote for a source, even if they did not finish."""
    # Skip partial files: a worker of a killed build may still be writing them.
    whole = [path for path in files if path.suffix == ".parquet"]
    tables = [
        table.select([*_KEY, *FACT_SCHEMA.names])
        for table in (in_order(_read, whole, whole[0]) if whole else ())
        if _version_of(table) == FACTS_VERSION
    ]
    return pa.concat_tables(tables, promote_options="default") if tables else None


def missing_chunks(
    source: str, items: pa.Table, facts: pa.Table | None
) -> Iterator[tuple[str, pa.Table]]:
    """Yield the items without facts as (file name, items) for `take_inventory`."""
    where = _match(items, facts)
    missing = items.filter(pc.is_null(where))
    for start, end in _bounds(missing):
        # A copy (`take`), because pickling a slice would send the whole table to the worker.
        chunk = missing.take(pa.array(range(start, end)))
        content = "\n".join(chunk.column("origin").to_pylist())
        fingerprint = hashlib.sha256(content.encode()).hexdigest()[:12]
        yield f"{source}+{fingerprint}.parquet", chunk


def _bounds(items: pa.Table) -> Iterator[tuple[int, int]]:
    """Yield the first row of each task, and the row after its last."""
    groups = [row_group_of(row) for row in items.select(["path", "member"]).to_pylist()]
    start = 0
    for end in range(1, len(groups) + 1):
        size = end - start
        is_last = end == len(groups)
        is_whole = is_last or groups[end] is None or groups[end] != groups[end - 1]
        if is_last or size == LARGEST_CHUNK or (size >= CHUNK and is_whole):
            yield start, end
            start = end


def join_facts(name: str, files: Sequence[AnyPath], items: pa.Table) -> pa.Table:
    """Join a source's items with their facts in `files`, which all builds so far wrote."""
    facts = known_facts(files)
    where = _match(items, facts)
    if where.null_count:
        raise RuntimeError(f"{where.null_count} images of {name} were never read")
    if facts is None:
        return SCHEMA.empty_table()
    chosen = facts.take(where)
    for field in FACT_SCHEMA:
        items = items.append_column(field.name, chosen.column(field.name).cast(field.type))
    return items.unify_dictionaries().replace_schema_metadata(None)


def finish_source(
    folder: AnyPath, name: str, files: Sequence[AnyPath], source: Source, table: pa.Table,
    listing: Listing,
) -> None:  # fmt: skip
    """Write the inventory of a source to one file, and delete the other `files`, which may be of
    killed builds.
    """
    notes = {
        "excluded": listing.excluded, "read_as": listing.read_as, "rules": _rules_of(source),
    }  # fmt: skip
    table = table.replace_schema_metadata({"facts": FACTS_VERSION, "listing": json.dumps(notes)})
    path = folder / f"{name}.parquet"
    if path not in files or not _read(path).equals(table, check_metadata=True):
        write_atomically(path, lambda partial: pq.write_table(table, partial))
    remove_files([file for file in files if file != path])


def forget(folder: AnyPath, source: str, path: str) -> None:
    """Delete the rows of the images in one raw file, so that the next build decodes them again."""
    inventory = folder / f"{source}.parquet"
    table = _read(inventory)
    kept = table.filter(pc.not_equal(table.column("path"), path))
    write_atomically(inventory, lambda partial: pq.write_table(kept, partial))


def packed_prints(folder: AnyPath, source: str) -> pa.Table | None:
    """Read the groups and thumbnails of a source that an earlier build packed; None if unknown."""
    table = _earlier(folder, source)
    return None if table is None else table.select(["origin", "group", "thumbnail"])


def packed_originals(folder: AnyPath, source: str) -> pa.Table | None:
    """Read the readable items of a source that an earlier build packed, with the hashes of their
    raw bytes; None if unknown.
    """
    table = _earlier(folder, source)
    if table is None:
        return None
    return table.filter(pc.equal(table["error"], "")).select([*ITEM_SCHEMA.names, "original"])


def _earlier(folder: AnyPath, source: str) -> pa.Table | None:
    """Read the inventory of an earlier build; None if there is none of this `FACTS_VERSION`."""
    path = folder / f"{source}.parquet"
    if not path.exists() or _version_of(table := _read(path)) != FACTS_VERSION:
        return None
    return table


def read_source(folder: AnyPath, name: str, source: Source) -> tuple[pa.Table, Listing] | None:
    """Read the inventory of a source from an earlier build; None if there is none. `source` is its
    entry in the catalog.

    Raises:
        ShardError: the file is damaged, or written by another version of this program, or the
            catalog now has other sets or rules for the images of the source.
    """
    path = folder / f"{name}.parquet"
    if not path.exists():
        return None
    table = _read(path)
    try:
        notes: Mapping[str, Any] = parse_json(table.schema.metadata[b"listing"])
        earlier = notes["rules"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{path} is damaged (no notes of its listing: {error}); delete it"
        ) from error
    if (version := _version_of(table)) != FACTS_VERSION:
        raise ShardError(
            f"{path} has inventory version {version}, expected {FACTS_VERSION}, and the raw files "
            f"of {name} are gone; restore them and build again, or delete it to drop the source"
        )
    destinations = source.destinations()
    for packed in map(parse_json, table.column("destination").unique().to_pylist()):
        if packed not in destinations:
            raise ShardError(
                f"{name} was packed for {_shares(packed)}, the catalog says "
                f"{' or '.join(map(_shares, destinations))}, and its raw files are gone; restore "
                f"them and build again, or delete {path} to drop the source (nothing was changed)"
            )
    rules = _rules_of(source)
    if changed := [key for key in rules if earlier.get(key) != rules[key]]:
        raise ShardError(
            f"{name} was packed with another {' and '.join(changed)} in its catalog entry, and its "
            f"raw files are gone; restore them and build again, take the change back, or delete "
            f"{path} to drop the source (nothing was changed)"
        )
    return table.replace_schema_metadata(None), Listing([], notes["excluded"], notes["read_as"])


def _rules_of(source: Source) -> dict[str, Any]:
    """Return the keys of a source in the catalog that decide its images, labels, sets and groups,
    as JSON values.
    """
    rules: dict[str, Any] = {
        kind: [
            [rule.folder, rule.name, rule.column, rule.where, rule.generator,
             shares(rule.set or source.set)]
            for rule in source.rules(label)
        ]
        for label, kind in enumerate(CLASSES)
    }  # fmt: skip
    return rules | {
        "ignore": [[rule.folder, rule.name] for rule in source.ignored()],
        "table": [table.name, table.key, *([] if table.optional else ["required"])]
        if (table := source.table)
        else [],
        "group": source.groups(),
        "group_column": source.group_column,
        "cap": dict(source.cap),
    }


def _shares(destination: Mapping[str, float]) -> str:
    return ", ".join(f"{name} ({share:g})" for name, share in destination.items())


def _read(path: AnyPath) -> pa.Table:
    data = read_bytes(path)
    try:
        table = table_from(data)
        columns = (*_KEY, *FACT_SCHEMA.names) if _version_of(table) == FACTS_VERSION else ()
        if missing := [name for name in columns if name not in table.schema.names]:
            raise KeyError(f"no column {', '.join(missing)}")
    except (KeyError, UnicodeDecodeError, OSError, pa.ArrowException) as error:
        reason = reason_of(error)
        raise ShardError(
            f"{path} is damaged ({reason}); delete it, and the build decodes its images again"
        ) from error
    return table


def _version_of(table: pa.Table) -> str:
    """Return the `FACTS_VERSION` that a table was written with.

    Raises:
        KeyError: the table has none.
    """
    metadata = table.schema.metadata or {}
    if b"facts" not in metadata:
        raise KeyError("no version of its facts")
    return metadata[b"facts"].decode()


def _match(items: pa.Table, facts: pa.Table | None) -> pa.Array:
    """Return for each item the row number of its facts, or null."""
    if facts is None:
        return pa.nulls(items.num_rows, pa.int64())
    left = items.select(_KEY).append_column("item", pa.array(range(items.num_rows)))
    right = facts.select(_KEY).append_column("fact", pa.array(range(facts.num_rows)))
    joined = left.join(right, keys=_KEY, join_type="left outer", use_threads=False)
    # Overlapping runs may have described a file twice; any of its rows can be used.
    best = joined.group_by("item", use_threads=False).aggregate([("fact", "max")]).sort_by("item")
    return best.column("fact_max").combine_chunks()
