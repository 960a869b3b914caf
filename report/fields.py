"""Define the fields of an evaluation's `report.json`, with their types and meanings, as `TypedDict`
and data classes.

Main entry: `Report`, the type of the whole file: main results, checkpoint, thresholds, and `sets`,
a dict from the name of each set to its `SetReport` (metrics of all images, by class, source and
generator, and robustness). The other classes are objects inside it. In the file all objects are
dicts, also where the type of a field is a data class, and a field `..._at_0_5` has the key
`..._at_0.5`. `model/evaluation/report.py` computes the report, `docs/reference.py` makes a page of
documentation from these classes, and a test compares both. `Interval` is (low, high) at 95 %.
"""

from dataclasses import dataclass
from typing import TypedDict

from model.evaluation.codec_swap import Container
from model.evaluation.robustness import Shift
from model.evaluation.scores import Identity, ReferenceReals, Subset
from model.metrics import Metrics
from model.shipped.calibration import CalibrationEntry

Interval = tuple[float, float]
"""Lower end and upper end of a 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Figures(Metrics):
    """Figures of a group of images. *Fake* is the positive class; rates are 0 to 1.

    With one class only, a figure that needs both is null.
    """

    groups: int
    """Independent groups of images, which the intervals are resampled from."""
    intervals: dict[str, Interval]
    """95 % interval of each figure that has one, by the figure's name."""


class Recall(TypedDict):
    """Recall on the images of one generator."""

    images: int
    """Images of the generator."""
    recall: float
    """Share called fake at the report's threshold."""
    interval: Interval | None
    """95 % interval of `recall`."""
    recall_at_0_5: float
    """Share called fake at 0.5."""


class Protocol(TypedDict):
    """Recall by generator. Each generator has the same weight in the mean."""

    images: int
    """Fake images."""
    prompts: int
    """Prompts (groups) of these images."""
    generators: dict[str, Recall]
    """Recall of each generator."""
    interval: Interval | None
    """95 % interval of `mean`."""
    mean: float
    """Mean recall over generators, at the report's threshold."""
    std: float | None
    """Standard deviation over generators, n - 1. Null with one generator."""
    mean_at_0_5: float
    """Mean recall over generators, at 0.5."""
    std_at_0_5: float | None
    """Standard deviation over generators, at 0.5."""
    false_positive_rate_at_0_5: float | None
    """Share of the real images of `reference`, else of `overall`, called fake at 0.5. Null without
    any."""


class Protocols(TypedDict):
    """Recall under both protocols of EvalGEN."""

    all_images: Protocol
    """Recall on all fake images."""
    first_per_prompt: Protocol | None
    """Recall on each generator's first image of each prompt. Null if every generator has one image
    per prompt."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of a group of images."""

    reals: int
    """Real images."""
    fakes: int
    """Fake images."""
    recall: float | None
    """Share of the fake images called fake."""
    false_positive_rate: float | None
    """Share of the real images called fake."""
    balanced_accuracy: float | None
    """Mean of recall and of 1 - false-positive rate."""
    auroc: float | None
    """Area under the ROC curve."""


@dataclass(frozen=True, kw_only=True)
class PerturbationEntry(Rates):
    """Figures after one perturbation, on the images that could be perturbed."""

    name: str
    """Short name, such as `jpeg-60`."""
    family: str
    """Kind of perturbation, such as JPEG or blur."""
    amount: float
    """Strength, in the unit of the family."""
    what: str
    """The perturbation in words."""
    images: int
    """Images that could be perturbed and scored."""
    intervals: dict[str, Interval]
    """95 % interval of each rate."""
    flip_rate: float | None
    """Share of the images whose verdict changed."""
    flip_rate_real: float | None
    """Share of the real images whose verdict changed."""
    flip_rate_fake: float | None
    """Share of the fake images whose verdict changed."""
    shift: dict[str, Shift | None]
    """Change of the mean logit of each class."""
    failed: int
    """Images that could not be perturbed, or have no finite score then."""
    failed_first: str | None
    """Reason of the first failure."""


@dataclass(frozen=True)
class ContainerEntry(Container):
    """Most common lossy file format of a class."""

    name: str
    """The format in words, such as `JPEG 75 420`."""


class SwapEntry(TypedDict):
    """One test of the codec swap."""

    name: str
    """Short name: `fakes-as-reals`, `reals-as-fakes`, `all-as-jpeg`, `all-as-webp`, `leveled`."""
    what: str
    """The test in words."""
    images: int
    """Images of the test that could be re-encoded and scored."""
    shift: dict[str, Shift | None]
    """Change of the mean logit of each class that was re-encoded; null for the other class."""
    before: Rates
    """Rates of the images as packed in the shards."""
    after: Rates
    """Rates after re-encoding."""
    failed: int
    """Images that could not be re-encoded, or have no finite score then."""
    failed_first: str | None
    """Reason of the first failure."""


class Robustness(TypedDict):
    """Results of `--robustness` on a fixed sample of the set."""

    images: int
    """Images of the sample that could be read."""
    of: int
    """Images of the set."""
    unreadable: int
    """Images of the sample that could not be read, or have no finite score as packed."""
    images_sha256: str
    """SHA-256 of the sorted file hashes of `images`: equal where two runs perturbed the same."""
    perturbations: list[PerturbationEntry]
    """Figures after each perturbation."""
    containers: dict[str, ContainerEntry | None]
    """Most common lossy format of each class. Null: the class has none."""
    codec_swap: list[SwapEntry]
    """Tests of the codec swap."""


class SetReport(TypedDict):
    """Figures of one set."""

    index_sha256: str
    """Hash of the set."""
    split: str
    """Split of the set."""
    known_generators: list[str]
    """Generators of a test set of which training had other images. Only those that the catalogs of
    both name alike, and of detectors of this program."""
    robustness: Robustness | None
    """Figures of `--robustness`. Null: not measured."""
    reference_reals: ReferenceReals | None
    """Reference real images. Null: the set's own."""
    overall: Figures
    """Figures of the set's own images."""
    reference: Figures | None
    """Figures of the set's fakes with the real images of `reference_reals`."""
    classes: dict[str, Figures]
    """Figures of each class alone."""
    sources: dict[str, Figures]
    """Figures of each source's own images."""
    generators: dict[str, Figures]
    """Figures of each generator's fakes with all real images of `reference`, else of `overall`."""
    verdicts: dict[str, dict[str, int]]
    """Number of images by class and verdict."""
    protocols: Protocols | None
    """Recall by generator. Null without fakes."""
    note: str | None
    """Sentence about a limit of the set's figures, such as a missing class."""
    unreadable: list[str]
    """Images without a score: name and reason. They could not be read, or the detector gives no
    verdict."""


class Resampling(TypedDict):
    """Settings of the bootstrap intervals."""

    level: float
    """Confidence level, such as 0.95."""
    resamples: int
    """Number of bootstrap resamples."""
    seed: int
    """Seed of the resamples."""


class Report(TypedDict):
    """Report of an evaluation. The same file of scores gives the same bytes."""

    report_version: int
    """Version of this layout."""
    headline: list[str]
    """Warnings about training sets, if any, then one sentence per set; sets without real images
    come first."""
    trained_on: list[str]
    """Sets of the report that the checkpoint was trained on, by its run or before."""
    maybe_trained_on: list[str]
    """Other sets of the report that have the name of a set that the checkpoint was trained on, but
    another hash: perhaps later builds of it."""
    detector: Identity
    """Detector that was measured."""
    checkpoint: str
    """Path of the checkpoint."""
    run: str
    """Name of the checkpoint's run."""
    step: int
    """Training step of the checkpoint."""
    commit: str
    """Commit of this program at the evaluation."""
    temperature: float
    """Divisor of the logits."""
    threshold: float
    """Decision threshold."""
    calibration: CalibrationEntry | None
    """Calibration, as in `meta.json`."""
    subset: Subset | None
    """List of samples. Null: whole sets."""
    band: Interval
    """Lower end and upper end of *uncertain*."""
    intervals: Resampling
    """Settings of the bootstrap intervals."""
    sets: dict[str, SetReport]
    """Each set by its name."""
