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
"""

import logging
import shutil
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import checkpoint
from model.distributed import all_gather_object, on_main
from model.inference.fitness import with_sources_of
from model.lean_import import lean_import
from model.metrics import Validation
from model.recipe import STEP_FOLDER, step_folder
from model.shipped.entries import TrainingData
from model.training.plan import RunPlan
from model.training.step import TrainState
from model.training.validation import Best, Gain, better
from pipeline.contents import content_sha256
from storage import partial_of, whole_name

log = logging.getLogger("ai_images_detector")


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
    if state["scaler"]:  # empty: saved in a precision without loss scale
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
    plan: RunPlan,
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
        whole = recipe.optim.solver == "lbfgs"
        replayed = stream.replayed_until(done, whole=whole) if data["replay"] else None
        with lean_import():
            optimizer = train_state.optimizer.state_dict()
        state = {
            "optimizer": optimizer,
            "scaler": train_state.scaler.state_dict(),
            "order": stream.state(done),
            "validation_content": {n: content_sha256(s) for n, s in plan.validation.items()},
            "gain": asdict(gain),
            "rng": rng,
            "cuda_rng": cuda_rng if on_gpu else [],
        }
        if replayed and not whole:
            state["replayed"] = stream.replayed_state()
        if train_state.ema is not None:
            state["net"] = train_state.net.backbone.state_dict()
        checkpoint.save(
            saved,
            train_state.shown,
            recipe=recipe,
            state=state,
            replayed=replayed,
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
        # Only now, when the new checkpoint is on the disk: after a power cut the run still has one.
        prune(plan.folder, {saved, best.path, *plan.spared})

    on_main(dist, write)
    return best


def _data_of(plan: RunPlan) -> dict[str, Any]:
    """Return the record of the training data for `meta.json`: only sets, sources and generators of
    samples that epochs take from. Sources of earlier runs, whose weights this run began from, stay
    in the record: notices and the model card concern all data that the weights have seen.
    """
    stream = plan.stream
    shards, rows = stream.pool.shards, stream.used
    folders = {shards.folders[code] for code in np.unique(shards.column("shard_code")[rows])}
    hashes = {n: sha256 for n, sha256 in stream.pool.hashes.items() if plan.data / n in folders}
    codes, names = shards.codes("source")
    sources = {names[code]: shards.sources[names[code]] for code in np.unique(codes[rows])}
    synthetic = {name for name, facts in sources.items() if facts.get("synthetic")}
    titles = {name: title for name, facts in sources.items() if (title := facts.get("title"))}
    data: TrainingData = {
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
            folder.rename(partial_of(folder))  # temporary: removed below, even after a kill
    for left in run.glob("step_*.partial"):
        if not STEP_FOLDER.fullmatch(whole_name(left.name, is_folder=True) or ""):
            continue
        if left.is_symlink():
            left.unlink()  # a link: its target is not this program's
        else:
            shutil.rmtree(left)
