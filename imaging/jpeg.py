"""What the header of a JPEG says, without decoding it (ITU-T T.81 annex B)."""

import hashlib
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import simplejpeg

Tables = tuple[tuple[int, ...], ...]
"""Quantization tables by rising number, the 64 values of each sorted: Pillow's order of them
(zigzag or natural) has changed between versions."""


CHROMAS = ("420", "422", "444", "Gray")
"""Chroma subsamplings that are written: as simplejpeg names them."""

PLAIN_SPACES = {"YCbCr", "Gray"}
"""Color spaces of JPEGs that every decoder turns into the same RGB values."""


class Header(NamedTuple):
    """The size in pixels as stored, the chroma subsampling (420, 422, 444, ..., Gray), and the
    quantization tables.
    """

    width: int
    height: int
    chroma: str
    tables: Tables


_SOF, _DHT, _SOS, _DQT, _DRI, _COM = (0xC0, 0xC1, 0xC2), 0xC4, 0xDA, 0xDB, 0xDD, 0xFE
_APP0 = 0xE0


class Segment(NamedTuple):
    """One segment of a JPEG: `data[start:end]` with its marker and length of four bytes. `filled`
    says that fill bytes lie before it. In a cut or damaged file `end` may be anything.
    """

    marker: int
    start: int
    end: int
    filled: bool


def segments(data: bytes) -> Iterator[Segment]:
    """The segments of a JPEG from its beginning up to the first that leads nowhere (T.81, B.1.1.4);
    what follows a start of scan is no segment, so callers stop there.
    """
    at = 2 if data.startswith(b"\xff\xd8") else len(data)
    while data[at : at + 1] == b"\xff":
        first = at
        while data[at + 1 : at + 2] == b"\xff":  # any number of them may fill the gap
            at += 1
        if at + 2 > len(data):
            return
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield Segment(data[at + 1], at, end, at > first)
        if end < at + 4:
            return
        at = end


def before_scan(data: bytes) -> bytes:
    """The segments of a JPEG up to the first of its pixels; without any, all of `data`."""
    scan = next((segment for segment in segments(data) if segment.marker == _SOS), None)
    return data[: scan.start] if scan else data


def read_header(data: bytes) -> Header | None:
    """The header of a JPEG in which there is nothing to interpret: 8 bits, YCbCr or gray, no
    metadata but JFIF and comments. None for every other, and for whatever looks odd: Pillow reads
    all of them, or refuses them, at several times the cost.
    """
    size, tables = None, {}
    for marker, start, end, filled in segments(data):
        if filled or end > len(data) or end < start + 4:
            return None
        segment = data[start + 4 : end]
        if marker == _SOS:
            return _described(data, size, tables) if size else None
        if marker == _DQT:
            # 8 bits each; longer entries are rare enough for Pillow
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
        elif marker not in (_DHT, _DRI, _COM):
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


# T.81 table K.1 (luma), the base that libjpeg scales by quality.
_LUMA = np.sort(np.array([
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
]))  # fmt: skip


def _luma_tables() -> np.ndarray:
    """(100, 64): the sorted luma table at quality 1 to 100, by libjpeg's `jpeg_quality_scaling`."""
    quality = np.arange(1, 101)
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return np.clip((_LUMA[None] * scale[:, None] + 50) // 100, 1, 255)


_TABLES = _luma_tables()


@lru_cache(maxsize=1024)  # a million files have a few hundred different tables
def describe_tables(tables: Tables) -> tuple[int, str]:
    """The libjpeg quality (1 to 100) whose luma table is nearest to the first of `tables`, and all
    of them as 8 hex digits: equal for files of one encoder and quality. 0 and empty without tables.
    """
    if not tables:
        return 0, ""
    quality = int(np.abs(_TABLES - np.array(tables[0], np.int64)).sum(axis=1).argmin()) + 1
    content = repr([list(table) for table in tables])
    return quality, hashlib.sha256(content.encode()).hexdigest()[:8]
