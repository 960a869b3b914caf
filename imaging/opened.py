"""Read an image that a caller has opened with Pillow.

Main entry: `bytes_or_pixels(image)` takes a `PIL.Image.Image` and returns the bytes of its file if
Pillow has opened but not decoded it: they are to be read as any file, with the same refusals. For
every other image it returns upright pixels, uint8 (height, width, 3) RGB: one that was loaded, made
or changed in memory, another frame than the first, a reduced scale (`draft`), an HEIF, and formats
that only Pillow reads here.

Of a loaded image Pillow keeps the format, the tables of a JPEG and the tags of a TIFF, so lossless
JPEGs and camera RAWs are still refused. The depth and the color space of a JPEG 2000, the crop of
an AVIF and damage that Pillow accepts can no longer be seen. Copies and conversions have no format.

`DecodeError` is raised for an image that is refused or cannot be loaded.
"""

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin

from imaging.decode import MAX_BYTES, READABLE, DecodeError, boundary, is_raw
from imaging.orientation import orientation_left, upright_copy
from imaging.rgb import to_rgb


def bytes_or_pixels(image: Image.Image) -> bytes | np.ndarray:
    """Return the bytes of the file of an image that is not decoded yet, or else upright pixels.

    Raises:
        DecodeError: the image is refused, or cannot be loaded; the message is the reason.
    """
    with boundary():
        if data := _undecoded_bytes(image):
            return data
        _refuse_as_seen(image)
        return upright_copy(to_rgb(image), orientation_left(image))


def _undecoded_bytes(image: Image.Image) -> bytes:
    """Return the bytes of the file, or nothing if Pillow has decoded it, or would decode other
    pixels than those of the whole first picture.
    """
    if not isinstance(image, ImageFile.ImageFile) or image._im is not None or image.fp is None:
        return b""
    is_reduced = bool(getattr(image, "decoderconfig", ()))
    if image.format not in {*READABLE, "MPO"} - {"HEIF"} or image.tell() or is_reduced:
        return b""
    place = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read(MAX_BYTES + 1)
    image.fp.seek(place)  # the caller may load the image later
    return data


def _refuse_as_seen(image: Image.Image) -> None:
    if isinstance(image, ImageFile.ImageFile) and image._im is None and image.fp is None:
        raise DecodeError("its file was closed before Pillow loaded it; load it, or pass the path")
    if isinstance(image, JpegImagePlugin.JpegImageFile) and not image.quantization:
        raise DecodeError("lossless JPEG is not read; export it as PNG")
    if is_raw(image):
        raise DecodeError("a preview in a camera RAW; export the photograph as JPEG")
