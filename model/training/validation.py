"""Validation: a network over the sets that choose the best checkpoint, and calibrate it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.calibrate import Calibration, ThresholdAt, calibrate, check_validation_sets
from model.checkpoint import annotate, load_network
from model.device import choose_precision, keep_freed_memory
from model.distributed import DistEnv
from model.features.loader import FeatureSource, open_scored
from model.metrics import Metrics, measure, measure_sources
from model.score import DEFAULT_THRESHOLD, Scores, probability, score_set
from model.training.forgetting import accuracy_of
from model.training.step import TrainState
from pipeline.augment import Preprocess
from pipeline.loading import Loading
from sharding.format import ShardSet, open_shards
from storage import AnyPath, write_text


@dataclass(frozen=True)
class Validation:
    """Metrics per set and per `set/source`, and the figure that picks the best checkpoint."""

    sets: dict[str, Metrics]
    sources: dict[str, Metrics]
    selection: float

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Validation":
        """What `asdict` made of one, as `meta.json` and `baseline_metrics.json` hold it."""
        sets, sources = (
            {name: Metrics(**metrics) for name, metrics in saved[kind].items()}
            for kind in ("sets", "sources")
        )
        return cls(sets, sources, saved["selection"])


@dataclass(frozen=True)
class Gain:
    """The highest selection figure of a run so far, the step that had it first, and how many
    validations there were since. A figure that is equal is no gain.
    """

    highest: float | None = None
    step: int = 0
    validations_since: int = 0

    def after(self, step: int, selection: float) -> "Gain":
        """What it is after the validation of `step`."""
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
    """Score every validation set, on all ranks together. In the selection figure each set counts
    alike, by its balanced accuracy, or by its accuracy where it has one class only: not by its
    AUROC, which does not see a checkpoint that calls everything fake. With `features` stored ones
    are scored instead of images.
    """
    dist = train_state.dist
    scored = []
    for name, shards in sets.items():
        loader = open_scored(
            shards, preprocess, loading, train_state.device, dist=dist, features=features
        )
        scores = score_set(train_state.shown, loader, train_state.dtype, dist=dist)
        scored.append((name, shards, scores))
    return _measured(scored)


def _measured(
    scored: Sequence[tuple[str, ShardSet, Scores]],
    temperature: float = 1.0,
    threshold: float = DEFAULT_THRESHOLD,
) -> Validation:
    """The metrics of sets and their scores, by the probabilities at a temperature."""
    by_set: dict[str, Metrics] = {}
    sources: dict[str, Metrics] = {}
    for name, shards, scores in scored:
        probabilities = probability(scores.logits, temperature)
        by_set[name] = measure(scores.labels, probabilities, threshold)
        by_source = measure_sources(
            scores.labels, probabilities, shards.names("source", scores.samples), threshold
        )
        sources |= {f"{name}/{source}": metrics for source, metrics in by_source.items()}
    return Validation(by_set, sources, float(np.mean([accuracy_of(m) for m in by_set.values()])))


def remembered(path: Path, find: Callable[[], Validation], first: bool) -> Validation:
    """What `find` finds, from `path` if it was found before; the first rank writes it there."""
    if path.exists():
        return read_validation(path)
    validation = find()
    if first:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(validation), indent=1) + "\n")
    return validation


def read_validation(path: Path) -> Validation:
    """What `remembered` wrote.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return Validation.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to measure again") from error


def calibrate_checkpoint(
    checkpoint: Path,
    folders: Sequence[AnyPath],
    loading: Loading,
    device: torch.device,
    *,
    threshold_at: ThresholdAt = "auto",
    dist: DistEnv | None = None,
    features: FeatureSource | None = None,
    fitted: tuple[Calibration, Mapping[str, str]] | None = None,
) -> Calibration:
    """Score validation sets with a checkpoint, fit to all of them together, and keep what was found
    in its `meta.json`, with the metrics of the sets at the threshold that was found
    (`calibrated_metrics`). With `features`, those of its backbone, stored ones are scored, not
    images. With `fitted`, a calibration and the hash of each set that it was fitted on, nothing is
    fitted, and the sets are measured only. On many ranks each calls this; the first one writes.

    Raises:
        CalibrationError: a set that is not of the split `val`, or scores that nothing fits to; the
            checkpoint is as it was.
    """
    dist = dist or DistEnv()
    check_validation_sets(folders)
    net, preprocess, _ = load_network(checkpoint)
    keep_freed_memory(device)
    dtype, _ = choose_precision("auto", device)
    net.to(device)
    scored, hashes = [], {}
    for folder in folders:
        shards = open_shards([folder])
        loader = open_scored(shards, preprocess, loading, device, dist=dist, features=features)
        scored.append((folder.name, shards, score_set(net, loader, dtype, dist=dist)))
        hashes[folder.name] = shards.sha256
    labels, logits = (
        np.concatenate([getattr(scores, name) for _, _, scores in scored])
        for name in ("labels", "logits")
    )
    calibration, fitted_on = fitted or (calibrate(labels, logits, threshold_at), hashes)
    if dist.is_main:
        calibrated = _measured(scored, calibration.temperature, calibration.threshold)
        entries = calibration.entries(fitted_on) | {"calibrated_metrics": asdict(calibrated)}
        annotate(checkpoint, entries)
    return calibration
