"""Runs side by side: a table in the terminal, and `comparison.html`, `.csv` and `.json`."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import console
from escape import without_secrets
from model.evaluation.compare import shared_samples
from model.evaluation.run import SPEED_FILE, find_scores
from model.evaluation.scores import ScoreTable, read_scores
from model.evaluation.side_by_side import FIGURES, MEAN, Run, named_runs
from report.page import rendered
from report.tables import table_csv
from storage import write_text

PAGE_FILE, TABLE_FILE, JSON_FILE = "comparison.html", "comparison.csv", "comparison.json"

COLUMNS = (
    "run", "AUROC", "behind the best", "recall at 1 %", "recall at 5 %", "recall",
    "false positives", "common 1 %", "common 5 %", "worst source", "worst generator", "robustness",
    "ECE", "ranks", "images/s",
)  # fmt: skip

LEAST_FIRST = (
    "common 1 %", "images/s", "ECE", "ranks", "robustness", "common 5 %", "worst source",
    "worst generator", "recall at 1 %", "behind the best", "recall", "false positives",
)  # fmt: skip
"""What a narrow terminal leaves out, in this order."""


def read_runs(paths: Sequence[Path], *, intersect: bool = False) -> tuple[list[Run], list[int]]:
    """The runs of folders of reports or of their files, on the images that all could read, and how
    many images of each are left out.

    Raises:
        ValueError: no scores there, or of other images; see `shared_samples`.
    """
    files = [find_scores(path) for path in paths]
    tables = [read_scores(file) for file in files]
    names = named_runs([_name_of(table) for table in tables])
    shared = shared_samples(*tables, intersect=intersect)
    runs = [
        Run(name, table, _speed_beside(file))
        for name, table, file in zip(names, shared, files, strict=True)
    ]
    return runs, [len(table) - len(shared[0]) for table in tables]


def _name_of(table: ScoreTable) -> str:
    about = table.evaluation
    detector = about.get("detector")
    if detector is None or detector["kind"] == "checkpoint":
        return f"{about['run']} step {about['step']}"
    return str(detector["name"])


def _speed_beside(scores: Path) -> float | None:
    """Images a second, where the evaluation said it."""
    try:
        text = scores.with_name(SPEED_FILE).read_text(encoding="utf-8")
        return float(json.loads(text)["images_per_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def print_side_by_side(sets: Mapping[str, Any]) -> None:
    """A table for each set, and how to read it."""
    for name, entry in sets.items():
        rows = [_row(run) for run in entry["runs"]]
        reals = f" of {entry['reference']}" if entry["reference"] else ""
        title = f"{name}: {entry['fakes']:,} fakes and {entry['reals']:,} reals{reals}"
        console.table(title, COLUMNS, rows, drop=LEAST_FIRST)
        console.say(stability_sentence(entry["stability"]))
    console.say(
        "In brackets: 95 % intervals; behind the best: that of the difference of AUROC, on the "
        "same resamples of the images. Recall at 1 % and 5 %: at each run's own threshold for so "
        "many false positives here; common: recall / false positives at one threshold for all."
    )


def stability_sentence(stability: Mapping[str, Any] | None) -> str:
    """How far the ranking holds from source to source, in words."""
    if stability is None:
        return "Too few sources or runs to say whether the ranking holds from source to source."
    return (
        f"Over {stability['sources']} sources the rankings agree by {stability['mean']:.2f} on "
        f"average and {stability['least']:.2f} at the least (Spearman; 1: the same everywhere, 0: "
        "the images decide who wins)."
    )


def _row(run: Mapping[str, Any]) -> list[Any]:
    behind = run["auroc"]["behind"]
    common = [
        None if rates["recall"] is None or rates["false_positive_rate"] is None
        else f"{rates['recall']:.3f} / {rates['false_positive_rate']:.3f}"
        for rates in (run["common"]["1"], run["common"]["5"])
    ]  # fmt: skip
    return [
        run["name"], _with_interval(run["auroc"]),
        f"{behind[0]:+.3f} to {behind[1]:+.3f}" if behind else None,
        _with_interval(run["recall_at_1"]), _with_interval(run["recall_at_5"]),
        run["recall"]["value"], run["false_positive_rate"]["value"], *common,
        *(_named(run[key]) for key in ("worst_source", "worst_generator", "worst_perturbation")),
        run["ece"], ranks_text(run["ranks"]),
        None if run["images_per_s"] is None else f"{run['images_per_s']:.1f}",
    ]  # fmt: skip


def _with_interval(figure: Mapping[str, Any]) -> str | None:
    if figure["value"] is None:
        return None
    ends = "" if figure["low"] is None else f" ({figure['low']:.2f}-{figure['high']:.2f})"
    return f"{figure['value']:.3f}{ends}"


def _named(worst: Mapping[str, Any] | None) -> str | None:
    return None if worst is None else f"{worst['value']:.3f} {worst['name']}"


def ranks_text(ranks: Sequence[float] | None) -> str | None:
    """`1 to 3`, or `2`."""
    if ranks is None:
        return None
    low, high = ranks
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def write_comparison(sets: Mapping[str, Any], runs: Sequence[Path], out: Path) -> list[Path]:
    """Write the page and both tables to `out`; returns what was written, the page last."""
    out.mkdir(parents=True, exist_ok=True)
    command = without_secrets(shlex.join(["python", *sys.argv]))
    content = {"runs": [str(path) for path in runs], "sets": sets}
    write_text(out / JSON_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_text(out / TABLE_FILE, comparison_csv(sets))
    write_text(out / PAGE_FILE, comparison_page(sets, command))
    return [out / JSON_FILE, out / TABLE_FILE, out / PAGE_FILE]


def comparison_csv(sets: Mapping[str, Any]) -> str:
    """A row per set and run: each figure with its interval and that of its difference to the best,
    and the lines that are worst.
    """
    ends = ("", "_low", "_high", "_behind_low", "_behind_high")
    worst = ("worst_source", "worst_generator", "worst_perturbation")
    columns = ["set", "name", "threshold", *(f"{name}{end}" for name in FIGURES for end in ends)]
    columns += [f"common_{rate}_{key}" for rate in ("1", "5")
                for key in ("recall", "false_positive_rate")]  # fmt: skip
    columns += ["ece", *(f"{name}{end}" for name in worst for end in ("", "_name"))]
    columns += ["best_rank", "worst_rank", "images_per_s"]
    rows = []
    for set_name, entry in sets.items():
        for run in entry["runs"]:
            row = {**run, "set": set_name}
            for name in FIGURES:
                figure = run[name]
                low, high = figure["behind"] or (None, None)
                values = (figure["value"], figure["low"], figure["high"], low, high)
                row |= {f"{name}{end}": v for end, v in zip(ends, values, strict=True)}
            for rate, rates in run["common"].items():
                row |= {f"common_{rate}_{key}": value for key, value in rates.items()}
            for name in worst:
                line = run[name] or {"value": None, "name": None}
                row |= {name: line["value"], f"{name}_name": line["name"]}
            row["best_rank"], row["worst_rank"] = run["ranks"] or (None, None)
            rows.append(row)
    return table_csv(columns, rows)


def comparison_page(sets: Mapping[str, Any], command: str) -> str:
    """One file that opens without a network, on a phone, in light and in dark."""
    return rendered(
        "comparison.html", sets=sets, command=command, mean=MEAN,
        sentence=stability_sentence, ranks_text=ranks_text,
    )  # fmt: skip
