"""Save the state of training in a checkpoint, and restore it to resume a run exactly.

Main entry: `save(plan, train_state, done, validation, best, *, gain, ended)`. On several ranks, all
call it, and rank 0 writes.

- `plan`: the `RunPlan` of the run (`plan()` in `plan.py`).
- `train_state`: its `TrainState` (network, optimizer and more; `assemble()` in `assemble.py`).
- `done`: the number of finished steps.
- `validation`: the `Validation` (metrics) of this step, as `validate()` in `validation.py` returns,
  or None.
- `best`: the best checkpoint so far, a `Best` of `validation.py` (`path`, `validation`), or None.
- `gain`: a `Gain` of `validation.py`, the record of the validations. Begin with `plan.gain`, and
  replace it by `gain.after(step, selection)` after each validation.
- `ended`: the reason why the run is over, a text ("", the default, if it is not).

It writes the checkpoint folder `step_<done>` (seven digits) in the run's folder: weights,
optimizer, random generators, order of samples, hashes of the validation sets, `gain`. Then it
removes the run's other checkpoints except the best one. It raises `CheckpointError` if the folder
cannot be written, and `OSError` if an old checkpoint cannot be removed; then the other ranks raise
`RankError` with that message.

It returns the new `Best`, never None: the better one of `best` and this checkpoint. The better one
has the higher `validation.selection`, a number from 0 to 1. If they are equal, this checkpoint is
better. A checkpoint without a validation is worse than one with a validation. If neither has one,
this checkpoint is returned.

`prune(run, keep)` removes the checkpoints of the folder `run` except the folders in `keep`, and
what killed processes left unfinished there.

`restore(train_state, folder, done)` takes a `TrainState` whose network has the weights of the
checkpoint `folder` (a `Path`) already, and sets the rest of it to the saved state; `done` is the
number of steps of this checkpoint. It returns nothing, and raises `CheckpointError` for a missing
or damaged file. If the number of ranks has changed, the random numbers differ from those of an
uninterrupted run (a warning is logged).

Before that, `plan()` uses five functions. `resumable_checkpoints(folder)` returns a list of the
undamaged checkpoints (`Path`s) of the run in `folder`, and a tuple of texts: why others are not
used. `unfinished_of(folder)` returns the last checkpoint of the run of the checkpoint `folder`,
None if that run is over. `check_same_recipe(resumed, recipe)` raises `ValueError` if the checkpoint
`resumed` is of another recipe; a key that its recipe lacks counts as the default.
`progress_of(resumed, stream, validation)` returns its number of finished steps and its `Gain`; it
raises `ValueError` if the training or validation sets are no longer those of the run.
`as_saved(recipe)` returns the recipe as a checkpoint stores it.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import recipes
from model import checkpoint
from model.distributed import all_gather_object, on_main
from model.inference.fitness import with_sources_of
from model.lean_import import lean_import
from model.metrics import Validation
from model.recipe import STEP_FOLDER, Recipe, flat_settings, step_folder
from model.training.step import TrainState
from model.training.validation import Best, Gain, better
from pipeline.stream import Stream
from sharding.format import ShardSet
from storage import partial_of, whole_name

if TYPE_CHECKING:
    from model.training.plan import RunPlan

log = logging.getLogger("ai_images_detector")

_DECIDE_NOTHING = {
    "loading.batch_size",  # per rank; the order of samples refuses another global batch
    "loading.num_workers",
    "loading.cache",
    "loading.cache_gb",
    "loading.verify_checksums",
    "loading.stall_warning_s",
    "loading.stall_error_s",
    "features.store",
    "run.log_every",
    "run.save_every",
    "run.tracker",
}
"""Recipe fields that may change when a run is resumed, for example on other hardware. They do not
affect the result.
"""


def resumable_checkpoints(folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Return the undamaged checkpoints of a run, and why others are not used, or not resumed from.

    Raises:
        CheckpointError: the run has checkpoints, and none can be resumed from.
    """
    whole, damaged = checkpoint.whole_checkpoints(folder)
    stateless = [one for one in whole if not (one / checkpoint.STATE_FILE).exists()]
    damaged += [f"{one} has no {checkpoint.STATE_FILE}" for one in stateless]
    if damaged and len(whole) == len(stateless):
        raise checkpoint.CheckpointError(
            f"{damaged[-1]}; no undamaged checkpoint in {folder}: restore one, or use --run NAME"
        )
    return whole, tuple(damaged)


def unfinished_of(folder: Path) -> Path | None:
    """Return the last checkpoint of the run of `folder` if that run can go on, None if it is over.
    A run is over if one of its checkpoints has `ended`. What was imported or shipped, without a
    training state, cannot go on.
    """
    run = checkpoint.checkpoints_of(folder.parent)
    for other in run:
        with contextlib.suppress(checkpoint.CheckpointError):  # a damaged one does not decide
            if checkpoint.read_meta(other).get("ended"):
                return None
    return next((one for one in reversed(run) if (one / checkpoint.STATE_FILE).exists()), None)


def check_same_recipe(resumed: Path, recipe: Recipe) -> None:
    """Refuse to resume a checkpoint of another recipe. A key that the program did not have when the
    run began has its default there.

    Raises:
        ValueError: the recipes differ, or the program no longer has a key of the saved recipe; the
            message names the first setting.
    """
    saved = checkpoint.read_meta(resumed)["recipe"]
    try:  # a key that the program got later has its default, which changes nothing
        completed = recipes.build(type(recipe), saved, str(resumed))
    except recipes.RecipeError as error:
        raise ValueError(
            f"{resumed.parent} holds a run of another version of this program, and this version "
            f"cannot read its recipe ({error}); continue with that version, or use --run NAME for "
            "a new run"
        ) from error
    before, now = flat_settings(as_saved(completed)), flat_settings(as_saved(recipe))
    keys = (before.keys() | now.keys()) - _DECIDE_NOTHING
    changed = sorted(key for key in keys if before.get(key) != now.get(key))
    if changed:
        key = changed[0]
        is_new = key in before.keys() - flat_settings(saved).keys()
        was = "was not known to the program that began it, default" if is_new else "was"
        raise ValueError(
            f"{resumed.parent} holds a run of another recipe ({key} {was} {before.get(key)}, now "
            f"{now.get(key)}; {len(changed)} differ); use --run NAME for a new run"
        )


def progress_of(
    resumed: Path, stream: Stream, validation: Mapping[str, ShardSet]
) -> tuple[int, Gain]:
    """Return the number of finished steps of a checkpoint, and the record of its validations.

    Raises:
        OrderError: the training sets, the seed or the global batch are no longer those of the run.
        ValueError: a validation set has been built again. The best checkpoint would be chosen by
            figures of different images, and forgetting would be their difference.
    """
    state = checkpoint.load_state(resumed, lazy=True)
    done, now = stream.resume(state["order"]), _hashes_of(validation)
    for name, sha256 in state.get("validation", now).items():
        if now[name] != sha256:
            raise ValueError(
                f"cannot resume: validation set {name} has been built again since this run began "
                f"(index_sha256 was {sha256[:16]} and is {now[name][:16]}), so figures of "
                "different images would be compared; undo the change, or start a new run with "
                "--run NAME"
            )
    return done, Gain(**state.get("gain", {}))


def _hashes_of(validation: Mapping[str, ShardSet]) -> dict[str, str]:
    return {name: shards.sha256 for name, shards in validation.items()}


def as_saved(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as it is read back from JSON."""
    return json.loads(json.dumps(asdict(recipe)))


def restore(train_state: TrainState, folder: Path, done: int) -> None:
    """Restore the training state of the checkpoint `folder`, saved after `done` steps.

    Raises:
        CheckpointError: an earlier version grouped the parameters in another way.
    """
    state = checkpoint.load_state(folder)
    try:
        train_state.optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:
        raise checkpoint.CheckpointError(
            f"{folder} cannot be resumed: an earlier version of this program grouped the network's "
            "parameters in another way; start a new run with --run NAME"
        ) from error
    if state["scaler"]:  # empty if saved in another precision, which has no loss scale
        train_state.scaler.load_state_dict(state["scaler"])
    if train_state.ema is not None:
        train_state.net.backbone.load_state_dict(state["net"])
    dist = train_state.dist
    if len(state["rng"]) != dist.world_size:
        log.warning(
            "saved on %d ranks, resumed on %d: same batches, but other random numbers (drop path)",
            *(len(state["rng"]), dist.world_size),
        )
        torch.manual_seed(int(state["order"]["seed"]) + 1_000_003 * (1 + dist.rank) + done)
        return
    torch.set_rng_state(state["rng"][dist.rank])
    if train_state.device.type == "cuda" and state["cuda_rng"]:  # empty if saved on a CPU
        torch.cuda.set_rng_state(state["cuda_rng"][dist.rank], train_state.device)


def save(
    plan: "RunPlan",
    train_state: TrainState,
    done: int,
    validation: Validation | None,
    best: Best | None,
    *,
    gain: Gain,
    ended: str = "",
) -> Best:
    """Write a checkpoint with all that resuming needs, after `done` steps, and return the best one.
    All checkpoints except these two, and those that cannot be read, are removed.

    `validation` is the one of this step, None if there was none. `best` is the best checkpoint so
    far. `ended` is the reason why the run is over, empty if it is not. Every rank calls this
    function; rank 0 writes.
    """
    on_gpu = train_state.device.type == "cuda"
    dist = train_state.dist
    rng = all_gather_object(dist, torch.get_rng_state())
    cuda_rng = all_gather_object(
        dist, torch.cuda.get_rng_state(train_state.device) if on_gpu else None
    )
    saved = plan.folder / step_folder(done)
    best = better(best, Best(path=saved, validation=validation))

    def write() -> None:
        recipe, stream, data = plan.recipe, plan.stream, _data_of(plan)
        with lean_import():
            optimizer = train_state.optimizer.state_dict()
        state = {
            "optimizer": optimizer,
            "scaler": train_state.scaler.state_dict(),
            "order": stream.state(done),
            "validation": _hashes_of(plan.validation),
            "gain": asdict(gain),
            "rng": rng,
            "cuda_rng": cuda_rng if on_gpu else [],
        }
        if train_state.ema is not None:
            state["net"] = train_state.net.backbone.state_dict()
        checkpoint.save(
            saved,
            train_state.shown,
            recipe=recipe,
            state=state,
            replayed=(
                stream.replayed_until(done, whole=recipe.optim.solver == "lbfgs")
                if data["replay"]
                else None
            ),
            record=checkpoint.Record(
                step=done,
                epoch=done / plan.steps_per_epoch,
                metrics=asdict(validation) if validation else {},
                selection=validation.selection if validation else None,
                data=data,
                first_weights=plan.first_weights,
                ended=ended,
            ),
        )
        # Only now: the new checkpoint is on the disk; a power cut cannot leave the run without one.
        prune(plan.folder, {saved, best.path, *plan.spared})

    on_main(dist, write)
    return best


def _data_of(plan: "RunPlan") -> dict[str, Any]:
    """Return the record of the training data for `meta.json`: only sets, sources and generators of
    samples that epochs take from. Sources of earlier runs, whose weights this run began from, stay
    in the record: notices and the model card are about all that the weights have learned.
    """
    stream = plan.stream
    shards, rows = stream.pool.shards, stream.used
    folders = {shards.folders[code] for code in np.unique(shards.column("shard_code")[rows])}
    hashes = {n: sha256 for n, sha256 in stream.pool.hashes.items() if plan.data / n in folders}
    codes, names = shards.codes("source")
    sources = {names[code]: shards.sources[names[code]] for code in np.unique(codes[rows])}
    synthetic = {name for name, facts in sources.items() if facts.get("synthetic")}
    titles = {name: title for name, facts in sources.items() if (title := facts.get("title"))}
    data = {
        "train": [name for name in plan.recipe.data.train if name in hashes],
        "replay": [name for name in plan.recipe.replay.used_sets if name in hashes],
        "replayed_per_epoch": stream.replayed_per_epoch,
        "index_sha256": shards.sha256,
        "set_sha256": hashes,
        "sources": [*sources],
        "generators": shards.generators(rows),
        "synthetic_sources": [*synthetic],
        "titles": titles,
    }
    return with_sources_of(plan.weights.data, data)


def prune(run: Path, keep: Collection[Path]) -> None:
    """Remove all checkpoints of a run except those in `keep`, and those that killed processes left
    unfinished. The run has one writer at a time.
    """
    for folder in checkpoint.checkpoints_of(run):
        if folder not in keep:
            folder.rename(partial_of(folder))  # a name that is removed below, also after a kill
    for left in run.glob("step_*.partial"):
        if not STEP_FOLDER.fullmatch(whole_name(left.name, is_folder=True) or ""):
            continue
        if left.is_symlink():
            left.unlink()  # what it points to is not this program's
        else:
            shutil.rmtree(left)
