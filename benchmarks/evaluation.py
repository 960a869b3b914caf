"""Measure what evaluation adds to the network's time, and what a report on many scores takes.

    python -m benchmarks.evaluation [--images N] [--scores N] [--network NAME] [--json FILE]
    python -m benchmarks.evaluation --detector [--images N] [--network NAME] [--json FILE]

Main entry: `main()`, this click command.

- `--images`: how many small JPEGs are made and scored (default 10000). 0: only the report (an error
  with `--detector`).
- `--scores`: how many random scores the report is written on (default 400000, at least 50).
- `--network`: a network of timm (default `mobilenetv2_100`), with random weights, which does not
  change the speed.
- `--detector`: measure only how much longer `evaluate.py --detector` takes for a third-party
  detector than a direct call of this detector (`costs()` of `benchmarks.adapters`), on the JPEGs. A
  table is printed, with a row for each kind of detector: a Python file, a timm model, and a model
  of transformers (if installed).
- `--json`: a file for the figures (default: none). It gets {"report": the dict of
  `cost_of_report()`, "scoring": the dict of `cost_of_scoring()`, or null if `--images` is 0}. With
  `--detector` it gets the dict of `costs()`: kind (`file`, `timm`, `hf`) -> the times `by_hand`
  (direct calls) and `adapter`, their `ratio`, and more.

Without `--detector`, a line on the report and a table of the scoring are printed, whether there is
a `--json` or not.

Both functions take an empty folder that exists (`folder`, a Path), write their files there, and
return a dict. A time is given as `seconds` and as CPU seconds (`processor_s`, of this process and
its ended workers), which are less affected by other programs.

- `cost_of_report(count, folder)` writes a report on `count` random scores of 15 sources and 40
  generators. A fifth of the scores belong to groups of related images. Besides the time it returns
  the peak memory of this process in GB, `peak_gb`, and before the report, `peak_before_gb`.
- `cost_of_scoring(count, network, folder)` evaluates `count` JPEGs on the CPU, from opening the
  shards to the report (`evaluation`). Before and after that it runs the network alone on as many
  images, rounded up to batches of 32: one batch in memory, again and again (`network`, a list of
  two times). `ratio_seconds` and `ratio_processor_s` are the evaluation's time divided by the mean
  of the network's.
"""

import json
import resource
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import torch
from PIL import Image

import cli
import console
import recipes
from benchmarks import adapters
from benchmarks.adapters import spent
from model import checkpoint
from model.backbones.resolve import resolved
from model.device import keep_freed_memory
from model.evaluation import report
from model.evaluation.plan import Options
from model.evaluation.run import evaluate
from model.evaluation.scores import SCORES_SCHEMA, read_scores, write_scores
from model.network import build as build_network
from model.recipe import Recipe
from model.score import AT_A_TIME, logits_of
from model.verdict import probability
from report.files import write_report
from sharding.build import build
from sharding.catalog import read_catalog

CATALOG = """
[sets]
small = "test"
[sources.small]
license = "synthetic"
set = "small"
real = ["real"]
fake = ["fake"]
"""

ABOUT = {
    "checkpoint": "-", "run": "random", "step": 0, "commit": "", "precision": "fp32",
    "backend": "pil", "temperature": 1.0, "threshold": 0.5, "calibration": None, "subset": None,
    "sets": {"many": {"index_sha256": "", "split": "test", "reference_reals": None}},
}  # fmt: skip


def made_up(count: int) -> pa.Table:
    """Return random scores of `count` images: half are fakes, a fifth are in groups of up to 20."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, count)
    logits = ((2 * labels - 1) * 1.5 + rng.normal(0, 1.5, count)).astype(np.float32)
    group = np.where(rng.random(count) < 0.2, rng.integers(0, count // 50, count), np.arange(count))
    generator = np.where(labels == 1, rng.integers(0, 40, count), 40)
    columns = {
        "set": ["many"] * count,
        "key": [f"k{i}" for i in range(count)],
        "sha256": [bytes(32)] * count,
        "source": [f"source {i}" for i in rng.integers(0, 15, count)],
        "generator": [f"generator {i}" for i in generator],
        "split": ["test"] * count,
        "group": [f"s/{i}" for i in group],
        "origin": [f"s/{g}/image_{i}.jpg" for i, g in enumerate(group)],
        "label": labels,
        "logit": logits,
        "probability": probability(logits),
        "valid": [True] * count,
        "error": [""] * count,
    }
    arrays = [pa.array(columns[field.name], field.type) for field in SCORES_SCHEMA]
    return pa.table(arrays, schema=SCORES_SCHEMA)


def cost_of_report(count: int, folder: Path) -> dict[str, float]:
    """Time the report of `count` scores, from reading the scores to writing all tables.

    Peak memory is in GB.
    """
    scores = folder / "scores.parquet"
    write_scores(scores, [made_up(count)], ABOUT)

    def work() -> None:
        write_report(report.report(read_scores(scores)), scores, folder / "none", folder)

    memory = resource.getrusage(resource.RUSAGE_SELF)
    return spent(work) | {
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "peak_before_gb": memory.ru_maxrss / 1e6,
    }


def pack(count: int, folder: Path) -> Path:
    """Pack `count` JPEGs of 200 x 150 pixels as the set `small`; returns the folder of sets."""
    for number in range(count):
        rng = np.random.default_rng([11, number])
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((200, 150), Image.Resampling.BICUBIC), np.float32)
        pixels = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        path = folder / "raw" / "small" / ("real", "fake")[number % 2] / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)
    (folder / "catalog.toml").write_text(CATALOG, encoding="utf-8")
    build(read_catalog([folder / "catalog.toml"]), folder / "raw", folder / "shards", jobs=2)
    return folder / "shards"


def cost_of_scoring(count: int, network: str, folder: Path) -> dict[str, Any]:
    """Time an evaluation of `count` images, and before and after it the network alone."""
    overrides = [f'network.name="{network}"', "network.pretrained=false"]
    # The small recipe has options that only MobileNetV2 accepts.
    name = "small-phase1.toml" if network.startswith("mobilenetv2") else "phase1.toml"
    recipe = resolved(recipes.load(Recipe, recipes.FOLDER / name, overrides))
    net = build_network(recipe.network, pretrained=False).eval()
    saved = folder / "runs" / "random" / "step_0000000"
    checkpoint.save(
        saved,
        net,
        recipe=recipe,
        state=None,
        record=checkpoint.Record(step=0, epoch=0.0, metrics={}, selection=0.0, data={}),
    )
    shards = pack(count, folder)
    cpu = torch.device("cpu")
    keep_freed_memory(cpu)
    shape = recipe.preprocess.shape
    images = torch.randint(0, 256, (AT_A_TIME, 3, *shape), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)

    def network_alone() -> None:
        for _ in range(-(-count // AT_A_TIME)):
            logits_of(net, images, cpu, torch.float32)

    def whole() -> None:
        out = folder / "out"
        report = evaluate(saved, shards, ["small"], out, options=Options(device="cpu"))
        write_report(report, out / "scores.parquet", shards, out)

    logits_of(net, images, cpu, torch.float32)
    first, evaluated, second = spent(network_alone), spent(whole), spent(network_alone)
    alone = {name: (first[name] + second[name]) / 2 for name in first}
    ratio = {f"ratio_{name}": evaluated[name] / alone[name] for name in evaluated}
    return {"network": [first, second], "evaluation": evaluated} | ratio


@click.command(cls=console.Command)
@click.option(
    "--images",
    type=click.IntRange(min=0),
    default=10_000,
    show_default=True,
    help="Small images to score.",
)
@click.option(
    "--scores",
    type=click.IntRange(min=50),
    default=400_000,
    show_default=True,
    help="Scores to report on.",
)
@click.option("--network", default="mobilenetv2_100", show_default=True, help="timm name.")
@click.option("--detector", is_flag=True, help="Measure only adapters against direct calls.")
@click.option("--json", "out", type=cli.LocalPath(dir_okay=False), help="File for the figures.")
@cli.options()
def main(images: int, scores: int, network: str, detector: bool, out: Path | None) -> None:
    """Measure what evaluation adds to the network's time."""
    if detector:
        with tempfile.TemporaryDirectory() as name:
            figures = adapters.costs(pack(images, Path(name)), Path(name), network)
        adapters.print_costs(figures, images)
        if out:
            out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as name:
        report = cost_of_report(scores, Path(name))
        console.say(
            f"report on {scores:,} scores: {report['seconds']:.1f} s, {report['processor_s']:.1f} "
            f"processor seconds, at most {report['peak_gb']:.2f} GB "
            f"({report['peak_before_gb']:.2f} GB before)"
        )
        scoring = cost_of_scoring(images, network, Path(name)) if images else None
    if scoring:
        rows = [
            [what, one["seconds"], one["processor_s"]]
            for what, one in (
                ("network alone, before", scoring["network"][0]),
                ("evaluation", scoring["evaluation"]),
                ("network alone, after", scoring["network"][1]),
                ("ratio", {n: scoring[f"ratio_{n}"] for n in ("seconds", "processor_s")}),
            )
        ]
        title = f"scoring {images:,} small images with {network}"
        console.table(title, ["", "seconds", "processor seconds"], rows)
    if out:
        figures = {"report": report, "scoring": scoring}
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
