"""Record which files builds wrote into a set's folder, so that builds never touch other files.

The record is `written.json` in the folder `marks` (`.build/<set>/` below the output). `folder` is
the set's folder. Both are `Path` or `UPath`. Main entries, which raise `ShardError` if they read a
record that is no JSON or has no list `files`:

- `read_record(marks)` returns the file names in the record, a set of texts (empty if there is no
  record).
- `write_record(marks, names)` replaces the names in the record by those in the set `names`. A build
  does so before its first file, so that the next build recognizes the files of a killed one.
- `refuse_foreign_files(folder, marks)` raises `ShardError` if the set's folder contains a file that
  is not recorded and is of one of these kinds: a tar or its `.idx`, a file of `SET_FILES`, or an
  unfinished file. It returns nothing.
- `remove_earlier(folder, marks, shards)` takes the set `shards` of the names of the tars to keep.
  In `folder`, it deletes the recorded files that are not in `files_of(shards)`. In `marks`, it
  deletes every file except the record and the marks of these tars (`<tar>.parquet`). Then it writes
  `files_of(shards)` as the record.
- `files_of(shards)` takes the names of tars and returns the set of the names of all files of a set
  with these tars.
- `packed_sources(marks)` returns the set of the names of the sources whose tars are recorded.
- `packed_sets(out, work)` takes the folder of all sets and the folder of all `marks`. It returns a
  sorted list of the names of the sets whose record has a tar and whose folder has one.
- `is_recorded(name, record)` returns whether the file `name` is in the set `record`; the name of an
  unfinished file counts as that of the finished one.
"""

import json
from collections.abc import Iterable

from sharding.format import EXCLUDED_FILE, INDEX_FILE, SAMPLES_FILE, TIMM_FILE, ShardError
from sharding.remote import files_in, remove_files
from storage import AnyPath, parse_json, read_text, whole_name, write_text

RECORD_FILE = "written.json"

SET_FILES = frozenset({INDEX_FILE, EXCLUDED_FILE, SAMPLES_FILE, TIMM_FILE})
"""Files of every set, in addition to its shards."""


def files_of(shards: Iterable[str]) -> set[str]:
    """Return the names of all files of a set with these shards."""
    return set(SET_FILES).union(*((name, f"{name.removesuffix('.tar')}.idx") for name in shards))


def read_record(marks: AnyPath) -> set[str]:
    """Return the names of the files that builds wrote; empty if there is no record.

    Raises:
        ShardError: the record is damaged.
    """
    path = marks / RECORD_FILE
    if not path.exists():
        return set()
    try:
        return {str(name) for name in parse_json(read_text(path))["files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{path} is damaged ({type(error).__name__}: {error}), so the build cannot tell "
            f"its files from others; move {marks} and the set's folder away and build again"
        ) from error


def write_record(marks: AnyPath, names: set[str]) -> None:
    """Write the record, unless it is unchanged."""
    if read_record(marks) != names or not names:
        write_text(marks / RECORD_FILE, json.dumps({"files": sorted(names)}, indent=1) + "\n")


def packed_sources(marks: AnyPath) -> set[str]:
    """Return the sources of the recorded tars of a set."""
    return {name.rsplit("-", 2)[0] for name in read_record(marks) if name.endswith(".tar")}


def packed_sets(out: AnyPath, work: AnyPath) -> list[str]:
    """Return the sets with a tar that earlier builds packed into `out`, of any catalog."""
    # List only `work`, not the folders in it: the client of a bucket caches listings, and would not
    # see the marks that workers write later.
    return [
        name
        for name in sorted(path.name for path in work.iterdir() if path.is_dir())
        if packed_sources(work / name) and any((out / name).glob("*.tar"))
    ]


def is_recorded(name: str, record: set[str]) -> bool:
    """Return whether a build wrote this file, complete or partial."""
    return name in record or whole_name(name) in record


def refuse_foreign_files(folder: AnyPath, marks: AnyPath) -> None:
    """Check that every shard, index and unfinished file in a set's folder is recorded.

    Raises:
        ShardError: some files are not; the message names them and says what to do.
    """
    record = read_record(marks)
    foreign = [
        path.name
        for path in files_in(folder)
        if (path.name in SET_FILES or path.suffix in (".tar", ".idx", ".partial"))
        and not is_recorded(path.name, record)
    ]
    if foreign:
        more = f" and {len(foreign) - 3:,} more" if len(foreign) > 3 else ""
        raise ShardError(
            f"{folder} contains {', '.join(foreign[:3])}{more}, not recorded in "
            f"{marks / RECORD_FILE} as written by a build. Is it a copied or downloaded set, or a "
            "backup? Move the files away, or choose another --out or set name (nothing was changed)"
        )


def remove_earlier(folder: AnyPath, marks: AnyPath, shards: set[str]) -> None:
    """Delete recorded files and marks of an earlier plan, then record the files of `shards`.

    A set must contain only the shards that its index lists.
    """
    record, names = read_record(marks), files_of(shards)
    remove_files(
        [
            path
            for path in files_in(folder)
            if path.name not in names and is_recorded(path.name, record)
        ]
    )
    remove_files(
        [
            path
            for path in files_in(marks)
            if path.name != RECORD_FILE and path.name.removesuffix(".parquet") not in shards
        ]
    )
    write_record(marks, names)
