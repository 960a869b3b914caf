"""Shards at an address (s3://, hf://, https://): ranges fetched once into a bounded local cache.

A shard is fetched in pieces of `PIECE` bytes, which every process of this machine shares. Under the
block shuffle an epoch needs each piece for a while and then never again, so a cache much smaller
than the data is enough. A remote that does not answer is asked again, ever later, and then named.
"""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock

from sharding.format import ShardSet
from storage import write_bytes

log = logging.getLogger("ai_images_detector")

PIECE = 8 * 2**20
"""Bytes fetched at a time: large enough for one request to be worth its latency, small enough to be
dropped soon."""

DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Waits between tries; after the last one the remote counts as gone."""


class RemoteError(OSError):
    """A remote that does not answer; the message says how often it was asked."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Where pieces of remote shards are kept, and how many bytes of them at most."""

    folder: Path = Path("data/cache")
    limit: int = 20 * 2**30

    def __post_init__(self) -> None:
        if self.limit < 4 * PIECE:
            raise ValueError(f"a cache needs at least {4 * PIECE:,} bytes, got {self.limit:,}")


class RemoteShards:
    """The tars of a shard set at an address; safe from any thread, process or fork."""

    def __init__(self, shards: ShardSet, cache: Cache):
        self.cache = cache
        self._names = [str(folder / name) for folder, name in zip(
            shards.folders, shards.shards, strict=True)]  # fmt: skip
        self._bytes = shards.shard_bytes
        self._options = [dict(getattr(f, "storage_options", {})) for f in shards.folders]
        # Another build of the same address is another set: its pieces have other names.
        self._identity = shards.sha256
        self._systems: dict[tuple[int, int], tuple[Any, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_systems": {}}

    def read(self, code: int, offset: int, size: int) -> bytes:
        """`size` bytes of a shard from `offset` on.

        Raises:
            RemoteError: the remote does not answer.
            OSError: there is no such shard, or no right to read it.
        """
        pieces = []
        for index in range(offset // PIECE, (offset + size - 1) // PIECE + 1):
            start = max(offset, index * PIECE)
            end = min(offset + size, (index + 1) * PIECE)
            pieces.append(self._part(code, index, start - index * PIECE, end - start))
        return b"".join(pieces)

    def _part(self, code: int, index: int, start: int, size: int) -> bytes:
        """Bytes of one piece, which is fetched first if it is not here."""
        text = f"{self._identity} {self._names[code]} {index}"
        path = self.cache.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.piece"
        while True:
            try:
                with path.open("rb") as stream:
                    os.utime(stream.fileno())  # the last use, by which pieces are dropped
                    return os.pread(stream.fileno(), size, start)
            except FileNotFoundError:  # never here, or dropped by another process
                self._fetch(code, index, path)

    def _fetch(self, code: int, index: int, path: Path) -> None:
        self.cache.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if path.exists():  # another worker wanted it too
                return
            data = self._ask(code, index)
            self._make_room(len(data))
            write_bytes(path, data)
        with contextlib.suppress(OSError):
            path.with_suffix(".lock").unlink()

    def _ask(self, code: int, index: int) -> bytes:
        """One piece from the remote, asked again after `DELAYS_S`."""
        start, end = index * PIECE, min((index + 1) * PIECE, self._bytes[code])
        started = time.monotonic()
        for delay in (*DELAYS_S, None):
            try:
                system, name = self._system(code)
                data = system.cat_file(name, start=start, end=end)
                if len(data) != end - start:
                    raise RemoteError(f"{len(data):,} of {end - start:,} bytes arrived")
                return data
            except (FileNotFoundError, PermissionError):
                raise  # asking again does not help
            except Exception as error:  # each file system and its client raise errors of their own
                if delay is None:
                    tries, passed = len(DELAYS_S) + 1, time.monotonic() - started
                    raise RemoteError(
                        f"{self._names[code]} did not answer {tries} times in {passed:.0f} s: "
                        f"{' '.join(str(error).split()) or type(error).__name__}"
                    ) from error
                log.warning(
                    "%s: %s; trying again in %g s",
                    *(self._names[code], " ".join(str(error).split()) or repr(error), delay),
                )
                time.sleep(delay)
        raise AssertionError("unreachable")

    def _system(self, code: int) -> tuple[Any, str]:
        """The file system of a shard and its name there, for this process: a client that was made
        before a fork does not work after it.
        """
        key = os.getpid(), code
        if key not in self._systems:
            self._systems[key] = fsspec.core.url_to_fs(self._names[code], **self._options[code])
        return self._systems[key]

    def _make_room(self, needed: int) -> None:
        """Drop the pieces that were used longest ago until `needed` more bytes are allowed."""
        pieces = sorted(_pieces(self.cache.folder))
        total = sum(size for _used, size, _path in pieces) + needed
        for _used, size, path in pieces:
            if total <= self.cache.limit:
                return
            path.unlink(missing_ok=True)
            total -= size


def _pieces(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """(time of last use, bytes, path) of each piece in the cache."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".piece"):
                with contextlib.suppress(FileNotFoundError):
                    facts = entry.stat()
                    yield facts.st_mtime, facts.st_size, Path(entry.path)
