"""Fixtures of all tests: tiny shard sets from the real builder, runs, checkpoints and servers.

Tests get them from tests/conftest.py, which loads this file as a plugin where tests run.
"""

import gc
import logging
import os
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub.constants
import pytest
import torch

import console
from model import checkpoint
from model.network import Detector
from model.network import build as build_network
from model.recipe import Network
from model.training import plan
from pipeline.augment import AugmentPolicy
from pipeline.loader import open_loader
from pipeline.loading import Loading
from pipeline.preprocess import Preprocess
from pipeline.replay import Replay
from pipeline.stream import Pool, Stream, open_pool
from sharding.format import INDEX_FILE, ShardSet, open_shards
from storage import sha256_of
from tests.browser import CHROMIUM
from tests.builders import (
    CALIBRATION,
    HARSH,
    PREPROCESS,
    ROOT,
    TINY,
    TINY_RECIPE,
    build_all,
    small_recipe,
    write_raw,
)
from tests.goldens import Golden
from tests.servers import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Golden values in tests/golden; see `make golden`."""
    return Golden(ROOT / "tests/golden", write=request.config.getoption("write_golden"))


@pytest.fixture(scope="session", autouse=True)
def each_size_is_checked_once() -> Iterator[None]:
    """Keep which image sizes networks accept: a hundred trainings have the same tiny network."""
    check, accepted = plan.check_size, set[str]()

    def checked(net: Detector, network: Network, preprocess: Preprocess) -> None:
        key = repr((network, preprocess))
        if key not in accepted:
            check(net, network, preprocess)
            accepted.add(key)

    plan.check_size = checked
    yield
    plan.check_size = check


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk() -> Iterator[None]:
    """Let the system write files when it likes: no test cuts the power. A test of what is synced
    replaces `os.fsync` by a function that notes it.
    """
    fsync, os.fsync = os.fsync, lambda descriptor: os.fstat(descriptor) and None
    yield
    os.fsync = fsync


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode in this process where a test does not set `num_workers`: a fork of pytest is slow."""
    monkeypatch.setattr("pipeline.loader.cores", lambda: 0)


@pytest.fixture(autouse=True)
def no_detector_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the detectors that ship, so that tests do not depend on them."""
    monkeypatch.setattr("model.shipped.backbone.DETECTORS", Path("no detectors").absolute())


@pytest.fixture(autouse=True)
def streamlit_leaves_nothing() -> Iterator[None]:
    """Restore `__main__`, which Streamlit's tests replace by a script that spawned processes run,
    and forget the detector that the page keeps for all sessions of a process.
    """
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main
    if "page.detector" in sys.modules:
        sys.modules["streamlit"].cache_resource.clear()


@pytest.fixture(autouse=True)
def no_training_goes_on() -> Iterator[None]:
    """End the trainings that a failed test left running."""
    yield
    if "tests.forked" in sys.modules:
        sys.modules["tests.forked"].kill_started()


@pytest.fixture(autouse=True)
def no_trust_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide a C2PA trust list of this machine, so that tests do not depend on it."""
    monkeypatch.setattr("model.c2pa.signatures.CACHED", "no list")
    monkeypatch.delenv("DETECTOR_TRUST_LIST", raising=False)


@pytest.fixture(scope="session")
def chromium() -> Iterator["Browser"]:
    """A running Chromium. There is one for all tests of a process, as Playwright requires."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="session")
def data(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the packed sets old, new and val."""
    return build_all(raw, tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def old(data: Path) -> ShardSet:
    return open_shards([data / "old"])


@pytest.fixture(scope="session")
def new(data: Path) -> ShardSet:
    return open_shards([data / "new"])


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """List of the messages that the program logs at level info or above."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("ai_images_detector")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start moto's S3 server; yields the environment in which s3:// addresses use it."""
    log = (tmp_path_factory.mktemp("s3") / "log").open("w+")
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    address = ""
    for _ in range(300):
        log.seek(0)
        if addresses := [w for w in log.read().split() if w.startswith("http://127.0.0.1:")]:
            address = addresses[0]
            break
        time.sleep(0.1)
    assert address, "moto's server did not start"
    yield {
        "AWS_ENDPOINT_URL": address,
        "FSSPEC_S3_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.terminate()
    server.wait()
    log.close()


@pytest.fixture(scope="session")
def client(s3: dict[str, str]) -> Iterator[object]:
    """boto3 client of moto's server."""
    import boto3  # optional: the other tests must run without it

    s3_client = boto3.client(
        "s3", endpoint_url=s3["AWS_ENDPOINT_URL"], region_name="us-east-1",
        aws_access_key_id="test", aws_secret_access_key="test",
    )  # fmt: skip
    yield s3_client
    s3_client.close()


@pytest.fixture
def make_stream(data: Path) -> Callable[..., Stream]:
    """Function that opens a training stream over the tiny sets: `make_stream(backend="pil")`."""

    def make(
        *, batch_size: int = 6, rank: int = 0, world_size: int = 1, pool: Pool | None = None,
        ratio: str = "1:8", seed: int = 3, **loading: object,
    ) -> Stream:  # fmt: skip
        replay = Replay(sets=["old"], ratio=ratio)
        pool = pool or open_pool(data, ["new"], replay)
        loader = open_loader(
            pool.shards, preprocess=PREPROCESS, loading=Loading(batch_size=batch_size, **loading),
            device=torch.device("cpu"), rank=rank, world_size=world_size,
        )  # fmt: skip
        return Stream(loader, pool, replay, {"train": HARSH, "dda": AugmentPolicy()}, "train", seed)

    return make


@pytest.fixture
def pipelines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], object]]]:
    """Weak references to the DALI pipelines that the test builds. Python collects no garbage: a
    dropped pipeline stays if it is part of a reference cycle.
    """
    from pipeline.dali import DaliBackend  # the other tests must run without DALI

    build, built = DaliBackend._build, []

    def noted(*arguments: Any, **options: Any) -> object:
        pipeline = build(*arguments, **options)
        built.append(weakref.ref(pipeline))
        return pipeline

    monkeypatch.setattr(DaliBackend, "_build", noted)
    gc.disable()
    yield built
    gc.enable()


@pytest.fixture(scope="session")
def small_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs with one checkpoint, whose network is initialized and not trained."""
    runs = tmp_path_factory.mktemp("small_runs")
    torch.manual_seed(1)
    checkpoint.save(
        runs / "small" / "step_0000001",
        build_network(TINY, pretrained=False),
        recipe=small_recipe(),
        state=None,
        record=checkpoint.Record(
            step=1, epoch=1, metrics={}, selection=0.5, data={"train": ["x"], "replay": []}
        ),
    )
    return runs


@pytest.fixture(scope="session")
def tiny_checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated checkpoint with random weights: step 7 of the run `tiny`, trained on `old`."""
    hashes = {"old": sha256_of(data / "old" / INDEX_FILE)}
    torch.manual_seed(5)
    net = build_network(TINY, pretrained=False)
    for name, weight in net.named_parameters():
        if "grn" in name:  # initialized to zero, which would have no effect
            torch.nn.init.normal_(weight)
    folder = tmp_path_factory.mktemp("runs") / "tiny" / "step_0000007"
    checkpoint.save(
        folder,
        net,
        recipe=small_recipe(name="tiny", preprocess=PREPROCESS),
        state=None,
        record=checkpoint.Record(
            step=7,
            epoch=0.5,
            metrics={},
            selection=None,
            data={"train": ["old"], "replay": [], "set_sha256": hashes},
        ),
    )
    checkpoint.annotate(folder, {"temperature": 1.7, "threshold": 0.6, "calibration": CALIBRATION})
    return folder


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> Path:
    """Recipe that trains on the tiny sets in a second."""
    path = tmp_path / "tiny.toml"
    path.write_text(
        f"""
extends = ["{TINY_RECIPE}"]
[network]
drop_path_rate = 0.2
[run]
epochs = 2
log_every = 2
"""
    )
    return path


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    one = Server()
    home = tmp_path / "home"
    home.mkdir()
    for key in [key for key in os.environ if key.startswith(("HF_", "KAGGLE"))]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(home))
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    import kagglesdk.kaggle_env  # optional: the other tests must run without it

    local = kagglesdk.kaggle_env.KaggleEnv.LOCAL
    monkeypatch.setitem(kagglesdk.kaggle_env._env_to_endpoint, local, one.url)
    # The library reads HF_ENDPOINT when it is imported, so its constants are patched instead.
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", one.url)
    template = one.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)
    yield one
    one.go_on.set()
    one.shutdown()
    one.server_close()


@pytest.fixture
def silence(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """`silence()` replaces the hub by one that takes connections and never answers."""
    constants = huggingface_hub.constants
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"

        def silence() -> None:
            monkeypatch.setattr(constants, "ENDPOINT", url)
            template = url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)

        yield silence


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None]]:
    """A list that gets the label and the total of each progress bar."""
    shown: list[tuple[str, int | None]] = []
    progress = console.progress

    def noted(label: str, total: int | None, *more: Any, **options: Any) -> Any:
        shown.append((label, total))
        return progress(label, total, *more, **options)

    monkeypatch.setattr(console, "progress", noted)
    return shown
