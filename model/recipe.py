"""The recipe: everything that decides what a run computes."""

from dataclasses import dataclass, field
from typing import Literal

from model.checkpoint import STEP_FOLDER
from model.features.store import Features
from model.network import Network
from model.training.forgetting import Gate
from model.training.optim import Optim
from pipeline.augment import AugmentPolicy, Preprocess
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
    the best. `grad_accum_steps` takes each batch in so many pieces, which saves memory and changes
    nothing else.
    """

    epochs: int
    seed: int = 70
    init_from: str = ""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    log_every: int = 50
    save_every: int = 0
    validate_every: int = 1
    grad_accum_steps: int = 1

    def __post_init__(self) -> None:
        least = min(self.epochs, self.log_every, self.validate_every, self.grad_accum_steps)
        if least < 1 or self.save_every < 0 or self.seed < 0:
            raise ValueError(
                "needs epochs, log_every, validate_every and grad_accum_steps of at least 1, no "
                "negative number"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run computes; `recipes/` holds them as TOML. `name` is the
    run's folder below that of all runs; with slashes in it, one further below. With `features` the
    head of a frozen backbone is trained from features that are computed once.
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
    preprocess: Preprocess = field(default_factory=Preprocess)
    features: Features | None = None

    def __post_init__(self) -> None:
        check_run_name(self.name)
        if self.features and not self.network.freeze_backbone:
            raise ValueError(
                "features are computed once for a frozen backbone only: set "
                "network.freeze_backbone=true, or leave [features] out"
            )


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
