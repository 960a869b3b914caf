"""Opening shard sets and choosing their samples."""

import hashlib
import json
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from pipeline.order import evaluation_epoch, training_epoch
from pipeline.read import ShardReader
from pipeline.replay import Replay
from pipeline.stream import open_pool
from sharding.format import SAMPLES_SCHEMA, ShardError, ShardSet, open_shards, read_index
from sharding.rows import row_numbers


def write_index_of(folder: Path, out: Path) -> None:
    """Write to `out` the index of the set in `folder`, with the hash of the table in `out`."""
    digest = hashlib.sha256((out / "samples.parquet").read_bytes()).hexdigest()
    index = read_index(folder) | {"samples_sha256": digest}
    (out / "index.json").write_text(json.dumps(index))


def test_folders_are_given_as_text_or_as_paths(data: Path, old: ShardSet) -> None:
    address = f"memory://{uuid.uuid4().hex}/old"
    for name in ("index.json", "samples.parquet"):
        (UPath(address) / name).parent.mkdir(parents=True, exist_ok=True)
        (UPath(address) / name).write_bytes((data / "old" / name).read_bytes())
    for folder, path in ((str(data / "old"), data / "old"), (address, UPath(address))):
        shards = open_shards([folder])
        assert (shards.sha256, shards.folders[0]) == (old.sha256, path)
        assert read_index(folder) == read_index(data / "old")
    assert open_pool(str(data), ["old"], Replay()).shards.folders == old.folders


@pytest.mark.parametrize("kind", [str, Path, lambda path: UPath(f"memory://{path}")])
def test_one_folder_instead_of_a_list_is_refused(data: Path, kind: Callable[[Path], Any]) -> None:
    with pytest.raises(
        TypeError, match=r"expected a list of folders, got one; use open_shards\(\["
    ):
        open_shards(kind(data / "old"))


@pytest.mark.parametrize(
    "use",
    [
        lambda shards, rows: shards.take(rows),
        lambda shards, rows: ShardReader(shards).read(rows),
        lambda _shards, rows: evaluation_epoch(rows, 2),
        lambda _shards, rows: training_epoch(rows, seed=0, number=0, global_batch=2),
        lambda _shards, rows: training_epoch(
            np.arange(8), seed=0, number=0, global_batch=2, old=rows
        ),
    ],
)
def test_a_mask_is_not_taken_for_row_numbers(
    old: ShardSet, use: Callable[[ShardSet, Any], Any]
) -> None:
    mask = old.column("label") == 1
    with pytest.raises(TypeError, match=r"got values of type bool; np\.flatnonzero\(mask\)"):
        use(old, mask)
    use(old, np.flatnonzero(mask))


def test_row_numbers_are_whole_numbers() -> None:
    with pytest.raises(TypeError, match="got values of type float64"):
        row_numbers([0.0, 1.0])
    for rows in ([], (), range(3), [1, 2], np.array([1], np.uint8)):
        assert row_numbers(rows).dtype == np.int64
        assert row_numbers(rows).tolist() == [*rows]


def test_a_table_with_missing_values_is_refused(data: Path, tmp_path: Path) -> None:
    """As of a column that the writer does not fill: it would be found by whoever reads it first."""
    table = pq.read_table(data / "old/samples.parquet")
    rows = [row | {"chroma": None} for row in table.to_pylist()]
    with pytest.raises(ValueError, match="chroma"):
        pq.write_table(pa.Table.from_pylist(rows, SAMPLES_SCHEMA), tmp_path / "samples.parquet")
    optional = pa.schema([field.with_nullable(True) for field in SAMPLES_SCHEMA])
    pq.write_table(pa.Table.from_pylist(rows, optional), tmp_path / "samples.parquet")
    write_index_of(data / "old", tmp_path)
    with pytest.raises(ShardError, match=r"is not a samples table .*chroma"):
        open_shards([tmp_path])


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("label", 7, "label of .* is 7, expected 0 to 1"),
        ("label", -1, "label of .* is -1, expected 0 to 1"),
        ("offset", -1, "offset of .* is -1"),
        ("size", 0, "size of .* is 0, expected 1 to"),
        ("width", -5, "width of .* is -5"),
        ("height", 0, "height of .* is 0"),
        ("orientation", 9, "orientation of .* is 9, expected 1 to 8"),
        ("jpeg_quality", 101, "jpeg_quality of .* is 101, expected 0 to 100"),
    ],
)
def test_a_value_out_of_range_is_refused(
    data: Path, tmp_path: Path, column: str, value: int, said: str
) -> None:
    """With a label of 7, `verify` ended with an IndexError, and a training deep inside torch."""
    rows = pq.read_table(data / "old/samples.parquet").to_pylist()
    rows[3][column] = value
    pq.write_table(pa.Table.from_pylist(rows, SAMPLES_SCHEMA), tmp_path / "samples.parquet")
    write_index_of(data / "old", tmp_path)
    with pytest.raises(ShardError, match=rf"samples\.parquet is not a samples table .*{said}"):
        open_shards([tmp_path])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"totals": {"source": {"alpha": None}}}, "totals.source.alpha is None, expected a whole"),
        ({"totals": {"source": {"alpha": "x"}}}, "totals.source.alpha is 'x', expected a whole"),
        ({"totals": {"label": {"real": True}}}, "totals.label.real is True, expected a whole"),
        ({"excluded": {"a": None}}, "excluded.a is None, expected a whole number"),
        ({"quarantined": [None]}, "quarantined.0 is None, expected an object"),
        ({"quarantined": [{}]}, "quarantined.0.source is missing, expected a text"),
        ({"samples": False}, "samples is False, expected a whole number"),
        ({"samples": -1}, "samples is -1, expected a whole number"),
        ({"shards": {0: {"bytes": 10**30}}}, "shards.0.bytes is 1000"),
        ({"shards": {0: {"samples": -1}}}, "shards.0.samples is -1"),
        ({"split": "x"}, "split is 'x', expected one of train, val, test"),
        ({"classes": [1]}, "classes.0 is 1, expected a text"),
        ({"sources": {"alpha": {"title": 5}}}, "sources.alpha.title is 5, expected a text"),
    ],
)
def test_each_value_of_an_index_is_checked(
    data: Path, tmp_path: Path, change: dict, said: str
) -> None:
    """A count of null ended `sharding list` with a TypeError; a split of `x` was believed."""
    index = read_index(data / "old")

    def put(into: Any, values: dict) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                put(into[key], value)
            else:
                into[key] = value

    put(index, change)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ShardError, match=re.escape(said)):
        read_index(tmp_path)
