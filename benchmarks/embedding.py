"""Measure how fast `python -m model embed` computes features, compared with the network alone.

    python -m benchmarks.embedding --shards SET [--recipe FILE] [--seconds S] [--rounds N]

Main entry: `main()`, this click command. Two speeds are measured in each round, and printed in
images/s; the last printed line is the ratio of their medians, `embed` / `network`. `network`
computes the features of one batch that stays on the device. `embed` is
`model.features.embed.embed()` on a set: it reads, decodes and crops the images, computes their
features and writes them to a temporary folder. Its first batch is not measured.

- `--shards`: the folder of a packed set.
- `--recipe`: a recipe file with a frozen backbone and the table `[features]` (default
  `recipes/clip-all.toml`). The weights are random here, which does not change the speed.
- `--set KEY=VALUE`: changes the recipe; may be repeated.
- `--seconds`: how long `network` runs in a round (default 8). `--rounds`: default 2.
- `--device`: `auto` (default: a GPU if there is one), `cpu`, `cuda` or `cuda:N`.
- `--json`: a file for the speeds of all rounds, written after each round.

`measure(embedder, shards, source, seconds)` measures one round and returns the dict of `network`
and `embed` in images/s. It takes an `Embedder(net=..., device=..., dtype=..., loading=...)` of
`model.features.embed`, the set (`open_shards([folder])`), the `FeatureSource` that
`model.features.loader.source_of()` makes (backbone and preprocessing), and the seconds.
click.ClickException is raised if the set has only one batch (one forward pass).
"""

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

import cli
import console
import recipes
from installed import versions
from model.backbones.resolve import resolved
from model.device import choose_device, choose_precision, describe, keep_freed_memory
from model.features.embed import AT_A_TIME_ON_GPU, Embedder, embed
from model.features.loader import FeatureSource, source_of
from model.features.store import missing_of
from model.network import build
from model.recipe import Recipe
from model.score import AT_A_TIME, autocast, evaluating
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
                embedder.net.features(images).to(torch.float16).cpu()
            done += 1
    return done * count / (time.perf_counter() - began)


def whole(embedder: Embedder, shards: ShardSet, source: FeatureSource) -> float:
    """Measure images/s of `embed()` on a set, from its first batch to its last."""
    moments: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = missing_of(Path(folder), source.backbone, shards, source.numbered(0))
        embed(
            embedder, shards, replace(source, store=Path(folder)), 0, files,
            lambda count: moments.append((time.perf_counter(), count)),
        )  # fmt: skip
    (first, _), (last, _) = moments[0], moments[-1]
    if len(moments) < 2:
        raise click.ClickException(
            f"the set has {len(shards)} images, which is one batch; a speed needs two or more"
        )
    return sum(count for _, count in moments[1:]) / (last - first)


def measure(
    embedder: Embedder, shards: ShardSet, source: FeatureSource, seconds: float
) -> dict[str, float]:
    """Measure both rows once, in images/s."""
    shape = source.backbone.preprocess.shape
    return {
        "network": network_alone(embedder, shape, seconds),
        "embed": whole(embedder, shards, source),
    }


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
    dtype, _ = choose_precision("auto", place)
    recipe = resolved(recipes.load(Recipe, recipe_path, overrides))
    net = build(recipe.network, pretrained=False).to(place)
    embedder = Embedder(net=net, device=place, dtype=dtype, loading=recipe.loading)
    shard_set, source = open_shards([shards]), source_of(recipe, net, dtype)
    rows: dict[str, list[float]] = {"network": [], "embed": []}
    about = {
        "network": recipe.network.name, "size": recipe.preprocess.crop_size,
        "precision": describe(dtype), "images": len(shard_set), "versions": versions(),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU",
    }  # fmt: skip
    for _ in range(rounds):
        for name, speed in measure(embedder, shard_set, source, seconds).items():
            rows[name].append(speed)
            console.say(f"{name}: {speed:,.1f} images/s")
        if out:
            out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", "utf-8")
    middle: dict[str, Any] = {name: statistics.median(speeds) for name, speeds in rows.items()}
    console.say(f"embed / network: {middle['embed'] / middle['network']:.3f}")


if __name__ == "__main__":
    main()
