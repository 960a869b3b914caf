"""Reading from tars: which files are open, and which byte ranges are prefetched."""

import contextlib
import os
import resource
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from pipeline import read
from pipeline.read import ReadError, ShardReader
from sharding.folder import pack_folder
from sharding.format import ShardSet, open_shards
from tests.builders import encode, limited, photo
from tests.servers import HANG_S


def first_of_each_shard(shards: ShardSet) -> list[int]:
    return [int(np.flatnonzero(shards.column("shard_code") == n)[0]) for n in range(3)]


def test_a_tar_in_use_is_not_closed_to_open_another(
    old: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tars may be open. One thread is in its second read while two other tars are opened."""
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
            assert go_on.wait(HANG_S)
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", slow)
    items: list = []
    thread = threading.Thread(target=lambda: items.extend(reader.read(samples[:1])))
    thread.start()
    assert reading.wait(HANG_S)
    assert reader.read(samples[1:]) == expected[1:]
    go_on.set()
    thread.join(HANG_S)
    assert items == expected[:1]
    assert reader.read(samples) == expected
    assert len(reader._files._open) <= 2


def test_a_tar_of_a_later_build_is_not_read(tmp_path: Path) -> None:
    """Two mislabeled images of equal size change places: the new tar has the length of the old
    one, and each of the two has the place of the other.
    """
    for number in range(48):
        path = tmp_path / f"photos/{('real', 'fake')[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photo(number, 40, 40), "PNG", compress_level=0))
    folder = tmp_path / "sets" / pack_folder(tmp_path / "photos", tmp_path / "sets", jobs=1).train
    shards, begun = open_shards([folder]), ShardReader(open_shards([folder]))
    expected = begun.read(range(len(shards)))
    rows = {label: shards.column("label").tolist().index(label) for label in (0, 1)}
    paths = [tmp_path / shards.text("origin", row) for row in rows.values()]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    pack_folder(tmp_path / "photos", tmp_path / "sets", jobs=1)
    tars = zip(shards.shards, shards.shard_bytes, strict=True)
    assert all((folder / name).stat().st_size == size for name, size in tars)
    assert begun.read(range(len(shards))) == expected  # from the tar that was open
    items = ShardReader(shards).read([*rows.values()])
    assert all(isinstance(each, ReadError) and "it was built again" in str(each) for each in items)
    assert ShardReader(open_shards([folder])).read([*rows.values()]) != expected


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise on this system")
def test_a_whole_batch_is_prefetched_while_reads_are_slow(
    old: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, pause, now = [], [0.0], [0.0]
    pread = os.pread
    monkeypatch.setattr(read, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def reading(file: int, size: int, offset: int) -> bytes:
        now[0] += pause[0]
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
    # The first call prefetches. Later calls prefetch if the call before was slow.
    assert calls == [expected, ["read"] * 3, expected, expected, ["read"] * 3]


def test_more_shards_than_file_descriptors_can_be_read(old: ShardSet) -> None:
    """Regression: with 300 shards under `ulimit -n 256`, good images were counted as broken."""
    codes = pa.array(range(len(old)), pa.int32())
    place = old.table.schema.get_field_index("shard_code")
    many = replace(
        old,
        folders=old.folders[:1] * len(old),
        shards=old.shards[:1] * len(old),
        shard_bytes=old.shard_bytes[:1] * len(old),
        shard_sha256=old.shard_sha256[:1] * len(old),
        table=old.table.set_column(place, "shard_code", codes),
        _columns={},
    )
    used = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 1
    with limited(resource.RLIMIT_NOFILE, used + 20):
        items = ShardReader(many).read(range(len(old)))
    assert not [data for data in items if isinstance(data, ReadError) and "open" in str(data)]
    assert [data for data in items if isinstance(data, bytes)]  # samples of the first shard
    with limited(resource.RLIMIT_NOFILE, used + 20), contextlib.ExitStack() as others:
        reader = ShardReader(many)
        reader.read(range(8))
        with contextlib.suppress(OSError):  # the rest of the process takes all that are left
            while True:
                others.enter_context(Path(os.devnull).open())
        assert len(reader.read(range(8, 16))) == 8
    too_many = pytest.raises(OSError, match=r"too many files are open; .*ulimit -n 4096")
    with limited(resource.RLIMIT_NOFILE, 3), too_many:
        ShardReader(many).read([0])
