"""Measure the speed of reading stored features and of training a head on stored features.

    python -m benchmarks.features [--images 400000] [--width 768] [--batch-size 256] [--json FILE]

Main entry: `main()`, this click command. A feature store of random numbers is written to a
temporary folder. All work is on the CPU. It prints these figures and a few more, and writes them to
FILE as a JSON object:

- images/s of `memory`, which copies batches of random rows from one array in memory (the better of
  two rounds);
- images/s of `store`, which reads the same batches from the memory-mapped files (likewise), and the
  ratio of the two;
- seconds and images/s of one epoch that trains a linear head from the store, by the steps that
  `train.py` takes;
- seconds to read all features at once, and to fit the head to them by L-BFGS, with the iterations;
- the peak memory of the process and the bytes per image in the files.

The options:

- `--images`: number of feature vectors, more than 4,000 and at least `--batch-size`. A file has up
  to 4,000 of them, all of one class, and the fit needs both classes.
- `--width`: float16 numbers per vector.
- `--batch-size`: vectors per batch.
- `--json`: the file; without it, the figures are only printed.

`shard_set(folder, count)` returns a `ShardSet` of `count` samples below `folder`. It is only an
index in memory: nothing is written, and its tars do not exist. `write_store(store, backbone,
shards, width)` writes random features of the samples of such a set to the folder `store`, and
returns them as float16 (N, width). `backbone` (`BackboneId`) is the network whose features they are
said to be. `python -m benchmarks.embedding` measures how fast features are computed.
"""

import json
import resource
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import torch

import cli
import console
from installed import versions
from model.features.fit import fit_head, gather
from model.features.loader import FeatureLoader, FeatureSource
from model.features.store import BackboneId, View, files_of, open_table, write_file
from model.network import build
from model.recipe import Network, Optim
from model.training.optim import make_optimizer
from model.training.step import TrainState, train_step
from pipeline.loading import Loading
from pipeline.preprocess import Preprocess
from pipeline.replay import Replay
from pipeline.stream import Pool, Stream
from sharding.format import SAMPLES_SCHEMA, ShardSet

PER_SHARD = 4000
CPU = torch.device("cpu")


def shard_set(folder: Path, count: int) -> ShardSet:
    """Return a set of `count` samples from one real and one fake source; its tars do not exist."""
    shards = -(-count // PER_SHARD)
    rows = np.arange(count)
    code = (rows // PER_SHARD).astype(np.int32)
    label = (code % 2).astype(np.int8)
    columns = {}
    for entry in SAMPLES_SCHEMA:
        if pa.types.is_dictionary(entry.type):
            names = pa.array(["real", "fake"] if entry.name == "source" else [""])
            codes = pa.array(label.astype(np.int32) if entry.name == "source" else 0 * code)
            columns[entry.name] = pa.DictionaryArray.from_arrays(codes, names)
        elif pa.types.is_integer(entry.type):
            values = {"offset": 512 * (rows % PER_SHARD), "label": label}.get(entry.name, 0 * rows)
            columns[entry.name] = pa.array(values).cast(entry.type)
        else:
            columns[entry.name] = pa.nulls(count, entry.type)
    columns["shard_code"] = pa.array(code)
    sizes = np.bincount(code, minlength=shards).tolist()
    return ShardSet(
        (folder / "set",) * shards,
        tuple(f"x-train-{number:05d}.tar" for number in range(shards)),
        tuple(sizes),
        tuple(sizes),
        tuple(f"{number:064x}" for number in range(shards)),
        pa.table(columns),
        {name: {"policy": "", "replay": True} for name in ("real", "fake")},
        "0" * 64,
    )


def write_store(store: Path, backbone: BackboneId, shards: ShardSet, width: int) -> np.ndarray:
    """Write random features of every sample, with a small offset for fakes.

    Returns the features, float16 (N, width).
    """
    rng = np.random.default_rng(0)
    everything = np.empty((len(shards), width), np.float16)
    codes, offsets = shards.column("shard_code"), shards.column("offset")
    for file in files_of(store, backbone, shards, View()):
        rows = np.flatnonzero(codes == file.shard_code)
        features = rng.standard_normal((len(rows), width), np.float32)
        features += 0.05 * (file.shard_code % 2)
        everything[rows] = features
        write_file(file, offsets[rows], np.ones(len(rows), bool), everything[rows], {})
    return everything


@click.command(cls=console.Command)
@click.option("--images", type=click.IntRange(min=1), default=400_000, show_default=True)
@click.option(
    "--width", type=click.IntRange(min=1), default=768, show_default=True, help="Numbers per image."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--json", "out", type=cli.LocalPath(dir_okay=False), help="File for the figures.")
@cli.options()
def main(images: int, width: int, batch_size: int, out: Path | None) -> None:
    """Measure reading stored features against memory, and training a head on stored features."""
    network = Network(
        name="vit_tiny_patch16_224", pretrained=False, freeze_backbone=True,
        options={"embed_dim": width, "depth": 1, "num_heads": 1},
    )  # fmt: skip
    backbone = BackboneId(
        network=network.name, options={}, head="timm", blocks=(), mean=(0, 0, 0), std=(1, 1, 1),
        sha256="0" * 64, preprocess=Preprocess(), precision="fp32",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        store, shards = Path(folder), shard_set(Path(folder), images)
        console.say(f"writing {images:,} features of {width} numbers")
        held = write_store(store, backbone, shards, width)
        began = time.perf_counter()
        table = open_table(store, backbone, shards, View())
        opened = time.perf_counter() - began
        order = np.random.default_rng(1).permutation(images)
        batches = np.split(order[: images // batch_size * batch_size], images // batch_size)
        rates: dict[str, list[float]] = {"memory": [], "store": []}
        for _ in range(2):
            for name, read in (("memory", held.__getitem__), ("store", table.rows)):
                began = time.perf_counter()
                for batch in batches:
                    read(batch)
                rates[name].append(len(batches) * batch_size / (time.perf_counter() - began))
        source = FeatureSource(store=store, backbone=backbone, view=View())
        loader = FeatureLoader(shards, source, Loading(batch_size=batch_size), CPU)
        pool = Pool(shards, np.arange(images), np.empty(0, np.int64))
        stream = Stream(loader, pool, Replay(), {}, "", 0, views=0)
        net = build(network, pretrained=False)
        optim = Optim(lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        state = TrainState(
            net, make_optimizer(net.backbone, optim, fused=False), scaler, CPU, torch.float32
        )
        del held
        began, losses = time.perf_counter(), []
        for batch in stream.batches(0, 1):
            losses.append(train_step(state, net, batch, optim))
        epoch_s = time.perf_counter() - began
        began = time.perf_counter()
        samples = gather(stream, 1)
        gathered = time.perf_counter()
        fit = fit_head(net, samples, Optim(lr=1e-3, weight_decay=4e-3))
        fit_s = time.perf_counter() - gathered
        stored = sum(path.stat().st_size for path in store.rglob("*.arrow"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {
        "images": images, "width": width, "bytes_per_image": stored / images, "open_s": opened,
        "memory_images_per_s": max(rates["memory"]), "store_images_per_s": max(rates["store"]),
        "store_over_memory": max(rates["store"]) / max(rates["memory"]),
        "head_epoch_s": epoch_s, "head_images_per_s": len(losses) * batch_size / epoch_s,
        "gather_s": gathered - began, "fit_s": fit_s, "fit_iterations": fit.iterations,
        "fit_loss": fit.loss,
        "first_loss": float(losses[0]), "last_loss": float(losses[-1]), "peak_bytes": peak,
        "versions": versions(),
    }  # fmt: skip
    for name, value in figures.items():
        if isinstance(value, int | float):
            console.say(f"{name}: {value:,.4g}" if value < 100 else f"{name}: {value:,.0f}")
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
