"""Perceptual hashes: near-duplicates have similar ones, other images do not."""

import numpy as np
from PIL import Image

from imaging.decode import prepare
from imaging.fingerprint import fingerprints, green_grid
from tests.builders import encode, photo

PIXELS = photo(1, 93, 71)


def test_near_duplicates_hash_alike_and_others_do_not() -> None:
    smaller = np.asarray(Image.fromarray(PIXELS).resize((60, 46)))
    worse = prepare(encode(PIXELS, quality=40)).pixels
    grids = [green_grid(pixels) for pixels in (PIXELS, smaller, worse, photo(2, 93, 71))]
    one, *others = fingerprints(np.stack(grids))[0]
    smaller_bits, worse_bits, other_bits = (int(one ^ bits).bit_count() for bits in others)
    assert smaller_bits <= 6
    assert worse_bits <= 6
    assert other_bits >= 16


def test_a_fingerprint_does_not_depend_on_its_batch() -> None:
    """Packing computes hundreds in one call, `verify` one at a time."""
    flat = np.full((5, 7, 3), 93, np.uint8)
    grids = np.stack([green_grid(photo(n, 40 + n, 300 - n)) for n in range(9)] + [green_grid(flat)])
    hashes, thumbnails = fingerprints(grids)
    for row, grid in enumerate(grids):
        (one,), (thumbnail,) = fingerprints(grid[None])
        assert one == hashes[row]
        np.testing.assert_array_equal(thumbnail, thumbnails[row])
    assert hashes[-1] == 1 << 63  # only the mean of a flat image is above the median
    assert (thumbnails[-1] == 93).all()
    assert [len(part) for part in fingerprints(grids[:0])] == [0, 0]
