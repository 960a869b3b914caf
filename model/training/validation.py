"""Score the validation sets during training, to choose the best checkpoint, and calibrate a
checkpoint. On several ranks, all call both main entries, and all get the same result.

`validate(train_state, sets, preprocess, loading, features)` returns a `Validation`: `sets` (name ->
`Metrics`), `sources` ("set/source" -> `Metrics`), and `selection`, by which the best checkpoint is
chosen: the mean over the sets of the balanced accuracy (the accuracy if a set has one class only).

- `train_state`: the `TrainState` of the run (`assemble()` in `assemble.py`).
- `sets`: a dict, name -> `ShardSet`, as `open_validation()` in `sets.py` returns.
- `preprocess`: a `Preprocess`, the `preprocess` of a `ResolvedRecipe`.
- `loading`: a `Loading` (batch size, workers and more of the loader), such as `recipe.loading`.
- `features`: None (the default), or a `FeatureSource`: the place of stored features, which are
  scored instead of images (`model/training/assemble.py`).

`calibrate_checkpoint(checkpoint, folders, loading, device, *, rule, dist, features, fitted)` scores
the sets, fits one `Calibration` (temperature and thresholds) to all of them and returns it. Rank 0
stores it in the checkpoint's `meta.json`, with the metrics of the sets at the new threshold. It
raises `CalibrationError` if none fits or a set is no validation set. `loading` and `features` are
as above. The last four may be left out.

- `checkpoint`: the `Path` of the checkpoint's folder.
- `folders`: a list of `Path`s (or `UPath`s) of the validation sets.
- `device`: the `torch.device` to score on.
- `rule`: how the threshold is fitted: "fpr5" or "fpr1" (5 % or 1 % false positives), "0.5", "auto"
  (the default: the larger of "fpr5" and "0.5"), or the recipe's `Calibrating`.
- `dist`: a `DistEnv` (from `init_distributed()`); None: one process.
- `fitted`: None (the default): fit a calibration. Else a pair: an existing `Calibration`, which is
  stored and returned, and a dict of the sets that it was fitted to, name -> SHA-256 of the set's
  `index.json` (`ShardSet.sha256`). Then `rule` is not used, and the sets of `folders` are scored
  only for their metrics.

Both main entries raise `ValueError` or a subclass for sets, scores or a checkpoint that cannot be
used. `calibrate_checkpoint()` raises `OSError` if a file cannot be read, or (on rank 0) `meta.json`
cannot be written. `Gain` has the `highest` selection so far, the `step` that reached it first, and
`validations_since`. Its `after(step, selection)` returns the `Gain` after one more validation.

`Best` is a run's best checkpoint so far and its `Validation`; `better(best, new)` returns the
better of two. `write_validation(path, validation)` writes a `Validation` to a JSON file (`Path`),
and `read_validation(path)` returns it. It raises `ValueError` for a missing or damaged file.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from escape import text_fault
from model.calibration.fit import (
    Calibration,
    CalibrationError,
    ThresholdAt,
    calibrate_by,
    check_validation_sets,
)
from model.checkpoint import annotate, load_network
from model.device import choose_precision, keep_freed_memory
from model.distributed import DistEnv, on_main
from model.features.loader import FeatureSource, open_scored
from model.metrics import Validation, measure_sets
from model.recipe import Calibrating
from model.score import score_set
from model.shipped.backbone import is_shipped
from model.training.step import TrainState
from pipeline.loading import Loading
from pipeline.preprocess import Preprocess
from sharding.format import ShardSet, open_shards
from storage import AnyPath, parse_json, read_text, write_text


@dataclass(frozen=True, kw_only=True)
class Best:
    """Best checkpoint of a run so far, and its validation (None if it has none)."""

    path: Path
    validation: Validation | None


def better(best: Best | None, new: Best) -> Best:
    """Return the checkpoint with the higher selection figure; the new one if the figures are equal.
    A checkpoint without a validation is worse than any with one.
    """
    if best is None or best.validation is None:
        return new
    if new.validation is None or new.validation.selection < best.validation.selection:
        return best
    return new


@dataclass(frozen=True)
class Gain:
    """Highest selection figure of a run so far, the step that reached it first, and the number of
    validations since then. An equal figure is no gain.
    """

    highest: float | None = None
    step: int = 0
    validations_since: int = 0

    def after(self, step: int, selection: float) -> "Gain":
        """Return the record after the validation of `step`."""
        if self.highest is None or selection > self.highest:
            return Gain(selection, step)
        return Gain(self.highest, self.step, self.validations_since + 1)


def validate(
    train_state: TrainState,
    sets: Mapping[str, ShardSet],
    preprocess: Preprocess,
    loading: Loading,
    features: FeatureSource | None = None,
) -> Validation:
    """Score every validation set, on all ranks together.

    The selection figure is the mean over the sets of the balanced accuracy, or of the accuracy if a
    set has one class only. AUROC is not used, because it can be high for a checkpoint that calls
    every image fake. With `features`, stored features are scored instead of images.
    """
    dist = train_state.dist
    scored = {}
    for name, shards in sets.items():
        with open_scored(
            shards, preprocess, loading, train_state.device, dist=dist, features=features
        ) as loader:
            scores = score_set(train_state.shown, loader, train_state.dtype, dist=dist)
        scored[name] = shards, scores
    return measure_sets(scored)


def write_validation(path: Path, validation: Validation) -> None:
    """Write the metrics before training, which a resumed run compares with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(validation), indent=1) + "\n")


def read_validation(path: Path) -> Validation:
    """Read the validation that `write_validation` wrote.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        return Validation.from_json(parse_json(read_text(path)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} has no readable metrics of the initial detector ({text_fault(error)}); "
            "restore the file from a copy, or use --run NAME for a new run"
        ) from error


def calibrate_checkpoint(
    checkpoint: Path,
    folders: Sequence[AnyPath],
    loading: Loading,
    device: torch.device,
    *,
    rule: ThresholdAt | Calibrating = "auto",
    dist: DistEnv | None = None,
    features: FeatureSource | None = None,
    fitted: tuple[Calibration, Mapping[str, str]] | None = None,
) -> Calibration:
    """Score validation sets with a checkpoint, fit one calibration to all of them by `rule`, and
    store it in the checkpoint's `meta.json` with the metrics of the sets at the new threshold
    (`calibrated_metrics`).

    With `features`, stored features of the checkpoint's backbone are scored instead of images. With
    `fitted`, a calibration and the index hash of each set that it was fitted on, the sets are only
    measured. Every rank calls this function; rank 0 writes.

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
    check_validation_sets(folders)
    net, preprocess, _ = load_network(checkpoint)
    keep_freed_memory(device)
    dtype, _ = choose_precision("auto", device)
    net.to(device)
    sources: list[str] = []
    scored, hashes = {}, {}
    for folder in folders:
        shards = open_shards([folder])
        with open_scored(
            shards, preprocess, loading, device, dist=dist, features=features
        ) as loader:
            scores = score_set(net, loader, dtype, dist=dist)
        scored[folder.name] = shards, scores
        sources += shards.names("source", scores.samples)
        hashes[folder.name] = shards.sha256
    labels, logits = (
        np.concatenate([getattr(scores, name) for _, scores in scored.values()])
        for name in ("labels", "logits")
    )
    calibration, fitted_on = fitted or (
        calibrate_by(rule, labels, logits, np.array(sources)),
        hashes,
    )
    calibrated = measure_sets(scored, calibration.temperature, calibration.threshold)
    entries = calibration.entries(fitted_on) | {"calibrated_metrics": asdict(calibrated)}
    on_main(dist, lambda: annotate(checkpoint, entries))
    return calibration
