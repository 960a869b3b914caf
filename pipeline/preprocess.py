"""Choose the part of an image that the network sees, and its size: the preprocessing.

Main entry: `Preprocess(crop_size=256, resize_size=288, interpolation="bilinear",
detail_crop=False)`, the settings of evaluation. All fields are passed by keyword and have these
defaults.

- `crop_size`: side of the network's square input in pixels.
- `resize_size`: length of the image's shorter side before the center crop, in pixels.
- `interpolation`: filter for resizing, one of `FILTERS`.
- `detail_crop`: whether the network also sees a second crop, taken from the first one at full
  resolution and placed below it.

It raises ValueError if not 16 <= crop_size <= resize_size. `preprocess.shape` is (height, width) of
the network's input in pixels, `preprocess.crops` the number of crops in it, 1 or 2.

Three functions return `Crops` of N images: (top, left, height, width), each an int array (N,), in
pixels of the upright image. `widths` and `heights`, int (N,), are the sizes of the images.

- `center_crops(preprocess, widths, heights)`: the crops of evaluation, without randomness.
- `random_crops(scale, ratio, widths, heights, numbers)`: the crops of training. `scale`: lowest and
  highest area of the crop as a share of the image's, array (2, N). `ratio`: lowest and highest
  width / height of the crop, array (2, N). `numbers`: three arrays of random numbers in [0, 1): for
  the areas and for the ratios of up to `CROP_TRIES` attempts, each (N, `CROP_TRIES`), and for the
  positions, (N, 2). If no attempt fits into the image, the crop is the largest of an allowed ratio.
- `detail_crops(preprocess, crops, position)`: squares inside `crops`, with sides of `crop_size`
  pixels, or the largest squares in smaller crops. `crops` comes from one of the functions above.
  `position`: random numbers in [0, 1), (N, 2). None (the default): the center.

`PreprocessSettings` is the table `[preprocess]` of a recipe. Its sizes and its filter may be None:
`resolved()` of `model/backbones/resolve.py` fills them in from the network's weights.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Filter = Literal["bilinear", "bicubic", "lanczos"]

FILTERS: tuple[Filter, ...] = ("bilinear", "bicubic", "lanczos")
"""Resampling filters, all antialiased. `AugmentParams.filter` and `AugmentParams.crop_filter` are
positions in this tuple.
"""

CROP_TRIES = 10
"""Number of random crops that are tried before the largest allowed one is taken."""

Crops = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Top, left, height and width of N crops in pixels, each int32 (N,)."""


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings:
    """Table `[preprocess]` of a recipe. None: the value that the network's weights were trained
    with (`model.backbones.resolve.resolved`).
    """

    crop_size: int | None = None
    """Side of the network's square input in pixels: the center crop in evaluation, the random crop
    in training. Range: at least 16"""
    resize_size: int | None = None
    """Length of the image's shorter side before the center crop, in pixels. Range: at least
    crop_size"""
    interpolation: Filter | None = None
    """Filter for resizing, in evaluation and in training."""
    detail_crop: bool = False
    """Whether the network also sees a second crop of each image, at full resolution. Needs the head
    `stages` or `class_tokens`."""


@dataclass(frozen=True, kw_only=True)
class Preprocess(PreprocessSettings):
    """Evaluation preprocessing: resize the shorter side to `resize_size` pixels with the filter
    `interpolation`, then take a center crop of `crop_size` x `crop_size` pixels.

    Training crops are resized to `crop_size` with the same filter.

    With `detail_crop`, a second crop of `crop_size` x `crop_size` pixels is taken from the first
    one before it is resized: its center in evaluation, a random place in training. It keeps the
    traces of generation that resizing removes. Both crops are one image of `shape` pixels, the
    detail below.

    Raises:
        ValueError: not 16 <= crop_size <= resize_size.
    """

    crop_size: int = 256
    resize_size: int = 288
    interpolation: Filter = "bilinear"

    @property
    def crops(self) -> int:
        """Number of crops of an image that the network sees: 1, or 2 with `detail_crop`."""
        return 1 + self.detail_crop

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the network's input in pixels: the crops, one below the other."""
        return self.crops * self.crop_size, self.crop_size

    def __post_init__(self) -> None:
        if not 16 <= self.crop_size <= self.resize_size:
            raise ValueError(
                "crop_size and resize_size must satisfy 16 <= crop_size <= resize_size, got "
                f"{self.crop_size} and {self.resize_size}"
            )


def center_crops(preprocess: Preprocess, widths: np.ndarray, heights: np.ndarray) -> Crops:
    """Compute the center crops of N images of `widths` x `heights` pixels, int (N,).

    Cropping `crop_size / resize_size` of the shorter side and resizing once equals resizing the
    whole image and cropping the center, up to the rounding of the crop to whole pixels.
    """
    shorter = np.minimum(widths, heights)
    side = np.maximum(1, np.rint(shorter * preprocess.crop_size / preprocess.resize_size))
    side = side.astype(np.int32)
    return (heights - side) // 2, (widths - side) // 2, side, side


def random_crops(
    scale: np.ndarray,
    ratio: np.ndarray,
    widths: np.ndarray,
    heights: np.ndarray,
    numbers: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> Crops:
    """Sample torchvision's random resized crop (Inception's): the first of ten tries that fits.

    `scale` and `ratio`, float (2, N), are the ranges of each image. `numbers`, in [0, 1), are areas
    and ratios to try, (N, `CROP_TRIES`), and the position, (N, 2).
    """
    areas, ratios, position = numbers
    low, high = ratio
    area = (scale[0, :, None] + (scale[1] - scale[0])[:, None] * areas) * (widths * heights)[
        :, None
    ]
    logs = np.log(ratio)[..., None]
    tried = np.exp(logs[0] + (logs[1] - logs[0]) * ratios)
    tried_width, tried_height = np.rint(np.sqrt(area * tried)), np.rint(np.sqrt(area / tried))
    fits = (0 < tried_width) & (tried_width <= widths[:, None])
    fits &= (0 < tried_height) & (tried_height <= heights[:, None])
    first = np.argmax(fits, axis=1)[:, None]
    width = np.take_along_axis(tried_width, first, 1)[:, 0]
    height = np.take_along_axis(tried_height, first, 1)[:, 0]
    # If no try fits (a very long image), take the largest crop of an allowed ratio.
    none = ~fits.any(axis=1)
    width = np.where(none, np.clip(np.rint(heights * high), 1, widths), width)
    height = np.where(none, np.clip(np.rint(widths / low), 1, heights), height)
    top = position[:, 0] * (heights - height + 1)
    left = position[:, 1] * (widths - width + 1)
    top, left, height, width = (c.astype(np.int32) for c in (top, left, height, width))
    return top, left, height, width


def lerp(limits: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Map `share`, in [0, 1), to a number between `limits[0]` and `limits[1]`."""
    return limits[0] + (limits[1] - limits[0]) * share


def detail_crops(preprocess: Preprocess, crops: Crops, position: np.ndarray | None = None) -> Crops:
    """Return squares of `crop_size` pixels inside `crops`, or the largest squares inside those that
    are smaller. `position`, float (N, 2) in [0, 1), is random; without it, the center is taken.
    """
    top, left, height, width = crops
    side = np.minimum(preprocess.crop_size, np.minimum(height, width)).astype(np.int32)
    down, right = height - side, width - side
    if position is None:
        down, right = down // 2, right // 2
    else:
        down, right = position[:, 0] * (down + 1), position[:, 1] * (right + 1)
    return top + down.astype(np.int32), left + right.astype(np.int32), side, side
