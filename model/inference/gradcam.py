"""Where the network looked: Grad-CAM of its last map, or a transformer's patches weighted by their
gradients, as an overlay on what it saw.

It is coarse (8 x 8 cells for ConvNeXtV2 and MobileNetV2 at 256 pixels, 14 x 14 for a transformer of
patches of 16 at 224), shows what moved the score and not what is fake, and proves nothing. The
patches of a transformer have taken in the rest of the image before they are weighed, so what one
of them holds need not come from its place.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from installed import install_extra
from model.inference.detector import ImageDetector
from model.inference.prediction import Picture
from model.network import Detector

MEANING = (
    "Red raised the score for AI; the strongest place has the full color, however weak it is. It "
    "shows what moved the score, coarsely, not which part is fake. In a transformer, red is more "
    "than the mean patch, and a patch holds something of the whole picture."
)
"""What must stand beside every heatmap."""

RED = np.array([255.0, 32.0, 0.0])
MOST = 0.6
"""Share of color in the strongest place."""


class ExplainError(ValueError):
    """A network that no heatmap can be made for; the message says why."""


def attribution(detector: ImageDetector, image: Picture) -> tuple[np.ndarray, np.ndarray]:
    """What the network sees, uint8 (size, size, 3) RGB, and for each of the cells of its last
    features, float32 (rows, columns), what it adds to the logit of fake minus that of real, to the
    first order.

    Of a map it is Grad-CAM (Selvaraju et al. 2017) without its last step, which hides what speaks
    for real; exact where the mean over the places is classified. Of patches it is the gradient
    times what a patch has beyond the mean patch: of the last ones, or, where the class token alone
    is classified and they have no gradient, of those that the last block's attention reads.

    Raises:
        DecodeError, OSError: the image cannot be read.
        ExplainError: the network has no map nor patches, or the library `captum` is not installed.
    """
    try:
        from captum.attr import LayerGradCam
    except ImportError as error:
        raise ExplainError(
            f"a heatmap needs the library captum; {install_extra('heatmap')}"
        ) from error
    preprocessed = detector.preprocess_file(image)
    pixels = torch.from_numpy(preprocessed)[None].permute(0, 3, 1, 2).to(detector.device)
    net = detector.net.eval()
    layer, features = last_features(net, pixels)

    def margin(images: torch.Tensor) -> torch.Tensor:
        real, fake = net(images).float().unbind(1)
        return fake - real

    if _is_map(net, features):
        cells = LayerGradCam(margin, layer).attribute(pixels, relu_attributions=False)[0, 0]
        return preprocessed, cells.detach().float().cpu().numpy()
    cells = _by_tokens(net, margin, layer, pixels)
    if not cells.any():  # only the class token goes on to the classifier
        attention = _last_attention(net, features)
        cells = _by_tokens(net, margin, attention, pixels, of_input=True)
    return preprocessed, cells.detach().float().cpu().numpy()


def _by_tokens(
    net: Detector,
    margin: Callable[[torch.Tensor], torch.Tensor],
    layer: nn.Module,
    pixels: torch.Tensor,
    *,
    of_input: bool = False,
) -> torch.Tensor:
    """What each place of a layer's output, or of its input (`of_input`), adds where the channels
    come last, (rows, columns): the gradient times the features of a map, and times that by which a
    patch differs from the mean patch, which says nothing of a place.
    """
    from captum.attr import LayerActivation, LayerGradientXActivation

    gradients = LayerGradientXActivation(margin, layer, multiply_by_inputs=False)
    tokens = LayerActivation(margin, layer)
    slope, places = (
        _tensor_of(method.attribute(pixels, attribute_to_layer_input=of_input))
        for method in (gradients, tokens)
    )
    slope, patches = _on_grid(net, slope), _on_grid(net, places)
    if places.ndim == 3:
        patches = patches - patches.mean((0, 1))
    return (patches * slope).sum(-1)


def _tensor_of(attribution: Any) -> torch.Tensor:
    """What captum gives for a layer of one input or output."""
    return attribution[0] if isinstance(attribution, tuple) else attribution


def last_features(net: Detector, pixels: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """The last features that the head sees of uint8 `pixels` (B, 3, H, W), and the module that puts
    them out: a map, (B, C, rows, columns) or (B, rows, columns, C), or tokens, (B, N, C).

    Raises:
        ExplainError: no module puts them out.
    """
    backbone, seen = net.backbone, []

    def note(module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            seen.append((module, output))

    inside = net.head != "timm"
    noted = list(backbone.modules())
    if net.head == "stages":
        noted = [backbone.get_submodule(backbone.feature_info[-1]["module"])]
    elif inside:
        noted = [backbone.blocks[net.blocks[-1]]]
    hooks = [module.register_forward_hook(note) for module in noted]
    try:
        with torch.inference_mode():
            if inside:
                net.features(pixels)
            else:
                features = backbone.forward_features((pixels - net.mean) / net.std)
    finally:
        for hook in hooks:
            hook.remove()
    if not inside:
        seen = [
            (module, output) for module, output in seen
            if (output.data_ptr(), output.shape) == (features.data_ptr(), features.shape)
        ]  # fmt: skip
    if not seen or not {1, -1} & _channel_axes(net, seen[-1][1]):
        raise ExplainError(
            f"{type(backbone).__name__} keeps neither a map of features nor patches, so there is "
            "no heatmap"
        )
    return seen[-1]


def _channel_axes(net: Detector, features: torch.Tensor) -> set[int]:
    """Which axes of (B, C, rows, columns), (B, rows, columns, C) or (B, N, C) may be the channels:
    1, -1.
    """
    backbone = net.backbone
    counts = {getattr(backbone, n, None) for n in ("num_features", "head_hidden_size")}
    if net.head == "stages":
        counts = {backbone.feature_info[-1]["num_chs"]}
    axes = {3: (-1,), 4: (1, -1)}.get(features.ndim, ())
    return {axis for axis in axes if features.shape[axis] in counts}


def _is_map(net: Detector, features: torch.Tensor) -> bool:
    """Whether features are (B, C, rows, columns)."""
    return 1 in _channel_axes(net, features)


def _on_grid(net: Detector, values: torch.Tensor) -> torch.Tensor:
    """Values of the one image's features, (1, rows, columns, C) or (1, N, C), on the grid of
    patches, (rows, columns, C); class and register tokens are left out.

    Raises:
        ExplainError: the tokens are no square of patches.
    """
    if values.ndim == 4:
        return values[0]
    patches = values[0, getattr(net.backbone, "num_prefix_tokens", 0) :]
    side = math.isqrt(len(patches))
    if side * side != len(patches):
        raise ExplainError(
            f"{type(net.backbone).__name__} keeps {len(patches)} tokens, which are no square of "
            "patches, so there is no heatmap"
        )
    return patches.reshape(side, side, -1)


def _last_attention(net: Detector, features: torch.Tensor) -> nn.Module:
    """The attention of the last block: behind it a class token is all that goes on.

    Raises:
        ExplainError: no block has such a module, or the features are no tokens.
    """
    attentions = [
        module
        for name, module in net.backbone.named_modules()
        if name.endswith(".attn") and not name.startswith("attn_pool.")
    ]
    if net.head == "class_tokens":
        attentions = attentions[: net.blocks[-1] + 1]
    if features.ndim != 3 or not attentions:
        raise ExplainError(
            f"{type(net.backbone).__name__} has no attention whose patches could be shown, so "
            "there is no heatmap"
        )
    return attentions[-1]


def heatmap(detector: ImageDetector, image: Picture) -> np.ndarray:
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
