"""Connect the processes of a multi-GPU run (ranks), and exchange values between them.

Main entry: `init_distributed()`, a context manager without arguments (`with init_distributed() as
dist:`). It reads torchrun's environment variables, joins the process group (and leaves it at the
end) and yields a `DistEnv`: `rank`, number of ranks (`world_size`), rank on this machine
(`local_rank`), and `is_main` (rank 0, which writes files). Without torchrun, or with one process,
it yields `DistEnv()`: rank 0 of 1.

Four functions exchange values. All ranks must call them together, each with the `DistEnv` and its
own value. The first three return the same result on every rank; for one process it is the value
itself (`all_gather_object()`: a list with it).

- `all_reduce_sum(dist, value)`: the sum of the tensors, which have the same shape on all ranks. The
  result is on the device of `value` (CPU or GPU).
- `all_reduce_any(dist, flag)`: whether `flag` (bool) is true on any rank.
- `all_gather_object(dist, value)`: the list of all ranks' values, in the order of ranks. `value` is
  any object that can be pickled.
- `broadcast(dist, tensors)`: returns nothing; the tensors of all ranks get the values of rank 0's.

`on_main(dist, work)` calls the function `work` on rank 0 alone and returns its result, which can be
pickled, on every rank; the other ranks wait. Whatever only rank 0 does, and may fail, goes through
it: if `work` raises an error, every rank does, rank 0 the same error and the others `RankError`
with its message.

`check_alike(dist, seen)` raises the same `ValueError` on every rank if `seen`, a dict from words
for the reader to a text, differs between ranks.

All six raise `RankError` (a `ValueError`) if another rank has ended or does not answer. So does
`with with_others():` around the exchanges of torch's own `DistributedDataParallel`.
"""

import contextlib
import datetime
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

import console
from escape import one_line

T = TypeVar("T")

LONGEST_WAIT = datetime.timedelta(days=7)
"""Longest time that ranks wait for one another. Rank 0 alone packs a folder or fits heads for
hours, and a rank that waits for images must report that first (`loading.stall_error_s`). torch's
defaults are 10 minutes for NCCL and 30 for gloo. A rank that ends is noticed at once.
"""


class RankError(ValueError):
    """Another rank has failed. The message is its error, or says that it has ended."""


@dataclass(frozen=True)
class DistEnv:
    """Rank of this process among `world_size` processes, and its rank on its own machine
    (`local_rank`). `meeting` is the group in which ranks wait for one another (`LONGEST_WAIT`).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    meeting: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, shows progress and logs for all ranks."""
        return self.rank == 0


@contextlib.contextmanager
def init_distributed() -> Iterator[DistEnv]:
    """Join the process group that torchrun started. Without torchrun, yield one rank of one. Other
    ranks than 0 log only errors, and warnings about their own samples and machine
    (`console.rank_log`).

    CPU tensors are exchanged through gloo, CUDA tensors through NCCL.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield DistEnv()
        return
    if "RANK" not in os.environ:
        raise ValueError(
            f"WORLD_SIZE is {world_size}, but RANK is not set: start the command with torchrun, or "
            "unset WORLD_SIZE"
        )
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=LONGEST_WAIT)
    meeting = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    dist = DistEnv(rank, world_size, local_rank, meeting)
    if not dist.is_main:
        console.log.setLevel(logging.ERROR)
        console.rank_log.setLevel(logging.WARNING)
    yield dist
    # Not after an error: NCCL would wait for the other ranks, which never get here. They end when
    # the end of this process closes the connections.
    distributed.destroy_process_group()


@contextlib.contextmanager
def with_others() -> Iterator[None]:
    """Raise `RankError` if an exchange in the block fails because another rank has ended."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        raise RankError("another rank has ended or does not answer; see its message") from error


def on_main(dist: DistEnv, work: Callable[[], T]) -> T:
    """Call `work` on rank 0 while the other ranks wait, and return its result on every rank.

    Raises:
        RankError: on the other ranks, if `work` has failed. Rank 0 raises the error itself.
    """
    if dist.world_size == 1:
        return work()
    result: T | None = None
    failure: Exception | None = None
    if dist.is_main:
        try:
            result = work()
        except Exception as error:  # any error: the other ranks wait for a result
            failure = error
    reason = failure and one_line(failure)
    result, reason = all_gather_object(dist, (result, reason))[0]
    if failure is not None:
        raise failure
    if reason is not None:
        raise RankError(reason)
    return result  # type: ignore[return-value]


def all_reduce_sum(dist: DistEnv, value: torch.Tensor) -> torch.Tensor:
    """Sum `value` over all ranks. The result is on the device of `value`, equal on every rank."""
    if dist.world_size > 1:
        value = value.clone()
        with with_others():
            distributed.all_reduce(value)
    return value


def broadcast(dist: DistEnv, tensors: Iterable[torch.Tensor]) -> None:
    """Give the tensors of every rank the values of those of rank 0, in place."""
    if dist.world_size > 1:
        with with_others():
            for tensor in tensors:
                distributed.broadcast(tensor, 0)


def all_reduce_any(dist: DistEnv, flag: bool) -> bool:
    """Return True on every rank if `flag` is set on any rank. The all-reduce runs on the CPU
    (gloo), so it does not synchronize with the GPU.
    """
    if dist.world_size == 1:
        return flag
    value = torch.tensor([int(flag)])
    with with_others():
        distributed.all_reduce(value, distributed.ReduceOp.MAX)
    return bool(value.item())


def all_gather_object(dist: DistEnv, value: T) -> list[T]:
    """Return the list of all ranks' values in the order of ranks, equal on every rank."""
    if dist.world_size == 1:
        return [value]
    values: list[Any] = [None] * dist.world_size
    with with_others():
        distributed.all_gather_object(values, value, group=dist.meeting)
    return values


def check_alike(dist: DistEnv, seen: Mapping[str, str]) -> None:
    """Check that all ranks see the same files. `seen` maps the words for a file to its name or
    hash.

    Raises:
        ValueError: a rank sees another file than rank 0; the message names both.
    """
    first, *others = all_gather_object(dist, dict(seen))
    for rank, other in enumerate(others, 1):
        for what in sorted(first.keys() | other.keys()):
            here, there = first.get(what, "none"), other.get(what, "none")
            if here != there:
                raise ValueError(
                    f"{what}: {here} on rank 0, but {there} on rank {rank}; give all machines the "
                    "same folders of runs and data, such as those of a network file system"
                )
