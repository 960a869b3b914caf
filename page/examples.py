"""Three pictures to try the page with, drawn here: no photograph, and of no AI generator.

One is as drawn, one went through the simulated camera of `sharding/demo/`, one through its
simulated generator. Each file says of itself that a program drew it.
"""

import functools
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sharding.demo.render import CAMERAS, blur, decode, finish, sensor

HEIGHT, WIDTH = 480, 640

NAMES = "dawn.jpg", "noon.jpg", "night.jpg"

ABOUT = (
    "A program drew the examples: none is a photograph, and none is of an AI generator. They show "
    "how this page works; a verdict on them says nothing about the detector."
)

XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType='
    '"http://cv.iptc.org/newscodes/digitalsourcetype/algorithmicMedia"/></rdf:RDF></x:xmpmeta>'
)  # fmt: skip
"""IPTC's word for a picture that a program made without any training data."""


@dataclass(frozen=True)
class Scene:
    """The colors of a landscape, linear RGB 0 to 1: sky at the zenith and above the hills, sun,
    and the nearest hill. `sun` is where, as shares of the width and the height.
    """

    zenith: tuple[float, float, float]
    horizon: tuple[float, float, float]
    light: tuple[float, float, float]
    hill: tuple[float, float, float]
    sun: tuple[float, float]
    seed: int


DAWN = Scene((0.10, 0.12, 0.32), (0.95, 0.42, 0.22), (1.0, 0.75, 0.45), (0.02, 0.03, 0.08),
             (0.66, 0.50), 3)  # fmt: skip
NOON = Scene((0.08, 0.28, 0.68), (0.62, 0.80, 0.92), (1.0, 0.98, 0.9), (0.02, 0.10, 0.04),
             (0.25, 0.33), 11)  # fmt: skip
NIGHT = Scene((0.004, 0.008, 0.03), (0.05, 0.10, 0.22), (0.85, 0.9, 1.0), (0.002, 0.004, 0.012),
              (0.72, 0.33), 20)  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A picture to try: `data` is a JPEG file."""

    name: str
    title: str
    data: bytes


def is_example(name: str, data: bytes) -> bool:
    """Whether a file is one of the three, so that its verdict can be told from a finding."""
    return name in NAMES and any(example.data == data for example in examples())


@functools.cache
def examples() -> tuple[Example, ...]:
    """The three, drawn once in a process."""
    drawn = landscape(DAWN)
    taken = sensor(np.random.default_rng(1), landscape(NOON), CAMERAS["camera-b"])
    made = decode(np.random.default_rng(2), finish(landscape(NIGHT), CAMERAS["camera-a"]), "smooth")
    return (
        Example(NAMES[0], "Drawn by a program", as_file(finish(drawn, CAMERAS["camera-a"]))),
        Example(
            NAMES[1],
            "Drawn, then a simulated camera",
            as_file(finish(taken, CAMERAS["camera-b"])),
        ),
        Example(NAMES[2], "Drawn, then a simulated generator", as_file(made)),
    )


def landscape(scene: Scene) -> np.ndarray:
    """Hills behind hills below a sky with a sun or moon, float32 (HEIGHT, WIDTH, 3) linear light,
    0 to 1.
    """
    rng = np.random.default_rng(scene.seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    zenith, horizon, light, hill = (
        np.array(color, np.float32)
        for color in (scene.zenith, scene.horizon, scene.light, scene.hill)
    )
    height = (y / (0.7 * HEIGHT)).clip(0, 1)[..., None] ** 1.3
    canvas = zenith * (1 - height) + horizon * height
    away = np.hypot(x - scene.sun[0] * WIDTH, y - scene.sun[1] * HEIGHT)[..., None]
    canvas += light * 0.5 * np.exp(-((away / 130) ** 2))
    disc = (26 - away).clip(0, 1)
    canvas = canvas * (1 - disc) + light * disc
    for layer in range(5):
        waves = sum(
            np.sin(x[0] * rng.uniform(0.6, 1.4) * 2**octave / 130 + rng.uniform(0, 6.3))
            / 2.0**octave
            for octave in range(6)
        )
        top = HEIGHT * (0.52 + 0.1 * layer) + waves * (26 + 3 * layer)
        near = ((layer + 1) / 5) ** 0.8
        inside = (y - top[None]).clip(0, 1)[..., None]
        shade = 1 + 0.25 * ((y - top[None]) / 120).clip(0, 1)[..., None]
        canvas = canvas * (1 - inside) + (horizon * (1 - near) + hill * near) * shade * inside
    return blur(canvas.clip(0.001, 1).astype(np.float32), 0.6)


def as_file(image: np.ndarray) -> bytes:
    """A JPEG of float RGB 0 to 1 that says what it is."""
    stream = io.BytesIO()
    pixels = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG", quality=88, xmp=XMP.encode())
    return stream.getvalue()
