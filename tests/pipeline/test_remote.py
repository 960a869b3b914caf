"""Shards at an address: on a real S3 server, an imitated Hugging Face hub, and an HTTP server that
fails on purpose.
"""

import http.server
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from upath import UPath

from pipeline import remote
from pipeline.loader import open_loader
from pipeline.loading import Loading
from pipeline.read import ReadError, ShardReader
from pipeline.remote import Cache
from pipeline.replay import Replay
from pipeline.stream import Pool, Stream, open_pool
from sharding.format import ShardError, ShardSet, open_shards
from tests.builders import HARSH, PREPROCESS

# aiobotocore does not close its sessions when a test ends; the garbage collector does.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed:ResourceWarning",
    "ignore:Unclosed:ResourceWarning", "ignore:datetime.datetime.utcnow:DeprecationWarning",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE", 16_384)
    monkeypatch.setattr(remote, "DELAYS_S", (0.01, 0.02, 0.04))


def local_facts(shards: ShardSet, cache: Path, workers: int, backend: str) -> list[tuple]:
    pool = Pool(shards, np.arange(len(shards)), np.empty(0, np.int64))
    loading = Loading(
        batch_size=8, backend=backend, num_workers=workers, shuffle="block", cache=str(cache),
        cache_gb=1.0,
    )  # fmt: skip
    loader = open_loader(shards, preprocess=PREPROCESS, loading=loading, device=torch.device("cpu"))
    stream = Stream(loader, pool, Replay(), {"train": HARSH, "dda": HARSH}, "train", 1)
    return [
        (b.samples.tolist(), b.valid.tolist(), b.images.sum(dtype=torch.int64).item())
        for b in stream.batches(0, 1)
    ]


@pytest.mark.parametrize(
    ("backend", "workers"), [("pil", 2), pytest.param("dali", 1, marks=pytest.mark.slow)]
)
def test_a_bucket_gives_the_batches_of_a_folder(
    s3: dict[str, str], client, data: Path, old: ShardSet, tmp_path: Path, backend, workers
) -> None:
    bucket = f"shards-{backend}-{workers}"
    client.create_bucket(Bucket=bucket)
    for path in (data / "old").iterdir():
        client.upload_file(str(path), bucket, f"shards/old/{path.name}")
    place = UPath(
        f"s3://{bucket}/shards", endpoint_url=s3["AWS_ENDPOINT_URL"], key="test", secret="test"
    )
    shards = open_pool(place, ["old"], Replay()).shards
    assert shards.sha256 == old.sha256
    expected = local_facts(old, tmp_path / "unused", 0, backend)
    assert local_facts(shards, tmp_path / "cache", workers, backend) == expected
    assert not (tmp_path / "unused").exists()
    assert list((tmp_path / "cache").glob("*.piece"))
    assert not list((tmp_path / "cache").glob("*.partial"))


class Flaky(http.server.BaseHTTPRequestHandler):
    """Serves files of a folder with byte ranges; `wrong` lists how the next answers fail."""

    folder: Path
    wrong: list[str]
    asked: int = 0

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def do_GET(self) -> None:
        self.answer(send=True)

    def answer(self, send: bool) -> None:
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            type(self).asked += 1
            self.send_error(404)
            return
        data, status = path.read_bytes(), 200
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            begin, end = int(first), min(int(last or len(data)), len(data) - 1)
            whole, data, status = len(data), data[begin : end + 1], 206
            type(self).asked += 1
            how = self.wrong.pop(0) if self.wrong else ""
            if how in ("busy", "forbidden"):
                self.send_error({"busy": 503, "forbidden": 403}[how])
                return
            if how == "drops":
                self.send_response(206)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Content-Range", f"bytes {begin}-{end}/{whole}")
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                return
            data = data[: len(data) // 2] if how == "short" else data
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end}/{whole}")
        self.end_headers()
        if send:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def serving(handler: type[Flaky]) -> http.server.HTTPServer:
    """Start a server that ends soon after `shutdown`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


@pytest.fixture
def web(data: Path) -> Iterator[Callable[..., ShardSet]]:
    """`web(*wrong)` serves the old set over HTTP; the next range requests fail as listed in
    `wrong`.
    """
    servers = []

    def serve(*wrong: str) -> ShardSet:
        handler = type("Handler", (Flaky,), {"folder": data, "wrong": [], "asked": 0})
        server = serving(handler)
        servers.append(server)
        shards = open_shards([UPath(f"http://127.0.0.1:{server.server_port}/old")])
        handler.wrong[:] = wrong
        handler.asked = 0
        serve.handler = handler
        return shards

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("wrong", ["busy", "drops", "short"])
def test_a_remote_that_fails_is_asked_again(
    web: Callable, old: ShardSet, tmp_path: Path, wrong: str, logged: list[str]
) -> None:
    shards = web(wrong, wrong)
    reader = ShardReader(shards, cache=Cache(folder=tmp_path), verify_checksums=True)
    expected = ShardReader(old).read(range(len(old)))
    assert reader.read(range(len(old))) == expected
    assert sum("trying again in" in message for message in logged) == 2
    asked = web.handler.asked
    assert reader.read(range(len(old))) == expected
    assert web.handler.asked == asked  # everything is cached now


def test_a_remote_that_refuses_is_not_asked_again(
    web: Callable, tmp_path: Path, logged: list[str]
) -> None:
    (image,) = ShardReader(web("forbidden"), cache=Cache(folder=tmp_path)).read([0])
    assert isinstance(image, ReadError)
    assert "403" in str(image)
    assert web.handler.asked == 1
    assert not [line for line in logged if "trying again" in line]


def test_other_bytes_at_an_address_are_no_image(
    web: Callable, data: Path, old: ShardSet, tmp_path: Path
) -> None:
    """Such as those of a set that was built again since it was opened: its pieces are cached."""
    shards = web()
    web.handler.folder = tmp_path / "again"
    shutil.copytree(data / "old", tmp_path / "again/old")
    sample = int(np.flatnonzero(old.column("shard_code") == 0)[0])
    end = int(old.column("offset")[sample] + old.column("size")[sample])
    with (tmp_path / "again/old" / old.shards[0]).open("r+b") as tar:
        tar.seek(end - 8)
        tar.write(bytes(8))
    for _ in ("fetched", "cached"):
        (image,) = ShardReader(shards, cache=Cache(folder=tmp_path / "cache")).read([sample])
        assert isinstance(image, ReadError) and "(sha256)" in str(image)


class Hub(Flaky):
    """Imitates the part of the Hugging Face hub that its file system uses. `folder` is the set."""

    DATASET = "datasets/owner/set"

    def answer(self, send: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        file = f"/{self.DATASET}/resolve/main/"
        tree = f"/api/{self.DATASET}/tree/main/"
        if path.startswith(file):
            self.path = "/" + path.removeprefix(file)
            super().answer(send)
            return
        if path.startswith(tree):
            inside = sorted((self.folder / path.removeprefix(tree)).iterdir())
            names = [(str(p.relative_to(self.folder)), p.stat().st_size) for p in inside]
            facts = [{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in names]
        else:
            facts = {"id": "owner/set", "sha": "a" * 40, "siblings": []}
        body = json.dumps(facts).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_the_hub_gives_the_batches_of_a_folder(
    data: Path, old: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = type("Handler", (Hub,), {"folder": data, "wrong": ["busy"], "asked": 0})
    server = serving(handler)
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        place = UPath("hf://datasets/owner/set", endpoint=endpoint, token=False)
        shards = open_pool(place, ["old"], Replay()).shards
        expected = local_facts(old, tmp_path / "unused", 0, "pil")
        assert local_facts(shards, tmp_path / "cache", 0, "pil") == expected
        assert handler.asked > len(shards.shards)  # pieces, and a retry after "busy"
    finally:
        server.shutdown()
        server.server_close()


def test_a_remote_that_keeps_failing_is_named(web: Callable, tmp_path: Path) -> None:
    shards = web(*["busy"] * 100)
    reader = ShardReader(shards, cache=Cache(folder=tmp_path))
    (item,) = reader.read([0])
    assert isinstance(item, ReadError)
    assert "old/alpha-train-00000.tar did not answer in 4 tries over" in str(item)
    assert "503" in str(item)


def test_a_piece_that_failed_is_not_asked_for_by_each_of_its_images(
    web: Callable, old: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PIECE", 2**20)  # a whole tar
    shards, expected = web(*["busy"] * 100), ShardReader(old).read(range(8))
    reader = ShardReader(shards, cache=Cache(folder=tmp_path), threads=8)
    for item in reader.read(range(8)):
        assert isinstance(item, ReadError) and "did not answer in 4 tries" in str(item)
    assert web.handler.asked == 4
    web.handler.wrong.clear()
    assert isinstance(reader.read([0])[0], ReadError)
    monkeypatch.setattr(remote, "REFUSE_S", 0.0)
    assert reader.read(range(8)) == expected
    assert web.handler.asked == 5


def test_an_address_that_fails_while_opening_is_one_error(web: Callable) -> None:
    folder = web().folders[0]
    web.handler.wrong[:] = ["busy"] * 10
    with pytest.raises(ShardError, match=r"http://127.0.0.1.* cannot be read: 503"):
        open_shards([folder])


def test_a_missing_shard_is_named_without_another_try(web: Callable, tmp_path: Path) -> None:
    shards = web()
    web.handler.folder = tmp_path
    (item,) = ShardReader(shards, cache=Cache(folder=tmp_path / "c")).read([0])
    assert isinstance(item, ReadError) and "alpha-train-00000.tar" in str(item)
    assert web.handler.asked == 1


def test_the_cache_stays_below_its_limit(web: Callable, old: ShardSet, tmp_path: Path) -> None:
    shards = web()
    limit = 4 * remote.PIECE
    reader = ShardReader(shards, cache=Cache(folder=tmp_path, limit=limit), threads=4)
    expected = ShardReader(old).read(range(len(old)))
    order = np.random.default_rng(0).permutation(len(old))
    for _ in range(2):
        for start in range(0, len(order), 8):
            rows = order[start : start + 8]
            assert reader.read(rows) == [expected[row] for row in rows]
            held = sum(path.stat().st_size for path in tmp_path.glob("*.piece"))
            assert held <= limit + 4 * remote.PIECE  # each thread may add one piece at a time
    pieces = sum(-(-size // remote.PIECE) for size in shards.shard_bytes)
    assert web.handler.asked > pieces  # some pieces were deleted and fetched again


def test_pieces_of_another_user_in_a_full_cache_cost_no_image(
    web: Callable, old: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    """In a folder such as /tmp, only their owner may delete them."""
    for number in range(4):
        (tmp_path / f"theirs{number}.piece").write_bytes(bytes(remote.PIECE))
    unlink = Path.unlink

    def sticky(path: Path, **options: bool) -> None:
        if path.name.startswith("theirs"):
            raise PermissionError
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", sticky)
    reader = ShardReader(web(), cache=Cache(folder=tmp_path, limit=4 * remote.PIECE), threads=1)
    assert reader.read(range(len(old))) == ShardReader(old).read(range(len(old)))
    assert len(list(tmp_path.glob("*.piece"))) == 5  # theirs, and the last of ours
    assert sum("is full of files of another user" in line for line in logged) == 1


def test_a_damaged_piece_is_fetched_again(
    web: Callable, old: ShardSet, tmp_path: Path, logged: list[str]
) -> None:
    reader = ShardReader(web(), cache=Cache(folder=tmp_path))
    expected = reader.read([0])
    (piece,) = tmp_path.glob("*.piece")
    for size in (0, piece.stat().st_size - 1):
        os.truncate(piece, size)
        assert reader.read([0]) == expected
    assert web.handler.asked == 3
    assert sum("is damaged" in line for line in logged) == 2


def test_temporary_files_of_killed_processes_leave_the_cache(web: Callable, tmp_path: Path) -> None:
    for name in ("a.piece.17.partial", "b.piece.17.partial"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "a.piece.17.partial", (1, 1))  # nobody writes it any more
    ShardReader(web(), cache=Cache(folder=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["b.piece.17.partial"]


def test_other_selections_of_a_set_use_the_same_pieces(web: Callable, tmp_path: Path) -> None:
    """Such as the old set of phase 1, which phase 2 replays, or a subset."""
    shards = web()
    ShardReader(shards, cache=Cache(folder=tmp_path)).read(range(len(shards)))
    asked = web.handler.asked
    part = shards.take(np.arange(5))
    assert len(ShardReader(part, cache=Cache(folder=tmp_path)).read(range(5))) == 5
    assert web.handler.asked == asked


def test_tars_on_this_disk_are_not_read_through_the_cache(
    web: Callable, data: Path, tmp_path: Path
) -> None:
    """Rows of both are mixed in one call."""
    local = Path(shutil.copytree(data / "new", tmp_path / "new"))
    shards = open_shards([local, web().folders[0]])
    reader = ShardReader(shards, cache=Cache(folder=tmp_path / "cache"), threads=4)
    order = np.random.default_rng(0).permutation(len(shards))
    expected = ShardReader(open_shards([data / "new", data / "old"])).read(order)
    assert reader.read(order) == expected
    far = [s for s, f in zip(shards.shard_bytes, shards.folders, strict=True) if f != local]
    cached = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.piece"))
    assert len(far) < len(shards.shards) and cached <= sum(far)
    (tar,) = local.glob("*.tar")
    os.truncate(tar, shards.column("offset")[0] + 1)
    asked = web.handler.asked
    (cut,) = pickle.loads(pickle.dumps(reader)).read([0])
    assert "its tar has" in str(cut)
    assert web.handler.asked == asked


def test_a_cache_below_its_limit_asks_for_no_sizes(
    web: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_pieces", lambda _folder: pytest.fail("looked at all pieces"))
    shards = web()
    ShardReader(shards, cache=Cache(folder=tmp_path)).read(range(len(shards)))


def test_a_cache_of_too_few_bytes_is_refused_for_remote_shards_only(
    web: Callable, old: ShardSet
) -> None:
    few = Cache(limit=remote.PIECE)
    with pytest.raises(
        ValueError, match=r"needs at least 65,536 bytes, .* larger loading.cache_gb"
    ):
        ShardReader(web(), cache=few)
    assert len(ShardReader(old, cache=few).read([0, 1])) == 2
