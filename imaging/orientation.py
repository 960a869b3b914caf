"""Find the orientation of an image (1 to 8, as in EXIF) and make its pixels upright.

Main entries: `orientation_of(data, image_format)` takes the bytes of a file and its format, "JPEG",
"PNG" or "WEBP" (else KeyError). It returns the orientation that EXIF, else XMP, states, and 1
(upright) if none is valid; damaged bytes raise no error. `upright(pixels, orientation)` takes
pixels, an array (height, width, channels) of any dtype, and an orientation, and returns the pixels
rotated and mirrored, as a NumPy view; `upright_copy()` returns them in C order. Only this module
reads the orientation.

`orientation_left(image)` is for all other formats: it takes an image opened by Pillow and returns
the orientation that Pillow has not applied when decoding. `carries_exif(data, image_format)`
returns whether a JPEG, PNG or WebP has EXIF data. An orientation is undone in two steps: first,
rows and columns are exchanged if `is_transposed(orientation)` is true; then `mirrored(orientation)`
returns two bools, whether to reverse the order of the rows, and of the columns.

`webp_chunks(data)` yields the four letters of each chunk of a WebP, and where its content starts
and ends.
"""

import re
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image

from imaging import jpeg, png

UPRIGHT = 1

_TAG = 0x0112

# An attribute or an element of any XMP packet, in single or double quotes.
_XMP = re.compile(rb"""tiff:Orientation(?:\s*=\s*["']|\s*>\s*)([1-8])\b""")


def orientation_of(data: bytes, image_format: str) -> int:
    """Read the orientation, 1 to 8 (JEITA CP-3451, tag 0x0112), of a JPEG, PNG or WEBP: from EXIF
    (in a PNG also from ImageMagick's raw profile), else from XMP. A missing or invalid value counts
    as 1.
    """
    by_xmp = None
    for kind, content in _METADATA[image_format](data):
        if kind == "exif":
            if by_exif := _of_exif(content):
                return by_exif
        else:
            by_xmp = by_xmp or _of_xmp(content)
    return by_xmp or UPRIGHT


def carries_exif(data: bytes, image_format: str) -> bool:
    """Return whether a JPEG, PNG or WEBP has EXIF data, valid or not."""
    return any(kind == "exif" for kind, _ in _METADATA[image_format](data))


def orientation_left(image: Image.Image) -> int:
    """Return the orientation still to be applied, 1 to 8, after Pillow has decoded an image of any
    other format. Some of Pillow's plugins (TIFF, HEIF) have applied it already. In an AVIF only its
    own boxes count. Pillow states them as EXIF, but would read XMP, too.
    """
    if image.format == "AVIF":
        return _of_exif(image.info.get("exif", b"")) or UPRIGHT
    stated = image.getexif().get(_TAG)
    return stated if isinstance(stated, int) and 1 <= stated <= 8 else UPRIGHT


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an orientation of (height, width, channels) pixels: transpose, then mirror the axes.
    Returns a NumPy view, not a copy. An axis of one pixel is not reversed: it would keep a negative
    stride in every array that NumPy calls contiguous, and torch refuses such an array.
    """
    if is_transposed(orientation):
        pixels = pixels.swapaxes(0, 1)
    rows, columns = mirrored(orientation)
    height, width = pixels.shape[:2]
    return pixels[:: -1 if rows and height > 1 else 1, :: -1 if columns and width > 1 else 1]


def upright_copy(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return `upright(pixels, orientation)` as an array in C order: the pixels themselves if they
    are one already, else a copy.

    NumPy would copy each pixel by itself. One channel of a tile at a time takes a third of that, as
    a tile of both arrays fits into the cache.
    """
    turned = upright(pixels, orientation)
    if turned.flags.c_contiguous:
        return turned
    copy = np.empty(turned.shape, turned.dtype)
    height, width, channels = turned.shape
    for top in range(0, height, TILE_PX):
        for left in range(0, width, TILE_PX):
            tile = np.s_[top : top + TILE_PX, left : left + TILE_PX]
            for channel in range(channels):
                copy[*tile, channel] = turned[*tile, channel]
    return copy


TILE_PX = 128
"""Side of the tiles that `upright_copy` copies, in pixels."""


def is_transposed(orientation: int) -> bool:
    """Return whether rows and columns are exchanged first."""
    return orientation >= 5


def mirrored(orientation: int) -> tuple[bool, bool]:
    """Return whether the order of the rows, and of the columns, is reversed after the exchange."""
    return orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)


# --- metadata that may state the orientation ------------------------------------------------------


def _in_jpeg(data: bytes) -> Iterator[tuple[str, bytes]]:
    for marker, start, end in jpeg.lenient_segments(data):
        if marker == jpeg.SOS:
            return
        if marker == jpeg.APP1:
            yield from _exif_or_xmp(data[start + 4 : end])


def _exif_or_xmp(content: bytes) -> Iterator[tuple[str, bytes]]:
    if content.startswith(b"Exif\0"):
        yield "exif", content
    elif content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
        yield "xmp", content


_PNG_TEXTS = (
    "XML:com.adobe.xmp", "Raw profile type exif", "Raw profile type APP1", "Raw profile type xmp",
)  # fmt: skip


def _in_png(data: bytes) -> Iterator[tuple[str, bytes]]:
    if not any(mark in data for mark in (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")):
        return
    for kind, start, end in png.chunks(data):
        if kind == b"eXIf":
            yield "exif", data[start + 8 : end - 4]
    for keyword, content in png.texts(data, _PNG_TEXTS):
        if keyword == "XML:com.adobe.xmp":
            yield "xmp", content
        elif keyword in ("Raw profile type exif", "Raw profile type APP1"):
            yield from _exif_or_xmp(_of_hex(content))
        elif keyword == "Raw profile type xmp":
            yield "xmp", _of_hex(content)


def _of_hex(profile: bytes) -> bytes:
    """Decode ImageMagick's profile format: the profile's name, its length, and its bytes in
    hexadecimal.
    """
    try:
        return bytes.fromhex(b"".join(profile.split()[2:]).decode("ascii"))
    except ValueError:
        return b""


def _in_webp(data: bytes) -> Iterator[tuple[str, bytes]]:
    for kind, start, end in webp_chunks(data):
        if kind == b"EXIF":
            yield "exif", data[start:end]
        elif kind == b"XMP ":
            yield "xmp", data[start:end]


def webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (four letters, start, end) of the content of each chunk of a WebP; a cut one ends after
    the data.
    """
    at = 12  # behind "RIFF", the length and "WEBP"
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        yield data[at : at + 4], at + 8, at + 8 + size
        at += 8 + size + size % 2


_METADATA = {"JPEG": _in_jpeg, "PNG": _in_png, "WEBP": _in_webp}


def _of_exif(content: bytes) -> int | None:
    """Read the tag from the first directory of EXIF data (TIFF 6.0, section 2), with or without the
    prefix "Exif".
    """
    tiff = content[6:] if content.startswith(b"Exif\0") else content
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (first,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, first)
        for entry in range(entries):
            tag, kind, count = struct.unpack_from(order + "HHI", tiff, first + 2 + 12 * entry)
            if tag == _TAG and count == 1 and kind in _INTEGERS:
                at = first + 10 + 12 * entry
                (stated,) = struct.unpack_from(order + _INTEGERS[kind], tiff, at)
                return stated if 1 <= stated <= 8 else None
    except (struct.error, TypeError):  # TypeError: no byte order
        return None
    return None


_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}
"""Integer types of TIFF, as struct format characters."""


def _of_xmp(content: bytes) -> int | None:
    stated = _XMP.search(content)
    return int(stated[1]) if stated else None
