"""Compute perceptual hashes and thumbnails of images, to find near-duplicates.

Main entry: `fingerprints(grids)` takes n grids, uint8 (n, 160, 160), and returns their pHashes,
uint64 (n,), and thumbnails, uint8 (n, 16, 16). `green_grid(pixels)` makes such a grid, uint8 (160,
160), of an image of any size, uint8 (height, width, 3) RGB. `GRID` is its side. Near-duplicates
have hashes that differ in few bits (`sharding/dedupe.py`). No function raises errors of its own.
"""

from functools import lru_cache

import numpy as np
from PIL import Image

GRID = 160
"""Pixels per side of a grid: 5 for each pixel of the thumbnail that is hashed (docs/log.md)."""

_COSINES = np.rint(4096 * np.cos(np.pi * np.outer(np.arange(8), np.arange(32) + 0.5) / 32))


def green_grid(pixels: np.ndarray) -> np.ndarray:
    """Sample the green channel of (height, width, 3) uint8 `pixels` at the centers of 160 x 160
    cells: uint8 (160, 160), the input of `fingerprints`. Green is the largest part of luma.
    """
    rows, columns = (_middles(side) for side in pixels.shape[:2])
    # Whole rows first: faster, because memory is then read in order.
    lines = pixels.reshape(len(pixels), -1).take(rows, axis=0, mode="clip")
    return lines.take(3 * columns + 1, axis=1, mode="clip")


@lru_cache(maxsize=256)
def _middles(side: int) -> np.ndarray:
    """Return the positions of the centers of `GRID` equal parts of a side."""
    return (2 * np.arange(GRID) + 1) * side // (2 * GRID)


def fingerprints(grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute pHashes uint64 (n,) and thumbnails uint8 (n, 16, 16) of `grids` uint8 (n, 160, 160).

    The hash compares the 8 x 8 lowest frequencies of the cosine transform of a 32 x 32 thumbnail
    with their median (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions",
    2010). All numbers are whole, so every machine computes the same bits. A call per image would
    cost ten times as much.
    """
    if not len(grids):
        return np.empty(0, np.uint64), np.empty((0, 16, 16), np.uint8)
    column = Image.fromarray(grids.reshape(-1, GRID)).reduce(GRID // 32)
    small = np.asarray(column, np.float64).reshape(-1, 32, 32)
    low = (_COSINES @ small @ _COSINES.T).reshape(-1, 64)
    median = np.partition(low, (31, 32), axis=1)[:, 31:33].mean(axis=1, keepdims=True)
    bits = np.packbits(low > median, axis=1)
    thumbnails = np.asarray(column.reduce(2)).reshape(-1, 16, 16)
    return bits.view(">u8")[:, 0].astype(np.uint64), thumbnails
