"""Reading out of tars: what is open, what is announced to the disk."""

import os
import threading
import time

import numpy as np
import pytest

from pipeline import read
from pipeline.read import ShardReader
from sharding.format import ShardSet


def first_of_each_shard(shards: ShardSet) -> list[int]:
    return [int(np.flatnonzero(shards.column("shard_code") == n)[0]) for n in range(3)]


def test_a_tar_that_is_read_from_is_not_closed_for_another(
    old: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two may be open. One is in the middle of its second read while two others are opened."""
    monkeypatch.setattr(read, "MAX_OPEN", 2)
    reader = ShardReader(old)
    samples = first_of_each_shard(old)
    expected = ShardReader(old).read(samples)
    reader.read(samples[:1])
    reading, go_on = threading.Event(), threading.Event()
    pread = os.pread

    def slow(file: int, size: int, offset: int) -> bytes:
        if threading.current_thread() is not threading.main_thread():
            reading.set()
            assert go_on.wait(20)
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", slow)
    found: list = []
    thread = threading.Thread(target=lambda: found.extend(reader.read(samples[:1])))
    thread.start()
    assert reading.wait(20)
    assert reader.read(samples[1:]) == expected[1:]
    go_on.set()
    thread.join(20)
    assert found == expected[:1]
    assert reader.read(samples) == expected
    assert len(reader._files._open) <= 2


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be told")
def test_the_disk_hears_of_a_whole_batch_while_it_is_waited_for(
    old: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, pause = [], [0.0]
    pread = os.pread

    def reading(file: int, size: int, offset: int) -> bytes:
        time.sleep(pause[0])
        told.append("read")
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", reading)
    monkeypatch.setattr(os, "posix_fadvise", lambda _file, offset, *_: told.append(offset))
    monkeypatch.setattr(read, "CACHED_READ_S", 0.05)
    reader = ShardReader(old)
    samples = [3, 1, 2]
    places = old.column("offset")[samples].tolist()
    expected = [*places, *["read"] * 3]
    calls = []
    for pause[0] in (0.0, 0.08, 0.08, 0.0, 0.0):
        reader.read(samples)
        calls.append(told[:])
        told.clear()
    # The first time it is not known; after that it is as the call before was.
    assert calls == [expected, ["read"] * 3, expected, expected, ["read"] * 3]
