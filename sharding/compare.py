"""Compare two shard sets (tars of images with an index): list the samples that were added, removed
or changed.

Main entry: `compare_sets(before, after)` takes two `ShardSet`s (from `open_shards()` of
sharding/format.py), the older and the newer, and returns a `Difference`, which is false if the sets
do not differ. No file is written. Fields of a `Difference`:

- `added`: sorted list of the keys that only `after` has.
- `removed`: sorted list of the keys that only `before` has.
- `changed`: dict from the key of each changed sample to a list of texts such as
  "label: real -> fake".
- `counts`: number of added and of removed samples by source and class, such as
  {"added": {"camera, real": 3}, "removed": {}}.

Samples are matched by their key (source and hash of the path). The columns `IGNORED` (the location
of a sample in the tars, and the key) are not compared.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from sharding.format import CLASSES, SAMPLES_SCHEMA, ShardSet

IGNORED = {"shard", "offset", "key"}
"""Columns that are not compared: the location of a sample, and the key that matches samples."""


@dataclass(frozen=True)
class Difference:
    """Keys of added, removed and changed samples, with changes such as `"label: real -> fake"`."""

    added: list[str]
    removed: list[str]
    changed: dict[str, list[str]]
    counts: dict[str, Counter[str]]  # "added" or "removed" -> "source, class" -> samples

    def __bool__(self) -> bool:
        """Return whether there is any difference."""
        return bool(self.added or self.removed or self.changed)


def compare_sets(before: ShardSet, after: ShardSet) -> Difference:
    """Match the samples of two sets by key (source and hash of the origin) and list differences."""
    names = [name for name in SAMPLES_SCHEMA.names if name not in IGNORED]
    old, new = (
        dict(zip(s.table.column("key").to_pylist(), range(len(s)), strict=True))
        for s in (before, after)
    )
    columns = {
        name: (before.table.column(name).to_pylist(), after.table.column(name).to_pylist())
        for name in names
    }
    changed = {}
    for key in sorted(old.keys() & new.keys()):
        differing = [
            _say(name, old_values[old[key]], new_values[new[key]])
            for name, (old_values, new_values) in columns.items()
            if old_values[old[key]] != new_values[new[key]]
        ]
        if differing:
            changed[key] = differing
    added, removed = sorted(new.keys() - old.keys()), sorted(old.keys() - new.keys())
    counts = {
        "added": _count(after, [new[key] for key in added]),
        "removed": _count(before, [old[key] for key in removed]),
    }
    return Difference(added, removed, changed, counts)


def _say(name: str, before: Any, after: Any) -> str:
    if name == "label":
        before, after = CLASSES[before], CLASSES[after]
    if isinstance(before, bytes):
        return f"{name}: {before.hex()[:8]} -> {after.hex()[:8]}"
    return f"{name}: {before} -> {after}"


def _count(shards: ShardSet, rows: list[int]) -> Counter[str]:
    sources, labels = shards.table.column("source"), shards.column("label")
    return Counter(f"{sources[row].as_py()}, {CLASSES[labels[row]]}" for row in rows)
