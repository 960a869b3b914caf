"""Plot the curves of a training run: loss, learning rate and validation metrics over the steps.

Main entry: `draw(run, out)` takes the `Path` of a run's folder (it reads `metrics.jsonl` there) and
the `Path` of a PNG file, in an existing folder. It writes the PNG and returns the last logged step,
an int. A dotted line in the plot marks the best checkpoint, if there is one.

It raises `CurvesError` (a `ValueError`) if the folder is no run or no training step is logged yet,
and another `ValueError` if `metrics.jsonl`, `baseline_metrics.json` or the `meta.json` of a
checkpoint is damaged, and `OSError` if the PNG cannot be written.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from reprlib import repr as short
from typing import Any

from model import checkpoint
from model.metrics import Validation
from model.recipe import BASELINE_FILE
from model.tracking.history import HISTORY_FILE, rows_of
from storage import parse_json, read_text, write_atomically

_PANELS = (
    ("recall", "recall of fakes"),
    ("false_positive_rate", "false positives on reals"),
    ("auroc", "AUROC"),
)


_FONTS = (
    "DejaVu Sans", "Noto Sans CJK JP", "Hiragino Sans", "Yu Gothic", "Noto Sans Devanagari",
    "Nirmala UI",
)  # fmt: skip
"""Fonts for the name of a run, by falling priority. The first one comes with matplotlib and has no
letters of East and South Asia."""


class CurvesError(ValueError):
    """A run that has nothing to plot. The message says what there is."""


def draw(run: Path, out: Path) -> int:
    """Write a PNG and return the last logged step. It shows loss and learning rate at each logged
    step, and recall, false-positive rate and AUROC of each validation set. A run that starts from a
    trained detector also shows the metrics before its first step. A line marks the best checkpoint.

    Raises:
        CurvesError: `run` is no run, or has not logged a step yet.
    """
    from matplotlib.figure import Figure  # a slow import
    from matplotlib.font_manager import get_font_names

    if not (run / HISTORY_FILE).exists():
        beside = sorted(path.parent.name for path in run.parent.glob(f"*/{HISTORY_FILE}"))
        raise CurvesError(
            f"{run} is no run (it has no {HISTORY_FILE}); {run.parent} holds "
            f"{', '.join(beside) or 'none'}"
        )
    steps, sets, last = _read(run)
    if not steps:
        raise CurvesError(f"{run} has not logged a step yet; a row comes every run.log_every steps")
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    installed = get_font_names()
    figure.suptitle(run.name, family=[name for name in _FONTS if name in installed])
    _line(axes[0], "loss", [(step, loss) for step, loss, _lr in steps], "training")
    _line(axes[1], "learning rate of the head", [(step, lr) for step, _loss, lr in steps])
    for panel, (name, title) in zip(axes[2:5], _PANELS, strict=True):
        for label, rows_of_set in sets.items():
            _line(panel, title, [(step, row[name]) for step, row in rows_of_set], label)
        panel.set_ylim(-0.02, 1.02)
    best = checkpoint.best_of(run)
    for panel in axes[:5]:
        if best:
            step = checkpoint.read_meta(best)["step"]
            panel.axvline(step, color="0.6", linestyle=":", label="best checkpoint")
        panel.set_xlabel("step")
        panel.grid(color="0.9")
    axes[5].axis("off")  # only for the legend
    entries = {
        label: line
        for panel in axes[:5]
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    axes[5].legend(entries.values(), entries.keys(), loc="center", frameon=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s)Glyph .* missing")  # draws a box
        write_atomically(out, lambda partial: figure.savefig(partial, format="png", dpi=100))
    return last


def _read(
    run: Path,
) -> tuple[list[tuple[int, float, float]], dict[str, list[tuple[int, dict]]], int]:
    """Return the data to draw of a run: step, loss and learning rate of each logged step, (step,
    metrics) of each validation set, by rising step, and the last step. The rows of sources are
    dropped: they may not fit into memory.
    """
    steps, last = [], 0
    metrics_of_set: dict[str, list[tuple[int, dict]]] = {}
    if (file := run / BASELINE_FILE).exists():
        before = Validation.from_json(parse_json(read_text(file)), file)
        metrics_of_set = {name: [(0, asdict(metrics))] for name, metrics in before.sets.items()}
    for row in rows_of(run):
        last = row["step"]
        kind, _, name = row["kind"].partition("/")
        if kind == "train":
            _check(run, row, ("loss", "lr"))
            steps.append((last, row["loss"], row["lr"]))
        if kind == "validate" and name and "/" not in name:  # with a slash it is a source
            _check(run, row, [name for name, _title in _PANELS])
            metrics_of_set.setdefault(name, []).append((last, row))
    return steps, metrics_of_set, last


def _check(run: Path, row: Mapping[str, Any], names: Sequence[str]) -> None:
    """Check that a row of `metrics.jsonl` has these figures: numbers, or None."""
    for name in names:
        if name not in row or type(row[name]) not in (int, float, type(None)):
            raise ValueError(
                f"{run / HISTORY_FILE}: a row of step {row['step']} has {name} "
                f"{short(row.get(name))}, expected a number; restore the file from a copy"
            )


def _line(panel: Any, title: str, points: list[tuple[float, float]], label: str = "") -> None:
    """Plot one curve. Sets are plotted in the same order in every panel, so their colors agree."""
    panel.set_title(title, fontsize=11)
    x, values = zip(*points, strict=True)
    y = [float("nan") if value is None else value for value in values]  # None: a class is missing
    marker = "o" if len(points) < 40 else ""
    panel.plot(x, y, marker=marker, markersize=3.5, label=label or "_", color=_color(panel, label))


def _color(panel: Any, label: str) -> str:
    """Return dark gray for training, else the next of matplotlib's ten colors."""
    return "0.2" if label in ("", "training") else f"C{len(panel.lines)}"
