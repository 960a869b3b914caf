"""PAIRS: how the real partner of each fake was compressed, from the index.

A fake that reconstructs a photograph is a lossless file, the photograph a JPEG: between them a
detector may learn the JPEG. Compressed as its partner is, the fake differs by its generator alone
(Chen et al., "Dual Data Alignment Makes AI-Generated Image Detector Easier Generalizable", 2025).
"""

import functools
import logging
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from imaging.jpeg import CHROMAS
from sharding.format import ShardSet

log = logging.getLogger("ai_images_detector")


class Partners(NamedTuple):
    """By sample: the quality of the real partner's JPEG, int32, 0 for "leave it as it is", and its
    chroma as a position in `CHROMAS`, int32.
    """

    quality: np.ndarray
    chroma: np.ndarray


@functools.lru_cache(maxsize=8)
def partners_of(shards: ShardSet, sources: tuple[str, ...]) -> Partners:
    """The partners of the fakes of `sources`. A fake's partner is the real image of its group and
    source, if that is one image. Left as they are: fakes that are JPEGs already, whose first
    compression nothing undoes, fakes without a partner, and those whose partner is no JPEG or one
    of an unusual chroma. How many there are of each is logged, once.
    """
    quality = np.zeros(len(shards), np.int32)
    chroma = np.zeros(len(shards), np.int32)
    codes, names = shards.codes("source")
    for source in sources:
        rows = np.flatnonzero(codes == names.index(source))
        is_fake = shards.column("label")[rows] == 1
        groups = shards.table.column("group").take(rows).combine_chunks()
        group = np.asarray(pc.dictionary_encode(groups).indices)
        reals = np.bincount(group[~is_fake], minlength=len(rows))
        partner = np.zeros(len(rows), np.int64)  # by group: the row of its one real image
        partner[group[~is_fake]] = rows[~is_fake]
        partner = partner[group]
        kinds, kind_names = shards.codes("chroma")
        known = np.array([CHROMAS.index(n) if n in CHROMAS else -1 for n in kind_names])
        theirs = known[kinds[partner]]
        jpeg = shards.column("jpeg_quality")
        alone = is_fake & (reals[group] != 1)
        lossy = is_fake & ~alone & (jpeg[rows] > 0)
        other = is_fake & ~alone & ~lossy & ((jpeg[partner] == 0) | (theirs < 0))
        taken = is_fake & ~alone & ~lossy & ~other
        quality[rows[taken]] = jpeg[partner[taken]]
        chroma[rows[taken]] = theirs[taken]
        log.info(
            "match_pair_jpeg: of the %s fakes of %s %s come as JPEGs of their real partner's "
            "quality; left as they are: %s without one real partner, %s whose partner is no common "
            "JPEG, %s that are JPEGs themselves",
            *(f"{is_fake.sum():,}", source),
            *(f"{part.sum():,}" for part in (taken, alone, other, lossy)),
        )
    return Partners(quality, chroma)
