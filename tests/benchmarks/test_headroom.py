"""Starts of epochs within the clock of `benchmarks.headroom` and `benchmarks.loader`."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from benchmarks import headroom
from benchmarks.headroom import WARM_UP
from pipeline.batch import Batch
from pipeline.monitor import LoaderStats
from tests.builders import CPU


def batch_of(count: int) -> Batch:
    return Batch(
        images=torch.zeros(count, 3, 2, 2, dtype=torch.uint8),
        labels=torch.zeros(count, dtype=torch.int64), valid=torch.ones(count, dtype=torch.bool),
        samples=np.arange(count), sources=np.zeros(count, np.int32),
        replayed=np.zeros(count, np.bool_), failures={},
    )  # fmt: skip


class Clock:
    """A clock that only `sleep` moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for name in ("perf_counter", "monotonic"):
            monkeypatch.setattr(time, name, lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_start_of_an_epoch_within_the_clock_is_told_apart(clock: Clock) -> None:
    """On an H200 one start of 3.2 s made 2,338 images/s of 3,880."""

    def batches() -> Iterator[Batch]:
        for step in range(10**6):
            clock.sleep(3.0 if step % 20 == 0 else 0.5)
            yield batch_of(4)

    stats = LoaderStats(["only"])
    row = headroom.run(batches(), lambda _batch: None, stats, CPU, 9.0, steps_per_epoch=20)
    assert WARM_UP < 20 < WARM_UP + row["steps"]
    assert row["epoch_starts_ms"] == [pytest.approx(3000)]
    assert row["images_per_s_within"] == pytest.approx(4 / 0.5)
    assert row["ms_per_step_within"] == pytest.approx(500)
    assert row["images_per_s"] < 7
    (line,) = headroom.epoch_starts({"loader": [row], "full": [row | {"epoch_starts_ms": []}]})
    assert line == "loader: 1 starts of epochs, up to 3,000 ms; without them 8 images/s"


def test_without_epochs_both_speeds_are_the_same(clock: Clock) -> None:
    def batches() -> Iterator[Batch]:
        while True:
            clock.sleep(0.5)
            yield batch_of(4)

    row = headroom.run(batches(), lambda _batch: None, LoaderStats(["only"]), CPU, 9.0)
    assert row["epoch_starts_ms"] == []
    assert row["images_per_s"] == row["images_per_s_within"] == pytest.approx(8)
