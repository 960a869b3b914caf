"""Tests of `build()`: the format on disk, identical bytes, resumed builds, and refused input."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset

from sharding.build import Tolerance, build
from sharding.catalog import CatalogError, read_catalog
from sharding.format import FORMAT_VERSION, ShardError, join_sets, open_shards, read_index
from sharding.inventory import FACTS_VERSION
from sharding.lock import locked
from sharding.write import write_shard
from tests.builders import CATALOG, build_all, hashes, run_build


def test_the_index_matches_the_packed_files(data: Path) -> None:
    index = read_index(data / "old")
    assert index["samples"] == 80
    assert index["totals"]["label"] == {"fake": 40, "real": 40}
    assert index["totals"]["source"] == {"alpha": 40, "beta": 30, "dummy": 10}
    assert index["sources"]["dummy"]["replay"] is False
    assert index["sources"]["beta"]["policy"] == "dda"
    for shard in index["shards"]:
        path = data / "old" / shard["name"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        assert path.stat().st_size == shard["bytes"]
        assert {name.split("-")[0] for name in [shard["name"]]} <= {"alpha", "beta", "dummy"}


def test_every_row_points_to_its_original_bytes(data: Path, raw: Path) -> None:
    shards = open_shards([data / "old", data / "new"])
    assert len(set(shards.table.column("key").to_pylist())) == len(shards)
    for row in shards.table.to_pylist():
        shard = shards.folders[row["shard_code"]] / shards.shards[row["shard_code"]]
        stored = shard.read_bytes()[row["offset"] : row["offset"] + row["size"]]
        assert stored == (raw / row["origin"]).read_bytes()
        assert hashlib.sha256(stored).digest() == row["sha256"]
        assert "." not in row["key"]


def test_members_of_a_sample_are_adjacent_and_have_no_date(data: Path) -> None:
    for path in (data / "old").glob("*.tar"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        keys = [member.name.split(".")[0] for member in members]
        assert keys[::2] == keys[1::2]
        assert {member.mtime for member in members} == {0}


def test_a_shard_is_the_tar_that_webdataset_would_write(data: Path, tmp_path: Path) -> None:
    for path in sorted((data / "old").glob("*.tar")):
        samples: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
        again = tmp_path / path.name
        with again.open("wb") as stream:
            with webdataset.TarWriter(stream, encoder=False, mtime=0) as writer:
                for key, members in samples.items():
                    writer.write({"__key__": key, **members})
        assert path.read_bytes() == again.read_bytes()


def test_a_name_too_long_for_a_tar_is_refused(raw: Path, tmp_path: Path) -> None:
    """The writer checks too, because a catalog made in Python has not been checked."""
    shutil.copytree(raw, tmp_path / "raw")
    long = "x" * 90
    (tmp_path / "raw/alpha").rename(tmp_path / "raw" / long)
    (tmp_path / "catalog.toml").write_text(CATALOG)
    catalog = read_catalog([tmp_path / "catalog.toml"])
    catalog.sources[long] = catalog.sources.pop("alpha")
    with pytest.raises(ShardError, match=f"{long}_.* 11[12] bytes, more than the 100 of"):
        build(catalog, tmp_path / "raw", tmp_path / "out", jobs=1)


def test_the_same_input_gives_the_same_bytes(raw: Path, data: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(raw, tmp_path / "copy")  # another path, other modification times
    assert hashes(build_all(copied, tmp_path / "again", jobs=2)) == hashes(data)


def test_a_second_build_does_nothing(raw: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*.tar")}
    assert before
    build_all(shutil.copytree(raw, tmp_path / "raw"), tmp_path / "out")
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*.tar")}


def test_a_changed_file_is_packed_again(raw: Path, data: Path, tmp_path: Path) -> None:
    raw = shutil.copytree(raw, tmp_path / "raw")
    shutil.copytree(data, tmp_path / "out")
    before = hashes(data)
    (raw / "alpha/real/003.webp").write_bytes((raw / "alpha/real/007.webp").read_bytes())
    (raw / "dummy/fake/000.jpg").unlink(missing_ok=True)
    after = hashes(build_all(raw, tmp_path / "out"))
    assert before["old/alpha-train-00000.tar"] != after["old/alpha-train-00000.tar"]
    assert before["old/beta-train-00000.tar"] == after["old/beta-train-00000.tar"]


def test_an_interrupted_rebuild_leaves_no_valid_set(
    raw: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old index next to new tars would look valid."""
    raw = shutil.copytree(raw, tmp_path / "raw")
    shutil.copytree(data, tmp_path / "out")
    (raw / "alpha/real/003.webp").write_bytes((raw / "alpha/real/007.webp").read_bytes())

    def full_disk(*arguments: object) -> None:
        write_shard(*arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sharding.build.write_shard", full_disk)
    with pytest.raises(OSError, match="No space left"):
        build_all(raw, tmp_path / "out")
    with pytest.raises(ShardError, match="its build did not finish"):
        open_shards([tmp_path / "out/old"])


def test_a_shard_that_another_process_replaces_stops_the_build(
    raw: Path, data: Path, tmp_path: Path
) -> None:
    """Such as a worker of a killed build, which still has the old labels."""
    raw, out = shutil.copytree(raw, tmp_path / "raw"), tmp_path / "out"
    shutil.copytree(data, out)
    mark = out / ".build/old/alpha-train-00000.tar.parquet"
    earlier = mark.read_bytes()
    text = CATALOG.replace('folder = "fake", generator = "gan"', 'folder = "fake", generator = "x"')
    (raw / "catalog.toml").write_text(text)

    @contextlib.contextmanager
    def replace_mark(_what: str, _total: int) -> Iterator[Callable[[int], None]]:
        yield lambda _done: mark.write_bytes(earlier) and None

    with pytest.raises(ShardError, match=r"another process has replaced .*alpha-train-00000\.tar"):
        build(read_catalog([raw / "catalog.toml"]), raw, out, jobs=1, progress=replace_mark)
    assert not (out / "old/index.json").exists()
    build_all(raw, out)
    assert "x" in read_index(out / "old")["totals"]["generator"]


def test_packed_sources_stay_when_their_raw_files_are_deleted(
    raw: Path, data: Path, tmp_path: Path
) -> None:
    """People delete a download once it is packed; the next build must keep its shards."""
    raw = shutil.copytree(raw, tmp_path / "raw")
    before = hashes(shutil.copytree(data, tmp_path / "out"))
    shutil.rmtree(raw / "dummy")
    assert hashes(build_all(raw, tmp_path / "out")) == before
    (tmp_path / "out/old/dummy-train-00000.tar").unlink()
    with pytest.raises(ShardError, match="the raw files of dummy are gone"):
        build_all(raw, tmp_path / "out")
    assert (tmp_path / "out/old/index.json").exists()


def test_packed_sources_stay_when_their_folder_is_empty(
    raw: Path, data: Path, tmp_path: Path
) -> None:
    """Such as a mount point without its disk."""
    raw = shutil.copytree(raw, tmp_path / "raw")
    before = hashes(shutil.copytree(data, tmp_path / "out"))
    shutil.rmtree(raw / "dummy")
    (raw / "dummy").mkdir()
    (raw / "dummy/.hidden").touch()
    assert hashes(build_all(raw, tmp_path / "out")) == before


def test_packed_sources_do_not_ignore_a_changed_catalog(
    raw: Path, data: Path, tmp_path: Path
) -> None:
    raw = shutil.copytree(raw, tmp_path / "raw")
    before = hashes(shutil.copytree(data, tmp_path / "out"))
    shutil.rmtree(raw / "dummy")
    text = (raw / "catalog.toml").read_text()
    start = text.index("[sources.dummy]")
    changed = text[start:].replace('set = "old"', 'set = "new"', 1)
    assert changed != text[start:]
    (raw / "catalog.toml").write_text(text[:start] + changed)
    with pytest.raises(ShardError, match=r"dummy was packed for old \(1\), the catalog says"):
        build_all(raw, tmp_path / "out")
    assert hashes(tmp_path / "out") == before


def test_a_source_is_removed_from_a_set_only_on_request(
    raw: Path, data: Path, tmp_path: Path
) -> None:
    raw = shutil.copytree(raw, tmp_path / "raw")
    shutil.copytree(data, tmp_path / "out")
    assert "synthetic" not in read_index(tmp_path / "out/old")["sources"]["beta"]
    text = (raw / "catalog.toml").read_text()
    own = '[sources.beta]\ntitle = "cats"\nsynthetic = true\n'
    text = text.replace("[sources.beta]\n", own)
    start, end = text.index("[sources.dummy]"), text.index("[sources.gamma]")
    (raw / "catalog.toml").write_text(text[:start] + text[end:])
    with pytest.raises(ShardError, match="set old contains source dummy, which is not in the cat"):
        build_all(raw, tmp_path / "out")
    (tmp_path / "out/.build/inventory/dummy.parquet").unlink()
    build_all(raw, tmp_path / "out")
    assert not list((tmp_path / "out/old").glob("dummy*"))
    sources = read_index(tmp_path / "out/old")["sources"]
    assert "dummy" not in sources
    assert sources["beta"]["synthetic"] is True and "synthetic" not in sources["alpha"]
    assert sources["beta"]["title"] == "cats" and "title" not in sources["alpha"]


def test_a_set_to_which_no_image_goes_any_more_stops_the_build(
    raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its images would be in two sets."""
    raw, out = shutil.copytree(raw, tmp_path / "raw"), tmp_path / "out"
    path = raw / "catalog.toml"
    path.write_text(CATALOG.replace("set = { new = 0.8, val = 0.2 }", 'set = "val"'))
    before = hashes(build_all(raw, out))
    path.write_text(CATALOG.replace("set = { new = 0.8, val = 0.2 }", 'set = "new"'))
    with pytest.raises(
        ShardError, match=rf"packs nothing into set val.* delete {out}/val and build "
    ):
        build_all(raw, out)
    assert hashes(out) == before
    shutil.rmtree(out / "val")
    build_all(raw, out)


def test_a_set_whose_raw_files_were_deleted_stays(
    raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing moved to another set, and its images cannot be packed again."""
    raw, out = shutil.copytree(raw, tmp_path / "raw"), tmp_path / "out"
    fakes = 'folder = "fake", generator = "diffusion"'
    text = CATALOG.replace("set = { new = 0.8, val = 0.2 }", 'set = "new"')
    (raw / "catalog.toml").write_text(text.replace(fakes, f'{fakes}, set = "val"'))
    before = hashes(build_all(raw, out))
    shutil.rmtree(raw / "gamma/fake")
    after = hashes(build_all(raw, out))
    assert "set val is out of date: no image goes to it any more; it is kept" in caplog.text
    kept = {name for name in before if name.startswith("val/")}
    assert kept and all(after[name] == before[name] for name in kept)


def test_a_set_of_another_catalog_stays(raw: Path, data: Path, tmp_path: Path) -> None:
    raw, out = shutil.copytree(raw, tmp_path / "raw"), tmp_path / "out"
    shutil.copytree(data, out)
    text = (raw / "catalog.toml").read_text()
    (raw / "catalog.toml").write_text(text[: text.index("[sources.gamma]")])
    build_all(raw, out)
    assert (out / "new/index.json").exists()


@pytest.mark.slow  # the quick kill of a build is in test_build_robust.py
def test_a_build_restarted_after_a_kill_writes_the_same_bytes(
    raw: Path, data: Path, tmp_path: Path
) -> None:
    """Send SIGKILL to the build and all its workers after the first shard is written."""
    process = run_build(raw, tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/*.tar")) and time.monotonic() < deadline:
        time.sleep(random.random() * 0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(tmp_path.glob("*/*.tar")), "nothing was written before the kill"
    unfinished = [p for p in tmp_path.glob("*") if not (p / "index.json").exists()]
    assert unfinished or not (tmp_path / "val/index.json").exists()
    again = run_build(raw, tmp_path)
    output = again.communicate(timeout=120)[0].decode()
    assert again.returncode == 0, output
    assert hashes(tmp_path) == hashes(data)


@pytest.mark.parametrize("keep", [0.0, 0.6])
def test_a_partial_tar_is_never_taken_for_a_whole_one(
    raw: Path, data: Path, tmp_path: Path, keep: float
) -> None:
    shutil.copytree(data, tmp_path / "out")
    tar = tmp_path / "out/old/alpha-train-00000.tar"
    os.truncate(tar, int(tar.stat().st_size * keep))
    (tmp_path / "out/old/index.json").unlink()
    assert hashes(build_all(raw, tmp_path / "out")) == hashes(data)


def test_a_second_build_of_one_output_is_refused(raw: Path, tmp_path: Path) -> None:
    (tmp_path / ".build").mkdir(parents=True)
    with locked(tmp_path / ".build", tmp_path):  # as a running build does
        with pytest.raises(OSError, match="another build is writing"):
            build_one(raw, tmp_path, "old")
    build_one(raw, tmp_path, "old")


def build_one(raw: Path, out: Path, name: str, max_bad: float = 0.01):
    catalog = read_catalog([raw / "catalog.toml"])
    (built,) = build(catalog, raw, out, only=[name], jobs=1, tolerance=Tolerance(max_bad))[1]
    return built


def test_bad_files_are_quarantined_with_their_reason(raw: Path, tmp_path: Path) -> None:
    raw = shutil.copytree(raw, tmp_path / "raw")
    victim = raw / "alpha/real/004.jpg"
    victim.write_bytes(victim.read_bytes()[:-200])
    built = build_one(raw, tmp_path / "out", "old", max_bad=0.05)
    (entry,) = built.index["quarantined"]
    assert entry["path"] == "alpha/real/004.jpg"
    assert "does not decode" in entry["reason"]
    assert built.index["samples"] == 79


@pytest.mark.slow
def test_images_that_the_catalog_excludes_by_hash_are_in_no_set(raw: Path, tmp_path: Path) -> None:
    raw = shutil.copytree(raw, tmp_path / "raw")
    names = ["alpha/real/004.jpg", "alpha/fake/003.jpg"]
    digests = [hashlib.sha256((raw / name).read_bytes()).hexdigest() for name in names]
    path = raw / "catalog.toml"
    path.write_text('exclude = ["kept.txt"]\n' + CATALOG)
    (raw / "kept.txt").write_text(f"# for testing\n{digests[0][:16]}\n{digests[1].upper()}\n")
    _, built = build(read_catalog([path]), raw, tmp_path / "out", only=["old"])
    reason = "its SHA-256 stands in a list that the catalog excludes"
    assert built[0].index["excluded"] == {reason: 2}
    assert built[0].index["samples"] == 78
    rows = (tmp_path / "out/old/excluded.csv").read_text().splitlines()[1:]
    assert sorted(rows) == sorted(f"alpha,{name},{reason}," for name in names)


def test_too_many_bad_files_fail_the_build(raw: Path, tmp_path: Path) -> None:
    raw = shutil.copytree(raw, tmp_path / "raw")
    for number in (0, 4, 8):
        (raw / f"alpha/real/{number:03d}.jpg").write_bytes(b"<html>")
    with pytest.raises(ShardError, match="3 of 80 images of set old cannot be read, more than 1 %"):
        build_one(raw, tmp_path / "out", "old")
    assert not (tmp_path / "out/old/index.json").exists()


def test_one_bad_file_passes_unless_none_may(raw: Path, tmp_path: Path) -> None:
    raw = shutil.copytree(raw, tmp_path / "raw")
    (raw / "alpha/real/000.jpg").write_bytes(b"<html>")
    with pytest.raises(ShardError, match="1 of 80 images of set old cannot be read, more than 0 %"):
        build_one(raw, tmp_path / "out", "old", max_bad=0)
    assert build_one(raw, tmp_path / "out", "old").index["samples"] == 79


def test_a_folder_without_an_index_is_not_a_set(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "out")
    (tmp_path / "out/old/index.json").unlink()
    with pytest.raises(ShardError, match=r"tar files but no index\.json, so its build did not fin"):
        open_shards([tmp_path / "out/old"])
    with pytest.raises(ShardError, match=r"no shard set at .*; .* has the sets new, val"):
        open_shards([tmp_path / "out/nowhere"])


def test_a_path_where_the_name_of_a_set_belongs_is_explained(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data, tmp_path / "data/shards")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ShardError, match=r"without its folder: val instead of data/shards/val$"):
        open_shards([Path("data/shards") / "data/shards/val"])


def test_no_sets_at_all_are_one_error() -> None:
    with pytest.raises(ShardError, match="no shard sets to open; name at least one folder"):
        open_shards([])
    with pytest.raises(ShardError, match="no shard sets to join; expected at least one"):
        join_sets([])


def test_a_table_of_another_set_or_version_is_refused(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "out")
    shutil.copy(data / "new/samples.parquet", tmp_path / "out/old/samples.parquet")
    with pytest.raises(ShardError, match=r"samples\.parquet has sha256"):
        open_shards([tmp_path / "out/old"])
    index = json.loads((tmp_path / "out/val/index.json").read_text())
    (tmp_path / "out/val/index.json").write_text(json.dumps(index | {"format_version": 99}))
    said = (
        f"format version 99, expected {FORMAT_VERSION}; build the set again with `python -m shard"
    )
    with pytest.raises(ShardError, match=said):
        open_shards([tmp_path / "out/val"])


def test_an_inventory_of_another_version_is_made_again_or_refused(
    raw: Path, tmp_path: Path
) -> None:
    """The inventory can be made again only if the raw files still exist."""
    raw, out = shutil.copytree(raw, tmp_path / "raw"), tmp_path / "out"
    build_one(raw, out, "old")
    path = out / ".build/inventory/alpha.parquet"
    table = pq.read_table(path)
    notes = {**table.schema.metadata, b"facts": b"1"}
    names = ["refused" if name == "excluded" else name for name in table.schema.names]

    def make_old() -> None:
        pq.write_table(table.rename_columns(names).replace_schema_metadata(notes), path)

    make_old()
    build_one(raw, out, "old")
    assert pq.read_schema(path).metadata[b"facts"] == FACTS_VERSION.encode()
    make_old()
    shutil.rmtree(raw / "alpha")
    said = (
        rf"alpha\.parquet has inventory version 1, expected {FACTS_VERSION}, and the raw files of "
    )
    with pytest.raises(ShardError, match=said):
        build_one(raw, out, "old")


def test_a_rule_that_matches_no_file_stops_the_build(raw: Path, tmp_path: Path) -> None:
    raw = shutil.copytree(raw, tmp_path / "raw")
    text = (raw / "catalog.toml").read_text()
    entry = '{ folder = "real", generator = "camera" }'
    for extra in ('{ folder = "raels" }', '{ folder = "real", name = "*.tif" }'):
        (raw / "catalog.toml").write_text(text.replace(entry, f"{entry}, {extra}", 1))
        with pytest.raises(
            CatalogError, match=r"source alpha: no file in .* matches real: (raels|real/)"
        ):
            build_one(raw, tmp_path / "out", "old")
        catalog = read_catalog([raw / "catalog.toml"])
        build(catalog, raw, tmp_path / "flag", only=["old"], jobs=1,
              tolerance=Tolerance(allow_incomplete=True))  # fmt: skip
        optional = extra.replace(" }", ", optional = true }")
        (raw / "catalog.toml").write_text(text.replace(entry, f"{entry}, {optional}", 1))
        build_one(raw, tmp_path / "out", "old")
    (raw / "catalog.toml").write_text(
        text.replace('license = "test"', 'license = "test"\nignore = ["x"]', 1)
    )
    with pytest.raises(CatalogError, match=r"source alpha: no file in .* matches ignored: x"):
        build_one(raw, tmp_path / "out", "old")


def test_optional_rules_of_which_none_matches_stop_the_build(raw: Path, tmp_path: Path) -> None:
    """Optional rules of one class are alternatives: at least one must match."""
    raw = shutil.copytree(raw, tmp_path / "raw")
    text = (raw / "catalog.toml").read_text()
    entry = '{ folder = "real", generator = "camera" }'
    choices = '{ folder = "a", optional = true }, { folder = "b", optional = true }'
    (raw / "catalog.toml").write_text(text.replace(entry, choices, 1))
    with pytest.raises(CatalogError, match=r"matches real: a; real: b\. Correct the rule"):
        build_one(raw, tmp_path / "out", "old")


def test_a_training_set_of_one_class_stops_the_build(raw: Path, tmp_path: Path) -> None:
    raw = shutil.copytree(raw, tmp_path / "raw")
    for source in ("alpha", "beta"):
        shutil.rmtree(raw / source)
    with pytest.raises(
        ShardError, match="set old has 10 fake images and no real images; add real im"
    ):
        build_one(raw, tmp_path / "out", "old")
    assert not (tmp_path / "out/old/index.json").exists()
    catalog = read_catalog([raw / "catalog.toml"])
    build(catalog, raw, tmp_path / "out", only=["old"], jobs=1,
          tolerance=Tolerance(allow_incomplete=True))  # fmt: skip
    text = (raw / "catalog.toml").read_text().replace('old = "train"', 'old = "test"')
    (raw / "catalog.toml").write_text(text)
    build_one(raw, tmp_path / "test", "old")


def test_an_empty_training_set_stops_the_build(copies: Path, tmp_path: Path) -> None:
    catalog = read_catalog([copies / "catalog.toml"])
    said = r"training set mine would be empty: .* ours/fake/0\.png \(near-duplicate of an image"
    with pytest.raises(ShardError, match=said):
        build(catalog, copies, tmp_path / "out", jobs=1)
    assert not (tmp_path / "out/tests").exists()
    assert read_index(build_all(copies, tmp_path / "out") / "mine")["samples"] == 0


def test_an_unknown_set_is_refused_before_anything_is_decoded(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no set odl in the catalog, which has old, new, val"):
        build_one(raw, tmp_path / "out", "odl")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"PAR1" + bytes(99) + b"PAR1", None])
def test_damaged_build_files_are_named_or_written_again(
    raw: Path, data: Path, tmp_path: Path, content: bytes | None
) -> None:
    """`None` stands for a valid parquet table of another kind."""
    out = shutil.copytree(data, tmp_path / "out")
    content = (data / "old/samples.parquet").read_bytes() if content is None else content
    mark = out / ".build/old/alpha-train-00000.tar.parquet"
    mark.write_bytes(content)
    assert hashes(build_all(raw, out)) == hashes(data)
    inventory = out / ".build/inventory/alpha.parquet"
    inventory.write_bytes(content)
    with pytest.raises(ShardError, match=r"alpha\.parquet is damaged \(.*\); delete it"):
        build_all(raw, out)
    inventory.unlink()
    assert hashes(build_all(raw, out)) == hashes(data)
