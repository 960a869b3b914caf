"""Heads that see more of a backbone than what it ends in. Each is linear in features that do not
depend on it, so the features can be kept.
"""

from collections.abc import Sequence

import torch
from torch import nn

from sharding.format import CLASSES


class InnerHead(nn.Module):
    """A linear classifier of parts of a backbone's features, each scaled by itself, so that none
    drowns the others.

    Traces of generation lie early; what a network ends in is what the picture shows. After RINE
    (Koutlis & Papadopoulos, ECCV 2024), which reads all blocks of CLIP.

    `forward`: float features (B, D) -> float logits (B, 2).
    """

    def __init__(self, width: int):
        super().__init__()
        self.fc = nn.Linear(width, len(CLASSES))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Classify."""
        return self.fc(features.to(self.fc.weight.dtype))


class StageHead(InnerHead):
    """Sees the maps of all stages: mean and deviation over the places of each.

    `features`: float maps (B, C_i, H_i, W_i), one per stage -> float (B, 2 * sum of C_i).
    """

    def __init__(self, channels: Sequence[int]):
        super().__init__(2 * sum(channels))

    @staticmethod
    def features(maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mean and deviation of each map, scaled."""
        parts = []
        for stage_map in maps:
            positions = stage_map.flatten(2).float()
            parts += [positions.mean(2), positions.std(2, correction=0)]
        return _scaled(parts)


class ClassTokenHead(InnerHead):
    """Sees the class token behind some blocks of a transformer.

    `features`: float tokens (B, C), one per block -> float (B, blocks * C).
    """

    @staticmethod
    def features(tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tokens behind each other, scaled."""
        return _scaled([token.float() for token in tokens])


def _scaled(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([nn.functional.layer_norm(part, part.shape[1:]) for part in parts], 1)
