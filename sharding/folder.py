"""Pack a folder that holds `real/` and `fake/` without a catalog of the user's: one is made here.

The sets lie below `folders/` in the place of all sets, apart from those of other catalogs:

    folders/<name>-<hash of the folder's path>/catalog.toml
    folders/<name>-<hash of the folder's path>/<name>            the training set
    folders/<name>-<hash of the folder's path>/<name>-val        the held-out one
"""

import hashlib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import recipes
from imaging.zip import printable
from sharding.build import Progress, Tolerance, build, no_progress
from sharding.catalog import BUILT_IN, Catalog, CatalogError, read_catalog
from sharding.format import CLASSES
from sharding.listing import list_source
from storage import AnyPath, make_folder, write_text

PLACE = "folders"
CATALOG_FILE = "catalog.toml"

CLASS_FOLDERS = (("real", "0_real"), ("fake", "1_fake"))
"""What the folder of a class may be called, by label, in any case."""

HELD_OUT = 0.2
"""The share of groups that is held out to choose the checkpoint by and to calibrate on."""

FEWEST = 20
"""Images that a class needs: a fifth of fewer says nothing."""

MAX_BAD = 0.05
"""The share of images that may be unreadable."""


@dataclass(frozen=True, kw_only=True)
class PackedFolder:
    """A packed folder: its name, where its sets lie, their names below the place of all sets, the
    images of each class in them (by label), and how many shards were written this time.
    """

    name: str
    place: AnyPath
    train: str
    validate: str
    train_counts: Sequence[int]
    validate_counts: Sequence[int]
    shards_written: int


def pack_folder(
    folder: Path, data: AnyPath, *, jobs: int = 0, progress: Progress = no_progress
) -> PackedFolder:
    """Pack the images of `folder` into two sets below `data`, or bring them up to date. `jobs` is
    the number of processes, 0 for one per core.

    Raises:
        CatalogError: a folder of a class is missing, or holds too few images.
        ShardError, OSError: as `sharding.build.build`.
    """
    folder = folder.resolve()
    sides = _class_folders(folder)
    name = re.sub(r"[^a-z0-9_-]+", "_", folder.name.lower()).strip("_-") or "images"
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    place = data / PLACE / f"{name}-{digest}"
    text = _catalog_text(name, folder, sides)
    catalog = recipes.build(Catalog, tomllib.loads(text), str(place / CATALOG_FILE))
    # What is kept for testing is trained on here no more than elsewhere.
    catalog = replace(catalog, exclude=read_catalog([BUILT_IN]).exclude)
    _refuse_few(folder, sides, catalog)
    make_folder(place)
    write_text(place / CATALOG_FILE, text)
    _, built = build(
        catalog, folder.parent, place,
        jobs=jobs, tolerance=Tolerance(MAX_BAD, allow_incomplete=True), progress=progress,
    )  # fmt: skip
    labels = {one.name: one.index["totals"]["label"] for one in built}
    train, validate = (
        [labels.get(set_name, {}).get(kind, 0) for kind in CLASSES]
        for set_name in (name, f"{name}-val")
    )
    for kind, of_train, of_val in zip(CLASSES, train, validate, strict=True):
        if not (of_train and of_val):
            raise CatalogError(
                f"of the {kind} images in {folder} {of_train} are left to train on and {of_val} to "
                "validate on, without copies and near-duplicates; add images that differ"
            )
    return PackedFolder(
        name=name,
        place=place,
        train=f"{PLACE}/{place.name}/{name}",
        validate=f"{PLACE}/{place.name}/{name}-val",
        train_counts=train,
        validate_counts=validate,
        shards_written=sum(one.shards_written for one in built),
    )


def _class_folders(folder: Path) -> list[list[str]]:
    """The folders of each class that are there, by label.

    Raises:
        CatalogError: one has none, or the folder's name is not UTF-8.
    """
    if printable(str(folder)) != str(folder) or not folder.name:
        raise CatalogError(f"{printable(str(folder))} cannot be packed by its name; rename it")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    sides = [[name for name in names if name.lower() in known] for known in CLASS_FOLDERS]
    for kind, known, side in zip(CLASSES, CLASS_FOLDERS, sides, strict=True):
        if not side:
            there = ", ".join(printable(name) for name in names[:8]) or "no folder"
            raise CatalogError(
                f"{folder} has no folder of {kind} images (expected {' or '.join(known)}; there "
                f"is {there}); rename one, or let `python -m sharding describe {folder}` write a "
                "catalog for other names"
            )
    return sides


def _catalog_text(name: str, folder: Path, sides: list[list[str]]) -> str:
    """The catalog of a folder."""
    lines = [
        f"# Made from the folders of {folder}; it is written anew each time.",
        "",
        "[sets]",
        f'{name} = "train"',
        f'{name}-val = "val"',
        "",
        f"[sources.{name}]",
        f"root = {json.dumps(folder.name, ensure_ascii=False)}",
        'license = "mine"',
        f"set = {{ {name} = {1 - HELD_OUT:g}, {name}-val = {HELD_OUT:g} }}",
    ]
    for kind, side in zip(CLASSES, sides, strict=True):
        lines.append(f"{kind} = [")
        for path in side:
            if kind == "fake":  # a folder inside it names the generator
                within = json.dumps(f"{path}/<generator>")
                lines.append(f"    {{ folder = {within}, optional = true }},")
            generator = "unknown" if kind == "fake" else "camera"
            rule = f'folder = {json.dumps(path)}, generator = "{generator}"'
            lines.append(f"    {{ {rule}, optional = true }},")
        lines.append("]")
    return "\n".join(lines) + "\n"


def _refuse_few(folder: Path, sides: list[list[str]], catalog: Catalog) -> None:
    """Refuse a class with too few images, before any is decoded.

    Raises:
        CatalogError: with how many there are.
    """
    ((name, source),) = catalog.sources.items()
    counts = Counter(item.label for item in list_source(name, source, folder.parent).items)
    for label, kind in enumerate(CLASSES):
        if counts[label] < FEWEST:
            where = " and ".join(str(folder / side) for side in sides[label])
            count = f"{counts[label]} images" if counts[label] else "no image"
            raise CatalogError(
                f"{where} holds {count}; expected at least {FEWEST} {kind} ones (a fifth is held "
                "out), such as .jpg, .png or .webp files, in folders or zip archives"
            )
