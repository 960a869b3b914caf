"""Make the AdamW optimizer, with a learning rate per layer and weight decay on weights only, and
compute the schedule of the learning rate.

Main entries:

- `make_optimizer(backbone, optim, fused)` takes the timm network to train (`net.backbone` of a
  `Detector`), the recipe's `Optim` settings, and by keyword whether torch uses its fused AdamW
  kernel (`train()` does so on a GPU). It returns `torch.optim.AdamW` over the parameters that are
  not frozen, and raises `OptimError` (a `ValueError`) if a parameter belongs to no layer.
- `schedule(optim, step, steps)` takes the `Optim`, a step, 0 to steps - 1, and the number of all
  steps. It returns the factor of the learning rate at this step, a float up to 1: warm-up, then a
  cosine to `min_lr / lr`.
- `set_learning_rate(optimizer, factor)` sets `lr = base_lr * factor` in each group of this
  optimizer, so the rates of all layers keep their ratios.

`parameter_groups(backbone, optim)` returns the optimizer's groups, a list of dicts with `params`,
`base_lr` and more. `layer_of_parameters(backbone, layer_decay_groups)` takes the timm network and
how parameters are grouped into layers (a name as in the recipe: "none", "block", "stage" or
"stage12"). It returns a dict, parameter name -> layer number (0: the first layers). timm's
`lr_scale` is not used, because torch's schedulers ignore it.
"""

import math
import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from timm.models._manipulate import group_with_matcher

from model.lean_import import lean_import
from model.network import STAGE_HEAD, Backbone, classifier_names
from model.recipe import Optim


class OptimError(ValueError):
    """Parameters that cannot be assigned to layer groups."""


def schedule(optim: Optim, step: int, steps: int) -> float:
    """Return the factor on the learning rate of every group at `step` (0 to steps - 1)."""
    warmup_steps = round(optim.warmup_ratio * steps)
    if step < warmup_steps:
        return optim.warmup_start_factor + (1 - optim.warmup_start_factor) * step / warmup_steps
    floor = optim.min_lr / optim.lr
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of each group to its `base_lr` times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def make_optimizer(backbone: Backbone, optim: Optim, *, fused: bool) -> torch.optim.AdamW:
    """Return AdamW over the `parameter_groups`.

    Raises:
        OptimError: a parameter belongs to no layer.
    """
    with lean_import():
        return torch.optim.AdamW(parameter_groups(backbone, optim), fused=fused)


def parameter_groups(backbone: Backbone, optim: Optim) -> list[dict[str, Any]]:
    """Return the optimizer's groups, one per layer and weight decay. Biases, norms and GRN (all 1-D
    parameters) have no weight decay, nor have parameters that timm excludes, such as position
    embeddings and class tokens.

    Raises:
        OptimError: a parameter belongs to no layer.
    """
    layers = layer_of_parameters(backbone, optim.layer_decay_groups)
    top = max(layers.values())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    # timm's names may be patterns, such as `pos_embed.*`.
    undecayed: Collection[str] = getattr(backbone, "no_weight_decay", tuple)()
    for name, parameter in backbone.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = (
            parameter.ndim > 1
            and not name.endswith((".bias", ".gamma", ".beta"))
            and not any(fnmatchcase(name, pattern) for pattern in undecayed)
        )
        base_lr = optim.lr * optim.layer_decay ** (top - layers[name])
        group = groups.setdefault(
            (layers[name], decays),
            {
                "params": [],
                "layer": layers[name],
                "lr": base_lr,
                "base_lr": base_lr,
                "weight_decay": optim.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def layer_of_parameters(backbone: Backbone, layer_decay_groups: str) -> dict[str, int]:
    """Return the layer index of each parameter: 0 for the stem, the highest for the head.

    Raises:
        OptimError: the network has no layer description, or its description misses a parameter.
    """
    names = [name for name, _ in backbone.named_parameters()]
    if layer_decay_groups == "none":
        return dict.fromkeys(names, 0)
    if layer_decay_groups in ("block", "stage"):
        if not hasattr(backbone, "group_matcher"):
            raise OptimError(
                f"{type(backbone).__name__} has no group_matcher; use layer_decay_groups none"
            )
        matcher = backbone.group_matcher(coarse=layer_decay_groups == "stage")
        layers = group_with_matcher(backbone.named_parameters(), matcher, reverse=True)
        # timm puts unmatched parameters into the last group: right for parameters after the blocks
        # (attention pooling, norms, heads), wrong for all others.
        matched = {name for name in names if _matches(matcher, name)}
        head = _head_prefixes(backbone, matched)
        layers = {n: layers[n] for n in names if n in matched or n.startswith(head)}
    else:
        layers = _official_convnext_layers(names)
    unmatched = [name for name in names if name not in layers]
    if unmatched:
        raise OptimError(
            f"layer_decay_groups {layer_decay_groups} has no layer for {len(unmatched)} "
            f"parameters, first: {unmatched[0]}; set layer_decay_groups none and layer_decay 1"
        )
    return {name: int(layers[name]) for name in names}


def _head_prefixes(backbone: Backbone, matched: Collection[str]) -> tuple[str, ...]:
    """Return the name prefixes of the parameters after the last block: those of the classifier, and
    of the modules between the classifier and the last module that the patterns cover (`matched`).
    """
    children = [name for name, _ in backbone.named_children()]
    covered = {name.partition(".")[0] for name in matched}
    last = max((index for index, name in enumerate(children) if name in covered), default=0)
    names = {name.partition(".")[0] for name in classifier_names(backbone)}
    end = max((index for index, name in enumerate(children) if name in names), default=0)
    names |= {*children[last + 1 : end + 1], "fc_norm", STAGE_HEAD.rstrip(".")}
    return tuple(f"{name}." for name in sorted(names))


def _matches(matcher: Any, name: str) -> bool:
    """Return whether a pattern of timm's group matcher covers a parameter."""
    if callable(matcher):
        return True
    patterns = []
    for entry in matcher.values():
        patterns += [entry] if isinstance(entry, str) else [pattern for pattern, _ in entry]
    return any(re.match(pattern, name) for pattern in patterns)


def _official_convnext_layers(names: Iterable[str]) -> dict[str, int]:
    """Return the grouping of facebookresearch/ConvNeXt (`optim_factory.py`) for timm's names.

    Stem 0, one group each for stages 1 and 2, groups of three blocks for stage 3, one group for
    stage 4, head last: 12 groups and the head for Base.
    """
    names = list(names)
    blocks = [re.match(r"stages\.2\.blocks\.(\d+)\.", name) for name in names]
    depth = 1 + max((int(match[1]) for match in blocks if match), default=0)
    last = 3 + (depth + 2) // 3
    layers = {}
    for name in names:
        stage = re.match(r"stages\.(\d)\.(?:blocks\.(\d+)\.)?", name)
        if name.startswith("stem."):
            layers[name] = 0
        elif name.startswith(("head.", "norm_pre.")):
            layers[name] = last + 1
        elif stage and stage[1] in "01":
            layers[name] = 1 + int(stage[1])
        elif stage and stage[1] == "2":
            layers[name] = 3 + int(stage[2] or 0) // 3
        elif stage:
            layers[name] = last
    return layers
