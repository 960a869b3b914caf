"""All batches of a training run, epoch after epoch: new sets, replayed old ones, parameters by
policy.

A stream is a pure function of its settings: `batches(step)` from any step gives what an
uninterrupted run would have given.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from pipeline.augment import AugmentPolicy, Preprocess
from pipeline.batch import Batch
from pipeline.loader import LoadError
from pipeline.loading import Loading
from pipeline.order import (
    Epoch,
    check_state,
    evaluation_epoch,
    repeat,
    repeat_rng,
    replay_rng,
    state_of,
    training_epoch,
)
from pipeline.params import ParamsFor, eval_params, train_params, view_params
from pipeline.replay import Replay, sample_old
from sharding.format import INDEX_FILE, ShardSet, open_shards
from storage import AnyPath, sha256_of


class BatchLoader(Protocol):
    """What makes the batches of a shard set on one rank: `pipeline.loader.Loader` from images, or
    a loader of stored features.
    """

    @property
    def shards(self) -> ShardSet:
        """The samples, by row number."""

    @property
    def preprocess(self) -> Preprocess:
        """How a whole image is seen by the network."""

    @property
    def loading(self) -> Loading:
        """How batches are made."""

    @property
    def device(self) -> torch.device:
        """Where batches lie."""

    @property
    def backend(self) -> str:
        """What makes them."""

    @property
    def reason(self) -> str:
        """Why that does."""

    @property
    def global_batch(self) -> int:
        """Samples per step over all ranks."""

    def batches(self, epoch: Epoch, params_for: ParamsFor, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from step `start` on, in order."""

    def name_failures(self, batch: Batch) -> list[str]:
        """One line per sample of the batch that could not be decoded: where it is, and why."""


@dataclass(frozen=True, eq=False)
class Pool:
    """The samples of a run: rows of `shards` that are new, and old ones that may be replayed.
    `hashes` has the hash of each set's index, by the set's name.
    """

    shards: ShardSet
    new: np.ndarray
    old: np.ndarray
    hashes: Mapping[str, str] = field(default_factory=dict)


def open_pool(data: AnyPath, train: Sequence[str], replay: Replay) -> Pool:
    """Open the new and, with replay, the old sets below `data` as one shard set."""
    new = open_shards([data / name for name in train])
    names = [*train, *(replay.sets if replay.fraction else [])]
    hashes = {name: sha256_of(data / name / INDEX_FILE) for name in names}
    if not replay.fraction:
        return Pool(new, np.arange(len(new)), np.empty(0, np.int64), hashes)
    shards = open_shards([data / name for name in names])
    codes, sources = shards.codes("source")
    allowed = np.array(
        [bool(shards.sources[n]["replay"]) and n not in replay.exclude_sources for n in sources],
        np.bool_,
    )
    old = np.arange(len(new), len(shards))
    return Pool(shards, np.arange(len(new)), old[allowed[codes[old]]], hashes)


@dataclass(frozen=True, eq=False)
class Stream:
    """The batches of a run on one rank. `policy` is that of sources without one of their own;
    `repeats` says how often sources of the new sets come in an epoch, where that is not once.
    `views` is None for parameters that are sampled anew in each epoch; with a number, epoch e takes
    view 1 + e modulo `views` of each image, or with 0 its center crop (`view_params`).
    """

    loader: BatchLoader
    pool: Pool
    replay: Replay
    augment: Mapping[str, AugmentPolicy]
    policy: str
    seed: int
    repeats: Mapping[str, float] = field(default_factory=dict)
    views: int | None = None

    @functools.cached_property
    def new_per_epoch(self) -> int:
        """New samples in each epoch."""
        return len(self.new(0))

    @property
    def replayed_per_epoch(self) -> int:
        """Old samples chosen for each epoch."""
        return math.floor(self.new_per_epoch * self.replay.fraction)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in each epoch; the last partial global batch is dropped."""
        total = self.new_per_epoch + self.replayed_per_epoch
        return total // self.loader.global_batch

    def new(self, epoch_number: int) -> np.ndarray:
        """The new samples of epoch `epoch_number`, in the order of the index."""
        codes, names = self.pool.shards.codes("source")
        if unknown := sorted(self.repeats.keys() - set(names)):
            raise LoadError(
                f"repeats names source {', '.join(unknown)}; the sets hold {', '.join(names)}"
            )
        if not self.repeats:
            return self.pool.new
        times = {names.index(name): count for name, count in self.repeats.items()}
        rng = repeat_rng(self.seed, epoch_number)
        return np.sort(repeat(self.pool.new, codes[self.pool.new], times, rng))

    def epoch(self, epoch_number: int) -> Epoch:
        """The order of epoch `epoch_number`, with old samples chosen afresh."""
        shards, old = self.pool.shards, self.pool.old
        replayed = sample_old(
            old,
            shards.codes("source")[0][old],
            shards.column("label")[old],
            self.replayed_per_epoch,
            replay_rng(self.seed, epoch_number),
        )
        return training_epoch(
            self.new(epoch_number),
            seed=self.seed,
            number=epoch_number,
            global_batch=self.loader.global_batch,
            shuffle=self.loader.loading.shuffle,
            old=replayed,
        )

    def view(self, epoch_number: int) -> int | None:
        """The view of each image in epoch `epoch_number`; None where there are no views."""
        if not self.views:
            return self.views
        return 1 + epoch_number % self.views

    def params(self, epoch_number: int) -> ParamsFor:
        """The augmentation parameters of epoch `epoch_number`.

        Raises:
            LoadError: a source keeps a policy that `augment` does not describe.
        """
        settings = (
            self.pool.shards, self.augment, self.policy, self.loader.preprocess, self.seed,
        )  # fmt: skip
        view = self.view(epoch_number)
        if view is None:
            return train_params(*settings, epoch_number)
        return view_params(*settings, view)

    def batches(self, start: int, epochs: int) -> Iterator[Batch]:
        """Batches from global step `start` to the end of the last of `epochs`."""
        epoch_number = start // self.steps_per_epoch
        while epoch_number < epochs:
            epoch = self.epoch(epoch_number)
            params_for = self.params(epoch_number)
            yield from self.loader.batches(
                epoch, params_for, max(0, start - epoch_number * epoch.steps)
            )
            epoch_number += 1

    def replayed_until(self, done: int) -> list[tuple[int, str]]:
        """(epoch, key) of every old sample in the first `done` steps, in the order they came."""
        replayed = []
        for epoch_number in range(-(-done // self.steps_per_epoch)):
            epoch = self.epoch(epoch_number)
            steps = min(epoch.steps, done - epoch_number * epoch.steps)
            seen = slice(0, steps * epoch.global_batch)
            keys = self.pool.shards.table.column("key").take(
                epoch.samples[seen][epoch.replayed[seen]]
            )
            replayed += [(epoch_number, key) for key in keys.to_pylist()]
        return replayed

    def state(self, done: int) -> dict[str, Any]:
        """What must be saved to go on after `done` steps: a few integers and the index hash."""
        epoch_number, step = divmod(done, self.steps_per_epoch)
        return state_of(self.epoch(epoch_number), step, self.pool.shards.sha256)

    def resume(self, state: Mapping[str, Any]) -> int:
        """The steps that are done, from a saved state.

        Raises:
            OrderError: the state belongs to other shards, another seed, batch or order.
        """
        epoch_number, step = check_state(
            state,
            seed=self.seed,
            global_batch=self.loader.global_batch,
            index_sha256=self.pool.shards.sha256,
        )
        return epoch_number * self.steps_per_epoch + step


def evaluation_batches(loader: BatchLoader) -> Iterator[Batch]:
    """Every sample of the loader's shard set exactly once, with the center crop of evaluation."""
    epoch = evaluation_epoch(len(loader.shards), loader.global_batch)
    return loader.batches(epoch, eval_params(loader.shards, loader.preprocess))
