"""Build images, shard sets, archives, score tables and runs for tests, and compare results."""

import ast
import contextlib
import functools
import hashlib
import io
import os
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import recipes
from model import checkpoint
from model.backbones.resolve import resolved
from model.evaluation.scores import (
    SCORES_SCHEMA,
    ScoreTable,
)
from model.recipe import Data, Network, Optim, Recipe, ResolvedRecipe, Run
from model.tracking.history import rows_of
from model.training.run import train
from model.verdict import probability
from pipeline.augment import AugmentPolicy
from pipeline.color import color_matrices
from pipeline.preprocess import Preprocess
from sharding.build import Tolerance, build
from sharding.catalog import Catalog, read_catalog
from sharding.format import ShardSet, open_shards

ROOT = Path(__file__).parents[1]

TINY_RECIPE = ROOT / "tests/tiny.toml"
"""Recipe of phase 1 with a network of a few thousand weights, on the sets of `build_all`."""

PREPROCESS = Preprocess(crop_size=48, resize_size=54)

SMALL_PREPROCESS = Preprocess(crop_size=32, resize_size=36)

TINY = recipes.load(Recipe, TINY_RECIPE).network

# Every operation with a high probability, so that tests use the whole augmentation graph.
HARSH = AugmentPolicy(
    scale=(0.4, 1.0), ratio=(0.8, 1.25), hflip=0.5, color_jitter=0.6, brightness=0.3, contrast=0.3,
    saturation=0.3, hue=0.1, resample=0.5, resample_scale=(0.6, 0.95), jpeg=0.5,
    jpeg_quality=(40, 95), blur=0.5, blur_sigma=(0.1, 0.8), grayscale=0.2, num_jpegs=(1, 3),
    jpeg_grid_shift=0.4, resample_filters=("bilinear", "bicubic", "lanczos"), webp=0.3,
    webp_quality=(40, 90),
)  # fmt: skip


def photo(seed: int, width: int = 90, height: int = 70) -> np.ndarray:
    """Make (height, width, 3) uint8 pixels: smooth colors with noise, to compress like a photo."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth, np.float32) + rng.normal(0, 5, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def encode(
    pixels: np.ndarray | Image.Image, image_format: str = "JPEG", **options: object
) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


ORIENTED_PLACES = [
    ("JPEG", "exif"), ("JPEG", "xmp attribute"), ("JPEG", "xmp element"),
    ("PNG", "exif"), ("PNG", "xmp attribute"), ("PNG", "raw profile"), ("PNG", "raw xmp"),
    ("WEBP", "exif"), ("WEBP", "prefixed exif"), ("WEBP", "xmp element"),
]  # fmt: skip
"""Formats that the builder keeps, with each place where a file may store its orientation."""


def oriented(image: Image.Image, image_format: str, place: str, orientation: int) -> bytes:
    """Encode an image with an orientation (1 to 8) stored in one of `ORIENTED_PLACES`."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    tiff = exif.tobytes().removeprefix(b"Exif\0\0")
    field = (
        f'tiff:Orientation="{orientation}"/>'
        if "attribute" in place
        else f"><tiff:Orientation>{orientation}</tiff:Orientation></rdf:Description>"
    )
    xmp = f"<x:xmpmeta><rdf:RDF><rdf:Description {field}</rdf:RDF></x:xmpmeta>".encode()
    if place == "exif":
        return encode(image, image_format, exif=exif)
    if place == "prefixed exif":  # some encoders copy EXIF from a JPEG with its prefix
        data = encode(image, image_format, exif=exif)
        prefixed = b"Exif\0\0" + tiff
        chunk = b"EXIF" + struct.pack("<I", len(prefixed)) + prefixed + b"\0" * (len(prefixed) % 2)
        data = data[: data.index(b"EXIF" + struct.pack("<I", len(tiff)))] + chunk
        return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    if image_format != "PNG":
        return encode(image, image_format, xmp=xmp)
    info = PngInfo()
    if place == "xmp attribute":
        info.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=True)
    else:  # the format of ImageMagick
        name, content = ("exif", b"Exif\0\0" + tiff) if place == "raw profile" else ("xmp", xmp)
        digits = content.hex()
        lines = [digits[at : at + 72] for at in range(0, len(digits), 72)]
        text = "\n".join(["", name, f"{len(content):8}", *lines, ""])
        info.add_text(f"Raw profile type {name}", text, zip=True)
    return encode(image, image_format, pnginfo=info)


CATALOG = """
[sets]
old = "train"
new = "train"
val = "val"

[sources.alpha]
license = "test"
set = "old"
real = [{ folder = "real", generator = "camera" }]
fake = [{ folder = "fake", generator = "gan" }]

[sources.beta]
license = "test"
set = "old"
policy = "dda"
real = [{ folder = "real", generator = "camera" }]
fake = [{ folder = "fake", generator = "vae" }]

[sources.dummy]
title = "dummies"
license = "test"
set = "old"
replay = false
fake = ["fake"]

[sources.gamma]
license = "test"
set = { new = 0.8, val = 0.2 }
real = [{ folder = "real", generator = "camera" }]
fake = [{ folder = "fake", generator = "diffusion" }]
"""


def write_raw(folder: Path) -> Path:
    """Write raw datasets and `catalog.toml`: 80 images of `old`, 120 of `new` and `val`."""
    kinds = [
        ("jpg", "JPEG", {"quality": 90}), ("JPEG", "JPEG", {"quality": 75, "subsampling": 0}),
        ("png", "PNG", {}), ("webp", "WEBP", {"quality": 80}),
    ]  # fmt: skip
    plan = {"alpha": (25, 15), "beta": (15, 15), "dummy": (0, 10), "gamma": (60, 60)}
    number = 0
    for source, counts in plan.items():
        for label, count in zip(("real", "fake"), counts, strict=True):
            for i in range(count):
                suffix, image_format, options = kinds[number % len(kinds)]
                pixels = photo(number, 60 + 7 * (number % 9), 60 + 5 * (number % 7))
                path = folder / source / label / f"{i:03d}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                # The fakes have a grid, so that a network can learn to tell them from reals.
                pixels[::2, ::2] = pixels[::2, ::2] // 2 if label == "fake" else pixels[::2, ::2]
                path.write_bytes(encode(pixels, image_format, **options))
                number += 1
    (folder / "catalog.toml").write_text(CATALOG)
    return folder


def build_all(
    raw: Path, out: Path, jobs: int = 1, catalog: Catalog | None = None, max_bad: float = 0.01
) -> Path:
    """Pack every set of `raw` with the real builder, also training sets of one class."""
    catalog = catalog or read_catalog([raw / "catalog.toml"])
    build(catalog, raw, out, jobs=jobs, tolerance=Tolerance(max_bad, allow_incomplete=True))
    return out


def small_recipe(
    name: str = "small", network: Network = TINY, preprocess: Preprocess = SMALL_PREPROCESS
) -> ResolvedRecipe:
    """Make a resolved recipe with a small network, to be saved in a checkpoint and not trained."""
    return resolved(
        Recipe(
            name=name,
            data=Data(train=[], validate=[], policy="train"),
            augment={},
            network=network,
            optim=Optim(lr=1e-3),
            run=Run(epochs=1),
            preprocess=preprocess,
        )
    )


CALIBRATION = {
    "fitted_on": ["val"], "index_sha256": {"val": "0" * 64}, "reals": 40, "fakes": 30,
    "threshold_at": "auto", "band": [0.3, 0.6], "method": "sources left out, pooled",
    "before": {"nll": 0.5, "ece": 0.1}, "after": {"nll": 0.4, "ece": 0.05},
}  # fmt: skip


def train_tiny(data: Path, runs: Path, *overrides: str, **options: Any) -> Path:
    """Train a network of a few thousand weights on the tiny sets, as run `tiny`; returns `runs`.
    `options` are those of `train`.
    """
    recipe = recipes.load(Recipe, TINY_RECIPE, ["run.epochs=1", *overrides])
    train(recipe, data, runs, **options)
    return runs


def can_mount() -> bool:
    """Return whether this process may mount file systems in a new namespace."""
    unshare = shutil.which("unshare")
    return bool(unshare) and not subprocess.run([unshare, "-m", "true"], check=False).returncode


PHOTO = Image.fromarray(photo(1))


JPEG, PNG, WEBP = (encode(PHOTO, kind) for kind in ("JPEG", "PNG", "WEBP"))


def noise(data: bytes, count: int = 200) -> bytes:
    """Overwrite `count` bytes in the second half of a file, where the pixels are."""
    rng = np.random.default_rng(0)
    changed = bytearray(data)
    for place in rng.integers(len(data) // 2, len(data) - 16, count).tolist():
        changed[place] = int(rng.integers(0, 256))
    return bytes(changed)


def png_of_rows(width: int, height: int, bits: int, color_type: int, rows: bytes) -> bytes:
    """Make a PNG of rows that begin with their filter bytes. Rows may be missing."""
    header = struct.pack(">2I5B", width, height, bits, color_type, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


KINDS = {
    "empty": b"", "one byte": b"\xff", "html": b"<html><body>404</body></html>",
    "zeros": b"\0" * 3000, "header only": JPEG[:20], "half a jpeg": JPEG[: len(JPEG) // 2],
    "nearly a whole jpeg": JPEG[: len(JPEG) * 95 // 100], "no end of image": JPEG[:-2],
    "noise in a scan": noise(JPEG), "noise in a png": noise(PNG), "half a png": PNG[:3000],
    "half a webp": WEBP[: len(WEBP) // 2], "noise in a webp": noise(WEBP),
    "lying size": JPEG.replace(struct.pack(">2H", 70, 90), struct.pack(">2H", 60_000, 60_000)),
    "bomb": png_of_rows(60_000, 60_000, 8, 2, bytes(10_000)), "gif": encode(PHOTO, "GIF"),
    "bmp": encode(PHOTO, "BMP"), "tiff": encode(PHOTO, "TIFF"), "avif": encode(PHOTO, "AVIF"),
    "cmyk": encode(PHOTO.convert("CMYK")), "another picture": encode(photo(2, 31, 33)),
    "16 bit": encode(Image.fromarray(np.full((70, 90), 40_000, np.uint16)), "PNG"),
    "animated": encode(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(90)]),
}  # fmt: skip


def awkward_files() -> list[Path]:
    folder = os.environ.get("AWKWARD_IMAGES")
    return sorted(p for p in Path(folder).rglob("*") if p.is_file()) if folder else []


BACKENDS = ("pil", "dali")


CPU = torch.device("cpu")


def broken_copy(data: Path, folder: Path, samples: list[int], cut: str) -> ShardSet:
    """Copy the set `old`, with the bytes of some samples overwritten inside their tars.

    `cut` is what is overwritten: the second "half" of a sample, or "all" of it.
    """
    shutil.copytree(data / "old", folder / "old")
    shards = open_shards([folder / "old"])
    for sample in samples:
        offset, size = (int(shards.column(name)[sample]) for name in ("offset", "size"))
        first = {"half": size // 2, "all": 0}[cut]
        with shards.shard_path(sample).open("r+b") as stream:
            stream.seek(offset + first)
            too_early = b"\xff\xd9"  # the end-of-image marker of a JPEG
            stream.write((too_early + b"\0" * size)[: size - first])
    return shards


ABOUT = {
    "scores_version": 3, "checkpoint": "runs/a/step_1", "run": "a", "step": 1, "commit": "c",
    "detector": {"kind": "checkpoint", "name": "step_1"}, "trained_on": [], "maybe_trained_on": [],
    "precision": "fp32", "backend": "pil", "temperature": 2.0, "threshold": 0.6,
    "calibration": {"band": [0.3, 0.6]}, "subset": None,
}  # fmt: skip
ABOUT_SET = {"index_sha256": "h", "split": "test", "known_generators": [], "robustness": None,
             "reference_reals": None}  # fmt: skip


def table_of(rows: list[dict[str, Any]], sets: list[str], **about: Any) -> ScoreTable:
    """Make a score table of `rows` and usual values. Sets without reals get `reference_reals`."""
    usual = {"source": "s", "generator": "g", "split": "test", "error": "", "valid": True}
    filled = []
    for number, row in enumerate(rows):
        own = {"key": f"k{number}", "origin": f"s/{number}.jpg", "group": f"s/{number}"}
        full = usual | own | {"sha256": bytes(32)} | row
        if full["valid"]:
            full["probability"] = float(probability(np.array(full["logit"]), 2.0))
        filled.append({name: full.get(name) for name in SCORES_SCHEMA.names})
    reals = about.pop("reference_reals", None)
    own = {row["set"] for row in rows if row["label"] == 0} | {reals and reals["set"]}
    info = {name: ABOUT_SET | ({} if name in own else {"reference_reals": reals}) for name in sets}
    table = pa.Table.from_pylist(filled, schema=SCORES_SCHEMA)
    return ScoreTable(table, ABOUT | {"sets": info} | about)


@contextlib.contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    """Set a limit of this process, such as `resource.RLIMIT_NOFILE`."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def small_disk(size: int) -> contextlib.AbstractContextManager[None]:
    """Limit the size of a file to `size` bytes, which acts like a full disk."""
    return limited(resource.RLIMIT_FSIZE, size)


MakeImage = Callable[[np.random.Generator, int, int], tuple[str, int, int]]


OPTIONS = {
    "jpg": ("JPEG", {"quality": 90}), "png": ("PNG", {}), "webp": ("WEBP", {"quality": 80}),
}  # fmt: skip


def random_size(rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(40, 80)), int(rng.integers(40, 80))


def partly(rng: np.random.Generator, label: int, _number: int) -> tuple[str, int, int]:
    """Choose PNG for three of four fakes and for one of four reals, else JPEG; a random size."""
    return "png" if rng.random() < (0.75 if label else 0.25) else "jpg", *random_size(rng)


def write_shards(folder: Path, plan: dict[str, dict[str, tuple[MakeImage, int, int]]]) -> Path:
    """Write and pack images by a plan; returns the folder of the sets.

    `plan` has, for each set and source, a function that chooses format and size of an image, and
    the counts of reals and fakes.
    """
    catalog = "[sets]\n" + "".join(f'{name} = "train"\n' for name in plan)
    rng = np.random.default_rng(0)
    seed = 0
    for set_name, sources in plan.items():
        for source, (make_image, *counts) in sources.items():
            catalog += f'[sources.{source}]\nlicense = "test"\nset = "{set_name}"\n'
            catalog += "group = '(v\\d+)_\\d+\\.'\n" if make_image is grouped else ""
            for label, (name, count) in enumerate(zip(("real", "fake"), counts, strict=True)):
                catalog += f'{name} = ["{name}"]\n' if count else ""
                for number in range(count):
                    suffix, width, height = make_image(rng, label, number)
                    kind, options = OPTIONS[suffix]
                    video = number // 6 * 2 + label
                    path = folder / "raw" / source / name / f"v{video}_{number}.{suffix}"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(encode(photo(seed, width, height), kind, **options))
                    seed += 1
    (folder / "catalog.toml").write_text(catalog)
    return build_all(
        folder / "raw", folder / "shards", catalog=read_catalog([folder / "catalog.toml"])
    )


def grouped(_rng: np.random.Generator, label: int, number: int) -> tuple[str, int, int]:
    """Choose one size for the six images of a video; each video has another size."""
    video = number // 6 * 2 + label
    return "jpg", 40 + int(np.random.default_rng(5).permutation(80)[video]), 44


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below `folder`, without the builder's notes."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".build" not in path.parts
    }


def run_build(raw: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "sharding", "build", "--jobs", "2", "--raw", str(raw)]
    command += ["--catalog", str(raw / "catalog.toml"), "--out", str(out)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def write_tar(path: Path, contents: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_zip(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def write_split_zip(path: Path, members: dict[str, bytes], volumes: int) -> None:
    """Write a split archive as `zip -s` does: X.z01, X.z02, ..., X.zip.

    Local headers and data continue from one volume to the next. The directory gives each entry's
    volume and the offset in this volume.
    """
    body = bytearray(b"PK\7\x08")  # signature of a split archive
    entries = []
    for name, data in members.items():
        encoded = name.encode()
        packed = zlib.compressobj(6, zlib.DEFLATED, -15)
        packed = packed.compress(data) + packed.flush()
        fields = (20, 0, 8, 0, 0x21, zlib.crc32(data), len(packed), len(data), len(encoded), 0)
        entries.append((len(body), encoded, fields))
        body += struct.pack("<4s5H3L2H", b"PK\3\4", *fields) + encoded + packed
    step = -(-len(body) // (volumes - 1)) if volumes > 1 else len(body)
    directory = b""
    for offset, encoded, fields in entries:
        disk, inside = divmod(offset, step)
        directory += struct.pack("<4sH", b"PK\1\2", 20) + struct.pack("<5H3L2H", *fields)
        directory += struct.pack("<3H2L", 0, disk, 0, 0, inside) + encoded
    last = volumes - 1
    count = len(members)
    end = struct.pack("<4s4H2LH", b"PK\5\6", last, last, count, count, len(directory), 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(last):
        piece = body[number * step : (number + 1) * step]
        path.with_suffix(f".z{number + 1:02d}").write_bytes(piece)
    path.write_bytes(directory + end)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read_weights(folder)


def same(one: Path, other: Path) -> bool:
    left, right = weights_of(one), weights_of(other)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def losses_of(run: Path) -> list[float]:
    return [row["loss"] for row in rows_of(run) if row["kind"] == "train"]


def ends_alike(whole: Path, parts: Path) -> None:
    """Assert that two runs end with the same weights, optimizer moments and losses."""
    one, other = checkpoint.checkpoints_of(whole)[-1], checkpoint.checkpoints_of(parts)[-1]
    assert one.name == other.name
    assert same(one, other)
    first, second = (checkpoint.load_state(folder)["optimizer"] for folder in (one, other))
    for number, moments in first["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, second["state"][number][name]), (number, name)
    assert losses_of(whole) == losses_of(parts)


@functools.cache
def imports_of(path: Path) -> tuple[str, ...]:
    """Return the dotted names of everything that a file imports."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} uses a relative import"
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(modules)


def color_matrix(
    brightness: float = 1.0, contrast: float = 1.0, saturation: float = 1.0, hue: float = 0.0
) -> tuple[float, ...]:
    """Return one of `color_matrices`, in the form of `AugmentParams.color`."""
    values = (np.array([value]) for value in (brightness, contrast, saturation, hue))
    return tuple(color_matrices(*values)[0].tolist())
