"""Tests of CSV tables with a row per image: which row belongs to a file, and files without one."""

from pathlib import Path

import pytest

from sharding.catalog import CatalogError, read_catalog
from sharding.listing import Listing, list_source
from sharding.scan import find_sources

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
