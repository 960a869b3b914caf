"""Load batches of stored features in place of images, with the order, labels and padding of the
image loader (`pipeline/loader.py`).

Main entries: `FeatureLoader(shards, source, loading, device, rank, world_size)` and its
`batches(epoch, params_for, start)`.

- `shards`: a `ShardSet` (packed images), opened by `open_shards()` in `sharding/format.py`.
- `source`: a `FeatureSource` (folder of the store, identity of the backbone, augmentation), made by
  `source_of()` or `source_of_checkpoint()`, below.
- `loading`: a `Loading`, of which only `batch_size`, the batch size per rank, is used.
- `device`: the torch device of the batches.
- `rank`, `world_size`: this process's rank (default 0) and the number of processes (default 1).
- `epoch`: the order of the samples, an `Epoch` from `training_epoch()` or `evaluation_epoch()` in
  `pipeline/order.py`, made with the loader's `global_batch` (samples per step over all ranks).
- `params_for`: an `EvalParams` or a `TrainParams` (`pipeline/params.py`). An `EvalParams` selects
  the stored view 0, a `TrainParams` of epoch e the view e + 1.
- `start`: the number of the step to begin with (default 0).

`batches()` yields a `Batch` of `pipeline/batch.py` for each step, with B samples: `images` (the
features, float16 (B, D)), `labels` (0 real, 1 fake), `valid` (False for padding and for images that
could not be decoded, which must not count), `samples` (row numbers in `shards`), `sources` (int32,
positions in `shards.codes("source")[1]`), `replayed` (True for samples of an old set, which phase 2
mixes in and which count like the others), and `failures` (a dict, position in the batch -> reason).
Errors are raised when the first batch is taken: `FeatureError` if features are missing or damaged,
`LoadError` if the epoch has another batch size (both are `ValueError`s), and `TypeError` for
another kind of `params_for`.

`source_of(recipe, net, dtype)` and `source_of_checkpoint(net, meta, dtype, store)` return the
`FeatureSource` of a `ResolvedRecipe` with `[features]`, or of a checkpoint's meta (a dict). `net`
is the `Detector` with its weights loaded, `dtype` its precision, `store` the `Path` of the store.
Both raise `FeatureError` if the backbone is not frozen.

`open_scored(shards, preprocess, loading, device, *, dist, features)` is a context manager
that opens a loader for evaluation, with the same `batches()`, and closes it. It is a
`FeatureLoader` if `features`, a `FeatureSource`, is given; else a loader of images, which are
preprocessed by `preprocess` (a `Preprocess`). `dist` is a `DistEnv` (rank and number of processes),
or None for a single process. `dist` and `features` default to None. It raises `LoadError` if the
images cannot be loaded.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import recipes
from model.distributed import DistEnv
from model.features.store import BackboneId, FeatureTable, View, backbone_id, open_table
from model.network import Detector
from model.recipe import Network, ResolvedRecipe
from pipeline.batch import Batch, labeled_batch
from pipeline.loader import LoadError, open_loader
from pipeline.loading import Loading
from pipeline.order import Epoch
from pipeline.params import EvalParams, ParamsFor, TrainParams
from pipeline.preprocess import Preprocess
from pipeline.stream import BatchLoader
from sharding.format import ShardSet


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureSource:
    """Location of a run's features: the folder of the store, the identity of the backbone, and
    `view`, the augmentation settings of all views except view 0.
    """

    store: Path
    backbone: BackboneId
    view: View

    def numbered(self, number: int) -> View:
        """Return the view with this number; 0 is the center crop."""
        if not number:
            return View()
        return View(
            number=number, augment=self.view.augment, policy=self.view.policy, seed=self.view.seed
        )


def source_of(recipe: ResolvedRecipe, net: Detector, dtype: torch.dtype) -> FeatureSource:
    """Return the location of a recipe's features. `net` has its weights loaded.

    Raises:
        FeatureError: the backbone of `net` is not frozen.
    """
    assert recipe.features is not None
    return FeatureSource(
        store=Path(recipe.features.store),
        backbone=backbone_id(net, recipe.network, recipe.preprocess, dtype),
        view=View(augment=recipe.augment, policy=recipe.data.policy, seed=recipe.run.seed),
    )


def source_of_checkpoint(
    net: Detector, meta: Mapping[str, Any], dtype: torch.dtype, store: Path
) -> FeatureSource:
    """Return the location of the center-crop features of a checkpoint's network. `meta` is the
    checkpoint's meta.

    Raises:
        FeatureError: the backbone was not frozen.
    """
    network = recipes.build(Network, meta["recipe"]["network"], "the checkpoint")
    preprocess = Preprocess(**meta["preprocess"])
    backbone = backbone_id(net, network, preprocess, dtype)
    return FeatureSource(store=store, backbone=backbone, view=View())


@dataclass(frozen=True, eq=False)
class FeatureLoader:
    """Loader of the stored features of one shard set on one rank; replaces
    `pipeline.loader.Loader`. A batch has float16 features (B, D) in `images`.
    """

    shards: ShardSet
    source: FeatureSource
    loading: Loading
    device: torch.device
    rank: int = 0
    world_size: int = 1
    backend: str = "features"
    _tables: dict[int, FeatureTable] = field(default_factory=dict, repr=False)

    @property
    def reason(self) -> str:
        """Location of the features, for the log."""
        return f"stored in {self.source.store / self.source.backbone.folder}"

    @property
    def preprocess(self) -> Preprocess:
        """Preprocessing of the images before the backbone."""
        return self.source.backbone.preprocess

    @property
    def global_batch(self) -> int:
        """Samples per step over all ranks."""
        return self.loading.batch_size * self.world_size

    def batches(self, epoch: Epoch, params_for: ParamsFor, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of `epoch` from step `start` on, in order. `params_for` selects the
        view.

        Raises:
            FeatureError: features are missing or damaged.
            LoadError: `epoch` was made for another batch size.
            TypeError: `params_for` does not select a view.
        """
        if epoch.global_batch != self.global_batch:
            raise LoadError(
                f"the epoch has batches of {epoch.global_batch}, expected {self.global_batch}"
            )
        if not isinstance(params_for, TrainParams | EvalParams):
            raise TypeError(
                f"expected TrainParams or EvalParams for stored features, got {params_for!r}"
            )
        table = self.table(params_for.view)
        for step in range(start, epoch.steps):
            rows = epoch.positions(step, self.rank, self.world_size)
            samples = epoch.samples[rows]
            features = torch.from_numpy(table.rows(samples)).to(self.device)
            yield labeled_batch(self.shards, epoch, rows, features, table.failures(samples))

    def name_failures(self, batch: Batch) -> list[str]:
        """Return one line per sample that could not be decoded: its name and the reason."""
        return [
            f"{self.shards.name(batch.samples[row])}: {reason}"
            for row, reason in batch.failures.items()
        ]

    def close(self) -> None:
        """Close the files of the features."""
        self._tables.clear()

    def table(self, view: int) -> FeatureTable:
        """Return the features of a view. Only the last returned view stays open: a system allows
        some 65,000 mapped files.

        Raises:
            FeatureError: features are missing or damaged.
        """
        if view not in self._tables:
            source = self.source
            self._tables.clear()
            self._tables[view] = open_table(
                source.store, source.backbone, self.shards, source.numbered(view)
            )
        return self._tables[view]


@contextlib.contextmanager
def open_scored(
    shards: ShardSet,
    preprocess: Preprocess,
    loading: Loading,
    device: torch.device,
    *,
    dist: DistEnv | None = None,
    features: FeatureSource | None = None,
) -> Iterator[BatchLoader]:
    """Open a loader of `shards` for evaluation: of stored features if `features` is given, else of
    images. The loader is closed when the block ends.

    Raises:
        LoadError: as `open_loader`.
    """
    dist = dist or DistEnv()
    loader: BatchLoader
    if features:
        loader = FeatureLoader(shards, features, loading, device, dist.rank, dist.world_size)
    else:
        loader = open_loader(
            shards, preprocess=preprocess, loading=loading, device=device,
            rank=dist.rank, world_size=dist.world_size,
        )  # fmt: skip
    with contextlib.closing(loader):
        yield loader
