"""Find the images to predict in files, folders, patterns, archives and shard sets.

Main entries, two generators:

- `find_images(paths, excluded)` takes an iterable of paths or patterns (such as `photos/*.jpg`;
  `**` means any subfolders) as texts, such as a list. The iterable may be endless, such as the
  lines of a pipe. It yields `ImageFile`s one by one. Each match of a pattern is treated like a path
  of its own. A file that is one of the paths is yielded whatever its suffix, unless it is an
  archive.
- `watch(folder, excluded)` takes the path of one folder as text. It yields a `Scan`, once a second
  without end. Its `files` are a list of `ImageFile`s: those that are new or changed, complete
  (unchanged for 2 seconds) and not empty. The first list has those already there. A list may be
  empty. Its `until` is a Unix time: every change before it is in this list or an earlier one.
- `excluded`: an empty `Counter` that the caller gives. Both count skipped files in it: reason
  (text) -> number of files. A hidden folder counts as one file; what is skipped in a shard set is
  not counted. `watch()` counts anew in each scan.

An `ImageFile` has a `name`, a text, and `read()`, which takes no arguments and returns the bytes.
The name is: of a file that is one of the paths, this path as it was given; of a match of a pattern,
the path of the match; of a file in a folder, the folder and the path below it; of an image in an
archive, the archive, `/` and the path in it; of an image in a parquet table, the table, `:`, its
row (from 0), `:` and its column.

Folders are searched with their subfolders. Hidden files and links to folders are skipped. An
archive or parquet table in a folder is skipped, except that `find_images()` reads the tars of a
shard set. It also reads an archive or table that is one of the paths, or a match. `watch()` yields
nothing of archives but a damaged tar of a shard set, as a file that cannot be read.

A file or folder that cannot be read is yielded too: its `read()` raises `DecodeError` or `OSError`.
The same holds for a path of `find_images()` that does not exist, and a pattern without a match. If
the folder of `watch()` does not exist, its lists are empty.

`covers(path, folder)` returns whether the images of a path or pattern may include files that are
written below `folder` (a `Path`) later, as PNG files and folders. `is_there(path)` returns whether
a path exists or a pattern matches anything, and `is_image(name)` whether a name has the suffix of
an image. At most `RUN` names of a folder are sorted at a time.
"""

import fnmatch
import functools
import glob
import itertools
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path, PurePath
from typing import NamedTuple, NoReturn

from imaging import tar, zip
from imaging.decode import IMAGE_SUFFIXES, DecodeError, ImageFile, read_file
from imaging.names import HIDDEN, NESTED, is_hidden, no_image

RUN = 10_000
"""Entries of a folder that are sorted at a time. A larger folder is listed in sorted runs."""

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz")
ARCHIVES = (".zip", *TARS)
TABLE = ".parquet"


def find_images(paths: Iterable[str], excluded: Counter[str]) -> Iterator[ImageFile]:
    """Yield the images of each of `paths`, which may be endless.

    A file that cannot be read is yielded too; reading it raises the reason. Skipped files are
    counted in `excluded` by reason.
    """
    for path in paths:
        if os.path.lexists(path) or not glob.has_magic(path):
            yield from _images_of(path, excluded)
            continue
        matched, folders, links = False, set[str](), set[str]()
        pattern = _without_last_stars(path)
        for match in glob.iglob(pattern, recursive=True):  # noqa: PTH207  it takes any pattern
            matched = True
            if folders and not folders.isdisjoint(_above(match)):
                continue  # its folder matched before: already yielded
            if "**" in pattern and (link := _link_above(match, pattern)):
                excluded["a link to a folder"] += link not in links
                links.add(link)
                continue
            if "**" in pattern and os.path.isdir(match):  # noqa: PTH112
                folders.add(os.path.join(match, ""))  # noqa: PTH118
            yield from _images_of(match, excluded)
        if not matched:
            yield unreadable(path, "no file matches this pattern")


def _without_last_stars(pattern: str) -> str:
    """Remove a final `**`: all that is below a folder is the same as the folder."""
    folder = re.sub(rf"({re.escape(os.sep)}\*\*)+$|^\*\*$", "", pattern)
    return folder or (os.sep if pattern.startswith(os.sep) else os.curdir)


def _above(path: str) -> Iterator[str]:
    """Yield the folders above a path, each with a separator at its end."""
    return (path[: place + 1] for place, letter in enumerate(path) if letter == os.sep)


def _link_above(match: str, pattern: str) -> str:
    """Return the first linked folder in the part of `match` that a `**` of `pattern` matched, or
    "". Such links could form a loop.
    """
    named = Path(pattern).parts.index("**") if "**" in Path(pattern).parts else 0
    parts = Path(match).parts
    path = Path(*parts[:named])
    for part in parts[named:]:
        path /= part
        if os.path.islink(path) and os.path.isdir(path):  # noqa: PTH112, PTH114  long names
            return str(path)
    return ""


def is_there(path: str) -> bool:
    """Return whether `path` is a file, a folder or a pattern with a match."""
    return os.path.lexists(path) or any(glob.iglob(path, recursive=True))  # noqa: PTH207


def is_image(name: str) -> bool:
    """Return whether a name has the suffix of an image file."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122  10 times as fast


def _images_of(path: str, excluded: Counter[str]) -> Iterator[ImageFile]:
    lower = path.lower()
    # Not methods of `Path`: they raise for names that are too long or in an unreadable folder.
    if os.path.isdir(path):  # noqa: PTH112
        yield from _in_folder(path, excluded)
    elif lower.endswith(".zip") and os.path.isfile(path):  # noqa: PTH113
        yield from _in_zip(path, excluded)
    elif lower.endswith(TARS) and os.path.isfile(path):  # noqa: PTH113
        yield from _in_tar(path, excluded)
    elif lower.endswith(TABLE) and os.path.isfile(path):  # noqa: PTH113
        yield from _in_table(path)
    else:
        yield ImageFile(path, partial(read_file, path))


def unreadable(name: str, reason: str) -> ImageFile:
    """Return an image whose `read()` raises `DecodeError` with this reason."""
    return ImageFile(name, partial(_fail, reason))


def _fail(reason: str) -> NoReturn:
    raise DecodeError(reason)


def covers(path: str, folder: Path) -> bool:
    """Return whether `folder` is `path` or below `path`. For a pattern: whether it may match
    `folder`, a folder above, or a folder or PNG file below. A `**` may match any folder.
    """
    is_pattern = glob.has_magic(path) and not os.path.exists(path)  # noqa: PTH110  long names
    parts = Path(path).parts
    named = itertools.takewhile(lambda part: not (is_pattern and glob.has_magic(part)), parts)
    fixed = Path(*named)
    if not folder.resolve().is_relative_to(fixed.resolve()):
        return False
    below = folder.resolve().relative_to(fixed.resolve()).parts
    rest = parts[len(fixed.parts) :]
    if "**" in rest:
        rest = rest[: rest.index("**")]
    elif len(below) < len(rest) and not _may_match_pictures(rest[-1]):
        return False
    return all(map(fnmatch.fnmatchcase, below, rest))  # `map` ends with the shorter one


def _may_match_pictures(part: str) -> bool:
    """Return whether the last part of a pattern may match a folder or a PNG file, not only images
    of another suffix, such as `*.jpg` or `*.[jJ][pP][gG]`.
    """
    suffix = PurePath(part).suffix.lower()
    suffixes = set(fnmatch.filter(IMAGE_SUFFIXES, suffix))
    return "*" in suffix or not suffixes or ".png" in suffixes


def _in_folder(top: str, excluded: Counter[str]) -> Iterator[ImageFile]:
    """Yield all images below a folder, also from the tars of a shard set. Hidden files are skipped,
    and links to folders too, because such links may form a cycle.
    """
    from sharding.format import INDEX_FILE  # a slow import, of pyarrow

    shards_of = functools.lru_cache(maxsize=64)(_shards_of)  # called for every tar
    folders = [_entries(str(Path(top)))]
    while folders:
        entry = next(folders[-1], None)
        if entry is None:
            folders.pop()
        elif isinstance(entry, ImageFile):
            yield entry
        elif is_hidden(entry.name):
            excluded[HIDDEN] += 1
        elif entry.is_dir(follow_symlinks=False):
            folders.append(_entries(entry.path))
        elif is_image(entry.name):
            yield ImageFile(entry.path, partial(read_file, entry.path))
        elif entry.name == INDEX_FILE and (shards := shards_of(entry.path)) is not None:
            for shard in shards:
                if not Path(entry.path).with_name(shard).exists():
                    path = str(Path(entry.path).with_name(shard))
                    yield unreadable(path, f"listed in {INDEX_FILE}, but missing")
        elif (shards := shards_of(str(Path(entry.path).with_name(INDEX_FILE)))) is not None:
            if entry.name in shards:
                yield from _in_tar(entry.path, Counter())
        elif os.path.isdir(entry.path):  # noqa: PTH112  links may form a loop
            excluded["a link to a folder"] += 1
        elif entry.name.lower().endswith(ARCHIVES):
            excluded["an archive (name it to look inside)"] += 1
        elif entry.name.lower().endswith(TABLE):
            excluded["a parquet table (name it to read its images)"] += 1
        else:
            excluded[no_image(entry.name)] += 1


def _shards_of(index: str) -> frozenset[str] | None:
    """Return the names of the tars that the index of a shard set lists. None if the file does not
    exist, or is another program's.
    """
    from sharding.format import ShardError, read_index

    if not os.path.exists(index):  # noqa: PTH110
        return None
    try:
        return frozenset(shard["name"] for shard in read_index(Path(index).parent)["shards"])
    except (ShardError, OSError, KeyError, TypeError):
        return None


def _entries(folder: str) -> Iterator[os.DirEntry[str] | ImageFile]:
    """Yield the entries of a folder in sorted runs. A folder that cannot be listed yields one
    unreadable image.
    """
    try:
        with os.scandir(folder) as entries:
            while run := sorted(islice(entries, RUN), key=lambda entry: entry.name):
                yield from run
    except OSError as error:
        yield unreadable(folder, error.strerror or str(error))


def _no_image_inside(name: str) -> str:
    """Return the reason for not reading a member of an archive, by its name."""
    return NESTED if name.lower().endswith(ARCHIVES) else no_image(name)


def _in_zip(path: str, excluded: Counter[str]) -> Iterator[ImageFile]:
    try:
        version = str(Path(path).stat().st_mtime_ns)
        for member in zip.members(Path(path), Path(path).name):
            name = str(Path(f"{path}/{member.name}"))
            if member.excluded == HIDDEN:
                excluded[HIDDEN] += 1
            elif not is_image(member.name):
                excluded[_no_image_inside(member.name)] += 1
            elif member.excluded:
                yield unreadable(name, member.excluded)
            else:
                yield ImageFile(name, partial(zip.read_member, Path(path), member.where, version))
    except (zip.ZipError, OSError) as error:
        yield unreadable(path, getattr(error, "strerror", None) or str(error))


def _in_tar(path: str, excluded: Counter[str]) -> Iterator[ImageFile]:
    def wanted(name: str) -> bool:
        if is_hidden(name):
            excluded[HIDDEN] += 1
            return False
        if not is_image(name):
            excluded[_no_image_inside(name)] += 1
            return False
        return True

    try:
        packed = tar.is_compressed(Path(path))
        for member in tar.members(Path(path), wanted):
            name, read = f"{path}/{member.name}", member.read
            if read is None:
                yield unreadable(name, member.excluded)
            else:  # a packed member is in memory: `read` is cheap, so it is `skip` too
                yield ImageFile(name, read, read) if packed else ImageFile(name, read)
    except (DecodeError, OSError) as error:
        yield unreadable(path, getattr(error, "strerror", None) or str(error))


def _in_table(path: str) -> Iterator[ImageFile]:
    """Yield the images in a parquet table. Each image is in memory until it is read or skipped."""
    from sharding.image_cells import image_cells  # a slow import, of pyarrow

    waiting = tar.Waiting()
    try:
        for place, data in image_cells(Path(path)):
            name = f"{path}:{place}"
            if isinstance(data, DecodeError):
                yield unreadable(name, str(data))
            else:
                read = waiting.put(data)
                yield ImageFile(name, read, read)
    except (DecodeError, OSError) as error:
        yield unreadable(path, getattr(error, "strerror", None) or str(error))


# --- watching a folder ----------------------------------------------------------------------------

POLL_S, SETTLED_S = 1.0, 2.0
"""Seconds between two scans of a folder, and seconds without change after which a file counts as
complete."""

SHARE = 0.1
"""Largest share of a processor core that scans of a folder without changes take."""


class Scan(NamedTuple):
    """Result of one scan of a folder: the images that are new or changed. These `files`, or those
    of an earlier scan, include all changes before the Unix time `until`.
    """

    files: list[ImageFile]
    until: float


def watch(folder: str, excluded: Counter[str]) -> Iterator[Scan]:
    """Yield, every `POLL_S` without end, the complete images below `folder` that are new or changed
    since the last scan. The first scan yields all complete images. Archives are skipped. Scans of a
    large folder are further apart, so that they take at most `SHARE` of a processor core.

    The images of a folder that is missing for some scans, such as a network share, are not new when
    the folder is back.
    """
    first_seen: dict[str, tuple[tuple[int, int], float]] = {}
    given: dict[str, tuple[int, int]] = {}
    is_first_scan = True
    while True:
        now, until, stamps, ready = time.monotonic(), time.time(), {}, []
        began = time.thread_time()
        failed: list[str] = []
        excluded.clear()
        for file in _in_folder(folder, excluded):
            try:
                facts = os.stat(file.name)  # noqa: PTH116  strings, as in the folder
            except NotADirectoryError:  # a member of a tar
                continue
            except OSError:  # deleted meanwhile, or a missing folder
                failed.append(file.name)
                continue
            if stat.S_ISDIR(facts.st_mode):  # a folder that could not be listed
                failed.append(file.name)
            stamp = facts.st_size, facts.st_mtime_ns
            before, since = first_seen.get(file.name, (stamp, now))
            stamps[file.name] = stamp, since if stamp == before else now
            # In the first scan only the modification time tells the age of a file.
            age = now - stamps[file.name][1]
            if is_first_scan:
                age = max(age, time.time() - facts.st_mtime)
            if not facts.st_size or given.get(file.name) == stamp:
                continue
            if age >= SETTLED_S:
                given[file.name] = stamp
                ready.append(file)
            else:
                until = min(until, facts.st_ctime)
        first_seen, is_first_scan = stamps, False
        # Remember files below folders that could not be listed, or all if nothing is listed (an
        # unmounted share): they are not new when they are back.
        if stamps and str(Path(folder)) not in failed:
            below = tuple(f"{name}{os.sep}" for name in failed)
            given = {n: stamp for n, stamp in given.items() if n in stamps or n.startswith(below)}
        took = time.thread_time() - began
        yield Scan(ready, until)
        time.sleep(max(POLL_S, took / SHARE - took))
