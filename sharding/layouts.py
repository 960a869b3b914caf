"""How a raw dataset on disk is read: a catalogue source in, labelled items out.

Labels come from whole path parts, without regard to case, the deepest match first; a file that a
real and a fake folder claim alike is refused, never guessed.
"""

import fnmatch
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sharding.catalog import CatalogError, Folder, Source, shares
from sharding.format import CLASSES

IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .heic .heif .ico .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm "
    ".qoi .tga .tif .tiff .webp".split()
)


class Item(NamedTuple):
    """One image file that will become a sample."""

    source: str
    path: str  # absolute
    origin: str  # below the raw folder, with '/'
    label: int
    generator: str
    group: str
    set: str
    size: int  # bytes
    mtime_ns: int


class Rule(NamedTuple):
    """A catalogue folder, compiled."""

    label: int
    folder: Folder
    pattern: re.Pattern


def read_folders(
    name: str, source: Source, raw: Path
) -> tuple[list[Item], Counter[tuple[str, str]]]:
    """All images of a folder dataset, sorted by path, and the count of files left out by reason.

    Raises:
        CatalogError: a file that is both real and fake by the catalogue's rules.
    """
    root = raw / (source.root or name)
    rules = [
        Rule(label, folder, folder_pattern(folder.folder))
        for label in range(len(CLASSES))
        for folder in source.folders(label)
    ]
    ignored = [folder_pattern(folder) for folder in source.ignore]
    group_of = re.compile(source.group, re.IGNORECASE) if source.group else None
    items: list[Item] = []
    left_out: Counter[tuple[str, str]] = Counter()
    for folder, names in _walk(root):
        inside = folder.relative_to(root).as_posix().lower() + "/"
        if any(pattern.match(inside) for pattern in ignored):
            left_out[name, "in a folder the catalogue ignores"] += len(names)
            continue
        claims = _claims(rules, inside)
        for file in names:
            path = folder / file
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                left_out[name, f"not an image by its name ({path.suffix.lower() or file})"] += 1
                continue
            rule = _decide(claims, path)
            if rule is None:
                left_out[name, "in no folder the catalogue names"] += 1
                continue
            items.append(_item(name, source, rule, path, raw, group_of))
    return items, left_out


def folder_pattern(folder: str) -> re.Pattern:
    """A catalogue path as a regular expression over 'a/b/c/' in lower case; see `Folder`."""
    parts = [part for part in folder.lower().strip("/").split("/") if part != "."]
    translated = [r"(?:[^/]+/)*" if part == "**" else _part_pattern(part) + "/" for part in parts]
    return re.compile("".join(translated))


def _part_pattern(part: str) -> str:
    """One path part, where `*` and `?` stop at the slash."""
    return "".join(
        {"*": "[^/]*", "?": "[^/]"}.get(character, re.escape(character)) for character in part
    )


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders below `root` in sorted order, with their regular files; links are not followed."""

    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders.sort()
        yield Path(folder), sorted(n for n in names if not n.startswith("."))


def _claims(rules: list[Rule], inside: str) -> list[tuple[int, Rule]]:
    """The rules whose folder contains `inside`, each with how deep it reaches."""
    found = []
    for rule in rules:
        match = rule.pattern.match("" if inside == "./" else inside)
        if match:
            found.append((match.end(), rule))
    return found


def _decide(claims: list[tuple[int, Rule]], path: Path) -> Rule | None:
    """The deepest rule for a file; equal depth with two labels is an error."""
    fitting = [
        (depth, rule)
        for depth, rule in claims
        if fnmatch.fnmatch(path.name.lower(), rule.folder.name.lower())
    ]
    if not fitting:
        return None
    deepest = max(depth for depth, _ in fitting)
    best = [rule for depth, rule in fitting if depth == deepest]
    if len({rule.label for rule in best}) > 1:
        raise CatalogError(
            f"{path} is real by folder {next(r.folder.folder for r in best if r.label == 0)!r} and "
            f"fake by {next(r.folder.folder for r in best if r.label == 1)!r}; make one of the two "
            "more precise in the catalogue"
        )
    return best[0]


def _item(
    name: str, source: Source, rule: Rule, path: Path, raw: Path, group_of: re.Pattern | None
) -> Item:
    origin = path.relative_to(raw).as_posix()
    captured = group_of.search(origin) if group_of else None
    group = f"{name}/{captured[1]}" if captured else origin.rpartition(".")[0]
    stat = path.stat()
    return Item(
        source=name,
        path=str(path.absolute()),
        origin=origin,
        label=rule.label,
        generator=rule.folder.generator or CLASSES[rule.label],
        group=group,
        set=choose_set(group, shares(rule.folder.set or source.set)),
        size=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
    )


def choose_set(group: str, share_of: dict[str, float]) -> str:
    """The set of a group: its hash is a point in [0, 1), and the shares divide that line.

    It depends on the group alone, so new files never move old ones to another set.
    """
    point = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    for name, share in share_of.items():
        if point < share:
            return name
        point -= share
    return name
