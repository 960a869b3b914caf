"""Collect the metadata of every image in a shard set (tars with an index) as numbers, for `audit`
and `match`.

Main entry: `metadata_of(shards)` takes a `ShardSet`, such as `open_shards([folder])` of
`sharding/format.py` returns, and returns a `Metadata`. No image is read.

- `values`: float32 (samples, 10), the columns below.
- `labels`: int8 (samples,), 0 real, 1 fake.
- `groups`: int64 (samples,), equal for related images.
- `names`: dict, number of a column with codes -> list of texts; a code is a position in this list.
  In the columns 0, 6, 7 and 9 only the 250 most frequent names (`MAX_NAMES`) have their own code;
  all other names share the last one, "others".
- `sources`: int64 (samples,), the codes of column 9 as integers.
- `take(rows)`: the `Metadata` of some samples.

Columns of `values`; `NAMED` are the numbers of those with codes, `FEATURES` maps the name of a
feature to its columns:

- 0: code of the format before packing.
- 1 to 5: width, height, aspect (width / height), bits per pixel, and JPEG quality (NaN if the image
  is no JPEG).
- 6 and 7: codes of the quantization tables (a hash) and of the chroma subsampling of a JPEG. The
  name for other formats is `NO_JPEG`.
- 8: code of the EXIF data: "none", "present", or "with a rotation".
- 9 (`SOURCE`): code of the source.

`assign_folds(metadata, seed)` takes a `Metadata` and an integer and returns a fold for each sample,
int64, 0 to 4 (`FOLDS` is 5), for cross-validation; a group is never in two folds.
`spelled(metadata, feature)` takes a key of `FEATURES`. It returns one integer for each sample
(negative: no value), and a function that formats such an integer as text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sharding.format import ShardSet, codes_of

FEATURES = {
    "format": (0,),
    "size": (1, 2),
    "aspect": (3,),
    "bits per pixel": (4,),
    "JPEG quality": (5,),
    "JPEG tables": (6,),
    "chroma": (7,),
    "EXIF": (8,),
}
"""Feature -> columns of `Metadata.values`."""

SOURCE = (9,)
NAMED = (0, 6, 7, 8, 9)  # columns of codes of names, not quantities

FOLDS = 5

NO_JPEG = "no JPEG"
"""Name of the tables and the chroma of other formats."""

MAX_NAMES = 250
"""Names of a column with their own code; the rarer ones share one. scikit-learn's limit is 255."""


@dataclass(frozen=True, eq=False)
class Metadata:
    """Metadata of each sample.

    `values` is float32 (samples, 10), with columns as in `FEATURES`, then the source. A column has
    either codes, positions in `names[column]`, or quantities (pixels, width / height, bits per
    pixel, quality 1 to 100), NaN if an image has none. `labels` is int8 (samples,), 0 real, 1 fake.
    `groups` is int64 (samples,), equal for images that belong together.
    """

    values: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    names: dict[int, list[str]]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sources(self) -> np.ndarray:
        """Source code of each sample, int64: a position in `names[9]`."""
        return self.values[:, SOURCE[0]].astype(np.int64)

    def take(self, rows: np.ndarray) -> "Metadata":
        """Return the metadata of these samples."""
        return Metadata(self.values[rows], self.labels[rows], self.groups[rows], self.names)


def metadata_of(shards: ShardSet) -> Metadata:
    """Compute the metadata of every sample from the index alone.

    The format is that of the published file, before packing.
    """
    pixels = shards.column("width") * np.maximum(1, shards.column("height")).astype(np.float64)
    quality = shards.column("jpeg_quality").astype(np.float64)
    turned = np.where(shards.column("orientation") != 1, 2, 1)
    columns = [
        shards.column("width"),
        shards.column("height"),
        shards.column("width") / np.maximum(1, shards.column("height")),
        8.0 * shards.column("size") / np.maximum(1, pixels),
        np.where(quality > 0, quality, np.nan),
    ]
    named = {
        0: _frequent(*_published_format(shards)),
        6: _frequent(*shards.codes("jpeg_tables")),
        7: _frequent(*shards.codes("chroma")),
        8: (np.where(shards.column("exif"), turned, 0), ["none", "present", "with a rotation"]),
        9: _frequent(*shards.codes("source")),
    }
    values = np.empty((len(shards), 10), np.float32)
    for index, column in enumerate(columns, start=1):
        values[:, index] = column
    for index, (codes, _names) in named.items():
        values[:, index] = codes
    names = {index: labels for index, (_codes, labels) in named.items()}
    return Metadata(values, shards.column("label"), _groups(shards), names)


def _published_format(shards: ShardSet) -> tuple[np.ndarray, list[str]]:
    """Return codes and names of the format before packing."""
    codes, names = shards.codes("format")
    before, names_before = shards.codes("transcoded_from")
    changed = np.array([bool(name) for name in names_before], np.bool_)[before]
    every = list(dict.fromkeys([*names, *filter(None, names_before)]))
    position = {name: index for index, name in enumerate(every)}
    kept = np.array([position[name] for name in names], np.int64)[codes]
    original = np.array([position.get(name, 0) for name in names_before], np.int64)[before]
    return np.where(changed, original, kept), every


def _frequent(codes: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Recode by falling frequency; if there are too many names, the rarest share one code."""
    counts = np.bincount(codes, minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    rank = np.empty(len(names), np.int64)
    rank[order] = np.minimum(np.arange(len(names)), MAX_NAMES)
    kept = [names[code] or NO_JPEG for code in order[:MAX_NAMES]]
    return rank[codes], [*kept, "others"]


def _groups(shards: ShardSet) -> np.ndarray:
    """Return a number per group. An image without a group gets its own number."""
    codes, names = codes_of(shards.table.column("group"))
    empty = np.array([not name for name in names], np.bool_)[codes]
    return np.where(empty, len(empty) + np.arange(len(codes)), codes.astype(np.int64))


def assign_folds(metadata: Metadata, seed: int) -> np.ndarray:
    """Assign each sample a fold, 0 to 4: whole groups, distributed evenly by source, class and
    size.

    The idea is that of scikit-learn's StratifiedGroupKFold, which loops over groups in Python and
    would take minutes for 420,000 of them.
    """
    _, first, group, size = np.unique(
        metadata.groups, return_index=True, return_inverse=True, return_counts=True
    )
    fakes = np.bincount(group, weights=metadata.labels)
    kind = (fakes > 0).astype(int) + (fakes == size)
    shuffled = np.random.default_rng(seed).random(len(first))
    order = np.lexsort((shuffled, -size, kind, metadata.sources[first]))
    fold = np.empty(len(first), np.int64)
    fold[order] = np.arange(len(first)) % FOLDS
    return fold[group]


_BITS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 24])


def spelled(metadata: Metadata, feature: str) -> tuple[np.ndarray, Callable[[int], str]]:
    """Convert a feature to whole numbers, one per sample, and return a function that formats such a
    number. Negative numbers mean no value.
    """
    first = metadata.values[:, FEATURES[feature][0]]
    if feature == "size":
        height = metadata.values[:, FEATURES[feature][1]].astype(np.int64)
        code = first.astype(np.int64) * 2**24 + height
        return code, lambda value: f"{value >> 24} x {value & (2**24 - 1)}"
    if feature == "aspect":
        return np.rint(first * 100).astype(np.int64), lambda value: f"{value / 100:.2f}"
    if feature == "bits per pixel":
        code = np.searchsorted(_BITS, first, "right") - 1

        def between(value: int) -> str:
            after = f" to {_BITS[value + 1]:g}" if value + 1 < len(_BITS) else " and more"
            return f"{_BITS[value]:g}{after}"

        return code, between
    if feature == "JPEG quality":
        return np.nan_to_num(first, nan=-1).astype(np.int64), str
    names = metadata.names[FEATURES[feature][0]]
    return first.astype(np.int64), lambda value: names[value]
