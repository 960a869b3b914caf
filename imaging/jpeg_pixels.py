"""The pixels of a JPEG: strictly where nothing is odd about it, and else with what is missing or
damaged told from what loses nothing.
"""

import io
import re

import numpy as np
import simplejpeg
from PIL import Image

from imaging.jpeg import MAX_SCANS, count_scans, has_end, mended
from imaging.rgb import PixelError, to_rgb

# What libjpeg warns of and loses nothing by. The first warning of a scan hides any that follow, so
# the end of the file is looked for apart.
_HARMLESS = re.compile(r"extraneous bytes before marker|Inconsistent progression sequence")


def jpeg_pixels(data: bytes) -> tuple[np.ndarray, bool]:
    """(height, width, 3) uint8 RGB as they are stored, exact and smooth, and whether no decoder has
    anything to complain of.

    Raises:
        PixelError: pixels are missing or damaged, or it is no JPEG.
    """
    try:
        return _strictly(data), True
    except (ValueError, KeyError):  # KeyError: sampling or colors that simplejpeg has no name for
        return odd_jpeg_pixels(data), False


def odd_jpeg_pixels(data: bytes) -> np.ndarray:
    """The pixels of a JPEG that a strict decoder refuses: only for missing or damaged pixels is it
    refused here.

    Raises:
        PixelError: they are.
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
    # Unusual sampling, which libjpeg knows and its simple interface does not.
    with Image.open(io.BytesIO(needed), formats=["JPEG"]) as image:
        image.load()
        return to_rgb(image)


def refuse_damaged_cmyk(data: bytes) -> None:
    """Raise what `odd_jpeg_pixels` would: Pillow, which converts these colors, does not say when
    pixels are missing.
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
    """Raise a `PixelError` for a JPEG without an end."""
    if not has_end(data):
        raise PixelError("JPEG does not decode: premature end of the file")


def _strictly(data: bytes, colorspace: str = "RGB", strict: bool = True) -> np.ndarray:
    return simplejpeg.decode_jpeg(
        data, colorspace=colorspace, fastdct=False, fastupsample=False, strict=strict
    )
