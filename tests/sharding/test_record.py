"""Tests of the record of a build: a build replaces and removes only its own files."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from sharding.build import build
from sharding.catalog import read_catalog
from sharding.format import ShardError, read_index
from sharding.inventory import item_table, missing_chunks
from tests.builders import build_all, hashes


@pytest.fixture
def built(raw: Path, data: Path, tmp_path: Path) -> Path:
    """Return a copy of the small sets with the record of their build."""
    return Path(shutil.copytree(data, tmp_path / "out"))


def refused(raw: Path, out: Path, *said: str) -> None:
    """Check that a build is refused with all these texts and changes nothing."""
    before = hashes(out)
    with pytest.raises(ShardError) as caught:
        build_all(raw, out)
    for text in (*said, "nothing was changed"):
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hashes(out) == before


def test_a_copied_set_without_its_record_is_refused(raw: Path, built: Path) -> None:
    shutil.rmtree(built / ".build")
    refused(raw, built, f"{built / 'new'} contains _info.json, excluded.csv", "and 3 more")


def test_a_downloaded_index_alone_is_refused(raw: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out/old").mkdir(parents=True)
    shutil.copy(data / "old/index.json", tmp_path / "out/old")
    refused(raw, tmp_path / "out", "old contains index.json")


@pytest.mark.parametrize(
    "name",
    ["backup.tar", "beta-train-00007.tar", "x.idx", "alpha-train-00000.tar.partial",
     "photos.tar.77.partial"],
)  # fmt: skip
def test_a_foreign_file_is_refused_and_kept(raw: Path, built: Path, name: str) -> None:
    (built / "old" / name).write_bytes(b"mine")
    refused(raw, built, name, "written.json", "Move the files away")
    (built / "old" / name).unlink()
    build_all(raw, built)


def test_other_files_are_left_alone(raw: Path, data: Path, built: Path) -> None:
    (built / "old/README.md").write_text("mine")
    (built / "old/index.json").unlink()  # so that the set is written again
    build_all(raw, built)
    assert (built / "old/README.md").read_text() == "mine"


def test_files_of_a_killed_build_are_recognized(raw: Path, data: Path, built: Path) -> None:
    (built / "old/alpha-train-00000.tar.77.partial").write_bytes(b"half")
    (built / "old/index.json.77.partial").write_bytes(b"half")
    (built / ".build/old/alpha-train-00000.tar.parquet").unlink()
    (built / "old/index.json").unlink()
    build_all(raw, built)
    assert hashes(built) == hashes(data)


def test_an_unfinished_set_of_another_catalog_is_not_lost(raw: Path, built: Path) -> None:
    """The record lists the sources of a set, even if the set has no index."""
    (built / "old/index.json").unlink()
    (built / "other.toml").write_text(
        '[sets]\nold = "train"\n[sources.gamma]\nlicense = "x"\nset = "old"\n'
        'real = ["real"]\nfake = ["fake"]\n'
    )
    before = hashes(built)
    with pytest.raises(ShardError, match="contains source alpha, which is not in the catalog"):
        build(read_catalog([built / "other.toml"]), raw, built, jobs=1)
    assert hashes(built) == before


def test_files_of_a_removed_source_are_deleted(raw: Path, data: Path, tmp_path: Path) -> None:
    raw = shutil.copytree(raw, tmp_path / "raw")
    shutil.copytree(data, tmp_path / "out")
    shutil.rmtree(raw / "dummy")
    (tmp_path / "out/.build/inventory/dummy.parquet").unlink()
    build_all(raw, tmp_path / "out")
    index = read_index(tmp_path / "out/old")
    record = json.loads((tmp_path / "out/.build/old/written.json").read_text())["files"]
    assert record == sorted(path.name for path in (tmp_path / "out/old").iterdir())
    assert [shard["name"] for shard in index["shards"]] == [n for n in record if n.endswith("tar")]


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "null"])
def test_a_damaged_record_is_a_one_line_error(raw: Path, built: Path, content: str) -> None:
    (built / ".build/old/written.json").write_text(content)
    with pytest.raises(ShardError, match=r"written\.json is damaged .*move .* away"):
        build_all(raw, built)


@pytest.mark.parametrize("folder", ["old", ".build/old", ".build/inventory"])
def test_a_link_out_of_the_output_is_refused(
    raw: Path, built: Path, tmp_path: Path, folder: str
) -> None:
    shutil.move(built / folder, tmp_path / "elsewhere")
    (built / folder).symlink_to(tmp_path / "elsewhere")
    before = hashes(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is outside of"):
        build_all(raw, built)
    assert hashes(tmp_path / "elsewhere") == before


def test_tasks_for_workers_hold_their_own_rows_alone() -> None:
    """Else packing would send the whole source with every 256 images."""
    sizes = []
    for count in (1_000, 20_000):
        names = [f"real/{number:06d}.jpg" for number in range(count)]
        items = item_table(
            [("alpha", name, name, "", 100, "1", 0, "", "", "{}", "") for name in names]
        )
        _, chunk = next(iter(missing_chunks("alpha", items, None)))
        sizes.append(len(pickle.dumps(chunk)))
    assert sizes[1] < 1.1 * sizes[0]


def test_temporary_files_of_killed_builds_are_removed(raw: Path, built: Path) -> None:
    before = hashes(built)
    for path in [path for path in built.rglob("*") if path.is_file()]:
        if path.name != "lock":
            path.with_name(f"{path.name}.7.partial").write_bytes(b"half")
    build_all(raw, built)
    assert hashes(built) == before
    assert not list(built.rglob("*.partial"))
