"""The chunks of a PNG, without decoding it (W3C, Portable Network Graphics, third edition).

Metadata never decides whether pixels are read: the pixels are decoded from `essential` bytes.
"""

import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"

MAX_TEXT_BYTES = 2**24
"""Of a compressed text no more is read."""

_CRITICAL = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
"""What the pixels are made of."""

_HARMLESS = {
    *_CRITICAL,
    b"bKGD", b"cHRM", b"eXIf", b"gAMA", b"hIST", b"iCCP", b"iTXt", b"oFFs", b"pHYs", b"sBIT",
    b"sRGB", b"tEXt", b"tIME", b"vpAg", b"zTXt", b"caBX", b"dSIG", b"sTER",
}  # fmt: skip
"""Chunks beside which every decoder shows the same picture; an animation's are not among them."""


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each chunk, with its length and checksum, up to the end of image, or
    to the first chunk that is not whole. Its content is `data[start + 8 : end - 4]`.
    """
    at = len(SIGNATURE) if data.startswith(SIGNATURE) else len(data)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            return
        kind = data[at + 4 : at + 8]
        yield kind, at, end
        if kind == b"IEND":
            return
        at = end


def essential(data: bytes) -> bytes:
    """The PNG with nothing but its pixels; of an animation its still picture. The last chunk of a
    file that is cut off stays as it is.

    Raises:
        ValueError: its colors come from a palette, and there is none.
    """
    parts, last = [SIGNATURE], len(SIGNATURE)
    for kind, start, end in chunks(data):
        if kind in _CRITICAL:
            parts.append(data[start:end])
        last = end
    if data[last + 4 : last + 8] in _CRITICAL:
        parts.append(data[last:])
    if data[25:26] == b"\3" and not any(part[4:8] == b"PLTE" for part in parts):  # IHDR: indexed
        raise ValueError("its palette is missing")
    return b"".join(parts)


def is_plain(data: bytes) -> bool:
    """Whether every decoder reads the same from it: at most 8 bits, no animation, and not a chunk
    that is unknown, damaged or cut off.
    """
    last = b""
    for kind, start, end in chunks(data):
        content = memoryview(data)[start + 4 : end - 4]
        if kind not in _HARMLESS or zlib.crc32(content) != int.from_bytes(
            data[end - 4 : end], "big"
        ):
            return False
        last = kind
    return last == b"IEND" and data[12:16] == b"IHDR" and data[24] <= 8  # IHDR's bit depth


def texts(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Keyword and content of every text chunk; what does not unpack is passed over."""
    for kind, start, end in chunks(data):
        keyword, _, rest = data[start + 8 : end - 4].partition(b"\0")
        if kind == b"tEXt":
            content = rest
        elif kind == b"zTXt":
            content = _unpacked(rest[1:])
        elif kind == b"iTXt" and len(rest) >= 2:
            packed, text = rest[0], rest[2:].split(b"\0", 2)
            content = _unpacked(text[-1]) if packed else text[-1]
        else:
            continue
        if content is not None:
            yield keyword.decode("latin-1"), content


def _unpacked(data: bytes) -> bytes | None:
    try:
        return zlib.decompressobj().decompress(data, MAX_TEXT_BYTES)
    except zlib.error:
        return None
