"""Count the images of a packed shard set by source, generator and class.

Main entry: `rows_of_set(shards, index)` takes a `ShardSet` and its `Index`. It returns
a list of rows, each a list of the values of `COLUMNS`: one row for each source, generator and class
that has images, in this order. Nothing is printed.
"""

from typing import Any

import numpy as np

from sharding.format import CLASSES, ShardSet
from sharding.index import Index

COLUMNS = ("source", "class", "generator", "images", "pixels", "formats", "license")
"""Headings of the table of `rows_of_set`."""


def rows_of_set(shards: ShardSet, index: Index) -> list[list[Any]]:
    """Return one row of `COLUMNS` per source, generator and class with images. The images are
    sorted once, so the time does not grow with the number of possible rows.
    """
    if not len(shards):
        return []
    sources, source_names = shards.codes("source")
    generators, generator_names = shards.codes("generator")
    formats, format_names = shards.codes("format")
    shape = (len(source_names), len(generator_names), len(CLASSES))
    kinds = np.ravel_multi_index((sources, generators, shards.column("label")), shape)
    order = np.argsort(kinds, kind="stable")
    present, starts = np.unique(kinds[order], return_index=True)
    widths, heights = shards.column("width"), shards.column("height")
    rows = []
    for kind, here in zip(present, np.split(order, starts[1:]), strict=True):
        source, generator, label = (int(code) for code in np.unravel_index(kind, shape))
        name, wide, high = source_names[source], widths[here], heights[here]
        rows.append(
            [
                name, CLASSES[label], generator_names[generator], len(here),
                f"{wide.min()}-{wide.max()} x {high.min()}-{high.max()}",
                " ".join(format_names[code] for code in np.unique(formats[here])),
                index["sources"][name]["license"],
            ]
        )  # fmt: skip
    return rows
