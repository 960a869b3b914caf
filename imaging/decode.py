"""Decode the bytes of an image file of any usual format to upright 8-bit RGB pixels.

Main entry: `decode(data)` takes the bytes of a file and returns pixels, uint8 (height, width, 3).
`decoded(data)` yields them in a `with` block that reserves memory. `prepare(data)` returns a
`Prepared`: `pixels`, `facts` (size, ...) and `data`, the bytes to pack (an RGB PNG unless it is a
plain JPEG, PNG or WebP). `as_is(data)` returns an `Encoded` (bytes, format, orientation, size), or
None if decoders may differ. `decode_image(data, image_format, orientation)` returns the pixels of
packed bytes ("JPEG", "PNG" or "WEBP"; EXIF orientation 1 to 8). All raise `DecodeError` for damage
(`as_is()`: of the header) or another format, all but `decode_image()` also above `MAX_BYTES` or
`MAX_PIXELS`. `ImageFile(name, read)`: `read()` gives bytes.
"""

import contextlib
import io
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, TiffImagePlugin
from pillow_heif import register_heif_opener

from imaging import png
from imaging.av1 import frame_pixels, is_cropped
from imaging.budget import decoding
from imaging.jpeg import PLAIN_SPACES, Header, Tables, describe_tables, mended, read_header
from imaging.jpeg_pixels import (
    jpeg_pixels,
    odd_jpeg_pixels,
    refuse_damaged_cmyk,
    refuse_many_scans,
)
from imaging.orientation import (
    UPRIGHT,
    carries_exif,
    is_transposed,
    orientation_left,
    orientation_of,
    upright_copy,
)
from imaging.quiet import silence_pillow, without_warnings
from imaging.rgb import PixelError, to_rgb
from imaging.signature import is_cut_off, unread_kind, why_not_opened
from storage import RefusedFileError, read_plain

register_heif_opener()
silence_pillow()
Image.init()  # load every plugin now: `Image.open(formats=...)` knows only loaded ones

IMAGE_SUFFIXES = frozenset(
    ".apng .avif .avifs .bmp .dib .gif .heic .heics .heif .heifs .hif .j2c .j2k .jfif .jp2 .jpc "
    ".jpe .jpeg .jpf .jpg .jpx .mpo .pbm .pgm .png .pnm .ppm .qoi .tga .tif .tiff .webp".split()
)
"""File name suffixes of images. In a folder, other files are not opened."""

MAX_PIXELS = 200_000_000
"""Pixels of the largest phone picture (Samsung, 16,320 x 12,240). More are refused undecoded."""

MAX_SLOW_PIXELS = 8_000_000
"""Largest number of pixels of a format whose decoder is written in Python (RLE BMP, QOI, PPM of
unusual depth). Such decoders take up to 1.6 seconds per megapixel."""

MAX_BYTES = 512 * 2**20
"""Bytes above which a file is refused before it is read into memory."""

# Pillow raises an error at a header of more than twice this many pixels.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2


# Formats that Pillow may open. PostScript, PDF and formats that run other programs are excluded,
# and icons (ICO), which Pillow decodes while it opens them, before their size can be refused.
READABLE = (
    "JPEG", "PNG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG2000",
    "PPM", "QOI", "TGA", "TIFF",
)  # fmt: skip

# Formats whose bytes are packed unchanged.
_KEPT = ("JPEG", "PNG", "WEBP")

# 8-bit modes that Pillow and DALI turn into the same RGB values (docs/shards.md has the list).
_PLAIN_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}


class DecodeError(ValueError):
    """Bytes that are not a readable image; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about an image from its own bytes; the index has columns of the same names.

    `width` and `height` are of the upright image. `format` is that of the kept bytes,
    `transcoded_from` the original one if converted. `chroma` (420, ..., Gray), `jpeg_quality` (1 to
    100) and `jpeg_tables` (a hash) are empty or 0 unless JPEG. `orientation` is EXIF's 1 to 8.
    """

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
    """Bytes to keep, their upright pixels, uint8 (height, width, 3) RGB, and the facts."""

    data: bytes
    pixels: np.ndarray
    facts: Facts


def prepare(data: bytes) -> Prepared:
    """Decode `data` fully, describe it, and convert it to PNG if its bytes cannot be kept.

    Raises:
        DecodeError: not an image, damaged, or too large; the message is the reason.
    """
    with boundary():
        if header := _plain_jpeg(data):
            with decoding(header.width * header.height):
                pixels, clean = jpeg_pixels(data)
            if clean:
                facts = _facts(pixels, "JPEG", header.chroma, header.tables)
                return Prepared(data, pixels, facts)
        with _opened(data) as image:
            name = _name_of(image)
            with decoding(work_pixels(image, data)):
                pixels, orientation = _upright_pixels(image, name, data)
            exif = carries_exif(data, name) if name in _KEPT else bool(image.info.get("exif"))
            tables: tuple[tuple[int, ...], ...] = ()
            chroma = transcoded_from = ""
            if orientation is None:
                data, name, orientation, transcoded_from = png_of(pixels), "PNG", UPRIGHT, name
            elif name == "JPEG":
                chroma, tables = simplejpeg.decode_jpeg_header(data)[3], _tables_of(image)
        facts = _facts(
            pixels, name, chroma, tables,
            exif=exif, orientation=orientation, transcoded_from=transcoded_from,
        )  # fmt: skip
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
    """Read the header of a JPEG that can be kept and needs no Pillow; else return None."""
    header = read_header(data) if len(data) <= MAX_BYTES else None
    if header and header.width * header.height <= MAX_PIXELS:
        refuse_many_scans(data)
        return header
    return None


def _tables_of(image: Image.Image) -> Tables:
    tables = getattr(image, "quantization", None) or {}
    return tuple(tuple(sorted(tables[number])) for number in sorted(tables))


def decode(data: bytes) -> np.ndarray:
    """Decode to upright pixels, uint8 (height, width, 3) RGB: those that `prepare` returns.

    Raises:
        DecodeError: as `prepare`.
    """
    with decoded(data) as pixels:
        return pixels


@contextlib.contextmanager
def decoded(data: bytes) -> Iterator[np.ndarray]:
    """Decode in a context, for threads: the image's share of the memory for decoding is reserved
    until the block ends, so that only as many images are in memory as there is room for.
    """
    with contextlib.ExitStack() as held:
        with boundary():
            pixels = _pixels_held(data, held)
        yield pixels


def _pixels_held(data: bytes, held: contextlib.ExitStack) -> np.ndarray:
    if header := _plain_jpeg(data):
        held.enter_context(decoding(header.width * header.height))
        return jpeg_pixels(data)[0]
    with _opened(data) as image:
        held.enter_context(decoding(work_pixels(image, data)))
        return _upright_pixels(image, _name_of(image), data)[0]


def decode_image(data: bytes, image_format: str, orientation: int = UPRIGHT) -> np.ndarray:
    """Decode a packed image: uint8 (height, width, 3) RGB, upright by the index's `orientation`.

    This is the reference for other decoders: exact inverse DCT and smooth chroma upsampling for
    JPEG, alpha dropped. Never a reduced scale, which would delete the traces that a detector reads.

    Raises:
        DecodeError: truncated or damaged bytes, or not `image_format`.
    """
    with boundary(image_format):
        return upright_copy(_member_pixels(data, image_format), orientation)


def _member_pixels(data: bytes, image_format: str) -> np.ndarray:
    """Decode a packed image without applying its orientation."""
    if image_format == "JPEG":
        return jpeg_pixels(data)[0]
    with Image.open(_stream(data), formats=[image_format]) as image:
        image.load()
        image.info.pop("transparency", None)  # alpha is dropped anyway; Pillow would warn
        return to_rgb(image)


def _upright_pixels(image: Image.Image, name: str, data: bytes) -> tuple[np.ndarray, int | None]:
    """Return the upright pixels, and the file's orientation, None if its bytes cannot be kept."""
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
            pixels = to_rgb(image)
    else:
        # No `seek`: Pillow opens a file of several pictures at the first or primary one.
        pixels, orientation = to_rgb(image), orientation_left(image)
    pixels = upright_copy(pixels, orientation)
    return pixels, orientation if plain else None


class Encoded(NamedTuple):
    """Bytes that every decoder decodes alike. `width` and `height` are of the upright image."""

    data: bytes
    format: str
    orientation: int
    width: int
    height: int


def as_is(data: bytes) -> Encoded | None:
    """Return `data` and its facts if, by its header, every decoder decodes it alike; else None.

    Raises:
        DecodeError: as `prepare`, except for damage that only decoding finds.
    """
    with boundary():
        if header := _plain_jpeg(data):
            return Encoded(data, "JPEG", UPRIGHT, header.width, header.height)
        with _opened(data) as image:
            name = _name_of(image)
            if not _is_plain(image, name, data):
                return None
            orientation = orientation_of(data, name)
            size = image.size[::-1] if is_transposed(orientation) else image.size
            return Encoded(data, name, orientation, *size)


def _nothing() -> None:
    """Do nothing: most files need no `skip`."""


class ImageFile(NamedTuple):
    """Image in a file or archive. `read` returns its bytes or raises `DecodeError` or `OSError`.
    Call `skip` for a file that is held or passed over without reading: a compressed archive counts
    its members in memory, and waits until they are read or skipped.
    """

    name: str
    read: Callable[[], bytes]
    skip: Callable[[], object] = _nothing

    @property
    def is_held(self) -> bool:
        """Return whether the image's bytes are in memory until `read` or `skip` is called."""
        return self.skip is not _nothing


_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # `Path` turns `//` into `/`


def read_file(path: Path | str) -> bytes:
    """Read the bytes of a file. Folders, pipes, devices and too large files are refused.

    Raises:
        DecodeError: no regular file, more than `MAX_BYTES`, an address of the web, or a zero byte
            in the path.
        OSError: the file cannot be opened.
    """
    name = os.fspath(path)
    if "\0" in name:
        raise DecodeError("its path has a zero byte; give one path a line, without find's -print0")
    if _ADDRESS.match(name) and not Path(path).exists():
        raise DecodeError("an address; images are read from disk, so download it")
    # Checked before opening, because an opened folder would stay open. `name`, not `Path(name)`:
    # `Path("")` is the current folder.
    if os.path.isdir(name):  # noqa: PTH112
        raise DecodeError("a folder; name the image files in it")
    try:
        return read_plain(path, MAX_BYTES)
    except RefusedFileError as error:
        raise DecodeError(error.strerror) from error


@contextlib.contextmanager
def boundary(name: str = "") -> Iterator[None]:
    """Turn every exception that a bad file causes into a `DecodeError`, and suppress warnings.

    `Exception` is caught on purpose: on hostile bytes, Pillow's plugins raise IndexError, KeyError,
    TypeError, struct.error, ZeroDivisionError, RecursionError and more, and document no list. One
    missing exception would end a run over a million files. `MemoryError` is not the file's fault.
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


def _too_large(pixels: int, most: int = MAX_PIXELS) -> str:
    return (
        f"{math.ceil(pixels / 10**6):,} megapixels, more than the {most // 10**6} allowed"
        f"{'' if most == MAX_PIXELS else ' for this format'}; scale it down"
    )


_PYTHON = re.compile(r"<[\w.]+ object at 0x[0-9a-f]+>|\bb(?=['\"])")


def _in_words(error: Exception) -> str:
    """Format a library's message as one line without Python's object and bytes notation."""
    said = " ".join(_PYTHON.sub("", str(error)).split())[:200]
    if said.startswith("decoder error"):  # an error number of libtiff
        return "damaged pixels, or a compression that is not read; export it as PNG"
    if said and isinstance(error, ValueError | OSError | SyntaxError | EOFError):
        return said
    return f"its parts contradict each other ({type(error).__name__})"


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open an image and check its size. Only the header is read."""
    if len(data) > MAX_BYTES:
        raise DecodeError(f"{len(data):,} bytes, more than the limit of {MAX_BYTES:,}")
    if not data:
        raise DecodeError("empty file")
    with open_image(data) as image:
        if image.width < 1 or image.height < 1:
            raise DecodeError(f"no pixels: the header says {image.width} x {image.height}")
        if is_raw(image, data):
            raise DecodeError(
                "a camera RAW (such as DNG, NEF or CR2), of which only a preview of "
                f"{image.width} x {image.height} pixels can be read; export it as JPEG"
            )
        if (pixels := work_pixels(image, data)) > MAX_PIXELS:
            raise DecodeError(_too_large(pixels))
        if image.format == "AVIF" and is_cropped(data, image.size):
            raise DecodeError("a cropped AVIF, of which all would be read; export it as PNG")
        slow = any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ()))
        if slow and image.width * image.height > MAX_SLOW_PIXELS:
            raise DecodeError(_too_large(image.width * image.height, MAX_SLOW_PIXELS))
        with boundary(_name_of(image)):
            yield image


def is_raw(image: Image.Image, data: bytes = b"") -> bool:
    """Return whether a TIFF is a camera RAW. Pillow decodes its first picture, a preview."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    kind = image.tag_v2.get(_SUBFILE_TYPE)
    is_reduced = isinstance(kind, int) and bool(kind & 1)
    is_preview = is_reduced and TiffImagePlugin.SUBIFD in image.tag_v2
    return is_preview or _DNG_VERSION in image.tag_v2 or data[8:12] == b"CR\2\0"


def work_pixels(image: Image.Image, data: bytes) -> int:
    """Return how many pixels the decoder of an opened image works on. A TIFF is decoded by the
    tile, and an AVIF by the frame, which may be larger than the picture.
    """
    pixels = image.width * image.height
    if image.format == "AVIF":
        return max(pixels, frame_pixels(data))
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        width, height = (image.tag_v2.get(tag) for tag in _TILE_SIDES)
        if isinstance(width, int) and isinstance(height, int):
            return max(pixels, width * height)
    return pixels


_SUBFILE_TYPE, _DNG_VERSION = 254, 50706
_TILE_SIDES = (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)

_MENDED = "mended"
"""Key in Pillow's `info` of an image that could only be opened after `mended`."""


def open_image(data: bytes) -> Image.Image:
    """Open an image as decoding does: bad metadata is left out. Raises DecodeError."""
    if kind := unread_kind(data):
        raise DecodeError(f"{kind} is not read; export it as PNG")
    try:
        return Image.open(_stream(data), formats=READABLE)
    except Image.DecompressionBombError:
        raise
    except Exception as error:  # `boundary` says why
        if data.startswith(b"\xff\xd8") and data[2:3]:
            with contextlib.suppress(Exception):
                image = Image.open(io.BytesIO(mended(data)), formats=["JPEG"])
                image.info[_MENDED] = True
                return image
        said = "" if isinstance(error, Image.UnidentifiedImageError) else _in_words(error)
        raise DecodeError(why_not_opened(data, said)) from error


def _stream(data: bytes) -> io.BytesIO:
    """Return the stream that Pillow reads. Of a PNG, only the chunks of the pixels: Pillow refuses
    a PNG with a damaged or large text chunk.
    """
    return io.BytesIO(png.essential(data) if data.startswith(png.SIGNATURE) else data)


def _name_of(image: Image.Image) -> str:
    """Return the format. The first picture of a multi-picture file (MPO) is a JPEG."""
    return "JPEG" if image.format == "MPO" else image.format or ""


def _is_plain(image: Image.Image, name: str, data: bytes) -> bool:
    """Return whether the bytes can be kept: Pillow and DALI decode them to the same pixels."""
    if name == "JPEG":
        refuse_many_scans(data)
        if _MENDED in image.info:
            return False
        try:
            return simplejpeg.decode_jpeg_header(data)[2] in PLAIN_SPACES
        except (ValueError, KeyError):  # KeyError: as in `jpeg_pixels`
            return False
    if image.mode not in _PLAIN_MODES:
        return False
    if name == "PNG":
        return png.is_plain(data)
    if name != "WEBP" or is_cut_off(data, name):
        return False
    # libwebp's simple decoder reads no animation, also not one of a single frame.
    is_animated = (data[12:16] == b"VP8X" and data[20] & 2) or getattr(image, "n_frames", 1) > 1
    return not is_animated


def png_of(pixels: np.ndarray, level: int = 6) -> bytes:
    """Encode (height, width, 3) uint8 RGB pixels as a PNG. `level` is zlib's, 0 to 9. Packed images
    have level 6. Level 0 is for a PNG that only stays in memory: larger, and 7 times as fast.
    """
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=level)
    return stream.getvalue()
