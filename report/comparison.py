"""Compare several evaluation runs: a terminal table, and `comparison.html`, `.csv` and `.json`.

Main entries: `read_runs(paths, *, intersect=False)` returns a pair. The first entry is a list with
a `ComparedRun` for each path, reduced to the images that all runs could read. The second is a list
of how many images of each run were left out. A `ComparedRun` has the `name`; `scores`, a
`ScoreTable`; and `images_per_s`, a number or None if it is unknown.

- `paths`: a list of `Path`s, each the folder of a report, or a file in it.
- `intersect`: whether to go on with the shared images if the runs scored different images.

It raises ValueError if a path has no scores, if the images differ and `intersect` is false, if no
image is in all runs, or if an image is real in one run and fake in another. It raises OSError if a
file cannot be read.

`side_by_side()` of `model/evaluation/side_by_side.py` takes the list of `ComparedRun`s and returns
the dict `sets` (name of a set -> figures of each run), which the other functions take.
`print_side_by_side(sets)` prints a table per set. `write_comparison(sets, runs, out)` writes the
three files and returns a list of their paths, the page last.

- `sets`: that dict.
- `runs`: the list of paths that `read_runs()` took (not the `ComparedRun`s). They are recorded in
  `comparison.json`.
- `out`: the `Path` of the folder to write to, which is made if needed.

`comparison_csv(sets)` and `comparison_page(sets, command)` return the CSV and HTML text; the page
shows the command line `command`. `stability_sentence(stability)` takes the entry `stability` of a
set and says in words whether the runs have the same order of quality on each image source; None
means that there are too few to compare. `trained_sentences(name, entry)` takes the name and the
entry of a set, and returns the warnings about runs that were trained on it, or perhaps were.
`ranks_text(ranks)` formats a range of ranks (lowest, highest) as "1 to 3"; it returns None for
None.
"""

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import console
from escape import as_json, as_utf8, without_secrets
from model.evaluation.compare import shared_samples
from model.evaluation.run import SPEED_FILE, find_scores
from model.evaluation.scores import ScoreTable, read_scores
from model.evaluation.side_by_side import FIGURES, MEAN, ComparedRun, named_runs
from report.page import rendered
from report.tables import table_csv
from storage import parse_json, read_text, write_text

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
"""Columns that a narrow terminal leaves out, in this order."""


NOT_ALIKE = (
    "Robustness is left out: it was measured on other images in some of the runs. Measure all with "
    "the same --robustness and --subset."
)


def read_runs(
    paths: Sequence[Path], *, intersect: bool = False
) -> tuple[list[ComparedRun], list[int]]:
    """Read runs from report folders or report files, reduced to the images that all runs scored.
    Also returns how many images of each run were left out.

    Raises:
        ValueError: a path has no scores, or the runs scored different images and `intersect` is
            false; see `shared_samples`.
    """
    files = [find_scores(path) for path in paths]
    tables = [read_scores(file) for file in files]
    names = named_runs([_name_of(table) for table in tables])
    shared = shared_samples(*tables, intersect=intersect)
    runs = [
        ComparedRun(name, table, _speed_beside(file))
        for name, table, file in zip(names, shared, files, strict=True)
    ]
    return runs, [len(table) - len(shared[0]) for table in tables]


def _name_of(table: ScoreTable) -> str:
    about = table.evaluation
    detector = about["detector"]
    if detector["kind"] == "checkpoint":
        return f"{about['run']} step {about['step']}"
    return str(detector["name"])


def _speed_beside(scores: Path) -> float | None:
    """Return the images per second next to a scores file, or None if there is no speed."""
    try:
        speed = parse_json(read_text(scores.with_name(SPEED_FILE)))["images_per_s"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(speed) if type(speed) in (int, float) and 0 < speed < math.inf else None


def print_side_by_side(sets: Mapping[str, Any]) -> None:
    """Print a table for each set, and an explanation of its columns."""
    for name, entry in sets.items():
        rows = [_row(run) for run in entry["runs"]]
        reals = f" of {entry['reference']}" if entry["reference"] else ""
        counts = [console.counted(entry[f"{noun}s"], noun) for noun in ("fake", "real")]
        title = f"{name}: {' and '.join(counts)}{reals}"
        for warning in trained_sentences(name, entry):
            console.say(warning)
        console.table(title, COLUMNS, rows, drop=LEAST_FIRST)
        if not entry["perturbed_alike"]:
            console.say(NOT_ALIKE)
        console.say(stability_sentence(entry["stability"]))
    console.say(
        "In parentheses: 95 % intervals. Behind the best: interval of the difference in AUROC to "
        "the best run, on the same resamples. Recall at 1 % and 5 %: at the threshold of each run "
        "for this false-positive rate. Common: recall / false positives at one threshold for all. "
        "Worst: the lowest AUROC, or recall of a generator, and on how many images."
    )


def trained_sentences(name: str, entry: Mapping[str, Any]) -> list[str]:
    """Return up to two warnings: on runs that were trained on a set or its reference, and on runs
    that perhaps were. `MEAN` contains these runs.
    """
    sets = f"{name} or {entry['reference']}" if entry["reference"] else name
    sentences = []
    for key, how, little in (
        ("trained_on", f"TRAINED ON {sets}", "nothing"),
        ("maybe_trained_on", f"PERHAPS TRAINED ON IMAGES OF {sets}, by another set of that name",
         "perhaps little"),
    ):  # fmt: skip
        if runs := [run["name"] for run in entry["runs"] if run[key] and run["name"] != MEAN]:
            sentences.append(
                f"{how}: {', '.join(runs)}. These figures, and those of the mean of all, say "
                f"{little} about images that the detector has not seen"
            )
    return sentences


def stability_sentence(stability: Mapping[str, Any] | None) -> str:
    """Describe in words how similar the ranking of the runs is on different sources."""
    if stability is None:
        return "Too few sources or runs to compare the rankings of different sources."
    return (
        f"Rankings on {stability['sources']} sources: the rank correlation of two sources is "
        f"{stability['mean']:.2f} on average and {stability['least']:.2f} at least (Spearman; 1: "
        "all sources rank the runs alike, 0: the choice of images decides which run is best)."
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
    ends = "" if figure["low"] is None else f" ({figure['low']:.3f}-{figure['high']:.3f})"
    return f"{figure['value']:.3f}{ends}"


def _named(worst: Mapping[str, Any] | None) -> str | None:
    return None if worst is None else f"{worst['value']:.3f} {worst['name']} ({worst['images']:,})"


def ranks_text(ranks: Sequence[float] | None) -> str | None:
    """Format a range of ranks: `1 to 3`, or `2` if both ends are equal."""
    if ranks is None:
        return None
    low, high = ranks
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def write_comparison(sets: Mapping[str, Any], runs: Sequence[Path], out: Path) -> list[Path]:
    """Write the page, the CSV and the JSON file to `out`; returns their paths, the page last."""
    out.mkdir(parents=True, exist_ok=True)
    command = without_secrets(shlex.join(["python", *sys.argv]))
    content = {"runs": [str(path) for path in runs], "sets": sets}
    write_text(out / JSON_FILE, as_json(content, indent=1, allow_nan=False) + "\n")
    write_text(out / TABLE_FILE, as_utf8(comparison_csv(sets)))
    write_text(out / PAGE_FILE, as_utf8(comparison_page(sets, command)))
    return [out / JSON_FILE, out / TABLE_FILE, out / PAGE_FILE]


def comparison_csv(sets: Mapping[str, Any]) -> str:
    """Return CSV with a row per set and run: each figure with its interval and the interval of its
    difference to the best run, and the worst source, generator and perturbation.
    """
    ends = ("", "_low", "_high", "_behind_low", "_behind_high")
    worst = ("worst_source", "worst_generator", "worst_perturbation")
    columns = ["set", "name", "threshold", *(f"{name}{end}" for name in FIGURES for end in ends)]
    columns += [f"common_{rate}_{key}" for rate in ("1", "5")
                for key in ("recall", "false_positive_rate")]  # fmt: skip
    columns += ["ece", *(f"{name}{end}" for name in worst for end in ("", "_name", "_images"))]
    columns += ["best_rank", "worst_rank", "images_per_s", "trained_on", "maybe_trained_on"]
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
                line = run[name] or dict.fromkeys(("value", "name", "images"))
                row |= {name: line["value"], f"{name}_name": line["name"]}
                row[f"{name}_images"] = line["images"]
            row["best_rank"], row["worst_rank"] = run["ranks"] or (None, None)
            rows.append(row)
    return table_csv(columns, rows)


def comparison_page(sets: Mapping[str, Any], command: str) -> str:
    """Return the comparison as one HTML page that loads nothing from the network."""
    return rendered(
        "comparison.html", sets=sets, command=command, mean=MEAN,
        sentence=stability_sentence, trained=trained_sentences, ranks_text=ranks_text,
        not_alike=NOT_ALIKE,
    )  # fmt: skip
