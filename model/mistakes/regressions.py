"""Score recorded mistakes again with a detector, and find out which are fixed, still wrong or newly
wrong.

Main entry: `measure_again(folder, mistakes, detector, images, advance, lacking)`. Nothing is
written.

- `folder`: a `Path`, the folder of the records (`model/mistakes/keep.py`).
- `mistakes`: a list of `Mistake`, as `read_mistakes(folder)` returns.
- `detector`: a loaded detector, as `load_detector()` in `model/inference/detector.py` returns.
- `images`: a `Path` or None (the default). Images without a copy in the records, or with a copy
  that has changed, are looked for below this folder, by their bytes. Nothing is found in a folder
  that is missing.
- `advance`: a function without arguments that is called after each image that is there (default:
  nothing is done).
- `lacking`: the text for `reason` when an image has no copy and `images` is None (it has a
  default).

It returns a list with one `Regression` per mistake, sorted by outcome in the order given here.
Fields:

- `mistake`: the `Mistake`. Its fields, and those of a `Verdict`, are those of the JSON in keep.py.
- `before`: the earlier `Verdict`, the last recorded one of another detector. (The same detector
  with another band counts as another one.) If no other detector is recorded, or the image is not
  measurable, it is the last recorded verdict of any detector.
- `after`: the new `Verdict`, or None if not measurable.
- `outcome`: "newly wrong" (the new verdict is wrong, and a recorded one of another detector was
  right), "still wrong" (the new verdict is wrong, and no recorded one of another detector was
  right), "uncertain" (the new verdict is "uncertain"), "fixed" (the new verdict is right) or "not
  measurable" (the image is missing or cannot be scored).
- `reason`: why it is not measurable, else "".

`record(folder, rows)` takes this list and adds the new verdicts to the records. `find_files(folder,
mistakes, images)` returns a dict, hash -> `ImageFile`, without the images that are missing.
`counts_of(rows)` returns the number of mistakes with each outcome, and `report_of(rows, detector)`
a dict for JSON: `detector` (its identity), `band`, `counts`, and `mistakes`, a list of dicts with
`sha256`, `label`, `outcome`, `before`, `after` and `reason`.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from imaging.decode import DecodeError, ImageFile, read_file
from model.inference.inputs import find_images
from model.mistakes.keep import Mistake, Verdict, add_verdict, standing_of, verdict_of

if TYPE_CHECKING:
    from model.inference.prediction import AnyDetector

Outcome: TypeAlias = Literal["newly wrong", "still wrong", "uncertain", "fixed", "not measurable"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
"""Outcomes, the worst first. `newly wrong` means that another detector was right."""


@dataclass(frozen=True, kw_only=True)
class Regression:
    """One mistake that was measured again: the earlier verdict and the new one.

    Without a new verdict, `after` is None and `reason` says why.
    """

    mistake: Mistake
    outcome: Outcome
    before: Verdict
    after: Verdict | None
    reason: str = ""


def measure_again(
    folder: Path,
    mistakes: Sequence[Mistake],
    detector: "AnyDetector",
    images: Path | None = None,
    advance: Callable[[], object] = lambda: None,
    lacking: str = "no copy of its image was kept; give the folder of the image with --images",
) -> list[Regression]:
    """Score the images of `mistakes`: the copies in `folder`, or files below `images` with the same
    bytes. `advance` is called after each image. `lacking` is the reason reported for an image
    without a copy. Nothing is written.
    """
    files = find_files(folder, mistakes, images)
    present = [mistake for mistake in mistakes if mistake.sha256 in files]
    scored = {}
    ordered = (files[mistake.sha256] for mistake in present)
    for mistake, prediction in zip(present, detector.stream(ordered), strict=True):
        scored[mistake.sha256] = prediction
        advance()
    lacking = f"no file below {images} has the bytes of its image" if images else lacking
    rows = []
    for mistake in mistakes:
        result = scored.get(mistake.sha256)
        if result is None or result.probability is None:
            reason = result.error if result else lacking
            before = mistake.verdicts[-1]
            rows.append(
                Regression(
                    mistake=mistake, outcome="not measurable", before=before, after=None,
                    reason=reason,
                )
            )  # fmt: skip
            continue
        rows.append(_compared(mistake, verdict_of(detector, result.probability)))
    return sorted(rows, key=lambda row: OUTCOMES.index(row.outcome))


def _compared(mistake: Mistake, after: Verdict) -> Regression:
    """Compare an entry with the new verdict.

    The earlier verdict is the last one of another detector, or, without another, of the same
    detector.
    """
    others = [each for each in mistake.verdicts if each.detector != after.detector]
    stands = standing_of(mistake.label, after.verdict)
    was_right = any(standing_of(mistake.label, each.verdict) == "right" for each in others)
    outcome: Outcome = "uncertain"
    if stands == "right":
        outcome = "fixed"
    elif stands == "wrong":
        outcome = "newly wrong" if was_right else "still wrong"
    before = (others or mistake.verdicts)[-1]
    return Regression(mistake=mistake, outcome=outcome, before=before, after=after)


def find_files(
    folder: Path, mistakes: Iterable[Mistake], images: Path | None
) -> dict[str, ImageFile]:
    """Return the image file of each mistake by hash: its copy, or a file below `images` if there is
    no copy or the copy has changed.

    Files below `images` are identified by their bytes. A file is read again when it is scored, and
    its hash is checked.
    """
    files, missing = {}, set()
    for mistake in mistakes:
        path = mistake.image_path(folder)
        if path and path.is_file():
            read = partial(read_file, path)
            changed = "its copy has changed since it was scored"
            files[mistake.sha256] = _checked(mistake.sha256, read, changed)
            if images and not _has_hash(files[mistake.sha256]):
                missing.add(mistake.sha256)
        else:
            missing.add(mistake.sha256)
    candidates = find_images([str(images)], Counter()) if images and missing else ()
    for file in candidates:
        try:
            sha256 = hashlib.sha256(file.read()).hexdigest()
        except (DecodeError, OSError):
            continue  # images of mistakes are readable
        if sha256 in missing:
            changed = f"its file below {images} has changed since it was found"
            files[sha256] = _checked(sha256, file.read, changed)
            missing.remove(sha256)
        if not missing:
            break
    return files


def _has_hash(file: ImageFile) -> bool:
    """Return whether a file of `_checked` can be read and has its hash."""
    try:
        file.read()
    except (DecodeError, OSError):
        return False
    return True


def _checked(sha256: str, read: Callable[[], bytes], changed: str) -> ImageFile:
    """Return an image file named by its hash. If its bytes have another hash, reading it raises
    `DecodeError` with the reason `changed`.
    """

    def read_and_check() -> bytes:
        data = read()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DecodeError(changed)
        return data

    return ImageFile(sha256, read_and_check)


def record(folder: Path, rows: Iterable[Regression]) -> None:
    """Add the new verdict to each entry, for later comparisons. Changes that other processes made
    since the entries were read are kept.
    """
    for row in rows:
        if row.after:
            add_verdict(folder, row.mistake.sha256, row.after)


def counts_of(rows: Iterable[Regression]) -> dict[Outcome, int]:
    """Return the number of mistakes with each outcome, including 0."""
    counted = Counter(row.outcome for row in rows)
    return {outcome: counted[outcome] for outcome in OUTCOMES}


def report_of(rows: Sequence[Regression], detector: "AnyDetector") -> Mapping[str, Any]:
    """Return the measurement as JSON values."""
    return {
        "detector": detector.identity,
        "band": detector.band,
        "counts": counts_of(rows),
        "mistakes": [
            {
                "sha256": row.mistake.sha256, "label": row.mistake.label, "outcome": row.outcome,
                "before": asdict(row.before), "after": asdict(row.after) if row.after else None,
                "reason": row.reason or None,
            }
            for row in rows
        ],
    }  # fmt: skip
