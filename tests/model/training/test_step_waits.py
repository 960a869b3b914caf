"""A training step never waits for the GPU: the host queues the next step while the GPU computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import recipes
from benchmarks.step import Way, random_batch
from model.network import build
from model.recipe import Recipe
from model.training.optim import make_optimizer
from model.training.step import TrainState, average_of, take_step
from tests.builders import CPU, TINY

READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount"}
"""Operations that wait for the device, because the host or a shape needs a value of it."""


class Reads(TorchDispatchMode):
    """Counts operations, and notes those that read a value of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.reading = 0, []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.count += 1
        name = func.overloadpacket.__name__
        masks = name == "index" and any(
            mask is not None and mask.dtype == torch.bool for mask in args[1]
        )
        if name in READING or masks:
            self.reading.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def refused_on_gpu() -> Iterator[None]:
    """Raise an error for each CUDA operation that waits."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(
    "device",
    [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu, id="cuda")],
    ids=str,
)
@pytest.mark.parametrize("name", ["phase1-fast", "phase2-fast"])
def test_a_step_reads_nothing_from_the_device(name: str, device: torch.device) -> None:
    """With mixed precision, an EMA, fused AdamW, and in phase 2 weights of replayed images and a
    teacher.
    """
    changes = ["replay.weight=2", "replay.distill_weight=0.5"] if name == "phase2-fast" else []
    recipe = recipes.load(Recipe, recipes.FOLDER / f"{name}.toml", changes)
    net, teacher = (build(TINY, pretrained=False).to(device) for _ in range(2))
    optimizer = make_optimizer(net.backbone, recipe.optim, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    state = TrainState(net, optimizer, scaler, device, torch.bfloat16)
    state.ema = average_of(net)
    state.teacher = average_of(teacher) if changes else None
    batch = random_batch(Way(batch=8, dtype="bf16"), (64, 64), device)
    batch.replayed[::2] = bool(changes)
    for step in range(2):  # the first makes the optimizer's state
        take_step(state, net, batch, recipe, step=step, steps=10)
    waits = refused_on_gpu() if device.type == "cuda" else Reads()
    with waits:
        take_step(state, net, batch, recipe, step=2, steps=10)
    if isinstance(waits, Reads):
        assert waits.count > 100 and waits.reading == []
