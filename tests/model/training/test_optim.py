"""Optimizer: layer-wise rates reach the step, weight decay on weights only, a schedule that
multiplies.
"""

from itertools import pairwise

import pytest
import timm
import torch

from model.network import build
from model.recipe import Optim
from model.training.optim import (
    OptimError,
    layer_of_parameters,
    make_optimizer,
    parameter_groups,
    schedule,
    set_learning_rate,
)
from tests.builders import TINY

with torch.device("meta"):  # names and shapes are enough for groups and rates
    BASE = timm.create_model("convnextv2_base", num_classes=2)


def rates(optim: Optim, backbone: torch.nn.Module, steps: int, step: int) -> set[float]:
    optimizer = make_optimizer(backbone, optim, fused=False)
    set_learning_rate(optimizer, schedule(optim, step, steps))
    return {group["lr"] for group in optimizer.param_groups}


@pytest.mark.parametrize(
    ("layer_decay_groups", "groups"), [("none", 1), ("block", 38), ("stage12", 14)]
)
def test_after_warm_up_there_are_as_many_rates_as_groups(
    layer_decay_groups: str, groups: int
) -> None:
    """The original project wrote `lr_scale`, which its schedulers ignored: one rate for 38
    groups.
    """
    decay = 1.0 if layer_decay_groups == "none" else 0.8
    optim = Optim(lr=2e-4, layer_decay=decay, layer_decay_groups=layer_decay_groups)
    layers = layer_of_parameters(BASE, layer_decay_groups)
    assert len(set(layers.values())) == groups
    for step in (0, 5, 50, 99):
        group_rates = rates(optim, BASE, 100, step)
        assert len(group_rates) == groups
        assert max(group_rates) / min(group_rates) == pytest.approx(decay ** -(groups - 1))


def test_the_official_grouping_has_12_layers_and_the_head() -> None:
    layers = layer_of_parameters(BASE, "stage12")
    assert layers["stem.0.weight"] == 0
    assert layers["stages.0.blocks.2.mlp.fc1.weight"] == 1
    assert layers["stages.1.downsample.1.weight"] == 2
    assert layers["stages.2.blocks.0.mlp.fc1.weight"] == 3
    assert layers["stages.2.blocks.26.mlp.fc1.weight"] == 11
    assert layers["stages.3.blocks.0.mlp.fc1.weight"] == 12
    assert layers["head.fc.weight"] == 13


def test_stages_are_groups_of_a_network_that_is_no_convnext() -> None:
    with torch.device("meta"):
        backbone = timm.create_model("mobilenetv2_100", num_classes=2)
    layers = layer_of_parameters(backbone, "stage")
    assert len(set(layers.values())) == 9
    assert layers["conv_stem.weight"] == 0
    assert layers["blocks.2.0.conv_pw.weight"] == layers["blocks.2.2.conv_pw.weight"] == 3
    assert layers["conv_head.weight"] == 7
    assert layers["classifier.weight"] == 8
    optim = Optim(lr=1e-3, layer_decay=0.8, layer_decay_groups="stage")
    assert len(rates(optim, backbone, 100, 50)) == 9


def test_no_decay_on_biases_norms_and_grn() -> None:
    optimizer = make_optimizer(
        BASE, Optim(lr=1e-3, layer_decay=0.8, layer_decay_groups="block"), fused=False
    )
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    for name, parameter in BASE.named_parameters():
        wanted = parameter.ndim > 1
        assert (id(parameter) in decayed) == wanted, name
        assert not (wanted and ("grn" in name or "norm" in name)), name
    listed = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert len(listed) == len(set(listed)) == len(list(BASE.parameters()))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("vit_tiny_patch16_224", {"cls_token", "pos_embed"}),
        ("vit_small_patch14_reg4_dinov2", {"cls_token", "pos_embed", "reg_token"}),
        ("xcit_nano_12_p8_224", {"cls_token", "pos_embed.token_projection.weight"}),
        ("swin_tiny_patch4_window7_224", {"layers.0.blocks.0.attn.relative_position_bias_table"}),
        ("resnet18", set()),
    ],
)
def test_no_decay_on_what_timm_names_for_a_network(name: str, kept: set[str]) -> None:
    """Positions and tokens are no weights of a layer."""
    with torch.device("meta"):
        backbone = timm.create_model(name, num_classes=2)
    decayed = {
        id(p)
        for group in parameter_groups(backbone, Optim(lr=1e-3))
        for p in group["params"]
        if group["weight_decay"]
    }
    large = {n: p for n, p in backbone.named_parameters() if p.ndim > 1}
    assert {n for n, p in large.items() if id(p) not in decayed} >= kept
    assert decayed <= {id(p) for p in large.values()} and len(decayed) > 15
    if not kept:
        assert len(decayed) == len(large)


def test_the_rates_are_used_by_the_step() -> None:
    """One step with gradients of 1: the head and the stem each move by their own rate."""
    net = build(TINY, pretrained=False)
    optim = Optim(
        lr=1e-2, weight_decay=0.0, layer_decay=0.5, layer_decay_groups="block", warmup_ratio=0.0
    )
    optimizer = make_optimizer(net.backbone, optim, fused=False)
    before = {name: p.detach().clone() for name, p in net.backbone.named_parameters()}
    for parameter in net.backbone.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_learning_rate(optimizer, 1.0)
    optimizer.step()
    moved = {n: (before[n] - p).abs().mean().item() for n, p in net.backbone.named_parameters()}
    layers = layer_of_parameters(net.backbone, "block")
    top = max(layers.values())
    for name, distance in moved.items():
        assert distance == pytest.approx(1e-2 * 0.5 ** (top - layers[name]), rel=1e-3), name


def test_a_parameter_without_a_layer_is_an_error() -> None:
    with torch.device("meta"):
        backbone = timm.create_model("convnextv2_atto", num_classes=2)
    backbone.surprise = torch.nn.Linear(2, 2)
    with pytest.raises(OptimError, match=r"no layer for 2 parameters, first: surprise\.weight"):
        layer_of_parameters(backbone, "stage12")
    with pytest.raises(OptimError, match=r"first: surprise\.weight"):
        layer_of_parameters(backbone, "block")


def test_the_schedule_equals_the_originals_as_a_factor() -> None:
    optim = Optim(lr=7.5e-5, warmup_ratio=0.07, warmup_start_factor=0.01, min_lr=1e-7)
    factors = [schedule(optim, step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[35] == pytest.approx(0.505)
    assert factors[70] == 1.0
    assert factors[535] == pytest.approx(0.5, abs=0.01)
    assert 1e-7 / 7.5e-5 <= factors[-1] < 2e-3
    assert all(a < b for a, b in pairwise(factors[:71]))
    assert all(a > b for a, b in pairwise(factors[70:]))


def test_a_small_learning_rate_is_never_raised() -> None:
    """An absolute minimum of 1e-7 would raise the stem's 5e-8; a factor cannot."""
    optim = Optim(lr=2e-4, layer_decay=0.8, layer_decay_groups="block", min_lr=1e-7)
    start, end = rates(optim, BASE, 1000, 50), rates(optim, BASE, 1000, 999)
    assert all(low < high for low, high in zip(sorted(end), sorted(start), strict=True))
    assert min(end) < 1e-9


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lr": 0}, "lr must be above 0 and min_lr from 0 to lr"),
        ({"lr": 1e-3, "layer_decay": 0.8}, "needs layer_decay_groups block, stage or stage12"),
        ({"lr": 1e-3, "warmup_ratio": 1.5}, "warmup_ratio is a share of the steps"),
    ],
)
def test_impossible_settings_are_refused(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Optim(**values)
