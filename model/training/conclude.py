"""Conclude a finished training run: calibrate its best checkpoint, compare it with the detector
that the run started from, and refuse it if it fails the gate (the recipe's limits on forgetting,
false positives and kept mistakes).

Main entry: `conclude(planned, best, baseline, start)`. On several ranks, all call it.

- `planned`: the `RunPlan` of the run, made by `plan()` in `plan.py`.
- `best`: the run's best checkpoint, a `Best` of `validation.py`.
- `baseline`: the `Validation` (metrics) of the initial detector, measured before training (in the
  file `planned.baseline`, which `read_validation()` of `validation.py` reads); None if the run did
  not start from a trained detector. Then nothing is compared, and the gate only limits false
  positives. If `best` has no validation, the checkpoint is only calibrated.
- `start`: the verdicts of the initial detector on the kept mistakes, which `start_on_mistakes()`
  returns before training, on every rank: a dict, hash of an image -> `Verdict`; None if the recipe
  names no folder of kept mistakes (`gate.mistakes`). Rank 0 alone uses it.

It writes the calibration (if there is none yet), the comparison (`compared`) and the reasons to
refuse (`refused`, a list of texts) into the checkpoint's `meta.json`, and returns nothing. It
raises `GateError` (a `ValueError`) on every rank if the gate refuses the checkpoint. Scores that
cannot be calibrated are only logged as a warning. Other errors of files and records pass through;
those of the comparison come on rank 0 only.

`conclude_again(planned, best)` does what is missing when a finished run is started again, and logs
whether there is anything to do. It raises `GateError` on each rank for a checkpoint that was
refused before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import console
from model import checkpoint
from model.calibration.calibrate import calibrate_checkpoint, check_sets
from model.calibration.fit import (
    CalibrationError,
    ThresholdAt,
    check_images,
    check_validation_sets,
)
from model.distributed import on_main
from model.forgetting import SourceChange, changes, forgetting, refusals
from model.inference.detector import load_detector
from model.metrics import Validation
from model.mistakes.gate import (
    START_FILE,
    against_start,
    lines_of,
    measure_start,
    newly_wrong,
    read_start,
    refusal,
)
from model.mistakes.keep import Verdict
from model.mistakes.regressions import counts_of
from model.recipe import Calibrating, Recipe
from model.training.assemble import assemble, with_features
from model.training.leave_out import calibrate_left_out
from model.training.plan import RunPlan
from model.training.sets import new_sources
from model.training.validation import Best, read_validation
from model.verdict import describe_band


class GateError(ValueError):
    """The gate refuses a trained checkpoint. The message gives the reasons."""


def conclude(
    planned: RunPlan, best: Best, baseline: Validation | None, start: Mapping[str, Verdict] | None
) -> None:
    """Calibrate the best checkpoint of a finished run, then compare it with the initial detector.
    The calibration comes first, so that kept mistakes are scored with the final band, and false
    positives are counted at the final threshold.

    Raises:
        GateError: the gate refuses the checkpoint.
    """
    _calibrate(planned, best.path)
    if best.validation is None:
        return

    def judge() -> list[str]:
        if baseline:
            return _judge(planned, best, baseline, start)
        if reasons := _refusals(planned, best, None):
            checkpoint.annotate(best.path, {"refused": reasons})
        return reasons

    # Raise on all ranks: a rank that returns would look like a run that passed the gate.
    if reasons := on_main(planned.dist, judge):
        raise _refused(best, reasons)


def _refused(best: Best, reasons: Sequence[str]) -> GateError:
    return GateError(
        f"{best.path} is refused: {'; '.join(reasons)}. The checkpoint and the one that the run "
        "started from are kept"
    )


def conclude_again(planned: RunPlan, best: Best) -> None:
    """Conclude a finished run whose training is started again. If the run was killed before the
    gate, the gate is applied now. A refused checkpoint is refused again.

    Raises:
        GateError: the gate refuses the best checkpoint.
    """
    baseline, start = None, None
    # Read on rank 0 only, because rank 0 rewrites the file below.
    meta = on_main(planned.dist, lambda: checkpoint.read_meta(best.path))
    early = f" after {planned.done} of {planned.steps} steps: {planned.ended}"
    why = early if planned.done < planned.steps else ""
    refused, judged = meta.get("refused"), meta["compared"] is not None or not planned.baseline
    calibrated = meta["calibration"] or _calibration_fault(planned)
    done = "; nothing to do" if refused or (judged and calibrated) else ""
    console.log.info("%s is finished%s%s", planned.folder, why, done)
    if refused:
        raise _refused(best, refused)
    if planned.baseline and not judged:
        baseline = read_validation(planned.baseline)
        start = start_on_mistakes(planned)
    conclude(planned, best, baseline, start)


def start_on_mistakes(planned: RunPlan) -> Mapping[str, Verdict] | None:
    """Return the verdicts of the initial detector on the kept mistakes of the gate, by hash. None
    without `gate.mistakes`, or without a trained detector to start from.
    """
    gate, file = planned.recipe.gate, planned.folder / START_FILE
    if not gate.mistakes or planned.baseline is None:
        return None

    def verdicts() -> dict[str, Verdict]:
        if planned.resumed:
            return read_start(file)
        start = load_detector(planned.weights.path, device=str(planned.device))
        return measure_start(Path(gate.mistakes), start, file)

    return on_main(planned.dist, verdicts)


def _calibrate(planned: RunPlan, best: Path) -> None:
    """Calibrate the best checkpoint of a finished run. If its scores cannot be calibrated, log a
    warning.
    """
    if checkpoint.read_meta(best)["calibration"]:
        return
    if fault := _calibration_fault(planned):
        console.log.warning("not calibrated: %s", fault)
        return
    recipe = planned.recipe
    folders = [planned.data / name for name in recipe.data.validate]
    left_out = recipe.calibration.on == "left_out"
    if planned.features is None and recipe.features and recipe.features.stored and not left_out:
        # A finished run that is started again has no features opened: score features as in
        # training.
        planned = with_features(planned, assemble(planned))
    try:
        calibration = calibrate_left_out(planned, best) if left_out else calibrate_checkpoint(
            best, folders, recipe.loading, planned.device,
            rule=_rule_of(recipe),
            dist=planned.dist, features=planned.features,
        )  # fmt: skip
    except CalibrationError as error:
        console.log.warning("not calibrated: %s", error)
        return
    console.log.info(
        "calibrated on %s: temperature %.2f, %s",
        "sources left out" if left_out else ", ".join(recipe.data.validate),
        calibration.temperature, describe_band(calibration.band),
    )  # fmt: skip


def _rule_of(recipe: Recipe) -> ThresholdAt | Calibrating:
    """Return the rule for a calibration on validation sets: stated error rates, or "auto"."""
    return recipe.calibration if recipe.calibration.is_stated else "auto"


def _calibration_fault(planned: RunPlan) -> str:
    """Return why a calibration on the sets of a run is impossible, checked before scoring: a set is
    no validation set, or has too few images of a class; else "".
    """
    recipe, shards = planned.recipe, planned.stream.pool.shards
    try:
        check_validation_sets([planned.data / name for name in recipe.data.validate])
        if recipe.calibration.on == "left_out":
            labels, sources = shards.column("label"), shards.codes("source")[0]
            used = planned.stream.used_new
            check_images(labels[used], recipe.calibration, sources[used])
        else:
            check_sets([*planned.validation.values()], _rule_of(recipe))
    except CalibrationError as error:
        return str(error)
    return ""


def _refusals(planned: RunPlan, best: Best, rows: list[SourceChange] | None) -> list[str]:
    """Return the gate's reasons to refuse the best checkpoint. False positives are counted at the
    stored threshold, which calibration has set.
    """
    meta = checkpoint.read_meta(best.path)
    validation = Validation.from_json(meta["calibrated_metrics"] or meta["metrics"], best.path)
    return refusals(planned.recipe.gate, rows, validation.sets, meta["threshold"])


def _judge(
    planned: RunPlan, best: Best, before: Validation, start: Mapping[str, Verdict] | None
) -> list[str]:
    """Compare the best checkpoint with the metrics `before` training, and with the verdicts of the
    initial detector on kept mistakes (`start`). Print the changes and store them in `meta.json`,
    with the gate's reasons to refuse the checkpoint. Return the reasons.
    """
    assert best.validation is not None  # a judged checkpoint has been validated
    gate, after = planned.recipe.gate, best.validation
    rows = changes(before.sources, after.sources, new_sources(planned.stream))
    step = checkpoint.read_meta(best.path)["step"]
    console.table(
        f"{planned.recipe.name}: balanced accuracy per source at 0.5 (with one class: accuracy), "
        f"before and after (step {step})",
        ["set/source", "", "images", "before", "after", "change"],
        [
            [r.name, "old" if r.old else "new", r.images, r.before, r.after, f"{-r.lost:+.3f}"]
            for r in rows
        ],
    )
    mean, worst = forgetting(rows), max((row.lost for row in rows if row.old), default=None)
    console.say(
        "forgetting: not measured, because the validation sets hold no old source"
        if mean is None or worst is None
        else f"forgetting: {mean:.3f} on average over the old sources, "
        f"{max(worst, 0.0):.3f} at worst"
    )
    reasons = _refusals(planned, best, rows)
    compared: dict[str, Any] = {
        "forgetting": mean,
        "worst": worst,
        "sources": [asdict(row) for row in rows],
        "mistakes": None,
    }
    if start is not None:
        detector = load_detector(best.path, device=str(planned.device))
        mistakes = against_start(Path(gate.mistakes), start, detector)
        for line in lines_of(gate, mistakes):
            console.say(line)
        reasons += refusal(gate, mistakes)
        compared["mistakes"] = {
            "counts": counts_of(mistakes), "newly_wrong": newly_wrong(mistakes),
        }  # fmt: skip
    checkpoint.annotate(best.path, {"compared": compared, "refused": reasons})
    return reasons
