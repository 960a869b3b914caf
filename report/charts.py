"""Draw the charts of an evaluation as SVG markup for an HTML page with light and dark colors.

Main entries. Each returns the SVG as `Markup` (text of markupsafe), with CSS variables of the page
as colors (`--real`, `--fake`, `--ink` ...).

- `roc_chart(labels, probabilities, threshold)`: the ROC curve with a dot at the decision threshold.
  `labels` is an int array (N,), 0 for real and 1 for fake, with both classes. `probabilities` is a
  float array (N,), the probabilities of fake. `threshold` is one probability.
- `reliability_chart(labels, probabilities)`: the share of fakes by predicted probability. The
  arrays are as above.
- `histogram_chart(reals, fakes, band)`: `reals` and `fakes` are the probabilities of fake for the
  real and for the fake images of one source, float arrays, which may be empty. `band` is the
  uncertain band, a pair (low, high).
- `robustness_chart(lines, xlabel, *, falling=False, doubling=False)`: rates of images called fake
  (recall of fakes, false positives of reals) against the amount of a perturbation, such as the JPEG
  quality. `lines` is a list of tuples: class ("real" or "fake"), pattern ("solid", "dashed" or
  "dotted"), list of x values, and list of as many rates, each 0 to 1 or None (no dot). `xlabel` is
  the title of the x axis, a fixed text: it also becomes an attribute, without escapes. `falling`
  reverses this axis, and `doubling` makes it logarithmic (all x above 0).
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from model.evaluation.bootstrap import wilson
from model.metrics import roc

REAL, FAKE, INK, MUTED, GRID, BAND = (f"#0a0b0{number}" for number in range(1, 7))
_VARIABLES = {REAL: "real", FAKE: "fake", INK: "ink", MUTED: "muted", GRID: "grid", BAND: "band"}
"""Placeholder color -> CSS variable of the page."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "text.color": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "path.simplify_threshold": 0.2,
}

_DASHED = (0, (3, 3))

MOST_POINTS = 400
"""Largest number of plotted points of a ROC curve; more points would not be visible."""

BINS = 10
"""Number of bins of the reliability diagram."""

_LEFT, _RIGHT, _BOTTOM, _TOP = 0.5, 0.1, 0.43, 0.08
"""Margins around the axes, in inches, for two digits and a label at each axis. Matplotlib's
automatic layout measures all texts, which takes longer than drawing them.
"""

_DIGIT = 0.08
"""Width of a digit in inches."""


def roc_chart(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> Markup:
    """Draw the ROC curve with a dot at `threshold`. The x axis has a square-root scale, which
    enlarges low false-positive rates. `labels` and `probabilities` have shape (N,); label 1 is
    fake.
    """
    false, true = roc(labels, probabilities)
    fpr, tpr = false / false[-1], true / true[-1]
    keep = np.unique(
        np.searchsorted(fpr + tpr, np.linspace(0, 2, MOST_POINTS)).clip(0, len(fpr) - 1)
    )
    keep = np.union1d(keep, [0, len(fpr) - 1])
    figure, axes = _figure()
    axes.plot([*np.linspace(0, 1, 50)], [*np.linspace(0, 1, 50)], color=MUTED, lw=0.8, ls=_DASHED)
    axes.plot(fpr[keep], tpr[keep], color=FAKE, drawstyle="steps-post", clip_on=False)
    called = probabilities >= threshold
    at = called[labels == 0].mean(), called[labels == 1].mean()
    axes.plot(*at, "o", color=INK, ms=6, zorder=5, clip_on=False)
    axes.set_xscale("function", functions=(np.sqrt, np.square))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xticks([0, 0.01, 0.05, 0.2, 0.5, 1], ["0", ".01", ".05", ".2", ".5", "1"])
    axes.set_xlabel("false positives on reals")
    axes.set_ylabel("fakes found")
    return _svg(figure, "ROC curve, with a dot at the decision threshold")


def reliability_chart(labels: np.ndarray, probabilities: np.ndarray) -> Markup:
    """Draw the share of fakes against the mean probability in `BINS` bins of equal width, with 95 %
    Wilson intervals, and the number of images per bin as bars. Both arrays have shape (N,).
    """
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    used = np.flatnonzero(counts)
    mean = np.bincount(bins, weights=probabilities, minlength=BINS)[used] / counts[used]
    share = np.bincount(bins, weights=labels, minlength=BINS)[used] / counts[used]
    low, high = wilson(share, counts[used])
    figure, axes = _figure()
    heights = counts / counts.max() * 0.25
    axes.bar(np.arange(BINS) / BINS + 0.05, heights, 0.09, color=BAND)
    axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=_DASHED)
    axes.vlines(mean, low, high, color=FAKE, lw=1.4)
    axes.plot(mean, share, "o", color=FAKE, ms=5, clip_on=False)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("predicted probability of fake")
    axes.set_ylabel("share of fakes")
    return _svg(figure, "Reliability diagram: share of fakes against predicted probability")


def histogram_chart(reals: np.ndarray, fakes: np.ndarray, band: Sequence[float]) -> Markup:
    """Draw histograms of the probabilities of the real and fake images of one source, over the
    uncertain band (low, high).
    """
    edges = np.linspace(0, 1, 26)
    counts = [np.histogram(values, edges)[0] for values in (reals, fakes)]
    digits = len(str(max(counts[0].max(), counts[1].max())))
    figure, axes = _figure(2.3, 1.2, left=0.12 + _DIGIT * digits, bottom=0.22)
    low, high = band
    axes.axvspan(low, high, color=BAND, lw=0) if high > low else axes.axvline(
        high, color=MUTED, lw=0.8, ls=_DASHED
    )
    for of_class, color in zip(counts, (REAL, FAKE), strict=True):
        if of_class.any():
            axes.stairs(of_class, edges, fill=True, color=color, alpha=0.75)
    axes.set_ylim(0, None)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(2, integer=True))
    return _svg(figure, "Histogram of the probability of fake")


def robustness_chart(
    lines: Sequence[tuple[str, str, Sequence[float], Sequence[float | None]]],
    xlabel: str,
    *,
    falling: bool = False,
    doubling: bool = False,
) -> Markup:
    """Draw rates against the amount of a perturbation.

    Each line is (class "real" or "fake", pattern "solid", "dashed" or "dotted", x values, rates).
    `falling` reverses the x axis, `doubling` gives it a base-2 log scale.
    """
    figure, axes = _figure(height=2.0)
    patterns = {"solid": "-", "dashed": (0, (4, 2)), "dotted": (0, (1, 1.5))}
    ticks: set[float] = set()
    for of_class, pattern, xs, ys in lines:
        color = FAKE if of_class == "fake" else REAL
        pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
        if pairs:
            axes.plot(*zip(*pairs, strict=True), "o", ls=patterns[pattern], color=color, ms=3.5,
                      clip_on=False)  # fmt: skip
        ticks |= set(xs)
    axes.set_ylim(0, 1.02)
    if doubling:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    if falling:
        axes.invert_xaxis()
    axes.set_xlabel(xlabel)
    return _svg(figure, f"Fakes found and false positives by {xlabel}")


def _figure(
    width: float = 3.4, height: float = 2.6, left: float = _LEFT, bottom: float = _BOTTOM
) -> tuple[Figure, Axes]:
    """Make a figure with one pair of axes; all lengths are in inches."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        inside = (width - left - _RIGHT, height - bottom - _TOP)
        place = (left / width, bottom / height, inside[0] / width, inside[1] / height)
        return figure, figure.add_axes(place)


def _svg(figure: Figure, label: str) -> Markup:
    """Convert a figure to SVG markup with CSS variables as colors, the page's font and no fixed
    size. `label` is its text for screen readers.
    """
    stream = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.patch.set_alpha(0)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(stream, metadata=metadata)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for pattern, new in _CLEANED:
        text = re.sub(pattern, new, text, flags=re.DOTALL)
    text = text.replace("<svg>", f'<svg viewBox="{_box(figure)}" role="img" aria-label="{label}">')
    for color, name in _VARIABLES.items():
        text = text.replace(color, f"var(--{name})")
    return Markup(text)


_CLEANED = (
    (r"<svg [^>]*>", "<svg>"),
    (r"<metadata>.*?</metadata>", ""),
    (r"<style .*?</style>", ""),  # it would apply to the whole page
    (
        r'<g id="[^"]*">',
        "<g>",
    ),  # remove ids that repeat in every chart, but not the hashes of clips and markers
    (r"font-family: [^;\"]*", "font-family: inherit"),
    (r"(?<=\d)(\.\d\d)\d+", r"\1"),  # round to hundredths of a point
    (r"\s*\n\s*", "\n"),
)
"""(pattern, replacement) pairs that make matplotlib's SVG fit into an HTML page."""


def _box(figure: Figure) -> str:
    """Return the viewBox of a figure in points; matplotlib's SVG has 72 points per inch."""
    return "0 0 {:g} {:g}".format(*(side * 72 for side in figure.get_size_inches()))
