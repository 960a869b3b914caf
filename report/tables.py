"""Write the figures of an evaluation report as CSV tables.

Main entry: `write_tables(report, folder)` takes the report (a dict, the content of `report.json`,
from `evaluate()` or `report_on()` of `model/evaluation/run.py`) and the `Path` of an existing
folder. It writes these files and returns a list of their paths:

- `figures.csv`: for each set, the metrics of its own images and, if a reference set is used for it,
  those of its fakes together with the real images of the reference set. Also the metrics of each
  class, source and generator.
- `robustness.csv`, only if perturbations were measured: the metrics after each perturbation and
  codec swap. If none were, such a file of an earlier report is deleted.

Values are not rounded; missing ones are empty. OSError is raised if a file cannot be written.

`figures_csv(report)` and `robustness_csv(report)` return the text of these files.
`table_csv(columns, rows)` takes a list of column names and a list of dicts, one for each row, and
returns CSV text with a header. Of a dict, only the entries in `columns` are written; texts that a
spreadsheet would run as a formula get a `'` in front, and characters that a terminal would execute
or that deceive a reader are escapes (`printable` of `escape.py`).
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from escape import printable, spreadsheet_cell
from model.metrics import Metrics
from storage import write_text

FIGURES_FILE, ROBUSTNESS_FILE = "figures.csv", "robustness.csv"

_COUNTS = ("count", "reals", "fakes")
_METRICS = [field.name for field in fields(Metrics) if field.name not in _COUNTS]


def write_tables(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `figures.csv`, and `robustness.csv` if perturbations were measured; returns the paths.
    Without perturbations, a `robustness.csv` of an earlier report is deleted. Values are those of
    `report.json`, not rounded; missing values are empty cells.
    """
    tables = {FIGURES_FILE: figures_csv(report)}
    if any(set_report["robustness"] for set_report in report["sets"].values()):
        tables[ROBUSTNESS_FILE] = robustness_csv(report)
    else:
        (folder / ROBUSTNESS_FILE).unlink(missing_ok=True)
    for name, text in tables.items():
        write_text(folder / name, text)
    return [folder / name for name in tables]


def figures_csv(report: Mapping[str, Any]) -> str:
    """Return CSV with a row per set, class, source and generator. Columns: `set`, `what` (overall,
    reference, class, source or generator), `name`, the counts, each metric and its interval.
    """
    columns = ["set", "what", "name", *_COUNTS]
    columns += [f"{name}{end}" for name in _METRICS for end in ("", "_low", "_high")]
    rows = []
    for name, set_report in report["sets"].items():
        lines = [("overall", "", set_report["overall"]), ("reference", "", set_report["reference"])]
        for what, key in (("class", "classes"), ("source", "sources"), ("generator", "generators")):
            lines += [
                (what, line_name, figures) for line_name, figures in set_report.get(key, {}).items()
            ]
        for what, line_name, figures in lines:
            if figures:
                rows.append({"set": name, "what": what, "name": line_name} | _flat(figures))
    return table_csv(columns, rows)


def robustness_csv(report: Mapping[str, Any]) -> str:
    """Return CSV with a row per set and perturbation, and per set and codec-swap test."""
    rates = ("recall", "false_positive_rate", "balanced_accuracy", "auroc")
    shifts = [f"shift_{name}{end}" for name in ("real", "fake") for end in ("", "_low", "_high")]
    columns = ["set", "kind", "name", "what", "images", *rates]
    columns += [f"{name}_before" for name in rates]
    columns += ["flip_rate", "flip_rate_real", "flip_rate_fake", *shifts, "failed"]
    rows = []
    for name, set_report in report["sets"].items():
        measured = set_report["robustness"] or {"perturbations": (), "codec_swap": ()}
        for line in measured["perturbations"]:
            rows.append({"set": name, "kind": "perturbation"} | line | _shifts(line["shift"]))
        for line in measured["codec_swap"]:
            before = {f"{key}_before": value for key, value in line["before"].items()}
            row = {"set": name, "kind": "codec swap"} | line | line["after"] | before
            rows.append(row | _shifts(line["shift"]))
    return table_csv(columns, rows)


def _flat(figures: Mapping[str, Any]) -> dict[str, Any]:
    ends = {
        f"{name}_{end}": value
        for name, pair in figures["intervals"].items()
        for end, value in zip(("low", "high"), pair, strict=True)
    }
    return {**figures, **ends}


def _shifts(shift: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"shift_{name}{end}": class_shift[key]
        for name, class_shift in shift.items()
        if class_shift
        for end, key in (("", "mean"), ("_low", "low"), ("_high", "high"))
    }


def table_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return CSV with a header. Entries that are not in `columns` are left out, and texts are
    escaped against formulas and for terminals.
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                name: spreadsheet_cell(printable(value)) if isinstance(value, str) else value
                for name, value in row.items()
            }
        )
    return stream.getvalue()
