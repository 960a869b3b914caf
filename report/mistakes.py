"""Print how a detector now judges the images of collected mistakes, which were scored again.

Main entry: `print_regressions(result)` takes the dict that `report_of(rows, detector)` of
`model/mistakes/regressions.py` returns: the detector, the counts per outcome and, for each mistake,
its label, its outcome (newly wrong, still wrong, uncertain, fixed or not measurable) and the
verdict before and after. It prints to standard output a table of at most `MOST_ROWS` rows, the
reasons of images that were not scored, and the counts. It returns nothing and writes no file.
"""

from collections.abc import Mapping
from typing import Any

import console

MOST_ROWS = 50
"""Largest number of table rows; the most important come first, and --out writes all."""


def print_regressions(result: Mapping[str, Any]) -> None:
    """Print the result of `model.mistakes.regressions.report_of`."""
    rows = result["mistakes"]
    counts = ", ".join(f"{count:,} {name}" for name, count in result["counts"].items() if count)
    console.table(
        f"{console.counted(len(rows), 'mistake')}, before and after {result['detector']}",
        ["image", "label", "outcome", "before", "after", "detector before"],
        [
            [
                row["sha256"][:12], row["label"], row["outcome"], _said(row["before"]),
                _said(row["after"]), row["before"]["detector"],
            ]
            for row in rows[:MOST_ROWS]
        ],
        drop=["detector before"],
    )  # fmt: skip
    if len(rows) > MOST_ROWS:
        console.say(f"and {len(rows) - MOST_ROWS:,} more; --out FOLDER writes all")
    reasons = [row["reason"] for row in rows if row["reason"]]
    for reason in dict.fromkeys(reasons):
        console.say(f"not scored, {reasons.count(reason):,}: {reason}")
    console.say(counts)


def _said(verdict: Mapping[str, Any] | None) -> str | None:
    """Format a verdict and its score for a table cell."""
    return f"{verdict['verdict']} {verdict['score']:.3f}" if verdict else None
