"""Compare two shard sets (tars of images with an index): list the samples that were added, removed
or changed.

Main entry: `compare_sets(before, after)` takes two `ShardSet`s (from `open_shards()` of
sharding/format.py), the older and the newer, and returns a `SetDifference`, which is false if the
sets do not differ. No file is written. Fields of a `SetDifference`:

- `added`: sorted list of the keys that only `after` has.
- `removed`: sorted list of the keys that only `before` has.
- `changed`: dict from the key of each changed sample to a list of texts such as
  "label: real -> fake".
- `counts`: number of added and of removed samples by source and class, such as
  {"added": {"camera, real": 3}, "removed": {}}.

Samples are matched by their key (source and hash of the path). The columns `IGNORED` (the location
of a sample in the tars, and the key) are not compared.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.format import CLASSES, SAMPLES_SCHEMA, ShardSet, numbers_of

IGNORED = {"shard", "offset", "key"}
"""Columns that are not compared: the location of a sample, and the key that matches samples."""


@dataclass(frozen=True)
class SetDifference:
    """Keys of added, removed and changed samples, with changes such as `"label: real -> fake"`."""

    added: list[str]
    removed: list[str]
    changed: dict[str, list[str]]
    counts: dict[str, Counter[str]]  # "added" or "removed" -> "source, class" -> samples

    def __bool__(self) -> bool:
        """Return whether there is any difference."""
        return bool(self.added or self.removed or self.changed)


def compare_sets(before: ShardSet, after: ShardSet) -> SetDifference:
    """Match the samples of two sets by key (source and hash of the origin) and list differences."""
    keys, old_keys = after.table.column("key"), before.table.column("key")
    old_row = numbers_of(pc.fill_null(pc.index_in(keys, value_set=old_keys), -1))
    added, shared = np.flatnonzero(old_row < 0), np.flatnonzero(old_row >= 0)
    removed = np.flatnonzero(~numbers_of(pc.is_in(old_keys, value_set=keys)))
    changed = defaultdict(list)
    for name in (name for name in SAMPLES_SCHEMA.names if name not in IGNORED):
        old, new = _values(before, name, old_row[shared]), _values(after, name, shared)
        for row in np.flatnonzero(numbers_of(pc.not_equal(old, new))).tolist():
            change = _say(name, old[row].as_py(), new[row].as_py())
            changed[after.text("key", shared[row])].append(change)
    return SetDifference(
        sorted(keys.take(added).to_pylist()),
        sorted(old_keys.take(removed).to_pylist()),
        dict(sorted(changed.items())),
        {"added": _count(after, added), "removed": _count(before, removed)},
    )


def _values(shards: ShardSet, name: str, rows: np.ndarray) -> pa.ChunkedArray:
    """Return the values of a column in `rows`, not the codes, which differ between tables."""
    column = shards.table.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.take(rows)


def _say(name: str, before: Any, after: Any) -> str:
    if name == "label":
        before, after = CLASSES[before], CLASSES[after]
    if isinstance(before, bytes):
        return f"{name}: {before.hex()[:8]} -> {after.hex()[:8]}"
    return f"{name}: {before} -> {after}"


def _count(shards: ShardSet, rows: np.ndarray) -> Counter[str]:
    labels = shards.column("label")[rows].tolist()
    sources = shards.names("source", rows)
    return Counter(
        f"{source}, {CLASSES[label]}" for source, label in zip(sources, labels, strict=True)
    )
