"""Fit the head of a frozen backbone to all stored features at once: logistic regression by L-BFGS,
to its minimum. A head from a fixed number of AdamW steps stops before, and does worse on new
sources (docs/log.md, 2026-11-28).

Main entry: `fit_head(net, samples, optim, dist, on_evaluation)` sets the weights of the head.

- `net`: a `Detector` whose backbone is frozen and whose head is one linear layer.
- `samples`: the `Samples` of this rank, from `gather()`.
- `optim`: the recipe's `Optim` settings, of which `weight_decay`, `label_smoothing` and
  `iterations` (the most) are used. The loss is the mean cross entropy plus a penalty:
  `weight_decay` / 4 times the sum of the squared changes of w from its first value. w is the
  layer's row for fake minus its row for real; the bias is free. A new head begins at 0
  (`reset_head()`), so this is the usual penalty on both rows. In phase 2 the penalty keeps the head
  near that of phase 1, unless the new images require a change (L2-SP, Li et al. 2018).
- `dist`: this process's rank, a `DistEnv` (default: a single process). On several ranks, each calls
  it with its own samples, and all get the same head.
- `on_evaluation`: a function without arguments that is called each time the loss is computed
  (default: does nothing). An exception in it ends the fit.

It returns a `FitResult`: `loss`, `iterations` (those done), `gradient`, the largest absolute
gradient at the end, near 0 if the fit has converged, and `converged`, whether it ended at the
minimum and not at a limit of iterations or evaluations. It raises `FitError` (a `ValueError`) if
the network learns other weights than those of one linear layer, there are no samples of one of the
classes, or the loss is not finite.

`gather(stream, epochs, dist)` reads the features of the first `epochs` epochs of a `Stream` of
stored features and returns this rank's `Samples`: `features`, float16 (N, D), `labels` (0 real, 1
fake) and `weights`, float32 (N,). An image that comes several times in one view is one row. Its
weight is how many times it comes; each time that it is replayed counts `replay.weight` times. It
raises `FeatureError` for missing or damaged features.
`check_fit(recipe, net)` raises `FitError` if a `ResolvedRecipe` and its network cannot be fitted.

`head_weights(net)` returns a copy of the weights of a `Detector` that learn (`HeadWeights`, name ->
tensor), `set_head(net, weights)` restores such a copy, and `reset_head(net)` sets these weights to
0.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import softplus

import console
from model.device import half_of_threads
from model.distributed import DistEnv, all_reduce_sum
from model.features.loader import FeatureLoader
from model.lean_import import lean_import
from model.network import Detector
from model.recipe import Optim, ResolvedRecipe
from pipeline.stream import Stream

ROWS = 512
"""Rows that are converted to float32 at a time, in one buffer that stays in the CPU cache: with a
new buffer each time a fit took three to five times as long. The features stay float16 in memory.
"""

HISTORY = 20
"""Number of gradients from which L-BFGS estimates the curvature."""

FLAT = 1e-7
"""Largest absolute gradient at which a fit ends."""


class FitError(ValueError):
    """A head that cannot be fitted. The message gives the reason and what to do."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Features of training images on one device: `features` float16 (N, D), `labels` float32 (N,)
    of 0 and 1, and `weights` float32 (N,), how often each row counts.
    """

    features: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor

    def parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield slices of `ROWS` rows, and their features in float32, valid until the next part."""
        count, width = self.features.shape
        memory = torch.empty(min(ROWS, count), width, device=self.features.device)
        for start in range(0, count, ROWS):
            part = self.features[start : start + ROWS]
            yield slice(start, start + ROWS), memory[: len(part)].copy_(part)


@dataclass(frozen=True)
class FitResult:
    """Result of a fit: the regularized loss, the number of iterations, the largest absolute
    gradient, and whether the fit ended before the largest number of iterations or evaluations.
    """

    loss: float
    iterations: int
    gradient: float
    converged: bool


def check_fit(recipe: ResolvedRecipe, net: Detector) -> None:
    """Refuse a recipe with `optim.solver` lbfgs that cannot be fitted. `net` may be on the meta
    device.

    Raises:
        FitError: the recipe has no stored features, its head is no single linear layer, or it has
            settings that need training in steps.
    """
    optim, features = recipe.optim, recipe.features
    reasons = {
        "needs stored features: set features.stored=true": not (features and features.stored),
        "cannot average weights: set optim.ema_decay=0": optim.ema_decay > 0,
        "cannot distill: set replay.distill_weight=0": recipe.replay.distill_weight > 0,
    }
    for reason, holds in reasons.items():
        if holds:
            raise FitError(f"optim.solver lbfgs {reason}, or optim.solver=adamw")
    linear_of(net)


def linear_of(net: Detector) -> nn.Linear:
    """Return the layer that classifies the features.

    Raises:
        FitError: the weights that learn are not those of one linear layer with a bias.
    """
    head = net.backbone.get_classifier() if net.head == "timm" else net.backbone.stage_head.fc
    learning = {id(p) for p in net.backbone.parameters() if p.requires_grad}
    if not isinstance(head, nn.Linear) or learning != {id(head.weight), id(head.bias)}:
        raise FitError(
            "optim.solver lbfgs fits one linear layer over a frozen backbone, which this network "
            "does not have: set network.freeze_backbone=true, or optim.solver=adamw"
        )
    return head


def gather(stream: Stream, epochs: int, dist: DistEnv | None = None) -> Samples:
    """Read the features of the first `epochs` epochs of `stream`: this rank's part. An image that
    could not be decoded is named in the log and left out.

    Raises:
        FeatureError: features are missing or damaged.
    """
    dist, loader = dist or DistEnv(), stream.loader
    assert isinstance(loader, FeatureLoader)
    counts: dict[int, np.ndarray] = {}
    for number in range(epochs):
        epoch, view = stream.epoch(number, whole=True), stream.view(number)
        assert view is not None
        seen = counts.setdefault(view, np.zeros(len(loader.shards)))
        weights_of = np.where(epoch.replayed, stream.replay.weight, 1.0)
        seen += np.bincount(epoch.samples, weights_of, minlength=len(seen))
    features, labels, weights, bad = [], [], [], dict[int, str]()
    for view, seen in counts.items():
        rows, table = np.flatnonzero(seen)[dist.rank :: dist.world_size], loader.table(view)
        failures = table.failures(rows)
        for position, reason in failures.items():
            bad.setdefault(int(rows[position]), reason)
        rows = np.delete(rows, list(failures))
        features.append(torch.from_numpy(table.rows(rows)))
        labels.append(torch.from_numpy(loader.shards.column("label")[rows].astype(np.float32)))
        weights.append(torch.from_numpy(seen[rows].astype(np.float32)))
    for row, reason in bad.items():
        console.rank_log.warning("not decoded: %s: %s", loader.shards.name(row), reason)
    return Samples(*(torch.cat(parts).to(loader.device) for parts in (features, labels, weights)))


def fit_head(
    net: Detector,
    samples: Samples,
    optim: Optim,
    dist: DistEnv | None = None,
    on_evaluation: Callable[[], Any] = lambda: None,
) -> FitResult:
    """Fit the head of `net` to `samples` and return the result of the fit. Every rank calls this
    function, with its own samples. The search begins at the head's present weights.

    Only the difference of the two rows of the layer matters, so one vector is fitted: the logit of
    fake minus that of real. Features are centered on the fly, which speeds up the fit.

    Raises:
        FitError: a class has no sample, or the loss is not finite.
    """
    head, dist = linear_of(net), dist or DistEnv()
    total, fakes, mean = _totals(samples, dist)
    if not 0 < fakes < total:
        raise FitError(
            f"the training images are all {'fake' if fakes else 'real'}; a fit needs both classes"
        )
    smoothing = optim.label_smoothing
    targets = samples.labels * (1 - smoothing) + smoothing / 2
    shares = samples.weights / total
    first, bias = ((rows[1] - rows[0]).detach().float() for rows in (head.weight, head.bias))
    vector = first.clone().requires_grad_()
    offset = (bias + mean @ first).reshape(1).requires_grad_()
    most = 2 * optim.iterations
    with lean_import():
        solver = torch.optim.LBFGS(
            [vector, offset], max_iter=optim.iterations, max_eval=most,
            history_size=HISTORY, tolerance_grad=FLAT, tolerance_change=1e-10,
            line_search_fn="strong_wolfe",
        )  # fmt: skip
    last = torch.zeros(())

    def loss_and_gradient() -> float:
        nonlocal last
        on_evaluation()
        with torch.no_grad():
            sums = torch.zeros(2 + len(vector), device=mean.device)
            for rows, features in samples.parts():
                logits = features @ vector + (offset - mean @ vector)
                sums[0] += shares[rows] @ (softplus(logits) - targets[rows] * logits)
                slopes = shares[rows] * (torch.sigmoid(logits) - targets[rows])
                sums[1] += slopes.sum()
                sums[2:] += slopes @ features
            sums = all_reduce_sum(dist, sums)
            # The layer's rows change by `moved / 2` and its negative: half of the squared norm of
            # `moved`.
            moved = vector - first
            vector.grad = sums[2:] - sums[1] * mean + optim.weight_decay / 2 * moved
            offset.grad = sums[1:2].clone()
            last = sums[0] + optim.weight_decay / 4 * (moved @ moved)
        if not math.isfinite(loss := float(last)):
            raise FitError(
                f"the loss of the fit is {loss}; use run.precision=fp32 for the features"
            )
        return loss

    with half_of_threads():
        solver.step(loss_and_gradient)
    with torch.no_grad():
        half, bias = vector / 2, (offset - mean @ vector) / 2
        head.weight.copy_(torch.stack([-half, half]))
        head.bias.copy_(torch.cat([-bias, bias]))
    assert vector.grad is not None
    assert offset.grad is not None
    gradient = max(float(vector.grad.abs().max()), float(offset.grad.abs()))
    iterations, evaluations = (solver.state[vector][name] for name in ("n_iter", "func_evals"))
    ended = iterations < optim.iterations and evaluations < most
    return FitResult(float(last), iterations, gradient, converged=ended or gradient <= FLAT)


def _totals(samples: Samples, dist: DistEnv) -> tuple[float, float, torch.Tensor]:
    """Return, over all ranks, the weight of all samples, the weight of the fakes, and the weighted
    mean of the features, float32 (D,).
    """
    weights = samples.weights
    sums = torch.zeros(2 + samples.features.shape[1], device=weights.device)
    sums[0], sums[1] = weights.sum(), weights @ samples.labels
    for rows, features in samples.parts():
        sums[2:] += weights[rows] @ features
    sums = all_reduce_sum(dist, sums)
    return float(sums[0]), float(sums[1]), sums[2:] / sums[0].clamp(min=1)


HeadWeights = Mapping[str, torch.Tensor]


def head_weights(net: Detector) -> HeadWeights:
    """Copy the weights that learn."""
    parameters = net.backbone.named_parameters()
    return {name: p.detach().clone() for name, p in parameters if p.requires_grad}


def set_head(net: Detector, weights: HeadWeights) -> None:
    """Restore weights that `head_weights` has copied."""
    with torch.no_grad():
        for name, parameter in net.backbone.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def reset_head(net: Detector) -> None:
    """Set the weights that learn to 0."""
    weights = head_weights(net)  # zeros, because 0 * NaN is NaN
    set_head(net, {name: torch.zeros_like(weight) for name, weight in weights.items()})
