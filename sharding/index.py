"""Define the fields of a shard set's `index.json`, with their types and meanings, as `TypedDict`s.

Main entry: `Index`, the type of the whole file, a dict. The other classes are types of its parts:
`ShardEntry` (one tar), `Totals` (numbers of images by label, source and generator), `SourceEntry`
(license, policy, excluded files, ... of one source) and `Quarantined` (one file that could not be
decoded). `read_index()` of sharding/format.py checks a file against them, `finish()` of
sharding/build.py writes it, and `docs/reference.py` makes the page docs/fields.md from them.
"""

from typing import Literal, NotRequired, TypedDict


class ShardEntry(TypedDict):
    """One tar of a set."""

    name: str
    """Name of the tar file, in the folder of `index.json`."""
    samples: int
    """Images in the tar."""
    bytes: int
    """Size of the tar in bytes."""
    sha256: str
    """SHA-256 of the tar."""


class Totals(TypedDict):
    """Numbers of images in a set."""

    label: dict[str, int]
    """Images by label, `real` or `fake`."""
    source: dict[str, int]
    """Images by source."""
    generator: dict[str, int]
    """Images by generator."""


class SourceEntry(TypedDict):
    """One source of a set, as the catalog described it when the set was built."""

    license: str
    """License of the images."""
    homepage: str
    """Web page of the dataset, or empty."""
    policy: str
    """Augmentation policy of the source. Empty: the recipe's `data.policy`."""
    replay: bool
    """Whether phase 2 may replay images of the source."""
    read_as: dict[str, int]
    """Number of files by the layout rule that they matched."""
    excluded: dict[str, int]
    """Files that are no images or may not be read, by reason."""
    title: NotRequired[str]
    """What the images are, in a few words for people."""
    synthetic: NotRequired[bool]
    """True if the images are rendered, such as those of the demo."""


class Quarantined(TypedDict):
    """One file that could not be decoded."""

    source: str
    """Source of the file."""
    path: str
    """Path below the raw folder."""
    reason: str
    """Error of the decoder."""


class Index(TypedDict):
    """Description of a shard set. It is written last: a folder without it is no shard set."""

    format_version: int
    """Version of the shard format."""
    set: str
    """Name of the set."""
    split: Literal["train", "val", "test"]
    """Split of every image in the set."""
    classes: list[str]
    """Class names in the order of the labels: `real`, `fake`."""
    samples: int
    """Images in the set."""
    samples_sha256: str
    """SHA-256 of `samples.parquet`."""
    shards: list[ShardEntry]
    """Tars of the set, in the order of `samples.parquet`."""
    totals: Totals
    """Numbers of images by label, source and generator."""
    sources: dict[str, SourceEntry]
    """Sources by name."""
    quarantined: list[Quarantined]
    """Files that could not be decoded, by path."""
    excluded: dict[str, int]
    """Images of `excluded.csv`, by reason: exact copies, near-duplicates across splits and hashes
    that the catalog excludes."""
    excluded_sha256: str
    """SHA-256 of `excluded.csv`."""
    content_sha256: str
    """SHA-256 of the other fields of `index.json`, as `json.dumps(..., sort_keys=True,
    ensure_ascii=False)` writes them. It also changes with a license or policy."""
