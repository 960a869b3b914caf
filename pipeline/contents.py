"""Hash what batches are made of, so that a run is resumed on the images that it began with.

Main entry: `content_sha256(shards)` takes a `ShardSet` (from `open_shards()` of
`sharding/format.py`). It returns a hex SHA-256 of the columns `READ` of its samples, in their
order. A build that changes only other facts (generators, titles, licenses, exclusions) keeps it.

`policies_sha256(shards)` is a hash of what training reads from the index for each source that has
samples: its name, augmentation policy, and whether it may be replayed.
"""

import hashlib
import json
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.format import ShardSet, codes_of, numbers_of

READ = (
    "sha256", "label", "source", "group", "width", "height", "format", "orientation", "chroma",
    "jpeg_quality",
)  # fmt: skip
"""Columns of the samples that decide a batch or a score. Formats, chroma and quality decide how a
fake is compressed like its partner, the real image of its `group`.
"""


_known: "weakref.WeakKeyDictionary[ShardSet, str]" = weakref.WeakKeyDictionary()


def content_sha256(shards: ShardSet) -> str:
    """Return the hash of the columns `READ`. The hash is cached, because a run needs it for each of
    its checkpoints.
    """
    if shards not in _known:
        _known[shards] = _hashed(shards)
    return _known[shards]


def _hashed(shards: ShardSet) -> str:
    digest = hashlib.sha256()
    for name in READ:
        column = shards.table.column(name)
        if pa.types.is_dictionary(column.type):
            codes, names = codes_of(column)
            # Equal values may have different dictionaries: unused names, or another order.
            present, codes = np.unique(codes, return_inverse=True)
            order = np.argsort([names[code] for code in present])
            digest.update(json.dumps(sorted(names[code] for code in present)).encode())
            digest.update(np.argsort(order)[codes].astype("<i4").tobytes())
        elif pa.types.is_string(column.type):
            digest.update(numbers_of(pc.binary_length(column)).astype("<i4").tobytes())
            for chunk in column.chunks:
                digest.update(_bytes_of(chunk.cast(pa.large_binary())))
        elif pa.types.is_fixed_size_binary(column.type):
            for chunk in column.chunks:
                digest.update(_bytes_of(chunk.cast(pa.large_binary())))
        else:
            digest.update(numbers_of(column).tobytes())
    return digest.hexdigest()


def _bytes_of(values: pa.LargeBinaryArray) -> memoryview:
    """Return the bytes of all values, without a copy."""
    offsets = np.frombuffer(values.buffers()[1], "<i8")[values.offset :]
    data = memoryview(values.buffers()[2] or b"")
    return data[offsets[0] : offsets[len(values)]] if len(values) else data[:0]


def policies_sha256(shards: ShardSet) -> str:
    """Return the hash of the policies and replay flags of the sources that have samples."""
    codes, names = shards.codes("source")
    present = sorted(names[code] for code in np.unique(codes))
    read = [[n, shards.sources[n]["policy"], shards.sources[n]["replay"]] for n in present]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()
