"""Write one shard: planned rows in, a tar of their bytes with its `.idx` and its rows out.

The tar appears under its final name only when complete, and the same rows give the same bytes.
The rows, written after it, are the mark that the shard is done.
"""

import hashlib
import json
import multiprocessing
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sharding.decode import prepare
from sharding.format import (
    IMAGE_FORMATS,
    SAMPLES_SCHEMA,
    DecodeError,
    ShardError,
    member_metadata,
)  # fmt: skip
from sharding.plan import ShardPlan
from sharding.raw import read_all
from sharding.storage import AnyPath, any_path, sha256_of, size_of, write_atomically, write_text


@dataclass(frozen=True)
class Written:
    """A finished shard."""

    name: str
    samples: int
    bytes: int
    sha256: str


def write_shard(
    raw: str, folder: str, marks: str, name: str, fingerprint: str, samples: pa.Table
) -> Written:
    """Pack `samples` into `folder/name`; their rows and the mark go to `marks`. Runs in a worker.

    Raises:
        ShardError: a raw file has changed since it was described.
        OSError: a raw file or the output cannot be read or written.
    """
    rows = samples.to_pylist()
    written: list[Written] = []
    lines: list[str] = []

    def pack(partial: Path) -> None:
        lines[:] = _pack(partial, any_path(raw), rows)
        written.append(Written(name, len(rows), partial.stat().st_size, sha256_of(partial)))

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


def _pack(path: Path, raw: AnyPath, rows: list[dict[str, Any]]) -> list[str]:
    """Write the tar; fills in `offset` and `size` of `rows`.

    Returns the lines of the `.idx` for DALI's reader (version 1.2): per sample the extension,
    offset, size and name of each member.
    """
    if multiprocessing.parent_process() is not None:
        # webdataset works without torch, whose import takes seconds that no worker needs.
        sys.modules.setdefault("torch", None)
    import webdataset

    class Writer(webdataset.TarWriter):
        """The same bytes without tarfile's own small buffer, and with a known position."""

        tarmode = staticmethod(lambda *_: "w")

    lines = []
    with path.open("wb") as stream, Writer(stream, encoder=False, mtime=0) as tar:
        tar.tarstream.copybufsize = 2**20  # one write per image, not one per 16 KiB
        for row, data in zip(rows, read_all(raw, rows), strict=True):
            data = _the_same(row, data)
            row["offset"], row["size"] = 0, len(data)
            meta = json.dumps(member_metadata(row), sort_keys=True).encode()
            members = {IMAGE_FORMATS[row["format"]]: data, "json": meta}
            offset = tar.tarstream.offset
            tar.write({"__key__": row["key"], **members})
            line = []
            for extension in sorted(members):  # the order in which TarWriter writes them
                size = len(members[extension])
                offset += 512
                line.append(f"{extension} {offset} {size} {row['key']}.{extension}")
                if extension != "json":
                    row["offset"] = offset
                offset += -(-size // 512) * 512
            if offset != tar.tarstream.offset:
                raise RuntimeError(f"{row['key']} is not where its index says")
            lines.append(" ".join(line))
    return lines


def _the_same(row: dict[str, Any], data: bytes | DecodeError) -> bytes:
    """The bytes to store, which are the ones that were decoded when the row was made."""
    try:
        if isinstance(data, DecodeError):
            raise data
        stored = prepare(data).data if row["transcoded_from"] else data
        if hashlib.sha256(stored).digest() == row["sha256"]:
            return stored
        found = "other bytes"
    except DecodeError as error:
        found = str(error)
    raise ShardError(
        f"{row['origin']} has changed since this build decoded it ({found}); run the build again "
        "when the raw files stay as they are"
    )


def read_done(plan: ShardPlan, folder: AnyPath, marks: AnyPath) -> Written | None:
    """What an earlier run wrote for `plan`, or None if it is missing, partial or out of date."""
    path = marks / f"{plan.name}.parquet"
    if not path.exists():
        return None
    with path.open("rb") as stream:
        mark = json.loads(pq.read_schema(stream).metadata[b"shard"])
    if mark.pop("fingerprint") != plan.fingerprint:
        return None
    written = Written(**mark)
    index = (folder / plan.name).with_suffix(".idx")
    return written if size_of(folder / plan.name) == written.bytes and index.exists() else None
