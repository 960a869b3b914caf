"""Render synthetic raw images, real and fake, for a demo without any download.

Main entry: `make_demo(folder, *, seed, jobs, on_done)` writes the files below and returns a dict
from the name of each source (key of `SOURCES`) to its number of images. A file that cannot be
written raises `OSError`, and so do files of a demo with another seed in `folder`. One JPEG is
truncated on purpose.

- `folder`: a `pathlib.Path`, created if it does not exist.
- `seed`: an integer from 0 on that determines all images (default 0).
- `jobs`: number of processes (default 2). They are spawned, so a script must call `make_demo()`
  inside `if __name__ == "__main__":`.
- `on_done`: None (default), or `on_done(done, total)`, called after each image with the number of
  images so far and of all.

Files:

    folder/raw/<source>/{real,fake}/<camera or decoder>/<number>.<jpg|png|webp|bmp>
    folder/catalog.toml      the catalog of these sources, for `python -m sharding build`

The images contain no photograph and nothing of a published generator. A procedural scene is
rendered in linear light at twice the final resolution and is then processed in one of two ways:

    real:  lens -> sensor with Bayer mosaic and noise -> demosaic -> tone curve -> file
    fake:  lens -> tone curve -> reduced to a latent, decoded with learned upsampling -> file

In the source `pairs`, each fake is made from the finished real image of the same number, by
reducing it to a latent and decoding this. A `Shot` is one image to make, a `Camera` or a `Decoder`
is what makes it. `render(shot, seed)` returns its pixels, float32 (height, width, 3), 0 to 1; most
other functions are its steps.

Scenes, lenses, tone curves, sizes, file formats and qualities have the same distribution in both
classes. Only pixels differ. Real images have sensor noise, which demosaicing makes similar in
neighboring pixels. Fake images have lost detail in the latent. Some decoders add independent noise
or the checkerboard of uneven upsampling (Odena et al. 2016). A score on this data shows that the
programs work. It shows nothing about real generators.
"""

import io
import math
import multiprocessing
import zlib
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.Image import Resampling

from sharding.demo.scenes import SCENES, Rng
from storage import is_partial, remove_leftovers, write_bytes, write_text

Progress = Callable[[int, int], None]  # finished files, all files
AFFINE = Image.Transform.AFFINE

SUPERSAMPLING = 2
REAL, FAKE = 0, 1


@dataclass(frozen=True)
class Camera:
    """Sensor and processing of one kind of camera."""

    shot: float  # variance of the photon noise per unit of light: 1 / full well
    read: float  # sigma of the read noise, full scale is 1
    denoise: float = 0.0  # share of a blur mixed in after demosaicing
    sharpen: float = 0.3  # gain of the unsharp mask
    gamma: float = 2.2


@dataclass(frozen=True)
class Decoder:
    """Decoder of a generator, from latent to pixels: one x2 upsampler per stage."""

    stages: tuple[str, ...]
    uneven: float  # deviation of the learned weights around the ideal kernel
    detail: float = 0.6  # share of the fine detail that survives the latent
    grain: float = 0.0  # sigma of the noise that imitates film


@dataclass(frozen=True)
class DemoSource:
    """One raw data set, with `count` images of each class."""

    scenes: tuple[str, ...]
    count: int
    cameras: tuple[str, ...]
    decoders: tuple[str, ...]
    split: str


@dataclass(frozen=True)
class Shot:
    """One image to make. Together with the seed, it determines every byte of the file."""

    source: str
    label: int
    number: int
    maker: str  # key of CAMERAS or DECODERS


CAMERAS = {
    "camera-a": Camera(shot=0.0030, read=0.008),
    "camera-b": Camera(shot=0.0020, read=0.006, sharpen=0.6, gamma=2.3),
    "camera-c": Camera(shot=0.0050, read=0.010, denoise=0.3),
    "phone-d": Camera(shot=0.0025, read=0.006, denoise=0.8, sharpen=0.5),
    "phone-e": Camera(shot=0.0020, read=0.006, denoise=0.7, sharpen=0.4, gamma=2.1),
    "camera-f": Camera(shot=0.0030, read=0.008, denoise=0.6, sharpen=0.4),
}

DECODERS = {
    "checkerboard": Decoder(("transposed",), uneven=0.12),
    "nearest": Decoder(("nearest", "nearest"), uneven=0.12),
    "shuffle": Decoder(("shuffle",), uneven=0.08),
    "bilinear": Decoder(("bilinear", "bilinear"), uneven=0.10),
    "autoencoder": Decoder(("nearest", "transposed"), uneven=0.12, detail=0.4),
    "cascade": Decoder(("shuffle", "bicubic"), uneven=0.13, grain=0.030),
    "smooth": Decoder(("transposed", "bilinear"), uneven=0.13, grain=0.030),
    "upscaler": Decoder(("transposed", "shuffle"), uneven=0.09, grain=0.028),
    "mixed": Decoder(("bicubic", "transposed"), uneven=0.11, grain=0.024),
}

OLD = "{ phase1 = 0.8, val = 0.2 }"
NEW = "{ phase2 = 0.7, val-phase2 = 0.3 }"
ANY = ("street", "nature", "studio")
SOURCES = {
    "street": DemoSource(
        ("street",), 110, ("camera-a", "camera-b"), ("checkerboard", "nearest"), OLD
    ),
    "nature": DemoSource(("nature",), 110, ("camera-b", "camera-c"), ("bilinear",), OLD),
    "studio": DemoSource(("studio",), 110, ("camera-a", "camera-c"), ("shuffle", "nearest"), OLD),
    "pairs": DemoSource(ANY, 90, ("camera-b",), ("autoencoder",), OLD),
    "mobile": DemoSource(ANY, 110, ("phone-d",), ("cascade",), NEW),
    "listings": DemoSource(ANY, 110, ("phone-e",), ("smooth",), NEW),
    "unseen": DemoSource(ANY, 90, ("camera-f",), ("upscaler", "mixed"), '"evalgen"'),
}
PAIRED = "pairs"  # source whose fakes reconstruct its photos

# Two special files exercise packing: a truncated download, which is quarantined, and a bitmap,
# which is transcoded.
TRUNCATED = Shot("street", REAL, 0, "camera-a")
FIXED = {("street", 0): "jpg", ("nature", 0): "bmp"}

SETS = """\
# Synthetic images made by sharding/demo/render.py: no photographs, no published generators.

[sets]
phase1 = "train"
phase2 = "train"
val = "val"
val-phase2 = "val"
evalgen = "test"
"""


def make_demo(
    folder: Path, *, seed: int = 0, jobs: int = 2, on_done: Progress | None = None
) -> dict[str, int]:
    """Write raw images and catalog.toml below `folder` with `jobs` processes. Returns the number of
    files per source.

    Raises:
        OSError: `folder` has files of another demo, or a file cannot be written.
    """
    shots = [shot for name in SOURCES for shot in shots_of(name)]
    paths = {path_of(folder, shot, seed) for shot in shots}
    _refuse_others(folder / "raw", paths)
    for parent in {path.parent for path in paths}:
        parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(parent)
    work = [(folder, shot, seed) for shot in shots]
    # Forking a process that already runs the threads of torch can deadlock; spawning cannot.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, jobs), mp_context=context) as pool:
        for done, _ in enumerate(pool.map(write_shot, work, chunksize=8), start=1):
            if on_done:
                on_done(done, len(shots))
    entries = [SETS, *(catalog_entry(name) for name in SOURCES)]
    write_text(folder / "catalog.toml", "\n".join(entries))
    return {name: 2 * source.count for name, source in SOURCES.items()}


def _refuse_others(raw: Path, paths: Collection[Path]) -> None:
    """Refuse a folder in which a source has other files, such as those of another seed: suffixes
    depend on the seed, so images of both seeds would be packed.

    Raises:
        FileExistsError: the message names one of these files.
    """
    for name in SOURCES:
        for path in sorted((raw / name).rglob("*")):
            kept = path in paths or is_partial(path) or path.name.startswith(".")
            if path.is_file() and not kept:
                raise FileExistsError(
                    f"{path} is not of this demo, maybe of one with another --seed; remove {raw}, "
                    "or choose another folder"
                )


def catalog_entry(name: str) -> str:
    """Return the catalog entry of one source as TOML; `sharding/catalog.py` defines the format."""
    source = SOURCES[name]
    real, fake = (
        ", ".join(f'{{ folder = "{side}/{maker}", generator = "{maker}" }}' for maker in makers)
        for side, makers in (("real", source.cameras), ("fake", source.decoders))
    )
    # A photo and its reconstruction have the same stem, and so the same group and split.
    paired = "policy = \"dda\"\ngroup = '([0-9]+)\\.[a-z]+$'\n" if name == PAIRED else ""
    return (
        f'[sources.{name}]\nroot = "{name}"\nlicense = "synthetic, no rights reserved"\n'
        f"synthetic = true\nset = {source.split}\nreal = [{real}]\nfake = [{fake}]\n{paired}"
    )


def shots_of(name: str) -> list[Shot]:
    """Return all images of one source. Cameras or decoders alternate."""
    source = SOURCES[name]
    return [
        Shot(name, label, number, makers[number % len(makers)])
        for label, makers in ((REAL, source.cameras), (FAKE, source.decoders))
        for number in range(source.count)
    ]


def rng_for(seed: int, purpose: str, source: str, *rest: int) -> Rng:
    """Return the generator of one purpose. Other purposes and images do not change its numbers."""
    return np.random.default_rng([seed, zlib.crc32(f"{purpose} {source}".encode()), *rest])


def path_of(folder: Path, shot: Shot, seed: int) -> Path:
    """Return the path of a shot's file."""
    side = "fake" if shot.label else "real"
    name = f"{shot.number:05d}.{container(shot, seed)[0]}"
    return folder / "raw" / shot.source / side / shot.maker / name


def write_shot(work: tuple[Path, Shot, int]) -> None:
    """Render one image and write its file. Runs in a worker process."""
    folder, shot, seed = work
    pixels = np.clip(render(shot, seed) * 255 + 0.5, 0, 255).astype(np.uint8)
    suffix, quality, subsampling = container(shot, seed)
    jpeg: dict[str, Any] = {"quality": quality, "subsampling": subsampling}
    options: dict[str, Any] = {"jpg": jpeg, "webp": {"quality": quality}}.get(suffix, {})
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG" if suffix == "jpg" else suffix.upper(), **options)
    data = stream.getvalue()
    write_bytes(
        path_of(folder, shot, seed), data[: len(data) * 2 // 5] if shot == TRUNCATED else data
    )


def size_of(shot: Shot, seed: int) -> tuple[int, int]:
    """Return height and width in pixels: multiples of 8, so that every latent has whole pixels."""
    # The label has no influence, as in `container`: a real and a fake image of one number have the
    # same size, suffix and quality, so none of these reveals the label.
    rng = rng_for(seed, "size", shot.source, shot.number)
    short = 8 * int(rng.integers(16, 19))
    long = 8 * round(short * rng.uniform(1.0, 1.3) / 8)
    return (short, long) if rng.random() < 0.7 else (long, short)


def container(shot: Shot, seed: int) -> tuple[str, int, int]:
    """Choose file suffix, quality, and chroma subsampling in Pillow's numbering (0: 4:4:4, 2:
    4:2:0).
    """
    rng = rng_for(seed, "container", shot.source, shot.number)
    suffix = str(rng.choice(["jpg", "png", "webp"], p=[0.8, 0.1, 0.1]))
    suffix = FIXED.get((shot.source, shot.number), suffix)
    return suffix, int(rng.integers(75, 98)), 2 * int(rng.random() < 0.6)


def render(shot: Shot, seed: int) -> np.ndarray:
    """Render the finished image: float32 (height, width, 3) RGB, 0 to 1."""
    source = SOURCES[shot.source]
    height, width = size_of(shot, seed)
    # A reconstruction starts from the photo of its pair, including its noise and mosaic.
    label = REAL if shot.source == PAIRED else shot.label
    rng = rng_for(seed, "image", shot.source, label, shot.number)
    paint = SCENES[str(rng.choice(source.scenes))]
    radiance = paint(rng, height * SUPERSAMPLING, width * SUPERSAMPLING)
    light = lens(rng, np.clip(radiance, 0.003, 1.2))
    camera = CAMERAS[source.cameras[shot.number % len(source.cameras)]]
    image = finish(sensor(rng, light, camera) if label == REAL else light, camera)
    if shot.label == FAKE:
        image = decode(rng_for(seed, "decode", shot.source, shot.number), image, shot.maker)
    return image


def lens(rng: Rng, light: np.ndarray) -> np.ndarray:
    """Apply blur, vignette and lateral color, then reduce to sensor resolution."""
    height, width = light.shape[:2]
    light = blur(light, rng.uniform(0.4, 1.0) * SUPERSAMPLING)  # focus varies
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    exposure = rng.uniform(0.75, 1.15) * (1 - 0.12 * (y**2 + x**2))
    light *= exposure.astype(np.float32)[..., None]
    for channel, scale in ((0, 1.001), (2, 0.999)):  # red and blue magnify differently from green
        matrix = (scale, 0, (1 - scale) * width / 2, 0, scale, (1 - scale) * height / 2)
        plane = Image.fromarray(light[..., channel])
        light[..., channel] = plane.transform(plane.size, AFFINE, matrix, Resampling.BILINEAR)
    return shrink(light, SUPERSAMPLING)


def sensor(rng: Rng, light: np.ndarray, camera: Camera) -> np.ndarray:
    """Expose an RGGB mosaic, add noise, demosaic bilinearly, and apply white balance."""
    # Silicon is most sensitive to green: the gains for red and blue also amplify their noise.
    balance = np.array([rng.uniform(1.5, 2.2), 1.0, rng.uniform(1.3, 1.8)], np.float32)
    exposed = light / balance
    noise = rng.standard_normal(light.shape, np.float32)
    exposed += noise * np.sqrt(camera.shot * exposed + camera.read**2)
    sites = np.zeros_like(light)
    sites[::2, ::2, 0] = sites[1::2, 1::2, 2] = 1
    sites[::2, 1::2, 1] = sites[1::2, ::2, 1] = 1
    tent = np.outer([1, 2, 1], [1, 2, 1]).astype(np.float32)
    color = convolve(exposed * sites, tent) / convolve(sites, tent) * balance
    return color + camera.denoise * (blur(color, 0.8) - color)


def finish(light: np.ndarray, camera: Camera) -> np.ndarray:
    """Apply tone curve and unsharp mask."""
    image = np.clip(light, 0, 1) ** (1 / camera.gamma)
    return np.clip(image + camera.sharpen * (image - blur(image, 1.0)), 0, 1)


def decode(rng: Rng, image: np.ndarray, maker: str) -> np.ndarray:
    """Reduce the image to the size of the latent and enlarge it stage by stage."""
    decoder = DECODERS[maker]
    weights = np.random.default_rng(zlib.crc32(maker.encode()))  # the same weights for all images
    factor = 2 ** len(decoder.stages)
    latent = shrink(image, factor)
    lost = image - enlarge(latent, factor, Resampling.BICUBIC)
    for stage in decoder.stages:
        latent = upsample(latent, stage, decoder.uneven, weights)
    latent += decoder.detail * lost
    latent += rng.normal(0, decoder.grain, latent.shape).astype(np.float32)
    return np.clip(latent, 0, 1)


def upsample(latent: np.ndarray, stage: str, uneven: float, weights: Rng) -> np.ndarray:
    """Double the size. Uneven weights after zero insertion or shuffling leave a pattern of period
    two.
    """
    if stage == "transposed":
        stretched = np.zeros((2 * latent.shape[0], 2 * latent.shape[1], 3), np.float32)
        stretched[::2, ::2] = latent
        return convolve(stretched, perturbed(np.outer([1, 2, 1], [1, 2, 1]) / 4, uneven, weights))
    if stage == "shuffle":
        gains = perturbed(np.ones((2, 2)), uneven, weights)
        return enlarge(latent, 2, Resampling.BILINEAR) * np.tile(gains, (*latent.shape[:2], 1))
    soft = perturbed(np.outer([1, 4, 1], [1, 4, 1]) / 36, uneven, weights)
    return convolve(enlarge(latent, 2, Resampling[stage.upper()]), soft)


def perturbed(kernel: np.ndarray, uneven: float, weights: Rng) -> np.ndarray:
    """Return the kernel with random errors for each color and an unchanged sum."""
    noisy = kernel[..., None] * (1 + uneven * weights.standard_normal((*kernel.shape, 3)))
    return (noisy * (kernel.sum() / noisy.sum((0, 1)))).astype(np.float32)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur with a Gaussian of `sigma` pixels."""
    reach = max(1, math.ceil(2.5 * sigma))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    return convolve(convolve(image, taps[:, None]), taps[None])


def convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve with an odd-sized kernel, one for all colors or one each. Borders are mirrored."""
    high, wide = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = np.pad(image, ((high, high), (wide, wide), (0, 0)), mode="reflect")
    out = np.zeros_like(image)
    for y, x in np.ndindex(kernel.shape[:2]):
        out += kernel[y, x] * padded[y : y + image.shape[0], x : x + image.shape[1]]
    return out


def shrink(image: np.ndarray, factor: int) -> np.ndarray:
    """Average each `factor` x `factor` block."""
    height, width, channels = image.shape
    blocks = image.reshape(height // factor, factor, width // factor, factor, channels)
    return blocks.mean((1, 3), dtype=np.float32)


def enlarge(image: np.ndarray, factor: int, method: Resampling) -> np.ndarray:
    """Enlarge `factor` times with one of Pillow's kernels."""
    size = (image.shape[1] * factor, image.shape[0] * factor)
    planes = (Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(3))
    return np.stack([np.asarray(plane.resize(size, method)) for plane in planes], axis=-1)
