"""Two commands that compute the same features at once."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.features import embed as embedding
from pipeline.loading import Loading


def test_features_are_computed_by_one_of_two_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other one waits with one line, and looks again."""
    caplog.set_level(logging.INFO)
    file = SimpleNamespace(path=tmp_path / "view" / "a.arrow", shard_code=0)

    def compute(*_: object) -> int:
        while len(caplog.messages) < 2:  # until the other one waits
            time.sleep(0.01)
        file.path.touch()
        return 5

    monkeypatch.setattr(
        embedding, "missing_of", lambda *_, **_ranks: [] if file.path.exists() else [file]
    )
    monkeypatch.setattr(embedding, "embed", compute)
    shards: Any = SimpleNamespace(shards=["a.tar"], shard_samples=[5], describe=lambda: "old")
    source: Any = SimpleNamespace(store=tmp_path, backbone=None, numbered=lambda _number: None)
    net: Any = None
    embedder = embedding.Embedder(
        net=net, device=torch.device("cpu"), dtype=torch.float32, loading=Loading()
    )
    with ThreadPoolExecutor() as pool:
        two = [pool.submit(embedding.embed_sets, embedder, [shards], source, 1) for _ in range(2)]
        assert sorted(each.result(60) for each in two) == [0, 5]
    assert sorted(caplog.messages) == [
        "embedding old, view 1: another command is computing these features; waiting for it",
        "embedding old, view 1: features of 5 images in 1 shards are missing",
    ]
    assert [path.name for path in (tmp_path / "view").iterdir()] == ["a.arrow"]
