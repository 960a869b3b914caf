"""Run a function on many tasks in parallel, in processes of this machine or on a Ray cluster.

Main entry: `run_all(function, tasks, engine, jobs, on_gpu)` is a generator: nothing runs before the
first result is requested. It calls `function(*task)` for each task and yields the results in the
order of completion.

- `function`: a function at module level (it is pickled).
- `tasks`: an iterable of tuples, each with the positional arguments of one call.
- `engine`: "local" (default) or "ray"; this type is `Engine`.
- `jobs`: number of parallel tasks (default 0: one per core of the machine or cluster). With "local"
  and 1, the tasks run in this process.
- `on_gpu`: keyword; if true, each task gets one GPU if a Ray cluster has GPUs (default: false).

When a task fails, its error is raised: tasks that have not started are dropped, and those running
are awaited (local) or canceled (Ray). `ValueError` is raised if `engine` is "ray" and Ray is not
installed, or if it is "local" and `jobs` is larger than max(64, 8 * number of cores).
`ChildProcessError` (an `OSError`) is raised if a worker is killed, or Ray fails in another way. A
task may write only to storage that every worker can reach, and may be killed at any moment: if this
process dies, its local workers exit at once, in the middle of their tasks.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Literal

from devices import cores
from escape import printable
from imaging.budget import share_large
from installed import install_extra
from storage import make_socket_folder

Engine = Literal["local", "ray"]


def run_all(
    function: Callable[..., Any],
    tasks: Iterable[tuple],
    engine: Engine = "local",
    jobs: int = 0,
    *,
    on_gpu: bool = False,
) -> Iterator[Any]:
    """Call `function(*task)` for each task and yield the results in the order of completion.

    `jobs` is the number of parallel tasks, 0 for one per core of this machine or cluster. If a task
    fails, tasks that have not started are dropped and its error is raised. `tasks` is consumed only
    a few tasks ahead. With `on_gpu`, each task gets one GPU if the cluster has GPUs.

    Raises:
        ValueError: Ray is not installed, or `jobs` is too large for this machine.
        ChildProcessError: a worker was killed, or the cluster failed.
    """
    if engine == "local" and jobs > (most := max(64, 8 * cores())):
        raise ValueError(f"--jobs {jobs:,}: this machine has {cores()} cores; use at most {most}")
    if engine == "ray":
        yield from _run_ray(function, tasks, jobs, on_gpu)
    elif jobs == 1:
        for task in tasks:
            yield function(*task)
    else:
        yield from _run_processes(function, tasks, jobs or cores())


def _run_processes(
    function: Callable[..., Any], tasks: Iterable[tuple], jobs: int
) -> Iterator[Any]:
    # Forking a process that has threads (a progress bar, a test runner) can deadlock.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sharding.inventory", "sharding.write"])  # not once per worker
    make_socket_folder()
    with _ignoring_interrupts():
        forkserver.ensure_running()
    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_start_worker, initargs=(context.Lock(),)
    ) as pool:
        try:
            running = set()
            for task in tasks:
                with _delaying_interrupts():
                    running.add(pool.submit(function, *task))
                if len(running) >= 2 * jobs:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker was killed, probably for lack of memory; run the same command again, "
                "with fewer --jobs"
            ) from error
        except BaseException:
            # Wait for running tasks: a worker prints a traceback if its parent ends while it
            # starts.
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextlib.contextmanager
def _delaying_interrupts() -> Iterator[None]:
    """Delay Ctrl-C, SIGTERM and SIGHUP until this block ends: a worker that loses its parent while
    it starts would print a traceback.
    """
    stops = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(one_large: AbstractContextManager) -> None:
    share_large(one_large)
    _exit_with_parent()


def _exit_with_parent() -> None:
    """Exit this worker when the parent process dies, also in the middle of a task.

    The lock of a build ends with the parent, which cannot stop its workers: a worker that finished
    its task would overwrite the files of the next build, and then wait for a task forever.
    """

    def leave() -> None:
        builder = multiprocessing.parent_process()
        assert builder is not None  # runs only in workers
        builder.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Make processes that start in this block ignore Ctrl-C, which a terminal sends to all of them.

    Workers then finish their task silently, and the parent process decides what happens next.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_SHIPPED = (
    "sharding", "imaging", "recipes", "pipeline", "model", "report",
    "checked.py", "cli.py", "console.py", "devices.py", "escape.py", "installed.py",
    "interrupts.py", "locks.py", "storage.py",
)  # fmt: skip
"""Files and folders of this program that are sent to the workers of a cluster."""


def _run_ray(
    function: Callable[..., Any], tasks: Iterable[tuple], jobs: int, on_gpu: bool
) -> Iterator[Any]:
    """Run tasks of one core each on the Ray cluster at RAY_ADDRESS, or on a local one."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError(f"--engine ray needs Ray; {install_extra('ray')}")
    import ray

    if not ray.is_initialized():
        root = Path(__file__).parents[1]
        packages = {"py_modules": [str(root / name) for name in _SHIPPED]}
        try:
            ray.init(runtime_env=packages, log_to_driver=False, configure_logging=False)
        except Exception as error:  # plain exceptions too, if a node starts slowly
            raise ChildProcessError(_why_ray_failed(error)) from error
    at_once = jobs or max(1, int(ray.cluster_resources().get("CPU", 1)))
    gpus = 1 if on_gpu and ray.cluster_resources().get("GPU") else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(function)
    running: list[Any] = []
    try:
        for task in tasks:
            running.append(remote.remote(*task))
            if len(running) >= 2 * at_once:
                done, running = ray.wait(running)
                yield from ray.get(done)
        while running:
            done, running = ray.wait(running)
            yield from ray.get(done)
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.RayTaskError) and error.cause:
            raise error.cause from None
        raise ChildProcessError(_why_ray_failed(error)) from error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _why_ray_failed(error: Exception) -> str:
    """Return one line: what an error of Ray itself, not of a task, means, and what to do."""
    from ray import exceptions

    kind = type(error).__name__
    if isinstance(error, exceptions.OutOfMemoryError | exceptions.WorkerCrashedError):
        return (
            f"the Ray cluster lost a task ({kind}), probably for lack of memory; run the same "
            "command again, with fewer --jobs"
        )
    said = textwrap.shorten(printable(str(error)), 300, placeholder=" ...")
    return f"the Ray cluster failed ({kind}: {said}); mend this, and run the same command again"
