"""Tests of `pack_folder()`: a folder with `real/` and `fake/` becomes two sets, or is refused."""

import functools
import hashlib
import os
import re
import shutil
from pathlib import Path

import pytest

from sharding.build import build
from sharding.catalog import BUILT_IN, CatalogError, read_catalog
from sharding.folder import HELD_OUT, pack_folder
from sharding.format import open_shards, read_index
from tests.builders import encode, hashes, photo

pack = functools.partial(pack_folder, jobs=1)


def write_images(folder: Path, count: int, first: int) -> None:
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        (folder / f"{number}.jpg").write_bytes(encode(photo(number, 40, 40)))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Return a folder with 26 real and 26 fake images; 20 fakes are in the subfolder `sdxl`."""
    folder = tmp_path / "raw" / "My Photos"
    write_images(folder / "REAL", 26, 0)
    write_images(folder / "1_fake" / "sdxl", 20, 100)
    for number in range(200, 206):
        (folder / "1_fake" / f"{number}.jpg").write_bytes(encode(photo(number, 40, 40)))
    return folder


def test_a_folder_becomes_two_sets_without_a_common_group(mine: Path, tmp_path: Path) -> None:
    """Unchanged shards are kept, changed files are noticed, and other sets stay the same."""
    data = tmp_path / "shards"
    packed = pack(mine, data)
    train, val = (open_shards([data / name]) for name in (packed.train, packed.validate))
    assert packed.place.parent == data / "folders"
    assert len(train) + len(val) == 52
    assert list(packed.validate_counts) == [int((val.column("label") == c).sum()) for c in (0, 1)]
    assert 2 <= len(val) <= 2 * HELD_OUT * 52
    assert read_index(data / packed.validate)["split"] == "val"
    groups = [set(shards.table.column("group").to_pylist()) for shards in (train, val)]
    assert not groups[0] & groups[1]
    assert set(train.codes("generator")[1]) == {"camera", "sdxl", "unknown"}
    assert train.generators() == ["sdxl"]
    before = hashes(data)
    assert pack(mine, data).shards_written == 0
    assert hashes(data) == before
    write_images(mine / "real", 3, 300)  # next to REAL
    (mine / "1_fake/200.jpg").unlink()
    again = pack(mine, data)
    assert again.shards_written > 0
    assert sum(again.train_counts) + sum(again.validate_counts) == 52 + 3 - 1
    # A build with the written catalog gives the same sets.
    catalog = read_catalog([packed.place / "catalog.toml"])
    _, built = build(catalog, mine.parent, packed.place, jobs=1)
    assert sum(one.shards_written for one in built) == 0


def test_a_folder_whose_images_were_all_replaced_is_packed_again(
    mine: Path, tmp_path: Path
) -> None:
    """Its sets belong to its path: no other folder has taken its name."""
    data = tmp_path / "shards"
    before = pack(mine, data)
    shutil.rmtree(mine)
    write_images(mine / "real", 26, 400)
    write_images(mine / "fake", 26, 500)
    again = pack(mine, data)
    assert again.place == before.place and again.shards_written > 0
    origins = open_shards([data / again.train]).table.column("origin").to_pylist()
    assert not any("sdxl" in origin for origin in origins)


def test_two_folders_of_the_same_name_have_separate_sets(mine: Path, tmp_path: Path) -> None:
    data = tmp_path / "shards"
    first = pack(mine, data)
    before = hashes(data)
    other = shutil.copytree(mine, tmp_path / "elsewhere/My Photos")
    second = pack(other, data)
    assert (second.name, second.place != first.place) == (first.name, True)
    assert {name: sha for name, sha in hashes(data).items() if name in before} == before


def test_relative_and_absolute_paths_of_a_folder_have_the_same_sets(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mine.parent)
    places = {pack(Path(name), tmp_path / "s").place for name in (mine.name, str(mine))}
    assert len(places) == 1


def test_a_near_duplicate_of_a_validation_image_is_not_trained_on(
    mine: Path, tmp_path: Path
) -> None:
    data = tmp_path / "shards"
    packed = pack(mine, data)
    held_out = open_shards([data / packed.validate])
    origin = held_out.table.column("origin").to_pylist()[0]
    copies = mine / ("REAL" if "/REAL/" in origin else "1_fake")
    number = int(Path(origin).stem)
    for quality in range(50, 56):  # by their names alone, some would be in the training set
        copy = encode(photo(number, 40, 40), quality=quality)
        (copies / f"copy{quality}.jpg").write_bytes(copy)
    again = pack(mine, data)
    trained = open_shards([data / again.train]).table.column("origin").to_pylist()
    assert not [name for name in trained if "copy" in name]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda mine: shutil.rmtree(mine / "1_fake"), r"no folder of fake images \(expected fake "),
        (lambda mine: shutil.rmtree(mine / "REAL"), r"no folder of real images .*found 1_fake"),
        (
            lambda mine: [path.unlink() for path in (mine / "REAL").glob("*.jpg")],
            r"REAL has no image; expected at least 20 real images",
        ),
        (
            lambda mine: [path.unlink() for path in (mine / "REAL").glob("*[05].jpg")],
            r"My Photos/REAL has 20 images|has 1\d images; expected at least 20 real",
        ),
        (
            lambda mine: [os.truncate(path, 0) for path in (mine / "1_fake/sdxl").glob("*")],
            r"images of set .* cannot be read, more than 5 %",
        ),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_a_one_line_error(
    mine: Path, tmp_path: Path, spoil: object, said: str
) -> None:
    (mine / "REAL" / "25.jpg").unlink()
    (mine / "REAL" / "24.jpg").unlink()
    spoil(mine)
    with pytest.raises((CatalogError, ValueError), match=said) as refused:
        pack(mine, tmp_path / "shards")
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "shards").rglob("index.json"))


def test_links_to_folders_are_named(mine: Path, tmp_path: Path) -> None:
    said = "REAL is a symbolic link, which is not followed: put the folder or file itself there"
    (mine / "1_fake/more").symlink_to("sdxl")
    (line,) = pack(mine, tmp_path / "shards").left_out
    assert "1 file: a symbolic link, which is not followed (first: 1_fake/more)" in line
    (mine / "1_fake/more").unlink()
    (mine / "REAL").rename(tmp_path / "elsewhere")
    (mine / "REAL").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CatalogError, match=rf"REAL has no image; .* zip archives; {said}$"):
        pack(mine, tmp_path / "shards")
    (tmp_path / "c.toml").write_text(
        '[sets]\nm = "train"\n[sources.mine]\nlicense = "x"\nset = "m"\n'
        'root = "My Photos"\nreal = ["REAL"]\nfake = ["1_fake/**"]\n'
    )
    with pytest.raises(CatalogError, match=rf"matches real: REAL; {said}\. Correct the rule"):
        build(read_catalog([tmp_path / "c.toml"]), mine.parent, tmp_path / "out", jobs=1)


def test_what_is_left_out_is_named_as_a_build_names_it(mine: Path, tmp_path: Path) -> None:
    cut = (mine / "REAL/0.jpg").read_bytes()[:900]
    (mine / "REAL/0.jpg").write_bytes(cut)
    for name in ("REAL/copy.jpg", "1_fake/both.jpg"):
        shutil.copy(mine / "REAL/1.jpg", mine / name)
    shutil.copy(mine / "1_fake/200.jpg", mine / "1_fake/copy.jpg")
    for name in ("1_fake/midjourney.tar", "1_fake/flux/a", "1_fake/flux/b"):
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).write_bytes(b"x")
    packed = pack(mine, tmp_path / "shards")
    lines = "\n".join(packed.left_out)
    assert "quarantined: My Photos/REAL/0.jpg: " in lines
    both = "3 images: the same bytes are labeled real and fake (first: My Photos/"
    (line,) = [line for line in packed.left_out if both in line]
    assert "REAL/" in line and " and My Photos/" in line and "1_fake/both.jpg" in line
    assert re.search(r"; all: \S+/my_photos(-val)?/excluded\.csv\)$", line)
    assert re.search(r"1 image: the same bytes as an image of my_photos\S* \(first: .* and ", lines)
    assert "excluded: my_photos: 1 file: not an image by its name (.tar) (first: 1_fake/m" in lines
    assert "2 files: not an image by its name (no extension) (first: 1_fake/flux/a)" in lines
    assert len(packed.left_out) == 5


def origins(data: Path, name: str) -> set[str]:
    return {*open_shards([data / name]).table.column("origin").to_pylist()}


def test_published_splits_are_kept(tmp_path: Path) -> None:
    """Its test images were divided among the training and the validation set."""
    mine, data = tmp_path / "mine", tmp_path / "shards"
    write_images(mine / "train/REAL", 22, 0)
    write_images(mine / "train/FAKE/sdxl", 22, 100)
    write_images(mine / "test/REAL", 3, 200)
    write_images(mine / "test/FAKE/flux", 3, 300)
    write_images(mine / "train/FAKE/sdxl/valid", 3, 400)
    write_images(mine / "train/REAL/Validation", 2, 500)
    packed = pack(mine, data)
    assert list(packed.test_counts) == [3, 3]
    assert all(name.startswith("mine/test/") for name in origins(data, packed.test))
    assert len(origins(data, packed.validate)) == 5
    assert all("/valid" in name.lower() for name in origins(data, packed.validate))
    assert sum(packed.train_counts) == 44
    assert {*read_index(data / packed.test)["totals"]["generator"]} == {"camera", "flux"}
    assert {*read_index(data / packed.validate)["totals"]["generator"]} == {"camera", "sdxl"}
    assert read_index(data / packed.test)["split"] == "test"
    shutil.rmtree(mine / "train/REAL/Validation")
    with pytest.raises(
        CatalogError, match=r"validation set .* has 3 images and no real image; add"
    ):
        pack(mine, data)


def test_the_splits_of_a_table_are_kept(mine: Path, tmp_path: Path) -> None:
    images = sorted(path.relative_to(mine) for path in mine.rglob("*.jpg"))
    rows = [f"{name},{'test' if at % 7 == 0 else 'train'},p\n" for at, name in enumerate(images)]
    (mine / "meta.csv").write_text("file,Split,prompt\n" + "".join(rows[1:]))
    packed = pack(mine, tmp_path / "shards")
    expected = {f"My Photos/{name}" for name in images[7::7]}
    assert origins(tmp_path / "shards", packed.test) == expected
    assert sum(packed.train_counts) + sum(packed.validate_counts) == 51 - len(expected)
    assert packed.left_out[:2] == [
        "table meta.csv: 'Split' decides",
        "table meta.csv: not used: 'prompt'",
    ]
    assert any("1 file: no row in meta.csv" in line for line in packed.left_out)


def test_a_table_takes_images_out_of_the_folder_train(tmp_path: Path) -> None:
    mine, data = tmp_path / "mine", tmp_path / "shards"
    write_images(mine / "train/real", 22, 0)
    write_images(mine / "train/fake/sdxl", 22, 100)
    write_images(mine / "test/real", 2, 200)
    write_images(mine / "test/fake", 2, 300)
    held = {"train/real/3.jpg", "train/fake/sdxl/107.jpg"}
    (mine / "m.csv").write_text("file,split\n" + "".join(f"{name},val\n" for name in held))
    packed = pack(mine, data)
    assert origins(data, packed.validate) == {f"mine/{name}" for name in held}
    assert list(packed.train_counts) == [21, 21] and list(packed.test_counts) == [2, 2]
    assert packed.left_out[0] == "table m.csv: 'split' decides"


def test_a_folder_with_a_long_name(mine: Path, tmp_path: Path) -> None:
    packed = pack(mine.rename(mine.with_name("x" * 200)), tmp_path / "shards")
    assert packed.name == "x" * 73
    assert len(open_shards([tmp_path / "shards" / packed.train])) > 0


def test_images_that_are_kept_for_testing_are_not_packed(mine: Path, tmp_path: Path) -> None:
    """The shipped list has real hashes; one more is added in a copy of the catalog."""
    assert len(read_catalog([BUILT_IN]).exclude) > 2000
    file = mine / "REAL/0.jpg"
    kept = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    (tmp_path / "kept.txt").write_text(kept + "\n")
    copy = tmp_path / "catalog.toml"
    copy.write_text(BUILT_IN.read_text().replace('"kept-for-testing.txt"', '"kept.txt"'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sharding.folder.BUILT_IN", copy)
        packed = pack(mine, tmp_path / "shards")
    names = [
        name
        for part in (packed.train, packed.validate)
        for name in open_shards([tmp_path / "shards" / part]).table.column("origin").to_pylist()
    ]
    assert len(names) == 51
    assert not [name for name in names if name.endswith("REAL/0.jpg")]


def test_copies_of_one_image_are_too_few(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    write_images(mine / "real", 25, 0)
    (mine / "fake").mkdir()
    for number in range(25):
        (mine / "fake" / f"{number}.jpg").write_bytes(encode(photo(500, 40, 40)))
    with pytest.raises(
        CatalogError,
        match=r"fake images in .*: 24 images excluded, such as mine/fake/1\.jpg \(the ",
    ):
        pack(mine, tmp_path / "shards")


@pytest.mark.parametrize(
    "text", ["path;id\n0.jpg;1\n", "path\n0.jpg\n"], ids=["semicolons", "shared"]
)
def test_a_published_test_table_that_cannot_be_used_is_refused(tmp_path: Path, text: str) -> None:
    """Its images would be trained on."""
    for label in ("real", "fake"):
        write_images(tmp_path / "raw" / label, 3, 0)
    (tmp_path / "raw/test.csv").write_text(text)
    with pytest.raises(CatalogError, match=r"test.csv in .* may name the images of a published"):
        pack(tmp_path / "raw", tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_tables_of_one_name_have_the_column_that_divides(tmp_path: Path) -> None:
    for label, column, cells in (
        ("real", "split", ["test", *["train"] * 20]), ("fake", "model", ["sdxl"] * 21)
    ):  # fmt: skip
        folder = tmp_path / "raw" / label
        write_images(folder, 21, {"real": 0, "fake": 50}[label])
        names = sorted(path.name for path in folder.iterdir())
        rows = [f"{name},{cell}" for name, cell in zip(names, cells, strict=True)]
        (folder / "meta.csv").write_text("\n".join([f"path,{column}", *rows]))
    with pytest.raises(CatalogError, match=r"some tables meta.csv in .* lack the column 'split'"):
        pack(tmp_path / "raw", tmp_path / "shards")
