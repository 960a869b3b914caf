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
- `left_out`: a list of lines, which `sharding build` prints too: the files and images of `folder`
  that are in neither set, by reason.

Errors, of which all but `OSError` are `ValueError`s:

- `CatalogError`: a subfolder is missing, the path of `folder` is `/` or not UTF-8, a class has
  fewer than `FEWEST` images, or, after packing, a class has no image in one of the sets.
- `ShardError`: too many images of a set are unreadable (more than one and more than the fraction
  `MAX_BAD`, or all), a raw file changed meanwhile, or the folder of a set has files that no build
  wrote.
- `RawError`: an archive is damaged. Another `ValueError`: `jobs` is too large.
- `OSError`: a file cannot be read or written, or another process packs the folder.

About the fraction `HELD_OUT` of the images, in whole groups of related ones, goes to the validation
set. Files below `data`:

    folders/<name>-<hash of the folder's path>/catalog.toml
    folders/<name>-<hash of the folder's path>/<name>            training set
    folders/<name>-<hash of the folder's path>/<name>-val        validation set
"""

import hashlib
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import recipes
from console import counted, log
from imaging.names import utf8_name
from sharding.build import Progress, Tolerance, build, no_progress, why_lacking
from sharding.catalog import (
    BUILT_IN,
    LONGEST_NAME,
    Catalog,
    CatalogError,
    read_catalog,
    toml_string,
)
from sharding.describe import split_of
from sharding.format import CLASSES, UNKNOWN
from sharding.left_out import left_out
from sharding.listing import Listing, links_in, list_source
from storage import AnyPath, make_folder, write_text

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

    `place` is the folder with both sets. `train` and `validate` are the paths of the sets below the
    folder of all sets, and the counts are their images per class, by label. `shards_written` is the
    number of shards that this run wrote. `left_out` are lines on the files and images in no set.
    """

    name: str
    place: AnyPath
    train: str
    validate: str
    train_counts: Sequence[int]
    validate_counts: Sequence[int]
    shards_written: int
    left_out: Sequence[str]


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
    name = re.sub(r"[^a-z0-9_-]+", "_", folder.name.lower())[: LONGEST_NAME - len("-val")]
    name = name.strip("_-") or "images"
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    place = data / PLACE / f"{name}-{digest}"
    text = _catalog_text(name, folder, sides)
    catalog = recipes.build(Catalog, tomllib.loads(text), str(place / CATALOG_FILE))
    # Images that are kept for testing must not be trained on here either.
    catalog = replace(catalog, exclude=read_catalog([BUILT_IN]).exclude)
    listing = list_source(name, catalog.sources[name], folder.parent)
    _refuse_few(folder, sides, listing)
    _warn_of_splits(folder, listing)
    make_folder(place)
    write_text(place / CATALOG_FILE, text)
    scan, built = build(
        catalog, folder.parent, place,
        jobs=jobs, tolerance=Tolerance(MAX_BAD, allow_incomplete=True, allow_replaced=True),
        progress=progress,
    )  # fmt: skip
    labels = {one.name: one.index["totals"]["label"] for one in built}
    train, validate = (
        [labels.get(set_name, {}).get(kind, 0) for kind in CLASSES]
        for set_name in (name, f"{name}-val")
    )
    excluded = [row for one in built for row in one.excluded]
    for label, (of_train, of_val) in enumerate(zip(train, validate, strict=True)):
        if not (of_train and of_val):
            raise CatalogError(
                f"{CLASSES[label]} images in {folder} without duplicates: {of_train} for training "
                f"and {of_val} for validation, expected at least 1 of each"
                f"{why_lacking(excluded, label)}; add images that differ"
            )
    return PackedFolder(
        name=name,
        place=place,
        train=f"{PLACE}/{place.name}/{name}",
        validate=f"{PLACE}/{place.name}/{name}-val",
        train_counts=train,
        validate_counts=validate,
        shards_written=sum(one.shards_written for one in built),
        left_out=left_out(built, scan, place),
    )


def _class_folders(folder: Path) -> list[list[str]]:
    """List the folders of each class, by label.

    Raises:
        CatalogError: a class has no folder, or the path of `folder` is `/` or not UTF-8.
    """
    if utf8_name(str(folder)) != str(folder) or not folder.name:
        raise CatalogError(
            f"{utf8_name(str(folder))} cannot be packed: its name is empty or not UTF-8; rename it"
        )
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    sides = [[name for name in names if name.lower() in known] for known in CLASS_FOLDERS]
    for kind, known, side in zip(CLASSES, CLASS_FOLDERS, sides, strict=True):
        if not side:
            there = ", ".join(utf8_name(name) for name in names[:8]) or "no folder"
            raise CatalogError(
                f"{folder} has no folder of {kind} images (expected {' or '.join(known)}, "
                f"found {there}); rename a folder, or let `{_describing(folder)}` "
                "write a catalog for other names"
            )
    return sides


def _catalog_text(name: str, folder: Path, sides: list[list[str]]) -> str:
    """Return the catalog of a folder as TOML."""
    lines = [
        f"# Made from the folders of {toml_string(str(folder))};",
        "# overwritten each time the folder is packed.",
        "",
        "[sets]",
        f'{name} = "train"',
        f'{name}-val = "val"',
        "",
        f"[sources.{name}]",
        f"root = {toml_string(folder.name)}",
        'license = "mine"',
        f"set = {{ {name} = {1 - HELD_OUT:g}, {name}-val = {HELD_OUT:g} }}",
    ]
    for kind, side in zip(CLASSES, sides, strict=True):
        lines.append(f"{kind} = [")
        for path in side:
            if kind == "fake":  # a subfolder names the generator
                within = toml_string(f"{path}/<generator>")
                lines.append(f"    {{ folder = {within}, optional = true }},")
            generator = UNKNOWN if kind == "fake" else "camera"
            rule = f'folder = {toml_string(path)}, generator = "{generator}"'
            lines.append(f"    {{ {rule}, optional = true }},")
        lines.append("]")
    return "\n".join(lines) + "\n"


def _refuse_few(folder: Path, sides: list[list[str]], listing: Listing) -> None:
    """Refuse a class with too few images, before any image is decoded.

    Raises:
        CatalogError: the message gives the number of images.
    """
    counts = Counter(item.label for item in listing.items)
    for label, kind in enumerate(CLASSES):
        if counts[label] < FEWEST:
            where = " and ".join(str(folder / side) for side in sides[label])
            count = counted(counts[label], "image") if counts[label] else "no image"
            raise CatalogError(
                f"{where} has {count}; expected at least {FEWEST} {kind} images (a fifth is for "
                "validation), such as .jpg, .png or .webp files, in folders or zip archives"
                f"{links_in(listing)}"
            )


def _warn_of_splits(folder: Path, listing: Listing) -> None:
    """Log that images of published splits are divided like all others."""
    inside = [item.origin.partition("/")[2].rpartition("/")[0] for item in listing.items]
    held = [path for path in inside if split_of(path)[0] in ("val", "test")]
    if held:
        log.warning(
            "divided like all others: %s in folders named like a published validation or test set "
            "(first: %s); a catalog from `%s` keeps published splits apart",
            counted(len(held), "image"), held[0], _describing(folder),
        )  # fmt: skip


def _describing(folder: Path) -> str:
    return shlex.join(["python", "-m", "sharding", "describe", str(folder)])
