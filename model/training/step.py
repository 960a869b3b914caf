"""Take one optimizer step on one batch, with mixed precision, gradient accumulation, a moving
average of the weights (EMA), distillation and several ranks.

Main entry: `train_step(train_state, forward, batch, optim, step, grad_accum_steps, replay_weight,
distill_weight)`. The last four are optional and passed by keyword. On several ranks, all call it.

- `train_state`: the `TrainState` (network, optimizer and more), made by `assemble()` in
  `assemble.py`; it is changed. Set the learning rate before (`set_learning_rate()` in `optim.py`).
- `forward`: the module to call with images, made by `compile_network()` in `assemble.py`.
- `batch`: a `Batch` (`pipeline/batch.py`) on the state's device, as `Stream.batches()` yields it.
- `optim`: the recipe's `Optim` settings (label smoothing, gradient clipping, EMA decay).
- `step`: the number of steps done before this one (default: 0).
- `grad_accum_steps`: the largest number of pieces that the batch is split into, to save memory
  (default: 1). It is at least 1 and need not divide the batch: the last piece may be smaller.
- `replay_weight`: the weight of a replayed sample in the loss (default: 1, as a new one).
- `distill_weight`: the weight of the distance to the logits of `train_state.teacher` on replayed
  samples (default: 0, none).

It returns a scalar tensor on the device. With one process, this is the loss of the batch. With
several ranks, each returns its part; the mean of the parts is the loss of the batch. A loss that is
not finite raises no error: the first such `step` (counted from 0, on this rank) is stored in
`train_state.bad_step`, and `run.py` reads it and stops the run.

`take_step(train_state, forward, batch, recipe, step, steps)` does so as step `step` of a run with
`steps` steps: by the `Recipe`, with the learning rate of this step.

`not_finite_in(train_state)` returns the name of the first weight or buffer, of the network or its
EMA, that is not finite, or None; frozen weights are not checked. `first_bad(steps)` takes the
`bad_step` of each rank, a list of ints, and returns the first step and its rank, or None.
`average_of(net)` returns a copy of a network for the EMA. `wrap_ddp(train_state)` returns the
network, wrapped in `DistributedDataParallel` on several ranks. A `TrainState` has `net`,
`optimizer`, `scaler`, `device`, `dtype`, `dist`, `ema` and `teacher` (networks, or None), and
`bad_step` (-1: none). Its `shown` is the network that is validated and saved: the EMA, or without
one the network.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.parallel import DistributedDataParallel

from model.distributed import DistEnv, all_reduce_sum, broadcast, with_others
from model.network import Detector
from model.recipe import Optim, Recipe
from model.score import autocast
from model.training.optim import schedule, set_learning_rate
from pipeline.batch import Batch


@dataclass
class TrainState:
    """Mutable state of a run. `ema` holds the averaged weights of `net`; `teacher` gives the target
    logits of replayed samples; both may be None. `bad_step` is the first step with a loss that is
    not finite, -1 if there is none. `bad_step` is a tensor on the device, because reading it waits
    for the GPU.
    """

    net: Detector
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    dtype: torch.dtype
    dist: DistEnv = field(default_factory=DistEnv)
    ema: Detector | None = None
    teacher: Detector | None = None
    bad_step: torch.Tensor = field(default_factory=lambda: torch.tensor(-1))

    @functools.cached_property
    def learning(self) -> list[torch.nn.Parameter]:
        """Parameters of `net` that training changes, in its order. Collecting them takes 1.5 ms."""
        return [parameter for parameter in self.net.parameters() if parameter.requires_grad]

    @property
    def shown(self) -> Detector:
        """Network that is validated and saved: the EMA if there is one, else `net`."""
        return self.ema or self.net


def not_finite_in(train_state: TrainState) -> str | None:
    """Return the name of the first trainable weight or buffer, of the network or its EMA, that is
    not finite, else None.

    Frozen weights are skipped: they do not change, and checking a large backbone takes 0.5 s.
    """
    for net in (train_state.net, train_state.ema):
        if net is None:
            continue
        frozen = {
            name for name, p in train_state.net.backbone.named_parameters() if not p.requires_grad
        }
        for name, value in net.backbone.state_dict().items():
            if name in frozen or not value.is_floating_point():
                continue
            if not bool(torch.isfinite(value).all()):
                return name
    return None


def first_bad(steps: Sequence[int]) -> tuple[int, int] | None:
    """Return the first step with a loss that is not finite, and its rank. `steps` has the
    `bad_step` of each rank. One step later, all ranks have such losses, because they share
    gradients.
    """
    return min(((step, rank) for rank, step in enumerate(steps) if step >= 0), default=None)


def average_of(net: Detector) -> Detector:
    """Create the EMA copy of a network, without gradients."""
    return copy.deepcopy(net).requires_grad_(False).eval()


def share_buffers(train_state: TrainState) -> None:
    """Give every rank the buffers of rank 0, such as the running statistics of batch norms. DDP
    does so before each forward pass, but not after the last one.
    """
    for net in filter(None, (train_state.net, train_state.ema)):
        broadcast(train_state.dist, net.buffers())


def wrap_ddp(train_state: TrainState) -> torch.nn.Module:
    """Return the network that the loop calls: on several ranks DDP averages its gradients."""
    if train_state.dist.world_size == 1:
        return train_state.net
    on = [train_state.device] if train_state.device.type == "cuda" else None
    with with_others():
        return DistributedDataParallel(train_state.net, device_ids=on, gradient_as_bucket_view=True)


def train_step(
    train_state: TrainState,
    forward: torch.nn.Module,
    batch: Batch,
    optim: Optim,
    *,
    step: int = 0,
    grad_accum_steps: int = 1,
    replay_weight: float = 1.0,
    distill_weight: float = 0.0,
) -> torch.Tensor:
    """Take one optimizer step and return this rank's part of the loss, a scalar on the device.

    The loss is the mean over the valid images of all ranks, of which replayed images count
    `replay_weight` times, and equals the mean of the parts. The batch is split into
    `grad_accum_steps` pieces, which saves memory. Pieces change the result only of networks with
    unfrozen batch norm, which normalizes each piece alone. `distill_weight` weights the squared
    distance between the logits of replayed samples and those of the teacher (DER++, Buzzega et al.
    2020).
    """
    if train_state.net.training == train_state.net.freeze_backbone:  # not in its training mode
        train_state.net.train()  # not always: 3 ms for a ViT-B, longer than a step of a head
    train_state.optimizer.zero_grad(set_to_none=True)
    # DDP averages gradients over ranks, so divide by the mean count to get the mean over all
    # images.
    weights, replayed = batch.valid.float(), None
    if distill_weight or replay_weight != 1:
        replayed = torch.from_numpy(batch.replayed).to(train_state.device, non_blocking=True)
        weights = torch.where(replayed, replay_weight, 1.0) * weights
    count = all_reduce_sum(train_state.dist, weights.sum()) / train_state.dist.world_size
    # Smallest possible count with a valid image, so that only an empty batch is clamped.
    least = min(1.0, replay_weight) / train_state.dist.world_size
    count = count.clamp(min=least)
    total = torch.zeros((), device=train_state.device)
    for rows, last in _pieces(len(batch), grad_accum_steps):
        with with_others(), _synchronized(forward, last):
            with autocast(train_state.device, train_state.dtype):
                logits = forward(batch.images[rows])
            losses = cross_entropy(
                logits.float(), batch.labels[rows],
                reduction="none", label_smoothing=optim.label_smoothing,
            )  # fmt: skip
            loss = (losses * weights[rows]).sum() / count
            if replayed is not None and train_state.teacher is not None:
                held = replayed[rows] & batch.valid[rows]
                loss = (
                    loss
                    + distill_weight
                    * _distance(train_state, train_state.teacher, batch.images[rows], logits, held)
                    / count
                )
            train_state.scaler.scale(loss).backward()
        total += loss.detach()
    train_state.scaler.unscale_(train_state.optimizer)
    torch.nn.utils.clip_grad_norm_(train_state.learning, optim.clip_grad_norm)
    train_state.scaler.step(train_state.optimizer)
    train_state.scaler.update()
    _note_if_bad(train_state, total, step)
    if train_state.ema is not None:
        _average(train_state.ema, train_state.net, min(optim.ema_decay, (1 + step) / (10 + step)))
    return total


def take_step(
    train_state: TrainState,
    forward: torch.nn.Module,
    batch: Batch,
    recipe: Recipe,
    *,
    step: int,
    steps: int,
) -> torch.Tensor:
    """Take step `step` (from 0) of the `steps` of a run by its recipe, at the learning rate of this
    step. Returns as `train_step`.
    """
    set_learning_rate(train_state.optimizer, schedule(recipe.optim, step, steps))
    return train_step(
        train_state, forward, batch, recipe.optim,
        step=step, grad_accum_steps=recipe.run.grad_accum_steps,
        replay_weight=recipe.replay.weight, distill_weight=recipe.replay.distill_weight,
    )  # fmt: skip


def _pieces(count: int, grad_accum_steps: int) -> Iterator[tuple[slice, bool]]:
    """Yield the rows of each piece of a batch, and whether the piece is the last."""
    size = -(-count // grad_accum_steps)
    starts = range(0, count, size)
    for start in starts:
        yield slice(start, start + size), start == starts[-1]


def _synchronized(forward: torch.nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Return DDP's `no_sync` context except for the last piece: ranks exchange gradients once."""
    inner = getattr(forward, "_orig_mod", forward)
    if last or not isinstance(inner, DistributedDataParallel):
        return contextlib.nullcontext()
    return inner.no_sync()


def _distance(
    train_state: TrainState,
    teacher: Detector,
    images: torch.Tensor,
    logits: torch.Tensor,
    held: torch.Tensor,
) -> torch.Tensor:
    """Sum the squared distances to the teacher's logits over the rows that `held` (bool (B,))
    marks.

    The teacher runs on all rows, because selecting rows would wait for the GPU.
    """
    with torch.no_grad(), autocast(train_state.device, train_state.dtype):
        wanted = teacher(images).float()
    return (mse_loss(logits.float(), wanted, reduction="none").mean(1) * held).sum()


def _note_if_bad(train_state: TrainState, loss: torch.Tensor, step: int) -> None:
    """Store the first step whose loss is not finite, without waiting for the device."""
    if train_state.bad_step.device != loss.device:
        train_state.bad_step = train_state.bad_step.to(loss.device)
    first = (train_state.bad_step < 0) & ~torch.isfinite(loss)
    train_state.bad_step = torch.where(first, step, train_state.bad_step)


def _average(ema: Detector, net: Detector, decay: float) -> None:
    """Update the EMA: weights move toward the current ones by 1 - `decay`, buffers are copied."""
    with torch.no_grad():
        averaged: list[torch.Tensor] = list(ema.parameters())
        current: list[torch.Tensor] = list(net.parameters())
        torch._foreach_lerp_(averaged, current, 1.0 - decay)
        for averaged_buffer, buffer in zip(ema.buffers(), net.buffers(), strict=True):
            averaged_buffer.copy_(buffer)
