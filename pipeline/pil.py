"""Decode and augment images on the CPU without DALI: the reference backend, which works everywhere.

Main entry: `decode_request(request, shape)`.

- `request`: a `Request` (pipeline/batch.py): encoded images of a batch with their formats,
  orientations and augmentation parameters.
- `shape`: (height, width) of the output images in pixels, the field `shape` of a `Preprocess`.

It returns `DecodedBatch`, whose fields are:

- `images`: a CPU tensor uint8 (B, *shape, 3) RGB.
- `failures`: a dict, position in the batch -> reason, for images that cannot be read or decoded, or
  whose crop reaches outside the image. No error is raised; these images are black.
- `timing`: a `BatchTiming` (pipeline/batch.py): `read_s`, copied from the request, and `decode_s`,
  in seconds.

`apply(pixels, params, out)` augments one decoded image. It returns nothing, and raises ValueError
if a crop reaches outside the image.

- `pixels`: an upright image, NumPy uint8 (height, width, 3) RGB.
- `params`: its `AugmentParams`, such as `batch.row(0)` of an `AugmentBatch`.
- `out`: the tensor for the result, torch uint8 (size, size, 3), on the CPU. With a detail crop it
  is (2 * size, size, 3): the resized crop above, the detail below.

`preprocess(pixels, settings)` takes such an image and the settings of evaluation (`Preprocess`),
and returns the center crop, NumPy uint8 (*settings.shape, 3). `apply_whole(pixels, params)` does
the steps for the whole image alone (resizing, JPEG, WebP) and returns the image. JPEG or WebP is
left out if a side is longer than `JPEG_SIDE` or `WEBP_SIDE`. `refuse_crop_outside()` raises the
ValueError of `apply()`. The other functions are single steps on NumPy images; `resize(image, out,
kind)` takes two tensors, `kind` is a position in `FILTERS` (pipeline/preprocess.py), and
`encode_jpeg()` returns the JPEG as bytes.

JPEG is decoded by simplejpeg (exact inverse DCT) and encoded by Pillow, because simplejpeg's
encoder always takes the fast DCT below quality 96, and libjpeg's default is the exact one. Bilinear
resizing is torch's vectorized form of Pillow's algorithm: five times as fast, and within one gray
level. The other filters are Pillow's.
"""

import io
import time

import numpy as np
import simplejpeg
import torch
from PIL import Image

from imaging.decode import decode_image
from imaging.jpeg import CHROMAS
from pipeline.augment import (
    BLUR_TAPS,
    GRID,
    LEAST_SIGMA,
    AugmentParams,
    center_crop_params,
)
from pipeline.batch import BatchTiming, DecodedBatch, Request
from pipeline.color import GRAY, IDENTITY
from pipeline.preprocess import Preprocess

_PILLOW = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
"""Pillow's names of `FILTERS`."""

JPEG_SIDE, WEBP_SIDE = 65_500, 16_383
"""Longest sides in pixels that libjpeg and libwebp encode."""


def decode_request(request: Request, shape: tuple[int, int]) -> DecodedBatch:
    """Decode and augment one batch: uint8 (B, *shape, 3) on the CPU. An image that fails is
    black, and its row is in `failures` with the reason.
    """
    started = time.perf_counter()
    images = torch.zeros((len(request.data), *shape, 3), dtype=torch.uint8)
    failures = dict(request.failures)
    for row, params in enumerate(request.params.rows()):
        try:
            pixels = decode_image(
                request.data[row], request.formats[row], request.orientations[row]
            )
            apply(pixels, params, images[row])
        except ValueError as error:
            failures[row] = str(error)
    timing = BatchTiming(read_s=request.read_s, decode_s=time.perf_counter() - started)
    return DecodedBatch(images, failures, timing)


def apply(pixels: np.ndarray, params: AugmentParams, out: torch.Tensor) -> None:
    """Apply `params` to `pixels`, an upright (height, width, 3) uint8 RGB image, and write the
    result into `out`, uint8 (size, size, 3), or (2 * size, size, 3) with a detail crop.

    Raises:
        ValueError: the crop reaches outside the image, so the parameters belong to another image.
    """
    pixels = apply_whole(pixels, params)
    refuse_crop_outside(pixels, params)
    size = out.shape[1]
    for number, (top, left, height, width) in enumerate(params.windows):
        crop = _tensor_of(pixels[top : top + height, left : left + width])
        _apply(crop, params, out[number * size : (number + 1) * size])


def apply_whole(pixels: np.ndarray, params: AugmentParams) -> np.ndarray:
    """Apply the steps of `params` for the whole image, before its crop: resizing, JPEG and WebP.
    Takes and returns an upright image, uint8 (height, width, 3) RGB. An image that is too long for
    a format is not compressed to this format.
    """
    if params.whole_height:
        shape = (params.whole_height, params.whole_width, 3)
        resized = torch.empty(shape, dtype=torch.uint8)
        resize(_tensor_of(pixels), resized, params.whole_filter)
        pixels = resized.numpy()
    longer = max(pixels.shape[:2])
    if params.whole_jpeg and longer <= JPEG_SIDE:
        pixels = _decode_jpeg(encode_jpeg(pixels, params.whole_jpeg, CHROMAS[params.whole_chroma]))
    if params.whole_webp and longer <= WEBP_SIDE:
        pixels = webp_round_trip(pixels, params.whole_webp)
    return pixels


def _tensor_of(pixels: np.ndarray) -> torch.Tensor:
    """Return pixels as a tensor. Read-only pixels, such as Pillow's, are copied, because torch
    warns of them.
    """
    return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())


def _apply(crop: torch.Tensor, params: AugmentParams, out: torch.Tensor) -> None:
    """Resize one crop, uint8 (height, width, 3), and augment it. The result is written into `out`,
    uint8 (size, size, 3).
    """
    size = out.shape[0]
    moved = bool(params.grid_top or params.grid_left)
    whole, out = out, torch.empty((size + GRID,) * 2 + (3,), dtype=torch.uint8) if moved else out
    resize(crop, out, params.crop_filter)
    image = out.numpy()
    if params.hflip:
        out.copy_(out.flip(1))  # NumPy takes twenty times as long
    if params.vflip:
        out.copy_(out.flip(0))
    if params.color != IDENTITY:
        image[:] = _recolor(image, params.color)
    if params.resample:
        small = torch.empty((params.resample, params.resample, 3), dtype=torch.uint8)
        resize(out, small, params.filter)
        resize(small, out, params.filter)
    for quality in filter(None, (params.jpeg, params.jpeg2, params.jpeg3)):
        image[:] = jpeg_round_trip(image, quality)
    if params.blur >= LEAST_SIGMA:
        image[:] = gaussian_blur(image, params.blur)
    if params.grayscale:
        image[:] = _recolor(image, GRAY)
    if moved:
        top, left = params.grid_top, params.grid_left
        whole.copy_(out[top : top + size, left : left + size])
    if params.webp:
        whole.numpy()[:] = webp_round_trip(whole.numpy(), params.webp)


def refuse_crop_outside(pixels: np.ndarray, params: AugmentParams) -> None:
    """Check that the crops of `params` are inside the upright (height, width, 3) image.

    Raises:
        ValueError: the crop reaches outside the image, so the parameters belong to another image.
    """
    for top, left, height, width in params.windows:
        bottom, right = top + height, left + width
        if bottom > pixels.shape[0] or right > pixels.shape[1]:
            raise ValueError(
                f"the image has {pixels.shape[1]} x {pixels.shape[0]} pixels, "
                f"but its crop reaches to {right} x {bottom}"
            )


def preprocess(pixels: np.ndarray, settings: Preprocess) -> np.ndarray:
    """Resize and center-crop an upright (height, width, 3) uint8 RGB image for evaluation: uint8
    (*settings.shape, 3).
    """
    out = torch.empty((*settings.shape, 3), dtype=torch.uint8)
    height, width = pixels.shape[:2]
    apply(pixels, center_crop_params(settings, np.array([width]), np.array([height])).row(0), out)
    return out.numpy()


def resize(image: torch.Tensor, out: torch.Tensor, kind: int = 0) -> None:
    """Resize `image` to the size of `out`, antialiased; both are uint8 (height, width, 3). `kind`
    is a position in `FILTERS`.

    Bilinear is Pillow's algorithm with 16-bit weights, which gives the same numbers on every
    processor. The operator is called directly, because `interpolate` returns separate color planes,
    and joining the planes would cost more than everything else. Bicubic and Lanczos are computed by
    Pillow.
    """
    if kind:
        resized = Image.fromarray(image.numpy()).resize((out.shape[1], out.shape[0]), _PILLOW[kind])
        out.numpy()[:] = np.asarray(resized)
        return
    torch.ops.aten._upsample_bilinear2d_aa.out(
        image.permute(2, 0, 1)[None], list(out.shape[:2]), False, None, None,
        out=out.permute(2, 0, 1)[None],
    )  # fmt: skip


def _recolor(image: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).convert("RGB", matrix))


def jpeg_round_trip(image: np.ndarray, quality: int) -> np.ndarray:
    """Encode a (height, width, 3) uint8 image as baseline JPEG with 4:2:0 chroma by libjpeg, and
    decode it.
    """
    return _decode_jpeg(encode_jpeg(image, quality))


def encode_jpeg(image: np.ndarray, quality: int, chroma: str = "420") -> bytes:
    """Encode a (height, width, 3) uint8 image as baseline JPEG by libjpeg. `quality` is 1 to 100,
    `chroma` one of `CHROMAS`.
    """
    stream = io.BytesIO()
    picture = Image.fromarray(image)
    if chroma == "Gray":
        picture.convert("L").save(stream, "JPEG", quality=quality)
    else:
        picture.save(stream, "JPEG", quality=quality, subsampling=":".join(chroma))
    return stream.getvalue()


def _decode_jpeg(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False)


def webp_round_trip(image: np.ndarray, quality: int) -> np.ndarray:
    """Encode a (height, width, 3) uint8 image as lossy WebP by libwebp, and decode it. `quality` is
    1 to 100.
    """
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "WEBP", quality=quality)
    return np.asarray(Image.open(stream).convert("RGB"))


def gaussian_blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Blur (height, width, 3) uint8 with a 3 x 3 Gaussian of `sigma` pixels. Borders are mirrored
    without repeating the edge.
    """
    reach = np.arange(BLUR_TAPS) - BLUR_TAPS // 2
    taps = np.exp(-0.5 * (reach / sigma) ** 2)
    outer, inner = (taps / taps.sum()).astype(np.float32)[:2]
    height, width = pixels.shape[:2]
    lines = pixels.reshape(height, -1)
    lines = np.concatenate([lines[1:2] if height > 1 else lines, lines, lines[-2:][:1]])
    blurred = np.empty_like(pixels).reshape(height, -1)
    edge = slice(3, 6) if width > 1 else slice(0, 3), slice(-6, -3) if width > 1 else slice(0, 3)
    for top in range(0, height, _BAND):
        rows = lines[top : top + _BAND + 2].astype(np.float32)
        sums = rows[:-2] + rows[2:]
        rows = rows[1:-1]
        for horizontal in (False, True):
            if horizontal:
                np.add(rows[:, :-6], rows[:, 6:], out=sums[:, 3:-3])
                sums[:, :3], sums[:, -3:] = 2 * rows[:, edge[0]], 2 * rows[:, edge[1]]
            rows *= inner
            sums *= outer
            rows += sums
        # No clipping: the weights sum to 1.
        blurred[top : top + _BAND] = np.rint(rows, out=rows)
    return blurred.reshape(pixels.shape)


_BAND = 32
"""Lines that are blurred at a time, so that they fit into the CPU cache: three times as fast."""
