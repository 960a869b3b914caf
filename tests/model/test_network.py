"""Networks: heads on stages and class tokens, frozen backbones, empty networks."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from model import checkpoint, load_detector
from model.backbones.heads import StageHead
from model.backbones.pretrained import NetworkError, pretrained_config
from model.export.hub import write_hub
from model.export.onnx import export_onnx
from model.inference.gradcam import attribution
from model.network import (
    Detector,
    build,
    check_backbone_file,
    check_pretrained,
    load_backbone_file,
)
from model.recipe import Network, Optim
from model.training.optim import make_optimizer
from tests.builders import PREPROCESS, TINY, encode, photo, small_recipe
from tests.servers import HANG_S

STAGES = replace(TINY, head="stages")
MOBILE = Network(name="mobilenetv2_035", pretrained=False, init="fan_in", head="stages")


def noise(count: int = 4, size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def test_the_stage_head_is_linear_in_scaled_means_and_deviations() -> None:
    torch.manual_seed(3)
    head = StageHead([2, 3])
    maps = [torch.randn(5, 2, 4, 6), 100 * torch.randn(5, 3, 2, 3)]
    statistics = []
    for one in maps:
        places = one.numpy().reshape(5, one.shape[1], -1)
        for part in (places.mean(2), places.std(2)):
            middle = part - part.mean(1, keepdims=True)
            statistics.append(middle / np.sqrt((middle**2).mean(1, keepdims=True) + 1e-5))
    expected = np.concatenate(statistics, 1) @ head.fc.weight.detach().numpy().T
    expected += head.fc.bias.detach().numpy()
    logits = head(head.features(maps))
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("head", ["timm", "stages"])
@pytest.mark.parametrize("name", ["mobilenetv2_035", "convnextv2_atto", "vit_tiny_patch16_224"])
def test_features_then_classify_equals_forward(name: str, head: str) -> None:
    """For a trainable network and for one with a frozen backbone."""
    size = 64
    options = {"img_size": size, "depth": 3} if name.startswith("vit") else {}
    torch.manual_seed(5)
    whole = build(
        Network(name=name, pretrained=False, head=head, options=options), pretrained=False
    ).eval()
    for parameter in whole.backbone.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    frozen = build(
        Network(name=name, head=head, freeze_backbone=True, options=options), pretrained=False
    ).eval()
    frozen.load_state_dict(whole.state_dict())
    images = noise(3, size)
    with torch.inference_mode():
        expected = whole(images)
        features = frozen.features(images)
        torch.testing.assert_close(frozen.classify(features), expected)
        torch.testing.assert_close(frozen(images), expected)
        torch.testing.assert_close(frozen(features), expected)


VIT = Network(
    name="vit_tiny_patch16_224", pretrained=False, head="class_tokens", blocks=(0, 2),
    freeze_backbone=True,
    options={"img_size": 32, "depth": 4, "embed_dim": 24, "num_heads": 2, "patch_size": 8},
)  # fmt: skip


def test_the_class_token_head_reads_the_tokens_after_its_blocks() -> None:
    torch.manual_seed(5)
    net = build(VIT, pretrained=False).eval()
    images = noise(3, 32)
    with torch.inference_mode():
        features = net.features(images)
        x = net.backbone._pos_embed(net.backbone.patch_embed((images - net.mean) / net.std))
        tokens = []
        for block in net.backbone.blocks[:3]:
            x = block(net.backbone.norm_pre(x) if not tokens else x)
            tokens.append(x[:, 0])
    scaled = [torch.nn.functional.layer_norm(token, (24,)) for token in (tokens[0], tokens[2])]
    torch.testing.assert_close(features, torch.cat(scaled, 1))
    assert not net(images).any()  # the head starts at 0
    torch.nn.init.normal_(net.backbone.stage_head.fc.weight)
    with torch.inference_mode():
        torch.testing.assert_close(net(images), net.classify(features))
        torch.nn.init.zeros_(net.backbone.blocks[3].attn.qkv.weight)  # not used by the head
        torch.testing.assert_close(net(images), net.classify(features))
    learning = [name for name, p in net.named_parameters() if p.requires_grad]
    assert learning == ["backbone.stage_head.fc.weight", "backbone.stage_head.fc.bias"]


@pytest.mark.slow
def test_a_class_token_head_is_saved_exported_and_explained(tmp_path: Path) -> None:
    torch.manual_seed(5)
    net = build(VIT, pretrained=False)
    torch.nn.init.normal_(net.backbone.stage_head.fc.weight)
    checkpoint.save(
        tmp_path / "step_0000001",
        net,
        recipe=small_recipe(network=VIT),
        state=None,
        record=checkpoint.Record(
            step=1, epoch=1, metrics={}, selection=0.5, data={"train": [], "replay": []}
        ),
    )
    detector = load_detector(tmp_path)
    image = encode(photo(3, 32, 32), "PNG")
    _, cells = attribution(detector, image)
    assert cells.shape == (4, 4)
    assert np.abs(cells).max() > 0
    report = export_onnx(tmp_path / "step_0000001", tmp_path / "onnx")
    assert report["files"][0]["same_pixels"]["max"] < 1e-4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"blocks": ()}, "list the blocks"),
        ({"head": "timm"}, "are set together"),
        ({"blocks": (2, 1)}, "from 0 in rising order"),
        ({"blocks": (1, 1)}, "from 0 in rising order"),
        ({"blocks": (-1,)}, "from 0 in rising order"),
        ({"freeze_backbone": False}, "needs a frozen backbone"),
    ],
)
def test_invalid_blocks_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(VIT, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"blocks": (4,)}, "has blocks 0 to 3, but network.blocks has 4"),
        ({"name": "convnextv2_atto", "options": {}}, "has no class token; set network.head"),
    ],
)
def test_a_network_without_class_tokens_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(NetworkError, match=said):
        build(replace(VIT, **changes), pretrained=False)


@pytest.mark.parametrize("name", ["mobilenetv2_035", "convnextv2_atto", "resnet10t"])
def test_every_trainable_parameter_gets_a_gradient(name: str) -> None:
    """With DDP, a parameter without a gradient stops the run."""
    net = build(Network(name=name, pretrained=False, head="stages"), pretrained=False).train()
    torch.nn.init.normal_(net.backbone.stage_head.fc.weight)
    net(noise()).square().sum().backward()
    without = [n for n, p in net.named_parameters() if p.requires_grad == (p.grad is None)]
    assert without == []
    learning = [n for n, p in net.named_parameters() if p.requires_grad]
    assert any(n.startswith("backbone.stage_head.") for n in learning)
    assert net.backbone.get_classifier().weight.requires_grad is False


@pytest.mark.parametrize(
    "network", [replace(TINY, freeze_backbone=True), replace(MOBILE, freeze_backbone=True)]
)
def test_with_a_frozen_backbone_only_the_head_learns(network: Network) -> None:
    torch.manual_seed(0)
    net = build(network, pretrained=False).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = make_optimizer(net.backbone, Optim(lr=0.1), fused=False)
    for _ in range(2):
        net(noise())[:, 0].sum().backward()
        optimizer.step()
    changed = {n for n, value in net.state_dict().items() if not torch.equal(value, before[n])}
    head = "stage_head.fc" if network.head == "stages" else "head.fc"
    assert changed == {f"backbone.{head}.weight", f"backbone.{head}.bias"}


def test_the_statistics_of_frozen_batch_norms_never_change() -> None:
    """Not in the first step either, before anything has switched the mode of a new network."""
    net = build(replace(MOBILE, freeze_bn=True), pretrained=False)
    before = {name: value.clone() for name, value in net.named_buffers()}
    assert "backbone.bn1.running_mean" in before
    net(noise())
    for name, value in net.named_buffers():
        assert torch.equal(value, before[name]), name
    assert net.training and not net.backbone.bn1.training


def test_a_frozen_network_with_two_classifiers_learns_with_both() -> None:
    name = "deit_tiny_distilled_patch16_224"
    net = build(Network(name=name, pretrained=False, freeze_backbone=True), pretrained=False)
    learning = {n for n, p in net.backbone.named_parameters() if p.requires_grad}
    assert learning == {f"{head}.{n}" for head in ("head", "head_dist") for n in ("weight", "bias")}


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("convnextv2_atto.fcmae_ft_in1k", r"; give a file with --init-from weights\.safetensors$"),
        (
            "vit_base_patch16_clip_quickgelu_224.openai",
            r"; type `python -m model fetch` and give --init-from clip, or give a file with "
            r"--init-from weights\.safetensors$",
        ),
    ],
)
def test_random_weights_are_no_advice_for_a_frozen_backbone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, advice: str
) -> None:
    """They are refused there."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match=advice):
        check_pretrained(Network(name=name, freeze_backbone=True))


def test_a_hub_that_never_answers_costs_seconds(silence: Callable[[], None]) -> None:
    silence()
    began = time.monotonic()
    with pytest.raises(NetworkError, match=r"could not be fetched \((no answer|timed out)"):
        check_pretrained(Network(name="convnextv2_atto.fcmae_ft_in1k"))
    with pytest.raises(NetworkError, match=r"'hf-hub:owner/net': (no answer|timed out)"):
        pretrained_config("hf-hub:owner/net")
    assert time.monotonic() - began < HANG_S


def test_an_imagenet_file_fills_the_body_of_a_network_with_a_stage_head(tmp_path: Path) -> None:
    plain = build(replace(MOBILE, head="timm"), pretrained=False).backbone
    weights = {name: value.contiguous() for name, value in plain.state_dict().items()}
    weights["classifier.weight"] = torch.zeros(1000, 1280)
    weights["classifier.bias"] = torch.zeros(1000)
    save_file(weights, tmp_path / "w.safetensors")
    net = build(MOBILE, pretrained=False)
    load_backbone_file(net, tmp_path / "w.safetensors")
    assert torch.equal(net.backbone.conv_stem.weight, weights["conv_stem.weight"])
    assert torch.equal(net.backbone.blocks[6][0].bn1.bias, weights["blocks.6.0.bn1.bias"])
    assert torch.count_nonzero(net.backbone.stage_head.fc.weight) == 0


@pytest.mark.parametrize("read", [load_backbone_file, check_backbone_file])
def test_a_damaged_weights_file_is_refused_in_one_line(
    read: Callable[[Detector, Path], None], tmp_path: Path
) -> None:
    net, path = build(MOBILE, pretrained=False), tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(99)}, path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(NetworkError, match=r"w.safetensors is no readable .*; get it again, or"):
        read(net, path)


@pytest.fixture
def with_stage_head(tmp_path: Path) -> tuple[Detector, Path]:
    """A network with a stage head, and its checkpoint."""
    torch.manual_seed(2)
    net = build(STAGES, pretrained=False).eval()
    torch.nn.init.normal_(net.backbone.stage_head.fc.weight)
    checkpoint.save(
        tmp_path / "step_0000001",
        net,
        recipe=small_recipe(network=STAGES, preprocess=PREPROCESS),
        state=None,
        record=checkpoint.Record(
            step=1, epoch=1, metrics={}, selection=0.5, data={"train": [], "replay": []}
        ),
    )
    return net, tmp_path / "step_0000001"


@pytest.mark.slow
def test_a_stage_head_is_exported(with_stage_head: tuple[Detector, Path], tmp_path: Path) -> None:
    report = export_onnx(with_stage_head[1], tmp_path / "onnx")
    assert max(file["same_pixels"]["max"] for file in report["files"][:1]) < 1e-4


def test_a_stage_head_is_saved_and_explained(
    with_stage_head: tuple[Detector, Path], tmp_path: Path
) -> None:
    net, saved = with_stage_head
    detector = load_detector(saved)
    images, image = noise(size=PREPROCESS.crop_size), encode(photo(1), "PNG")
    with torch.inference_mode():
        assert torch.equal(detector.net(images), net(images))
    expected = [p.probability for p in detector.predict([image])]
    folder = write_hub(saved, tmp_path / "hub")
    assert [p.probability for p in load_detector(folder).predict([image])] == expected
    card = (folder / "README.md").read_text()
    assert "load_detector" in card and "library_name" not in card and "timm.create" not in card
    with pytest.raises(FileNotFoundError, match="config"):  # timm must not guess silently
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    _, cells = attribution(detector, image)
    assert np.isfinite(cells).all()
    assert np.abs(cells).max() > 0


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnextv2_atto"])
def test_an_empty_network_uses_no_random_numbers(name: str) -> None:
    """Random initialization takes longer than the rest of loading."""
    before = torch.get_rng_state()
    build(Network(name=name, pretrained=False), pretrained=False, empty=True)
    assert torch.equal(torch.get_rng_state(), before)
    build(Network(name=name, pretrained=False), pretrained=False)
    assert not torch.equal(torch.get_rng_state(), before)
