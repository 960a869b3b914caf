"""Compare a trained checkpoint with the detector that its training started from, on recorded
mistakes (`model/mistakes/keep.py`), and give the reason to refuse it if too many have become wrong.

Main entries, in the order of use. Their arguments:

- `gate`: the `Gate` of a recipe, `recipes.load(Recipe, path).gate`. Its `mistakes` is the folder of
  the records, a text; if it is empty, do not call these functions. `max_newly_wrong` is the limit.
- `folder`: this folder as a `Path`. No function changes it.
- A detector is what `load_detector()` in `model/inference/detector.py` returns.

The functions:

- `check_mistakes(gate, start_file)`, before a run, returns nothing. It raises `MistakeError` if the
  folder is missing or empty, if a record is damaged, or if no record has a copy of its image. One
  copy is enough. `start_file` is None (default) for a new run. For a resumed run, it is the `Path`
  of the file that `measure_start()` wrote; if it is missing, cannot be read or is no JSON of
  verdicts, `MistakeError` is raised.
- `measure_start(folder, start, file)` scores the mistakes with the detector `start`, from which the
  training starts. It writes the verdicts to the `Path` `file` (`START_FILE` in the run's folder) as
  JSON and returns them, a dict from image hash to `Verdict` (of keep.py). Mistakes without a
  readable copy of the image are not in it. A resumed run reads the same dict with
  `read_start(file)`.
- `against_start(folder, start, detector)`, after training, scores the mistakes again with the
  trained detector. Here `start` is no detector, but the dict that `measure_start()` returned. It
  returns a list with a `Regression` per mistake: `mistake`, both verdicts (`before`, and `after` or
  None), `outcome` ("newly wrong", "still wrong", "uncertain", "fixed" or "not measurable") and
  `reason` (why it is not measurable, else "").
- `refusal(gate, rows)` takes this list of `Regression`s. It returns a list with one sentence if
  more images are newly wrong than `gate.max_newly_wrong`, else an empty list. `newly_wrong(rows)`
  returns the hashes of all newly wrong images; `lines_of(gate, rows)` yields lines of text for the
  log: how many mistakes have each outcome.

The functions that read the folder raise `MistakeError` (a `ValueError`) for a damaged record or an
empty folder, and `OSError` if it cannot be read. `NO_COPY` and `NO_VERDICT` are reasons why a
mistake cannot be measured. `MOST_HASHES` limits the hashes in a refusal.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from checked import checked
from console import counted
from escape import text_fault
from installed import command
from model.mistakes.keep import MistakeError, Verdict, read_mistakes
from model.mistakes.regressions import Regression, counts_of, measure_again
from model.recipe import Gate
from storage import parse_json, read_text, write_text

if TYPE_CHECKING:
    from model.inference.prediction import AnyDetector

START_FILE = "baseline_mistakes.json"

NO_COPY = "the folder has no copy of the image; report the image again with --keep-image"
NO_VERDICT = "added after the run began, so the initial detector gave no verdict"

MOST_HASHES = 10
"""Largest number of hashes in a refusal. `meta.json` lists all."""


def check_mistakes(gate: Gate, start_file: Path | None = None) -> None:
    """Check before a run that the mistakes can be measured. If the run is resumed, `start_file`
    must contain the verdicts of its initial detector.

    Raises:
        MistakeError: the folder is missing or has no entry, an entry or `start_file` is damaged, or
            no entry has a copy of its image.
    """
    folder = Path(gate.mistakes)
    if not folder.is_dir():
        raise MistakeError(
            f"gate.mistakes: {folder} is no folder; give the folder that "
            f"`{command('predict')} --report-mistake` writes"
        )
    mistakes = read_mistakes(folder)
    copies = (mistake.image_path(folder) for mistake in mistakes)
    if not any(path and path.is_file() for path in copies):
        raise MistakeError(
            f"gate.mistakes: {folder} has {counted(len(mistakes), 'mistake')} but no copy of an "
            "image, so nothing can be measured; report the images again with --keep-image"
        )
    if start_file:
        read_start(start_file)


def measure_start(folder: Path, start: "AnyDetector", file: Path) -> dict[str, Verdict]:
    """Score the mistakes that have a copy of their image with the initial detector `start`. Write
    its verdicts to `file` and return them by hash.
    """
    rows = measure_again(folder, read_mistakes(folder), start)
    verdicts = {row.mistake.sha256: row.after for row in rows if row.after}
    saved = {sha256: asdict(verdict) for sha256, verdict in verdicts.items()}
    write_text(file, json.dumps(saved, indent=1) + "\n")
    return verdicts


def read_start(file: Path) -> dict[str, Verdict]:
    """Read the verdicts that `measure_start` wrote, by hash.

    Raises:
        MistakeError: the file is missing or damaged.
    """
    try:
        kept = parse_json(read_text(file))
        return checked(dict[str, Verdict], kept, ignore_unknown=True)
    except (OSError, ValueError) as error:
        raise MistakeError(
            f"{file} has no readable verdicts of the initial detector on the mistakes "
            f"({text_fault(error)}); restore the file from a copy, or use --run NAME for a new run"
        ) from error


def against_start(
    folder: Path, start: Mapping[str, Verdict], detector: "AnyDetector"
) -> list[Regression]:
    """Score the mistakes in `folder`, and compare each with the verdict of the initial detector in
    `start` (by hash). A mistake without such a verdict, or without a copy of its image, has the
    outcome "not measurable".
    """
    mistakes = [
        replace(mistake, verdicts=(start.get(mistake.sha256, mistake.verdicts[-1]),))
        for mistake in read_mistakes(folder)
    ]
    rows = measure_again(folder, mistakes, detector, lacking=NO_COPY)
    return [
        row
        if row.after is None or row.mistake.sha256 in start
        else replace(row, outcome="not measurable", after=None, reason=NO_VERDICT)
        for row in rows
    ]


def newly_wrong(rows: Sequence[Regression]) -> list[str]:
    """Return the hashes of the newly wrong mistakes, which the initial detector had right."""
    return [row.mistake.sha256 for row in rows if row.outcome == "newly wrong"]


def refusal(gate: Gate, rows: Sequence[Regression]) -> list[str]:
    """Return the reason to refuse the checkpoint, as a list of at most one sentence."""
    hashes = newly_wrong(rows)
    if len(hashes) <= gate.max_newly_wrong:
        return []
    named = ", ".join(sha256[:12] for sha256 in hashes[:MOST_HASHES])
    more = f" and {len(hashes) - MOST_HASHES:,} more" if len(hashes) > MOST_HASHES else ""
    return [
        f"{len(hashes):,} of the kept mistakes in {gate.mistakes} became wrong in training, more "
        f"than gate.max_newly_wrong {gate.max_newly_wrong}: {named}{more}"
    ]


def lines_of(gate: Gate, rows: Sequence[Regression]) -> Iterator[str]:
    """Yield one line with the number of each outcome, and one per reason for "not measurable"."""
    counts = ", ".join(f"{count:,} {name}" for name, count in counts_of(rows).items() if count)
    yield f"{counted(len(rows), 'kept mistake')} in {gate.mistakes}, before and after: {counts}"
    reasons = [row.reason for row in rows if row.reason]
    for reason in dict.fromkeys(reasons):
        yield f"not measurable, {reasons.count(reason):,}: {reason}"
