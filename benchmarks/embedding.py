"""Measure how fast `python -m model embed` computes features, compared with the network alone.

    python -m benchmarks.embedding --shards SET [--recipe FILE] [--seconds S] [--rounds N]

Main entry: `main()`, this click command. These speeds are measured in each round, and printed in
images/s. The last printed lines are the ratios of the medians of the `embed` rows to `network`.

- `network` computes the features of one batch that stays on the device, again and again.
- `loader, view N` reads, decodes and crops (view 0) or augments (view 1 and so on) the images of a
  set, and computes nothing.
- `embed, view N` is `model.features.embed.embed()` on the set: it does the same, computes the
  features and writes them to a temporary folder. The first batch is not measured in either.

Precision and torch.compile are those of the recipe (`run.precision`, `run.compile`). The views are
view 0 and, if the recipe has augmented views, view 1.

- `--shards`: the folder of a packed set.
- `--recipe`: a recipe file with a frozen backbone and the table `[features]` (default
  `recipes/clip-all.toml`). The weights are random here, which does not change the speed.
- `--set KEY=VALUE`: changes the recipe; may be repeated.
- `--seconds`: how long `network` runs in a round (default 8). `--rounds`: default 2.
- `--device`: `auto` (default: a GPU if there is one), `cpu`, `cuda` or `cuda:N`.
- `--json`: a file for the speeds of all rounds, written after each round.

`measure(embedder, shards, source, seconds, views)` measures one round and returns a dict of rows in
images/s. It takes an `Embedder` of `model.features.embed`, the set (`open_shards([folder])`), the
`FeatureSource` that `model.features.loader.source_of()` makes (backbone, preprocessing and
augmentation), the seconds for `network`, and the numbers of the views. click.ClickException is
raised if the set has only one batch (one forward pass).
"""

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import cli
import console
import recipes
from installed import versions
from model.backbones.resolve import resolved
from model.device import (
    choose_compile,
    choose_device,
    choose_precision,
    describe,
    keep_freed_memory,
)
from model.features.embed import AT_A_TIME_ON_GPU, Embedder, embed
from model.features.loader import FeatureSource, source_of
from model.features.store import missing_of
from model.network import build
from model.recipe import Recipe
from model.score import AT_A_TIME, autocast, evaluating
from pipeline.loader import open_loader
from pipeline.order import evaluation_epoch
from pipeline.params import view_params
from sharding.format import ShardSet, open_shards

WARM_UP = 2
"""Forward passes of `network` before the clock starts."""


def network_alone(embedder: Embedder, shape: tuple[int, int], seconds: float) -> float:
    """Measure images/s of the features of one batch of images of `shape` on the device. Its layout
    is that of `embed()`, on which the speed of a convolution depends.
    """
    count = AT_A_TIME_ON_GPU if embedder.device.type == "cuda" else AT_A_TIME
    images = torch.randint(0, 256, (count, 3, *shape), dtype=torch.uint8)
    images = images.to(embedder.device).contiguous(memory_format=torch.channels_last)
    done = -WARM_UP
    began = time.perf_counter()
    with evaluating(embedder.net), torch.inference_mode():
        while done < 1 or time.perf_counter() - began < seconds:
            if done == 0:
                began = time.perf_counter()
            with autocast(embedder.device, embedder.dtype):
                embedder.features(images).to(torch.float16).cpu()
            done += 1
    return done * count / (time.perf_counter() - began)


def whole(embedder: Embedder, shards: ShardSet, source: FeatureSource, number: int = 0) -> float:
    """Measure images/s of `embed()` for a view of a set, from its first batch to its last."""
    moments: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = missing_of(Path(folder), source.backbone, shards, source.numbered(number))
        embed(
            embedder, shards, replace(source, store=Path(folder)), number, files,
            lambda count: moments.append((time.perf_counter(), count)),
        )  # fmt: skip
    return _speed(moments, shards)


def loading_alone(
    embedder: Embedder, shards: ShardSet, source: FeatureSource, number: int
) -> float:
    """Measure images/s of the loader that `embed()` reads, for a view of a set."""
    view, preprocess = source.numbered(number), source.backbone.preprocess
    params_for = view_params(shards, view.augment or {}, view.policy, preprocess, view.seed, number)
    moments: list[tuple[float, int]] = []
    with contextlib.closing(
        open_loader(shards, preprocess=preprocess, loading=embedder.loading, device=embedder.device)
    ) as loader:
        epoch = evaluation_epoch(np.arange(len(shards)), loader.global_batch)
        for batch in loader.batches(epoch, params_for):
            batch.valid.cpu()  # waits for the batch on a GPU
            moments.append((time.perf_counter(), len(batch)))
    return _speed(moments, shards)


def _speed(moments: Sequence[tuple[float, int]], shards: ShardSet) -> float:
    """Return images/s from (time in seconds, images) of each batch, without the first batch."""
    (first, _), (last, _) = moments[0], moments[-1]
    if len(moments) < 2:
        raise click.ClickException(
            f"the set has {len(shards)} images, which is one batch; a speed needs two or more"
        )
    return sum(count for _, count in moments[1:]) / (last - first)


def measure(
    embedder: Embedder,
    shards: ShardSet,
    source: FeatureSource,
    seconds: float,
    views: Sequence[int],
) -> dict[str, float]:
    """Measure all rows once, in images/s."""
    rows = {"network": network_alone(embedder, source.backbone.preprocess.shape, seconds)}
    for number in views:
        rows[f"loader, view {number}"] = loading_alone(embedder, shards, source, number)
        rows[f"embed, view {number}"] = whole(embedder, shards, source, number)
    return rows


@click.command(cls=console.Command)
@cli.options("device")
@click.option(
    "--shards", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True,
    help="A packed set.",
)  # fmt: skip
@click.option(
    "--recipe", "recipe_path", type=click.Path(path_type=Path, exists=True),
    default=recipes.FOLDER / "clip-all.toml", help="Recipe with a frozen backbone.",
)  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the recipe.")
@click.option("--seconds", default=8.0, show_default=True, help="Seconds of `network` in a round.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Rounds of both rows.",
)
@click.option("--json", "out", type=cli.LocalPath(dir_okay=False), help="File for the figures.")
def main(
    device: str,
    shards: Path,
    recipe_path: Path,
    overrides: tuple[str, ...],
    seconds: float,
    rounds: int,
    out: Path | None,
) -> None:
    """Measure the computation of features from a packed set, against the network alone."""
    place = choose_device(device)
    keep_freed_memory(place)
    recipe = resolved(recipes.load(Recipe, recipe_path, overrides))
    if recipe.features is None:
        raise click.UsageError(
            f"{recipe_path} has no table [features]; give a recipe such as recipes/clip-all.toml"
        )
    dtype, _ = choose_precision(recipe.run.precision, place)
    compiled, compiled_reason = choose_compile(recipe.run.compile, place)
    net = build(recipe.network, pretrained=False).to(place)
    embedder = Embedder(
        net=net, device=place, dtype=dtype, loading=recipe.loading, compiled=compiled
    )
    shard_set, source = open_shards([shards]), source_of(recipe, net, dtype)
    rows: dict[str, list[float]] = {}
    about = {
        "network": recipe.network.name, "head": recipe.network.head,
        "blocks": recipe.network.blocks, "crops": net.crops, "size": recipe.preprocess.crop_size,
        "precision": describe(dtype), "compiled": f"{compiled} ({compiled_reason})",
        "images": len(shard_set), "loading": asdict(recipe.loading), "versions": versions(),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU",
    }  # fmt: skip
    views = (0, 1) if recipe.features.views else (0,)
    for _ in range(rounds):
        for name, speed in measure(embedder, shard_set, source, seconds, views).items():
            rows.setdefault(name, []).append(speed)
            console.say(f"{name}: {speed:,.1f} images/s")
        if out:
            out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", "utf-8")
    middle: dict[str, Any] = {name: statistics.median(speeds) for name, speeds in rows.items()}
    for number in views:
        ratio = middle[f"embed, view {number}"] / middle["network"]
        console.say(f"embed, view {number} / network: {ratio:.3f}")


if __name__ == "__main__":
    main()
