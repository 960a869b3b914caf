"""Define the DALI operators that decode and augment a batch of images. Importing this module needs
DALI.

Main entry: `graph(feed, shape, on_gpu, hw_decoder_load)` returns a DALI pipeline that is not built
yet. Its output is the batch, uint8 (B, *shape, 3) RGB. The order of operations is that of
`pipeline/augment.py`. Two kinds of steps are left out, because `pipeline/dali.py` does them on the
CPU: before the graph, those for the whole image (resizing, JPEG and WebP before the crop); after
it, the last one (the WebP compression of the crop). The graph ignores their parameters.

- `feed`: a function without arguments, which DALI calls for each batch; it returns what
  `columns_of()` returns, or raises StopIteration at the end.
- `shape`: (height, width) of the output images in pixels, the field `shape` of a `Preprocess`.
- `on_gpu`: whether the operators run on the GPU.
- `hw_decoder_load`: share of the JPEGs, 0 to 1, that the GPU's JPEG engine decodes (default 0.65).

Keyword arguments of every DALI pipeline are taken, too. Two must be given, or the pipeline cannot
be built: `batch_size` (the largest number of images in a batch) and `num_threads` (CPU threads).
`device_id` is the number of the GPU (None, the default: the current one, if `on_gpu`).

`columns_of(data, orientations, params, shape)` returns the inputs of one batch, a tuple in the
order of `columns_for(shape)`, which returns the columns that images of this shape need.

- `data`: a list of B image files as bytes, in formats that DALI decodes (JPEG, PNG, WebP, ...). For
  a damaged file, the pipeline's `run()` raises RuntimeError or even ends the process;
  `pipeline/dali.py` checks the files before.
- `orientations`: a list of B EXIF orientations, 1 to 8.
- `params`: an `AugmentBatch`, the augmentation parameters of the B images.
- `shape`: as above.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from imaging.orientation import is_transposed, mirrored
from pipeline.augment import BLUR_TAPS, GRID, LEAST_SIGMA, AugmentBatch
from pipeline.color import GRAY

HW_DECODER_LOAD = 0.65
"""Share of JPEGs decoded by the GPU's JPEG engine, if it has one; its cores decode the rest. This
is DALI's default.
"""

# DALI's names of `preprocess.FILTERS`.
_FILTERS = np.array(
    [int(kind) for kind in (types.INTERP_LINEAR, types.INTERP_CUBIC, types.INTERP_LANCZOS3)],
    np.int32,
)


_TURNS = np.array(
    [(is_transposed(number), *mirrored(number)) for number in range(9)], np.bool_
)  # row: EXIF orientation; columns: transposed, rows mirrored, columns mirrored


class GraphInput(NamedTuple):
    """Input of the graph for one batch: encoded images, their parameters, bool (3, N) flags that
    make the images upright (see `_TURNS`), and the side of a crop in pixels.
    """

    data: list[bytes]
    params: AugmentBatch
    turns: np.ndarray
    size: int


class Column(NamedTuple):
    """Input of the graph: dtype, dimensions per sample, and a function that returns its values for
    a batch.
    """

    dtype: Any
    dimensions: int
    values: Callable[[GraphInput], Any]


def _of(name: str, dtype: Any) -> Column:
    """Return the column of a parameter whose only conversion is its dtype."""
    numpy_dtype = {types.INT32: np.int32, types.FLOAT: np.float32, types.BOOL: np.bool_}[dtype]
    return Column(dtype, 0, lambda fed: getattr(fed.params, name).astype(numpy_dtype, copy=False))


def _pair(first: str, second: str) -> Column:
    """Return the column of two parameters of an image."""
    return Column(
        types.INT32,
        1,
        lambda fed: np.stack([getattr(fed.params, first), getattr(fed.params, second)], axis=1),
    )


def _matrices(fed: GraphInput) -> np.ndarray:
    return fed.params.color.reshape(-1, 3, 4)


COLUMNS = {
    "data": Column(
        types.UINT8, 1, lambda fed: [np.frombuffer(item, np.uint8) for item in fed.data]
    ),
    "transposed": Column(types.BOOL, 0, lambda fed: fed.turns[0]),
    "mirrored": Column(types.BOOL, 0, lambda fed: fed.turns[1] | fed.turns[2]),
    "mirrored_rows": Column(types.INT32, 0, lambda fed: fed.turns[1].astype(np.int32)),
    "mirrored_columns": Column(types.INT32, 0, lambda fed: fed.turns[2].astype(np.int32)),
    "anchor": _pair("top", "left"),
    "shape": _pair("height", "width"),
    "detail_anchor": _pair("detail_top", "detail_left"),
    "detail_shape": _pair("detail_side", "detail_side"),
    "crop_filter": Column(types.INT32, 0, lambda fed: _FILTERS[fed.params.crop_filter]),
    "hflip": _of("hflip", types.INT32),
    "vflip": _of("vflip", types.INT32),
    "color_jitter": _of("color_jitter", types.BOOL),
    "matrix": Column(types.FLOAT, 2, lambda fed: np.ascontiguousarray(_matrices(fed)[:, :, :3])),
    "offset": Column(types.FLOAT, 1, lambda fed: np.ascontiguousarray(_matrices(fed)[:, :, 3])),
    "resample": _of("resample", types.FLOAT),
    "filter": Column(types.INT32, 0, lambda fed: _FILTERS[fed.params.filter]),
    "jpeg": _of("jpeg", types.INT32),
    "jpeg2": _of("jpeg2", types.INT32),
    "jpeg3": _of("jpeg3", types.INT32),
    "blur": Column(
        types.FLOAT, 0,
        lambda fed: np.where(fed.params.blur >= LEAST_SIGMA, fed.params.blur, 0).astype(np.float32),
    ),
    "grayscale": _of("grayscale", types.BOOL),
    "side": Column(
        types.FLOAT, 0, lambda fed: (fed.size + GRID * fed.params.moved).astype(np.float32)
    ),
    "moved": _of("moved", types.BOOL),
    "grid": _pair("grid_top", "grid_left"),
}  # fmt: skip
"""Inputs of the graph by name, in the order in which they are fed."""


@pipeline_def(enable_conditionals=True)
def graph(
    feed: Callable[[], tuple],
    shape: tuple[int, int],
    on_gpu: bool,
    hw_decoder_load: float = HW_DECODER_LOAD,
) -> Any:
    """Define the DALI graph: encoded images and columns in, (*shape, 3) uint8 out. The order of
    operations is that of `augment`.
    """
    columns = columns_for(shape)
    outputs = fn.external_source(
        source=feed,
        num_outputs=len(columns),
        batch=True,
        dtype=[column.dtype for column in columns.values()],
        ndim=[column.dimensions for column in columns.values()],
    )
    fed = dict(zip(columns, outputs))  # noqa: B905  DALI's zip takes no strict
    image = fn.decoders.image(
        fed["data"],
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,  # the index has it; DALI reads fewer kinds of metadata
        jpeg_fancy_upsampling=True,
        use_fast_idct=False,
        hw_decoder_load=hw_decoder_load,
    )
    if fed["transposed"]:
        image = fn.transpose(image, perm=[1, 0, 2], transpose_layout=False, output_layout="HWC")
    if fed["mirrored"]:
        image = fn.flip(image, vertical=fed["mirrored_rows"], horizontal=fed["mirrored_columns"])
    crop = fn.slice(image, fed["anchor"], fed["shape"], axes=(0, 1))
    crop = _augmented(crop, fed, shape[1], on_gpu)
    if shape[0] == shape[1]:
        return crop
    detail = fn.slice(image, fed["detail_anchor"], fed["detail_shape"], axes=(0, 1))
    return fn.cat(crop, _augmented(detail, fed, shape[1], on_gpu), axis=0)


def _augmented(image: Any, fed: dict[str, Any], size: int, on_gpu: bool) -> Any:
    """Resize a crop to `size` pixels and augment it."""
    side = fed["side"]
    image = _resize(image, side, fn.reinterpret(fed["crop_filter"], dtype=types.INTERP_TYPE))
    image = fn.flip(image, horizontal=fed["hflip"], vertical=fed["vflip"])
    if fed["color_jitter"]:
        image = _color(image, fed["matrix"], fed["offset"])
    if fed["resample"] > 0.0:
        kind = fn.reinterpret(fed["filter"], dtype=types.INTERP_TYPE)
        image = _resize(_resize(image, fed["resample"], kind), side, kind)
    if fed["jpeg"] > 0:
        image = _jpeg(image, fed["jpeg"], on_gpu)
    if fed["jpeg2"] > 0:
        image = _jpeg(image, fed["jpeg2"], on_gpu)
    if fed["jpeg3"] > 0:
        image = _jpeg(image, fed["jpeg3"], on_gpu)
    if fed["blur"] > 0.0:
        image = fn.gaussian_blur(image, sigma=fed["blur"], window_size=BLUR_TAPS)
    if fed["grayscale"]:
        rows = np.array(GRAY, np.float32).reshape(3, 4)
        image = _color(image, rows[:, :3].ravel().tolist(), rows[:, 3].tolist())
    if fed["moved"]:
        image = fn.slice(image, start=fed["grid"], shape=[size, size], axes=[0, 1])
    return image


def _resize(image: Any, side: Any, kind: Any) -> Any:
    """Resize as Pillow does: antialiased, and without shifting the grid by part of a pixel."""
    return fn.resize(
        image,
        resize_x=side,
        resize_y=side,
        interp_type=kind,
        antialias=True,
        subpixel_scale=False,
    )


def _color(image: Any, matrix: Any, offset: Any) -> Any:
    turned = fn.coord_transform(image, M=matrix, T=offset, dtype=types.UINT8)
    return fn.reshape(turned, layout="HWC")


def _jpeg(image: Any, quality: Any, on_gpu: bool) -> Any:
    """Encode and decode with libjpeg on the CPU. DALI's GPU operator is another algorithm, so a GPU
    batch is copied to the CPU for this step: 200 kB per image that has it.
    """
    if not on_gpu:
        return fn.jpeg_compression_distortion(image, quality=quality)
    return fn.jpeg_compression_distortion(image.cpu(), quality=quality, device="cpu").gpu()


def columns_for(shape: tuple[int, int]) -> dict[str, Column]:
    """Return those of `COLUMNS` that the graph for images of `shape` uses. DALI warns of unused
    inputs.
    """
    return {
        name: column
        for name, column in COLUMNS.items()
        if shape[0] > shape[1] or not name.startswith("detail_")
    }


def columns_of(
    data: list[bytes], orientations: list[int], params: AugmentBatch, shape: tuple[int, int]
) -> tuple:
    """Return the graph's inputs for one batch, in the order of `columns_for(shape)`."""
    turns = np.ascontiguousarray(_TURNS[orientations].T)
    fed = GraphInput(data, params, turns, shape[1])
    return tuple(column.values(fed) for column in columns_for(shape).values())
