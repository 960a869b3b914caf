"""ONE STEP: a batch in, weights moved. Mixed precision, accumulation, averaging, many ranks."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.parallel import DistributedDataParallel

from model.distributed import Ranks, sum_over
from model.network import Detector
from model.score import autocast
from model.training.optim import Optim
from pipeline.batch import Batch


@dataclass
class Trainer:
    """The moving parts of a run. `ema` averages the weights of `net`, `teacher` is what replayed
    samples are held to; both may be None. `bad_step` is the first step with a loss that is not
    finite, -1 for none, on the device: looking at it waits for the GPU.
    """

    net: Detector
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks = field(default_factory=Ranks)
    ema: Detector | None = None
    teacher: Detector | None = None
    bad_step: torch.Tensor = field(default_factory=lambda: torch.tensor(-1))

    @property
    def shown(self) -> Detector:
        """The network that is validated and saved."""
        return self.ema or self.net


def average_of(net: Detector) -> Detector:
    """A copy of a network to average its weights in; it takes no gradient."""
    return copy.deepcopy(net).requires_grad_(False).eval()


def spread(trainer: Trainer) -> torch.nn.Module:
    """The network as the loop calls it: on many ranks gradients are averaged behind the scenes."""
    if trainer.ranks.world == 1:
        return trainer.net
    on = [trainer.device] if trainer.device.type == "cuda" else None
    return DistributedDataParallel(trainer.net, device_ids=on, gradient_as_bucket_view=True)


def train_step(
    trainer: Trainer,
    forward: torch.nn.Module,
    batch: Batch,
    optim: Optim,
    *,
    step: int = 0,
    accumulate: int = 1,
    distill: float = 0.0,
) -> torch.Tensor:
    """One optimizer step; returns this rank's part of the loss, a scalar on the device.

    The loss is the mean over the valid images of all ranks; the parts average to it. The batch is
    taken in `accumulate` pieces, which changes nothing but memory. `distill` weighs the squared
    distance between the logits of replayed samples and the teacher's (DER++, Buzzega et al. 2020).
    """
    trainer.net.train()
    trainer.optimizer.zero_grad(set_to_none=True)
    # Gradients are averaged over the ranks: dividing by the mean count gives the mean over all.
    count = sum_over(trainer.ranks, batch.valid.sum().float()) / trainer.ranks.world
    count = count.clamp(min=1.0 / trainer.ranks.world)
    replayed = torch.from_numpy(batch.replayed).to(trainer.device) if distill else None
    total = torch.zeros((), device=trainer.device)
    for rows, last in _pieces(len(batch), accumulate):
        with _synchronised(forward, last):
            with autocast(trainer.device, trainer.dtype):
                logits = forward(batch.images[rows])
            losses = cross_entropy(
                logits.float(), batch.labels[rows],
                reduction="none", label_smoothing=optim.label_smoothing,
            )  # fmt: skip
            loss = (losses * batch.valid[rows]).sum() / count
            if distill and trainer.teacher is not None:
                held = replayed[rows] & batch.valid[rows]
                loss = loss + distill * _distance(trainer, batch.images[rows], logits, held) / count
            trainer.scaler.scale(loss).backward()
        total += loss.detach()
    trainer.scaler.unscale_(trainer.optimizer)
    torch.nn.utils.clip_grad_norm_(trainer.net.parameters(), optim.clip)
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    _note_if_bad(trainer, total, step)
    if trainer.ema is not None:
        _average(trainer, min(optim.ema, (1 + step) / (10 + step)))
    return total


def _pieces(count: int, accumulate: int) -> Iterator[tuple[slice, bool]]:
    """The rows of each piece of a batch, and whether it is the last."""
    size = -(-count // accumulate)
    starts = range(0, count, size)
    for start in starts:
        yield slice(start, start + size), start == starts[-1]


def _synchronised(forward: torch.nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Ranks exchange gradients with the last piece only."""
    inner = getattr(forward, "_orig_mod", forward)
    if last or not isinstance(inner, DistributedDataParallel):
        return contextlib.nullcontext()
    return inner.no_sync()


def _distance(
    trainer: Trainer, images: torch.Tensor, logits: torch.Tensor, held: torch.Tensor
) -> torch.Tensor:
    """The summed squared distance to the teacher's logits over the rows `held`.

    All rows go through the teacher: picking some would wait for the GPU to say which.
    """
    with torch.no_grad(), autocast(trainer.device, trainer.dtype):
        wanted = trainer.teacher(images).float()
    return (mse_loss(logits.float(), wanted, reduction="none").mean(1) * held).sum()


def _note_if_bad(trainer: Trainer, loss: torch.Tensor, step: int) -> None:
    """Remember the first step whose loss is not finite, without waiting for the device."""
    if trainer.bad_step.device != loss.device:
        trainer.bad_step = trainer.bad_step.to(loss.device)
    first = (trainer.bad_step < 0) & ~torch.isfinite(loss)
    trainer.bad_step = torch.where(first, step, trainer.bad_step)


def _average(trainer: Trainer, decay: float) -> None:
    """Move the averaged weights a little towards the current ones; buffers are copied."""
    with torch.no_grad():
        averaged, current = list(trainer.ema.parameters()), list(trainer.net.parameters())
        torch._foreach_lerp_(averaged, current, 1.0 - decay)
        for one, other in zip(trainer.ema.buffers(), trainer.net.buffers(), strict=True):
            one.copy_(other)
