"""THE AUGMENTATION: ranges in, one `Draw` per image out. Two backends only apply it.

The dice roll here and nowhere else, on the host, from the index's width and height. So the same
(seed, epoch, sample) gives the same picture with any backend, worker count, rank or resume.

Order of operations (as in the original recipe): random resized crop -> flip -> colour jitter ->
resample down and back up -> JPEG re-encode -> 3x3 blur -> grey.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

Range = tuple[float, float]

IDENTITY = (1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
"""A colour matrix that changes nothing: three rows of (red, green, blue, offset)."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of grey in RGB (ITU-R BT.601), those of JPEG and of Pillow's "L"."""

GREY = (*LUMA, 0.0, *LUMA, 0.0, *LUMA, 0.0)

TO_YIQ = np.array([LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)])
FROM_YIQ = np.linalg.inv(TO_YIQ)

BLUR_TAPS = 3


@dataclass(frozen=True, kw_only=True)
class View:
    """How a whole image is seen by the network: shorter side to `resize`, centre crop of `size`.

    Both in pixels. Training crops end at `size` as well.
    """

    size: int = 256
    resize: int = 288

    def __post_init__(self) -> None:
        if not 16 <= self.size <= self.resize:
            raise ValueError(f"needs 16 <= size <= resize, got {self.size} and {self.resize}")


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Ranges to draw from: one augmentation law. What is not named stays off.

    Fields without a range of their own are probabilities. `scale` is the share of the image's
    area that a crop takes, `ratio` its width / height; `brightness`, `contrast` and `saturation`
    vary by a factor of 1 +- value, `hue` by +- value of a full turn; `resample_scale` is relative
    to the view's side; `jpeg_quality` is libjpeg's 1 to 100; `blur_sigma` is in pixels.
    """

    scale: Range = (1.0, 1.0)
    ratio: Range = (1.0, 1.0)
    flip: float = 0.0
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    resample: float = 0.0
    resample_scale: Range = (1.0, 1.0)
    jpeg: float = 0.0
    jpeg_quality: tuple[int, int] = (95, 95)
    blur: float = 0.0
    blur_sigma: Range = (0.1, 0.1)
    grey: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "resample", "jpeg", "blur", "grey"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a probability, got {getattr(self, name)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and not 0 < value[0] <= value[1]:
                raise ValueError(f"{field.name} must be 0 < low <= high, got {list(value)}")
        if self.scale[1] > 1:
            raise ValueError(f"scale is a share of the area, at most 1, got {list(self.scale)}")
        if self.jpeg_quality[1] > 100:
            raise ValueError(f"jpeg_quality is at most 100, got {list(self.jpeg_quality)}")


class Draw(NamedTuple):
    """What happens to one image: plain numbers, no ranges, no dice.

    The crop is in pixels of the upright image; `colour` is a 3 x 4 matrix in rows on RGB values of
    0 to 255; `resample` is the intermediate side in pixels, `jpeg` the quality, `blur` the sigma,
    each 0 for "not at all".
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool = False
    colour: tuple[float, ...] = IDENTITY
    resample: int = 0
    jpeg: int = 0
    blur: float = 0.0
    grey: bool = False


def rng_for(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The dice of one sample in one epoch: counter-based, so no other sample matters."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, sample, 0, 0]))


def draw(augment: Augment, view: View, width: int, height: int, rng: np.random.Generator) -> Draw:
    """Roll the dice for an upright image of `width` x `height` pixels.

    Always takes the same count of random numbers, so one probability does not shift the others.
    """
    top, left, crop_height, crop_width = _crop(augment, width, height, rng)
    chance = rng.random(6)
    factors = rng.uniform(-1.0, 1.0, 4)
    within = rng.random(3)
    low, high = augment.jpeg_quality
    return Draw(
        top=top,
        left=left,
        height=crop_height,
        width=crop_width,
        flip=bool(chance[0] < augment.flip),
        colour=_jitter(augment, factors) if chance[1] < augment.jitter else IDENTITY,
        resample=round(view.size * _between(augment.resample_scale, within[0]))
        if chance[2] < augment.resample
        else 0,
        jpeg=low + int(within[1] * (high - low + 1)) if chance[3] < augment.jpeg else 0,
        blur=_between(augment.blur_sigma, within[2]) if chance[4] < augment.blur else 0.0,
        grey=bool(chance[5] < augment.grey),
    )


def centre(view: View, width: int, height: int) -> Draw:
    """Evaluation is a draw without dice: the part of the image that the view shows.

    Cropping `size / resize` of the shorter side and resizing once equals resizing the whole and
    cropping the centre, up to the rounding of the crop to whole pixels.
    """
    side = max(1, round(min(width, height) * view.size / view.resize))
    return Draw(top=(height - side) // 2, left=(width - side) // 2, height=side, width=side)


def _crop(
    augment: Augment, width: int, height: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Inception's random resized crop as torchvision does it, from one set of ten tries."""
    areas = rng.uniform(*augment.scale, 10) * (width * height)
    ratios = np.exp(rng.uniform(*np.log(augment.ratio), 10))
    place = rng.random(2)
    for area, ratio in zip(areas.tolist(), ratios.tolist(), strict=True):
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            break
    else:  # a very long image: the largest crop of an allowed ratio
        low, high = augment.ratio
        crop_width = max(1, min(width, round(height * high)))
        crop_height = max(1, min(height, round(width / low)))
    top = int(place[0] * (height - crop_height + 1))
    left = int(place[1] * (width - crop_width + 1))
    return top, left, crop_height, crop_width


def _between(limits: Range, share: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * float(share)


def _jitter(augment: Augment, factors: np.ndarray) -> tuple[float, ...]:
    return colour_matrix(
        brightness=1 + augment.brightness * factors[0],
        contrast=1 + augment.contrast * factors[1],
        saturation=1 + augment.saturation * factors[2],
        hue=augment.hue * factors[3],
    )


def colour_matrix(
    brightness: float = 1.0, contrast: float = 1.0, saturation: float = 1.0, hue: float = 0.0
) -> tuple[float, ...]:
    """Brightness, contrast, saturation and hue (in turns) as one 3 x 4 matrix, row by row.

    All four are linear here, unlike in torchvision, whose contrast needs the image's mean and
    whose hue goes through HSV: contrast pivots on mid-grey (127.5) and hue turns the chroma plane
    of YIQ (the NTSC primaries, as DALI's colour operators do). So the matrix is known before the
    pixels are, and both backends apply the very same numbers.
    """
    angle = 2 * math.pi * hue
    turn = np.array(
        [
            [1.0, 0.0, 0.0],
            [0.0, saturation * math.cos(angle), -saturation * math.sin(angle)],
            [0.0, saturation * math.sin(angle), saturation * math.cos(angle)],
        ]
    )
    linear = brightness * contrast * (FROM_YIQ @ turn @ TO_YIQ)
    offset = np.full((3, 1), 127.5 * (1.0 - contrast))
    return tuple(np.hstack([linear, offset]).astype(np.float32).ravel().tolist())


def stack(draws: Sequence[Draw]) -> dict[str, np.ndarray]:
    """Draws as columns, one row per image; `colour` is (N, 12) float32."""
    return {
        "top": np.array([d.top for d in draws], np.int32),
        "left": np.array([d.left for d in draws], np.int32),
        "height": np.array([d.height for d in draws], np.int32),
        "width": np.array([d.width for d in draws], np.int32),
        "flip": np.array([d.flip for d in draws], np.int32),
        "colour": np.array([d.colour for d in draws], np.float32),
        "resample": np.array([d.resample for d in draws], np.int32),
        "jpeg": np.array([d.jpeg for d in draws], np.int32),
        "blur": np.array([d.blur for d in draws], np.float32),
        "grey": np.array([d.grey for d in draws], np.bool_),
    }
