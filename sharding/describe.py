"""Propose a catalog for a folder of images, with classes from words in the folder names.

Main entry: `describe(folder)` takes a `pathlib.Path` and returns a `Description`; nothing is
written to disk. Its fields:

- `text`: the catalog as TOML.
- `folders`: dict from each folder whose name decides a class (path below `folder`) to a pair: the
  class, "real" or "fake", and the number of images that it decides, also in its subfolders.
- `holding`: dict from each of these folders to the list of the folders, below it, that hold the
  images ("." is the folder itself).
- `undecided`: dict from each folder without a class to its number of images ("." is `folder`).
- `unread`: dict from each reason why images cannot be read to the number of files: images, and
  files of other kinds that may hold images (`CONTAINERS`).

`CatalogError` is raised if there is no image, or if the folder's name is not UTF-8 or cannot be the
root of a source (such as a name with a control character). A broken zip archive raises `RawError`,
a folder that is missing or cannot be read `OSError`.

`first_names(names)` returns the first few of a list of names, and the number of the others.

`WORDS` are two sets of words, such as "photo" for real and "generated" for fake. The names in the
path of a folder are read from the deepest to the top. The first name with words of only one class
decides, but not a word for content, such as "human", below a name that is exactly that of fakes.
If another name in the path has a word of the other class, it decides only if the deepest name that
is exactly that of a class (`EXACT`, such as "0_real"; "nature" beside "ai") agrees. A name such as
"non_ai" decides nothing, nor do the names above it. Two words may also mean photographs: "sd" in a
path with a word of memory cards, such as "SD Card/DCIM", and "imagen" in a name without a digit or
a word of fakes in `EXACT`.

If no name decides, the folder is undecided. The catalog has two lines for it, one under each class,
both commented out; a person removes the `#` of the right one. Such a line also labels the undecided
folders below, which a third line for each of them, under `ignore`, can leave out. That third line
is active for an undecided folder inside of a decided one. A person has to check the whole catalog.
The source and its sets have the name of the folder, in ASCII: a letter of another alphabet has no
counterpart there, so that such a name ends with the first 8 digits of its SHA-256, or two folders
would have one name. `my-` is before it if the catalogs of this program (`SHIPPED`) have that name:
the source would inherit the other keys there.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from console import counted
from imaging.decode import IMAGE_SUFFIXES
from imaging.names import NESTED, no_image, utf8_name
from installed import command
from sharding.catalog import (
    LONGEST_NAME,
    SHIPPED,
    CatalogError,
    leaves_raw,
    read_catalog,
    toml_string,
)
from sharding.format import CLASSES, UNKNOWN
from sharding.raw import nfc, walk

WORDS = (
    frozenset("real reals nature natural photo photos photograph photographs camera human "
              "original originals authentic pristine".split()),
    frozenset("fake fakes ai aigc synthetic synth generated artificial deepfake deepfakes gan "
              "diffusion midjourney dalle flux sdxl sd imagen firefly stylegan".split()),
)  # fmt: skip
"""Words that indicate a class, by label."""

CONTAINERS = frozenset(
    ["", *".zip .tar .tgz .gz .bz2 .xz .zst .7z .rar .parquet .arrow .tfrecord .mdb .h5".split(),
     *".hdf5 .npy .npz .jxl .raw .dng .nef .cr2 .cr3 .arw .raf .rw2 .orf .psd".split(),
     *".pdf .mp4 .mov .avi .mkv .webm".split()]
)  # fmt: skip
"""Suffixes of files that are not read but may hold images."""

EXACT = (
    frozenset("real reals authentic".split()),
    frozenset("fake fakes ai aigc synthetic generated artificial deepfake deepfakes".split()),
)
"""Words that may be the whole name of a folder of one class, by label; digits do not count."""

_CARD = frozenset("card cards karte carte tarjeta dcim".split())
"""Words in a path in which `sd` names a memory card, not Stable Diffusion."""

_NEUTRAL = frozenset({"", "image", "images"})

_NEGATIONS = frozenset({"no", "non", "not", "un"})

_CONTENT = frozenset("nature natural photo photos photograph photographs human".split())
"""Words for real images that also say what generated images show."""

_GENERIC = frozenset(
    "fake fakes ai aigc synthetic synth generated artificial images image 1 "
    "train val valid validation test".split()
)


@dataclass(frozen=True)
class Description:
    """Proposed catalog as TOML text, with the decided, undecided and unreadable images."""

    text: str
    folders: dict[str, tuple[str, int]]  # folder -> (class, images)
    holding: dict[str, list[str]]  # folder -> folders below it with its images
    undecided: dict[str, int]  # folder -> images
    unread: dict[str, int]  # reason -> files that cannot be read


def describe(folder: Path) -> Description:
    """Propose a catalog for the images below `folder`.

    Raises:
        CatalogError: no image below `folder`, or its name is not UTF-8.
    """
    folder = folder.absolute()
    if utf8_name(folder.name) != folder.name:
        raise CatalogError(f"{utf8_name(str(folder))} has a name that is not UTF-8; rename it")
    if leaves_raw(folder.name):
        raise CatalogError(f"{folder.name!r} cannot be the root of a source; rename the folder")
    unread: Counter[str] = Counter()
    images: Counter[str] = Counter()
    for file in walk(folder.parent, folder.name):
        suffix = PurePosixPath(file.inside.lower()).suffix
        if suffix not in IMAGE_SUFFIXES:
            if suffix in CONTAINERS:  # a zip archive only if it is in another one, or excluded
                reason = NESTED if suffix == ".zip" else no_image(file.inside)
                unread[file.excluded or reason] += 1
            continue
        if file.excluded:
            unread[file.excluded] += 1
        else:
            images[nfc(file.inside.rpartition("/")[0])] += 1
    if not images:
        counts = [f"{counted(count, 'file')}: {reason}" for reason, count in unread.items()]
        there = f", found {'; '.join(counts)}" if counts else ""
        raise CatalogError(
            f"no image below {folder}; expected files such as .jpg, .png or .webp in folders or "
            f"zip archives{there}"
        )
    folders: dict[str, tuple[str, int]] = {}
    holding: dict[str, list[str]] = {}
    undecided: dict[str, int] = {}
    nested: Counter[str] = Counter()
    every = {path for inside in images for path in _with_parents(inside)}
    for inside, count in sorted(images.items()):
        label, decided = _class_of(inside, every)
        if label is None:
            undecided[inside or "."] = count
            continue
        folders[decided] = (CLASSES[label], folders.get(decided, ("", 0))[1] + count)
        nested[decided] += count if inside != decided else 0
        holding.setdefault(decided, []).append(inside[len(decided) + 1 :] or ".")
    text = _catalog(folder, folders, undecided, nested)
    return Description(text, folders, holding, undecided, dict(unread))


def first_names(names: Sequence[str], most: int = 3) -> str:
    """Return the first names of a list, and the number of the others."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _with_parents(inside: str) -> list[str]:
    """Return the lower-case paths of a folder and of those that contain it."""
    path = PurePosixPath(inside.lower())
    return [str(each) for each in (path, *path.parents)]


def _class_of(inside: str, folders: Set[str]) -> tuple[int | None, str]:
    """Return a folder's label, and its path up to the name that decides; (None, "") if undecided.
    `folders` are the lower-case paths of all folders.
    """
    parts = inside.lower().split("/") if inside else []
    on_card = not _CARD.isdisjoint(re.split(r"[^a-z]+", inside.lower()))
    names = [_Name(part, on_card) for part in parts]
    for depth, part in enumerate(parts):
        above = "/".join(parts[:depth])
        beside = [str(PurePosixPath(above, other)) for other in ("ai", "fake")]
        if part == "nature" and not folders.isdisjoint(beside):
            names[depth].exact = 0
    for depth in range(len(names), 0, -1):
        name = names[depth - 1]
        if name.negated:
            break
        if len(name.labels) != 1 or (
            name.words & _CONTENT and name.exact is None and _is_fake(names[: depth - 1])
        ):
            continue
        (label,) = name.labels
        exact = next((each.exact for each in reversed(names) if each.exact is not None), None)
        if exact != label and any(each.labels - {label} for each in names):
            break
        return label, "/".join(inside.split("/")[:depth])
    return None, ""


class _Name:
    """Name of a folder: its words, the labels that they indicate, and the one that is its name.
    A word of two meanings indicates both.
    """

    def __init__(self, part: str, on_card: bool) -> None:
        words = re.split(r"[^a-z]+", part)
        self.words = set(words)
        self.labels = {label for label, known in enumerate(WORDS) if self.words & known}
        told = self.words - _NEUTRAL
        self.exact = next((label for label in (0, 1) if told and told <= EXACT[label]), None)
        known = WORDS[0] | WORDS[1]
        self.negated = any(
            word in _NEGATIONS and known.intersection(words[at:]) for at, word in enumerate(words)
        )
        is_generator = re.search(r"\d", part) or not EXACT[1].isdisjoint(words)
        is_spanish = "imagen" in words and not is_generator  # for image
        if self.negated or is_spanish or (on_card and "sd" in words):
            self.labels = {0, 1}


def _is_fake(names: Sequence[_Name]) -> bool:
    """Return whether a name stands only for fakes: `fake/human` is no folder of reals."""
    return any(name.labels == {1} for name in names)


def _catalog(
    folder: Path,
    folders: dict[str, tuple[str, int]],
    undecided: dict[str, int],
    nested: Counter[str],
) -> str:
    name = _free_name(folder)
    measure = f"{command('evaluate')} --shards {name}-test"
    lines = [
        f"# Proposed from the folder names of {toml_string(folder.name)}. Check every line: the",
        "# labels of the images come only from this file.",
        "",
        "[sets]",
        f'{name} = "train"',
        f'{name}-val = "val"    # chooses the checkpoint and its thresholds',
        f'{name}-test = "test"  # held out: `{measure}` measures on it',
        "",
        f"[sources.{name}]",
        f"root = {toml_string(folder.name)}",
        'license = "mine"',
        f"set = {{ {name} = 0.7, {name}-val = 0.15, {name}-test = 0.15 }}",
        "# Optional: keep files of one scene, prompt or video in one set; (...) names the group:",
        "# group = '([^/]+)_[0-9]+\\.[a-z0-9]+$'",
    ]
    for kind in CLASSES:
        lines.append(f"{kind} = [")
        for path, (class_name, count) in folders.items():
            if class_name != kind:
                continue
            whole = kind == "fake" and nested[path] == count
            generator = _generator(path) if kind == "fake" else "camera"
            entry = (
                f"{{ folder = {toml_string(path + '/<generator>')} }}"
                if whole
                else f"{{ folder = {toml_string(path)}, generator = {toml_string(generator)} }}"
            )
            lines.append(f"    {entry},  # {counted(count, 'image')}")
        for path, count in undecided.items():
            below = sum(undecided[inner] for inner in undecided if _is_below(inner, path))
            images = counted(count + below, "image")
            note = f", {below:,} of them in folders below that are listed too" if below else ""
            lines.append(f"    # {{ folder = {toml_string(path)} }},  # {images}{note}: {kind}?")
        lines.append("]")
    # A rule for a folder applies to those below it, and `ignore` also to those with a class.
    labeled = [path for path in undecided if any(_is_below(path, outer) for outer in folders)]
    inner = [path for path in undecided if any(_is_below(path, outer) for outer in undecided)]
    inner = [path for path in inner if not any(_is_below(decided, path) for decided in folders)]
    inner = [path for path in inner if path not in labeled]
    if labeled or inner:
        lines.append("ignore = [")
        for path in labeled:
            images = counted(undecided[path], "image")
            inside = sum(count for other, (_, count) in folders.items() if _is_below(other, path))
            note = f", and {inside:,} below with a class" if inside else ""
            lines.append(f"    {toml_string(path)},  # {images}{note}: remove this when you decide")
        for path in inner:
            images = counted(undecided[path], "image")
            lines.append(f"    # {toml_string(path)},  # {images} that no rule may label?")
        lines.append("]")
    return "\n".join(lines) + "\n"


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


def _generator(path: str) -> str:
    """Return the generator: the deepest part of a path that has words outside of `_GENERIC`."""
    for part in reversed(path.lower().split("/")):
        words = [word for word in re.split(r"[^a-z0-9.]+", part) if word not in {"", *_GENERIC}]
        if words:
            return "-".join(words)
    return UNKNOWN
