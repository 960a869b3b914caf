"""Plan a training run: decide, open and check everything before anything is built or written.

Main entry: `plan(recipe, data, runs, *, init_from, device, dist)`. The last three may be left out.

- `recipe`: a `Recipe`, as `recipes.load(Recipe, path)` reads it from a TOML file.
- `data`: the `Path` (or `UPath`) of the folder of all shard sets (packed images).
- `runs`: the `Path` of the folder of all runs; this run's folder is `runs/<recipe.name>`.
- `init_from`: the `Path` of the first weights, a checkpoint, a run (its best checkpoint) or an
  ImageNet `.safetensors` file; None (default): those that the recipe says.
- `device`: a text, `auto` (the default: this rank's GPU, else the CPU), `cpu`, `cuda` or `cuda:N`.
- `dist`: a `DistEnv`, as `init_distributed()` yields it; None (default): one process.

It returns a `RunPlan`, which has these and more fields:

- `resumed`: the `Path` of the run's last undamaged checkpoint, to resume from; None for a new run.
- `folder`: the `Path` of the run's folder. `finished`: whether the run is over (bool).
- `done`: the number of steps that were made before `resumed` was saved; 0 for a new run.
- `steps`: the number of steps of the whole run.
- `weights`: the `Weights` that are loaded first, with their `kind` and `path`.
- `stream`: the training batches; `validation`: a dict, name -> opened validation set.
- `device` and `dtype` (of torch), with which the run computes.

It raises `ValueError` for any error in the input, also if the run's folder holds a run of another
recipe or from other first weights than `init_from`. It raises `OSError` for a file that cannot be
read. `assemble.py` builds the objects of a plan, and `run.py` runs it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import recipes
from console import counted
from installed import command
from model import checkpoint
from model.backbones.resolve import describe_preprocess, normalization_warnings, resolved
from model.device import choose_compile, choose_device, choose_precision, describe
from model.distributed import DistEnv
from model.features.fit import check_fit
from model.features.loader import FeatureSource
from model.inference.fitness import generators_seen, sets_seen
from model.metrics import Validation
from model.mistakes.gate import START_FILE, check_mistakes
from model.network import (
    build,
    check_backbone_file,
    check_pretrained,
    check_size,
    timm_license,
)
from model.recipe import BASELINE_FILE, Recipe, ResolvedRecipe
from model.tracking.tracker import check_tracker
from model.training.optim import parameter_groups
from model.training.resume import (
    as_saved,
    check_same_recipe,
    ended_of,
    progress_of,
    resumable_checkpoints,
    unfinished_of,
)
from model.training.sets import (
    check_apart,
    check_sets,
    open_stream,
    open_validation,
    unjudged_limits,
    warnings_of,
)
from model.training.validation import Best, Gain
from pipeline.stream import Stream
from sharding.format import CLASSES, ShardSet
from storage import AnyPath, sha256_of


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Source of a network's weights. `path` is a checkpoint folder, or a `.safetensors` file of a
    backbone; None for timm's own weights and for random ones. `sha256` is the hash of the weights
    file, empty if there is no file. `data` is a checkpoint's record of its training data.
    """

    kind: Literal["checkpoint", "file", "timm", "random"]
    path: Path | None = None
    sha256: str = ""
    data: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunPlan:
    """Plan of a run on this rank, made by `plan` and complete: later code looks nothing up again.

    `resumed` is the run's checkpoint to resume from, after `done` of its `steps`; None for a new
    run. `best` is its best checkpoint, `gain` the record of its validations, and `ended` the reason
    why the run is over, empty if it is not. `damaged` lists why other checkpoints of the run are
    not used; those of `spared` are not deleted. `warnings` are lines for the user.

    `weights` are loaded first. `first_weights` is the origin of the weights of the run's first step
    (see `_first_weights`). `teacher` gives the target logits of replayed samples, None without
    distillation. `baseline` is the file for the metrics before the first step, None unless the run
    starts from a trained detector.

    `validation` maps names to the sets that choose the best checkpoint. `stream` yields the
    batches. `features` is the source of stored features, None if the run reads images; it is set
    after the network is built (`model/training/assemble.py`).
    """

    recipe: ResolvedRecipe = field(repr=False)
    data: AnyPath
    folder: Path
    resumed: Path | None
    damaged: tuple[str, ...]
    spared: frozenset[Path]
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
        """Whether all steps are done and validated, or the run ended early."""
        return bool(self.ended)

    def describe(self) -> list[str]:
        """Describe the run and every automatic choice, a line each."""
        recipe, stream, loader = self.recipe, self.stream, self.stream.loader
        least, most = self.learning_rates[0], self.learning_rates[-1]
        labels = stream.pool.shards.column("label")[stream.new(0)]
        if recipe.optim.solver == "lbfgs":
            how = f"L-BFGS of at most {recipe.optim.iterations} iterations"
            work, left = "fitted together", ""
        else:
            many = f"{len(self.learning_rates)} learning rates from {least:.2g} to {most:.2g}"
            how = many if least < most else f"learning rate {most:.2g}"
            work = f"{self.steps:,} steps of {loader.global_batch}"
            rest = (len(labels) + stream.replayed_per_epoch) % loader.global_batch
            left = f", without the last {rest} that fill no batch"
        counts = ", ".join(f"{int((labels == c).sum()):,} {name}" for c, name in enumerate(CLASSES))
        return [
            *([f"resuming from {self.resumed}"] if self.resumed else []),
            *([f"weights from {self.weights.path}"] if self.weights.path else []),
            f"first weights: {_words_for(self.first_weights)}",
            f"{describe(self.dtype)} on {self.device} ({self.dtype_reason})",
            f"{recipe.name}: {recipe.network.name}, {self.parameters / 1e6:.1f} M parameters, "
            f"{how}",
            *describe_preprocess(recipe, of_timm=_of_timm(self.first_weights)),
            f"per epoch {len(labels):,} new samples ({counts}) and {stream.replayed_per_epoch:,} "
            f"old ones{left}; {counted(recipe.run.epochs, 'epoch')}, {work}",
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
    """Decide, open and check everything that a run of `recipe` in `runs` needs. Nothing is written.

    `init_from` is a checkpoint, a run (its best checkpoint) or an ImageNet `.safetensors` file for
    the first weights; it overrides the recipe. If `runs` contains a run of the same recipe, the
    plan resumes it.

    Raises:
        ValueError: an error in the recipe, data, checkpoint, network, weights or device; the
            message says what to do.
    """
    check_tracker(recipe.run.tracker)
    dist, recipe = dist or DistEnv(), resolved(recipe)
    if init_from is not None and init_from.suffix != ".safetensors":
        init_from = checkpoint.checkpoint_at(init_from) or init_from
    folder = runs / recipe.name
    whole, damaged = resumable_checkpoints(folder)
    resumed = next((one for one in reversed(whole) if (one / checkpoint.STATE_FILE).exists()), None)
    if resumed:
        check_same_recipe(resumed, recipe)
        _check_same_start(resumed, init_from)
    where = choose_device(device, dist.local_rank)
    dtype, dtype_reason = choose_precision(recipe.run.precision, where)
    stream = open_stream(recipe, data, where, dist)
    validation = open_validation(recipe, data)
    check_sets(recipe, stream)
    check_apart(recipe, stream, validation)
    starts_trained = _starts_trained(recipe, init_from, resumed)
    blind = unjudged_limits(recipe, stream, validation, starts_trained)
    _refuse_left_out(recipe, starts_trained, init_from)
    if blind and not resumed:  # or the gate would refuse the checkpoint
        raise ValueError(f"{blind[0]}: add such a set to data.validate, or leave out the limit")
    if recipe.gate.mistakes and starts_trained:
        check_mistakes(recipe.gate, folder / START_FILE if resumed else None)
    weights, teacher = _weights(recipe, runs, init_from, resumed)
    parameters, learning_rates = _check_network(recipe, weights, teacher)
    done, gain = progress_of(resumed, stream, validation) if resumed else (0, Gain())
    compiled, compiled_reason = choose_compile(recipe.run.compile, where)
    return RunPlan(
        recipe=recipe,
        data=data,
        folder=folder,
        resumed=resumed,
        damaged=damaged,
        spared=frozenset(checkpoint.checkpoints_of(folder)) - {*whole},
        warnings=(
            *_warnings(recipe, weights, starts_trained, resumed),
            *warnings_of(recipe, stream),
            *(f"{limit}: the gate will refuse the checkpoint" for limit in blind),
        ),
        done=done,
        steps=stream.steps_per_epoch * recipe.run.epochs,
        steps_per_epoch=stream.steps_per_epoch,
        best=_best(whole),
        gain=gain,
        ended=ended_of(resumed, done, stream.steps_per_epoch * recipe.run.epochs),
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


def _refuse_left_out(recipe: Recipe, starts_trained: bool, init_from: Path | None) -> None:
    """Refuse a calibration on sources left out for a trained head: it has seen them.

    Raises:
        ValueError: the recipe asks for it.
    """
    if starts_trained and recipe.calibration.on == "left_out":
        raise ValueError(
            f"calibration.on=left_out needs an untrained head, and {init_from} is trained: set "
            "calibration.on=validation"
        )


def _check_same_start(resumed: Path, init_from: Path | None) -> None:
    """Refuse `--init-from` for a run that began from other weights; the option would have no
    effect.

    Raises:
        ValueError: the weights differ; the message names those of the run.
    """
    if init_from is None:
        return
    began = checkpoint.read_meta(resumed)["first_weights"]
    if began is None or _weights_at(init_from).sha256 != began["sha256"]:
        raise ValueError(
            f"{resumed.parent} holds a run that began from other weights than {init_from}: "
            f"{_words_for(began)}; leave out --init-from to resume it, or use --run NAME for a "
            "new run"
        )


def _weights(
    recipe: Recipe, runs: Path, init_from: Path | None, resumed: Path | None
) -> tuple[Weights, Weights | None]:
    """Return the weights that are loaded first, and those of the teacher.

    Raises:
        CheckpointError: there is no such checkpoint.
        ValueError: distillation without a trained detector to start from, or a frozen backbone with
            random weights.
    """
    distills = recipe.replay.distill_weight > 0 and recipe.replay.fraction > 0
    if init_from is None and (distills or not resumed):
        init_from = _start_of(recipe, runs, resumed)
    if first := resumed or init_from:
        weights = _weights_at(first)
    else:
        weights = Weights(kind="timm" if recipe.network.pretrained else "random")
    if recipe.network.freeze_backbone and weights.kind == "random":
        raise ValueError(
            "network.freeze_backbone would freeze random weights: "
            "give weights with --init-from weights.safetensors, or with "
            "--set network.pretrained=true"
        )
    if not distills:
        return weights, None
    teacher = _weights_at(init_from) if init_from and init_from.suffix != ".safetensors" else None
    began = checkpoint.read_meta(resumed)["first_weights"] if resumed else None
    if began and (teacher is None or teacher.sha256 != began["sha256"]):
        other = f", and not {init_from}" if init_from else ""
        raise ValueError(
            f"the teacher is the checkpoint that the run began from, {_words_for(began)}{other}; "
            "give it with --init-from"
        )
    if teacher is None:
        raise ValueError("replay.distill_weight needs a run that starts from a trained checkpoint")
    return weights, teacher


def _weights_at(path: Path) -> Weights:
    """Return a checkpoint folder or a file of a backbone's weights as `Weights`."""
    if path.suffix == ".safetensors":
        return Weights(kind="file", path=path, sha256=sha256_of(path))
    sha256, data = checkpoint.check_weights(path), checkpoint.read_meta(path)["data"]
    return Weights(kind="checkpoint", path=path, sha256=sha256, data=data or {})


def _first_weights(
    recipe: Recipe, weights: Weights, resumed: Path | None
) -> Mapping[str, Any] | None:
    """Return the origin of the weights of the run's first step, as stored in `meta.json`.

    `kind` is as in `Weights`; `name` is the name of the run and its checkpoint, of the file, or of
    timm's network; `sha256` is empty for timm's and random weights; `license` is timm's, or None;
    and `first_weights` is the entry of the checkpoint that the run starts from, `sets` the sets
    that it was trained on (`sets_seen`), `generators` the generators of their fakes. No local path
    is stored.
    """
    if resumed:
        return checkpoint.read_meta(resumed)["first_weights"]
    path = weights.path.absolute() if weights.path else None
    name = path.name if path else ""
    origin: dict[str, Any] = {"license": None, "first_weights": None}
    if weights.kind == "checkpoint" and path:
        name, began = f"{path.parent.name}/{name}", checkpoint.read_meta(path)
        origin |= {"first_weights": began["first_weights"], "sets": sets_seen(began),
                   "generators": generators_seen(began)}  # fmt: skip
    elif weights.kind == "timm":
        name, origin["license"] = recipe.network.name, timm_license(recipe.network.name)
    return origin | {"kind": weights.kind, "name": name, "sha256": weights.sha256}


def _of_timm(first_weights: Mapping[str, Any] | None) -> bool:
    """Return whether a run began from timm's weights, or from a file."""
    return first_weights is not None and first_weights["kind"] in ("timm", "file")


def _words_for(first_weights: Mapping[str, Any] | None) -> str:
    """Describe the result of `_first_weights` in words."""
    if first_weights is None:
        return "not recorded"
    kind, name = first_weights["kind"], first_weights["name"]
    digest = f" (sha256 {first_weights['sha256'][:12]})"
    return {
        "checkpoint": f"checkpoint {name}{digest}",
        "file": f"file {name}{digest}",
        "timm": f"timm's {name} (license {first_weights['license']})",
        "random": "random, not pretrained",
    }[kind]


def _start_of(recipe: Recipe, runs: Path, resumed: Path | None) -> Path | None:
    """Return the best checkpoint of the run that the recipe names in `run.init_from`, None if the
    recipe names no run.

    Raises:
        CheckpointError: the named run has no checkpoint, its best one was refused by the gate, or
            it is not finished and this run has not begun.
    """
    if not recipe.run.init_from:
        return None
    run = runs / recipe.run.init_from
    best = checkpoint.best_of(run)
    starts = f"{recipe.name} starts from the best checkpoint of {run}"
    if best is None:
        raise checkpoint.CheckpointError(
            f"{starts}, which has none; {_how_to_train(recipe.run.init_from)}, or name a "
            "checkpoint with --init-from"
        )
    if reasons := checkpoint.refusal_of(best):
        raise checkpoint.CheckpointError(
            f"{starts}, but {best.name} was refused: {reasons}; train another run and name it with "
            f"--init-from, or use this one all the same with --init-from {best}"
        )
    if not resumed and (last := unfinished_of(best)):
        raise checkpoint.CheckpointError(
            f"{starts}, which is not finished (its last checkpoint is {last.name}); "
            f"{_how_to_train(recipe.run.init_from)}, or use {best.name} all the same with "
            f"--init-from {best}"
        )
    return best


def _how_to_train(run: str) -> str:
    """Return how to train a run: a command, or words if no built-in recipe has its name."""
    if run == "phase1":
        return f"run `{command('train')} --phase 1` first"
    recipe = recipes.FOLDER / f"{run}.toml"
    if recipe.is_file():  # the file's header has the command
        return f"train it first, with the same --runs: the command is in {recipe}"
    return "train that run first"


def _starts_trained(recipe: Recipe, init_from: Path | None, resumed: Path | None) -> bool:
    """Return whether the run starts from a trained detector, so that forgetting can be measured."""
    if resumed:  # the command line may have changed
        began = checkpoint.read_meta(resumed)["first_weights"]
        return began is not None and began["kind"] == "checkpoint"
    if init_from is not None:
        return init_from.suffix != ".safetensors"
    return bool(recipe.run.init_from)


def _check_network(
    recipe: ResolvedRecipe, weights: Weights, teacher: Weights | None
) -> tuple[int, tuple[float, ...]]:
    """Return the number of the network's parameters and its distinct learning rates, ascending.

    Raises:
        NetworkError: timm does not know the network, it does not accept the image size, or its
            weights do not fit or cannot be fetched.
        OptimError: a parameter belongs to no layer group.
    """
    outline = build(recipe.network, pretrained=False, empty=True)
    parameters = sum(parameter.numel() for parameter in outline.parameters())
    rates = {group["base_lr"] for group in parameter_groups(outline.backbone, recipe.optim)}
    if recipe.optim.solver == "lbfgs":
        check_fit(recipe, outline)
    check_size(outline, recipe.network, recipe.preprocess)
    if weights.kind == "timm":
        check_pretrained(recipe.network)
    elif weights.path and weights.kind == "file":
        check_backbone_file(outline, weights.path)
    elif weights.path:
        checkpoint.check(weights.path, outline)
    if teacher and teacher.path:
        checkpoint.check(teacher.path)
    return parameters, tuple(sorted(rates))


def _warnings(
    recipe: ResolvedRecipe, weights: Weights, starts_trained: bool, resumed: Path | None
) -> tuple[str, ...]:
    """Return lines for likely mistakes: a mean or std other than that of timm's weights,
    preprocessing other than that of the checkpoint that the run starts from, a start from a refused
    checkpoint or from an unfinished run, views that no epoch reads, a gate that needs a trained
    detector to compare with, without one, or weights of replayed samples without replay.
    """
    gate, lines = recipe.gate, list[str]()
    if recipe.features and (epochs := recipe.run.epochs) <= recipe.features.views:
        views = recipe.features.views + 1
        lines = [f"run.epochs={epochs} reads only {epochs} of {views} views; set {views} or more"]
    if not starts_trained and (gate.mistakes or gate.max_forgetting < 1):
        name = f"mistakes ({gate.mistakes})" if gate.mistakes else "max_forgetting"
        lines += [f"gate.{name} is not used: this run starts from no trained detector to compare"]
    for key in recipe.replay.unused:
        lines += [f"replay.{key} is not used: replay.ratio is 0, no old sample is replayed"]
    if weights.kind in ("timm", "file"):
        return (*lines, *normalization_warnings(recipe))
    if weights.path is None:
        return tuple(lines)
    if not resumed and (reasons := checkpoint.refusal_of(weights.path)):
        lines += [f"this run starts from {weights.path}, which was refused: {reasons}"]
    if not resumed and (last := unfinished_of(weights.path)):
        lines += [
            f"this run starts from {weights.path}, of a run that is not finished (its last "
            f"checkpoint is {last.name}): finish that run first, unless this is intended"
        ]
    before, now = checkpoint.read_meta(weights.path), as_saved(recipe)
    seen = before["preprocess"], before["recipe"]["network"]
    differ = [
        f"{table}.{name} is {now[table][name]}, but was {there[name]} in {weights.path}"
        for table, there in zip(("preprocess", "network"), seen, strict=True)
        for name in ("crop_size", "resize_size", "interpolation", "detail_crop", "mean", "std")
        if name in there and there[name] != now[table][name]
    ]
    return (*lines, *differ)


def _best(whole: Sequence[Path]) -> Best | None:
    """Return the best of a run's undamaged checkpoints."""
    if (path := checkpoint.best_among(whole)) is None:
        return None
    metrics = checkpoint.read_meta(path)["metrics"]
    return Best(path=path, validation=Validation.from_json(metrics, path) if metrics else None)
