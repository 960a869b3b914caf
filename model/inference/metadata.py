"""Open the metadata of an image file: its texts, EXIF and XMP, without decoding pixels.

Main entries:

- `without_pixels(data)` takes the bytes of a file. It returns a JPEG or PNG without pixel data.
- `open_metadata(data, head)` takes both and returns a pair: a Pillow image, whose `info` has the
  metadata, and the number of its parts that are damaged. It raises what Pillow does.
- `exif_of(image)` takes this image and returns the texts of its EXIF, as str or bytes by tag name;
  nothing if EXIF is damaged. `raw_profile(text)` decodes a profile that ImageMagick writes.

`MAX_READ` and `MAX_CHUNKS` limit how much of a text, and how many parts of a file, are read.
"""

import functools
import io
import itertools
import logging
from typing import Any

from PIL import ExifTags, Image, TiffImagePlugin, TiffTags

from imaging import png
from imaging.decode import READABLE
from imaging.jpeg import APP1, COM, before_scan, segments

log = logging.getLogger("ai_images_detector")

MAX_READ = 500_000
"""Characters of one text that are read: a large graph has 300,000."""

MAX_CHUNKS = 100_000
"""Chunks of a PNG, or segments of a JPEG, that are read."""

_PNG_PARTS = (b"tEXt", b"zTXt", b"iTXt", b"eXIf")
_JPEG_PARTS = (APP1, COM)  # EXIF or XMP, and a comment
_MAX_PARTS = 100  # opened one by one


def without_pixels(data: bytes) -> bytes:
    """Return a JPEG or PNG without its pixel data, so that a search is fast. Return other files,
    and files with an unusual structure, completely.
    """
    if data.startswith(b"\xff\xd8"):
        return before_scan(data)
    if not data.startswith(png.SIGNATURE):
        return data
    chunks = itertools.islice(png.chunks(data), MAX_CHUNKS)
    kept = [data[start:end] for kind, start, end in chunks if kind != b"IDAT"]
    return b"".join([png.SIGNATURE, *kept])


def open_metadata(data: bytes, head: bytes) -> tuple[Image.Image, int]:
    """Open an image for its metadata. Pillow refuses a whole PNG or JPEG for one bad text chunk or
    segment; then each part is opened alone, in a picture of one pixel, because the file may have
    millions of tables or palettes. Returns an image, whose `info` has the metadata of all good
    parts, and the number of bad parts.
    """
    is_png = data.startswith(png.SIGNATURE)
    try:
        # Of a PNG without pixel data (`head`), Pillow also reads the texts behind the pixels.
        return Image.open(io.BytesIO(head if is_png else data), formats=READABLE), 0
    except Exception:
        if is_png:
            bare, at = _one_pixel("PNG"), len(png.SIGNATURE) + 25  # behind the chunk IHDR
            chunks = itertools.islice(png.chunks(head), MAX_CHUNKS)
            parts = [head[start:end] for kind, start, end in chunks if kind in _PNG_PARTS]
        elif data.startswith(b"\xff\xd8"):
            bare, at = _one_pixel("JPEG"), 2
            every = itertools.islice(segments(head), MAX_CHUNKS)
            parts = [head[s.start : s.end] for s in every if s.marker in _JPEG_PARTS]
        else:
            raise
        image = Image.open(io.BytesIO(bare), formats=READABLE)
        image.info.clear()
    bad = 0
    for part in parts[:_MAX_PARTS]:
        try:
            with Image.open(io.BytesIO(bare[:at] + part + bare[at:]), formats=READABLE) as one:
                image.info.update(one.info)
        except Exception as error:
            log.debug("metadata: %s: %s", type(error).__name__, error)
            bad += 1
    return image, bad + max(0, len(parts) - _MAX_PARTS)


@functools.cache
def _one_pixel(kind: str) -> bytes:
    """Return a picture of one pixel: a PNG or a JPEG."""
    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, kind)
    return stream.getvalue()


def exif_of(image: Image.Image) -> dict[str, Any]:
    """Return the texts of EXIF by tag name; empty if EXIF cannot be read."""
    info, raw = image.info, raw_profile(image.info.get("Raw profile type APP1"))
    try:
        if image.format == "PNG" and not info.keys() & {"exif", "Raw profile type exif"}:
            base = Image.Exif()  # `getexif` would decode the pixels to find late EXIF
            if raw.startswith(b"Exif\0"):
                base.load(raw)
        else:
            base = image.getexif()
        tags = _texts_of(base)
    except Exception as error:  # XMP and texts are still read
        log.debug("EXIF: %s: %s", type(error).__name__, error)
        return {}
    return {
        ExifTags.TAGS.get(tag, str(tag)): (
            _windows_text(value) if tag in _WINDOWS_TAGS else _utf8(value)
        )
        for tag, value in tags.items()
    }


_TEXTS = (TiffTags.BYTE, TiffTags.ASCII, TiffTags.UNDEFINED)


def _texts_of(base: Image.Exif) -> dict[int, Any]:
    """Return the values of both directories that may be texts. Pillow decodes values on access.
    Numbers are left out: an array of numbers takes 40 times its bytes.
    """
    first = base._info  # public methods decode all values of the second directory
    if first is None:
        return {}
    directories = [first]
    pointer = first._tagdata.get(ExifTags.IFD.Exif, b"")
    if 4 <= len(pointer) <= 8:
        second = TiffImagePlugin.ImageFileDirectory_v2(base.head, group=ExifTags.IFD.Exif)
        base.fp.seek(int.from_bytes(pointer, "little" if base.endian == "<" else "big"))
        second.load(base.fp)
        directories.append(second)
    texts = {}
    for directory in directories:
        for tag in directory:
            if directory.tagtype.get(tag) in _TEXTS:
                value = directory[tag]
                texts[tag] = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    return texts


_WINDOWS_TAGS = range(0x9C9B, 0x9CA0)  # XPTitle, XPComment, XPAuthor, XPKeywords, XPSubject


def _windows_text(value: Any) -> Any:
    """Decode an XP tag, which contains UTF-16 whatever type the file declares."""
    try:
        return bytes(value).decode("utf-16-le", "replace") if len(value) > 1 else value
    except (TypeError, ValueError):
        return value


def _utf8(value: Any) -> Any:
    """Decode a tag as UTF-8 if possible. Pillow reads tags as Latin-1, but programs write UTF-8
    ("DALL·E").
    """
    try:
        return value.encode("latin-1").decode("utf-8")
    except (AttributeError, UnicodeError):
        return value


def raw_profile(text: Any) -> bytes:
    """Decode ImageMagick's `Raw profile type ...`: a name, a length, then hexadecimal lines."""
    try:
        return bytes.fromhex(text[: 2 * MAX_READ].split(None, 2)[2])
    except (TypeError, ValueError, IndexError):
        return b""
