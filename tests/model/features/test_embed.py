"""Computing features: by two commands at once, and by a compiled network."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.features import embed as embedding
from model.network import build
from pipeline.loading import Loading
from tests.builders import CPU, TINY


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
    embedder = embedding.Embedder(net=net, device=CPU, dtype=torch.float32, loading=Loading())
    with ThreadPoolExecutor() as pool:
        two = [pool.submit(embedding.embed_sets, embedder, [shards], source, 1) for _ in range(2)]
        assert sorted(each.result(60) for each in two) == [0, 5]
    assert sorted(caplog.messages) == [
        "embedding old, view 1: another command is computing these features; waiting for it",
        "embedding old, view 1: features of 5 images in 1 shards are missing",
    ]
    assert [path.name for path in (tmp_path / "view").iterdir()] == ["a.arrow"]


@pytest.mark.slow  # compiles for 10 to 40 seconds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_features_are_those_of_the_network(dtype: torch.dtype) -> None:
    frozen = replace(TINY, freeze_backbone=True, head="stages")
    net = build(frozen, pretrained=False).eval()
    images = torch.randint(0, 256, (32, 3, 64, 64), dtype=torch.uint8)
    made = embedding.Embedder(net=net, device=CPU, dtype=dtype, loading=Loading())
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = made.features(images)
        compiled = replace(made, compiled=True).features(images)
    assert compiled.shape == expected.shape
    torch.testing.assert_close(
        compiled.float(), expected.float(), rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1
    )
