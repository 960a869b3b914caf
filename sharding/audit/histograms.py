"""Draw histograms of the metadata of a shard set, real images against fake ones, as a PNG file.

Main entry: `draw(shards, name, result, path)` returns nothing.

- `shards`: a `ShardSet`, such as `open_shards([folder])` of `sharding/format.py` returns.
- `name`: its name for the title. A name of more than `TITLE_NAME` characters is cut for the title,
  so any length is allowed.
- `result`: its `Audit`, from `audit(shards)` of `sharding/audit/audit.py`, for the counts and
  AUROCs in the titles.
- `path`: the `Path` (or `UPath`) of the PNG to write, in an existing folder.

The PNG has a panel for each of the eight features of `sharding/audit/metadata.py` (format, size,
...). `ValueError` is raised without matplotlib (the extra `audit`), `OSError` if the PNG cannot be
written.
"""

from typing import Any

import numpy as np

from sharding.audit.audit import Audit
from sharding.audit.libraries import import_extra
from sharding.audit.metadata import FEATURES, Metadata, metadata_of, spelled
from sharding.format import CLASSES, ShardSet
from storage import AnyPath, write_atomically

TITLE_NAME = 60
"""Characters of a set's name that fit into the title."""

_COLORS = ("#0072B2", "#D55E00")  # blue and vermilion of Okabe and Ito, safe for color blindness


def draw(shards: ShardSet, name: str, result: Audit, path: AnyPath) -> None:
    """Write the histograms of a set as PNG: one panel per feature, with the share of each class."""
    figure = import_extra("matplotlib.figure").Figure(figsize=(16, 8), layout="constrained")
    metadata = metadata_of(shards)
    pooled = f", AUROC of metadata {result.pooled}" if result.pooled else ""
    shown = name if len(name) <= TITLE_NAME else f"{name[: TITLE_NAME - 3]}..."
    figure.suptitle(f"{shown}: {result.reals:,} real and {result.fakes:,} fake images{pooled}")
    for axes, feature in zip(figure.subplots(2, 4).flat, FEATURES, strict=True):
        if feature in ("size", "aspect", "bits per pixel", "JPEG quality"):
            _draw_quantity(axes, metadata, feature)
        else:
            _draw_names(axes, metadata, feature)
        alone = result.features.get(feature)
        axes.set_title(feature + (f" (alone {alone.alone.auroc:.2f})" if alone else ""))
        axes.set_ylabel("share of the class")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    # Compute the layout now: `savefig` would draw the whole figure once more to compute it.
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=100))


def _draw_names(axes: Any, metadata: Metadata, feature: str, most: int = 8) -> None:
    codes, words = spelled(metadata, feature)
    shown = np.unique(codes)  # most frequent first
    labels = [words(int(code)) for code in shown[:most]]
    codes = np.minimum(np.searchsorted(shown, codes), most)
    labels += ["others"] if len(shown) > most else []
    for label, class_name in enumerate(CLASSES):
        here = codes[metadata.labels == label]
        share = np.bincount(here, minlength=len(labels)) / max(1, len(here))
        positions = np.arange(len(labels)) + (label - 0.5) * 0.4
        axes.bar(positions, share, 0.4, color=_COLORS[label], label=class_name)
    long = max(map(len, labels), default=0) > 6 and len(labels) > 3
    axes.set_xticks(range(len(labels)), labels, rotation=45 if long else 0)


def _draw_quantity(axes: Any, metadata: Metadata, feature: str) -> None:
    values = metadata.values[:, FEATURES[feature][0]].astype(np.float64)
    if feature == "size":
        values = np.sqrt(values * metadata.values[:, FEATURES[feature][1]])
        axes.set_xlabel("square root of width x height, pixels")
    else:
        axes.set_xlabel(
            {"aspect": "width / height", "bits per pixel": "8 x bytes / (width x height)"}.get(
                feature, "libjpeg quality; other formats are left out"
            )
        )
    known = np.isfinite(values)
    if not known.any():
        axes.text(0.5, 0.5, "no JPEG", ha="center", transform=axes.transAxes)
        return
    # The outer bars also hold the most extreme 1 %: all others would else be in a few bars.
    low, high = np.percentile(values[known], [0.5, 99.5])
    edges = np.linspace(low, high if high > low else low + 1, 41)
    if feature == "JPEG quality":
        edges = np.arange(np.floor(low), np.ceil(high) + 2) - 0.5
    for label, class_name in enumerate(CLASSES):
        here = values[known & (metadata.labels == label)].clip(edges[0], edges[-1])
        total = max(1, int((metadata.labels == label).sum()))
        weights = np.full(len(here), 1 / total)
        axes.hist(here, edges, weights=weights, color=_COLORS[label], alpha=0.6, label=class_name)
