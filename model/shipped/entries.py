"""Define the entries of `meta.json` on the training of a detector, and check those entries of the
file, or of the metadata of an ONNX file, that a detector needs. These values come from files of
strangers.

Main entry: `checked_meta(kind, meta, where)` returns `meta`, a dict of parsed JSON, as a new dict
in which `preprocess` has all keys of `Preprocess`. It raises `ValueError` for an entry that is
missing or wrong. The text `where` names the file in the error.

- `kind`: `Entries` of any detector, or `CheckpointEntries`.

The entries of the network are checked by `Network` of `model/recipe.py`. `model/shipped/meta.py`
has all entries.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NotRequired, Optional

from typing_extensions import TypedDict  # pydantic needs it up to Python 3.11

from checked import checked
from model.shipped.calibration import Calibrated
from pipeline.preprocess import Preprocess


class TrainingData(TypedDict):
    """Shard sets and sources of the run, without those that give no sample, such as sources with
    `data.repeats` 0."""

    train: NotRequired[list[str]]
    """Training sets."""
    replay: NotRequired[list[str]]
    """Sets that old samples are replayed from. Empty with `replay.ratio` 0."""
    replayed_per_epoch: NotRequired[int]
    """Old samples in an epoch."""
    index_sha256: NotRequired[str]
    """Hash of all opened sets together."""
    set_sha256: NotRequired[dict[str, str]]
    """SHA-256 of the `index.json` of each set."""
    sources: NotRequired[list[str]]
    """Sources that the weights were trained on, by this run or before."""
    generators: NotRequired[list[str]]
    """Generators of the fakes of this run's sources, as far as their catalog names them."""
    synthetic_sources: NotRequired[list[str]]
    """Those of `sources` with rendered images, such as those of the demo."""
    titles: NotRequired[dict[str, str]]
    """What the images of these sources are, in a few words for people, by source."""
    earlier_sets: NotRequired[dict[str, str]]
    """Hash of the index and name of each set that the weights of an average were trained on."""
    earlier_generators: NotRequired[list[str]]
    """Generators of the fakes in these sets."""
    imported_from: NotRequired[str]
    """File of the original project that the weights were converted from."""
    known_against: NotRequired[list[str]]
    """Weaknesses of the detector that others measured, one sentence each."""


class FirstWeights(TypedDict):
    """Origin of the weights of the run's first step."""

    kind: str
    """`timm`, `random`, `file` (a weights file), `checkpoint`, or `average` (two checkpoints that
    did not begin from the same recorded weights)."""
    name: str
    """Name of timm's network, of the file, or of each run and checkpoint."""
    sha256: str
    """SHA-256 of the weights file. Empty for timm's and random weights."""
    license: str | None
    """License that timm states for its weights."""
    first_weights: Optional["FirstWeights"]
    """Origin of the first weights of the checkpoint that the run started from."""
    sets: NotRequired[dict[str, str]]
    """Hash of the index and name of each set that this checkpoint was trained on, by its run or
    before."""
    generators: NotRequired[list[str]]
    """Generators of the fakes in these sets."""


class Entries(Calibrated):
    """Types of the entries that scoring reads."""

    preprocess: Preprocess
    data: TrainingData | None


class NetworkName(TypedDict):
    """Types of the entries of the network that name it."""

    name: str


class RunSettings(TypedDict):
    """Types of the settings of the run that the model card shows."""

    precision: NotRequired[str]


class RecipeNames(TypedDict):
    """Types of the entries of the recipe that are read from each checkpoint."""

    name: str
    network: NetworkName
    run: NotRequired[RunSettings]


class BackboneLicense(TypedDict):
    """Types of the entries of a backbone that the license of the weights is read from."""

    name: NotRequired[str]
    license: NotRequired[str | None]


class CheckpointEntries(Entries):
    """Types of the entries that are read from each checkpoint."""

    created: str
    created_ns: int
    step: int
    selection: float | None
    recipe: RecipeNames
    refused: NotRequired[list[str]]
    metrics: dict[str, Any]
    calibrated_metrics: NotRequired[dict[str, Any] | None]
    first_weights: NotRequired[FirstWeights | None]
    backbone: NotRequired[BackboneLicense | None]
    backbone_inside: NotRequired[BackboneLicense | None]


def checked_meta(kind: type[Entries], meta: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return `meta` with all keys of `preprocess`, after a check of the entries that `kind` lists.

    Raises:
        ValueError: an entry is missing, of another type or out of its range.
    """
    return {**meta, "preprocess": asdict(checked(kind, meta, where)["preprocess"])}
