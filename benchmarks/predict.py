"""Measure what `predict.py` adds to the network's time: reading, decoding, provenance and writing.

    python -m benchmarks.predict [--checkpoint NAME] [--originals FOLDER] [--images 200]
        [--rounds 3] [--json FILE]

Main entry: `measure(detector, folder, images, batch_size, rounds)`.

- `detector`: an `ImageDetector`, such as `model.load_detector(run_folder)` returns.
- `folder`: a folder (Path) of JPEG files, also in subfolders. The JSON lines of `predict.py` are
  written next to it, to a file with the folder's name and the suffix `.jsonl`, which is replaced.
  The folder's name must have no dot.
- `images`: how many JPEG files `folder` has. All are scored.
- `batch_size`: images per batch.
- `rounds`: how often each way runs.

Two ways run in turn (A B A B ...) on the same number of images. `bare()` runs the network alone on
a batch in memory. `whole()` runs the loop of `predict.py` over the files and writes the JSON lines;
its time includes the small batches with which `predict.py` begins, but not the loading of the
checkpoint. `measure()` returns a dict with a list for each way (`bare`, `predict`): for each round
a dict with the `seconds` and CPU seconds (`cpu`) per image.

The command makes the JPEGs (synthetic, or variants of those in FOLDER) and networks with random
weights, which are as fast as trained ones. It prints a table with a row per network: images/s and
CPU milliseconds per image of both ways, and two ratios: the time per image of the network alone
divided by that of `predict.py`, once in elapsed time and once in CPU time. A ratio below 1 means
that `predict.py` needs more. `--network` (may be repeated) chooses the networks (`convnextv2_base`
or `mobilenetv2_100`; default: both). NAME is a trained detector, which is measured instead: a
checkpoint folder, a run's folder, or the name of one that ships, such as `clip`. `--device`,
`--backend` and `--batch-size` are as in `predict.py`. FILE gets the figures of all rounds as JSON.

Compare ratios, not the speeds of different runs. While other programs use the CPU, the ratio of CPU
times is more reliable than the other one. On an idle machine without a GPU the two are about equal,
because both ways use all cores.
"""

import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import cli
import console
from benchmarks.images import write_copies, write_images
from model import load_detector
from model.checkpoint import Record, save
from model.export.import_original import recipe_of
from model.inference import inputs, results
from model.inference.detector import ImageDetector
from model.inference.run import PredictionRun
from model.network import build
from model.recipe import Network
from model.score import evaluating, logits_of

NETWORKS = {
    "convnextv2_base": "convnextv2_base.fcmae_ft_in1k",
    "mobilenetv2_100": "mobilenetv2_100",
}


def write_checkpoint(folder: Path, name: str) -> Path:
    """Save a run with one checkpoint of random weights; returns its folder."""
    network = Network(name=NETWORKS[name], pretrained=False)
    save(
        folder / name / "step_0000000",
        build(network, pretrained=False),
        recipe=replace(recipe_of(name), network=network),
        state=None,
        record=Record(step=0, epoch=0, metrics={}, selection=None, data={}),
    )
    return folder / name


def bare(detector: ImageDetector, images: int, batch_size: int) -> None:
    """Run the network alone on one batch, repeated until `images` images are done, in the precision
    of `predict.py`: bf16 on most GPUs.
    """
    pixels = np.random.default_rng(0).integers(
        0, 256, (batch_size, *detector.preprocess.shape, 3), np.uint8
    )
    batch = torch.from_numpy(pixels).to(detector.device).permute(0, 3, 1, 2)
    with evaluating(detector.net):
        for start in range(0, images, batch_size):
            logits_of(detector.net, batch[: images - start], detector.device, detector.dtype).cpu()


def whole(detector: ImageDetector, folder: Path, batch_size: int, out: Path) -> None:
    """Run `predict.py FOLDER --out OUT` with a detector that is loaded already."""
    out.unlink(missing_ok=True)
    file = results.open_results(out, "jsonl", detector.identity, resume=False)
    with contextlib.closing(file):
        run = PredictionRun(detector, "jsonl", file)
        for _ in run.over(inputs.find_images([str(folder)], Counter()), batch_size):
            pass
        file.finish()


def timed(work: Callable[[], Any], images: int) -> dict[str, float]:
    """Return the wall-clock seconds and CPU seconds per image."""
    began, cpu = time.perf_counter(), time.process_time()
    work()
    passed, spent = time.perf_counter() - began, time.process_time() - cpu
    return {"seconds": passed / images, "cpu": spent / images}


def measure(
    detector: ImageDetector, folder: Path, images: int, batch_size: int, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Time all rounds of both ways, after a warm-up."""
    out = folder.with_suffix(".jsonl")
    bare(detector, batch_size, batch_size)
    runs: dict[str, list[dict[str, float]]] = {"bare": [], "predict": []}
    for _ in range(rounds):
        runs["bare"].append(timed(lambda: bare(detector, images, batch_size), images))
        runs["predict"].append(timed(lambda: whole(detector, folder, batch_size, out), images))
    return runs


def row_of(name: str, runs: dict[str, list[dict[str, float]]]) -> list[object]:
    """Return a line of the table: medians over the rounds."""
    middle = {
        (way, what): statistics.median(one[what] for one in runs[way])
        for way in runs
        for what in ("seconds", "cpu")
    }
    return [
        name,
        *(f"{1 / middle[way, 'seconds']:,.1f}" for way in runs),
        f"{middle['bare', 'seconds'] / middle['predict', 'seconds']:.2f}",
        *(f"{1000 * middle[way, 'cpu']:,.1f}" for way in runs),
        f"{middle['bare', 'cpu'] / middle['predict', 'cpu']:.2f}",
    ]


@click.command(cls=console.Command)
@click.option(
    "--images", type=click.IntRange(min=1), default=200, show_default=True, help="Images per round."
)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds of each way."
)
@click.option(
    "--originals",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Real JPEGs, with copies at other qualities. Default: synthetic ones.",
)
@click.option(
    "--network",
    "names",
    multiple=True,
    type=click.Choice(list(NETWORKS)),
    help="Measure only this.",
)
@click.option(
    "--checkpoint",
    type=cli.LocalPath(),
    help="Measure only this: a checkpoint folder, run folder, or name of a shipped detector.",
)
@click.option("--json", "out", type=cli.LocalPath(dir_okay=False), help="File for the figures.")
@cli.options("device", "backend", "batch_size")
def main(
    images: int,
    rounds: int,
    originals: Path | None,
    names: tuple[str, ...],
    checkpoint: Path | None,
    out: Path | None,
    device: str,
    backend: str,
    batch_size: int,
) -> None:
    """Measure both ways in turn, and print one table."""
    cli.refuse_conflicts({"checkpoint": ["names"]})
    figures_of = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        if originals:
            paths = write_copies(folder, originals, images)
        else:
            paths = write_images(folder, images)
        size = sum(path.stat().st_size for path in paths) / len(paths) / 1000
        for name in [str(checkpoint)] if checkpoint else names or NETWORKS:
            run = checkpoint or write_checkpoint(Path(place), name)
            detector = load_detector(run, device=device, backend=backend)
            figures_of[name] = measure(detector, folder, images, batch_size, rounds)
            console.log.info("%s: %s", name, row_of(name, figures_of[name]))
    title = (
        f"{images:,} JPEGs of {size:.0f} kB, batch {batch_size}, {rounds} rounds, "
        f"{os.cpu_count()} cores, torch {torch.__version__}"
    )
    columns = [
        "network", "bare images/s", "predict images/s", "ratio", "bare CPU ms", "predict CPU ms",
        "CPU ratio",
    ]  # fmt: skip
    console.table(title, columns, [row_of(name, runs) for name, runs in figures_of.items()])
    if out:
        figures = {"title": title, "python": platform.python_version(), "runs": figures_of}
        out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
