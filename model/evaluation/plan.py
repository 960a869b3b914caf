"""Plan an evaluation: open the shard sets (packed images) and check all input before any network is
loaded.

Main entry: `plan(subject, data, names, options, dist)` opens and checks everything. One check comes
later: whether the backbone is frozen, which `features` needs.

- `subject`: the folder of a checkpoint (a `Path`, not a text), or an `OtherDetector` or
  `OnnxDetector` from `open_other()` of `model/adapters/open.py`.
- `data`: the folder of all packed sets, a `Path` (not a text), or a `UPath` for an address.
- `names`: a list of the names of the sets to score, which are folders in `data`.
- `options`: an `Options`, below. `Options()` has the defaults.
- `dist`: this process's rank (`DistEnv`; None, the default, for a single process).

It returns an `EvaluationPlan`, which `model/evaluation/run.py` executes. Its fields include `sets`
(a dict, name -> `PlannedSet`, in scoring order, including those of `references`), `measured` (those
of them that the report covers), `references` (a dict, name of a measured set -> `Reals`, without
the sets that use their own real images), `meta` (a dict), `device`, `dtype` (precision) and
`backend` (the decoder, "pil" or "dali"). It raises `ValueError` if a set, sample, checkpoint or
device does not exist or does not fit, and `OSError` if a file cannot be read. It writes nothing.

All fields of `Options` are set by keyword:

- `device`: `auto` (default), `cpu`, `cuda` or `cuda:N`.
- `loading`: a `Loading` of `pipeline/loading.py` (batch size, decoding).
- `subset`: the only samples to score, a `Subset` from `read_subset(file)`, or None (default: all).
- `reference_reals`: the name of a set, on whose real images the false-positive rate of all sets is
  measured. None (default): each set is measured on its own real images. If a set has none, the
  catalogs may name another set for it, whose real images serve instead if that set is packed in
  `data`.
- `catalogs`: `Path`s of the user's own catalogs (default: none), besides those of this program.
- `robustness`: images per class for the robustness test (default 0: none).
- `features`: the folder of stored features (a `Path`), for a checkpoint with a frozen backbone, or
  None (default). With them `dtype` is the precision that the recipe of the run asks for.

A `PlannedSet` is one set: `shards` (the samples to score, a `ShardSet`), `index_sha256` and `split`
of the whole set, and `measured` (False if only its real images are used). `Reals` is a dict about
the set whose real images give the false-positive rate of another: `set` (its name) and `why` (a
text). `choose_references(data, opened, asked, catalogs)` returns a dict, name of a set -> its
`Reals`, without the sets that need none or for which none is known: `opened` is a dict, name ->
opened set, `asked` is as `reference_reals`. `open_reals(data, name)` opens the real images of a
set, as a `PlannedSet`. `REAL` is the label of real images, 0. `trained_on(meta, hashes)` takes a
detector's meta and a dict, set name -> hash. It returns the names of sets that the detector was
trained on, also by an earlier run whose weights it began from. `maybe_trained_on(meta, hashes)`
returns the names of the others that have the name of a set that it was trained on, but another
hash.
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
from model.inference.fitness import generators_seen, sets_seen
from model.inference.onnx_detector import OnnxDetector
from pipeline.loader import choose_backend
from pipeline.loading import Loading
from pipeline.subset import Subset, choose_samples
from sharding.catalog import SHIPPED, read_catalog
from sharding.format import CLASSES, INDEX_FILE, ShardSet, open_shards, read_index
from storage import AnyPath

REAL = CLASSES.index("real")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of an evaluation.

    `reference_reals` names the set whose real images give all sets their false-positive rate.
    Without it, `catalogs` of the user may name a set for each set without real images.
    `robustness` is the number of images per class that are re-scored under each perturbation.
    `features` is the folder of a feature store: stored features are scored in place of images, and
    missing features are computed. Only for checkpoints with a frozen backbone.
    """

    loading: Loading = field(default_factory=Loading)
    device: str = "auto"
    subset: Subset | None = None
    reference_reals: str | None = None
    catalogs: Sequence[Path] = ()
    robustness: int = 0
    features: Path | None = None


class Reals(TypedDict):
    """The set whose real images are the reference of another set, and why that set was chosen."""

    set: str
    why: str


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedSet:
    """Samples to score, with the hash and the split of their whole set. A set with `measured=False`
    is included only for its real images.
    """

    shards: ShardSet
    index_sha256: str
    split: str
    measured: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationPlan:
    """Checked input of an evaluation on this rank, made by `plan`.

    `detector` is None for a checkpoint. `meta` belongs to the checkpoint or to `detector`. `sets`
    are in scoring order. `references` has an entry for each measured set that does not use its own
    real images.
    """

    checkpoint: Path
    detector: OtherDetector | OnnxDetector | None
    meta: Mapping[str, Any] = field(repr=False)
    sets: Mapping[str, PlannedSet] = field(repr=False)
    references: Mapping[str, Reals]
    options: Options
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str
    backend: str
    backend_reason: str
    dist: DistEnv

    @property
    def trained_on(self) -> list[str]:
        """Names of the planned sets, reference included, that the checkpoint was trained on. Sets
        are matched by the hash of their index, because names can change.
        """
        return trained_on(self.meta, self._hashes)

    @property
    def maybe_trained_on(self) -> list[str]:
        """Names of the planned sets, reference included, that are perhaps a later build of a set
        that the checkpoint was trained on.
        """
        return maybe_trained_on(self.meta, self._hashes)

    @property
    def _hashes(self) -> dict[str, str]:
        return {name: planned.index_sha256 for name, planned in self.sets.items()}

    @property
    def known_generators(self) -> dict[str, list[str]]:
        """Generators of the fakes of each measured set that the checkpoint learned from other
        images of: `dalle3` and `DALL-E 3` are one name. Only of test sets: validation sets have the
        generators of training on purpose.
        """
        seen = {_letters(name) for name in generators_seen(self.meta)} - {""}
        trained_on = self.trained_on
        return {
            name: [one for one in planned.shards.generators() if _letters(one) in seen]
            for name, planned in self.measured.items()
            if planned.split == "test" and name not in trained_on
        }

    @property
    def measured(self) -> dict[str, PlannedSet]:
        """Sets that the report covers: all but a set included only for its real images."""
        return {name: planned for name, planned in self.sets.items() if planned.measured}


def plan(
    subject: Path | OtherDetector | OnnxDetector,
    data: AnyPath,
    names: Sequence[str],
    options: Options,
    dist: DistEnv | None = None,
) -> EvaluationPlan:
    """Open and check everything needed to score the sets `names` below `data` with a checkpoint or
    another detector. Writes nothing.

    Raises:
        ValueError: a set, sample, checkpoint or device does not exist, the reference set has no
            real images, or stored features are requested for a detector that is not a checkpoint.
    """
    dist = dist or DistEnv()
    detector = None if isinstance(subject, Path) else subject
    if detector and options.features:
        raise ValueError(
            f"--features needs a checkpoint, but {detector.checkpoint} is not one and can only "
            "score images; leave --features out"
        )
    sets = {name: _open(data, name, options.subset) for name in names}
    references = choose_references(
        data,
        {name: s.shards for name, s in sets.items()},
        options.reference_reals,
        options.catalogs,
    )
    for reals in references.values():
        if reals["set"] not in sets:
            sets[reals["set"]] = open_reals(data, reals["set"])
    device = choose_device(options.device, dist.local_rank)
    meta = checkpoints.check(subject) if isinstance(subject, Path) else subject.meta
    run = meta["recipe"].get("run", {}) if options.features else {}
    asked = run.get("precision", "auto")
    dtype, dtype_reason = choose_precision(asked, device)
    if asked != "auto":  # or all features would be computed again
        dtype_reason = "the precision of the run, as of its features"
    backend, backend_reason = choose_backend(options.loading.backend, device)
    if detector:
        backend, backend_reason = detector.backend, detector.reason
    return EvaluationPlan(
        checkpoint=subject if isinstance(subject, Path) else subject.checkpoint,
        detector=detector,
        meta=meta,
        sets=sets,
        references=references,
        options=options,
        device=device,
        dtype=dtype,
        dtype_reason=dtype_reason,
        backend=backend,
        backend_reason=backend_reason,
        dist=dist,
    )


def _letters(name: str) -> str:
    """Return the letters and digits of a name, in lower case."""
    return "".join(filter(str.isalnum, name.casefold()))


def trained_on(meta: Mapping[str, Any], hashes: Mapping[str, str]) -> list[str]:
    """Return the names of the sets in `hashes` (name -> hash of the index) that a detector with
    this `meta` was trained on: its weights, or those that they began from (`sets_seen`).
    """
    known = {*sets_seen(meta), (meta["data"] or {}).get("index_sha256")}
    return [name for name, sha256 in hashes.items() if sha256 in known]


def maybe_trained_on(meta: Mapping[str, Any], hashes: Mapping[str, str]) -> list[str]:
    """Return the names of the sets in `hashes` that have the name, but not the hash, of a set that
    a detector with this `meta` was trained on: often a later build of the same images, but perhaps
    unrelated.
    """
    names = {*sets_seen(meta).values()} - {*trained_on(meta, hashes)}
    return [name for name in hashes if name in names]


def _open(data: AnyPath, name: str, subset: Subset | None) -> PlannedSet:
    """Open a set to measure. With `subset`, keep only the samples that it lists."""
    whole = open_shards([data / name])
    return PlannedSet(
        shards=choose_samples(whole, name, subset) if subset else whole,
        index_sha256=whole.sha256,
        split=read_index(data / name)["split"],
    )


def open_reals(data: AnyPath, name: str) -> PlannedSet:
    """Open the real images of a set that is not measured itself."""
    whole = open_shards([data / name])
    return PlannedSet(
        shards=whole.take(np.flatnonzero(whole.column("label") == REAL)),
        index_sha256=whole.sha256,
        split=read_index(data / name)["split"],
        measured=False,
    )


def choose_references(
    data: AnyPath,
    opened: Mapping[str, ShardSet],
    asked: str | None,
    catalogs: Sequence[Path] = (),
) -> dict[str, Reals]:
    """Choose the set whose real images are the reference of each set in `opened`.

    The set `asked` is used for all sets. Without `asked`, a set without real images gets the reals
    of the set that the catalog names for it (`[reference]`), if that set is packed below `data`.
    Reason: recall without a false-positive rate is meaningless. What counts are all images to
    score: a set whose real images all get no score uses no others. `catalogs` are the user's own.

    Raises:
        ValueError: the set `asked` has no real images, or a catalog has an error.
    """
    if asked:
        if not _has_reals(data, opened, asked):
            raise ValueError(
                f"--reference-reals {asked}: this set has no real images to score; name a set that "
                "has some"
            )
        return {
            name: {"set": asked, "why": "--reference-reals"} for name in opened if name != asked
        }
    defaults = read_catalog([*SHIPPED, *catalogs]).reference
    references: dict[str, Reals] = {}
    for name in opened:
        other = defaults.get(name)
        if other is None or _has_reals(data, opened, name):
            continue
        if (data / other / INDEX_FILE).exists() and _has_reals(data, opened, other):
            references[name] = {"set": other, "why": "the catalog's default"}
    return references


def _has_reals(data: AnyPath, opened: Mapping[str, ShardSet], name: str) -> bool:
    """Return whether the set `name` has real images: among the samples to score if it is measured,
    else in the whole set.
    """
    shards = opened[name] if name in opened else open_shards([data / name])
    return bool((shards.column("label") == REAL).any())
