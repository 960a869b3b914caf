"""Define the fields of a checkpoint's `meta.json`, with their types and meanings, as `TypedDict`s.

Main entry: `Meta`, the type of the whole file, a dict: step, recipe, first weights, validation
metrics, calibration, training data, versions and hashes. The other classes are objects inside it;
those on the training are in `model/shipped/entries.py`. `Annotated[Object, Preprocess]` is a dict
with the fields of the data class `Preprocess` as keys. `model/checkpoint.py` reads and writes the
file, and `docs/reference.py` makes a page of documentation from these classes.
"""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from model.forgetting import SourceChange
from model.metrics import Metrics
from model.recipe import ResolvedRecipe
from model.shipped.backbone import BackboneSpec
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


class Fit(TypedDict):
    """How well probabilities fit the labels of the calibration images."""

    nll: float
    """Negative log-likelihood, natural logarithm."""
    ece: float
    """Expected calibration error, over 15 bins."""


class SourceRates(TypedDict):
    """Rates of one source at the decision threshold and the band."""

    reals: int
    """Real images."""
    fakes: int
    """Fake images."""
    false_positive_rate: float | None
    """Share of the real images called likely AI. Null without real images."""
    recall: float | None
    """Share of the fake images called likely AI. Null without fake images."""
    uncertain: float | None
    """Share of all images called uncertain."""
    uncertain_real: NotRequired[float | None]
    """Share of the real images called uncertain. Null without real images."""
    uncertain_fake: NotRequired[float | None]
    """Share of the fake images called uncertain. Null without fake images."""


class LeftOutEntry(TypedDict):
    """Rates of sources by heads trained without them, which a later calibration has kept."""

    temperature: float
    """Divisor of the logits at which they were measured."""
    band: tuple[float, float]
    """Band at which they were measured, as probabilities of fake at that temperature."""
    sources: dict[str, SourceRates]
    """Rates of each source."""


class CalibrationEntry(TypedDict):
    """Calibration, fitted by `evaluate.py calibrate` or at the end of a training run."""

    fitted_on: list[str]
    """Shard sets whose images were scored."""
    index_sha256: dict[str, str]
    """Hash of the index of each set in `fitted_on`."""
    reals: int
    """Real images."""
    fakes: int
    """Fake images."""
    threshold_at: Literal["auto", "fpr5", "fpr1", "0.5", "max_fpr"]
    """Rule that chose the decision threshold: that of `evaluate.py calibrate --threshold`, or
    `max_fpr`, which is `calibration.max_fpr` of the recipe."""
    band: tuple[float, float]
    """Lower end and upper end of *uncertain*, as probabilities of fake. Below: *no sign of AI*. At
    the upper end or above: *likely AI*."""
    roc: list[tuple[float, float, float]]
    """Threshold, false-positive rate and recall on the calibration images, by rising threshold."""
    before: Fit
    """Fit at temperature 1."""
    after: Fit
    """Fit at the fitted temperature."""
    method: str
    """Scores that the calibration was fitted to: `validation`, `sources left out, <rule>`, or
    `validation sets by source, <rule>`. The rule is `calibration.threshold` of the recipe."""
    sources: dict[str, SourceRates]
    """Rates of each source. With `sources left out`, by a head trained without the source. Empty
    for `validation`."""
    sources_used: NotRequired[dict[str, tuple[int, int]]]
    """By class: sources with enough images for the threshold (`real`) and for the lower end of the
    band (`fake`), and sources with any. 0 if all were joined as one. Empty if the rates hold for
    all images together."""
    at_fpr: list[tuple[float, float]]
    """Pairs for `--max-fpr`: an error rate, and the lowest threshold at which at most that share of
    real images is called fake."""
    at_miss: list[tuple[float, float]]
    """Pairs for `--max-miss`: an error rate, and the highest threshold below which at most that
    share of fakes lies."""
    left_out: NotRequired[LeftOutEntry]
    """Rates on left-out sources of the calibration before, if the method of this one is another."""


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
    temperature: float
    """Divisor of the logits. 1 before calibration."""
    threshold: float
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
