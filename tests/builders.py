"""Images, shard sets, tables and checkpoints that many tests build, and what they compare."""

import ast
import functools
import hashlib
import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
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
from model.score import probability
from model.training.history import rows_of
from model.training.run import train
from pipeline.augment import AugmentPolicy, Preprocess, color_matrices
from sharding.build import Tolerance, build
from sharding.catalog import Catalog, read_catalog
from sharding.format import ShardSet, open_shards

ROOT = Path(__file__).parents[1]


PREPROCESS = Preprocess(crop_size=48, resize_size=54)


SMALL_PREPROCESS = Preprocess(crop_size=32, resize_size=36)

TINY = Network(
    name="convnextv2_atto",
    pretrained=False,
    init="fan_in",
    options={"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16], "patch_size": 2},
)


# Every operation at once, often: nothing of the graph stays unused.
HARSH = AugmentPolicy(
    scale=(0.4, 1.0), ratio=(0.8, 1.25), hflip=0.5, color_jitter=0.6, brightness=0.3, contrast=0.3,
    saturation=0.3, hue=0.1, resample=0.5, resample_scale=(0.6, 0.95), jpeg=0.5,
    jpeg_quality=(40, 95), blur=0.5, blur_sigma=(0.1, 0.8), grayscale=0.2, num_jpegs=(1, 3),
    jpeg_grid_shift=0.4, resample_filters=("bilinear", "bicubic", "lanczos"), webp=0.3,
    webp_quality=(40, 90),
)  # fmt: skip


def photo(seed: int, width: int = 90, height: int = 70) -> np.ndarray:
    """Smooth color fields with noise: compresses like a photograph, and every pixel matters."""
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
"""Formats that may be kept, and where each may state its orientation."""


def oriented(image: Image.Image, image_format: str, place: str, orientation: int) -> bytes:
    """The image as a file that states an orientation in one of `ORIENTED_PLACES`."""
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
    if place == "prefixed exif":  # as some encoders copy it out of a JPEG
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
    else:  # as ImageMagick writes them
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
    """Raw datasets and `catalog.toml`: 40 + 30 + 10 old images, 120 new or validation ones."""
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
                # The fakes carry a grid, so that something can be learned.
                pixels[::2, ::2] = pixels[::2, ::2] // 2 if label == "fake" else pixels[::2, ::2]
                path.write_bytes(encode(pixels, image_format, **options))
                number += 1
    (folder / "catalog.toml").write_text(CATALOG)
    return folder


def build_all(
    raw: Path, out: Path, jobs: int = 1, catalog: Catalog | None = None, max_bad: float = 0.01
) -> Path:
    """Every set of `raw`, by the real builder; training sets of one class are meant."""
    catalog = catalog or read_catalog([raw / "catalog.toml"])
    build(catalog, raw, out, jobs=jobs, tolerance=Tolerance(max_bad, allow_incomplete=True))
    return out


def small_recipe(
    name: str = "small", network: Network = TINY, preprocess: Preprocess = SMALL_PREPROCESS
) -> ResolvedRecipe:
    """A recipe whose network is small; it is written down and never run."""
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
    "threshold_at": "auto", "threshold_fpr_1": None, "threshold_fpr_5": 0.6, "band": [0.3, 0.6],
    "before": {"nll": 0.5, "ece": 0.1}, "after": {"nll": 0.4, "ece": 0.05},
}  # fmt: skip


def train_tiny(data: Path, runs: Path, *overrides: str, **options: Any) -> Path:
    """Train a network of a few thousand weights on the tiny sets, as run `tiny`; returns `runs`.
    `options` are those of `train`.
    """

    settings = [
        'name="tiny"', 'data.train=["old"]', 'data.validate=["val"]', "preprocess.crop_size=32",
        "preprocess.resize_size=36", 'network.name="convnextv2_atto"', "network.pretrained=false",
        'network.init="fan_in"', "network.options.depths=[1,1,2,1]",
        "network.options.dims=[8,8,16,16]", "network.options.patch_size=2", "run.epochs=1",
        "loading.batch_size=16", "loading.num_workers=0", *overrides,
    ]  # fmt: skip
    recipe = recipes.load(Recipe, recipes.FOLDER / "phase1.toml", settings)
    train(recipe, data, runs, **options)
    return runs


def can_mount() -> bool:
    """Whether a test may mount a file system of its own."""
    unshare = shutil.which("unshare")
    return bool(unshare) and not subprocess.run([unshare, "-m", "true"], check=False).returncode


PHOTO = Image.fromarray(photo(1))


JPEG, PNG, WEBP = (encode(PHOTO, kind) for kind in ("JPEG", "PNG", "WEBP"))


def noise(data: bytes, count: int = 200) -> bytes:
    """Random bytes in the second half, where the pixels are."""
    rng = np.random.default_rng(0)
    changed = bytearray(data)
    for place in rng.integers(len(data) // 2, len(data) - 16, count).tolist():
        changed[place] = int(rng.integers(0, 256))
    return bytes(changed)


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 10_000)
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


KINDS = {
    "empty": b"", "one byte": b"\xff", "html": b"<html><body>404</body></html>",
    "zeros": b"\0" * 3000, "header only": JPEG[:20], "half a jpeg": JPEG[: len(JPEG) // 2],
    "nearly a whole jpeg": JPEG[: len(JPEG) * 95 // 100], "no end of image": JPEG[:-2],
    "noise in a scan": noise(JPEG), "noise in a png": noise(PNG), "half a png": PNG[:3000],
    "half a webp": WEBP[: len(WEBP) // 2], "noise in a webp": noise(WEBP),
    "lying size": JPEG.replace(struct.pack(">2H", 70, 90), struct.pack(">2H", 60_000, 60_000)),
    "bomb": bomb(), "gif": encode(PHOTO, "GIF"), "bmp": encode(PHOTO, "BMP"),
    "tiff": encode(PHOTO, "TIFF"), "avif": encode(PHOTO, "AVIF"),
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
    """The old set with the bytes of some samples overwritten inside their tars."""
    shutil.copytree(data / "old", folder / "old")
    shards = open_shards([folder / "old"])
    for sample in samples:
        offset, size = (int(shards.column(name)[sample]) for name in ("offset", "size"))
        first = {"half": size // 2, "all": 0}[cut]
        with shards.shard_path(sample).open("r+b") as stream:
            stream.seek(offset + first)
            stream.write((b"\xff\xd9" + b"\0" * size)[: size - first])  # an early end of image
    return shards


ABOUT = {
    "scores_version": 2, "checkpoint": "runs/a/step_1", "run": "a", "step": 1, "commit": "c",
    "precision": "fp32", "backend": "pil", "temperature": 2.0, "threshold": 0.6,
    "calibration": {"band": [0.3, 0.6]}, "subset": None, "reference_reals": None,
}  # fmt: skip


def table_of(rows: list[dict[str, Any]], sets: list[str], **about: Any) -> ScoreTable:
    """Rows with what a test does not care about filled in."""
    usual = {"source": "s", "generator": "g", "split": "test", "error": "", "valid": True}
    filled = []
    for number, row in enumerate(rows):
        own = {"key": f"k{number}", "origin": f"s/{number}.jpg", "group": f"s/{number}"}
        full = usual | own | {"sha256": bytes(32)} | row
        if full["valid"]:
            full["probability"] = float(probability(np.array(full["logit"]), 2.0))
        filled.append({name: full.get(name) for name in SCORES_SCHEMA.names})
    info = {name: {"index_sha256": "h", "split": "test"} for name in sets}
    table = pa.Table.from_pylist(filled, schema=SCORES_SCHEMA)
    return ScoreTable(table, ABOUT | {"sets": info} | about)


MakeImage = Callable[[np.random.Generator, int, int], tuple[str, int, int]]


OPTIONS = {
    "jpg": ("JPEG", {"quality": 90}), "png": ("PNG", {}), "webp": ("WEBP", {"quality": 80}),
}  # fmt: skip


def random_size(rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(40, 80)), int(rng.integers(40, 80))


def partly(rng: np.random.Generator, label: int, _number: int) -> tuple[str, int, int]:
    """Three of four fakes are PNG, one of four reals is."""
    return "png" if rng.random() < (0.75 if label else 0.25) else "jpg", *random_size(rng)


def write_shards(folder: Path, plan: dict[str, dict[str, tuple[MakeImage, int, int]]]) -> Path:
    """The sets of a plan, packed by the real builder; returns the folder that holds them."""
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
    """Six images of a video have one size, which no other video has; it says nothing else."""
    video = number // 6 * 2 + label
    return "jpg", 40 + int(np.random.default_rng(5).permutation(80)[video]), 44


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of every set, without the builder's own notes."""
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
    """A split archive, as `zip -s` writes it: X.z01, X.z02, ..., X.zip.

    Local headers and data run through the volumes; the directory gives volume and offset in it.
    """
    body = bytearray(b"PK\7\x08")  # the mark of a split archive
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
    """Weights, optimizer and what was written down, bit for bit."""
    one, other = checkpoint.last_of(whole), checkpoint.last_of(parts)
    assert one.name == other.name
    assert same(one, other)
    first, second = (checkpoint.load_state(folder)["optimizer"] for folder in (one, other))
    for number, moments in first["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, second["state"][number][name]), (number, name)
    assert losses_of(whole) == losses_of(parts)


@functools.cache
def imports_of(path: Path) -> tuple[str, ...]:
    """Everything a file imports, as dotted names."""
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
    """One of `color_matrices`, as `AugmentParams.color` holds it."""
    values = (np.array([value]) for value in (brightness, contrast, saturation, hue))
    return tuple(color_matrices(*values)[0].tolist())
