"""Train the head again without a source, and score the source with it: how a new one will look."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

import console
from model.features.loader import FeatureLoader, FeatureSource
from model.score import score_set
from model.training.optim import make_optimizer, schedule, set_learning_rate
from model.training.plan import RunPlan
from model.training.step import TrainState, train_step
from pipeline.stream import Stream


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceScores:
    """The images of one source, scored by a head that has not learned from it: `labels` int64 (N,)
    and `logits` float32 (N,) of fake minus real, before any temperature.
    """

    labels: np.ndarray
    logits: np.ndarray


HeadWeights = Mapping[str, torch.Tensor]


def head_weights(train_state: TrainState) -> HeadWeights:
    """A copy of the weights that learn."""
    parameters = train_state.net.backbone.named_parameters()
    return {name: p.detach().clone() for name, p in parameters if p.requires_grad}


def set_head(train_state: TrainState, weights: HeadWeights) -> None:
    """Put weights that `head_weights` copied into the network."""
    with torch.no_grad():
        for name, parameter in train_state.net.backbone.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def refit(
    planned: RunPlan, train_state: TrainState, first: HeadWeights, without: Collection[str]
) -> None:
    """Train the head in `train_state` from `first`, by the recipe of the run and its stored
    features, without some sources of its new and replayed sets.
    """
    recipe, stream = planned.recipe, _without(planned.stream, without)
    set_head(train_state, first)
    optimizer = make_optimizer(train_state.net.backbone, recipe.optim, fused=False)
    state = replace(train_state, optimizer=optimizer, ema=None, teacher=None)
    steps = stream.steps_per_epoch * recipe.run.epochs
    for step, batch in enumerate(stream.batches(0, recipe.run.epochs)):
        set_learning_rate(optimizer, schedule(recipe.optim, step, steps))
        train_step(state, state.net, batch, recipe.optim, step=step)


def _without(stream: Stream, sources: Collection[str]) -> Stream:
    """The stream with no sample of these sources."""
    codes, names = stream.pool.shards.codes("source")
    left_out = np.isin(codes, [names.index(name) for name in sources if name in names])
    pool = replace(
        stream.pool,
        new=stream.pool.new[~left_out[stream.pool.new]],
        old=stream.pool.old[~left_out[stream.pool.old]],
    )
    repeats = {name: times for name, times in stream.repeats.items() if name not in sources}
    return replace(stream, pool=pool, repeats=repeats)


def leave_one_out(
    planned: RunPlan,
    train_state: TrainState,
    first: HeadWeights,
    source: FeatureSource,
    together: Mapping[str, str] | None = None,
) -> dict[str, SourceScores]:
    """Score each source of the new sets with a head that has not learned from it. Sources that
    `together` gives one name are left out together, such as two galleries of one generator. The
    network has its own head again afterward.
    """
    kept, shards = head_weights(train_state), planned.stream.pool.shards
    codes, names = shards.codes("source")
    groups: dict[str, list[str]] = {}
    for name in sorted({names[code] for code in codes[planned.stream.pool.new]}):
        groups.setdefault((together or {}).get(name, name), []).append(name)
    scored = {}
    with console.progress("leaving out", len(groups), shown=planned.dist.is_main) as advance:
        for members in groups.values():
            refit(planned, train_state, first, members)
            for name in members:
                rows = planned.stream.pool.new[codes[planned.stream.pool.new] == names.index(name)]
                loader = FeatureLoader(
                    shards.take(rows), source, planned.recipe.loading, planned.device
                )
                scores = score_set(train_state.net, loader, planned.dtype)
                scored[name] = SourceScores(labels=scores.labels, logits=scores.logits)
            advance(1)
    set_head(train_state, kept)
    return scored
