"""One small network of each timm family, with random weights: from training to the heatmap."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

import recipes
from model import checkpoint, load_detector
from model.backbones.pretrained import pretrained_input
from model.backbones.resolve import (
    describe_preprocess,
    nearest_filter,
    normalization_warnings,
    resolved,
)
from model.export import onnx as export
from model.export.hub import write_hub
from model.inference import onnx_detector
from model.inference.gradcam import attribution
from model.network import (
    Detector,
    NetworkError,
    build,
    check_backbone_file,
    check_size,
    load_backbone_file,
)
from model.recipe import Network, Recipe
from model.training.optim import layer_of_parameters
from model.training.plan import plan
from model.training.run import train
from pipeline import pil
from pipeline.preprocess import Preprocess, PreprocessSettings
from tests.builders import encode, photo, small_recipe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

TINY_VIT = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("vit_base_patch16_clip_quickgelu_224.openai", TINY_VIT),
    "interpolated": (  # its weights are of 24 pixels
        "vit_base_patch16_clip_quickgelu_224.openai",
        TINY_VIT | {"img_size": 24, "dynamic_img_size": True},
    ),
    "siglip": ("vit_base_patch16_siglip_224.webli", TINY_VIT),
    "swin": (
        "swin_tiny_patch4_window7_224.ms_in1k",
        {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    ),
    "convnext": (
        "convnextv2_atto.fcmae_ft_in1k",
        {"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16], "patch_size": 2},
    ),
    "pe": ("vit_pe_core_tiny_patch16_384.fb", TINY_VIT),
    "dinov3": ("vit_small_patch16_dinov3.lvd1689m", TINY_VIT),
    "efficientnet": ("efficientnet_b0.ra_in1k", {}),
}
QUICK = ("clip",)
EACH = [
    pytest.param(key, marks=() if key in QUICK else pytest.mark.slow, id=key) for key in FAMILIES
]

SIZE = 32

# float32 sums of the same numbers in another order.
SAME = 1e-4


def family(key: str, **changes: Any) -> Network:
    """Build a small network of a family, for images of `SIZE`."""
    name, options = FAMILIES[key]
    network = Network(name=name, pretrained=False, options=options, **changes)
    recipe = small_recipe(network=network, preprocess=PreprocessSettings(crop_size=SIZE))
    return recipe.network


def state_of(net: Detector) -> dict[str, torch.Tensor]:
    """Copy the backbone's weights."""
    weights = net.backbone.state_dict()
    return {
        name: weight.clone(memory_format=torch.contiguous_format)
        for name, weight in weights.items()
    }


@pytest.mark.parametrize("key", EACH)
def test_a_family_trains_predicts_is_exported_and_explained(
    key: str, data: Path, tmp_path: Path
) -> None:
    name, options = FAMILIES[key]
    path = tmp_path / "family.toml"
    settings = "\n".join(f"{option} = {json.dumps(value)}" for option, value in options.items())
    path.write_text(
        f"""
name = "{key}"
data = {{ train = ["old"], validate = ["val"], policy = "flip" }}
augment = {{ flip = {{ hflip = 0.5 }}, dda = {{ hflip = 0.5 }} }}
preprocess = {{ crop_size = {SIZE} }}
optim = {{ lr = 1e-3, layer_decay = 0.5, layer_decay_groups = "block" }}
loading = {{ batch_size = 8, num_workers = 0 }}
run = {{ epochs = 1 }}
[network]
name = "{name}"
pretrained = false
[network.options]
{settings}
"""
    )
    torch.manual_seed(1)
    saved = train(recipes.load(Recipe, path), data, tmp_path / "runs", stop_at=2)
    meta, config = checkpoint.read_meta(saved), timm.get_pretrained_cfg(name)
    assert meta["step"] == 2
    assert tuple(meta["recipe"]["network"]["mean"]) == config.mean
    assert tuple(meta["recipe"]["network"]["std"]) == config.std
    assert meta["preprocess"] == {
        "crop_size": SIZE,
        "resize_size": int(SIZE / config.crop_pct),
        "interpolation": config.interpolation,
        "detail_crop": False,
    }
    detector, image = load_detector(saved, backend="pil"), encode(photo(1), "PNG")
    (prediction,) = detector.predict([image])
    assert 0 < prediction.probability < 1

    export.export_onnx(saved, tmp_path / "onnx")
    exported = onnx_detector.load_onnx(tmp_path / "onnx/detector.onnx", device="cpu")
    (by_onnx,) = exported.predict([image])
    assert by_onnx.probability == pytest.approx(prediction.probability, abs=1e-2)
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "onnx/detector.onnx")
    (logits,) = session.run(["logits"], {"images": pixels})
    with torch.inference_mode():
        expected = detector.net(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(logits, expected, atol=10 * SAME)

    _, cells = attribution(detector, image)
    assert np.isfinite(cells).all()
    assert np.abs(cells).max() > 0

    folder = write_hub(saved, tmp_path / "hub")
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=plain))
    images = transform(Image.fromarray(photo(2, 36, 36)))[None]
    assert images.shape == (1, 3, SIZE, SIZE)
    with torch.inference_mode():
        by_timm = plain(images)[0].numpy()
    (by_ours,) = detector.predict([encode(photo(2, 36, 36), "PNG")])
    assert 1 / (1 + np.exp(by_timm[0] - by_timm[1])) == pytest.approx(by_ours.probability, abs=0.02)


@pytest.mark.parametrize("key", FAMILIES)
def test_preprocessing_matches_timms_transform(key: str) -> None:
    """Compared with timm's transform for the weights, at their own size: exact up to rounding
    without resizing; with resizing, compared inside of the outermost pixels.
    """
    name = FAMILIES[key][0]
    recipe = small_recipe(network=Network(name=name), preprocess=PreprocessSettings())
    config = timm.get_pretrained_cfg(name)
    transform = create_transform(**resolve_data_config(pretrained_cfg=config.to_dict()))
    net = Detector(torch.nn.Identity(), recipe.network)
    side = recipe.preprocess.resize_size
    for times, within in ((1, 1e-5), (2, 2 / 255 / min(config.std) + 1e-5)):
        noise = np.random.default_rng(3).integers(0, 256, (times * side, times * side, 3), np.uint8)
        image = noise if times == 1 else photo(4, times * side, times * side)
        expected = transform(Image.fromarray(image))
        for by in (pil.preprocess, onnx_detector.preprocess):
            pixels = torch.from_numpy(by(image, recipe.preprocess).copy())
            seen = net(pixels.permute(2, 0, 1)[None])[0]
            assert seen.shape == expected.shape
            apart = (seen - expected).abs()[:, 4:-4, 4:-4]
            assert apart.max() <= within, f"{times}: {apart.max()}"


def test_two_filters_differ_by_more_than_the_tolerance() -> None:
    """The comparison with timm's transform can tell two filters apart."""
    image = photo(4, 496, 496)
    bicubic, bilinear = (
        pil.preprocess(image, Preprocess(crop_size=224, resize_size=248, interpolation=name))
        for name in ("bicubic", "bilinear")
    )
    assert np.abs(bicubic.astype(int) - bilinear)[4:-4, 4:-4].max() > 4


def test_stated_settings_are_kept_and_described() -> None:
    network = Network(name=FAMILIES["clip"][0], mean=(0.5, 0.5, 0.5))
    stated = PreprocessSettings(crop_size=336, interpolation="lanczos")
    recipe = small_recipe(network=network, preprocess=stated)
    assert recipe.network.mean == (0.5, 0.5, 0.5)
    assert recipe.network.std == timm.get_pretrained_cfg(network.name).std
    assert recipe.network.options == {"img_size": 336}
    assert recipe.preprocess == Preprocess(crop_size=336, resize_size=373, interpolation="lanczos")
    assert resolved(recipe) == recipe
    for zero in ({"crop_size": 0}, {"resize_size": 0}):
        with pytest.raises(ValueError, match="must satisfy 16 <= crop_size <= resize_size"):
            small_recipe(network=network, preprocess=PreprocessSettings(**zero))
    (warned,) = normalization_warnings(recipe)
    assert warned == (
        "network.mean is [0.5, 0.5, 0.5], but timm's weights of "
        "vit_base_patch16_clip_quickgelu_224.openai were made with [0.4815, 0.4578, 0.4082]: leave "
        "it out, unless your weights are not timm's"
    )
    seen, made = describe_preprocess(recipe)
    assert seen.startswith("input: center crop of 336 x 336 pixels, shorter side 373 (lanczo")
    assert made == "its weights were trained on 224 x 224 pixels, shorter side 248 (bicubic)"
    assert [nearest_filter(name) for name in ("bicubic", "hamming")] == ["bicubic", "bilinear"]


def test_an_open_recipe_takes_the_size_of_the_weights() -> None:
    recipe = small_recipe(network=Network(name=FAMILIES["pe"][0]), preprocess=PreprocessSettings())
    assert recipe.preprocess == Preprocess(crop_size=384, resize_size=384, interpolation="bicubic")
    assert recipe.network.options == {}
    assert not normalization_warnings(recipe)
    assert len(describe_preprocess(recipe)) == 1
    built_for = Network(name=FAMILIES["pe"][0], options={"img_size": 128})
    recipe = small_recipe(network=built_for, preprocess=PreprocessSettings())
    assert recipe.preprocess.crop_size == 128


def test_the_plan_warns_of_preprocessing_other_than_the_weights(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipes.load(Recipe, tiny_recipe, ["network.mean=[0.5, 0.5, 0.5]"])
    weights = state_of(build(resolved(recipe).network, pretrained=False))
    save_file(weights, tmp_path / "weights.safetensors")
    planned = plan(recipe, data, tmp_path, init_from=tmp_path / "weights.safetensors")
    (warned,) = planned.warnings
    assert warned.startswith("network.mean is [0.5, 0.5, 0.5], but timm's weights of convnextv2_at")
    assert not plan(recipe, data, tmp_path).warnings  # random weights were trained on no images
    checkpoint.save(
        tmp_path / "before" / "step_0000001",
        build(resolved(recipe).network, pretrained=False),
        recipe=resolved(recipe),
        state=None,
        record=checkpoint.Record(step=1, epoch=1, metrics={}, selection=0.5, data={}),
    )
    start = tmp_path / "before" / "step_0000001"
    recipe = recipes.load(Recipe, tiny_recipe, ["preprocess.interpolation=bicubic"])
    assert plan(recipe, data, tmp_path, init_from=start).warnings == (
        f"preprocess.interpolation is bicubic, but was bilinear in {start}",
        f"network.mean is [0.485, 0.456, 0.406], but was [0.5, 0.5, 0.5] in {start}",
    )


def test_a_size_that_a_network_cannot_take_is_refused() -> None:
    def sized(side: int) -> Preprocess:
        return Preprocess(crop_size=side, resize_size=side)

    network = family("clip")
    check_size(build(network, pretrained=False, empty=True), network, sized(SIZE))
    with pytest.raises(NetworkError, match="does not accept 224 x 224"):  # `img_size` is an option
        check_size(build(network, pretrained=False, empty=True), network, sized(224))
    with pytest.raises(NetworkError) as caught:
        check_size(build(network, pretrained=False, empty=True), network, sized(40))
    assert "does not accept 40 x 40 images" in str(caught.value)
    assert "set preprocess.crop_size=224, the size of its pretrained weights" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224.nobody", "local-dir:/nowhere", "vti"])
def test_weights_that_timm_does_not_know_are_one_line(name: str) -> None:
    with pytest.raises(NetworkError, match="timm cannot build") as caught:
        small_recipe(network=Network(name=name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"input_size": "36"}, "cannot be used"),
        ({"input_size": [3, 36.5, 36]}, "cannot be used"),
        ({"input_size": [3, 0, 36]}, "expected numbers above 0"),
        ({"mean": None}, "cannot be used"),
        ({"mean": [0.5]}, "images of 1 channels, expected 3"),
        ({"std": [1, 1, 0]}, "expected numbers, std above 0"),
        ({"mean": [0.5, 0.5, math.nan]}, "expected numbers, std above 0"),
        ({"crop_pct": "all"}, "cannot be used"),
    ],
)
def test_a_published_configuration_with_wrong_values_is_refused(
    tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    config = {"architecture": "resnet18", "pretrained_cfg": {"input_size": [3, 36, 36]} | wrong}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NetworkError, match=said) as caught:
        pretrained_input(f"local-dir:{tmp_path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("grouping", ["block", "stage"])
@pytest.mark.parametrize("key", FAMILIES)
def test_parameters_after_the_blocks_are_in_the_top_layer(key: str, grouping: str) -> None:
    backbone = build(family(key), pretrained=False, empty=True).backbone
    layers = layer_of_parameters(backbone, grouping)
    top = max(layers.values())
    pooling = [name for name in layers if name.startswith(("attn_pool", "head", "classifier"))]
    assert pooling
    assert {layers[name] for name in pooling} == {top}
    assert min(layers.values()) == 0


def planted(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Make pairs of images without and with a checkered patch, uint8 (2 * count, SIZE, SIZE, 3),
    and the row and column of each patch, (count, 2), in patches of 8 pixels.
    """
    rng = np.random.default_rng(7)
    checks = (np.indices((8, 8)).sum(0) // 2 % 2 * 255).astype(np.uint8)[..., None]
    images, places = [], rng.integers(0, SIZE // 8, (count, 2))
    for seed, (row, column) in enumerate(places.tolist()):
        clean = photo(seed, SIZE, SIZE)
        marked = clean.copy()
        marked[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = checks
        images += [clean, marked]
    return np.stack(images), places


@pytest.mark.parametrize("key", ["clip", "siglip", "pe", "dinov3", "swin"])
def test_the_heatmap_follows_a_patch(key: str, tmp_path: Path) -> None:
    """A frozen transformer of one block, with a linear head along the direction in which a
    checkered patch moves the features. The patch must raise the heatmap most at its own position.
    (A second block of random weights would mix positions before that.)
    """
    torch.manual_seed(4)
    network = family(key, freeze_backbone=True, init="fan_in")
    if "depth" in network.options:
        network = replace(network, options={**network.options, "depth": 1})
    net = build(network, pretrained=False).eval()
    images, places = planted(5)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.inference_mode():
        features = net.features(pixels)
        changes = (features[1::2] - features[0::2]).clone()
    checkpoint.save(
        tmp_path / "step_0000001",
        net,
        recipe=small_recipe(
            network=network, preprocess=Preprocess(crop_size=SIZE, resize_size=SIZE)
        ),
        state=None,
        record=checkpoint.Record(step=1, epoch=1, metrics={}, selection=0.5, data={}),
    )
    detector, hits = load_detector(tmp_path, backend="pil"), []
    head = detector.net.backbone.get_classifier()
    for index, change in enumerate(changes):
        with torch.no_grad():
            head.weight.copy_(torch.stack([-change, change]))
        clean, marked = (
            attribution(detector, encode(image, "PNG"))[1]
            for image in images[2 * index : 2 * index + 2]
        )
        assert np.abs(marked).max() > 0
        raised = np.array(np.unravel_index((marked - clean).argmax(), clean.shape))
        # In the cell of the patch, for every cell size.
        hits.append((raised == places[index] * len(clean) // (SIZE // 8)).all())
    assert np.mean(hits) >= 0.75


def test_a_clip_file_loads_with_any_head(tmp_path: Path) -> None:
    """Without a classifier, and with CLIP's projection in its place."""
    network = family("clip")
    theirs = state_of(build(network, pretrained=False))
    body = {name: weight for name, weight in theirs.items() if not name.startswith("head.")}
    for index, head in enumerate(
        ({}, {"head.weight": torch.randn(20, 48)}, {"head.weight": torch.randn(2, 48)})
    ):
        path = tmp_path / f"{index}.safetensors"
        save_file(body | head, path)
        net = build(network, pretrained=False)
        own = net.backbone.head.weight.detach().clone()
        check_backbone_file(build(network, pretrained=False, empty=True), path)
        load_backbone_file(net, path)
        assert torch.equal(net.backbone.head.weight, own)
        for name, weight in body.items():
            assert torch.equal(net.backbone.state_dict()[name], weight), name


def test_a_clip_file_of_another_size_says_what_to_set(tmp_path: Path) -> None:
    network = family("clip")
    weights = state_of(build(network, pretrained=False))
    weights["pos_embed"] = torch.zeros(1, 50, 48)
    save_file(weights, tmp_path / "other.safetensors")
    said = r"pos_embed.*set preprocess.crop_size to the size .*, or network.options={dynamic_img"
    with pytest.raises(NetworkError, match=said):
        check_backbone_file(
            build(network, pretrained=False, empty=True), tmp_path / "other.safetensors"
        )
