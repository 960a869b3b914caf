"""Tests of downloads from the Hugging Face hub, with a local server for its protocol."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sharding.fetch import MARK, Fetched
from sharding.fetch_spec import BEGUN
from tests.builders import ROOT
from tests.servers import (
    BODY,
    CUT,
    DATA,
    FILES,
    HANG_S,
    HUB,
    NEW,
    OLD,
    REPO,
    Server,
    fetched,
    files_of,
)

PROGRAM = f"""
import sys
from pathlib import Path
from sharding.catalog import Fetch, Source
from sharding.fetch import fetch_source
fetch = Fetch(hub={REPO!r}, files=["data/*.parquet"])
print(fetch_source("s", Source(license="x", set="t", real=["**"], fetch=fetch), Path(sys.argv[1])))
"""


def test_a_hub_dataset_is_downloaded_completely_and_only_once(
    server: Server, tmp_path: Path
) -> None:
    server.publish(FILES, OLD)
    assert fetched(tmp_path, **HUB) == Fetched("s", "downloaded", str(tmp_path / "s"))
    assert files_of(tmp_path / "s") == DATA
    mark = json.loads((tmp_path / "s" / MARK).read_text())
    files = {name: len(body) for name, body in DATA.items()}
    assert mark == {"fetch": HUB, "files": files, "revision": OLD}
    assert not (tmp_path / "s" / BEGUN).exists()
    assert server.tokens == {"Bearer hf_s3cret"}
    server.publish(FILES, NEW)
    server.asked.clear()
    assert fetched(tmp_path, **HUB).status == "complete"
    assert server.asked == []


def test_another_pattern_adds_files_of_the_same_revision(server: Server, tmp_path: Path) -> None:
    server.publish(FILES, OLD)
    assert fetched(tmp_path, **HUB).status == "downloaded"
    server.publish(dict.fromkeys(FILES, b"other"), NEW)
    server.asked.clear()
    assert fetched(tmp_path, hub=REPO).status == "downloaded"
    assert files_of(tmp_path / "s") == FILES
    assert [path for path, _ in server.got("/resolve/")] == [
        f"/datasets/{REPO}/resolve/{OLD}/README.md"
    ]


def test_an_interrupted_hub_file_continues_at_the_same_byte(server: Server, tmp_path: Path) -> None:
    server.publish({"data/big.parquet": BODY}, OLD)
    server.cut[f"/datasets/{REPO}/resolve/{OLD}/data/big.parquet"] = CUT
    assert fetched(tmp_path, **HUB).status == "downloaded"
    assert files_of(tmp_path / "s") == {"data/big.parquet": BODY}
    first, second = [of for _, of in server.got("big.parquet")]
    assert (first, second) == ("", f"bytes={CUT // 2**16 * 2**16}-")


def test_a_killed_hub_download_resumes_with_its_revision(server: Server, tmp_path: Path) -> None:
    files = {"data/a.parquet": BODY[:1000], "data/big.parquet": BODY}
    server.publish(files, OLD)
    server.stall.add(f"/datasets/{REPO}/resolve/{OLD}/data/big.parquet")
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **silent) as process:
        assert server.stalled.wait(HANG_S)
        until = time.monotonic() + HANG_S
        while not (tmp_path / "s/data/a.parquet").exists() and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert files_of(tmp_path / "s") == {"data/a.parquet": BODY[:1000]}
    assert len(list((tmp_path / "s").rglob("*.incomplete"))) == 1

    server.go_on.set()
    server.stall.clear()
    server.publish(dict.fromkeys(files, b"other"), NEW)
    server.asked.clear()
    assert fetched(tmp_path, **HUB).status == "downloaded"
    assert files_of(tmp_path / "s") == files
    assert [path.rpartition("/")[2] for path, _ in server.got("/resolve/")] == ["big.parquet"]
    assert not list((tmp_path / "s").rglob("*.incomplete"))


def test_an_incomplete_file_is_never_called_complete(server: Server, tmp_path: Path) -> None:
    # If the server does not answer about a file, the library accepts any file of its name.
    server.publish(FILES, OLD)
    server.status[f"HEAD /datasets/{REPO}/resolve/{OLD}/data/a.parquet"] = 500
    (tmp_path / "s/data").mkdir(parents=True)
    (tmp_path / "s/data/a.parquet").write_bytes(BODY[:999])
    result = fetched(tmp_path, **HUB)
    assert result.status == "failed"
    assert "1 of 2 files of owner/set are incomplete, first data/a.parquet" in result.note
    server.status.clear()
    assert fetched(tmp_path, **HUB).status == "downloaded"
    assert files_of(tmp_path / "s") == DATA


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("code", ["GatedRepo", ""])
@pytest.mark.parametrize("where", ["/api/datasets/{}", "/datasets/{}/resolve/{}/data/a.parquet"])
def test_a_gated_dataset_says_how_to_get_access(
    server: Server, tmp_path: Path, status: int, code: str, where: str
) -> None:
    server.publish(FILES, OLD)
    path = where.format(REPO, OLD)
    server.status[path] = status
    server.headers[path] = {"X-Error-Code": code}
    result = fetched(tmp_path, **HUB)
    assert result.status == "failed"
    assert f"{server.url}/datasets/{REPO} refuses access (HTTP {status})" in result.note
    assert "Accept its terms" in result.note
    assert "`hf auth login`" in result.note
    assert "HF_TOKEN" in result.note
    assert "s3cret" not in result.note
    assert "\n" not in result.note
    assert not (tmp_path / "s" / MARK).exists()


def test_a_missing_dataset_is_an_error(server: Server, tmp_path: Path) -> None:
    result = fetched(tmp_path, **HUB)
    assert result.status == "failed"
    assert result.note.endswith("does not exist (HTTP 404); correct its address in the catalog")
    assert not (tmp_path / "s").exists()


def test_a_deleted_revision_says_how_to_start_over(server: Server, tmp_path: Path) -> None:
    server.publish(FILES, OLD)
    path = f"/datasets/{REPO}/resolve/{OLD}/data/a.parquet"
    server.status[path] = 403
    assert fetched(tmp_path, **HUB).status == "failed"
    server.status = {f"/api/datasets/{REPO}/revision/{OLD}": 404}
    server.publish(FILES, NEW)
    result = fetched(tmp_path, **HUB)
    assert f"or delete {tmp_path}/s/{BEGUN} to start over" in result.note
    (tmp_path / "s" / BEGUN).unlink()
    assert fetched(tmp_path, **HUB).status == "downloaded"
    assert json.loads((tmp_path / "s" / MARK).read_text())["revision"] == NEW


def test_a_revision_that_is_no_text_is_ignored(server: Server, tmp_path: Path) -> None:
    server.publish(FILES, OLD)
    (tmp_path / "s").mkdir()
    for revision in (5, [OLD], None):
        (tmp_path / "s" / BEGUN).write_text(json.dumps({"fetch": HUB, "revision": revision}))
        assert fetched(tmp_path, **HUB).status == "downloaded"
        (tmp_path / "s" / MARK).unlink()


def test_patterns_that_match_no_file_are_an_error(server: Server, tmp_path: Path) -> None:
    server.publish(FILES, OLD)
    result = fetched(tmp_path, hub=REPO, files=["train/*"])
    assert result.status == "failed"
    assert "no file that matches train/*; it has README.md, data" in result.note


def test_files_of_an_interrupted_download_that_the_catalog_no_longer_names_are_removed(
    server: Server, tmp_path: Path
) -> None:
    """A build would pack them."""
    server.publish(FILES, OLD)
    broken = f"/datasets/{REPO}/resolve/{OLD}/data/sub/b.parquet"
    server.status[broken] = 403
    assert fetched(tmp_path, **HUB).status == "failed"
    assert files_of(tmp_path / "s").keys() == {"data/a.parquet"}
    server.status.clear()
    assert fetched(tmp_path, **HUB | {"files": ["data/sub/*"]}).status == "downloaded"
    assert files_of(tmp_path / "s").keys() == {"data/sub/b.parquet"}
