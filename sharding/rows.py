"""Check row numbers of a shard set.

Main entry: `row_numbers(samples)` takes a list or array of whole numbers and returns int64 (n,). It
raises `TypeError` for other values, such as a mask of booleans. It does not load Arrow.
"""

from collections.abc import Sequence

import numpy as np


def row_numbers(samples: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return row numbers as int64 (n,), or raise TypeError for other values, such as a mask."""
    rows = np.asarray(samples)
    if rows.size and rows.dtype.kind not in "iu":
        said = f"expected row numbers, got values of type {rows.dtype}"
        raise TypeError(f"{said}; np.flatnonzero(mask) returns those of a mask of booleans")
    return rows.astype(np.int64, copy=False)
