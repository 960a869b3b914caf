"""Tell what the names of folders say of their images: the class, the published split and the
generator.

Main entries, each for the path of a folder below the one that is read, with `/` between its parts:

- `class_of(path, folders)` returns the label (0 real, 1 fake) and the path up to the name that
  decides, or (None, "") if none does. `folders` is a set of the lower-case paths of all folders.
- `split_of(path)` returns the split ("train", "val" or "test") and the path up to the name that
  says so, or ("", "").
- `notes_on_splits(folders)` returns a line on the folders that are not taken for a split, but have
  a word of one in their name (`looks_published(name)`).
- `strictest(splits)` returns which of several splits of one image counts.
- `generator_of(decided, path, holding)` returns the generator of the fakes in the folder `path`,
  whose class the name of the folder `decided` tells, or `NAMED` if the folders inside name it.
  `holding` are the folders with its images, relative to `path`. `model_name(part)` returns what one
  name says beyond a class and a split, or "".

`WORDS` are two sets of words, such as "photo" for real and "generated" for fake. The names in a
path are read from the deepest to the top. The first name with words of only one class decides, but
not a word for content, such as "human", below a name that is exactly that of fakes. If another name
in the path has a word of the other class, it decides only if the deepest name that is exactly that
of a class (`EXACT`, such as "0_real"; "nature" beside "ai") agrees. A name such as "non_ai" decides
nothing, nor do the names above it. Two words may also mean photographs: "sd" in a path with a word
of memory cards, such as "SD Card/DCIM", and "imagen" in a name without a digit or a word of fakes
in `EXACT`.

A folder named like a split (`SPLITS`) is taken for a published split. Of several such names in a
path, and of a path and the row of a table, test counts before val, and val before train: a detector
must not learn from published test images. `dev` below a folder of fakes is a generator (of FLUX),
not a split.

The generator of fakes is named by the folders below one that says only that they are fakes, such as
`fake/sdxl`. Otherwise it is the deepest name of a known family of generators in the path, or the
deepest name that says more than a class, a split or a kind of file.
"""

import re
from collections.abc import Iterable, Sequence, Set
from pathlib import PurePosixPath

from sharding.format import UNKNOWN

WORDS = (
    frozenset("real reals nature natural photo photos photograph photographs camera human "
              "original originals authentic pristine".split()),
    frozenset("fake fakes ai aigc synthetic synth generated artificial deepfake deepfakes gan "
              "diffusion midjourney dalle flux sdxl sd imagen firefly stylegan".split()),
)  # fmt: skip
"""Words that indicate a class, by label."""

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
    "test": frozenset("test testing testset eval evaluation holdout".split()),
    "val": frozenset("val valid validation valset dev".split()),
    "train": frozenset("train training trainset".split()),
}
"""Words that may be the name of a folder with a published split, by split."""

_SPLIT_WORDS = frozenset().union(*SPLITS.values()) - {"dev"}
"""Words that are no part of a generator's name. `dev` is, in FLUX.1 [dev]."""

NAMED = "<generator>"
"""Generator of a rule whose pattern takes it from the name of a folder."""

_FAKES = EXACT[1] | {"synth"}

_PLAIN = WORDS[0] | _FAKES | _NEUTRAL | frozenset(
    "and c data dataset frames manipulated or raw sequences set split videos vs".split()
)  # fmt: skip
"""Words that name neither a generator nor a split, such as the `c` of c23 in FaceForensics++."""

_FAMILIES = re.compile(rf"gan\d*\b|\b({'|'.join(sorted(WORDS[1] - _FAKES))})\d*\b")


def split_of(inside: str) -> tuple[str, str]:
    """Return the published split of a folder, and its path up to the part that names the split;
    ("", "") if no part does.
    """
    parts = inside.split("/")
    for split in SPLITS:
        for depth in range(1, len(parts) + 1):
            if _split_at(parts[:depth]) == split:
                return split, "/".join(parts[:depth])
    return "", ""


def _split_at(parts: Sequence[str]) -> str:
    """Return the split that the last name of a path names, or ""."""
    told = _words_in(parts[-1]) - _PLAIN
    if told == {"dev"} and any(_Name(part.lower(), on_card=False).exact == 1 for part in parts):
        return ""
    return next((split for split, words in SPLITS.items() if told and told <= words), "")


def looks_published(name: str) -> bool:
    """Return whether a name has a word of a split that is not for training."""
    words = _words_in(name)
    return words - _PLAIN == {"dev"} or not words.isdisjoint(
        (SPLITS["test"] | SPLITS["val"]) & _SPLIT_WORDS
    )


def notes_on_splits(folders: Iterable[str]) -> list[str]:
    """Return a line on the folders named almost like a published split, if there are any."""
    paths = {
        "/".join(path.split("/")[: at + 1]) for path in folders for at in range(path.count("/") + 1)
    }
    unclear = sorted(
        path
        for path in paths
        if looks_published(path.rpartition("/")[2]) and not _split_at(path.split("/"))
    )
    if not unclear:
        return []
    more = f" and {len(unclear) - 5:,} more" if len(unclear) > 5 else ""
    return [
        f"not taken for a published split: {', '.join(unclear[:5])}{more}; if it is one, name the "
        "folder test or val, or give its rules `set`"
    ]


def strictest(*splits: str) -> str:
    """Return the split that counts for an image with all of these: test before val before train."""
    return next((split for split in SPLITS if split in splits), "")


def class_of(inside: str, folders: Set[str]) -> tuple[int | None, str]:
    """Return a folder's label, and its path up to the part that decides; (None, "") if undecided.

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
    """Words in the name of a folder, the `labels` that they indicate (a word of two meanings:
    both), and the label for which the name stands alone (`exact`).
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
        is_spanish = "imagen" in words and not is_generator  # Spanish for image
        if self.negated or is_spanish or (on_card and "sd" in words):
            self.labels = {0, 1}


def _is_fake(names: Sequence[_Name]) -> bool:
    """Return whether one of the names indicates only fakes: `fake/human` is no folder of reals."""
    return any(name.labels == {1} for name in names)


def generator_of(decided: str, path: str, holding: Iterable[str]) -> str:
    """Return the generator of the fakes in `path`. The last part of `decided` named their class."""
    below = {inner.partition("/")[0] for inner in holding}
    outer = decided.rpartition("/")[2].lower()
    between = path[len(decided) + 1 :]
    if (
        _Name(outer, on_card=False).exact == 1
        and "." not in below
        and not any(map(model_name, between.split("/")))
        and any(map(model_name, below))
    ):
        return NAMED
    parts = path.split("/")
    names = [
        name
        for depth, part in enumerate(parts, 1)
        if (name := model_name(part)) and not _split_at(parts[:depth])
    ]
    known = [name for name in names if _FAMILIES.search(name)]
    return (known or names or [UNKNOWN])[-1]


def model_name(part: str) -> str:
    """Return the part of a folder's name that names a model, or ""."""
    if _words_in(part) <= _PLAIN | _SPLIT_WORDS:
        return ""
    words = re.split(r"(?:[^\w.]|_)+", part.lower().removesuffix(".zip").strip("_- "))
    if words[0] in ("0", "1") and words[1] in _FAKES:  # such as 1_fake
        del words[0]
    return "-".join(word for word in words if word not in _FAKES | _NEUTRAL | _SPLIT_WORDS)


def _words_in(part: str) -> set[str]:
    return set(re.split(r"[\W\d_]+", part.lower()))
