"""Propose a catalog for a folder of images, with classes from words in the folder names.

Main entry: `describe(folder)` takes a `pathlib.Path` and returns a `Description`; nothing is
written to disk. Its fields:

- `text`: the catalog as TOML.
- `folders`: dict from each folder whose name decides a class (path below `folder`), or from each
  folder below it that is named like a split, to a `Folder`: `kind` ("real" or "fake"), `images`
  (the number in it and its subfolders), `generator` (`NAMED`: of each folder in it), `split`
  ("train", "val", "test" or "") and `holding`, the list of the folders below it that hold the
  images ("." is the folder itself). Where a CSV table has the class or the split, the key ends with
  its conditions (`fake split=test`, `kind=photo`), which are in `where`.
- `published`: dict from "val" and "test" to the number of images in folders that are named like
  this split, or whose row in the CSV table names it. A split without images is not in it.
- `undecided`: dict from each folder without a class, or value of the table's column of classes that
  does not tell one, to its number of images ("." is `folder`).
- `unread`: dict from each reason why images cannot be used to the number of files: images, and
  files of other kinds that may hold images (`CONTAINERS`).
- `notes`: a list of lines on the CSV table, on tables and columns that are not used, and on folders
  that may be a published split and are not taken for one.

`CatalogError` is raised if there is no image, if CSV tables divide the images by their file names
(`test.csv`), or if the folder's name is not UTF-8 or cannot be the
root of a source (such as a name with a control character). A broken zip archive raises `RawError`,
a folder that is missing or cannot be read `OSError`.

`first_names(names)` returns the first few of a list of names, and the number of the others.

`sharding/folder_names.py` defines what a name says. Images of a published split go to the set of
that split, and no others if it is val or test. All images that are not published for val or test
are divided among the other sets.

A CSV table with a row per image (sharding/image_table.py) divides the images, if one of its columns
has splits. Where a folder names another split, test counts before val, and val before train. If no
folder has a class, a column with classes gives them. An image without a row is in no set then,
unless its folder has a class and is named like a split.

If no name decides, the folder is undecided. The catalog has two lines for it, one under each class,
both commented out; a person removes the `#` of the right one. Such a line also labels the undecided
folders below, which a third line for each of them, under `ignore`, can leave out. This line under
`ignore` is active for an undecided folder inside of a decided one. A person has to check the whole
catalog. The source and its sets have the name of the folder, in ASCII: a letter of another alphabet
has no counterpart there, so that such a name ends with the first 8 digits of its SHA-256, or two
folders would have one name. `my-` is before it if the catalogs of this program (`SHIPPED`) have
that name: the source would inherit the other keys there.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from console import counted
from escape import as_utf8
from imaging.decode import IMAGE_SUFFIXES
from imaging.names import NESTED, no_image
from installed import command
from sharding.catalog import (
    LONGEST_NAME,
    SHIPPED,
    CatalogError,
    leaves_raw,
    read_catalog,
    toml_string,
)
from sharding.folder_names import (
    NAMED,
    class_of,
    generator_of,
    model_name,
    notes_on_splits,
    split_of,
    strictest,
)
from sharding.format import CLASSES, UNKNOWN
from sharding.image_table import ImageTable, Where, destination, find_table, rule
from sharding.raw import RawFile, nfc, walk

CONTAINERS = frozenset(
    ["", *".zip .tar .tgz .gz .bz2 .xz .zst .7z .rar .parquet .arrow .tfrecord .mdb .h5".split(),
     *".hdf5 .npy .npz .jxl .raw .dng .nef .cr2 .cr3 .arw .raf .rw2 .orf .psd".split(),
     *".pdf .mp4 .mov .avi .mkv .webm".split()]
)  # fmt: skip
"""Suffixes of files that are not read but may hold images."""

HELD_OUT = 0.15
"""Share of the validation set and of the test set that are proposed where none is published."""


class Folder(NamedTuple):
    """Images of one rule of the catalog."""

    kind: str  # "real" or "fake"
    images: int
    generator: str  # NAMED: the names of the folders below
    split: str  # published split, by path or table; or ""
    holding: list[str]  # folders below with the images
    path: str  # "": the whole source
    where: Where = ()  # conditions on the row of the CSV table


@dataclass(frozen=True)
class Description:
    """Proposed catalog as TOML text, with the decided, undecided and unreadable images."""

    text: str
    folders: dict[str, Folder]
    published: dict[str, int]  # split -> images
    undecided: dict[str, int]  # folder -> images
    unread: dict[str, int]  # reason -> files that cannot be used
    notes: list[str]  # on CSV tables


@dataclass
class _Sorted:
    """Images of the folder, counted by what is known of them."""

    folders: dict[str, Folder] = field(default_factory=dict)
    undecided: dict[tuple[str, Where], int] = field(default_factory=dict)
    published: Counter[str] = field(default_factory=Counter)


def describe(folder: Path) -> Description:
    """Propose a catalog for the images below `folder`.

    Raises:
        CatalogError: no image below `folder`, or its name is not UTF-8.
    """
    folder = folder.absolute()
    if as_utf8(folder.name) != folder.name:
        raise CatalogError(f"{as_utf8(str(folder))} has a name that is not UTF-8; rename it")
    if leaves_raw(folder.name):
        raise CatalogError(f"{folder.name!r} cannot be the root of a source; rename the folder")
    files = list(walk(folder.parent, folder.name))
    unread: Counter[str] = Counter()
    names = _images(files, unread)
    if not names:
        counts = [f"{counted(count, 'file')}: {reason}" for reason, count in unread.items()]
        there = f", found {'; '.join(counts)}" if counts else ""
        raise CatalogError(
            f"no image below {folder}; expected files such as .jpg, .png or .webp in folders or "
            f"zip archives{there}"
        )
    table, notes = find_table(folder.parent, folder.name, files)
    folders = {nfc(name.rpartition("/")[0]) for name in names}
    every = {path for name in folders for path in _with_parents(name)}
    has_classes = any(class_of(name, every)[0] is not None for name in folders)
    columns = table.decisive(has_classes) if table else ()
    images: Counter[tuple[str, Where]] = Counter()
    by_label = bool(table and table.label in columns)
    for name in names:
        inside = name.rpartition("/")[0]
        split = "" if by_label else split_of(inside)[0]
        row = table.row_of(name, columns) if table and columns and split != "test" else {}
        if table and split and row == table.rows.no_row:
            row = {}  # the folder names the split
        if isinstance(row, str):
            unread[row] += 1
        else:
            where = table.where(inside, row, columns) if table else ()
            images[nfc(inside), where] += 1
    if table:
        conditions = [where for _, where in images]
        notes += table.notes_on(columns, conditions, names)
        table = table if any(conditions) else None
    notes += notes_on_splits(folders)
    known = _by_table(images, table) if table and by_label else _by_folder(images, every, table)
    held = {split: known.published[split] for split in ("val", "test") if known.published[split]}
    text = _catalog(folder, known, held, table)
    undecided = {_named(path, where): count for (path, where), count in known.undecided.items()}
    return Description(text, known.folders, held, undecided, dict(unread), notes)


def _images(files: Sequence[RawFile], unread: Counter[str]) -> list[str]:
    """Return the paths of the images, and count files that cannot be read in `unread`."""
    names = []
    for file in files:
        suffix = PurePosixPath(file.inside.lower()).suffix
        if suffix in IMAGE_SUFFIXES and not file.excluded:
            names.append(file.inside)
        elif suffix in IMAGE_SUFFIXES:
            unread[file.excluded] += 1
        elif suffix in CONTAINERS:  # zip: nested or excluded ones only
            reason = NESTED if suffix == ".zip" else no_image(file.inside)
            unread[file.excluded or reason] += 1
    return names


def _by_folder(
    images: Mapping[tuple[str, Where], int], every: Set[str], table: ImageTable | None
) -> _Sorted:
    """Sort images by the classes that their folders have."""
    known = _Sorted()
    labels: dict[tuple[str, Where], int] = {}
    deciding: dict[tuple[str, Where], str] = {}
    holding: dict[tuple[str, Where], dict[str, int]] = {}
    below: dict[
        str, list[str]
    ] = {}  # path -> its folders in all rules: generators are named by folders in all or in none
    for (inside, where), count in sorted(images.items()):
        split, published_as = split_of(inside)
        known.published[strictest(split, _split_by(where, table))] += count
        label, decided = class_of(inside, every)
        if label is None:
            unit = (inside or ".", where)
            known.undecided[unit] = known.undecided.get(unit, 0) + count
            continue
        unit = (max(decided, published_as, key=len), where)
        labels[unit], deciding[unit] = label, decided
        inner = holding.setdefault(unit, {})
        rest = inside[len(unit[0]) + 1 :] or "."
        inner[rest] = inner.get(rest, 0) + count
        below.setdefault(unit[0], []).append(rest)
    for (path, where), inner in holding.items():
        label, decided = labels[path, where], deciding[path, where]
        known.folders[_named(path, where)] = Folder(
            CLASSES[label],
            sum(inner.values()),
            generator_of(decided, path, below[path]) if label else "camera",
            strictest(split_of(path)[0], _split_by(where, table)),
            [*inner],
            path,
            where,
        )
    return known


def _by_table(images: Mapping[tuple[str, Where], int], table: ImageTable) -> _Sorted:
    """Sort images by the classes that the table gives. A folder may still name a split."""
    known = _Sorted()
    rules: dict[tuple[str, Where], dict[str, int]] = {}
    for (inside, where), count in sorted(images.items()):
        split, path = split_of(inside)
        known.published[strictest(split, table.split_if(where))] += count
        holding = rules.setdefault((path, where), {})
        holding[inside or "."] = holding.get(inside or ".", 0) + count
    for (path, where), holding in rules.items():
        value, total = where[0][1], sum(holding.values())
        label = table.labels.get(value)
        if label is None:
            known.undecided[path, where] = total
            continue
        known.folders[_named(path, where)] = Folder(
            CLASSES[label],
            total,
            (model_name(value) or UNKNOWN) if label else "camera",
            strictest(split_of(path)[0], table.split_if(where)),
            [*holding],
            path,
            where,
        )
    return known


def _split_by(where: Where, table: ImageTable | None) -> str:
    """Return the published split of rows with these values, "" if they name none."""
    return table.split_if(where) if table else ""


def _named(path: str, where: Where) -> str:
    """Return the name of a rule for people."""
    return " ".join([*filter(None, [path]), *(f"{column}={value}" for column, value in where)])


def first_names(names: Sequence[str], most: int = 3) -> str:
    """Return the first names of a list, and the number of the others."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _with_parents(inside: str) -> list[str]:
    """Return the lower-case paths of a folder and of those that contain it."""
    path = PurePosixPath(inside.lower())
    return [str(each) for each in (path, *path.parents)]


def _catalog(folder: Path, known: _Sorted, held: dict[str, int], table: ImageTable | None) -> str:
    name = _free_name(folder)
    measure = f"{command('evaluate')} --shards {name}-test"
    lines = [
        f"# Proposed for {toml_string(folder.name)}, from names of folders"
        f"{' and its CSV table' if table else ''}. Check every line:",
        "# the labels of the images come only from this file.",
        "",
        "[sets]",
        f'{name} = "train"',
        f'{name}-val = "val"    # chooses the checkpoint and its thresholds',
        f'{name}-test = "test"  # held out: `{measure}` measures on it',
        "",
        f"[sources.{name}]",
        f"root = {toml_string(folder.name)}",
        'license = "mine"',
        *([f"table = {table.as_toml()}"] if table else []),
        *_about_splits(name, held, table),
        f"set = {destination(name, held, {'val': HELD_OUT, 'test': HELD_OUT})}",
        "# Optional: keep files of one scene, prompt or video in one set; (...) names the group:",
        "# group = '([^/]+)_[0-9]+\\.[a-z0-9]+$'",
    ]
    undecided = Counter[str]()
    for (path, _), count in known.undecided.items():
        undecided[path] += count
    for kind in CLASSES:
        lines.append(f"{kind} = [")
        # The first of several rules of equal depth is used: `fake/test` must come before
        # `fake/<generator>`, and rows with the split val before the folder `train`.
        for entry in sorted(
            known.folders.values(), key=lambda entry: (entry.generator == NAMED, -len(entry.where))
        ):
            if entry.kind != kind:
                continue
            path, named = entry.path, entry.generator
            if named == NAMED:
                path, named = f"{path}/{NAMED}", ""
            images = counted(entry.images, "image")
            to = rule(name, path, entry.split, named, entry.where)
            lines.append(f"    {to},  # {images}")
        for (path, where), count in sorted(known.undecided.items(), key=lambda u: -len(u[0][1])):
            below = sum(undecided[inner] for inner in undecided if _is_below(inner, path))
            images = counted(count + below, "image")
            note = f", {below:,} of them in folders below that are listed too" if below else ""
            split = strictest(split_of(path)[0], _split_by(where, table))
            to = rule(name, path, split, "", where)
            lines.append(f"    # {to},  # {images}{note}: {kind}?")
        lines.append("]")
    return "\n".join([*lines, *_ignored(known, undecided)]) + "\n"


def _ignored(known: _Sorted, undecided: Mapping[str, int]) -> list[str]:
    """Return the lines of `ignore`: undecided folders that an outer folder would label."""
    # Rules apply to all folders below, so `ignore` also drops folders below that have a class.
    folders = [entry for entry in known.folders.values() if entry.path]
    undecided = {path: count for path, count in undecided.items() if path}
    labeled = [path for path in undecided if any(_is_below(path, f.path) for f in folders)]
    inner = [path for path in undecided if any(_is_below(path, outer) for outer in undecided)]
    inner = [path for path in inner if not any(_is_below(f.path, path) for f in folders)]
    inner = [path for path in inner if path not in labeled]
    if not (labeled or inner):
        return []
    lines = ["ignore = ["]
    for path in labeled:
        images = counted(undecided[path], "image")
        inside = sum(entry.images for entry in folders if _is_below(entry.path, path))
        note = f", and {inside:,} below with a class" if inside else ""
        lines.append(f"    {toml_string(path)},  # {images}{note}: remove this when you decide")
    for path in inner:
        images = counted(undecided[path], "image")
        lines.append(f"    # {toml_string(path)},  # {images} that no rule may label?")
    return [*lines, "]"]


def _about_splits(name: str, held: dict[str, int], table: ImageTable | None) -> list[str]:
    """Return comments for the catalog on the published splits."""
    lines = []
    rows = f", or with such a value in column {table.split}" if table and table.split else ""
    for split, count in held.items():
        images = counted(count, "image")
        lines.append(
            f"# {images} in folders named like {split}{rows}: only they go to {name}-{split}."
        )
    if [*held] == ["val"]:
        lines += [
            "# If others publish figures on them, they are a test set: exchange the names",
            f"# {name}-val and {name}-test in the lines below.",
        ]
    return [*lines, "# All other images:"] if lines else []


def _free_name(folder: Path) -> str:
    """Return a name for the source of a folder that no shipped source or set has."""
    longest = LONGEST_NAME - len("my-") - len("-test")
    whole = unicodedata.normalize("NFKD", folder.name.casefold())
    letters = "".join(c for c in whole if not unicodedata.combining(c)).casefold()
    tag = "" if letters.isascii() else f"-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    ascii_name = re.sub(r"[^a-z0-9_-]+", "_", letters)[: longest - len(tag)].strip("_-")
    name = (ascii_name or "mine") + tag
    shipped = read_catalog(SHIPPED)
    taken = shipped.sources.keys() | shipped.sets.keys()
    return name if taken.isdisjoint({name, f"{name}-val", f"{name}-test"}) else f"my-{name}"


def _is_below(path: str, folder: str) -> bool:
    """Return whether a folder is in another one; "." is the top."""
    return path != folder and (folder == "." or path.startswith(f"{folder}/"))
