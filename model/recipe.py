"""The recipe: everything that decides what a run computes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from model.backbones.made_with import made_with
from model.calibrate import Calibrating
from model.checkpoint import STEP_FOLDER
from model.features.store import Features
from model.network import Network
from model.tracking.tracker import TrackerName
from model.training.forgetting import Gate
from model.training.optim import Optim
from pipeline.augment import FILTERS, AugmentPolicy, Filter, Preprocess, PreprocessSettings
from pipeline.loader import Loading
from pipeline.replay import Replay


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

    `log_every` and `save_every` are in steps; a checkpoint is saved at each epoch's end anyway.
    `validate_every` is in epochs; the last is always validated, and only what was validated can be
    the best. `stop_after_no_gain` ends the run after so many validations in a row without a gain of
    the figure that chooses the best checkpoint; 0 never does. `grad_accum_steps` takes each batch
    in so many pieces, which saves memory and changes nothing else. `tracker` names a program that
    gets the run's figures beside TensorBoard.
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
class Recipe:
    """Everything that decides what a run computes; `recipes/` holds them as TOML. `name` is the
    run's folder below that of all runs; with slashes in it, one further below. With `features` the
    head of a frozen backbone is trained from features that are computed once. What `preprocess` and
    `network` leave to the weights is filled by `resolved`.
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
    """A recipe that states all of its preprocessing, made by `resolved`."""

    preprocess: Preprocess


def resolved(recipe: Recipe) -> ResolvedRecipe:
    """The recipe with what it leaves to the network's weights filled from timm's record of them:
    mean, std, crop, resize and filter, and `img_size` of a network that is built for one size. What
    the recipe states is kept.

    Raises:
        NetworkError: timm does not know the network.
        ValueError: sizes that do not fit each other.
    """
    network, stated = recipe.network, recipe.preprocess
    made = made_with(network.name)
    options = dict(network.options)
    built_for = options.get("img_size")
    crop_size = stated.crop_size or (built_for if isinstance(built_for, int) else made.height)
    if made.fixed and not options.keys() & {"img_size", "dynamic_img_size"}:
        options |= {} if (made.height, made.width) == (crop_size,) * 2 else {"img_size": crop_size}
    preprocess = Preprocess(
        crop_size=crop_size,
        resize_size=stated.resize_size or math.floor(crop_size / min(1, made.crop_pct)),
        interpolation=stated.interpolation or nearest_filter(made.interpolation),
    )
    network = replace(
        network, mean=network.mean or made.mean, std=network.std or made.std, options=options
    )
    values = {own.name: getattr(recipe, own.name) for own in fields(recipe)}
    return ResolvedRecipe(**values | {"network": network, "preprocess": preprocess})


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The nested tables of a recipe as one level: {"optim.lr": ...}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        flat |= flat_settings(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def nearest_filter(name: str) -> Filter:
    """Of the filters that both backends have, that of Pillow's name, else bilinear."""
    return next((known for known in FILTERS if known == name), "bilinear")


def describe_preprocess(recipe: ResolvedRecipe) -> list[str]:
    """How images are seen, and a line for each difference from how the network's weights saw them
    that `preprocess` makes.
    """
    seen, made = recipe.preprocess, made_with(recipe.network.name)
    lines = [
        f"sees {seen.crop_size} x {seen.crop_size} pixels from the center of a shorter side of "
        f"{seen.resize_size} ({seen.interpolation}), mean {_list(recipe.network.mean)}, std "
        f"{_list(recipe.network.std)}"
    ]
    resize = math.floor(made.height / min(1, made.crop_pct))
    if (seen.crop_size, seen.resize_size, seen.interpolation) != (
        made.height, resize, made.interpolation,
    ) or made.squashed:  # fmt: skip
        squashed = ", squashed to a square" if made.squashed else ""
        lines.append(
            f"its weights were made with {made.width} x {made.height} of {resize} "
            f"({made.interpolation}{squashed})"
        )
    if made.interpolation not in FILTERS and seen.interpolation == "bilinear":
        lines.append(
            f"the filter {made.interpolation} of its weights is in neither backend (they have "
            f"{', '.join(FILTERS)}): bilinear takes its place"
        )
    return lines


def normalization_warnings(recipe: ResolvedRecipe) -> list[str]:
    """A line for a stated mean and one for a std that timm's weights were not made with."""
    network, made = recipe.network, made_with(recipe.network.name)
    return [
        f"network.{name} is {_list(ours)}, but timm's weights of {network.name} were made with "
        f"{_list(theirs)}: leave it out, unless yours are others"
        for name, ours, theirs in (
            ("mean", network.mean, made.mean),
            ("std", network.std, made.std),
        )
        if ours != theirs
    ]


def _list(numbers: tuple[float, ...] | None) -> str:
    return str([round(number, 4) for number in numbers or ()])


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
