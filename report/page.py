"""Write `report.html`: the report of an evaluation as one page that loads nothing from the network.

Main entry: `write_page(report, scores, shards, folder, command)` writes the CSV tables and the
page, and returns a list of the paths of all files, the page last. It raises OSError if a file
cannot be written, and ValueError if a set of the report is not in the scores.

- `report`: the report, a dict, content of `report.json`. `evaluate()` and `report_on()` of
  `model/evaluation/run.py` return it.
- `scores`: the scores of all images, a `ScoreTable` (from `read_scores(path)` of
  `model/evaluation/scores.py`).
- `shards`: dict, set name -> `ShardSet` (from `open_shards([folder])` of `sharding/format.py`), for
  the pictures of mistakes. A missing set gets no pictures.
- `folder`: the `Path` of an existing folder to write to.
- `command`: the command line to show on the page, text.

`render(report, scores, mistakes, pictures, command)` returns the page as HTML text; `mistakes` is
the result of `mistakes_of()`, `pictures` that of `report.thumbnails.thumbnails()`.
`mistakes_of(report, scores)` returns a dict, set name -> list of its worst mistakes.
`rendered(template, name=value, ...)` fills a template file of this folder (its name) with these
values and returns the text. An `Estimate` is a figure with its 95 % interval; `estimate()` makes
one from figures of the report, or returns None. `HeadlineRates` are the recall and the
false-positive rate of a set, which are always shown together; `rates_of()` makes them. `percent()`,
`figure()` and `signed()` format a number as text, `NOTHING` if it is None.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from console import counted
from escape import printable
from model.evaluation.report import FAKE, on_subset, samples_of_set
from model.evaluation.scores import ScoreTable
from report.charts import histogram_chart, reliability_chart, robustness_chart, roc_chart
from report.tables import write_tables
from report.thumbnails import MOST, Misclassified, thumbnails, worst_mistakes
from sharding.format import CLASSES, ShardSet
from storage import write_text

PAGE_FILE = "report.html"

MOST_HISTOGRAMS = 24
"""Largest number of histograms per set; sources with most images come first."""


NOTHING = "\N{EN DASH}"
"""Text for a figure that is not defined."""


@dataclass(frozen=True)
class Estimate:
    """A figure, its 95 % interval (None if there is none), and the number of images."""

    value: float
    low: float | None
    high: float | None
    images: int


@dataclass(frozen=True)
class HeadlineRates:
    """Headline rates of a set: recall, always together with the false-positive rate.

    `reals_from` names the other set whose real images were used, if any. Without real images, the
    sentence `missing` is shown instead of the rate.

    Raises:
        ValueError: a recall without a false-positive rate and without `missing`.
    """

    recall: Estimate | None
    false_positive_rate: Estimate | None
    missing: str | None = None
    reals_from: str | None = None

    def __post_init__(self) -> None:
        if self.recall and not self.false_positive_rate and not self.missing:
            raise ValueError("a recall must be shown with a false-positive rate on real images")


def estimate(figures: Mapping[str, Any] | None, name: str, count: str) -> Estimate | None:
    """Return a metric of FIGURES with its interval; None if the metric is not defined."""
    if figures is None or figures.get(name) is None:
        return None
    low, high = figures["intervals"].get(name) or (None, None)
    return Estimate(figures[name], low, high, figures[count])


def rates_of(set_report: Mapping[str, Any]) -> HeadlineRates:
    """Return the rates of one set, with its own real images or the reference reals."""
    reference = set_report["reference"]
    figures = reference or set_report["overall"]
    false = estimate(figures, "false_positive_rate", "reals")
    missing = None
    if false is None:
        missing = set_report["note"] or "There are no real images here to measure false alarms on."
    return HeadlineRates(
        estimate(figures, "recall", "fakes"),
        false,
        missing,
        set_report["reference_reals"]["set"] if reference else None,
    )


def mistakes_of(report: Mapping[str, Any], scores: ScoreTable) -> dict[str, list[Misclassified]]:
    """Return set name -> its worst mistakes. The sets share `MOST` pictures; each set gets at least
    3 per class.
    """
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
    """Write the tables and `report.html` to `folder`; returns their paths, the page last.

    Pictures of mistakes are read from `shards`. `command` is the command line; it is shown on the
    page but not stored in `report.json`, so that equal scores give equal reports.
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
    mistakes: Mapping[str, Sequence[Misclassified]],
    pictures: Mapping[tuple[str, str], str],
    command: str,
) -> str:
    """Return the page as HTML. `mistakes` is from `mistakes_of`, `pictures` from `thumbnails`."""
    columns = _Columns(scores)
    sets = [
        _set(index, name, report, scores, columns, mistakes[name])
        for index, name in enumerate(report["sets"])
    ]
    return rendered(
        "page.html", report=report, sets=sets, pictures=pictures, command=command,
        evaluation=scores.evaluation, classes=CLASSES, on_subset=on_subset,
    )  # fmt: skip


def rendered(template: str, **values: Any) -> str:
    """Render a template of this folder with the shared style sheet."""
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    return _environment().get_template(template).render(style=style, **values)


_FOLDER = Path(__file__).parent


@functools.cache
def _environment() -> Environment:
    """Return the settings of the templates, which keep the compiled ones for further pages."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "figure": figure, "number": "{:,}".format,
                            "counted": counted, "signed": signed}  # fmt: skip
    return environment


def _shown(value: Any) -> Any:
    """Return a value for a template, with escapes for deceptive characters of a text."""
    return printable(value) if type(value) is str else value  # not `Markup`, which is trusted


def percent(value: float | None) -> str:
    """Format a share in percent with one decimal."""
    return NOTHING if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def figure(value: float | None) -> str:
    """Format a figure with three decimals."""
    return NOTHING if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """Format a change with a sign and two decimals."""
    return NOTHING if value is None else f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


class _Columns:
    """Score columns that the charts need, extracted once for all sets."""

    def __init__(self, scores: ScoreTable):
        self.source, self.sources = scores.codes("source")
        self.label = scores.numbers("label").astype(np.int64)
        self.probability = scores.numbers("probability")


def _set(
    index: int,
    name: str,
    report: Mapping[str, Any],
    scores: ScoreTable,
    columns: _Columns,
    mistakes: Sequence[Misclassified],
) -> dict[str, Any]:
    """Return the template values of one set."""
    set_report = report["sets"][name]
    own, references = samples_of_set(scores, name)
    rows = own
    if len(references):
        rows = np.concatenate([own[columns.label[own] == FAKE], references])
    labels, probabilities = columns.label[rows], columns.probability[rows]
    both = len(set(labels.tolist())) == 2
    return {
        "id": f"set-{index}",
        "name": name,
        "report": set_report,
        "figures": set_report["reference"] or set_report["overall"],
        "rates": rates_of(set_report),
        "roc": roc_chart(labels, probabilities, report["threshold"]) if both else None,
        "reliability": reliability_chart(labels, probabilities) if both else None,
        "histograms": _histograms(columns, own, report["band"]),
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
    # title, {family: line pattern}, axis label, x of the unchanged image, options of the chart
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
