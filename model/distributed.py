"""Many processes, one per GPU: what torchrun says of this one, and the few words they exchange."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class DistEnv:
    """Which of `world_size` processes this is, and which of those of its machine (`local_rank`)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes, shows progress and logs for all."""
        return self.rank == 0


@contextlib.contextmanager
def init_distributed() -> Iterator[DistEnv]:
    """Join the other processes that torchrun started; alone without torchrun.

    CPU tensors travel through gloo, CUDA tensors through NCCL.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield DistEnv()
        return
    dist = DistEnv(int(os.environ["RANK"]), world_size, int(os.environ.get("LOCAL_RANK", "0")))
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.local_rank)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist
    finally:
        distributed.destroy_process_group()


def all_reduce_sum(dist: DistEnv, value: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, on the device of `value`; the same on each of them."""
    if dist.world_size > 1:
        value = value.clone()
        distributed.all_reduce(value)
    return value


def all_reduce_any(dist: DistEnv, flag: bool) -> bool:
    """Whether `flag` is set on any rank: a word on the host, that waits for no GPU."""
    if dist.world_size == 1:
        return flag
    value = torch.tensor([int(flag)])
    distributed.all_reduce(value, distributed.ReduceOp.MAX)
    return bool(value.item())


def all_gather_object(dist: DistEnv, value: T) -> list[T]:
    """The value of every rank, in order; the same list on each of them."""
    if dist.world_size == 1:
        return [value]
    values: list[Any] = [None] * dist.world_size
    distributed.all_gather_object(values, value)
    return values
