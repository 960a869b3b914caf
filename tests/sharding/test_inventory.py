"""Tests of the tasks into which the images to decode are divided, and of the inventory's files."""

import itertools
from pathlib import Path

import pytest

from sharding import inventory
from sharding.inventory import (
    CHUNK,
    LARGEST_CHUNK,
    files_by_source,
    item_table,
    missing_chunks,
)
from sharding.listing import Item
from sharding.remote import files_in
from tests.builders import build_all, encode, photo


def item(path: str, member: str, number: int) -> Item:
    return Item(
        source="s", origin=f"{path}:{number}", path=path, member=member, size=0, version="",
        label=0, generator="camera", group=f"{path}:{number}", destination="{}", excluded="",
    )  # fmt: skip


def sizes_of(items: list[Item]) -> list[int]:
    return [chunk.num_rows for _name, chunk in missing_chunks("s", item_table(items), None)]


def cells(path: str, *groups: int) -> list[Item]:
    """List the cells of a parquet table with row groups of these sizes."""
    members = [f"{group}:{row}:image" for group, size in enumerate(groups) for row in range(size)]
    return [item(path, member, number) for number, member in enumerate(members)]


def test_files_are_divided_into_tasks_of_one_size() -> None:
    assert sizes_of([item(f"s/{n}.jpg", "", n) for n in range(2 * CHUNK + 3)]) == [CHUNK, CHUNK, 3]
    assert sizes_of([item("s/x.zip", f"{n}", n) for n in range(CHUNK)]) == [CHUNK]
    assert sizes_of([]) == []


def test_a_row_group_is_read_by_one_task_unless_it_is_very_large() -> None:
    """Each task reads it from its beginning."""
    assert sizes_of(cells("s/a.parquet", 100, 100, 100, 100)) == [300, 100]
    assert sizes_of(cells("s/a.parquet", 1000, 1000) + cells("s/b.parquet", 5)) == [1000, 1000, 5]
    assert sizes_of(cells("s/a.parquet", LARGEST_CHUNK + 7, 9)) == [LARGEST_CHUNK, 16]


def test_each_file_is_of_one_source(tmp_path: Path) -> None:
    """Also the temporary ones that killed processes left."""
    names = {
        "a": ["a+12.parquet", "a+12.parquet.7.partial", "a.parquet", "a.parquet.7.partial"],
        "a-b": ["a-b+12.parquet", "a-b.parquet"],
    }
    for name in itertools.chain(*names.values()):
        (tmp_path / name).touch()
    files = files_by_source(tmp_path)
    assert {source: sorted(path.name for path in files[source]) for source in files} == names
    assert files["c"] == []


def test_a_build_lists_the_inventory_twice_for_any_number_of_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after decoding. A listing for each source takes the square of their number."""
    catalog = '[sets]\nmine = "train"\n'
    for number in range(5):
        catalog += f'[sources.s{number}]\nlicense = "x"\nset = "mine"\nreal = ["real"]\n'
        (tmp_path / f"raw/s{number}/real").mkdir(parents=True)
        image = encode(photo(number), "PNG")
        (tmp_path / f"raw/s{number}/real/0.png").write_bytes(image)
    (tmp_path / "raw/catalog.toml").write_text(catalog)
    listed = []
    monkeypatch.setattr(inventory, "files_in", lambda path: listed.append(path) or files_in(path))
    folder = build_all(tmp_path / "raw", tmp_path / "out") / ".build/inventory"
    assert listed == [folder, folder]
    assert [path.name for path in files_in(folder)] == [f"s{n}.parquet" for n in range(5)]
