"""Prepare training on a folder of images with the subfolders `real/` and `fake/`: pack them as
shard sets (tars with an index) and adapt a recipe to these sets.

Main entry: `with_folder(recipe, folder, data, *, changed, dist)`. On several ranks, each must
call it; rank 0 packs.

- `recipe`: a `Recipe`, read by `recipes.load(Recipe, path)`.
- `folder`: `Path` of the folder of images.
- `data`: the folder of all sets, a `Path`, or a `UPath` for an address.
- `changed`: the keys of the recipe that the user has set, such as `name`: then the run keeps this
  name instead of getting the folder's.
- `dist`: this process's rank, a `DistEnv`; `DistEnv()` for a single process.

It writes a training set `<name>`, a validation set `<name>-val`, `catalog.toml` and, if the folder
has a published test set, `<name>-test` into `folders/<name>-<hash>/` below `data`. `<name>` is made
from the folder's name, `<hash>` from its full path. Another call with the same folder and `data`
uses the packed sets again, and packs only what is new or changed in the folder. The files and
images that are left out are logged, by reason.

It returns the recipe with these two sets. If the recipe also trains on old sets (replay), its own
validation sets are kept beside the new one. The batch size in it is reduced if there are few
images, so that an epoch has at least `FEWEST_STEPS` steps.

`ValueError` is raised if the folder cannot be packed, for example if a class has too few images, or
if `changed` has `data.train` or, without replay, `data.validate`, which the packed sets replace;
`OSError` if the folder cannot be read or a set cannot be written. On several ranks, both are a
`ValueError`, on every rank.

`default_weights()` returns the path of the cached backbone of `RECIPE`, the recipe that `train.py
--folder` uses by default, or raises `ValueError` if it is not cached.
"""

import shlex
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import console
from installed import command
from model.distributed import DistEnv, on_main
from model.recipe import Recipe
from model.shipped.backbone import CLIP_8_BIT, cached_path
from sharding.build import image_progress
from sharding.folder import PackedFolder, pack_folder
from storage import AnyPath

RECIPE = "clip-phase1.toml"
"""Default recipe of `--folder`: a head on a frozen CLIP, which learns from a few hundred images on
a CPU. The shipped detector is such a head.
"""

FEWEST_STEPS = 8
"""Minimum number of steps per epoch. For a small folder, the batch size is reduced to reach this
number."""


def default_weights() -> Path:
    """Return the cached backbone of `RECIPE`.

    Raises:
        ValueError: the backbone was not fetched; the message lists what to do.
    """
    for file in CLIP_8_BIT.files:
        if cached_path(file.sha256).is_file():
            return cached_path(file.sha256)
    raise ValueError(
        f"--folder trains recipes/{RECIPE}, a head on a frozen CLIP, whose backbone is not on this "
        "machine: type `python -m model fetch`, or name another recipe, such as --recipe "
        "recipes/demo-phase1.toml, a small network that needs no weights"
    )


def with_folder(
    recipe: Recipe, folder: Path, data: AnyPath, *, changed: Collection[str], dist: DistEnv
) -> Recipe:
    """Pack `folder` as shard sets below `data` and return the recipe with these sets.

    The run gets the name of the folder, unless `changed`, the keys that the user has set, has
    `name`. A recipe that replays old sets keeps its own validation sets as well. The batch size is
    reduced if the folder is small. Every rank calls this function; rank 0 packs.

    Raises:
        ValueError: as `sharding.folder.pack_folder`, or the user has set a key that the packed sets
            would replace.
    """
    replaced = {"data.train"} if recipe.replay.sets else {"data.train", "data.validate"}
    if lost := sorted(replaced & {*changed}):
        raise ValueError(
            f"--folder trains and validates on the sets that it packs, so {' and '.join(lost)} "
            "would have no effect; leave out --folder or that --set"
        )
    packed = on_main(dist, lambda: pack_folder(folder, data, progress=image_progress))
    console.log.info("%s", _words_for(packed, folder))
    if packed.test:
        console.log.info("%s", _words_for_test(packed, data))
    for line in packed.left_out:
        console.log.info("%s", line)
    samples, batch = sum(packed.train_counts), recipe.loading.batch_size
    most = max(1, samples // (FEWEST_STEPS * dist.world_size))
    if batch > most:
        console.log.info("batch size %d instead of %d, because there are few images", most, batch)
    own = recipe.data.validate if recipe.replay.sets else []
    return replace(
        recipe,
        name=recipe.name if "name" in changed else packed.name,
        data=replace(recipe.data, train=[packed.train], validate=[packed.validate, *own]),
        loading=replace(recipe.loading, batch_size=min(batch, most)),
    )


def _words_for(packed: PackedFolder, folder: Path) -> str:
    """Describe the packed sets in one sentence for the log."""
    done = "packed" if packed.shards_written else "is up to date, packed"
    counts = [
        f"{real:,} real and {fake:,} fake images"
        for real, fake in (packed.train_counts, packed.validate_counts)
    ]
    return (
        f"{folder} {done} in {packed.place}: {counts[0]} to train on ({packed.name}), {counts[1]} "
        f"held out ({packed.name}-val)"
    )


def _words_for_test(packed: PackedFolder, data: AnyPath) -> str:
    """Say that a published test set is kept apart, and how to measure on it."""
    real, fake = packed.test_counts
    words = ["--data", str(data), "--shards", packed.test]
    return (
        f"published test set: {real:,} real and {fake:,} fake images ({packed.name}-test), which "
        "are neither trained nor validated on; after the training: "
        f"`{command('evaluate')} {shlex.join(words)}`"
    )
