"""Loader statistics, and the watchdog's warning when a stage hangs."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.batch import Batch, BatchTiming
from pipeline.monitor import LoaderStats, Watchdog, WorkerStatus
from pipeline.read import ShardReader
from pipeline.replay import Replay
from pipeline.stream import Stream, open_pool
from tests.servers import HANG_S


def batch(sources: list[int], *, replayed: int = 0, timing: BatchTiming | None = None) -> Batch:
    count = len(sources)
    return Batch(
        images=torch.zeros(count, 3, 4, 4, dtype=torch.uint8),
        labels=torch.zeros(count, dtype=torch.int64),
        valid=torch.ones(count, dtype=torch.bool),
        samples=np.arange(count),
        sources=np.array(sources),
        replayed=np.arange(count) < replayed,
        failures={0: "broken"} if count == 3 else {},
        timing=timing or BatchTiming(),
    )


def test_statistics_add_up_the_batches_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("pipeline.monitor.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slowly():
        for wait in (0.0, 0.02, 0.2):
            now[0] += wait
            yield batch(
                [0, 0, 1], replayed=1, timing=BatchTiming(read_s=0.3, decode_s=0.1, ready=2)
            )

    stats = LoaderStats(["a", "b", "c"])
    assert sum(len(timed) for timed in stats.timed(slowly())) == 9
    now[0] += 0.08
    row = stats.row()
    assert row["images/a"] == 6 and row["images/b"] == 3 and "images/c" not in row
    assert row["unreadable"] == 3
    assert row["replay_share"] == pytest.approx(1 / 3)
    assert row["ready"] == 2
    assert (row["read_ms"], row["decode_ms"]) == (pytest.approx(300), pytest.approx(100))
    assert row["stall_max_ms"] == pytest.approx(200)
    assert row["stall_p50_ms"] == pytest.approx(20)
    assert row["wait_share"] == pytest.approx(0.22 / 0.3)
    assert row["wait_read"] == pytest.approx(0.75 * row["wait_share"])
    assert stats.row()["images_per_s"] == 0  # the first `row` has reset the counts


def test_the_speed_is_that_of_all_ranks() -> None:
    """Each has batches of the same size; contents are those of this rank."""
    stats = LoaderStats(["a", "b"], ranks=4)
    list(stats.timed(batch([0, 0, 1]) for _ in range(100)))
    before = time.perf_counter() - stats.since
    rate = stats.rates()["images_per_s"]
    after = time.perf_counter() - stats.since
    assert 4 * 300 / after <= rate <= 4 * 300 / before
    assert stats.row()["images/a"] == 200


@pytest.fixture
def short(make_stream: Callable, data: Path) -> Callable[..., Stream]:
    """As `make_stream`, with epochs of a few batches."""
    pool = open_pool(data, ["val"], Replay())
    return functools.partial(make_stream, pool=pool, ratio="0")


def test_each_batch_has_its_reading_and_decoding_time(short: Callable) -> None:
    for backend in ("pil", "dali"):
        stream = short(backend=backend, num_workers=2)
        batches = list(stream.batches(0, 1))
        assert len(batches) == stream.steps_per_epoch > 1
        for batch in batches:
            assert batch.timing.decode_s > 0
            assert batch.timing.read_s >= 0
            assert 0 <= batch.timing.ready <= 10


def test_the_watchdog_logs_the_stage_of_each_worker(logged: list[str]) -> None:
    status = WorkerStatus(["worker 0", "worker 1"])
    with Watchdog(status.describe, stall_warning_s=HANG_S) as watchdog, watchdog.waiting(3):
        time.sleep(0.01)
    assert not logged  # the wait was shorter than `stall_warning_s`
    until = time.monotonic() + HANG_S
    with Watchdog(status.describe, stall_warning_s=0.1) as watchdog:
        with watchdog.waiting(4), status.at(1, "reading", 6):
            began = time.monotonic()
            while not logged and time.monotonic() < until:
                time.sleep(0.01)
            assert time.monotonic() - began > 0.07  # three of four parts
    assert "at step 4: worker 0 idle, worker 1 reading step 6" in logged[0]


@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_a_reader_that_hangs_is_named(
    short: Callable, backend: str, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    read = ShardReader.read
    said = ("worker 0" if backend == "pil" else "reader") + " reading step 0"

    def hang(self: ShardReader, samples):
        until = time.monotonic() + HANG_S
        while not any(said in line for line in logged) and time.monotonic() < until:
            time.sleep(0.01)
        return read(self, samples)

    monkeypatch.setattr(ShardReader, "read", hang)
    stream = short(backend=backend, num_workers=0, stall_warning_s=0.2)
    assert len(list(stream.batches(0, 1))) == stream.steps_per_epoch
    assert "at step 0: " in logged[0]
    assert any(said in line for line in logged)


@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_an_error_in_the_reader_reaches_the_consumer(
    make_stream: Callable, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: ShardReader, samples):
        raise MemoryError("the reader has no memory left")

    monkeypatch.setattr(ShardReader, "read", fail)
    with pytest.raises(MemoryError, match="no memory left"):
        next(make_stream(backend=backend, num_workers=0).batches(0, 1))


def test_a_status_made_in_inference_mode_can_be_changed_by_other_threads() -> None:
    """That mode is of one thread. DALI's reader is another than the one that computes features."""
    with torch.inference_mode():
        status = WorkerStatus(["reader"])
    status.finished(0)
    assert status.made() == 1
