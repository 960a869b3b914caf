"""Check the entries of a `meta.json`, or of the metadata of an ONNX file, that a detector needs.
These values come from files of strangers.

Main entry: `checked(kind, meta, where)` returns `meta`, a dict of parsed JSON, as a new dict in
which `preprocess` has all keys of `Preprocess`. It raises `RecipeError` (a `ValueError`) for an
entry that is missing or of another type. The text `where` names the file in the error.

- `kind`: `Entries` of any detector, or `CheckpointEntries`.

The entries of the calibration are checked by `calibration_fault()` of `model/verdict.py`, those of
the network by `Network` of `model/recipe.py`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import recipes
from pipeline.preprocess import Preprocess


@dataclass(frozen=True, kw_only=True)
class DataEntries:
    """Types of the entries of `data` that are read."""

    train: list[str] = field(default_factory=list)
    replay: list[str] = field(default_factory=list)
    set_sha256: dict[str, str] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    generators: list[str] = field(default_factory=list)
    synthetic_sources: list[str] = field(default_factory=list)
    titles: dict[str, str] = field(default_factory=dict)
    earlier_sets: dict[str, str] = field(default_factory=dict)
    earlier_generators: list[str] = field(default_factory=list)
    known_against: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Entries:
    """Types of the entries that scoring reads."""

    preprocess: Preprocess
    data: DataEntries | None


@dataclass(frozen=True, kw_only=True)
class NetworkEntries:
    """Types of the entries of the network that name it."""

    name: str


@dataclass(frozen=True, kw_only=True)
class RecipeEntries:
    """Types of the entries of the recipe that are read from each checkpoint."""

    name: str
    network: NetworkEntries


@dataclass(frozen=True, kw_only=True)
class OriginEntries:
    """Types of the entries of `first_weights`, and of the record in it, that are read."""

    kind: str
    name: str
    sha256: str
    sets: dict[str, str] = field(default_factory=dict)
    generators: list[str] = field(default_factory=list)
    first_weights: "OriginEntries | None" = None


@dataclass(frozen=True, kw_only=True)
class CheckpointEntries(Entries):
    """Types of the entries that are read from each checkpoint."""

    created: str
    created_ns: int
    step: int
    selection: float | None
    recipe: RecipeEntries
    refused: list[str] = field(default_factory=list)
    metrics: dict[str, Any]
    first_weights: OriginEntries | None = None


def checked(kind: type[Entries], meta: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return `meta` with all keys of `preprocess`, after a check of the entries that `kind` lists.

    Raises:
        RecipeError: an entry is missing or of another type.
    """
    return {**meta, "preprocess": asdict(recipes.build(kind, _known(kind, meta), where).preprocess)}


_OBJECTS: dict[str, type] = {
    "data": DataEntries, "recipe": RecipeEntries, "network": NetworkEntries,
    "first_weights": OriginEntries,
}  # fmt: skip


def _known(kind: type, values: Any) -> Any:
    """Return the entries of an object that `kind` lists, without others, which are not read."""
    if not isinstance(values, Mapping):
        return values
    return {
        name: _known(_OBJECTS[name], values[name]) if name in _OBJECTS else values[name]
        for name in (of.name for of in fields(kind))
        if name in values
    }
