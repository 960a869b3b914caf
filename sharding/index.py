"""Define the fields of a shard set's `index.json`, with their types and meanings, as `TypedDict`s.

Main entry: `Index`, the type of the whole file, a dict. The other classes are types of its parts:
`ShardEntry` (one tar), `Totals` (numbers of images by label, source and generator), `SourceEntry`
(license, policy, excluded files, ... of one source) and `Quarantined` (one file that could not be
decoded). `index_fault(value, Index)` checks a parsed file against them, for `read_index()` of
sharding/format.py. `finish()` of sharding/build.py writes the file, and `docs/reference.py` makes
the page docs/fields.md from the fields.
"""

import functools
from collections.abc import Iterable
from reprlib import repr as short
from typing import (
    Any,
    Literal,
    NotRequired,
    TypedDict,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)


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


class Versioned(TypedDict):
    """The field of an index of any version."""

    format_version: int


_hints = functools.cache(get_type_hints)


def index_fault(value: Any, kind: Any, name: str = "") -> str:
    """Return what is wrong in `value`, parsed JSON, for the type `kind`: `Index` or a part of it.

    The words begin with the field, such as `totals.label`. They are "" for a value of this type.
    """
    if not _is_of(value, kind):
        return f"{name or 'it'} is {short(value)}, expected {_in_words(kind)}"
    prefix = f"{name}." if name else ""
    arguments = get_args(kind)
    parts: Iterable[tuple[Any, Any, Any]] = ()
    if is_typeddict(kind):
        for key, hint in _hints(kind).items():
            if key in kind.__required_keys__ - value.keys():
                return f"{prefix}{key} is missing, expected {_in_words(hint)}"
        parts = ((key, value[key], hint) for key, hint in _hints(kind).items() if key in value)
    elif isinstance(value, list):
        parts = ((index, entry, arguments[0]) for index, entry in enumerate(value))
    elif isinstance(value, dict):
        parts = ((key[:60], entry, arguments[1]) for key, entry in value.items())
    faults = (index_fault(entry, hint, f"{prefix}{key}") for key, entry, hint in parts)
    return next(filter(None, faults), "")


def _is_of(value: Any, kind: Any) -> bool:
    """Return whether `value` is of a type, without regard to its parts."""
    origin = get_origin(kind) or kind
    if origin is Literal:
        return value in get_args(kind)
    if origin is int:  # not a bool
        return type(value) is int and 0 <= value < 2**63
    return isinstance(value, dict if is_typeddict(kind) else origin)


def _in_words(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return f"one of {', '.join(get_args(kind))}"
    words = {int: "a whole number", bool: "true or false", str: "a text", list: "a list"}
    return words.get(origin, "an object")
