"""Paint procedural scenes (nature, street, studio) for the demo's synthetic images.

Main entry: `SCENES`, a dict of three functions with the keys "street", "nature" and "studio". For
example, `SCENES["street"](rng, height, width)` takes a NumPy random generator
(`np.random.default_rng(0)`) and the size in pixels (each side below 1024, else ValueError), and
returns linear light: a float32 array (height, width, 3), mostly 0 to 1. No file is written. Real
and fake images have the same scenes, so the scene reveals nothing about the label.

The other functions paint parts of a scene; `rng` is the random generator. `fractal(slope, side)`
returns noise of amplitude 1/f**slope, float32 (side, side). `texture(rng, shape, slope)` returns a
random region of such noise; `shape` is (height, width). `cover(canvas, mask, paint)` blends `paint`
over `canvas` in place, with `mask` (0 to 1) as opacity.
"""

import functools
import math

import numpy as np

Rng = np.random.Generator


def nature(rng: Rng, height: int, width: int) -> np.ndarray:
    """Paint sky, two or three ridges, and leaves in front."""
    canvas = sky(rng, height, width)
    horizon = rng.uniform(0.3, 0.5) * height
    for depth in range(int(rng.integers(2, 4))):
        ridge = np.cumsum(rng.normal(0, 1, width))
        ridge = horizon + (depth + (ridge - ridge.mean()) / np.ptp(ridge)) * 0.15 * height
        mask = np.clip(np.arange(height)[:, None] - ridge, 0, 1)
        ground = np.array([0.16, 0.22, 0.08]) * rng.uniform(0.5, 1.6, 3) / (1 + 0.3 * depth)
        cover(canvas, mask, textured(rng, mask.shape, ground, 0.45))
    leaves = texture(rng, (height, width), 0.9) + 2.2 * ramp(rng, height, width) - 2.0
    color = np.array([0.10, 0.20, 0.05]) * rng.uniform(0.6, 1.8, 3)
    cover(canvas, np.clip(leaves * 4, 0, 1), textured(rng, leaves.shape, color, 0.6))
    return canvas


def street(rng: Rng, height: int, width: int) -> np.ndarray:
    """Paint a row of houses between sky and pavement."""
    canvas = sky(rng, height, width)
    ground, left = int(rng.uniform(0.7, 0.85) * height), 0
    canvas[ground:] = textured(rng, canvas[ground:].shape[:2], color_of(rng) * 0.6, 0.25)
    while left < width:
        right = left + max(1, int(rng.uniform(0.2, 0.45) * width))
        front = canvas[int(rng.uniform(0.05, 0.4) * height) : ground, left:right]
        y, x = np.mgrid[: front.shape[0], : front.shape[1]].astype(np.float32) / rng.uniform(25, 60)
        windows = np.minimum(0.3 - abs(y % 1 - 0.5), 0.25 - abs(x % 1 - 0.5)) * 40
        front[:] = textured(rng, y.shape, color_of(rng), 0.2)
        glass = np.array([0.05, 0.07, 0.1]) * rng.uniform(0.5, 3)
        cover(front, np.clip(windows, 0, 1), textured(rng, y.shape, glass, 0.3))
        left = right
    for _ in range(int(rng.integers(1, 4))):
        ball(rng, canvas, rng.uniform(0.05, 0.12), ground)
    return canvas


def studio(rng: Rng, height: int, width: int) -> np.ndarray:
    """Paint balls on striped cloth in front of a softly lit background."""
    canvas = textured(rng, (height, width), color_of(rng), 0.05)
    canvas *= 0.5 + 0.7 * ramp(rng, height, width)[..., None]
    table = int(rng.uniform(0.55, 0.75) * height)
    cloth = canvas[table:]
    phase = ramp(rng, *cloth.shape[:2]) * rng.uniform(40, 150)
    stripes = 1 + 0.35 * np.tanh(3 * np.sin(phase + 2 * texture(rng, phase.shape, 1.8)))
    cloth[:] = textured(rng, phase.shape, color_of(rng), 0.25) * stripes[..., None]
    for _ in range(int(rng.integers(2, 6))):
        ball(rng, canvas, rng.uniform(0.08, 0.25), table)
    return canvas


def ball(rng: Rng, canvas: np.ndarray, radius: float, floor: int) -> None:
    """Paint a shaded sphere on the floor, with shadow and highlight."""
    r = radius * min(canvas.shape[:2])
    cx, cy = rng.uniform(0.05, 0.95) * canvas.shape[1], floor + rng.uniform(-0.4, 0.8) * r
    left, top = max(0, int(cx - 2 * r)), max(0, int(cy - r))
    region = canvas[top : int(cy + 2 * r), left : int(cx + 3 * r)]
    y, x = np.mgrid[: region.shape[0], : region.shape[1]].astype(np.float32)
    dx, dy = (x + left - cx) / r, (y + top - cy) / r
    region *= 1 - 0.6 * np.exp(-((dx - 0.4) ** 2) - ((dy - 0.9) / 0.3) ** 2)[..., None]
    dz = np.sqrt(np.clip(1 - dx**2 - dy**2, 0, 1))
    diffuse = np.clip(-0.5 * dx - 0.6 * dy + 0.62 * dz, 0.05, 1)[..., None]
    gloss = diffuse ** rng.uniform(15, 60) * rng.uniform(0, 0.6)
    skin = textured(rng, dz.shape, color_of(rng), rng.uniform(0.05, 0.4))
    cover(region, np.clip((1 - np.hypot(dx, dy)) * r, 0, 1), skin * diffuse + gloss)


def sky(rng: Rng, height: int, width: int) -> np.ndarray:
    """Paint a sky with clouds, blue at the top and pale at the horizon."""
    low, high = np.array([0.75, 0.8, 0.85]), np.array([0.2, 0.38, 0.75]) * rng.uniform(0.5, 1.2)
    fall = np.linspace(0, 1, height)[:, None, None] ** 0.7
    canvas = np.repeat(high + (low - high) * fall, width, axis=1).astype(np.float32)
    clouds = texture(rng, (height, width), 1.7) * 0.5 - rng.uniform(-0.3, 0.6)
    cover(canvas, np.clip(clouds, 0, 1), np.full(3, 0.9, np.float32))
    return canvas


def textured(rng: Rng, shape: tuple[int, ...], color: np.ndarray, contrast: float) -> np.ndarray:
    """Paint a surface of this color with random lighter and darker areas."""
    relief = np.exp(contrast * texture(rng, shape, float(rng.choice([0.8, 1.1, 1.4]))))
    return relief[..., None] * color.astype(np.float32)


def texture(rng: Rng, shape: tuple[int, ...], slope: float) -> np.ndarray:
    """Cut a random region out of the fractal. This is far cheaper than a Fourier transform per
    texture.
    """
    y, x = rng.integers(0, 1024 - np.array(shape))
    return fractal(slope)[y : y + shape[0], x : x + shape[1]]


@functools.cache
def fractal(slope: float, side: int = 1024) -> np.ndarray:
    """Make noise of unit variance and amplitude 1/f**slope. Natural images have a slope of about 1
    (Field 1987).
    """
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    spectrum = np.fft.rfft2(np.random.default_rng(0).standard_normal((side, side)))
    # No structures larger than an image: most cut-outs would be flat.
    noise = np.fft.irfft2(spectrum / np.maximum(frequency, 1 / 300) ** slope)
    return (noise / noise.std()).astype(np.float32)


def ramp(rng: Rng, height: int, width: int) -> np.ndarray:
    """Make a linear gradient from 0 to 1 in a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    plane = y * math.sin(angle) + x * math.cos(angle)
    return (plane - plane.min()) / np.ptp(plane)


def color_of(rng: Rng) -> np.ndarray:
    """Choose a muted reflectance: most surfaces are closer to gray than to a pure hue."""
    return rng.uniform(0.08, 0.6) * rng.uniform(0.6, 1.3, 3)


def cover(canvas: np.ndarray, mask: np.ndarray, paint: np.ndarray) -> None:
    """Blend `paint` over `canvas` in place, with `mask` (0 to 1) as opacity."""
    canvas += mask[..., None].astype(np.float32) * (paint - canvas)


SCENES = {"street": street, "nature": nature, "studio": studio}
