"""Compute the features of a frozen backbone for the images of a shard set (packed images), and
write them to a feature store (`model/features/store.py`).

Main entry: `embed_sets(embedder, sets, source, number)` computes the features of one view.

- `embedder`: an `Embedder`, below.
- `sets`: a list of `ShardSet`s, opened by `open_shards()` in `sharding/format.py`.
- `source`: a `FeatureSource` (folder of the store, identity of the backbone, augmentation).
  `source_of()` in `loader.py` makes one from a `ResolvedRecipe` and the `net` and `dtype` of the
  `Embedder`.
- `number`: the number of the view. 0 is the center crop, v >= 1 the augmentation of epoch v - 1.

It writes the missing Arrow files, one per shard, and `backbone.json`, and shows its progress. It
returns the number of images computed on this rank (0 if no file is missing). A shard is written
when it is complete, so an interrupted run resumes there. If another command computes the same
features, it waits for that one. Errors:

- `FeatureError` (a `ValueError`): a feature is not finite, or a set is a selection that leaves out
  samples of a shard.
- `LoadError` (a `ValueError`): the set cannot be loaded, too many images cannot be decoded, or the
  disk or network failed for an image. The shard of that image is not written. An image that cannot
  be decoded is logged.
- `OSError`: a file cannot be written.

`embed(embedder, shards, source, number, files, on_images)` does this for the missing `files` of one
set, which `missing_of()` of the store returns, and reports progress to `on_images`.

The fields of an `Embedder` are passed by keyword:

- `net`: a `Detector` (a torch module) with a frozen backbone, on `device`. It comes from
  `load_network(folder)[0]` of `model/checkpoint.py` (of a checkpoint), or from `build()` of
  `model/network.py` (new).
- `device`: a `torch.device`.
- `dtype`: the precision, such as `torch.float32`.
- `compiled`: whether the network is compiled by torch.compile (default False).
- `loading`: a `Loading` of `pipeline/loading.py` (batch size, decoding).
- `rank`, `world_size`: the number of this process, from 0 (the default), and how many processes
  there are (default 1). Rank r computes every `world_size`-th shard.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

import console
from locks import locked
from model.features.loader import FeatureSource
from model.features.store import (
    FeatureError,
    ShardFile,
    describe_backbone,
    missing_of,
    write_file,
)
from model.network import Detector
from model.score import AT_A_TIME, autocast, evaluating, in_parts
from pipeline.batch import Batch
from pipeline.loader import LoadError, open_loader
from pipeline.loading import Loading
from pipeline.order import evaluation_epoch
from pipeline.params import view_params
from pipeline.read import UNREAD
from sharding.format import ShardSet
from storage import remove_leftovers

AT_A_TIME_ON_GPU = 256
"""Number of images per forward pass on a GPU; `AT_A_TIME` on the CPU. It is constant, because the
shape of the input affects the last bits of a feature.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedder:
    """Settings for computing features: network, device, precision, compilation and loading. Rank
    `rank` of `world_size` computes every `world_size`-th shard.
    """

    net: Detector
    device: torch.device
    dtype: torch.dtype
    loading: Loading
    rank: int = 0
    world_size: int = 1
    compiled: bool = False

    @cached_property
    def features(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the function from images, uint8 (B, 3, H, W), to features, float (B, D). It is
        compiled if `compiled`. On a CPU the weights become constants of the compiled code, in the
        order in memory that its matrix products read (1.3 times as fast in bf16, docs/log.md).
        """
        if not self.compiled:
            return self.net.features
        if self.device.type != "cpu":
            return torch.compile(self.net.features, dynamic=False)
        return torch.compile(self.net.features, dynamic=False, options={"freezing": True})


def embed(
    embedder: Embedder,
    shards: ShardSet,
    source: FeatureSource,
    number: int,
    files: Sequence[ShardFile],
    on_images: Callable[[int], Any],
) -> int:
    """Compute `files`, at least one, of view `number` of a shard set, and return the number of
    images computed. `on_images(n)` is called after each forward pass. Each shard is written when it
    is complete, so that an interrupted run resumes at the next shard.

    Raises:
        LoadError: too many images cannot be decoded, or there are no images.
        FeatureError: a feature is not finite, or `shards` contains only a part of a shard.
    """
    view = source.numbered(number)
    describe_backbone(source.store, source.backbone)
    for folder in {file.path.parent for file in files}:
        remove_leftovers(folder)
    of_shard = shards.rows_of_shards()
    rows = [_whole(of_shard[file.shard_code], shards, file) for file in files]
    params_for = view_params(
        shards, view.augment or {}, view.policy, source.backbone.preprocess, view.seed, number
    )
    left = sum(map(len, rows))
    offsets = shards.column("offset")
    held: list[tuple[np.ndarray, np.ndarray, dict[int, str]]] = []
    loader = open_loader(
        shards,
        preprocess=source.backbone.preprocess,
        loading=embedder.loading,
        device=embedder.device,
    )
    epoch = evaluation_epoch(np.concatenate(rows), loader.global_batch)
    with (
        contextlib.closing(loader),
        # Closed at an error: a generator that is left inside `inference_mode` keeps the mode on.
        contextlib.closing(_features(embedder, loader.batches(epoch, params_for))) as computed,
    ):
        for file, wanted in zip(files, rows, strict=True):
            while sum(len(part[1]) for part in held) < len(wanted):
                held.append(next(computed))
                new = min(len(held[-1][1]), left)  # what fills up the last batch does not count
                left -= new
                on_images(new)
            features, valid, failures = _joined(held)
            count = len(wanted)
            own = {row: reason for row, reason in failures.items() if row < count}
            _name_failures(shards, wanted, own, file)
            write_file(file, offsets[wanted], valid[:count], features[:count], own)
            later = {row - count: reason for row, reason in failures.items() if row >= count}
            held = [(features[count:], valid[count:], later)]
    return sum(map(len, rows))


def _name_failures(
    shards: ShardSet, rows: np.ndarray, failures: Mapping[int, str], file: ShardFile
) -> None:
    """Log the images of a shard that have no features. `failures` maps a position in `rows` to the
    reason.

    Raises:
        LoadError: the disk or the network failed. The image may be read the next time, so the shard
            must not be stored without it.
    """
    for row, reason in failures.items():
        name = shards.name(int(rows[row]))
        if reason.startswith(UNREAD):
            raise LoadError(
                f"{name} {reason}; nothing of {file.path.stem} was stored, run the same command "
                "again when it can be read"
            )
        console.rank_log.warning("%s has no features: %s", name, reason)


def _whole(rows: np.ndarray, shards: ShardSet, file: ShardFile) -> np.ndarray:
    """Return the rows of a shard if they are all of its samples.

    Raises:
        FeatureError: `shards` is a subset that lacks samples of the shard.
    """
    expected = shards.shard_samples[file.shard_code]
    if len(rows) != expected:
        raise FeatureError(
            f"{shards.shards[file.shard_code]} has {expected} samples, but the set has {len(rows)} "
            "of them; compute the features of whole sets"
        )
    return rows


def _features(
    embedder: Embedder, batches: Iterator[Batch]
) -> Generator[tuple[np.ndarray, np.ndarray, dict[int, str]]]:
    """Yield (features float16 (N, D), valid bool (N,), failures row -> reason), in order. The
    features of an image that cannot be decoded are zeros.
    """
    on_gpu = embedder.device.type == "cuda"
    size = AT_A_TIME_ON_GPU if on_gpu else AT_A_TIME
    waiting_valid, waiting_failures, seen = np.empty(0, np.bool_), dict[int, str](), 0

    def noted() -> Iterator[torch.Tensor]:
        nonlocal waiting_valid, seen
        for batch in batches:
            waiting_failures.update({seen + row: reason for row, reason in batch.failures.items()})
            seen += len(batch)
            waiting_valid = np.concatenate([waiting_valid, batch.valid.cpu().numpy()])
            yield batch.images

    done = 0
    with evaluating(embedder.net), torch.inference_mode():
        for images in in_parts(noted(), size):
            with autocast(embedder.device, embedder.dtype):
                features = embedder.features(images).to(torch.float16).cpu().numpy()
            valid, waiting_valid = waiting_valid[:size], waiting_valid[size:]
            features = features[: len(valid)]
            features[~valid] = 0
            failures = {
                row - done: waiting_failures.pop(row)
                for row in sorted(waiting_failures)
                if row < done + len(valid)
            }
            done += len(valid)
            yield features, valid, failures


def _joined(
    parts: list[tuple[np.ndarray, np.ndarray, dict[int, str]]],
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Concatenate consecutive parts."""
    failures: dict[int, str] = {}
    first = 0
    for _features_of, valid, of_part in parts:
        failures |= {first + row: reason for row, reason in of_part.items()}
        first += len(valid)
    features = np.concatenate([part[0] for part in parts])
    return features, np.concatenate([part[1] for part in parts]), failures


def embed_sets(
    embedder: Embedder, sets: Sequence[ShardSet], source: FeatureSource, number: int
) -> int:
    """Compute the missing features of a view of some sets, with progress; return the number of
    images computed on this rank.
    """
    count = first = 0
    for shards in sets:
        # Shards are numbered through all sets; else rank 0 would compute every set of one shard.
        here = replace(embedder, rank=(embedder.rank - first) % embedder.world_size)
        first += len(shards.shards)
        missing = partial(
            missing_of, source.store, source.backbone, shards, source.numbered(number),
            rank=here.rank, world_size=here.world_size,
        )  # fmt: skip
        if not (own := missing()):
            continue
        label = f"embedding {shards.describe()}, view {number}"
        waiting = f"{label}: another command is computing these features; waiting for it"
        folder = own[0].path.parent
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / f".rank-{here.rank}-of-{here.world_size}.lock"
        with locked(lock, waiting=waiting, remove=True):
            if not (own := missing()):  # the other command has computed them
                continue
            images = sum(shards.shard_samples[file.shard_code] for file in own)
            console.log.info(
                "%s: features of %d images in %d shards are missing", label, images, len(own)
            )
            with console.progress(label, images, shown=embedder.rank == 0) as advance:
                count += embed(here, shards, source, number, own, advance)
    return count
