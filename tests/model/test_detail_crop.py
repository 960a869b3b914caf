"""A network that sees two crops of an image: built, trained on features, predicted, exported."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model import checkpoint, load_detector
from model.backbones.resolve import describe_preprocess
from model.export import onnx as export
from model.features.store import View, files_of, frozen_sha256
from model.features.store import backbone_id as identity_of
from model.inference import onnx_detector
from model.inference.gradcam import attribution, heatmap
from model.network import build, check_size
from model.recipe import Network
from pipeline.preprocess import Preprocess, PreprocessSettings
from sharding.format import open_shards
from tests.builders import encode, photo, small_recipe
from tests.model.test_families import FAMILIES

SIZE = 32
VIT = Network(
    name=FAMILIES["clip"][0], pretrained=False, options=FAMILIES["clip"][1] | {"depth": 3},
    head="class_tokens", blocks=(0, 1), freeze_backbone=True,
)  # fmt: skip
CONV = Network(
    name=FAMILIES["convnext"][0], pretrained=False, options=FAMILIES["convnext"][1],
    head="stages",
)  # fmt: skip


def recipe_of(network: Network, detail: bool = True):
    settings = PreprocessSettings(crop_size=SIZE, detail_crop=detail)
    return small_recipe(network=network, preprocess=settings)


def net_of(network: Network, detail: bool = True):
    recipe = recipe_of(network, detail)
    torch.manual_seed(4)
    net = build(recipe.network, pretrained=False)
    with torch.no_grad():
        net.backbone.stage_head.fc.weight.normal_(std=0.05)
    return recipe, net.eval()


@pytest.fixture(scope="module", params=[VIT, CONV], ids=["class_tokens", "stages"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe, net = net_of(request.param)
    folder = tmp_path_factory.mktemp("detail") / "step_0000001"
    record = checkpoint.Record(step=1, epoch=1, metrics={}, selection=0.5, data={})
    checkpoint.save(folder, net, recipe=recipe, state=None, record=record)
    return folder


@pytest.mark.parametrize("network", [VIT, CONV], ids=["class_tokens", "stages"])
def test_the_head_reads_the_features_of_each_crop(network: Network) -> None:
    recipe, net = net_of(network)
    assert recipe.network.crops == 2 and recipe.preprocess.detail_crop
    pixels = torch.randint(0, 256, (3, 2 * SIZE, SIZE, 3), dtype=torch.uint8)
    images = pixels.permute(0, 3, 1, 2)
    _, single = net_of(network, detail=False)
    single.backbone.load_state_dict(
        {k: v for k, v in net.backbone.state_dict().items() if not k.startswith("stage_head")},
        strict=False,
    )
    with torch.inference_mode():
        both = net.features(images)
        upper, lower = (single.features(half) for half in images.split(SIZE, 2))
        logits, classified = net(images), net.classify(both)
    torch.testing.assert_close(both, torch.cat([upper, lower], 1))
    torch.testing.assert_close(logits, classified)
    assert not torch.allclose(upper, lower)


def test_a_recipe_says_that_the_network_has_a_second_input() -> None:
    lines = describe_preprocess(recipe_of(VIT))
    assert f"second input: {SIZE} x {SIZE} pixels, not resized" in lines
    assert len(describe_preprocess(recipe_of(VIT, detail=False))) == len(lines) - 1
    check_size(build(recipe_of(VIT).network, pretrained=False, empty=True), VIT,
               recipe_of(VIT).preprocess)  # fmt: skip


def test_timms_own_head_cannot_read_two_crops() -> None:
    with pytest.raises(ValueError, match="detail_crop needs a head that reads two crops"):
        recipe_of(replace(CONV, head="timm"))
    with pytest.raises(ValueError, match=r"crops is 2 without preprocess\.detail_crop"):
        recipe_of(replace(VIT, crops=2), detail=False)
    with pytest.raises(ValueError, match="crops is 1 or 2, got 3"):
        replace(VIT, crops=3)


FILES = [encode(photo(n, 90 + 11 * n, 70), kind) for n, kind in enumerate(("JPEG", "PNG"))]


def test_it_predicts_the_same_from_files_and_pixels(saved: Path) -> None:
    detector = load_detector(saved, backend="pil")
    assert detector.preprocess.shape == (2 * SIZE, SIZE)
    by_file = [prediction.probability for prediction in detector.predict(FILES)]
    pixels = np.stack([detector.preprocess_file(file) for file in FILES])
    np.testing.assert_allclose(detector.score(pixels), by_file, rtol=1e-6)
    by_dali = load_detector(saved, backend="dali").predict(FILES)
    np.testing.assert_allclose([p.probability for p in by_dali], by_file, atol=0.02)
    swapped = np.concatenate([pixels[:, SIZE:], pixels[:, :SIZE]], 1)
    assert np.abs(detector.score(swapped) - by_file).min() > 1e-4  # the order of the crops counts


@pytest.mark.parametrize(
    "saved",
    [pytest.param(VIT, marks=pytest.mark.slow, id="class_tokens"), pytest.param(CONV, id="stages")],
    indirect=True,
)
def test_the_exported_graph_predicts_the_same(saved: Path, tmp_path: Path) -> None:
    by_file = [one.probability for one in load_detector(saved, backend="pil").predict(FILES)]
    export.export_onnx(saved, tmp_path / "onnx")
    exported = onnx_detector.load_onnx(tmp_path / "onnx/detector.onnx", device="cpu")
    by_onnx = [prediction.probability for prediction in exported.predict(FILES)]
    np.testing.assert_allclose(by_onnx, by_file, atol=1e-2)
    assert "(batch, 64, 32, 3)" in exported.meta["input"]
    assert "before its resizing" in exported.meta["input"]


def test_the_heatmap_shows_both_crops(saved: Path) -> None:
    detector = load_detector(saved, backend="pil")
    file = encode(photo(2, 90, 70), "PNG")
    preprocessed, cells = attribution(detector, file)
    assert preprocessed.shape == heatmap(detector, file).shape == (2 * SIZE, SIZE, 3)
    rows, columns = cells.shape
    assert rows == 2 * columns
    assert np.abs(cells[:columns]).max() > 0 and np.abs(cells[columns:]).max() > 0


def test_a_store_without_the_detail_keeps_its_name(data: Path, tmp_path: Path) -> None:
    """A store is found by a hash of its settings: the new setting must not change old names."""
    recipe, net = net_of(VIT, detail=False)
    plain = identity_of(net, recipe.network, recipe.preprocess, torch.float32)
    same = replace(plain, sha256="0" * 64, options={}, preprocess=Preprocess(crop_size=SIZE))
    assert same.folder.endswith("-b111830ae2c4152c")
    detailed = replace(same, preprocess=replace(same.preprocess, detail_crop=True))
    assert detailed.folder != same.folder
    shards = open_shards([data / "val"])
    (first, *_) = files_of(tmp_path, detailed, shards, View())
    assert first.path.parts[-4] == detailed.folder
    assert frozen_sha256(net) == plain.sha256
