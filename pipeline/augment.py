"""Sample the parameters of image augmentations: crop, flips, color, resizing, JPEG, blur and WebP.

Main entry: `sample_params(policies, policy, preprocess, widths, heights, keys, partners)` returns,
for N training images, an `AugmentBatch`: an array of N values per field of `AugmentParams`.

- `policies`: `PolicyTable([AugmentPolicy(hflip=0.5), ...])`. `scale`, `ratio`, `blur_sigma`,
  `num_jpegs` (1 to 3 in a row) and those in `_scale` or `_quality` are pairs (least, most);
  `brightness` to `hue` are largest changes, `resample_filters` names of filters, all others are
  probabilities. The defaults change nothing. `match_pair_jpeg` has no effect: see `partners`.
- `policy`: position of each image's policy in `policies`, int (N,).
- `preprocess`: side of the output, filter and whether there is a detail crop:
  `Preprocess(crop_size=256, interpolation="bicubic")`.
- `widths`, `heights`: sizes of the upright images in pixels, int (N,).
- `keys`: key of the random numbers: `SampleKeys(seed, epoch, samples, repeat_index)`. `seed` and
  `epoch`: ints from 0 on. `samples`: row numbers of the images, int (N,). `repeat_index`: how many
  times each image was already used in this epoch, int (N,) (None, the default: never).
- `partners`: None (the default), or two int arrays (N,): quality and chroma (position in
  `imaging.jpeg.CHROMAS`) of a JPEG to which the whole image is compressed in place of `whole_jpeg`
  of its policy (0 for a policy with `match_pair_jpeg`). Where the quality is 0, the policy decides.

`center_crop_params(preprocess, widths, heights)` returns the `AugmentBatch` of evaluation: a center
crop. `AugmentPolicy` and `Preprocess` raise ValueError for a setting out of range. Order: resizing,
JPEG and WebP of the whole image, crop, flips, color, resampling, JPEGs, blur, grayscale, WebP.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from imaging.jpeg import CHROMAS
from pipeline.color import IDENTITY, color_matrices
from pipeline.philox import uniform
from pipeline.preprocess import (
    CROP_TRIES,
    FILTERS,
    Crops,
    Filter,
    Preprocess,
    center_crops,
    detail_crops,
    lerp,
    random_crops,
)

Range = tuple[float, float]

_PAIRS = (Range, tuple[int, int])
"""Types of the fields of `AugmentPolicy` that are pairs (least, most)."""

BLUR_TAPS = 3
LEAST_SIGMA = 0.25
"""Sigma in pixels below which backends skip the 3 x 3 Gaussian blur, because no 8-bit value would
change. Each of the two passes changes a value by at most 510 times the outer weight, exp(-1 / (2
sigma^2)). Both passes together change a value by at most 0.34 gray levels.
"""

GRID = 16
"""Pixels after which the blocks of a 4:2:0 JPEG repeat: a block of chroma covers 16 x 16 pixels."""


@dataclass(frozen=True, kw_only=True)
class AugmentPolicy:
    """One augmentation policy: the ranges that parameters are sampled from. The defaults change
    nothing.
    """

    scale: Range = (1.0, 1.0)
    """Area of the crop, as a share of the image's area. Range: above 0, at most 1"""
    ratio: Range = (1.0, 1.0)
    """Width / height of the crop. Range: above 0"""
    hflip: float = 0.0
    """Probability of a horizontal flip. Range: 0 to 1"""
    color_jitter: float = 0.0
    """Probability that brightness, contrast, saturation and hue are changed. Range: 0 to 1"""
    brightness: float = 0.0
    """Brightness changes by a factor of 1 +- value. Range: 0 to 1"""
    contrast: float = 0.0
    """Contrast changes by a factor of 1 +- value. Range: 0 to 1"""
    saturation: float = 0.0
    """Saturation changes by a factor of 1 +- value. Range: 0 to 1"""
    hue: float = 0.0
    """Hue changes by +- value of the full color circle. Range: 0 to 1"""
    resample: float = 0.0
    """Probability of scaling down and back up. Range: 0 to 1"""
    resample_scale: Range = (1.0, 1.0)
    """Side of the intermediate image, as a share of the crop's side. Range: above 0"""
    jpeg: float = 0.0
    """Probability of JPEG compression. Range: 0 to 1"""
    jpeg_quality: tuple[int, int] = (95, 95)
    """libjpeg quality. Range: 1 to 100"""
    blur: float = 0.0
    """Probability of a 3 x 3 Gaussian blur. Range: 0 to 1"""
    blur_sigma: Range = (0.1, 0.1)
    """Sigma of the blur in pixels. Range: above 0"""
    grayscale: float = 0.0
    """Probability of conversion to gray. Range: 0 to 1"""
    resample_filters: tuple[Filter, ...] = ("bilinear",)
    """Filters that `resample` chooses from. One that is named twice is chosen twice as often."""
    num_jpegs: tuple[int, int] = (1, 1)
    """Number of successive JPEG compressions, if `jpeg` applies. Range: 1 to 3"""
    jpeg_grid_shift: float = 0.0
    """Probability that the JPEG blocks are shifted from the image's corner, by 0 to 15 pixels down
    and right. Range: 0 to 1"""
    webp: float = 0.0
    """Probability of WebP compression at the end. Range: 0 to 1"""
    webp_quality: tuple[int, int] = (95, 95)
    """libwebp quality. Range: 1 to 100"""
    match_pair_jpeg: bool = False
    """Compress a fake as JPEG with the quality and chroma subsampling of its real partner, if the
    index has one (`pipeline/pairs.py`). Excludes `whole_jpeg`, `whole_resize` and `whole_webp`."""
    vflip: float = 0.0
    """Probability of a vertical flip. Range: 0 to 1"""
    whole_jpeg: float = 0.0
    """Probability of JPEG compression (4:2:0) of the whole image before the crop, as web sites do.
    Range: 0 to 1"""
    whole_jpeg_quality: tuple[int, int] = (95, 95)
    """libjpeg quality of `whole_jpeg`. Range: 1 to 100"""
    whole_resize: float = 0.0
    """Probability of resizing the whole image, before `whole_jpeg`, with one of `resample_filters`.
    The shorter side does not become smaller than `crop_size`. Range: 0 to 1"""
    whole_resize_scale: Range = (1.0, 1.0)
    """Factor of both sides in `whole_resize`. Range: above 0, at most 2"""
    whole_webp: float = 0.0
    """Probability of WebP compression of the whole image, after `whole_jpeg`. Range: 0 to 1"""
    whole_webp_quality: tuple[int, int] = (95, 95)
    """libwebp quality of `whole_webp`. Range: 1 to 100"""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and not 0.0 <= value <= 1.0:
                raise ValueError(f"{field.name} must be from 0 to 1, got {value}")
            if field.type in _PAIRS and (len(value) != 2 or not 0 < value[0] <= value[1]):
                raise ValueError(f"{field.name} must be 0 < low <= high, got {list(value)}")
        if self.match_pair_jpeg and (self.whole_jpeg or self.whole_resize or self.whole_webp):
            raise ValueError(
                "match_pair_jpeg gives a fake the stored compression of its real partner; whole_* "
                "would change only the partner's: set whole_jpeg, whole_resize and whole_webp to 0"
            )
        if not self.resample_filters or not set(self.resample_filters) <= set(FILTERS):
            raise ValueError(
                f"resample_filters takes one or more of {', '.join(FILTERS)}, got "
                f"{list(self.resample_filters)}"
            )
        if self.scale[1] > 1:
            raise ValueError(f"scale is a share of the area, at most 1, got {list(self.scale)}")
        qualities = ("jpeg_quality", "webp_quality", "whole_jpeg_quality", "whole_webp_quality")
        limits = {**dict.fromkeys(qualities, 100), "num_jpegs": 3, "whole_resize_scale": 2}
        for name, most in limits.items():
            if getattr(self, name)[1] > most:
                raise ValueError(f"{name} is at most {most}, got {list(getattr(self, name))}")


class AugmentParams(NamedTuple):
    """Sampled parameters of one image: plain numbers, no ranges, nothing random.

    - `top`, `left`, `height`, `width`: crop in pixels of the upright image.
    - `crop_filter`, `filter`: positions in `FILTERS`, for resizing the crop and for `resample`.
    - `color`: 3 x 4 matrix, row by row, applied to RGB values of 0 to 255.
    - `resample`: intermediate side in pixels, 0 for none. `blur`: sigma in pixels, 0 for none.
    - `jpeg`, `jpeg2`, `jpeg3`: qualities of successive JPEGs, 0 for none. `webp`: likewise.
    - `grid_top`, `grid_left`: distance of the image's corner from the corner of a chroma block, in
      pixels, 0 to 15.
    - `whole_height`, `whole_width`: size to which the whole image is resized before everything
      else, 0 for none. `whole_filter`: its filter. `top`, `left`, ... are pixels of the result.
    - `whole_jpeg`: quality of a JPEG of the whole image before the crop, 0 for none.
      `whole_chroma`: its chroma subsampling, a position in `imaging.jpeg.CHROMAS`. `whole_webp`:
      quality of a WebP of the whole image after it, 0 for none.
    - `detail_top`, `detail_left`, `detail_side`: square of a second crop in pixels of the upright
      image, side 0 for none. It is augmented like the first one, and placed below it.
    """

    top: int
    left: int
    height: int
    width: int
    hflip: bool = False
    color: tuple[float, ...] = IDENTITY
    resample: int = 0
    jpeg: int = 0
    blur: float = 0.0
    grayscale: bool = False
    filter: int = 0
    jpeg2: int = 0
    jpeg3: int = 0
    grid_top: int = 0
    grid_left: int = 0
    webp: int = 0
    whole_jpeg: int = 0
    whole_chroma: int = 0
    vflip: bool = False
    crop_filter: int = 0
    detail_top: int = 0
    detail_left: int = 0
    detail_side: int = 0
    whole_height: int = 0
    whole_width: int = 0
    whole_filter: int = 0
    whole_webp: int = 0

    @property
    def windows(self) -> list[tuple[int, int, int, int]]:
        """Crops of the image, (top, left, height, width) in pixels: the one that is resized, then
        the detail if there is one.
        """
        crops = [(self.top, self.left, self.height, self.width)]
        if side := self.detail_side:
            crops.append((self.detail_top, self.detail_left, side, side))
        return crops


_DTYPES = {int: np.int32, bool: np.bool_, float: np.float64, tuple[float, ...]: np.float32}
"""Dtype of a column, by the type annotation of its field in `AugmentParams`."""


class AugmentBatch:
    """Parameters of a batch: one column per field of `AugmentParams`, as an attribute with the
    field's name.

    A column has shape (N,), `color` (N, 12). Its dtype is int32, bool, float64 or float32, by the
    type of the field. A field that is not given has its default for every image.

    Raises:
        TypeError: an argument that is no field of `AugmentParams`.
    """

    def __init__(self, **columns: np.ndarray):
        if unknown := columns.keys() - set(AugmentParams._fields):
            raise TypeError(f"AugmentParams has no field {', '.join(sorted(unknown))}")
        count = len(next(iter(columns.values())))
        self._columns: dict[str, np.ndarray] = {}
        for name in AugmentParams._fields:
            values = columns.get(name)
            if values is None:
                default = np.asarray(AugmentParams._field_defaults[name])
                values = np.broadcast_to(default, (count, *default.shape))
            dtype = _DTYPES[AugmentParams.__annotations__[name]]
            self._columns[name] = np.ascontiguousarray(values, dtype)

    def __getattr__(self, name: str) -> np.ndarray:
        if name.startswith("_") or name not in self._columns:
            raise AttributeError(f"AugmentParams has no field {name}")
        return self._columns[name]

    def __len__(self) -> int:
        return len(self._columns["top"])

    @property
    def moved(self) -> np.ndarray:
        """Images to which `jpeg_grid_shift` applies, bool (N,). Backends process these images with
        a margin of `GRID` pixels and cut it off at the end.
        """
        return (self.grid_top > 0) | (self.grid_left > 0)

    @property
    def color_jitter(self) -> np.ndarray:
        """Images whose color matrix is not `IDENTITY`, bool (N,)."""
        return (self.color != np.array(IDENTITY, np.float32)).any(axis=1)

    def row(self, index: int) -> AugmentParams:
        """Return the parameters of one image."""
        return next(self.take(np.array([index])).rows())

    def rows(self) -> Iterator[AugmentParams]:
        """Yield the parameters of each image."""
        columns = [column.tolist() for column in self._columns.values()]
        for values in zip(*columns, strict=True):
            row = AugmentParams(*values)
            yield row._replace(color=tuple(row.color))

    def take(self, rows: np.ndarray | slice) -> "AugmentBatch":
        """Return the parameters of the images `rows`."""
        return AugmentBatch(**{name: column[rows] for name, column in self._columns.items()})


def concatenate(batches: Sequence[AugmentBatch]) -> AugmentBatch:
    """Join batches into one, in order."""
    return AugmentBatch(
        **{
            name: np.concatenate([getattr(batch, name) for batch in batches])
            for name in AugmentParams._fields
        }
    )


def blank(params: AugmentBatch, rows: Sequence[int]) -> AugmentBatch:
    """Replace the parameters of `rows` with a crop of 1 x 1 pixel, which fits every image."""
    smallest = stack([AugmentParams(0, 0, 1, 1)])
    columns = {name: getattr(params, name).copy() for name in AugmentParams._fields}
    for name, column in columns.items():
        column[list(rows)] = getattr(smallest, name)
    return AugmentBatch(**columns)


def stack(params: Sequence[AugmentParams]) -> AugmentBatch:
    """Convert the parameters of single images to columns."""
    columns = zip(AugmentParams._fields, zip(*params, strict=True), strict=True)
    return AugmentBatch(**{name: np.array(column) for name, column in columns})


_NUMBERS = np.cumsum([CROP_TRIES, CROP_TRIES, 2, 6, 4, 3, 10, 2, 2, 5])
"""End of each group of random numbers among those of one sample: areas to try, ratios to try, crop
position, six for whether an operation happens, four color factors, three positions in a range, ten
for harsher policies, two for the JPEG of the whole image, the position of the detail crop, five for
resizing and WebP of the whole image. The groups are the same for every policy, so that a changed
probability does not shift the other numbers.
"""


class PolicyTable:
    """Augmentation policies as arrays: row i has the ranges of `policies[i]`."""

    def __init__(self, policies: Sequence[AugmentPolicy]):
        self._columns = {
            field.name: np.array([getattr(policy, field.name) for policy in policies], np.float64)
            for field in fields(AugmentPolicy)
            if field.name != "resample_filters"
        }
        codes = [[FILTERS.index(name) for name in policy.resample_filters] for policy in policies]
        self._filter_counts = np.array([len(row) for row in codes])
        longest = max(map(len, codes), default=0)
        self._filters = np.array([row + [0] * (longest - len(row)) for row in codes])

    def filter(self, rows: np.ndarray, share: np.ndarray) -> np.ndarray:
        """Choose a filter for each row, int32 (N,) positions in `FILTERS`. `share`, float (N,) in
        [0, 1), selects from the row's list of filters.
        """
        index = np.floor(share * self._filter_counts[rows]).astype(np.int64)
        return self._filters[rows, index].astype(np.int32)

    def of(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return each setting for `rows`, float64: (N,), or (2, N) for a range."""
        return {name: column[rows].T for name, column in self._columns.items()}


class SampleKeys(NamedTuple):
    """Key of the random numbers of N samples: the run's seed, the epoch, the sample numbers, int
    (N,), and how many times the epoch had each sample before, int (N,), or None for never.
    """

    seed: int
    epoch: int
    samples: np.ndarray
    repeat_index: np.ndarray | None = None


def sample_params(
    policies: PolicyTable,
    policy: np.ndarray,
    preprocess: Preprocess,
    widths: np.ndarray,
    heights: np.ndarray,
    keys: SampleKeys,
    partners: tuple[np.ndarray, np.ndarray] | None = None,
) -> AugmentBatch:
    """Sample the parameters of N upright images of `widths` x `heights` pixels.

    `policy` is each image's row in `policies`. `partners` are the quality and the chroma
    subsampling (`CHROMAS`) of the JPEG that each image is first compressed to, quality 0 for none
    (`pipeline/pairs.py`). All arrays are int (N,).
    """
    ranges = policies.of(policy)
    numbers = uniform(keys.seed, keys.epoch, keys.samples, _NUMBERS[-1], keys.repeat_index)
    areas, ratios, position, chance, color, within, more, whole, detail, extra = np.split(
        numbers, _NUMBERS[:-1], axis=1
    )
    resized = _whole_sizes(ranges, preprocess, widths, heights, extra)
    widths, heights = np.where(np.array(resized) > 0, resized, (widths, heights))
    crops = random_crops(
        ranges["scale"], ranges["ratio"], widths, heights, (areas, ratios, position)
    )
    top, left, height, width = crops
    happens = {
        name: chance[:, index] < ranges[name]
        for index, name in enumerate(
            ("hflip", "color_jitter", "resample", "jpeg", "blur", "grayscale")
        )
    }
    side = np.rint(preprocess.crop_size * lerp(ranges["resample_scale"], within[:, 0]))
    jpegs = np.where(happens["jpeg"], _whole(ranges["num_jpegs"], more[:, 0]), 0)
    qualities = [
        np.where(jpegs > index, _whole(ranges["jpeg_quality"], share), 0)
        for index, share in enumerate((within[:, 1], more[:, 1], more[:, 2]))
    ]
    webp = np.where(more[:, 4] < ranges["webp"], _whole(ranges["webp_quality"], more[:, 5]), 0)
    moved = (more[:, 6] < ranges["jpeg_grid_shift"])[:, None] * np.floor(more[:, 7:9] * GRID)
    sigma = lerp(ranges["blur_sigma"], within[:, 2])
    quality = _whole(ranges["whole_jpeg_quality"], whole[:, 1])
    whole_jpeg = np.where(whole[:, 0] < ranges["whole_jpeg"], quality, 0)
    whole_chroma = np.full(len(keys.samples), CHROMAS.index("420"))
    if partners:
        paired = partners[0] > 0
        whole_jpeg = np.where(paired, partners[0], whole_jpeg)
        whole_chroma = np.where(paired, partners[1], whole_chroma)
    jitter = _color_jitter(ranges, 2 * color - 1)
    return AugmentBatch(
        top=top,
        left=left,
        height=height,
        width=width,
        hflip=happens["hflip"],
        color=np.where(happens["color_jitter"][:, None], jitter, np.array(IDENTITY, np.float32)),
        resample=np.where(happens["resample"], side, 0),
        jpeg=qualities[0],
        blur=np.where(happens["blur"], sigma, 0.0),
        grayscale=happens["grayscale"],
        filter=np.where(happens["resample"], policies.filter(policy, more[:, 3]), 0),
        jpeg2=qualities[1],
        jpeg3=qualities[2],
        grid_top=moved[:, 0],
        grid_left=moved[:, 1],
        webp=webp,
        whole_jpeg=whole_jpeg,
        whole_chroma=np.where(whole_jpeg > 0, whole_chroma, 0),
        whole_width=resized[0],
        whole_height=resized[1],
        whole_filter=np.where(resized[0] > 0, policies.filter(policy, extra[:, 2]), 0),
        whole_webp=np.where(
            extra[:, 3] < ranges["whole_webp"],
            _whole(ranges["whole_webp_quality"], extra[:, 4]),
            0,
        ),
        vflip=more[:, 9] < ranges["vflip"],
        crop_filter=_crop_filters(preprocess, len(keys.samples)),
        **_detail_columns(preprocess, crops, detail),
    )


def center_crop_params(
    preprocess: Preprocess, widths: np.ndarray, heights: np.ndarray
) -> AugmentBatch:
    """Compute the parameters of evaluation: the center crop of N upright images of `widths` x
    `heights` pixels, int (N,). Nothing is random.
    """
    crops = center_crops(preprocess, widths, heights)
    top, left, height, width = crops
    return AugmentBatch(
        top=top,
        left=left,
        height=height,
        width=width,
        crop_filter=_crop_filters(preprocess, len(widths)),
        **_detail_columns(preprocess, crops),
    )


def _whole_sizes(
    ranges: dict[str, np.ndarray],
    preprocess: Preprocess,
    widths: np.ndarray,
    heights: np.ndarray,
    numbers: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Sample the width and height to which each whole image is resized, int32 (N,), 0 for none. The
    shorter side does not become smaller than the crop, as web sites leave small images alone.
    """
    factor = lerp(ranges["whole_resize_scale"], numbers[:, 1])
    least = np.minimum(1.0, preprocess.crop_size / np.minimum(widths, heights))
    factor = np.maximum(factor, least)
    happens = (numbers[:, 0] < ranges["whole_resize"]) & (factor != 1.0)
    width, height = (
        np.where(happens, np.maximum(1, np.rint(side * factor)), 0).astype(np.int32)
        for side in (widths, heights)
    )
    return width, height


def _detail_columns(
    preprocess: Preprocess, crops: Crops, position: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return the columns of the detail crop; none without `detail_crop`."""
    if not preprocess.detail_crop:
        return {}
    top, left, side, _ = detail_crops(preprocess, crops, position)
    return {"detail_top": top, "detail_left": left, "detail_side": side}


def _crop_filters(preprocess: Preprocess, count: int) -> np.ndarray:
    """Repeat the filter of `preprocess` for every image, int32 (N,)."""
    return np.full(count, FILTERS.index(preprocess.interpolation), np.int32)


def _whole(limits: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Map `share`, in [0, 1), to a whole number of the range `limits`, both ends included."""
    return limits[0] + np.floor(share * (limits[1] - limits[0] + 1))


def _color_jitter(ranges: dict[str, np.ndarray], factors: np.ndarray) -> np.ndarray:
    """Compute color matrices, float32 (N, 12), from `factors` between -1 and 1, float (N, 4)."""
    return color_matrices(
        brightness=1 + ranges["brightness"] * factors[:, 0],
        contrast=1 + ranges["contrast"] * factors[:, 1],
        saturation=1 + ranges["saturation"] * factors[:, 2],
        hue=ranges["hue"] * factors[:, 3],
    )
