"""Choose images of a shard set (packed images) so that real and fake ones agree on metadata
(format, size, ...).

A detector can then be measured without shortcuts (`docs/audit.md`). Main entry:
`match_classes(shards, seed=0)`.

- `shards`: a `ShardSet`, such as `open_shards([folder])` of `sharding/format.py` returns.
- `seed`: an integer, the seed of random choices (only by keyword).

It returns a `Match`:

- `rows`: the chosen row numbers (int64 array), as many real as fake ones.
- `per_class`: the number of chosen images of each class.
- `before`, `after`: how well metadata alone tell the classes apart, over all images and over the
  chosen ones. Each is an `AurocEstimate` (`auroc`, and its 95 % interval from `low` to `high`).
- `rounds`: how many rounds of matching were needed.

Matching goes on, for at least one round, until the AUROC is at most `MATCHED` or its interval
includes 0.5. `MatchError` (a `ValueError`) is raised if too few images can be matched or the
classes still differ after the last round, another `ValueError` without scikit-learn.

`sample_list(chosen)` takes a dict from the name of a set to the pair (its `ShardSet`, its `rows`)
and returns a CSV text for `evaluate.py --subset`, with the columns `set` and `key`.
`commands(chosen, file)` takes the same dict and the `Path` of this file, and returns the commands
that score it, one for each folder that the sets are in.

`as_json(match)` returns the entry for `report.json`:

- for a `Match`, a dict of its figures.
- for a text that says why there is no `Match`, {"error": this text}.
- for None, None.
"""

import csv
import io
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from installed import command
from sharding.audit.audit import MIN_GROUPS, AurocEstimate, count_groups, cross_fit, estimate
from sharding.audit.libraries import one_thread
from sharding.audit.metadata import FEATURES, Metadata, assign_folds, metadata_of
from sharding.format import ShardSet

MATCHED = 0.55
"""Matching ends when the AUROC of metadata is at most this, or its interval includes 0.5."""

_STRATA = (0, 7, 8)  # columns that must be equal: format, chroma, EXIF
_ROUNDS = 8


class MatchError(ValueError):
    """A set whose classes cannot be matched on metadata; the message says what to do."""


@dataclass(frozen=True, eq=False)
class Match:
    """Rows of the set in which the classes agree on metadata, the number of images per class, and
    the AUROC of metadata before and after matching.
    """

    rows: np.ndarray
    per_class: int
    before: AurocEstimate
    after: AurocEstimate
    rounds: int


@one_thread()
def match_classes(shards: ShardSet, *, seed: int = 0) -> Match:
    """Choose as many real as fake images that agree on metadata.

    Images are matched within a source (sources with one class only are pooled) and with equal
    format, chroma and EXIF. They are binned by the cross-validated log-odds of fake, the propensity
    score of Rosenbaum and Rubin (1983), in bins 0.2 standard deviations wide (Austin 2011). Each
    bin keeps as many images of each class as the smaller class has.

    A classifier fitted on the remaining images finds the remaining differences, and the next round
    matches on its scores. Bins are within folds: each held-out fold is balanced, so matching does
    not push the last AUROC below 0.5.

    Raises:
        MatchError: too few images can be matched, or the classes still differ after all rounds.
    """
    where = shards.describe()
    metadata = metadata_of(shards)
    folds = assign_folds(metadata, seed)
    rng = np.random.default_rng(seed)
    everything = [column for columns in FEATURES.values() for column in columns]
    before: AurocEstimate | None = None
    rows = np.arange(len(metadata))
    strata = np.column_stack([_home(metadata), metadata.values[:, _STRATA], folds])
    for round_index in range(_ROUNDS + 1):
        left = metadata.take(rows)
        counts = count_groups(left.labels, left.groups)
        if min(counts) < MIN_GROUPS:
            if not round_index and min(counts):  # a small set: count its possible matches
                kept = left.take(_balanced(strata, left.labels, rng))
                counts = count_groups(kept.labels, kept.groups)
            raise MatchError(
                f"{where}: only {counts[0]:,} real and {counts[1]:,} fake images (counted in "
                f"groups) can be matched on metadata, {MIN_GROUPS} of each are needed; add sources "
                "whose real and fake images have the same formats and sizes, or re-encode both "
                "classes in the same way before packing"
            )
        scores = cross_fit(left, folds[rows], everything, seed)[1]
        now = estimate(left.labels, scores, left.groups)
        assert now is not None  # both classes have at least MIN_GROUPS groups
        before = before or now
        if round_index and (now.auroc <= MATCHED or now.low <= 0.5):
            return Match(rows, int(left.labels.sum()), before, now, round_index)
        width = max(0.2 * scores.std(), 1e-9)
        cells = np.column_stack([strata[rows], np.floor(scores / width)])
        rows = rows[_balanced(cells, left.labels, rng)]
    raise MatchError(
        f"{where}: after {_ROUNDS} rounds of matching, the AUROC of metadata is still {now}, "
        f"expected {MATCHED} at most; the classes differ too much to be matched"
    )


def _home(metadata: Metadata) -> np.ndarray:
    """Return the source code of each sample, or -1 if its source has one class only."""
    images = np.bincount(metadata.sources)
    fakes = np.bincount(metadata.sources, weights=metadata.labels)
    both = (fakes > 0) & (fakes < images)
    return np.where(both[metadata.sources], metadata.sources, -1)


def _balanced(cells: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Choose samples, in order, so that each cell (equal rows of `cells`) has as many real as fake
    ones.
    """
    cell = np.unique(cells, axis=0, return_inverse=True)[1].ravel()
    kept = np.minimum(np.bincount(cell, weights=labels), np.bincount(cell, weights=1 - labels))
    kind = cell * 2 + labels
    order = np.lexsort((rng.random(len(cell)), kind))
    starts = np.cumsum(np.bincount(kind)) - np.bincount(kind)
    rank = np.arange(len(cell)) - starts[kind[order]]
    return np.sort(order[rank < kept[cell[order]]])


def sample_list(chosen: dict[str, tuple[ShardSet, np.ndarray]]) -> str:
    """Format a CSV with the columns `set` and `key` for `evaluate.py --subset`. `chosen` maps the
    name of a set to (shards, rows).
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["set", "key"])
    for name, (shards, rows) in chosen.items():
        keys = shards.table.column("key").take(rows).to_pylist()
        writer.writerows((name, key) for key in keys)
    return stream.getvalue()


def commands(chosen: Mapping[str, tuple[ShardSet, np.ndarray]], file: Path) -> list[str]:
    """Return the commands that score the sample list `file`. A list names sets only by the last
    part of their names, so each folder of sets needs a command of its own.
    """
    names: dict[str, list[str]] = {}
    for name, (shards, _rows) in chosen.items():
        names.setdefault(str(shards.folders[0].parent), []).append(name)
    return [
        shlex.join([
            *command("evaluate").split(), "--data", parent,
            *(f"--shards={name}" for name in own if len(names) > 1), "--subset", str(file),
        ])
        for parent, own in names.items()
    ]  # fmt: skip


def as_json(match: Match | str | None) -> dict[str, Any] | None:
    """Convert the match of one set to its entry in `report.json`. `match` may be the reason why
    there is none.
    """
    if isinstance(match, str):
        return {"error": match}
    if match is None:
        return None
    return {
        "per_class": match.per_class,
        "rounds": match.rounds,
        "auroc_before": asdict(match.before),
        "auroc_after": asdict(match.after),
    }
