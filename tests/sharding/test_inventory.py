"""Tests of the tasks into which the images to decode are divided."""

from sharding.inventory import CHUNK, LARGEST_CHUNK, item_table, missing_chunks
from sharding.listing import Item


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
