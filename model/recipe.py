"""Recipe: every setting that decides the result of a training run. Main entry: `Recipe`.

`recipes/` reads recipes from TOML. This module and its imports do not load torch, so that a wrong
recipe is refused at once.
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
"""Pattern of the folder names of a run's checkpoints. Folders with other names are no
checkpoints.
"""

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Shard sets for training and validation, and the default augmentation policy of their sources.

    `repeats` maps a source to how often each of its images is used per epoch; the default is once.
    2.5 uses every image twice and half of them a third time, 0 excludes the source. Training
    samples of one class only are refused unless `allow_one_class` is set. Images that are both in a
    training and in a validation set are refused unless `allow_shared_images` is set (for speed
    measurements only).
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
    """Length, seed and intervals of a run. `init_from` names a run: its best checkpoint gives the
    first weights.

    `log_every` and `save_every` are in steps. `validate_every` is in epochs; the last epoch is
    always validated. A checkpoint is saved after each validation, and only these checkpoints can
    become the best one. `stop_after_no_gain` ends the run after this number of consecutive
    validations without a higher selection figure; 0 disables it. `grad_accum_steps` splits each
    batch into this number of pieces, which saves memory and does not change the result. `tracker`
    names a program that receives the run's figures in addition to TensorBoard.
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
                "epochs, log_every, validate_every and grad_accum_steps must be at least 1, and "
                "save_every, seed and stop_after_no_gain must not be negative"
            )


@dataclass(frozen=True, kw_only=True)
class Network:
    """Network architecture and the source of its first weights.

    `name` is any timm classifier. `pretrained` loads timm's weights; a run that starts from a
    checkpoint or a file needs none. `init` is the initialization without weights: `timm` (sigma
    0.02, meant for wide networks) or `fan_in` (sigma 1 / sqrt(fan-in)), without which a narrow
    network hardly passes a signal and learns nothing in minutes. `freeze_bn` keeps the loaded
    statistics of batch norm.

    `head` is the classifier: `timm` reads the last features, `stages` the features of every stage,
    `class_tokens` the class tokens after the transformer blocks `blocks` (numbered from 0; later
    blocks are not computed). With `freeze_backbone` only the head learns. `options` are passed to
    `timm.create_model`. `mean` and `std` are per channel, for RGB values from 0 to 1; None selects
    those that timm records for the weights.
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
                "head class_tokens and blocks are set together: list the blocks, such as "
                f"blocks=[5, 6, 7]; got head {self.head} and blocks {list(self.blocks)}"
            )
        if list(self.blocks) != sorted({*self.blocks}) or min(self.blocks, default=0) < 0:
            raise ValueError(
                f"blocks must be different numbers from 0 in rising order; got {list(self.blocks)}"
            )
        if self.head == "class_tokens" and not self.freeze_backbone:
            raise ValueError("head class_tokens needs a frozen backbone: set freeze_backbone=true")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW with warm-up and cosine decay of the learning rate.

    `lr` is the learning rate of the head. Each layer group below has the rate of the group above
    times `layer_decay`. `layer_decay_groups` selects the groups: `none`, `block` (stem, each block,
    head: 38 groups for ConvNeXtV2-Base), `stage12` (the official ConvNeXt grouping: stem, 12
    groups, head) or `stage` (stem, each stage, head, for networks other than ConvNeXt: 9 for
    MobileNetV2).

    `warmup_ratio` is the share of all steps for the warm-up, which starts at `warmup_start_factor`
    * lr. The cosine ends at `min_lr` for the head. `ema_decay` is the decay per step of the
    averaged weights, which are validated and saved; 0 disables them.
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
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(
                f"warmup_ratio is a share of the steps, in [0, 1), got {self.warmup_ratio}"
            )


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
    """Settings for training a head on stored features, which are computed once.

    `views` is the number of augmented views stored per image: epoch e uses view 1 + e modulo
    `views`. With 0 every epoch uses the center crop of evaluation. `store` is the folder of the
    features. With `stored = false` the same views are computed from pixels in each epoch, which is
    slow and gives the same head up to rounding.
    """

    views: int = 0
    store: str = "data/features"
    stored: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.views <= 1000:
            raise ValueError(f"views must be 0 to 1000, got {self.views}")
        if not self.store:
            raise ValueError("store is empty; name a folder, such as data/features")


@dataclass(frozen=True, kw_only=True)
class Calibrating:
    """How the scores of a trained detector are turned into verdicts.

    `on` selects the scores: `validation` takes those of the validation sets. `left_out` scores
    every source with a head that was trained without it (`model/features/leave_out.py`), as if the
    source were new. With `left_out`, `threshold` selects the images of which the error rates are
    taken: all images together (`pooled`), each source (`worst_source`), or three quarters of the
    sources (`most_sources`).

    `max_fpr` is the largest share of real images that may be called "likely AI", `max_miss` the
    largest share of fakes that may be called "no sign of AI". `together` names groups of sources
    that are left out together, such as several galleries of one generator.
    """

    on: Literal["validation", "left_out"] = "validation"
    threshold: Literal["pooled", "most_sources", "worst_source"] = "most_sources"
    max_fpr: float = 0.05
    max_miss: float = 0.05
    together: dict[str, list[str]] = field(default_factory=dict)

    def group_of(self, source: str) -> str:
        """Return the group that a source is left out with. A source in no group of `together` is a
        group of its own name.
        """
        return next((name for name, of in self.together.items() if source in of), source)

    def __post_init__(self) -> None:
        if not (0 < self.max_fpr < 0.5 and 0 < self.max_miss < 0.5):
            raise ValueError(
                "max_fpr and max_miss are shares between 0 and 0.5, got "
                f"{self.max_fpr} and {self.max_miss}"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting that decides the result of a run. `recipes/` contains recipes as TOML.

    `name` is the run's folder, relative to the folder of all runs; it may contain slashes. With
    `features` the head of a frozen backbone is trained on stored features. Settings of `preprocess`
    and `network` that are not given are filled in from timm's record of the weights by
    `model.backbones.resolve.resolved`.
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
        if not part or part.startswith(".") or part.endswith(".partial") or not part.isprintable():
            raise ValueError(
                f"a run cannot be called {name!r}: use letters and digits, slashes only between "
                "them, and no dot at the start"
            )
        if STEP_FOLDER.fullmatch(part):
            raise ValueError(f"a run cannot be called {name!r}: that is a name of checkpoints")
