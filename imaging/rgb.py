"""Convert an image of Pillow, of any mode, to 8-bit RGB pixels.

Main entry: `to_rgb(image)` takes a `PIL.Image.Image` (from `Image.open()`, after `load()`) and
returns uint8 (height, width, 3). It is not turned upright. Alpha is dropped. ICC profiles of RGB
and gray images are ignored. CMYK is converted to sRGB by the ICC profile of the file, or without a
usable profile by Pillow (docs/design.md explains why).

Values of more than 8 bits are scaled to gray levels from 0 to 255 (in parts of `BAND_PIXELS`
pixels, to save memory):

- Floats: the largest finite value becomes 255. If the smallest value is negative, it becomes 0;
  otherwise zero becomes 0.
- Integers of a file that declares a white level (a TIFF): this level becomes 255; the declared
  black level, or else zero, becomes 0. A white level counts as not declared if it is not above the
  black level, or if a value of the image is above it.
- Other integers: 65,535 becomes 255; zero becomes 0.
- In a TIFF that stores white as 0, the gray levels are then inverted.

`PixelError` (a `ValueError`) is raised in three cases:

- No value is finite.
- No white level is declared, and the image is a TIFF of signed or 32-bit integers, or has integers
  below 0 or above 65,535.
- No white level is declared, and all integers are below `LEAST_SHARE` of 65,536, so that the image
  would look black.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms

BAND_PIXELS = 2**22
"""Pixels of more than 8 bits that are converted at a time: 32 MB as float64."""

LEAST_SHARE = 1 / 16
"""Smallest share of the full range that the brightest value must reach if the file declares no
white level. 12 bits stored in 16 reach exactly this share and would look black.
"""

_BLACK, _WHITE = (280, 340), (281, 341)  # TIFF: (S)MinSampleValue, (S)MaxSampleValue
_PHOTOMETRIC = 262


class PixelError(ValueError):
    """Pixels that are missing, damaged or cannot be scaled; the message is the whole reason."""


def to_rgb(image: Image.Image) -> np.ndarray:
    """Convert a loaded image to (height, width, 3) uint8 RGB. Alpha is dropped.

    Raises:
        PixelError: an image of more than 8 bits without a white level, or without a finite value.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep(image)
    if image.mode == "CMYK":
        image = _from_cmyk(image)
    elif image.mode == "La":  # gray, multiplied by alpha: Pillow converts it to LA only
        image = image.convert("LA")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _from_cmyk(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")
    try:
        converted = ImageCms.profileToProfile(
            image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"),
            outputMode="RGB",
        )  # fmt: skip
        assert converted is not None  # None only with `inPlace`
        return converted
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image.convert("RGB")  # the profile is damaged or not for CMYK


def _from_deep(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    low, high = _range_of(image, values, tags)
    inverted = tags.get(_PHOTOMETRIC) == 0  # white is zero
    gray = np.empty(values.shape, np.uint8)
    for band in _bands(values):
        scaled = (values[band].astype(np.float64) - low) * (255.0 / max(high - low, 1e-300))
        scaled = np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0)
        gray[band] = np.rint(scaled.clip(0.0, 255.0, out=scaled), out=scaled)
    if inverted:
        np.subtract(255, gray, out=gray)
    return np.repeat(gray[:, :, None], 3, axis=2)


def _range_of(image: Image.Image, values: np.ndarray, tags: Any) -> tuple[float, float]:
    """Return the values that become 0 and 255."""
    smallest, largest = _extremes(values)
    if image.mode == "F":
        return min(0.0, smallest), largest
    black, white = (_declared(tags, names) for names in (_BLACK, _WHITE))
    if white is not None and white > (black or 0.0) and largest <= white:
        return black or 0.0, white
    # Pillow scales 16-bit PGM and JPEG 2000 to the full range of 16 bits, in both modes.
    if image.mode == "I" and (image.format == "TIFF" or smallest < 0 or largest > 65535):
        raise PixelError(
            f"{_subject(image)}: signed or 32-bit integers from {smallest:,.0f} to "
            f"{largest:,.0f}, and nothing says which value is white; convert it to 8 bits"
        )
    if largest < 65536 * LEAST_SHARE:
        raise PixelError(
            f"{_subject(image)}: values of at most {largest:,.0f}, nearly black if 65,535 is "
            "white, and nothing says which value is; convert it to 8 bits, or to values up to "
            "65,535"
        )
    return 0.0, 65535.0


def _subject(image: Image.Image) -> str:
    """Return the beginning of a message. An image that was made in memory has no format."""
    return f"{image.format} does not decode" if image.format else f"an image of mode {image.mode}"


def _declared(tags: Any, names: tuple[int, ...]) -> float | None:
    for name in names:
        value = tags.get(name)
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, int | float) and np.isfinite(value):
            return float(value)
    return None


def _extremes(values: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest finite value.

    Raises:
        PixelError: no value is finite.
    """
    smallest, largest = np.inf, -np.inf
    for band in _bands(values):
        part = values[band]
        if part.dtype.kind == "f":
            part = part[np.isfinite(part)]
        if part.size:
            smallest, largest = min(smallest, float(part.min())), max(largest, float(part.max()))
    if smallest > largest:
        raise PixelError("no pixel has a finite value")
    return smallest, largest


def _bands(values: np.ndarray) -> Iterator[slice]:
    rows = max(1, BAND_PIXELS // max(1, values.shape[1]))
    return (slice(top, top + rows) for top in range(0, len(values), rows))
