"""Print the results of `evaluate.py` in a terminal: tables, and sentences that explain them.

All functions print to standard output and return nothing. Main entry: `print_report(report)` takes
a report (a dict, content of `report.json`, from `evaluate()` or `report_on()` of
`model/evaluation/run.py`) and prints its headline and the metrics of each set. It also calls the
next two functions for each set that has these measurements. `entry` below is
`report["sets"][name]`.

- `print_protocols(name, protocols)`: the set's name and `entry["protocols"]`, whose
  "first_per_prompt" must not be None. It prints the recall per generator, on all images and on the
  first image of each prompt.
- `print_robustness(name, robustness)`: the set's name and `entry["robustness"]`, not None. It
  prints the metrics after each perturbation, and the tests of the codec swap.
- `print_comparison(before, after, changed)`: `before` and `after` are the scores of two runs on the
  same images, `ScoreTable`s from `shared_samples()` of `model/evaluation/compare.py`. `changed` is
  the list of changed verdicts, from `flips(before, after)` there. It prints the metrics of both
  with the interval of each difference, the number of changed verdicts and the largest changes. It
  raises `ScoresError` if the false-positive rates of a set come from different real images in the
  two runs.
- `print_calibration(calibration)`: `calibration` is a `Calibration` of `model/calibration/fit.py`.
  It prints NLL and ECE at temperature 1, at that of the calibration until now and at the fitted
  one, then the thresholds and the band.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import console
from installed import command
from model.calibration.fit import Calibration
from model.evaluation.compare import COMPARED, Flip, MetricChange, compare, count_flips
from model.evaluation.report import on_subset
from model.evaluation.scores import ScoreTable
from model.verdict import describe_band
from sharding.format import CLASSES

COLUMNS = (
    "what", "reals", "fakes", "accuracy", "recall", "false positives", "AUROC", "TPR at 1 % FPR",
    "TPR at 5 %",
)  # fmt: skip

LEAST_FIRST = ("TPR at 5 %", "TPR at 1 % FPR", "fakes", "reals", "accuracy", "AUROC")
"""Columns that a narrow terminal leaves out, in this order. Recall and false positives stay."""

SHOWN_FLIPS = 3


def _figure(figures: Mapping[str, Any], name: str) -> str | None:
    """Format a metric and its interval: `0.944 (0.901-0.978)`."""
    if figures[name] is None:
        return None
    between = figures["intervals"].get(name)
    return f"{figures[name]:.3f}" + (f" ({between[0]:.3f}-{between[1]:.3f})" if between else "")


def _row(name: str, figures: Mapping[str, Any]) -> list[Any]:
    if not (figures["reals"] and figures["fakes"]):  # one class: accuracy repeats recall or 1 - FPR
        figures = {**figures, "accuracy": None}
    with_interval = ("accuracy", "recall", "false_positive_rate", "auroc")
    plain = ("tpr_at_fpr_1", "tpr_at_fpr_5")
    return [
        name, figures["reals"], figures["fakes"],
        *(_figure(figures, figure) for figure in with_interval),
        *(figures[figure] for figure in plain),
    ]  # fmt: skip


def print_report(report: Mapping[str, Any]) -> None:
    """Print the headline, and for each set a table with notes."""
    for sentence in report["headline"]:
        console.say(sentence)
    if report["subset"]:
        console.say(on_subset(report["subset"]))
    if report["calibration"] is None and report["detector"]["kind"] == "scores":
        console.say("not calibrated: 0.5 decides")
    elif report["calibration"] is None:
        console.say(f"not calibrated: see `{command('evaluate')} calibrate --help`")
    for name, set_report in report["sets"].items():
        rows = [_row("overall", set_report["overall"])]
        if set_report["reference"]:
            rows.append(
                _row(
                    f"with reference reals of {set_report['reference_reals']['set']}",
                    set_report["reference"],
                )
            )
        rows += [_row(f"source {source}", m) for source, m in set_report["sources"].items()]
        rows += [_row(f"generator {gen}", m) for gen, m in set_report["generators"].items()]
        title = (
            f"{name}: {report['run']} step {report['step']}, threshold {report['threshold']:.3f}"
        )
        console.table(title, COLUMNS, rows, drop=LEAST_FIRST)
        overall = set_report["overall"]
        quality = [
            f"{n.upper()} {overall[n]:.3f}" for n in ("nll", "ece") if overall[n] is not None
        ]
        parts = [", ".join(quality), "In parentheses: 95 % intervals over groups of images."]
        console.say(". ".join(filter(None, parts)))
        if set_report["generators"] and (set_report["reference"] or overall)["reals"]:
            of = set_report["reference_reals"]["set"] if set_report["reference"] else "the set"
            console.say(f"Rows of generators use all real images of {of}.")
        if set_report["note"]:
            console.say(set_report["note"])
        if set_report["unreadable"]:
            console.say(
                f"images without a score: {len(set_report['unreadable']):,}, first: "
                f"{set_report['unreadable'][0]}"
            )
        if set_report["protocols"] and set_report["protocols"]["first_per_prompt"]:
            print_protocols(name, set_report["protocols"])
        if set_report["robustness"]:
            print_robustness(name, set_report["robustness"])


def print_protocols(name: str, protocols: Mapping[str, Any]) -> None:
    """Print the recall per generator on all images and on the first image of each prompt, with the
    mean and standard deviation over generators, and the false-positive rate at 0.5.
    """
    every, first = protocols["all_images"], protocols["first_per_prompt"]
    rows = []
    for generator, recall in every["generators"].items():
        other = first["generators"][generator]
        rows.append([generator, recall["images"], recall["recall"], recall["recall_at_0.5"],
                     other["images"], other["recall"], other["recall_at_0.5"]])  # fmt: skip
    for figure in ("mean", "std"):
        values = [(None, recall[figure], recall[f"{figure}_at_0.5"]) for recall in (every, first)]
        rows.append([f"{figure} over generators", *values[0], *values[1]])
    title = (
        f"{name}, recall by protocol: all {every['images']:,} images, and the first image of each "
        f"prompt ({first['images']:,})"
    )
    columns = ["generator", "images", "all", "all, at 0.5", "first images", "first",
               "first, at 0.5"]  # fmt: skip
    least_first = ["first, at 0.5", "all, at 0.5", "first images", "images"]
    console.table(title, columns, rows, drop=least_first)
    alarms = every["false_positive_rate_at_0.5"]
    known = "not known, without real images" if alarms is None else f"{alarms:.3f}"
    console.say(f"false positives at a threshold of 0.5: {known}")


def print_robustness(name: str, robustness: Mapping[str, Any]) -> None:
    """Print the metrics of every perturbation, and the codec-swap tests."""
    rows = [
        [row["name"], row["images"], _figure(row, "recall"), _figure(row, "false_positive_rate"),
         _figure(row, "auroc"), row["flip_rate"]]
        for row in robustness["perturbations"]
    ]  # fmt: skip
    columns = ["perturbation", "images", "recall", "false positives", "AUROC", "verdicts flipped"]
    least_first = ["images", "AUROC", "verdicts flipped"]
    console.table(f"{name}, perturbed", columns, rows, drop=least_first)
    for row in (*robustness["perturbations"], *robustness["codec_swap"]):
        if row["failed"]:
            console.say(
                f"{row['name']}: failed images: {row['failed']:,}, first: {row['failed_first']}"
            )
    if robustness["unreadable"]:
        console.say(f"unreadable images, not counted here: {robustness['unreadable']:,}")
    rows = []
    for row in robustness["codec_swap"]:
        changes = [
            _change(row["before"][figure], row["after"][figure])
            for figure in ("recall", "false_positive_rate", "auroc")
        ]
        rows.append(
            [
                row["what"],
                row["images"],
                *(_shift(row["shift"][label]) for label in CLASSES),
                *changes,
            ]
        )
    columns = [
        "codec swap",
        "images",
        "reals shift",
        "fakes shift",
        "recall",
        "false positives",
        "AUROC",
    ]
    title = f"{name}: do scores depend on the image or on its file format?"
    console.table(title, columns, rows, drop=["images", "AUROC", "recall", "false positives"])
    for label, container in robustness["containers"].items():
        said = "none, so no image can be converted to it"
        if container:
            said = f"{container['name']} ({container['share']:.0%} of them)"
        console.say(f"most common lossy format of {label}s: {said}")
    console.say(
        "Shift: change of the mean logit (positive: toward fake), its 95 % interval, and the shift "
        "as a share of the distance between the classes."
    )


def _shift(shift: Mapping[str, Any] | None) -> str | None:
    if shift is None:
        return None
    ends = "" if shift["low"] is None else f" ({shift['low']:+.2f} to {shift['high']:+.2f})"
    of_gap = "" if shift["of_gap"] is None else f" {shift['of_gap']:+.0%}"
    return f"{shift['mean']:+.2f}{ends}{of_gap}"


def print_comparison(before: ScoreTable, after: ScoreTable, changed: Sequence[Flip]) -> None:
    """Print two runs on the same images: figures, the interval of each difference, and flips."""
    rows = [
        [
            line.set
            if line.kind in ("overall", "reference")
            else f"  {line.kind[:-1]} {line.name}",
            line.images,
            *(_difference(line.changes[figure]) for figure in COMPARED),
        ]
        for line in compare(before, after)
    ]
    name_before, name_after = (
        "{run} step {step}".format(**table.evaluation) for table in (before, after)
    )
    columns = ["set", "images", "AUROC", "recall", "false positives"]
    title = f"{name_before} -> {name_after}"
    console.table(title, columns, rows, drop=["images", "AUROC"])
    console.say(
        "In parentheses: 95 % interval of the difference, on the same resamples of the images."
    )
    columns = ["verdicts flipped", "class", "images", "to wrong", "to right"]
    console.table("", columns, count_flips(before, changed))
    for said, fixed in (("to wrong", False), ("to right", True)):
        furthest = [flip for flip in changed if flip.fixed == fixed][:SHOWN_FLIPS]
        if furthest:
            console.say(f"largest changes {said}: " + ", ".join(map(_flip, furthest)))


def _difference(change: MetricChange | None) -> str | None:
    """Format a change: `0.544 -> 0.944 (+0.284 to +0.511)`."""
    if change is None:
        return None
    shown = f"{change.before:.3f} -> {change.after:.3f}"
    return shown if change.low is None else f"{shown} ({change.low:+.3f} to {change.high:+.3f})"


def _flip(flip: Flip) -> str:
    return f"{flip.key} ({flip.generator}) {flip.before:.2f} -> {flip.after:.2f}"


def _change(before: float | None, after: float | None) -> str | None:
    if before is None or after is None:
        return None
    return f"{before:.3f} -> {after:.3f}"


def print_calibration(calibration: Calibration) -> None:
    """Print a calibration: NLL and ECE at each temperature, thresholds and the band."""
    fits = {
        "uncalibrated": {"temperature": 1.0, **calibration.before},
        "until now": calibration.earlier,
        "fitted": {"temperature": calibration.temperature, **calibration.after},
    }
    rows = [[n, fit["temperature"], fit["nll"], fit["ece"]] for n, fit in fits.items() if fit]
    console.say(f"fitted to {calibration.reals:,} real and {calibration.fakes:,} fake images")
    console.table("calibration", ["", "temperature", "NLL", "ECE"], rows)
    lowest = min(fit["nll"] for fit in fits.values() if fit)
    if round(lowest, 3) < round(calibration.after["nll"], 3):  # rounded as in the table
        console.say(
            "The fitted NLL is not the lowest: with few images the fit leans toward doubt, since "
            "new images fit less well than these (Platt 1999)."
        )
    rule: str = calibration.threshold_at
    if rule == "max_fpr":
        rule += f", {calibration.method}"
    console.say(f"decision threshold {calibration.threshold:.3f} ({rule})")
    for what, label in (("decision threshold", "real"), ("lower end of uncertain", "fake")):
        if label in calibration.sources_used:
            console.say(f"{what}: {_sources(label, *calibration.sources_used[label])}")
    at_fpr = dict(calibration.at_fpr)
    at_1, at_5 = (console.cell(at_fpr.get(rate)) for rate in (0.01, 0.05))
    console.say(f"threshold for at most 1 % false positives: {at_1}, 5 %: {at_5}")
    if 0.01 not in at_fpr:
        console.say("no threshold for 1 %: too few real images, in all or in most sources")
    console.say(f"verdicts: {describe_band(calibration.band)}")


def _sources(label: str, used: int, of: int) -> str:
    """Describe the sources that decide a threshold: `used` of `of` have enough images."""
    sources = f"{console.counted(of, 'source')} with {label} images"
    if not used:
        return f"all {sources} together, because each has too few"
    return f"{used:,} of {sources}" + ("" if used == of else "; the others have too few")
