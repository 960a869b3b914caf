"""Open a shard set as batches: choose a backend and say why, read, draw, decode, hand over."""

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.augment import Augment, Draw, View, centre, draw, rng_for
from pipeline.batch import PLACEHOLDER, Batch, Pixels, Request
from pipeline.order import Epoch, Shuffle
from pipeline.pil import decode_request
from pipeline.read import ReadError, ShardReader
from sharding.format import ShardSet

Backend = Literal["auto", "dali", "pil"]
DrawSample = Callable[[int], Draw]

MAX_BAD_SHARE = 0.05
MIN_SEEN = 200
"""A run stops when more than this share of at least `MIN_SEEN` samples cannot be decoded."""


class LoadError(ValueError):
    """Batches cannot be had; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How batches are made.

    `batch_size` is per rank. `workers` are processes (pil) or threads (dali): 0 decodes in the
    calling process, -1 takes one per processor core, up to 16.
    """

    batch_size: int = 32
    workers: int = -1
    backend: Backend = "auto"
    shuffle: Shuffle = "global"
    check_hashes: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.workers < -1:
            raise ValueError(f"workers must be at least -1, got {self.workers}")


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
class DrawByLaw:
    """Training draws of one epoch; made by `draw_by_law`. An object, so that workers can be sent it
    where they are not forked.
    """

    laws: Sequence[Augment]  # by source code
    sources: np.ndarray
    widths: np.ndarray
    heights: np.ndarray
    view: View
    seed: int
    epoch: int

    def __call__(self, sample: int) -> Draw:
        """Roll the dice of one sample."""
        law = self.laws[self.sources[sample]]
        size = int(self.widths[sample]), int(self.heights[sample])
        return draw(law, self.view, *size, rng_for(self.seed, self.epoch, sample))


@dataclass(frozen=True, eq=False)
class DrawCentre:
    """Evaluation draws: the same view of every image, without dice."""

    widths: np.ndarray
    heights: np.ndarray
    view: View

    def __call__(self, sample: int) -> Draw:
        """What the view shows of one sample."""
        return centre(self.view, int(self.widths[sample]), int(self.heights[sample]))


def draw_by_law(
    shards: ShardSet, augment: Mapping[str, Augment], law: str, view: View, seed: int, epoch: int
) -> DrawByLaw:
    """Training draws: each source by its own law where the index names one, else by `law`.

    Raises:
        LoadError: a source keeps a law that `augment` does not describe.
    """
    codes, names = shards.codes("source")
    laws = []
    for name in names:
        wanted = str(shards.sources[name]["law"]) or law
        if wanted not in augment:
            raise LoadError(
                f"source {name} is augmented by law {wanted!r}, but the recipe describes "
                f"{', '.join(augment) or 'none'}; add [augment.{wanted}]"
            )
        laws.append(augment[wanted])
    size = shards.column("width"), shards.column("height")
    return DrawByLaw(laws, codes, *size, view, seed, epoch)


def draw_centre(shards: ShardSet, view: View) -> DrawCentre:
    """Evaluation draws of a shard set."""
    return DrawCentre(shards.column("width"), shards.column("height"), view)


@dataclass(frozen=True, eq=False)
class Loader:
    """Batches of one shard set on one rank; made by `open_loader`."""

    shards: ShardSet
    view: View
    loading: Loading
    device: torch.device
    backend: str
    reason: str
    rank: int = 0
    world: int = 1

    @property
    def global_batch(self) -> int:
        """Samples per step over all ranks."""
        return self.loading.batch_size * self.world

    def batches(self, epoch: Epoch, draw_sample: DrawSample, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from step `start` on, in order.

        Raises:
            LoadError: too many samples cannot be decoded.
        """
        if epoch.global_batch != self.global_batch:
            raise LoadError(f"epoch of {epoch.global_batch}, loader of {self.global_batch}")
        seen, bad = 0, []
        for step, pixels in zip(
            range(start, epoch.steps), self._decode(epoch, draw_sample, start), strict=True
        ):
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

    def _decode(self, epoch: Epoch, draw_sample: DrawSample, start: int) -> Iterator[Pixels]:
        """Pixels of each step, by the chosen backend."""
        requests = _Requests(self, epoch, draw_sample)
        steps = range(start, epoch.steps)
        if self.backend == "dali":
            yield from self._dali.run(map(requests.make, steps))
            return
        yield from DataLoader(
            requests,
            sampler=steps,
            batch_size=None,
            num_workers=self._workers,
            pin_memory=self.device.type == "cuda",
            collate_fn=_unchanged,
            # Else it takes a number from torch's global generator each time it starts, and a run
            # that resumes in mid-epoch would draw its dropout from another place.
            generator=torch.Generator(),
        )

    @property
    def _workers(self) -> int:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        return self.loading.workers if self.loading.workers >= 0 else min(16, cores)

    @functools.cached_property
    def _dali(self):
        from pipeline.dali import DaliBackend

        threads = max(1, self._workers)
        return DaliBackend(self.view.size, self.loading.batch_size, self.device, threads)

    def _batch(self, epoch: Epoch, step: int, pixels: Pixels) -> Batch:
        rows = epoch.positions(step, self.rank, self.world)
        samples = epoch.samples[rows]
        valid = epoch.valid[rows].copy()
        valid[list(pixels.failures)] = False
        labels = self.shards.column("label")[samples].astype(np.int64)
        return Batch(
            images=pixels.images.to(self.device, non_blocking=True).permute(0, 3, 1, 2),
            labels=torch.from_numpy(labels).to(self.device, non_blocking=True),
            valid=torch.from_numpy(valid).to(self.device, non_blocking=True),
            samples=samples,
            replayed=epoch.replayed[rows],
            failures=pixels.failures,
        )


class _Requests(Dataset):
    """What each step asks of a backend; as a dataset, each item is a step already decoded."""

    def __init__(self, loader: Loader, epoch: Epoch, draw_sample: DrawSample):
        self.epoch, self.draw_sample = epoch, draw_sample
        self.rank, self.world, self.size = loader.rank, loader.world, loader.view.size
        self.reader = ShardReader(loader.shards, loader.loading.check_hashes)
        self.formats = loader.shards.codes("format")
        self.orientations = loader.shards.column("orientation")

    def __len__(self) -> int:
        return self.epoch.steps

    def __getitem__(self, step: int) -> Pixels:
        return decode_request(self.make(step), self.size)

    def make(self, step: int) -> Request:
        """Read the samples of one step and draw for each."""
        samples = self.epoch.samples[self.epoch.positions(step, self.rank, self.world)].tolist()
        codes, names = self.formats
        data, formats, orientations, draws, failures = [], [], [], [], {}
        for row, sample in enumerate(samples):
            try:
                entry = (
                    self.reader.read(sample),
                    names[codes[sample]],
                    int(self.orientations[sample]),
                    self.draw_sample(sample),
                )
            except ReadError as error:
                entry, failures[row] = PLACEHOLDER, str(error)
            for column, value in zip((data, formats, orientations, draws), entry, strict=True):
                column.append(value)
        return Request(data, formats, orientations, draws, failures)


def _unchanged(pixels: Pixels) -> Pixels:
    return pixels


def open_loader(
    shards: ShardSet,
    *,
    view: View,
    loading: Loading,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """A loader over `shards`; `backend` and `reason` say what decodes, and why.

    Raises:
        LoadError: the backend that was asked for is not there.
    """
    backend, reason = choose_backend(loading.backend, device)
    return Loader(shards, view, loading, device, backend, reason, rank, world)
