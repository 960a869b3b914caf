"""Tests of the processes that run the tasks of a build, when they or their parent are killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sharding.executor import run_all
from tests.builders import ROOT
from tests.servers import HANG_S


def test_a_killed_worker_is_one_error_that_says_what_to_do() -> None:
    tasks = [(signal.SIGKILL,), (signal.SIGKILL,)]
    with pytest.raises(OSError, match=r"killed, .* lack of memory; .* again, with fewer --jobs"):
        list(run_all(signal.raise_signal, tasks, jobs=2))


def test_tasks_run_where_the_temporary_folder_has_a_long_name(tmp_path: Path) -> None:
    """Its name would be too long for the socket of multiprocessing's fork server."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    code = "from sharding.executor import run_all; print(sum(run_all(abs, [(-1,), (-2,)], jobs=2)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, timeout=HANG_S,
        env=os.environ | {"TMPDIR": str(long)},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("3\n", "")


PROGRAM = """
import sys
from sharding.executor import run_all
task = "import os, time; open(f'{0}/{{os.getpid()}}', 'w').close(); time.sleep(60)"
list(run_all(exec, [(task.format(sys.argv[1]),)] * 2, jobs=2))
"""


def test_workers_of_a_killed_parent_do_not_finish_their_tasks(tmp_path: Path) -> None:
    """They would write into the next build, because the lock ended with their parent."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT) as parent:
        deadline = time.monotonic() + HANG_S
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        parent.kill()
    workers = [int(path.name) for path in tmp_path.iterdir()]
    assert len(workers) == 2
    deadline = time.monotonic() + HANG_S / 2
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_runs, workers)), "workers go on without their parent"


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
