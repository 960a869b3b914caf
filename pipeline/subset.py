"""Read a list of samples from a CSV file, and reduce shard sets (packed images) to these samples.

Main entries: `read_subset(path)` takes the `Path` of a CSV file with the header `set,key` (names of
the set and of the sample in it) and returns a `Subset`: `keys`, a dict from a set to the list of
its keys, the file's name (`file`) and its `sha256`. The command `python -m sharding audit DIR
--match FILE` writes such a file.

`choose_samples(shards, name, subset)` returns a `ShardSet` with only the listed samples, in the
order of the set.

- `shards`: a `ShardSet`, such as `open_shards([folder])` of `sharding/format.py` returns.
- `name`: the name of this set; the list may have only its last part (`mine` of `folders/mine`).
- `subset`: a `Subset`.

`read_subset()` raises ValueError if the file is not CSV in UTF-8, has another header, names no
sample, or names one twice, and OSError if it cannot be read. `choose_samples()` raises ValueError
if the list names no sample of this set, or a key that the set does not have.
"""

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from escape import text_fault
from sharding.format import ShardSet


@dataclass(frozen=True)
class Subset:
    """List of samples: the keys in each set, the name of the list's file and the SHA-256 of its
    bytes.
    """

    file: str
    sha256: str
    keys: Mapping[str, Sequence[str]]


def read_subset(path: Path) -> Subset:
    """Read a CSV file with the columns `set` and `key`.

    Raises:
        ValueError: no UTF-8 or CSV, other columns, no sample, or a sample that is listed twice.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()  # unlike `read_plain`, this also reads a pipe
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"))))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {text_fault(error)}; save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file: {error}; write the list again") from error
    if not rows or rows[0] != ["set", "key"]:
        begins = f"begins with {','.join(rows[0])!r}" if rows else "is empty"
        raise ValueError(
            f"{path} {begins}, expected the header "
            "set,key; `python -m sharding audit DIR --match FILE` writes such a list"
        )
    keys: dict[str, list[str]] = {}
    for line_number, row in enumerate(rows[1:], start=2):
        if row and len(row) != 2:
            raise ValueError(f"{path}:{line_number} has {len(row)} values, expected set,key")
        if row:
            keys.setdefault(row[0], []).append(row[1])
    listed = sum(map(len, keys.values()))
    if not listed:
        raise ValueError(f"{path} lists no sample; write the list again")
    different = sum(len(set(of_set)) for of_set in keys.values())
    if different != listed:
        raise ValueError(
            f"{path} lists {listed:,} samples, but {listed - different:,} repeated; list each "
            "sample once"
        )
    return Subset(path.name, hashlib.sha256(data).hexdigest(), keys)


def choose_samples(shards: ShardSet, name: str, subset: Subset) -> ShardSet:
    """Return the samples of set `name` that `subset` lists, in the order of the set. An audit lists
    a set by the last part of its name.

    Raises:
        ValueError: the list has no sample of this set, or a key that the set does not have.
    """
    wanted = set(subset.keys.get(name) or subset.keys.get(PurePath(name).name, ()))
    if not wanted:
        raise ValueError(
            f"{subset.file} lists no sample of {name}, only of {', '.join(subset.keys)}; remove "
            f"--shards {name}, or add such samples to the list"
        )
    held = shards.table.column("key").to_pylist()
    rows = np.array([row for row, key in enumerate(held) if key in wanted], np.int64)
    unknown = sorted(wanted.difference(held))
    if unknown:
        raise ValueError(
            f"{subset.file} lists {len(wanted):,} samples of {name}, but {len(unknown):,} of them "
            f"are not in that set of {len(held):,} (first: {unknown[0]}); make the list again "
            "from these shards"
        )
    return shards.take(rows)
