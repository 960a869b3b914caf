"""Compute a heatmap of an image: which parts raised the detector's score for AI.

Main entry: `heatmap(detector, image)` takes an `ImageDetector` (a loaded checkpoint, from
`load_detector()`) and an image: a path, the bytes of a file, a Pillow image, a uint8 array (height,
width, 3) in RGB or (height, width) in gray, or an `ImageFile`. It returns uint8
(*detector.preprocess.shape, 3) RGB: the network's input in gray, with red where it raised the
score. A detail crop is below the first crop. It raises `DecodeError` or `OSError` for an unreadable
image, and `ExplainError` if the network has no feature map or patches, or (`NoCaptumError`) captum
is not installed.
`MEANING` is the explanation to show with a heatmap.

`attribution(detector, image)` returns the network's input and the raw values per cell, float32
(rows, columns), positive where the cell raised the score; `overlay(preprocessed, cells)` takes
these two and draws them. `last_features(net, pixels)` returns the layer that the values are
computed from, and its output for uint8 images (B, 3, H, W). `check_possible(detector)` raises
`ExplainError` where one forward pass of a black image shows that no heatmap is possible.

The method is Grad-CAM for convolutional networks, and gradient times patch for transformers. The
result is coarse: per crop, 8 x 8 cells for ConvNeXtV2 and MobileNetV2 at 256 pixels, 14 x 14 for a
transformer with patches of 16 at 224 pixels. It shows what moved the score, not what is fake. A
transformer's patches contain information from the whole image, so a strong patch does not prove
that its own area caused the score.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from installed import why_not_imported
from model.inference.detector import ImageDetector
from model.inference.prediction import Picture
from model.network import Detector

MEANING = (
    "Red raised the score for AI. The strongest area always has the full color, even if its effect "
    "is weak. The heatmap shows, coarsely, what moved the score, not which part is fake. In a "
    "transformer, red means more than the mean patch, and each patch contains information from the "
    "whole picture."
)
"""Explanation that must be shown with every heatmap."""

RED = np.array([255.0, 32.0, 0.0])
MOST = 0.6
"""Opacity of red (0 to 1) in the strongest cell."""


class ExplainError(ValueError):
    """Raised if a heatmap cannot be computed; the message gives the reason."""


class NoCaptumError(ExplainError):
    """Raised if captum cannot be imported. The message has a command with paths of this machine."""


def attribution(detector: ImageDetector, image: Picture) -> tuple[np.ndarray, np.ndarray]:
    """Return the network's input, uint8 (*shape, 3) RGB, and the attribution of each cell of
    its last features, float32 (rows, columns): the first-order contribution of the cell to the
    logit of fake minus the logit of real.

    For a feature map: Grad-CAM (Selvaraju et al. 2017) without the final ReLU, which would hide
    evidence for real. The attribution is exact if the head classifies the mean over the map.
    For patches: the gradient times the difference between a patch and the mean patch. If the head
    classifies only the class token, the last patches have no gradient; then the patches at the
    input of the last attention are used.

    Raises:
        DecodeError, OSError: the image cannot be read.
        ExplainError: the network has neither a map nor patches, or `captum` is not installed.
    """
    preprocessed = detector.preprocess_file(image)
    pixels = torch.from_numpy(preprocessed)[None].permute(0, 3, 1, 2).to(detector.device)
    with detector.lock:
        return preprocessed, _cells(detector.net.eval(), pixels).detach().float().cpu().numpy()


def check_possible(detector: ImageDetector) -> None:
    """Check with a black image whether heatmaps can be computed.

    Raises:
        ExplainError: as `attribution`. One reason shows only in a whole computation: no attention.
    """
    _require_captum()
    black = torch.zeros((1, 3, *detector.preprocess.shape), dtype=torch.uint8)
    with detector.lock:
        _, features = last_features(detector.net.eval(), black.to(detector.device))
    if not _is_map(detector.net, features):
        _on_grid(detector.net, features)


def _require_captum() -> None:
    try:
        importlib.import_module("captum.attr")
    except ImportError as error:
        raise NoCaptumError(
            f"a heatmap needs the library captum; {why_not_imported(error, 'heatmap')}"
        ) from error


def _cells(net: Detector, pixels: torch.Tensor) -> torch.Tensor:
    """Return the attribution of each cell, (rows, columns), for uint8 `pixels` (1, 3, H, W).

    Raises:
        ExplainError: as `attribution`.
    """
    _require_captum()
    from captum.attr import LayerGradCam

    layer, features = last_features(net, pixels)

    def margin(images: torch.Tensor) -> torch.Tensor:
        real, fake = net(images).float().unbind(1)
        return fake - real

    if _is_map(net, features):
        of_crops = LayerGradCam(margin, layer).attribute(pixels, relu_attributions=False)
        return of_crops[:, 0].flatten(0, 1)
    cells = _by_tokens(net, margin, layer, pixels)
    if not cells.any():  # the head classifies only the class token
        attention = _last_attention(net, features)
        cells = _by_tokens(net, margin, attention, pixels, of_input=True)
    return cells


def _by_tokens(
    net: Detector,
    margin: Callable[[torch.Tensor], torch.Tensor],
    layer: nn.Module,
    pixels: torch.Tensor,
    *,
    of_input: bool = False,
) -> torch.Tensor:
    """Return the attribution of each cell of a layer's output or input (`of_input`), (rows,
    columns): gradient times features, summed over channels, which are the last axis.

    For patches, the mean patch is subtracted from the features first, because it is the same for
    all cells.
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
    """Unpack a captum result for a layer with a single input or output."""
    return attribution[0] if isinstance(attribution, tuple) else attribution


def last_features(net: Detector, pixels: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """Return the module that outputs the last features before the head, and its output for uint8
    `pixels` (B, 3, H, W): a map, (B, C, rows, columns) or (B, rows, columns, C), or tokens,
    (B, N, C).

    Raises:
        ExplainError: no module outputs a map or patches.
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
            f"{type(backbone).__name__} keeps neither a feature map nor patches, so a heatmap is "
            "not possible"
        )
    return seen[-1]


def _channel_axes(net: Detector, features: torch.Tensor) -> set[int]:
    """Return the axes that may be the channels, from {1, -1}, of features (B, C, rows, columns),
    (B, rows, columns, C) or (B, N, C).
    """
    backbone = net.backbone
    counts = {getattr(backbone, n, None) for n in ("num_features", "head_hidden_size")}
    if net.head == "stages":
        counts = {backbone.feature_info[-1]["num_chs"]}
    axes = {3: (-1,), 4: (1, -1)}.get(features.ndim, ())
    return {axis for axis in axes if features.shape[axis] in counts}


def _is_map(net: Detector, features: torch.Tensor) -> bool:
    """Return whether features are (B, C, rows, columns)."""
    return 1 in _channel_axes(net, features)


def _on_grid(net: Detector, values: torch.Tensor) -> torch.Tensor:
    """Reshape values of one image, (crops, rows, columns, C) or (crops, N, C), to the grid of
    patches, (crops * rows, columns, C). Class and register tokens are dropped.

    Raises:
        ExplainError: the tokens do not form a square of patches.
    """
    if values.ndim == 4:
        return values.flatten(0, 1)
    patches = values[:, getattr(net.backbone, "num_prefix_tokens", 0) :]
    count = patches.shape[1]
    side = math.isqrt(count)
    if side * side != count:
        raise ExplainError(
            f"{type(net.backbone).__name__} keeps {count} tokens, which form no square of "
            "patches, so a heatmap is not possible"
        )
    return patches.reshape(len(patches) * side, side, -1)


def _last_attention(net: Detector, features: torch.Tensor) -> nn.Module:
    """Return the attention module of the last block. It is the last module in which patches can
    influence the class token.

    Raises:
        ExplainError: no block has an attention module, or the features are not tokens.
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
            f"{type(net.backbone).__name__} has no attention over patches, so a heatmap is not "
            "possible"
        )
    return attentions[-1]


def heatmap(detector: ImageDetector, image: Picture) -> np.ndarray:
    """Return the heatmap of an image: uint8 (*detector.preprocess.shape, 3) RGB, the network's
    input in gray with red where it raised the score for AI. Show `MEANING` with it.

    Raises:
        DecodeError, OSError, ExplainError: as `attribution`.
    """
    return overlay(*attribution(detector, image))


def overlay(preprocessed: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Draw positive `cells` (rows, columns), of any scale, in red over the grayscale image, uint8
    (height, width, 3).

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
