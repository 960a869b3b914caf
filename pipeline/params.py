"""Which augmentation parameters a sample gets: in training, in evaluation, and in a stored view."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pipeline.augment import (
    AugmentBatch,
    AugmentPolicy,
    PolicyTable,
    Preprocess,
    SampleKeys,
    center_crop_params,
    sample_params,
)
from pipeline.batch import LoadError
from pipeline.pairs import Partners, partners_of
from sharding.format import ShardSet

ParamsFor = Callable[[np.ndarray, np.ndarray], AugmentBatch]
"""The parameters of some samples: int64 (B,) row numbers and how often each came before."""


@dataclass(frozen=True, eq=False)
class TrainParams:
    """Training parameters of one epoch; made by `train_params`. An object, so that workers can be
    sent it where they are not forked.
    """

    policies: PolicyTable  # by source code
    sources: np.ndarray
    widths: np.ndarray
    heights: np.ndarray
    preprocess: Preprocess
    seed: int
    epoch: int
    partners: Partners | None = None
    numbers: np.ndarray | None = None

    @property
    def view(self) -> int:
        """The number of the view that these parameters make; see `view_params`."""
        return self.epoch + 1

    def __call__(self, samples: np.ndarray, repeat_index: np.ndarray) -> AugmentBatch:
        """Sample the parameters of these samples, each for the stated time in this epoch. With
        `numbers`, one for each sample, an image has the same ones each time, and in any set.
        """
        partners = self.partners and tuple(column[samples] for column in self.partners)
        keys = SampleKeys(self.seed, self.epoch, samples, repeat_index)
        if self.numbers is not None:
            keys = SampleKeys(self.seed, self.epoch, self.numbers[samples], 0 * repeat_index)
        return sample_params(
            self.policies, self.sources[samples], self.preprocess,
            self.widths[samples], self.heights[samples], keys, partners,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class EvalParams:
    """Evaluation parameters: the same center crop of every image."""

    widths: np.ndarray
    heights: np.ndarray
    preprocess: Preprocess

    @property
    def view(self) -> int:
        """The number of the view that these parameters make."""
        return 0

    def __call__(self, samples: np.ndarray, _repeat_index: np.ndarray) -> AugmentBatch:
        """The center crop of these samples."""
        return center_crop_params(self.preprocess, self.widths[samples], self.heights[samples])


def policies_of(
    shards: ShardSet, augment: Mapping[str, AugmentPolicy], policy: str
) -> dict[str, AugmentPolicy]:
    """The policy of each source: by the name that the index has for it, else `policy`.

    Raises:
        LoadError: a source keeps a policy that `augment` does not describe.
    """
    policies = {}
    for name in shards.codes("source")[1]:
        wanted = str(shards.sources[name]["policy"]) or policy
        if wanted not in augment:
            raise LoadError(
                f"source {name} is augmented by policy {wanted!r}, but the recipe describes "
                f"{', '.join(augment) or 'none'}; add [augment.{wanted}]"
            )
        policies[name] = augment[wanted]
    return policies


def train_params(
    shards: ShardSet,
    augment: Mapping[str, AugmentPolicy],
    policy: str,
    preprocess: Preprocess,
    seed: int,
    epoch: int,
) -> TrainParams:
    """Training parameters: each source by its own policy (`policies_of`).

    Raises:
        LoadError: a source keeps a policy that `augment` does not describe.
    """
    codes, names = shards.codes("source")
    by_source = policies_of(shards, augment, policy)
    policies = [by_source[name] for name in names]
    size = shards.column("width"), shards.column("height")
    paired = tuple(name for name in names if by_source[name].match_pair_jpeg)
    partners = partners_of(shards, paired) if paired else None
    return TrainParams(PolicyTable(policies), codes, *size, preprocess, seed, epoch, partners)


def view_params(
    shards: ShardSet,
    augment: Mapping[str, AugmentPolicy],
    policy: str,
    preprocess: Preprocess,
    seed: int,
    view: int,
) -> TrainParams | EvalParams:
    """The parameters of a view: 0 is the center crop, view v has those of epoch v - 1. Other than
    in training from pixels they depend on a sample's place in its own set, whatever sets are opened
    with it, and an image that comes twice in an epoch comes alike.

    Raises:
        LoadError: a source keeps a policy that `augment` does not describe.
    """
    if not view:
        return eval_params(shards, preprocess)
    params = train_params(shards, augment, policy, preprocess, seed, view - 1)
    # Hashed, not counted: a subset of a set keeps the numbers of its samples.
    offsets = shards.column("offset").astype(np.int64)
    tars = np.array([int(sha256[:8], 16) for sha256 in shards.shard_sha256], np.int64)
    return replace(params, numbers=(tars[shards.column("shard_code")] << 31) ^ offsets)


def eval_params(shards: ShardSet, preprocess: Preprocess) -> EvalParams:
    """Evaluation parameters of a shard set."""
    return EvalParams(shards.column("width"), shards.column("height"), preprocess)
