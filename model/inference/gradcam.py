"""Where the network looked: Grad-CAM as an overlay on what it saw.

It is coarse (8 x 8 cells for ConvNeXtV2 and MobileNetV2 at 256 pixels), shows what moved the score
and not what is fake, and proves nothing.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from imaging.decode import ImageFile
from model.inference.detector import ImageDetector
from model.network import Detector

MEANING = (
    "Red raised the score for AI; the strongest place has the full color, however weak it is. It "
    "shows what moved the score, coarsely, not which part is fake."
)
"""What must stand beside every heatmap."""

RED = np.array([255.0, 32.0, 0.0])
MOST = 0.6
"""Share of color in the strongest place."""


class ExplainError(ValueError):
    """A network that no heatmap can be made for; the message says why."""


def attribution(
    detector: ImageDetector, image: Path | str | bytes | ImageFile
) -> tuple[np.ndarray, np.ndarray]:
    """What the network sees, uint8 (size, size, 3) RGB, and for each of the cells of its last
    feature map, float32 (rows, columns), what it adds to the logit of fake minus that of real.

    Grad-CAM (Selvaraju et al. 2017) without its last step, which hides what speaks for real.

    Raises:
        DecodeError, OSError: the image cannot be read.
        ExplainError: the network has no feature map, or the library `captum` is not installed.
    """
    try:
        from captum.attr import LayerGradCam
    except ImportError as error:
        raise ExplainError(
            "a heatmap needs the library captum; install the extra `heatmap`, as `make setup` does"
        ) from error
    preprocessed = detector.preprocess_file(image)
    pixels = torch.from_numpy(preprocessed)[None].permute(0, 3, 1, 2).to(detector.device)
    net = detector.net.eval()
    layer = last_feature_layer(net, pixels)

    def margin(images: torch.Tensor) -> torch.Tensor:
        real, fake = net(images).float().unbind(1)
        return fake - real

    cells = LayerGradCam(margin, layer).attribute(pixels, relu_attributions=False)
    return preprocessed, cells[0, 0].detach().float().cpu().numpy()


def last_feature_layer(net: Detector, pixels: torch.Tensor) -> nn.Module:
    """The module that puts out the last map of features, (B, C, rows, columns), which the
    classifier then averages.

    Raises:
        ExplainError: there is none, as in a transformer, which keeps a list of patches.
    """
    backbone, seen = net.backbone, []
    if net.head == "stages":
        return backbone.get_submodule(backbone.feature_info[-1]["module"])

    def note(module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            seen.append((module, output.data_ptr(), output.shape))

    hooks = [module.register_forward_hook(note) for module in backbone.modules()]
    try:
        with torch.inference_mode():
            features = backbone.forward_features((pixels - net.mean) / net.std)
    finally:
        for hook in hooks:
            hook.remove()
    channels = {getattr(backbone, n, None) for n in ("num_features", "head_hidden_size")}
    layers = [
        module for module, address, shape in seen
        if (address, shape) == (features.data_ptr(), features.shape)
    ]  # fmt: skip
    if features.ndim != 4 or features.shape[1] not in channels or not layers:
        raise ExplainError(
            f"{type(backbone).__name__} keeps no map of features, so there is no heatmap"
        )
    return layers[-1]


def heatmap(detector: ImageDetector, image: Path | str | bytes | ImageFile) -> np.ndarray:
    """The overlay: uint8 (size, size, 3) RGB, what the network sees with red where it raised the
    score for AI (`MEANING` says it to people).

    Raises:
        DecodeError, OSError, ExplainError: as `attribution`.
    """
    return overlay(*attribution(detector, image))


def overlay(preprocessed: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Positive `cells` (rows, columns), any scale, as red over an image, uint8 (height, width, 3).

    Negative cells stay gray: covering them did not raise the score (docs/log.md, 2026-11-25).
    """
    smooth = nn.functional.interpolate(
        torch.from_numpy(cells)[None, None], size=preprocessed.shape[:2], mode="bicubic"
    )[0, 0].numpy()
    raised = np.maximum(smooth, 0)
    largest = raised.max()
    weight = MOST * (raised / largest if largest > 0 else raised)[..., None]
    gray = preprocessed.mean(axis=2, keepdims=True)
    return np.rint((1 - weight) * gray + weight * RED).astype(np.uint8)
