"""Plan an evaluation: what is scored, and whatever can be refused is, before a network is loaded.

`model/evaluation/run.py` scores what an `EvaluationPlan` says and reports on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch

from model import checkpoint as checkpoints
from model.adapters.detector import OtherDetector
from model.device import choose_device, choose_precision
from model.distributed import DistEnv
from model.inference.onnx_detector import OnnxDetector
from pipeline.loader import choose_backend
from pipeline.loading import Loading
from pipeline.subset import Subset, choose_samples
from sharding.catalog import SHIPPED, read_catalog
from sharding.format import CLASSES, ShardSet, open_shards, read_index
from storage import AnyPath

REAL = CLASSES.index("real")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How sets are scored, and what else is. `reference_reals` names the set whose real images give
    the others their false-positive rate, `robustness` is how many images of each class are scored
    once more through every robustness. `features` is a store whose features are scored in place of
    images, and computed where they are missing; for checkpoints with a frozen backbone.
    """

    loading: Loading = field(default_factory=Loading)
    device: str = "auto"
    subset: Subset | None = None
    reference_reals: str | None = None
    robustness: int = 0
    features: Path | None = None


class Reals(TypedDict):
    """The set whose real images are the reference, why, and whether for sets with reals as well."""

    set: str
    why: str
    for_all: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedSet:
    """The samples of a set that are scored, and the hash and split of the whole set. One that is
    not `measured` is there for its real images only.
    """

    shards: ShardSet
    index_sha256: str
    split: str
    measured: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationPlan:
    """What an evaluation will do, on this rank. Made by `plan`; `meta` is that of the checkpoint or
    of the `detector` that is none, `sets` are in the order in which they are scored.
    """

    checkpoint: Path
    detector: OtherDetector | OnnxDetector | None
    meta: Mapping[str, Any] = field(repr=False)
    sets: Mapping[str, PlannedSet] = field(repr=False)
    reference: Reals | None
    options: Options
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str
    backend: str
    backend_reason: str
    dist: DistEnv

    @property
    def trained_on(self) -> list[str]:
        """The sets, of those that are measured or give their reals, that the checkpoint was trained
        on, by the hash of their index, whatever they are called.
        """
        return trained_on(self.meta, {name: s.index_sha256 for name, s in self.sets.items()})

    @property
    def measured(self) -> dict[str, PlannedSet]:
        """The sets that the report is about."""
        return {name: planned for name, planned in self.sets.items() if planned.measured}


def plan(
    subject: Path | OtherDetector | OnnxDetector,
    data: AnyPath,
    names: Sequence[str],
    options: Options,
    dist: DistEnv | None = None,
) -> EvaluationPlan:
    """Open and check all that scoring `names` (sets below `data`) by a checkpoint or another
    detector needs; nothing is written.

    Raises:
        ValueError: no such set, sample, real image, checkpoint or device, or stored features for a
            detector that is no checkpoint; the message says what to do.
    """
    dist = dist or DistEnv()
    detector = None if isinstance(subject, Path) else subject
    if detector and options.features:
        raise ValueError(
            f"stored features are those of a checkpoint's backbone; {detector.checkpoint} is "
            "scored on images: leave --features out"
        )
    sets = {name: _open(data, name, options.subset) for name in names}
    reference = choose_reference(
        data, {name: s.shards for name, s in sets.items()}, options.reference_reals
    )
    if reference and reference["set"] not in sets:
        sets[reference["set"]] = _open_reals(data, reference["set"])
    device = choose_device(options.device, dist.local_rank)
    dtype, dtype_reason = choose_precision("auto", device)
    backend, backend_reason = choose_backend(options.loading.backend, device)
    if detector:
        backend, backend_reason = detector.backend, detector.reason
    return EvaluationPlan(
        checkpoint=subject if isinstance(subject, Path) else subject.checkpoint,
        detector=detector,
        meta=checkpoints.check(subject) if isinstance(subject, Path) else subject.meta,
        sets=sets,
        reference=reference,
        options=options,
        device=device,
        dtype=dtype,
        dtype_reason=dtype_reason,
        backend=backend,
        backend_reason=backend_reason,
        dist=dist,
    )


def trained_on(meta: Mapping[str, Any], hashes: Mapping[str, str]) -> list[str]:
    """Which of some sets (name -> hash of the index) a checkpoint with this `meta` was trained on,
    replayed ones too.
    """
    data = meta["data"]
    known = {*data.get("set_sha256", {}).values(), data.get("index_sha256")}
    return [name for name, sha256 in hashes.items() if sha256 in known]


def _open(data: AnyPath, name: str, subset: Subset | None) -> PlannedSet:
    """A set that is measured, or those of its samples that the subset lists."""
    whole = open_shards([data / name])
    return PlannedSet(
        shards=choose_samples(whole, name, subset) if subset else whole,
        index_sha256=whole.sha256,
        split=read_index(data / name)["split"],
    )


def _open_reals(data: AnyPath, name: str) -> PlannedSet:
    """The real images of a set that is not measured itself."""
    whole = open_shards([data / name])
    return PlannedSet(
        shards=whole.take(np.flatnonzero(whole.column("label") == REAL)),
        index_sha256=whole.sha256,
        split=read_index(data / name)["split"],
        measured=False,
    )


def choose_reference(
    data: AnyPath, opened: Mapping[str, ShardSet], asked: str | None
) -> Reals | None:
    """The set whose real images are the reference, and why; see `model/evaluation/report.py`.

    Recall without a false-positive rate says nothing, so a set without real images gets those of
    the set that the catalog names for it (`[reference]`), if it is at hand.

    Raises:
        ValueError: the set that was asked for has no real images.
    """
    if asked:
        if not _count_reals(data, asked):
            raise ValueError(
                f"--reference-reals {asked}: that set has no real images; name one that has"
            )
        return {"set": asked, "why": "--reference-reals", "for_all": True}
    defaults = read_catalog(SHIPPED).reference
    for name, shards in opened.items():
        other = defaults.get(name)
        if (shards.column("label") == REAL).any() or other is None:
            continue
        if (data / other / "index.json").exists() and _count_reals(data, other):
            return {"set": other, "why": "the catalog's default", "for_all": False}
    return None


def _count_reals(data: AnyPath, name: str) -> int:
    labels = open_shards([data / name]).column("label")
    return int((labels == REAL).sum())
