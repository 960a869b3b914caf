"""Read the chunks of a PNG, given its bytes, without decoding it (W3C, PNG, third edition).

Main entries, which take `data`, the bytes of a PNG file:

- `chunks(data)` yields (kind, start, end) of each whole chunk. `kind` is its type, such as b"IDAT".
  `data[start:end]` is the whole chunk, `data[start + 8 : end - 4]` its content. It stops after the
  chunk IEND or before the first incomplete chunk. It yields nothing for bytes that are no PNG.
- `essential(data)` returns the bytes of the PNG with only the chunks of its pixels, without
  metadata and animation. Pixels are decoded from these bytes, so that bad metadata does no harm. It
  raises `ValueError` if the image needs a palette and has none.
- `is_plain(data)` returns True if every decoder reads the same pixels: at most 8 bits per sample,
  not animated, no unknown, damaged or incomplete chunk.
- `texts(data, wanted)` yields (keyword, content) of each text chunk whose keyword (text) is in
  `wanted`: a str, and bytes as in the file. These are UTF-8 in a chunk iTXt, else Latin-1. The pair
  does not say which encoding it is; the caller must know it from the keyword. Compressed content is
  unpacked, at most `MAX_TEXT_BYTES` of it in the whole file; a chunk that cannot be unpacked is
  skipped.
"""

import zlib
from collections.abc import Container, Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"

MAX_TEXT_BYTES = 2**22
"""Bytes that are unpacked at most from all wanted text chunks of a file together. A thousand small
chunks could fill the memory otherwise.
"""

_CRITICAL = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
"""Chunks that are needed to decode the pixels."""

_HARMLESS = {
    *_CRITICAL,
    b"bKGD", b"cHRM", b"eXIf", b"gAMA", b"hIST", b"iCCP", b"iTXt", b"oFFs", b"pHYs", b"sBIT",
    b"sRGB", b"tEXt", b"tIME", b"vpAg", b"zTXt", b"caBX", b"dSIG", b"sTER",
}  # fmt: skip
"""Chunks with which every decoder still shows the same picture. Chunks of an animation are not
included.
"""


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, end) of each chunk, including its length and checksum, up to the end of
    image or the first incomplete chunk. The content of a chunk is `data[start + 8 : end - 4]`.
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
    """Return the PNG with only the chunks of its pixels; for an animation, those of its still
    picture. An incomplete last chunk is kept.

    Raises:
        ValueError: the colors need a palette, but there is none.
    """
    parts, last = [SIGNATURE], len(SIGNATURE)
    for kind, start, end in chunks(data):
        if kind in _CRITICAL:
            parts.append(data[start:end])
        last = end
    if data[last + 4 : last + 8] in _CRITICAL:
        parts.append(data[last:])
    if data[25:26] == b"\3" and not any(part[4:8] == b"PLTE" for part in parts):  # indexed
        raise ValueError("its palette is missing")
    return b"".join(parts)


def is_plain(data: bytes) -> bool:
    """Return whether every decoder reads the same pixels: at most 8 bits, no animation, and no
    unknown, damaged or incomplete chunk.
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


def texts(data: bytes, wanted: Container[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (keyword, content) of the text chunks with a keyword in `wanted`. A chunk is skipped if
    it cannot be unpacked, or no bytes of `MAX_TEXT_BYTES` are left for it.
    """
    left = MAX_TEXT_BYTES
    for kind, start, end in chunks(data):
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            continue
        latin, _, rest = data[start + 8 : end - 4].partition(b"\0")
        keyword, content = latin.decode("latin-1"), None
        if keyword not in wanted:
            continue
        if kind == b"tEXt":
            content = rest
        elif kind == b"zTXt":
            content = _unpacked(rest[1:], left)
            left -= len(content or b"")
        elif kind == b"iTXt" and len(rest) >= 2:
            packed, text = rest[0], rest[2:].split(b"\0", 2)
            content = _unpacked(text[-1], left) if packed else text[-1]
            left -= len(content or b"") if packed else 0
        if content is not None:
            yield keyword, content


def _unpacked(data: bytes, most: int) -> bytes | None:
    if not most:
        return None
    try:
        return zlib.decompressobj().decompress(data, most)
    except zlib.error:
        return None
