"""Tests of memory, time and limits of reading the images in parquet tables, also hostile ones."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imaging.decode import DecodeError
from sharding.image_cells import image_cells
from sharding.raw import read_all

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def read(path: Path) -> tuple[list[str], str]:
    """Return the places of the cells in a table, and the error that ended it or ""."""
    places = []
    try:
        for place, _ in image_cells(path):
            places.append(place)
    except DecodeError as error:
        return places, str(error)
    return places, ""


def named_image(table: pa.Table) -> pa.Table:
    """Return a table whose metadata says that the column `image` has images."""
    features = {"image": {"_type": "Image"}}
    return table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


def test_a_table_without_rows_is_no_silence(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.nulls(0, IMAGE)}), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet") == ([], "a table without rows")


def test_empty_cells_of_a_small_table_take_no_memory(tmp_path: Path) -> None:
    """A table of 11 kB has 3 million rows, which took 2 GB before the first image."""
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": pa.nulls(40_000, IMAGE)}), path)
    tracemalloc.start()
    place, data = next(image_cells(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (place, str(data)) == ("0:image", "the cell holds no image")
    assert peak < 2_000_000
    pq.write_table(pa.table({"image": pa.nulls(1_000_000, IMAGE)}), path)
    places, error = read(path)
    assert not places
    assert error.startswith("its images unpack to 512,000,000 bytes or more, expected at most 269,")
    assert error.endswith("(200 times its size and 268,435,456), so none is read")


def test_a_table_that_unpacks_to_too_much_is_refused_from_its_footer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharding.image_cells.MAX_RATIO", 2)
    monkeypatch.setattr("sharding.image_cells.MAX_SLACK", 5_000_000)
    cells = [{"bytes": bytes(2_000_000 + number)} for number in range(4)]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": cells}), path, row_group_size=2)
    places, error = read(path)
    assert not places and "unpack to 8,000," in error
    pq.write_table(pa.table({"image": cells[:2]}), path, row_group_size=2)
    assert read(path) == (["0:image", "1:image"], "")


def test_bytes_that_many_cells_refer_to_are_counted_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of 3 kB gave 60 MB in each of 400 rows."""
    size = 2**20
    cell = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array([bytes(size)]))
    path = tmp_path / "t.parquet"
    options: dict[str, Any] = {"compression": "zstd", "store_schema": False}
    pq.write_table(
        pa.table({"image": pa.StructArray.from_arrays([cell], ["bytes"])}), path, **options
    )
    assert path.stat().st_size < 10_000
    monkeypatch.setattr("sharding.image_cells.MAX_SLACK", 5 * size)
    places, error = read(path)
    assert places == [f"{row}:image" for row in range(5)]
    assert error.startswith(f"its images unpack to {6 * size:,} bytes or more, expected at most")
    assert error.endswith("; the remaining rows are not read")


def test_a_row_group_is_read_in_pieces(tmp_path: Path) -> None:
    """Published tables have row groups of hundreds of megabytes."""
    path = tmp_path / "t.parquet"
    cells = [{"bytes": os.urandom(100_000)} for _ in range(100)]
    options: dict[str, Any] = {"use_dictionary": False, "write_batch_size": 1}  # small pages
    pq.write_table(pa.table({"image": cells}), path, **options)
    rows = [{"path": path.name, "member": "0:0:image"}]
    tracemalloc.start()
    for first in (next(image_cells(path))[1], next(read_all(tmp_path, rows))):
        _, peak = tracemalloc.get_traced_memory()  # pyarrow reads bytes of Python
        assert first == cells[0]["bytes"] and peak < 2_000_000
    tracemalloc.stop()


def test_rows_are_counted_through_all_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table({"image": [{"bytes": b"a"}, {"bytes": b"b"}, {"bytes": None}]})
    with pq.ParquetWriter(path, table.schema) as writer:
        for part in (table[:2], table[:0], table):
            writer.write_table(part)
    assert pq.ParquetFile(path).num_row_groups == 3
    given = [(place, str(data)) for place, data in image_cells(path)]
    none = "the cell holds no image"
    kept = ["b'a'", "b'b'", "b'a'", "b'b'", none]
    assert given == [(f"{row}:image", each) for row, each in enumerate(kept)]


def test_a_table_is_opened_once_for_all_of_its_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The footer of a table with a row group per row would be read for each row."""
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [{"bytes": b"%d" % n} for n in range(9)]}), path,
                   row_group_size=1)  # fmt: skip
    opened = []
    real = pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda *a, **k: opened.append(a) or real(*a, **k))
    expected = [b"%d" % n for n in range(9)]
    rows = [{"path": "t.parquet", "member": f"{n}:0:image"} for n in range(9)]
    assert [*read_all(tmp_path, rows)] == expected and len(opened) == 1
    assert [data for _, data in image_cells(path)] == expected and len(opened) == 2


def test_cells_that_are_no_bytes_do_not_become_python_values(tmp_path: Path) -> None:
    """A list of a million numbers takes a few bytes of a file, and 8 MB or more in Python."""
    path = tmp_path / "t.parquet"
    count = 1_000_000
    many = pa.ListArray.from_arrays([0, count], pa.array(bytes(count), pa.uint8()))
    beside = pa.StructArray.from_arrays([pa.array([b"x"]), many], ["bytes", "more"])
    table = named_image(pa.table({"image": many, "other": beside}))
    pq.write_table(table, path, compression="zstd")
    rows = [{"path": path.name, "member": f"0:0:{column}"} for column in ("image", "other")]
    tracemalloc.start()
    packed = [*map(str, read_all(tmp_path, rows))]
    given = [(place, str(data)) for place, data in image_cells(path)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert packed == ["the cell holds no image", "b'x'"]
    assert peak < 2_000_000
    reason = (
        f"a column of images of type {pq.read_schema(path).field('image').type}, expected binary"
    )
    assert given == [("image", reason), ("0:other", "b'x'")]


@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.binary(3), pa.dictionary(pa.int8(), pa.binary())],
    ids=str,
)
def test_bytes_of_each_type_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    cells = pa.array([b"abc", None, b"def"], pa.binary(3) if kind == pa.binary(3) else pa.binary())
    cells = cells.dictionary_encode() if pa.types.is_dictionary(kind) else cells.cast(kind)
    texts = pa.array(["abc", "d", ""])
    struct = pa.StructArray.from_arrays([cells, texts], ["bytes", "path"])
    path = tmp_path / "t.parquet"
    pq.write_table(named_image(pa.table({"image": cells, "pair": struct, "text": texts})), path)
    none = "the cell holds no image"
    kept = ["b'abc'", "b'abc'", none, none, "b'def'", "b'def'"]
    assert [str(data) for _, data in image_cells(path)] == kept
    rows = [{"path": path.name, "member": f"0:{row}:text"} for row in range(3)]
    assert [*map(str, read_all(tmp_path, rows))] == [none] * 3
