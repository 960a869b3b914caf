"""Measure forgetting: compare the accuracy on each image source before and after training that
started from a trained detector, and give the reasons to refuse a checkpoint that lost too much.

Main entries, pure functions, in the order of use:

- `changes(before, after, new)` takes two dicts, "set/source" -> `Metrics` (such as the `sources` of
  a `Validation`), and a set of the names (without "set/") of the sources that are new training
  data. It returns a list with a `SourceChange` for each source that is in both dicts: `name`, `old`
  (not in `new`), `images` (their number), accuracy `before` and `after`, and `lost` (before -
  after).
- `forgetting(rows)` takes this list and returns the mean loss of accuracy over the old sources, 0
  to 1; a source that gained counts as 0. Without old sources it is None: nothing was measured.
- `refusals(gate, rows, sets, threshold)` takes the recipe's `Gate` (`max_forgetting`: largest loss
  allowed on any old source; `max_fpr`: highest false-positive rate allowed on any set), this list,
  a dict, set -> `Metrics` after training, and the decision threshold of these metrics. It returns
  the reasons for refusing the checkpoint, a list of sentences; empty if it passes. The list is None
  if nothing was compared. A limit that cannot be judged is a reason, too: an unmeasured checkpoint
  has not kept it.

"Accuracy" means the balanced accuracy, or with one class the accuracy (`accuracy_of()` of
`model/metrics.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from model.metrics import Metrics, accuracy_of
from model.recipe import Gate

_ROUNDING = 1e-9
"""Tolerance: 0.9 - 0.85 is a little more than 0.05, and a loss at the limit is allowed."""


@dataclass(frozen=True, kw_only=True)
class SourceChange:
    """Balanced accuracy of one source of one validation set, before and after phase 2. With one
    class it is the accuracy.
    """

    name: str
    """`<set>/<source>`."""
    old: bool
    """Whether the source is not among the new training data of phase 2."""
    images: int
    """Images of the source."""
    before: float
    """Balanced accuracy before."""
    after: float
    """Balanced accuracy after."""

    @property
    def lost(self) -> float:
        """Loss of balanced accuracy; negative for a gain."""
        return self.before - self.after


def changes(
    before: Mapping[str, Metrics], after: Mapping[str, Metrics], new: set[str]
) -> list[SourceChange]:
    """Return one row per `set/source`. Sources in `new` are new training data; all others
    are old.
    """
    return [
        SourceChange(
            name=name,
            old=name.rpartition("/")[2] not in new,
            images=after[name].count,
            before=accuracy_of(before[name]),
            after=accuracy_of(after[name]),
        )
        for name in sorted(before.keys() & after.keys())
    ]


def forgetting(rows: list[SourceChange]) -> float | None:
    """Return the mean loss of accuracy over the old sources, counting gains as 0 (after Chaudhry et
    al., "Riemannian Walk for Incremental Learning", 2018, for one step). None: no source is old.
    """
    lost = [max(0.0, row.lost) for row in rows if row.old]
    return sum(lost) / len(lost) if lost else None


def refusals(
    gate: Gate, rows: list[SourceChange] | None, sets: Mapping[str, Metrics], threshold: float
) -> list[str]:
    """Return the gate's reasons for refusing a checkpoint, a sentence each; empty if it passes.
    `rows` is None if the run started from no trained detector: then there is nothing to forget.
    """
    old = None if rows is None else [row for row in rows if row.old]
    rates = {name: m.false_positive_rate for name, m in sets.items()}
    reasons = unjudged(gate, old is None or bool(old), any(r is not None for r in rates.values()))
    reasons += [
        f"{row.name} lost {row.lost:.1%} of accuracy ({row.before:.3f} to {row.after:.3f}), more "
        f"than gate.max_forgetting {gate.max_forgetting:.1%}"
        for row in old or ()
        if row.lost > gate.max_forgetting + _ROUNDING
    ]
    return reasons + [
        f"{name} has {rate:.1%} false positives at threshold {threshold:.3f}, "
        f"more than gate.max_fpr {gate.max_fpr:.1%}"
        for name, rate in rates.items()
        if rate is not None and rate > gate.max_fpr + _ROUNDING
    ]


def unjudged(gate: Gate, has_old: bool, has_reals: bool) -> list[str]:
    """Return a sentence for each limit of the gate that the validation sets cannot judge. `has_old`
    and `has_reals` say whether they hold an old source and real images.
    """
    lacking = {
        "max_forgetting": (gate.max_forgetting < 1 and not has_old, "an old source"),
        "max_fpr": (gate.max_fpr < 1 and not has_reals, "real images"),
    }
    return [
        f"gate.{limit} cannot be judged, because no validation set holds {what}"
        for limit, (cannot, what) in lacking.items()
        if cannot
    ]
