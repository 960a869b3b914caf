"""Build the objects of a planned training run: the network with its first weights, optimizer,
gradient scaler, and, if the recipe uses them, the moving average of the weights and the teacher
(the trained network that the run started from, for distillation).

Main entry: `assemble(plan)` takes a `RunPlan` (made by `plan()` in `plan.py`) and returns a
`TrainState` (these objects: `net`, `optimizer`, `scaler`, `ema`, `teacher` and more) on the run's
device. If the run is resumed, it has the state of the checkpoint. torch's random generators are
seeded. It raises `NetworkError` if the weights cannot be fetched or do not fit, and
`CheckpointError` if a checkpoint is damaged (both are `ValueError`s). Nothing is written.

`compile_network(plan, train_state)` takes both and returns the torch module that the training loop
calls with images: the network in `DistributedDataParallel` on several ranks, and compiled if the
plan says so. On several ranks, all call both functions.
"""

from typing import cast

import torch

from model import checkpoint
from model.device import keep_freed_memory
from model.network import Detector, build, load_backbone_file, load_weights
from model.training.optim import make_optimizer
from model.training.plan import RunPlan, Weights
from model.training.resume import restore
from model.training.step import TrainState, average_of, wrap_ddp


def assemble(plan: RunPlan) -> TrainState:
    """Build the training state on the run's device, as it is after `plan.done` steps. torch's
    random generators are seeded.

    Raises:
        NetworkError: timm's weights cannot be fetched.
    """
    recipe, device, dist = plan.recipe, plan.device, plan.dist
    keep_freed_memory(device)
    torch.manual_seed(recipe.run.seed)
    torch.backends.cudnn.benchmark = True
    net = build(recipe.network, pretrained=plan.weights.kind == "timm")
    _load(net, plan.weights)
    net.to(device)
    optimizer = make_optimizer(net.backbone, recipe.optim, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=plan.dtype == torch.float16)
    train_state = TrainState(net, optimizer, scaler, device, plan.dtype, dist)
    train_state.ema = average_of(net) if recipe.optim.ema_decay else None
    if plan.teacher and plan.teacher.path:
        teacher, _, _ = checkpoint.load_network(plan.teacher.path)
        teacher.requires_grad_(False).to(memory_format=torch.channels_last)
        train_state.teacher = teacher.to(device)
    if dist.world_size > 1:  # weights are equal on all ranks; stochastic depth must differ
        torch.manual_seed(recipe.run.seed + 1_000_003 * (1 + dist.rank))
    if plan.resumed:
        restore(train_state, plan.resumed, plan.done)
    return train_state


def _load(net: Detector, weights: Weights) -> None:
    """Load weights from a file or checkpoint. timm's weights and random ones are in `net`
    already.
    """
    if weights.path is None:
        return
    if weights.kind == "imagenet":
        load_backbone_file(net, weights.path)
    else:
        load_weights(net, checkpoint.read_weights(weights.path), str(weights.path))


def compile_network(plan: RunPlan, train_state: TrainState) -> torch.nn.Module:
    """Return the network that the training loop calls: wrapped in DDP on several ranks, and
    compiled if the plan says so.
    """
    net = wrap_ddp(train_state)
    return cast(torch.nn.Module, torch.compile(net)) if plan.compiled else net
