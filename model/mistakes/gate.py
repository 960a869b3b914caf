"""Compare a trained checkpoint with the detector that its training started from, on recorded
mistakes (`model/mistakes/keep.py`), and give the reason to refuse it if too many have become wrong.

Main entries, in order: `check_mistakes(gate, start_file)` raises `MistakeError` before a run if the
folder `gate.mistakes` of the recipe cannot be used. `measure_start(folder, start, file)` scores the
mistakes with the first detector before training and writes its verdicts to `file` (`START_FILE` in
the run's folder), which `read_start()` reads when a run is resumed.
`against_start(folder, start, detector)` scores them with the trained detector and returns a
`Regression` per mistake. `refusal(gate, rows)` returns the reason for a refusal as a list of at
most one sentence; `newly_wrong()` returns the hashes of the images concerned, and `lines_of()`
lines for the log. `NO_COPY` and `NOT_ASKED` are reasons why a mistake has no outcome. The folder of
the mistakes is not changed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from console import counted
from model.mistakes.keep import MistakeError, Verdict, read_mistakes, verdict_from
from model.mistakes.regressions import Regression, counts_of, measure_again
from model.recipe import Gate
from storage import text_fault, write_text

if TYPE_CHECKING:
    from model.inference.run import Loaded

START_FILE = "baseline_mistakes.json"

NO_COPY = "no copy of its image is in the folder; keep it again with --keep-image"
NOT_ASKED = "kept, or its image, after the run began: the start gave no verdict"

MOST_HASHES = 10
"""Hashes that a refusal names; `meta.json` has all."""


def check_mistakes(gate: Gate, start_file: Path | None = None) -> None:
    """Refuse a gate that cannot be asked, before a run begins; with `start_file` the run is
    resumed, and its start was measured.

    Raises:
        MistakeError: no folder, no entry, a damaged one, no image to measure, or no verdict of the
            start.
    """
    folder = Path(gate.mistakes)
    if not folder.is_dir():
        raise MistakeError(
            f"gate.mistakes: {folder} is no folder; name the one that `python -m model mistakes "
            "add` writes"
        )
    mistakes = read_mistakes(folder)
    copies = (mistake.image_path(folder) for mistake in mistakes)
    if not any(path and path.is_file() for path in copies):
        raise MistakeError(
            f"gate.mistakes: of {counted(len(mistakes), 'mistake')} in {folder} none has a copy of "
            "its image, and without one nothing is measured; keep them with --keep-image"
        )
    if start_file:
        read_start(start_file)


def measure_start(folder: Path, start: "Loaded", file: Path) -> dict[str, Verdict]:
    """The verdict of the start of each mistake whose image is kept, by its hash; they are written
    to `file` as well.
    """
    rows = measure_again(folder, read_mistakes(folder), start)
    verdicts = {row.mistake.sha256: row.after for row in rows if row.after}
    saved = {sha256: asdict(verdict) for sha256, verdict in verdicts.items()}
    write_text(file, json.dumps(saved, indent=1) + "\n")
    return verdicts


def read_start(file: Path) -> dict[str, Verdict]:
    """What `measure_start` wrote.

    Raises:
        MistakeError: it is not there, or damaged.
    """
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        return {sha256: verdict_from(entry) for sha256, entry in saved.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fault = text_fault(error) if isinstance(error, ValueError) else repr(error)[:200]
        raise MistakeError(
            f"{file} does not say what the start of the run made of the kept mistakes ({fault}); "
            "take it from a copy, or use --run NAME for a new run"
        ) from error


def against_start(
    folder: Path, start: Mapping[str, Verdict], detector: "Loaded"
) -> list[Regression]:
    """Measure the mistakes in `folder`, each against the verdict of the start. One that the start
    was not asked about is not measurable; so is one without an image.
    """
    mistakes = [
        replace(mistake, verdicts=(start.get(mistake.sha256, mistake.verdicts[-1]),))
        for mistake in read_mistakes(folder)
    ]
    rows = measure_again(folder, mistakes, detector, lacking=NO_COPY)
    return [
        row
        if row.after is None or row.mistake.sha256 in start
        else replace(row, outcome="not measurable", after=None, reason=NOT_ASKED)
        for row in rows
    ]


def newly_wrong(rows: Sequence[Regression]) -> list[str]:
    """The hashes of the mistakes that the start had right and the checkpoint has wrong."""
    return [row.mistake.sha256 for row in rows if row.outcome == "newly wrong"]


def refusal(gate: Gate, rows: Sequence[Regression]) -> list[str]:
    """Why the gate refuses, one sentence at most; empty if it lets the checkpoint pass."""
    hashes = newly_wrong(rows)
    if len(hashes) <= gate.max_newly_wrong:
        return []
    named = ", ".join(sha256[:12] for sha256 in hashes[:MOST_HASHES])
    more = f" and {len(hashes) - MOST_HASHES:,} more" if len(hashes) > MOST_HASHES else ""
    return [
        f"of the kept mistakes in {gate.mistakes} the start had {len(hashes):,} right that are "
        f"wrong now, more than gate.max_newly_wrong {gate.max_newly_wrong}: {named}{more}"
    ]


def lines_of(gate: Gate, rows: Sequence[Regression]) -> Iterator[str]:
    """How many mistakes have which outcome, and why some could not be measured."""
    counts = ", ".join(f"{count:,} {name}" for name, count in counts_of(rows).items() if count)
    yield f"{counted(len(rows), 'kept mistake')} in {gate.mistakes}, the start before: {counts}"
    reasons = [row.reason for row in rows if row.reason]
    for reason in dict.fromkeys(reasons):
        yield f"not measurable, {reasons.count(reason):,}: {reason}"
