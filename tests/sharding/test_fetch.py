"""Downloads from a loopback server that speaks as much of each protocol as the libraries need."""

import base64
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import filelock
import huggingface_hub.constants
import kagglesdk.kaggle_env
import pytest

from sharding.catalog import BUILT_IN, Catalog, CatalogError, Fetch, Source, read_catalog
from sharding.fetch import BEGUN, MARK, Fetched, fetch_all, fetch_source
from tests.builders import ROOT
from tests.servers import REPO, SERVICE, Server

OLD, NEW = "a" * 40, "b" * 40

# More than the pieces in which bodies are read (1 MiB), so that a cut leaves whole pieces behind.
BODY = random.Random(0).randbytes(3 * 2**20 + 7)
CUT = 2**21 + 5

# How long "no network" may take to be said; refused connections take milliseconds.
SOON_S = 5


def source(**fetch: object) -> Source:
    return Source(license="x", set="train", real=["**"], fetch=Fetch(**fetch))


def fetched(raw: Path, **fetch: object) -> Fetched:
    return fetch_source("s", source(**fetch), raw)


def files_of(folder: Path) -> dict[str, bytes]:
    """What the build would see: no hidden files or folders."""
    paths = [p for p in folder.rglob("*") if p.is_file()]
    inside = {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}
    return {name: body for name, body in inside.items() if not f"/{name}".count("/.")}


# --- the hub --------------------------------------------------------------------------------------

FILES = {"data/a.parquet": BODY[:1000], "data/sub/b.parquet": BODY[1000:3000], "README.md": b"hi"}
DATA = {name: body for name, body in FILES.items() if name.startswith("data/")}
HUB = {"hub": REPO, "files": ["data/*.parquet"]}


def test_a_hub_dataset_arrives_whole_and_once(server: Server, tmp_path: Path) -> None:
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


def test_a_cut_hub_download_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.publish({"data/big.parquet": BODY}, OLD)
    server.cut[f"/datasets/{REPO}/resolve/{OLD}/data/big.parquet"] = CUT
    assert fetched(tmp_path, **HUB).status == "downloaded"
    assert files_of(tmp_path / "s") == {"data/big.parquet": BODY}
    first, second = [of for _, of in server.got("big.parquet")]
    assert (first, second) == ("", f"bytes={CUT // 2**16 * 2**16}-")


PROGRAM = f"""
import sys
from pathlib import Path
from sharding.catalog import Fetch, Source
from sharding.fetch import fetch_source
fetch = Fetch(hub={REPO!r}, files=["data/*.parquet"])
print(fetch_source("s", Source(license="x", set="t", real=["**"], fetch=fetch), Path(sys.argv[1])))
"""


def test_a_killed_hub_download_resumes_with_its_revision(server: Server, tmp_path: Path) -> None:
    files = {"data/a.parquet": BODY[:1000], "data/big.parquet": BODY}
    server.publish(files, OLD)
    server.stall.add(f"/datasets/{REPO}/resolve/{OLD}/data/big.parquet")
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    silent = {"cwd": ROOT, "env": environment, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **silent) as process:
        assert server.stalled.wait(15)
        until = time.monotonic() + 5
        while not (tmp_path / "s/data/a.parquet").exists() and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert files_of(tmp_path / "s") == {"data/a.parquet": BODY[:1000]}
    assert len(list((tmp_path / "s").rglob("*.incomplete"))) == 1

    server.go_on.set()
    server.stall.clear()
    server.publish(dict.fromkeys(files, b"other"), NEW)
    server.asked.clear()
    second = subprocess.run(command, **silent, stdout=subprocess.PIPE, check=True, text=True)
    assert "downloaded" in second.stdout
    assert files_of(tmp_path / "s") == files
    assert [path.rpartition("/")[2] for path, _ in server.got("/resolve/")] == ["big.parquet"]
    assert not list((tmp_path / "s").rglob("*.incomplete"))


def test_a_file_that_is_not_whole_is_never_called_complete(server: Server, tmp_path: Path) -> None:
    # Without an answer about a file, the library is content with whatever bears its name.
    server.publish(FILES, OLD)
    server.status[f"HEAD /datasets/{REPO}/resolve/{OLD}/data/a.parquet"] = 500
    (tmp_path / "s/data").mkdir(parents=True)
    (tmp_path / "s/data/a.parquet").write_bytes(BODY[:999])
    result = fetched(tmp_path, **HUB)
    assert result.status == "failed"
    assert "1 of 2 files of owner/set did not arrive whole, first data/a.parquet" in result.note
    server.status.clear()
    assert fetched(tmp_path, **HUB).status == "downloaded"
    assert files_of(tmp_path / "s") == DATA


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("code", ["GatedRepo", ""])
@pytest.mark.parametrize("where", ["/api/datasets/{}", "/datasets/{}/resolve/{}/data/a.parquet"])
def test_a_gated_dataset_says_how_to_get_in(
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


def test_a_dataset_that_is_not_there(server: Server, tmp_path: Path) -> None:
    result = fetched(tmp_path, **HUB)
    assert result.status == "failed"
    assert result.note.endswith("is not there (HTTP 404); correct its address in the catalog")
    assert not (tmp_path / "s").exists()


def test_a_revision_that_is_gone_has_a_way_out(server: Server, tmp_path: Path) -> None:
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


def test_patterns_that_fit_nothing(server: Server, tmp_path: Path) -> None:
    server.publish(FILES, OLD)
    result = fetched(tmp_path, hub=REPO, files=["train/*"])
    assert result.status == "failed"
    assert "nothing that fits train/*, but README.md, data" in result.note


# --- plain addresses ------------------------------------------------------------------------------


@pytest.fixture
def photos(server: Server) -> str:
    server.bodies["/p/photos.bin"] = BODY
    server.headers["/p/photos.bin"] = {"ETag": '"1"'}
    return f"{server.url}/p/photos.bin"


def test_an_address_arrives_whole_and_once(server: Server, photos: str, tmp_path: Path) -> None:
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
def test_a_cut_address_resumes(server: Server, photos: str, tmp_path: Path, ranges: str) -> None:
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


def test_a_failing_head_keeps_what_there_is(server: Server, photos: str, tmp_path: Path) -> None:
    server.cut["/p/photos.bin"] = CUT
    assert fetched(tmp_path, urls=[photos]).status == "failed"
    server.status["HEAD /p/photos.bin"] = 503
    assert "HTTP 503" in fetched(tmp_path, urls=[photos]).note
    server.status.clear()
    assert fetched(tmp_path, urls=[photos]).status == "downloaded"
    assert [of for _, of in server.got()] == ["", f"bytes={2**21}-"]


def test_a_partial_that_is_all_of_it_is_only_renamed(
    server: Server, photos: str, tmp_path: Path
) -> None:
    # Killed after the last byte.
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
        assert ranges == ([""] if refused else [])  # without an ETag it starts anew


def test_a_file_without_a_length_is_refused(server: Server, photos: str, tmp_path: Path) -> None:
    server.headers["/p/photos.bin"] = {"Content-Length": "", "Connection": "close"}
    result = fetched(tmp_path, urls=[photos])
    assert result.status == "failed"
    assert "the server gives no length" in result.note
    assert files_of(tmp_path / "s") == {}


def test_a_file_of_another_length_is_refused(server: Server, photos: str, tmp_path: Path) -> None:
    # Compressed on its way although that was not asked for: its length says nothing of the file's.
    server.bodies["/p/photos.bin"] = gzip.compress(BODY)
    server.headers["/p/photos.bin"] = {"Content-Encoding": "gzip"}
    result = fetched(tmp_path, urls=[photos])
    assert result.status == "failed"
    assert f"of which {len(BODY):,} arrived" in result.note
    assert not (tmp_path / "s/photos.bin").exists()


@pytest.mark.parametrize("end", ["", "a/", "a/..", "a%2Fb.zip", "a%5Cb.zip", ".fetched.json"])
def test_an_address_must_end_in_a_file_name(server: Server, tmp_path: Path, end: str) -> None:
    result = fetched(tmp_path, urls=[f"{server.url}/{end}"])
    assert result.status == "failed"
    assert "does not end in a name for a file" in result.note
    assert server.asked == []


def test_errors_keep_the_secrets_of_an_address(server: Server, tmp_path: Path) -> None:
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


# --- Kaggle ---------------------------------------------------------------------------------------

IMAGES = {"keep/x/1.png": BODY[:2_000_000], "keep/2.png": BODY[2_000_000:], "rest/3.png": b"3"}
KAGGLE = {"kaggle": "owner/set", "files": ["keep/*"]}
KEPT = {name: body for name, body in IMAGES.items() if name.startswith("keep/")}


@pytest.fixture
def kaggle(server: Server) -> Server:
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


def test_a_kaggle_dataset_arrives_whole_and_once(
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


def test_a_cut_kaggle_download_resumes(kaggle: Server, tmp_path: Path) -> None:
    kaggle.cut["/blob/archive.zip"] = CUT
    first = fetched(tmp_path, **KAGGLE)
    assert first.status == "failed"
    assert "run the command again to resume" in first.note
    assert not (tmp_path / "s").exists()
    kaggle.asked.clear()
    assert fetched(tmp_path, **KAGGLE).status == "downloaded"
    assert files_of(tmp_path / "s") == KEPT
    assert f"bytes={2**21}-" in [of for _, of in kaggle.got("/blob/")]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_kaggle_without_a_login(kaggle: Server, tmp_path: Path, status: int) -> None:
    kaggle.status[f"{SERVICE}/GetDataset"] = status
    result = fetched(tmp_path, **KAGGLE)
    assert result.status == "failed"
    assert "https://www.kaggle.com/datasets/owner/set" in result.note
    if status == 404:
        assert "is not there (HTTP 404)" in result.note
    else:
        for hint in (f"HTTP {status}", "~/.kaggle/kaggle.json", "KAGGLE_API_TOKEN", "KAGGLE_KEY"):
            assert hint in result.note


def test_a_damaged_archive_is_an_error_with_a_way_out(kaggle: Server, tmp_path: Path) -> None:
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


def test_kaggle_leaves_files_alone_that_it_did_not_bring(kaggle: Server, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s/mine.png").write_bytes(b"mine")
    result = fetched(tmp_path, **KAGGLE)
    assert result.status == "failed"
    assert "holds files already, and not what this fetch left" in result.note
    assert files_of(tmp_path / "s") == {"mine.png": b"mine"}
    assert kaggle.asked == []


def test_kagglehub_is_an_extra(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    assert "install the extra `fetch`" in fetched(tmp_path, **KAGGLE).note


# --- all of them ----------------------------------------------------------------------------------


def test_too_little_disk_is_said_before_anything_is_downloaded(
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
        assert "5.00 GiB are to be downloaded" in result.note
        assert "2.00 GiB free" in result.note
    assert server.got("/resolve/") + server.got("/p/") == []
    assert not (tmp_path / "not/there/s").exists()


def test_disk_is_needed_only_for_what_is_not_there(
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
    """An address where nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


def test_no_network_is_said_soon(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = _nobody()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    local = kagglesdk.kaggle_env.KaggleEnv.LOCAL
    monkeypatch.setitem(kagglesdk.kaggle_env._env_to_endpoint, local, nobody)
    start = time.monotonic()
    for fetch in (HUB, KAGGLE, {"urls": [f"{nobody}/x.zip"]}):
        result = fetched(tmp_path, **fetch)
        assert result.status == "failed"
        assert result.note.startswith("no download from http")
        assert "refused" in result.note
    assert time.monotonic() - start < SOON_S
    assert not (tmp_path / "s").exists()


def test_by_hand_says_what_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(CatalogError, match=r"no source godo; the catalog knows gone, good"):
        fetch_all(catalog, tmp_path, ["good", "godo"])


def test_the_folder_is_the_source_s_root(server: Server, photos: str, tmp_path: Path) -> None:
    one = Source(license="x", set="t", real=["**"], root="a/b", fetch=Fetch(urls=[photos]))
    assert fetch_source("s", one, tmp_path).status == "downloaded"
    assert files_of(tmp_path) == {"a/b/photos.bin": BODY}


def test_what_a_kill_left_of_a_mark_goes(server: Server, tmp_path: Path) -> None:
    server.publish(FILES, OLD)
    (tmp_path / "s").mkdir()
    for name in (BEGUN, MARK):
        (tmp_path / "s" / f"{name}.4711.partial").touch()
    (tmp_path / "s/notes.4711.partial").touch()  # of somebody else
    assert fetched(tmp_path, **HUB).status == "downloaded"
    assert files_of(tmp_path / "s") == {**DATA, "notes.4711.partial": b""}
    assert not list((tmp_path / "s").glob(".*.partial"))


def test_two_downloads_of_one_folder_do_not_meet(
    server: Server, photos: str, tmp_path: Path
) -> None:
    with filelock.FileLock(tmp_path / ".s.lock"):
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
    assert "leads out of" in result.note
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
        ("x.zip", b"quota exceeded", "no whole zip archive"),
        ("x.zip", zipped(a=BODY)[:-30], "no whole zip archive"),
        ("x.tar", b"quota exceeded" * 99, "no tar archive"),
        ("x.parquet", b"quota exceeded", "no .parquet file"),
        ("x.tar.gz", b"quota exceeded", "no .gz file"),
    ],
)  # fmt: skip
def test_a_page_instead_of_the_file_is_no_download(
    server: Server, tmp_path: Path, name: str, body: bytes, said: str
) -> None:
    server.bodies[f"/p/{name}"] = body
    for _ in range(2):
        result = fetched(tmp_path, urls=[f"{server.url}/p/{name}"])
        assert result.status == "failed"
        assert f"{name} is {said}" in result.note
    assert files_of(tmp_path / "s") == {}
    assert not (tmp_path / "s" / MARK).exists()


def test_complete_looks_at_the_files(server: Server, photos: str, tmp_path: Path) -> None:
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


def test_complete_looks_at_the_files_of_kaggle(kaggle: Server, tmp_path: Path) -> None:
    assert fetched(tmp_path, **KAGGLE).status == "downloaded"
    (tmp_path / "s/keep/2.png").unlink()
    result = fetched(tmp_path, **KAGGLE)
    assert result.status == "failed"
    assert "move them away to fetch the dataset" in result.note


def test_a_catalog_may_say_the_sha256(server: Server, photos: str, tmp_path: Path) -> None:
    good = {"photos.bin": hashlib.sha256(BODY).hexdigest()}
    assert fetched(tmp_path / "a", urls=[photos], sha256=good).status == "downloaded"
    result = fetched(tmp_path / "b", urls=[photos], sha256={"photos.bin": "0" * 64})
    assert result.status == "failed"
    assert "the catalog says 000000000000..." in result.note
    assert files_of(tmp_path / "b/s") == {}
    result = fetched(tmp_path / "c", urls=[photos], sha256={"other.bin": "0" * 64})
    assert "a sha256 of other.bin, which did not arrive" in result.note
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        Fetch(urls=[photos], sha256={"photos.bin": "abc"})


def test_without_an_etag_a_download_starts_anew(
    server: Server, photos: str, tmp_path: Path
) -> None:
    """Last-Modified counts in seconds, and a weak ETag does not promise the same bytes."""
    for headers in ({}, {"Last-Modified": "x"}, {"ETag": 'W/"1"'}):
        raw = tmp_path / str(len(str(headers)))
        server.headers["/p/photos.bin"] = headers
        server.bodies["/p/photos.bin"] = BODY
        server.cut["/p/photos.bin"] = CUT
        assert fetched(raw, urls=[photos]).status == "failed"
        server.bodies["/p/photos.bin"] = BODY[::-1]
        assert fetched(raw, urls=[photos]).status == "downloaded"
        assert files_of(raw / "s") == {"photos.bin": BODY[::-1]}


def test_marks_keep_no_secrets(server: Server, photos: str, tmp_path: Path) -> None:
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
    sources = read_catalog([BUILT_IN]).sources.values()
    urls = [url for source in sources if source.fetch for url in source.fetch.urls]
    assert urls
    assert all(url.startswith("https://") for url in urls)
