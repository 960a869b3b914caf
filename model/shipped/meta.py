"""Define the fields of a checkpoint's `meta.json`, with their types and meanings, as `TypedDict`s.

Main entry: `Meta`, the type of the whole file, a dict: step, recipe, first weights, validation
metrics, calibration, training data, versions and hashes. The other classes are objects inside it;
those on the training are in `model/shipped/entries.py`, those of the calibration in
`model/shipped/calibration.py`. `Annotated[Object, Preprocess]` is a dict with the fields of the
data class `Preprocess` as keys. `model/checkpoint.py` reads and writes the file, and
`docs/reference.py` makes a page of documentation from these classes.
"""

from typing import Annotated, Any, NotRequired, TypedDict

from model.forgetting import SourceChange
from model.metrics import Metrics
from model.recipe import ResolvedRecipe
from model.shipped.backbone import BackboneSpec
from model.shipped.calibration import CalibrationEntry, Share, Temperature
from model.shipped.entries import FirstWeights, TrainingData
from pipeline.preprocess import Preprocess

Object = dict[str, Any]


class ValidationEntry(TypedDict):
    """Figures of the validation sets."""

    sets: NotRequired[dict[str, Annotated[Object, Metrics]]]
    """Figures of each set."""
    sources: NotRequired[dict[str, Annotated[Object, Metrics]]]
    """Figures of each source, by `<set>/<source>`."""
    selection: NotRequired[float]
    """Mean over the sets of the balanced accuracy (accuracy where a set has one class). The
    checkpoint with the highest value is the best one."""


class Mistakes(TypedDict):
    """Kept mistakes (`gate.mistakes`), scored before and after training."""

    counts: dict[str, int]
    """Mistakes by outcome: `newly wrong`, `still wrong`, `uncertain`, `fixed`, `not measurable`."""
    newly_wrong: list[str]
    """SHA-256 of each image that the initial detector classified correctly and this one does
    not."""


class Compared(TypedDict):
    """Comparison of balanced accuracies at a threshold of 0.5 before and after phase 2."""

    forgetting: float | None
    """Mean loss of balanced accuracy over the old sources; a gain counts as 0. Null if the
    validation sets hold no old source."""
    worst: float | None
    """Largest loss of an old source. Null as above."""
    sources: list[Annotated[Object, SourceChange]]
    """Balanced accuracy of each source before and after."""
    mistakes: Mistakes | None
    """Kept mistakes before and after. Null without `gate.mistakes`."""


class Average(TypedDict):
    """Checkpoints whose weights were averaged by `python -m model average`."""

    first: str
    """First checkpoint."""
    last: str
    """Second checkpoint."""
    weight: float
    """Weight of the second checkpoint in the average, 0 to 1."""


class Meta(TypedDict):
    """Description of a checkpoint. It is written last: a folder without it is no checkpoint."""

    format_version: int
    """Version of the checkpoint format."""
    created: str
    """Time of writing, UTC."""
    created_ns: int
    """Time of writing in nanoseconds since 1970. The newest run is chosen by this value."""
    step: int
    """Optimizer steps done."""
    epoch: float
    """Epochs done."""
    classes: list[str]
    """Class names in the order of the network's outputs: `real`, `fake`."""
    preprocess: Annotated[Object, Preprocess]
    """Scaling and cropping before the network."""
    temperature: Temperature
    """Divisor of the logits. 1 before calibration."""
    threshold: Share
    """Decision threshold: an image is called fake at or above this probability of fake."""
    calibration: CalibrationEntry | None
    """Fitted temperature, thresholds and band. Null: not calibrated."""
    calibrated_metrics: ValidationEntry | None
    """Figures of the validation sets at the calibrated threshold."""
    metrics: ValidationEntry
    """Figures of the validation sets at a threshold of 0.5. Empty without a validation at this
    step."""
    selection: float | None
    """Figure that chooses the best checkpoint, as in `metrics`. Null without a validation."""
    ended: str | None
    """Reason why the run ended with this checkpoint. Null: the run continued."""
    compared: Compared | None
    """Balanced accuracy before and after phase 2."""
    refused: list[str]
    """Reasons of the gate, one sentence each. Empty: not refused."""
    data: TrainingData
    """Shard sets and sources of the run."""
    recipe: Annotated[Object, ResolvedRecipe]
    """All recipe keys of the run. Unset keys have the values of the weights."""
    first_weights: FirstWeights | None
    """Origin of the first weights."""
    commit: str
    """Commit of this program, with `-dirty` if files differed. Empty outside a checkout."""
    versions: dict[str, str]
    """Versions of Python and of the libraries that affect the results."""
    sha256: dict[str, str]
    """SHA-256 of each file of the checkpoint, and, under `meta.json`, of the other fields here."""
    backbone: NotRequired[Annotated[Object, BackboneSpec]]
    """Only in a shipped head: the backbone, which `weights.safetensors` does not contain."""
    backbone_inside: NotRequired[Annotated[Object, BackboneSpec]]
    """The backbone, if `weights.safetensors` contains it, as after `model export --hub`."""
    average: NotRequired[Average]
    """Only in an average of two checkpoints."""
