"""Find out whether and how a run can be resumed; `plan()` in `plan.py` calls these functions.

`resumable_checkpoints(folder)` returns a list of the undamaged checkpoints (`Path`s) of the run in
`folder`, and a tuple of texts: why others are not used.

`unfinished_of(folder)` returns the last checkpoint of the run of the checkpoint `folder`, None if
that run is over.

`check_same_recipe(resumed, recipe)` raises `ValueError` if the checkpoint `resumed` is of another
recipe; a key that its recipe lacks counts as the default.

`progress_of(resumed, stream, validation)` returns its number of finished steps and its `Gain`; it
raises `ValueError` if the training or validation sets are no longer those of the run.
`as_saved(recipe)` returns the recipe as a checkpoint stores it.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import recipes
from escape import typed_reason_of
from model import checkpoint
from model.recipe import Recipe, flat_settings
from model.training.validation import Gain
from pipeline.contents import content_sha256
from pipeline.stream import Stream
from sharding.format import ShardSet, hashes_of

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
    """Return the undamaged checkpoints of a run, and why others are not used, or cannot be resumed.

    Raises:
        CheckpointError: the run has checkpoints, and none can be resumed.
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
    """Return the last checkpoint of the run of `folder` if the run is unfinished, else None. A run
    is finished if one of its checkpoints has `ended`. Imported and shipped checkpoints have no
    training state and cannot be resumed.
    """
    run = checkpoint.checkpoints_of(folder.parent)
    for other in run:
        with contextlib.suppress(checkpoint.CheckpointError):  # ignore a damaged one
            if checkpoint.read_meta(other).get("ended"):
                return None
    return next((one for one in reversed(run) if (one / checkpoint.STATE_FILE).exists()), None)


def ended_of(resumed: Path | None, done: int, steps: int) -> str:
    """Return why a run is over, empty if it is not. Earlier versions recorded no reason after the
    last step.
    """
    meta = checkpoint.read_meta(resumed) if resumed else None
    if meta is None:
        return ""
    return meta.get("ended") or ("every step is done" if done == steps and meta["metrics"] else "")


def check_same_recipe(resumed: Path, recipe: Recipe) -> None:
    """Refuse to resume a checkpoint of another recipe. A key that did not exist when the run began
    has its default.

    Raises:
        ValueError: the recipes differ, or the program no longer has a key of the saved recipe; the
            message names the first setting.
    """
    saved = checkpoint.read_meta(resumed)["recipe"]
    try:  # a newer key gets its default
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
        CheckpointError: the file is damaged, or no training state of this program.
        OrderError: the training sets, the seed or the global batch are no longer those of the run,
            or the record of replayed samples belongs to another run.
        ValueError: a validation set has been built again, so figures of different images would be
            compared.
    """
    state = checkpoint.load_state(resumed, lazy=True)
    try:
        done = stream.resume(state["order"])
        if "replayed" in state:  # missing in earlier versions and without replay
            stream.keep_replayed(state["replayed"])
        _check_validation(state, validation)
        gain = Gain(**state.get("gain", {}))
        if not isinstance(gain.highest, float | None) or not (
            type(gain.step) is type(gain.validations_since) is int
        ):
            raise TypeError("gain has values that are no numbers")
    except (LookupError, TypeError, AttributeError) as error:  # a file of another program
        raise checkpoint.CheckpointError(
            f"{resumed / checkpoint.STATE_FILE} is no training state of this program "
            f"({typed_reason_of(error)}); restore the checkpoint, or start a new run with "
            "--run NAME"
        ) from error
    return done, gain


def _check_validation(state: Mapping[str, Any], validation: Mapping[str, ShardSet]) -> None:
    now = {name: content_sha256(shards) for name, shards in validation.items()}
    before = state.get("validation_content")
    if before is None:  # saved by an earlier version
        now = hashes_of(validation)
        before = state.get("validation", now)
    for name, sha256 in before.items():
        if now[name] != sha256:
            raise ValueError(
                f"cannot resume: validation set {name} has been built again since this run began "
                f"(its hash was {sha256[:16]} and is {now[name][:16]}), so figures of "
                "different images would be compared; undo the change, or start a new run with "
                "--run NAME"
            )


def as_saved(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as it is read back from JSON."""
    return json.loads(json.dumps(asdict(recipe)))
