"""Loading processes: shared memory, stop signals, and a batch that never comes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import workers
from pipeline.loader import LoadError, _patient
from pipeline.monitor import WAITS, stalled
from pipeline.read import ShardReader
from pipeline.workers import fitting_workers, free_shared_memory
from tests.builders import ROOT, can_mount
from tests.servers import HANG_S

MIB = 2**20


def test_the_number_of_workers_fits_into_shared_memory() -> None:
    assert fitting_workers(16, 6 * MIB, None) == 16
    assert fitting_workers(16, 6 * MIB, 64 * MIB) == 3  # 2 x 3 + 3 batches are 54 MiB
    assert fitting_workers(2, 6 * MIB, 64 * MIB) == 2
    assert fitting_workers(16, 30 * MIB, 64 * MIB) == 0
    assert fitting_workers(16, 6 * MIB, 0) == 0


def test_shared_memory_that_is_not_writable_has_no_free_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert free_shared_memory(tmp_path) > MIB
    assert free_shared_memory(tmp_path / "none") == 0
    monkeypatch.setattr(workers.os, "access", lambda *_arguments: False)
    assert free_shared_memory(tmp_path) == 0


def test_fewer_workers_are_logged_and_none_is_an_error(
    make_stream: Callable, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    batch = 6 * 3 * 48**2
    monkeypatch.setattr("pipeline.loader.free_shared_memory", lambda: MIB + 5 * batch)
    stream = make_stream(backend="pil", num_workers=2)
    assert "using 1 of 2 loading workers; give it more (docker run --shm-size" in logged[0]
    assert len(list(stream.batches(0, 1))) == stream.steps_per_epoch
    for free, said in ((MIB, "has 1 MiB free"), (0, "cannot be written")):
        monkeypatch.setattr("pipeline.loader.free_shared_memory", lambda free=free: free)
        with pytest.raises(LoadError, match=rf"/dev/shm.* {said}, too little .*num_workers=0"):
            make_stream(backend="pil", num_workers=2)
        stream = make_stream(backend="pil", num_workers=-1)  # -1: no number was requested
        assert len(list(stream.batches(0, 1))) == stream.steps_per_epoch


SMALL = """
import sys, torch
from pathlib import Path
from pipeline.preprocess import Preprocess
from pipeline.loading import Loading
from pipeline.loader import LoadError, open_loader
from pipeline.stream import evaluation_batches
from sharding.format import open_shards

shards = open_shards([Path(sys.argv[1]) / "old"])
loading = Loading(batch_size=30, num_workers=int(sys.argv[2]), backend="pil")
try:
    loader = open_loader(
        shards, preprocess=Preprocess(), loading=loading, device=torch.device("cpu")
    )
    print(loader._workers, sum(int(b.valid.sum()) for b in evaluation_batches(loader)))
except LoadError as error:
    print(error)
"""


@pytest.mark.skipif(not can_mount(), reason="mounting a small /dev/shm needs root")
@pytest.mark.parametrize(
    ("options", "wanted", "said"),
    [("size=64m", 16, "4 80"), ("size=8m", 16, "too little"), ("size=8m", -1, "0 80"),
     ("size=64m,ro", 16, "cannot be written, too little"), ("size=64m,ro", -1, "0 80")],
)  # fmt: skip
@pytest.mark.slow
def test_a_container_with_little_shared_memory_loads_or_gives_the_reason(
    data: Path, options: str, wanted: int, said: str
) -> None:
    """Docker's default of 64 MB is too little for the batches of 16 workers, which would hang."""
    words = f'mount -t tmpfs -o {options} none /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", words, "-", sys.executable, "-c", SMALL, str(data),
         str(wanted)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert said in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(("backend", "workers"), [("pil", 1), ("dali", 0)])
def test_a_batch_that_never_comes_ends_the_run(
    make_stream: Callable, backend: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, ended = multiprocessing.Event(), multiprocessing.Event()  # a forked worker has both

    def hang(self: ShardReader, samples):
        began.set()
        ended.wait(HANG_S)

    def noted(*arguments: object) -> str:
        ended.set()  # else the run waits 5 s for its reader
        return stalled(*arguments)

    monkeypatch.setattr(ShardReader, "read", hang)
    monkeypatch.setattr("pipeline.loader.stalled", noted)
    monkeypatch.setattr("pipeline.read_ahead.stalled", noted)
    name = "worker 0" if backend == "pil" else "reader"
    for seconds in (1, 5, 25):  # on a busy machine the reader may begin later
        ended.clear()
        stream = make_stream(backend=backend, num_workers=workers, stall_error_s=seconds)
        with pytest.raises(LoadError, match=rf"no batch for {seconds} s ") as caught:
            next(stream.batches(0, 1))
        if began.is_set():
            break
    assert f"{name} reading step 0" in str(caught.value)


PAUSED = """
import sys, time
from pathlib import Path
import torch
from pipeline.loader import open_loader
from pipeline.loading import Loading
from pipeline.preprocess import Preprocess
from pipeline.read import ShardReader
from pipeline.stream import evaluation_batches
from sharding.format import open_shards

read = ShardReader.read
def slowly(self, samples):
    if slowly.first:
        print("reading", flush=True)
        time.sleep(1)
    slowly.first = False
    return read(self, samples)
slowly.first = True
ShardReader.read = slowly
backend, workers = sys.argv[2], int(sys.argv[3])
loading = Loading(
    batch_size=30, num_workers=workers, backend=backend, stall_error_s=6, stall_warning_s=4
)
shards = open_shards([Path(sys.argv[1]) / "old"])
loader = open_loader(shards, preprocess=Preprocess(), loading=loading, device=torch.device("cpu"))
print(sum(int(batch.valid.sum()) for batch in evaluation_batches(loader)))
"""


@pytest.mark.parametrize(("backend", "workers"), [("pil", 1), ("dali", 0)])
@pytest.mark.slow
def test_a_stopped_process_goes_on(data: Path, backend: str, workers: int) -> None:
    """The clock runs on while a process is stopped, here for longer than `stall_error_s`."""
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED, str(data), backend, str(workers)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "reading\n"
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(8)
    os.killpg(process.pid, signal.SIGCONT)
    said, errors = process.communicate(timeout=HANG_S)
    assert (said, errors) == ("80\n", "")


def test_torch_is_asked_again_before_a_stall_is_an_error() -> None:
    class Late:
        """Gives an item every `late` + 1 times that it is asked."""

        def __init__(self, late: int):
            self.late, self.asked = late, 0

        def __next__(self) -> int:
            self.asked += 1
            if self.asked % (self.late + 1):
                raise RuntimeError("DataLoader timed out after 1 seconds")
            return self.asked

    batches = _patient(Late(WAITS - 1))
    assert [next(batches) for _ in range(2)] == [WAITS, 2 * WAITS]
    with pytest.raises(RuntimeError, match="timed out"):
        next(_patient(Late(WAITS)))


SIGNALS = """
import itertools, os, signal, sys
import torch
from torch.utils import data

from pipeline.workers import garbage_held, killed_at_the_end, stop_signals_held

data._utils.MP_STATUS_CHECK_INTERVAL = 0.2  # torch waits so long for a worker to end by itself

with stop_signals_held(), garbage_held():
    batches = iter(
        data.DataLoader(range(10**6), num_workers=3, multiprocessing_context=killed_at_the_end())
    )
worker, *_others = batches._workers
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    os.kill(worker.pid, number)
print(len(list(itertools.islice(batches, 20))), worker.is_alive(), flush=True)
os.kill(worker.pid, signal.SIGSTOP)  # it answers nothing any more
print(worker.pid)
if sys.argv[1] == "closed":
    del batches
"""


@pytest.mark.parametrize("ending", [pytest.param("closed", marks=pytest.mark.slow), "left open"])
def test_a_worker_ignores_signals_and_ends_with_its_parent(ending: str, tmp_path: Path) -> None:
    """Also where the temporary folder has too long a name for the sockets that pass batches."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SIGNALS, ending],
        cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=True,
        env=os.environ | {"TMPDIR": str(long)},
    )  # fmt: skip
    assert not list(long.iterdir())
    said, worker = done.stdout.splitlines()
    assert (said, done.stderr) == ("20 True", "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(worker), 0)
