"""Broken bytes of every kind inside a shard: the run ends normally, and only the broken images are
lost.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from imaging.orientation import orientation_of
from pipeline.loader import LoadError, open_loader
from pipeline.loading import Loading
from pipeline.params import train_params
from pipeline.read import ReadError, ShardReader
from pipeline.replay import Replay
from pipeline.stream import Pool, Stream, evaluation_batches
from sharding.format import INDEX_FILE, ShardSet, read_index
from storage import sha256_of
from tests.builders import CPU, HARSH, KINDS, PREPROCESS, awkward_files, limited
from tests.servers import HANG_S

DEVICES = {"pil": CPU, "dali": CPU, "dali on a GPU": torch.device("cuda")}
BACKENDS = ("pil", "dali", pytest.param("dali on a GPU", marks=pytest.mark.gpu))


def claimed_by(data: bytes) -> dict[str, object] | None:
    """Read format, size and orientation from the header; None if Pillow cannot, or the size is too
    large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"]) as image:
            if image.width * image.height > 2**26:
                return None
            turned = orientation_of(data, image.format)
            width, height = image.size[:: -1 if turned >= 5 else 1]
            return {
                "format": image.format, "width": width, "height": height, "orientation": turned,
            }  # fmt: skip
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


DECODABLE = {"cmyk", "another picture", "16 bit", "animated"}
"""Kinds that are whole images. They are found only because the index states another size."""

BATCH, BATCHES = 8, 5
BAD = [0 * BATCH, 1 * BATCH + 4, 2 * BATCH + 7, *range(3 * BATCH, 4 * BATCH)]
"""The first, a middle and the last sample of a batch, and a whole batch. The last batch is good."""


def with_bytes(
    shards: ShardSet, contents: dict[int, bytes], folder: Path, *, as_claimed: bool = True
) -> ShardSet:
    """Replace the bytes of some samples, stored in a tar of another set. If `as_claimed`, the index
    is changed to agree with the headers, so that only the decoders can find the error.
    """
    path = folder / "broken-train-00000.tar"
    names = ("offset", "size", "shard_code", "width", "height", "orientation")
    columns = {name: shards.column(name).copy() for name in names}
    columns["format"] = shards.table.column("format").to_pylist()
    stream = io.BytesIO()
    for sample, data in contents.items():
        changes = {"offset": stream.tell(), "size": len(data), "shard_code": len(shards.shards)}
        if as_claimed and (claimed := claimed_by(data)):
            changes |= claimed
        for name, value in changes.items():
            columns[name][sample] = value
        stream.write(data)
    path.write_bytes(stream.getvalue())
    index = read_index(shards.folders[0])
    entry = index["shards"][0] | {"name": path.name, "sha256": sha256_of(path)}
    (folder / INDEX_FILE).write_text(json.dumps(index | {"shards": [entry]}))
    table = shards.table
    for name, column in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.array(column, table.schema.types[place]))
    return replace(
        shards, table=table, folders=(*shards.folders, folder), _columns={},
        shards=(*shards.shards, path.name), shard_bytes=(*shards.shard_bytes, path.stat().st_size),
        shard_sha256=(*shards.shard_sha256, entry["sha256"]),
    )  # fmt: skip


def run(shards: ShardSet, backend: str) -> dict[int, tuple[bool, str, str]]:
    """Return (valid, digest of the pixels, reason) by sample number, over one epoch."""
    pool = Pool(shards, np.arange(len(shards)), np.empty(0, np.int64))
    loading = Loading(batch_size=BATCH, backend=backend.partition(" ")[0], num_workers=0)
    loader = open_loader(shards, preprocess=PREPROCESS, loading=loading, device=DEVICES[backend])
    stream = Stream(loader, pool, Replay(), {"train": HARSH, "dda": HARSH}, "train", 1)
    epoch = stream.epoch(0)
    epoch = replace(epoch, samples=np.arange(len(epoch.samples)))
    params_for = train_params(shards, stream.augment, "train", PREPROCESS, 1, 0)
    rows = {}
    with contextlib.closing(loader):
        for batch in loader.batches(epoch, params_for):
            names = dict(zip(batch.failures, loader.name_failures(batch), strict=True))
            for row, sample in enumerate(batch.samples.tolist()):
                pixels = batch.images[row].contiguous().cpu().numpy().tobytes()
                digest = hashlib.sha256(pixels).hexdigest()
                rows[sample] = bool(batch.valid[row]), digest, names.get(row, "")
    return rows


@pytest.fixture(scope="module")
def few(old: ShardSet) -> ShardSet:
    """As many samples as these tests need."""
    return old.take(np.arange(BATCHES * BATCH))


@pytest.fixture(scope="module")
def whole(few: ShardSet) -> Callable[[str], dict]:
    """Result of `run` for each backend, on the set without broken bytes."""
    return functools.cache(functools.partial(run, few))


@pytest.fixture(autouse=True)
def many_may_be_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.loader.MAX_BAD_SHARE", 1.0)


def only_the_bad_are_lost(
    shards: ShardSet, good: dict, backend: str, bad: list[int]
) -> Iterator[str]:
    """Compare a run with one without bad samples, and yield the reasons for the bad ones."""
    rows = run(shards, backend)
    assert rows.keys() == good.keys()
    for sample, (valid, digest, reason) in rows.items():
        if sample not in bad:
            assert (valid, digest, reason) == good[sample], sample
        elif not valid:
            assert shards.text("key", sample) in reason
            assert len(reason.splitlines()) == 1
            assert len(reason) < 400
            yield reason


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_bad_are_lost(
    few: ShardSet, whole: Callable[[str], dict], tmp_path: Path, kind: str, backend: str
) -> None:
    contents = dict.fromkeys(BAD, KINDS[kind])
    shards = with_bytes(few, contents, tmp_path, as_claimed=kind not in DECODABLE)
    reasons = list(only_the_bad_are_lost(shards, whole(backend), backend, BAD))
    # No decoder notices the kind "noise": only its checksum finds it (docs/log.md), not used here.
    if not kind.startswith("noise"):
        assert reasons, f"{kind} went through unnoticed"


@pytest.mark.parametrize("kind", ["lying size", "bomb"])
def test_a_header_with_a_wrong_size_is_refused_before_decoding(
    old: ShardSet, tmp_path: Path, kind: str
) -> None:
    """A decoder would need gigabytes of memory or a minute."""
    shards = with_bytes(old, {3: KINDS[kind]}, tmp_path, as_claimed=False)
    width, height = (int(old.column(name)[3]) for name in ("width", "height"))
    (item,) = ShardReader(shards).read([3])
    assert isinstance(item, ReadError)
    assert str(item) == (f"its header says 60000 x 60000 pixels, the index {width} x {height}")


@pytest.mark.slow
@pytest.mark.skipif(not awkward_files(), reason="AWKWARD_IMAGES names no folder of hostile files")
@pytest.mark.parametrize("backend", BACKENDS)
def test_hostile_files_of_a_folder_change_no_other_image(
    few: ShardSet, whole: Callable[[str], dict], tmp_path: Path, backend: str
) -> None:
    for path in awkward_files():
        shards = with_bytes(few, dict.fromkeys(BAD, path.read_bytes()), tmp_path)
        list(only_the_bad_are_lost(shards, whole(backend), backend, BAD))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_stays_flat_over_ten_thousand_batches(
    old: ShardSet, tmp_path: Path, backend: str
) -> None:
    """One image in eighty is broken, so that DALI's repair is included."""
    shards = with_bytes(old, {17: KINDS["half a jpeg"]}, tmp_path)
    pool = Pool(shards, np.arange(len(shards)), np.empty(0, np.int64))
    loading = Loading(batch_size=4, backend=backend.partition(" ")[0], num_workers=0)
    loader = open_loader(shards, preprocess=PREPROCESS, loading=loading, device=DEVICES[backend])
    stream = Stream(loader, pool, Replay(), {"train": HARSH, "dda": HARSH}, "train", 1)
    early = 0
    for number, _ in enumerate(stream.batches(0, 500)):  # 500 epochs, to include their starts
        if number == 2000:
            early = resident()
    assert number == 9_999
    assert resident() - early < 16 * 2**20


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_an_error_of_the_system_in_a_worker_is_one_line(
    old: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_self: ShardReader, _samples: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "/shards/a.tar")

    monkeypatch.setattr(ShardReader, "read", failing)  # a worker is forked with it
    loading = Loading(batch_size=4, backend="pil", num_workers=1)
    loader = open_loader(old, preprocess=PREPROCESS, loading=loading, device=CPU)
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error: '/shards/a.tar'$"):
        list(evaluation_batches(loader))


def test_too_few_descriptors_for_a_batch_of_a_worker_are_named(old: ShardSet) -> None:
    """torch tells it with the advice to change the program."""
    loading = Loading(batch_size=4, backend="pil", num_workers=1)
    loader = open_loader(old, preprocess=PREPROCESS, loading=loading, device=CPU)
    batches = evaluation_batches(loader)
    next(batches)
    with limited(resource.RLIMIT_NOFILE, 3), TOO_MANY:
        list(batches)


def test_too_few_descriptors_for_another_worker_are_named(old: ShardSet) -> None:
    """Such as for those of a validation beside those of the training."""
    loading = Loading(batch_size=4, backend="pil", num_workers=1)
    loader = open_loader(old, preprocess=PREPROCESS, loading=loading, device=CPU)
    with limited(resource.RLIMIT_NOFILE, 3), TOO_MANY:
        list(evaluation_batches(loader))


TOO_MANY = pytest.raises(LoadError, match=r"^too many files are open; raise .* fewer workers \(")


def test_a_batch_that_a_worker_cannot_pass_ends_the_run(
    old: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python prints the error, and torch would wait for the batch."""

    def failing(_descriptor: int) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("multiprocessing.reduction.DupFd", failing)  # a worker is forked with it
    loading = Loading(batch_size=4, backend="pil", num_workers=1, stall_error_s=HANG_S)
    loader = open_loader(old, preprocess=PREPROCESS, loading=loading, device=CPU)
    with TOO_MANY:
        list(evaluation_batches(loader))


@pytest.mark.filterwarnings("error")
def test_more_workers_than_cores_are_one_line(
    old: ShardSet, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch would warn twice, with a line of its code. `docker --cpuset-cpus` limits the cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0})
    loading = Loading(batch_size=4, backend="pil", num_workers=2)
    for _set in range(2):
        list(
            evaluation_batches(open_loader(old, preprocess=PREPROCESS, loading=loading, device=CPU))
        )
    (line,) = [line for line in logged if "cores" in line]
    assert line.startswith(
        "loading.num_workers is 2, more than the cores that this process may use (1)"
    )


# torch's signal handler may raise while torch opens a file, and the file is then never closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_is_killed_ends_the_run_with_one_error(old: ShardSet) -> None:
    loading = Loading(batch_size=4, backend="pil", num_workers=1)
    loader = open_loader(old, preprocess=PREPROCESS, loading=loading, device=CPU)
    batches = evaluation_batches(loader)
    before = set(torch.multiprocessing.active_children())
    next(batches)
    (worker,) = set(torch.multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(LoadError, match=r"a loading worker died \(.+\); if memory ran out"):
        list(batches)
