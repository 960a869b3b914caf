"""Read the size of an image from its header, before memory for its pixels is taken.

Main entry: `claimed_size(data)` takes the bytes of a file and returns the (width, height) in pixels
that a decoder will use, without the EXIF orientation. It returns None for a format other than JPEG,
PNG and WebP, and for a header that cannot be read. It raises no error.
"""

import io
import struct

import simplejpeg
from PIL import Image

from imaging.decode import DecodeError, boundary

_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def claimed_size(data: bytes) -> tuple[int, int] | None:
    """Read the (width, height) that a decoder will use from the header of a JPEG, PNG or WebP; None
    for other formats and bad headers.
    """
    # A second header, or chunks before the header, can make a PNG larger than its first bytes say.
    if data[:16] == _PNG_START and data.find(b"IHDR", 16) < 0 and len(data) >= 24:
        return struct.unpack_from(">2I", data, 16)
    if data.startswith((b"\x89PNG", b"RIFF")):
        try:
            with boundary(), Image.open(io.BytesIO(data), formats=["PNG", "WEBP"]) as image:
                return image.size
        except DecodeError:
            return None
    if data.startswith(b"\xff\xd8"):
        try:
            height, width = simplejpeg.decode_jpeg_header(data, strict=False)[:2]
        except (ValueError, KeyError):  # KeyError: simplejpeg has no name for color space -1
            return None
        return width, height
    return None
