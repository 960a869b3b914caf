"""Perturb images for the robustness test, as an image may change between its creation and the
detector: by compression, resizing, blur, noise, or a screenshot.

Main entry: `PERTURBATIONS`, a tuple of the `Perturbation`s that `evaluate.py --robustness`
measures; the first is `ORIGINAL`, the unchanged image. Each has a `name` (such as "jpeg-90"), a
`family` (the curve in plots that it belongs to) and an `amount` (its position on this curve). Its
`apply(pixels, sha256)` returns the perturbed image, uint8 (height, width, 3) RGB; some
perturbations change the size.

- `pixels`: a whole upright image, uint8 (height, width, 3) RGB.
- `sha256`: the SHA-256 of the image's file, 32 bytes, the seed of the noise (default b"").

An image that is too large, or that an encoder refuses, raises ValueError. The same image and hash
always give the same pixels.

A perturbation is a chain of steps such as `jpeg(pixels, rng, quality=80)` and `scale(pixels, rng,
factor=0.5)` (type `Step`), which take the pixels, a NumPy generator (used only by `noise()`) and
settings as keywords, and return the new pixels. Encoders are Pillow's (libjpeg-turbo, libwebp,
libaom).
"""

import contextlib
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageFilter

from imaging.decode import MAX_PIXELS, decode_image
from pipeline.pil import encode_jpeg, webp_round_trip

Step = Callable[[np.ndarray, np.random.Generator], np.ndarray]

PHONE = (1080, 1920)
"""Width and height of a screenshot in pixels: full HD, portrait."""


@dataclass(frozen=True, eq=False)
class Perturbation:
    """One degradation of an image, as a chain of steps.

    `family` and `amount` are its curve and its position on that curve: perturbations of one family
    differ only in one number. `what` is a description, if the name is not enough.
    """

    name: str
    family: str
    amount: float
    steps: tuple[Step, ...]
    what: str = ""

    def apply(self, pixels: np.ndarray, sha256: bytes = b"") -> np.ndarray:
        """Return the perturbed image. `sha256`, that of the image's file, is the seed of the noise.

        Raises:
            ValueError: the image is too large for the format or for enlarging.
        """
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), *sha256])
        for step in self.steps:
            pixels = step(pixels, rng)
        return np.ascontiguousarray(pixels)


def jpeg(
    pixels: np.ndarray, _rng: np.random.Generator, *, quality: int, chroma: str = "420"
) -> np.ndarray:
    """Compress as baseline JPEG at libjpeg's `quality`, 1 to 100. `chroma` is 420, 422, 444 or
    Gray.
    """
    with _sides_fit(pixels, "JPEG"):
        data = encode_jpeg(pixels, quality, chroma)
    return decode_image(data, "JPEG")


def webp(pixels: np.ndarray, _rng: np.random.Generator, *, quality: int) -> np.ndarray:
    """Compress as lossy WebP at libwebp's `quality`, 1 to 100."""
    with _sides_fit(pixels, "WEBP"):
        return webp_round_trip(pixels, quality)


def avif(pixels: np.ndarray, _rng: np.random.Generator, *, quality: int) -> np.ndarray:
    """Compress as 4:2:0 AVIF at libavif's `quality`, 1 to 100. One thread and speed 8 of 10,
    because the default speed of 6 takes four times as long.
    """
    options = {"codec": "aom", "speed": 8, "max_threads": 1, "subsampling": "4:2:0"}
    stream = io.BytesIO()
    with _sides_fit(pixels, "AVIF"):
        Image.fromarray(pixels).save(stream, "AVIF", quality=quality, **options)
    with Image.open(stream, formats=["AVIF"]) as image:
        return np.asarray(image.convert("RGB"))


def scale(pixels: np.ndarray, _rng: np.random.Generator, *, factor: float) -> np.ndarray:
    """Multiply width and height by `factor`, with a Lanczos filter."""
    height, width = pixels.shape[:2]
    return _resized(pixels, width * factor, height * factor, Image.Resampling.LANCZOS)


def fit(pixels: np.ndarray, _rng: np.random.Generator, *, longest: int) -> np.ndarray:
    """Reduce the longer side to `longest` pixels, with a bilinear filter. Smaller images do not
    change.
    """
    height, width = pixels.shape[:2]
    factor = min(1.0, longest / max(height, width))
    return _resized(pixels, width * factor, height * factor, Image.Resampling.BILINEAR)


def fit_shorter(pixels: np.ndarray, _rng: np.random.Generator, *, shorter: int) -> np.ndarray:
    """Reduce the shorter side to `shorter` pixels, with a Lanczos filter. Smaller images do not
    change.
    """
    height, width = pixels.shape[:2]
    factor = min(1.0, shorter / min(height, width))
    return _resized(pixels, width * factor, height * factor, Image.Resampling.LANCZOS)


def blur(pixels: np.ndarray, _rng: np.random.Generator, *, sigma: float) -> np.ndarray:
    """Blur with a Gaussian of `sigma` pixels (Pillow's: three box blurs of that variance)."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))


def noise(pixels: np.ndarray, rng: np.random.Generator, *, sigma: float) -> np.ndarray:
    """Add Gaussian noise of `sigma` gray levels, independent in each value."""
    grain = rng.standard_normal(pixels.shape, np.float32)
    grain *= sigma
    grain += pixels
    return np.rint(grain, out=grain).clip(0, 255).astype(np.uint8)


def cut(pixels: np.ndarray, _rng: np.random.Generator, *, edge: int) -> np.ndarray:
    """Remove `edge` pixels on the left and at the top, so that the blocks of another JPEG start at
    other pixels. An image with a side shorter than twice `edge` does not change.
    """
    height, width = pixels.shape[:2]
    return pixels if min(height, width) < 2 * edge else pixels[edge:, edge:]


def screenshot(pixels: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
    """Imitate a screenshot of a phone: fit the image to the screen with a bilinear filter, enlarged
    if smaller, and center it between black bars.
    """
    height, width = pixels.shape[:2]
    factor = min(PHONE[0] / width, PHONE[1] / height)
    shown = _resized(pixels, width * factor, height * factor, Image.Resampling.BILINEAR)
    screen = np.zeros((PHONE[1], PHONE[0], 3), np.uint8)
    top, left = (PHONE[1] - shown.shape[0]) // 2, (PHONE[0] - shown.shape[1]) // 2
    screen[top : top + shown.shape[0], left : left + shown.shape[1]] = shown
    return screen


@contextlib.contextmanager
def _sides_fit(pixels: np.ndarray, image_format: str) -> Iterator[None]:
    """Turn a codec's error about a side that is too long into a `ValueError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        height, width = pixels.shape[:2]
        raise ValueError(f"{width} x {height} pixels, no {image_format}: {error}") from error


def _resized(pixels: np.ndarray, width: float, height: float, kind: Image.Resampling) -> np.ndarray:
    size = max(1, round(width)), max(1, round(height))
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{size[0]} x {size[1]} pixels, more than {MAX_PIXELS:,}")
    if size == pixels.shape[1::-1]:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, kind))


def _jpeg(quality: int) -> Perturbation:
    return Perturbation(f"jpeg-{quality}", "JPEG", quality, (partial(jpeg, quality=quality),))


def _webp(quality: int) -> Perturbation:
    return Perturbation(f"webp-{quality}", "WebP", quality, (partial(webp, quality=quality),))


def _avif(quality: int) -> Perturbation:
    return Perturbation(f"avif-{quality}", "AVIF", quality, (partial(avif, quality=quality),))


def _scale(factor: float) -> Perturbation:
    return Perturbation(f"scale-{factor:g}", "scale", factor, (partial(scale, factor=factor),))


def _blur(sigma: float) -> Perturbation:
    return Perturbation(f"blur-{sigma:g}", "blur", sigma, (partial(blur, sigma=sigma),))


def _noise(sigma: float) -> Perturbation:
    return Perturbation(f"noise-{sigma:g}", "noise", sigma, (partial(noise, sigma=sigma),))


def _tier(name: str, longest: int, quality: int) -> Perturbation:
    steps: tuple[Step, ...] = (partial(fit, longest=longest), *_jpeg(quality).steps)
    what = f"longer side at most {longest} pixels, then JPEG {quality}"
    return Perturbation(name, "tier", longest, steps, what)


ORIGINAL = Perturbation("original", "original", 0, ())
"""The image as packed. Other perturbations are compared with this one."""

PERTURBATIONS: Sequence[Perturbation] = (
    ORIGINAL,
    # From the quality of cameras down to the quality of chat programs.
    *map(_jpeg, (90, 80, 70, 60, 50, 40, 30)),
    # Two JPEGs: an image that was uploaded twice.
    Perturbation("jpeg-90-60", "two JPEGs", 0, (*_jpeg(90).steps, *_jpeg(60).steps)),
    Perturbation(
        "jpeg-90-cut-60", "two JPEGs", 3,
        (*_jpeg(90).steps, partial(cut, edge=3), *_jpeg(60).steps),
        "cut by 3 pixels between two JPEGs, so that their blocks do not meet",
    ),
    *map(_webp, (80, 50)),  # Pillow's default, and a low quality
    *map(_avif, (75, 50)),  # the defaults of Pillow and of sharp, which many web servers use
    *map(_scale, (0.25, 0.5, 0.75, 1.5, 2.0)),
    *map(_blur, (1.0, 2.0)),  # Wang et al. (2020) use 0 to 3
    *map(_noise, (4.0, 10.0)),  # hardly visible, and clearly visible
    Perturbation(
        "screenshot", "screenshot", 0, (screenshot,),
        f"fitted to a screen of {PHONE[0]} x {PHONE[1]} pixels between black bars",
    ),
    # Tiers for which the Sieve detector publishes its accuracy (its docs/accuracy-v0.14.md).
    _tier("web", 768, 60),
    _tier("hard", 512, 40),
)  # fmt: skip
"""Perturbations that `evaluate.py --robustness` measures. The first one is the unchanged image."""
