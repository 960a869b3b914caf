"""Write one shard: planned items in, a tar of their bytes with its `.idx` and its rows out.

The tar appears under its final name only when complete, and the same items give the same bytes.
The rows, written after it, are the mark that the shard is done.
"""

import hashlib
import json
import os
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sharding.decode import MAX_BYTES, Prepared, prepare
from sharding.format import CLASSES, IMAGE_FORMATS, SAMPLES_SCHEMA, DecodeError
from sharding.layouts import Item
from sharding.plan import ShardPlan


@dataclass(frozen=True)
class Written:
    """A finished shard: its hash, and what was left out of it with the reason."""

    name: str
    samples: int
    bytes: int
    sha256: str
    quarantine: list[dict[str, str]]


def write_shard(plan: ShardPlan, folder: Path, work: Path) -> Written:
    """Pack `plan` into `folder`; rows and mark go to `work`.

    Raises:
        OSError: a raw file or the output cannot be read or written (never: a bad image, which is
            quarantined).
    """
    import webdataset  # it imports torch, which takes seconds; only writing needs it

    partial = folder / f"{plan.name}.partial"
    rows: list[dict[str, Any]] = []
    quarantine: list[dict[str, str]] = []
    with partial.open("wb") as stream:
        with webdataset.TarWriter(stream, encoder=False, mtime=0) as tar:
            for key, item in plan.items:
                try:
                    prepared = prepare(read_limited(item))
                except DecodeError as error:
                    reason = {"source": item.source, "path": item.origin, "reason": str(error)}
                    quarantine.append(reason)
                    continue
                tar.write(_sample(key, item, prepared))
                rows.append(_row(plan, key, item, prepared))
        stream.flush()
        os.fsync(stream.fileno())
    _index_members(partial, rows, folder / Path(plan.name).with_suffix(".idx"))
    partial.replace(folder / plan.name)
    written = Written(
        plan.name, len(rows), (folder / plan.name).stat().st_size,
        _sha256_of(folder / plan.name), quarantine,
    )  # fmt: skip
    mark = {"fingerprint": plan.fingerprint, **asdict(written)}
    table = pa.Table.from_pylist(rows, SAMPLES_SCHEMA)
    table = table.replace_schema_metadata({"shard": json.dumps(mark)})
    write_atomically(work / f"{plan.name}.parquet", lambda path: pq.write_table(table, path))
    return written


def read_done(plan: ShardPlan, folder: Path, work: Path) -> Written | None:
    """What an earlier run wrote for `plan`, or None if it is missing, partial or out of date."""
    path = work / f"{plan.name}.parquet"
    if not path.exists():
        return None
    mark = json.loads(pq.read_schema(path).metadata[b"shard"])
    tar = folder / plan.name
    if mark.pop("fingerprint") != plan.fingerprint or not tar.exists():
        return None
    written = Written(**mark)
    return written if tar.stat().st_size == written.bytes else None


def write_atomically(path: Path, write: Any) -> None:
    """`write(temporary path)`, then rename: `path` is either absent, old or whole."""
    partial = path.with_name(f"{path.name}.partial")
    write(partial)
    partial.replace(path)


def read_limited(item: Item) -> bytes:
    """A raw file's bytes; a file past the size limit is refused unread."""
    if item.size > MAX_BYTES:
        raise DecodeError(f"{item.size:,} bytes, more than the limit of {MAX_BYTES:,}")
    return Path(item.path).read_bytes()


def _sample(key: str, item: Item, prepared: Prepared) -> dict[str, Any]:
    meta = {
        "label": CLASSES[item.label],
        "source": item.source,
        "generator": item.generator,
        "origin": item.origin,
    }
    return {
        "__key__": key,
        IMAGE_FORMATS[prepared.facts.format]: prepared.data,
        "json": json.dumps(meta, sort_keys=True).encode(),
    }


def _row(plan: ShardPlan, key: str, item: Item, prepared: Prepared) -> dict[str, Any]:
    return {
        "shard": plan.name,
        "key": key,
        "offset": 0,  # known when the tar is closed
        "size": len(prepared.data),
        "sha256": hashlib.sha256(prepared.data).digest(),
        "label": item.label,
        "source": item.source,
        "generator": item.generator,
        "split": plan.split,
        "group": item.group,
        "origin": item.origin,
        **asdict(prepared.facts),
    }


def _index_members(tar_path: Path, rows: list[dict[str, Any]], idx_path: Path) -> None:
    """Read the tar back: offsets into `rows`, and the `.idx` (version 1.2) for DALI's reader.

    Its lines name, per sample, extension, offset, size and name of each member.
    """
    members: dict[str, list[tarfile.TarInfo]] = {}
    with tarfile.open(tar_path) as tar:
        for member in tar:
            members.setdefault(member.name.partition(".")[0], []).append(member)
    lines = [f"v1.2 {len(rows)}"]
    for row in rows:
        parts = []
        for member in members[row["key"]]:
            extension = member.name.partition(".")[2]
            parts.append(f"{extension} {member.offset_data} {member.size} {member.name}")
            if extension != "json":
                row["offset"] = member.offset_data
        lines.append(" ".join(parts))
    write_atomically(idx_path, lambda path: path.write_text("\n".join(lines) + "\n"))


def _sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
