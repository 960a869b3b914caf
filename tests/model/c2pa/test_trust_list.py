"""The public trust list: fetching, checking, storing; without internet it fails in seconds."""

import datetime
import hashlib
import json
import socket
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from model.__main__ import main
from model.c2pa import signatures, trust_list
from tests.provenance_files import make_authority, pem
from tests.servers import HANG_S, Server

PATH = "/c2pa-org/conformance-public/refs/heads/main/trust-list/C2PA-TRUST-LIST.pem"


@pytest.fixture(scope="module")
def body() -> bytes:
    """Return a list in the format of the public one."""
    certificates = b"".join(pem(make_authority().root) for _ in range(2))
    return b"Subject\tCN=Root, O=Example\n" + certificates


@pytest.fixture(autouse=True)
def kept(server: Server, body: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of the stored list; `server` replaces the official address."""
    monkeypatch.setenv("DETECTOR_CACHE", str(tmp_path / "cache"))
    for module in (signatures, trust_list):
        monkeypatch.setattr(module, "CACHED", "list.json")
    server.bodies[PATH] = body
    assert trust_list.ADDRESS == f"https://raw.githubusercontent.com{PATH}"
    monkeypatch.setattr(trust_list, "ADDRESS", server.url + PATH)
    return tmp_path / "cache" / "list.json"


def fetch(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["fetch", "--trust-list", *map(str, arguments)])


def test_the_list_is_stored_with_date_and_hash_and_used(
    server: Server, body: bytes, kept: Path
) -> None:
    result = fetch()
    today = datetime.datetime.now(datetime.UTC).date()
    sha256 = hashlib.sha256(body).hexdigest()
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"C2PA trust list: C2PA list of {today}, 2 anchors, SHA-256 {sha256[:16]}..., 0 days old\n"
    )
    entry = json.loads(kept.read_text())
    assert entry["fetched"].startswith(str(today)) and entry["sha256"] == sha256
    assert (entry["origin"], entry["pem"].encode()) == (server.url + PATH, body)
    trust = signatures.usual_trust_list()
    assert trust and (trust.anchors, trust.fetched, trust.sha256) == (2, today, sha256)


def test_a_newer_list_replaces_the_old_one_and_a_failure_does_not(
    server: Server, body: bytes, kept: Path
) -> None:
    assert fetch().exit_code == 0
    before = kept.read_bytes()
    for answer, reason in {
        b"<html>sign in</html>": "holds no certificate", body[:-40]: "is damaged: certificate 2",
        body + b"x" * 2**20: "more than 1,048,576 bytes",
    }.items():  # fmt: skip
        server.bodies[PATH] = answer
        result = fetch()
        assert result.exit_code == 1 and reason in result.stderr, result.output
        assert kept.read_bytes() == before
    server.bodies[PATH] = pem(make_authority().root)
    assert "1 anchors" in fetch().stdout
    assert kept.read_bytes() != before


@pytest.mark.parametrize("trouble", ["missing", "no server", "cut", "silent"])
def test_without_an_answer_the_error_says_what_to_do(
    trouble: str, server: Server, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = trust_list.ADDRESS
    monkeypatch.setattr(trust_list, "TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        if trouble == "missing":
            server.status[PATH] = 404
        elif trouble == "no server":
            url = f"http://127.0.0.1:9{PATH}"
        elif trouble == "cut":
            server.cut[PATH] = 100
        else:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}{PATH}"
        monkeypatch.setattr(trust_list, "ADDRESS", url)
        began = time.monotonic()
        result = fetch()
        assert time.monotonic() - began < HANG_S
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: the C2PA trust list was not fetched (")
    assert f"download it by hand from {url} and type: " in result.stderr
    assert "fetch --trust-list --file C2PA-TRUST-LIST.pem" in result.stderr
    assert not kept.exists()


def test_a_list_given_by_hand_is_stored(
    server: Server, body: bytes, kept: Path, tmp_path: Path
) -> None:
    (tmp_path / "C2PA-TRUST-LIST.pem").write_bytes(body)
    result = fetch("--file", tmp_path / "C2PA-TRUST-LIST.pem")
    assert result.exit_code == 0, result.output
    assert json.loads(kept.read_text())["pem"].encode() == body
    assert not server.got(PATH)
    before = kept.read_bytes()
    long = body + b"#" * (signatures.MAX_BYTES - len(body))
    (tmp_path / "long.pem").write_bytes(long)
    result = fetch("--file", tmp_path / "long.pem")
    assert result.exit_code == 1 and "too large to keep" in result.stderr
    assert kept.read_bytes() == before  # the good list stays
    (tmp_path / "photo.pem").write_bytes(b"\xff\xd8")
    result = fetch("--file", tmp_path / "photo.pem")
    assert result.exit_code == 1 and "photo.pem holds no certificate" in result.stderr
