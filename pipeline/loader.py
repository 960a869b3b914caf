"""Open a shard set as batches: choose a backend and say why, read, sample parameters, decode, hand
over."""

import contextlib
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipeline.augment import (
    AugmentBatch,
    AugmentPolicy,
    PolicyTable,
    Preprocess,
    SampleKeys,
    blank,
    center_crop_params,
    sample_params,
)
from pipeline.batch import PLACEHOLDER, Batch, Pixels, Request
from pipeline.monitor import STALL_WARNING_S, Watchdog, WorkerStatus
from pipeline.order import Epoch, Shuffle
from pipeline.pairs import Partners, partners_of
from pipeline.pil import decode_request
from pipeline.read import ReadError, ShardReader
from pipeline.remote import Cache
from sharding.format import ShardSet
from storage import cores

if TYPE_CHECKING:
    from pipeline.dali import DaliBackend

Backend = Literal["auto", "dali", "pil"]
ParamsFor = Callable[[np.ndarray, np.ndarray], AugmentBatch]

READ_THREADS = 8
"""Reads from an address in flight at a time, in each process."""

MAX_BAD_SHARE = 0.05
MIN_SEEN = 200
"""A run stops when more than this share of at least `MIN_SEEN` samples cannot be decoded."""


class LoadError(ValueError):
    """Batches cannot be had; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How batches are made.

    `batch_size` is per rank. `num_workers` are processes (pil) or threads (dali): 0 decodes in the
    calling process, -1 takes one per processor core, up to 16 (with dali on a GPU fewer, if the
    GPU decodes most of the images). `cache` and `cache_gb` are for shards at an address.
    """

    batch_size: int = 32
    num_workers: int = -1
    backend: Backend = "auto"
    shuffle: Shuffle = "global"
    verify_checksums: bool = False
    cache: str = "data/cache"
    cache_gb: float = 20.0
    stall_warning_s: float = STALL_WARNING_S

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.num_workers < -1:
            raise ValueError(f"num_workers must be at least -1, got {self.num_workers}")
        if self.cache_gb <= 0 or self.stall_warning_s <= 0:
            raise ValueError("cache_gb and stall_warning_s must be more than 0")


def choose_backend(asked: Backend, device: torch.device) -> tuple[str, str]:
    """The backend to use, and why.

    Raises:
        LoadError: DALI was asked for and is not installed.
    """
    have_dali = _is_installed("nvidia.dali")
    if asked == "dali" and not have_dali:
        raise LoadError("backend dali: nvidia-dali-cuda120 is not installed (Linux only)")
    if asked != "auto":
        return asked, "asked for"
    if device.type != "cuda":
        return "pil", "no CUDA device"
    if not have_dali:
        return "pil", "nvidia-dali-cuda120 is not installed"
    return "dali", "CUDA device and DALI found"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package it would be in
        return False


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

    def __call__(self, samples: np.ndarray, repeat_index: np.ndarray) -> AugmentBatch:
        """Sample the parameters of these samples, each for the stated time in this epoch."""
        partners = self.partners and tuple(column[samples] for column in self.partners)
        return sample_params(
            self.policies, self.sources[samples], self.preprocess,
            self.widths[samples], self.heights[samples],
            SampleKeys(self.seed, self.epoch, samples, repeat_index), partners,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class EvalParams:
    """Evaluation parameters: the same center crop of every image."""

    widths: np.ndarray
    heights: np.ndarray
    preprocess: Preprocess

    def __call__(self, samples: np.ndarray, _repeat_index: np.ndarray) -> AugmentBatch:
        """The center crop of these samples."""
        return center_crop_params(self.preprocess, self.widths[samples], self.heights[samples])


def train_params(
    shards: ShardSet,
    augment: Mapping[str, AugmentPolicy],
    policy: str,
    preprocess: Preprocess,
    seed: int,
    epoch: int,
) -> TrainParams:
    """Training parameters: each source by its own policy where the index names one, else by
    `policy`.

    Raises:
        LoadError: a source keeps a policy that `augment` does not describe.
    """
    codes, names = shards.codes("source")
    policies = []
    for name in names:
        wanted = str(shards.sources[name]["policy"]) or policy
        if wanted not in augment:
            raise LoadError(
                f"source {name} is augmented by policy {wanted!r}, but the recipe describes "
                f"{', '.join(augment) or 'none'}; add [augment.{wanted}]"
            )
        policies.append(augment[wanted])
    size = shards.column("width"), shards.column("height")
    paired = tuple(
        name for name, policy in zip(names, policies, strict=True) if policy.match_pair_jpeg
    )
    partners = partners_of(shards, paired) if paired else None
    return TrainParams(PolicyTable(policies), codes, *size, preprocess, seed, epoch, partners)


def eval_params(shards: ShardSet, preprocess: Preprocess) -> EvalParams:
    """Evaluation parameters of a shard set."""
    return EvalParams(shards.column("width"), shards.column("height"), preprocess)


@dataclass(frozen=True, eq=False)
class Loader:
    """Batches of one shard set on one rank; made by `open_loader`."""

    shards: ShardSet
    preprocess: Preprocess
    loading: Loading
    device: torch.device
    backend: str
    reason: str
    rank: int = 0
    world_size: int = 1

    @property
    def global_batch(self) -> int:
        """Samples per step over all ranks."""
        return self.loading.batch_size * self.world_size

    def batches(self, epoch: Epoch, params_for: ParamsFor, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from step `start` on, in order.

        Raises:
            LoadError: too many samples cannot be decoded.
        """
        if epoch.global_batch != self.global_batch:
            raise LoadError(f"epoch of {epoch.global_batch}, loader of {self.global_batch}")
        seen, bad = 0, []
        status = self._status
        watching = Watchdog(status.describe, self.loading.stall_warning_s)
        with _named_worker_death(), watching as watchdog:
            decoded = self._decode(epoch, params_for, start)
            for step in range(start, epoch.steps):
                with watchdog.waiting(step):
                    pixels = next(decoded)
                batch = self._batch(epoch, step, pixels)
                seen += len(batch)
                bad += self.name_failures(batch)
                if seen >= MIN_SEEN and len(bad) > MAX_BAD_SHARE * seen:
                    raise LoadError(
                        f"{len(bad)} of {seen} samples cannot be decoded, more than "
                        f"{MAX_BAD_SHARE:.0%}; the first: {bad[0]}"
                    )
                yield batch

    def name_failures(self, batch: Batch) -> list[str]:
        """One line per sample of the batch that could not be decoded: where it is, and why."""
        return [
            f"{self.shards.name(batch.samples[row])}: {reason}"
            for row, reason in batch.failures.items()
        ]

    def _decode(self, epoch: Epoch, params_for: ParamsFor, start: int) -> Iterator[Pixels]:
        """Pixels of each step, by the chosen backend."""
        requests = _Requests(self, epoch, params_for)
        steps = range(start, epoch.steps)
        if self.backend == "dali":
            yield from self._dali.run(map(requests.make, steps), start)
            return
        loader = DataLoader(
            requests,
            sampler=steps,
            batch_size=None,
            num_workers=self._workers,
            pin_memory=self.device.type == "cuda",
            collate_fn=_unchanged,
            # Else it takes a number from torch's global generator each time it starts, and a run
            # that resumes in mid-epoch would take its dropout from another place.
            generator=torch.Generator(),
        )
        before = self._status.made()
        for taken, pixels in enumerate(loader, start=1):
            ready = self._status.made() - before - taken
            yield replace(pixels, timing=replace(pixels.timing, ready=ready))

    @functools.cached_property
    def _status(self) -> WorkerStatus:
        if self.backend == "dali":
            return self._dali.status
        return WorkerStatus([f"worker {index}" for index in range(max(1, self._workers))])

    @property
    def _workers(self) -> int:
        return self.loading.num_workers if self.loading.num_workers >= 0 else min(16, cores())

    @functools.cached_property
    def _dali(self) -> "DaliBackend":
        from pipeline.dali import DaliBackend

        # One thread per core beside a GPU too: the JPEG step, PNG and WebP run on the host. On an
        # H200 with 16 cores, 4 threads gave 2,338 images/s and 16 gave 3,303 (docs/log.md).
        size, batch = self.preprocess.crop_size, self.loading.batch_size
        return DaliBackend(size, batch, self.device, max(1, self._workers))

    def _batch(self, epoch: Epoch, step: int, pixels: Pixels) -> Batch:
        rows = epoch.positions(step, self.rank, self.world_size)
        samples = epoch.samples[rows]
        valid = epoch.valid[rows].copy()
        valid[list(pixels.failures)] = False
        labels = self.shards.column("label")[samples].astype(np.int64)
        sources = self.shards.codes("source")[0][samples]
        return Batch(
            images=pixels.images.to(self.device, non_blocking=True).permute(0, 3, 1, 2),
            labels=torch.from_numpy(labels).to(self.device, non_blocking=True),
            valid=torch.from_numpy(valid).to(self.device, non_blocking=True),
            samples=samples,
            sources=sources,
            replayed=epoch.replayed[rows],
            failures=pixels.failures,
            timing=pixels.timing,
        )


@contextlib.contextmanager
def _named_worker_death() -> Iterator[None]:
    """When a worker dies torch raises a plain RuntimeError, wherever the main thread is, or the
    pipe to it breaks in the middle of a batch.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LoadError(
            f"a loading worker died ({reason}); if memory ran out, use a smaller "
            "loading.num_workers or loading.batch_size"
        ) from error


SAMPLED_TOGETHER = 1024
"""Samples whose parameters are sampled at once."""


class _Requests(Dataset):
    """What each step asks of a backend; as a dataset, each item is a step already decoded."""

    def __init__(self, loader: Loader, epoch: Epoch, params_for: ParamsFor):
        self.epoch, self.params_for = epoch, params_for
        self.rank, self.world_size, self.size = (
            loader.rank,
            loader.world_size,
            loader.preprocess.crop_size,
        )
        loading = loader.loading
        self.reader = ShardReader(
            loader.shards,
            verify_checksums=loading.verify_checksums,
            threads=READ_THREADS,
            cache=Cache(folder=Path(loading.cache), limit=round(loading.cache_gb * 1e9)),
        )
        self.formats = loader.shards.codes("format")
        self.orientations = loader.shards.column("orientation")
        self.status = loader._status
        self._sampled: dict[int, AugmentBatch] = {}

    def __len__(self) -> int:
        return self.epoch.steps

    def __getitem__(self, step: int) -> Pixels:
        worker = get_worker_info()
        worker_id = worker.id if worker else 0
        with self.status.at(worker_id, "reading", step):
            request = self.make(step)
        with self.status.at(worker_id, "decoding", step):
            pixels = decode_request(request, self.size)
        self.status.finished(worker_id)
        return pixels

    def make(self, step: int) -> Request:
        """Read the samples of one step and sample the parameters of each."""
        began = time.perf_counter()
        samples = self.epoch.samples[self.epoch.positions(step, self.rank, self.world_size)]
        params = self._params(step)
        images = self.reader.read(samples)
        codes, names = self.formats
        formats = [names[code] for code in codes[samples].tolist()]
        orientations = self.orientations[samples].tolist()
        failures = {row: str(e) for row, e in enumerate(images) if isinstance(e, ReadError)}
        data = [PLACEHOLDER[0] if isinstance(image, ReadError) else image for image in images]
        for row in failures:
            _data, formats[row], orientations[row] = PLACEHOLDER
        if failures:
            params = blank(params, list(failures))
        read_s = time.perf_counter() - began
        return Request(data, formats, orientations, params, failures, read_s)

    def _params(self, step: int) -> AugmentBatch:
        """The parameters of one step, made with those of the next ones that this process will be
        asked
        for: thirty at a time cost ten times as much each as a thousand do.
        """
        if step not in self._sampled:
            worker = get_worker_info()
            batch = self.epoch.global_batch // self.world_size
            stride = worker.num_workers if worker else 1
            ahead = step + stride * max(1, SAMPLED_TOGETHER // batch)
            steps = range(step, min(ahead, self.epoch.steps), stride)
            rows = [
                self.epoch.positions(next_step, self.rank, self.world_size) for next_step in steps
            ]
            samples, repeat_index = (
                np.concatenate([column[row] for row in rows])
                for column in (self.epoch.samples, self.epoch.repeat_index)
            )
            params = self.params_for(samples, repeat_index)
            self._sampled = {
                next_step: params.take(slice(index * batch, (index + 1) * batch))
                for index, next_step in enumerate(steps)
            }
        return self._sampled.pop(step)


def _unchanged(item: Any) -> Any:
    return item


def open_loader(
    shards: ShardSet,
    *,
    preprocess: Preprocess,
    loading: Loading,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """A loader over `shards`; `backend` and `reason` say what decodes, and why.

    Raises:
        LoadError: the backend that was asked for is not there.
    """
    backend, reason = choose_backend(loading.backend, device)
    return Loader(shards, preprocess, loading, device, backend, reason, rank, world_size)
