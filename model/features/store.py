"""Store the features of a frozen backbone on disk, in one Arrow file per shard and view, and read
them.

    <store>/<backbone>-<hash>/backbone.json          identity of the backbone
    <store>/<backbone>-<hash>/<set>/<view>/<shard>-<hash of the tar>.arrow

View 0 is the center crop of evaluation; view v >= 1 has the augmentation of epoch v - 1 (the first
epoch is 0). Its folder depends on the policy of the shard's source and on the seed. If the policy
has `match_pair_jpeg`, the file's name ends in a second hash, of the JPEG settings that the shard's
fakes get: those of their real partners, which the index names and which may be in other shards. A
file has a row per sample, in the order of the tar. A file with another identity counts as missing.
Sets of one name whose tars differ have different files.

Main entries: `open_table(store, backbone, shards, view)` reads the features of one view, and
`missing_of(store, backbone, shards, view, *, rank, world_size)` lists the files to compute.

- `store`: `Path` of the folder of the store.
- `backbone`: a `BackboneId`, made by `backbone_id(net, network, preprocess, dtype)` from a
  `Detector`, the `Network` settings of its recipe, a `Preprocess` and the torch dtype of the
  computation.
- `shards`: a `ShardSet` (packed images), opened by `open_shards()`.
- `view`: `View()` for the center crop, else `View(number=v, augment=..., policy=..., seed=...)`
  with the values of the recipe's `augment`, `data.policy` and `run.seed`.
- `rank`, `world_size`: the number of this process, from 0 (the default), and how many processes
  there are (default 1). `missing_of()` lists only the files that this process has to compute.

`open_table()` returns a `FeatureTable` of memory-mapped files (`Part`). It raises `FeatureError` if
a file is missing, damaged or incomplete. Two methods take an int array of row numbers of the set:
`rows(samples)` returns their features, float16 (B, D), zeros for images that could not be decoded.
`failures(samples)` returns a dict of these images, position in `samples` -> reason.

`missing_of()` returns a list of `ShardFile`. `write_file(file, offsets, valid, features, failures)`
writes one of them, with arrays in the order of the tar: `offsets` in the tar, int64 (N,); `valid`,
bool (N,); `features`, float16 (N, D), zeros where not valid; and `failures`, a dict, row -> reason,
of images that cannot be decoded. It raises `FeatureError` if a feature is not finite.
`describe_backbone(store, backbone)` writes `backbone.json`, which only people read.
`frozen_sha256(net)` hashes the weights that do not learn, and raises `FeatureError`, as
`backbone_id()` does, if the backbone is not frozen.
"""

import errno
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from escape import reason_of
from model.device import describe
from model.network import Detector
from model.recipe import Network
from pipeline.augment import AugmentPolicy
from pipeline.params import matched_partners, policies_of
from pipeline.preprocess import Preprocess
from sharding.format import ShardSet
from storage import parse_json, write_atomically, write_text

STORE_VERSION = 2
"""Version of the files. Change it when a default of `AugmentPolicy` or `Preprocess` changes:
identities contain only values that differ from the defaults, so that stored features stay valid
when a setting is added."""

BACKBONE_FILE = "backbone.json"
_ID_KEY = b"ai_images_detector.features"
_FAILURES_KEY = b"ai_images_detector.failures"


class FeatureError(ValueError):
    """Features that are missing, damaged or cannot be computed. The message gives the reason and
    what to do.
    """


@dataclass(frozen=True, kw_only=True)
class BackboneId:
    """Identity of the computation of features: equal identities give equal features.

    `sha256` covers the names, shapes and values of the frozen weights. `precision` is fp32, bf16 or
    fp16.
    """

    network: str
    options: Mapping[str, Any]
    head: str
    blocks: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sha256: str
    preprocess: Preprocess
    precision: str

    @property
    def folder(self) -> str:
        """Name of the backbone's folder in a store."""
        own = asdict(self) | {"preprocess": _changed(self.preprocess)}
        digest = hashlib.sha256(_canonical(own).encode()).hexdigest()
        return f"{self.network}-{digest[:16]}"


def backbone_id(
    net: Detector, network: Network, preprocess: Preprocess, dtype: torch.dtype
) -> BackboneId:
    """Return the identity of the frozen part of a network.

    Equal identities give equal features up to the rounding of `dtype`: another processor, or
    compiled code (`run.compile`), rounds sums differently.
    """
    return BackboneId(
        network=network.name,
        options=dict(network.options),
        head=network.head,
        blocks=network.blocks,
        mean=_triple(net.mean),
        std=_triple(net.std),
        sha256=frozen_sha256(net),
        preprocess=preprocess,
        precision=describe(dtype),
    )


def _triple(channels: torch.Tensor) -> tuple[float, float, float]:
    """Convert a detector's mean or std buffer (0 to 255) back to values from 0 to 1."""
    red, green, blue = (round(float(value) / 255, 8) for value in channels.flatten())
    return red, green, blue


def frozen_sha256(net: Detector) -> str:
    """Hash all weights and buffers of a network except those that learn.

    Raises:
        FeatureError: the backbone is not frozen.
    """
    if not net.freeze_backbone:
        raise FeatureError(
            "features are stored for a frozen backbone only: set network.freeze_backbone=true"
        )
    learning = {name for name, p in net.backbone.named_parameters() if p.requires_grad}
    digest = hashlib.sha256()
    for name, value in sorted(net.backbone.state_dict().items()):
        if name not in learning:
            array = value.detach().to("cpu").contiguous().numpy()
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def _changed(settings: Preprocess | AugmentPolicy) -> dict[str, Any]:
    """Return the settings that differ from their defaults, by name."""
    defaults = asdict(type(settings)())
    return {name: v for name, v in asdict(settings).items() if v != defaults[name]}


def _canonical(value: Any) -> str:
    """Format a value as JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """One view of every image. `number` 0 is the center crop; view v >= 1 is the view of training
    epoch v - 1, augmented by `augment`, `policy` and `seed` as in a recipe.
    """

    number: int = 0
    augment: Mapping[str, AugmentPolicy] | None = None
    policy: str = ""
    seed: int = 0

    def folder_of(self, policy: AugmentPolicy | None) -> str:
        """Return the name of the view's folder in a set, for the shards of the sources with this
        policy. Other policies of the recipe do not change it.
        """
        if not self.number:
            return "view0"
        text = _canonical([policy and _changed(policy), self.seed])
        return f"view{self.number}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """File of one shard and view. `id` is the identity that its metadata must have to be used."""

    path: Path
    shard_code: int
    id: Mapping[str, Any]


def files_of(store: Path, backbone: BackboneId, shards: ShardSet, view: View) -> list[ShardFile]:
    """Return the files of a view of a shard set, in the order of its shards, whether they exist or
    not.
    """
    codes, first_rows = np.unique(shards.column("shard_code"), return_index=True)
    source_codes, names = shards.codes("source")
    policies = policies_of(shards, view.augment, view.policy) if view.augment else {}
    partners = matched_partners(shards, policies) if view.number else None
    rows_of = shards.rows_of_shards() if partners else {}
    files = []
    for code, row in zip(codes.tolist(), first_rows.tolist(), strict=True):
        folder, shard = shards.folders[code], shards.shards[code]
        entry: dict[str, Any] = {
            "version": STORE_VERSION,
            "backbone": backbone.folder,
            "shard": shard,
            "shard_sha256": shards.shard_sha256[code],
            "view": view.number,
        }
        policy = policies.get(names[source_codes[row]])
        if view.number and policy is not None:
            entry |= {"seed": view.seed, "policy": _changed(policy)}
        name = f"{shard[:-4]}-{shards.shard_sha256[code][:12]}"
        if partners and policy is not None and policy.match_pair_jpeg:
            jpegs = np.stack([column[rows_of[code]] for column in partners]).astype("<i4")
            entry["partners_sha256"] = hashlib.sha256(jpegs.tobytes()).hexdigest()
            name += f"-{entry['partners_sha256'][:12]}"
        path = store / backbone.folder / folder.name / view.folder_of(policy) / f"{name}.arrow"
        files.append(ShardFile(path=path, shard_code=code, id=parse_json(_canonical(entry))))
    return files


def describe_backbone(store: Path, backbone: BackboneId) -> None:
    """Write `backbone.json` into the backbone's folder, for readers; the program does not
    read it.
    """
    folder = store / backbone.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / BACKBONE_FILE).exists():
        text = json.dumps(asdict(backbone), indent=1, sort_keys=True)
        write_text(folder / BACKBONE_FILE, text + "\n")


def write_file(
    file: ShardFile,
    offsets: np.ndarray,
    valid: np.ndarray,
    features: np.ndarray,
    failures: Mapping[int, str],
) -> None:
    """Write the file of one shard. `offsets` int64 (N,) ascending, `valid` bool (N,), `features`
    float16 (N, D), `failures` row -> reason.

    Raises:
        FeatureError: a feature is not finite.
    """
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise FeatureError(
            f"{file.path.parent}: the features of row {bad[0]} are not finite in float16; the "
            "weights or the precision of the backbone cause this: use --set run.precision=fp32"
        )
    values = pa.Array.from_buffers(
        pa.float16(), features.size, [None, pa.py_buffer(np.ascontiguousarray(features))]
    )
    columns = {
        "offset": pa.Array.from_buffers(pa.int64(), len(offsets), [None, pa.py_buffer(offsets)]),
        "valid": pa.array(valid.tolist(), pa.bool_()),
        "features": pa.FixedSizeListArray.from_arrays(values, features.shape[1]),
    }
    notes = {str(row): reason for row, reason in failures.items()}
    metadata = {_ID_KEY: _canonical(dict(file.id)), _FAILURES_KEY: _canonical(notes)}
    table = pa.table(columns).replace_schema_metadata(metadata)
    file.path.parent.mkdir(parents=True, exist_ok=True)

    def write(partial: Path) -> None:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)

    write_atomically(file.path, write)


def is_there(file: ShardFile) -> bool:
    """Return whether a file exists and has the expected identity. An unreadable file counts as
    missing.

    Raises:
        FeatureError: this process has mapped as many files as the system allows.
    """
    try:
        with pa.memory_map(str(file.path)) as source:
            metadata = pa.ipc.open_file(source).schema.metadata or {}
    except (OSError, pa.ArrowException) as error:
        if getattr(error, "errno", None) == errno.ENOMEM:
            raise FeatureError(
                f"{file.path} cannot be mapped: the system allows no more mapped files; raise the "
                "limit, such as by `sysctl vm.max_map_count=1000000`"
            ) from error
        return False
    try:
        return parse_json(metadata.get(_ID_KEY, b"null")) == dict(file.id)
    except ValueError:
        return False


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of one shard, mapped from its file: `offsets` int64 (N,), `valid` bool (N,), `features`
    float16 (N, D), and `failures` row -> reason.
    """

    offsets: np.ndarray
    valid: np.ndarray
    features: np.ndarray
    failures: Mapping[int, str]


def read_file(file: ShardFile) -> Part:
    """Map the file of one shard into memory.

    Raises:
        FeatureError: the file is missing, has another identity or is damaged.
    """
    if not is_there(file):
        raise FeatureError(
            f"{file.path} is missing or has other features; compute them with `python -m model "
            "embed`"
        )
    try:
        # The table's buffers keep the memory map alive after the file is closed.
        with pa.memory_map(str(file.path)) as source:
            table = pa.ipc.open_file(source).read_all()
        return _part_of(table)
    except (OSError, pa.ArrowException, KeyError, ValueError, AttributeError) as error:
        reason = reason_of(error)
        raise FeatureError(
            f"{file.path} is damaged ({reason}); delete it to have it computed again"
        ) from error


def _part_of(table: pa.Table) -> Part:
    """Return the rows of a file of `write_file`.

    Raises:
        ValueError, KeyError, AttributeError: the file is of another kind.
    """
    notes = parse_json(table.schema.metadata[_FAILURES_KEY])
    failures = {int(row): str(reason) for row, reason in notes.items()}
    columns = [table.column(name) for name in ("offset", "valid", "features")]
    *kinds, listed = [column.type for column in columns]
    if [*kinds, listed.value_type] != [pa.int64(), pa.bool_(), pa.float16()]:
        raise ValueError(f"its columns are {kinds[0]}, {kinds[1]} and {listed}")
    if any(column.null_count for column in columns):
        raise ValueError("a value in it is null")
    width = listed.list_size
    if not table.num_rows:
        return Part(np.empty(0, np.int64), np.empty(0, bool), np.empty((0, width), np.float16), {})
    batch = table.combine_chunks().to_batches()[0]
    column = batch.column("features")
    flat = np.frombuffer(column.values.buffers()[1], np.float16)
    start = (column.offset + column.values.offset) * width
    features = flat[start : start + len(column) * width].reshape(len(column), width)
    offsets = np.from_dlpack(batch.column("offset"))
    valid = np.array(batch.column("valid").to_pylist(), np.bool_)
    return Part(offsets, valid, features, failures)


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """Features of one view for every sample of a shard set, indexed by the set's row numbers.

    `part_of` (N,) is the index of each sample's part, `row_of` (N,) its row in that part.
    """

    parts: Sequence[Part]
    part_of: np.ndarray
    row_of: np.ndarray

    @property
    def width(self) -> int:
        """Number of features per image, D."""
        return self.parts[0].features.shape[1]

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """Return the features of the given samples, float16 (B, D)."""
        features = np.empty((len(samples), self.width), np.float16)
        parts = self.part_of[samples]
        order = np.argsort(parts, kind="stable")
        edges = np.flatnonzero(np.diff(parts[order], prepend=-1, append=-1))
        for first, last in itertools.pairwise(edges.tolist()):
            into = order[first:last]
            part = self.parts[parts[into[0]]]
            features[into] = part.features[self.row_of[samples[into]]]
        return features

    def failures(self, samples: np.ndarray) -> dict[int, str]:
        """Return the given samples that could not be decoded: position in `samples` -> reason."""
        reasons = {}
        for position, sample in enumerate(samples.tolist()):
            part, row = self.parts[self.part_of[sample]], int(self.row_of[sample])
            if not part.valid[row]:
                reasons[position] = part.failures.get(row, "could not be decoded")
        return reasons


def open_table(store: Path, backbone: BackboneId, shards: ShardSet, view: View) -> FeatureTable:
    """Open a view of a shard set.

    Raises:
        FeatureError: a file is missing, damaged, or lacks a sample of the set.
    """
    files = files_of(store, backbone, shards, view)
    parts = [read_file(file) for file in files]
    offsets, rows_of = shards.column("offset"), shards.rows_of_shards()
    part_of, row_of = np.empty(len(shards), np.int64), np.empty(len(shards), np.int64)
    for number, (file, part) in enumerate(zip(files, parts, strict=True)):
        chosen = rows_of[file.shard_code]
        part_of[chosen] = number
        rows = np.searchsorted(part.offsets, offsets[chosen])
        held = part.offsets[np.minimum(rows, len(part.offsets) - 1)] if len(part.offsets) else -1
        if not np.array_equal(held, offsets[chosen]):
            raise FeatureError(f"{file.path} lacks samples of its shard; delete it and run again")
        row_of[chosen] = rows
    return FeatureTable(parts, part_of, row_of)


def missing_of(
    store: Path,
    backbone: BackboneId,
    shards: ShardSet,
    view: View,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> list[ShardFile]:
    """Return the missing files of a view that this rank of `world_size` computes. A rank takes
    every `world_size`-th shard, finished or not, so that ranks need not coordinate.
    """
    files = files_of(store, backbone, shards, view)
    return [file for file in files[rank::world_size] if not is_there(file)]
