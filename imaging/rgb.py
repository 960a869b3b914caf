"""Convert an image of Pillow, of any mode, to 8-bit RGB pixels.

Main entry: `to_rgb(image)` takes a `PIL.Image.Image`, loads it if it is not loaded yet, and returns
uint8 (height, width, 3). It is not turned upright. Alpha is dropped. ICC profiles of RGB
and gray images are ignored. CMYK is converted to sRGB by the ICC profile of the file, or without a
usable profile by Pillow (docs/design.md explains why).

Values of more than 8 bits are scaled to levels from 0 to 255 (in parts of `BAND_PIXELS` pixels, to
save memory):

- Floats: the largest finite value becomes 255. If the smallest value is negative, it becomes 0;
  otherwise zero becomes 0.
- Integers of a file that declares a white level (a TIFF): this level becomes 255; the declared
  black level, or else zero, becomes 0. A white level counts as not declared if it is not above the
  black level, or if a value of the image is above it.
- Other integers: 65,535 becomes 255; zero becomes 0.
- In a TIFF that stores white as 0, the gray levels are then inverted.
- Of 16-bit color, and of gray with alpha, Pillow reads the upper 8 bits, which are the result. Only
  of a TIFF that declares a white level are the lower 8 bits read too, and the values scaled.
- In a JPEG 2000, gray of fewer than 8 bits is scaled.

Of an image that was loaded before, lower bits and the depth of a JPEG 2000 cannot be read.

`PixelError` (a `ValueError`) is raised in seven cases:

- No value is finite.
- No white level is declared, and the image is a TIFF of signed or 32-bit integers, or has integers
  below 0 or above 65,535.
- No white level is declared, and all integers are below `LEAST_SHARE` of 65,536, so that the image
  would look black.
- A white level of 16-bit color is declared, but the lower bits cannot be read: they are multiplied
  by alpha, or compressed in one plane per channel.
- A JPEG 2000 is of more or fewer than 8 bits, which Pillow reads right only of gray (9 to 16 bits).
- A JPEG 2000 without the boxes of a `.jp2` does not say whether it is RGB or YCbCr.
- A TIFF is YCbCr of fewer color than brightness values, without compression.
"""

import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageFile, Jpeg2KImagePlugin, TiffImagePlugin

from imaging.av1 import Boxes

BAND_PIXELS = 2**22
"""Pixels of more than 8 bits that are converted at a time: 32 MB as float64, 96 MB in color."""

LEAST_SHARE = 1 / 16
"""Smallest share of the full range that the brightest value must reach if the file declares no
white level. 12 bits stored in 16 reach exactly this share and would look black.
"""

_BLACK, _WHITE = (280, 340), (281, 341)  # TIFF: (S)MinSampleValue, (S)MaxSampleValue
_PHOTOMETRIC, _YCBCR_SUBSAMPLING = 262, 530

_FULL = (0.0, 65535.0)
"""Black and white of 16 bits."""

_UPPER_OF_COLOR = ("LA", "RGB", "RGBA")
"""Modes in which Pillow keeps only the upper 8 bits of each 16."""

_SWAPPED = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
"""Byte orders in Pillow's names of raw modes. With the other order, it reads the lower 8 bits."""


class PixelError(ValueError):
    """Pixels that are missing, damaged or cannot be scaled; the message is the whole reason."""


def to_rgb(image: Image.Image) -> np.ndarray:
    """Load an image and convert it to (height, width, 3) uint8 RGB. Alpha is dropped.

    Raises:
        PixelError: an image of more than 8 bits without a white level, or without a finite value.
    """
    if isinstance(image, Jpeg2KImagePlugin.Jpeg2KImageFile) and image.tile:
        return _from_jpeg2000(image)
    _refuse_raw_chroma(image)
    _name_depth_of_planes(image)
    if image.mode in _UPPER_OF_COLOR and _raw_mode(image)[-3:] in _SWAPPED:
        return _from_deep_color(image)
    image.load()
    return _from_loaded(image)


def _from_loaded(image: Image.Image) -> np.ndarray:
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep(image)
    if image.mode == "CMYK":
        image = _from_cmyk(image)
    elif image.mode == "La":  # premultiplied alpha: Pillow converts only to LA
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
        return image.convert("RGB")  # no usable CMYK profile


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of the layout of values in the file, such as "RGB;16B". It is empty
    after the image was loaded.
    """
    for tile in getattr(image, "tile", ()):
        raw = tile.args if isinstance(tile.args, str) else (tile.args or ("",))[0]
        return raw if isinstance(raw, str) else ""
    return ""


def _name_depth_of_planes(image: Image.Image) -> None:
    """Complete the raw modes of an uncompressed TIFF that has 16 bits and one plane per channel:
    Pillow leaves out the depth, and would read noise.
    """
    if isinstance(image, TiffImagePlugin.TiffImageFile) and _is_planar(image):
        order = "L" if image.tag_v2.prefix == TiffImagePlugin.II else "B"
        if 16 in image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, ()):
            if image.mode == "CMYK" and ";" not in _raw_mode(image):
                raise PixelError(
                    f"{_subject(image)}: CMYK of 16 bits in one plane per channel is not read; "
                    "convert it to 8 bits"
                )
            gray = image.mode if image.mode.startswith("I;16") else ""
            _rename_raw_modes(image, lambda raw: raw if ";" in raw else gray or f"{raw};16{order}")


def _is_planar(image: TiffImagePlugin.TiffImageFile) -> bool:
    return image.tag_v2.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2


def _rename_raw_modes(image: ImageFile.ImageFile, rename: Callable[[str], str]) -> None:
    for index, tile in enumerate(image.tile):
        assert isinstance(tile.args, tuple)  # str or None only in other formats
        image.tile[index] = tile._replace(args=(rename(tile.args[0]), *tile.args[1:]))


def _refuse_raw_chroma(image: Image.Image) -> None:
    """Refuse an uncompressed TIFF of YCbCr in which pixels share color values (section 21 of TIFF
    6.0): Pillow expects one color value per pixel, and runs out of data.

    Raises:
        PixelError: the image is of this kind.
    """
    if image.mode != "YCbCr" or not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    is_raw = any(tile[0] == "raw" for tile in image.tile)
    if is_raw and image.tag_v2.get(_YCBCR_SUBSAMPLING, (2, 2)) != (1, 1):
        raise PixelError(
            f"{_subject(image)}: YCbCr with chroma subsampling and without compression is not "
            "read; convert it to RGB, or export it as PNG"
        )


def _from_deep_color(image: Image.Image) -> np.ndarray:
    lower = _lower_bytes(image)
    image.load()
    upper = _from_loaded(image)
    if lower is None:
        _range_of(image, 0.0, 256.0 * upper.max() + 255.0)  # refuses nearly black images
        return upper
    values = upper.astype(np.uint16)
    values <<= 8
    values |= lower
    return _scaled(values, *_range_of(image, *_extremes(values)))


def _lower_bytes(image: Image.Image) -> np.ndarray | None:
    """Read the lower 8 bits of each 16-bit value of a TIFF that is not loaded yet: uint8 (height,
    width, 3). None if the upper 8 bits suffice, because black and white are 0 and 65,535 or not
    declared.

    Raises:
        PixelError: such levels are declared, and Pillow cannot read the lower bits.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return None
    black, white = (_declared(image.tag_v2, names) for names in (_BLACK, _WHITE))
    if white is None or (black or 0.0, white) == _FULL:
        return None
    raw = _raw_mode(image)
    if raw.startswith("RGBa") or (raw.endswith("N") and _is_planar(image)):
        raise PixelError(
            f"{_subject(image)}: {white:,.0f} is white, and of 16 bits only the upper 8 can be "
            "read; convert it to 8 bits"
        )
    assert image.fp is not None  # it is not loaded yet
    image.fp.seek(0)
    with Image.open(io.BytesIO(image.fp.read()), formats=["TIFF"]) as other:
        other.seek(image.tell())
        _name_depth_of_planes(other)
        _rename_raw_modes(other, lambda raw: raw[:-3] + _SWAPPED[raw[-3:]])
        other.load()
        return _from_loaded(other)


def _from_jpeg2000(image: Jpeg2KImagePlugin.Jpeg2KImageFile) -> np.ndarray:
    """Load and convert a JPEG 2000. Pillow rounds white of more than 8 bits to 256, which is stored
    as 0 (not in the mode I;16), and shifts values of fewer bits, so that white becomes gray.

    Raises:
        PixelError: a depth that Pillow reads wrong, or colors of an unknown kind.
    """
    depths = _depths_of_jpeg2000(image)
    bits = min(depths) if len(depths) == 1 else 0
    is_scaled = bits < 8 and image.mode in ("L", "LA")
    if not bits or not (bits == 8 or is_scaled or (image.mode == "I;16" and 8 < bits <= 16)):
        stated = "/".join(map(str, sorted(depths))) or "unknown"
        raise PixelError(
            f"{_subject(image)}: {stated}-bit {image.mode} is not read; export it as PNG"
        )
    if image.codec == "j2k" and not _states_colors(image):
        raise PixelError(
            f"{_subject(image)}: a codestream that does not say whether it is RGB or YCbCr; "
            "convert it to PNG, or to JP2 with the right color space"
        )
    image.load()
    pixels = _from_loaded(image)
    return _scaled(pixels >> (8 - bits), 0.0, 2.0**bits - 1) if is_scaled else pixels


def _depths_of_jpeg2000(image: Jpeg2KImagePlugin.Jpeg2KImageFile) -> set[int]:
    """Read the bit depths of the channels except alpha (ISO 15444-1, A.5.1), and of a palette
    (I.5.3.4).
    """
    assert image.fp is not None  # it is not loaded yet
    image.fp.seek(0)
    data = image.fp.read()
    boxes, end = Boxes(data), len(data)
    start = 0 if image.codec == "j2k" else next(boxes.inside(0, end, b"jp2c"), (end, end))[0]
    colors = sum(band not in "Aa" for band in image.getbands())
    depths = set(data[start + 42 : start + 42 + 3 * colors : 3])
    for palette, _ in boxes.inside(0, start, b"jp2h", b"pclr"):
        depths |= set(data[palette + 3 : palette + 3 + data[palette + 2]])
    return {(depth & 127) + 1 for depth in depths}


def _states_colors(image: Jpeg2KImagePlugin.Jpeg2KImageFile) -> bool:
    """Return whether a codestream shows its color space: gray, a transform that is defined for RGB
    (ISO 15444-1, A.6.1), or fewer values of some channels, as only YCbCr has.
    """
    if image.mode in ("L", "LA", "I;16"):
        return True
    assert image.fp is not None  # it is not loaded yet
    image.fp.seek(2)  # behind the start marker
    while (marker := image.fp.read(2)) not in (b"", b"\xff\x90"):  # up to the first tile
        segment = image.fp.read(max(0, int.from_bytes(image.fp.read(2), "big") - 2))
        if marker == _SIZ and set(segment[37::3] + segment[38::3]) != {1}:
            return True
        if marker == _COD and segment[4:5] == b"\1":
            return True
    return False


_SIZ, _COD = b"\xff\x51", b"\xff\x52"
"""Markers of JPEG 2000: sizes of the image and its channels; defaults of the coding."""


def _from_deep(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    gray = _scaled(values, *_range_of(image, *_extremes(values)))
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # zero is white
        np.subtract(255, gray, out=gray)
    return np.repeat(gray[:, :, None], 3, axis=2)


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale values so that `low` becomes 0 and `high` 255; uint8 of the same shape."""
    levels = np.empty(values.shape, np.uint8)
    for band in _bands(values):
        scaled = (values[band].astype(np.float64) - low) * (255.0 / max(high - low, 1e-300))
        scaled = np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0)
        levels[band] = np.rint(scaled.clip(0.0, 255.0, out=scaled), out=scaled)
    return levels


def _range_of(image: Image.Image, smallest: float, largest: float) -> tuple[float, float]:
    """Return the values that become 0 and 255, given the extremes of an image."""
    tags = getattr(image, "tag_v2", {})
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
    return _FULL


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
