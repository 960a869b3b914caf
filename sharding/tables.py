"""Read the tables of a raw dataset: CSV files with a row per image, and columns of parquet files.

- `read_rows(source, root, raw, files)` returns the rows of the CSV files that `source.table` names,
  as `LabelRows`, or None if it names none. `source` is a `Source`, `root` the name of its folder
  below `raw`, the folder of the raw datasets (`Path` or `UPath`), and `files` the list of the
  source's `RawFile`s (`walk()` of sharding/raw.py). `row_of(path)` of the rows returns the row of a
  file, or why it has none.
- `agrees(rule, row)` returns whether a row has the values that `where` of a `Rule` demands.
- `equal_to(values, column, value, path)` takes a pyarrow table and the path to name in errors. It
  returns a mask of the rows whose `column` has a value. `texts_of(values, column, path)` returns
  the column as texts.
- `naming_damage(path)` is a context manager that turns errors of a damaged table into one that
  names `path`.

A damaged table, and one without a column or a class that the catalog names, raises `CatalogError`.
"""

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from escape import reason_of
from sharding.catalog import CatalogError, Rule, Source, Table
from sharding.csv_rows import csv_rows, ends_of, listed
from sharding.format import CLASSES
from sharding.raw import RawFile, nfc
from storage import AnyPath, parse_json


@contextlib.contextmanager
def naming_damage(path: AnyPath) -> Iterator[None]:
    """Add the file name of a table to errors of the libraries that read it."""
    try:
        yield
    except CatalogError:
        raise
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        reason = reason_of(error)
        raise CatalogError(
            f"{path} is damaged or not a table ({reason}); fetch it again"
        ) from error


@dataclass
class LabelRows:
    """Rows of the CSV files of a source, by the name or path of their image in lower case.

    A row is for the files whose path ends with its key, in whole parts; of several such rows, the
    one with the longest key. The key is the whole path if there is such a file below the folder of
    the CSV file. `fitted` are the keys of rows that are for a file because they end with its path
    (`fit`), and the paths. `paths` are the paths of all files of the source. `shared` are keys
    without a folder that several files would have. `csv_files` counts the CSV files. Several rows
    of one key contradict each other if they differ in one of the `deciding` columns.
    """

    table: Table
    paths: Set[str] = frozenset()
    deciding: Set[str] = frozenset()
    rows: dict[str, dict[str, str]] = field(default_factory=dict)  # key -> its first row
    differing: dict[str, dict[str, set[str]]] = field(default_factory=dict)  # values of other rows
    fitted: dict[str, str] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    example: str = ""
    csv_files: int = 0

    @property
    def no_row(self) -> str:
        """Return the reason for a file without a row."""
        example = f", such as {self.example[:40]!r}" if self.example else ""
        return f"no row in {self.table.name} for its name (key column {self.table.key!r}{example})"

    def add(self, named: str, row: Mapping[str, str], folder: str) -> None:
        """Add the row of the image `named`, of a CSV file in `folder`."""
        self.example = self.example or named
        key = nfc(str(PurePosixPath(named.replace("\\", "/")))).lower().lstrip("/")
        beside = f"{nfc(folder).lower()}/{key}"
        key = beside if beside in self.paths else key
        self._join(key, dict(row))

    def _join(self, key: str, row: dict[str, str]) -> None:
        first = self.rows.setdefault(key, row)
        for column in {*first, *row}:
            if first.get(column, "") != (value := row.get(column, "")):
                self.differing.setdefault(key, {}).setdefault(column, set()).add(value)

    def fit(self, root: str) -> None:
        """Assign unused rows whose key is a path on another machine to the file of the same end:
        its path, from `root` or from inside `root`, is the end of the key. Not if the part before
        this end is a folder in `root`.
        """
        inside = f"{nfc(root).lower()}/"
        folders = {str(folder) for path in self.paths for folder in PurePosixPath(path).parents}
        used = {self.key_of(path) for path in self.paths}
        depth = max((path.count("/") + 1 for path in self.paths), default=0)
        for key in [key for key in self.rows if "/" in key and key not in used]:
            parts = key.split("/")
            paths = (
                path
                for at, end in ends_of(parts, depth)
                if 0 < at < len(parts) - 1  # an end with a folder
                for path in (end, inside + end)
                if path in self.paths and inside + "/".join(parts[:at]) not in folders
            )
            if path := next(paths, ""):
                before = self.key_of(path)
                self.fitted[key] = path
                self._take(path, key)
                if "/" in before and before != path:
                    self._take(path, before)

    def _take(self, key: str, other: str) -> None:
        """Add the rows of another key to those of `key`."""
        self._join(key, self.rows[other])
        for column, values in self.differing.get(other, {}).items():
            for value in values:
                self._join(key, {**self.rows[other], column: value})

    def key_of(self, path: str) -> str:
        """Return the key of the row of a file, or "" if it has none."""
        key = nfc(path).lower()
        while key and key not in self.rows:
            key = key.partition("/")[2]
        return key

    def row_of(self, path: str, deciding: Iterable[str] | None = None) -> Mapping[str, str] | str:
        """Return the row of a file, or the reason why it has none. Several rows of one key may
        differ, except in the columns `deciding` (default: the columns in rules).
        """
        key = self.key_of(path)
        if key in self.shared:
            return "several files have its name, and its row in the table has no folder"
        if not key:
            return self.no_row
        deciding = self.deciding if deciding is None else deciding
        if any(column in self.differing.get(key, {}) for column in deciding):
            return "its rows in the table contradict each other"
        return self.rows[key]


def read_rows(
    source: Source, root: str, raw: AnyPath, files: Sequence[RawFile]
) -> LabelRows | None:
    """Read the CSV tables of a source; None if its catalog entry names none."""
    if not source.table:
        return None
    pattern = source.table.name.lower()
    rules = [rule for label in range(len(CLASSES)) for rule in source.rules(label)]
    deciding = frozenset[str]().union(*(rule.where for rule in rules if not rule.column))
    needed = {source.table.key, *deciding}
    paths = {nfc(f"{root}/{file.inside}").lower() for file in files}
    rows = LabelRows(source.table, paths, deciding)
    for file in files:
        if not fnmatch.fnmatch(file.inside.rpartition("/")[2].lower(), pattern) or file.member:
            continue
        if file.excluded:  # images would be labeled by folder alone
            raise CatalogError(
                f"{raw / file.path} is {file.excluded}, expected a table; put the file itself there"
            )
        rows.csv_files += 1
        with csv_rows(raw / file.path, CatalogError) as (columns, lines):
            if missing := sorted(needed - {*columns}):
                raise CatalogError(
                    f"{raw / file.path} has columns {listed(columns)}, expected "
                    f"{', '.join(map(repr, missing))} among them"
                )
            for line, row in lines:
                named = row.pop(source.table.key)
                if not named:
                    raise CatalogError(
                        f"{raw / file.path}, line {line} has no name of an image in the column "
                        f"{source.table.key!r}; complete or remove it, or fetch the table again"
                    )
                rows.add(named, row, f"{root}/{file.inside}".rpartition("/")[0])
    rows.fit(root)
    return rows


def agrees(rule: Rule, row: Mapping[str, str]) -> bool:
    """Return whether a row has all values of the rule's `where`."""
    return all(row.get(column, "").strip() == str(value) for column, value in rule.where.items())


def equal_to(values: pa.Table, column: str, value: str | bool | int, path: AnyPath) -> np.ndarray:
    """Return the rows where a column has a value; a text for an integer column is a class name."""
    cells = values.column(column)
    if isinstance(value, str) and pa.types.is_integer(cells.type):
        names = class_names(values.schema, column, path)
        if value not in names:
            raise CatalogError(
                f"{path}: integer column {column} has the class names {names or 'of none'}; "
                f"the catalog expects the class {value!r}, and labels are not guessed"
            )
        value = names.index(value)
    return np.array([entry == value for entry in cells.to_pylist()], bool)


def texts_of(values: pa.Table, column: str, path: AnyPath) -> list[str]:
    """Return a column as lower-case text, class numbers as class names, missing values as ""."""
    names = class_names(values.schema, column, path)
    cells = values.column(column).to_pylist()
    if names:
        named: dict[Any, str] = {None: "", -1: "", **dict(enumerate(names))}  # -1: unlabeled
        if unknown := set(cells) - named.keys():
            raise CatalogError(
                f"{path}: column {column} has the value {unknown.pop()!r}, expected a number of "
                f"its {len(names)} classes; fetch it again"
            )
        cells = [named[cell] for cell in cells]
    return ["" if cell is None else str(cell).strip().lower() for cell in cells]


def class_names(schema: pa.Schema, column: str, path: AnyPath) -> list[str]:
    """Return the class names of a Hugging Face `ClassLabel` column; empty for other columns."""
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = parse_json(text).get("info", {}).get("features", {})
        return list(features.get(column, {}).get("names", []))
    except (ValueError, AttributeError, TypeError) as error:  # no JSON, or unexpected types
        reason = reason_of(error)
        raise CatalogError(
            f"{path}: its `huggingface` metadata is damaged ({reason}); fetch it again"
        ) from error
