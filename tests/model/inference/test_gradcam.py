"""Heatmaps: the cells add up to the logit, supported networks, and the colors."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model import checkpoint, load_detector
from model.inference.gradcam import ExplainError, attribution, check_possible, heatmap, overlay
from model.inference.prediction import Prediction
from model.network import build
from model.recipe import Network
from tests.builders import encode, photo, small_recipe

MOBILE = Network(name="mobilenetv2_035", pretrained=False, init="fan_in")


def detector_of(network: Network, folder: Path, size: int = 64):
    from pipeline.preprocess import Preprocess

    torch.manual_seed(2)
    recipe = small_recipe(network=network, preprocess=Preprocess(crop_size=size, resize_size=size))
    checkpoint.save(
        folder / "step_0000001",
        build(network, pretrained=False),
        recipe=recipe,
        state=None,
        record=checkpoint.Record(step=1, epoch=1, metrics={}, selection=0.5, data={}),
    )
    return load_detector(folder)


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory):
    return detector_of(MOBILE, tmp_path_factory.mktemp("mobile"))


def margin(detector, preprocessed: np.ndarray) -> float:
    pixels = torch.from_numpy(preprocessed)[None].permute(0, 3, 1, 2)
    with torch.inference_mode():
        real, fake = detector.net(pixels)[0].tolist()
    return fake - real


def test_the_cells_add_up_to_the_logit(mobile) -> None:
    """If a linear layer follows the average, Grad-CAM is exact: the cells add up to the logit
    without the bias.
    """
    head = mobile.net.backbone.get_classifier()
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.25, -0.5]))
    for seed in range(3):
        preprocessed, cells = attribution(mobile, encode(photo(seed, 80, 64), "PNG"))
        assert cells.shape == (2, 2)
        assert cells.sum() - 0.75 == pytest.approx(margin(mobile, preprocessed), abs=1e-4)


def test_heatmaps_of_supported_networks_and_refusal_of_others(
    mobile, small_runs: Path, tmp_path: Path
) -> None:
    for detector in (mobile, load_detector(runs=small_runs)):
        overlay = heatmap(detector, encode(photo(1), "PNG"))
        size = detector.preprocess.crop_size
        assert (overlay.shape, overlay.dtype) == ((size, size, 3), np.uint8)
    transformer = Network(
        name="vit_tiny_patch16_224", pretrained=False,
        options={"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 16},
    )  # fmt: skip
    net = detector_of(transformer, tmp_path, 32)
    assert heatmap(net, encode(photo(1), "PNG")).shape == (32, 32, 3)
    check_possible(net)
    net.net.backbone.num_prefix_tokens = 2
    for refused in (lambda: heatmap(net, encode(photo(1), "PNG")), lambda: check_possible(net)):
        with pytest.raises(ExplainError, match="keeps 3 tokens, which form no square of patches"):
            refused()
    for name in ("num_features", "head_hidden_size"):
        setattr(net.net.backbone, name, 7)  # no axis of the features has this size
    for refused in (lambda: heatmap(net, encode(photo(1), "PNG")), lambda: check_possible(net)):
        with pytest.raises(ExplainError, match="keeps neither a feature map nor patches"):
            refused()


def test_a_heatmap_changes_no_score(mobile) -> None:
    data = encode(photo(4), "PNG")
    (before,) = mobile.predict([data])
    heatmap(mobile, data)
    (after,) = mobile.predict([data])
    assert before.probability == after.probability
    assert all(parameter.grad is None for parameter in mobile.net.parameters())


def predicted(detector, image: bytes) -> Prediction:
    return detector.predict(image)


@pytest.mark.parametrize("work", [heatmap, predicted])
def test_another_thread_changes_no_heatmap(mobile, work) -> None:
    """The hooks of a heatmap would read what the other image leaves in the shared network."""
    image, other = encode(photo(1), "PNG"), encode(photo(2), "PNG")
    expected, of_other = heatmap(mobile, image), work(mobile, other)
    second = replace(mobile, asked=(0.5, 0.5))  # as `at_rates` does; it shares the network
    started: list[Future] = []

    def begin(*_: object) -> None:
        if not started:
            started.append(thread.submit(work, second, other))
            wait(started, timeout=0.2)  # it must not end before the heatmap

    with ThreadPoolExecutor(1) as thread:
        hook = mobile.net.backbone.get_classifier().register_forward_hook(begin)
        try:
            drawn = heatmap(mobile, image)
        finally:
            hook.remove()
        np.testing.assert_array_equal(drawn, expected)
        result = started[0].result()
    if work is heatmap:
        np.testing.assert_array_equal(result, of_other)
    else:
        assert result.probability == of_other.probability


def test_only_cells_that_raise_the_score_are_red() -> None:
    preprocessed = np.full((64, 64, 3), 100, np.uint8)
    drawn = overlay(preprocessed, np.array([[1.0, 0.0], [0.0, -1.0]], np.float32)).astype(int)
    red, lowered = drawn[5, 5], drawn[58, 58]
    assert red[0] > 150 > red[2]
    assert (lowered == 100).all()
    assert (overlay(preprocessed, np.zeros((2, 2), np.float32)) == 100).all()
