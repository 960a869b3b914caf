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
class Ranks:
    """Which of `world` processes this is, and which of those of its machine (`local`)."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes, draws progress and speaks for all."""
        return self.rank == 0


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes that torchrun started; alone without torchrun.

    CPU tensors travel through gloo, CUDA tensors through NCCL.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    ranks = Ranks(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", "0")))
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield ranks
    finally:
        distributed.destroy_process_group()


def sum_over(ranks: Ranks, value: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, on the device of `value`; the same on each of them."""
    if ranks.world > 1:
        value = value.clone()
        distributed.all_reduce(value)
    return value


def any_over(ranks: Ranks, flag: bool) -> bool:
    """Whether `flag` is set on any rank: a word on the host, that waits for no GPU."""
    if ranks.world == 1:
        return flag
    value = torch.tensor([int(flag)])
    distributed.all_reduce(value, distributed.ReduceOp.MAX)
    return bool(value.item())


def gather(ranks: Ranks, value: T) -> list[T]:
    """The value of every rank, in order; the same list on each of them."""
    if ranks.world == 1:
        return [value]
    found: list[Any] = [None] * ranks.world
    distributed.all_gather_object(found, value)
    return found
