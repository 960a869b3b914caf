"""Load a shard set (tars of images with an index) as batches of decoded and augmented images on a
device.

Main entry: `open_loader(shards, *, preprocess, loading, device, rank, world_size)` checks the
lengths of the tars on this machine, chooses the backend that decodes and augments ("dali", or "pil"
for Pillow) and returns a `Loader`.

- `shards`: the `ShardSet` that `sharding.format.open_shards([Path(folder)])` returns.
- `preprocess`: a `Preprocess` (pipeline/preprocess.py); its `shape` is the (height, width) of the
  images.
- `loading`: the settings, `Loading()` or such as `Loading(batch_size=64)` (pipeline/loading.py).
- `device`: the `torch.device` on which the images are used.
- `rank`, `world_size`: this process's rank and the number of ranks (defaults 0 and 1).

`Loader.batches(epoch, params_for, start)` yields a `Batch` for each step: images uint8 (B, 3,
height, width), labels and more (pipeline/batch.py). An image that cannot be decoded is black and
named in `Batch.failures`.

- `epoch`: the order of the samples, an `Epoch` of `training_epoch()` or `evaluation_epoch()`
  (pipeline/order.py), made with `global_batch=loader.global_batch`.
- `params_for`: what `train_params()` or `eval_params()` (pipeline/params.py) returns. It is a
  function of two arrays: row numbers, and how often each of these rows came before in the epoch. It
  returns their augmentation parameters.
- `start`: the step to begin with (default 0).

`Loader.close()` frees what the backend keeps for the next epoch: with DALI a pipeline, which has
memory on the GPU. Whoever opens a loader closes it, such as with `contextlib.closing`.

`open_loader()` raises `LoadError` (a `ValueError`) if the backend is not installed, a tar is
missing or has another length, or shared memory is too small even for one worker (only with Pillow
and `num_workers` other than 0). The errors of `batches()` come with the first batch or a later one:

- `LoadError`: the batch size of `epoch` is not `loader.global_batch`.
- `LoadError`: a worker died, or no batch came in `loading.stall_error_s` seconds (with Pillow and
  `num_workers` 0, there is no such limit).
- `LoadError`: more than 5 % of the samples so far cannot be decoded. This is checked once
  `MIN_SEEN` samples were seen, and at the end of a whole epoch. One bad sample alone is no error.
- `LoadError`: too many files are open. `RuntimeError`: the GPU fails.

`choose_backend(asked, device)` returns (backend, reason) for "auto", "dali" or "pil", and raises
`LoadError` for another text; `check_shards(shards)` is the check of the tars.
"""

import contextlib
import functools
import importlib.util
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from devices import cores
from escape import too_many_files
from pipeline.augment import AugmentBatch, blank
from pipeline.batch import PLACEHOLDER, Batch, DecodedBatch, LoadError, Request, labeled_batch
from pipeline.loading import Backend, Loading
from pipeline.monitor import (
    WAITS,
    StallError,
    Watchdog,
    WorkerStatus,
    stalled,
)
from pipeline.order import Epoch
from pipeline.params import ParamsFor
from pipeline.pil import decode_request
from pipeline.preprocess import Preprocess
from pipeline.read import ReadError, ShardReader, damaged_shards
from pipeline.remote import Cache
from pipeline.workers import (
    SHARED_MEMORY,
    fitting_workers,
    free_shared_memory,
    garbage_held,
    killed_at_the_end,
    stop_signals_held,
)
from sharding.format import ShardSet
from storage import local_path

if TYPE_CHECKING:
    from pipeline.dali import DaliBackend

log = logging.getLogger("ai_images_detector.rank")  # `rank_log` of console.py

READ_THREADS = 8
"""Concurrent reads from an address, in each process."""

TIMED_OUT = "DataLoader timed out"
"""Text in the `RuntimeError` of torch's iterator for a batch that does not come in time."""

MAX_BAD_SHARE = 0.05
MIN_SEEN = 200
"""A run stops when more than `MAX_BAD_SHARE` of at least `MIN_SEEN` samples cannot be decoded, or
more than `MAX_BAD_SHARE` of a whole epoch of any length. A single bad sample never stops a run.
"""


def choose_backend(asked: Backend, device: torch.device) -> tuple[str, str]:
    """Return the backend to use, "dali" or "pil", and the reason.

    `asked` "auto" chooses "dali" with a CUDA device if DALI is installed, else "pil".

    Raises:
        LoadError: `asked` is no `Backend`, or it is "dali", but DALI is not installed.
    """
    if asked not in get_args(Backend):
        raise LoadError(f"no such backend: {asked}; use auto, dali or pil")
    have_dali = _is_installed("nvidia.dali")
    if asked == "dali" and not have_dali:
        raise LoadError(
            "backend dali: nvidia-dali-cuda120 is not installed (Linux only); pip install it, or "
            "use the backend pil"
        )
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
    except ModuleNotFoundError:  # the parent package is missing
        return False


@dataclass(frozen=True, eq=False)
class Loader:
    """Makes batches of one shard set on one rank. Create it with `open_loader`.

    `backend` is "dali" or "pil", `reason` says why that one was chosen.
    """

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
        """Yield the batches of `epoch` from step `start` on, in order.

        Raises:
            LoadError: too many samples cannot be decoded, a worker died, or no batch came in time.
        """
        if epoch.global_batch != self.global_batch:
            raise LoadError(
                f"the epoch has a global batch of {epoch.global_batch}, the loader of "
                f"{self.global_batch}; make both with the same batch size and number of ranks"
            )
        seen, bad = 0, []
        with (
            self._named_failures(),
            Watchdog(self._status.describe, self.loading.stall_warning_s) as watchdog,
        ):
            decoded = self._decode(epoch, params_for, start)
            for step in range(start, epoch.steps):
                with watchdog.waiting(step):
                    pixels = next(decoded)
                batch = self._batch(epoch, step, pixels)
                counts = epoch.valid[epoch.positions(step, self.rank, self.world_size)]
                seen += int(counts.sum())
                bad += self.name_failures(batch)
                whole = start == 0 and step == epoch.steps - 1
                if (seen >= MIN_SEEN or whole) and len(bad) > max(1, MAX_BAD_SHARE * seen):
                    raise LoadError(
                        f"{len(bad)} of {seen} samples cannot be decoded, more than "
                        f"{MAX_BAD_SHARE:.0%}; the first: {bad[0]}"
                    )
                yield batch
            next(decoded, None)  # end the run, so that the backend keeps its pipeline

    def close(self) -> None:
        """Free what the backend keeps for its next epoch, such as memory on the GPU."""
        if "_dali" in vars(self):  # created on first use, imports DALI
            self._dali.close()

    def name_failures(self, batch: Batch) -> list[str]:
        """Return one line for each sample of the batch that could not be decoded: its name and the
        reason.
        """
        return [
            f"{self.shards.name(batch.samples[row])}: {reason}"
            for row, reason in batch.failures.items()
        ]

    @contextlib.contextmanager
    def _named_failures(self) -> Iterator[None]:
        """Turn torch's errors about dead or stalled workers into a `LoadError`, and an `OSError` of
        a worker, which comes with its traceback, into one line.

        If a worker dies, torch raises a plain RuntimeError, at any line of the main thread, or the
        worker's pipe breaks in the middle of a batch. If no worker gives a batch in time, or the
        main process has no descriptor left for a batch, torch raises another RuntimeError.
        """
        try:
            yield
        except StallError as error:
            raise LoadError(str(error)) from error
        except (RuntimeError, OSError, EOFError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            of_worker = lines[0].startswith("Caught ")  # a worker's traceback, ends with the error
            reason = lines[-1] if of_worker else lines[0]
            if TIMED_OUT in str(error):
                status = self._status.describe()
                raise LoadError(stalled(self.loading.stall_error_s, status)) from error
            if advice := too_many_files(error):
                raise LoadError(advice) from error
            if isinstance(error, OSError) and of_worker:
                raise OSError(reason.partition(": ")[2] or reason) from error
            if isinstance(error, OSError) and not isinstance(error, ConnectionError):
                raise
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise LoadError(
                f"a loading worker died ({reason}); if memory ran out, use a smaller "
                "loading.num_workers or loading.batch_size"
            ) from error

    def _decode(self, epoch: Epoch, params_for: ParamsFor, start: int) -> Iterator[DecodedBatch]:
        """Yield the pixels of each step, decoded by the chosen backend."""
        requests = _Requests(self, epoch, params_for)
        steps = range(start, epoch.steps)
        if self.backend == "dali":
            yield from self._dali.run(map(requests.make, steps), start)
            return
        loader = _DataLoader(
            requests,
            sampler=steps,
            batch_size=None,
            num_workers=self._workers,
            pin_memory=self.device.type == "cuda",
            collate_fn=_unchanged,
            multiprocessing_context=killed_at_the_end() if self._workers else None,
            timeout=self.loading.stall_error_s / WAITS if self._workers else 0,
            # Without its own generator, each start of a DataLoader uses up a number of torch's
            # global generator, so dropout would differ in a run that is resumed within an epoch.
            generator=torch.Generator(),
        )
        before = self._status.made()
        # A worker must not receive a stop signal while it starts.
        with stop_signals_held(), garbage_held():
            decoded = iter(loader)
        for taken, pixels in enumerate(_patient(decoded), start=1):
            ready = self._status.made() - before - taken
            yield replace(pixels, timing=replace(pixels.timing, ready=ready))

    @functools.cached_property
    def _status(self) -> WorkerStatus:
        if self.backend == "dali":
            return self._dali.status
        names = [f"worker {index}" for index in range(max(1, self._workers))]
        return WorkerStatus(names, shared=self._workers > 0)

    @functools.cached_property
    def _workers(self) -> int:
        """Number of loading processes (pil) or threads (dali).

        Raises:
            LoadError: workers were requested, but shared memory has no room for even one.
        """
        asked = self.loading.num_workers
        wanted = asked if asked >= 0 else min(16, cores())
        if self.backend == "dali" or not wanted:
            return wanted
        if wanted > cores():
            _warn_of_few_cores(wanted, cores())
        batch_bytes = 3 * self.loading.batch_size * math.prod(self.preprocess.shape)
        free = free_shared_memory()
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        fitting = fitting_workers(wanted, batch_bytes, None if free is None else free // ranks)
        if fitting == wanted:
            return wanted
        shortage = (
            f"{SHARED_MEMORY}, through which loading workers pass batches of "
            f"{batch_bytes / 2**20:.1f} MiB, "
            + (f"has {free / 2**20:.0f} MiB free" if free else "cannot be written")
        )
        advice = "give it more (docker run --shm-size=8g) or use a smaller loading.batch_size"
        if not fitting and asked > 0:
            raise LoadError(
                f"{shortage}, too little for even one of {asked} workers; {advice}, or decode in "
                "this process with loading.num_workers=0"
            )
        log.warning("%s: using %d of %d loading workers; %s", shortage, fitting, wanted, advice)
        return fitting

    @functools.cached_property
    def _dali(self) -> "DaliBackend":
        from pipeline.dali import DaliBackend

        # With a GPU too, one thread per core: the JPEG step, PNG and WebP run on the CPU. Whether 4
        # threads would be enough on a GPU is not measured yet (docs/log.md, 2026-12-01).
        return DaliBackend(
            self.preprocess.shape,
            self.loading.batch_size,
            self.device,
            max(1, self._workers),
            stall_error_s=self.loading.stall_error_s,
        )

    def _batch(self, epoch: Epoch, step: int, pixels: DecodedBatch) -> Batch:
        images = pixels.images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        rows = epoch.positions(step, self.rank, self.world_size)
        return labeled_batch(self.shards, epoch, rows, images, pixels.failures, pixels.timing)


@functools.cache  # warn once, not for each set
def _warn_of_few_cores(workers: int, cores: int) -> None:
    log.warning(
        "loading.num_workers is %d, more than the cores that this process may use (%d), so that "
        "loading is no faster; -1 takes one worker for each core", workers, cores,
    )  # fmt: skip


class _DataLoader(DataLoader):
    """`DataLoader` without torch's own warning of too few cores."""

    def check_worker_number_rationality(self) -> None:
        """Check nothing: `Loader` warns."""


SAMPLED_TOGETHER = 1024
"""Samples whose parameters are sampled in one call."""


class _Requests(Dataset):
    """Reads the samples of a step and samples their parameters. As a torch dataset, item i is step
    i, decoded.
    """

    def __init__(self, loader: Loader, epoch: Epoch, params_for: ParamsFor):
        self.epoch, self.params_for = epoch, params_for
        self.rank, self.world_size = loader.rank, loader.world_size
        self.shape = loader.preprocess.shape
        loading = loader.loading
        self.reader = ShardReader(
            loader.shards,
            verify_checksums=loading.verify_checksums,
            threads=READ_THREADS,
            cache=Cache(folder=local_path(loading.cache), limit=round(loading.cache_gb * 1e9)),
        )
        self.formats = loader.shards.codes("format")
        self.orientations = loader.shards.column("orientation")
        self.status = loader._status
        self._sampled: dict[int, AugmentBatch] = {}
        _ = epoch.repeat_index  # compute it here, not in each worker

    def __len__(self) -> int:
        return self.epoch.steps

    def __getitem__(self, step: int) -> DecodedBatch:
        worker = get_worker_info()
        worker_id = worker.id if worker else 0
        with self.status.at(worker_id, "reading", step):
            request = self.make(step)
        with self.status.at(worker_id, "decoding", step):
            pixels = decode_request(request, self.shape)
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
        """Return the parameters of one step. The same call samples the parameters of this process's
        next steps: thirty samples per call cost ten times as much per sample as a thousand.
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


def _patient(decoded: Iterator[DecodedBatch]) -> Iterator[DecodedBatch]:
    """Yield the items of torch's iterator. Repeat a wait that timed out, up to `WAITS` times."""
    waits = 0
    while True:
        try:
            pixels = next(decoded)
        except StopIteration:
            return
        except RuntimeError as error:
            waits += 1
            if waits == WAITS or TIMED_OUT not in str(error):
                raise
        else:
            waits = 0
            yield pixels


def open_loader(
    shards: ShardSet,
    *,
    preprocess: Preprocess,
    loading: Loading,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """Create a loader of `shards` for one rank and choose its backend.

    Raises:
        LoadError: the requested backend is not installed, a tar is missing or has another length
            than in the index, or shared memory has no room for the requested workers.
    """
    backend, reason = choose_backend(loading.backend, device)
    check_shards(shards)
    loader = Loader(shards, preprocess, loading, device, backend, reason, rank, world_size)
    _ = loader._workers  # too little shared memory must be an error here
    return loader


def check_shards(shards: ShardSet) -> None:
    """Check that the tars of a shard set on this machine exist and have the lengths in the index.

    Raises:
        LoadError: a tar is missing or has another length.
    """
    if damaged := damaged_shards(shards):
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise LoadError(
            f"{damaged[0]}{more}; if the set was built meanwhile, run this command again; else "
            "build or copy the set again, then check all of it with `python -m sharding verify`"
        )
