"""Score shard sets (packed images) with a detector that is not a checkpoint (a third-party detector
or an ONNX file), and calibrate a third-party detector.

Main entry: `score_shards(detector, shards, dist, on_images)` scores every image of a set.

- `detector`: an `OtherDetector` or `OnnxDetector`, from `open_other()` of `model/adapters/open.py`.
- `shards`: the opened set, from `open_shards([folder])`.
- `dist`: this process's rank, a `DistEnv`. None (default): a single process. All ranks must call a
  function that takes it, and all get the same result.
- `on_images`: None (default), or a function that is called after each batch with the number of
  images that this process did since its last call.

It returns `Scores`, three arrays with one value per image and a dict:

- `samples`: row numbers in the set, rising.
- `labels`: 0 real, 1 fake.
- `logits`: float32, the logit of fake minus that of real, before the temperature.
- `failures`: row number -> reason, for each image that could not be decoded or has no finite score.
  These images are not in the arrays.

It raises `DetectorError` if the detector is a Python file whose function fails, or returns
something else than one number from 0 to 1 (or NaN) per image.

Main entry: `calibrate_other(detector, folders, runs, rule, dist)` scores validation sets and fits
one `Calibration` (temperature, threshold, band) to all; `detector` and `dist` are as above.

- `folders`: packed sets of the split `val`, a list of at least one `Path` (`UPath` for an address).
- `runs`: the `Path` of the folder of all runs. Rank 0 writes the file in a subfolder of it.
- `rule`: "auto" (default: 0.5, or higher if needed for 5 % false positives at most), "fpr5", "fpr1"
  (at most 5 % or 1 % false positives) or "0.5"; or a `Calibrating` of `model/recipe.py`, whose
  `max_fpr`, `max_miss` and `threshold` are used.

It returns the `Calibration` and the `Path` of its file. It raises `CalibrationError` for an ONNX
file, a set of another split than `val`, or scores to which nothing can be fitted; `DetectorError`
as above; and `ShardError` for a set that cannot be opened. All of these are `ValueError`s.

For the robustness test, which calls their `prepare()` and `column()`: `Scorer(net, preprocess,
device, dtype, dist)` wraps a checkpoint's network and `DetectorScorer(detector, dist)` any other
detector. `net` and `preprocess` come from `load_network()`, `net` is already on `device` (a
`torch.device`), and `dtype` is a torch dtype (default float32).

`logits_in_batch(detector, prepared)` returns the logits of a list of at most `AT_A_TIME`
preprocessed images, padded if their number affects the scores.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

import console
from model.adapters.detector import OtherDetector
from model.adapters.kept import calibration_path, keep_calibration
from model.calibration.fit import (
    Calibration,
    CalibrationError,
    ThresholdAt,
    calibrate_by,
    check_validation_sets,
)
from model.distributed import DistEnv, all_gather_object, on_main
from model.inference.onnx_detector import OnnxDetector
from model.inference.prediction import in_groups
from model.recipe import Calibrating
from model.score import AT_A_TIME, Scores, evaluating, join_ranks, logits_of
from model.verdict import NOT_FINITE
from pipeline import pil
from pipeline.preprocess import Preprocess
from pipeline.read import ShardReader
from sharding.format import ShardSet, open_shards
from storage import AnyPath


class Scoring(Protocol):
    """Interface of `OtherDetector` and `OnnxDetector` for scoring."""

    @property
    def fixed_batches(self) -> bool:
        """Whether the last bits of a score depend on the batch size."""

    def prepare(self, pixels: np.ndarray) -> Any:
        """Return the input of `logits` for one image, uint8 (height, width, 3) RGB."""

    def logits(self, prepared: Sequence[Any]) -> np.ndarray:
        """Return the logits of preprocessed images, before the temperature: float32 (B,)."""


class _Sample(NamedTuple):
    name: str
    row: int


def score_shards(
    detector: Scoring,
    shards: ShardSet,
    dist: DistEnv | None = None,
    on_images: Callable[[int], None] | None = None,
) -> Scores:
    """Score every sample of a set exactly once, in batches of `AT_A_TIME`, divided over the ranks.
    Every rank returns the scores of all samples. A sample without a finite score is a failure.
    """
    dist = dist or DistEnv()
    reader = ShardReader(shards)
    rows = np.arange(dist.rank, len(shards), dist.world_size)

    def prepare(sample: _Sample) -> Any:
        return detector.prepare(reader.pixels(sample.row))

    samples = (_Sample(str(row), int(row)) for row in rows)
    logits = np.full(len(shards), np.nan, np.float32)
    failures: dict[int, str] = {}
    for names, prepared in in_groups(samples, prepare, itertools.repeat(AT_A_TIME)):
        of_group = [int(name) for name in names]
        failed = {row: item for row, item in zip(of_group, prepared, strict=True)
                  if isinstance(item, str)}  # fmt: skip
        failures |= failed
        kept = [row for row in of_group if row not in failed]
        if kept:
            logits[kept] = logits_in_batch(
                detector, [item for item in prepared if not isinstance(item, str)]
            )
        failures |= {row: NOT_FINITE for row in kept if not np.isfinite(logits[row])}
        if on_images:
            on_images(len(of_group))
    own = np.array([row for row in rows.tolist() if row not in failures], np.int64)
    scores = Scores(own, shards.column("label")[own].astype(np.int64), logits[own], failures)
    return join_ranks(all_gather_object(dist, scores))


def logits_in_batch(detector: Scoring, prepared: Sequence[Any]) -> np.ndarray:
    """Return the logits of at most `AT_A_TIME` images, float32 (B,).

    If the last bits depend on the batch size, a smaller batch is padded with its last image. So the
    scores do not depend on the number of ranks.
    """
    if not detector.fixed_batches:
        return detector.logits(prepared)
    filling = [prepared[-1]] * (AT_A_TIME - len(prepared))
    return detector.logits([*prepared, *filling])[: len(prepared)]


@dataclass(frozen=True)
class Scorer:
    """A checkpoint's network as a `VariantScorer`: preprocessing, device, precision and ranks."""

    net: nn.Module
    preprocess: Preprocess
    device: torch.device
    dtype: torch.dtype = torch.float32
    dist: DistEnv = field(default_factory=DistEnv)

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Preprocess an image, uint8 (height, width, 3), to uint8 (*preprocess.shape, 3)."""
        return pil.preprocess(pixels, self.preprocess)

    def column(self, variants: Sequence[np.ndarray | str]) -> np.ndarray:
        """Return the logits of all variants of one image, float32 (D,), computed as one batch. A
        variant that is a reason (a string) gets NaN.
        """
        made = [variant for variant in variants if not isinstance(variant, str)]
        blank = np.zeros(made[0].shape if made else (1, 1, 3), np.uint8)
        pixels = np.stack([blank if isinstance(v, str) else v for v in variants])
        images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)
        with evaluating(self.net):
            logits = logits_of(self.net, images, self.device, self.dtype).cpu().numpy()
        logits[[isinstance(variant, str) for variant in variants]] = np.nan
        return logits


@dataclass(frozen=True)
class DetectorScorer:
    """A detector that is not a checkpoint, as a `VariantScorer` of `robustness.py`."""

    detector: Scoring
    dist: DistEnv = field(default_factory=DistEnv)

    def prepare(self, pixels: np.ndarray) -> Any:
        """Preprocess an image, uint8 (height, width, 3), as the detector does."""
        return self.detector.prepare(pixels)

    def column(self, variants: Sequence[Any]) -> np.ndarray:
        """Return the logits of all variants of one image, float32 (D,). A variant that is a reason
        (a string) gets NaN.
        """
        rows = [row for row, variant in enumerate(variants) if not isinstance(variant, str)]
        logits = np.full(len(variants), np.nan, np.float32)
        for first in range(0, len(rows), AT_A_TIME):
            part = rows[first : first + AT_A_TIME]
            logits[part] = self.detector.logits([variants[row] for row in part])
        return logits


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
    check_validation_sets(folders)
    labels, logits, sources, hashes = [], [], list[str](), {}
    for folder in folders:
        shards = open_shards([folder])
        with console.progress(f"scoring {folder.name}", len(shards), dist.is_main) as advance:
            scores = score_shards(
                detector, shards, dist, lambda done: advance(done * dist.world_size)
            )  # fmt: skip
        labels.append(scores.labels)
        logits.append(scores.logits)
        sources += shards.names("source", scores.samples)
        hashes[folder.name] = shards.sha256
    calibration = calibrate_by(
        rule, np.concatenate(labels), np.concatenate(logits), np.array(sources)
    )
    path = calibration_path(detector, runs)
    on_main(dist, lambda: keep_calibration(detector, runs, calibration.entries(hashes)))
    return calibration, path
