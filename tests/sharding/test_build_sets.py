"""Tests of builds of some sets, and of catalogs that changed since: no image is in two sets, and no
rule is ignored.
"""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sharding.build import Tolerance, build
from sharding.catalog import CatalogError, read_catalog
from sharding.fetch_spec import BEGUN
from sharding.format import ShardError, open_shards
from sharding.left_out import left_out
from sharding.lock import changing, reading
from sharding.scan import find_sources
from sharding.sources import rows_of
from sharding.verify import sets_in, verify
from tests.builders import encode, hashes, photo

SOURCE = '[sources.{0}]\nlicense = "x"\nroot = "{1}"\nset = {2}\n{3}\n'
REAL, FAKE = 'real = ["real"]', 'fake = ["fake"]'


def catalog(*sources: tuple[str, str, str, str], sets: str = "tr te te2") -> str:
    lines = [f'{name} = "{"train" if name[:2] == "tr" else "test"}"' for name in sets.split()]
    return "\n".join(["[sets]", *lines, *(SOURCE.format(*source) for source in sources)])


def put(folder: Path, numbers: range, suffix: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        options = {"quality": 90} if suffix == "jpg" else {}
        kind = {"png": "PNG", "jpg": "JPEG"}[suffix]
        data = encode(photo(number, 48, 40), kind, **options)
        (folder / f"{number}.{suffix}").write_bytes(data)


def pack(tmp_path: Path, text: str, *only: str) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(text)
    build(read_catalog([path]), tmp_path / "raw", tmp_path / "out", only=only, jobs=1,
          tolerance=Tolerance(allow_incomplete=True))  # fmt: skip


def refused(tmp_path: Path, said: str, text: str, *only: str) -> None:
    """Check that a build is refused with `said`, and changes no set."""
    before = hashes(tmp_path / "out")
    with pytest.raises(ShardError, match=said):
        pack(tmp_path, text, *only)
    assert hashes(tmp_path / "out") == before


def consistent(tmp_path: Path) -> bool:
    return verify(sets_in(tmp_path / "out"), jobs=1) == []


def test_a_download_that_has_not_finished_is_not_packed(tmp_path: Path) -> None:
    """Files arrive in the order of their names, so that a class may be missing."""
    raw, out, text = tmp_path / "raw", tmp_path / "out", catalog(("a", "b", '"tr"', REAL))
    put(raw / "b/real", range(2))
    (raw / "b" / BEGUN).write_text("{}")
    (tmp_path / "catalog.toml").write_text(text)
    described = read_catalog([tmp_path / "catalog.toml"])
    with pytest.raises(CatalogError, match=r"has not finished .* the command that began it"):
        build(described, raw, out, jobs=1)
    assert not out.exists() and rows_of(described, raw, {})[0][2] == "partly"
    with pytest.raises(CatalogError, match="has not finished"):
        find_sources(described, raw, out, only=["tr"])
    assert find_sources(described, raw, out, only=["va"]).listings  # this download is for `tr`
    pack(tmp_path, text)  # with allow_incomplete
    assert len(open_shards([out / "tr"])) == 2


def test_a_set_that_is_read_is_not_changed(tmp_path: Path) -> None:
    put(tmp_path / "raw/a/real", range(4))
    text = catalog(("a", "a", '"tr"', REAL))
    pack(tmp_path, text)
    shards = open_shards([tmp_path / "out/tr"])
    before = hashes(tmp_path / "out/tr")
    with reading(shards):
        pack(tmp_path, text)  # nothing to write
        put(tmp_path / "raw/a/real", range(4, 6))
        with pytest.raises(BlockingIOError, match="another process reads them"):
            pack(tmp_path, text)
        assert hashes(tmp_path / "out/tr") == before
    pack(tmp_path, text)
    with (
        changing(tmp_path / "out/tr", ["another.tar"], writes=False),  # which removes its shard
        pytest.raises(BlockingIOError, match="a build is changing"),
        reading(shards),
    ):
        pass
    with (
        changing(tmp_path / "out/tr", ["another.tar"], writes=False),
        pytest.raises(BlockingIOError, match="a build is changing"),
    ):
        verify([tmp_path / "out/tr"], jobs=1)


def test_a_set_without_images_and_a_set_without_a_class_are_named(tmp_path: Path) -> None:
    put(tmp_path / "raw/a/real", range(4))
    put(tmp_path / "raw/a/fake", range(10, 12))
    put(tmp_path / "raw/b/real", range(20, 22))
    text = catalog(("a", "a", "{ tr = 0.998, te = 0.001, te2 = 0.001 }", f"{REAL}\n{FAKE}"),
                   ("b", "b", '"te2"', REAL))  # fmt: skip
    (tmp_path / "c.toml").write_text(text)
    place = read_catalog([tmp_path / "c.toml"]), tmp_path / "raw", tmp_path / "out"
    scan, built = build(*place, jobs=1)
    assert scan.lacking == {"te": ["real", "fake"], "te2": ["fake"]}
    lines = left_out(built, scan, tmp_path / "out")
    assert [line.partition(";")[0] for line in lines] == [
        "no image went to set te", "no fake image went to set te2",
    ]  # fmt: skip
    assert build(*place, only=["tr"], jobs=1)[0].lacking == {}


def test_a_class_that_is_lost_to_contradictory_labels_is_not_called_missing(tmp_path: Path) -> None:
    put(tmp_path / "raw/a/real", range(2))
    put(tmp_path / "raw/a/imagen", range(2))
    put(tmp_path / "raw/a/fake", range(10, 12))
    text = catalog(("a", "a", '"tr"', f'{REAL}\nfake = ["fake", "imagen"]'))
    (tmp_path / "c.toml").write_text(text)
    said = (
        r"2 fake images and no real images: 2 images excluded, such as a/real/0\.png \(the same "
        r"bytes are labeled real and fake: a/imagen/0\.png\); correct the labels or add other real"
    )
    with pytest.raises(ShardError, match=said):
        build(read_catalog([tmp_path / "c.toml"]), tmp_path / "raw", tmp_path / "out", jobs=1)


def test_images_that_are_copies_of_another_set_are_not_said_to_have_wrong_labels(
    tmp_path: Path,
) -> None:
    put(tmp_path / "raw/a/real", range(2))
    put(tmp_path / "raw/a/fake", range(10, 12))
    put(tmp_path / "raw/b/real", range(2))
    text = catalog(("a", "a", '"tr"', f"{REAL}\n{FAKE}"), ("b", "b", '"te"', REAL))
    (tmp_path / "c.toml").write_text(text)
    place = read_catalog([tmp_path / "c.toml"]), tmp_path / "raw", tmp_path / "out"
    with pytest.raises(ShardError, match=r"2 images excluded, such as .*; add other real images,"):
        build(*place, jobs=1)
    scan, built = build(*place, jobs=1, tolerance=Tolerance(allow_incomplete=True))
    lines = left_out(built, scan, tmp_path / "out")
    assert lines[-1].startswith("no real image went to set tr: 2 images excluded, such as a/real/")
    assert lines[-1].endswith("; add images")


def test_changed_shares_do_not_put_images_of_a_set_that_is_not_built_into_another(
    tmp_path: Path,
) -> None:
    put(tmp_path / "raw/a/real", range(20))
    text = catalog(("a", "a", "{ tr = 0.5, te = 0.5 }", REAL))
    pack(tmp_path, text)
    changed = text.replace("tr = 0.5, te = 0.5", "tr = 0.95, te = 0.05")
    said = r"set te is out of date: \d+ of its .* in set tr too. .* add --set te, or leave out"
    refused(tmp_path, said, changed, "tr")
    pack(tmp_path, changed, "tr", "te")
    assert consistent(tmp_path)
    pack(tmp_path, changed, "tr")


def images_of(folder: Path) -> set[bytes]:
    return {*pq.read_table(folder / "samples.parquet").column("sha256").to_pylist()}


def test_packed_images_that_change_their_set_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A renamed folder moves images: a detector trained before has learned from some of the test
    images, and no command can tell.
    """
    put(tmp_path / "raw/a/real", range(20))
    text = catalog(("a", "a", "{ tr = 0.5, te = 0.5 }", REAL))
    pack(tmp_path, text)
    put(tmp_path / "raw/a/real", range(20, 24))  # new files move none
    pack(tmp_path, text)
    assert "packed before" not in caplog.text
    before = [images_of(tmp_path / "out" / name) for name in ("tr", "te")]
    (tmp_path / "raw/a").rename(tmp_path / "raw/b")
    pack(tmp_path, text.replace('"a"', '"b"'))
    after = [images_of(tmp_path / "out" / name) for name in ("tr", "te")]
    to_train, to_test = len(before[1] & after[0]), len(before[0] & after[1])
    assert to_train and to_test
    said = f"images packed before change their set (te -> tr: {to_train}, tr -> te: {to_test}); det"
    assert said in caplog.text
    caplog.clear()
    pack(tmp_path, text.replace('"a"', '"b"'))
    assert "packed before" not in caplog.text


def test_a_source_that_moves_to_another_split_is_not_in_both(tmp_path: Path) -> None:
    put(tmp_path / "raw/a/real", range(4))
    put(tmp_path / "raw/b/fake", range(10, 14))
    text = catalog(("a", "a", '"tr"', REAL), ("b", "b", '"tr"', FAKE))
    pack(tmp_path, text)
    moved = catalog(("a", "a", '"te2"', REAL), ("b", "b", '"tr"', FAKE))
    refused(tmp_path, "set tr is out of date: 4 of its images.* in set te2 too", moved, "te2")
    pack(tmp_path, moved)
    assert consistent(tmp_path)


@pytest.mark.parametrize("root", ["photos", "renamed"])
def test_a_source_that_is_renamed_with_its_set_is_not_in_two_sets(
    tmp_path: Path, root: str
) -> None:
    put(tmp_path / "raw/photos/real", range(4))
    pack(tmp_path, catalog(("old", "photos", '"trx"', REAL), sets="trx"))
    (tmp_path / "raw/photos").rename(tmp_path / "raw" / root)
    renamed = catalog(("new", root, '"tex"', REAL), sets="tex")
    said = rf"packs nothing into set trx, and 4 .* set tex too.* delete {tmp_path}/out/trx and "
    refused(tmp_path, said, renamed)


def test_another_catalog_may_pack_other_files_of_the_same_names(tmp_path: Path) -> None:
    put(tmp_path / "raw/photos/real", range(4))
    pack(tmp_path, catalog(("old", "photos", '"tr"', REAL)))
    shutil.rmtree(tmp_path / "raw/photos")
    put(tmp_path / "raw/photos/real", range(10, 14))
    pack(tmp_path, catalog(("new", "photos", '"tex"', REAL), sets="tex"))
    assert consistent(tmp_path)


def test_another_folder_does_not_replace_the_packed_images_of_a_source(tmp_path: Path) -> None:
    put(tmp_path / "raw/a/real", range(4))
    text = catalog(("mine", "a", '"tr"', REAL))
    pack(tmp_path, text)
    packed = hashes(tmp_path / "out")
    (tmp_path / "raw/a").rename(tmp_path / "a")
    put(tmp_path / "raw/b/real", range(10, 13))
    said = r"mine had 4 images, such as a/real/0\.png, and none .* its 3 images now"
    for _again in range(2):
        with pytest.raises(ShardError, match=said):
            pack(tmp_path, text.replace('"a"', '"b"'))
    pack(tmp_path, text)  # its raw files are gone, and its inventory is kept
    assert hashes(tmp_path / "out") == packed
    both = catalog(("mine", "a", '"tr"', REAL), ("other", "b", '"tr"', REAL))
    pack(tmp_path, both)
    assert len(open_shards([tmp_path / "out/tr"])) == 7
    (tmp_path / "a").rename(tmp_path / "raw/c")  # a renamed folder has the same images
    both = both.replace('"a"', '"c"')
    pack(tmp_path, both)
    assert len(open_shards([tmp_path / "out/tr"])) == 7
    shutil.rmtree(tmp_path / "raw/c")
    (tmp_path / "raw/c/real").mkdir(parents=True)
    for number in range(2):  # other files of the same names
        data = encode(photo(20 + number), "PNG")
        (tmp_path / f"raw/c/real/{number}.png").write_bytes(data)
    refused(tmp_path, r"such as c/real/0\.png, and none .* 2 images now, such as c/real/0", both)
    (tmp_path / "out/.build/inventory/mine.parquet").unlink()  # as the message says
    pack(tmp_path, both)
    assert len(open_shards([tmp_path / "out/tr"])) == 5


def test_images_beyond_a_cap_are_not_taken_for_those_of_another_folder(tmp_path: Path) -> None:
    """Which ones a cap keeps may change with each new image."""
    kept = set()
    for number in range(11, 0, -3):
        put(tmp_path / "raw/a/real", range(number, 12))
        pack(tmp_path, catalog(("a", "a", '"tr"', f"{REAL}\ncap = {{ real = 1 }}")))
        kept |= images_of(tmp_path / "out/tr")
    assert len(kept) > 1


@pytest.mark.parametrize("quality", ["the same bytes", "near-duplicates"])
def test_new_duplicates_of_a_set_that_is_not_built_are_refused(
    tmp_path: Path, quality: str
) -> None:
    put(tmp_path / "raw/a/real", range(6))
    text = catalog(("a", "a", '"tr"', REAL), ("b", "b", '"te"', REAL))
    pack(tmp_path, text)
    put(tmp_path / "raw/b/real", range(4, 8), "png" if quality == "the same bytes" else "jpg")
    refused(tmp_path, "set tr is out of date: 2 of its images", text, "te")
    pack(tmp_path, text)
    assert consistent(tmp_path)
    assert len(open_shards([tmp_path / "out/tr"])) == 4


def test_a_set_of_another_catalog_has_no_relatives_in_another_split(tmp_path: Path) -> None:
    put(tmp_path / "raw/a/real", range(6))
    put(tmp_path / "raw/b/fake", range(10, 14))
    test = ("a", "a", '"te"', REAL)
    pack(tmp_path, catalog(test, sets="te"))
    train = ("b", "b", '"tr"', FAKE)
    pack(tmp_path, catalog(train, sets="tr"))
    put(tmp_path / "raw/b/fake", range(4, 6), "jpg")  # re-encoded images of the test set
    said = "set te, and 2 of its images are near-duplicates of images of set tr, or .* but the "
    said += "splits are test and train. .* pass the --catalog"
    refused(tmp_path, said, catalog(train, sets="tr"))
    pack(tmp_path, catalog(test, train, sets="te tr"))
    assert len(open_shards([tmp_path / "out/tr"])) == 4


def test_a_group_of_a_set_of_another_catalog_is_in_no_other_split(tmp_path: Path) -> None:
    put(tmp_path / "raw/a/real", range(4))
    group = "\ngroup = '(real)'"
    pack(tmp_path, catalog(("a", "a", '"te"', REAL + group), sets="te"))
    put(tmp_path / "raw/a2/real", range(20, 23))
    other = catalog(("a", "a2", '"tr"', REAL + group), sets="tr")
    refused(tmp_path, "set te, and 4 of its images are near-duplicates .* or in a group", other)
    pack(tmp_path, other.replace('= "train"', '= "test"').replace("tr", "te3"))


def test_a_set_built_alone_loses_images_that_another_source_labels_otherwise(
    tmp_path: Path,
) -> None:
    put(tmp_path / "raw/a/real", range(4))
    put(tmp_path / "raw/b/fake", range(3, 6))
    text = catalog(("a", "a", '"te"', REAL), ("b", "b", '"tr"', FAKE))
    pack(tmp_path, text, "te")
    alone = hashes(tmp_path / "out")
    assert len(open_shards([tmp_path / "out/te"])) == 3
    pack(tmp_path, text)
    assert alone.items() <= hashes(tmp_path / "out").items()


def test_a_damaged_table_of_a_set_that_is_not_built_is_named(tmp_path: Path) -> None:
    put(tmp_path / "raw/a/real", range(4))
    put(tmp_path / "raw/b/fake", range(4, 8))
    text = catalog(("a", "a", '"te"', REAL), ("b", "b", '"tr"', FAKE))
    pack(tmp_path, text)
    (tmp_path / "out/tr/samples.parquet").write_bytes(b"PAR1")
    refused(tmp_path, r"out/tr/samples\.parquet is damaged \(.*; delete .*/out/tr and", text, "te")


RULES = {
    "classes": (REAL + "\n" + FAKE, 'real = ["fake"]\nfake = ["real"]', "real and fake"),
    "ignored": (REAL, REAL + '\nignore = [{ folder = "real", name = "1*" }]', "ignore"),
    "cap": (REAL, REAL + "\ncap = { real = 2 }", "cap"),
    "group": (REAL, REAL + "\ngroup = '(\\d)'", "group"),
    "set of a rule": (
        'set = "te"\nreal = [{ folder = "real", set = "tr" }]\nfake = ["fake"]',
        'set = "tr"\nreal = [{ folder = "real", set = "te" }]\nfake = ["fake"]',
        "real and fake",
    ),
}


@pytest.mark.parametrize("change", RULES)
def test_changed_rules_of_a_source_whose_raw_files_are_gone_are_refused(
    tmp_path: Path, change: str
) -> None:
    before, after, keys = RULES[change]
    head = '[sets]\ntr = "train"\nte = "test"\n[sources.a]\nlicense = "x"\n'
    head += "" if before.startswith("set") else 'set = "tr"\n'
    put(tmp_path / "raw/a/real", range(4))
    put(tmp_path / "raw/a/fake", range(4, 8))
    pack(tmp_path, head + before)
    shutil.rmtree(tmp_path / "raw/a")
    pack(tmp_path, head + before.replace('["real"]', '[{ folder = "real", optional = true }]'))
    refused(tmp_path, f"a was packed with another {keys} in its catalog entry.*gone", head + after)


def test_a_source_without_raw_files_and_without_recorded_rules_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "raw/a/real", range(4))
    text = catalog(("a", "a", '"tr"', REAL))
    pack(tmp_path, text)
    path = tmp_path / "out/.build/inventory/a.parquet"
    table = pq.read_table(path)
    notes = json.loads(table.schema.metadata[b"listing"])
    del notes["rules"]
    table = table.replace_schema_metadata(
        {**table.schema.metadata, b"listing": json.dumps(notes).encode()}
    )
    pq.write_table(table, path)
    shutil.rmtree(tmp_path / "raw/a")
    refused(tmp_path, r"a\.parquet is damaged \(no notes of its listing: 'rules'\)", text)


def test_changed_groups_of_packed_images_are_stored(tmp_path: Path) -> None:
    """The tars do not change, but folds, pairs and intervals follow from the groups."""
    put(tmp_path / "raw/a/real", range(20))
    text = catalog(("a", "a", '"tr"', REAL))
    pack(tmp_path, text)
    pack(tmp_path, text.replace(REAL, REAL + "\ngroup = '/([0-9])[0-9]?\\.png$'"))
    groups = open_shards([tmp_path / "out/tr"]).table.column("group").to_pylist()
    assert len(groups) == 20 and len(set(groups)) == 10
