"""Read CSV tables that other people made: labels and splits of images, and scores.

Main entry: `csv_rows(path, error)` is a context manager. It yields the list of the columns and an
iterator over pairs, the number of a line and the dict from each column to the text of its cell.

- `path`: `Path` or `UPath` of a file in UTF-8, with a heading and columns separated by commas.
- `error`: the class of the errors, a `ValueError`, each with the path and, for a row, the line.

Space around headings and cells is removed, and so are columns at the end without heading and
without content. The cells that a short row lacks are "". A table must not be misread in silence, so
these are refused: rows with more cells than the heading, two columns of one name, quotes that do
not end, another separator, and another encoding.

`ends_of(path, depth)` yields the ends of a path in such a table, which may be paths of files.
`short(cell)` and `listed(columns)` return a cell and a list of columns for a message.
"""

import contextlib
import csv
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TextIO

from escape import reason_of, text_fault
from storage import AnyPath

Rows = Iterator[tuple[int, dict[str, str]]]

MAX_PARTS = 2048
"""Folders and names in a path of 4,096 bytes, the longest of a file."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = 200  # reprlib's 30 cut most paths

MOST_SHOWN = 20
"""Most columns that a message lists."""


def short(cell: str) -> str:
    """Quote a cell for a message; the middle of one of over 200 characters is left out."""
    return _SHORT.repr(cell)


def listed(columns: Sequence[str]) -> str:
    """Return columns as a list for a message."""
    more = len(columns) - MOST_SHOWN
    texts = [short(column) if column else "(no heading)" for column in columns[:MOST_SHOWN]]
    return ", ".join(texts) + (f" and {more:,} more" if more > 0 else "")


@contextlib.contextmanager
def csv_rows(path: AnyPath, error: type[ValueError]) -> Iterator[tuple[list[str], Rows]]:
    """Open a CSV table, and yield its columns and its rows with the number of their line."""
    try:
        with path.open("r", encoding="utf-8-sig", newline="") as stream:
            rows = _rows(path, stream, error)
            _, heading = next(rows, (0, {}))
            yield [*heading], rows
    except UnicodeDecodeError as fault:
        is_utf16 = fault.object[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in fault.object
        kind = "UTF-16" if is_utf16 else f"in another encoding ({text_fault(fault)})"
        raise error(f"{path} is {kind}, expected a CSV table in UTF-8; save it as UTF-8") from fault
    except csv.Error as fault:
        raise error(f"{path} is not a CSV table in UTF-8 ({reason_of(fault)})") from fault


def _rows(path: AnyPath, stream: TextIO, error: type[ValueError]) -> Rows:
    """Yield the heading, each column as its own cell, and then the rows."""
    reader = csv.reader(stream, strict=True)
    columns = [cell.strip() for cell in next(reader, [])]
    while columns and not columns[-1]:
        del columns[-1]
    if any("\0" in column for column in columns):
        raise error(f"{path} is UTF-16, expected a CSV table in UTF-8; save it as UTF-8")
    separators = {";": "semicolons", "\t": "tabs"}
    if len(columns) == 1 and (wrong := [separators[c] for c in separators if c in columns[0]]):
        raise error(
            f"{path} separates its columns by {wrong[0]} ({columns[0][:60]}), expected commas; "
            "save it with commas, and decimals with a point"
        )
    if twice := [column for column, count in Counter(columns).items() if count > 1]:
        named = short(twice[0]) if twice[0] else "without heading"
        raise error(f"{path} has two columns {named}, expected one; rename or remove one")
    yield reader.line_num, dict(zip(columns, columns, strict=True))
    for cells in reader:
        row = [cell.strip() for cell in cells]
        if any(row[len(columns) :]):
            raise error(
                f"{path}, line {reader.line_num} has {len(row)} cells, the heading "
                f"{len(columns)}; write decimals with a point (0.5), and put a cell that has a "
                "comma between double quotes"
            )
        if any(row):
            row += [""] * (len(columns) - len(row))
            yield reader.line_num, dict(zip(columns, row, strict=False))


def ends_of(path: Sequence[str], depth: int) -> Iterator[tuple[int, str]]:
    """Yield the ends of a path, given as its parts, and where each starts; the longest first.

    No end has more than `depth` parts, those of the longest path that it may be equal to: all ends
    of a cell of 120 kB took 3.6 GB.
    """
    for start in range(max(0, len(path) - min(depth, MAX_PARTS)), len(path)):
        yield start, "/".join(path[start:])
