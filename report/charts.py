"""Charts as SVG for a page in light or dark: numbers in, markup out.

Drawn by matplotlib in stand-in colors, which are then replaced by the page's own variables. No
name that a user chose enters a chart: such text belongs to the page, which escapes it.
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

from model.metrics import roc

REAL, FAKE, INK, MUTED, GRID, BAND = (f"#0a0b0{number}" for number in range(1, 7))
_VARIABLES = {REAL: "real", FAKE: "fake", INK: "ink", MUTED: "muted", GRID: "grid", BAND: "band"}
"""Stand-in colors, and the variables of the page that take their place."""

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
"""Corners of a ROC curve that are plotted; more cannot be told apart."""

BINS = 10
"""Bins of the reliability diagram."""


def roc_chart(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> Markup:
    """The ROC curve, its low end enlarged (square roots), and where the threshold stands on it."""
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
    """Share of fakes against the mean probability, in equal bins with 95 % intervals (Wilson), and
    how many images each has.
    """
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    used = np.flatnonzero(counts)
    mean = np.bincount(bins, weights=probabilities, minlength=BINS)[used] / counts[used]
    share = np.bincount(bins, weights=labels, minlength=BINS)[used] / counts[used]
    low, high = _wilson(share, counts[used])
    figure, axes = _figure()
    heights = counts / counts.max() * 0.25
    axes.bar(np.arange(BINS) / BINS + 0.05, heights, 0.09, color=BAND)
    axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=_DASHED)
    axes.vlines(mean, low, high, color=FAKE, lw=1.4)
    axes.plot(mean, share, "o", color=FAKE, ms=5, clip_on=False)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("probability of fake as stated")
    axes.set_ylabel("share that is fake")
    return _svg(figure, "Reliability diagram: share of fakes against stated probability")


def _wilson(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The score interval of Wilson (1927) at 95 %."""
    z2 = 1.96**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = np.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) * 1.96 / (1 + z2 / count)
    return middle - reach, middle + reach


def histogram_chart(reals: np.ndarray, fakes: np.ndarray, band: Sequence[float]) -> Markup:
    """How the probabilities of one source's images lie, with the band of doubt behind them."""
    figure, axes = _figure(width=2.3, height=1.2)
    edges = np.linspace(0, 1, 26)
    low, high = band
    axes.axvspan(low, high, color=BAND, lw=0) if high > low else axes.axvline(
        high, color=MUTED, lw=0.8, ls=_DASHED
    )
    for values, color in ((reals, REAL), (fakes, FAKE)):
        if len(values):
            axes.hist(values, edges.tolist(), color=color, alpha=0.75)
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
    """Rates along the amount of a degradation: lines of (class, dash pattern, x, y), where class is
    "real" or "fake". `falling` puts high amounts to the left, `doubling` doubles along the axis.
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


def _figure(width: float = 3.4, height: float = 2.6) -> tuple[Figure, Axes]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as markup for a page: colors by variable, the page's own font, as wide as its
    place.
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
    (r"<style .*?</style>", ""),  # it would hold for the whole page
    (r'<g id="[^"]*">', "<g>"),  # the same in every chart; clips and markers are named by content
    (r"font-family: [^;\"]*", "font-family: inherit"),
    (r"(?<=\d)(\.\d\d)\d+", r"\1"),  # hundredths of a point are enough
    (r"\s*\n\s*", "\n"),
)
"""What a chart needs to be part of a page: pattern, and what takes its place."""


def _box(figure: Figure) -> str:
    """In points: 72 to the inch, as matplotlib's SVG always has."""
    return "0 0 {:g} {:g}".format(*(side * 72 for side in figure.get_size_inches()))
