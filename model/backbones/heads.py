"""Classify an image from features of several depths of a backbone, by a linear layer with two
outputs.

Early layers keep traces of generation; the last layers describe the content of the image. Main
entries: two torch modules. `StageHead(channels)` reads the feature maps of all stages (their mean
and standard deviation per channel); `channels` is a list of the number of channels of each stage.
`ClassTokenHead(width)` reads the class token of a transformer after chosen blocks; `width` (int) is
the number of blocks times the size of a token. For a network that reads two crops of an image, both
arguments are twice as large, and the features of its crops are joined before `forward()`.

The static method `features()` of each takes the list of maps, float (B, C_i, H_i, W_i), or of
tokens, float (B, C). Each token vector is normalized alone; of each map, the vector of the means
and that of the standard deviations, each alone. It returns float features (B, D), where D is 2 *
sum(channels) or `width`. `forward()` takes the features and returns float logits (B, 2), real and
fake: `logits = head(head.features(maps))`. `features()` uses no weights, so features of a frozen
backbone can be stored. `InnerHead` is the base class of both.
"""

from collections.abc import Sequence

import torch
from torch import nn

from sharding.format import CLASSES


class InnerHead(nn.Module):
    """Linear classifier of features from several depths of a backbone. Each depth is normalized on
    its own, so that none dominates.

    Early layers keep traces of generation; the last layers describe the content of the image. After
    RINE (Koutlis & Papadopoulos, ECCV 2024), which reads all blocks of CLIP.

    `forward`: float features (B, D) -> float logits (B, 2).
    """

    def __init__(self, width: int):
        super().__init__()
        self.fc = nn.Linear(width, len(CLASSES))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Classify features: float (B, D) -> float logits (B, 2)."""
        return self.fc(features.to(self.fc.weight.dtype))


class StageHead(InnerHead):
    """Head that reads the maps of all stages: the mean and standard deviation of each channel over
    all positions.

    `features`: float maps (B, C_i, H_i, W_i), one per stage -> float (B, 2 * sum of C_i).
    """

    def __init__(self, channels: Sequence[int]):
        super().__init__(2 * sum(channels))

    @staticmethod
    def features(maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the normalized mean and standard deviation of each map."""
        parts = []
        for stage_map in maps:
            positions = stage_map.flatten(2).float()
            parts += [positions.mean(2), positions.std(2, correction=0)]
        return _scaled(parts)


class ClassTokenHead(InnerHead):
    """Head that reads the class token after some blocks of a transformer.

    `features`: float tokens (B, C), one per block -> float (B, blocks * C).
    """

    @staticmethod
    def features(tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        """Normalize the tokens and concatenate them."""
        return _scaled([token.float() for token in tokens])


def _scaled(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([nn.functional.layer_norm(part, part.shape[1:]) for part in parts], 1)
