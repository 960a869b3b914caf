"""Draw three example images for the web page, without any photograph or AI generator.

Main entry: `examples()` takes nothing and returns a tuple of three `Example`s with `name` (`NAMES`,
such as "dawn.jpg"), `title` (text) and `data` (the JPEG file as bytes). All are drawn, and get the
tone curve and sharpening of a simulated camera of `sharding/demo/`. The second also passes a
simulated sensor, the third a simulated generator. The metadata of each file (`XMP`) states that a
program drew it.

`is_example(name, data)` takes the name and the bytes of an uploaded file and returns whether it is
one of the examples: its name is in `NAMES`, and its bytes are those of an example.
`landscape(scene)` draws a `Scene` (colors and sun of a landscape, such as `DAWN`) and returns
linear RGB from 0 to 1, float32 (480, 640, 3). `as_file(image)` takes float RGB from 0 to 1,
(height, width, 3), and returns a JPEG file as bytes. `ABOUT` is a text that explains the examples
to visitors.
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
    "A program drew the examples: they are neither photographs nor made by an AI generator. They "
    "show how this page works. Their verdicts do not show how good the detector is."
)

XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType='
    '"http://cv.iptc.org/newscodes/digitalsourcetype/algorithmicMedia"/></rdf:RDF></x:xmpmeta>'
)  # fmt: skip
"""XMP packet with the IPTC source type for an image made by a program without training data."""


@dataclass(frozen=True)
class Scene:
    """Colors and sun position of a landscape.

    Colors are linear RGB, 0 to 1: the sky at the zenith and at the horizon, the sun (`light`), and
    the nearest hill. `sun` is its position (x, y) as fractions of the width and the height.
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
    """An example image; `data` is a JPEG file."""

    name: str
    title: str
    data: bytes


def is_example(name: str, data: bytes) -> bool:
    """Return whether a file is one of the examples, whose verdicts mean nothing."""
    return name in NAMES and any(example.data == data for example in examples())


@functools.cache
def examples() -> tuple[Example, ...]:
    """Draw the three examples; the result is cached in the process."""
    drawn = landscape(DAWN)
    taken = sensor(np.random.default_rng(1), landscape(NOON), CAMERAS["camera-b"])
    made = decode(np.random.default_rng(2), finish(landscape(NIGHT), CAMERAS["camera-a"]), "smooth")
    return (
        Example(NAMES[0], "Drawn by a program", as_file(finish(drawn, CAMERAS["camera-a"]))),
        Example(
            NAMES[1],
            "Drawn, with a simulated camera",
            as_file(finish(taken, CAMERAS["camera-b"])),
        ),
        Example(NAMES[2], "Drawn, with a simulated generator", as_file(made)),
    )


def landscape(scene: Scene) -> np.ndarray:
    """Draw rows of hills below a sky with a sun or moon. Returns float32 (HEIGHT, WIDTH, 3), linear
    RGB, 0 to 1.
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
    """Encode float RGB, 0 to 1, as a JPEG file with the metadata `XMP`."""
    stream = io.BytesIO()
    pixels = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG", quality=88, xmp=XMP.encode())
    return stream.getvalue()
