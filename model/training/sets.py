"""Open the shard sets (packed images) of a training run, and check that they fit the recipe.

Main entries: `open_stream(recipe, data, device, dist)` returns this rank's training batches, a
`Stream`. `open_validation(recipe, data)` returns the validation sets, a dict, name -> `ShardSet`.
Nothing is written.

- `recipe`: a `ResolvedRecipe`, as `resolved(recipe)` in `model/backbones/resolve.py` returns.
- `data`: the `Path` (or `UPath`) of the folder of all sets.
- `device`: the `torch.device` of the batches.
- `dist`: a `DistEnv`, as `init_distributed()` yields it; None (the default): one process.

`Stream.batches(start, epochs)` yields each `Batch` from the step `start` (counted over all epochs)
to the end of the run, which has `epochs` epochs in total. Both functions raise `OSError` if a file
cannot be read, and these errors, all `ValueError`s:

- `ValueError`: the recipe names no set, the same set twice, one set for training and replay, an
  empty validation set, or for training or replay a set of the split test.
- `ShardError`: a set is missing or damaged.
- `LoadError`: a tar is missing or has another length than in the index; for training, also if the
  image decoder is not installed or shared memory is too small.

`warnings_of(recipe, stream)` returns lines for the user, a list of texts: if the training sets lack
sources of `calibration.together`, if a source is new and replayed, and if each epoch would fetch
most of the sets again. Two checks take what these functions returned, and return nothing.
`check_sets(recipe, stream)` raises

- `OrderError` if the samples of an epoch do not fill one batch (over all ranks);
- `LoadError` if the training sets lack a source of `data.repeats`, or the recipe lacks the
  augmentation policy of a source;
- `ValueError` if the replayed sets lack a source of `replay.exclude_sources`, if there is nothing
  to replay, if `data.repeats` is so low for a source that no epoch takes an image of it, or
  `replay.ratio` so low that no epoch takes an old one, or if all samples are of one class (unless
  `data.allow_one_class`).

`new_sources(stream)` returns the names of the sources that are trained on, replayed ones apart (a
set). `unjudged_limits(recipe, stream, validation, starts_trained)` returns a sentence (in a list)
for each limit of the gate that the validation sets cannot judge.

`check_apart(recipe, stream, validation)` raises `ValueError` if a validation set shares images with
the training sets (unless `data.allow_shared_images`). Sets that are only replayed do not count, nor
do sources that `data.repeats` sets to 0.
"""

import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow.compute as pc
import torch

import console
from model.distributed import DistEnv
from model.forgetting import unjudged
from model.recipe import Recipe, ResolvedRecipe
from pipeline.loader import check_shards, open_loader
from pipeline.params import train_params
from pipeline.remote import PIECE
from pipeline.stream import Stream, open_pool
from sharding.format import CLASSES, ShardSet, open_shards, read_index
from storage import AnyPath, is_local


def open_stream(
    recipe: ResolvedRecipe, data: AnyPath, device: torch.device, dist: DistEnv | None = None
) -> Stream:
    """Return the run's batches on this rank, from the sets below `data`.

    Raises:
        ValueError: the recipe names no training set, or a set of the split test.
        ShardError: a set is missing or cannot be used.
        LoadError: the backend of the recipe is not available.
    """
    dist = dist or DistEnv()
    if not recipe.data.train:
        raise ValueError('data.train names no set; name one, such as data.train=["phase1"]')
    _refuse_repeated("data.train", recipe.data.train, "; data.repeats reads a source more often")
    _refuse_repeated("replay.sets", recipe.replay.sets)
    _refuse_new_and_old(recipe)
    pool = open_pool(data, recipe.data.train, recipe.replay)
    _refuse_test_sets("data.train", recipe.data.train, data)
    _refuse_test_sets("replay.sets", recipe.replay.used_sets, data)
    loader = open_loader(
        pool.shards, preprocess=recipe.preprocess, loading=recipe.loading, device=device,
        rank=dist.rank, world_size=dist.world_size,
    )  # fmt: skip
    return Stream(
        loader,
        pool,
        recipe.replay,
        recipe.augment,
        recipe.data.policy,
        recipe.run.seed,
        recipe.data.repeats,
        recipe.features.views if recipe.features else None,
    )


def _refuse_repeated(key: str, names: Sequence[str], advice: str = "") -> None:
    """Refuse a set that is named more than once, also by another spelling such as `./old`."""
    counts = Counter(posixpath.normpath(name) for name in names)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(f"{key} names {', '.join(twice)} more than once; name each once{advice}")


def _refuse_new_and_old(recipe: Recipe) -> None:
    """Refuse a set that is named as new and as old. Each of its images would be new and old."""
    new, old = (
        {posixpath.normpath(name) for name in names}
        for names in (recipe.data.train, recipe.replay.used_sets)
    )
    if both := sorted(new & old):
        raise ValueError(
            f"data.train and replay.sets both name {', '.join(both)}, so its images would be new "
            "and old ones; take it out of data.train to replay it, else out of replay.sets"
        )


def _refuse_test_sets(key: str, names: Sequence[str], data: AnyPath) -> None:
    """Refuse sets of the split test. Trained on, they could no longer measure the detector."""
    tests = [name for name in names if read_index(data / name)["split"] == "test"]
    if tests:
        raise ValueError(
            f"{key} names {', '.join(tests)}, of the split test: a detector that was trained on it "
            'cannot be tested on it. Name a set of the split train, or set split = "train" in '
            "your own catalog and build the set again"
        )


def open_validation(recipe: Recipe, data: AnyPath) -> dict[str, ShardSet]:
    """Return the validation sets by folder name. Their metrics are stored under these names.

    Raises:
        ValueError: the recipe names no set, the same name twice, or an empty set.
        ShardError: a set is missing or cannot be used.
    """
    folders = [data / name for name in recipe.data.validate]
    if not folders:
        raise ValueError(
            "data.validate names no set, and only a validated checkpoint can become the best one; "
            'name one, such as data.validate=["val"]'
        )
    names = [folder.name for folder in folders]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"data.validate names {', '.join(twice)} more than once; name each once")
    sets = {folder.name: open_shards([folder]) for folder in folders}
    for name, shards in sets.items():
        if not len(shards):
            raise ValueError(f"validation set {name} has no samples; build it again")
        check_shards(shards)
        if (split := read_index(shards.folders[0])["split"]) != "val":
            console.log.warning(
                "validation set %s is of the split %s, not val: the run will not be calibrated%s",
                name, split,
                ", and this set no longer tests it" if split == "test" else "",
            )  # fmt: skip
    return sets


def check_apart(recipe: Recipe, stream: Stream, validation: Mapping[str, ShardSet]) -> None:
    """Refuse a validation set that shares images with the training sets, because it would measure
    memorization. Sets that are only replayed may be validation sets: this measures forgetting.

    Raises:
        ValueError: images are shared; the message has the set, the number and one image.
    """
    if recipe.data.allow_shared_images:
        return
    trained = stream.pool.shards.table.column("sha256").take(stream.used_new)
    for name, shards in validation.items():
        shared = pc.is_in(shards.table.column("sha256"), value_set=trained)
        rows = np.flatnonzero(shared.to_numpy())
        if len(rows):
            raise ValueError(
                f"{len(rows)} of {len(shards)} images of validation set {name} are also in the "
                f"training sets {', '.join(recipe.data.train)}, first: {shards.name(rows[0])}; "
                "validate on a set without training images (sets of one catalog share none)"
            )


def new_sources(stream: Stream) -> set[str]:
    """Return the sources that are new training data. A source that `repeats` sets to 0 is not."""
    return {*_sources_of(stream.pool.shards, stream.used_new)}


def unjudged_limits(
    recipe: Recipe, stream: Stream, validation: Mapping[str, ShardSet], starts_trained: bool
) -> list[str]:
    """Return a sentence for each limit of the gate that the validation sets cannot judge. Without a
    trained detector to start from, nothing can be forgotten.
    """
    held = {n for shards in validation.values() for n in _sources_of(shards, slice(None))}
    reals = any((shards.column("label") == 0).any() for shards in validation.values())
    return unjudged(recipe.gate, not starts_trained or bool(held - new_sources(stream)), reals)


def check_sets(recipe: ResolvedRecipe, stream: Stream) -> None:
    """Refuse sets that do not fit the recipe.

    Raises:
        LoadError: the training sets lack a source of `data.repeats`, or the recipe lacks a policy.
        OrderError: the samples do not fill a batch.
        ValueError: there is nothing to replay, the replayed sets lack a source of
            `replay.exclude_sources`, no epoch takes an image of a source that `data.repeats` does
            not leave out, `replay.ratio` is less than one image, or all samples are of one class.
    """
    shards, seed = stream.pool.shards, recipe.run.seed
    replayed = _sources_of(stream.pool.shards, slice(len(stream.pool.new), None))
    unknown = sorted({*recipe.replay.exclude_sources} - {*replayed})
    if recipe.replay.fraction and unknown:
        raise ValueError(
            f"replay.exclude_sources names source {', '.join(unknown)}; the sets of replay.sets "
            f"hold {', '.join(replayed)}"
        )
    _refuse_too_few(stream)
    epoch = stream.epoch(0)
    labels = np.unique(shards.column("label")[epoch.samples])
    if len(labels) == 1 and not recipe.data.allow_one_class:
        raise ValueError(
            f"all training samples are {CLASSES[labels[0]]}, so nothing can be learned; add "
            "a set with the other class, or use --set data.allow_one_class=true if intended"
        )
    train_params(shards, recipe.augment, recipe.data.policy, recipe.preprocess, seed, 0)


def _refuse_too_few(stream: Stream) -> None:
    """Refuse a repeat or a replay ratio above 0 that rounds to no image. Every epoch has the same
    number of images of a source and of old ones, so the source would never be trained on, and
    nothing would be replayed.
    """
    shards, new = stream.pool.shards, stream.new_per_epoch
    for name in sorted(new_sources(stream) - {*_sources_of(shards, stream.new(0))}):
        count = shards.names("source", stream.used_new).count(name)
        images = console.counted(count, "image")
        raise ValueError(
            f"data.repeats.{name} is {stream.repeats[name]:g}, so no epoch takes an image of this "
            f"source, which has {images}; set {1 / count:.3g} to take one in each epoch, or 0 to "
            "leave the source out"
        )
    if 0 < stream.replay.fraction * new < 1:
        raise ValueError(
            f"replay.ratio is {stream.replay.ratio}, so no epoch replays an old image: it has "
            f"{console.counted(new, 'new image')}; set 1:{new} to replay one in each epoch, or 0 "
            "for no replay"
        )


def warnings_of(recipe: Recipe, stream: Stream) -> list[str]:
    """Return lines for likely mistakes about the sets; empty if there are none."""
    return [
        *_lacking_in_groups(recipe, stream),
        *_new_and_replayed(stream),
        *_traffic(recipe, stream),
    ]


def _lacking_in_groups(recipe: Recipe, stream: Stream) -> list[str]:
    """Return a line on sources of `calibration.together` that the training and replayed sets lack,
    if there are any: a misspelled name has no effect. A recipe may name more sources than a user
    has.
    """
    named, pool = {n for group in recipe.calibration.together.values() for n in group}, stream.pool
    lacking = sorted(named - {*_sources_of(stream.pool.shards, np.r_[pool.new, pool.old])})
    if recipe.calibration.on != "left_out" or not lacking:
        return []
    more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
    return [
        f"calibration.together names sources that the training sets lack: "
        f"{', '.join(lacking[:3])}{more}"
    ]


def _new_and_replayed(stream: Stream) -> list[str]:
    """Return a line on sources that are new training data and replayed, if there are any."""
    shards, pool = stream.pool.shards, stream.pool
    both = sorted(new_sources(stream) & {*_sources_of(shards, pool.old)})
    if not both:
        return []
    codes, names = shards.codes("source")
    of_both = np.isin(codes, [names.index(name) for name in both])

    def sets_of(rows: np.ndarray) -> str:
        tars = np.unique(shards.column("shard_code")[rows[of_both[rows]]])
        return ", ".join(sorted({shards.folders[tar].name for tar in tars}))

    listed = ", ".join(both[:3]) + (f" and {len(both) - 3} more" if len(both) > 3 else "")
    return [
        f"new samples (in {sets_of(pool.new)}) and replayed ones (in {sets_of(pool.old)}) are of "
        f"the same source: {listed}; it counts as new, so its forgetting is not measured"
    ]


def _traffic(recipe: Recipe, stream: Stream) -> list[str]:
    """Return a line if images in random order come from sets at an address that are larger than the
    cache: then nearly every image causes the download of a whole piece of a shard.
    """
    loading, shards = recipe.loading, stream.pool.shards
    if recipe.features and recipe.features.stored:  # images are read once, in order
        return []
    far = {
        (folder, name): size
        for folder, name, size in zip(
            shards.folders, shards.shards, shards.shard_bytes, strict=True
        )
        if not is_local(folder)
    }
    size = sum(far.values()) / 1e9
    if loading.shuffle != "global" or size <= loading.cache_gb:
        return []
    return [
        f"the sets at an address have {size:,.0f} GB, more than loading.cache_gb "
        f"{loading.cache_gb:g}, so nearly each sample of a global shuffle fetches "
        f"{PIECE / 2**20:g} MiB; set loading.shuffle=block, or a larger cache"
    ]


def _sources_of(shards: ShardSet, rows: np.ndarray | slice) -> list[str]:
    """Return the names of the sources of these rows, sorted by their codes."""
    codes, names = shards.codes("source")
    return [names[code] for code in np.unique(codes[rows])]
