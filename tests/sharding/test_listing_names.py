"""Tests of unusual file names (Unicode forms, no UTF-8, no extension) and of damaged tables."""

import os
import shutil
import zipfile
from pathlib import Path
from unicodedata import normalize

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from sharding.__main__ import main
from sharding.catalog import BUILT_IN, CatalogError, read_catalog
from sharding.describe import describe
from sharding.format import open_shards
from sharding.scan import find_sources
from sharding.verify import verify
from tests.builders import encode, photo

SEEDS = iter(range(10_000))
"""Seeds of the photos, so that no two photos of a test are equal."""


def small_source(tmp_path: Path, folder: bytes, catalog_folder: str) -> Path:
    """Write five photos to `folder` (its name as bytes), five fakes, and a catalog of both."""
    top = os.fsencode(tmp_path / "raw") + b"/mine/"
    for name in (folder, b"fake"):
        os.makedirs(top + name)  # noqa: PTH103  bytes
        for number in range(5):
            with open(top + name + b"/%d.png" % number, "wb") as stream:  # noqa: PTH123
                stream.write(encode(photo(next(SEEDS), 48, 40), "PNG"))
    (tmp_path / "catalog.toml").write_text(
        f'[sets]\nm = "train"\n[sources.mine]\nlicense = "x"\nset = "m"\n'
        f'real = ["{catalog_folder}"]\nfake = ["fake"]\n'
    )
    return tmp_path


def build_command(tmp_path: Path, *arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(
        main,
        ["build", "--raw", str(tmp_path / "raw"), "--catalog", str(tmp_path / "catalog.toml"),
         "--out", str(tmp_path / "out"), "--jobs", "1", *map(str, arguments)],
    )  # fmt: skip
    return result.exit_code, result.output


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_composed_and_decomposed_names_are_equal(tmp_path: Path, form: str) -> None:
    for other in ("NFC", "NFD"):
        folder = small_source(tmp_path / other, normalize(form, "fotos é").encode(), "fotos é")
        text = (folder / "catalog.toml").read_text()
        text = text.replace("fotos é", normalize(other, "fotos é"))
        (folder / "raw/mine").rename(folder / "raw" / normalize(form, "mîne"))
        root = normalize(other, "mîne")
        text = text.replace('license = "x"', f'license = "x"\nroot = "{root}"')
        (folder / "catalog.toml").write_text(text)
        status, output = build_command(folder)
        assert status == 0, output
        table = open_shards([folder / "out/m"]).table
        assert table.column("label").to_pylist().count(0) == 5
        assert all(name == normalize("NFC", name) for name in table.column("origin").to_pylist())


def test_a_name_that_is_not_utf_8_is_quarantined_and_the_rest_packed(tmp_path: Path) -> None:
    small_source(tmp_path, b"real", "real")
    name = os.fsencode(tmp_path / "raw/mine/real/") + b"/caf\xe9.png"
    shutil.copy(os.fsencode(tmp_path / "raw/mine/real/0.png"), name)
    status, output = build_command(tmp_path, "--max-bad", 0.2)
    assert status == 0, output
    assert "quarantined: mine/real/caf\\xe9.png: a name that is not UTF-8; rename it" in output
    assert len(open_shards([tmp_path / "out/m"])) == 10
    assert verify([tmp_path / "out/m"], jobs=1) == []


def test_describe_counts_names_that_are_not_utf_8(tmp_path: Path) -> None:
    small_source(tmp_path, b"photos \xe9", "photos")
    catalog = tmp_path / "my.toml"
    result = CliRunner().invoke(
        main, ["describe", str(tmp_path / "raw/mine"), "--out", str(catalog)]
    )
    assert result.exit_code == 0, result.output
    assert "excluded: 5 files: a name that is not UTF-8; rename it" in result.output
    assert list(read_catalog([BUILT_IN, catalog]).sources["mine"].fake)


def test_describe_writes_odd_names_so_that_the_catalog_can_be_read(tmp_path: Path) -> None:
    folder = tmp_path / ("odd \U0001f600 \x7f" + "long" * 30)
    for part in ("photos \U0001f4f7", "generated \x7f"):
        (folder / part).mkdir(parents=True)
        Image.new("RGB", (300, 300)).save(folder / part / "0.png")
    (tmp_path / "my.toml").write_text(describe(folder).text, encoding="utf-8")
    (source,) = read_catalog([tmp_path / "my.toml"]).sources.values()
    assert source.root == folder.name
    assert [rule.folder for rule in source.real] == ["photos \U0001f4f7"]
    assert [rule.folder for rule in source.fake] == ["generated \x7f"]
    folder.rename(tmp_path / "two\nlines")
    with pytest.raises(CatalogError, match=r"'two\\nlines' cannot be the root of a source; rename"):
        describe(tmp_path / "two\nlines")


def test_files_without_an_extension_are_counted_in_one_line(tmp_path: Path) -> None:
    small_source(tmp_path, b"real", "real")
    for number in range(30):
        (tmp_path / f"raw/mine/real/file{number}").write_bytes(b"x")
    status, output = build_command(tmp_path)
    assert status == 0
    (line,) = [line for line in output.splitlines() if line.startswith("excluded: mine")]
    assert "30 files: not an image by its name (no extension) (first: real/file0)" in line


def test_too_many_jobs_are_a_one_line_error(tmp_path: Path) -> None:
    small_source(tmp_path, b"real", "real")
    status, output = build_command(tmp_path, "--jobs", 100_000)
    assert status == 1
    assert "Error: --jobs 100,000: this machine has" in output


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("x.parquet", b"", "damaged or not a table ("),
     ("x.parquet", b"PAR1" + bytes(99) + b"PAR1", "damaged or not a table ("),
     ("x_labels.csv", b"filename,label\ncaf\xe9.png,1\n",
      "in another encoding (byte 18 is 0xe9, which is not UTF-8), expected a CSV table in UTF-8")],
)  # fmt: skip
def test_a_damaged_table_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    small_source(tmp_path, b"real", "real")
    with (tmp_path / "catalog.toml").open("a") as stream:
        stream.write('table = { name = "*.csv", key = "filename" }\n')
    text = (tmp_path / "catalog.toml").read_text()
    text = text.replace('real = ["real"]', 'real = ["real", { column = "image", optional = true }]')
    (tmp_path / "catalog.toml").write_text(text)
    (tmp_path / "raw/mine" / name).write_bytes(content)
    status, output = build_command(tmp_path)
    assert status == 1
    assert f"Error: {tmp_path}/raw/mine/{name} is {said}" in output


def with_tables(tmp_path: Path) -> Path:
    """Write a catalog of files anywhere and of tables, and return the source's folder."""
    (tmp_path / "catalog.toml").write_text(
        '[sets]\nm = "test"\n[sources.mine]\nlicense = "x"\nset = "m"\n'
        'real = [{ name = "*" }, { column = "image", optional = true }]\n'
        'table = { name = "*.csv", key = "filename", optional = true }\n'
    )
    folder = tmp_path / "raw/mine"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(encode(photo(next(SEEDS)), "PNG"))
    pq.write_table(pa.table({"image": [encode(photo(next(SEEDS)))]}), tmp_path / "x.parquet")
    return folder


def test_a_table_that_is_a_link_or_a_pipe_is_not_read(tmp_path: Path) -> None:
    folder = with_tables(tmp_path)
    (folder / "x.parquet").symlink_to("../../x.parquet")
    os.mkfifo(folder / "y.parquet")
    status, output = build_command(tmp_path)
    assert status == 0, output
    assert "mine: 1 file: a symbolic link, which is not followed (first: x.parquet)" in output
    assert "mine: 1 file: neither a file nor a folder (first: y.parquet)" in output
    assert len(open_shards([tmp_path / "out/m"])) == 1
    (tmp_path / "x.csv").write_text("filename\na.png\n")
    (folder / "x.csv").symlink_to("../../x.csv")
    status, output = build_command(tmp_path)
    assert status == 1
    assert f"{folder}/x.csv is a symbolic link, which is not followed, expected a tab" in output


def test_a_table_in_an_archive_is_left_out_and_named(tmp_path: Path) -> None:
    folder = with_tables(tmp_path)
    with zipfile.ZipFile(folder / "t.zip", "w") as archive:
        archive.write(tmp_path / "x.parquet", "x.parquet")
        archive.writestr("x.csv", "filename\na.png\n")
    status, output = build_command(tmp_path)
    assert status == 0, output
    said = "mine: 2 files: a table in an archive, which is not read; unpack it (first: t.zip/x.csv)"
    assert said in output


def test_a_table_that_ends_within_a_line_is_named(tmp_path: Path) -> None:
    small_source(tmp_path, b"real", "real")
    with (tmp_path / "catalog.toml").open("a") as stream:
        stream.write('table = { name = "*.csv", key = "filename" }\n')
    (tmp_path / "raw/mine/x.csv").write_text("label,filename\n1,a.png\n1")
    status, output = build_command(tmp_path)
    assert status == 1
    said = "line 3 has no name of an image in the column 'filename'"
    assert f"Error: {tmp_path}/raw/mine/x.csv, {said}" in output


def test_files_with_numbers_as_extensions_are_counted_in_one_line(tmp_path: Path) -> None:
    """Files that are named by numbers are counted in one line, not in a line per file."""
    (tmp_path / "raw/mine/real").mkdir(parents=True)
    (tmp_path / "raw/mine/real/a.jpg").write_bytes(encode(photo(1)))
    for number in range(300):
        (tmp_path / f"raw/mine/real/{number:03d}").write_bytes(b"x")
        (tmp_path / f"raw/mine/real/part.{number:03d}").write_bytes(b"x")
    (tmp_path / "raw/mine/real/notes.txt").write_text("x")
    (tmp_path / "mine.toml").write_text(
        '[sets]\nmine = "train"\n[sources.mine]\nlicense = "x"\nset = "mine"\nreal = ["real"]\n'
    )
    catalog = read_catalog([tmp_path / "mine.toml"])
    listing = find_sources(catalog, tmp_path / "raw", tmp_path / "out").listings["mine"]
    assert {reason: entry["files"] for reason, entry in listing.excluded.items()} == {
        "not an image by its name (no extension)": 600,
        "not an image by its name (.txt)": 1,
    }
