"""Make the batches of a training run, epoch after epoch, or of one evaluation.

Main entries: `open_pool(data, train, replay)` returns a `Pool`: all sets opened as one shard set
(`shards`), the row numbers of its `new` and its `old` samples (int64), and `hashes` (name of a set
-> SHA-256 of its index).

- `data`: the folder of all sets, or its address (a text, `Path` or `UPath`).
- `train`: a list of the names of the training sets.
- `replay`: the `Replay` (`pipeline/replay.py`) that names the old sets; `Replay()` for none.

`Stream(loader, pool, replay, augment, policy, seed, repeats, views)`:

- `loader`: a `BatchLoader` of `pool.shards`, from `open_loader()` of `pipeline/loader.py`.
- `pool` and `replay`: as above.
- `augment`: dict, name -> `AugmentPolicy` (`pipeline/augment.py`).
- `policy`: the name in `augment` for sources that have no policy of their own in the set's index.
- `seed`: an integer.
- `repeats`: dict, source -> how many times each of its new samples comes in an epoch, such as 2 or
  0.5. A source that is not in it counts once (default: {}).
- `views`: None (default): new augmentations in each epoch. A number n: each image has n fixed
  augmentations. Epoch 0 uses the center crop, epochs 1 to n use the n augmentations, epoch n + 1
  the center crop again, and so on. 0: only center crops.

Call `Stream.epoch(0)` once first. It checks the sets, and returns the order of epoch 0 (an `Epoch`
of `pipeline/order.py`), which a caller need not keep. Without it, samples that do not fill a batch
are a ZeroDivisionError of `batches()`; the other errors of `epoch(0)` come there, too.

`Stream.batches(start, epochs)` yields each `Batch` (images, labels and more) from the step `start`
(counted over all epochs) to the end of the last one of `epochs` epochs. Started at any step, it
yields the batches of an uninterrupted run. `Stream.state(done)` returns a dict for a checkpoint
after `done` steps; `resume(state)` checks such a dict and returns its number of finished steps.
`Stream.used` has the row numbers of all samples that epochs take from, `used_new` only those of new
ones: without sources that `repeats` sets to 0.
`evaluation_batches(loader)` yields the batches of a loader's set, each sample once, as center
crops.

Errors:

- `open_pool()`: `ShardError` if a set is missing, damaged or of another format version, `OSError`
  if a file cannot be read.
- `Stream.epoch(0)`: `OrderError` if the samples do not fill a batch, `LoadError` for a source in
  `repeats` that the new sets lack, `ValueError` if there is no old sample to replay.
- `Stream.batches()`: `LoadError` if the policy of a source is not in `augment`, too many images are
  unreadable, or no batch comes in time.
- `Stream.resume()`: `OrderError` if the state has other data, another seed, batch size, shuffle,
  `repeats` or replay, or was made by a version of the program that orders samples in another way.
- `evaluation_batches()`: `OrderError` if the set is empty; `LoadError` as above.
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from pipeline.augment import AugmentPolicy
from pipeline.batch import Batch
from pipeline.contents import content_sha256, policies_sha256
from pipeline.loader import LoadError
from pipeline.loading import Loading
from pipeline.order import (
    REPEAT,
    REPLAY,
    Epoch,
    OrderError,
    check_state,
    evaluation_epoch,
    repeat,
    rng_of,
    state_of,
    training_epoch,
)
from pipeline.params import ParamsFor, eval_params, train_params, view_params
from pipeline.preprocess import Preprocess
from pipeline.replay import Replay, sample_old
from sharding.format import INDEX_FILE, ShardError, ShardSet, open_shards
from storage import AnyPath, any_path, sha256_of


class BatchLoader(Protocol):
    """Interface of a loader: makes the batches of one shard set on one rank. Implemented by
    `pipeline.loader.Loader` (from images) and by a loader of stored features.
    """

    @property
    def shards(self) -> ShardSet:
        """The shard set whose samples are loaded."""

    @property
    def preprocess(self) -> Preprocess:
        """Evaluation preprocessing of an image."""

    @property
    def loading(self) -> Loading:
        """Settings of the loader."""

    @property
    def device(self) -> torch.device:
        """Device of the batches."""

    @property
    def backend(self) -> str:
        """Name of the part that makes the batches, such as "pil"."""

    @property
    def reason(self) -> str:
        """Why this backend was chosen."""

    @property
    def global_batch(self) -> int:
        """Samples per step over all ranks."""

    def batches(self, epoch: Epoch, params_for: ParamsFor, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of `epoch` from step `start` on, in order."""

    def name_failures(self, batch: Batch) -> list[str]:
        """Return one line for each sample of the batch that could not be decoded: its name and the
        reason.
        """

    def close(self) -> None:
        """Free what is kept for the next epoch, such as memory on the GPU."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Samples of a run: int64 row numbers of `shards` that are new, and old ones that may be
    replayed.

    `hashes` maps the name of each set to the SHA-256 of its index file.
    """

    shards: ShardSet
    new: np.ndarray
    old: np.ndarray
    hashes: Mapping[str, str] = field(default_factory=dict)


def open_pool(data: str | AnyPath, train: Sequence[str], replay: Replay) -> Pool:
    """Open the sets `train` and, if replay is on, the old sets below the folder `data` as one shard
    set.

    Raises:
        ShardError: a folder has no shard set that can be read.
    """
    data = any_path(data)
    new = open_shards([data / name for name in train])
    names = [*train, *replay.used_sets]
    try:
        shards = open_shards([data / name for name in names]) if replay.used_sets else new
    except ShardError as error:  # of an old set: `train` was opened above
        raise ShardError(f"replay.sets: {error}") from error
    hashes = {name: sha256_of(data / name / INDEX_FILE) for name in names}
    if not replay.used_sets:
        return Pool(new, np.arange(len(new)), np.empty(0, np.int64), hashes)
    codes, sources = shards.codes("source")
    allowed = np.array(
        [bool(shards.sources[n]["replay"]) and n not in replay.exclude_sources for n in sources],
        np.bool_,
    )
    old = np.arange(len(new), len(shards))
    return Pool(shards, np.arange(len(new)), old[allowed[codes[old]]], hashes)


@dataclass(frozen=True, eq=False)
class Stream:
    """Batches of a training run on one rank.

    `policy` is for sources for which the index names none. `repeats` maps a source of the new sets
    to how many times it appears in an epoch (1 if missing).

    `views` None samples new parameters in each epoch. With `views` = n, epoch e uses view e mod
    (n + 1) of each image; view 0 is the center crop (`view_params`).
    """

    loader: BatchLoader
    pool: Pool
    replay: Replay
    augment: Mapping[str, AugmentPolicy]
    policy: str
    seed: int
    repeats: Mapping[str, float] = field(default_factory=dict)
    views: int | None = None
    _replayed: dict[int, tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict, init=False, repr=False
    )
    _running: dict[int, Epoch] = field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def new_per_epoch(self) -> int:
        """New samples in each epoch."""
        return len(self.new(0))

    @property
    def replayed_per_epoch(self) -> int:
        """Old samples chosen for each epoch."""
        return math.floor(self.new_per_epoch * self.replay.fraction)

    @functools.cached_property
    def used_new(self) -> np.ndarray:
        """Row numbers of the new samples that epochs take from, int64: without the sources that
        `repeats` sets to 0. All samples of a source with a fractional repeat are included: each
        epoch takes other ones.
        """
        codes, names = self.pool.shards.codes("source")
        is_used = np.array([self.repeats.get(name, 1) > 0 for name in names], np.bool_)
        return self.pool.new[is_used[codes[self.pool.new]]]

    @property
    def used(self) -> np.ndarray:
        """Row numbers of all samples that epochs take from, int64: new ones, then old ones if any
        are replayed. The opened sets may have more samples.
        """
        old = self.pool.old if self.replayed_per_epoch else self.pool.old[:0]
        return np.concatenate([self.used_new, old])

    @property
    def steps_per_epoch(self) -> int:
        """Steps in each epoch. The last partial global batch is dropped."""
        total = self.new_per_epoch + self.replayed_per_epoch
        return total // self.loader.global_batch

    def new(self, epoch_number: int) -> np.ndarray:
        """Return the new samples of epoch `epoch_number`, in the order of the index.

        Raises:
            LoadError: `repeats` names a source that the new sets do not have.
        """
        if not self.repeats:
            return self.pool.new
        codes, names = self.pool.shards.codes("source")
        known = [names[code] for code in np.unique(codes[self.pool.new])]
        if unknown := sorted(self.repeats.keys() - set(known)):
            raise LoadError(
                f"repeats names source {', '.join(unknown)}; the sources of the new samples are "
                f"{', '.join(known)}"
            )
        times = {names.index(name): count for name, count in self.repeats.items()}
        rng = rng_of(self.seed, epoch_number, REPEAT)
        return np.sort(repeat(self.pool.new, codes[self.pool.new], times, rng))

    def epoch(self, epoch_number: int, *, whole: bool = False) -> Epoch:
        """Return the order of epoch `epoch_number`. Old samples are chosen anew for each epoch.
        With `whole`, samples that fill no batch are kept: batches of one sample.
        """
        shards, old = self.pool.shards, self.pool.old
        replayed = sample_old(
            old,
            shards.codes("source")[0][old],
            shards.column("label")[old],
            self.replayed_per_epoch,
            rng_of(self.seed, epoch_number, REPLAY),
        )
        return training_epoch(
            self.new(epoch_number),
            seed=self.seed,
            number=epoch_number,
            global_batch=1 if whole else self.loader.global_batch,
            shuffle=self.loader.loading.shuffle,
            old=replayed,
        )

    def view(self, epoch_number: int) -> int | None:
        """Return the view number of every image in epoch `epoch_number`, or None if `views` is
        None.
        """
        return None if self.views is None else epoch_number % (self.views + 1)

    def params(self, epoch_number: int) -> ParamsFor:
        """Return the augmentation parameters of epoch `epoch_number`.

        Raises:
            LoadError: the index names a policy that `augment` does not have.
        """
        settings = (
            self.pool.shards, self.augment, self.policy, self.loader.preprocess, self.seed,
        )  # fmt: skip
        view = self.view(epoch_number)
        if view is None:
            return train_params(*settings, epoch_number)
        return view_params(*settings, view)

    def batches(self, start: int, epochs: int) -> Iterator[Batch]:
        """Yield the batches from global step `start` to the end of the last of `epochs`."""
        epoch_number = start // self.steps_per_epoch
        while epoch_number < epochs:
            epoch = self.epoch(epoch_number)
            self._running.clear()
            self._running[epoch_number] = epoch  # for `_order`, when a checkpoint is saved
            params_for = self.params(epoch_number)
            yield from self.loader.batches(
                epoch, params_for, max(0, start - epoch_number * epoch.steps)
            )
            epoch_number += 1

    def replayed_until(self, done: int, *, whole: bool = False) -> Iterator[tuple[str, int]]:
        """Yield the key of each old sample in the first `done` steps, and how often it came. With
        `whole`, whole epochs count, as in `epoch()`. The counts of finished epochs are cached for
        the next checkpoint, and stored in it (`replayed_state`): computing an order takes seconds
        for a hundred million samples.
        """
        finished, left = divmod(done, self.steps_per_epoch)
        if whole:
            finished, left = finished + (left > 0), 0
        known = max((n for n in self._replayed if n <= finished and not whole), default=0)
        counts = np.zeros(len(self.pool.shards), np.int32)
        if known:
            rows, times = self._replayed[known]
            counts[rows] = times
        for epoch_number in range(known, finished):
            _add_replayed(counts, self._order(epoch_number, whole=whole))
        if not whole:
            rows = np.flatnonzero(counts)
            self._replayed.clear()
            self._replayed[finished] = rows, counts[rows]
        if left:
            _add_replayed(counts, self._order(finished), left)
        samples = np.flatnonzero(counts)
        keys = self.pool.shards.table.column("key").take(samples)
        return ((key.as_py(), int(count)) for key, count in zip(keys, counts[samples], strict=True))

    def _order(self, epoch_number: int, *, whole: bool = False) -> Epoch:
        """Return the order of an epoch; that of the running epoch is cached in `_running`."""
        running = None if whole else self._running.get(epoch_number)
        return running or self.epoch(epoch_number, whole=whole)

    def replayed_state(self) -> dict[str, Any]:
        """Return the cache of `replayed_until`, so that a resumed run need not compute the orders
        of finished epochs again: their number, the old samples that came, and how often.
        """
        ((finished, (rows, times)),) = self._replayed.items()
        samples, counts = torch.from_numpy(rows), torch.from_numpy(times)
        return {"epochs": finished, "samples": samples, "counts": counts}

    def keep_replayed(self, state: Mapping[str, Any]) -> None:
        """Take over the `replayed_state` of a checkpoint of this run.

        Raises:
            OrderError: `state` is not a `replayed_state` of these sets.
        """
        if not self._is_replayed_state(state):
            raise OrderError(
                "cannot resume: the record of replayed samples in the training state is not of "
                "this run (expected are a number of epochs, and old samples with how often each "
                "came); restore the checkpoint, or start a new run with --run NAME"
            )
        # Copy, because the tensors are mapped from a file that is removed after the next save.
        kept = state["samples"].numpy().copy(), state["counts"].numpy().copy()
        self._replayed[state["epochs"]] = kept

    def _is_replayed_state(self, state: Any) -> bool:
        """Return whether a value of a file can be a `replayed_state` of these sets. Sizes are
        compared first: a file of a few bytes can hold a tensor of any size.
        """
        if not isinstance(state, Mapping) or state.keys() != {"epochs", "samples", "counts"}:
            return False
        epochs, samples, counts = state["epochs"], state["samples"], state["counts"]
        if type(epochs) is not int or epochs < 0:
            return False
        for tensor, dtype in ((samples, torch.int64), (counts, torch.int32)):
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
                return False
            if tensor.dtype != dtype or tensor.device.type != "cpu":
                return False
        if samples.ndim != 1 or counts.shape != samples.shape or len(samples) > len(self.pool.old):
            return False
        rows, is_old = samples.numpy(), np.zeros(len(self.pool.shards), np.bool_)
        is_old[self.pool.old] = True
        in_sets = np.all((rows >= 0) & (rows < len(is_old))) and np.all(np.diff(rows) > 0)
        most = epochs * self.replayed_per_epoch
        in_number = torch.all(counts > 0) and int(counts.sum(dtype=torch.int64)) <= most
        return bool(in_sets and in_number and is_old[rows].all())

    def state(self, done: int) -> dict[str, Any]:
        """Return what `resume` needs to continue after `done` steps: a few integers and texts."""
        epoch_number, step = divmod(done, self.steps_per_epoch)
        return state_of(
            seed=self.seed,
            number=epoch_number,
            step=step,
            global_batch=self.loader.global_batch,
            index_sha256=self.pool.shards.sha256,
            content_sha256=self._content_sha256,
            shuffle=self.loader.loading.shuffle,
            settings=self._settings,
        )

    @functools.cached_property
    def _content_sha256(self) -> str:
        """Hash of what batches are made of. Other facts of the sets may change during a run."""
        shards = self.pool.shards
        both = content_sha256(shards) + policies_sha256(shards)
        return hashlib.sha256(both.encode()).hexdigest()

    @property
    def _settings(self) -> dict[str, str]:
        """All that decides the order of samples, besides the sets, seed, batch size and shuffle.
        Settings without an effect are left out.
        """
        ratio = self.replay.fraction
        excluded = sorted({*self.replay.exclude_sources}) if ratio else []
        repeats = sorted((name, times) for name, times in self.repeats.items() if times != 1)
        return {
            "data.train": f"{len(self.pool.new)} images",
            "data.repeats": ", ".join(f"{name} {float(times)}" for name, times in repeats)
            or "none",
            "replay.ratio": f"{ratio.numerator}:{ratio.denominator}",
            "replay.exclude_sources": ", ".join(excluded) or "none",
        }

    def resume(self, state: Mapping[str, Any]) -> int:
        """Return the number of finished steps in a saved state.

        Raises:
            OrderError: the state belongs to another order: other shards, another seed, global
                batch, shuffle, `repeats`, replay or order version.
        """
        epoch_number, step = check_state(
            state,
            seed=self.seed,
            global_batch=self.loader.global_batch,
            index_sha256=self.pool.shards.sha256,
            content_sha256=self._content_sha256,
            shuffle=self.loader.loading.shuffle,
            settings=self._settings,
        )
        return epoch_number * self.steps_per_epoch + step


def _add_replayed(counts: np.ndarray, epoch: Epoch, steps: int | None = None) -> None:
    """Add the old samples of an epoch, or of its first steps, to the counts of all samples."""
    seen = slice(None if steps is None else steps * epoch.global_batch)
    np.add.at(counts, epoch.samples[seen][epoch.replayed[seen]], 1)


def evaluation_batches(loader: BatchLoader) -> Iterator[Batch]:
    """Iterate once over the loader's shard set with evaluation preprocessing."""
    epoch = evaluation_epoch(np.arange(len(loader.shards)), loader.global_batch)
    return loader.batches(epoch, eval_params(loader.shards, loader.preprocess))
