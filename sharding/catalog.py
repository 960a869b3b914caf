"""The catalogue: a TOML file that says, for each source, which folders are real and which fake.

    [sets]                                  # set -> split; a set is a folder of shards
    phase1 = "train"

    [sources.my_photos]
    root = "my-photos"                      # below the raw folder; default: the source's name
    licence = "mine"
    set = { phase1 = 0.9, val = 0.1 }       # or one name; shares go by hash of the group
    real = ["camera"]                       # folders, matched by whole part, `*` within a part
    fake = [{ folder = "sdxl", generator = "sdxl" }]
    group = '(\\d+)_\\d+\\.png$'              # optional: files with one capture stay in one set

Labels come from these names and from nothing else.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import recipes

BUILT_IN = Path(__file__).with_name("catalog.toml")

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


class CatalogError(ValueError):
    """A catalogue that cannot be used; the message says where and why."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """One place of a source: every image below `folder` (and named like `name`) has one label.

    `folder` is a path below the source's root, matched part by part and without regard to case:
    `*` and `?` match within a part, `**` matches any number of parts.
    """

    folder: str
    generator: str = ""
    name: str = "*"
    set: str | dict[str, float] = ""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset. `law` names the augmentation its training images keep; see `recipes/`."""

    licence: str
    set: str | dict[str, float]
    real: list[str | Folder] = field(default_factory=list)
    fake: list[str | Folder] = field(default_factory=list)
    ignore: list[str] = field(default_factory=list)
    root: str = ""
    homepage: str = ""
    group: str = ""
    law: str = ""
    replay: bool = True

    def __post_init__(self) -> None:
        if not self.real and not self.fake:
            raise ValueError("names neither real nor fake folders")
        if self.group and re.compile(self.group).groups != 1:
            raise ValueError(f"group {self.group!r} must have exactly one capture group")

    def folders(self, label: int) -> list[Folder]:
        """The places of one label, 0 real or 1 fake, all as `Folder`."""
        places = self.fake if label else self.real
        return [Folder(folder=p) if isinstance(p, str) else p for p in places]


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Sets with their split, and sources by name."""

    sets: dict[str, Literal["train", "val", "test"]] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)


def shares(place: str | dict[str, float]) -> dict[str, float]:
    """Where samples go: `{set: share}`, shares summing to 1."""
    return {place: 1.0} if isinstance(place, str) else place


def read_catalog(files: Sequence[Path]) -> Catalog:
    """The files as one catalogue; a later file replaces sources of the same name.

    Raises:
        CatalogError: unknown keys, bad names, shares that do not sum to 1, sets without a split.
    """
    sets: dict[str, str] = {}
    sources: dict[str, Source] = {}
    for file in files:
        try:
            catalog = recipes.load(Catalog, file)
        except recipes.RecipeError as error:
            raise CatalogError(str(error)) from error
        sets |= catalog.sets
        sources |= catalog.sources
        for name, source in catalog.sources.items():
            _check(name, source, sets, file)
    return Catalog(sets=sets, sources=sources)


def _check(name: str, source: Source, sets: dict[str, str], file: Path) -> None:
    """Names are safe in file names, and every set that is used has a split."""
    if not _NAME.fullmatch(name):
        raise CatalogError(f"{file}: source {name!r}: use lower-case letters, digits, '-' and '_'")
    places = [source.set, *(f.set for label in (0, 1) for f in source.folders(label) if f.set)]
    for place in places:
        total = sum(shares(place).values())
        if abs(total - 1) > 1e-6:
            raise CatalogError(f"{file}: source {name}: the shares of {place} sum to {total:g}")
        for set_name in shares(place):
            if set_name not in sets:
                raise CatalogError(
                    f"{file}: source {name} goes to set {set_name!r}, but [sets] has only "
                    f'{", ".join(sets) or "nothing"}; add {set_name} = "train", "val" or "test"'
                )
