"""Tests of downloads from Kaggle, with a local server for its protocol."""

import base64
import hashlib
import io
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from sharding import fetch
from sharding.fetch import MARK
from tests.servers import (
    BODY,
    CUT,
    KAGGLE,
    SERVICE,
    Server,
    fetched,
    files_of,
)

IMAGES = {"keep/x/1.png": BODY[:2_000_000], "keep/2.png": BODY[2_000_000:], "rest/3.png": b"3"}


KEPT = {name: body for name, body in IMAGES.items() if name.startswith("keep/")}


@pytest.fixture
def kaggle(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    # It looks through all modules for each function on the call stack, which takes seconds here.
    monkeypatch.setattr("kagglehub.clients.get_user_agent", lambda: "kagglehub")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, body in IMAGES.items():
            archive.writestr(name, body)
    body = stream.getvalue()
    digest = base64.b64encode(hashlib.md5(body).digest()).decode()
    server.bodies |= {f"{SERVICE}/DownloadDataset": b"", "/blob/archive.zip": body}
    server.bodies[f"{SERVICE}/GetDataset"] = json.dumps({"currentVersionNumber": 3}).encode()
    server.status[f"{SERVICE}/DownloadDataset"] = 302
    server.headers[f"{SERVICE}/DownloadDataset"] = {"Location": f"{server.url}/blob/archive.zip"}
    server.headers["/blob/archive.zip"] = {
        "Content-Type": "application/zip", "Accept-Ranges": "bytes", "X-Goog-Hash": f"md5={digest}",
    }  # fmt: skip
    return server


def test_a_kaggle_dataset_is_downloaded_completely_and_only_once(
    kaggle: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAGGLE_API_TOKEN", "kg_s3cret")
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "elsewhere"))
    assert fetched(tmp_path, **KAGGLE).status == "downloaded"
    assert files_of(tmp_path / "s") == KEPT
    mark = json.loads((tmp_path / "s" / MARK).read_text())
    files = {name: len(body) for name, body in KEPT.items()}
    assert mark == {"fetch": KAGGLE, "files": files, "revision": "3"}
    assert kaggle.tokens == {"Bearer kg_s3cret"}
    assert not (tmp_path / ".s.kaggle").exists()
    assert not (tmp_path / "elsewhere").exists()
    assert os.environ["KAGGLEHUB_CACHE"] == str(tmp_path / "elsewhere")
    kaggle.asked.clear()
    assert fetched(tmp_path, **KAGGLE).status == "complete"
    assert kaggle.asked == []


def test_an_interrupted_kaggle_download_resumes(kaggle: Server, tmp_path: Path) -> None:
    kaggle.cut["/blob/archive.zip"] = CUT
    first = fetched(tmp_path, **KAGGLE)
    assert first.status == "failed"
    assert "run the command again to resume" in first.note
    assert not (tmp_path / "s").exists()
    kaggle.asked.clear()
    assert fetched(tmp_path, **KAGGLE).status == "downloaded"
    assert files_of(tmp_path / "s") == KEPT
    assert f"bytes={2**21}-" in [of for _, of in kaggle.got("/blob/")]


SMALL = {"keep/1.png": b"1", "rest/2.png": b"22"}


@pytest.fixture
def small(kaggle: Server) -> Server:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, body in SMALL.items():
            archive.writestr(name, body)
    kaggle.bodies["/blob/archive.zip"] = stream.getvalue()
    kaggle.headers["/blob/archive.zip"] = {"Content-Type": "application/zip"}
    return kaggle


def killed_in(monkeypatch: pytest.MonkeyPatch, function: str, raw: Path, **entry: object) -> None:
    def interrupted(*_: object, **_facts: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fetch, function, interrupted)
        fetched(raw, **entry)


def test_a_kaggle_download_that_is_killed_at_its_end_is_complete_after_the_next(
    small: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_in(monkeypatch, "publish", tmp_path, kaggle="owner/set")
    small.asked.clear()
    assert fetched(tmp_path, kaggle="owner/set").status == "downloaded"
    assert small.got("/blob/") == []
    assert fetched(tmp_path, kaggle="owner/set").status == "complete"


@pytest.mark.parametrize("function", ["_finish", "publish"])
def test_files_that_a_killed_kaggle_download_left_out_are_fetched_when_they_are_named(
    small: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    killed_in(monkeypatch, function, tmp_path, **KAGGLE)
    assert fetched(tmp_path, kaggle="owner/set", files=["*/*"]).status == "downloaded"
    assert files_of(tmp_path / "s") == SMALL
    assert fetched(tmp_path, kaggle="owner/set", files=["*/*"]).status == "complete"


def test_a_wrong_hash_in_the_catalog_is_corrected_without_another_kaggle_download(
    small: Server, tmp_path: Path
) -> None:
    assert fetched(tmp_path, **KAGGLE, sha256={"keep/1.png": "0" * 64}).status == "failed"
    small.asked.clear()
    assert fetched(tmp_path, **KAGGLE).status == "downloaded"
    assert small.got("/blob/") == []


@pytest.mark.parametrize("status", [401, 403, 404])
def test_kaggle_without_a_login_says_how_to_log_in(
    kaggle: Server, tmp_path: Path, status: int
) -> None:
    kaggle.status[f"{SERVICE}/GetDataset"] = status
    result = fetched(tmp_path, **KAGGLE)
    assert result.status == "failed"
    assert "https://www.kaggle.com/datasets/owner/set" in result.note
    if status == 404:
        assert "does not exist (HTTP 404)" in result.note
    else:
        for hint in (f"HTTP {status}", "~/.kaggle/kaggle.json", "KAGGLE_API_TOKEN", "KAGGLE_KEY"):
            assert hint in result.note


def test_a_damaged_archive_says_how_to_start_over(kaggle: Server, tmp_path: Path) -> None:
    whole = kaggle.bodies["/blob/archive.zip"], kaggle.headers["/blob/archive.zip"]
    kaggle.bodies["/blob/archive.zip"] = b"no archive"
    kaggle.headers["/blob/archive.zip"] = {"Content-Type": "application/zip"}
    result = fetched(tmp_path, **KAGGLE)
    assert result.status == "failed"
    assert "archive type" in result.note
    assert f"delete {tmp_path}/.s.kaggle to start over" in result.note
    assert not (tmp_path / "s").exists()
    shutil.rmtree(tmp_path / ".s.kaggle")
    kaggle.bodies["/blob/archive.zip"], kaggle.headers["/blob/archive.zip"] = whole
    assert fetched(tmp_path, **KAGGLE).status == "downloaded"


def test_a_kaggle_download_never_changes_existing_files(kaggle: Server, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s/mine.png").write_bytes(b"mine")
    result = fetched(tmp_path, **KAGGLE)
    assert result.status == "failed"
    assert "already has files that this command did not write" in result.note
    assert files_of(tmp_path / "s") == {"mine.png": b"mine"}
    assert kaggle.asked == []


def test_without_kagglehub_the_error_names_its_extra(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    assert "install the extra `fetch`" in fetched(tmp_path, **KAGGLE).note


def test_a_missing_file_of_kaggle_is_an_error(kaggle: Server, tmp_path: Path) -> None:
    assert fetched(tmp_path, **KAGGLE).status == "downloaded"
    (tmp_path / "s/keep/2.png").unlink()
    result = fetched(tmp_path, **KAGGLE)
    assert result.status == "failed"
    assert "is of an earlier download, which lacks files" in result.note
    assert "delete it to fetch the dataset anew" in result.note
    shutil.rmtree(tmp_path / "s")
    assert fetched(tmp_path, **KAGGLE).status == "downloaded"
