"""Any image file in; bytes that every decoder reads alike, and the facts about them, out.

8-bit JPEG (gray or YCbCr), PNG and WebP keep their original bytes. Everything else that a person
may have (GIF, BMP, TIFF, AVIF, HEIC, 16-bit, CMYK, animated) becomes an 8-bit RGB PNG, losslessly
from the decoded pixels, and the facts say so. Packing and prediction both go through `prepare`.
"""

import contextlib
import io
import os
import stat
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps
from pillow_heif import register_heif_opener

from imaging.jpeg import PLAIN_SPACES, Header, Tables, describe_tables, read_header

register_heif_opener()
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
    if header := _plain_jpeg(data):
        pixels = decode_image(data, "JPEG")
        facts = _facts(pixels, "JPEG", header.chroma, header.tables)
        return Prepared(data, pixels, facts)
    with _opened(data) as image:
        name, orientation = _name_of(image), _orientation(image, data)
        if _is_plain(image, name, data):
            pixels, transcoded_from = decode_image(data, name, orientation), ""
        else:
            pixels = _eight_bit_rgb(image)
            data, name, orientation, transcoded_from = _png(pixels), "PNG", 1, name
    chroma = simplejpeg.decode_jpeg_header(data)[3] if name == "JPEG" else ""
    tables = _tables_of(image) if name == "JPEG" else ()
    facts = _facts(
        pixels,
        name,
        chroma,
        tables,
        exif="exif" in image.info,
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
    return header if header and header.width * header.height <= MAX_PIXELS else None


def _tables_of(image: Image.Image) -> Tables:
    tables = getattr(image, "quantization", None) or {}
    return tuple(tuple(sorted(tables[number])) for number in sorted(tables))


def decode(data: bytes) -> np.ndarray:
    """The pixels of `prepare`, alone: (height, width, 3) uint8 RGB, upright.

    Raises:
        DecodeError: as `prepare`.
    """
    if _plain_jpeg(data):
        return decode_image(data, "JPEG")
    with _opened(data) as image:
        name = _name_of(image)
        if _is_plain(image, name, data):
            return decode_image(data, name, _orientation(image, data))
        return _eight_bit_rgb(image)


def decode_image(data: bytes, image_format: str, orientation: int = 1) -> np.ndarray:
    """The pixels of a member: (height, width, 3) uint8 RGB, upright.

    This is the reference that every other decoder is held against: exact inverse DCT and smooth
    chroma upsampling for JPEG, alpha dropped, EXIF orientation applied. Never a scaled decode: it
    deletes the traces that a detector reads.

    Raises:
        DecodeError: truncated or damaged bytes, or not `image_format`.
    """
    try:
        if image_format == "JPEG":
            pixels = simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False, strict=True)
            return np.ascontiguousarray(_upright(pixels, orientation))
        with Image.open(io.BytesIO(data), formats=[image_format]) as image:
            image.load()
            image.info.pop("transparency", None)  # dropped anyway; Pillow would warn of it
            # Orientation comes from the index for every format, so that EXIF is parsed once.
            return np.ascontiguousarray(_upright(np.asarray(image.convert("RGB")), orientation))
    except (ValueError, OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DecodeError(f"{image_format} does not decode: {error}") from error


def exif_orientation(image: Image.Image) -> int:
    """EXIF orientation of an opened image, 1 to 8; what is absent or nonsense counts as 1."""
    if image.format == "JPEG" and not image.info.keys() & {"exif", "xmp"}:
        return 1  # parsing nothing costs as much as a twentieth of the decode
    try:
        value = image.getexif().get(0x0112, 1)
    except (ValueError, OSError, SyntaxError, KeyError, TypeError):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (JEITA CP-3451, tag 0x0112): transpose, then mirror the axes."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


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


def encoded(data: bytes) -> Encoded:
    """The bytes of `prepare`, alone: what is plain is not decoded, only its header is read.

    Raises:
        DecodeError: as `prepare`, but for damage that only decoding finds.
    """
    if header := _plain_jpeg(data):
        return Encoded(data, "JPEG", 1, header.width, header.height)
    with _opened(data) as image:
        name, orientation = _name_of(image), _orientation(image, data)
        if _is_plain(image, name, data):
            size = image.size if orientation < 5 else image.size[::-1]
            return Encoded(data, name, orientation, *size)
        pixels = _eight_bit_rgb(image)
    return Encoded(_png(pixels), "PNG", 1, pixels.shape[1], pixels.shape[0])


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
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image with its header read; Pillow's warnings are silent until the block ends."""
    if len(data) > MAX_BYTES:
        raise DecodeError(f"{len(data):,} bytes, more than the limit of {MAX_BYTES:,}")
    # Pillow warns where we decide: size has its own limit, odd metadata does not matter.
    with without_warnings():
        yield _open(data)


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF orientation. Pillow decodes a whole PNG in search of one behind the pixels, so it is
    asked only where some bytes look like one.
    """
    if image.format == "PNG" and not any(mark in data for mark in _ORIENTED):
        return 1
    return exif_orientation(image)


_ORIENTED = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")


_silence = threading.Lock()
_silent: list[warnings.catch_warnings] = []  # what was caught first, then one for each block inside


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """No warnings until the block ends, in any number of threads: `catch_warnings` alone, entered
    and left by several in no order, leaves the filters of one of them behind.
    """
    with _silence:
        if not _silent:
            _silent.append(warnings.catch_warnings())
            _silent[0].__enter__()
            warnings.simplefilter("ignore")
        _silent.append(_silent[0])
    try:
        yield
    finally:
        with _silence:
            _silent.pop()
            if len(_silent) == 1:
                _silent.pop().__exit__(None, None, None)


def _name_of(image: Image.Image) -> str:
    """Its format; the first picture of a multi-picture file is a JPEG."""
    return "JPEG" if image.format == "MPO" else image.format


def _open(data: bytes) -> Image.Image:
    """The image with its header read and nothing decoded; the size is checked here."""
    if not data:
        raise DecodeError("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=READABLE)
    except Image.DecompressionBombError as error:
        raise DecodeError(f"more than {MAX_PIXELS:,} pixels: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise DecodeError(f"not an image this program reads (it begins {data[:8]!r})") from error
    except Exception as error:  # Pillow's plugins raise almost anything on hostile headers
        raise DecodeError(f"damaged header: {type(error).__name__}: {error}") from error
    if image.width < 1 or image.height < 1:
        raise DecodeError(f"{image.width} x {image.height} pixels")
    return image


def _is_plain(image: Image.Image, name: str, data: bytes) -> bool:
    """Whether the original bytes may stay: both decoders read them, and read the same."""
    if name == "JPEG":
        try:
            return simplejpeg.decode_jpeg_header(data)[2] in PLAIN_SPACES
        except (ValueError, KeyError) as error:  # KeyError: no color space before the data ends
            raise DecodeError(f"JPEG does not decode: {error}") from error
    if getattr(image, "n_frames", 1) > 1:
        return False
    if name == "PNG":
        return image.mode in _PLAIN_MODES and data[24] <= 8  # byte 24 is IHDR's bit depth
    return name == "WEBP" and image.mode in _PLAIN_MODES


def _eight_bit_rgb(image: Image.Image) -> np.ndarray:
    """The first frame as upright 8-bit RGB."""
    try:
        image.seek(0)
        image.load()
        # After loading, because some plugins (TIFF, HEIF) turn the image themselves then.
        image = ImageOps.exif_transpose(image)
        return np.array(_from_deep(image) if image.mode[0] in "IF" else image.convert("RGB"))
    except Exception as error:  # as in _open: a plugin may raise anything
        raise DecodeError(f"{image.format} does not decode: {error}") from error


def _from_deep(image: Image.Image) -> Image.Image:
    """16-bit gray by its full range, 32-bit float by its own; `convert` would clip both at 255."""
    values = np.asarray(image, np.float64)
    low, high = (0.0, 65535.0) if image.mode[0] == "I" else (min(0.0, values.min()), values.max())
    scaled = np.rint((values - low) * (255.0 / max(high - low, 1e-12)))
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert("RGB")


def _png(pixels: np.ndarray) -> bytes:
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
