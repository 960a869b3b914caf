"""Ranks that wait for rank 0, and end when another one fails."""

import logging
from pathlib import Path

import pytest
import torch

import console
from model import distributed
from model.distributed import (
    DistEnv,
    RankError,
    all_reduce_any,
    broadcast,
    check_alike,
    on_main,
)
from tests.ranks import two_ranks


def full(_dist: DistEnv) -> None:
    def work() -> None:
        raise OSError(28, "No space left on device", "/runs/one")

    on_main(_dist, work)


def answers(dist: DistEnv) -> object:
    return on_main(dist, lambda: Path("/runs") if dist.is_main else None)


def warned(dist: DistEnv) -> list[str]:
    """Return the warnings that this rank logs: one about the run, and one about its samples."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    console.log.addHandler(handler)
    console.log.warning("not calibrated")
    console.rank_log.warning("not decoded: an image of rank %d", dist.rank)
    return logged


def test_a_warning_about_the_run_comes_from_rank_0_alone() -> None:
    assert two_ranks(warned) == [
        ["not calibrated", "not decoded: an image of rank 0"],
        ["not decoded: an image of rank 1"],
    ]


def rank_1_fails(dist: DistEnv) -> None:
    if not dist.is_main:
        raise ValueError("too many images cannot be decoded")
    all_reduce_any(dist, False)


def test_all_ranks_get_what_rank_0_returns() -> None:
    assert two_ranks(answers) == [Path("/runs"), Path("/runs")]


def averages_of_batches(dist: DistEnv) -> float:
    """Return the running mean of a batch norm that has seen the rank's own images."""
    net = torch.nn.BatchNorm1d(1)
    net(torch.full((2, 1), 1.0 + dist.rank))
    broadcast(dist, net.buffers())
    return net.running_mean.item()


def test_ranks_share_the_statistics_of_rank_0() -> None:
    first, second = two_ranks(averages_of_batches)
    assert first == second == pytest.approx(0.1)


def test_a_failure_of_rank_0_ends_all_ranks_with_its_message() -> None:
    assert two_ranks(full) == [
        "OSError: [Errno 28] No space left on device: '/runs/one'",
        "RankError: /runs/one: No space left on device",
    ]


def test_a_failure_of_another_rank_ends_the_rest() -> None:
    first, second = two_ranks(rank_1_fails)
    assert first == "RankError: another rank has ended or does not answer; see its message"
    assert second == "ValueError: too many images cannot be decoded"


def test_one_process_raises_the_error_itself() -> None:
    with pytest.raises(ZeroDivisionError):
        on_main(DistEnv(), lambda: 1 / 0)
    assert issubclass(RankError, ValueError)
    assert distributed.LONGEST_WAIT.days >= 1


def sees_another_file(dist: DistEnv) -> None:
    check_alike(dist, {"weights": "abc", "set a": "12" if dist.is_main else "34"})


def test_ranks_that_see_other_files_end_with_the_same_message() -> None:
    first, second = two_ranks(sees_another_file)
    assert first == second
    assert str(first).startswith("ValueError: set a: 12 on rank 0, but 34 on rank 1; give all")
