"""Read the size of the frames of an AVIF, and whether it is cropped. Pillow reads neither.

Main entry: `frame_pixels(data)` takes the bytes of an AVIF and returns the pixels of the largest
frame that a sequence header states, or 0 without any. The box `ispe`, which states the size of the
picture, may be wrong: a decoder scales a larger frame down (AV1, section 5.5; ISO 14496-12).
`is_cropped(data, size)` returns whether only a part of the picture of this (width, height) is to be
shown. Both raise `ValueError` for too many parts, and for parts that overlap.

`Boxes(data).inside(start, end, *path)` yields (start, end) of the content of each box at a path of
types (`b"meta"`, ...).
"""

import contextlib
import io
from collections.abc import Iterator

MAX_PARTS = 20_000
"""Boxes, items, their pieces and properties, and units of AV1 data that are read of one file."""


_TABLES = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
"""Path of the boxes that describe the pictures of a track."""


class Boxes:
    """Reads the boxes of a file (AVIF, HEIF, JPEG 2000), and counts them."""

    def __init__(self, data: bytes) -> None:
        self.data, self.left, self.bytes_left = data, MAX_PARTS, 2 * len(data)

    def count(self) -> None:
        """Count one part, and raise a `ValueError` if there are too many."""
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"a file of more than {MAX_PARTS:,} parts")

    def joined(self, pieces: list[tuple[int, int]]) -> bytes:
        """Return the bytes of all pieces (start, size), joined. A size of 0 means up to the end."""
        parts = []
        for start, size in pieces:
            parts.append(self.data[start : start + size] if size else self.data[start:])
            self.bytes_left -= len(parts[-1])
            if self.bytes_left < 0:
                raise ValueError("an AVIF whose pictures overlap")
        return b"".join(parts)

    def boxes(self, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
        """Yield (type, start of the content, end) of each box."""
        while start + 8 <= end:
            self.count()
            size, head = int.from_bytes(self.data[start : start + 4], "big"), 8
            if size == 1:
                size, head = int.from_bytes(self.data[start + 8 : start + 16], "big"), 16
            stop = end if size == 0 else min(start + size, end)
            if stop < start + head:
                return
            yield self.data[start + 4 : start + 8], start + head, stop
            start = stop

    def inside(self, start: int, end: int, *path: bytes) -> Iterator[tuple[int, int]]:
        """Yield (start of the content, end) of each box at a path of types."""
        for kind, at, stop in self.boxes(start, end):
            if kind == path[0] and len(path) == 1:
                yield at, stop
            elif kind == path[0]:
                yield from self.inside(at, stop, *path[1:])


def frame_pixels(data: bytes) -> int:
    """Return the pixels of the largest frame in any item or track of an AVIF; 0 if none is stated.

    Raises:
        ValueError: more than `MAX_PARTS` parts, or parts that overlap.
    """
    reader = Boxes(data)
    largest = 0
    for coded in (*_items(reader), *_first_samples(reader)):
        for content in _sequence_headers(reader, coded):
            with contextlib.suppress(EOFError):
                largest = max(largest, _pixels_of(_Bits(content)))
    return largest


def is_cropped(data: bytes, size: tuple[int, int]) -> bool:
    """Return whether a box `clap` (ISO 14496-12) shows a part of an AVIF of this (width, height).
    Only the `clap` of the shown picture counts: that of the first picture of an animation, or of
    the primary item, which may be a grid of other items.

    Raises:
        ValueError: more than `MAX_PARTS` parts.
    """
    reader = Boxes(data)
    is_animation = data[8:12] == b"avis"
    for at in _crops_of_tracks(reader) if is_animation else _crops_of_primary_item(reader):
        # Width and height are fractions. A part of the size of the picture crops nothing.
        sides = [int.from_bytes(data[n : n + 4], "big") for n in range(at, at + 16, 4)]
        if (sides[0], sides[2]) != (size[0] * sides[1], size[1] * sides[3]):
            return True
    return False


def _crops_of_tracks(reader: Boxes) -> Iterator[int]:
    """Yield the start of the content of each box `clap` of a track."""
    for table, stop in reader.inside(0, len(reader.data), *_TABLES, b"stsd"):
        for _, entry, entry_end in reader.boxes(table + 8, stop):
            for at, _ in reader.inside(entry + 78, entry_end, b"clap"):
                yield at


def _crops_of_primary_item(reader: Boxes) -> Iterator[int]:
    """Yield the start of the content of each box `clap` that the primary item has."""
    data = reader.data
    for meta, meta_end in reader.inside(0, len(data), b"meta"):
        primary = {
            int.from_bytes(data[at + 4 : min(end, at + (8 if data[at] else 6))], "big")
            for at, end in reader.inside(meta + 4, meta_end, b"pitm")
        }
        for properties, stop in reader.inside(meta + 4, meta_end, b"iprp"):
            used = set()
            for at, end in reader.inside(properties, stop, b"ipma"):
                with contextlib.suppress(EOFError):
                    for item, index in _associations(reader, io.BytesIO(data[at:end])):
                        if item in primary:
                            used.add(index)
            for first, last in reader.inside(properties, stop, b"ipco"):
                for index, (kind, at, _) in enumerate(reader.boxes(first, last), start=1):
                    if kind == b"clap" and index in used:
                        yield at


def _associations(reader: Boxes, box: io.BytesIO) -> Iterator[tuple[int, int]]:
    """Yield (number of the item, number of its property from 1 on) of a box `ipma`."""
    head = _number(box, 4)
    for _ in range(_number(box, 4)):
        reader.count()
        item = _number(box, 4 if head >> 24 else 2)
        for _ in range(_number(box, 1)):  # a number's highest bit is a flag
            reader.count()
            yield item, _number(box, 2) & 0x7FFF if head & 1 else _number(box, 1) & 0x7F


def _items(reader: Boxes) -> Iterator[bytes]:
    """Yield the AV1 data of each coded item: the picture, its tiles, its transparency."""
    data, whole = reader.data, len(reader.data)
    for meta, meta_end in reader.inside(0, whole, b"meta"):
        coded = set()
        for kind, at, end in _entries(reader, meta + 4, meta_end):
            wide = data[at : at + 1] >= b"\3"  # version 3: item numbers of 4 bytes
            if kind == b"infe" and data[at + 8 + 2 * wide : end][:4] == b"av01":
                coded.add(int.from_bytes(data[at + 4 : at + 6 + 2 * wide], "big"))
        inline, _ = next(reader.inside(meta + 4, meta_end, b"idat"), (whole, whole))
        for at, end in reader.inside(meta + 4, meta_end, b"iloc"):
            with contextlib.suppress(EOFError):
                for item, is_inline, extents in _locations(reader, io.BytesIO(data[at:end])):
                    if item in coded:
                        first = inline if is_inline else 0
                        yield reader.joined([(first + start, size) for start, size in extents])


def _entries(reader: Boxes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the entries of the list of items; their number has 2 or 4 bytes."""
    for at, stop in reader.inside(start, end, b"iinf"):
        yield from reader.boxes(at + (6 if reader.data[at : at + 1] == b"\0" else 8), stop)


def _locations(reader: Boxes, box: io.BytesIO) -> Iterator[tuple[int, bool, list[tuple[int, int]]]]:
    """Yield (number of the item, whether it is in the box `idat`, its pieces) of a box `iloc`."""
    version, sizes, more = _number(box, 4) >> 24, _number(box, 1), _number(box, 1)
    for _ in range(_number(box, 4 if version == 2 else 2)):
        reader.count()
        item = _number(box, 4 if version == 2 else 2)
        method = _number(box, 2) & 15 if version else 0
        _number(box, 2)  # data_reference_index, not used
        base, extents = _number(box, more >> 4), []
        for _ in range(_number(box, 2)):
            reader.count()  # limits the loop: a piece may take 0 bytes
            _number(box, more & 15 if version else 0)
            extents.append((base + _number(box, sizes >> 4), _number(box, sizes & 15)))
        yield item, method == 1, extents


def _first_samples(reader: Boxes) -> Iterator[bytes]:
    """Yield the AV1 data of the first picture of each track: the first of an animation is shown."""
    data = reader.data
    for table, end in reader.inside(0, len(data), *_TABLES):
        for kind, width in ((b"stco", 4), (b"co64", 8)):
            for at, _ in reader.inside(table, end, kind):
                start = int.from_bytes(data[at + 8 : at + 8 + width], "big")
                for sizes, _ in reader.inside(table, end, b"stsz"):
                    size = int.from_bytes(data[sizes + 4 : sizes + 8], "big")
                    size = size or int.from_bytes(data[sizes + 12 : sizes + 16], "big")
                    yield reader.joined([(start, size)])


def _number(stream: io.BytesIO, size: int) -> int:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return int.from_bytes(content, "big")


def _sequence_headers(reader: Boxes, coded: bytes) -> Iterator[bytes]:
    """Yield the start of each sequence header in AV1 data (section 5.3)."""
    at = 0
    while at < len(coded) and coded[at] < 128:  # the forbidden bit must be 0
        reader.count()
        first = coded[at]
        at += 2 if first & 4 else 1  # bit 4: a header extension
        size, shift = 0, 0
        while first & 2 and at < len(coded):  # LEB128 size
            size |= (coded[at] & 127) << shift
            shift += 7
            at += 1
            if coded[at - 1] < 128 or shift > 56:
                break
        end = at + size if first & 2 else len(coded)
        if first >> 3 == 1:
            yield coded[at : min(end, at + 512)]
        at = end


class _Bits:
    """Reads numbers of any count of bits."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def read(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise EOFError
        return self._value >> self._left & (1 << count) - 1


def _pixels_of(bits: _Bits) -> int:
    """Return the pixels of the largest frame that a sequence header allows (section 5.5.1)."""
    bits.read(4)  # profile, still picture
    if bits.read(1):  # reduced_still_picture_header
        bits.read(5)
    else:
        delays = _timing(bits)
        has_display_delay = bits.read(1)
        for _ in range(bits.read(5) + 1):
            bits.read(12)
            if bits.read(5) > 7:  # the level
                bits.read(1)
            if delays and bits.read(1):
                bits.read(2 * delays + 1)
            if has_display_delay and bits.read(1):
                bits.read(4)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    return (bits.read(width_bits) + 1) * (bits.read(height_bits) + 1)


def _timing(bits: _Bits) -> int:
    """Skip the timing of a sequence. Return the number of bits of a decoder's delay, 0 if not
    given.
    """
    if not bits.read(1):
        return 0
    bits.read(64)
    if bits.read(1):  # equal_picture_interval: a uvlc number follows
        zeros = 0
        while not bits.read(1):
            zeros += 1
        bits.read(zeros if zeros < 32 else 0)
    if not bits.read(1):
        return 0
    delays = bits.read(5) + 1
    bits.read(42)
    return delays
