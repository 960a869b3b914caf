"""Read the encoded images of a shard set from its tars, at the byte offsets in its index (the table
of samples).

Main entry: `ShardReader(shards, *, verify_checksums, threads, cache)`.

- `shards`: the `ShardSet` that `sharding.format.open_shards([Path(folder)])` returns, with local
  tars, tars at an address, or both.
- `verify_checksums`: whether every image's SHA-256 is compared with the index (default False). For
  tars at an address, it always is: nothing else shows that a tar there was replaced.
- `threads`: number of parallel reads from an address (default 1; local tars need none).
- `cache`: a `Cache(folder=Path, limit=BYTES)` of pipeline/remote.py, for tars at an address: the
  folder of their cached parts and its limit. None (the default) means the folder `data/cache` and
  20 GiB.

Its `read(samples)` takes row numbers of the set (a list or an int array) and returns a list: for
each image the bytes of its file (JPEG, PNG or WebP), or a `ReadError` object (returned, not raised)
with the reason, such as a missing or cut tar, one that was built again since `open_shards()`, an
address that does not answer, another width or height in the image's header than in the index, or
another SHA-256. It raises OSError if too many files are open, and TypeError for a mask of booleans.
Several threads may use one reader. It can be pickled, and used after a fork. In a forked process,
let one thread finish a first `read()` before other threads call it.

`damaged_shards(shards)` returns a list with one line for each local tar that is missing or has
another length than in the index. `max_open()` is the number of tars that may be open at a time.
"""

import contextlib
import hashlib
import itertools
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from escape import too_many_files
from imaging.decode import DecodeError, decode_image
from imaging.header import claimed_size
from imaging.orientation import is_transposed
from pipeline.remote import Cache, RemoteShards
from sharding.format import INDEX_FILE, ShardError, ShardSet, read_index
from sharding.rows import row_numbers
from storage import AnyPath, is_local, size_of

MAX_OPEN = 256
"""Tars kept open at a time. The least recently used one is closed."""


def max_open() -> int:
    """Return `MAX_OPEN`, or a quarter of this process's limit of open files (`ulimit -n`) if that
    is less.
    """
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_OPEN if soft == resource.RLIM_INFINITY else max(2, min(MAX_OPEN, soft // 4))


CACHED_READ_S = 60e-6
"""Seconds above which a read is assumed to come from the disk. A read from the page cache takes 10
to 20 us.
"""


UNREAD = "cannot be read: "
"""Start of the text of a `ReadError` that is the fault of the disk or the network."""


_Range = tuple[int, int, int]
"""Bytes of a tar: the code of the shard, the offset and the size in bytes."""


class ReadError(ValueError):
    """A sample whose bytes cannot be read or are not those that the index describes."""


def damaged_shards(shards: ShardSet) -> list[str]:
    """Return one line for each tar on this machine that is missing or has another length than in
    the index.

    Tars at an address are not checked here; reading them gives the error.
    """
    lines = []
    for folder, name, size in zip(shards.folders, shards.shards, shards.shard_bytes, strict=True):
        if not is_local(folder):
            continue
        there = size_of(folder / name)
        if there is None:
            lines.append(f"{folder / name} is gone")
        elif there != size:
            lines.append(f"{folder / name} has {there:,} bytes, its index says {size:,}")
    return lines


class ShardReader:
    """Reads the encoded images of a shard set from local tars or from an address.

    Local tars are read by the calling thread. While reads come from the disk, not the page cache,
    the reader first announces all byte ranges of a call to the system, so that the disk works on
    them together. From an address, `threads` read in parallel. A reader can be pickled or forked at
    any time.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        verify_checksums: bool = False,
        threads: int = 1,
        cache: Cache | None = None,
    ):
        self.shards, self.verify_checksums, self.threads = shards, verify_checksums, threads
        self._files = _Files(shards)
        self._remote_codes = {
            code for code, folder in enumerate(shards.folders) if not is_local(folder)
        }
        self._remote = RemoteShards(shards, cache or Cache()) if self._remote_codes else None
        self._waited = True
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": None}

    def read(self, samples: Sequence[int] | np.ndarray) -> list[bytes | ReadError]:
        """Return the encoded image of each sample, or a `ReadError` with the reason.

        The reasons are: the tar is missing or has another length than in the index, or the set was
        built again; the address does not answer; the image's header states another size than the
        index, so decoding could need more memory than expected; or the SHA-256 differs (if it is
        compared).

        Raises:
            OSError: too many open files. This is not the fault of an image.
            TypeError: a mask of booleans instead of row numbers.
        """
        rows = row_numbers(samples)
        locations = [self.shards.column(n)[rows].tolist() for n in ("shard_code", "offset", "size")]
        wanted = list(zip(*locations, strict=True))
        is_remote = [code in self._remote_codes for code, _, _ in wanted]
        fetched = iter(self._fetch(list(itertools.compress(wanted, is_remote))))
        read = iter(
            self._read_files([w for w, remote in zip(wanted, is_remote, strict=True) if not remote])
        )
        images = [next(fetched if remote else read) for remote in is_remote]
        images = self._check_sizes(rows, images)
        # Not `column.take`, which copies the whole column first.
        hashes = self.shards.table.column("sha256")
        return [
            _checked(data, hashes[row].as_py()) if remote or self.verify_checksums else data
            for data, row, remote in zip(images, rows.tolist(), is_remote, strict=True)
        ]

    def _fetch(self, wanted: list[_Range]) -> Iterable[bytes | ReadError]:
        """Start to read these ranges from addresses, and return the results in their order."""
        return self._threads.map(self._read_one, wanted) if wanted else ()

    def _read_files(self, wanted: list[_Range]) -> list[bytes | ReadError]:
        """Read these ranges from tars on this machine. Threads cost three times as much as cached
        reads and make disk reads no faster.
        """
        began = time.perf_counter()
        if self._waited:
            self._files.expect(wanted)
        images = [self._read_one(location) for location in wanted]
        if wanted:
            self._waited = time.perf_counter() - began > CACHED_READ_S * len(wanted)
        return images

    def pixels(self, sample: int) -> np.ndarray:
        """Read and decode one image to upright RGB, uint8 (height, width, 3).

        Raises:
            DecodeError: the image cannot be read or does not decode.
        """
        (data,) = self.read([sample])
        if isinstance(data, ReadError):
            raise DecodeError(str(data))
        codes, formats = self.shards.codes("format")
        orientation = int(self.shards.column("orientation")[sample])
        return decode_image(data, formats[codes[sample]], orientation)

    def _check_sizes(
        self, rows: np.ndarray, images: list[bytes | ReadError]
    ) -> list[bytes | ReadError]:
        names = ("width", "height", "orientation")
        width, height, orientations = (self.shards.column(name)[rows] for name in names)
        turned = np.array([is_transposed(each) for each in orientations.tolist()], bool)
        widths = np.where(turned, height, width).tolist()
        heights = np.where(turned, width, height).tolist()
        for row, expected in enumerate(zip(widths, heights, strict=True)):
            data = images[row]
            claimed = claimed_size(data) if isinstance(data, bytes) else None
            if claimed and claimed != expected:
                images[row] = ReadError(
                    "its header says {} x {} pixels, the index {} x {}".format(*claimed, *expected)
                )
        return images

    @property
    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None or self._process != os.getpid():
            self._process = os.getpid()
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="read")
        return self._pool

    def _read_one(self, location: _Range) -> bytes | ReadError:
        code, offset, size = location
        try:
            reader = self._remote if self._remote and code in self._remote_codes else self._files
            data = reader.read(code, offset, size)
        except OSError as error:
            if advice := too_many_files(error):
                raise OSError(advice) from error
            return ReadError(f"{UNREAD}{error}")
        if len(data) != size:
            return ReadError(f"the tar ends early: {len(data)} of {size} bytes")
        return data


def _checked(data: bytes | ReadError, sha256: bytes) -> bytes | ReadError:
    if isinstance(data, bytes) and hashlib.sha256(data).digest() != sha256:
        return ReadError("its bytes have changed since it was packed (sha256)")
    return data


def _facts_of(descriptor: int) -> tuple[int, int, int]:
    """Return facts that change when an open file is replaced: inode, time of change, size."""
    facts = os.fstat(descriptor)
    return facts.st_ino, facts.st_mtime_ns, facts.st_size


class _Files:
    """Tars of a shard set on this machine, opened when needed."""

    def __init__(self, shards: ShardSet):
        self.shards = shards
        self._max_open = max_open()
        self._few = len(shards.shards) <= self._max_open
        self._listed: dict[AnyPath, tuple[tuple[int, int, int], Mapping[str, str]]] = {}
        self._passed: dict[int, tuple[int, int, int]] = {}  # facts of tars that passed the check
        self._reset()

    def _reset(self) -> None:
        self._open: OrderedDict[int, int] = OrderedDict()
        self._reading: dict[int, int] = {}  # descriptor -> number of reading threads
        self._lock = threading.Lock()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"shards": self.shards}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _Files.__init__(self, state["shards"])

    def expect(self, ranges: Sequence[_Range]) -> None:
        """Prefetch these byte ranges with posix_fadvise, if available."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # `read` raises the error
                for code, offset, size in ranges:
                    self._on(code, os.posix_fadvise, offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, code: int, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, fewer at the end of the tar."""
        return self._on(code, os.pread, size, offset)

    def _on(self, code: int, act: Callable[..., Any], *arguments: int) -> Any:
        """Call `act` with the descriptor of a tar. No thread closes the file during the call."""
        # If all tars fit below the limit, none is ever closed, and no lock is needed.
        if self._few and code in self._open and self._process == os.getpid():
            return act(self._open[code], *arguments)
        file = self._take(code)
        try:
            return act(file, *arguments)
        finally:
            with self._lock:
                self._reading[file] -= 1

    def _take(self, code: int) -> int:
        if self._process != os.getpid():  # a forked worker opens its own files
            self._reset()
        with self._lock:
            if code not in self._open:
                self._close_oldest()
                self._open[code] = self._descriptor(code)
            self._open.move_to_end(code)
            file = self._open[code]
            self._reading[file] = self._reading.get(file, 0) + 1
            return file

    def _descriptor(self, code: int) -> int:
        try:
            return self._open_checked(code)
        except OSError as error:
            if too_many_files(error) is None or self._few:  # `_few`: never close, see `_on`
                raise
            self._close_oldest(1)  # other parts of the process use them up
            return self._open_checked(code)

    def _open_checked(self, code: int) -> int:
        file = os.open(str(self.shards.folders[code] / self.shards.shards[code]), os.O_RDONLY)
        try:
            facts = _facts_of(file)
            if self._passed.get(code) != facts:
                self._refuse_replaced(code, os.fstat(file).st_size)
                self._passed[code] = facts
        except OSError:
            os.close(file)
            raise
        return file

    def _refuse_replaced(self, code: int, size: int) -> None:
        """Refuse the open tar number `code` of `size` bytes if a build has replaced it: another tar
        has other bytes at the offsets of the index. A build deletes the index before it replaces a
        tar, so the index is read after the tar was opened.

        Raises:
            OSError: the set was built again, or the tar is damaged.
        """
        folder, name = self.shards.folders[code], self.shards.shards[code]
        if self._listed_in(folder).get(name) != self.shards.shard_sha256[code]:
            raise OSError(
                f"{folder} is not the set that this command opened: it was built again, or is "
                "being built; run the command again"
            )
        if size != (expected := self.shards.shard_bytes[code]):
            raise OSError(
                f"its tar has {size:,} bytes, its index says {expected:,}: copy the set again, or "
                "build it again"
            )

    def _listed_in(self, folder: AnyPath) -> Mapping[str, str]:
        """Return the hashes of the tars of a set, by name, as its index lists them now; {} without
        an index. The index is read again when its file has changed.
        """
        try:
            # Open the file: a network file system may still report the facts of a deleted file.
            with (folder / INDEX_FILE).open("rb") as stream:
                seen = _facts_of(stream.fileno())
            if (known := self._listed.get(folder)) is None or known[0] != seen:
                tars = {shard["name"]: shard["sha256"] for shard in read_index(folder)["shards"]}
                self._listed[folder] = known = seen, tars
        except (FileNotFoundError, ShardError):
            return {}
        return known[1]

    def _close_oldest(self, most: int = 0) -> None:
        """Close tars that no thread reads from, least recently used first, until one more may be
        opened.
        """
        for code, file in list(self._open.items()):
            if len(self._open) < (most or self._max_open):
                return
            if not self._reading.get(file):
                os.close(self._open.pop(code))
                self._reading.pop(file, None)

    def __del__(self) -> None:
        if self._process == os.getpid():
            for file in self._open.values():
                os.close(file)
