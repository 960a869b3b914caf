"""Tests of groups and of the largest numbers of images: `cap` in a catalog."""

import hashlib
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from sharding.__main__ import main
from sharding.catalog import CatalogError, read_catalog
from sharding.format import open_shards
from sharding.listing import Listing, list_source
from sharding.scan import find_sources
from tests.builders import encode, photo
from tests.raw_copies import image, parquet, put

CATALOG = """
[sets]
train = "train"
val = "val"

[sources.mine]
license = "x"
set = {{ train = 0.5, val = 0.5 }}
real = ["real"]
fake = ["fake"]
{cap}
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for label, name in enumerate(("real", "fake")):
        (folder / "mine" / name).mkdir(parents=True)
        for number in range(60):
            image = photo(100 * label + number, 48, 40)
            (folder / "mine" / name / f"{number}.png").write_bytes(encode(image, "PNG"))
    return folder


def build(
    raw: Path, folder: Path, cap: str, *arguments: str, before: str = ""
) -> dict[str, Counter]:
    """Build the source, and return the number of real (0) and fake (1) images of each set."""
    (folder / "catalog.toml").write_text(before + CATALOG.format(cap=cap))
    result = CliRunner().invoke(
        main,
        ["build", "--raw", str(raw), "--catalog", str(folder / "catalog.toml"),
         "--out", str(folder / "out"), "--jobs", "1", *arguments],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return {
        name: Counter(open_shards([folder / "out" / name]).column("label").tolist())
        for name in ("train", "val")
    }


def test_a_cap_takes_images_of_every_set(raw: Path, tmp_path: Path) -> None:
    """The images that are kept must not be those whose hash puts them into the first set."""
    counts = build(raw, tmp_path, "cap = { real = 20 }")
    assert counts["train"][0] + counts["val"][0] == 20
    assert min(counts["train"][0], counts["val"][0]) >= 4
    assert counts["train"][1] + counts["val"][1] == 60


def test_a_cap_below_the_size_of_the_groups_takes_parts_of_them(raw: Path, tmp_path: Path) -> None:
    """Frames of one video are a group, and a source must not vanish."""
    videos = "cap = { real = 5, fake = 5 }\ngroup = '/(\\d)\\d?\\.png$'"
    counts = build(raw, tmp_path, videos, "--allow-incomplete")
    assert sum(counts["train"].values()) + sum(counts["val"].values()) == 10


def listing_of(tmp_path: Path, text: str) -> Listing:
    (tmp_path / "catalog.toml").write_text(
        f'[sets]\nm = "train"\n[sources.mine]\nlicense = "x"\nset = "m"\n{text}'
    )
    source = read_catalog([tmp_path / "catalog.toml"]).sources["mine"]
    return list_source("mine", source, tmp_path / "raw")


def test_a_group_column_that_counts_from_0(tmp_path: Path) -> None:
    cells = {"image": [image() for _ in range(6)], "video": [0, 0, 0, 1, None, None]}
    parquet(tmp_path / "raw/mine/a.parquet", cells)
    listing = listing_of(tmp_path, 'real = [{ column = "image" }]\ngroup_column = "video"\n')
    groups = [item.group for item in listing.items]
    assert len(groups) == 6 and groups[0] == groups[1] == groups[2]
    assert len(set(groups[2:])) == 4  # None is no group


def test_a_group_pattern_that_matches_no_image_stops_the_build(tmp_path: Path) -> None:
    put(tmp_path / "raw/mine/f", "a_1.png", "a_2.png", "b_1.jpg")
    pattern = r"""group = '([^/]+)_[0-9]+\.jpeg$'"""
    listing = listing_of(tmp_path, f'fake = ["f"]\n{pattern}\n')
    assert listing.unmatched == [r"group '([^/]+)_[0-9]+\.jpeg$' (paths are like mine/f/a_1.png)"]
    catalog = read_catalog([tmp_path / "catalog.toml"])
    with pytest.raises(CatalogError, match=r"no file in .*/raw/mine matches group '.*--allow-inc"):
        find_sources(catalog, tmp_path / "raw", tmp_path / "out")


def test_one_of_several_group_patterns_must_match_an_image(tmp_path: Path) -> None:
    put(tmp_path / "raw/mine/f", "a_1.png", "a_2.png", "b_1.jpg", "c.png")
    patterns = r"""group = ['nothing/(.*)', '([^/]+)_[0-9]+\.png$']"""
    listing = listing_of(tmp_path, f'fake = ["f"]\n{patterns}\n')
    assert listing.unmatched == []
    assert [item.group for item in listing.items] == ["mine/a", "mine/a", "mine/f/b_1", "mine/f/c"]
    assert listing.ungrouped == "2 of 4 images match no `group` pattern (first: mine/f/b_1.jpg)"
    listing = listing_of(tmp_path, """fake = ["f"]\ngroup = 'f/(.)'\n""")
    assert (listing.ungrouped, listing.unmatched) == ("", [])


def test_a_build_prints_the_number_of_images_without_a_group(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "catalog.toml").write_text(CATALOG.format(cap="group = 'real/([0-9])'"))
    arguments = ["--raw", raw, "--catalog", tmp_path / "catalog.toml", "--out", tmp_path / "out"]
    result = CliRunner().invoke(main, ["build", *map(str, arguments), "--jobs", "1"])
    assert result.exit_code == 0, result.output
    said = "mine: 60 of 120 images match no `group` pattern (first: mine/fake/0.png)"
    assert said in result.output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            """real = [{ column = "image" }]\ngroup = '(a)'""",
            "its rules read parquet tables",
        ),
        ('real = ["real"]\ngroup_column = "prompt"', "no rule reads a parquet table"),
    ],
)
def test_a_group_key_that_no_rule_can_use_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(CatalogError, match=said):
        listing_of(tmp_path, text)


def test_a_table_without_a_column_of_a_rule_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "raw/mine/f", "a.png", kind="PNG")
    (tmp_path / "raw/mine/labels.csv").write_text("file,label\na.png,1\n")
    table = 'table = { name = "labels.csv", key = "file" }\n'
    assert len(listing_of(tmp_path, f"fake = [{{ where = {{ label = 1 }} }}]\n{table}").items) == 1
    with pytest.raises(CatalogError, match=r"has columns .*, expected 'lable' among them"):
        listing_of(tmp_path, f"fake = [{{ where = {{ lable = 1 }} }}]\n{table}")


def test_an_excluded_file_is_also_found_if_it_is_packed_as_png(tmp_path: Path) -> None:
    raw = tmp_path / "raw/mine"
    for label, name in enumerate(("real", "fake")):
        (raw / name).mkdir(parents=True)
        for number in range(8):
            image = photo(100 * label + number, 48, 40)
            (raw / name / f"{number}.gif").write_bytes(encode(image, "GIF"))
    digest = hashlib.sha256((raw / "real/3.gif").read_bytes()).hexdigest()
    (tmp_path / "kept.txt").write_text(f"{digest[:16]}\n")
    counts = build(raw.parent, tmp_path, "", before='exclude = ["kept.txt"]')
    assert counts["train"][0] + counts["val"][0] == 7


def test_two_sources_do_not_download_to_one_folder(tmp_path: Path) -> None:
    text = '[sets]\nm = "train"\n'
    for name in ("a", "b"):
        text += f'[sources.{name}]\nlicense = "x"\nset = "m"\nreal = ["**"]\nroot = "both"\n'
        text += f'fetch = {{ urls = ["https://example.com/{name}.zip"] }}\n'
    (tmp_path / "catalog.toml").write_text(text)
    with pytest.raises(CatalogError, match="sources a and b have the root 'both' and different"):
        read_catalog([tmp_path / "catalog.toml"])
