"""Tests of downloads from addresses, and of all kinds of downloads, with a local server."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import socket
import time
import zipfile
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import kagglesdk.kaggle_env
import pytest
from click.testing import CliRunner

from locks import locked
from sharding.__main__ import main
from sharding.catalog import (
    BUILT_IN,
    SHIPPED,
    Catalog,
    CatalogError,
    Source,
    read_catalog,
)
from sharding.fetch import MARK, Fetched, fetch_all, fetch_source
from sharding.fetch_spec import BEGUN, Fetch
from tests.servers import (
    BODY,
    CUT,
    DATA,
    FILES,
    HANG_S,
    HUB,
    KAGGLE,
    OLD,
    REPO,
    Server,
    fetched,
    files_of,
    source,
)

# --- plain addresses ------------------------------------------------------------------------------


@pytest.fixture
def photos(server: Server) -> str:
    server.bodies["/p/photos.bin"] = BODY
    server.headers["/p/photos.bin"] = {"ETag": '"1"'}
    return f"{server.url}/p/photos.bin"


def test_an_address_is_downloaded_completely_and_only_once(
    server: Server, photos: str, tmp_path: Path
) -> None:
    bars = []

    class Bar:
        def __init__(self, label: str, total: int | None) -> None:
            self.label, self.total, self.done = label, total, 0.0
            bars.append(self)

        def __enter__(self):
            return self.advance

        def __exit__(self, *_: object) -> None: ...

        def advance(self, done: float) -> None:
            self.done += done

    assert fetch_source("s", source(urls=[photos]), tmp_path, Bar).status == "downloaded"
    assert files_of(tmp_path / "s") == {"photos.bin": BODY}
    assert [(bar.label, bar.total, bar.done) for bar in bars] == [
        ("photos.bin, MiB", 3, pytest.approx(len(BODY) / 2**20))
    ]
    server.asked.clear()
    assert fetched(tmp_path, urls=[photos]).status == "complete"
    assert server.asked == []


@pytest.mark.parametrize("ranges", ["yes", "no", "wrong"])
def test_an_interrupted_download_of_an_address_resumes(
    server: Server, photos: str, tmp_path: Path, ranges: str
) -> None:
    server.ranges = ranges
    server.cut["/p/photos.bin"] = CUT
    first = fetched(tmp_path, urls=[photos])
    assert first.status == "failed"
    assert "run the command again to resume" in first.note
    assert not (tmp_path / "s/photos.bin").exists()
    assert not (tmp_path / "s" / MARK).exists()
    assert fetched(tmp_path, urls=[photos]).status == "downloaded"
    assert files_of(tmp_path / "s") == {"photos.bin": BODY}
    again = [""] if ranges == "wrong" else []
    assert [of for _, of in server.got()] == ["", f"bytes={2**21}-", *again]


def test_a_file_that_changed_is_not_resumed(server: Server, photos: str, tmp_path: Path) -> None:
    server.cut["/p/photos.bin"] = CUT
    assert fetched(tmp_path, urls=[photos]).status == "failed"
    server.bodies["/p/photos.bin"] = other = BODY[::-1] + b"longer"
    server.headers["/p/photos.bin"] = {"ETag": '"2"'}
    assert fetched(tmp_path, urls=[photos]).status == "downloaded"
    assert files_of(tmp_path / "s") == {"photos.bin": other}


def test_a_failed_head_request_keeps_the_partial_file(
    server: Server, photos: str, tmp_path: Path
) -> None:
    server.cut["/p/photos.bin"] = CUT
    assert fetched(tmp_path, urls=[photos]).status == "failed"
    server.status["HEAD /p/photos.bin"] = 503
    assert "HTTP 503" in fetched(tmp_path, urls=[photos]).note
    server.status.clear()
    assert fetched(tmp_path, urls=[photos]).status == "downloaded"
    assert [of for _, of in server.got()] == ["", f"bytes={2**21}-"]


def test_a_partial_file_that_is_complete_is_only_renamed(
    server: Server, photos: str, tmp_path: Path
) -> None:
    # The first download was killed after the last byte.
    for refused in (False, True):
        server.status = {"HEAD /p/photos.bin": 405} if refused else {}
        raw = tmp_path / str(refused)
        server.cut["/p/photos.bin"] = CUT
        assert fetched(raw, urls=[photos]).status == "failed"
        (raw / "s/photos.bin.partial").write_bytes(BODY)
        server.asked.clear()
        assert fetched(raw, urls=[photos]).status == "downloaded"
        assert files_of(raw / "s") == {"photos.bin": BODY}
        ranges = [of for _, of in server.got()]
        assert ranges == ([""] if refused else [])  # without an ETag it starts again


def test_a_file_without_a_length_is_refused(server: Server, photos: str, tmp_path: Path) -> None:
    server.headers["/p/photos.bin"] = {"Content-Length": "", "Connection": "close"}
    result = fetched(tmp_path, urls=[photos])
    assert result.status == "failed"
    assert "the server gives no length" in result.note
    assert files_of(tmp_path / "s") == {}


def test_a_file_of_another_length_is_refused(server: Server, photos: str, tmp_path: Path) -> None:
    # The server compresses without being asked, so its length is not that of the file.
    server.bodies["/p/photos.bin"] = gzip.compress(BODY)
    server.headers["/p/photos.bin"] = {"Content-Encoding": "gzip"}
    result = fetched(tmp_path, urls=[photos])
    assert result.status == "failed"
    assert f"of which {len(BODY):,} arrived" in result.note
    assert not (tmp_path / "s/photos.bin").exists()


def test_a_file_name_of_255_bytes_is_downloaded(server: Server, tmp_path: Path) -> None:
    name = "n" * 251 + ".bin"
    server.bodies[f"/p/{name}"] = BODY
    result = fetched(tmp_path, urls=[f"{server.url}/p/{name}"])
    assert result.status == "downloaded", result.note
    assert files_of(tmp_path / "s") == {name: BODY}


@pytest.mark.parametrize("end", ["", "a/", "a/..", "a%2Fb.zip", "a%5Cb.zip", ".fetched.json"])
def test_an_address_must_end_in_a_file_name(server: Server, tmp_path: Path, end: str) -> None:
    result = fetched(tmp_path, urls=[f"{server.url}/{end}"])
    assert result.status == "failed"
    assert "does not end in a file name" in result.note
    assert server.asked == []


def test_errors_do_not_show_the_secrets_of_an_address(server: Server, tmp_path: Path) -> None:
    server.status["/p/x.zip"] = 500
    host = server.url.removeprefix("http://")
    address = f"http://me:s3cret@{host}/p/x.zip?token=s3cret"
    notes = [fetched(tmp_path, urls=[address]).note]
    server.status["/p/x.zip"] = 403
    notes.append(fetched(tmp_path, urls=[address]).note)
    notes.append(fetched(tmp_path, urls=[f"{_nobody()}/x.zip?token=s3cret"]).note)
    assert "HTTP 500" in notes[0]
    assert "refuses access (HTTP 403): download it by hand" in notes[1]
    assert "x.zip" in notes[2]
    assert not any("s3cret" in note for note in notes)


# --- all kinds of downloads -----------------------------------------------------------------------


def test_too_little_disk_space_is_an_error_before_any_download(
    server: Server, photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(10**12, 0, 2**31))
    server.publish(FILES, OLD)
    info = json.loads(server.bodies[f"/api/datasets/{REPO}"])
    info["siblings"][0]["size"] = 5 * 2**30
    server.bodies[f"/api/datasets/{REPO}"] = json.dumps(info).encode()
    server.headers["/p/photos.bin"] = {"Content-Length": str(5 * 2**30)}
    for fetch in (HUB, {"urls": [photos]}):
        result = fetched(tmp_path / "not/there", **fetch)
        assert result.status == "failed"
        assert "the download needs 5.00 GiB" in result.note
        assert "2.00 GiB free" in result.note
    assert server.got("/resolve/") + server.got("/p/") == []
    assert not (tmp_path / "not/there/s").exists()


def test_disk_space_is_needed_only_for_missing_files(
    server: Server, photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.publish({"data/big.parquet": BODY}, OLD)
    (tmp_path / "s/data").mkdir(parents=True)
    (tmp_path / "s/data/big.parquet").write_bytes(BODY)
    server.cut["/p/photos.bin"] = CUT
    urls = {"urls": [photos]}
    assert fetched(tmp_path / "u", **urls).status == "failed"
    disk = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(10**12, 0, 2**20 + 7))
    assert fetched(tmp_path, **HUB).status == "downloaded"
    assert server.got("/resolve/") == []
    assert fetched(tmp_path / "u", **urls).status == "downloaded"


def _nobody() -> str:
    """Return an address on which no server listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


def test_a_missing_network_is_reported_quickly(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = _nobody()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    local = kagglesdk.kaggle_env.KaggleEnv.LOCAL
    monkeypatch.setitem(kagglesdk.kaggle_env._env_to_endpoint, local, nobody)
    monkeypatch.setattr("kagglehub.clients.get_user_agent", lambda: "kagglehub")  # slow in tests
    start = time.monotonic()
    for fetch in (HUB, KAGGLE, {"urls": [f"{nobody}/x.zip"]}):
        result = fetched(tmp_path, **fetch)
        assert result.status == "failed"
        assert result.note.startswith("download from http")
        assert "refused" in result.note
    assert time.monotonic() - start < HANG_S
    assert not (tmp_path / "s").exists()


def test_a_manual_download_says_what_to_do_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = fetched(Path("raw"), by_hand="Ask for access.")
    assert result == Fetched("s", "by hand", f"Ask for access. Put it in {tmp_path}/raw/s")
    assert not (tmp_path / "raw").exists()


def test_one_failing_source_does_not_stop_the_others(
    server: Server, photos: str, tmp_path: Path
) -> None:
    sources = {
        "gone": source(hub="owner/gone"),
        "good": source(urls=[photos]),
        "manual": source(by_hand="Ask."),
        "own": Source(license="x", set="train", real=["**"], homepage="here.org"),
    }
    catalog = Catalog(sets={"train": "train"}, sources=sources)
    results = {each.source: each.status for each in fetch_all(catalog, tmp_path)}
    assert results == {"gone": "failed", "good": "downloaded", "manual": "by hand"}
    results = list(fetch_all(catalog, tmp_path, ["own", "good", "good"]))
    assert [each.status for each in results] == ["by hand", "complete"]
    assert "here.org" in results[0].note
    with pytest.raises(CatalogError, match=r"no source godo; the catalog has gone, good"):
        fetch_all(catalog, tmp_path, ["good", "godo"])


def test_a_source_is_downloaded_to_its_root(server: Server, photos: str, tmp_path: Path) -> None:
    one = Source(license="x", set="t", real=["**"], root="a/b", fetch=Fetch(urls=[photos]))
    assert fetch_source("s", one, tmp_path).status == "downloaded"
    assert files_of(tmp_path) == {"a/b/photos.bin": BODY}


def test_partial_marks_of_a_killed_download_are_deleted(server: Server, tmp_path: Path) -> None:
    server.publish(FILES, OLD)
    (tmp_path / "s").mkdir()
    for name in (BEGUN, MARK):
        (tmp_path / "s" / f"{name}.4711.partial").touch()
    (tmp_path / "s/notes.4711.partial").touch()  # written by another program
    assert fetched(tmp_path, **HUB).status == "downloaded"
    assert files_of(tmp_path / "s") == {**DATA, "notes.4711.partial": b""}
    assert not list((tmp_path / "s").glob(".*.partial"))


def test_a_second_download_to_one_folder_is_refused(
    server: Server, photos: str, tmp_path: Path
) -> None:
    with locked(tmp_path / ".s.lock"):
        assert "another fetch is writing" in fetched(tmp_path, urls=[photos]).note
    assert fetched(tmp_path, urls=[photos]).status == "downloaded"


def test_a_link_out_of_the_raw_folder_is_not_written_through(
    server: Server, photos: str, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/s").symlink_to(tmp_path / "elsewhere")
    result = fetched(tmp_path / "raw", urls=[photos])
    assert result.status == "failed"
    assert "is outside of" in result.note
    assert not list((tmp_path / "elsewhere").iterdir())


PAGE = b"<!doctype html><html>Quota exceeded</html>"


def zipped(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "body", "said"),
    [
        ("x.zip", PAGE, "a web page"), ("x.bin", b"\xef\xbb\xbf\n <HTML>", "a web page"),
        ("x.bin", b"<!-- a --> <!-- b\n -->\n<html>", "a web page"),
        ("x.bin", b'<?xml version="1.0"?>\n<!DOCTYPE html>', "a web page"),
        ("x.bin", b"<!--" + b" " * 2000 + b"--><html>", "a web page"),
        ("x.zip", b"quota exceeded", "not a complete zip archive"),
        ("x.zip", zipped(a=BODY)[:-30], "not a complete zip archive"),
        ("x.tar", b"quota exceeded" * 99, "not a tar archive"),
        *(("x.tar", pack(BODY[:1000])[:40], "not a tar archive")
          for pack in (partial(gzip.compress, mtime=0), bz2.compress, lzma.compress)),
        ("x.tar", b"\x1f\x8b\x08" + b"\0" * 7 + b"\xff" * 99, "not a tar archive"),
        ("x.parquet", b"quota exceeded", "not a .parquet file"),
        ("x.tar.gz", b"quota exceeded", "not a .gz file"),
    ],
)  # fmt: skip
def test_a_web_page_instead_of_the_file_is_an_error(
    server: Server, tmp_path: Path, name: str, body: bytes, said: str
) -> None:
    server.bodies[f"/p/{name}"] = body
    for _ in range(2):
        result = fetched(tmp_path, urls=[f"{server.url}/p/{name}"])
        assert result.status == "failed"
        assert f"{name} is {said}" in result.note
    assert files_of(tmp_path / "s") == {}
    assert not (tmp_path / "s" / MARK).exists()


def test_missing_or_short_files_are_downloaded_again(
    server: Server, photos: str, tmp_path: Path
) -> None:
    assert fetched(tmp_path, urls=[photos]).status == "downloaded"
    (tmp_path / "s/photos.bin").unlink()
    assert fetched(tmp_path, urls=[photos]).status == "downloaded"
    os.truncate(tmp_path / "s/photos.bin", 100)
    assert fetched(tmp_path, urls=[photos]).status == "downloaded"
    assert files_of(tmp_path / "s") == {"photos.bin": BODY}
    server.publish(FILES, OLD)
    assert fetched(tmp_path / "hub", **HUB).status == "downloaded"
    (tmp_path / "hub/s/data/a.parquet").unlink()
    assert fetched(tmp_path / "hub", **HUB).status == "downloaded"
    assert fetched(tmp_path / "hub", **HUB).status == "complete"
    assert files_of(tmp_path / "hub/s") == DATA


def test_the_sha256_in_the_catalog_is_checked(server: Server, photos: str, tmp_path: Path) -> None:
    good = {"photos.bin": hashlib.sha256(BODY).hexdigest()}
    assert fetched(tmp_path / "a", urls=[photos], sha256=good).status == "downloaded"
    result = fetched(tmp_path / "b", urls=[photos], sha256={"photos.bin": "0" * 64})
    assert result.status == "failed"
    assert "the catalog says 000000000000..." in result.note
    assert files_of(tmp_path / "b/s") == {}
    result = fetched(tmp_path / "c", urls=[photos], sha256={"other.bin": "0" * 64})
    assert "no file other.bin was downloaded, but the catalog has" in result.note
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        Fetch(urls=[photos], sha256={"photos.bin": "abc"})


def test_an_outdated_file_of_the_same_length_is_replaced(
    server: Server, photos: str, tmp_path: Path
) -> None:
    """Only if this command wrote it."""
    assert fetched(tmp_path, urls=[photos]).status == "downloaded"
    server.bodies["/p/photos.bin"] = BODY[::-1]
    changed = {"photos.bin": hashlib.sha256(BODY[::-1]).hexdigest()}
    assert fetched(tmp_path, urls=[photos], sha256=changed).status == "downloaded"
    assert files_of(tmp_path / "s") == {"photos.bin": BODY[::-1]}
    wrong = fetched(tmp_path, urls=[photos], sha256={"photos.bin": "0" * 64})
    assert "the address now gives another file, or the catalog is wrong" in wrong.note
    assert files_of(tmp_path / "s") == {"photos.bin": BODY[::-1]}
    for mark in (MARK, BEGUN):
        (tmp_path / "s" / mark).unlink()
    result = fetched(tmp_path, urls=[photos], sha256={"photos.bin": "0" * 64})
    assert "this command did not write it; move it away to download" in result.note


def test_files_of_an_interrupted_download_that_the_catalog_no_longer_names_are_removed(
    server: Server, photos: str, tmp_path: Path
) -> None:
    """A build would pack them."""
    server.bodies["/p/more.bin"] = b"more"
    server.cut["/p/photos.bin"] = CUT
    assert fetched(tmp_path, urls=[f"{server.url}/p/more.bin", photos]).status == "failed"
    assert files_of(tmp_path / "s").keys() >= {"more.bin"}
    (tmp_path / "s/own.bin").write_bytes(b"mine")
    assert fetched(tmp_path, urls=[photos]).status == "downloaded"
    assert files_of(tmp_path / "s").keys() == {"photos.bin", "own.bin"}


def test_without_an_etag_a_download_starts_again(
    server: Server, photos: str, tmp_path: Path
) -> None:
    """Last-Modified is exact to a second only, and a weak ETag does not promise the same bytes."""
    for headers in ({}, {"Last-Modified": "x"}, {"ETag": 'W/"1"'}):
        raw = tmp_path / str(len(str(headers)))
        server.headers["/p/photos.bin"] = headers
        server.bodies["/p/photos.bin"] = BODY
        server.cut["/p/photos.bin"] = CUT
        assert fetched(raw, urls=[photos]).status == "failed"
        server.bodies["/p/photos.bin"] = BODY[::-1]
        assert fetched(raw, urls=[photos]).status == "downloaded"
        assert files_of(raw / "s") == {"photos.bin": BODY[::-1]}


@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff", b"[]", b"5", pytest.param(b"[" * 100_000, id="deep"),
     b'{"files": ["photos.bin"]}', b'{"fetch": "x"}', b'{"versions": []}'],
)  # fmt: skip
def test_damaged_marks_start_the_download_again(
    server: Server, photos: str, tmp_path: Path, content: bytes
) -> None:
    server.publish(FILES, OLD)
    server.bodies["/p/photos.bin"] = BODY[:1000]
    for name, fetch in (("urls", {"urls": [photos]}), ("hub", HUB)):
        folder = tmp_path / name / "s"
        folder.mkdir(parents=True)
        for mark in (BEGUN, MARK):
            (folder / mark).write_bytes(content)
        assert fetched(tmp_path / name, **fetch).status == "downloaded"
        assert fetched(tmp_path / name, **fetch).status == "complete"


def test_marks_contain_no_secrets(server: Server, photos: str, tmp_path: Path) -> None:
    host = photos.removeprefix("http://")
    address = f"http://me:s3c@ret@{host}?X-Amz-Signature=s3cret#s3cret"
    server.cut["/p/photos.bin"] = CUT
    notes = [fetched(tmp_path, urls=[address]).note]
    assert BEGUN in [path.name for path in (tmp_path / "s").iterdir()]
    texts = [(tmp_path / "s" / BEGUN).read_text()]
    notes.append(fetched(tmp_path, urls=[address]).note)
    texts.append((tmp_path / "s" / MARK).read_text())
    for text in (*notes, *texts):
        assert not {word for word in ("s3c", "ret@", "Signature", "me:") if word in text}
    assert fetched(tmp_path, urls=[address.replace("Signature=s3cret", "x=y")]).status == "complete"


def test_the_built_in_catalog_downloads_by_https_only() -> None:
    sources = read_catalog(SHIPPED).sources.values()
    urls = [url for source in sources if source.fetch for url in source.fetch.urls]
    assert urls
    assert all(url.startswith("https://") for url in urls)


def test_fetch_without_names_skips_the_test_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test sets are over 500 GB, and nobody trains on them."""
    asked: list[str] = []

    def fetch_all(_catalog: Catalog, _raw: Path, names: list[str], *_: object) -> list[Fetched]:
        asked.extend(names)
        return [Fetched(name, "complete", "") for name in names]

    monkeypatch.setattr("sharding.fetch.fetch_all", fetch_all)
    tests = read_catalog(SHIPPED).sources.keys() - read_catalog([BUILT_IN]).sources.keys()
    assert CliRunner().invoke(main, ["fetch", "--raw", str(tmp_path)]).exit_code == 0
    assert {"evalgen", "tiny_genimage"} <= set(asked)
    assert not tests & set(asked)
    asked.clear()
    CliRunner().invoke(main, ["fetch", "wildrf", "raid", "--raw", str(tmp_path)])
    assert asked == ["wildrf", "raid"]


def test_a_test_set_behind_a_form_says_where_to_ask(tmp_path: Path) -> None:
    (fetched,) = fetch_all(read_catalog(SHIPPED), tmp_path, ["chameleon"])
    assert fetched.status == "by hand"
    assert fetched.note.startswith("Chameleon is sent on request: write to the address")
    assert fetched.note.endswith(f"Put it in {tmp_path / 'chameleon'}")
