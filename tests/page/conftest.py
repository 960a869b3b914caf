"""Fixtures of the page tests: a real browser, and a real server that cannot write any file."""

import contextlib
import functools
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import requests
from streamlit.components.v2 import manifest_scanner

from model import load_detector
from model.calibration.fit import calibrate
from model.checkpoint import annotate
from model.inference.detector import ImageDetector
from model.score import score_set
from model.verdict import VERDICTS
from pipeline.loader import open_loader
from pipeline.loading import Loading
from sharding.format import open_shards
from tests.builders import ROOT, encode, photo, train_tiny

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request


@pytest.fixture(scope="session", autouse=True)
def packages_are_scanned_once() -> Iterator[None]:
    """Keep which packages have components: each run of a page reads all that are installed."""
    scan = manifest_scanner.scan_component_manifests
    manifest_scanner.scan_component_manifests = functools.cache(scan)
    yield
    manifest_scanner.scan_component_manifests = scan


@pytest.fixture(scope="session")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs folder with a checkpoint that was trained and calibrated on the tiny sets."""
    folder = train_tiny(data, tmp_path_factory.mktemp("runs"), "run.epochs=4")
    detector = load_detector(runs=folder)
    shards = open_shards([data / "new"])
    loading = Loading(backend="pil", num_workers=0)
    scores = score_set(
        detector.net,
        open_loader(
            shards, preprocess=detector.preprocess, loading=loading, device=detector.device
        ),
    )
    fitted = calibrate(scores.labels, scores.logits)
    annotate(detector.checkpoint, fitted.entries({"new": "0"}))
    return folder


@pytest.fixture(scope="session")
def detector(runs: Path) -> ImageDetector:
    return load_detector(runs=runs)


@pytest.fixture(scope="session")
def claimed(detector: ImageDetector) -> tuple[bytes, str]:
    """A photograph with a verdict that claims something, and that verdict."""
    photos = [encode(photo(seed, 400, 300)) for seed in range(12)]
    predictions = zip(photos, detector.predict(photos), strict=True)
    return next((data, one.verdict) for data, one in predictions if one.verdict != VERDICTS[1])


@contextlib.contextmanager
def serving(runs: Path, folder: Path, *, writes: bool) -> Iterator[str]:
    """The address of a server as `make app` starts it, whose temporary and kept files are in
    `folder`. Unless it `writes` the system refuses it every byte written to a file.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "streamlit", "run", "app_server.py", "--server.port", str(port),
    ]  # fmt: skip
    no_bytes = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (0, 0))
    server = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"DETECTOR_RUNS": str(runs), "TMPDIR": str(folder),
                          "DETECTOR_MISTAKES": str(folder / "kept"),
                          "PYTHONDONTWRITEBYTECODE": "1", "DETECTOR_GRACE_S": "1"},
        preexec_fn=None if writes else no_bytes,
    )  # fmt: skip
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(server.stdout), daemon=True)
    reader.start()
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        with contextlib.suppress(requests.ConnectionError, requests.Timeout):
            if requests.get(f"{address}/_stcore/health", timeout=5).text == "ok":
                break
        assert server.poll() is None, said
        time.sleep(0.1)
    try:
        yield address
    finally:
        server.terminate()
        server.wait()
        reader.join()
        server.stdout.close()
    assert "Traceback" not in "".join(said), "".join(said)


@pytest.fixture(scope="session")
def address(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that may not write a byte to a file."""
    with serving(runs, tmp_path_factory.mktemp("tmp"), writes=False) as address:
        yield address


@pytest.fixture
def visit(chromium: "Browser", address: str) -> Iterator[Callable[..., "Page"]]:
    """Function that opens the page: `visit(color_scheme="dark")`. After the test, check that the
    browser reported no error and sent requests to this server only.
    """
    contexts, strange = [], []

    def ask(request: "Request") -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            strange.append(request.url)

    def visit(**options: object) -> "Page":
        context = chromium.new_context(
            permissions=["clipboard-read", "clipboard-write"], accept_downloads=True, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(150_000)
        page.on("request", ask)
        page.on("pageerror", lambda error: strange.append(str(error)))
        page.goto(address)
        page.get_by_text("What this page can and cannot tell").wait_for()
        page.locator("h1").wait_for()  # the browser loads Streamlit's HTML element separately
        page.get_by_role("button", name="Paste from the clipboard").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not strange
