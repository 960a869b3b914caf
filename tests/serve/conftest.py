"""Fixtures of the API tests: a service with a small detector, and a client in the same process."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from model import checkpoint, load_detector
from model.inference.detector import ImageDetector
from model.network import build as build_network
from serve.api import Service, make_app
from serve.guard import Guard
from serve.limits import Limits
from tests.builders import CALIBRATION, TINY, small_recipe
from tests.servers import HANG_S

Serve = Callable[..., tuple[TestClient, Service]]


@pytest.fixture(scope="session")
def served_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs folder with one calibrated checkpoint; its random weights score images differently."""
    runs = tmp_path_factory.mktemp("served_runs")
    torch.manual_seed(5)
    net = build_network(TINY, pretrained=False)
    for name, weight in net.named_parameters():
        if "grn" in name:  # initialized to zero, which has no effect
            torch.nn.init.normal_(weight)
    folder = runs / "served" / "step_0000001"
    checkpoint.save(
        folder,
        net,
        recipe=small_recipe("served"),
        state=None,
        record=checkpoint.Record(
            step=1, epoch=1, metrics={}, selection=0.5, data={"train": ["x"], "replay": []}
        ),
    )
    checkpoint.annotate(folder, {"temperature": 1.7, "threshold": 0.6, "calibration": CALIBRATION})
    return runs


@pytest.fixture(scope="session")
def detector(served_runs: Path) -> ImageDetector:
    return load_detector(runs=served_runs, device="cpu")


@pytest.fixture
def serve(detector: ImageDetector) -> Iterator[Serve]:
    """Function `serve(key="", max_files=4, ...)` that returns a client and its service."""
    services = []

    def start(key: str = "", **limits: object) -> tuple[TestClient, Service]:
        service = Service(detector, Limits(**limits))
        services.append(service)
        guard = Guard(make_app(service), service, key)
        return TestClient(guard, raise_server_exceptions=False), service

    yield start
    for service in services:
        service.close()


class Gate:
    """Blocks scoring until `open` is set. `entered` is set when scoring was called; `sizes` lists
    the batch sizes.
    """

    def __init__(self) -> None:
        self.entered, self.open, self.sizes = threading.Event(), threading.Event(), []


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    held, score = Gate(), ImageDetector.score

    def gated(self: ImageDetector, pixels):
        held.sizes.append(len(pixels))
        held.entered.set()
        held.open.wait(2 * HANG_S)
        return score(self, pixels)

    monkeypatch.setattr(ImageDetector, "score", gated)
    yield held
    held.open.set()
