"""Hostile archives: each gives one clear error, in limited time and memory."""

import gzip
import io
import lzma
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import pytest

from imaging import tar, zip
from imaging.decode import DecodeError
from model.inference.inputs import find_images
from sharding.downloads import FetchError, check_content
from sharding.raw import walk
from tests.builders import JPEG, ROOT, write_split_zip


def zip_of(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def header(name: str, kind: bytes, size: int = 0) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def refusals(path: Path) -> dict[str, str]:
    """Return name -> reason why it is not read, of each member of a tar."""
    return {member.name: member.excluded for member in tar.members(path, lambda _name: True)}


def overlapping_zip(path: Path, count: int) -> Path:
    """Write a zip whose members overlap, as in David Fifield's construction: each member is one
    stored DEFLATE block around the next local header, and all end in the same kernel of zeros.
    """
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    kernel = packer.compress(bytes(2**20)) + packer.flush()
    body, size, entries = kernel, 2**20, []
    for number in reversed(range(count)):
        name = f"{number:04d}.png".encode()
        local = struct.pack(
            "<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 33, 0, len(body), size, len(name), 0
        )
        entries.insert(0, (name, len(body), size, len(local) + len(name)))
        body = local + name + body
        quote = struct.pack("<BHH", 0, len(local) + len(name), (len(local) + len(name)) ^ 0xFFFF)
        body, size = (quote + body, size + len(local) + len(name)) if number else (body, size)
    directory, offset = b"", 0
    for name, packed, unpacked, step in entries:
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 8, 0, 33, 0, packed, unpacked, len(name),
            0, 0, 0, 0, 0, offset,
        ) + name  # fmt: skip
        offset += step + 5
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0)
    path.write_bytes(body + directory + end)
    return path


def test_overlapping_members_that_claim_too_much_are_one_error(tmp_path: Path) -> None:
    path = overlapping_zip(tmp_path / "x.zip", 400)
    assert path.stat().st_size < 60_000
    with pytest.raises(
        zip.ZipError, match=r"x\.zip claims 4\d\d,\d+,\d+ bytes in \d\d,\d+, more th"
    ):
        list(zip.members(path, "x.zip"))


def test_only_the_first_of_overlapping_members_is_read(tmp_path: Path) -> None:
    path = overlapping_zip(tmp_path / "x.zip", 2)
    first, second = zip.members(path)
    assert (first.name, first.excluded) == ("0000.png", "")
    assert (second.name, second.excluded) == ("0001.png", "shares bytes with another member")


def as_zip64(path: Path, volumes: int, directory_disk: int) -> None:
    """Add the zip64 records to an archive of `write_split_zip`. Its own end record then has the
    volume number 0xFFFF.
    """
    data = path.read_bytes()
    directory, fields = data[:-22], struct.unpack("<4s4H2LH", data[-22:])
    count, last = fields[3], volumes - 1
    end64 = struct.pack(
        "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, last, directory_disk, count, count, len(directory), 0
    )
    locator = struct.pack("<4sLQL", b"PK\6\7", last, len(directory), volumes)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0xFFFF, 0xFFFF, *fields[3:])
    path.write_bytes(directory + end64 + locator + end)


SPLIT = {f"{number}.png": bytes([number]) * 900 for number in range(9)}


@pytest.mark.parametrize("missing", [("z02",), ("z02", "z03"), ("z01", "z02", "z03")])
@pytest.mark.parametrize("is_zip64", [False, True])
def test_missing_volumes_are_counted_in_one_error(
    tmp_path: Path, missing: tuple[str, ...], is_zip64: bool
) -> None:
    path = tmp_path / "x.zip"
    write_split_zip(path, SPLIT, volumes=4)
    if is_zip64:
        as_zip64(path, volumes=4, directory_disk=3)
    assert [zip.read_member(path, m.where) for m in zip.members(path)] == list(SPLIT.values())
    for suffix in missing:
        path.with_suffix(f".{suffix}").unlink()
    with pytest.raises(zip.ZipError, match=rf"has 4 volumes, found {4 - len(missing)} \("):
        list(zip.members(path))


@pytest.mark.parametrize("is_zip64", [False, True])
def test_a_directory_in_a_volume_that_does_not_exist_is_one_error(
    tmp_path: Path, is_zip64: bool
) -> None:
    path = tmp_path / "x.zip"
    write_split_zip(path, SPLIT, volumes=4)
    if is_zip64:
        as_zip64(path, volumes=4, directory_disk=7)
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-16] + struct.pack("<H", 7) + data[-14:])
    with pytest.raises(zip.ZipError, match="directory begins in volume 8, but it has 4 volumes"):
        list(zip.members(path))


def test_members_without_a_name_are_refused(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", {"a.png": b"1", "n.png": b"2"})
    data = path.read_bytes().replace(b"n.png", b"\0.png")
    path.write_bytes(data)  # zipfile cuts a name at a zero byte
    assert [member.excluded for member in zip.members(path)] == ["without a name", ""]
    path = tmp_path / "x.tar"
    path.write_bytes(header("", tarfile.REGTYPE) + header("a.png", tarfile.REGTYPE) + bytes(1024))
    assert refusals(path) == {"": "without a name", "a.png": ""}


def test_names_that_are_not_utf_8_are_escaped_in_tars_and_refused_in_zips(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", {"é.png": b"1"})
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xe9\xe9"))
    with pytest.raises(
        zip.ZipError, match="is not a readable zip archive: 'utf-8' codec can't dec"
    ):
        list(zip.members(path))
    path = tar_of(tmp_path / "x.tar", {"caf\udce9.png": b"1"})
    (member,) = tar.members(path, lambda _name: True)
    assert member.name == "caf\\xe9.png"
    assert member.read() == b"1"


HIDDEN = {"._a.jpg": b"x", ".git/a.jpg": JPEG, "__MACOSX/d/._a.jpg": b"x", "__MACOSX/b.jpg": JPEG}
SHOWN = {"a.jpg": JPEG, "d/a.jpg": JPEG, "__MACOSX_2/a.jpg": JPEG, "d./a.jpg": JPEG}


def test_hidden_files_are_skipped_in_folders_zips_and_tars_alike(tmp_path: Path) -> None:
    members = HIDDEN | SHOWN
    zip_of(tmp_path / "x.zip", members)
    tar_of(tmp_path / "x.tar", members | {"./e.jpg": JPEG})
    for name, data in members.items():
        (tmp_path / "raw/s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw/s" / name).write_bytes(data)
    for path, more, hidden in (("x.zip", [], 4), ("x.tar", ["e.jpg"], 4), ("raw/s", [], 3)):
        excluded: Counter[str] = Counter()
        top = tmp_path / path
        names = [
            str(Path(file.name).relative_to(top)) for file in find_images([str(top)], excluded)
        ]
        assert sorted(names) == sorted([*SHOWN, *more])
        assert excluded["hidden"] == hidden  # a hidden folder counts once
    assert sorted(file.inside for file in walk(tmp_path / "raw", "s")) == sorted(SHOWN)
    (tmp_path / "raw/z").mkdir()
    (tmp_path / "x.zip").rename(tmp_path / "raw/z/x.zip")
    inside = sorted(file.inside for file in walk(tmp_path / "raw", "z"))
    assert inside == sorted(f"x.zip/{name}" for name in SHOWN)


def test_a_long_chain_of_extended_headers_is_an_error(tmp_path: Path) -> None:
    """tarfile reads nested headers recursively, up to Python's recursion limit."""
    record = b"12 path=abc\n"
    link = header("p", tarfile.XHDTYPE, len(record)) + record.ljust(512, b"\0")
    good = tar_of(tmp_path / "good.tar", {"a.png": b"1"}).read_bytes()
    path = tmp_path / "x.tar"
    for count, damaged in ((3, False), (3000, True)):
        path.write_bytes(
            good[:1024] + link * count + header("b.png", tarfile.REGTYPE) + bytes(1024)
        )
        if damaged:
            with pytest.raises(DecodeError, match="too many extended headers of one member"):
                refusals(path)
        else:
            assert refusals(path) == {"a.png": "", "abc": ""}


def test_what_begins_as_a_tar_is_one(tmp_path: Path) -> None:
    """The standard `is_tarfile` ends nested headers with RecursionError."""
    path, record = tmp_path / "x.tar", b"12 path=abc\n"
    link = header("p", tarfile.XHDTYPE, len(record)) + record.ljust(512, b"\0")
    good = tar_of(tmp_path / "good.tar", {"a.png": b"1"}).read_bytes()
    for data, is_tar in (
        (good, True), (good[:600], True), (bytes(10_240), True), (b"", False), (b"x" * 999, False),
        (link * 3 + good, True), (link * 3000 + good, False),
        (header("p", tarfile.GNUTYPE_LONGNAME, 2**31) + bytes(2**20), False),
    ):  # fmt: skip
        for pack in (bytes, gzip.compress, lzma.compress):
            path.write_bytes(pack(data))
            assert tar.is_tar(path) == is_tar
            if pack is not bytes and not is_tar:
                with pytest.raises(FetchError, match=r"x\.tar is not a tar archive"):
                    check_content(path, "")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_extended_header_of_gigabytes_is_an_error(tmp_path: Path, kind: bytes) -> None:
    """Less than a megabyte on disk, for which tarfile would allocate two gigabytes."""
    path = tmp_path / "x.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(header("p", kind, 2**31))
        for _ in range(16):
            stream.write(bytes(2**20))
    with pytest.raises(DecodeError, match="an extended header of 2,147,483,648 bytes"):
        refusals(path)


def test_sparse_members_are_refused_without_reading_their_maps(tmp_path: Path) -> None:
    def old_gnu(extensions: int) -> bytes:
        block = bytearray(header("s.png", tarfile.GNUTYPE_SPARSE))
        block[482] = 1 if extensions else 0
        block[483:495] = b"00000000777\0"
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        maps = [bytearray(512) for _ in range(extensions)]
        for each in maps[:-1]:
            each[504] = 1
        return bytes(block) + b"".join(maps)

    path = tmp_path / "x.tar"
    sparse = "a sparse file, which is not read; unpack it yourself"
    path.write_bytes(old_gnu(3) + header("a.png", tarfile.REGTYPE) + bytes(1024))
    assert refusals(path) == {"s.png": sparse, "a.png": ""}
    path.write_bytes(old_gnu(5000) + bytes(1024))
    with pytest.raises(DecodeError, match="without an end of its map"):
        refusals(path)
    record = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"
    pax = header("p", tarfile.XHDTYPE, len(record)) + record.ljust(512, b"\0")
    path.write_bytes(pax + header("b.png", tarfile.REGTYPE, 512) + b"99999999\n".ljust(512, b"1")
                     + header("a.png", tarfile.REGTYPE) + bytes(1024))  # fmt: skip
    assert refusals(path) == {"b.png": sparse, "a.png": ""}


def test_a_member_of_negative_size_is_an_error(tmp_path: Path) -> None:
    record = b"14 size=-1024\n"
    pax = header("p", tarfile.XHDTYPE, len(record)) + record.ljust(512, b"\0")
    path = tmp_path / "x.tar"
    path.write_bytes(pax + header("a.png", tarfile.REGTYPE) + bytes(2048))
    with pytest.raises(DecodeError, match="damaged"):
        refusals(path)


@pytest.mark.parametrize("mode", ["gz", "xz"])
def test_a_tar_that_unpacks_to_too_much_is_an_error(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar, "MAX_SLACK", 2**20)
    path = tmp_path / f"x.tar.{mode}"
    with tarfile.open(path, f"w:{mode}") as archive:
        for number in range(12):
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = 2**20
            archive.addfile(info, io.BytesIO(bytes(2**20)))
    with pytest.raises(DecodeError, match="unpacks to more than 200 times its size"):
        for _member in tar.members(path, lambda name: name.endswith(".png")):
            pass


def test_an_xz_that_needs_too_much_memory_is_refused(tmp_path: Path) -> None:
    """A few hundred bytes whose header asks for a dictionary of 1.5 GiB."""
    plain = tar_of(tmp_path / "x.tar", {"a.jpg": JPEG}).read_bytes()
    path = tmp_path / "x.tar.xz"
    for dictionary, says in ((64 * 2**20, ""), (3 * 2**29, "needs more than 256 MiB of memory")):
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**16}]
        path.write_bytes(with_dictionary(lzma.compress(plain, filters=filters), dictionary))
        if says:
            with pytest.raises(DecodeError, match=says):
                refusals(path)
        else:
            (member,) = tar.members(path, lambda _name: True)
            assert member.read() == JPEG


def with_dictionary(packed: bytes, size: int) -> bytes:
    """Change the dictionary size in the block header of an xz file of one block, and the header's
    checksum.
    """
    begin, length = 12, 4 * (packed[12] + 1)
    header = bytearray(packed[begin : begin + length - 4])
    at = header.index(bytes([lzma_id := 0x21, 1])) + 2  # the filter, its one byte of properties
    assert header[at - 2] == lzma_id
    bits = next(bits for bits in range(41) if (2 | bits & 1) << bits // 2 + 11 >= size)
    header[at] = bits
    check = struct.pack("<I", zlib.crc32(header))
    return packed[:begin] + bytes(header) + check + packed[begin + length :]


def test_several_xz_streams_are_one_tar_and_a_cut_one_is_an_error(tmp_path: Path) -> None:
    plain = tar_of(tmp_path / "x.tar", {"a.jpg": JPEG, "b.jpg": JPEG}).read_bytes()
    path = tmp_path / "x.tar.xz"
    whole = lzma.compress(plain[:700]) + lzma.compress(plain[700:]) + bytes(8)
    path.write_bytes(whole)
    assert refusals(path) == {"a.jpg": "", "b.jpg": ""}
    path.write_bytes(lzma.compress(plain)[:-200])
    with pytest.raises(DecodeError, match="cut off"):
        refusals(path)


def test_folders_may_be_nested_deeper_than_the_recursion_limit(tmp_path: Path) -> None:
    folder = tmp_path / "raw/s"
    folder.mkdir(parents=True)
    code = (
        "import os\n"
        "for _ in range(1500): os.mkdir('d'); os.chdir('d')\n"
        "open('a.jpg', 'w').write('x')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    files = list(walk(tmp_path / "raw", "s"))
    # Not shutil.rmtree, which would reach the recursion limit.
    subprocess.run(["rm", "-rf", tmp_path / "raw"], check=True)
    assert [file.inside for file in files] == ["d/" * 1500 + "a.jpg"]


@pytest.mark.slow
def test_memory_stays_small_for_a_header_of_gigabytes(tmp_path: Path) -> None:
    """The tar is read in a process with 1 GiB of address space."""
    path = tmp_path / "x.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(header("p", tarfile.XHDTYPE, 2**31))
        for _ in range(2048):
            stream.write(bytes(2**20))
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom imaging import tar\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "try: list(tar.members(Path(sys.argv[1]), lambda n: True))\n"
        "except ValueError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "an extended header of" in result.stdout, result.stderr
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != 2**30


def test_backslashes_separate_folders_as_in_old_windows_programs(tmp_path: Path) -> None:
    names = ("d\\a.png", "d/b.png", "e\\", "d\\.c.png", "..\\up.png")
    path = zip_of(tmp_path / "x.zip", dict.fromkeys(names, b"1"))
    reasons = {member.name: member.excluded for member in zip.members(path)}
    assert reasons == {
        "..\\up.png": "a path that leaves the archive", "d/a.png": "", "d/b.png": "",
        "d/.c.png": "hidden",
    }  # fmt: skip


def test_names_in_utf_8_without_the_flag_are_read(tmp_path: Path) -> None:
    """As the usual `zip` of Linux writes them; other names stay in the code page of DOS."""
    names = {"Größe ü.jpg".encode(): "Größe ü.jpg", b"\x81.jpg": "ü.jpg"}
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(f"{number}" + "x" * (len(name) - 5) + ".jpg", b"x")
    data = path.read_bytes()
    for number, name in enumerate(names):
        data = data.replace((f"{number}" + "x" * (len(name) - 5) + ".jpg").encode(), name)
    path.write_bytes(data)
    assert sorted(member.name for member in zip.members(path)) == sorted(names.values())
