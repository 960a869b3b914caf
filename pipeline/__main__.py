"""Inspect how the loader augments and shuffles a shard set, by two commands.

- `python -m pipeline preview SHARDS` writes a PNG that shows samples of the set as the network sees
  them, made without DALI and, if it is installed, also by DALI. Then it prints the difference of
  the two in gray levels.
- `python -m pipeline order SHARDS` prints a table of how well the shuffles `global` and `block` mix
  the samples and their sources into batches; 1 means as well as a random order. It writes nothing.

SHARDS is the folder of a shard set (tars of images with an index), or its address, such as
s3://bucket/set. The options:

- `--out FILE` (preview): the PNG to write (default `grid.png`; an existing file is overwritten).
- `--recipe FILE` (preview): the recipe (TOML) with the preprocessing and the augmentation policies,
  which are named settings. Default: the recipe of phase 1.
- `--policy NAME` (preview): the policy for sources to which the set's `index.json` gives none.
  Default: the policy that the recipe names.
- `--count N` (preview): number of samples, 1 to 64 (default 8).
- `--batch N` (order): images per batch, at least 2 (default 64).
- `--seed N`: seed of the samples and their augmentations, or of the shuffle (default 0).
- `--verbose`: more log lines.

An error, such as a set that cannot be read, is one line and exit status 1; for a wrong option the
exit status is 2.
"""

from pathlib import Path

import click

import cli
import console
from storage import AnyPath


@click.group(cls=console.Group)
def main() -> None:
    """Inspect the batches that the loader makes."""


@main.command()
@click.argument("shards", type=cli.AnyAddress())
@click.option(
    "--out",
    type=cli.LocalPath(dir_okay=False, writes=True),
    default=Path("grid.png"),
    show_default=True,
    help="PNG to write.",
)
@click.option(
    "--recipe",
    "path",
    type=cli.LocalPath(),
    help="Recipe with the policies and preprocessing to show. Default: the recipe of phase 1.",
)
@click.option(
    "--policy", help="Policy of sources for which the index names none. Default: the recipe's."
)
@click.option(
    "--count",
    type=click.IntRange(1, 64),
    default=8,
    show_default=True,
    help="Number of samples.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Seed that selects the samples.",
)
@cli.options()
def preview(
    shards: AnyPath, out: Path, path: Path | None, policy: str | None, count: int, seed: int
) -> None:
    """Write a PNG of samples of the set SHARDS as the network sees them, with both backends."""
    import recipes
    from pipeline.preview import write_preview

    path = path or recipes.FOLDER / "phase1.toml"
    drawn, change = write_preview(shards, out, path, policy, count, seed)
    if change is not None:
        console.say(f"dali - pil: mean {change.mean():.2f}, at most {change.max()} gray levels")
    console.say(f"{drawn} samples of {shards}: {out}")


@main.command()
@click.argument("shards", type=cli.AnyAddress())
@click.option(
    "--batch",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Images per batch.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Seed of the shuffle.",
)
@cli.options()
def order(shards: AnyPath, batch: int, seed: int) -> None:
    """Measure how well each shuffle mixes the set SHARDS; 1 means as well as a random order."""
    import numpy as np

    from pipeline.order import mixing_of, training_epoch
    from sharding.format import open_shards

    opened = open_shards([shards])
    if len(opened) < batch:
        raise ValueError(
            f"{shards} has {len(opened)} samples, fewer than a batch of {batch}; use a smaller "
            "--batch"
        )
    codes = opened.codes("source")[0]
    rows = []
    for shuffle in ("global", "block"):
        samples = training_epoch(
            np.arange(len(opened)), seed=seed, number=0, global_batch=batch, shuffle=shuffle
        ).samples
        mixing = mixing_of(samples, codes[samples], batch)
        rows.append([shuffle, mixing.distance, mixing.batches])
    columns = ["shuffle", "distance (1: random)", "sources per batch (1: random)"]
    console.table(f"{shards}: {len(opened):,} samples in batches of {batch}", columns, rows)


if __name__ == "__main__":
    main()
