"""Parsing of JPEG headers against Pillow: the same facts, or None."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from imaging import decode
from imaging.decode import DecodeError, as_is, prepare
from imaging.header import claimed_size
from imaging.jpeg import before_scan, read_header
from tests.builders import encode, photo

IMAGE = Image.fromarray(photo(3, 61, 83))
GRAY = IMAGE.convert("L")

PLAIN = {
    "quality 30": encode(IMAGE, quality=30),
    "quality 100": encode(IMAGE, quality=100),
    "4:4:4": encode(IMAGE, subsampling=0),
    "4:2:2": encode(IMAGE, subsampling=1),
    "gray": encode(GRAY),
    "progressive": encode(IMAGE, progressive=True),
    "optimized": encode(IMAGE, optimize=True),
    "comment": encode(IMAGE, comment=b"written by a person"),
    "restarts": encode(IMAGE, restart_marker_rows=1),
}

EXIF = Image.Exif()
EXIF[0x0112] = 6

OTHER = {
    "exif": encode(IMAGE, exif=EXIF),
    "profile": encode(IMAGE, icc_profile=b"no profile at all"),
    "cmyk": encode(IMAGE.convert("CMYK")),
    "16-bit table": encode(IMAGE, qtables=[[300] * 64, [17] * 64]),
    "png": encode(IMAGE, "PNG"),
    "gap before a marker": PLAIN["4:4:4"][:2] + b"\xff" + PLAIN["4:4:4"][2:],
    "no image data": PLAIN["4:4:4"][:300],
    "one byte": b"\xff",
    "no size": PLAIN["4:4:4"].replace(b"\xff\xc0", b"\xff\xfe"),
    "no width": PLAIN["4:4:4"].replace(b"\x00\x53\x00\x3d", b"\x00\x53\x00\x00"),
}


def outcome(data: bytes):
    """Return the results of `prepare` and `as_is`, or the error."""
    try:
        prepared = prepare(data)
    except DecodeError as error:
        return str(error)
    return prepared.facts, prepared.data, prepared.pixels.tobytes(), as_is(data)


def with_pillow(data: bytes, monkeypatch: pytest.MonkeyPatch):
    """Return `outcome` with the header parser turned off, so that Pillow reads every file."""
    with monkeypatch.context() as patched:
        patched.setattr(decode, "read_header", lambda _data: None)
        return outcome(data)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_jpeg_is_described_as_by_pillow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    header = read_header(PLAIN[kind])
    assert header is not None
    assert (header.width, header.height) == IMAGE.size
    assert outcome(PLAIN[kind]) == with_pillow(PLAIN[kind], monkeypatch)


@pytest.mark.parametrize("kind", OTHER)
def test_unusual_headers_are_left_to_pillow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_header(OTHER[kind]) is None
    assert outcome(OTHER[kind]) == with_pillow(OTHER[kind], monkeypatch)


def test_a_bomb_is_refused_by_its_header() -> None:
    bomb = PLAIN["4:4:4"].replace(b"\x00\x53\x00\x3d", b"\xff\xdc\xff\xdc")
    assert read_header(bomb) is not None
    for act in (prepare, decode.decode, as_is):
        with pytest.raises(DecodeError, match="megapixels, more than the 200 allowed"):
            act(bomb)


@pytest.mark.parametrize("kind", ["4:2:2", "gray", "progressive", "restarts"])
def test_damaged_files_have_the_same_outcome_as_with_pillow(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes are changed, removed, inserted or cut off at random, mostly in the header."""
    rng = np.random.default_rng(7)
    outcomes = set()
    for _ in range(250):
        data = bytearray(PLAIN[kind])
        at = int(rng.integers(2, rng.choice([640, len(data)])))
        match rng.integers(4):
            case 0:
                data[at] = rng.integers(256)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = rng.bytes(rng.integers(1, 9))
            case 3:
                del data[at : at + int(rng.integers(1, 9))]
        ended = outcome(bytes(data))
        expected = with_pillow(bytes(data), monkeypatch)
        good = not isinstance(ended, str)
        assert good == (not isinstance(expected, str)), (ended, expected)
        if good:
            assert ended == expected
        outcomes.add((good, read_header(bytes(data)) is not None))
    assert outcomes >= {(True, True), (False, False), (False, True)}


@pytest.mark.parametrize("kind", [*PLAIN, "exif", "profile", "cmyk", "gap before a marker"])
def test_before_scan_ends_at_the_first_scan(kind: str) -> None:
    data = (PLAIN | OTHER)[kind]
    head = before_scan(data)
    assert data.startswith(head) and len(head) < len(data)
    assert data[len(head) :].startswith(b"\xff\xda") and b"\xff\xda" not in head


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", OTHER["no image data"], OTHER["png"]])
def test_before_scan_returns_everything_without_a_scan(data: bytes) -> None:
    assert before_scan(data) == data


@pytest.mark.parametrize("kind", PLAIN | OTHER)
def test_claimed_size_equals_the_decoded_size(kind: str) -> None:
    unsaid = ("one byte", "no image data", "no size", "no width")
    expected = None if kind in unsaid else IMAGE.size
    assert claimed_size((PLAIN | OTHER)[kind]) == expected


def test_claimed_size_is_the_one_that_the_decoder_uses() -> None:
    """A small header before the real one must not let a large image pass."""
    large = encode(IMAGE.resize((640, 480)), "PNG")
    start, header, rest = large[:8], large[8:33], large[33:]
    small = encode(IMAGE.resize((32, 32)), "PNG")[8:33]
    for data in (start + small + header + rest, start + text_chunk() + header + rest):
        assert claimed_size(data) == (640, 480)
    for lossless in (True, False):
        data = encode(IMAGE.resize((640, 480)), "WEBP", lossless=lossless)
        assert claimed_size(data) == (640, 480)


def text_chunk() -> bytes:
    """Return a tEXt chunk of a PNG."""
    content = b"tEXtComment\0" + b"x" * 40
    crc = struct.pack(">I", zlib.crc32(content))
    return struct.pack(">I", len(content) - 4) + content + crc
