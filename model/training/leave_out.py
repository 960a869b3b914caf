"""Calibrate a detector by leaving sources out: for each image source, train a new head on all other
sources, and score this source with it. This shows how the detector behaves on a new source.

Main entry: `calibrate_left_out(planned, best)` calibrates a checkpoint of a finished run. On
several ranks, each must call it.

- `planned`: the `RunPlan` of the run, made by `plan()` in `model/training/plan.py`. Its recipe has
  `[features]` (a frozen backbone). The recipe's `calibration` has the error rates that must not be
  exceeded, and groups of sources that are left out together.
- `best`: `Path` of the folder of the run's best checkpoint.

It computes missing features, trains the heads and fits a `Calibration` to their scores. It stores
the calibration and the metrics of the validation sets in the checkpoint's `meta.json`, and returns
the calibration. Its main fields:

- `temperature`: the logits are divided by it. The next two are probabilities of fake after that.
- `threshold`: the decision threshold; from it on, an image is called fake.
- `band`: a pair (low, high). The verdict is "likely AI" from high on, "no sign of AI" below low,
  and "uncertain" between.

It raises `CalibrationError` (on every rank) if there are too few images, no calibration fits, a
validation set has another split than `val`, or a head cannot be trained (see `refit()`). It raises
`ScoreError` (of `model/score.py`) for a score that is not finite. It raises `FeatureError` or
`LoadError` if features cannot be computed.

`leave_one_out(planned, train_state, source, on_head)` trains the heads on stored features and
returns the scores: a dict, source -> (labels, logits of fake minus real). The dict has the sources
of the training sets, without those that `data.repeats` sets to 0: the run has nothing of them.
Sources that come only from replay sets (old sets, mixed in against forgetting) are not in it, but
are left out with their group. The function also takes a `TrainState`
(network, device, ..., from `assemble()`), the `FeatureSource` (location of the features, from
`source_of()`), and a function that may be left out: `on_head(sources)` is called once for each new
head, with the list of names that this head was trained without; while `on_head` runs,
`train_state.net` has this head.

`refit(planned, train_state, without)` trains a new head, which begins at 0, in `train_state` on the
stored features of `planned` (from `with_features()`), without the sources `without` (names): in
steps, or by `fit_head()` with `optim.solver` lbfgs. If no old sample is left, it replays none. It
returns whether the fit has converged (True for steps). It raises `CalibrationError` if the other
images fill no batch or, with lbfgs, lack a class or give a loss that is not finite. (In steps, a
lacking class is no error.)

`groups_of(planned)` returns the sources that are left out together: a dict, group -> list of names.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import console
from model.calibration.calibrate import scorer_of, store_calibration
from model.calibration.fit import (
    Calibration,
    CalibrationError,
    calibrate_sources,
    check_validation_sets,
)
from model.checkpoint import load_network
from model.device import one_thread
from model.distributed import DistEnv, all_gather_object, on_main
from model.evaluation.scoring import score_all
from model.features.fit import FitError, fit_head, gather, head_weights, reset_head, set_head
from model.features.loader import FeatureLoader, FeatureSource, source_of
from model.score import score_set
from model.training.assemble import embed_run
from model.training.optim import make_optimizer
from model.training.plan import RunPlan
from model.training.step import TrainState, average_of, take_step
from pipeline.order import OrderError
from pipeline.replay import Replay
from pipeline.stream import Stream


def refit(planned: RunPlan, train_state: TrainState, without: Collection[str]) -> bool:
    """Train a new head in `train_state` without the sources `without`, by the run's recipe and on
    stored features. Only this rank trains. Returns whether a fit has converged; True for steps.

    Raises:
        CalibrationError: the remaining images do not fill a batch, or lack a class.
    """
    recipe, stream, net = planned.recipe, _without(planned.stream, without), train_state.net
    # Start from zero weights: a head that has seen these sources would leak them into the scores.
    reset_head(net)
    if recipe.optim.solver == "lbfgs":
        try:
            return fit_head(net, gather(stream, recipe.run.epochs), recipe.optim).converged
        except (FitError, OrderError) as error:
            raise CalibrationError(f"without {', '.join(without)} {error}") from error
    if not stream.steps_per_epoch:
        raise CalibrationError(
            f"without {', '.join(without)} the training images fill no batch of "
            f"{stream.loader.global_batch}; use a smaller loading.batch_size"
        )
    optimizer = make_optimizer(net.backbone, recipe.optim, fused=False)
    ema = average_of(net) if recipe.optim.ema_decay else None
    state = replace(train_state, optimizer=optimizer, ema=ema, teacher=None, dist=DistEnv())
    steps = stream.steps_per_epoch * recipe.run.epochs
    for step, batch in enumerate(stream.batches(0, recipe.run.epochs)):
        take_step(state, net, batch, recipe, step=step, steps=steps)
    if ema is not None:
        set_head(net, dict(ema.backbone.named_parameters()))
    return True


def _without(stream: Stream, sources: Collection[str]) -> Stream:
    """Return the stream without the samples of these sources. If no old sample is left, nothing is
    replayed, as in a run without these sources.
    """
    codes, names = stream.pool.shards.codes("source")
    left_out = np.isin(codes, [names.index(name) for name in sources if name in names])
    pool = replace(
        stream.pool,
        new=stream.pool.new[~left_out[stream.pool.new]],
        old=stream.pool.old[~left_out[stream.pool.old]],
    )
    repeats = {name: times for name, times in stream.repeats.items() if name not in sources}
    return replace(
        stream, pool=pool, repeats=repeats, replay=stream.replay if len(pool.old) else Replay()
    )


def groups_of(planned: RunPlan) -> dict[str, list[str]]:
    """Return the sources that are left out together: group -> names, including sources that are
    only replayed. A source outside of `calibration.together` is a group of its own.
    """
    pool = planned.stream.pool
    codes, names = pool.shards.codes("source")
    groups: dict[str, list[str]] = {}
    for name in sorted(names[code] for code in np.unique(codes[np.r_[pool.new, pool.old]])):
        groups.setdefault(planned.recipe.calibration.group_of(name), []).append(name)
    return groups


def leave_one_out(
    planned: RunPlan,
    train_state: TrainState,
    source: FeatureSource,
    on_head: Callable[[Sequence[str]], Any] = lambda _members: None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Score each source of the new sets with a head trained without it. Returns source -> (labels
    int64, logits float32 of fake minus real, before any temperature).

    A source that `data.repeats` sets to 0 is not scored. Sources of one group of the recipe's
    `calibration.together` are left out together, also those that are only replayed.
    `on_head(sources)` is called while the network has the head trained without these sources. At
    the end the network has its original head again.
    """
    kept, pool = head_weights(train_state.net), planned.stream.pool
    device, global_batch = planned.device, planned.stream.loader.global_batch
    # Only this rank trains, with the global batch size, so that heads learn as the run's own head.
    loading = replace(planned.recipe.loading, batch_size=global_batch)
    loader = FeatureLoader(pool.shards, source, loading, device)
    planned = replace(planned, stream=replace(planned.stream, loader=loader))
    codes, names = pool.shards.codes("source")
    used = planned.stream.used_new
    new = {names[code] for code in np.unique(codes[used])}
    groups = [members for members in groups_of(planned).values() if new & {*members}]
    scored, short = {}, 0
    in_steps = planned.recipe.optim.solver == "adamw"
    with one_thread(in_steps), console.progress("heads without one source", len(groups)) as advance:
        for members in groups:
            short += not refit(planned, train_state, members)
            for name in [member for member in members if member in new]:
                rows = used[codes[used] == names.index(name)]
                of_source = FeatureLoader(pool.shards.take(rows), source, loading, device)
                scores = score_set(train_state.net, of_source, planned.dtype)
                scored[name] = scores.labels, scores.logits
            on_head(members)
            advance(1)
    set_head(train_state.net, kept)
    if short:
        console.log.warning(
            "%d of %d heads without one source have not converged after %d iterations, so their "
            "scores, and the thresholds from them, are not those of the minimum: use --run NAME "
            "with a higher optim.iterations",
            *(short, len(groups), planned.recipe.optim.iterations),
        )
    return scored


def calibrate_left_out(planned: RunPlan, best: Path) -> Calibration:
    """Calibrate a checkpoint of a run on the scores of left-out sources. Missing center-crop
    features of the training images are computed first. Every rank calls this function; rank 0
    trains the heads.

    Raises:
        CalibrationError: there are too few images, no calibration fits the scores, or a validation
            set has another split than `val`.
    """
    recipe, dist = planned.recipe, planned.dist
    check_validation_sets([planned.data / name for name in recipe.data.validate])
    net, _, _ = load_network(best)
    net.to(planned.device)
    optimizer = make_optimizer(net.backbone, recipe.optim, fused=False)
    scaler = torch.amp.GradScaler(planned.device.type, enabled=planned.dtype == torch.float16)
    state = TrainState(net, optimizer, scaler, planned.device, planned.dtype)
    source = source_of(recipe, net, planned.dtype)
    embed_run(planned, state, source, [planned.stream.pool.shards])
    all_gather_object(dist, None)  # barrier: all ranks have written

    def fitted() -> Calibration | CalibrationError:
        try:
            return calibrate_sources(leave_one_out(planned, state, source), recipe.calibration)
        except CalibrationError as error:
            return error  # raised by all ranks below

    calibration = on_main(dist, fitted)
    if isinstance(calibration, CalibrationError):
        raise calibration
    scorer = scorer_of(best, recipe.loading, planned.device, dist, source)
    scored = score_all(planned.validation, scorer)
    store_calibration(best, calibration, planned.stream.pool.hashes, scored, dist)
    return calibration
