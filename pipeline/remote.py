"""Read bytes of shards at an address (s3://, hf://, https://) through a local cache.

Main entry: `RemoteShards(shards, cache)`. Both must be given.

- `shards`: a `ShardSet` (from `open_shards()` of `sharding/format.py`) whose folders are addresses.
- `cache`: a `Cache(*, folder, limit)`: `folder` is a `Path`, made if needed; `limit` is the largest
  size of the cache in bytes. `Cache()` is `data/cache` and 20 GiB. For a limit below `4 * PIECE`
  bytes, `RemoteShards` raises ValueError.

Its `read(code, offset, size)` takes the number of a shard (a position in `shards.shards`), and an
offset and a size in bytes, both inside the shard. It returns these bytes. If the remote does not
answer, it is asked again after growing delays (`DELAYS_S`); then `RemoteError`, an OSError, is
raised, and for `REFUSE_S` seconds also for other reads of the same piece, without asking. A shard
that does not exist or may not be read raises FileNotFoundError or PermissionError at once. (On
https://, only status 404 does so; every other error counts as no answer.) OSError is also raised if
the cache cannot be written.

Shards are fetched in pieces of `PIECE` bytes, one file per piece in the cache's folder. All
processes of this machine share them; the pieces used longest ago are deleted. Those of another user
may be impossible to delete (in a folder such as /tmp): then the cache exceeds its limit, and one
warning says so. A piece whose file has not the expected size is fetched again.
"""

import contextlib
import hashlib
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from escape import reason_of
from locks import locked
from sharding.format import ShardSet
from storage import remove_leftovers, size_of, write_bytes

log = logging.getLogger("ai_images_detector.rank")  # `rank_log` of console.py

PIECE = 8 * 2**20
"""Bytes fetched at a time: large enough that a request is worth its latency, small enough that a
piece is soon no longer needed.
"""

DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between tries. After the last try the read fails."""

REFUSE_S = 60.0
"""Seconds after that last try in which a process does not ask for the piece again: a batch may have
many images of one piece.
"""


class RemoteError(OSError):
    """The remote does not answer; the message gives the number of tries."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Folder of cached pieces of remote shards, and its limit in bytes."""

    folder: Path = Path("data/cache")
    limit: int = 20 * 2**30


class RemoteShards:
    """Tars of a shard set at an address. Safe in any thread or process, and after a fork.

    Raises:
        ValueError: the limit of the cache is less than four pieces.
    """

    def __init__(self, shards: ShardSet, cache: Cache):
        if cache.limit < 4 * PIECE:
            raise ValueError(
                f"the cache of remote shards needs at least {4 * PIECE:,} bytes, got "
                f"{cache.limit:,}; set a larger loading.cache_gb"
            )
        self.cache = cache
        self._names = [str(folder / name) for folder, name in zip(
            shards.folders, shards.shards, strict=True)]  # fmt: skip
        self._bytes = shards.shard_bytes
        self._options = [dict(getattr(f, "storage_options", {})) for f in shards.folders]
        # Part of the names of pieces, because a tar that is built again has other bytes.
        self._sha256 = shards.shard_sha256
        self._systems: dict[tuple[int, int], tuple[Any, str]] = {}
        self._failed: dict[Path, tuple[float, str]] = {}  # piece -> time of the last try, reason
        self._is_full = False  # of pieces that may not be deleted
        with contextlib.suppress(PermissionError):  # the folder may be of another user
            remove_leftovers(cache.folder)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_systems": {}}

    def read(self, code: int, offset: int, size: int) -> bytes:
        """Return `size` bytes of the shard number `code` from `offset` on.

        Raises:
            RemoteError: the remote does not answer.
            OSError: the shard does not exist or may not be read.
        """
        pieces = []
        for index in range(offset // PIECE, (offset + size - 1) // PIECE + 1):
            start = max(offset, index * PIECE)
            end = min(offset + size, (index + 1) * PIECE)
            pieces.append(self._part(code, index, start - index * PIECE, end - start))
        return b"".join(pieces)

    def _part(self, code: int, index: int, start: int, size: int) -> bytes:
        """Return `size` bytes of one piece from `start` on. The piece is fetched first if it is not
        cached, or if its file is damaged: if it has another size.
        """
        text = f"{self._sha256[code]} {self._names[code]} {index}"
        path = self.cache.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.piece"
        while True:
            try:
                with path.open("rb") as stream:
                    if os.fstat(stream.fileno()).st_size == self._size(code, index):
                        with contextlib.suppress(OSError):  # another user may own the file
                            os.utime(stream.fileno())  # time of the last use, for `_make_room`
                        return os.pread(stream.fileno(), size, start)
                log.warning("%s is damaged; it is fetched again", path)
            except FileNotFoundError:  # not fetched yet, or deleted by another process
                pass
            self._fetch(code, index, path)

    def _size(self, code: int, index: int) -> int:
        """Return the size of one piece in bytes: the last piece of a tar is shorter."""
        return min(PIECE, self._bytes[code] - index * PIECE)

    def _fetch(self, code: int, index: int, path: Path) -> None:
        self.cache.folder.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock"), remove=True):
            if size_of(path) == self._size(code, index):  # another worker fetched it meanwhile
                return
            failed_at, reason = self._failed.get(path, (-math.inf, ""))
            if time.monotonic() < failed_at + REFUSE_S:
                raise RemoteError(reason)
            try:
                data = self._ask(code, index)
            except RemoteError as error:
                self._failed[path] = time.monotonic(), str(error)
                raise
            self._make_room(len(data))
            write_bytes(path, data)

    def _ask(self, code: int, index: int) -> bytes:
        """Fetch one piece from the remote. Failed tries are repeated after `DELAYS_S`."""
        start = index * PIECE
        end = start + self._size(code, index)
        started = time.monotonic()
        for delay in (*DELAYS_S, None):
            try:
                system, name = self._system(code)
                data = system.cat_file(name, start=start, end=end)
                if len(data) != end - start:
                    raise RemoteError(f"{len(data):,} of {end - start:,} bytes arrived")
                return data
            except (FileNotFoundError, PermissionError):
                raise  # trying again is useless
            except Exception as error:  # clients raise any exception
                reason = reason_of(error)
                if getattr(error, "status", None) in (401, 403):
                    raise PermissionError(f"{self._names[code]}: {reason}") from error
                if delay is None:
                    tries, passed = len(DELAYS_S) + 1, time.monotonic() - started
                    raise RemoteError(
                        f"{self._names[code]} did not answer in {tries} tries over {passed:.0f} s: "
                        f"{reason}"
                    ) from error
                log.warning("%s: %s; trying again in %g s", self._names[code], reason, delay)
                time.sleep(delay)
        raise AssertionError("unreachable")

    def _system(self, code: int) -> tuple[Any, str]:
        """Return the file system of a shard, and the shard's name in it, for this process. A client
        that was created before a fork does not work after it.
        """
        key = os.getpid(), code
        if key not in self._systems:
            self._systems[key] = fsspec.core.url_to_fs(self._names[code], **self._options[code])
        return self._systems[key]

    def _make_room(self, needed: int) -> None:
        """Delete the least recently used pieces until `needed` more bytes fit below the limit, and
        a twentieth of the limit more, so that not every fetch has to look at all of them. Pieces of
        another user may stay: the cache then exceeds its limit.
        """
        with os.scandir(self.cache.folder) as entries:
            count = sum(entry.name.endswith(".piece") for entry in entries)
        if count * PIECE + needed <= self.cache.limit:  # no need for their sizes
            return
        pieces = sorted(_pieces(self.cache.folder))
        total = sum(size for _used, size, _path in pieces) + needed
        if total <= self.cache.limit:
            return
        spare = self.cache.limit // 20 // PIECE * PIECE
        for _used, size, path in pieces:
            if total <= self.cache.limit - spare:
                return
            with contextlib.suppress(PermissionError):
                path.unlink(missing_ok=True)
                total -= size
        if total > self.cache.limit and not self._is_full:
            self._is_full = True
            log.warning(
                "the cache %s is full of files of another user, so that it exceeds its limit, and "
                "pieces are fetched repeatedly; set loading.cache to a folder of yours",
                self.cache.folder,
            )


def _pieces(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Yield (time of last use, bytes, path) of each piece in the cache."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".piece"):
                with contextlib.suppress(FileNotFoundError):
                    facts = entry.stat()
                    yield facts.st_mtime, facts.st_size, Path(entry.path)
