"""Make small copies of raw datasets, as folders and as parquet tables, and list their rows."""

import json
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tests.builders import encode, photo


class Row(NamedTuple):
    set: str
    label: str
    generator: str
    group: str


SEEDS = iter(range(10_000))


def image(kind: str = "JPEG", size: tuple[int, int] = (48, 40)) -> bytes:
    """Return a new image file that differs from all previous ones."""
    return encode(photo(next(SEEDS), *size), kind)


def put(folder: Path, *names: str, kind: str = "JPEG") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(kind))


def parquet(path: Path, columns: dict[str, list], classes: dict[str, list[str]] | None = None):
    """Write a parquet file like Hugging Face: images as {bytes, path}, class names as metadata."""
    arrays = {
        name: pa.array([{"bytes": v, "path": None} for v in values])
        if isinstance(values[0], bytes)
        else pa.array(values)
        for name, values in columns.items()
    }
    features = {
        name: {"names": names, "_type": "ClassLabel"} for name, names in (classes or {}).items()
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(arrays).replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=3)
