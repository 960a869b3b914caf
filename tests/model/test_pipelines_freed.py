"""Whoever opens a loader or a DALI backend closes it, so that no pipeline keeps memory on a GPU."""

from dataclasses import replace
from pathlib import Path

import torch

from model.features.embed import Embedder, embed_sets
from model.features.loader import FeatureSource, open_scored
from model.features.store import View, backbone_id
from model.inference.detector import load_detector
from model.network import build
from model.score import score_set
from pipeline.loading import Loading
from sharding.format import ShardSet
from tests.builders import CPU, SMALL_PREPROCESS, TINY, encode, photo

LOADING = Loading(batch_size=16, backend="dali", num_workers=1)


def test_open_scored(old: ShardSet, pipelines: list) -> None:
    with open_scored(old, SMALL_PREPROCESS, LOADING, CPU) as loader:
        score_set(build(TINY, pretrained=False), loader)
    assert [pipeline() for pipeline in pipelines] == [None]


def test_embed(old: ShardSet, tmp_path: Path, pipelines: list) -> None:
    frozen = replace(TINY, freeze_backbone=True, head="stages")
    net = build(frozen, pretrained=False)
    identity = backbone_id(net, frozen, SMALL_PREPROCESS, torch.float32)
    source = FeatureSource(store=tmp_path, backbone=identity, view=View())
    embedder = Embedder(net=net, device=CPU, dtype=torch.float32, loading=LOADING)
    embed_sets(embedder, [old], source, 0)
    assert [pipeline() for pipeline in pipelines] == [None]


def test_prediction(small_runs: Path, pipelines: list) -> None:
    load_detector(runs=small_runs, backend="dali").predict([encode(photo(1, 60, 60))] * 3)
    assert [pipeline() for pipeline in pipelines] == [None]
