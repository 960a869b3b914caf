"""Write JPEG files for the benchmarks to read: synthetic ones, or variants of real photographs.

Main entries: `write_images(folder, count)` writes `count` synthetic JPEGs of 500 x 375 pixels.
`write_copies(folder, originals, count)` makes them from real JPEGs: each is copied byte for byte,
then encoded again at lower and lower quality until `count` different files are written.

- `folder`: the folder to write to (Path); it is made if missing. Its subfolders `real` and `fake`
  get files in turn, about half each.
- `originals`: a folder of JPEGs (Path). All files below it that begin like a JPEG are used.
- `count`: the number of files in total (int, at least 1).

Both return a list of the paths, in the order of writing. `write_copies()` raises ValueError if
there is no JPEG or too few different files can be made, and OSError if a file that begins like a
JPEG cannot be decoded to be encoded again.
"""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from sharding.demo.scenes import SCENES


def write_images(folder: Path, count: int) -> list[Path]:
    """Write `count` synthetic JPEGs of 500 x 375 pixels, quality 96, half real and half fake."""
    paths = []
    for number in range(count):
        rng = np.random.default_rng([7, number])
        scene = SCENES[list(SCENES)[number % len(SCENES)]](rng, 375, 500)
        noisy = scene + rng.normal(0, 0.02, scene.shape)
        pixels = (255 * np.clip(noisy, 0, 1) ** (1 / 2.2)).astype(np.uint8)
        path = folder / ("real", "fake")[number % 2] / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=96)
        paths.append(path)
    return paths


def write_copies(folder: Path, originals: Path, count: int) -> list[Path]:
    """Write `count` JPEGs made from those below `originals`, half labeled real and half fake.

    Each original is copied as it is, then re-encoded at lower and lower quality. No two files are
    equal.

    Raises:
        ValueError: there are no JPEGs, or too few different ones.
    """
    files = sorted(path for path in originals.rglob("*") if path.is_file())
    jpegs = [path for path in files if path.read_bytes()[:2] == b"\xff\xd8"]
    if not jpegs:
        raise ValueError(f"no JPEG below {originals}; name a folder with JPEGs")
    paths, seen = [], set()
    for number in range(100 * count):
        original, turn = jpegs[number % len(jpegs)], number // len(jpegs)
        path = folder / ("real", "fake")[number % 2] / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if turn == 0:
            path.write_bytes(original.read_bytes())
        else:
            with Image.open(original) as image:
                image.convert("RGB").save(path, "JPEG", quality=96 - turn)
        digest = hashlib.sha256(path.read_bytes()).digest()
        if digest in seen:
            path.unlink()
            continue
        seen.add(digest)
        paths.append(path)
        if len(paths) == count:
            return paths
    raise ValueError(f"only {len(paths)} different JPEGs can be made from {originals}")
