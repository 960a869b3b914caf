"""Read the images in a parquet table, such as a file of a Hugging Face dataset, one after another.

Main entry: `image_cells(path)` takes the `Path` of a table. It yields a pair for each image, row by
row: "<row>:<column>", and the bytes, or a `DecodeError` (not raised) with the reason why they
cannot be read. The rows are counted from 0. A column has images if its values are structs with
binary `bytes`, as Hugging Face writes them, or if they are binary and the table says so in its
`huggingface` metadata. Other columns are not read. If the metadata names one of them, the first
pair has its name and a `DecodeError`.

`DecodeError` is raised for a file that is no table, has no column with images or no row, is
damaged, or whose images unpack to more than `MAX_RATIO` times the size of the file plus `MAX_SLACK`
bytes, as for a compressed tar; `OSError` if it cannot be read. A cell counts as `LEAST` bytes or
its own. What the footer states is compared first, so that such a table is not begun; then what is
given is counted, as many cells may refer to the same bytes. Cells before the error are good. One
row is in memory at a time, and no image above the limit for a file (`MAX_BYTES` of
imaging/decode.py) is given.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from escape import reason_of
from imaging.decode import DecodeError
from imaging.tar import MAX_RATIO, MAX_SLACK
from sharding.raw import PIECE, cell_of, is_bytes, leaf_of, rows_of
from storage import open_plain, parse_json

LEAST = 512
"""Bytes that a cell counts as at least, as many as the header of a file in a tar: a million empty
cells fit in a few kilobytes."""


def image_cells(path: Path) -> Iterator[tuple[str, bytes | DecodeError]]:
    """Yield the place and the bytes of each image in a parquet table.

    Raises:
        DecodeError: not a table with images, a damaged one, or one that unpacks to too much.
        OSError: the file cannot be read.
    """
    opened = False
    try:
        with open_plain(path) as stream:
            table = pq.ParquetFile(stream, pre_buffer=False, buffer_size=PIECE)
            schema = table.schema_arrow
            opened = True
            columns, others = _image_columns(schema)
            if not columns:
                shown = ", ".join(schema.names[:8]) or "none"
                raise DecodeError(f"a table without a column of images (columns: {shown})")
            if not table.metadata.num_rows:
                raise DecodeError("a table without rows")
            for name in others:
                kind = schema.field(name).type
                yield name, DecodeError(f"a column of images of type {kind}, expected binary"[:200])
            yield from _cells(table, columns, path.stat().st_size)
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, DecodeError) or (isinstance(error, OSError) and error.errno):
            raise
        what = "is damaged" if opened else "not a parquet table, or damaged"
        raise DecodeError(f"{what} ({reason_of(error)})") from error


def _cells(
    table: pq.ParquetFile, columns: list[str], size: int
) -> Iterator[tuple[str, bytes | DecodeError]]:
    """Yield the cells of a table of `size` bytes, row by row, within the limit of bytes."""
    limit = MAX_RATIO * size + MAX_SLACK
    leaves = [leaf_of(table.schema_arrow, column) for column in columns]
    footer = table.metadata
    # Not `column(i)` of a row group: pyarrow ends the process if its statistics are damaged.
    groups = range(footer.num_row_groups)
    stated = sum(footer.row_group(group).total_byte_size for group in groups)
    stated = max(footer.num_rows * len(columns) * LEAST, stated)
    if stated > limit:
        raise DecodeError(f"{_too_much(stated, limit)}, so none is read")
    given = 0
    for at, row in enumerate(row for group in groups for row in rows_of(table, group, leaves)):
        for column in columns:
            data = cell_of(row, column)
            given += max(LEAST, 0 if isinstance(data, DecodeError) else len(data))
            if given > limit:
                raise DecodeError(f"{_too_much(given, limit)}; the remaining rows are not read")
            yield f"{at}:{column}", data


def _too_much(count: int, limit: int) -> str:
    return (
        f"its images unpack to {count:,} bytes or more, expected at most {limit:,} ({MAX_RATIO} "
        f"times its size and {MAX_SLACK:,})"
    )


def _image_columns(schema: pa.Schema) -> tuple[list[str], list[str]]:
    """Return the columns with images, and the columns that only the metadata declares to be images.
    A column named twice cannot be read by its name.
    """
    features: Any = {}
    try:
        features = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = features.get("info", {}).get("features", {})
    except (ValueError, AttributeError):  # no JSON, or unexpected types
        features = {}
    counts = Counter(schema.names)
    columns, others = [], []
    for field in schema:
        about = features.get(field.name) if isinstance(features, dict) else None
        named = isinstance(about, dict) and about.get("_type") == "Image"
        if counts[field.name] != 1:
            continue
        if _has_bytes(field.type) or (named and is_bytes(field.type)):
            columns.append(field.name)
        elif named:
            others.append(field.name)
    return columns, others


def _has_bytes(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    return is_bytes(kind.field("bytes").type)
