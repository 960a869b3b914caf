"""What is said of files that are not read: their kind, and what to do."""

import struct
import subprocess
import sys

import pytest
from PIL import Image

from imaging.decode import DecodeError, as_is, decode, prepare
from imaging.signature import unread_kind, why_not_opened
from tests.builders import ROOT, encode, photo

IMAGE = Image.fromarray(photo(1, 64, 48))
UTF8_MARK = b"\xef\xbb\xbf"


def box(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (encode(IMAGE, "SGI"), "SGI"),
        (encode(IMAGE.convert("L"), "SGI"), "SGI"),
        (encode(IMAGE, "PCX"), "PCX"),
        (encode(IMAGE, "DDS"), "DDS"),
        (encode(IMAGE, "ICNS"), "ICNS"),
        (encode(IMAGE, "PDF"), "PDF"),
        (encode(IMAGE, "EPS"), "PostScript"),
        (encode(IMAGE.convert("1"), "XBM"), "XBM"),
        (b"\0\0\2\0\1\0\x20\x20\0\0" + bytes(99), "CUR"),
        (b"gimp xcf v011\0" + bytes(99), "XCF"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"></svg>', "SVG"),
        (UTF8_MARK + b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg></svg>', "SVG"),
        (b"\x76\x2f\x31\x01\2\0\0\0", "OpenEXR"),
        (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 4 +X 4\n", "Radiance HDR"),
        (b"SIMPLE  =                    T", "FITS"),
        (bytes(128) + b"DICM" + bytes(99), "DICOM"),
        (b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(99), "EMF"),
    ],
)
def test_a_kind_of_image_that_is_not_read_is_named(data: bytes, kind: str) -> None:
    for read in (decode, prepare, as_is):
        with pytest.raises(DecodeError, match=f"^{kind} is not read; export it as PNG$"):
            read(data)


def test_a_tga_is_not_called_a_cursor() -> None:
    data = encode(IMAGE, "TGA")
    assert data.startswith(b"\0\0\2\0")
    assert decode(data).shape == (48, 64, 3)


VIDEO = "a video: export one picture of it"
TEXT = "text (it begins with "


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (box(b"ftyp", b"isom\0\0\2\0isomiso2avc1mp41") + box(b"mdat", bytes(99)), VIDEO),
        (box(b"ftyp", b"qt  \0\0\2\0qt  ") + box(b"wide") + box(b"mdat", bytes(99)), VIDEO),
        (box(b"moov", bytes(99)), VIDEO),
        (b"\x1a\x45\xdf\xa3\x9fB\x86\x81\1" + bytes(99), VIDEO),
        (b"RIFF\0\0\0\0AVI LIST" + bytes(99), VIDEO),
        (2 * (b"\x47" + bytes(187)), VIDEO),
        (b"RIFF\0\0\0\0WAVEfmt " + bytes(99), "an audio file"),
        (b"<!DOCTYPE html><html>", "a web page: download the image itself"),
        (UTF8_MARK + b"\n<HTML lang=en>", "a web page: download the image itself"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer to a file: fetch"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X  ", "metadata that macOS keeps of a file"),
        (b"BZh91AY&SY" + bytes(99), "a bzip2 archive: unpack it"),
        (b"\xfd7zXZ\0" + bytes(99), "an xz archive: unpack it"),
        (bytes(999), "zero bytes: copy or download it again"),
        (b"A picture of a cat.\n", TEXT),
        ("\u30cd\u30b3\n".encode() * 99, TEXT),  # cut within a character after 300 bytes
        ("Gr\u00fc\u00dfe".encode("utf-16"), TEXT),
    ],
)  # fmt: skip
def test_a_file_that_is_no_image_is_named(data: bytes, said: str) -> None:
    with pytest.raises(DecodeError) as error:
        prepare(data)
    assert str(error.value).startswith(f"not an image this program reads but {said}")


def test_bytes_of_an_unknown_kind_are_shown() -> None:
    for data in (b"\xff\xe4\x22\x79" + bytes(9), bytes(16) + b"x"):
        with pytest.raises(DecodeError) as error:
            prepare(data)
        assert str(error.value) == (
            f"not an image this program reads (it begins with {data[:8].hex(' ')}); if it is an "
            "image, export it as PNG"
        )


@pytest.mark.parametrize(
    ("brands", "boxes", "said"),
    [
        (b"msf1\0\0\0\0msf1hevciso8", box(b"moov", bytes(99)), "it is a sequence of pictures"),
        (b"hevc\0\0\0\0hevcmif1", box(b"mdat") + box(b"moov"), "it is a sequence of pictures"),
        (b"avci\0\0\0\0avcimif1", box(b"meta", bytes(40)), "compressed as H.264, and only HEVC"),
        (b"mif1\0\0\0\0mif1jpeg", box(b"meta", bytes(40)), "compressed as JPEG, and only HEVC"),
        (b"heic\0\0\0\0mif1heic", box(b"meta", bytes(40)), "its header is damaged or cut off"),
    ],
)
def test_a_heif_that_is_not_read_is_described(brands: bytes, boxes: bytes, said: str) -> None:
    with pytest.raises(DecodeError, match=rf"^HEIF does not decode: .*{said}.*as PNG"):
        prepare(box(b"ftyp", brands) + boxes)


REPEATED = """
from imaging.signature import format_of, unread_kind, why_not_opened
for start in (b"", b"<!--", b"<?xml", b"\\0\\0\\1\\x2cftyp", b"#define "):
    for piece in (b"<!---->", b"<!-- -->", b"<!--->", b"-->", b"<?xml>", b" ", b"<", b"avif", b"a"):
        data = start + piece * 40 + b"x"
        format_of(data), unread_kind(data), why_not_opened(data, "")
"""


def test_no_signature_takes_longer_with_each_repetition() -> None:
    """In a process of its own: a regular expression holds the interpreter, and so every thread."""
    subprocess.run([sys.executable, "-c", REPEATED], check=True, timeout=20, cwd=ROOT)


def test_a_picture_after_comments_is_named() -> None:
    for comments in (b"<!-- a -- b -->\n<!---->", b"<!--x-->" * 20, b"<!-- <svg> -->"):
        assert unread_kind(comments + b"<svg >") == "SVG"
        assert not unread_kind(comments + b"<!-- <svg >")
        said = why_not_opened(comments + b"<BODY>", "")
        assert "but a web page" in said
