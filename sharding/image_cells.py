"""Read the images in a parquet table, such as a file of a Hugging Face dataset, one after another.

Main entry: `image_cells(path)` takes the `Path` of a table. It yields a pair for each image, row by
row: "<row>:<column>", and the bytes, or a `DecodeError` (not raised) with the reason why they
cannot be read. The rows are counted from 0. A column has images if its values are structs with
binary `bytes`, as Hugging Face writes them, or if the table says so in its `huggingface` metadata.
Other columns are not read.

`DecodeError` is raised for a file that is no table, has no column with images, is damaged, or whose
images unpack to more than `MAX_RATIO` times the size of the file plus `MAX_SLACK` bytes; `OSError`
if it cannot be read. Cells before the error are good. One image is in memory at a time, and none
above the limit for a file (`MAX_BYTES` of imaging/decode.py) is given.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from escape import reason_of
from imaging.decode import DecodeError
from imaging.tar import MAX_RATIO, MAX_SLACK
from sharding.raw import RawError, read_all
from storage import open_plain, parse_json


def image_cells(path: Path) -> Iterator[tuple[str, bytes | DecodeError]]:
    """Yield the place and the bytes of each image in a parquet table.

    Raises:
        DecodeError: not a table with images, a damaged one, or one that unpacks to too much.
        OSError: the file cannot be read.
    """
    try:
        with open_plain(path) as stream:
            table = pq.ParquetFile(stream, pre_buffer=False)
            schema, groups = table.schema_arrow, table.metadata
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DecodeError(f"not a parquet table, or damaged ({reason_of(error)})") from error
    columns = _image_columns(schema)
    if not columns:
        shown = ", ".join(schema.names[:8]) or "none"
        raise DecodeError(f"a table without a column of images (columns: {shown})")
    unpacked, limit = 0, MAX_RATIO * path.stat().st_size + MAX_SLACK
    row = 0
    for group in range(groups.num_row_groups):
        facts = groups.row_group(group)
        unpacked += facts.total_byte_size
        if unpacked > limit:
            raise DecodeError(
                f"unpacks to more than {MAX_RATIO} times its size; the remaining rows are not read"
            )
        places = [(at, column) for at in range(facts.num_rows) for column in columns]
        rows = [{"path": path.name, "member": f"{group}:{at}:{column}"} for at, column in places]
        try:
            for (at, column), data in zip(places, read_all(path.parent, rows), strict=True):
                yield f"{row + at}:{column}", data
        except RawError as error:
            raise DecodeError(str(error)) from error
        row += facts.num_rows


def _image_columns(schema: pa.Schema) -> list[str]:
    """Return the columns with images. A column named twice cannot be read by its name."""
    features: Any = {}
    try:
        features = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = features.get("info", {}).get("features", {})
    except (ValueError, AttributeError):  # not JSON, or JSON of another shape
        features = {}
    names = []
    for field in schema:
        about = features.get(field.name) if isinstance(features, dict) else None
        named = isinstance(about, dict) and about.get("_type") == "Image"
        if schema.names.count(field.name) == 1 and (_has_bytes(field.type) or named):
            names.append(field.name)
    return names


def _has_bytes(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    inner = kind.field("bytes").type
    return bool(pa.types.is_binary(inner) or pa.types.is_large_binary(inner))
