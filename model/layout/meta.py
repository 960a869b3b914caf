"""Describe a checkpoint's `meta.json`: every field with its type and meaning, as `TypedDict`
classes.

Main entry: `Meta`, the type of the whole file: step, recipe, first weights, validation metrics,
calibration, training data, versions and hashes. The other classes are objects inside it. The string
below each field is its meaning. The classes are for annotations, such as `meta: Meta =
read_meta(folder)`: the value is a plain dict, parsed JSON. Where the type of a field is a data
class, such as `Preprocess`, the value is a dict with its fields as keys. There are no functions,
and nothing is checked at run time: `model/checkpoint.py` reads and writes the file, and
`docs/reference.py` makes a page of documentation from these classes.
"""

from typing import Literal, NotRequired, Optional, TypedDict

from model.forgetting import SourceChange
from model.metrics import Metrics
from model.recipe import ResolvedRecipe
from model.shipped.backbone import BackboneSpec
from pipeline.preprocess import Preprocess


class ValidationEntry(TypedDict):
    """Figures of the validation sets."""

    sets: NotRequired[dict[str, Metrics]]
    """Figures of each set."""
    sources: NotRequired[dict[str, Metrics]]
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
    sources: list[SourceChange]
    """Balanced accuracy of each source before and after."""
    mistakes: Mistakes | None
    """Kept mistakes before and after. Null without `gate.mistakes`."""


class TrainingData(TypedDict):
    """Shard sets and sources of the run, without those that give no sample, such as sources with
    `data.repeats` 0."""

    train: list[str]
    """Training sets."""
    replay: list[str]
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
    preprocess: Preprocess
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
    recipe: ResolvedRecipe
    """All recipe keys of the run. Unset keys have the values of the weights."""
    first_weights: FirstWeights | None
    """Origin of the first weights."""
    commit: str
    """Commit of this program, with `-dirty` if files differed. Empty outside a checkout."""
    versions: dict[str, str]
    """Versions of Python and of the libraries that affect the results."""
    sha256: dict[str, str]
    """SHA-256 of each file of the checkpoint, and, under `meta.json`, of the other fields here."""
    backbone: NotRequired[BackboneSpec]
    """Only in a shipped head: the backbone, which `weights.safetensors` does not contain."""
    backbone_inside: NotRequired[BackboneSpec]
    """The backbone, if `weights.safetensors` contains it, as after `model export --hub`."""
    average: NotRequired[Average]
    """Only in an average of two checkpoints."""
