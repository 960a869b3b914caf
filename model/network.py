"""Build the network of a detector: a timm backbone with two outputs, real and fake, that normalizes
its own input.

Main entry: `build(network, *, pretrained, empty)` returns a `Detector` (a torch module) on the CPU.

- `network`: a `Network` of `model/recipe.py`, such as `Network(name="resnet50.a1_in1k")`, a name of
  timm.
- `pretrained`: True takes timm's weights (downloaded if not in the cache). It has no default.
- `empty`: True leaves the weights uninitialized, to be loaded next (default: False).

If both are False, the weights are random. Do not set both to True: the head may stay uninitialized.
`build()` raises `NetworkError` (a `ValueError`) if timm does not know the network or one of its
`options`, the network lacks the class token or the `blocks` that the head `class_tokens` needs, or
the weights cannot be fetched or do not fit the `options`.

The detector's `forward()` takes uint8 images (B, 3, H, W), or features (B, D), and returns float
logits (B, 2), real and fake. With `network.crops` 2, an image is two square crops, one below the
other. `features()` returns the input of the head, (B, D), and `classify()` applies the head to it.
`backbone` is the timm network in it.

`load_weights(net, weights, where, *, assign=False)` fills a `Detector` with `weights`, a dict from
timm's names to tensors. The text `where` names their file in an error; with `assign`, the tensors
are used without a copy. `load_backbone_file(net, path)` fills it from an ImageNet `.safetensors`
file (`Path`), without its classifier. Both raise `NetworkError` for wrong names or shapes, and the
second for a damaged file (`OSError` for a missing one). Four checks raise `NetworkError` before any
work starts:

- `check_size(net, network, preprocess)`: if a network does not accept the image size of a
  `Preprocess`. `net` is unusable afterward.
- `check_weights_file(net, path, where, backbone)`: if the file does not fit `load_weights()`.
  `backbone` is the file with the other weights if `path` has only the head (default None). Only
  headers are read. `net` is unusable afterward.
- `check_backbone_file(net, path)`: if the file does not fit `load_backbone_file()`. Only its header
  is read.
- `check_pretrained(network)`: if timm's weights are not in the cache and their Hub does not answer.

`normalization(network)` takes the `Network` settings and returns mean and std, three numbers each.
`classifier_names(backbone)` returns the names of the modules of timm's head, `head_prefixes(net)`
the prefixes of the names of the head's parameters, `timm_license(name)` the license of timm's
weights or None. `Backbone` is a type for the type checker only; `STAGE_HEAD` is the name prefix of
a head of `heads.py`.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode

from model.backbones.heads import ClassTokenHead, StageHead
from model.backbones.pretrained import NetworkError, first_line, pretrained_input
from model.lean_import import lean_import
from model.recipe import Network, Triple
from model.shipped.backbone import CLIP_8_BIT
from pipeline.preprocess import Preprocess
from sharding.format import CLASSES
from sharding.hub import ask_hub, hub_errors, in_hub_cache, proxy_faults

with lean_import():
    import timm

log = logging.getLogger("ai_images_detector")

STAGE_HEAD = "stage_head."
"""Prefix of the names of this project's own head among the names of timm."""


class Backbone(nn.Module):
    """Type stub for the type checker: the attributes of a timm classifier that this project uses.
    At runtime the object has one of timm's classes. `stage_head` exists only with the heads
    `stages` and `class_tokens`.
    """

    feature_info: list[dict[str, Any]]
    blocks: nn.ModuleList
    num_features: int
    num_prefix_tokens: int
    cls_token: torch.Tensor | None
    group_matcher: Callable[..., dict[str, Any]]
    get_classifier: Callable[[], nn.Module | tuple[nn.Module, ...]]
    forward_features: Callable[[torch.Tensor], torch.Tensor]
    forward_head: Callable[..., torch.Tensor]
    forward_intermediates: Callable[..., list[Any]]
    pretrained_cfg: dict[str, Any]
    stage_head: StageHead | ClassTokenHead


class Detector(nn.Module):
    """Backbone, head and normalization. `forward`: uint8 (B, 3, H, W) -> float logits (B, 2),
    columns in the order of `CLASSES`. An image may hold several crops, one below the other
    (`crops`): the backbone sees each by itself, and the head their features together.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, backbone: Backbone, network: Network):
        super().__init__()
        self.backbone = backbone
        self.head, self.blocks, self.crops = network.head, network.blocks, network.crops
        self.freeze_backbone = network.freeze_backbone
        self.freeze_bn = network.freeze_bn
        shape = (1, 3, 1, 1)
        mean, std = normalization(network)
        scaled_mean = 255 * torch.tensor(mean).reshape(shape)
        scaled_std = 255 * torch.tensor(std).reshape(shape)
        self.register_buffer("mean", scaled_mean, persistent=False)
        self.register_buffer("std", scaled_std, persistent=False)

    def train(self, mode: bool = True) -> "Detector":
        """Switch between training and evaluation mode; frozen parts stay in evaluation mode."""
        super().train(mode and not self.freeze_backbone)
        if self.freeze_bn:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalize and classify images. Features (B, D), given instead of images, are classified
        directly.
        """
        if images.ndim == 2:
            return self.classify(images)
        if self.head == "timm":
            return self.backbone(self._normalized(images))
        return self.classify(self.features(images))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the input of the head: uint8 (B, 3, H, W) -> float (B, D)."""
        if self.crops > 1:
            features = self._of_one_crop(self._apart(images))
            return features.reshape(-1, self.crops * features.shape[1])
        return self._of_one_crop(images)

    def _apart(self, images: torch.Tensor) -> torch.Tensor:
        """Separate the crops: (B, 3, crops * S, S) -> (B * crops, 3, S, S), the crops of an image
        next to each other. No copy is made of a channels_last tensor.
        """
        channels, height, width = images.shape[1:]
        rows = images.permute(0, 2, 3, 1).reshape(-1, height // self.crops, width, channels)
        return rows.permute(0, 3, 1, 2)

    def _of_one_crop(self, images: torch.Tensor) -> torch.Tensor:
        images = self._normalized(images)
        if self.head == "timm":
            last = self.backbone.forward_features(images)
            return self.backbone.forward_head(last, pre_logits=True)
        if self.head == "stages":
            maps = self.backbone.forward_intermediates(images, intermediates_only=True)
            return self.backbone.stage_head.features(maps)
        behind = self.backbone.forward_intermediates(
            images, indices=list(self.blocks), return_prefix_tokens=True, stop_early=True,
            output_fmt="NLC", intermediates_only=True,
        )  # fmt: skip
        return self.backbone.stage_head.features([prefix[:, 0] for _, prefix in behind])

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Apply the head: float features (B, D) -> float logits (B, 2)."""
        if self.head != "timm":
            return self.backbone.stage_head(features)
        classifier = self.backbone.get_classifier()
        if not isinstance(classifier, nn.Module):
            raise NetworkError(
                "a network with two classifiers has no single feature vector; leave its backbone "
                "unfrozen, or use another network"
            )
        return classifier(features.to(self.mean.dtype))

    def _normalized(self, images: torch.Tensor) -> torch.Tensor:
        return (images.to(self.mean.dtype) - self.mean) / self.std


def normalization(network: Network) -> tuple[Triple, Triple]:
    """Return mean and std of a network: from the recipe, else from timm's record of its weights.

    Raises:
        NetworkError: the recipe gives no mean or std, and timm does not know the network.
    """
    if network.mean and network.std:
        return network.mean, network.std
    made = pretrained_input(network.name)
    return network.mean or made.mean, network.std or made.std


def check_size(net: Detector, network: Network, preprocess: Preprocess) -> None:
    """Refuse the image size of a `preprocess` that a network does not accept.
    `net` is built for this check only (`build` with `empty`): unless the size is that of the
    pretrained weights, shapes are propagated on the meta device, and `net` is unusable afterward.

    Raises:
        NetworkError: the network does not accept the size; the message says what to set.
    """
    size, made = preprocess.crop_size, pretrained_input(network.name)
    if size == made.height == made.width and not network.options:
        return
    images = torch.empty((1, 3, *preprocess.shape), dtype=torch.uint8, device="meta")
    try:
        with torch.inference_mode(), lean_import():
            net.to("meta").eval()(images)
    except (AssertionError, RuntimeError, ValueError, TypeError, LookupError) as error:
        if isinstance(error, NotImplementedError) or "meta tensor" in str(error):
            return  # meta tensors have no values, which this network reads: size not checked
        raise NetworkError(
            f"{network.name} does not accept {size} x {size} images ({first_line(error)}); set "
            f"preprocess.crop_size={made.height}, the size of its pretrained weights, or a "
            "multiple of its patch size"
        ) from error


def build(network: Network, *, pretrained: bool, empty: bool = False) -> Detector:
    """Build the network on the CPU, in fp32 and channels_last, with weights from timm if
    `pretrained`. With `empty` the weights are left uninitialized, to be filled by `load_weights`.

    Raises:
        NetworkError: timm does not know the name or an option, or the weights cannot be fetched.
    """
    options = dict(network.options)
    if network.drop_path_rate:
        options["drop_path_rate"] = network.drop_path_rate
    if pretrained:
        check_pretrained(network)
    with _SkipInit() if empty else contextlib.nullcontext():
        backbone = _create(network, options, pretrained)
    if network.init == "fan_in" and not pretrained and not empty:
        _init_by_fan_in(backbone)
    if pretrained:
        license = backbone.pretrained_cfg.get("license")
        log.info("%s: pretrained weights from timm, license %s", network.name, license)
    if network.head == "stages":
        _put_stage_head(backbone, network.crops)
    if network.head == "class_tokens":
        _put_class_token_head(backbone, network)
    if network.freeze_backbone:
        head = (
            STAGE_HEAD
            if network.head != "timm"
            else tuple(f"{name}." for name in classifier_names(backbone))
        )
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name.startswith(head))
    net = Detector(backbone, network).train()  # sets frozen parts to evaluation mode
    return net.to(memory_format=torch.channels_last)


def _create(network: Network, options: dict[str, Any], pretrained: bool) -> Backbone:
    """Build the backbone by timm.

    Raises:
        NetworkError: as `build`.
    """
    try:
        with proxy_faults():
            return timm.create_model(
                network.name, pretrained=pretrained, num_classes=len(CLASSES), **options
            )
    except (OSError, HTTPError) as error:
        raise NetworkError(_how_to_get_weights(network, error)) from error
    except (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        if pretrained:
            _create(network, options, False)  # raises if the name or an option is wrong
            raise NetworkError(_how_to_get_weights(network, error)) from error
        said = f"with the options {options}: {error}" if options else str(error)
        raise NetworkError(f"timm cannot build {network.name!r} {said}") from error


def _put_stage_head(backbone: Backbone, crops: int) -> None:
    """Add a `StageHead` to the backbone, so that it is saved and loaded with the backbone's
    weights. The head starts at 0: random weights would give the backbone a random first gradient.
    """
    stages = backbone.feature_info
    backbone.stage_head = StageHead([stage["num_chs"] for stage in stages] * crops)
    nn.init.zeros_(backbone.stage_head.fc.weight)
    nn.init.zeros_(backbone.stage_head.fc.bias)
    last = stages[-1]["module"].partition(".")[0]
    children = dict(backbone.named_children())
    # Modules after the last stage are unused: freeze them, because DDP waits for all gradients.
    for name in [*children][[*children].index(last) + 1 :]:
        children[name].requires_grad_(name == "stage_head")


def _put_class_token_head(backbone: Backbone, network: Network) -> None:
    """Add a `ClassTokenHead` that starts at 0, as `_put_stage_head` does.

    Raises:
        NetworkError: the network has no class token, or fewer blocks than asked for.
    """
    if getattr(backbone, "cls_token", None) is None or not hasattr(backbone, "blocks"):
        raise NetworkError(
            f"{network.name} has no class token; set network.head to stages or timm, and leave "
            "network.blocks out"
        )
    if network.blocks[-1] >= len(backbone.blocks):
        raise NetworkError(
            f"{network.name} has blocks 0 to {len(backbone.blocks) - 1}, but network.blocks has "
            f"{network.blocks[-1]}"
        )
    backbone.stage_head = ClassTokenHead(
        network.crops * len(network.blocks) * backbone.num_features
    )
    nn.init.zeros_(backbone.stage_head.fc.weight)
    nn.init.zeros_(backbone.stage_head.fc.bias)


def classifier_names(backbone: Backbone) -> list[str]:
    """Return the names of the modules of timm's own head; distilled transformers have two."""
    head = backbone.get_classifier()
    heads = {id(module) for module in (head if isinstance(head, tuple) else (head,))}
    return [name for name, module in backbone.named_modules() if id(module) in heads]


class _SkipInit(TorchFunctionMode):
    """Skip weight initialization, because the weights are loaded right after. Initializing
    ConvNeXtV2-Base takes longer than the rest of a prediction.
    """

    _INIT_FUNCTIONS = frozenset(
        "kaiming_uniform_ uniform_ normal_ trunc_normal_ erfinv_ mul_ add_ clamp_ zero_ "
        "fill_".split()
    )

    def __torch_function__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__name__", "") in self._INIT_FUNCTIONS:
            target = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(target, nn.Parameter):
                return target
        return function(*args, **(kwargs or {}))


def _init_by_fan_in(backbone: nn.Module) -> None:
    """Initialize every convolution and linear weight with sigma 1 / sqrt(fan-in)."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)


def timm_license(name: str) -> str | None:
    """Return the license that timm records for its weights of a network, else None."""
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return config.license if config else None


def check_pretrained(network: Network) -> None:
    """Check once that the hub answers, before timm downloads: timm retries for a minute if the hub
    is not reachable. The time limit of the check is the hub's HF_HUB_ETAG_TIMEOUT, 10 s by default.

    Raises:
        NetworkError: the hub does not answer, and the weights are not in its cache.
    """
    config = timm.get_pretrained_cfg(network.name) if timm.is_model(network.name) else None
    if config is None or not config.hf_hub_id:
        return
    repository, _, revision = config.hf_hub_id.partition("@")
    files = ("model.safetensors", "pytorch_model.bin")
    try:
        if not any(in_hub_cache(repository, file, revision or None) for file in files):
            ask_hub(repository, files[0], revision or None)
    except HfHubHTTPError:
        return  # the hub answers; timm handles the error itself
    except hub_errors() as error:
        raise NetworkError(_how_to_get_weights(network, error)) from error


def _how_to_get_weights(network: Network, error: Exception) -> str:
    fault = "do not fit network.options" if "state_dict" in str(error) else "could not be fetched"
    ways = ["give a file with --init-from weights.safetensors"]
    if network.name == CLIP_8_BIT.name:
        ways.insert(0, "type `python -m model fetch` and give --init-from clip")
    if not network.freeze_backbone:  # frozen: random weights are refused
        ways.append("use random weights: --no-pretrained or --set network.pretrained=false")
    return f"the weights of {network.name} {fault} ({first_line(error)}); {', or '.join(ways)}"


def load_weights(
    net: Detector, weights: Mapping[str, torch.Tensor], where: str, *, assign: bool = False
) -> None:
    """Load weights with plain timm names into the backbone; names and shapes must match exactly.
    With `assign` the given tensors become the parameters, without a copy.

    Raises:
        NetworkError: a name or shape does not match.
    """
    try:
        net.backbone.load_state_dict(weights, strict=True, assign=assign)
    except RuntimeError as error:
        # Skip torch's heading; the other lines name parameters.
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise NetworkError(
            f"the weights in {where} do not fit: {lines[0][:200]}{more}; give a checkpoint or file "
            "of this network"
        ) from error


def load_backbone_file(net: Detector, path: Path) -> None:
    """Load an ImageNet `.safetensors` file into the backbone, without its classifier.

    Raises:
        NetworkError: a name or shape outside the classifier does not match, or the file is damaged.
    """
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise _unreadable(path, error) from error
    net.backbone.load_state_dict(
        net.backbone.state_dict() | _without_classifier(net, weights, path)
    )


def head_prefixes(net: Detector) -> tuple[str, ...]:
    """Return the prefixes of the head's parameter names, for every kind of head."""
    return (*(f"{name}." for name in classifier_names(net.backbone)), STAGE_HEAD)


def _without_classifier(
    net: Detector, weights: Mapping[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    """Return the weights of an ImageNet file that fit the backbone. `path` is for messages only.

    Raises:
        NetworkError: a name or shape outside the classifier does not match.
    """
    state = net.backbone.state_dict()
    heads = head_prefixes(net)
    kept = {name: weight for name, weight in weights.items() if not name.startswith(heads)}
    missing = [name for name in state if name not in kept and not name.startswith(heads)]
    strange = [n for n in kept if n not in state or kept[n].shape != state[n].shape]
    # Files may lack the counters of batch norms, which then stay 0.
    missing = [n for n in missing if not n.endswith("num_batches_tracked")]
    if missing or strange:
        other = "; set preprocess.crop_size to the size that it was made for"
        other += ", or network.options={dynamic_img_size=true}" * hasattr(net.backbone, "pos_embed")
        other *= any("pos_embed" in name for name in strange)
        raise NetworkError(
            f"{path} does not fit the network: {len(missing)} parameters are missing (first: "
            f"{missing[:1]}), {len(strange)} are unknown or of another shape (first: {strange[:1]})"
            f"{other}"
        )
    return kept


def check_backbone_file(net: Detector, path: Path) -> None:
    """Refuse an ImageNet `.safetensors` file that `load_backbone_file` would refuse; only its
    header is read.

    Raises:
        NetworkError: a name or shape does not match, or the file is damaged.
        OSError: there is no such file.
    """
    _without_classifier(net, _outlines(path), path)


def check_weights_file(net: Detector, path: Path, where: str, backbone: Path | None = None) -> None:
    """Refuse a `.safetensors` file that `load_weights` would refuse; only its header is read. If
    `path` holds only the head, `backbone` is the file with the other weights. `net` is built for
    this check only (`build` with `empty`) and is unusable afterward.

    Raises:
        NetworkError: a name or shape does not match, or a file is damaged.
        OSError: there is no such file.
    """
    outlines = (_outlines(backbone) if backbone else {}) | _outlines(path)
    load_weights(net, outlines, where, assign=True)


def _outlines(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a `.safetensors` file on the meta device: names and shapes without
    values.

    Raises:
        NetworkError: the file is damaged.
        OSError: there is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {
                name: torch.empty(file.get_slice(name).get_shape(), device="meta")
                for name in file.keys()
            }
    except SafetensorError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: SafetensorError) -> NetworkError:
    return NetworkError(
        f"{path} is no readable .safetensors file ({error}); get it again, or use another file"
    )
