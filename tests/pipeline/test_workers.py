"""Loading processes: shared memory, stop signals, and a batch that never comes."""

import json
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
from pipeline.loader import LoadError
from pipeline.monitor import stalled
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
    ended = multiprocessing.Event()  # a forked worker has it, too

    def hang(self: ShardReader, samples):
        ended.wait(HANG_S)

    def noted(*arguments: object) -> str:
        ended.set()  # else the run waits 5 s for its reader
        return stalled(*arguments)

    monkeypatch.setattr(ShardReader, "read", hang)
    monkeypatch.setattr("pipeline.loader.stalled", noted)
    monkeypatch.setattr("pipeline.read_ahead.stalled", noted)
    stream = make_stream(backend=backend, num_workers=workers, stall_error_s=2)
    name = "worker 0" if backend == "pil" else "reader"
    with pytest.raises(LoadError, match=rf"no batch for 2 s .*{name} reading step 0"):
        next(stream.batches(0, 1))


ANSWERS = """
import json, os, signal, sys, time
from pipeline.workers import answer_parent_only
if (child := os.fork()) == 0:
    answer_parent_only()
    print("ready", flush=True)
    time.sleep(30)
    os._exit(7)
signal.signal(signal.SIGUSR1, lambda *_arguments: os.kill(child, signal.SIGTERM))
print(json.dumps(child), flush=True)
print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)
"""


def test_a_worker_ends_on_signals_of_its_parent_only() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", ANSWERS], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    lines = sorted(parent.stdout.readline().strip() for _ in range(2))
    child = json.loads(lines[0])
    assert lines[1] == "ready"
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(child, number)
        time.sleep(0.3)
        os.kill(child, 0)
    os.kill(parent.pid, signal.SIGUSR1)
    assert json.loads(parent.stdout.readline()) == 0
    assert parent.wait(HANG_S) == 0
    parent.stdout.close()
