"""Reading out of tars: what is open, what is announced to the disk."""

import contextlib
import os
import resource
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import read
from pipeline.read import ReadError, ShardReader
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
    items: list = []
    thread = threading.Thread(target=lambda: items.extend(reader.read(samples[:1])))
    thread.start()
    assert reading.wait(20)
    assert reader.read(samples[1:]) == expected[1:]
    go_on.set()
    thread.join(20)
    assert items == expected[:1]
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


@contextlib.contextmanager
def few_descriptors(count: int) -> Iterator[None]:
    """A process that may have `count` descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_shards_than_descriptors_are_read(old: ShardSet) -> None:
    """As under `ulimit -n 256` with 300 shards; good images were counted as broken."""
    codes = pa.array(range(len(old)), pa.int32())
    place = old.table.schema.get_field_index("shard_code")
    many = replace(
        old,
        folders=old.folders[:1] * len(old),
        shards=old.shards[:1] * len(old),
        table=old.table.set_column(place, "shard_code", codes),
        _columns={},
    )
    used = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 1
    with few_descriptors(used + 20):
        items = ShardReader(many).read(range(len(old)))
    assert not [data for data in items if isinstance(data, ReadError) and "open" in str(data)]
    assert [data for data in items if isinstance(data, bytes)]  # of the first shard, these
    with few_descriptors(3), pytest.raises(OSError, match=r"Too many open .*ulimit -n 4096"):
        ShardReader(many).read([0])
