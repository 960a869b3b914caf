"""Train from a folder that holds `real/` and `fake/`: pack it, and fit a recipe to it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import console
from model.distributed import DistEnv, all_gather_object
from model.recipe import Recipe
from model.shipped.backbone import CLIP_8_BIT, cached_path
from sharding.folder import PackedFolder, pack_folder
from storage import AnyPath

RECIPE = "clip-phase1.toml"
"""What a folder is trained with where no recipe is named: a head on a frozen CLIP, which learns
from a few hundred images on a CPU and is the kind of detector that ships.
"""

FEWEST_STEPS = 8
"""Steps in an epoch that a small folder should have; the batch is made smaller for them."""


def default_weights() -> Path:
    """The backbone of `RECIPE` on this machine.

    Raises:
        ValueError: it was not fetched; the message has the ways out.
    """
    for file in CLIP_8_BIT.files:
        if cached_path(file.sha256).is_file():
            return cached_path(file.sha256)
    raise ValueError(
        f"--folder trains recipes/{RECIPE}, a head on a frozen CLIP, whose backbone is not on this "
        "machine: type `python -m model fetch`, or name another recipe, such as --recipe "
        "recipes/demo-phase1.toml, a small network that starts from nothing"
    )


def with_folder(
    recipe: Recipe, folder: Path, data: AnyPath, *, keep_name: bool, dist: DistEnv
) -> Recipe:
    """Pack `folder` below `data`, say so, and return the recipe with its sets in place of its own;
    unless `keep_name` the run is called as the folder. A recipe that replays old sets validates on
    its own sets too. A batch that is large for the folder is made smaller. On many ranks each calls
    this; the first one packs.

    Raises:
        ValueError: as `sharding.folder.pack_folder`.
    """
    packed = _packed(folder, data, dist)
    console.log.info("%s", _words_for(packed, folder))
    samples, batch = sum(packed.train_counts), recipe.loading.batch_size
    most = max(1, samples // (FEWEST_STEPS * dist.world_size))
    if batch > most:
        console.log.info("batches of %d instead of %d, for so few images", most, batch)
    own = recipe.data.validate if recipe.replay.sets else []
    return replace(
        recipe,
        name=recipe.name if keep_name else packed.name,
        data=replace(recipe.data, train=[packed.train], validate=[packed.validate, *own]),
        loading=replace(recipe.loading, batch_size=min(batch, most)),
    )


def _packed(folder: Path, data: AnyPath, dist: DistEnv) -> PackedFolder:
    """What the first rank packed, on every rank.

    Raises:
        ValueError: why it could not be packed, on every rank.
    """
    packed, reason = None, ""
    if dist.is_main:
        try:
            packed = pack_folder(folder, data, progress=_progress)
        except (ValueError, OSError) as error:
            if dist.world_size == 1:
                raise
            reason = console.one_line(error)
    packed, reason = all_gather_object(dist, (packed, reason))[0]
    if packed is None:
        raise ValueError(reason)
    return packed


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    console.log.info("%s %s images", what, f"{total:,}")
    with console.progress(what, total) as advance:
        yield advance


def _words_for(packed: PackedFolder, folder: Path) -> str:
    """What was packed, and where it lies."""
    done = "packed" if packed.shards_written else "is up to date, packed"
    counts = [
        f"{real:,} real and {fake:,} fake images"
        for real, fake in (packed.train_counts, packed.validate_counts)
    ]
    return (
        f"{folder} {done} in {packed.place}: {counts[0]} to train on ({packed.name}), {counts[1]} "
        f"held out ({packed.name}-val)"
    )
