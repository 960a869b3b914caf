"""Average the weights of two checkpoints of the same network, to reduce forgetting after
fine-tuning.

Main entry: `average(first, last, weight, run)` takes two checkpoint folders (before and after
fine-tuning), the weight of `last` (a number from 0 to 1; `first` has the rest) and the folder of a
new run, all folders as `Path`. It writes a checkpoint there, without calibration, and returns its
path (a folder `step_...` in `run`). A new training can start from it, but training cannot be
resumed from it. It raises `CheckpointError` if a checkpoint cannot be read, the networks differ,
the weight is outside 0 to 1, `run` exists or the weights cannot be written, and another
`ValueError` if the backbone of a shipped detector was not fetched. The average of fine-tuned
weights and the weights before fine-tuning often performs well on both tasks (WiSE-FT: Wortsman et
al., "Robust fine-tuning of zero-shot models", 2022).
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from model.checkpoint import (
    WEIGHTS_FILE,
    CheckpointError,
    read_meta,
    read_weights,
    seal,
    uncalibrated,
)
from model.export.license import first_of
from model.inference.fitness import generators_seen, sets_seen, with_sources_of
from model.recipe import STEP_FOLDER, step_folder
from model.shipped.backbone import with_backbone_inside
from storage import atomic_folder


def average(first: Path, last: Path, weight: float, run: Path) -> Path:
    """Write a checkpoint with the weights (1 - `weight`) * `first` + `weight` * `last` into the new
    folder `run`, and return its path. `weight` is 0 to 1.

    The record of the training data is copied from `last`; its `earlier_sets` are all sets that one
    of the two was trained on. The checkpoint is neither validated nor calibrated. A new run can
    start from it, but training cannot be resumed from it.

    Raises:
        CheckpointError: the networks differ, the weight is outside 0 to 1, `run` exists, or the
            weights cannot be written (such as on a full disk).
    """
    if not 0 <= weight <= 1:
        raise CheckpointError(f"the weight must be between 0 and 1, got {weight}")
    first_meta, meta = read_meta(first), read_meta(last)
    if first_meta["recipe"]["network"]["name"] != meta["recipe"]["network"]["name"]:
        raise CheckpointError(
            f"{first} is a {first_meta['recipe']['network']['name']}, {last} a "
            f"{meta['recipe']['network']['name']}; only weights of the same network can be averaged"
        )
    for key in ("network", "preprocess"):
        one, other = (_what_computes(of, key) for of in (first_meta, meta))
        if differing := sorted(name for name in other if one.get(name) != other[name]):
            name = differing[0]
            raise CheckpointError(
                f"{first} has {key}.{name} = {one.get(name)}, {last} {other[name]}; only weights "
                "of the same network can be averaged"
            )
    start, ends = read_weights(first), read_weights(last)
    if {n: w.shape for n, w in start.items()} != {n: w.shape for n, w in ends.items()}:
        raise CheckpointError(f"the weights of {first} and {last} differ in names or shapes")
    if run.exists():
        raise CheckpointError(f"{run} exists; name another run")
    weights = {
        name: torch.lerp(start[name], end, weight) if end.is_floating_point() else end
        for name, end in ends.items()
    }
    averaged: dict[str, Any] = {
        **meta,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "created_ns": time.time_ns(),
        **uncalibrated(),
        "first_weights": _first_weights(first, last),
        "metrics": {"sets": {}, "sources": {}},
        "selection": None,
        "data": with_sources_of(first_meta["data"] or {}, meta["data"] or {})
        | {
            "earlier_sets": sets_seen(first_meta) | sets_seen(meta),
            "earlier_generators": sorted({*generators_seen(first_meta), *generators_seen(meta)}),
        },
        "average": {"first": str(first), "last": str(last), "weight": weight},
        "recipe": meta["recipe"] | {"name": run.name},
    }
    averaged = with_backbone_inside(averaged)
    name = last.name if STEP_FOLDER.fullmatch(last.name) else step_folder(meta["step"])
    with atomic_folder(run) as partial:
        folder = partial / name
        folder.mkdir()
        try:
            save_file(weights, folder / WEIGHTS_FILE)
        except SafetensorError as error:
            raise CheckpointError(
                f"{run} could not be written ({error}); free space, or name another run"
            ) from error
        seal(folder, averaged)
    return run / name


def _first_weights(first: Path, last: Path) -> Mapping[str, Any]:
    """Return the record of the first weights of an average: that of both checkpoints if they began
    from the same weights, else one of the kind `average`, whose license is not certain.
    """
    one, other = (first_of(read_meta(folder)["first_weights"]) for folder in (first, last))
    if one and one == other:
        return one
    names = (f"{path.absolute().parent.name}/{path.absolute().name}" for path in (first, last))
    name = " and ".join(names)
    return {"kind": "average", "name": name, "sha256": "", "license": None, "first_weights": None}


def _what_computes(meta: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the settings `network` or `preprocess` of a checkpoint that change its outputs,
    without those that matter only in training.
    """
    if key == "preprocess":
        return dict(meta[key])
    training = ("pretrained", "init", "drop_path_rate", "freeze_bn", "freeze_backbone")
    return {name: value for name, value in meta["recipe"][key].items() if name not in training}
