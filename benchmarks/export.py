"""Compare the speed of ONNX Runtime under several settings with PyTorch, on this CPU.

    python -m benchmarks.export [--network NAME] [--batch 8] [--rounds 5] [--json FILE]

NAME is a network of timm (default `convnextv2_base`). It is exported with random weights, and each
way (PyTorch, and ONNX Runtime with several settings) scores the same batch of noise in every round,
in turn (A B C A B C ...). The command prints a table with a row per way: images per second of the
best round, CPU seconds per image of the median round (less affected by other programs), and the
largest difference between a probability and the one that PyTorch computes in fp32. FILE gets the
differences and the seconds of all rounds. All ways are in memory at once (ConvNeXtV2-Base: 6 GB).

Main entry: `ways_of(name, folder)`.

- `name`: the timm name of a network that takes images of 256 x 256 pixels.
- `folder`: an empty folder (Path). It gets the checkpoint `step_0000000/` and, in `onnx/`, the
  files of `export_onnx()` (ONNX in fp32, fp16 and int8, and `parity.json`).

It returns a dict from the name of a way (the first is "PyTorch") to its scoring function. Such a
function takes RGB images, a NumPy array uint8 (N, 256, 256, 3), and returns the probability that
each is fake, a float array (N,). The packages of the extra `export` are needed; without ONNX
Runtime, importing this module fails.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import torch

import cli
import console
from model import checkpoint
from model.export import onnx as export
from model.export.import_original import recipe_of
from model.inference.onnx_detector import load_onnx
from model.inference.prediction import threads
from model.network import build, load_weights
from model.recipe import Network

Score = Callable[[np.ndarray], np.ndarray]

COLUMNS = ("way", "images/s", "processor s", "max |dp|")


def measured(score: Score, images: np.ndarray) -> tuple[float, float]:
    """Return the wall-clock and CPU seconds of scoring one batch."""
    started, used = time.perf_counter(), time.process_time()
    score(images)
    return time.perf_counter() - started, time.process_time() - used


def by_onnx(file: Path, **settings: Any) -> Score:
    """Return the scoring function of an ONNX Runtime session with some settings changed.

    `settings` are `threads`, `level` (of graph optimization) and `spinning`.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.get("threads", threads())
    options.graph_optimization_level = settings.get(
        "level", onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    )
    if not settings.get("spinning", True):
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probability"], {"images": images})[0]


def by_torch(net: torch.nn.Module) -> Score:
    """Return the scoring function of the network in PyTorch, channels_last as in evaluation."""

    def score(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            real, fake = net(torch.from_numpy(images).permute(0, 3, 1, 2)).unbind(1)
        return torch.sigmoid(fake - real).numpy()

    return score


def ways_of(name: str, folder: Path) -> dict[str, Score]:
    """Export a network with random weights to `folder`; returns the scoring functions by name."""
    torch.manual_seed(0)
    network = Network(name=name, pretrained=False, init="fan_in")
    recipe = replace(recipe_of("bench"), network=network)
    net = build(recipe.network, pretrained=False)
    checkpoint.save(
        folder / "step_0000000",
        net,
        recipe=recipe,
        state=None,
        record=checkpoint.Record(
            step=0, epoch=0, metrics={}, selection=None, data={"train": [], "replay": []}
        ),
    )
    load_weights(net, checkpoint.read_weights(folder / "step_0000000"), name)
    export.export_onnx(folder / "step_0000000", folder / "onnx")
    fp32, fp16, int8 = (folder / "onnx" / export.FILES[kind] for kind in ("fp32", "fp16", "int8"))
    basic = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return {
        "PyTorch": by_torch(net.eval()),
        "ONNX, as predict.py --onnx": load_onnx(fp32, device="cpu").score,
        "ONNX, no spinning": by_onnx(fp32, spinning=False),
        "ONNX, basic optimization": by_onnx(fp32, level=basic),
        "ONNX, one thread": by_onnx(fp32, threads=1),
        "ONNX, fp16": by_onnx(fp16),
        "ONNX, int8": by_onnx(int8),
    }


@click.command(cls=console.Command)
@click.option("--network", default="convnextv2_base", show_default=True, help="timm name.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Images.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds of all ways."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
@cli.options()
def main(network: str, batch: int, rounds: int, json_file: Path | None) -> None:
    """Measure PyTorch and ONNX Runtime on this CPU."""
    torch.set_num_threads(threads())
    images = np.random.default_rng(0).integers(0, 256, (batch, 256, 256, 3), np.uint8)
    with tempfile.TemporaryDirectory() as name:
        ways = ways_of(network, Path(name))
        expected = ways["PyTorch"](images)
        apart = {way: float(np.abs(score(images) - expected).max()) for way, score in ways.items()}
        seconds_of: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, score in ways.items():
                seconds_of[way].append(measured(score, images))
    rows = []
    for way, seconds in seconds_of.items():
        best = batch / min(wall for wall, _ in seconds)
        used = statistics.median(used for _, used in seconds) / batch
        rows.append([way, best, f"{used:.3f}", f"{apart[way]:.1e}"])
    title = f"{network}, batch {batch}, {threads()} threads, load {os.getloadavg()[0]:.1f}"
    console.table(title, COLUMNS, rows)
    if json_file:
        json_file.write_text(json.dumps({"apart": apart, "seconds": seconds_of}, indent=1) + "\n")


if __name__ == "__main__":
    main()
