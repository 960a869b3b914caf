"""Record wrong verdicts in a local folder, one JSON file per image, and read them; nothing is sent
anywhere.

Main entry: `keep_mistake(folder, data, label, given, *, copy_named, room)` adds one verdict.

- `folder`: a `Path`, the folder of the records (made if missing).
- `data`: the bytes of the image file.
- `label`: the true label, "real" or "fake".
- `given`: a `Verdict`. `verdict_of(detector, score)` makes it from a loaded detector and its
  probability of fake.
- `copy_named`: the image's file name, to keep a copy of the image with its suffix. None (the
  default) makes no copy.
- `room`: how many more entries `folder` may get, from `room_in(folder)`, for a caller that adds
  many: it saves counting them each time. None (the default): they are counted.

A wrong verdict makes an entry: the JSON file of this image. Every later verdict on this image is
added to it, also a right or uncertain one, and replaces the earlier one of the same detector. The
new `label` replaces that of the entry. When no verdict in the entry is wrong by this label, the
entry and its copy are deleted. For an image without an entry, a right or uncertain verdict does
nothing.

It returns a `Kept`: `kept` (whether there is an entry now), `added` (whether this call made it),
`label_was` (the former label if it has changed, else None) and `text` (one line).
`add_verdict(folder, sha256, given)` adds a verdict to the entry of this hash, if there still is
one; its label stays. Both lock `folder`, so that threads and processes may use them at once.
`read_mistakes(folder)` returns all entries as a list of `Mistake`; it and `Verdict` have the fields
of the JSON below.

The functions raise `OSError` if the folder cannot be read or written, and `MistakeError` (a
`ValueError`) if an entry is larger than `MAX_ENTRY_BYTES` or does not have the form below, or if
there are more than `MAX_MISTAKES` entries. `keep_mistake()` also raises `MistakeError` if the entry
would be larger, or the copy larger than `MAX_IMAGE_BYTES`; `read_mistakes()` if there is no entry.

`FOLDER/<SHA-256 of the image's bytes>.json` is

    {"sha256": hash, "label": "real" or "fake",      # the label that a person gave
     "image": ".jpg",                                # suffix of the copy of the image, or null
     "verdicts": [{"detector": identity, "score": p, "verdict": one of VERDICTS,
                   "band": [low, high], "date": "2026-01-31T12:00:00+00:00"}, ...]}

with the last verdict of each detector, the newest at the end. If there are more than
`MAX_VERDICTS`, the first one and the newest ones are kept. `VERDICTS` are "no sign of AI",
"uncertain" and "likely AI". The name of the image is not recorded. `standing_of(label, verdict)`
returns "right", "uncertain" or "wrong" (a `Standing`). `UNNAMED` is the suffix of a copy if the
image's name has no image suffix.
"""

import contextlib
import hashlib
import json
import re
import shlex
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import Field

from checked import checked, one_of
from escape import text_fault
from imaging.decode import IMAGE_SUFFIXES
from installed import command
from locks import locked
from model.inference.prediction import DecisionRule
from model.shipped.calibration import Band, Share
from model.verdict import VERDICTS
from storage import RefusedFileError, parse_json, read_text, write_bytes, write_text

Label: TypeAlias = Literal["real", "fake"]
LABELS: tuple[Label, ...] = get_args(Label)

Standing: TypeAlias = Literal["right", "uncertain", "wrong"]

MAX_MISTAKES = 10_000
"""Largest number of entries in one folder."""

MAX_VERDICTS = 200
"""Largest number of verdicts in one entry: the first one, and the newest ones."""

MAX_ENTRY_BYTES = 2**20
MAX_IMAGE_BYTES = 64 * 2**20
"""Largest size of an entry, and of a copied image, in bytes."""

UNNAMED = ".img"
"""Suffix of a copy if the image's name has no image suffix."""

_SUFFIXES = {*IMAGE_SUFFIXES, UNNAMED}

_ENTRY = re.compile(r"[0-9a-f]{64}\.json")


class MistakeError(ValueError):
    """Error of an entry that cannot be kept or read; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Verdict of one detector on an image.

    `detector` is its identity (checkpoint and band), `score` the probability of fake, `band` the
    thresholds of the verdict, and `date` is in UTC (ISO 8601).
    """

    detector: str
    score: Share
    verdict: Annotated[str, one_of(VERDICTS)]
    band: Band
    date: str


def entry_path(folder: Path, sha256: str) -> Path:
    """Return the file of the entry of an image with this SHA-256 (hexadecimal)."""
    return folder / f"{sha256}.json"


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One entry; see the module. `image` is the suffix of the image's copy, or None."""

    sha256: str
    label: Label
    verdicts: Annotated[tuple[Verdict, ...], Field(min_length=1, max_length=MAX_VERDICTS)]
    image: Annotated[str, one_of(_SUFFIXES, "the suffix of an image")] | None = None

    def entry_path(self, folder: Path) -> Path:
        """Return the file of the entry."""
        return entry_path(folder, self.sha256)

    def image_path(self, folder: Path) -> Path | None:
        """Return the file of the image's copy, or None if there is no copy."""
        return folder / f"{self.sha256}{self.image}" if self.image else None


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Result of `keep_mistake`.

    `kept` is whether the image has an entry now, and `added` whether it is a new one. `label_was`
    is its former label if the label has changed, else None. `text` is one line for the user.
    """

    kept: bool
    label_was: Label | None
    text: str
    added: bool = False


def standing_of(label: Label, verdict: str) -> Standing:
    """Compare a verdict with a label: right, wrong or uncertain."""
    if verdict == VERDICTS[1]:
        return "uncertain"
    return "right" if (verdict == VERDICTS[2]) == (label == "fake") else "wrong"


def verdict_of(detector: DecisionRule, score: float) -> Verdict:
    """Return a detector's verdict at this probability of fake, with the current time.

    Raises:
        ValueError: the probability is not finite.
    """
    return Verdict(
        detector=detector.identity,
        score=score,
        verdict=detector.verdict(score),
        band=detector.band,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def keep_mistake(
    folder: Path,
    data: bytes,
    label: Label,
    given: Verdict,
    *,
    copy_named: str | None = None,
    room: int | None = None,
) -> Kept:
    """Keep a verdict in `folder` if it is wrong about the image with these bytes.

    If the image has an entry, the verdict is added to it, and the new label replaces the old one.
    An entry without a wrong verdict under its new label is removed, with its copy. With
    `copy_named`, the name of the image, a copy of `data` is kept as well, with the suffix of this
    name. `room` is the number of entries that may still be added; None: they are counted.

    Raises:
        MistakeError: the folder is full, the copy is too large, or the existing entry is damaged.
        OSError: the folder cannot be written.
    """
    if standing_of(label, given.verdict) == "wrong":
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, is_folder=True) if folder.is_dir() else contextlib.nullcontext():
        return _keep(folder, data, label, given, copy_named, room)


def _keep(
    folder: Path,
    data: bytes,
    label: Label,
    given: Verdict,
    copy_named: str | None,
    room: int | None,
) -> Kept:
    """Read, change and write the entry of an image; the caller holds the lock of `folder`."""
    sha256 = hashlib.sha256(data).hexdigest()
    path = entry_path(folder, sha256)
    stands = standing_of(label, given.verdict)
    known = read_mistake(path) if path.exists() else None
    added = known is None
    if known is None:
        if stands != "wrong":
            why = "agrees" if stands == "right" else "is uncertain, which is not wrong"
            return Kept(kept=False, label_was=None, text=f"the verdict {why}; nothing kept")
        if (room_in(folder) if room is None else room) < 1:
            raise MistakeError(
                f"{folder} has {MAX_MISTAKES:,} mistakes, which is the limit; name another folder"
            )
        known = Mistake(sha256=sha256, label=label, verdicts=())
        said = "kept"
    else:
        said = "kept already" if stands == "wrong" else f"kept; this verdict is {stands}"
    label_was = known.label if known.label != label else None
    mistake = with_verdict(replace(known, label=label), given)
    changed = f"the label was {label_was} and is {label} now: " if label_was else ""
    if all(standing_of(label, each.verdict) != "wrong" for each in mistake.verdicts):
        remove_mistake(folder, mistake)
        text = f"{changed}no verdict was wrong; the entry is removed"
        return Kept(kept=False, label_was=label_was, text=text)
    if copy_named is not None:
        mistake = _with_copy(folder, mistake, data, copy_named)
    _write(folder, mistake)
    beside = "with its image" if mistake.image else "without its image"
    return Kept(kept=True, label_was=label_was, text=f"{changed}{said}, {beside}", added=added)


def _with_copy(folder: Path, mistake: Mistake, data: bytes, name: str) -> Mistake:
    """Write a copy of the image, and return the entry with its suffix.

    An existing copy is overwritten, so that there is only one.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise MistakeError(
            f"{len(data):,} bytes are too many for a copy ({MAX_IMAGE_BYTES:,} at most); keep the "
            "entry without a copy"
        )
    suffix = PurePath(name).suffix.lower()
    with_image = replace(mistake, image=suffix if suffix in IMAGE_SUFFIXES else UNNAMED)
    if mistake.image:
        with_image = mistake
    path = with_image.image_path(folder)
    assert path is not None
    write_bytes(path, data)
    return with_image


def with_verdict(mistake: Mistake, given: Verdict) -> Mistake:
    """Return the entry with a verdict added. It replaces an older one of the same detector."""
    others = [each for each in mistake.verdicts if each.detector != given.detector]
    verdicts = (*others, given)
    if len(verdicts) > MAX_VERDICTS:
        verdicts = (verdicts[0], *verdicts[1 - MAX_VERDICTS :])
    return replace(mistake, verdicts=verdicts)


def add_verdict(folder: Path, sha256: str, given: Verdict) -> None:
    """Add a verdict to an entry as it is now. Do nothing if the entry has been removed."""
    if not folder.is_dir():
        return
    with locked(folder, is_folder=True):
        if (path := entry_path(folder, sha256)).exists():
            _write(folder, with_verdict(read_mistake(path), given))


def _write(folder: Path, mistake: Mistake) -> None:
    """Write an entry atomically."""
    text = json.dumps(asdict(mistake), indent=1) + "\n"
    if len(text) > MAX_ENTRY_BYTES:
        raise MistakeError(f"an entry of {len(text):,} bytes; the limit is {MAX_ENTRY_BYTES:,}")
    write_text(mistake.entry_path(folder), text)


def remove_mistake(folder: Path, mistake: Mistake) -> None:
    """Remove an entry, then the copy of its image."""
    mistake.entry_path(folder).unlink(missing_ok=True)
    if path := mistake.image_path(folder):
        path.unlink(missing_ok=True)


def entries_of(folder: Path) -> list[Path]:
    """Return the files of all entries in the order of their names; other files are ignored."""
    return sorted(path for path in folder.iterdir() if _ENTRY.fullmatch(path.name))


def room_in(folder: Path) -> int:
    """Return how many entries a folder may still get; counts its entries."""
    return MAX_MISTAKES - (len(entries_of(folder)) if folder.is_dir() else 0)


def read_mistakes(folder: Path) -> list[Mistake]:
    """Read all entries of a folder.

    Raises:
        MistakeError: there are no entries or too many, or one is damaged.
        OSError: the folder cannot be read.
    """
    paths = entries_of(folder)
    if not paths:
        raise MistakeError(
            f"{folder} has no mistakes; add one with `{command('predict')} PATH --report-mistake "
            f"real --mistakes {shlex.quote(str(folder))}`"
        )
    if len(paths) > MAX_MISTAKES:
        raise MistakeError(
            f"{folder} has {len(paths):,} mistakes, at most {MAX_MISTAKES:,} are read; remove some"
        )
    return [read_mistake(path) for path in paths]


def read_mistake(path: Path) -> Mistake:
    """Read the entry in a file.

    Raises:
        MistakeError: the file is damaged; the message says where.
    """
    try:
        entry = parse_json(read_text(path, MAX_ENTRY_BYTES))
        mistake = checked(Mistake, entry, ignore_unknown=True)
        if mistake.sha256 != path.stem:
            raise ValueError("its hash is not that of its file name")
        return mistake
    except (RefusedFileError, ValueError) as error:
        fault = getattr(error, "strerror", None) or text_fault(error)
        raise MistakeError(f"{path} is no entry of a mistake ({fault}); remove it") from error
