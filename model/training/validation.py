"""Score the validation sets during training, to choose the best checkpoint.

Main entry: `validate(train_state, sets, preprocess, loading, features)` returns a `Validation`:
`sets` (name -> `Metrics`), `sources` ("set/source" -> `Metrics`), and `selection`, by which the
best checkpoint is chosen: the mean over the sets of the balanced accuracy (the accuracy if a set
has one class only). On several ranks, all call it, and all get the same result.

- `train_state`: the `TrainState` of the run (`assemble()` in `assemble.py`).
- `sets`: a dict, name -> `ShardSet`, as `open_validation()` in `sets.py` returns.
- `preprocess`: a `Preprocess`, the `preprocess` of a `ResolvedRecipe`.
- `loading`: a `Loading` (batch size, workers and more of the loader), such as `recipe.loading`.
- `features`: None (the default), or a `FeatureSource`: the place of stored features, which are
  scored instead of images (`model/training/assemble.py`).

It raises `ValueError` or a subclass for sets or scores that cannot be used.

`Gain` has the `highest` selection so far, the `step` that reached it first, and
`validations_since`. Its `after(step, selection)` returns the `Gain` after one more validation.

`Best` is a run's best checkpoint so far and its `Validation`; `better(best, new)` returns the
better of two. `write_validation(path, validation)` writes a `Validation` to a JSON file (`Path`),
and `read_validation(path)` returns it. It raises `ValueError` for a missing or damaged file.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from escape import text_fault
from model.evaluation.scoring import CheckpointScorer, score_all
from model.features.loader import FeatureSource
from model.metrics import Validation, measure_sets
from model.training.step import TrainState
from pipeline.loading import Loading
from pipeline.preprocess import Preprocess
from sharding.format import ShardSet
from storage import parse_json, read_text, write_text


@dataclass(frozen=True, kw_only=True)
class Best:
    """Best checkpoint of a run so far, and its validation (None if it has none)."""

    path: Path
    validation: Validation | None


def better(best: Best | None, new: Best) -> Best:
    """Return the checkpoint with the higher selection figure; the new one if the figures are equal.
    A checkpoint without a validation is worse than any with one.
    """
    if best is None or best.validation is None:
        return new
    if new.validation is None or new.validation.selection < best.validation.selection:
        return best
    return new


@dataclass(frozen=True)
class Gain:
    """Highest selection figure of a run so far, the step that reached it first, and the number of
    validations since then. An equal figure is no gain.
    """

    highest: float | None = None
    step: int = 0
    validations_since: int = 0

    def after(self, step: int, selection: float) -> "Gain":
        """Return the record after the validation of `step`."""
        if self.highest is None or selection > self.highest:
            return Gain(selection, step)
        return Gain(self.highest, self.step, self.validations_since + 1)


def validate(
    train_state: TrainState,
    sets: Mapping[str, ShardSet],
    preprocess: Preprocess,
    loading: Loading,
    features: FeatureSource | None = None,
) -> Validation:
    """Score every validation set, on all ranks together.

    The selection figure is the mean over the sets of the balanced accuracy, or of the accuracy if a
    set has one class only. AUROC is not used, because it can be high for a checkpoint that calls
    every image fake. With `features`, stored features are scored instead of images.
    """
    scorer = CheckpointScorer(
        train_state.shown, preprocess, train_state.device, train_state.dtype, train_state.dist,
        loading, features, quiet=True,
    )  # fmt: skip
    return measure_sets(score_all(sets, scorer, "validating"))


def write_validation(path: Path, validation: Validation) -> None:
    """Write the metrics before training, which a resumed run compares with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(validation), indent=1) + "\n")


def read_validation(path: Path) -> Validation:
    """Read the validation that `write_validation` wrote.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        return Validation.from_json(parse_json(read_text(path)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} has no readable metrics of the initial detector ({text_fault(error)}); "
            "restore the file from a copy, or use --run NAME for a new run"
        ) from error
