"""Divide the samples of a set into shards (tars); nothing is read from disk or written.

Main entry: `plan_shards(samples, split)`.

- `samples`: a pyarrow table with one row per sample. It has `key`, made by `sample_key()`, and
  these columns of sharding/inventory.py: `source`, `origin` (the image's own path below the raw
  folder), `path` and `member` (the file with the bytes and the place in it), `stored` (size in
  bytes), `sha256`, `label`, `generator`, `group` and `transcoded_from`. Other columns are not used.
- `split`: the split to which all these samples belong, such as "train". It is a part of the names
  of the tars; nothing is filtered by it.

It returns a list of `ShardPlan`, one for each tar to write:

- `name`: file name of the tar, `<source>-<split>-<NNNNN>.tar`.
- `source`: its source.
- `rows`: NumPy array of the row numbers of its samples in the table, in the order of the tar.
- `fingerprint`: a hash of the tar's name and of the columns above in its rows, except `path`,
  `member` and `stored`. A build compares it to find out whether a shard is up to date.

A shard ends before it exceeds `MAX_SAMPLES` samples or `MAX_BYTES` bytes; a larger sample gets a
shard of its own. If two samples have the same key, `ValueError` is raised.

`sample_key(source, origin)` returns the key of a sample: its source and a hash of `origin`.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import pyarrow as pa

from sharding.format import FORMAT_VERSION, shard_name

MAX_SAMPLES = 2048
MAX_BYTES = 256 * 2**20
"""A shard ends at the first of these two limits: large enough to stream, small enough to redo."""


@dataclass(frozen=True)
class ShardPlan:
    """One tar to write: `rows` of the samples table. `fingerprint` changes with the content."""

    name: str
    source: str
    rows: np.ndarray
    fingerprint: str


def sample_key(source: str, origin: str) -> str:
    """Return a sample's key: unique in its set, free of dots, the same on every machine."""
    return f"{source}_{_digest(origin)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan_shards(samples: pa.Table, split: str) -> list[ShardPlan]:
    """Plan the shards of one set. The samples of each source are ordered by a hash of their origin.

    The hash order mixes labels and generators in a shard, and a new file does not change the order
    of the others. Cells of a parquet table are ordered by the hash of their row group and stay
    together, because a row group can only be read as a whole.

    Raises:
        ValueError: two files have the same key (a hash collision, or a path listed twice).
    """
    names = ("source", "key", "origin", "path", "member")
    columns = [samples.column(name).to_pylist() for name in names]
    order = sorted(
        (source, *_position(key, path, member), key, row)
        for row, (source, key, _, path, member) in enumerate(zip(*columns, strict=True))
    )
    keys = sorted(zip(columns[1], columns[2], strict=True))
    for (left, a), (right, b) in pairwise(keys):
        if left == right:
            raise ValueError(f"{a} and {b} have the same key {left}; rename one of them")
    sizes = samples.column("stored").to_numpy()
    content = list(zip(*(samples.column(name).to_pylist() for name in _CONTENT), strict=True))
    plans = []
    for source, entries in groupby(order, key=lambda entry: entry[0]):
        rows = np.array([entry[-1] for entry in entries])
        for shard_number, chunk in enumerate(_chunks(rows, sizes)):
            name = shard_name(source, split, shard_number)
            print_of = _fingerprint(name, [content[row] for row in chunk])
            plans.append(ShardPlan(name, source, chunk, print_of))
    return plans


_CONTENT = ("key", "sha256", "label", "generator", "group", "origin", "transcoded_from")


def _position(key: str, path: str, member: str) -> tuple[str, int, str]:
    """Return the position of a sample in its source as a sort key: (hash, row, column)."""
    if path.lower().endswith(".parquet") and member:
        group, row, column = member.split(":", 2)
        return _digest(f"{path}:{group}"), int(row), column
    return key.rpartition("_")[2], 0, ""


def _chunks(rows: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    start, size = 0, 0
    for end, row in enumerate(rows):
        if end > start and (end - start == MAX_SAMPLES or size + int(sizes[row]) > MAX_BYTES):
            yield rows[start:end]
            start, size = end, 0
        size += int(sizes[row])
    if start < len(rows):
        yield rows[start:]


def _fingerprint(name: str, content: list[tuple]) -> str:
    """Hash the values that determine a shard's bytes and rows."""
    text = json.dumps([FORMAT_VERSION, name, content], default=bytes.hex)
    return hashlib.sha256(text.encode()).hexdigest()
