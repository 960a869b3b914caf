"""Tests of many requests to a bucket: their number, their order, and what waits in memory."""

import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from upath import UPath

from sharding import remote
from sharding.remote import REQUESTS, files_in, in_order, read_bytes, remove_files, sizes_in
from tests.servers import HANG_S


@pytest.fixture
def bucket() -> UPath:
    folder = UPath(f"memory://{uuid.uuid4().hex}")
    folder.mkdir()
    for name in ("b", "a", "c"):
        (folder / name).write_bytes(name.encode() * 3)
    (folder / "inner").mkdir()
    (folder / "inner/d").write_bytes(b"d")
    return folder


@pytest.fixture
def requests(bucket: UPath, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record what is asked about single files, and the listings and removals of several."""
    names: list[str] = []
    for name in ("info", "cat_file", "open", "rm", "rm_file", "ls"):
        method = getattr(type(bucket.fs), name)

        def noted(self, *arguments, name=name, method=method, **options):
            names.append(name)
            return method(self, *arguments, **options)

        monkeypatch.setattr(type(bucket.fs), name, noted)
    monkeypatch.setattr(type(bucket.fs), "isdir", lambda *_arguments: True)
    return names


def test_one_listing_names_the_files_of_a_bucket_and_their_sizes(
    bucket: UPath, requests: list[str]
) -> None:
    """To ask about each takes a request, or the client compares it with all names."""
    assert sizes_in(bucket) == {"a": 3, "b": 3, "c": 3}
    assert [path.path for path in files_in(bucket)] == [(bucket / name).path for name in "abc"]
    assert requests == ["ls", "ls"]


def test_a_listing_is_not_kept_by_the_client(
    bucket: UPath, requests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would lack the files that workers write later."""
    monkeypatch.setattr(bucket.fs, "invalidate_cache", lambda _path: requests.append("forget"))
    sizes_in(bucket)
    assert requests == ["forget", "ls", "forget"]


def test_a_missing_folder_has_no_files(bucket: UPath, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (bucket / "none", bucket / "a", tmp_path / "none", tmp_path / "file"):
        assert sizes_in(folder) == {}
    assert sizes_in(tmp_path) == {"file": 0}


def test_a_file_is_read_by_one_request(bucket: UPath, requests: list[str]) -> None:
    assert read_bytes(bucket / "a") == b"aaa"
    assert requests == ["cat_file"]


def test_an_empty_file_is_read_where_its_first_byte_cannot_be_asked_for(
    bucket: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_arguments: object, **_options: object) -> bytes:
        raise OSError(22, "The requested range is not satisfiable")

    (bucket / "a").write_bytes(b"")
    monkeypatch.setattr(type(bucket.fs), "cat_file", refused)
    assert read_bytes(bucket / "a") == b""
    for name in ("b", "none"):
        with pytest.raises(OSError, match="range"):
            read_bytes(bucket / name)


def test_files_of_a_bucket_are_removed_together(bucket: UPath, requests: list[str]) -> None:
    remove_files([bucket / "a", bucket / "c"])
    remove_files([])
    assert requests.count("rm") == 1
    assert list(sizes_in(bucket)) == ["b"]


def test_calls_wait_for_a_bucket_together_and_give_their_results_in_order(bucket: UPath) -> None:
    together = threading.Barrier(REQUESTS)

    def slow(number: int) -> int:
        together.wait(HANG_S)
        time.sleep(0.001 * (REQUESTS - number % REQUESTS))
        return number

    assert list(in_order(slow, range(2 * REQUESTS), bucket)) == list(range(2 * REQUESTS))


def test_few_large_results_wait_in_memory(bucket: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "AHEAD_BYTES", 10)
    taken: list[int] = []

    def sizes() -> Iterator[int]:
        for size in (4, 4, 4, 50, 1, 1):
            taken.append(size)
            yield size

    results = in_order(int, sizes(), bucket, int)
    ahead = [len(taken) - number for number, _ in enumerate(results)]
    assert ahead == [3, 3, 2, 2, 2, 1]  # one of them is not asked for yet
    assert taken == [4, 4, 4, 50, 1, 1]


def test_an_error_comes_in_place_of_its_result_and_ends_the_calls(bucket: UPath) -> None:
    begun = []

    def call(number: int) -> int:
        begun.append(number)
        return 1 // (number - 2)

    results = in_order(call, range(1000), bucket)
    assert [next(results), next(results)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert len(begun) < 100
