"""Try a training run: take up to `BATCHES` steps in memory, and print what the run would do, with
an estimate of its time and memory.

Main entry: `dry_run(recipe, data, runs, *, init_from, dist)`; the last two may be left out. On
several ranks, each must call it.

- `recipe`: a `Recipe`, read by `recipes.load(Recipe, path)`.
- `data`: the folder of the shard sets (packed images), a `Path`, or a `UPath` for an address.
- `runs`: `Path` of the folder of all runs.
- `init_from`: `Path` of the first weights (checkpoint folder or ImageNet `.safetensors` file).
  None: the recipe's.
- `dist`: this process's rank, a `DistEnv`. None: one process.

Rank 0 prints the plan, a table of the images and the estimate. Nothing is written to `runs` or the
feature store, and nothing is returned. If the run is finished already, it prints only that. It
raises `ValueError` for an error that would stop the run before or in its first steps, and `OSError`
if a file cannot be read. It does not notice that another training holds the lock of the run, or
that the teacher (for distillation) of a run with stored features has another backbone.

`Trial`, which is only used inside, has the measured loss and the times in seconds. `ENOUGH_S`
limits the trial: two batches are always done, if there are so many. After that, it stops when the
batches have taken more seconds than this.
"""

import contextlib
import itertools
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import console
from model.distributed import DistEnv, all_gather_object, all_reduce_any
from model.features.loader import FeatureSource, open_scored, source_of
from model.features.store import missing_of
from model.recipe import Recipe
from model.score import autocast, evaluating, logits_of
from model.training.assemble import (
    assemble,
    check_teacher,
    compile_network,
    on_features,
    views_of,
)
from model.training.plan import RunPlan, plan
from model.training.step import TrainState, take_step
from pipeline.batch import Batch
from pipeline.stream import evaluation_batches
from sharding.format import CLASSES
from storage import AnyPath

BATCHES = 4
"""Number of batches that are tried. The first one is timed separately, because it starts the loader
and the compiler.
"""

ENOUGH_S = 30.0
"""Seconds after which no further batch is tried, once two are done."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Measurements of the first batches of a run on this rank.

    `loss` is the loss of the first batch. Times are in seconds: `first_s` of the first step,
    `step_s` the mean of the later steps (of the first if there is only one), `image_s` for the
    features of one image, `validation_s` for one scoring of all validation sets. `timed` is the
    number of later steps. `missing` is the number of images without stored features.
    """

    loss: float
    first_s: float
    step_s: float
    timed: int
    missing: int = 0
    image_s: float = 0.0
    validation_s: float = 0.0


def dry_run(
    recipe: Recipe,
    data: AnyPath,
    runs: Path,
    *,
    init_from: Path | None = None,
    dist: DistEnv | None = None,
) -> None:
    """Take a few steps of `recipe` in memory and print what the training run would do. Nothing is
    written into `runs` or the feature store. Every rank calls this function; rank 0 prints.

    Raises:
        ValueError: an error that would stop the run before or in its first steps.
    """
    planned = plan(recipe, data, runs, init_from=init_from, dist=dist)
    say = console.say if planned.dist.is_main else _say_nothing
    for line in (*(f"{line}; it is not used" for line in planned.damaged), *planned.warnings):
        console.log.warning("%s", line)
    if planned.finished or planned.done == planned.steps:
        say(
            f"{planned.folder} is finished: training would only repeat what is missing of the "
            "last validation, the calibration and the gate"
        )
        return
    train_state = assemble(planned)
    with contextlib.closing(planned.stream.loader):
        trial = _try(planned, train_state)
    memory = _memory(planned)
    if not planned.dist.is_main:
        return
    for line in planned.describe():
        say(line)
    console.table("Images", ["use", "source", *CLASSES], _counts(planned))
    for line in _report(planned, train_state, trial, memory):
        say(line)
    say(f"dry run: nothing was written to {runs}, and no step is kept")


def _say_nothing(_text: str) -> None:
    """Print nothing: used on ranks other than 0."""


def _counts(planned: RunPlan) -> list[list[object]]:
    """Return the rows of a table: use of the images, their source, and their number per class."""
    pool = planned.stream.pool
    uses = [("training", pool.shards, planned.stream.new(0))]
    uses += [("replay candidates", pool.shards, pool.old)] if len(pool.old) else []
    uses += [
        (f"validation {name}", shards, np.arange(len(shards)))
        for name, shards in planned.validation.items()
    ]
    rows: list[list[object]] = []
    for use, shards, samples in uses:
        codes, names = shards.codes("source")
        labels = shards.column("label")[samples]
        for code in np.unique(codes[samples]):
            own = labels[codes[samples] == code]
            rows.append([use, names[code], *(int((own == c).sum()) for c in range(len(CLASSES)))])
    return rows


def _try(planned: RunPlan, train_state: TrainState) -> Trial:
    """Take up to `BATCHES` steps from the current step of the run, on images or stored features."""
    recipe = planned.recipe
    if recipe.features is None or not recipe.features.stored:
        trial = _try_steps(planned, train_state)
        return replace(trial, validation_s=_validation_s(planned, train_state))
    source = source_of(recipe, train_state.net, planned.dtype)
    check_teacher(train_state, source)
    missing = _missing(planned, source)
    if missing:
        return replace(_try_features(planned, train_state), missing=missing)
    return _try_steps(on_features(planned, source), train_state)


def _try_steps(planned: RunPlan, train_state: TrainState) -> Trial:
    step = _stepper(planned, train_state)
    losses: list[float] = []
    times = _times(planned, _batches(planned), lambda batch: losses.append(step(batch)))
    return _trial(losses, times)


def _try_features(planned: RunPlan, train_state: TrainState) -> Trial:
    """Time a run without stored features: compute the features of each batch, then take a step of
    the head.
    """
    step, net = _stepper(planned, train_state), train_state.net
    losses: list[float] = []
    steps: list[float] = []

    def compute(batch: Batch) -> None:
        with evaluating(net), torch.no_grad(), autocast(planned.device, planned.dtype):
            features = net.features(batch.images).to(torch.float16)
        if planned.device.type == "cuda":
            torch.cuda.synchronize(planned.device)  # or the step's time includes computing features
        started = time.perf_counter()
        losses.append(step(replace(batch, images=features)))
        steps.append(time.perf_counter() - started)

    times = _times(planned, _batches(planned), compute)
    computing = [whole - own for whole, own in zip(times, steps, strict=True)]
    # All ranks together compute a global batch.
    images = planned.stream.loader.global_batch
    return replace(_trial(losses, steps), image_s=float(np.mean(_later(computing))) / images)


def _stepper(planned: RunPlan, train_state: TrainState) -> Callable[[Batch], float]:
    """Return a function that takes the next step of a run on a batch and returns its loss.

    Raises:
        ValueError: raised by the returned function if the loss is not finite.
    """
    recipe, numbers = planned.recipe, itertools.count(planned.done)
    forward = compile_network(planned, train_state)

    def step(batch: Batch) -> float:
        number = next(numbers)
        for failure in planned.stream.loader.name_failures(batch):
            console.rank_log.warning("not decoded: %s", failure)
        loss = take_step(
            train_state, forward, batch, recipe, step=number, steps=planned.steps
        ).item()
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {number + 1}; lower optim.lr, or use --set "
                "run.precision=fp32"
            )
        return loss

    return step


def _batches(planned: RunPlan) -> Iterator[Batch]:
    """Yield the first batches of the run."""
    batches = planned.stream.batches(planned.done, planned.recipe.run.epochs)
    return itertools.islice(batches, BATCHES)


def _times(
    planned: RunPlan, batches: Iterator[Batch], use: Callable[[Batch], object]
) -> list[float]:
    """Return the seconds per batch, loading included. Stop after two or more batches if the sum
    exceeds `ENOUGH_S` on any rank.
    """
    times, started = [], time.perf_counter()
    for batch in batches:
        use(batch)
        times.append(time.perf_counter() - started)
        if len(times) > 1 and all_reduce_any(planned.dist, sum(times) > ENOUGH_S):
            break
        started = time.perf_counter()
    return times


def _later(times: list[float]) -> list[float]:
    """Return all times but the first, which is slower, or a single time."""
    return times[1:] or times


def _trial(losses: list[float], times: list[float]) -> Trial:
    later = _later(times)
    return Trial(
        loss=losses[0], first_s=times[0], step_s=float(np.mean(later)), timed=len(times[1:])
    )


def _validation_s(planned: RunPlan, train_state: TrainState) -> float:
    """Estimate the seconds of one validation from a few batches of the largest set."""
    recipe, dist = planned.recipe, planned.dist
    largest = max(planned.validation.values(), key=len)
    net = train_state.shown
    with (
        open_scored(
            largest, recipe.preprocess, recipe.loading, planned.device, dist=dist
        ) as loader,
        evaluating(net),
    ):
        times = _times(
            planned,
            itertools.islice(evaluation_batches(loader), BATCHES),
            lambda b: logits_of(net, b.images, planned.device, planned.dtype).cpu(),
        )
    count = sum(-(-len(shards) // loader.global_batch) for shards in planned.validation.values())
    return count * float(np.mean(_later(times)))


def _missing(planned: RunPlan, source: FeatureSource) -> int:
    """Count the images, once per view, whose features are not in the store."""
    pool = planned.stream.pool.shards
    wanted = [(pool, number) for number in views_of(planned.recipe)]
    wanted += [(shards, 0) for shards in planned.validation.values()]
    return sum(
        shards.shard_samples[file.shard_code]
        for shards, number in wanted
        for file in missing_of(
            source.store, source.backbone, shards, source.numbered(number), rank=0, world_size=1
        )
    )


@dataclass(frozen=True)
class _Memory:
    """Peak memory in bytes of one process and of one GPU; `gpu` is 0 without a GPU."""

    process: int
    gpu: int


def _memory(planned: RunPlan) -> _Memory:
    """Return the highest peak over all ranks."""
    on_gpu = planned.device.type == "cuda"
    unit = 1 if sys.platform == "darwin" else 1024
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    gpu = torch.cuda.max_memory_reserved(planned.device) if on_gpu else 0
    of_ranks = all_gather_object(planned.dist, (process, gpu))
    return _Memory(max(rank[0] for rank in of_ranks), max(rank[1] for rank in of_ranks))


def _report(
    planned: RunPlan, train_state: TrainState, trial: Trial, memory: _Memory
) -> Iterator[str]:
    """Yield lines with the measurements and the estimate for the whole run."""
    recipe, stream = planned.recipe, planned.stream
    learning = sum(p.numel() for p in train_state.net.parameters() if p.requires_grad)
    yield f"{learning:,} of {planned.parameters:,} parameters are trained"
    yield (
        f"tried {1 + trial.timed} steps of {stream.loader.global_batch} images forward and "
        f"backward: first loss {trial.loss:.3f}; the first step took "
        + console.duration(trial.first_s)
        + (f", each later one {console.duration(trial.step_s)}" if trial.timed else "")
    )
    gpu = ""
    if memory.gpu:
        total = torch.cuda.get_device_properties(planned.device).total_memory
        gpu = f", on the GPU {memory.gpu / 2**30:.2f} of {total / 2**30:.1f} GiB"
    workers = "" if recipe.loading.num_workers == 0 else ", loading workers not counted"
    yield f"peak memory {memory.process / 2**30:.2f} GiB a process{workers}{gpu}"
    steps = planned.steps - planned.done
    seconds, parts = steps * trial.step_s, [f"{steps:,} steps"]
    if recipe.optim.solver == "lbfgs":
        rows = len(views_of(recipe)) * len(stream.new(0))
        yield (
            f"the head is fitted, not trained in steps: at most {recipe.optim.iterations} "
            f"iterations over about {rows:,} features; the estimate does not include the fit"
        )
        seconds, parts = 0.0, []
    if trial.missing:
        seconds += trial.missing * trial.image_s
        parts.append(f"the features of {trial.missing:,} images ({1 / trial.image_s:.3g} a second)")
    if trial.validation_s:
        count = _validations_left(planned)
        seconds += count * trial.validation_s
        parts.append(f"{count} validations of {console.duration(trial.validation_s)}")
    time_in_words = console.duration(seconds)
    estimate = f"{time_in_words} for {', '.join(parts)}" if parts else "all features are stored"
    yield f"estimate: {estimate}"
    yield (
        f"batches measured for the estimate: {max(1, trial.timed)}. The disk cache, other programs "
        "and the temperature of the machine change the speed; saving checkpoints and calibrating "
        "are not included"
    )


def _validations_left(planned: RunPlan) -> int:
    """Count the remaining validations, including the one before the first step."""
    settings = planned.recipe.run
    begun = planned.done // planned.steps_per_epoch
    epochs = range(begun + 1, settings.epochs + 1)
    count = sum(
        epoch % settings.validate_every == 0 or epoch == settings.epochs for epoch in epochs
    )
    return count + bool(planned.baseline and not planned.baseline.exists())
