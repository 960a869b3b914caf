"""Loader throughput: both backends against the usual torchvision loader, on one set of images.

    python -m benchmarks.loader [--images N] [--repeats N] [--json FILE]

Prints images/s and the ratio to the torchvision loader of the same run. The images are synthetic,
500 x 375, JPEG quality 96 (ImageNet's size and usual quality), under the law of phase 1. The limit
is bare decoding in as many processes; no loader can be faster than that on a CPU.
"""

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import console
import recipes
from benchmarks.images import write_images
from model.device import choose_device
from pipeline import Loading, Replay, Stream, open_loader, open_pool
from sharding.build import build
from sharding.catalog import read_catalog
from sharding.format import decode_image
from train import Recipe

CATALOG = """
[sets]
bench = "train"
[sources.bench]
licence = "synthetic"
set = "bench"
real = ["real"]
fake = ["fake"]
"""

RECIPE = recipes.load(Recipe, recipes.FOLDER / "phase1.toml")


class Reencode:
    """The JPEG step as a torchvision user writes it."""

    def __call__(self, image: Image.Image) -> Image.Image:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=int(torch.randint(80, 96, ())))
        return Image.open(stream).convert("RGB")


class Resample:
    """Down and back up, likewise."""

    def __call__(self, image: Image.Image) -> Image.Image:
        side = int(256 * (0.8 + 0.15 * torch.rand(()).item()))
        bilinear = Image.Resampling.BILINEAR
        return image.resize((side, side), bilinear).resize((256, 256), bilinear)


def torchvision_law() -> transforms.Compose:
    """The law of phase 1 in torchvision's own transforms: what the original trains through."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(256, scale=(0.6, 1.0), ratio=(0.85, 1.15)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.06, 0.06, 0.06, 0.02)], p=0.3),
            transforms.RandomApply([Resample()], p=0.3),
            transforms.RandomApply([Reencode()], p=0.3),
            transforms.RandomApply([transforms.GaussianBlur(3, (0.1, 0.5))], p=0.2),
            transforms.RandomGrayscale(p=0.03),
            transforms.ToTensor(),
            transforms.Normalize(RECIPE.network.mean, RECIPE.network.std),
        ]
    )


def torchvision_images(folder: Path, workers: int) -> Iterable[int]:
    """Images per batch of ImageFolder and DataLoader."""
    dataset = datasets.ImageFolder(str(folder), torchvision_law())
    loader = DataLoader(dataset, 30, shuffle=True, num_workers=workers, drop_last=True)
    return (len(images) for images, _ in loader)


def our_images(data: Path, backend: str, workers: int) -> Iterable[int]:
    """Images per batch of this project's loader."""
    pool = open_pool(data, ["bench"], Replay())
    loading = Loading(batch_size=30, backend=backend, workers=workers)
    device = choose_device("auto")
    loader = open_loader(pool.shards, view=RECIPE.view, loading=loading, device=device)
    stream = Stream(loader, pool, Replay(), RECIPE.augment, "train", 1)
    return (len(batch) for batch in stream.batches(0, 1))


def decode_all(paths: list[Path]) -> int:
    """Bare decoding in one process."""
    return sum(decode_image(path.read_bytes(), "JPEG").shape[0] > 0 for path in paths)


def bare_decode(paths: list[Path], pool: ProcessPoolExecutor, workers: int) -> Iterable[int]:
    """The limit: the same bytes to pixels and nothing else."""
    return pool.map(decode_all, [paths[start::workers] for start in range(workers)])


def rate(images: Callable[[], Iterable[int]], repeats: int) -> list[float]:
    """Images/s of each repeat, first one dropped: it warms caches and starts processes."""
    rates = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        count = sum(images())
        rates.append(count / (time.perf_counter() - started))
    return rates[1:]


@click.command()
@click.option("--images", default=900, show_default=True, help="Images to load.")
@click.option("--repeats", default=3, show_default=True, help="Counted repeats of each loader.")
@click.option("--workers", default=2, show_default=True, help="Processes or threads.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here too.")
def main(images: int, repeats: int, workers: int, out: Path | None) -> None:
    """Measure the loaders one after another, and print one table."""
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(workers) as pool:
        folder = Path(name)
        paths = write_images(folder / "raw" / "bench", images)
        (folder / "catalog.toml").write_text(CATALOG)
        catalog = read_catalog([folder / "catalog.toml"])
        build(catalog, folder / "raw", folder / "shards", jobs=workers, max_bad=0)
        loaders = {
            "torchvision ImageFolder": lambda: torchvision_images(folder / "raw/bench", workers),
            "ours, pil": lambda: our_images(folder / "shards", "pil", workers),
            "ours, dali": lambda: our_images(folder / "shards", "dali", workers),
            "bare decode (limit)": lambda: bare_decode(paths, pool, workers),
        }
        rates = {name: rate(loader, repeats) for name, loader in loaders.items()}
    base = statistics.median(rates["torchvision ImageFolder"])
    rows = [
        [
            name,
            *(round(f(r)) for f in (min, statistics.median, max)),
            f"{statistics.median(r) / base:.2f}",
        ]
        for name, r in rates.items()
    ]
    title = f"{images} JPEGs of 500 x 375, phase 1 law, {workers} workers, {choose_device('auto')}"
    console.table(title, ["loader", "images/s min", "median", "max", "ratio"], rows)
    if out:
        out.write_text(json.dumps({"title": title, "images_per_s": rates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
