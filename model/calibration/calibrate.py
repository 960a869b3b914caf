"""Calibrate a detector on validation sets: score the sets, fit one `Calibration` (temperature,
threshold, band) to all of them, and store it. On several ranks, all call each main entry, and all
get the same result; rank 0 writes.

`calibrate_checkpoint(checkpoint, folders, loading, device, *, rule, dist, features)` stores the
calibration in the checkpoint's `meta.json`, with the metrics of the sets at the new threshold, and
returns it.

- `checkpoint`: the `Path` of the checkpoint's folder.
- `folders`: packed sets of the split `val`, a list of at least one `Path` (`UPath` for an address).
- `loading`: a `Loading` (batch size, workers and more of the loader).
- `device`: the `torch.device` to score on.
- `rule`: how the threshold is fitted: "auto" (default: 0.5, or higher if needed for 5 % false
  positives at most), "fpr5", "fpr1" (at most 5 % or 1 % false positives) or "0.5"; or a
  `Calibrating` of `model/recipe.py`, whose `max_fpr`, `max_miss` and `threshold` are used.
- `dist`: this process's rank, a `DistEnv` (from `init_distributed()`); None (default): one process.
- `features`: None (default), or a `FeatureSource`: the place of stored features, which are scored
  instead of images.

`calibrate_other(detector, folders, runs, rule, dist)` does so for a third-party detector, an
`OtherDetector` (from `open_other()` of `model/adapters/open.py`), and returns the `Calibration` and
the `Path` of the file that it is stored in, below `runs` (the `Path` of the folder of all runs).

`with run_locked(checkpoint, dist):` keeps trainings from replacing the checkpoint meanwhile; it
raises `CalibrationError` if its run is being trained.

Both raise `CalibrationError`, before anything is scored if possible: for a detector that ships, an
ONNX file, a set of another split than `val`, too few images, or scores to which nothing can be
fitted. They raise `ShardError` for a set that cannot be opened, and as `score_all()` of
`model/evaluation/scoring.py`. All of these are `ValueError`s. `OSError` is raised if a file cannot
be read or (on rank 0) written.

`store_calibration(checkpoint, calibration, fitted_on, scored, dist)` stores a calibration that was
fitted otherwise. `fitted_on` is a dict of the sets that it was fitted to, name -> SHA-256 of the
set's `index.json` (`ShardSet.sha256`). `scored`, from `score_all()`, are the validation sets whose
metrics are stored. `scorer_of(checkpoint, loading, device, dist, features)` returns the
`CheckpointScorer` for them. `check_sets(sets, rule)` raises `CalibrationError` if opened sets (a
list of `ShardSet`s) have too few images.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from locks import locked
from model.adapters.calibration import calibration_path, keep_calibration
from model.adapters.detector import OtherDetector
from model.calibration.fit import (
    Calibration,
    CalibrationError,
    ThresholdAt,
    calibrate_by,
    check_images,
    check_validation_sets,
)
from model.checkpoint import annotate, check, load_network
from model.device import choose_precision, keep_freed_memory
from model.distributed import DistEnv, on_main
from model.evaluation.scoring import CheckpointScorer, DetectorScorer, score_all
from model.features.loader import FeatureSource
from model.inference.onnx_detector import OnnxDetector
from model.metrics import measure_sets
from model.recipe import LOCK_FILE, STEP_FOLDER, Calibrating
from model.score import Scores
from model.shipped.backbone import is_shipped
from model.verdict import temperature_of
from pipeline.loading import Loading
from sharding.format import ShardSet, hashes_of, open_shards
from sharding.lock import reading
from storage import AnyPath


def calibrate_checkpoint(
    checkpoint: Path,
    folders: Sequence[AnyPath],
    loading: Loading,
    device: torch.device,
    *,
    rule: ThresholdAt | Calibrating = "auto",
    dist: DistEnv | None = None,
    features: FeatureSource | None = None,
) -> Calibration:
    """Fit one calibration by `rule` to all validation sets, scored with a checkpoint, and store it
    in the checkpoint's `meta.json`.

    With `features`, stored features of the checkpoint's backbone are scored instead of images.
    Every rank calls this function; rank 0 writes.

    Raises:
        CalibrationError: the checkpoint is a shipped detector, a set has another split than `val`,
            two have the same name, or no calibration fits the scores; the checkpoint is unchanged.
    """
    dist = dist or DistEnv()
    if is_shipped(checkpoint):
        raise CalibrationError(
            f"{checkpoint} is a detector that ships, which is not changed; calibrate a copy: "
            f"`python -m model export --head FOLDER --checkpoint {checkpoint.name}`, then the same "
            "with --checkpoint FOLDER"
        )
    sets = _opened(folders, rule)
    with reading(*sets.values()):
        scored = score_all(sets, scorer_of(checkpoint, loading, device, dist, features))
    calibration = _fitted(rule, scored, temperature_of(check(checkpoint)))
    store_calibration(checkpoint, calibration, hashes_of(sets), scored, dist)
    return calibration


@contextlib.contextmanager
def run_locked(checkpoint: Path, dist: DistEnv) -> Iterator[None]:
    """Lock the run of a checkpoint until the block ends: a training would replace the checkpoint,
    and the calibration would be lost. Every rank calls this function; rank 0 locks.

    Raises:
        CalibrationError: the run is being trained.
    """
    run = checkpoint.parent
    busy = CalibrationError(
        f"{run} is being trained, and may replace {checkpoint.name} at any time; wait for the "
        "training to end, or calibrate a copy of the folder"
    )
    with contextlib.ExitStack() as held:
        if STEP_FOLDER.fullmatch(checkpoint.name) and (run / LOCK_FILE).exists():
            on_main(dist, lambda: held.enter_context(locked(run / LOCK_FILE, busy, shared=True)))
        yield


def calibrate_other(
    detector: OtherDetector | OnnxDetector,
    folders: Sequence[AnyPath],
    runs: Path,
    rule: ThresholdAt | Calibrating = "auto",
    dist: DistEnv | None = None,
) -> tuple[Calibration, Path]:
    """Calibrate a third-party detector on validation sets. Return the calibration and its file.

    One calibration is fitted to all sets by `rule` (`calibrate_by`) and is written below
    `runs`, where `model.adapters.open` reads it. With several ranks, every rank calls this and
    rank 0 writes.

    Raises:
        CalibrationError: a set is not of the split `val`, nothing can be fitted to the scores, or
            the detector is an ONNX file, which contains its calibration.
    """
    dist = dist or DistEnv()
    if not isinstance(detector, OtherDetector):
        raise CalibrationError(
            f"{detector.checkpoint} is an ONNX file, which contains its calibration; calibrate its "
            "checkpoint and export the file again"
        )
    sets = _opened(folders, rule)
    with reading(*sets.values()):
        scored = score_all(sets, DetectorScorer(detector, dist))
    calibration = _fitted(rule, scored, temperature_of(detector.meta))
    entries = calibration.entries(hashes_of(sets))
    on_main(dist, lambda: keep_calibration(detector, runs, entries))
    return calibration, calibration_path(detector, runs)


def scorer_of(
    checkpoint: Path,
    loading: Loading,
    device: torch.device,
    dist: DistEnv,
    features: FeatureSource | None = None,
) -> CheckpointScorer:
    """Load a checkpoint's network to `device`, to score validation sets with it."""
    net, preprocess, _ = load_network(checkpoint)
    keep_freed_memory(device)
    dtype, _ = choose_precision("auto", device)
    return CheckpointScorer(net.to(device), preprocess, device, dtype, dist, loading, features)


def store_calibration(
    checkpoint: Path,
    calibration: Calibration,
    fitted_on: Mapping[str, str],
    scored: Mapping[str, tuple[ShardSet, Scores]],
    dist: DistEnv,
) -> None:
    """Store a calibration in a checkpoint's `meta.json`, with the metrics of scored sets at its
    threshold (`calibrated_metrics`). `fitted_on` maps each set that it was fitted to, to the hash
    of its index.
    """
    metrics = measure_sets(scored, calibration.temperature, calibration.threshold)
    entries = calibration.entries(fitted_on) | {"calibrated_metrics": asdict(metrics)}
    on_main(dist, lambda: annotate(checkpoint, entries))


def _opened(folders: Sequence[AnyPath], rule: ThresholdAt | Calibrating) -> dict[str, ShardSet]:
    """Open validation sets, by name, whose images suffice for a calibration by `rule`.

    Raises:
        CalibrationError: a set is no validation set, or a class has too few images.
    """
    check_validation_sets(folders)
    sets = {folder.name: open_shards([folder]) for folder in folders}
    check_sets([*sets.values()], rule)
    return sets


def check_sets(sets: Sequence[ShardSet], rule: ThresholdAt | Calibrating) -> None:
    """Refuse opened sets that have too few images for a calibration by `rule`.

    Raises:
        CalibrationError: as `check_images`.
    """
    labels = np.concatenate([shards.column("label") for shards in sets])
    sources = [name for shards in sets for name in shards.names("source", np.arange(len(shards)))]
    check_images(labels, rule, np.array(sources))


def _fitted(
    rule: ThresholdAt | Calibrating,
    scored: Mapping[str, tuple[ShardSet, Scores]],
    earlier: float | None,
) -> Calibration:
    """Fit one calibration to all scored sets. `earlier` is as in `calibrate_by`."""
    labels, logits = (
        np.concatenate([getattr(scores, part) for _, scores in scored.values()])
        for part in ("labels", "logits")
    )
    sources = [
        name
        for shards, scores in scored.values()
        for name in shards.names("source", scores.samples)
    ]
    return calibrate_by(rule, labels, logits, np.array(sources), earlier)
