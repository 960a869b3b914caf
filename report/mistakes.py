"""Kept mistakes that were measured again, as a table on the terminal."""

from collections.abc import Mapping
from typing import Any

import console

MOST_ROWS = 50
"""Rows of the table; the gravest come first, and a JSON file has all."""


def print_regressions(result: Mapping[str, Any]) -> None:
    """Print what `model.mistakes.regressions.report_of` gives."""
    rows = result["mistakes"]
    counts = ", ".join(f"{count:,} {name}" for name, count in result["counts"].items() if count)
    console.table(
        f"{console.counted(len(rows), 'mistake')}, before and after {result['detector']}",
        ["image", "it is", "outcome", "before", "after", "detector before"],
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
        console.say(f"and {len(rows) - MOST_ROWS:,} more; --json FILE has all")
    reasons = [row["reason"] for row in rows if row["reason"]]
    for reason in dict.fromkeys(reasons):
        console.say(f"not measurable, {reasons.count(reason):,}: {reason}")
    console.say(counts)


def _said(verdict: Mapping[str, Any] | None) -> str | None:
    """A verdict and its score, for a cell."""
    return f"{verdict['verdict']} {verdict['score']:.3f}" if verdict else None
