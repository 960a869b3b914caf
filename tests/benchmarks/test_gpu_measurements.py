"""What the benchmarks of the GPU path measure is what they name, as far as a CPU can show it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step as step_benchmark
from benchmarks.embedding import network_alone, whole
from benchmarks.gpu_loader import pictures_of
from benchmarks.gpu_selftest import DETAIL, OPERATIONS, Given, damaged_png, operations
from benchmarks.predict import bare, write_checkpoint
from benchmarks.step import CONVOLUTIONS, Way, measure
from imaging.decode import DecodeError, decode_image
from model import load_detector
from model.backbones.resolve import resolved
from model.features.embed import Embedder
from model.features.loader import FeatureSource
from model.features.store import BackboneId, View
from model.recipe import Recipe
from pipeline.augment import AugmentParams
from pipeline.dali import _may_reach_graph
from pipeline.loading import Loading
from recipes import load
from sharding.format import ShardSet, open_shards
from tests.builders import PREPROCESS, encode, photo


def test_the_damaged_png_reaches_dalis_decoder() -> None:
    assert _may_reach_graph(damaged_png(), "PNG")
    with pytest.raises(DecodeError):
        decode_image(damaged_png(), "PNG", 1)


def test_the_self_test_has_every_field_of_the_augmentation() -> None:
    """The bicubic crop of each frozen backbone was left out."""
    tried = {field for operation in (*OPERATIONS.values(), DETAIL) for field in operation}
    assert tried == set(AugmentParams._fields) - {"top", "left", "height", "width"}
    alone = [set(operation) for operation in OPERATIONS.values() if len(operation) == 1]
    assert {"crop_filter"} in alone and {"vflip"} in alone


@pytest.mark.slow
def test_the_self_test_runs_every_operation_without_a_failed_image() -> None:
    jpegs = [encode(photo(seed, 200, 180), "JPEG") for seed in range(3)]
    answer = operations(Given(jpegs, [], torch.device("cpu")))
    assert list(answer) == [*OPERATIONS, "a second crop"]
    assert all(row == [0, 0, 0, {}] for row in answer.values())


def test_the_jpeg_step_is_measured_on_pictures(data: Path) -> None:
    """Noise costs libjpeg more than pictures do."""
    pictures = pictures_of(data / "val", 100)
    count = len(open_shards([data / "val"]))
    assert len(pictures) == 100 > count
    assert {(picture.shape, picture.dtype.name) for picture in pictures} == {
        ((256, 256, 3), "uint8")
    }
    assert pictures[count] is pictures[0] is not pictures[1]
    neighbors = np.diff(np.stack(pictures[:count]).astype(int), axis=2)
    assert np.abs(neighbors).mean() < 30  # of noise: 85


@pytest.mark.slow
def test_operations_are_counted_before_the_peak_of_memory_is_reset(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting runs an uncompiled step, which needs more memory than the compiled one."""
    happened: list[str] = []
    count, reset = step_benchmark.operations, step_benchmark.begin_memory

    def counted(state: object, batch: object, recipe: object) -> int:
        happened.append(f"counted on {len(batch)}")
        return count(state, batch, recipe)

    def begun(device: torch.device) -> None:
        happened.append("reset")
        reset(device)

    monkeypatch.setattr(step_benchmark, "operations", counted)
    monkeypatch.setattr(step_benchmark, "begin_memory", begun)
    recipe = resolved(load(Recipe, tiny_recipe))
    way = Way(batch=16, dtype="fp32")
    whole = measure(way, recipe, torch.device("cpu"), 0.01, {"fp32": 1.0})
    assert happened == ["reset", "counted on 8", "reset"]
    half = measure(Way(batch=8, dtype="fp32"), recipe, torch.device("cpu"), 0.01, {"fp32": 1.0})
    assert whole["operations"] == 2 * half["operations"]


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_both_gradients_of_a_convolution_count_as_much_as_its_forward_pass(groups: int) -> None:
    """torch counts a depthwise convolution as many times too much as it has channels."""
    layer = torch.nn.Conv2d(16, 32, 3, padding=1, groups=groups, device="meta")
    images = torch.empty(2, 16, 8, 8, device="meta", requires_grad=True)
    forward = 2 * (2 * 32 * 8 * 8) * (16 // groups * 3 * 3)  # multiply and add
    with FlopCounterMode(display=False, custom_mapping=CONVOLUTIONS) as counter:
        layer(images).sum().backward()
    assert counter.get_total_flops() == 3 * forward


def test_predict_and_the_bare_network_have_one_precision(tmp_path: Path) -> None:
    """On a GPU, the bare network ran in float32 beside predict.py in bf16."""
    detector = load_detector(write_checkpoint(tmp_path, "mobilenetv2_100"), device="cpu")
    mixed = []
    detector.net.register_forward_hook(lambda *_: mixed.append(torch.is_autocast_enabled("cpu")))
    for dtype in (torch.float32, torch.bfloat16):
        bare(replace(detector, dtype=dtype), 3, 2)
    assert mixed == [False, False, True, True]


class Layouts(torch.nn.Module):
    """Notes the layout of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[bool] = set()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.add(images.is_contiguous(memory_format=torch.channels_last))
        return images.float().mean((2, 3))


def test_the_network_alone_has_the_layout_of_embed(old: ShardSet, tmp_path: Path) -> None:
    device, loading = torch.device("cpu"), Loading(batch_size=16, num_workers=0, backend="pil")
    alone, together = Layouts(), Layouts()
    backbone = BackboneId(
        network="layouts", options={}, head="timm", blocks=(), mean=(0, 0, 0), std=(1, 1, 1),
        sha256="0" * 64, preprocess=PREPROCESS, precision="fp32",
    )  # fmt: skip
    source = FeatureSource(store=tmp_path, backbone=backbone, view=View())
    of_net = Embedder(net=alone, device=device, dtype=torch.float32, loading=loading)
    network_alone(of_net, PREPROCESS.shape, 0)
    whole(replace(of_net, net=together), old, source)
    assert alone.seen == together.seen == {True}
