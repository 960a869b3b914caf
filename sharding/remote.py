"""List, read and remove many files at an address, with few requests, many of them at a time.

`files_in(folder)` lists the files of a folder, and `sizes_in(folder)` their names and bytes.
`read_bytes(path, most)` returns the bytes of a file, and `remove_files(paths)` removes files. Both
take paths of this machine, too.

`in_order(function, items, where, bytes_of)` is a generator like `map(function, items)`.
If `where` (an `AnyPath`) is an address, the calls run in `REQUESTS` threads, ahead of the consumer.

- `bytes_of(item)`: optional; the bytes that the result of an item holds, an int. At most
  `AHEAD_BYTES` are held ahead of the consumer, or one result.

The error of a call is raised in place of its result. At the end, or if the consumer stops, calls
that have not begun are dropped and the others are awaited.
"""

import contextlib
import errno
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from storage import (
    MAX_TABLE_BYTES,
    AnyPath,
    RefusedFileError,
    is_local,
    read_plain,
    size_of,
)

REQUESTS = 16
"""Calls at a time. The client of S3 has ten connections, unless it is configured otherwise."""

AHEAD_BYTES = 64 * 2**20

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    where: AnyPath,
    bytes_of: Callable[[Item], int] = lambda _item: 0,
) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order; in threads if `where` is an address."""
    if is_local(where):
        yield from map(function, items)
        return
    waiting = deque[tuple[int, Future[Result]]]()
    held = 0
    pool = ThreadPoolExecutor(REQUESTS)
    try:
        for item in items:
            size = bytes_of(item)
            while waiting and (len(waiting) >= REQUESTS or held + size > AHEAD_BYTES):
                earlier, future = waiting.popleft()
                held -= earlier
                yield future.result()
            waiting.append((size, pool.submit(function, item)))
            held += size
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_bytes(path: AnyPath, most: int = MAX_TABLE_BYTES) -> bytes:
    """Return the bytes of a file, by a single request if it is at an address (`read_plain` would
    first ask for the size).

    Raises:
        RefusedFileError: no plain file, or more than `most` bytes.
        OSError: the file cannot be read.
    """
    if is_local(path):
        return read_plain(path, most)
    try:
        data = path.fs.cat_file(path.path, start=0, end=most + 1)
    except Exception:
        with contextlib.suppress(Exception):
            if size_of(path) == 0:  # S3 refuses a range of an empty file
                return b""
        raise
    if len(data) > most:
        raise RefusedFileError(errno.EINVAL, f"more than the limit of {most:,} bytes", str(path))
    return data


def sizes_in(folder: AnyPath) -> dict[str, int | None]:
    """Return the names and sizes of the files directly in a folder, sorted by name; empty if the
    folder does not exist. A size is None if the listing of an address has none.
    """
    sizes: dict[str, int | None] = {}
    if is_local(folder):
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_file():
                sizes[path.name] = size_of(path)
        return dict(sorted(sizes.items()))
    # Drop the client's cached listing, before and after: it would lack files that other processes
    # write later, and searching it for one file is slow.
    folder.fs.invalidate_cache(folder.path)
    for entry in folder.fs.ls(folder.path, detail=True) if folder.is_dir() else ():
        if entry["type"] == "file" and (name := entry["name"].rpartition("/")[2]):
            sizes[name] = entry["size"]
    folder.fs.invalidate_cache(folder.path)
    return dict(sorted(sizes.items()))


def files_in(folder: AnyPath) -> list[AnyPath]:
    """Return the files directly in a folder, sorted by name; empty if the folder does not exist."""
    return [folder / name for name in sizes_in(folder)]


def remove_files(paths: Sequence[AnyPath]) -> None:
    """Remove files of one folder. At an address, a request removes many of them."""
    addresses = [path for path in paths if not is_local(path)]
    if addresses:
        addresses[0].fs.rm([path.path for path in addresses])
    for path in filter(is_local, paths):
        path.unlink()
