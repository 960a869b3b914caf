"""Apply a `Draw` with Pillow: the reference, and what runs where DALI cannot.

JPEG is decoded by simplejpeg (exact inverse DCT) and encoded by Pillow: simplejpeg's encoder takes
the fast DCT below quality 96 whatever it is told, and libjpeg's default is the exact one.
"""

import io

import numpy as np
import simplejpeg
import torch
from PIL import Image

from pipeline.augment import BLUR_TAPS, GREY, IDENTITY, Draw
from pipeline.batch import Pixels, Request
from sharding.format import decode_image

BILINEAR = Image.Resampling.BILINEAR


def decode_request(request: Request, size: int) -> Pixels:
    """Decode and augment one batch; an image that fails stays black and is named."""
    images = np.zeros((len(request.data), size, size, 3), np.uint8)
    failures = dict(request.failures)
    for row, draw in enumerate(request.draws):
        try:
            pixels = decode_image(
                request.data[row], request.formats[row], request.orientations[row]
            )
            images[row] = apply(pixels, draw, size)
        except ValueError as error:
            failures[row] = str(error)
    return Pixels(torch.from_numpy(images), failures)


def apply(pixels: np.ndarray, draw: Draw, size: int) -> np.ndarray:
    """One upright (height, width, 3) uint8 RGB image as the (size, size, 3) uint8 the net sees.

    Raises:
        ValueError: the crop reaches outside the image, so the draw was made for another one.
    """
    bottom, right = draw.top + draw.height, draw.left + draw.width
    if bottom > pixels.shape[0] or right > pixels.shape[1]:
        raise ValueError(
            f"the image has {pixels.shape[1]} x {pixels.shape[0]} pixels, "
            f"its crop reaches to {right} x {bottom}"
        )
    crop = np.ascontiguousarray(pixels[draw.top : bottom, draw.left : right])
    image = Image.fromarray(crop).resize((size, size), BILINEAR)
    if draw.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draw.colour != IDENTITY:
        image = image.convert("RGB", draw.colour)
    if draw.resample:
        image = image.resize((draw.resample, draw.resample), BILINEAR)
        image = image.resize((size, size), BILINEAR)
    if draw.jpeg:
        image = Image.fromarray(jpeg_round_trip(image, draw.jpeg))
    if draw.blur:
        image = Image.fromarray(gaussian_blur(np.asarray(image), draw.blur))
    if draw.grey:
        image = image.convert("RGB", GREY)
    return np.asarray(image)


def jpeg_round_trip(image: Image.Image, quality: int) -> np.ndarray:
    """Baseline JPEG with 4:2:0 chroma, as libjpeg writes it, and back."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, subsampling="4:2:0")
    return simplejpeg.decode_jpeg(stream.getvalue(), fastdct=False, fastupsample=False)


def gaussian_blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """A 3 x 3 Gaussian on (height, width, 3) uint8, edges mirrored without repeating the edge."""
    reach = np.arange(BLUR_TAPS) - BLUR_TAPS // 2
    taps = np.exp(-0.5 * (reach / sigma) ** 2)
    outer, inner = (taps / taps.sum()).astype(np.float32)[:2]
    padded = np.pad(pixels.astype(np.float32), ((1, 1), (1, 1), (0, 0)), mode="reflect")
    rows = inner * padded[1:-1] + outer * (padded[:-2] + padded[2:])
    blurred = inner * rows[:, 1:-1] + outer * (rows[:, :-2] + rows[:, 2:])
    return np.rint(blurred).clip(0, 255).astype(np.uint8)
