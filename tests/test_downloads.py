"""Referee of both downloaders, `sharding fetch` and `model fetch`: after the same fault, both have
the whole file and nothing else.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

import console
from model.shipped import fetch
from model.shipped.backbone import BackboneFile, BackboneSpec, HubPlace
from sharding.downloads import FetchError
from sharding.http import ask, download
from tests.servers import BODY, CUT, Server

SHA256 = hashlib.sha256(BODY).hexdigest()
PLACE = HubPlace(repository="someone/clip", revision="1" * 40, file="model.safetensors")
PATH = f"/{PLACE.repository}/resolve/{PLACE.revision}/{PLACE.file}"
SPEC = BackboneSpec(
    name="tiny",
    license="mit",
    files=[BackboneFile(sha256=SHA256, hub=PLACE, wheel=None)],
    tested={SHA256: {}},
)


def raw_file(url: str, folder: Path) -> Path:
    """Download as `sharding fetch` does."""
    with requests.Session() as session:
        session.headers["Accept-Encoding"] = "identity"
        remote = ask(session, url, folder / f"{SHA256}.safetensors", SHA256)
        download(session, remote, functools.partial(console.progress, shown=False))
    return remote.path


def backbone(_url: str, _folder: Path) -> Path:
    """Download as `model fetch` does."""
    return fetch.fetch_backbone(SPEC)


PARTIALS = {
    "none": b"",
    "a part": BODY[:2000],
    "everything": BODY,
    "another file of this length": BODY[::-1],
    "a part of another file": BODY[::-1][:2000],
    "more than the file": BODY + b"more",
}


@pytest.mark.parametrize("ranges", ["yes", "no", "wrong"])
@pytest.mark.parametrize("left", PARTIALS)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("fetched", [raw_file, backbone], ids=["raw file", "backbone"])
def test_a_fault_costs_at_most_one_more_command(
    fetched: Callable[[str, Path], Path], cut: bool, left: str, ranges: str, server: Server,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("DETECTOR_CACHE", str(tmp_path))
    server.bodies[PATH] = BODY
    server.headers[PATH] = {"ETag": f'"{SHA256}"', "X-Repo-Commit": PLACE.revision}
    server.ranges = ranges
    if cut:
        server.cut[PATH] = CUT
    if PARTIALS[left]:
        names = {raw_file: f"{SHA256}.safetensors.partial", backbone: f"{SHA256}.partial"}
        (tmp_path / names[fetched]).write_bytes(PARTIALS[left])
    # A broken connection ends `sharding fetch`, and the next one resumes; `model fetch` goes on.
    broken = cut and fetched is raw_file
    for _ in range(1 + broken + ("another" in left)):
        try:
            path = fetched(f"{server.url}{PATH}", tmp_path)
            break
        except (FetchError, requests.RequestException):
            assert not list(tmp_path.glob("*.safetensors"))  # never under its final name
    else:
        pytest.fail("the file did not arrive")
    assert path.read_bytes() == BODY
    assert not list(tmp_path.glob("*.partial"))
    if left == "everything":
        assert not server.got(PATH)


def test_without_a_size_a_partial_file_that_is_too_long_is_replaced(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTOR_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "ask_hub", lambda *_: None)
    server.bodies[PATH] = BODY
    (tmp_path / f"{SHA256}.partial").write_bytes(BODY + b"more")
    assert fetch.fetch_backbone(SPEC).read_bytes() == BODY
    assert [of for _, of in server.got(PATH)] == [f"bytes={len(BODY) + 4}-", ""]
