"""Apply draws without DALI: the reference, and what runs where DALI cannot.

JPEG is decoded by simplejpeg (exact inverse DCT) and encoded by Pillow: simplejpeg's encoder takes
the fast DCT below quality 96 whatever it is told, and libjpeg's default is the exact one. Resizing
is torch's vectorised form of Pillow's algorithm: five times as fast, and within one grey level.
"""

import io
import time

import numpy as np
import simplejpeg
import torch
from PIL import Image

from imaging.decode import decode_image
from imaging.jpeg import CHROMAS
from pipeline.augment import BLUR_TAPS, GREY, GRID, IDENTITY, LEAST_SIGMA, Draw, View, centre
from pipeline.batch import Cost, Pixels, Request

_PILLOW = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
"""Pillow's names of `FILTERS`."""


def decode_request(request: Request, size: int) -> Pixels:
    """Decode and augment one batch; an image that fails stays black and is named."""
    started = time.perf_counter()
    images = torch.zeros((len(request.data), size, size, 3), dtype=torch.uint8)
    failures = dict(request.failures)
    for row, draw in enumerate(request.draws.rows()):
        try:
            pixels = decode_image(
                request.data[row], request.formats[row], request.orientations[row]
            )
            apply(pixels, draw, images[row])
        except ValueError as error:
            failures[row] = str(error)
    cost = Cost(read_s=request.read_s, decode_s=time.perf_counter() - started)
    return Pixels(images, failures, cost)


def apply(pixels: np.ndarray, draw: Draw, out: torch.Tensor) -> None:
    """Write into `out`, uint8 (size, size, 3), what the net sees of an upright (height, width, 3)
    uint8 RGB image.

    Raises:
        ValueError: the crop reaches outside the image, so the draw was made for another one.
    """
    bottom, right = draw.top + draw.height, draw.left + draw.width
    if bottom > pixels.shape[0] or right > pixels.shape[1]:
        raise ValueError(
            f"the image has {pixels.shape[1]} x {pixels.shape[0]} pixels, "
            f"its crop reaches to {right} x {bottom}"
        )
    if draw.pair_jpeg:
        pixels = _decode_jpeg(encode_jpeg(pixels, draw.pair_jpeg, CHROMAS[draw.pair_chroma]))
    size = out.shape[0]
    moved = bool(draw.grid_top or draw.grid_left)
    whole, out = out, torch.empty((size + GRID,) * 2 + (3,), dtype=torch.uint8) if moved else out
    crop = pixels[draw.top : bottom, draw.left : right]
    if not crop.flags.writeable:  # as Pillow gives it, and torch does not like it
        crop = crop.copy()
    resize(torch.from_numpy(crop), out)
    image = out.numpy()
    if draw.flip:
        out.copy_(out.flip(1))  # NumPy takes twenty times as long
    if draw.colour != IDENTITY:
        image[:] = _recolour(image, draw.colour)
    if draw.resample:
        small = torch.empty((draw.resample, draw.resample, 3), dtype=torch.uint8)
        resize(out, small, draw.filter)
        resize(small, out, draw.filter)
    for quality in filter(None, (draw.jpeg, draw.jpeg2, draw.jpeg3)):
        image[:] = jpeg_round_trip(image, quality)
    if draw.blur >= LEAST_SIGMA:
        image[:] = gaussian_blur(image, draw.blur)
    if draw.grey:
        image[:] = _recolour(image, GREY)
    if moved:
        top, left = draw.grid_top, draw.grid_left
        whole.copy_(out[top : top + size, left : left + size])
    if draw.webp:
        whole.numpy()[:] = webp_round_trip(whole.numpy(), draw.webp)


def see(pixels: np.ndarray, view: View) -> np.ndarray:
    """What the network sees of an upright (height, width, 3) uint8 RGB image when no dice are
    rolled: uint8 (size, size, 3).
    """
    out = torch.empty((view.size, view.size, 3), dtype=torch.uint8)
    height, width = pixels.shape[:2]
    apply(pixels, centre(view, np.array([width]), np.array([height])).row(0), out)
    return out.numpy()


def resize(image: torch.Tensor, out: torch.Tensor, kind: int = 0) -> None:
    """Antialiased from uint8 (height, width, 3) to `out`, likewise, of any size; `kind` is a
    position in `FILTERS`.

    Bilinear is Pillow's algorithm with 16-bit weights, the same numbers on every processor. The
    operator itself and not `interpolate`, which gives separate colour planes: putting them back
    together would cost more than all the rest. The other filters are Pillow's.
    """
    if kind:
        found = Image.fromarray(image.numpy()).resize(tuple(out.shape[1::-1]), _PILLOW[kind])
        out.numpy()[:] = np.asarray(found)
        return
    torch.ops.aten._upsample_bilinear2d_aa.out(
        image.permute(2, 0, 1)[None], list(out.shape[:2]), False, None, None,
        out=out.permute(2, 0, 1)[None],
    )  # fmt: skip


def _recolour(image: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).convert("RGB", matrix))


def jpeg_round_trip(image: np.ndarray, quality: int) -> np.ndarray:
    """Baseline JPEG with 4:2:0 chroma, as libjpeg writes it, and back."""
    return _decode_jpeg(encode_jpeg(image, quality))


def encode_jpeg(image: np.ndarray, quality: int, chroma: str = "420") -> bytes:
    """Baseline JPEG of a (height, width, 3) uint8 image, as libjpeg writes it; `chroma` is one of
    `CHROMAS`.
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
    """Lossy WebP as libwebp writes it, and back."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "WEBP", quality=quality)
    return np.asarray(Image.open(stream).convert("RGB"))


def gaussian_blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """A 3 x 3 Gaussian on (height, width, 3) uint8, edges mirrored without repeating the edge."""
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
        # Weights sum to 1: nothing to clip.
        blurred[top : top + _BAND] = np.rint(rows, out=rows)
    return blurred.reshape(pixels.shape)


_BAND = 32
"""Lines that are blurred at a time, so that they stay in the cache: three times as fast."""
