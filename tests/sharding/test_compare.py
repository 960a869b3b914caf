"""Tests of `compare_sets()`: differences of each kind, and the memory for those of no kind."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from sharding.compare import compare_sets
from sharding.format import ShardSet


def changed(shards: ShardSet, change: Callable[[list[dict]], None]) -> ShardSet:
    rows = shards.table.to_pylist()
    change(rows)
    return replace(shards, table=pa.Table.from_pylist(rows, shards.table.schema), _columns={})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("label", 1, "label: real -> fake"), ("source", "other", "source: alpha -> other"),
        ("exif", True, "exif: False -> True"), ("width", 9, "width: {} -> 9"),
        ("sha256", b"\xab" * 32, "sha256: {} -> abababab"), ("origin", "x", "origin: {} -> x"),
        ("group", "a/b", "group: {} -> a/b"), ("chroma", "411", "chroma: {} -> 411"),
    ],
)  # fmt: skip
def test_a_changed_value_is_listed_wherever_its_row_is(
    old: ShardSet, name: str, value: object, said: str
) -> None:
    row = next(r for r in old.table.to_pylist() if r["label"] == 0 and r["source"] == "alpha")

    def change(rows: list[dict]) -> None:
        rows[rows.index(row)][name] = value
        rows.reverse()

    was = row[name].hex()[:8] if name == "sha256" else row[name]
    other = changed(old, change)
    difference = compare_sets(old, other)
    assert difference.changed == {row["key"]: [said.format(was)]}
    assert not difference.added and not difference.removed
    before, after = said.format(was).partition(": ")[2].split(" -> ")
    assert compare_sets(other, old).changed == {row["key"]: [f"{name}: {after} -> {before}"]}
    assert not compare_sets(other, other)


def test_added_and_removed_samples_are_counted_by_source_and_class(old: ShardSet) -> None:
    rows = old.table.to_pylist()
    less = changed(old, lambda rows: rows.__delitem__(slice(3)))
    forth, back = compare_sets(less, old), compare_sets(old, less)
    assert forth.added == back.removed == sorted(row["key"] for row in rows[:3])
    assert not forth.removed and not forth.changed
    classes = ["real" if row["label"] == 0 else "fake" for row in rows[:3]]
    where = [f"{row['source']}, {kind}" for row, kind in zip(rows[:3], classes, strict=True)]
    assert forth.counts == {"added": {key: where.count(key) for key in where}, "removed": {}}
    assert back.counts == {"added": {}, "removed": forth.counts["added"]}


def test_equal_samples_need_few_bytes_each(old: ShardSet) -> None:
    """2 kB of Python's objects for each sample were 200 GB for 100 million."""
    count = 20_000
    table = old.table.take(np.arange(count) % len(old))
    keys = pa.chunked_array([[f"key-{number}" for number in range(count)]])
    table = table.set_column(table.schema.get_field_index("key"), "key", keys)
    many = replace(old, table=table, _columns={})
    tracemalloc.start()
    try:
        assert not compare_sets(many, many)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200 * count
