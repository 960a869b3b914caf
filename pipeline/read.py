"""Bytes out of tars: positional reads through the index, safe from any thread or process."""

import hashlib
import os
from collections import OrderedDict

from sharding.format import ShardSet

MAX_OPEN = 256
"""Tars kept open at a time; the least recently used one is closed."""


class ReadError(ValueError):
    """A sample whose bytes are not what the index says."""


class ShardReader:
    """Reads the encoded image of any sample of a shard set."""

    def __init__(self, shards: ShardSet, check_hashes: bool = False):
        self.shards = shards
        self.check_hashes = check_hashes
        self._open: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()

    def read(self, sample: int) -> bytes:
        """The bytes of a sample's image.

        Raises:
            ReadError: the tar is missing or shorter than the index says, or (with `check_hashes`)
                the bytes have changed.
        """
        size = int(self.shards.column("size")[sample])
        try:
            data = os.pread(self._file(sample), size, int(self.shards.column("offset")[sample]))
        except OSError as error:
            raise ReadError(f"cannot be read: {error}") from error
        if len(data) != size:
            raise ReadError(f"the tar ends early: {len(data)} of {size} bytes")
        if self.check_hashes:
            expected = self.shards.table.column("sha256")[int(sample)].as_py()
            if hashlib.sha256(data).digest() != expected:
                raise ReadError("its bytes have changed since it was packed (sha256)")
        return data

    def _file(self, sample: int) -> int:
        if self._process != os.getpid():  # a forked worker shares no descriptor with its parent
            self._open.clear()
            self._process = os.getpid()
        code = int(self.shards.column("shard_code")[sample])
        if code in self._open:
            self._open.move_to_end(code)
            return self._open[code]
        if len(self._open) >= MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        self._open[code] = os.open(self.shards.shard_path(sample), os.O_RDONLY)
        return self._open[code]

    def close(self) -> None:
        """Close every open tar."""
        while self._open:
            os.close(self._open.popitem()[1])
