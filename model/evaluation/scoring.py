"""Score shard sets (packed images) with any detector: a checkpoint, an ONNX file or a third-party
detector.

Main entry: `score_all(sets, scorer, verb)` scores every image of some sets, under a progress bar
that is named after `verb` (default "scoring") and the set. All ranks must call it, and all get the
same result: a dict, name -> a pair of the `ShardSet` and its `Scores`. `sets` is a dict, name ->
opened set, from `open_shards([folder])`. `scorer` is one of these; its `score(shards, label)`
scores one set:

- `CheckpointScorer(net, preprocess, device, dtype, dist, loading, features, quiet)` for a
  checkpoint. `net` and `preprocess` come from `load_network()`, and `net` is already on `device` (a
  `torch.device`). Optional: `dtype`, a torch dtype (default float32); `dist`, this process's rank
  (`DistEnv`; default: a single process); `loading`, a `Loading` (batch size, workers); `features`,
  a `FeatureSource`: stored features are scored instead of images; `quiet`: true if no line is
  logged on how images are decoded.
- `DetectorScorer(detector, dist)` for an `OtherDetector` or `OnnxDetector`, from `open_other()` of
  `model/adapters/open.py`.

`Scores` has three arrays with one value per image and a dict:

- `samples`: row numbers in the set, rising.
- `labels`: 0 real, 1 fake.
- `logits`: float32, the logit of fake minus that of real, before the temperature.
- `failures`: row number -> reason, for each image that could not be decoded or, by a detector that
  is not a checkpoint, has no finite score. These images are not in the arrays.

A checkpoint's score that is not finite raises `ScoreError` instead, and images or features that
cannot be loaded raise `LoadError` or `FeatureError`. `DetectorError` is raised if the detector is a
Python file whose function fails, or returns something else than one number from 0 to 1 (or NaN) per
image. All are `ValueError`s.

Both scorers also have `prepare()` and `column()` for the robustness test.

`score_shards(detector, shards, dist, on_images)` returns the `Scores` of one set by such a detector
without a bar. `on_images` is None (default), or a function that is called after each batch with the
number of images that this process did since its last call. `rank_progress(label, total, dist)` is a
context manager that shows a bar for all ranks together and yields such a function.
`logits_in_batch(detector, prepared)` returns the logits of a list of at most `AT_A_TIME`
preprocessed images, padded if their number affects the scores.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

import console
from model.distributed import DistEnv, all_gather_object
from model.features.loader import FeatureSource, open_scored
from model.inference.prediction import in_groups
from model.score import AT_A_TIME, Scores, evaluating, join_ranks, logits_of, score_set
from model.verdict import NOT_FINITE
from pipeline import pil
from pipeline.loading import Loading
from pipeline.preprocess import Preprocess
from pipeline.read import ShardReader
from sharding.format import ShardSet


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


@contextlib.contextmanager
def rank_progress(label: str, total: int, dist: DistEnv) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on rank 0 for work that the ranks share; yields a function that takes the
    number of images this rank has done since its last call.
    """
    with console.progress(label, total, dist.is_main) as advance:
        yield lambda done: advance(done * dist.world_size)


@dataclass(frozen=True)
class CheckpointScorer:
    """A checkpoint's network for scoring whole sets, and as a `VariantScorer` of `robustness.py`:
    preprocessing, device, precision, ranks, and how images or stored `features` are loaded.
    """

    net: nn.Module
    preprocess: Preprocess
    device: torch.device
    dtype: torch.dtype = torch.float32
    dist: DistEnv = field(default_factory=DistEnv)
    loading: Loading = field(default_factory=Loading)
    features: FeatureSource | None = None
    quiet: bool = False

    def score(self, shards: ShardSet, label: str) -> Scores:
        """Score every sample of a set exactly once, on all ranks together."""
        with (
            open_scored(
                shards, self.preprocess, self.loading, self.device,
                dist=self.dist, features=self.features,
            ) as loader,
            rank_progress(label, len(shards), self.dist) as on_images,
        ):  # fmt: skip
            if not self.quiet:
                console.log.info("%s: images through %s (%s)", label, loader.backend, loader.reason)
            return score_set(self.net, loader, self.dtype, on_images, self.dist)

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
    """A detector that is not a checkpoint, for scoring whole sets, and as a `VariantScorer` of
    `robustness.py`.
    """

    detector: Scoring
    dist: DistEnv = field(default_factory=DistEnv)

    def score(self, shards: ShardSet, label: str) -> Scores:
        """Score every sample of a set exactly once, on all ranks together."""
        with rank_progress(label, len(shards), self.dist) as on_images:
            return score_shards(self.detector, shards, self.dist, on_images)

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


AnyScorer = CheckpointScorer | DetectorScorer


def score_all(
    sets: Mapping[str, ShardSet], scorer: AnyScorer, verb: str = "scoring"
) -> dict[str, tuple[ShardSet, Scores]]:
    """Score every sample of some sets; `sets` and the result are by name."""
    return {name: (shards, scorer.score(shards, f"{verb} {name}")) for name, shards in sets.items()}
