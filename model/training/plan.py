"""Plan a training run: whatever is decided, opened or refused is, before anything is built.

`model/training/assemble.py` builds what a `RunPlan` says, `model/training/run.py` runs it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from installed import command
from model import checkpoint
from model.backbones.resolve import describe_preprocess, normalization_warnings, resolved
from model.device import choose_device, choose_precision, describe
from model.distributed import DistEnv
from model.features.loader import FeatureSource
from model.mistakes.gate import START_FILE, check_mistakes
from model.network import (
    build,
    check_backbone_file,
    check_pretrained,
    check_size,
    timm_license,
)
from model.recipe import Recipe, ResolvedRecipe, flat_settings
from model.tracking.tracker import check_tracker
from model.training.optim import parameter_groups
from model.training.sets import check_apart, check_sets, open_stream, open_validation
from model.training.validation import Gain, Validation
from pipeline.stream import Stream
from sharding.format import CLASSES, ShardSet
from storage import AnyPath, sha256_of

BASELINE_FILE = "baseline_metrics.json"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where the weights of a network come from. `path` is a checkpoint folder or an ImageNet
    `.safetensors` file, None for timm's own weights and for random ones; `sha256` is the hash of
    the file that holds the weights, empty where there is none yet.
    """

    kind: Literal["checkpoint", "imagenet", "timm", "random"]
    path: Path | None = None
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best checkpoint of a run so far, and its validation, None if it has none."""

    path: Path
    validation: Validation | None


def better(best: Best | None, new: Best) -> Best:
    """The checkpoint with the higher selection figure, the new one if they are equal. One without
    validation is worse than any that has one.
    """
    if best is None or best.validation is None:
        return new
    if new.validation is None or new.validation.selection < best.validation.selection:
        return best
    return new


@dataclass(frozen=True, kw_only=True, eq=False)
class RunPlan:
    """What a run will do, on this rank. Made by `plan`; nothing is looked up afterward.

    `resumed` is the checkpoint of this run from which it goes on after `done` of its `steps`, None
    for a new run; `best` is its best one, `gain` how its validations went, and `ended` why it is
    over, empty where it is not. `damaged` says of each other checkpoint of the run why it is not
    used; `warnings` are what the user should look at. `weights` are the first ones that are loaded,
    `first_weights` is where those of the run's first step came from (see `_first_weights`),
    `teacher` those that replayed samples are held to. `baseline` is the file of what the detector
    knew before the run, None where the run starts from no trained detector. `validation` holds the
    sets that choose the best checkpoint, by name, and `stream` the batches. `features` is where
    stored features lie, None where the run reads images; it is known once the network is
    (`model/features/prepare.py`).
    """

    recipe: ResolvedRecipe = field(repr=False)
    data: AnyPath
    folder: Path
    resumed: Path | None
    damaged: tuple[str, ...]
    warnings: tuple[str, ...]
    done: int
    steps: int
    steps_per_epoch: int
    best: Best | None = field(repr=False)
    gain: Gain
    ended: str
    weights: Weights
    first_weights: Mapping[str, Any] | None
    teacher: Weights | None
    baseline: Path | None
    stream: Stream = field(repr=False)
    validation: Mapping[str, ShardSet] = field(repr=False)
    parameters: int
    learning_rates: tuple[float, ...]
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str
    compiled: bool
    compiled_reason: str
    dist: DistEnv
    features: FeatureSource | None = None

    @property
    def finished(self) -> bool:
        """Whether every step is done, or no more will be."""
        return self.done == self.steps or bool(self.ended)

    def describe(self) -> list[str]:
        """What will run, and every choice that was made for the user, a line each."""
        recipe, stream, loader = self.recipe, self.stream, self.stream.loader
        least, most = self.learning_rates[0], self.learning_rates[-1]
        rates = (
            f"{len(self.learning_rates)} learning rates from {least:.2g} to {most:.2g}"
            if least < most
            else f"learning rate {most:.2g}"
        )
        labels = stream.pool.shards.column("label")[stream.new(0)]
        counts = ", ".join(f"{int((labels == c).sum()):,} {name}" for c, name in enumerate(CLASSES))
        left = (len(labels) + stream.replayed_per_epoch) % loader.global_batch
        return [
            *([f"going on from {self.resumed}"] if self.resumed else []),
            *([f"weights from {self.weights.path}"] if self.weights.path else []),
            f"first weights: {_words_for(self.first_weights)}",
            f"{describe(self.dtype)} on {self.device} ({self.dtype_reason})",
            f"{recipe.name}: {recipe.network.name}, {self.parameters / 1e6:.1f} M parameters, "
            f"{rates}",
            *describe_preprocess(recipe),
            f"per epoch {len(labels):,} new samples ({counts}) and {stream.replayed_per_epoch:,} "
            f"old ones, less the last {left} that fill no batch; {recipe.run.epochs} epochs, "
            f"{self.steps:,} steps of {loader.global_batch}",
            f"images through {loader.backend} ({loader.reason})",
            f"torch.compile {'on' if self.compiled else 'off'} ({self.compiled_reason})",
        ]


def plan(
    recipe: Recipe,
    data: AnyPath,
    runs: Path,
    *,
    init_from: Path | None = None,
    device: str = "auto",
    dist: DistEnv | None = None,
) -> RunPlan:
    """Decide, open and check all that a run of `recipe` in `runs` needs; nothing is written.

    `init_from` is a checkpoint folder or an ImageNet `.safetensors` file to begin from instead of
    what the recipe says. A run of the same recipe in `runs` is continued.

    Raises:
        ValueError: what stops the run before it begins: recipe, data, checkpoint, network, weights,
            device; the message says what to do.
    """
    check_tracker(recipe.run.tracker)
    dist, recipe = dist or DistEnv(), resolved(recipe)
    folder = runs / recipe.name
    whole, damaged = _checkpoints_of(folder)
    resumed = whole[-1] if whole else None
    if resumed:
        _check_same_recipe(resumed, recipe)
        _check_same_start(resumed, init_from)
    where = choose_device(device, dist.local_rank)
    dtype, dtype_reason = choose_precision(recipe.run.precision, where)
    stream = open_stream(recipe, data, where, dist)
    validation = open_validation(recipe, data)
    check_sets(recipe, stream)
    check_apart(recipe, stream, validation)
    starts_trained = _starts_trained(recipe, init_from)
    if recipe.gate.mistakes and starts_trained:
        check_mistakes(recipe.gate, folder / START_FILE if resumed else None)
    weights, teacher = _weights(recipe, runs, init_from, resumed)
    parameters, learning_rates = _check_network(recipe, weights, teacher)
    state = checkpoint.load_state(resumed, lazy=True) if resumed else {}
    done = stream.resume(state["order"]) if resumed else 0
    compiled, compiled_reason = _choose_compile(recipe.run.compile, where)
    return RunPlan(
        recipe=recipe,
        data=data,
        folder=folder,
        resumed=resumed,
        damaged=damaged,
        warnings=_warnings(recipe, weights, starts_trained),
        done=done,
        steps=stream.steps_per_epoch * recipe.run.epochs,
        steps_per_epoch=stream.steps_per_epoch,
        best=_best(whole),
        gain=Gain(**state.get("gain", {})),
        ended=(checkpoint.read_meta(resumed).get("ended") or "") if resumed else "",
        weights=weights,
        first_weights=_first_weights(recipe, weights, resumed),
        teacher=teacher,
        baseline=folder / BASELINE_FILE if starts_trained else None,
        stream=stream,
        validation=validation,
        parameters=parameters,
        learning_rates=learning_rates,
        device=where,
        dtype=dtype,
        dtype_reason=dtype_reason,
        compiled=compiled,
        compiled_reason=compiled_reason,
        dist=dist,
    )


_DECIDE_NOTHING = {
    "loading.batch_size",  # of one rank; the order refuses another global batch
    "loading.num_workers",
    "loading.cache",
    "loading.cache_gb",
    "loading.verify_checksums",
    "loading.stall_warning_s",
    "loading.stall_error_s",
    "features.store",
    "run.log_every",
    "run.save_every",
    "run.tracker",
}
"""What another machine, or another number of them, may set anew when it goes on with a run."""


def _checkpoints_of(folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The whole checkpoints of a run, and of each other one why it is not used.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    whole, damaged = checkpoint.whole_checkpoints(folder)
    if damaged and not whole:
        raise checkpoint.CheckpointError(
            f"{damaged[-1]}; no whole checkpoint lies in {folder}: take one from a copy, or use "
            "--run NAME for a new run"
        )
    return whole, tuple(damaged)


def _check_same_start(resumed: Path, init_from: Path | None) -> None:
    """Refuse `--init-from` for a run that began from other weights: it would change nothing.

    Raises:
        ValueError: with what the run began from.
    """
    if init_from is None:
        return
    began = checkpoint.read_meta(resumed)["first_weights"]
    if began is None or _weights_at(init_from).sha256 != began["sha256"]:
        raise ValueError(
            f"{resumed.parent} holds a run that began from other weights than {init_from}: "
            f"{_words_for(began)}; leave --init-from out to go on with it, or use --run NAME for a "
            "new run"
        )


def _check_same_recipe(resumed: Path, recipe: Recipe) -> None:
    """Refuse to go on from a checkpoint of another recipe.

    Raises:
        ValueError: with the first setting that differs.
    """
    before = flat_settings(checkpoint.read_meta(resumed)["recipe"])
    now = flat_settings(_as_saved(recipe))
    changed = sorted(
        key
        for key in (before.keys() | now.keys()) - _DECIDE_NOTHING
        if before.get(key) != now.get(key)
    )
    if changed:
        key = changed[0]
        raise ValueError(
            f"{resumed.parent} holds a run of another recipe ({key} was {before.get(key)}, now "
            f"{now.get(key)}; {len(changed)} differ); use --run NAME for a new run"
        )


def _as_saved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON gives it back."""
    return json.loads(json.dumps(asdict(recipe)))


def _weights(
    recipe: Recipe, runs: Path, init_from: Path | None, resumed: Path | None
) -> tuple[Weights, Weights | None]:
    """The weights that are loaded first, and those of the teacher.

    Raises:
        CheckpointError: no such checkpoint.
        ValueError: distillation without a trained detector to start from, or a frozen body of
            random weights.
    """
    distills = recipe.replay.distill_weight > 0
    init_from = (init_from or _start_of(recipe, runs)) if distills or not resumed else None
    first = resumed or init_from
    if first:
        weights = _weights_at(first)
    else:
        weights = Weights(kind="timm" if recipe.network.pretrained else "random")
    if recipe.network.freeze_backbone and weights.kind == "random":
        raise ValueError(
            "network.freeze_backbone keeps the body as it is, and its weights would be random: "
            "give some with --init-from weights.safetensors (see docs/training.md), or with "
            "--set network.pretrained=true"
        )
    if not distills:
        return weights, None
    if init_from is None or init_from.suffix == ".safetensors":
        raise ValueError("replay.distill_weight needs a run that starts from a trained checkpoint")
    return weights, _weights_at(init_from)


def _weights_at(path: Path) -> Weights:
    """A checkpoint folder or an ImageNet file as the source of weights."""
    if path.suffix == ".safetensors":
        return Weights(kind="imagenet", path=path, sha256=sha256_of(path))
    return Weights(kind="checkpoint", path=path, sha256=checkpoint.check_weights(path))


def _first_weights(
    recipe: Recipe, weights: Weights, resumed: Path | None
) -> Mapping[str, Any] | None:
    """Where the weights of the run's first step came from, as `meta.json` keeps it: `kind` as in
    `Weights`, `name` (of the run and its checkpoint, of the file or of timm's network), `sha256`
    (empty for timm's and random ones), `license` where timm says one, and for a checkpoint its own
    `first_weights`. No path of this machine is in it.
    """
    if resumed:
        return checkpoint.read_meta(resumed)["first_weights"]
    path, name = weights.path, ""
    origin: dict[str, Any] = {"license": None, "first_weights": None}
    if weights.kind == "checkpoint" and path:
        name = f"{path.absolute().parent.name}/{path.absolute().name}"
        origin["first_weights"] = checkpoint.read_meta(path)["first_weights"]
    elif path:
        name = path.name
    elif weights.kind == "timm":
        name, origin["license"] = recipe.network.name, timm_license(recipe.network.name)
    return origin | {"kind": weights.kind, "name": name, "sha256": weights.sha256}


def _words_for(first_weights: Mapping[str, Any] | None) -> str:
    """What `_first_weights` found, for people."""
    if first_weights is None:
        return "not recorded"
    kind, name = first_weights["kind"], first_weights["name"]
    digest = f" (sha256 {first_weights['sha256'][:12]})"
    return {
        "checkpoint": f"checkpoint {name}{digest}",
        "imagenet": f"file {name}{digest}",
        "timm": f"timm's {name} (license {first_weights['license']})",
        "random": "random, nothing is pretrained",
    }[kind]


def _start_of(recipe: Recipe, runs: Path) -> Path | None:
    """The best checkpoint of the run this recipe starts from, if it names one."""
    if not recipe.run.init_from:
        return None
    best = checkpoint.best_of(runs / recipe.run.init_from)
    if best is None:
        raise checkpoint.CheckpointError(
            f"{recipe.name} starts from the best checkpoint of {runs / recipe.run.init_from}, "
            f"which has none; run `{command('train')} --phase 1` first, or name one with "
            "--init-from CHECKPOINT"
        )
    return best


def _starts_trained(recipe: Recipe, init_from: Path | None) -> bool:
    """Whether the run starts from a trained detector, which it may then make forget."""
    if init_from is not None:
        return init_from.suffix != ".safetensors"
    return bool(recipe.run.init_from)


def _check_network(
    recipe: ResolvedRecipe, weights: Weights, teacher: Weights | None
) -> tuple[int, tuple[float, ...]]:
    """How many parameters the network has and its different learning rates, ascending.

    Raises:
        NetworkError: a network that timm does not know or that takes no images of this size,
            weights that do not fit it or that cannot be fetched.
        OptimError: a parameter that belongs to no layer group.
    """
    outline = build(recipe.network, pretrained=False, empty=True)
    parameters = sum(parameter.numel() for parameter in outline.parameters())
    rates = {group["base_lr"] for group in parameter_groups(outline.backbone, recipe.optim)}
    check_size(outline, recipe.network.name, recipe.preprocess.crop_size)
    if weights.path is None:
        if weights.kind == "timm":
            check_pretrained(recipe.network)
    elif weights.kind == "imagenet":
        check_backbone_file(outline, weights.path)
    else:
        checkpoint.check(weights.path, outline)
    if teacher and teacher.path:
        checkpoint.check(teacher.path)
    return parameters, tuple(sorted(rates))


def _warnings(recipe: ResolvedRecipe, weights: Weights, starts_trained: bool) -> tuple[str, ...]:
    """What may be a mistake: a mean or std that timm's weights were not made with, images that are
    seen otherwise than by the checkpoint that the run begins from, or a gate that nothing is held
    against.
    """
    unused = () if starts_trained or not recipe.gate.mistakes else (
        f"gate.mistakes ({recipe.gate.mistakes}) is not used: this run starts from no trained "
        "detector, so no mistake can be new",
    )  # fmt: skip
    if weights.kind in ("timm", "imagenet"):
        return (*unused, *normalization_warnings(recipe))
    if weights.path is None:
        return unused
    before, now = checkpoint.read_meta(weights.path), _as_saved(recipe)
    seen = before["preprocess"], before["recipe"]["network"]
    differ = [
        f"{table}.{name} is {now[table][name]}, in {weights.path} it was {there[name]}"
        for table, there in zip(("preprocess", "network"), seen, strict=True)
        for name in ("crop_size", "resize_size", "interpolation", "mean", "std")
        if name in there and there[name] != now[table][name]
    ]
    return (*unused, *differ)


def _best(whole: Sequence[Path]) -> Best | None:
    """The best of the whole checkpoints of a run."""
    path = checkpoint.best_among(whole)
    if path is None:
        return None
    metrics = checkpoint.read_meta(path)["metrics"]
    return Best(path=path, validation=Validation.from_json(metrics) if metrics else None)


def _choose_compile(asked: str, device: torch.device) -> tuple[bool, str]:
    """Whether torch.compile is used, and why."""
    if asked != "auto":
        return asked == "on", "asked for"
    pays = device.type == "cuda"
    return pays, f"{'pays' if pays else 'does not pay'} on {device.type}"
