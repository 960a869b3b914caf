"""The recipe: everything that decides what a run computes.

A recipe is read and refused in a moment: nothing here, and nothing that it imports, loads torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from model.tracking.tracker import TrackerName
from pipeline.augment import AugmentPolicy, Preprocess, PreprocessSettings
from pipeline.loading import Loading
from pipeline.replay import Replay

STEP_FOLDER = re.compile(r"step_(\d{7,})")
"""The names that a run gives its checkpoints, and no other folder of it is one."""

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Shard sets to learn from and to validate on, and the augmentation policy of most sources.

    `repeats` says how often a source comes in an epoch, where that is not once: 2.5 is every image
    twice and half of them once more, 0 leaves a source out. Training samples of one class only are
    refused unless `allow_one_class` says that they are meant, images that are trained and validated
    on unless `allow_shared_images` does (where nothing but speed is measured).
    """

    train: list[str]
    validate: list[str]
    policy: str
    repeats: dict[str, float] = field(default_factory=dict)
    allow_one_class: bool = False
    allow_shared_images: bool = False

    def __post_init__(self) -> None:
        if any(times < 0 for times in self.repeats.values()):
            raise ValueError(f"repeats must not be negative, got {self.repeats}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """How long, how seeded, how often. `init_from` names a run whose best checkpoint is the start.

    `log_every` and `save_every` are in steps. `validate_every` is in epochs; the last is always
    validated, a checkpoint is saved after each validation, and only these can be the best.
    `stop_after_no_gain` ends the run after so many validations in a row without a gain of the
    figure that chooses the best checkpoint; 0 never does. `grad_accum_steps` takes each batch in so
    many pieces, which saves memory and changes nothing else. `tracker` names a program that gets
    the run's figures beside TensorBoard.
    """

    epochs: int
    seed: int = 70
    init_from: str = ""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    log_every: int = 50
    save_every: int = 0
    validate_every: int = 1
    stop_after_no_gain: int = 0
    grad_accum_steps: int = 1
    tracker: TrackerName = ""

    def __post_init__(self) -> None:
        least = min(self.epochs, self.log_every, self.validate_every, self.grad_accum_steps)
        if least < 1 or min(self.save_every, self.seed, self.stop_after_no_gain) < 0:
            raise ValueError(
                "needs epochs, log_every, validate_every and grad_accum_steps of at least 1, no "
                "negative number"
            )


@dataclass(frozen=True, kw_only=True)
class Network:
    """Which network, and where its first weights come from.

    `name` is any timm classifier. `pretrained` takes timm's weights over the network; a run that
    starts from a checkpoint or a file needs none. `init` is how weights are initialized otherwise:
    by timm (sigma 0.02, made for wide networks), or with sigma 1 / sqrt(fan-in), without which a
    narrow network hardly passes a signal and learns nothing in minutes. `freeze_bn` keeps the
    statistics of batch norm as they were loaded. `head` is what classifies: timm's own, which sees
    the last features, one that sees those of every stage, or one that sees the class tokens behind
    `blocks` of a transformer (numbered from 0; what comes behind the last of them is not computed).
    With `freeze_backbone` only the head learns. `options` go to `timm.create_model` as they are.
    `mean` and `std` are per channel, for RGB values in 0 to 1; None stands for those that the
    weights were made with.
    """

    name: str = "convnextv2_base.fcmae_ft_in1k"
    pretrained: bool = True
    init: Literal["timm", "fan_in"] = "timm"
    drop_path_rate: float = 0.0
    mean: Triple | None = None
    std: Triple | None = None
    freeze_bn: bool = False
    head: Literal["timm", "stages", "class_tokens"] = "timm"
    blocks: tuple[int, ...] = ()
    freeze_backbone: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.head == "class_tokens") != bool(self.blocks):
            raise ValueError(
                "head class_tokens and blocks belong together: say behind which blocks, such as "
                f"blocks=[5, 6, 7]; got head {self.head} and blocks {list(self.blocks)}"
            )
        if list(self.blocks) != sorted({*self.blocks}) or min(self.blocks, default=0) < 0:
            raise ValueError(f"blocks rise from 0 on, each once; got {list(self.blocks)}")
        if self.head == "class_tokens" and not self.freeze_backbone:
            raise ValueError("head class_tokens is for a frozen backbone: set freeze_backbone=true")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW with warm-up and cosine.

    `lr` is the head's. `layer_decay` multiplies it once per group on the way down;
    `layer_decay_groups` says what a group is: `none`, `block` (stem, each block, head: 38 for
    ConvNeXtV2-Base), `stage12` (the official ConvNeXt grouping: stem, 12 groups, head) or `stage`
    (stem, each stage, head, for networks that are no ConvNeXt: 9 for MobileNetV2). `warmup_ratio`
    is the share of all steps, starting from `warmup_start_factor` * lr; the cosine ends at `min_lr`
    for the head. `ema_decay` is the decay per step of the averaged weights that are validated and
    saved, 0 for none.
    """

    lr: float
    weight_decay: float = 0.02
    layer_decay: float = 1.0
    layer_decay_groups: Literal["none", "block", "stage", "stage12"] = "none"
    warmup_ratio: float = 0.05
    warmup_start_factor: float = 0.01
    min_lr: float = 0.0
    label_smoothing: float = 0.05
    clip_grad_norm: float = 1.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        if not (self.clip_grad_norm > 0 and self.weight_decay >= 0):
            raise ValueError(
                "needs clip_grad_norm above 0 and weight_decay of at least 0, got "
                f"{self.clip_grad_norm} and {self.weight_decay}"
            )
        if not (0 <= self.warmup_start_factor <= 1 and 0 <= self.label_smoothing <= 1):
            raise ValueError(
                "warmup_start_factor and label_smoothing are shares, from 0 to 1, got "
                f"{self.warmup_start_factor} and {self.label_smoothing}"
            )
        if not self.lr > 0 or not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"needs 0 <= min_lr <= lr, got {self.min_lr} and {self.lr}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.layer_decay}")
        if self.layer_decay < 1 and self.layer_decay_groups == "none":
            raise ValueError("layer_decay below 1 needs layer_decay_groups block, stage or stage12")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is a decay below 1, got {self.ema_decay}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio is a share of the steps, got {self.warmup_ratio}")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """When a trained checkpoint is refused. `max_forgetting` is the most that an old source may
    lose of its accuracy (balanced where it has both classes), `max_fpr` the most reals of any
    validation set that may be called fake; both are shares, and 1 refuses nothing. `mistakes` is a
    folder of kept mistakes (`python -m model mistakes add`), of which the checkpoint may have
    `max_newly_wrong` wrong that its start had right; each counts whose image is kept.
    """

    max_forgetting: float = 1.0
    max_fpr: float = 1.0
    mistakes: str = ""
    max_newly_wrong: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.max_forgetting <= 1 and 0 <= self.max_fpr <= 1):
            raise ValueError("max_forgetting and max_fpr are shares, from 0 to 1")
        if self.max_newly_wrong < 0:
            raise ValueError(f"max_newly_wrong is a count from 0 on, got {self.max_newly_wrong}")


@dataclass(frozen=True, kw_only=True)
class Features:
    """How a head is trained from features that are computed once.

    `views` is how many augmented views of each image are kept: epoch e takes view 1 + e modulo
    `views`. With 0 every epoch takes the center crop of evaluation. `store` is the folder. With
    `stored = false` the same views are computed from pixels in each epoch, which is slow and
    gives the same head to rounding.
    """

    views: int = 0
    store: str = "data/features"
    stored: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.views <= 1000:
            raise ValueError(f"views must be 0 to 1000, got {self.views}")
        if not self.store:
            raise ValueError("store names no folder; give one, such as data/features")


@dataclass(frozen=True, kw_only=True)
class Calibrating:
    """How the scores of a trained detector become verdicts.

    `on` says which scores are fitted to: those of the validation sets, or those of every source by
    a head that has not learned from it (`model/features/leave_out.py`), which is what the images
    of a new source will look like. `threshold` says over which images the errors are counted then:
    all of them together, those of the worst source, or so that three sources of four keep to the
    rate. `max_fpr` is the share of real images that may be called likely AI,
    `max_miss` the share of fakes that may be called the contrary. `together` names groups of
    sources that are left out at once, such as several galleries of one generator.
    """

    on: Literal["validation", "left_out"] = "validation"
    threshold: Literal["pooled", "most_sources", "worst_source"] = "most_sources"
    max_fpr: float = 0.05
    max_miss: float = 0.05
    together: dict[str, list[str]] = field(default_factory=dict)

    def group_of(self, source: str) -> str:
        """The group that a source is left out with; most are alone in their own."""
        return next((name for name, of in self.together.items() if source in of), source)

    def __post_init__(self) -> None:
        if not (0 < self.max_fpr < 0.5 and 0 < self.max_miss < 0.5):
            raise ValueError(
                "max_fpr and max_miss are shares between 0 and 0.5, got "
                f"{self.max_fpr} and {self.max_miss}"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run computes; `recipes/` holds them as TOML. `name` is the
    run's folder below that of all runs; with slashes in it, one further below. With `features` the
    head of a frozen backbone is trained from features that are computed once. What `preprocess` and
    `network` leave to the weights is filled by `model.backbones.resolve.resolved`.
    """

    name: str
    data: Data
    augment: dict[str, AugmentPolicy]
    network: Network
    optim: Optim
    run: Run
    loading: Loading = field(default_factory=Loading)
    replay: Replay = field(default_factory=Replay)
    gate: Gate = field(default_factory=Gate)
    preprocess: PreprocessSettings = field(default_factory=PreprocessSettings)
    features: Features | None = None
    calibration: Calibrating = field(default_factory=Calibrating)

    def __post_init__(self) -> None:
        check_run_name(self.name)
        if self.features and not self.network.freeze_backbone:
            raise ValueError(
                "features are computed once for a frozen backbone only: set "
                "network.freeze_backbone=true, or leave [features] out"
            )
        if self.calibration.on == "left_out":
            if not (self.features and self.features.stored):
                raise ValueError(
                    "calibration.on=left_out trains the head again for each source, from stored "
                    "features: add [features], or set calibration.on=validation"
                )
            if self.run.init_from:
                raise ValueError(
                    "calibration.on=left_out needs a head that has learned nothing before, and "
                    f"this one starts from {self.run.init_from}: set calibration.on=validation"
                )


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe(Recipe):
    """A recipe that states all of its preprocessing, made by `model.backbones.resolve.resolved`."""

    preprocess: Preprocess


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The nested tables of a recipe as one level: {"optim.lr": ...}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        flat |= flat_settings(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def check_run_name(name: str) -> None:
    """Refuse a name that leads out of the folder of all runs, or that no run is found by.

    Raises:
        ValueError: what is wrong with it.
    """
    for part in name.split("/"):
        if not part or part.startswith(".") or part.endswith(".partial") or not part.isprintable():
            raise ValueError(
                f"a run cannot be called {name!r}: give letters and digits, with slashes only "
                "between them, and no dot first"
            )
        if STEP_FOLDER.fullmatch(part):
            raise ValueError(f"a run cannot be called {name!r}: checkpoints are called so")
