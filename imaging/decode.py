"""Any image file in; bytes that every decoder reads alike, and the facts about them, out.

8-bit JPEG (gray or YCbCr), PNG and WebP keep their original bytes. Everything else that a person
may have (GIF, BMP, TIFF, AVIF, HEIC, 16-bit, CMYK, animated, odd) becomes an 8-bit RGB PNG,
losslessly from the decoded pixels, and the facts say so. Packing and prediction both go through
here, and no exception but `DecodeError` and `MemoryError` leaves it on a file's account.
"""

import contextlib
import io
import math
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image
from pillow_heif import register_heif_opener

from imaging import png
from imaging.budget import decoding
from imaging.jpeg import PLAIN_SPACES, Header, Tables, describe_tables, mended, read_header
from imaging.jpeg_pixels import (
    jpeg_pixels,
    odd_jpeg_pixels,
    refuse_damaged_cmyk,
    refuse_many_scans,
)
from imaging.orientation import UPRIGHT, carries_exif, orientation_left, orientation_of, upright
from imaging.quiet import silence_pillow, without_warnings
from imaging.rgb import PixelError, to_rgb

register_heif_opener()
silence_pillow()
Image.init()  # load every plugin now: `Image.open(formats=...)` looks names up in those loaded

IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .heic .heif .ico .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm "
    ".qoi .tga .tif .tiff .webp".split()
)
"""What the names of images end with; in a folder only these are looked at."""

MAX_PIXELS = 200_000_000
"""The largest picture a phone takes today (Samsung, 16,320 x 12,240). More is refused unread."""

MAX_BYTES = 512 * 2**20
"""A larger file is refused before it is read into memory."""

# Pillow looks at every header before it decodes, and raises past twice this.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2


# Everything Pillow may open, the common ones first. PostScript, PDF and formats that run other
# programs are left out.
READABLE = (
    "JPEG", "PNG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG2000",
    "PPM", "QOI", "TGA", "TIFF",
)  # fmt: skip

# Formats whose bytes may be kept.
_KEPT = ("JPEG", "PNG", "WEBP")

# 8-bit modes that Pillow and DALI turn into the same RGB values (docs/shards.md has the list).
_PLAIN_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}


class DecodeError(ValueError):
    """Bytes that are not the image they claim to be."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of an image from its own bytes; the columns of the same names in the index."""

    width: int
    height: int
    format: str
    chroma: str
    jpeg_quality: int
    jpeg_tables: str
    exif: bool
    orientation: int
    transcoded_from: str


@dataclass(frozen=True)
class Prepared:
    """The bytes to keep, their pixels (height, width, 3) uint8 RGB upright, and the facts."""

    data: bytes
    pixels: np.ndarray
    facts: Facts


def prepare(data: bytes) -> Prepared:
    """Decode `data` fully and describe it; see the module.

    Raises:
        DecodeError: not an image, damaged, or too large; the message is the reason.
    """
    with _boundary():
        if header := _plain_jpeg(data):
            with decoding(header.width * header.height):
                pixels, clean = jpeg_pixels(data)
            if clean:
                facts = _facts(pixels, "JPEG", header.chroma, header.tables)
                return Prepared(data, pixels, facts)
        with _opened(data) as image:
            name = _name_of(image)
            with decoding(image.width * image.height):
                pixels, orientation = _upright_pixels(image, name, data)
            exif = carries_exif(data, name) if name in _KEPT else "exif" in image.info
            tables: tuple[tuple[int, ...], ...] = ()
            chroma = transcoded_from = ""
            if orientation is None:
                data, name, orientation, transcoded_from = png_of(pixels), "PNG", UPRIGHT, name
            elif name == "JPEG":
                chroma, tables = simplejpeg.decode_jpeg_header(data)[3], _tables_of(image)
        facts = _facts(
            pixels,
            name,
            chroma,
            tables,
            exif=exif,
            orientation=orientation,
            transcoded_from=transcoded_from,
        )
        return Prepared(data, pixels, facts)


def _facts(
    pixels: np.ndarray,
    name: str,
    chroma: str,
    tables: Tables,
    *,
    exif: bool = False,
    orientation: int = 1,
    transcoded_from: str = "",
) -> Facts:
    height, width = pixels.shape[:2]
    quality, tables_hash = describe_tables(tables)
    return Facts(
        width=width,
        height=height,
        format=name,
        chroma=chroma,
        jpeg_quality=quality,
        jpeg_tables=tables_hash,
        exif=exif,
        orientation=orientation,
        transcoded_from=transcoded_from,
    )


def _plain_jpeg(data: bytes) -> Header | None:
    """The header of a JPEG that may stay as it is and needs no Pillow."""
    header = read_header(data) if len(data) <= MAX_BYTES else None
    if header and header.width * header.height <= MAX_PIXELS:
        refuse_many_scans(data)
        return header
    return None


def _tables_of(image: Image.Image) -> Tables:
    tables = getattr(image, "quantization", None) or {}
    return tuple(tuple(sorted(tables[number])) for number in sorted(tables))


def decode(data: bytes) -> np.ndarray:
    """The pixels of `prepare`, alone: (height, width, 3) uint8 RGB, upright.

    Raises:
        DecodeError: as `prepare`.
    """
    with decoded(data) as pixels:
        return pixels


@contextlib.contextmanager
def decoded(data: bytes) -> Iterator[np.ndarray]:
    """`decode` for threads: what the picture takes of the memory for decoding is held until the
    block ends, so that no more pictures are whole in memory than there is room for.
    """
    with contextlib.ExitStack() as held:
        with _boundary():
            pixels = _pixels_held(data, held)
        yield pixels


def _pixels_held(data: bytes, held: contextlib.ExitStack) -> np.ndarray:
    if header := _plain_jpeg(data):
        held.enter_context(decoding(header.width * header.height))
        return jpeg_pixels(data)[0]
    with _opened(data) as image:
        held.enter_context(decoding(image.width * image.height))
        return _upright_pixels(image, _name_of(image), data)[0]


def decode_image(data: bytes, image_format: str, orientation: int = UPRIGHT) -> np.ndarray:
    """The pixels of a member: (height, width, 3) uint8 RGB, upright by the index's `orientation`.

    This is the reference that every other decoder is held against: exact inverse DCT and smooth
    chroma upsampling for JPEG, alpha dropped. Never a scaled decode: it deletes the traces that a
    detector reads.

    Raises:
        DecodeError: truncated or damaged bytes, or not `image_format`.
    """
    with _boundary(image_format):
        return np.ascontiguousarray(upright(_member_pixels(data, image_format), orientation))


def _member_pixels(data: bytes, image_format: str) -> np.ndarray:
    """As they are stored."""
    if image_format == "JPEG":
        return jpeg_pixels(data)[0]
    with Image.open(_stream(data), formats=[image_format]) as image:
        image.load()
        image.info.pop("transparency", None)  # dropped anyway; Pillow would warn of it
        return to_rgb(image)


def _upright_pixels(image: Image.Image, name: str, data: bytes) -> tuple[np.ndarray, int | None]:
    """The pixels of an opened image, and its orientation if its bytes may stay; else None."""
    plain = _is_plain(image, name, data)
    if name in _KEPT:
        orientation = orientation_of(data, name)
        if plain and name == "JPEG":
            pixels, plain = jpeg_pixels(data)
        elif plain:
            pixels = _member_pixels(data, name)
        elif name == "JPEG" and image.mode != "CMYK":
            pixels = odd_jpeg_pixels(data)
        else:
            if name == "JPEG":
                refuse_damaged_cmyk(data)
            image.load()
            pixels = to_rgb(image)
    else:
        # Without `seek`: Pillow opens a file at its first picture, or at the primary one.
        image.load()
        pixels, orientation = to_rgb(image), orientation_left(image)
    pixels = np.ascontiguousarray(upright(pixels, orientation))
    return pixels, orientation if plain else None


def claimed_size(data: bytes) -> tuple[int, int] | None:
    """Width and height by the header of a JPEG or PNG; None where it has none that can be read."""
    if data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) >= 24:
        return struct.unpack_from(">2I", data, 16)
    if data.startswith(b"\xff\xd8"):
        try:
            height, width = simplejpeg.decode_jpeg_header(data, strict=False)[:2]
        except (ValueError, KeyError):  # simplejpeg knows no color -1
            return None
        return width, height
    return None


class Encoded(NamedTuple):
    """Bytes that every decoder reads alike; `width` and `height` are those of the upright image."""

    data: bytes
    format: str
    orientation: int
    width: int
    height: int


def as_is(data: bytes) -> Encoded | None:
    """The bytes themselves where every decoder reads them alike, by a look at the header; None
    where they have to be decoded by `decode`.

    Raises:
        DecodeError: as `prepare`, but for damage that only decoding finds.
    """
    with _boundary():
        if header := _plain_jpeg(data):
            return Encoded(data, "JPEG", UPRIGHT, header.width, header.height)
        with _opened(data) as image:
            name = _name_of(image)
            if not _is_plain(image, name, data):
                return None
            orientation = orientation_of(data, name)
            size = image.size if orientation < 5 else image.size[::-1]
            return Encoded(data, name, orientation, *size)


class ImageFile(NamedTuple):
    """An image somewhere: `read` gives the bytes of the file when they are wanted, in any thread,
    or raises `DecodeError` or `OSError`.
    """

    name: str
    read: Callable[[], bytes]


def read_file(path: Path | str) -> bytes:
    """The bytes of a file. What has no end (a pipe, a device) or is too large is not read.

    Raises:
        DecodeError: no plain file, or more than `MAX_BYTES`.
        OSError: it cannot be opened.
    """
    # A pipe without a writer would be waited for; the flag means nothing for files.
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(file, "rb", buffering=0) as stream:
        facts = os.fstat(file)
        if not stat.S_ISREG(facts.st_mode):
            raise DecodeError("not a plain file, but a pipe, a device or the like")
        if facts.st_size > MAX_BYTES:
            raise DecodeError(f"{facts.st_size:,} bytes, more than the limit of {MAX_BYTES:,}")
        return _read_to(stream, facts.st_size)


def _read_to(stream: io.RawIOBase, size: int) -> bytes:
    """All of a file of about `size` bytes, however much it has grown, up to the limit."""
    pieces, left = [], MAX_BYTES + 1
    while left and (piece := stream.read(min(left, max(size, 65536)))):
        pieces.append(piece)
        left -= len(piece)
    if not left:
        raise DecodeError(f"more than the limit of {MAX_BYTES:,} bytes")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@contextlib.contextmanager
def _boundary(name: str = "") -> Iterator[None]:
    """Whatever is raised on the account of a file leaves as one `DecodeError`; no warnings.

    Broad on purpose: plugins index, unpack and convert what a file says, and on hostile bytes they
    raise IndexError, KeyError, TypeError, struct.error, ZeroDivisionError, RecursionError and
    more, which no list of theirs names. A list of ours would end a run of a million files at the
    first that is missing from it. `MemoryError` is no verdict on the file and passes.
    """
    try:
        with without_warnings():
            yield
    except (DecodeError, MemoryError):
        raise
    except PixelError as error:
        raise DecodeError(str(error)) from error
    except Image.DecompressionBombError as error:
        count = re.search(r"\d{9,}", str(error))  # "Image size (221000000 pixels) exceeds ..."
        raise DecodeError(_too_large(int(count[0]) if count else MAX_PIXELS + 1)) from error
    except Exception as error:
        raise DecodeError(f"{name or 'image'} does not decode: {_in_words(error)}") from error


def _too_large(pixels: int) -> str:
    return (
        f"{math.ceil(pixels / 10**6):,} megapixels, more than the {MAX_PIXELS // 10**6} allowed; "
        "scale it down"
    )


_PYTHON = re.compile(r"<[\w.]+ object at 0x[0-9a-f]+>|\bb(?=['\"])")


def _in_words(error: Exception) -> str:
    """The message of a library as one line without Python's way of writing things."""
    said = " ".join(_PYTHON.sub("", str(error)).split())[:200]
    if said and isinstance(error, ValueError | OSError | SyntaxError | EOFError):
        return said
    return f"its parts contradict each other ({type(error).__name__})"


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image with its header read and nothing decoded; the size is checked here."""
    if len(data) > MAX_BYTES:
        raise DecodeError(f"{len(data):,} bytes, more than the limit of {MAX_BYTES:,}")
    if not data:
        raise DecodeError("empty file")
    with _open(data) as image:
        if image.width < 1 or image.height < 1:
            raise DecodeError(f"{image.width} x {image.height} pixels")
        if image.width * image.height > MAX_PIXELS:
            raise DecodeError(_too_large(image.width * image.height))
        with _boundary(_name_of(image)):
            yield image


_MENDED = "mended"
"""Among what Pillow knows of an image: that it opened the mended bytes only."""


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(_stream(data), formats=READABLE)
    except Image.DecompressionBombError:
        raise
    except Exception as error:  # see `_boundary`
        if data.startswith(b"\xff\xd8") and data[2:3]:
            with contextlib.suppress(Exception):
                image = Image.open(io.BytesIO(mended(data)), formats=["JPEG"])
                image.info[_MENDED] = True
                return image
        if isinstance(error, Image.UnidentifiedImageError):
            raise DecodeError(
                f"not an image this program reads (it begins with {_readable(data[:8])})"
            ) from error
        raise DecodeError(f"damaged header: {_in_words(error)}") from error


def _readable(data: bytes) -> str:
    """Bytes for a message: as text if they are some, else in hexadecimal."""
    text = data.decode("latin-1")
    return f'"{text}"' if text.isascii() and text.isprintable() else data.hex(" ")


def _stream(data: bytes) -> io.BytesIO:
    """What Pillow reads: of a PNG its pixels alone, since Pillow refuses the whole for the sake of
    a text that is damaged or large.
    """
    return io.BytesIO(png.essential(data) if data.startswith(png.SIGNATURE) else data)


def _name_of(image: Image.Image) -> str:
    """Its format; the first picture of a multi-picture file is a JPEG."""
    return "JPEG" if image.format == "MPO" else image.format or ""


def _is_plain(image: Image.Image, name: str, data: bytes) -> bool:
    """Whether the original bytes may stay: both decoders read them, and read the same."""
    if name == "JPEG":
        refuse_many_scans(data)
        if _MENDED in image.info:
            return False
        try:
            return simplejpeg.decode_jpeg_header(data)[2] in PLAIN_SPACES
        except (ValueError, KeyError):  # KeyError: as in `_jpeg_pixels`
            return False
    if image.mode not in _PLAIN_MODES:
        return False
    if name == "PNG":
        return png.is_plain(data)
    whole = int.from_bytes(data[4:8], "little") + 8 <= len(data)  # RIFF's length
    return name == "WEBP" and whole and getattr(image, "n_frames", 1) == 1


def png_of(pixels: np.ndarray) -> bytes:
    """(height, width, 3) uint8 RGB as the bytes of a PNG."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=6)
    return stream.getvalue()


GRID = 160
"""Pixels along each side of a grid: 5 for one of the thumbnail that is hashed (docs/log.md)."""


def green_grid(pixels: np.ndarray) -> np.ndarray:
    """(160, 160) uint8: green, the larger part of luma, of the pixels at the middles of as many
    cells of (height, width, 3) uint8 `pixels`. What `fingerprints` are made of.
    """
    rows, columns = (_middles(side) for side in pixels.shape[:2])
    # Whole rows first: what decoding has just written comes from memory, and in order.
    lines = pixels.reshape(len(pixels), -1).take(rows, axis=0, mode="clip")
    return lines.take(3 * columns + 1, axis=1, mode="clip")


@lru_cache(maxsize=256)
def _middles(side: int) -> np.ndarray:
    """The pixels in the middles of `GRID` equal parts of a side."""
    return (2 * np.arange(GRID) + 1) * side // (2 * GRID)


def fingerprints(grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """pHashes (n,) uint64, and (n, 16, 16) uint8 thumbnails, of (n, 160, 160) uint8 `grids`.

    The hash is the 8 x 8 lowest frequencies of the cosine transform of a 32 x 32 thumbnail, each
    against their median (Zauner, "Implementation and Benchmarking of Perceptual Image Hash
    Functions", 2010); all whole numbers, so that every machine finds the same bits. Many images at
    once, because one by one they cost ten times as much.
    """
    if not len(grids):
        return np.empty(0, np.uint64), np.empty((0, 16, 16), np.uint8)
    column = Image.fromarray(grids.reshape(-1, GRID)).reduce(GRID // 32)
    small = np.asarray(column, np.float64).reshape(-1, 32, 32)
    low = (_COSINES @ small @ _COSINES.T).reshape(-1, 64)
    median = np.partition(low, (31, 32), axis=1)[:, 31:33].mean(axis=1, keepdims=True)
    bits = np.packbits(low > median, axis=1)
    thumbnails = np.asarray(column.reduce(2)).reshape(-1, 16, 16)
    return bits.view(">u8")[:, 0].astype(np.uint64), thumbnails


_COSINES = np.rint(4096 * np.cos(np.pi * np.outer(np.arange(8), np.arange(32) + 0.5) / 32))
