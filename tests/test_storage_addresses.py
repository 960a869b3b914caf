"""Paths and addresses: which is which, and what is wrong with a mistyped one."""

from collections.abc import Callable
from pathlib import Path

import pytest
from upath import UPath

import storage
from pipeline.loading import Loading
from sharding.format import ShardError
from sharding.verify import sets_in


@pytest.mark.parametrize("read", [storage.any_path, storage.local_path])
def test_a_file_address_is_a_path_of_this_machine(
    tmp_path: Path, read: Callable[[str], storage.AnyPath]
) -> None:
    assert read(f"file://{tmp_path}") == tmp_path
    assert storage.is_local(read(f"file://{tmp_path}"))


@pytest.mark.parametrize("text", ["C:/me/runs", "C:\\me", "C:/"])
def test_a_path_of_windows_is_no_address(text: str) -> None:
    """In WSL it does not exist, which is then the message."""
    for read in (storage.any_path, storage.local_path):
        assert read(text) == Path(text)


@pytest.mark.parametrize(
    ("text", "fault"),
    [("s3:/bucket/a", "names no bucket or host"), ("s3:///bucket/a", "names no bucket or host"),
     ("http:/here.org/a", "names no bucket or host"), ("HTTPS:///a", "names no bucket or host"),
     ("s3:", "names no bucket or host"), ("htp://here.org/a", "is of no known kind of address")],
)  # fmt: skip
def test_a_mistyped_address_is_one_true_line(text: str, fault: str) -> None:
    """It blamed an extra that is installed."""
    with pytest.raises(ValueError, match=rf"{fault}; expected an address like s3://bucket/\S+, or"):
        storage.any_path(text)


def test_the_scheme_of_an_address_may_have_capitals() -> None:
    assert storage.any_path("Memory://bucket/a") == UPath("memory://bucket/a")


@pytest.mark.parametrize("end", ["", "/", "//"])
def test_a_slash_at_the_end_of_a_web_address_is_dropped(end: str) -> None:
    """Browsers show it, and the last part of an address is the name of its set."""
    for path in (f"https://host/sets/own{end}", UPath(f"https://host/sets/own{end}", timeout=3)):
        assert storage.any_path(path).name == "own"
        assert str(storage.any_path(path) / "index.json") == "https://host/sets/own/index.json"
    assert storage.any_path(path).storage_options["timeout"] == 3
    assert str(storage.any_path(f"https://host{end}") / "own") == "https://host/own"


@pytest.mark.parametrize("address", ["https://host/own?sig=secret", "http://host/own/#secret"])
def test_a_web_address_with_a_query_is_refused(address: str) -> None:
    """The names of files were put behind the query, or in its place."""
    for path in (address, UPath(address)):
        with pytest.raises(ValueError, match="a query or fragment names one file") as refused:
            storage.any_path(path)
        assert "secret" not in str(refused.value)
    assert storage.any_path("https://host/a%3Fb").name == "a%3Fb"


def test_a_set_that_is_a_whole_bucket_is_refused() -> None:
    """It would have no name."""
    index = UPath("memory:///index.json")
    index.write_text("{}")
    try:
        with pytest.raises(ShardError, match="is a whole bucket or host, expected a folder that"):
            sets_in(index.parent)
    finally:
        index.unlink()


@pytest.mark.parametrize(
    ("error", "said"),
    [(ModuleNotFoundError("No module named 's3fs'"), "s3fs; install the extra `s3`"),
     (ImportError("no symbol x"), "s3fs; it is installed, but cannot be imported: no symbol x")],
)  # fmt: skip
def test_the_extra_is_named_only_if_its_library_is_missing(
    error: ImportError, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_protocol: str) -> None:
        raise ImportError("Install s3fs to access S3") from error

    monkeypatch.setattr(storage.fsspec, "get_filesystem_class", fails)
    with pytest.raises(ValueError, match=f"^s3://bucket/a needs the library {said}"):
        storage.any_path("s3://bucket/a")


def test_the_cache_is_a_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address made folders in the working folder, and so did `~` of a unit file."""
    monkeypatch.setenv("HOME", "/home/me")
    for text, folder in (("~/x", "/home/me/x"), ("file:///x", "/x"), ("x", "x")):
        monkeypatch.setenv("DETECTOR_CACHE", text)
        assert storage.cache_folder() == Path(folder)
    monkeypatch.setenv("DETECTOR_CACHE", "s3://bucket/a")
    with pytest.raises(ValueError, match=r"^DETECTOR_CACHE: s3://bucket/a is an address; "):
        storage.cache_folder()
    with pytest.raises(ValueError, match=r"^cache must be a folder: s3://bucket/a is an address"):
        Loading(cache="s3://bucket/a")


@pytest.mark.parametrize("text", ["s3://bucket/a", "simplecache::memory://bucket/a"])
def test_local_path_refuses_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="is an address"):
        storage.local_path(text)
