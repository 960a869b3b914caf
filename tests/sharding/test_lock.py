"""Tests of the lock of a build, most of them in a bucket, for which a file system in memory
stands.
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from sharding import lock
from tests.servers import HANG_S


@pytest.fixture
def work() -> Iterator[UPath]:
    folder = UPath(f"memory://{uuid.uuid4().hex}")
    yield folder
    for path in folder.fs.find(folder.path):
        folder.fs.rm_file(path)


def lease(work: UPath, age: float, owner: str = "elsewhere:1") -> None:
    content = {"owner": owner, "token": owner, "renewed": time.time() - age}
    work.fs.pipe_file((work / "lock.json").path, json.dumps(content).encode())


def names(work: UPath) -> list[str]:
    return [path.rpartition("/")[2] for path in work.fs.find(work.path)]


def wait_for(done: Callable[[], Any]) -> None:
    until = time.monotonic() + HANG_S
    while not done():
        assert time.monotonic() < until, f"it did not happen in {HANG_S} seconds"
        time.sleep(0.01)


def read(work: UPath) -> dict[str, Any]:
    return json.loads(work.fs.cat_file((work / "lock.json").path))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_a_held_lease_is_refused_and_an_expired_one_replaced(work: UPath) -> None:
    lease(work, 0)
    with pytest.raises(BlockingIOError, match=r"another build .*held by elsewhere:1, renewed 0 s"):
        ExitStack().enter_context(lock.locked(work, work))
    lease(work, 1000)
    with lock.locked(work, work):
        assert read(work)["owner"] != "elsewhere:1"
        with pytest.raises(BlockingIOError, match="another build is writing"):
            ExitStack().enter_context(lock.locked(work, work))
    assert names(work) == []


def test_one_of_two_that_find_a_lease_expired_gets_it(
    work: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process reads the expired lease before the first replaces it."""
    lease(work, 1000)
    first = ExitStack()
    cat_file = work.fs.cat_file

    def read_before(path: str) -> bytes:
        expired = cat_file(path)
        monkeypatch.undo()
        first.enter_context(lock.locked(work, work))
        return expired

    monkeypatch.setattr(work.fs, "cat_file", read_before)
    with first:
        with pytest.raises(BlockingIOError, match="renewed 0 s ago"):
            ExitStack().enter_context(lock.locked(work, work))
        assert names(work) == ["lock.json"]
    assert names(work) == []


def test_a_takeover_that_does_not_end_is_named(work: UPath) -> None:
    lease(work, 1000)
    work.fs.pipe_file((work / "takeover.json").path, b"{}")
    with pytest.raises(BlockingIOError, match=r"if no build is running, remove .*takeover\.json"):
        ExitStack().enter_context(lock.locked(work, work))


RENEWED = ["null", "NaN", "Infinity", "-Infinity", "1e999", "1e300", "-1", "true", '"7"', "[]"]
DAMAGED = [f'{{"owner": "x", "renewed": {renewed}}}'.encode() for renewed in RENEWED]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"renewed": 1}', *DAMAGED])
def test_a_damaged_lease_is_one_error(work: UPath, content: bytes) -> None:
    work.fs.pipe_file((work / "lock.json").path, content)
    with pytest.raises(
        OSError, match=r"lock\.json is damaged .*; remove it if no build is running"
    ):
        ExitStack().enter_context(lock.locked(work, work))


def test_a_lease_from_the_future_is_not_waited_for(work: UPath) -> None:
    lease(work, -1000)
    with pytest.raises(OSError, match=r"lock\.json of elsewhere:1 was renewed .* s after now; if"):
        ExitStack().enter_context(lock.locked(work, work))
    lease(work, -60)  # the clocks of two machines
    with pytest.raises(BlockingIOError, match="held by elsewhere:1"):
        ExitStack().enter_context(lock.locked(work, work))


def test_a_renewal_that_fails_is_tried_again(
    work: UPath, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.08)
    pipe_file, failures = work.fs.pipe_file, []

    def fail(path: str, data: bytes, **options: Any) -> None:
        if len(failures) < 3:
            failures.append(path)
            raise RuntimeError("no network")
        pipe_file(path, data, **options)

    with lock.locked(work, work):
        monkeypatch.setattr(work.fs, "pipe_file", fail)
        wait_for(lambda: len(failures) == 3)
        since = time.time()
        wait_for(lambda: read(work)["renewed"] > since)
    assert len(warnings(caplog)) == 1
    assert "lock.json could not be renewed (no network) and is tried again" in warnings(caplog)[0]
    assert names(work) == []


def test_a_lost_lease_stays_with_its_new_owner(
    work: UPath, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A renewal and the end of the block find the lease of another process."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.01)
    lease(work, 0)
    lock._renew(work / "lock.json", "ours", threading.Event())
    lock._release(work / "lock.json", "ours")
    assert read(work)["owner"] == "elsewhere:1"
    assert "is no longer the lock of this build" in warnings(caplog)[0]


def test_a_link_in_place_of_the_lock_file_is_refused(tmp_path: Path) -> None:
    """The output may be a folder that a stranger made."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "lock").symlink_to("mine")
    with pytest.raises(OSError, match=f"{tmp_path}/lock is a link, expected a file; remove it"):
        with lock.locked(tmp_path, tmp_path):
            pass
    (tmp_path / "lock").unlink()
    (tmp_path / "lock").write_text("kept")
    with lock.locked(tmp_path, tmp_path), pytest.raises(BlockingIOError, match="another build"):
        with lock.locked(tmp_path, tmp_path):
            pass
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "lock").read_text() == "kept"
