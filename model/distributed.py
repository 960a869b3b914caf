"""Connect the processes of a multi-GPU run (ranks), and exchange values between them.

Main entry: `init_distributed()`, a context manager without arguments (`with init_distributed() as
dist:`). It reads torchrun's environment variables, joins the process group (and leaves it at the
end) and yields a `DistEnv`: `rank`, number of ranks (`world_size`), rank on this machine
(`local_rank`), and `is_main` (rank 0, which writes files). Without torchrun, or with one process,
it yields `DistEnv()`: rank 0 of 1.

Three functions exchange values. All ranks must call them together, each with the `DistEnv` and its
own value. Each returns the same result on every rank; for one process it is the value itself
(`all_gather_object()`: a list with it).

- `all_reduce_sum(dist, value)`: the sum of the tensors, which have the same shape on all ranks. The
  result is on the device of `value` (CPU or GPU).
- `all_reduce_any(dist, flag)`: whether `flag` (bool) is true on any rank.
- `all_gather_object(dist, value)`: the list of all ranks' values, in the order of ranks. `value` is
  any object that can be pickled.
"""

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
    """Rank of this process among `world_size` processes, and its rank on its own machine
    (`local_rank`).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, shows progress and logs for all ranks."""
        return self.rank == 0


@contextlib.contextmanager
def init_distributed() -> Iterator[DistEnv]:
    """Join the process group that torchrun started. Without torchrun, yield one rank of one.

    CPU tensors are exchanged through gloo, CUDA tensors through NCCL.
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
    """Sum `value` over all ranks. The result is on the device of `value`, equal on every rank."""
    if dist.world_size > 1:
        value = value.clone()
        distributed.all_reduce(value)
    return value


def all_reduce_any(dist: DistEnv, flag: bool) -> bool:
    """Return True on every rank if `flag` is set on any rank. The all-reduce runs on the CPU
    (gloo), so it does not synchronize with the GPU.
    """
    if dist.world_size == 1:
        return flag
    value = torch.tensor([int(flag)])
    distributed.all_reduce(value, distributed.ReduceOp.MAX)
    return bool(value.item())


def all_gather_object(dist: DistEnv, value: T) -> list[T]:
    """Return the list of all ranks' values in the order of ranks, equal on every rank."""
    if dist.world_size == 1:
        return [value]
    values: list[Any] = [None] * dist.world_size
    distributed.all_gather_object(values, value)
    return values
