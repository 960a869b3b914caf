"""`report.html`: one file that opens without a network, on a phone, in light and in dark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from model.evaluation.scores import ScoreTable
from report.charts import histogram_chart, reliability_chart, robustness_chart, roc_chart
from report.tables import write_tables
from report.thumbnails import MOST, Mistake, thumbnails, worst_mistakes
from sharding.format import CLASSES, ShardSet
from storage import write_text

PAGE_FILE = "report.html"

MOST_HISTOGRAMS = 24
"""Sources of a set that get a histogram, the largest first; the page says how many do not."""


NOTHING = "\N{EN DASH}"
"""What stands where a figure is not defined."""


@dataclass(frozen=True)
class Estimate:
    """A figure, its 95 % interval where there is one, and how many images it is of."""

    value: float
    low: float | None
    high: float | None
    images: int


@dataclass(frozen=True)
class Rates:
    """What stands at the head of a set: fakes found, and false alarms beside it, always.

    `reals_from` names the set whose reals these are, where they are another's. Without any reals
    `missing` is the sentence that says so, and stands in the place of the rate.

    Raises:
        ValueError: a recall with neither a false-positive rate nor that sentence.
    """

    recall: Estimate | None
    false_positive_rate: Estimate | None
    missing: str | None = None
    reals_from: str | None = None

    def __post_init__(self) -> None:
        if self.recall and not self.false_positive_rate and not self.missing:
            raise ValueError("a recall never stands without a false-positive rate on real images")


def estimate(figures: Mapping[str, Any] | None, name: str, count: str) -> Estimate | None:
    """A metric out of FIGURES; None where it is not defined."""
    if figures is None or figures.get(name) is None:
        return None
    low, high = figures["intervals"].get(name) or (None, None)
    return Estimate(figures[name], low, high, figures[count])


def rates_of(set_report: Mapping[str, Any], reals: Mapping[str, Any] | None) -> Rates:
    """The rates of one set of a report: its own, or its fakes with the reference reals of another
    set.
    """
    reference = set_report["reference"]
    figures = reference or set_report["overall"]
    false = estimate(figures, "false_positive_rate", "reals")
    missing = None
    if false is None:
        missing = set_report["note"] or "There are no real images here to measure false alarms on."
    return Rates(
        estimate(figures, "recall", "fakes"),
        false,
        missing,
        reals["set"] if reference and reals else None,
    )


def mistakes_of(report: Mapping[str, Any], scores: ScoreTable) -> dict[str, list[Mistake]]:
    """The worst mistakes of each set, as many as the page has room for."""
    count = max(3, MOST // (2 * max(1, len(report["sets"]))))
    return {
        name: worst_mistakes(scores, name, report["threshold"], count) for name in report["sets"]
    }


def write_page(
    report: Mapping[str, Any],
    scores: ScoreTable,
    shards: Mapping[str, ShardSet],
    folder: Path,
    command: str,
) -> list[Path]:
    """Write the tables and `report.html` to `folder`; returns what was written, the page last.
    `shards` are the sets that pictures of mistakes may be taken from, `command` is what was typed:
    it stands on the page only, since the same scores give the same report however they were asked
    for.
    """
    mistakes = mistakes_of(report, scores)
    shown = [mistake for of_set in mistakes.values() for mistake in of_set if mistake.set in shards]
    page = render(report, scores, mistakes, thumbnails(shards, shown), command)
    written = write_tables(report, folder)
    write_text(folder / PAGE_FILE, page)
    return [*written, folder / PAGE_FILE]


def render(
    report: Mapping[str, Any],
    scores: ScoreTable,
    mistakes: Mapping[str, Sequence[Mistake]],
    pictures: Mapping[tuple[str, str], str],
    command: str,
) -> str:
    """The page, from `report.json`, the scores it is of, `mistakes_of` and `thumbnails` of them."""
    columns = _Columns(report, scores)
    sets = [
        _set(index, name, set_report, report, columns, mistakes[name])
        for index, (name, set_report) in enumerate(report["sets"].items())
    ]
    return rendered(
        "page.html", report=report, sets=sets, pictures=pictures, command=command,
        evaluation=scores.evaluation, classes=CLASSES,
    )  # fmt: skip


def rendered(template: str, **values: Any) -> str:
    """A page of this folder, with the style that all of them share."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "figure": figure, "number": "{:,}".format,
                            "signed": signed}  # fmt: skip
    style = (folder / "page.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(style=style, **values)


def percent(value: float | None) -> str:
    """A share as a person reads it."""
    return NOTHING if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def figure(value: float | None) -> str:
    """A figure that is no share."""
    return NOTHING if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """A change."""
    return NOTHING if value is None else f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


class _Columns:
    """The columns that charts are made from, once for all sets."""

    def __init__(self, report: Mapping[str, Any], scores: ScoreTable):
        self.set, self.sets = scores.codes("set")
        self.source, self.sources = scores.codes("source")
        self.label = scores.numbers("label").astype(np.int64)
        self.probability = scores.numbers("probability")
        self.valid = scores.numbers("valid").astype(bool)
        self.reals: Mapping[str, Any] = report["reference_reals"] or {}

    def of_set(self, name: str, reference: bool) -> np.ndarray:
        """Readable rows of a set; or its fakes, and the reference reals."""
        rows = self.set == self.sets.index(name)
        if reference:
            others = self.set == self.sets.index(self.reals["set"])
            rows = rows & (self.label == 1) | others & (self.label == 0)
        return np.flatnonzero(rows & self.valid)


def _set(
    index: int,
    name: str,
    set_report: Mapping[str, Any],
    report: Mapping[str, Any],
    columns: _Columns,
    mistakes: Sequence[Mistake],
) -> dict[str, Any]:
    """What the page says of one set."""
    reference = bool(set_report["reference"])
    rows = columns.of_set(name, reference)
    labels, probabilities = columns.label[rows], columns.probability[rows]
    both = len(set(labels.tolist())) == 2
    own_rows = columns.of_set(name, False)
    return {
        "id": f"set-{index}",
        "name": name,
        "report": set_report,
        "figures": set_report["reference"] if reference else set_report["overall"],
        "rates": rates_of(set_report, report["reference_reals"]),
        "roc": roc_chart(labels, probabilities, report["threshold"]) if both else None,
        "reliability": reliability_chart(labels, probabilities) if both else None,
        "histograms": _histograms(columns, own_rows, report["band"]),
        "hidden_histograms": max(0, len(set_report["sources"]) - MOST_HISTOGRAMS),
        "curves": _curves(set_report["robustness"]["perturbations"])
        if set_report["robustness"]
        else [],
        "mistakes": {
            label: [mistake for mistake in mistakes if mistake.label == label] for label in (0, 1)
        },
    }


def _histograms(columns: _Columns, rows: np.ndarray, band: Sequence[float]) -> list[dict[str, Any]]:
    sources = columns.source[rows]
    codes, counts = np.unique(sources, return_counts=True)
    result = []
    for code in codes[np.argsort(-counts, kind="stable")][:MOST_HISTOGRAMS]:
        source_rows = rows[sources == code]
        reals, fakes = (
            columns.probability[source_rows[columns.label[source_rows] == label]]
            for label in (0, 1)
        )
        chart = histogram_chart(reals, fakes, band)
        result.append({"name": columns.sources[code], "reals": len(reals), "fakes": len(fakes),
                       "chart": chart})  # fmt: skip
    return result


_CURVES: tuple[tuple[str, dict[str, str], str, float | None, dict[str, bool]], ...] = (
    # title, families with their line pattern, axis, what the image itself is on it, its options
    ("Compression", {"JPEG": "solid", "WebP": "dashed", "AVIF": "dotted"}, "quality", None,
     {"falling": True}),
    ("Size", {"scale": "solid"}, "scale", 1.0, {"doubling": True}),
    ("Blur", {"blur": "solid"}, "sigma, pixels", 0.0, {}),
    ("Noise", {"noise": "solid"}, "sigma, gray levels", 0.0, {}),
)  # fmt: skip


def _curves(perturbations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    original = next((row for row in perturbations if row["family"] == "original"), None)
    result = []
    for title, families, xlabel, at_original, options in _CURVES:
        lines = []
        for family, pattern in families.items():
            rows = [row for row in perturbations if row["family"] == family]
            points = [(row["amount"], row) for row in rows]
            if points and original and at_original is not None:
                points.append((at_original, original))
            points.sort(key=lambda point: point[0])
            xs = [x for x, _row in points]
            for of_class, figure_name in (("fake", "recall"), ("real", "false_positive_rate")):
                lines.append((of_class, pattern, xs, [row[figure_name] for _x, row in points]))
        if any(xs for _class, _pattern, xs, _ys in lines):
            chart = robustness_chart(lines, xlabel, **options)
            result.append({"title": title, "chart": chart, "patterns": families})
    return result
