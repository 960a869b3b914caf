"""Decode the bytes of a JPEG to RGB pixels. A `PixelError` is raised for missing pixels, and for
damage that the decoder notices (a JPEG has no checksum).

Main entry: `jpeg_pixels(data)` takes the bytes of a file and returns two values. The first is the
pixels, uint8 (height, width, 3), as they are stored: the EXIF orientation is not applied. The
second is True if the strict mode of simplejpeg (libjpeg-turbo, every warning is an error) decodes
the file as it is. Otherwise it is False, and the pixels come from `odd_jpeg_pixels(data)`. That
function also accepts faults that lose no pixel: wrong metadata, extra bytes before a marker (they
may also come from damage), unusual chroma sampling.

`PixelError` (a `ValueError`) is defined in `imaging/rgb.py`. Bytes that are no JPEG raise it, too.
The decoders' own exceptions may get through for hostile bytes: `imaging/decode.py` turns every
exception into a `DecodeError`.

Three functions take the bytes, return nothing and raise `PixelError`:

- `refuse_cut_off()` for a file without an end marker.
- `refuse_many_scans()` for more than `MAX_SCANS` scans (of `imaging/jpeg.py`), which would be slow.
  Call it before `jpeg_pixels()`: that function counts the scans only when the strict mode fails.
  `odd_jpeg_pixels()` calls this function and `refuse_cut_off()` itself.
- `refuse_damaged_cmyk()` for a CMYK JPEG with missing or damaged pixels. Call it for a CMYK file,
  then decode the file with Pillow, as `imaging/decode.py` does. `jpeg_pixels()` also finds such
  damage, but its colors can be wrong for CMYK, because it ignores the color profile of the file.
"""

import io
import re

import numpy as np
import simplejpeg
from PIL import Image

from imaging.jpeg import MAX_SCANS, count_scans, has_end, mended
from imaging.rgb import PixelError, to_rgb

# Warnings of libjpeg about defects that lose no pixel. The first warning of a scan hides the next
# ones, so the end of the file is checked separately.
_HARMLESS = re.compile(r"extraneous bytes before marker|Inconsistent progression sequence")


def jpeg_pixels(data: bytes) -> tuple[np.ndarray, bool]:
    """Decode to uint8 (height, width, 3) RGB as stored (not turned upright), with exact inverse DCT
    and smooth chroma upsampling. The second value is True if a strict decoder accepts the file
    unchanged.

    Raises:
        PixelError: pixels are missing or damaged, or the file is no JPEG.
    """
    try:
        return _strictly(data), True
    except (ValueError, KeyError):  # KeyError: simplejpeg has no name for the sampling or colors
        return odd_jpeg_pixels(data), False


def odd_jpeg_pixels(data: bytes) -> np.ndarray:
    """Decode a JPEG that a strict decoder refuses. Only missing or damaged pixels are an error
    here.

    Raises:
        PixelError: pixels are missing or damaged, or there are too many scans.
    """
    refuse_many_scans(data)
    refuse_cut_off(data)
    needed = mended(data)
    try:
        return _strictly(needed)
    except KeyError:
        said = ""
    except ValueError as error:
        said = str(error)
    if _HARMLESS.search(said):
        return _strictly(needed, strict=False)
    if said and "subsampling" not in said:
        raise PixelError(f"JPEG does not decode: {said}")
    # Unusual sampling: libjpeg supports it, the TurboJPEG interface of simplejpeg does not.
    with Image.open(io.BytesIO(needed), formats=["JPEG"]) as image:
        image.load()
        return to_rgb(image)


def refuse_damaged_cmyk(data: bytes) -> None:
    """Check a CMYK JPEG, which Pillow converts without reporting missing pixels.

    Raises:
        PixelError: pixels are missing or damaged, or there are too many scans.
    """
    refuse_many_scans(data)
    refuse_cut_off(data)
    try:
        _strictly(mended(data), "CMYK")
    except KeyError:
        return
    except ValueError as error:
        if "subsampling" not in str(error) and not _HARMLESS.search(str(error)):
            raise PixelError(f"JPEG does not decode: {error}") from error


def refuse_many_scans(data: bytes) -> None:
    """Raise a `PixelError` for a JPEG of more than `MAX_SCANS` scans."""
    if (scans := count_scans(data)) > MAX_SCANS:
        raise PixelError(f"JPEG of {scans:,} scans, more than the limit of {MAX_SCANS}")


def refuse_cut_off(data: bytes) -> None:
    """Raise a `PixelError` for a JPEG without an end marker."""
    if not has_end(data):
        raise PixelError("JPEG does not decode: premature end of the file")


def _strictly(data: bytes, colorspace: str = "RGB", strict: bool = True) -> np.ndarray:
    return simplejpeg.decode_jpeg(
        data, colorspace=colorspace, fastdct=False, fastupsample=False, strict=strict
    )
