"""Find how the real partner of each fake was compressed, so that the loader can first compress the
fake in the same way (`match_pair_jpeg` of a recipe). Only the index of the shard set is read.

Main entry: `partners_of(shards, sources)` returns a `Partners`: two int32 arrays with a value for
each of the N samples of the set. `quality` is the JPEG quality of the sample's partner (0: the
loader does not change the sample), `chroma` its chroma subsampling (a position in
`imaging.jpeg.CHROMAS`).

- `shards`: the `ShardSet` that `sharding.format.open_shards([Path(folder)])` returns.
- `sources`: names of the sources whose fakes to change, a tuple (not a list). A name that the set
  does not have raises ValueError.

A fake's partner is the only real image of the same source and group (related images). Three kinds
of fakes are not changed: those without exactly one such real image, those whose partner is no
common JPEG, and those that are JPEGs already. The number of each kind is logged.

Why: in a dataset of photographs and their reconstructions by a generator, the fake is often a
lossless file and the photograph a JPEG. A detector trained on such pairs may learn to recognize the
JPEG. After the fake is compressed like its partner, only the generator's traces differ (Chen et
al., "Dual Data Alignment Makes AI-Generated Image Detector Easier Generalizable", 2025).
"""

import functools
import logging
from typing import NamedTuple

import numpy as np

from imaging.jpeg import CHROMAS
from sharding.format import ShardSet, codes_of

log = logging.getLogger("ai_images_detector")


class Partners(NamedTuple):
    """JPEG of each sample's real partner, int32 (N,) each: its quality, 0 where the sample is not
    changed, and its chroma subsampling, a position in `CHROMAS`.
    """

    quality: np.ndarray
    chroma: np.ndarray


@functools.lru_cache(maxsize=8)
def partners_of(shards: ShardSet, sources: tuple[str, ...]) -> Partners:
    """Find the real partner of each fake of `sources`: the only real image of the same group and
    source.

    Fakes of three kinds are not changed: fakes without exactly one real partner, fakes that are
    JPEGs already (their first compression cannot be undone), and fakes whose partner is no JPEG or
    has an unusual chroma subsampling. The number of each kind is logged once per set.
    """
    quality = np.zeros(len(shards), np.int32)
    chroma = np.zeros(len(shards), np.int32)
    codes, names = shards.codes("source")
    for source in sources:
        rows = np.flatnonzero(codes == names.index(source))
        is_fake = shards.column("label")[rows] == 1
        group = codes_of(shards.table.column("group").take(rows))[0]
        reals = np.bincount(group[~is_fake], minlength=len(rows))
        partner = np.zeros(len(rows), np.int64)  # group -> row of its only real image
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
            "match_pair_jpeg: of the %s fakes of %s, %s are compressed like their real partner's "
            "JPEG; not changed: %s without exactly one real partner, %s whose partner is no common "
            "JPEG, %s that are JPEGs already",
            *(f"{is_fake.sum():,}", source),
            *(f"{part.sum():,}" for part in (taken, alone, other, lossy)),
        )
    return Partners(quality, chroma)
