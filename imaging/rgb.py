"""The pixels of an image that Pillow has decoded, whatever its mode, as 8-bit RGB.

Deep values are scaled by what the file declares white to be; where it declares nothing, and the
full range would make the picture black, it is refused. RGB and gray profiles are not applied, CMYK
is turned into sRGB by its own profile (docs/design.md says why).
"""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageCms

BAND_PIXELS = 2**22
"""Deep pixels that are converted at a time: in 64 bits, 32 MB."""

LEAST_SHARE = 1 / 16
"""Of the full range, the least that the brightest value of a deep picture must reach where the file
does not say what white is: 12 bits stored in 16 reach just that and would be shown as black.
"""

_BLACK, _WHITE = (280, 340), (281, 341)  # TIFF: (S)MinSampleValue, (S)MaxSampleValue
_PHOTOMETRIC = 262


class PixelError(ValueError):
    """Pixels that are missing, damaged or cannot be scaled; the message is the whole reason."""


def to_rgb(image: Image.Image) -> np.ndarray:
    """(height, width, 3) uint8 RGB of a loaded image, alpha dropped.

    Raises:
        PixelError: a deep image that does not say what white is.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep(image)
    if image.mode == "CMYK":
        image = _from_cmyk(image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _from_cmyk(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")
    try:
        return ImageCms.profileToProfile(
            image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"),
            outputMode="RGB",
        )  # fmt: skip
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image.convert("RGB")  # damaged, or of another kind of color


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


def _range_of(image: Image.Image, values: np.ndarray, tags: object) -> tuple[float, float]:
    """The values that become 0 and 255."""
    smallest, largest = _extremes(values)
    if image.mode == "F":
        return min(0.0, smallest), largest
    black, white = (_declared(tags, names) for names in (_BLACK, _WHITE))
    if white is not None and white > (black or 0.0) and largest <= white:
        return black or 0.0, white
    # Pillow brings 16-bit PGM and JPEG 2000 to the full range of 16 bits, in either mode.
    if not image.mode.startswith("I;16") and image.format == "TIFF":
        raise PixelError(
            f"{image.format} does not decode: signed or 32-bit integers from {smallest:,.0f} to "
            f"{largest:,.0f}, and nothing in the file says which is white; save it with 8 bits"
        )
    if largest < 65536 * LEAST_SHARE:
        raise PixelError(
            f"{image.format} does not decode: 16-bit values of at most {largest:,.0f}, nearly "
            "black if 65,535 is white, and nothing in the file says what else is; save it with 8 "
            "bits, or over the full range"
        )
    return 0.0, 65535.0


def _declared(tags: object, names: tuple[int, ...]) -> float | None:
    for name in names:
        value = tags.get(name)
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, int | float) and np.isfinite(value):
            return float(value)
    return None


def _extremes(values: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest finite value.

    Raises:
        PixelError: there is none.
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
