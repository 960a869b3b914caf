"""Locks of files and folders against other processes and threads."""

import contextlib
import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import locks
from locks import locked
from model.checkpoint import annotate, read_meta
from model.distributed import DistEnv
from model.inference.results import open_results
from model.shipped.fetch import _download_lock
from model.training.run import _locked
from sharding import lock as sharding_lock
from sharding.fetch import _alone
from storage import atomic_folder
from tests.builders import ROOT
from tests.servers import HANG_S

BUSY = BlockingIOError("busy")


@pytest.fixture(autouse=True)
def warns_again() -> None:
    locks._warn.cache_clear()


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_lock_excludes_others_until_its_block_ends(tmp_path: Path, is_folder: bool) -> None:
    path = tmp_path if is_folder else tmp_path / "lock"
    code = (
        "import sys; from pathlib import Path; from locks import locked\n"
        f"with locked(Path({str(path)!r}), ValueError('busy'), is_folder={is_folder}): print('got')"
    )
    command = [sys.executable, "-c", code]
    with locked(path, BUSY, is_folder=is_folder):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and "ValueError: busy" in done.stderr
        with pytest.raises(BlockingIOError, match="busy"), locked(path, BUSY, is_folder=is_folder):
            pass
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "got\n"
    assert (tmp_path / "lock").exists() != is_folder


def test_several_readers_exclude_a_writer(tmp_path: Path) -> None:
    with locked(tmp_path / "a", BUSY, shared=True), locked(tmp_path / "a", BUSY, shared=True):
        with pytest.raises(BlockingIOError), locked(tmp_path / "a", BUSY):
            pass
    with locked(tmp_path / "a", BUSY), pytest.raises(BlockingIOError):
        with locked(tmp_path / "a", BUSY, shared=True):
            pass


def test_waiting_threads_get_the_lock_one_by_one_also_if_its_file_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    inside, most = [], []

    def work() -> None:
        for _ in range(20):
            with locked(tmp_path / "a", waiting="waiting for it", remove=True):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    with locked(tmp_path / "a", remove=True):
        threads = [in_thread(work) for _ in range(4)]
        while caplog.messages.count("waiting for it") < 4:
            threads[0].join(0.01)
    for thread in threads:
        thread.join(HANG_S)
    assert most == [1] * 80
    assert not list(tmp_path.iterdir())


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """Loading workers live on for seconds after their training was killed."""
    (started, starts), (goes_on, ends) = os.pipe(), os.pipe()
    with locked(tmp_path / "a", BUSY):
        child = os.fork()
        if not child:
            os.write(starts, b"x")
            os.read(goes_on, 1)
            os._exit(0)
    os.read(started, 1)
    try:
        with locked(tmp_path / "a", BUSY):
            pass
    finally:
        os.write(ends, b"x")
        os.waitpid(child, 0)


def test_a_lock_file_of_another_user_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has mode 644 in a shared cache, and may not be opened for writing."""
    (tmp_path / "a").write_text("12345\nnode17\n")  # as lock files of other programs
    opens = os.open

    def refuse(path: Path, flags: int, *arguments: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opens(path, flags, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    with locked(tmp_path / "a", BUSY), pytest.raises(BlockingIOError), locked(tmp_path / "a", BUSY):
        pass
    with pytest.raises(PermissionError, match=f"{tmp_path.name}'$"), locked(tmp_path / "new", BUSY):
        pass
    assert (tmp_path / "a").read_text() == "12345\nnode17\n"


def use_all(folder: Path) -> None:
    """Take the lock of every user of `locked`, also with files that other programs left."""
    run = folder / "run"
    run.mkdir(exist_ok=True)
    for left in ("", "12345\nnode17\n"):
        (run / ".lock").write_text(left)
        with _locked(run, DistEnv(), is_new=False):
            pass
    open_results(folder / "x.csv", "csv", "id", resume=True).close()
    with (
        _alone(folder / "raw"),
        _download_lock("0" * 64),
        sharding_lock.locked(folder, folder),
        atomic_folder(folder / "made", replace=True),
    ):
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EBADF])
def test_without_locks_everything_goes_on_after_one_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setenv("DETECTOR_CACHE", str(tmp_path))
    monkeypatch.setattr("fcntl.flock", fail)
    for _ in range(2):
        use_all(tmp_path)
    reason = os.strerror(code)
    assert sorted(caplog.messages) == sorted(
        f"{folder}: its file system has no locks ({reason}); make sure that no other process "
        "writes there"
        for folder in (tmp_path, tmp_path / "run")
    )


def test_several_writers_annotate_one_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A calibration must not undo the verdict of the gate."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "step_0000007"))
    lost = []

    def write(key: str) -> None:
        for index in range(25):
            annotate(folder, {key: {"n": index}} if key == "compared" else {key: [str(index)]})
            if str(index) not in str(read_meta(folder)[key]):
                lost.append((key, index))

    threads = [in_thread(partial(write, key)) for key in ("compared", "refused")]
    for thread in threads:
        thread.join(HANG_S)
    assert not lost
    assert read_meta(folder)["refused"] == ["24"] and read_meta(folder)["compared"] == {"n": 24}


def test_an_error_in_the_block_releases_the_lock(tmp_path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), locked(tmp_path / "a", BUSY):
        raise ZeroDivisionError
    with locked(tmp_path / "a", BUSY):
        pass
