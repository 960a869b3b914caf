"""Evaluate a checkpoint or another detector on shard sets (packed images): score every image and
compute the report.

Main entry: `evaluate(subject, data, names, out, *, options, dist, held)` scores and reports. All
ranks must call it.

- `subject`: the folder of a checkpoint (a `Path`, not a text), or an `OtherDetector` or
  `OnnxDetector`. `choose_subject()` returns one.
- `data`: the folder of all packed sets, a `Path`, or a `UPath` for an address.
- `names`: a list of the names of the sets to score, which are folders in `data`.
- `out`: the output folder (`Path`), made if needed.
- `options`: the `Options` of `plan.py` (device, subset, reference reals, robustness ...), or None
  (default: the defaults of `Options()`).
- `dist`: this process's rank (`DistEnv`; None, the default, for a single process).
- `held`: a `contextlib.ExitStack` that keeps the lock of `out`, for a caller that goes on to write
  the report there. None (the default): the lock ends with the call.

It writes `scores.parquet` (one row per image) and `speed.json` (images per second) to `out`. It
returns the report as a dict (`report/fields.py`), {} on other ranks than 0; it does not write
the report. It raises `ValueError` if a set, checkpoint or device cannot be used, or if a
checkpoint's score is not finite, and `OSError` if a file cannot be read or written, or another
evaluation is writing `out`.

`choose_subject(name, checkpoint, opening, device, dist)` returns a pair: the subject and its output
folder. No argument has a default. It raises `ValueError` if there is no such detector, or if both
`name` and `checkpoint` are given. If both are None, it chooses the best checkpoint of the newest
run (never a shipped detector, unlike `load_any()`). Without a run, it raises `ValueError`.

- `name`: a text, `hf:OWNER/NAME`, `timm:NAME`, FILE.onnx, FILE.py or as `checkpoint`; or None.
- `checkpoint`: the `Path` of a checkpoint or run, or the name of a shipped detector as a `Path`; or
  None.
- `opening`: an `Opening` of `model/adapters/open.py`: `runs` (`Path` of the folder of all runs),
  and `trust` and `fake_labels`, which are for other detectors only (`ValueError` with a
  checkpoint).
- `device`: `auto`, `cpu`, `cuda` or `cuda:N`.
- `dist`: a `DistEnv` (`DistEnv()` for a single process).

`report_on(path)` computes the same report from a scores file (`Path`). `find_scores(path)` returns
the `Path` of that file, given the file, its folder or a report in it, and raises `ValueError` if
there is none. `score_sets()`, `perturb_sets()` and `with_reference()` are parts of `evaluate()`;
they take its `EvaluationPlan` as `planned`.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import console
from installed import command, git_commit
from locks import locked
from model.adapters.detector import OtherDetector, output_name
from model.adapters.open import Opening, as_checkpoint, open_other
from model.checkpoint import find, load_network, weights_name
from model.device import choose_device, describe, keep_freed_memory
from model.distributed import DistEnv, all_gather_object, check_alike, on_main
from model.evaluation import report
from model.evaluation.bootstrap import RESAMPLES
from model.evaluation.codec_swap import report_robustness
from model.evaluation.plan import REAL, EvaluationPlan, Options, plan
from model.evaluation.robustness import VariantScorer
from model.evaluation.scores import SCORES_FILE, read_scores, rows_of, write_scores
from model.evaluation.scoring import AnyScorer, CheckpointScorer, DetectorScorer, rank_progress
from model.features.embed import Embedder, embed_sets
from model.features.loader import FeatureSource, source_of_checkpoint
from model.inference.onnx_detector import OnnxDetector
from model.network import Detector
from model.shipped.backbone import output_folder
from model.verdict import CALIBRATION_KEYS
from pipeline.perturb import PERTURBATIONS
from sharding.format import ShardSet, join_sets, open_shards
from sharding.lock import reading
from storage import AnyPath, write_text

SPEED_FILE = "speed.json"
"""File for the scoring speed. The scores file has no timing, so that its bytes are reproducible."""


def evaluate(
    subject: Path | OtherDetector | OnnxDetector,
    data: AnyPath,
    names: Sequence[str],
    out: Path,
    *,
    options: Options | None = None,
    dist: DistEnv | None = None,
    held: contextlib.ExitStack | None = None,
) -> dict[str, Any]:
    """Score the sets `names` below `data` and return the report as a dict (see `report.py`).

    `subject` is the checkpoint or the other detector that scores. `options.subset` limits the
    samples. Writes `scores.parquet` and `speed.json` to `out`. With several ranks, every rank
    calls `evaluate`; rank 0 writes, and the other ranks return {}. `held` keeps the lock of `out`.

    Raises:
        ValueError: as `plan`.
        BlockingIOError: another evaluation is writing `out`.
    """
    planned = plan(subject, data, names, options or Options(), dist)
    check_alike(
        planned.dist,
        {"detector": str(_identity_of(planned).get("sha256", ""))}
        | {f"set {name}": one.index_sha256 for name, one in planned.sets.items()},
    )
    for sentence in report.on_training_data(_seen(planned)):
        console.log.warning("%s", sentence)
    keep_freed_memory(planned.device)
    with contextlib.ExitStack() as own:
        on_main(planned.dist, lambda: lock_output(out, held or own))
        return _evaluate(planned, out)


def lock_output(out: Path, held: contextlib.ExitStack) -> None:
    """Lock the folder of a report until `held` ends; the folder is made if it is missing. Otherwise
    the report could be on the scores of another evaluation.
    """
    out.mkdir(parents=True, exist_ok=True)
    busy = BlockingIOError(
        f"another evaluation is writing {out}; wait for it to end, or name another folder with "
        "--out"
    )
    held.enter_context(locked(out / ".evaluation.lock", busy, remove=True))


def _evaluate(planned: EvaluationPlan, out: Path) -> dict[str, Any]:
    with reading(*(one.shards for one in planned.sets.values())):
        scorer = _scorer_of(planned)
        began = time.perf_counter()
        rows = score_sets(planned, scorer)
        seconds = time.perf_counter() - began
        perturbed = perturb_sets(planned, scorer) if planned.options.robustness else {}
    if not planned.dist.is_main:
        return {}
    write_scores(out / SCORES_FILE, rows, _about(planned, perturbed))
    images = sum(map(len, rows))
    if planned.options.features:  # reading features is not the detector's speed
        (out / SPEED_FILE).unlink(missing_ok=True)
        return report_on(out / SCORES_FILE)
    speed = {"images": images, "seconds": seconds, "images_per_s": images / seconds,
             "device": str(planned.device), "ranks": planned.dist.world_size}  # fmt: skip
    write_text(out / SPEED_FILE, json.dumps(speed) + "\n")
    return report_on(out / SCORES_FILE)


def choose_subject(
    name: str | None, checkpoint: Path | None, opening: Opening, device: str, dist: DistEnv
) -> tuple[Path | OtherDetector | OnnxDetector, Path]:
    """Return the detector of `--detector` (`name`) or `--checkpoint`, and its output folder.

    Raises:
        ValueError: no such detector; as `model.adapters.open.load_any`.
    """
    named = as_checkpoint(name, checkpoint, opening)
    if named or not name:
        chosen = find(opening.runs, named)
        return chosen, output_folder(chosen, opening.runs)
    if device == "auto":
        device = str(choose_device(device, dist.local_rank))
    detector = open_other(name, opening, device=device)
    if isinstance(detector, OnnxDetector):
        return detector, opening.runs / output_name(
            "onnx", detector.checkpoint.stem, detector.checkpoint
        )
    return detector, opening.runs / detector.folder_name


def _scorer_of(planned: EvaluationPlan) -> AnyScorer:
    """Load the detector of the plan, and compute missing features. Logs device and precision."""
    if planned.detector:
        console.log.info("%s (%s)", planned.checkpoint, planned.backend_reason)
        return DetectorScorer(planned.detector, planned.dist)
    net, preprocess, _ = load_network(planned.checkpoint)
    precision = describe(planned.dtype)
    console.log.info("%s on %s (%s)", precision, planned.device, planned.dtype_reason)
    net.to(planned.device)
    source, options = None, planned.options
    if options.features:
        source = source_of_checkpoint(net, planned.meta, planned.dtype, options.features)
        _embed(planned, net, source)
    return CheckpointScorer(
        net, preprocess, planned.device, planned.dtype, planned.dist, options.loading, source
    )


def _log_reference(planned: EvaluationPlan, name: str) -> None:
    """Log that only the real images of set `name` are scored, and why."""
    if not planned.sets[name].measured:
        why = next(reals["why"] for reals in planned.references.values() if reals["set"] == name)
        console.log.info(
            "%s: only its %s real images (%s)", name, len(planned.sets[name].shards), why
        )


def score_sets(planned: EvaluationPlan, scorer: AnyScorer) -> list[pa.Table]:
    """Score each set. Return one table of `scores.parquet` rows per set, the same on every rank."""
    tables = []
    for name, planned_set in planned.sets.items():
        _log_reference(planned, name)
        scores = scorer.score(planned_set.shards, f"scoring {name}")
        tables.append(rows_of(name, planned_set.shards, scores, planned.meta["temperature"]))
    return tables


def _embed(planned: EvaluationPlan, net: Detector, source: FeatureSource) -> None:
    """Compute missing features of whole sets, even if only a subset is measured."""
    folders = dict.fromkeys(f for s in planned.sets.values() for f in s.shards.folders)
    embedder = Embedder(
        net=net,
        device=planned.device,
        dtype=planned.dtype,
        loading=planned.options.loading,
        rank=planned.dist.rank,
        world_size=planned.dist.world_size,
    )
    embed_sets(embedder, [open_shards([folder]) for folder in folders], source, 0)
    all_gather_object(planned.dist, None)  # barrier: no rank reads before all ranks have written


def perturb_sets(planned: EvaluationPlan, scorer: VariantScorer) -> dict[str, dict[str, Any]]:
    """Return the entry `robustness` of each measured set. Logs the number of perturbed images."""
    meta, per_class = planned.meta, planned.options.robustness
    entries = {}
    for name in planned.measured:
        label, shards = f"perturbing {name}", with_reference(planned, name)
        counts = np.bincount(shards.column("label"), minlength=2)
        taken = np.minimum(counts, per_class)
        figures = (f"{n:,}" for pair in zip(taken, counts, strict=True) for n in pair)
        console.log.info("%s: %s of %s real and %s of %s fake images", label, *figures)
        with rank_progress(label, int(taken.sum()), planned.dist) as on_images:
            entries[name] = report_robustness(
                scorer, shards, PERTURBATIONS,
                temperature=meta["temperature"], threshold=meta["threshold"],
                per_class=per_class, on_images=on_images,
            )  # fmt: skip
    return entries


def with_reference(planned: EvaluationPlan, name: str) -> ShardSet:
    """Return the samples for the robustness test of set `name`: all samples of the set, or its
    fakes and the reference reals where the report uses reference reals for it.
    """
    shards, reference = planned.sets[name].shards, planned.references.get(name)
    if reference is None:
        return shards
    is_real = shards.column("label") == REAL
    other = planned.sets[reference["set"]].shards
    reals = other.take(np.flatnonzero(other.column("label") == REAL))
    return join_sets([shards.take(np.flatnonzero(~is_real)), reals])


def _about(planned: EvaluationPlan, perturbed: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the metadata of `scores.parquet`; layout in `model/evaluation/scores.py`."""
    meta, subset, measured = planned.meta, planned.options.subset, planned.measured
    known = planned.known_generators
    return {
        "checkpoint": str(planned.checkpoint),
        "run": meta["run"] if planned.detector else meta["recipe"]["name"],
        "step": meta["step"],
        "detector": _identity_of(planned),
        "commit": git_commit(),
        "precision": planned.backend_reason if planned.detector else describe(planned.dtype),
        "backend": planned.backend,
        **{name: meta[name] for name in CALIBRATION_KEYS},
        "subset": None
        if subset is None
        else {
            "file": subset.file,
            "sha256": subset.sha256,
            "samples": sum(len(planned_set.shards) for planned_set in measured.values()),
        },
        "sets": {
            name: {
                "index_sha256": planned_set.index_sha256,
                "split": planned_set.split,
                "known_generators": known.get(name, []),
                "robustness": perturbed.get(name),
                "reference_reals": planned.references.get(name),
            }
            for name, planned_set in measured.items()
        },
        **_seen(planned),
    }


def _seen(planned: EvaluationPlan) -> dict[str, list[str]]:
    """Return the entries of the metadata about sets whose images the checkpoint has learned."""
    return {"trained_on": planned.trained_on, "maybe_trained_on": planned.maybe_trained_on}


def _identity_of(planned: EvaluationPlan) -> dict[str, Any]:
    """Return the entry `detector` of the metadata; layout in `model/evaluation/scores.py`."""
    meta = planned.meta
    if isinstance(planned.detector, OnnxDetector):
        name = planned.checkpoint.name
        return {"kind": "onnx", "name": name, "sha256": meta["sha256"]}
    if planned.detector:
        return meta["detector"]
    weights = meta["sha256"][weights_name(meta)]
    return {"kind": "checkpoint", "name": planned.checkpoint.name, "sha256": weights}


def report_on(path: Path) -> dict[str, Any]:
    """Read a file of scores and return the report on it."""
    scores = read_scores(path)
    with console.progress("intervals", RESAMPLES * len(scores.evaluation["sets"])) as advance:
        return report.report(scores, advance)


def find_scores(path: Path) -> Path:
    """Return the scores file for `path`, which is that file, its folder, or a report in its folder.

    Raises:
        ValueError: the folder contains no scores file. The message names the reports below it.
    """
    file = path / SCORES_FILE if path.is_dir() else path
    file = file if file.suffix == ".parquet" else file.with_name(SCORES_FILE)
    if file.exists():
        return file
    below = [*path.glob(f"*/{SCORES_FILE}"), *path.glob(f"*/*/{SCORES_FILE}")]
    names = sorted(str(scores.parent) for scores in below)
    todo = f"run `{command('evaluate')} --shards SET`, and name the folder of its report"
    if names:
        more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
        todo = f"name one of the reports below: {', '.join(names[:_NAMED])}{more}"
    raise ValueError(f"there is no {SCORES_FILE} at {path}; {todo}")


_NAMED = 5
"""Largest number of reports that a message names."""
