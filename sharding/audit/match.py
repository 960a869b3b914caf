"""A sample in which real and fake agree on metadata, for measuring a detector without the shortcut.

`docs/audit.md` says how to use it.
"""

import csv
import io
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sharding.audit.audit import MIN_GROUPS, Estimate, cross_fit, estimate
from sharding.audit.metadata import FEATURES, Metadata, assign_folds, metadata_of
from sharding.format import ShardSet

MATCHED = 0.55
"""A match goes on until metadata alone reaches no more than this AUROC, or what chance explains."""

_STRATA = (0, 7, 8)  # what a match must agree on exactly: format, chroma, EXIF
_ROUNDS = 8


class MatchError(ValueError):
    """A set whose classes cannot be matched on metadata; the message says what to do."""


@dataclass(frozen=True, eq=False)
class Match:
    """Rows of the set in which the classes agree on metadata, and the AUROC before and after."""

    rows: np.ndarray
    per_class: int
    before: Estimate
    after: Estimate
    rounds: int


def match_classes(shards: ShardSet, *, seed: int = 0) -> Match:
    """A sample in which real and fake agree on metadata, as many of each.

    Inside a source (sources of one class are taken together) and of equal format, chroma and EXIF,
    images are put in bins of the cross-validated log-odds of fake, the propensity score of
    Rosenbaum and Rubin (1983), 0.2 standard deviations wide (Austin 2011), and as many of each
    class are taken from a bin as the smaller has. A classifier fitted anew on what is left shows
    what still differs, and the next round matches on that. Bins lie inside the folds: what is held
    out together is balanced, so the last figure is not below 0.5 for having been matched.

    Raises:
        MatchError: too few images can be matched, or they still differ after all rounds.
    """
    where = shards.describe()
    metadata = metadata_of(shards)
    folds = assign_folds(metadata, seed)
    rng = np.random.default_rng(seed)
    everything = [column for columns in FEATURES.values() for column in columns]
    before: Estimate | None = None
    rows = np.arange(len(metadata))
    strata = np.column_stack([_home(metadata), metadata.values[:, _STRATA], folds])
    for round_index in range(_ROUNDS + 1):
        left = metadata.take(rows)
        counts = _count_groups(left)
        if min(counts) < MIN_GROUPS:
            if not round_index and min(counts):  # few from the start: how many have a counterpart
                counts = _count_groups(left.take(_balanced(strata, left.labels, rng)))
            raise MatchError(
                f"{where}: only {counts[0]:,} real and {counts[1]:,} fake images (groups of them) "
                f"can be matched on metadata, {MIN_GROUPS} of each are needed; add sources whose "
                "real and fake images have the same formats and sizes, or re-encode both classes "
                "alike before packing"
            )
        scores = cross_fit(left, folds[rows], everything, seed)[1]
        now = estimate(left.labels, scores, left.groups)
        assert now is not None  # both classes have the groups that it asks for
        before = before or now
        if round_index and (now.auroc <= MATCHED or now.low <= 0.5):
            return Match(rows, int(left.labels.sum()), before, now, round_index)
        width = max(0.2 * scores.std(), 1e-9)
        cells = np.column_stack([strata[rows], np.floor(scores / width)])
        rows = rows[_balanced(cells, left.labels, rng)]
    raise MatchError(
        f"{where}: after {_ROUNDS} rounds of matching metadata still reaches an AUROC of {now}, "
        f"expected {MATCHED} at most; the classes differ too much to be matched"
    )


def _count_groups(metadata: Metadata) -> list[int]:
    """The groups of real and of fake images."""
    return [len(np.unique(metadata.groups[metadata.labels == label])) for label in (0, 1)]


def _home(metadata: Metadata) -> np.ndarray:
    """The source of each sample, or -1 where its source has one class only."""
    images = np.bincount(metadata.sources)
    fakes = np.bincount(metadata.sources, weights=metadata.labels)
    both = (fakes > 0) & (fakes < images)
    return np.where(both[metadata.sources], metadata.sources, -1)


def _balanced(cells: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which samples to keep, in order, so that each cell (equal rows) has as many of each class."""
    cell = np.unique(cells, axis=0, return_inverse=True)[1].ravel()
    kept = np.minimum(np.bincount(cell, weights=labels), np.bincount(cell, weights=1 - labels))
    kind = cell * 2 + labels
    order = np.lexsort((rng.random(len(cell)), kind))
    starts = np.cumsum(np.bincount(kind)) - np.bincount(kind)
    rank = np.arange(len(cell)) - starts[kind[order]]
    return np.sort(order[rank < kept[cell[order]]])


def sample_list(chosen: dict[str, tuple[ShardSet, np.ndarray]]) -> str:
    """CSV with the columns `set` and `key`, for `evaluate.py --subset`: set -> (shards, rows)."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["set", "key"])
    for name, (shards, rows) in chosen.items():
        keys = shards.table.column("key").take(rows).to_pylist()
        writer.writerows((name, key) for key in keys)
    return stream.getvalue()


def as_json(match: Match | str | None) -> dict[str, Any] | None:
    """The match of one set in `report.json`; it may be the reason why there is none."""
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
