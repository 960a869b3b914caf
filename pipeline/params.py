"""Choose the augmentation parameters of the samples of a shard set: for training, for evaluation,
or for a view. A view is a numbered choice of parameters, sampled separately for each image and the
same each time, so that the features of the augmented images can be stored.

Main entries: `train_params(shards, augment, policy, preprocess, seed, epoch)`, `view_params(shards,
augment, policy, preprocess, seed, view)` and `eval_params(shards, preprocess)`.

- `shards`: the `ShardSet` that `sharding.format.open_shards([Path(folder)])` returns.
- `augment`: a dict, name -> `AugmentPolicy` (ranges and probabilities), the `[augment.NAME]` tables
  of a recipe.
- `policy`: the default policy, a key of `augment`, for each source to which the set's index gives
  no policy.
- `preprocess`: a `Preprocess` (sizes in pixels; pipeline/preprocess.py).
- `seed`, `epoch`: the seed and the number of the epoch, ints from 0 on.
- `view`: number of the view, from 0 on. View 0 is the center crop of evaluation.

Each returns a callable object (type `ParamsFor`), a `TrainParams` or, for evaluation and view 0, an
`EvalParams`. Call it with two int64 arrays (B,): the rows of B images in the set, and how often
each has already appeared in the epoch. It returns an `AugmentBatch`: the crop, flip, colors, ... of
each of the B images, as columns. The object has an attribute `view`: `view` for `view_params()`, 0
for `eval_params()`, and `epoch + 1` for `train_params()`, because view 0 is the center crop.

`policies_of(shards, augment, policy)` returns a dict, source -> policy, from which
`matched_partners(shards, policies)` returns the `Partners` (pipeline/pairs.py) whose JPEGs fakes
are matched to, or None. `policies_of()`, `train_params()` and
`view_params()` (except view 0) raise `LoadError` if the policy of a source is not in `augment`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pipeline.augment import (
    AugmentBatch,
    AugmentPolicy,
    PolicyTable,
    SampleKeys,
    center_crop_params,
    sample_params,
)
from pipeline.batch import LoadError
from pipeline.pairs import Partners, partners_of
from pipeline.preprocess import Preprocess
from sharding.format import ShardSet

ParamsFor = Callable[[np.ndarray, np.ndarray], AugmentBatch]
"""Function from int64 (B,) row numbers, and how many times each appeared before in the epoch, to
the parameters of these samples.
"""


@dataclass(frozen=True, eq=False)
class TrainParams:
    """Samples augmentation parameters for one epoch. Create it with `train_params`. A class rather
    than a closure, so that it can be pickled to spawned workers.

    `policies` has a row for each source code. If `numbers` is given, int64, one per sample, it
    replaces the row numbers as the key of the random numbers, and an image has the same parameters
    each time it appears.
    """

    policies: PolicyTable  # row: code of the source
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
        """Number of the view that these parameters make; see `view_params`."""
        return self.epoch + 1

    def __call__(self, samples: np.ndarray, repeat_index: np.ndarray) -> AugmentBatch:
        """Sample the parameters of the row numbers `samples`, int64 (B,). `repeat_index`, int64
        (B,), is how many times each appeared before in this epoch.
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
    """Evaluation parameters: the same center crop of an image in every epoch."""

    widths: np.ndarray
    heights: np.ndarray
    preprocess: Preprocess

    @property
    def view(self) -> int:
        """Number of the view that these parameters make: 0."""
        return 0

    def __call__(self, samples: np.ndarray, _repeat_index: np.ndarray) -> AugmentBatch:
        """Compute the center crops of the row numbers `samples`, int64 (B,)."""
        return center_crop_params(self.preprocess, self.widths[samples], self.heights[samples])


def policies_of(
    shards: ShardSet, augment: Mapping[str, AugmentPolicy], policy: str
) -> dict[str, AugmentPolicy]:
    """Return the policy of each source: the one that the index names for it, else `policy`.

    Raises:
        LoadError: the index names a policy that `augment` does not have.
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


def matched_partners(shards: ShardSet, policies: Mapping[str, AugmentPolicy]) -> Partners | None:
    """Return the JPEGs of the real partners of the fakes of all sources whose policy has
    `match_pair_jpeg`; None if no policy has. `policies` is the result of `policies_of`.
    """
    paired = tuple(name for name, policy in policies.items() if policy.match_pair_jpeg)
    return partners_of(shards, paired) if paired else None


def train_params(
    shards: ShardSet,
    augment: Mapping[str, AugmentPolicy],
    policy: str,
    preprocess: Preprocess,
    seed: int,
    epoch: int,
) -> TrainParams:
    """Return the training parameters of one epoch: each source with its own policy (`policies_of`).

    Raises:
        LoadError: the index names a policy that `augment` does not have.
    """
    codes, names = shards.codes("source")
    by_source = policies_of(shards, augment, policy)
    policies = PolicyTable([by_source[name] for name in names])
    size = shards.column("width"), shards.column("height")
    partners = matched_partners(shards, by_source)
    return TrainParams(policies, codes, *size, preprocess, seed, epoch, partners)


def view_params(
    shards: ShardSet,
    augment: Mapping[str, AugmentPolicy],
    policy: str,
    preprocess: Preprocess,
    seed: int,
    view: int,
) -> TrainParams | EvalParams:
    """Return the parameters of view number `view`. View 0 is the center crop; view v has the
    augmentations of epoch v - 1.

    Unlike in training from pixels, the random numbers depend on a sample's position in its own set,
    not on the other opened sets. An image that appears twice in an epoch has the same parameters
    both times.

    Raises:
        LoadError: the index names a policy that `augment` does not have.
    """
    if not view:
        return eval_params(shards, preprocess)
    params = train_params(shards, augment, policy, preprocess, seed, view - 1)
    # Key: hash and offset, not the row number, so that a sample has the same key in a subset of its
    # set.
    offsets = shards.column("offset").astype(np.int64)
    tars = np.array([int(sha256[:8], 16) for sha256 in shards.shard_sha256], np.int64)
    return replace(params, numbers=(tars[shards.column("shard_code")] << 31) ^ offsets)


def eval_params(shards: ShardSet, preprocess: Preprocess) -> EvalParams:
    """Return the evaluation parameters of a shard set."""
    return EvalParams(shards.column("width"), shards.column("height"), preprocess)
