"""Plan a training run: whatever is decided, opened or refused is, before anything is built.

`model/training/assemble.py` builds what a `RunPlan` says, `model/training/run.py` runs it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import recipes
from model import checkpoint
from model.device import choose_device, choose_precision, describe
from model.distributed import DistEnv
from model.network import build, check_backbone_file, check_pretrained
from model.recipe import Recipe
from model.training.optim import parameter_groups
from model.training.validation import Validation
from pipeline.loader import open_loader, train_params
from pipeline.stream import Stream, open_pool
from sharding.format import CLASSES, ShardSet, open_shards
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
    for a new run; `best` is its best one. `weights` are the first ones that are loaded, `teacher`
    those that replayed samples are held to. `baseline` is the file of what the detector knew before
    the run, None where the run starts from no trained detector. `validation` holds the sets that
    choose the best checkpoint, by name, and `stream` the batches.
    """

    recipe: Recipe = field(repr=False)
    data: AnyPath
    folder: Path
    resumed: Path | None
    done: int
    steps: int
    steps_per_epoch: int
    best: Best | None = field(repr=False)
    weights: Weights
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

    @property
    def finished(self) -> bool:
        """Whether every step is done."""
        return self.done == self.steps

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
            f"{describe(self.dtype)} on {self.device} ({self.dtype_reason})",
            f"{recipe.name}: {recipe.network.name}, {self.parameters / 1e6:.1f} M parameters, "
            f"{rates}",
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
    dist = dist or DistEnv()
    folder = runs / recipe.name
    resumed = checkpoint.last_of(folder)
    if resumed:
        _check_same_recipe(resumed, recipe)
    where = choose_device(device, dist.local_rank)
    dtype, dtype_reason = choose_precision(recipe.run.precision, where)
    stream = open_stream(recipe, data, where, dist)
    validation = _open_validation(recipe, data)
    _check_sets(recipe, stream)
    weights, teacher = _weights(recipe, runs, init_from, resumed)
    parameters, learning_rates = _check_network(recipe, weights, teacher)
    done = stream.resume(checkpoint.load_state(resumed, lazy=True)["order"]) if resumed else 0
    compiled, compiled_reason = _choose_compile(recipe.run.compile, where)
    return RunPlan(
        recipe=recipe,
        data=data,
        folder=folder,
        resumed=resumed,
        done=done,
        steps=stream.steps_per_epoch * recipe.run.epochs,
        steps_per_epoch=stream.steps_per_epoch,
        best=_best(folder) if resumed else None,
        weights=weights,
        teacher=teacher,
        baseline=folder / BASELINE_FILE if _starts_trained(recipe, init_from) else None,
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
    "run.log_every",
    "run.save_every",
}
"""What another machine, or another number of them, may set anew when it goes on with a run."""


def _check_same_recipe(resumed: Path, recipe: Recipe) -> None:
    """Refuse to go on from a checkpoint of another recipe.

    Raises:
        ValueError: with the first setting that differs.
    """
    before = _flat(_completed(checkpoint.read_meta(resumed)["recipe"], type(recipe)))
    now = _flat(_as_saved(recipe))
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


def _completed(values: dict[str, Any], kind: type[Recipe]) -> dict[str, Any]:
    """A saved recipe with the defaults of settings that are younger than it."""
    try:
        return _as_saved(recipes.build(kind, values, ""))
    except recipes.RecipeError:
        return values  # it has settings that are gone: they will be named


def _as_saved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON gives it back."""
    return json.loads(json.dumps(asdict(recipe)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one level: {"optim.lr": ...}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def open_stream(
    recipe: Recipe, data: AnyPath, device: torch.device, dist: DistEnv | None = None
) -> Stream:
    """The run's batches on this rank, from the sets below `data`.

    Raises:
        ShardError: a set that is not there or cannot be used.
        LoadError: the backend that was asked for is not there.
    """
    dist = dist or DistEnv()
    if not recipe.data.train:
        raise ValueError('data.train names no set; name one, such as data.train=["phase1"]')
    pool = open_pool(data, recipe.data.train, recipe.replay)
    loader = open_loader(
        pool.shards, preprocess=recipe.preprocess, loading=recipe.loading, device=device,
        rank=dist.rank, world_size=dist.world_size,
    )  # fmt: skip
    return Stream(
        loader,
        pool,
        recipe.replay,
        recipe.augment,
        recipe.data.policy,
        recipe.run.seed,
        recipe.data.repeats,
    )


def _open_validation(recipe: Recipe, data: AnyPath) -> dict[str, ShardSet]:
    """The validation sets by the name of their folder, under which their metrics are kept.

    Raises:
        ValueError: no set, or two of one name.
        ShardError: a set that is not there or cannot be used.
    """
    folders = [data / name for name in recipe.data.validate]
    if not folders:
        raise ValueError(
            "data.validate names no set, and only what was validated can be the best checkpoint; "
            'name one, such as data.validate=["val"]'
        )
    names = [folder.name for folder in folders]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"data.validate names {', '.join(twice)} more than once; name each once")
    return {folder.name: open_shards([folder]) for folder in folders}


def _check_sets(recipe: Recipe, stream: Stream) -> None:
    """Refuse sets that the recipe does not fit.

    Raises:
        LoadError: a source of `data.repeats` that is not there, or a policy that is not described.
        OrderError: too few samples for a batch.
        ValueError: nothing to replay, or a source of `replay.exclude_sources` that is not there.
    """
    shards, seed = stream.pool.shards, recipe.run.seed
    sources = shards.codes("source")[1]
    if unknown := sorted(set(recipe.replay.exclude_sources) - set(sources)):
        raise ValueError(
            f"replay.exclude_sources names source {', '.join(unknown)}; the sets hold "
            f"{', '.join(sources)}"
        )
    stream.epoch(0)
    train_params(shards, recipe.augment, recipe.data.policy, recipe.preprocess, seed, 0)


def _weights(
    recipe: Recipe, runs: Path, init_from: Path | None, resumed: Path | None
) -> tuple[Weights, Weights | None]:
    """The weights that are loaded first, and those of the teacher.

    Raises:
        CheckpointError: no such checkpoint.
        ValueError: distillation without a trained detector to start from.
    """
    distills = recipe.replay.distill_weight > 0
    init_from = (init_from or _start_of(recipe, runs)) if distills or not resumed else None
    first = resumed or init_from
    if first:
        weights = _weights_at(first)
    else:
        weights = Weights(kind="timm" if recipe.network.pretrained else "random")
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


def _start_of(recipe: Recipe, runs: Path) -> Path | None:
    """The best checkpoint of the run this recipe starts from, if it names one."""
    if not recipe.run.init_from:
        return None
    best = checkpoint.best_of(runs / recipe.run.init_from)
    if best is None:
        raise checkpoint.CheckpointError(
            f"{recipe.name} starts from the best checkpoint of {runs / recipe.run.init_from}, "
            "which has none; run `python train.py --phase 1` first, or name one with --init-from "
            "CHECKPOINT"
        )
    return best


def _starts_trained(recipe: Recipe, init_from: Path | None) -> bool:
    """Whether the run starts from a trained detector, which it may then make forget."""
    if init_from is not None:
        return init_from.suffix != ".safetensors"
    return bool(recipe.run.init_from)


def _check_network(
    recipe: Recipe, weights: Weights, teacher: Weights | None
) -> tuple[int, tuple[float, ...]]:
    """How many parameters the network has and its different learning rates, ascending.

    Raises:
        NetworkError: a network that timm does not know, weights that do not fit it or that cannot
            be fetched.
        OptimError: a parameter that belongs to no layer group.
    """
    outline = build(recipe.network, pretrained=False, empty=True)
    parameters = sum(parameter.numel() for parameter in outline.parameters())
    rates = {group["base_lr"] for group in parameter_groups(outline.backbone, recipe.optim)}
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


def _best(folder: Path) -> Best | None:
    """The best checkpoint in the folder of a run."""
    path = checkpoint.best_of(folder)
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
