"""The record of what a build wrote into a set's folder: it replaces and removes these files only.

`.build/<set>/written.json` below the output names them. It is written before the first of them, so
that a killed build knows its files again. Everything else in the folder belongs to somebody else.
"""

import json
import re
from collections.abc import Iterable

from sharding.format import EXCLUDED_FILE, INDEX_FILE, SAMPLES_FILE, TIMM_FILE, ShardError
from storage import AnyPath, files_in, write_text

RECORD_FILE = "written.json"

SET_FILES = frozenset({INDEX_FILE, EXCLUDED_FILE, SAMPLES_FILE, TIMM_FILE})
"""What every set holds beside its shards."""

_PARTIAL = re.compile(r"(.+)\.\d+\.partial")


def files_of(shards: Iterable[str]) -> set[str]:
    """The names of the files of a set with these shards."""
    return SET_FILES.union(*((name, f"{name.removesuffix('.tar')}.idx") for name in shards))


def read_record(marks: AnyPath) -> set[str]:
    """The names of the files that builds wrote; empty where none did.

    Raises:
        ShardError: the record is damaged.
    """
    path = marks / RECORD_FILE
    if not path.exists():
        return set()
    try:
        return {str(name) for name in json.loads(path.read_text(encoding="utf-8"))["files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{path} is damaged ({type(error).__name__}: {error}), so the build cannot tell "
            f"its files from others; move {marks} and the set's folder away and build the set anew"
        ) from error


def write_record(marks: AnyPath, names: set[str]) -> None:
    """Replace the record; an equal one stays untouched."""
    if read_record(marks) != names or not names:
        write_text(marks / RECORD_FILE, json.dumps({"files": sorted(names)}, indent=1) + "\n")


def is_recorded(name: str, record: set[str]) -> bool:
    """Whether a build wrote this file, or left it unfinished."""
    partial = _PARTIAL.fullmatch(name)
    return name in record or bool(partial and partial[1] in record)


def refuse_foreign_files(folder: AnyPath, marks: AnyPath) -> None:
    """Check that a set's folder holds no shard, index or unfinished file but recorded ones.

    Raises:
        ShardError: it does; the message names them and the way out.
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
            f"{folder} holds {', '.join(foreign[:3])}{more}, which no build recorded in "
            f"{marks / RECORD_FILE} wrote: a copied or downloaded set, or a backup? Move them "
            "away, or choose another --out or set name (nothing was changed)"
        )


def remove_earlier(folder: AnyPath, marks: AnyPath, shards: set[str]) -> None:
    """Delete recorded files and marks of an earlier, different plan: a set holds what its index
    lists. The record then names the files of `shards`.
    """
    record, names = read_record(marks), files_of(shards)
    for path in files_in(folder):
        if path.name not in names and is_recorded(path.name, record):
            path.unlink()
    for path in files_in(marks):
        if path.name != RECORD_FILE and path.name.removesuffix(".parquet") not in shards:
            path.unlink()
    write_record(marks, names)
