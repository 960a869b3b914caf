"""Run `train.py` in separate processes, for tests with real signals, ranks and mounts.

The processes are forked from multiprocessing's fork server, which imports everything once. They are
not forked from pytest's process, because a fork of a process that ran autograd cannot train.
"""

import ctypes
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from click.testing import CliRunner

import train

FORK = multiprocessing.get_context("forkserver")
# What training imports when it begins takes seconds: here once, and not in each process.
FORK.set_forkserver_preload(
    [
        __name__, "pytest", "tests.servers", "model.launch.folder", "model.training.run",
        "pandas", "timm.models", "torch._dynamo", "torch.utils.tensorboard",
    ]
)  # fmt: skip

# From Linux's sched.h.
_CLONE_NEWNS = 0x00020000


@dataclass(frozen=True)
class Ended:
    """Exit status and output of a command that has ended."""

    status: int
    stdout: str
    stderr: str


@dataclass
class Running:
    """Running command. Signals are sent to `process`; `answer` is the file of its result."""

    process: BaseProcess
    answer: Path

    def wait(self, timeout_s: float = 120) -> Ended:
        """Wait for the end of the command, and return its result."""
        self.process.join(timeout_s)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {timeout_s} s")
        return Ended(**json.loads(self.answer.read_text()))


def start(arguments: Sequence[object], answer: Path, **environment: str) -> Running:
    """Start `python train.py` with arguments; `answer` is the file for its result.

    With OWN_GROUP in the environment the process is the leader of a new process group.
    """
    return _forked(_train, answer, [str(argument) for argument in arguments], environment)


def start_ranks(count: int, arguments: Sequence[object], folder: Path) -> list[Running]:
    """Start `train.py` as `count` ranks, each with the environment that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [
        start(arguments, folder / f"rank{rank}.json", **common, **own[rank])
        for rank in range(count)
    ]


def start_on_small_disk(
    disk: Path, sizes: Sequence[str], arguments: Sequence[object], answer: Path
) -> list[Running]:
    """Start `train.py` once for each of `sizes`, on a tmpfs of this size mounted at `disk`.

    Other processes do not see the mount. Its files are copied to `<disk>-kept` at the end.
    """
    answers = [answer.with_name(f"{number}-{answer.name}") for number in range(len(sizes))]
    process = _forked(
        _train_on_small_disk, answer, disk, list(sizes), [str(a) for a in arguments], answers
    ).process
    return [Running(process, one) for one in answers]


def start_on_image(image: Path, disk: Path, arguments: Sequence[object], answer: Path) -> Running:
    """Start `train.py` with the file system in `image` mounted at `disk`.

    Other processes see the mount only through `/proc/<process>/root`.
    """
    return _forked(_train_on_image, answer, image, disk, [str(a) for a in arguments])


_STARTED: list[BaseProcess] = []
"""Processes of the current test."""


def start_process(function: Callable, *arguments: object) -> BaseProcess:
    """Call a function in a new process, which is killed if it is still there after the test."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    _STARTED.append(process)
    return process


def _forked(function: Callable, answer: Path, *arguments: object) -> Running:
    answer.unlink(missing_ok=True)
    return Running(start_process(function, answer, *arguments), answer)


def kill_started() -> None:
    """Kill the processes that a failed test left: pytest would wait for them at its end."""
    while _STARTED:
        process = _STARTED.pop()
        process.kill()
        process.join()


def _train(answer: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    if "OWN_GROUP" in environment:
        os.setpgid(0, 0)
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    result = CliRunner().invoke(train.main, arguments)
    ended = {"status": result.exit_code, "stdout": result.stdout, "stderr": result.stderr}
    if result.exception and not isinstance(result.exception, SystemExit):
        ended["stderr"] += f"Traceback: {result.exception!r}"
    partial = answer.with_suffix(".partial")
    partial.write_text(json.dumps(ended))
    partial.replace(answer)


def _unshare_mounts() -> None:
    """Give this process its own mount namespace, so that others do not see its mounts."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def _train_on_image(answer: Path, image: Path, disk: Path, arguments: Sequence[str]) -> None:
    _unshare_mounts()
    subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    _train(answer, arguments, {})


def _train_on_small_disk(
    _answer: Path, disk: Path, sizes: Sequence[str], arguments: Sequence[str], answers: list[Path]
) -> None:
    _unshare_mounts()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={sizes[0]}", "none", disk], check=True)
    for size, answer in zip(sizes, answers, strict=True):
        subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
        _train(answer, arguments, {})
    shutil.copytree(disk, disk.with_name(f"{disk.name}-kept"))
