"""Pack a folder with the subfolders `real/` and `fake/` into a training set and a validation set.

Main entry: `pack_folder(folder, data, *, jobs, progress)` writes a catalog, so that the user needs
none, and both sets. Existing sets are updated: new images are added, and images that are no longer
in `folder` are dropped. Duplicates, and images that this program's catalog keeps for testing, are
left out (by hash).

- `folder`: the `Path` with the two subfolders; `CLASS_FOLDERS` are their allowed names.
- `data`: the folder of all shard sets, a `Path`, or a `UPath` for an address.
- `jobs`: number of processes (default 0: one per core).
- `progress`: a function (default: no progress). `progress(what, total)` is called for each of up to
  two stages: `what` is the label to show, "decoding" or "packing", `total` the number of images. It
  returns a context manager, which yields a function. That function is called with the number of
  images finished since its last call.

It returns a `PackedFolder`:

- `name`: the name of the training set, made from the name of `folder`.
- `place`: the folder with the catalog and both sets, `data`/folders/..., of the type of `data`.
- `train`, `validate`: the path of each set relative to `data`, a text: `folders/...`.
- `train_counts`, `validate_counts`: each [number of real images, of fake images].
- `shards_written`: the number of shards that this call wrote.
- `test`, `test_counts`: the same of a published test set; "" and [0, 0] if there is none.
- `left_out`: a list of lines, which `sharding build` prints too: the files and images of `folder`
  that are in no set, by reason, and the CSV tables and columns that are not used.

Errors, of which all but `OSError` are `ValueError`s:

- `CatalogError`: a subfolder is missing, the path of `folder` is `/` or not UTF-8, a class has
  fewer than `FEWEST` images, or has none in a published validation set, or, after packing, a class
  has no image in the training or the validation set, or CSV tables divide the images by their file
  names (`test.csv`).
- `ShardError`: too many images of a set are unreadable (more than one and more than the fraction
  `MAX_BAD`, or all), a raw file changed meanwhile, or the folder of a set has files that no build
  wrote.
- `RawError`: an archive is damaged. Another `ValueError`: `jobs` is too large.
- `OSError`: a file cannot be read or written, or another process packs the folder.

`sharding/describe.py` writes such a catalog too, but only proposes it: a word in the name of any
folder decides there, which a person checks. What is packed unchecked must have the four names. So
the rules differ: `real/ai_fakes` is real here and fake there.

About the fraction `HELD_OUT` of the images, in whole groups of related ones, goes to the validation
set. Folders that are named like a published split (sharding/folder_names.py), inside those of a
class or around them (`test/fake`), and a column of a CSV table (sharding/image_table.py) keep it:
images of val and of test go to the sets of these names, and only they. Files below `data`:

    folders/<name>-<hash of the folder's path>/catalog.toml
    folders/<name>-<hash of the folder's path>/<name>            training set
    folders/<name>-<hash of the folder's path>/<name>-val        validation set
    folders/<name>-<hash of the folder's path>/<name>-test       published test set, if there is one
"""

import hashlib
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import recipes
from console import counted
from escape import as_utf8
from sharding.build import Progress, Tolerance, build, no_progress, why_lacking
from sharding.catalog import (
    BUILT_IN,
    LONGEST_NAME,
    Catalog,
    CatalogError,
    read_catalog,
    toml_string,
)
from sharding.folder_names import NAMED, notes_on_splits, split_of, strictest
from sharding.format import CLASSES, UNKNOWN
from sharding.image_table import ImageTable, Where, destination, find_table, rule
from sharding.left_out import left_out
from sharding.listing import Listing, links_in, list_source
from sharding.raw import walk
from storage import AnyPath, make_folder, parse_json, write_text

PLACE = "folders"
CATALOG_FILE = "catalog.toml"

CLASS_FOLDERS = (("real", "0_real"), ("fake", "1_fake"))
"""Allowed names of the folder of a class, by label, ignoring case."""

HELD_OUT = 0.2
"""Fraction of the groups in the validation set, which selects the checkpoint and calibrates it."""

FEWEST = 20
"""Minimum number of images per class: a fifth of fewer is too few to validate on."""

MAX_BAD = 0.05
"""Maximum fraction of unreadable images."""


@dataclass(frozen=True, kw_only=True)
class PackedFolder:
    """Result of packing a folder.

    `place` is the folder with the sets. `train`, `validate` and `test` are the paths of the sets
    below the folder of all sets, and the counts are their images per class, by label. `test` is ""
    if no test set is published. `shards_written` is the number of shards that this run wrote.
    `left_out` are lines on the files and images in no set, and on what is not used.
    """

    name: str
    place: AnyPath
    train: str
    validate: str
    train_counts: Sequence[int]
    validate_counts: Sequence[int]
    test: str
    test_counts: Sequence[int]
    shards_written: int
    left_out: Sequence[str]


class _Unit(NamedTuple):
    """Images of a class folder that go to one set: all below `path` whose row fulfills `where`."""

    side: str  # class folder
    path: str  # the class folder, or a folder of a split in it
    split: str = ""
    where: Where = ()

    def rules(self, kind: str) -> list[tuple[str, str]]:
        """Return the rules of these images: folders, with the generators of their images."""
        if kind == "real":
            return [(self.path, "camera")]
        above, _, _ = self.path[len(self.side) + 1 :].rpartition("/")
        if generator := above.partition("/")[0]:
            return [(self.path, generator.removesuffix(".zip"))]
        return [(f"{self.path}/{NAMED}", ""), (self.path, UNKNOWN)]  # subfolders name generators


def pack_folder(
    folder: Path, data: AnyPath, *, jobs: int = 0, progress: Progress = no_progress
) -> PackedFolder:
    """Pack the images of `folder` into two sets below `data`, or update the sets.

    `jobs` is the number of processes, 0 for one per core.

    Raises:
        CatalogError: the folder of a class is missing, or a class has too few images.
        ShardError, OSError: see `sharding.build.build`.
    """
    folder = folder.resolve()
    sides = _class_folders(folder)
    name = re.sub(r"[^a-z0-9_-]+", "_", folder.name.lower())[: LONGEST_NAME - len("-test")]
    name = name.strip("_-") or "images"
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    place = data / PLACE / f"{name}-{digest}"
    table, notes = find_table(folder.parent, folder.name, list(walk(folder.parent, folder.name)))
    text, catalog, listing = _catalog(name, folder, sides, table, notes)
    _refuse_few(name, folder, sides, listing)
    # Images that the built-in catalog keeps for tests must not be trained on here either.
    catalog = replace(catalog, exclude=read_catalog([BUILT_IN]).exclude)
    make_folder(place)
    write_text(place / CATALOG_FILE, text)
    scan, built = build(
        catalog, folder.parent, place,
        jobs=jobs, tolerance=Tolerance(MAX_BAD, allow_incomplete=True, allow_replaced=True),
        progress=progress,
    )  # fmt: skip
    labels = {one.name: one.index["totals"]["label"] for one in built}
    train, validate, test = (
        [labels.get(set_name, {}).get(kind, 0) for kind in CLASSES]
        for set_name in (name, f"{name}-val", f"{name}-test")
    )
    excluded = [row for one in built for row in one.excluded]
    for label, (of_train, of_val) in enumerate(zip(train, validate, strict=True)):
        if not (of_train and of_val):
            raise CatalogError(
                f"{CLASSES[label]} images in {folder} without duplicates: {of_train} for training "
                f"and {of_val} for validation, expected at least 1 of each"
                f"{why_lacking(excluded, label)}; add images that differ"
            )
    where = f"{PLACE}/{place.name}/{name}"
    return PackedFolder(
        name=name,
        place=place,
        train=where,
        validate=f"{where}-val",
        train_counts=train,
        validate_counts=validate,
        test=f"{where}-test" if sum(test) else "",
        test_counts=test,
        shards_written=sum(one.shards_written for one in built),
        left_out=[*notes, *left_out(built, scan, place)],
    )


def _class_folders(folder: Path) -> list[list[str]]:
    """List the folders of each class, by label.

    Raises:
        CatalogError: a class has no folder, or the path of `folder` is `/` or not UTF-8.
    """
    if as_utf8(str(folder)) != str(folder) or not folder.name:
        raise CatalogError(
            f"{as_utf8(str(folder))} cannot be packed: its name is empty or not UTF-8; rename it"
        )
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    inside = [name for name in names if split_of(name)[0] and not (folder / name).is_symlink()]
    names += [
        f"{name}/{path.name}"
        for name in inside
        for path in sorted((folder / name).iterdir())
        if path.is_dir()
    ]
    sides = [
        [name for name in names if name.rpartition("/")[2].lower() in known]
        for known in CLASS_FOLDERS
    ]
    for kind, known, side in zip(CLASSES, CLASS_FOLDERS, sides, strict=True):
        if not side:
            there = ", ".join(as_utf8(name) for name in names[:8]) or "no folder"
            raise CatalogError(
                f"{folder} has no folder of {kind} images (expected {' or '.join(known)}, "
                f"found {there}); rename a folder, or let `{_describing(folder)}` "
                "write a catalog for other names"
            )
    return sides


def _catalog(
    name: str, folder: Path, sides: list[list[str]], table: ImageTable | None, notes: list[str]
) -> tuple[str, Catalog, Listing]:
    """Return the catalog of a folder as TOML and as a `Catalog`, with the images that it lists.
    Lines on the table are added to `notes`.
    """
    plain = [[_Unit(side, side) for side in of_class] for of_class in sides]
    _, _, listing = _read(name, folder, _catalog_text(name, folder, plain, None))
    names = [item.origin.partition("/")[2] for item in listing.items]
    inside = {path.rpartition("/")[0] for path in names}
    units = [[unit for side in of_class for unit in _units(side, inside, table)]
             for of_class in sides]  # fmt: skip
    if table:
        wheres = [unit.where for of_class in units for unit in of_class]
        notes += table.notes_on(table.decisive(has_classes=True), wheres, names)
    notes += notes_on_splits(inside)
    return _read(name, folder, _catalog_text(name, folder, units, table))


def _units(side: str, inside: Set[str], table: ImageTable | None) -> list[_Unit]:
    """Divide the images of the class folder `side` by split. `inside` are all folders with images.
    Where both a folder and its rows name a split, test counts before val before train.
    """
    below = {split_of(path)[1] for path in inside if path.startswith(f"{side}/")}
    published = sorted(
        (path for path in below if len(path) > len(side)), key=lambda p: (-len(p), p)
    )
    units = []
    # The first of several rules of equal depth is used: `fake/test` must come before
    # `fake/<generator>`, and rows with the split val before the folder `train`.
    for path in (*published, side):
        split = split_of(path)[0]
        if table and table.split:
            wheres = [table.where(path, {table.split: v}, [table.split]) for v in table.splits]
            units += [
                _Unit(side, path, strictest(split, table.split_if(where)), where)
                for where in wheres
                if where
            ]
        if split or not (table and table.split):
            units.append(_Unit(side, path, split))
    return units


def _read(name: str, folder: Path, text: str) -> tuple[str, Catalog, Listing]:
    catalog = recipes.build(Catalog, tomllib.loads(text), CATALOG_FILE)
    return text, catalog, list_source(name, catalog.sources[name], folder.parent)


def _catalog_text(
    name: str, folder: Path, units: Sequence[Sequence[_Unit]], table: ImageTable | None
) -> str:
    """Return the catalog of a folder as TOML."""
    held = [split for split in ("val", "test") if any(u.split == split for us in units for u in us)]
    uses_table = table and any(unit.where for of_class in units for unit in of_class)
    lines = [
        f"# Made from the folders of {toml_string(str(folder))};",
        "# overwritten each time the folder is packed.",
        "",
        "[sets]",
        f'{name} = "train"',
        f'{name}-val = "val"',
        *([f'{name}-test = "test"'] if "test" in held else []),
        "",
        f"[sources.{name}]",
        f"root = {toml_string(folder.name)}",
        'license = "mine"',
        *([f"table = {table.as_toml()}"] if table and uses_table else []),
        f"set = {destination(name, held, {'val': HELD_OUT})}",
    ]
    for kind, of_class in zip(CLASSES, units, strict=True):
        lines.append(f"{kind} = [")
        for unit in of_class:
            for path, generator in unit.rules(kind):
                line = rule(name, path, unit.split, generator, unit.where, optional=True)
                lines.append(f"    {line},")
        lines.append("]")
    return "\n".join(lines) + "\n"


def _refuse_few(name: str, folder: Path, sides: list[list[str]], listing: Listing) -> None:
    """Refuse a class with too few images, before any image is decoded.

    Raises:
        CatalogError: the message gives the number of images.
    """
    sets = [(item.label, {*parse_json(item.destination)}) for item in listing.items]
    counts = Counter(label for label, names in sets if names != {f"{name}-test"})
    held = Counter(label for label, names in sets if names == {f"{name}-val"})
    for label, kind in enumerate(CLASSES):
        if counts[label] < FEWEST:
            where = " and ".join(str(folder / side) for side in sides[label])
            count = counted(counts[label], "image") if counts[label] else "no image"
            beside = " besides a published test set" if counts.total() < len(sets) else ""
            reasons = [f"; {counted(e['files'], 'file')}: {r}" for r, e in listing.excluded.items()]
            raise CatalogError(
                f"{where} has {count}{beside}; expected at least {FEWEST} {kind} images (a fifth "
                "is for validation), such as .jpg, .png or .webp files, in folders or zip archives"
                f"{links_in(listing) or ''.join(reasons[:2])}"
            )
        if held and not held[label]:
            raise CatalogError(
                f"the published validation set in {folder} has {counted(held.total(), 'image')} "
                f"and no {kind} image; add some to it, or rename its folders so that a fifth of "
                "all images is held out instead"
            )


def _describing(folder: Path) -> str:
    return shlex.join(["python", "-m", "sharding", "describe", str(folder)])
