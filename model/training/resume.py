"""The training state down into a checkpoint and back, and whose checkpoint it is."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import recipes
from model import checkpoint
from model.distributed import all_gather_object
from model.recipe import Recipe
from model.training.step import TrainState
from model.training.validation import Validation
from pipeline.stream import Stream

log = logging.getLogger("ai_images_detector")

_DECIDE_NOTHING = {
    "loading.batch_size",  # of one rank; the order refuses another global batch
    "loading.num_workers",
    "loading.cache",
    "loading.cache_gb",
    "loading.verify_checksums",
    "loading.stall_warning_s",
    "run.log_every",
    "run.save_every",
}
"""What another machine, or another number of them, may set anew when it goes on with a run."""


def resumable(folder: Path, recipe: Recipe) -> Path | None:
    """The last checkpoint of the run in `folder`, or None where there is none.

    Raises:
        ValueError: the run there is one of another `recipe` (a dataclass).
    """
    last = checkpoint.last_of(folder)
    if last is None:
        return None
    before = _flat(_completed(checkpoint.read_meta(last)["recipe"], type(recipe)))
    now = _flat(_as_saved(recipe))
    changed = sorted(
        key
        for key in (before.keys() | now.keys()) - _DECIDE_NOTHING
        if before.get(key) != now.get(key)
    )
    if changed:
        key = changed[0]
        raise ValueError(
            f"{folder} holds a run of another recipe ({key} was {before.get(key)}, now "
            f"{now.get(key)}; {len(changed)} differ); use --run NAME for a new run"
        )
    log.info("going on from %s", last)
    return last


def _completed(values: dict[str, Any], kind: type) -> dict[str, Any]:
    """A saved recipe with the defaults of settings that are younger than it."""
    try:
        return _as_saved(recipes.build(kind, values, ""))
    except recipes.RecipeError:
        return values  # it has settings that are gone: they will be named


def _as_saved(recipe: Recipe) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(recipe)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one level: {"optim.lr": ...}."""
    flat = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def restore(train_state: TrainState, folder: Path, stream: Stream) -> int:
    """Put the training state of the checkpoint `folder` back; returns how many steps are done.

    Raises:
        OrderError: it belongs to other shards, another seed or another global batch.
    """
    state = checkpoint.load_state(folder)
    done = stream.resume(state["order"])
    train_state.optimizer.load_state_dict(state["optimizer"])
    train_state.scaler.load_state_dict(state["scaler"])
    if train_state.ema is not None:
        train_state.net.backbone.load_state_dict(state["net"])
    dist = train_state.dist
    if len(state["rng"]) != dist.world_size:
        log.warning(
            "saved on %d ranks, going on on %d: the same batches, but dropped paths are drawn anew",
            *(len(state["rng"]), dist.world_size),
        )
        torch.manual_seed(int(state["order"]["seed"]) + 1_000_003 * (1 + dist.rank) + done)
        return done
    torch.set_rng_state(state["rng"][dist.rank])
    if train_state.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"][dist.rank], train_state.device)
    return done


def save(
    folder: Path,
    train_state: TrainState,
    recipe: Recipe,
    stream: Stream,
    done: int,
    found: Validation | None,
) -> None:
    """Write a checkpoint of the run in `folder` with all that resuming needs, after `done` steps,
    then prune the older ones. `found` is what validation found, if it was its turn. Every rank
    calls this; the first one writes.
    """
    on_gpu = train_state.device.type == "cuda"
    dist = train_state.dist
    rng = all_gather_object(dist, torch.get_rng_state())
    cuda_rng = all_gather_object(
        dist, torch.cuda.get_rng_state(train_state.device) if on_gpu else None
    )
    if not dist.is_main:
        return
    state = {
        "optimizer": train_state.optimizer.state_dict(),
        "scaler": train_state.scaler.state_dict(),
        "order": stream.state(done),
        "rng": rng,
        "cuda_rng": cuda_rng if on_gpu else [],
    }
    if train_state.ema is not None:
        state["net"] = train_state.net.backbone.state_dict()
    checkpoint.save(
        folder / f"step_{done:07d}",
        train_state.shown,
        recipe=recipe,
        step=done,
        epoch=done / stream.steps_per_epoch,
        metrics=asdict(found) if found else {},
        selection=found.selection if found else None,
        data={
            "train": recipe.data.train,
            "replay": recipe.replay.sets,
            "replayed_per_epoch": stream.replayed_per_epoch,
            "index_sha256": stream.pool.shards.sha256,
        },
        state=state,
        replayed=stream.replayed_until(done) if recipe.replay.sets else None,
    )
    checkpoint.prune(folder)
