"""Read the headers and markers of a JPEG, given its bytes, without decoding it (ITU-T T.81).

Main entry: `read_header(data)` takes the bytes of a file and returns the `Header` of a plain JPEG:
8 bits, YCbCr or gray, no metadata but JFIF and comments. It returns None for any other file, such
as one with EXIF, XMP or a color profile, or with a damaged header. A `Header` has:

- `width` and `height`: in pixels, as stored.
- `chroma`: the chroma subsampling, a text such as "420" or "Gray".
- `tables`: the quantization tables, a tuple of tuples of 64 sorted numbers.

`describe_tables(tables)` takes these tables and returns the nearest libjpeg quality, 1 to 100, and
a hash of 8 hex digits (0 and "" without tables). All other functions take the bytes of a JPEG,
`data`. Damaged bytes raise no error:

- `segments()` yields each `Segment`: `marker`, `start` and `end` in `data`, and `filled` (True if
  fill bytes precede it). It stops after the first invalid one, whose `end` may have any value.
  Pixels are in no segment, so a caller must end its loop at the first start of scan (`SOS`).
- `lenient_segments()` yields (marker, start, end) to the end of the image. It skips bytes between
  segments as libjpeg does, and gives the pixels of a scan the pseudo-marker `PIXELS`.
- `before_scan()` returns the bytes before the first scan, or all bytes if there is no scan.
- `has_end()` returns False for a cut-off file.
- `unread_kind()` returns "lossless JPEG" or another kind that is not read, or "".
- `mended()` returns the JPEG with only the segments that its pixels need.
- `count_scans()` first finds an upper bound of the number of scans. If the bound is at most
  `MAX_SCANS`, it returns the bound; else it returns the exact number, which takes longer. Callers
  refuse a file with more than `MAX_SCANS` scans, which would be slow.
"""

import hashlib
import re
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import simplejpeg

Tables = tuple[tuple[int, ...], ...]
"""Quantization tables by rising number. The 64 values of each are sorted, because Pillow's order
(zigzag or natural) has changed between versions.
"""


CHROMAS = ("420", "422", "444", "Gray")
"""Chroma subsamplings that this project writes, with simplejpeg's names."""

PLAIN_SPACES = {"YCbCr", "Gray"}
"""Color spaces of JPEGs that every decoder converts to the same RGB values."""


class Header(NamedTuple):
    """Size in pixels as stored, chroma subsampling (420, 422, 444, ..., Gray) and quantization
    tables.
    """

    width: int
    height: int
    chroma: str
    tables: Tables


PROGRESSIVE, DHT, SOS, _DQT, _DRI, COM = 0xC2, 0xC4, 0xDA, 0xDB, 0xDD, 0xFE
_SOF = (0xC0, 0xC1, PROGRESSIVE)
_APP0, APP1, _APP14 = 0xE0, 0xE1, 0xEE
_TEM, _SOI, _EOI, _DAC = 0x01, 0xD8, 0xD9, 0xCC
PIXELS = 0
"""Pseudo-marker for the pixels of a scan. No real marker has this code."""

_FRAMES = frozenset(range(0xC0, 0xD0)) - {DHT, 0xC8, _DAC}
_UNREAD = dict.fromkeys(_FRAMES - {*_SOF, 0xC9, 0xCA}, "hierarchical JPEG")
_UNREAD |= {0xC3: "lossless JPEG", 0xCB: "lossless JPEG", 0xF7: "JPEG-LS"}


class Segment(NamedTuple):
    """Segment of a JPEG: `data[start:end]`, with its marker and length of four bytes.

    `filled` is True if fill bytes precede it. In a cut or damaged file `end` may have any value.
    """

    marker: int
    start: int
    end: int
    filled: bool


def segments(data: bytes) -> Iterator[Segment]:
    """Yield the segments of a JPEG from its start up to the first invalid one (T.81, B.1.1.4). The
    data after a start of scan is no segment, so callers must stop there.
    """
    at = 2 if data.startswith(b"\xff\xd8") else len(data)
    while data[at : at + 1] == b"\xff":
        first = at
        while data[at + 1 : at + 2] == b"\xff":  # any number of fill bytes
            at += 1
        if at + 2 > len(data):
            return
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield Segment(data[at + 1], at, end, at > first)
        if end < at + 4:
            return
        at = end


def before_scan(data: bytes) -> bytes:
    """Return the bytes before the first scan of a JPEG, or all of `data` if there is no scan."""
    scan = next((segment for segment in segments(data) if segment.marker == SOS), None)
    return data[: scan.start] if scan else data


def read_header(data: bytes) -> Header | None:
    """Parse a plain JPEG header: 8 bits, YCbCr or gray, no metadata except JFIF and comments.
    Returns None for every other file. The caller then uses Pillow, at several times the cost.
    """
    size, tables = None, {}
    for marker, start, end, filled in segments(data):
        if filled or end > len(data) or end < start + 4:
            return None
        segment = data[start + 4 : end]
        if marker == SOS:
            return _described(data, size, tables) if size else None
        if marker == _DQT:
            # Tables of 8 bits only: longer entries are rare, so Pillow may read them.
            if len(segment) % 65 or any(kind > 3 for kind in segment[::65]):
                return None
            for entry in range(0, len(segment), 65):
                tables[segment[entry]] = segment[entry + 1 : entry + 65]
        elif marker in _SOF and size is None and len(segment) >= 6:
            bits, height, width, components = struct.unpack_from(">BHHB", segment)
            if bits != 8 or components not in (1, 3) or not width or not height:
                return None
            size = width, height
        elif marker == _APP0:
            if not segment.startswith(b"JFIF\0"):
                return None
        elif marker not in (DHT, _DRI, COM):
            return None
    return None


def _described(data: bytes, size: tuple[int, int], tables: dict[int, bytes]) -> Header | None:
    try:
        height, width, space, chroma = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):
        return None
    if space not in PLAIN_SPACES or (width, height) != size:
        return None
    return Header(*size, chroma, tuple(tuple(sorted(tables[number])) for number in sorted(tables)))


MAX_SCANS = 100
"""Scans above which a JPEG is refused before it is decoded. Each scan covers the whole picture
again, so a small file could take a minute (decoders with a limit stop at 500). Encoders write about
ten.
"""

# Any marker except restart markers, which are inside the pixel data.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def count_scans(data: bytes) -> int:
    """Return an upper bound of the number of scans, or the exact number if the bound is more than
    `MAX_SCANS`.
    """
    total = data.count(b"\xff\xda")
    if total <= MAX_SCANS:
        return total
    return sum(marker == SOS for marker, *_ in lenient_segments(data))


def has_end(data: bytes) -> bool:
    """Return whether a JPEG has an end of image marker after its first start of scan. A JPEG
    without this marker is cut off.

    The two bytes of the marker cannot be among the pixels (T.81, B.1.1.5). A cut file may have the
    end marker of its thumbnail, before the scan.
    """
    end = data.rfind(b"\xff\xd9")
    if end < 0:
        return False
    scan = next((segment for segment in segments(data) if segment.marker == SOS), None)
    if scan is None:  # bytes between segments: search leniently
        start = next((at for marker, at, _ in lenient_segments(data) if marker == SOS), None)
        return start is not None and end > start
    return end > scan.start


def lenient_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of every segment up to the end of image. The data after a start of
    scan has the marker `PIXELS`. Bytes between two segments are skipped, as in libjpeg.
    """
    at = 2 if data.startswith(b"\xff\xd8") else len(data)
    while following := _MARKER.search(data, at):
        start = following.start()
        marker = data[start + 1]
        if marker == _EOI:
            yield marker, start, start + 2
            return
        if marker in (_TEM, _SOI):
            at = start + 2
            continue
        at = start + 2 + max(2, int.from_bytes(data[start + 2 : start + 4], "big"))
        yield marker, start, at
        if marker == SOS:
            following = _MARKER.search(data, at)
            start, at = at, following.start() if following else len(data)
            yield PIXELS, start, at


def unread_kind(data: bytes) -> str:
    """Name the kind of a JPEG that libjpeg does not decode, or decodes to wrong colors (a lossless
    JPEG does not state its color space). Returns "" for every other file.
    """
    for marker, start, _ in lenient_segments(data):
        if marker == SOS:
            break
        if marker in _UNREAD:
            return _UNREAD[marker]
        if marker in _FRAMES:
            return "12-bit JPEG" if data[start + 4 : start + 5] == b"\x0c" else ""
    return ""


def mended(data: bytes) -> bytes:
    """Return the JPEG with only the parts that its pixels need, so that a strict decoder reports
    only missing or damaged pixels.

    Metadata and bytes between segments are removed. JFIF version, Adobe transform and scan
    parameters are set to values of the standard. The meaning of the JFIF and Adobe segments for the
    colors is kept (libjpeg's rules).
    """
    parts, sequential, components = [b"\xff\xd8"], True, 3
    for marker, start, end in lenient_segments(data):
        segment = data[start:end]
        if marker in _FRAMES and len(segment) > 9:
            sequential, components = marker in (0xC0, 0xC1), segment[9]
        elif marker == _APP0:
            segment = _JFIF if segment[4:9] == b"JFIF\0" and len(segment) >= 16 else b""
        elif marker == _APP14:
            adobe = segment[4:9] == b"Adobe" and len(segment) >= 16
            # libjpeg treats an unknown transform as the usual one.
            usual = 1 if components == 3 else 2
            segment = _ADOBE + bytes([segment[15] if segment[15] <= 2 else usual]) if adobe else b""
        elif marker == SOS and sequential:
            segment = segment[:-3] + b"\0\x3f\0"
        elif marker not in (SOS, PIXELS, DHT, _DQT, _DRI, _DAC, _EOI):
            continue
        parts.append(segment)
    return b"".join(parts)


# The segments that define how three or four components make a color, without the other fields.
_JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
_ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"


# T.81 table K.1 (luma), which libjpeg scales by quality.
_LUMA = np.sort(np.array([
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
]))  # fmt: skip


def _luma_tables() -> np.ndarray:
    """Return the sorted luma tables of quality 1 to 100, int (100, 64), by libjpeg's
    `jpeg_quality_scaling`.
    """
    quality = np.arange(1, 101)
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return np.clip((_LUMA[None] * scale[:, None] + 50) // 100, 1, 255)


_TABLES = _luma_tables()


@lru_cache(maxsize=1024)  # a million files have a few hundred different tables
def describe_tables(tables: Tables) -> tuple[int, str]:
    """Return the libjpeg quality, 1 to 100, whose luma table is nearest to the first of `tables`,
    and a hash of all tables, 8 hex digits: equal for files of one encoder and quality. Without
    tables: 0 and "".
    """
    if not tables:
        return 0, ""
    quality = int(np.abs(_TABLES - np.array(tables[0], np.int64)).sum(axis=1).argmin()) + 1
    content = repr([list(table) for table in tables])
    return quality, hashlib.sha256(content.encode()).hexdigest()[:8]
