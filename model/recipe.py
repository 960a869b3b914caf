"""Define the recipe: every setting that decides the result of a training run, as frozen
dataclasses.

Main entry: `Recipe`, one training run. `recipes.load(Recipe, path)` reads one from a TOML file,
whose tables are its fields. Every field is passed by keyword; the first six are required.

- `name`: a text, the name of the run and of its folder (a slash makes a subfolder).
- `data`: a `Data`: `train` and `validate`, lists of names of shard sets (packed images); `policy`,
  a key of `augment`; and options. `policy` is the default augmentation policy, used for every
  source that has no policy in the index of its set.
- `augment`: a dict, policy name -> `AugmentPolicy` (`pipeline/augment.py`).
- `network`: a `Network`: `name` (of a timm network), first weights, trained part; all have
  defaults.
- `optim`: an `Optim`: `lr` (learning rate, required), schedule, weight decay and more.
- `run`: a `Run`: `epochs` (required), seed, precision, saving, logging.
- `loading`: a `Loading` (`pipeline/loading.py`): batch size, workers, decoder.
- `replay`: a `Replay` (`pipeline/replay.py`): old sets, of which samples are mixed in.
- `gate`: a `Gate`: the limits beyond which a trained checkpoint is refused.
- `preprocess`: a `PreprocessSettings` (`pipeline/preprocess.py`): sizes and filter of the images.
- `features`: a `Features`, to train a head on stored features of a frozen network, or None (the
  default), to train from pixels.
- `calibration`: a `Calibrating`: how thresholds are fitted.

All fields of `gate`, `features` and `calibration` have defaults; the default gate refuses nothing.
The text below each field in this file gives its meaning, default and range.

A number out of range, or settings that do not fit together, raise `ValueError` with the allowed
values. Making a `Recipe` does not check two things. `recipes.load()` checks the first: types, texts
with a fixed choice (such as `precision`) and that numbers are finite; it raises `RecipeError` (a
`ValueError`). `plan()` in `model/training/plan.py` checks the second: that `augment` has every
policy that the sets need, and that `train` and `validate` are not empty. `resolved()` in
`model/backbones/resolve.py` makes a `ResolvedRecipe`, with complete preprocessing settings.

`flat_settings(values, prefix)` takes nested dicts and returns one dict with keys such as
"optim.lr", each after the text `prefix` ("" by default). `check_run_name(name)` returns nothing,
and raises `ValueError` for a name that no run may have. `Triple` is a value per RGB channel;
`STEP_FOLDER` is the regular expression for the names of checkpoint folders, `step_folder(step)`
returns the name for a number of steps, and `BASELINE_FILE` and `LOCK_FILE` are files of a run.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from escape import printable
from model.tracking.tracker import TrackerName
from pipeline.augment import AugmentPolicy
from pipeline.loading import Loading
from pipeline.preprocess import Preprocess, PreprocessSettings
from pipeline.replay import Replay
from storage import is_partial, local_path

STEP_FOLDER = re.compile(r"step_(\d{7,})")
"""Pattern of the folder names of a run's checkpoints, which `step_folder()` makes. Folders with
other names are no checkpoints.
"""

LOCK_FILE = ".lock"
"""File in the folder of a run that its one writer has locked."""

BASELINE_FILE = "baseline_metrics.json"
"""File in the folder of a run with the metrics before the first step."""


def step_folder(step: int) -> str:
    """Return the name of the folder of the checkpoint after `step` steps."""
    return f"step_{step:07d}"


Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Shard sets to train and to validate on, and the augmentation policy of most sources."""

    train: list[str]
    """Shard sets to train on, by their names below `--data`. Training samples of only one class are
    refused without `allow_one_class`."""
    validate: list[str]
    """Shard sets that choose the best checkpoint and calibrate it. At least one is needed."""
    policy: str
    """Augmentation policy, a table of `[augment]`, for each source whose index names no other."""
    repeats: dict[str, float] = field(default_factory=dict)
    """Uses of each image per epoch, by the name of its source. 2.5 uses every image twice and half
    of them a third time, 0 leaves the source out. Other sources: 1. Range: at least 0"""
    allow_one_class: bool = False
    """Accept training samples of only one class."""
    allow_shared_images: bool = False
    """Accept images that are in both training and validation sets, for measurements of speed."""

    def __post_init__(self) -> None:
        if any(times < 0 for times in self.repeats.values()):
            raise ValueError(f"repeats must not be negative, got {self.repeats}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Length of a run, its seed, and how often it validates, saves and logs."""

    epochs: int
    """Passes over the training set. Range: at least 1"""
    seed: int = 70
    """Seed of sample order, augmentation and initial weights, below 2**63. Range: at least 0"""
    init_from: str = ""
    """Run whose best checkpoint gives the first weights. Empty: see `network.pretrained`."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Floating-point format of the forward pass. `auto`: bf16 if the GPU supports it, else fp16,
    else fp32; fp32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether torch.compile is used. `auto` uses it on a GPU, if a compiler is installed. With
    stored features only their computation is compiled, which also pays on a CPU for thousands of
    images."""
    log_every: int = 50
    """Steps between two rows of `metrics.jsonl`. Range: at least 1"""
    save_every: int = 0
    """Steps between two checkpoints, in addition to those after each validation. 0: none. Range:
    at least 0"""
    validate_every: int = 1
    """Epochs between two validations. The last epoch is always validated. Range: at least 1"""
    stop_after_no_gain: int = 0
    """Number of successive validations without a gain of the selection figure after which the run
    ends. 0: never. Range: at least 0"""
    grad_accum_steps: int = 1
    """Parts that a batch is split into, with one optimizer step for all. More parts need less
    memory. Batch norm that is not frozen normalizes each part alone, which changes the result.
    Range: at least 1"""
    tracker: TrackerName = ""
    """Experiment tracker that receives the scalars in addition to TensorBoard. Empty: none."""

    def __post_init__(self) -> None:
        least = min(self.epochs, self.log_every, self.validate_every, self.grad_accum_steps)
        if least < 1 or min(self.save_every, self.seed, self.stop_after_no_gain) < 0:
            raise ValueError(
                "epochs, log_every, validate_every and grad_accum_steps must be at least 1, and "
                "save_every, seed and stop_after_no_gain must not be negative"
            )
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network, its first weights, and the part of it that is trained."""

    name: str = "convnextv2_base.fcmae_ft_in1k"
    """Name of a classifier of timm."""
    pretrained: bool = True
    """Start from timm's weights, unless the run starts from a checkpoint or a file."""
    init: Literal["timm", "fan_in"] = "timm"
    """Initialization without pretrained weights: `timm` (sigma 0.02, for wide networks), or
    `fan_in` (sigma 1 / sqrt(fan-in), for narrow networks, which learn nothing in minutes with
    `timm`)."""
    drop_path_rate: float = 0.0
    """Share of residual branches that are dropped in training (stochastic depth). Range: at least
    0, below 1"""
    mean: Triple | None = None
    """Mean of each channel, for RGB values in 0 to 1. Unset: that of the weights."""
    std: Triple | None = None
    """Standard deviation of each channel, for RGB values in 0 to 1. Unset: that of the weights.
    Each is above 0."""
    freeze_bn: bool = False
    """Do not update the loaded statistics of batch norm."""
    head: Literal["timm", "stages", "class_tokens"] = "timm"
    """Input of the classifier: `timm` the last features, `stages` the features of every stage,
    `class_tokens` the class tokens of a transformer after each of `blocks`."""
    blocks: tuple[int, ...] = ()
    """Transformer blocks after which `class_tokens` are read, numbered from 0, in rising order.
    Later blocks are not computed. Range: at least 0"""
    freeze_backbone: bool = False
    """Train only the head."""
    crops: int = 1
    """Number of crops of an image that the head reads together. Leave it out: it follows from
    `preprocess.detail_crop`. Range: 1 to 2"""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `timm.create_model`, passed unchanged. None that names
    files (`checkpoint_path`, `cache_dir`)."""

    def __post_init__(self) -> None:
        # Refuse options that name files: a checkpoint with options may come from a stranger.
        if files := sorted({"checkpoint_path", "cache_dir"} & self.options.keys()):
            raise ValueError(
                f"options takes no {files[0]}, which names files of this machine; give weights "
                "with --init-from, and the cache of the hub as HF_HOME"
            )
        if (self.head == "class_tokens") != bool(self.blocks):
            raise ValueError(
                "head class_tokens and blocks are set together: list the blocks, such as "
                f"blocks=[5, 6, 7]; got head {self.head} and blocks {list(self.blocks)}"
            )
        if list(self.blocks) != sorted({*self.blocks}) or min(self.blocks, default=0) < 0:
            raise ValueError(
                f"blocks must be different numbers from 0 in rising order; got {list(self.blocks)}"
            )
        if self.head == "class_tokens" and not self.freeze_backbone:
            raise ValueError("head class_tokens needs a frozen backbone: set freeze_backbone=true")
        if self.crops not in (1, 2):
            raise ValueError(f"crops is 1 or 2, got {self.crops}")
        if self.drop_path_rate < 0 or self.drop_path_rate >= 1:
            raise ValueError(
                f"drop_path_rate is a share, at least 0 and below 1, got {self.drop_path_rate}"
            )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be above 0 in each channel, got {list(self.std)}")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW with warm-up and a cosine schedule, or a fit of the head."""

    lr: float
    """Peak learning rate of the head. Range: above 0"""
    weight_decay: float = 0.02
    """Weight decay of AdamW. For `lbfgs`: factor of half the sum of squared changes of the weights
    from the first ones (0 in a new head). Range: at least 0"""
    layer_decay: float = 1.0
    """Factor on the learning rate from one group of layers to the next, starting at the head.
    Range: above 0, at most 1"""
    layer_decay_groups: Literal["none", "block", "stage", "stage12"] = "none"
    """Groups for `layer_decay`: `block` (stem, each block, head: 38 for ConvNeXtV2-Base), `stage12`
    (the official ConvNeXt grouping: stem, 12 groups, head: 14) or `stage` (stem, each stage, head,
    for other networks: 9 for MobileNetV2)."""
    warmup_ratio: float = 0.05
    """Share of all steps in which the learning rate warms up. Range: at least 0, below 1"""
    warmup_start_factor: float = 0.01
    """First learning rate, as a share of `lr`. Range: 0 to 1"""
    min_lr: float = 0.0
    """Learning rate of the head at the end of the cosine. Range: 0 to lr"""
    label_smoothing: float = 0.05
    """Share of each label that is spread over both classes. Range: 0 to 1"""
    clip_grad_norm: float = 1.0
    """Norm that gradients are clipped to. Range: above 0"""
    ema_decay: float = 0.0
    """Decay per step of the averaged weights, which are then validated and saved. 0: no averaging.
    Range: at least 0, below 1"""
    solver: Literal["adamw", "lbfgs"] = "adamw"
    """`adamw`: train in steps on batches. `lbfgs`: fit the linear head of a frozen backbone to the
    stored features of all epochs at once; only `weight_decay`, `label_smoothing` and `iterations`
    have an effect."""
    iterations: int = 100
    """Largest number of iterations of `lbfgs`. Range: at least 1"""

    def __post_init__(self) -> None:
        if not (self.clip_grad_norm > 0 and self.weight_decay >= 0):
            raise ValueError(
                "clip_grad_norm must be above 0 and weight_decay at least 0, got "
                f"{self.clip_grad_norm} and {self.weight_decay}"
            )
        if not (0 <= self.warmup_start_factor <= 1 and 0 <= self.label_smoothing <= 1):
            raise ValueError(
                "warmup_start_factor and label_smoothing are shares, from 0 to 1, got "
                f"{self.warmup_start_factor} and {self.label_smoothing}"
            )
        if not self.lr > 0 or not 0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"lr must be above 0 and min_lr from 0 to lr, got {self.min_lr} and {self.lr}"
            )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.layer_decay}")
        if self.layer_decay < 1 and self.layer_decay_groups == "none":
            raise ValueError("layer_decay below 1 needs layer_decay_groups block, stage or stage12")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(
                f"warmup_ratio is a share of the steps, in [0, 1), got {self.warmup_ratio}"
            )


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Limits beyond which a trained checkpoint is refused."""

    max_forgetting: float = 1.0
    """Largest loss of accuracy of an old source (balanced accuracy if the source has both classes).
    Needs an old source in a validation set. 1 refuses nothing. Range: 0 to 1"""
    max_fpr: float = 1.0
    """Highest false-positive rate on any validation set that has real images (one is needed), at
    the calibrated threshold (without a calibration at 0.5). 1 refuses nothing. Range: 0 to 1"""
    mistakes: str = ""
    """Folder of kept mistakes (`predict.py --report-mistake`). Their kept images are scored before
    and after training. Empty: none."""
    max_newly_wrong: int = 0
    """Largest number of images of `mistakes` that the initial detector classified correctly and the
    trained one does not. Range: at least 0"""

    def __post_init__(self) -> None:
        if not (0 <= self.max_forgetting <= 1 and 0 <= self.max_fpr <= 1):
            raise ValueError("max_forgetting and max_fpr are shares, from 0 to 1")
        if self.max_newly_wrong < 0:
            raise ValueError(f"max_newly_wrong must not be negative, got {self.max_newly_wrong}")


@dataclass(frozen=True, kw_only=True)
class Features:
    """Training of a head on features of a frozen backbone, which are computed once."""

    views: int = 0
    """Number of augmented views per image. Epoch e uses view e modulo (`views` + 1); view 0 is the
    center crop of evaluation. 0: every epoch uses the center crop. Range: 0 to 1000"""
    store: str = "data/features"
    """Folder of the feature store."""
    stored: bool = True
    """Store the features. `false` computes the same views from pixels in each epoch, which is slow
    and gives the same head up to rounding."""

    def __post_init__(self) -> None:
        if not 0 <= self.views <= 1000:
            raise ValueError(f"views must be 0 to 1000, got {self.views}")
        if not self.store:
            raise ValueError("store is empty; name a folder, such as data/features")
        local_path(self.store)  # raises for an address


@dataclass(frozen=True, kw_only=True)
class Calibrating:
    """Fit of the thresholds by which scores become verdicts."""

    on: Literal["validation", "left_out"] = "validation"
    """Scores that the thresholds are fitted to: `validation` those of the validation sets,
    `left_out` those of each source by a head that was trained without the source. The latter
    resemble the scores of a new source."""
    threshold: Literal["pooled", "most_sources", "worst_source"] = "most_sources"
    """The images for which `max_fpr` and `max_miss` must hold: `pooled` all images together,
    `most_sources` those of each of three quarters of the sources, `worst_source` those of each
    source. Sources with fewer than 20 images of a class, or too few for the rate, do not count for
    it; if more than half of those with 20 have too few, there is no calibration. With `validation`,
    and if none of the three is changed, the threshold is the larger of 0.5 and that of 5 % false
    positives over all images."""
    max_fpr: float = 0.05
    """Largest share of real images that may be called likely AI. Range: above 0, below 0.5"""
    max_miss: float = 0.05
    """Largest share of fake images that may be called no sign of AI. Range: above 0, below 0.5"""
    together: dict[str, list[str]] = field(default_factory=dict)
    """Groups of sources that are left out together, such as several galleries of one generator: the
    sources by the name of the group."""

    @property
    def is_stated(self) -> bool:
        """Whether the recipe gives a rate or `threshold` other than the default."""
        default = Calibrating()
        return any(
            getattr(self, name) != getattr(default, name)
            for name in ("threshold", "max_fpr", "max_miss")
        )

    def group_of(self, source: str) -> str:
        """Return the group that a source is left out with. Without a group in `together`, the group
        is the source alone and has its name.
        """
        return next((name for name, of in self.together.items() if source in of), source)

    def __post_init__(self) -> None:
        if not (0 < self.max_fpr < 0.5 and 0 < self.max_miss < 0.5):
            raise ValueError(
                "max_fpr and max_miss are shares between 0 and 0.5, got "
                f"{self.max_fpr} and {self.max_miss}"
            )
        counts = Counter(name for group in self.together.values() for name in {*group})
        if twice := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(
                f"together names {', '.join(twice)} in more than one group; a source is left out "
                "with one group"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings that decide the result of a training run. `recipes/` contains recipes as TOML.

    `model.backbones.resolve.resolved` sets the unset fields of `preprocess` and `network` to the
    values of the weights.
    """

    name: str
    """Name of the run, and of its folder in `--runs`. A slash makes a subfolder."""
    data: Data
    """Shard sets and the default augmentation policy."""
    augment: dict[str, AugmentPolicy]
    """Augmentation policies by name."""
    network: Network
    """Network and its first weights."""
    optim: Optim
    """Optimizer and schedule."""
    run: Run
    """Length, seed, precision and logging."""
    loading: Loading = field(default_factory=Loading)
    """Reading and decoding of images, and batches."""
    replay: Replay = field(default_factory=Replay)
    """Old samples that are mixed with the new ones."""
    gate: Gate = field(default_factory=Gate)
    """Limits beyond which a trained checkpoint is refused."""
    preprocess: PreprocessSettings = field(default_factory=PreprocessSettings)
    """Scaling and cropping of images."""
    features: Features | None = None
    """Stored features of a frozen backbone. Absent: train from pixels."""
    calibration: Calibrating = field(default_factory=Calibrating)
    """Fit of the thresholds by which scores become verdicts."""

    def __post_init__(self) -> None:
        check_run_name(self.name)
        if self.features and not self.network.freeze_backbone:
            raise ValueError(
                "[features] needs a frozen backbone: set "
                "network.freeze_backbone=true, or leave [features] out"
            )
        if self.calibration.on == "left_out":
            if not (self.features and self.features.stored):
                raise ValueError(
                    "calibration.on=left_out trains one head per source on stored features: "
                    "add [features], or set calibration.on=validation"
                )
            if self.run.init_from:
                raise ValueError(
                    "calibration.on=left_out needs an untrained head, and this one starts from "
                    f"{self.run.init_from}: set calibration.on=validation"
                )


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe(Recipe):
    """Recipe with complete preprocessing settings, made by `model.backbones.resolve.resolved`."""

    preprocess: Preprocess


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten the nested tables of a recipe: {"optim": {"lr": 1}} becomes {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        flat |= flat_settings(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def check_run_name(name: str) -> None:
    """Refuse a name that points outside the folder of all runs or that looks like a checkpoint.

    Raises:
        ValueError: the name is empty, hidden, temporary (`.partial`), not printable, or `step_...`.
    """
    for part in name.split("/"):
        is_line = printable(part).split("\n") == [part]
        if not part or part.startswith(".") or is_partial(Path(part)) or not is_line:
            raise ValueError(
                f"a run cannot be called {name!r}: use letters and digits, slashes only between "
                "them, and no dot at the start"
            )
        if STEP_FOLDER.fullmatch(part):
            raise ValueError(f"a run cannot be called {name!r}: that is a name of checkpoints")
