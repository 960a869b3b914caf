"""Tests of raw archives that are split, damaged, hostile or larger than 4 GiB, of links, and of
cells of parquet tables.
"""

import os
import shutil
import stat
import subprocess
import threading
import uuid
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from imaging.decode import DecodeError
from sharding.catalog import Source
from sharding.listing import list_source
from sharding.raw import VOLUME, RawError, read_all, walk
from tests.builders import write_split_zip
from tests.servers import HANG_S, Server


def contents(raw: Path, root: str = "s") -> dict[str, bytes | DecodeError]:
    files = [file for file in walk(raw, root) if not file.excluded]
    return dict(
        zip([f.inside for f in files], read_all(raw, [f._asdict() for f in files]), strict=True)
    )


MEMBERS = {f"d/{n}.bin": os.urandom(3000) + bytes(2000) for n in range(20)}


@pytest.mark.parametrize("volumes", [2, 3, 7])
def test_split_archives_are_read_without_unpacking(tmp_path: Path, volumes: int) -> None:
    write_split_zip(tmp_path / "s/X.zip", MEMBERS, volumes)
    assert contents(tmp_path) == {f"X.zip/{name}": data for name, data in MEMBERS.items()}


def test_the_version_of_a_member_changes_with_every_volume(tmp_path: Path) -> None:
    """Otherwise a volume that was repaired would never be read again."""
    write_split_zip(tmp_path / "s/X.zip", MEMBERS, 3)
    (before,) = {file.version for file in walk(tmp_path, "s")}
    os.utime(tmp_path / "s/X.z02", ns=(0, 1))
    (changed,) = {file.version for file in walk(tmp_path, "s")}
    os.truncate(tmp_path / "s/X.z01", 10)
    (shorter,) = {file.version for file in walk(tmp_path, "s")}
    assert len({before, changed, shorter}) == 3


def test_volumes_without_their_archive_are_an_error(tmp_path: Path) -> None:
    """The last volume is the last one to arrive; without it, its images would be left out."""
    write_split_zip(tmp_path / "s/sub/X.zip", MEMBERS, 3)
    (tmp_path / "s/sub/X.zip").rename(tmp_path / "s/sub/X.ZIP")
    assert len(list(walk(tmp_path, "s"))) == len(MEMBERS)
    (tmp_path / "s/sub/X.ZIP").unlink()
    (tmp_path / "s/a.jpg").touch()
    (tmp_path / "s/mario.z64").touch()  # no volume, although its name looks like one
    files = {file.inside: file.excluded for file in walk(tmp_path, "s")}
    volumes = {"sub/X.z01", "sub/X.z02"}
    assert files == {"a.jpg": "", "mario.z64": ""} | dict.fromkeys(volumes, VOLUME)
    source = Source(license="x", set="train", real=["**"])
    with pytest.raises(RawError, match=r"s/sub/X\.z0. is a volume .*, the \.zip, is not beside it"):
        list_source("s", source, tmp_path)
    listing = list_source("s", replace(source, ignore=["sub"]), tmp_path)
    assert [item.origin for item in listing.items] == ["s/a.jpg"]
    (tmp_path / "s/sub/X.zip").symlink_to("elsewhere.zip")
    assert [file.inside for file in walk(tmp_path, "s")] == ["a.jpg", "sub/X.zip", "mario.z64"]


@pytest.mark.skipif(not shutil.which("zip"), reason="no zip program")
@pytest.mark.parametrize("options", [[], ["-fz"]], ids=["zip32", "zip64"])
def test_archives_split_by_the_zip_program_are_read(tmp_path: Path, options: list[str]) -> None:
    members = {f"d/{n}.bin": os.urandom(30_000) for n in range(12)}
    for name, data in members.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "s").mkdir()
    command = ["zip", "-q", "-r", "-s", "64k", *options, "s/X.zip", "d"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert len(list((tmp_path / "s").iterdir())) > 4
    assert contents(tmp_path) == {f"X.zip/{name}": data for name, data in members.items()}
    (tmp_path / "s/X.z03").unlink()
    with pytest.raises(RawError, match="fetch the missing ones"):
        contents(tmp_path)


def test_an_archive_over_4_gib_without_zip64_is_read(tmp_path: Path) -> None:
    """macOS writes such archives, with offsets modulo 4 GiB; `zipfile` calls them overlapping."""
    small = tmp_path / "small.zip"
    with zipfile.ZipFile(small, "w") as opened:
        opened.writestr("a.bin", b"first" * 100)
        opened.writestr("b.bin", b"second" * 100)
    data = small.read_bytes()
    second = data.index(b"PK\3\4", 4)
    directory = data.index(b"PK\1\2")
    gap = 2**32
    path = tmp_path / "s/big.zip"
    path.parent.mkdir()
    with path.open("wb") as stream:
        stream.write(data[:second])
        stream.seek(second + gap)  # sparse: b's offset in the directory is short by 2**32
        stream.write(data[second:])
    assert path.stat().st_size == gap + len(data)
    assert directory > second
    assert contents(tmp_path) == {"big.zip/a.bin": b"first" * 100, "big.zip/b.bin": b"second" * 100}


def test_two_entries_with_the_same_data_are_read(tmp_path: Path) -> None:
    """Two names have one local header; newer versions of `zipfile` open neither of them."""
    path = tmp_path / "s/x.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("a.bin", b"data" * 50)
        twin = zipfile.ZipInfo("b.bin")
        for name in ("header_offset", "file_size", "compress_size", "CRC"):
            setattr(twin, name, getattr(opened.infolist()[0], name))
        opened.filelist.append(twin)
    assert contents(tmp_path) == {"x.zip/a.bin": b"data" * 50, "x.zip/b.bin": b"data" * 50}


def test_hostile_members_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with zipfile.ZipFile(tmp_path / "s/x.zip", "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("../up.png", b"x")
        opened.writestr("/etc/absolute.png", b"x")
        opened.writestr("C:\\windows.png", b"x")
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        opened.writestr(link, "/etc/passwd")
        opened.writestr("large.png", os.urandom(700_000))
        opened.infolist()[-1].file_size = 600 * 2**20  # what the directory of the archive declares
        opened.writestr(zipfile.ZipInfo("bz2.png"), b"x", zipfile.ZIP_BZIP2)
        opened.writestr("good.png", b"good")
    reasons = {file.inside: file.excluded for file in walk(tmp_path, "s")}
    assert {name.removeprefix("x.zip/"): reason for name, reason in reasons.items() if reason} == {
        "../up.png": "a path that leaves the archive",
        "/etc/absolute.png": "a path that leaves the archive",
        "C:\\windows.png": "a path that leaves the archive",
        "link.png": "a symbolic link, which is not followed",
        "large.png": "629,145,600 bytes, more than the limit of 536,870,912",
        "bz2.png": "compression method 12, which is not read; unpack it yourself",
    }
    assert contents(tmp_path) == {"x.zip/good.png": b"good"}


def test_a_member_larger_than_its_declared_size_is_an_error(tmp_path: Path) -> None:
    """The directory of the archive declares 10 bytes for data of 10 MiB."""
    path = tmp_path / "s/x.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("a.png", bytes(10 * 2**20))
        opened.infolist()[0].file_size = 10
    (content,) = contents(tmp_path).values()
    assert isinstance(content, DecodeError)
    assert "damaged in the archive" in str(content)


def test_damage_inside_an_archive_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "s/x.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("a.bin", b"a" * 1000)
        opened.writestr("b.bin", b"b" * 1000)
    data = bytearray(path.read_bytes())
    data[data.index(b"bbb") + 500] ^= 1
    path.write_bytes(data)
    by_name = contents(tmp_path)
    assert by_name["x.zip/a.bin"] == b"a" * 1000
    assert isinstance(by_name["x.zip/b.bin"], DecodeError)


@pytest.mark.parametrize("keep", [0, 10, 500, 1500])
def test_half_an_archive_is_one_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "s/x.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as opened:
        for n in range(10):
            opened.writestr(f"{n}.bin", os.urandom(150))
    os.truncate(path, keep)
    with pytest.raises(RawError, match=r"s/x\.zip is not a whole zip archive"):
        contents(tmp_path)


def test_links_and_devices_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "s/d").mkdir(parents=True)
    (tmp_path / "s/d/real.bin").write_bytes(b"x")
    (tmp_path / "s/file.png").symlink_to("d/real.bin")
    (tmp_path / "s/loop").symlink_to("..")
    os.mkfifo(tmp_path / "s/pipe.png")  # reading it would wait forever
    reasons = {file.inside: file.excluded for file in walk(tmp_path, "s")}
    assert reasons == {
        "d/real.bin": "",
        "file.png": "a symbolic link, which is not followed",
        "loop": "a symbolic link, which is not followed",
        "pipe.png": "neither a file nor a folder",
    }


def cells(*members: str) -> list[dict[str, Any]]:
    facts = {"path": "s/t.parquet", "size": 0, "version": "", "excluded": ""}
    return [{**facts, "member": member} for member in members]


def write_cells(raw: Path, count: int = 50) -> Path:
    """Write a parquet table of one row group; its cell in row n has the text of n as bytes."""
    path = raw / "s/t.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"image": [b"%d" % n for n in range(count)]}), path)
    return path


def test_cells_are_read_in_ascending_order_only(tmp_path: Path) -> None:
    write_cells(tmp_path)
    rows = cells("0:1:image", "0:1:image", "0:40:image")
    assert list(read_all(tmp_path, rows)) == [b"1", b"1", b"40"]
    for members in (["0:40:image", "0:31:image"], ["0:-1:image"]):
        with pytest.raises(
            RawError, match=r"s/t\.parquet: row (31|-1) .*sort the cells by their row"
        ):
            list(read_all(tmp_path, cells(*members)))
    with pytest.raises(RawError, match="has fewer rows than when it was listed"):
        list(read_all(tmp_path, cells("0:50:image")))


def test_a_cell_that_many_rows_refer_to_is_in_memory_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small file may refer to one large cell in each of its rows."""
    size = 2**20
    cell = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array([bytes(size)]))
    path = write_cells(tmp_path)
    pq.write_table(pa.table({"image": cell}), path, compression="zstd", store_schema=False)
    before = pa.total_allocated_bytes()
    every = read_all(tmp_path, cells(*(f"0:{row}:image" for row in range(64))))
    assert next(every) == bytes(size)
    assert pa.total_allocated_bytes() - before < 8 * size
    monkeypatch.setattr("sharding.raw.MAX_BYTES", size - 1)
    error = next(every)
    assert isinstance(error, DecodeError)
    assert str(error) == "1,048,576 bytes, more than the limit of 1,048,575"


def test_a_damaged_table_is_one_error(tmp_path: Path) -> None:
    path = write_cells(tmp_path)
    whole = path.read_bytes()
    name = r"s/t\.parquet is damaged, or not the table that was listed \(.+\); fetch it again"
    for member in ("1:0:image", "0:0:picture"):
        with pytest.raises(RawError, match=name):
            list(read_all(tmp_path, cells(member)))
    page = bytes(byte ^ 255 for byte in whole[4:20])  # pyarrow raises an OSError for these
    for data in (b"", whole[:-9], whole[:4] + page + whole[20:], b"PAR1" + bytes(99) + b"PAR1"):
        path.write_bytes(data)
        with pytest.raises(RawError, match=name):
            list(read_all(tmp_path, cells("0:0:image")))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        list(read_all(tmp_path, cells("0:0:image")))


@pytest.mark.parametrize("name", ["a.jpg", "a.zip", "a.parquet"])
def test_a_server_that_fails_is_an_error_of_reading(name: str) -> None:
    server = Server()
    server.status |= {f"/s/{name}": 500}
    member = {"a.jpg": "", "a.zip": "0:5:5:0:0", "a.parquet": "0:0:image"}[name]
    row = {"path": f"s/{name}", "member": member, "size": 5, "version": "", "excluded": ""}
    with pytest.raises(OSError, match=rf"{name} could not be read: .*; check the addr") as caught:
        list(read_all(UPath(server.url), [row]))
    assert "\n" not in str(caught.value)
    server.shutdown()
    server.server_close()


def test_files_of_a_bucket_are_read_together_in_one_request_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One at a time, a worker would wait for a round trip of the network for each image."""
    raw = UPath(f"memory://{uuid.uuid4().hex}")
    together = threading.Barrier(4)
    requests: list[str] = []
    for number in range(8):
        (raw / f"s/{number}.jpg").write_bytes(f"image {number}".encode())
    read, info = raw.fs.cat_file, raw.fs.info

    def slow(path: str, **options: int) -> bytes:
        together.wait(HANG_S)
        requests.append("GET")
        return read(path, **options)

    monkeypatch.setattr(raw.fs, "cat_file", slow)
    monkeypatch.setattr(raw.fs, "info", lambda path: requests.append("HEAD") or info(path))
    rows = [file._asdict() for file in walk(raw, "s")]
    rows[2]["excluded"] = rows[7]["excluded"] = "a link"
    rows[5]["size"] = 2**40
    rows[6]["path"] = "s/4.jpg"
    rows += rows[:2] + rows[3:4]
    requests.clear()
    images = list(read_all(raw, rows))
    assert requests == ["GET"] * 8
    assert [str(image) for image in images if isinstance(image, DecodeError)] == [
        "a link", f"{2**40:,} bytes, more than the limit of 536,870,912", "a link",
    ]  # fmt: skip
    read_bytes = [image.decode() for image in images if isinstance(image, bytes)]
    assert read_bytes == [f"image {number}" for number in (0, 1, 3, 4, 4, 0, 1, 3)]
