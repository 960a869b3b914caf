"""Evaluate a checkpoint: shard sets are scored and measured, each sample once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import console
from model.checkpoint import git_commit, load_network
from model.device import choose_device, choose_precision, describe, keep_freed_memory
from model.distributed import DistEnv
from model.evaluation import report
from model.evaluation.bootstrap import RESAMPLES
from model.evaluation.codec_swap import report_robustness
from model.evaluation.scores import SCORES_FILE, read_scores, rows_of, write_scores
from model.score import score_set
from pipeline.augment import Preprocess
from pipeline.loader import Loading, open_loader
from pipeline.perturb import PERTURBATIONS
from pipeline.subset import Subset, choose_samples
from sharding.catalog import BUILT_IN, read_catalog
from sharding.format import CLASSES, ShardSet, join_sets, open_shards, read_index
from storage import AnyPath


def choose_reference(
    data: AnyPath, opened: Mapping[str, ShardSet], asked: str | None
) -> dict[str, Any] | None:
    """The set whose real images stand beside, and why; see `model/evaluation/report.py`.

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
    defaults = read_catalog([BUILT_IN]).reference
    for name, shards in opened.items():
        other = defaults.get(name)
        if (shards.column("label") == 0).any() or other is None:
            continue
        if (data / other / "index.json").exists() and _count_reals(data, other):
            return {"set": other, "why": "the catalog's default", "for_all": False}
    return None


def _count_reals(data: AnyPath, name: str) -> int:
    labels = open_shards([data / name]).column("label")
    return int((labels == CLASSES.index("real")).sum())


def evaluate(
    checkpoint: Path,
    data: AnyPath,
    names: Sequence[str],
    out: Path,
    *,
    loading: Loading,
    device: str = "auto",
    subset: Subset | None = None,
    reference_reals: str | None = None,
    robustness: int = 0,
    dist: DistEnv | None = None,
) -> dict[str, Any]:
    """Score `names` (sets below `data`), or a subset of their samples; write `scores.parquet` to
    `out` and return the report on it. `robustness` is how many images of each class are scored once
    more through every perturbation. On many ranks each calls this; the first one writes, and the
    others return an empty report.
    """
    dist = dist or DistEnv()
    for name in [*names, *([reference_reals] if reference_reals else [])]:
        read_index(data / name)  # a wrong name is said before any work is done
    whole = {name: open_shards([data / name]) for name in names}
    opened = {
        name: choose_samples(shards, name, subset) if subset else shards
        for name, shards in whole.items()
    }
    reference = choose_reference(data, opened, reference_reals)
    measured = len(opened)
    if reference and reference["set"] not in opened:
        shards = open_shards([data / reference["set"]])
        only = np.flatnonzero(shards.column("label") == CLASSES.index("real"))
        opened[reference["set"]] = shards.take(only)
        console.log.info(
            "%s: its %s real images (%s)", reference["set"], len(only), reference["why"]
        )
    net, preprocess, meta = load_network(checkpoint)
    where = choose_device(device, dist.local_rank)
    keep_freed_memory(where)
    dtype, reason = choose_precision("auto", where)
    console.log.info("%s on %s (%s)", describe(dtype), where, reason)
    net.to(where)
    parts = []
    for name, shards in opened.items():
        loader = open_loader(
            shards,
            preprocess=preprocess,
            loading=loading,
            device=where,
            rank=dist.rank,
            world_size=dist.world_size,
        )
        console.log.info("%s: images through %s (%s)", name, loader.backend, loader.reason)
        with console.progress(f"scoring {name}", len(shards), dist.is_main) as advance:
            scores = score_set(
                net, loader, dtype, lambda done: advance(done * dist.world_size), dist
            )  # fmt: skip
        parts.append(rows_of(name, shards, scores, meta["temperature"]))
    perturbed = {}
    for name in list(opened)[:measured] if robustness else ():
        perturbed[name] = measure_robustness(
            net, with_reference(opened, name, reference), preprocess, meta, dtype, robustness,
            where, label=f"perturbing {name}", dist=dist,
        )  # fmt: skip
    if not dist.is_main:
        return {}
    about = {
        "checkpoint": str(checkpoint),
        "run": meta["recipe"]["name"],
        "step": meta["step"],
        "commit": git_commit(),
        "precision": describe(dtype),
        "backend": loader.backend,
        **{name: meta[name] for name in ("temperature", "threshold", "calibration")},
        "subset": None
        if subset is None
        else {
            "file": subset.file,
            "sha256": subset.sha256,
            "samples": sum(len(opened[name]) for name in names),
        },
        "sets": {
            name: {
                "index_sha256": whole[name].sha256,
                "split": read_index(data / name)["split"],
                "robustness": perturbed.get(name),
            }
            for name in list(opened)[:measured]
        },
        "reference_reals": reference,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_scores(out / SCORES_FILE, parts, about)
    return report_on(out / SCORES_FILE)


def report_on(path: Path) -> dict[str, Any]:
    """The report on a file of scores."""
    scores = read_scores(path)
    with console.progress("intervals", RESAMPLES * len(scores.evaluation["sets"])) as advance:
        return report.report(scores, advance)


def with_reference(
    opened: Mapping[str, ShardSet], name: str, reference: Mapping[str, Any] | None
) -> ShardSet:
    """What set `name` is delivered with: itself, or its fakes and the reals that stand beside, as
    in its report.
    """
    own = opened[name]
    labels = own.column("label")
    if (
        not reference
        or reference["set"] == name
        or not (reference["for_all"] or (labels == 1).all())
    ):
        return own
    other = opened[reference["set"]]
    reals = other.take(np.flatnonzero(other.column("label") == 0))
    return join_sets([own.take(np.flatnonzero(labels == 1)), reals])


def measure_robustness(
    net: nn.Module,
    shards: ShardSet,
    preprocess: Preprocess,
    meta: Mapping[str, Any],
    dtype: torch.dtype,
    per_class: int,
    device: torch.device,
    *,
    label: str,
    dist: DistEnv,
) -> dict[str, Any]:
    """The entry `robustness` of one set; says how many images it is about."""
    counts = np.bincount(shards.column("label"), minlength=2)
    taken = np.minimum(counts, per_class)
    numbers = (f"{n:,}" for pair in zip(taken, counts, strict=True) for n in pair)
    console.log.info("%s: %s of %s real and %s of %s fake images", label, *numbers)
    with console.progress(label, int(taken.sum()), dist.is_main) as advance:
        return report_robustness(
            net, shards, PERTURBATIONS, preprocess=preprocess, device=device, dtype=dtype,
            temperature=meta["temperature"], threshold=meta["threshold"], per_class=per_class,
            on_images=lambda done: advance(done * dist.world_size), dist=dist,
        )  # fmt: skip


def scores_beside(path: Path) -> Path:
    """The file of scores that is meant by `path`: itself, or that of its report or folder.

    Raises:
        ValueError: there is none.
    """
    found = path / SCORES_FILE if path.is_dir() else path
    found = found.with_name(SCORES_FILE) if found.suffix != ".parquet" else found
    if not found.exists():
        raise ValueError(f"there is no {SCORES_FILE} at {path}; run `python evaluate.py` again")
    return found
