"""Propose a catalog for a folder of images, with classes from words in the folder names.

Main entry: `describe(folder)` takes a `pathlib.Path` and returns a `Description`; nothing is
written to disk. Its fields:

- `text`: the catalog as TOML.
- `folders`: dict from each folder whose name decides a class (path below `folder`), or from each
  folder below it that is named like a split, to a `Folder`: `kind` ("real" or "fake"), `images`
  (the number in it and its subfolders), `generator` (`NAMED`: of each folder in it), `split`
  ("train", "val", "test" or "") and `holding`, the list of the folders below it that hold the
  images ("." is the folder itself).
- `published`: dict from "val" and "test" to the number of images in folders that are named like
  this split. A split without images is not in it.
- `undecided`: dict from each folder without a class to its number of images ("." is `folder`).
- `unread`: dict from each reason why images cannot be read to the number of files: images, and
  files of other kinds that may hold images (`CONTAINERS`).

`CatalogError` is raised if there is no image, or if the folder's name is not UTF-8 or cannot be the
root of a source (such as a name with a control character). A broken zip archive raises `RawError`,
a folder that is missing or cannot be read `OSError`.

`first_names(names)` returns the first few of a list of names, and the number of the others.
`split_of(path)` returns a pair of texts: the published split that a path names (below) and the path
up to this name, or ("", "").

`WORDS` are two sets of words, such as "photo" for real and "generated" for fake. The names in the
path of a folder are read from the deepest to the top. The first name with words of only one class
decides, but not a word for content, such as "human", below a name that is exactly that of fakes.
If another name in the path has a word of the other class, it decides only if the deepest name that
is exactly that of a class (`EXACT`, such as "0_real"; "nature" beside "ai") agrees. A name such as
"non_ai" decides nothing, nor do the names above it. Two words may also mean photographs: "sd" in a
path with a word of memory cards, such as "SD Card/DCIM", and "imagen" in a name without a digit or
a word of fakes in `EXACT`.

A folder named like a split (`SPLITS`) is taken for a published split. Its images go to the set of
that split, and no others if it is val or test: a detector must not learn from what others measure
on. Of several such names in a path, test counts before val, and val before train. All images that
are not published for val or test are divided among the other sets.

The generator of fakes is named by the folders below one that says only that they are fakes, such as
`fake/sdxl`. Otherwise it is the deepest name of a known family of generators in the path, or the
deepest name that says more than a class, a split or a kind of file.

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
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

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

_NEUTRAL = frozenset({"", "image", "images", "zip"})

_NEGATIONS = frozenset({"no", "non", "not", "un"})

_CONTENT = frozenset("nature natural photo photos photograph photographs human".split())
"""Words for real images that also say what generated images show."""

SPLITS = {
    "test": frozenset({"test", "testing"}),
    "val": frozenset({"val", "valid", "validation"}),
    "train": frozenset({"train", "training"}),
}
"""Words that may be the name of a folder with a published split, by split."""

HELD_OUT = 0.15
"""Share of the validation set and of the test set that are proposed where none is published."""

NAMED = "<generator>"
"""Generator of a rule whose pattern takes it from the name of a folder."""

_FAKES = EXACT[1] | {"synth"}

_PLAIN = WORDS[0] | _FAKES | _NEUTRAL | frozenset(
    "and c data dataset frames manipulated or raw sequences set split videos vs".split()
)  # fmt: skip
"""Words that name neither a generator nor a split, such as the `c` of c23 in FaceForensics++."""

_FAMILIES = re.compile(rf"gan\d*\b|\b({'|'.join(sorted(WORDS[1] - _FAKES))})\d*\b")


class Folder(NamedTuple):
    """Images of one rule of the catalog."""

    kind: str  # "real" or "fake"
    images: int
    generator: str  # NAMED: that of each folder below
    split: str  # published split, "" if the path names none
    holding: list[str]  # folders below with the images


@dataclass(frozen=True)
class Description:
    """Proposed catalog as TOML text, with the decided, undecided and unreadable images."""

    text: str
    folders: dict[str, Folder]
    published: dict[str, int]  # split -> images
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
    labels: dict[str, int] = {}
    deciding: dict[str, str] = {}
    holding: dict[str, dict[str, int]] = {}
    published: Counter[str] = Counter()
    undecided: dict[str, int] = {}
    every = {path for inside in images for path in _with_parents(inside)}
    for inside, count in sorted(images.items()):
        split, published_as = split_of(inside)
        published[split] += count
        label, decided = _class_of(inside, every)
        if label is None:
            undecided[inside or "."] = count
            continue
        path = max(decided, published_as, key=len)
        labels[path], deciding[path] = label, decided
        holding.setdefault(path, {})[inside[len(path) + 1 :] or "."] = count
    folders = {
        path: Folder(
            CLASSES[labels[path]],
            sum(inner.values()),
            _generator_of(deciding[path], path, inner) if labels[path] else "camera",
            split_of(path)[0],
            [*inner],
        )
        for path, inner in holding.items()
    }
    held = {split: published[split] for split in ("val", "test") if published[split]}
    text = _catalog(folder, folders, held, undecided)
    return Description(text, folders, held, undecided, dict(unread))


def first_names(names: Sequence[str], most: int = 3) -> str:
    """Return the first names of a list, and the number of the others."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def split_of(inside: str) -> tuple[str, str]:
    """Return the published split of a folder, and its path up to the name that says so; ("", "") if
    none does.
    """
    parts = inside.split("/")
    for split, words in SPLITS.items():
        for depth, part in enumerate(parts, 1):
            told = _words_in(part) - _PLAIN
            if told and told <= words:
                return split, "/".join(parts[:depth])
    return "", ""


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
    folder: Path, folders: dict[str, Folder], held: dict[str, int], undecided: dict[str, int]
) -> str:
    name = _free_name(folder)
    shares = {f"{name}-{split}": HELD_OUT for split in ("val", "test") if split not in held}
    shares = {name: 1 - sum(shares.values()), **shares}
    divided = "{ " + ", ".join(f"{key} = {share:g}" for key, share in shares.items()) + " }"
    divided = divided if len(shares) > 1 else toml_string(name)
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
        *_about_splits(name, held),
        f"set = {divided}",
        "# Optional: keep files of one scene, prompt or video in one set; (...) names the group:",
        "# group = '([^/]+)_[0-9]+\\.[a-z0-9]+$'",
    ]
    for kind in CLASSES:
        lines.append(f"{kind} = [")
        # Of rules of equal depth the first counts: `fake/test`, not `fake/<generator>`.
        for path, entry in sorted(folders.items(), key=lambda pair: pair[1].generator == NAMED):
            if entry.kind != kind:
                continue
            named = f", generator = {toml_string(entry.generator)}"
            if entry.generator == NAMED:
                path, named = f"{path}/{NAMED}", ""
            images = counted(entry.images, "image")
            lines.append(f"    {_rule(name, path, entry.split, named)},  # {images}")
        for path, count in undecided.items():
            below = sum(undecided[inner] for inner in undecided if _is_below(inner, path))
            images = counted(count + below, "image")
            note = f", {below:,} of them in folders below that are listed too" if below else ""
            rule = _rule(name, path, split_of(path)[0])
            lines.append(f"    # {rule},  # {images}{note}: {kind}?")
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
            inside = sum(entry.images for p, entry in folders.items() if _is_below(p, path))
            note = f", and {inside:,} below with a class" if inside else ""
            lines.append(f"    {toml_string(path)},  # {images}{note}: remove this when you decide")
        for path in inner:
            images = counted(undecided[path], "image")
            lines.append(f"    # {toml_string(path)},  # {images} that no rule may label?")
        lines.append("]")
    return "\n".join(lines) + "\n"


def _about_splits(name: str, held: dict[str, int]) -> list[str]:
    """Return comments for the catalog on the published splits."""
    lines = []
    for split, count in held.items():
        images = counted(count, "image")
        lines.append(f"# {images} in folders named like {split}: only they go to {name}-{split}.")
    if [*held] == ["val"]:
        lines += [
            "# If others publish figures on them, they are a test set: exchange the names",
            f"# {name}-val and {name}-test in the lines below.",
        ]
    return [*lines, "# All other images:"] if lines else []


def _rule(name: str, folder: str, split: str, named: str = "") -> str:
    """Return a rule as TOML; `named` is its `generator`. Images of train go to the sets of all."""
    to = f', set = "{name}-{split}"' if split in ("val", "test") else ""
    return f"{{ folder = {toml_string(folder)}{named}{to} }}"


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


def _generator_of(decided: str, path: str, holding: Iterable[str]) -> str:
    """Return the generator of the fakes in `path`, whose class the name of `decided` tells."""
    below = {inner.partition("/")[0] for inner in holding}
    outer = decided.rpartition("/")[2].lower()
    between = path[len(decided) + 1 :]
    if (
        _Name(outer, on_card=False).exact == 1
        and "." not in below
        and not any(map(_model_name, between.split("/")))
        and any(map(_model_name, below))
    ):
        return NAMED
    names = [name for part in path.split("/") if (name := _model_name(part))]
    known = [name for name in names if _FAMILIES.search(name)]
    return (known or names or [UNKNOWN])[-1]


def _model_name(part: str) -> str:
    """Return what the name of a folder says beyond a class and a split, or ""."""
    splits = frozenset().union(*SPLITS.values())
    if _words_in(part) <= _PLAIN | splits:
        return ""
    words = re.split(r"(?:[^\w.]|_)+", part.lower().removesuffix(".zip").strip("_- "))
    if words[0] in ("0", "1") and words[1] in _FAKES:  # as in 1_fake
        del words[0]
    return "-".join(word for word in words if word not in _FAKES | _NEUTRAL | splits)


def _words_in(part: str) -> set[str]:
    return set(re.split(r"[\W\d_]+", part.lower()))
