"""Tests of CSV tables with a row per image: which row belongs to a file, and files without one."""

import re
import tracemalloc
from pathlib import Path

import pytest
from click.testing import CliRunner

from sharding.__main__ import main
from sharding.catalog import CatalogError, Table, read_catalog
from sharding.format import open_shards
from sharding.listing import Listing, list_source
from sharding.scan import find_sources
from sharding.tables import LabelRows
from tests.builders import ROOT, encode, photo

RULES = 'real = [{ where = { label = "0" } }]\nfake = [{ where = { label = "1" } }]\n'


def write(tmp_path: Path, csv: str, *images: str, name: str = "labels.csv") -> None:
    """Write a CSV file, and empty files as images: listing reads only their names."""
    for image in images:
        path = tmp_path / "raw/s" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "raw/s" / name).write_text(csv)


def listing_of(tmp_path: Path, rules: str = RULES, more: str = "") -> Listing:
    (tmp_path / "catalog.toml").write_text(
        f'[sets]\nm = "train"\n[sources.s]\nlicense = "x"\nset = "m"\n{rules}'
        f'table = {{ name = "labels.csv", key = "id"{more} }}\n'
    )
    source = read_catalog([tmp_path / "catalog.toml"]).sources["s"]
    return list_source("s", source, tmp_path / "raw")


def labels(listing: Listing) -> dict[str, int]:
    return {item.origin.removeprefix("s/"): item.label for item in listing.items}


def reasons(listing: Listing) -> dict[str, list[str]]:
    return {reason: entry["first"] for reason, entry in listing.excluded.items()}


def test_a_rule_with_a_condition_takes_no_file_without_a_row(tmp_path: Path) -> None:
    write(tmp_path, "id,label\na.png,0\nb.png,1\n", "x/a.png", "x/b.png", "x/c.png")
    listing = listing_of(tmp_path)
    assert labels(listing) == {"x/a.png": 0, "x/b.png": 1}
    reason = "no row in labels.csv for its name (key column 'id', such as 'a.png')"
    assert reasons(listing) == {reason: ["x/c.png"]}
    rules = RULES.replace("fake = [", 'fake = [{ folder = "x", generator = "rest" }, ')
    assert labels(listing_of(tmp_path, rules))["x/c.png"] == 1
    write(tmp_path, "id,label\na,0\nb,1\n")  # names without a suffix
    with pytest.raises(CatalogError, match=r"3 files: no row in labels\.csv .*such as 'a'"):
        listing_of(tmp_path)


def test_a_table_that_is_missing_stops_the_build(tmp_path: Path) -> None:
    write(tmp_path, "id,label\na.png,0\n", "a.png", name="label.csv")
    said = r"s has no labels\.csv below .*raw/s, which has label\.csv; correct `table`, or"
    with pytest.raises(CatalogError, match=said):
        listing_of(tmp_path)
    rules = 'real = [{ folder = ".", where = { label = "0" } }]\n'
    listing = listing_of(tmp_path, rules, ", optional = true")
    assert labels(listing) == {"a.png": 0}
    assert listing.read_as["no table labels.csv: labels by folder"] == 0


def test_a_condition_that_no_row_meets_is_a_rule_without_a_file(tmp_path: Path) -> None:
    write(tmp_path, "id,label\na.png,0\nb.png,0\n", "a.png", "b.png")
    listing = listing_of(tmp_path)
    assert listing.unmatched == ["fake: ** label=1"]
    catalog = read_catalog([tmp_path / "catalog.toml"])
    with pytest.raises(CatalogError, match=r"matches fake: \*\* label=1\. Correct the rule"):
        find_sources(catalog, tmp_path / "raw", tmp_path / "out")


def test_a_rule_that_a_deeper_one_always_beats_is_used(tmp_path: Path) -> None:
    write(tmp_path, "id,label\na.png,1\nb.png,0\n", "sd/a.png", "cam/b.png")
    deeper = '{ folder = "sd", where = { label = "1" }, generator = "sd" }'
    listing = listing_of(tmp_path, RULES.replace("fake = [", f"fake = [{deeper}, "))
    assert labels(listing) == {"sd/a.png": 1, "cam/b.png": 0}
    assert listing.unmatched == []


def test_a_key_with_a_folder_names_a_file_of_that_folder(tmp_path: Path) -> None:
    csv = "id,label\na/0.png,0\nb\\0.png,1\n./a/1.png,1\ns/top/2.png,0\na/b/3.png,0\n"
    images = ("a/0.png", "b/0.png", "x/a/1.png", "b/1.png", "top/2.png", "b/3.png", "ca/0.png")
    write(tmp_path, csv, *images)
    listing = listing_of(tmp_path)
    assert labels(listing) == {"a/0.png": 0, "b/0.png": 1, "top/2.png": 0, "x/a/1.png": 1}
    (reason,) = reasons(listing)
    assert reason.startswith("no row in labels.csv")
    assert reasons(listing)[reason] == ["b/1.png", "b/3.png", "ca/0.png"]


def test_the_longest_key_decides(tmp_path: Path) -> None:
    write(tmp_path, "id,label\n0.png,0\nb/0.png,1\n", "b/0.png", "c/0.png")
    assert labels(listing_of(tmp_path)) == {"b/0.png": 1, "c/0.png": 0}


def test_a_key_without_a_folder_names_no_two_files(tmp_path: Path) -> None:
    csv = "id,label\n0.png,0\n1.png,1\n2.png,0\n"
    write(tmp_path, csv, "a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.JPG", "thumbs/2.png")
    rules = 'real = [{ folder = "a", where = { label = "0" } }, { folder = "b", where = { label = '
    rules += '"0" } }]\nfake = [{ where = { label = "1" } }]\nignore = ["thumbs"]\n'
    listing = listing_of(tmp_path, rules)
    assert labels(listing) == {"a/1.png": 1, "a/2.png": 0}
    several = "several files have its name, and its row in the table has no folder"
    assert reasons(listing)[several] == ["a/0.png", "b/0.png"]
    assert labels(listing_of(tmp_path, rules, ", optional = true")) == {
        "a/0.png": 0, "b/0.png": 0, "a/1.png": 1, "a/2.png": 0, "b/1.JPG": 0,
    }  # fmt: skip


def test_a_row_is_for_the_file_in_the_folder_of_its_table(tmp_path: Path) -> None:
    """Most images of such a layout had no row: several files have their name."""
    for number, folder in enumerate(("train", "test")):
        images = ("0.png", "images/1.png", f"only{number}.png")
        write(tmp_path, "", *(f"{folder}/{image}" for image in images))
        (tmp_path / "raw/s" / folder / "labels.csv").write_text(
            f"id,label\n0.png,{number}\nimages/1.png,{number}\nonly{1 - number}.png,1\n"
        )
    (tmp_path / "raw/s/labels.csv").unlink()
    listing = listing_of(tmp_path)
    of_folder = {
        f"{folder}/{name}": number
        for number, folder in enumerate(("train", "test"))
        for name in ("0.png", "images/1.png")
    }
    assert labels(listing) == of_folder | {"train/only0.png": 1, "test/only1.png": 1}
    write(tmp_path, "id,label\n2.png,0\na/3.png,1\n", "2.png", "a/2.png", "a/3.png", "b/a/3.png")
    listing = listing_of(tmp_path)
    assert labels(listing).items() >= {"2.png": 0, "a/3.png": 1}.items()
    assert [path for paths in reasons(listing).values() for path in paths] == [
        "a/2.png", "b/a/3.png",
    ]  # fmt: skip


def test_a_row_with_too_many_cells_is_refused(tmp_path: Path) -> None:
    """The label of the image was a part of its caption."""
    write(tmp_path, "id,text,label\n0.png,a castle, 0,1\n", "0.png")
    with pytest.raises(CatalogError, match=r"labels\.csv, line 2 has 4 cells, the heading 3"):
        listing_of(tmp_path)


def test_rows_that_contradict_each_other_have_a_reason_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, "id,label\n0.png,0\n0.png,1\n1.png,1\n", "a/0.png", "a/1.png")
    listing = listing_of(tmp_path, RULES, ", optional = true")
    assert labels(listing) == {"a/1.png": 1}
    assert reasons(listing) == {"its rows in the table contradict each other": ["a/0.png"]}


@pytest.mark.parametrize(
    "above", ["/home/me/s", "C:\\\\data\\\\s", "dataset", "..", "/x/dataset/old"]
)
def test_a_path_of_another_machine_is_that_of_the_file_it_ends_with(
    tmp_path: Path, above: str
) -> None:
    csv = f"id,label\n{above}/a/0.png,0\n{above}/b/0.png,1\n{above}/2.png,1\n"
    write(
        tmp_path, csv.replace("/", "\\" if ":" in above else "/"), "a/0.png", "b/0.png", "x/2.png"
    )
    listing = listing_of(tmp_path)
    assert labels(listing) == {"a/0.png": 0, "b/0.png": 1}
    assert listing.read_as["rows whose path ends with that of a file"] == 2
    write(tmp_path, f"{csv}/other/b/0.png,0\n")
    listing = listing_of(tmp_path)
    assert labels(listing) == {"a/0.png": 0}
    assert reasons(listing)["its rows in the table contradict each other"] == ["b/0.png"]


def test_a_path_of_many_parts_takes_no_memory() -> None:
    """All ends of a cell of 120 kB took half a minute and 3.6 GB."""
    rows = LabelRows(Table(name="t.csv", key="id"), {"s/a/0.png"})
    rows.add("x/" * 5_000 + "a/0.png", {"label": "0"}, "s")
    rows.add("x/" * 5_000 + "b/0.png", {"label": "1"}, "s")
    tracemalloc.start()
    rows.fit("s")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 2**20
    assert [*rows.fitted.values()] == ["s/a/0.png"]


def test_rows_that_differ_elsewhere_agree(tmp_path: Path) -> None:
    """Such as two captions of one image: it was left out."""
    write(tmp_path, "id,text,label\n0.png,a,0\n0.png,b,0\n1.png,c,1\n", "0.png", "1.png")
    assert labels(listing_of(tmp_path)) == {"0.png": 0, "1.png": 1}


def test_the_example_of_the_page_about_own_images_builds(tmp_path: Path) -> None:
    page = (ROOT / "docs/own-data.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^```csv\n(.*?)^```", page, re.S | re.M)
    (catalog,) = re.findall(r"^```toml\n(.*?)^```", page, re.S | re.M)
    header, *rows = table.splitlines()
    kinds = dict(row.split(",") for row in rows)
    raw = tmp_path / "raw/mixed"
    raw.mkdir(parents=True)
    named = {f"{n}{name}": kind for n in range(9) for name, kind in kinds.items()}
    for seed, name in enumerate([*named, "without-a-row.png"]):
        (raw / name).write_bytes(encode(photo(seed, 48, 40), "PNG"))
    lines = [header, *(f"{name},{kind}" for name, kind in named.items())]
    (raw / "labels.csv").write_text("\n".join(lines))
    (tmp_path / "mixed.toml").write_text(catalog)
    where = ["--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "shards")]
    result = CliRunner().invoke(
        main, ["build", *where, "--jobs", "1", "--catalog", str(tmp_path / "mixed.toml")]
    )
    assert result.exit_code == 0, result.output
    assert "no row in labels.csv" in result.output
    packed = {}
    for index in (tmp_path / "shards").glob("*/index.json"):
        for row in open_shards([index.parent]).table.to_pylist():
            packed[row["origin"].removeprefix("mixed/")] = (row["label"], row["generator"])
    expected = {"photo": (0, "real"), "sdxl": (1, "sdxl"), "flux": (1, "flux")}
    assert packed == {name: expected[kind] for name, kind in named.items()}
