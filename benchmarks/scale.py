"""Measure time and memory of packing a shard set and of opening one, by number of images (Linux).

    python -m benchmarks.scale [--images N]... [--rows N] [--jobs N] [--json FILE]

Main entry: `main()`, this click command. Its options:

- `--images` (`counts`; default 10000 and 100000; may be repeated): for each, so many tiny JPEGs
  (48 x 48 pixels) are packed from a zip archive by `python -m sharding build`. They are tiny, so
  that the cost per sample is measured and not that of its pixels;
- `--rows` (default 420000): samples in the set that is opened. It is the last packed set, with its
  index enlarged. It is opened five times as in training, with the columns that every loader reads;
- `--jobs` (default 2): processes that pack;
- `--json` (`out`; default: none): a JSON file that gets the figures of every run.

All other files are temporary. Two tables are printed: one for packing (seconds, and the memory of
the largest process), and one for opening (the median of the seconds, and the largest memory that it
added). If packing or opening fails, `subprocess.CalledProcessError` is raised.

`write_archive(path, count)` writes the zip file `path` (a `Path`) with `count` JPEGs. It makes the
folder of `path`, which must not exist yet. `grow_index(folder, rows)` changes the index of the
packed set in `folder` (a `Path`) to `rows` samples: its rows are repeated or cut off; the tars stay
as they are. Both return nothing. `OPEN` is the code of the process that opens the set; its argument
is the folder of the set.
"""

import hashlib
import io
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import cli
import console
from benchmarks.packing import CATALOG, seconds_and_memory
from sharding.format import (
    INDEX_FILE,
    ROW_GROUP,
    SAMPLES_FILE,
    SAMPLES_SCHEMA,
    content_sha256,
)

OPEN = """
import re, sys, time
from pathlib import Path
import sharding.format

def peak():  # of this program alone; getrusage would count what started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before, started = peak(), time.perf_counter()
shards = sharding.format.open_shards([Path(sys.argv[1])])
for name in ("label", "offset", "size", "width", "height", "orientation", "shard_code"):
    shards.column(name)
for name in ("source", "generator", "format"):
    shards.codes(name)
print(time.perf_counter() - started, peak() - before, len(shards))
"""


def write_archive(path: Path, count: int) -> None:
    """Write a zip of `count` different JPEGs of 48 x 48 pixels, half real and half fake."""
    path.parent.mkdir(parents=True)
    rng = np.random.default_rng(count)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
            stream = io.BytesIO()
            coarse.resize((48, 48), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
            archive.writestr(f"{('real', 'fake')[number % 2]}/{number:08d}.jpg", stream.getvalue())


def grow_index(folder: Path, rows: int) -> None:
    """Repeat the rows of a set with new keys until it has `rows` samples."""
    table = pq.read_table(folder / SAMPLES_FILE, schema=SAMPLES_SCHEMA)
    turns = -(-rows // len(table))
    table = pa.concat_tables([table] * turns).slice(0, rows).unify_dictionaries()
    keys = pa.array([f"bench_{number:016x}" for number in range(rows)])
    table = table.set_column(table.schema.get_field_index("key"), "key", keys)
    pq.write_table(table, folder / SAMPLES_FILE, row_group_size=ROW_GROUP)
    index = json.loads((folder / INDEX_FILE).read_text())
    index["samples_sha256"] = hashlib.sha256((folder / SAMPLES_FILE).read_bytes()).hexdigest()
    index["content_sha256"] = content_sha256(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


@click.command(cls=console.Command)
@click.option(
    "--images", "counts", type=click.IntRange(min=1), multiple=True, default=[10_000, 100_000],
    show_default=True, help="Images to pack. May be repeated.",
)  # fmt: skip
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=420_000,
    show_default=True,
    help="Samples in the set that is opened.",
)
@click.option("--jobs", default=2, show_default=True, help="Processes.")
@click.option("--json", "out", type=cli.LocalPath(dir_okay=False), help="File for the figures.")
def main(counts: tuple[int, ...], rows: int, jobs: int, out: Path | None) -> None:
    """Measure packing and opening, and print a table of each."""
    packed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "catalog.toml").write_text(CATALOG)
        for count in counts:
            raw, shards = folder / f"raw{count}", folder / f"shards{count}"
            write_archive(raw / "bench" / "images.zip", count)
            command = [
                sys.executable, "-m", "sharding", "build", "--raw", raw, "--out", shards,
                "--catalog", folder / "catalog.toml", "--jobs", jobs,
            ]  # fmt: skip
            took, largest = seconds_and_memory(list(map(str, command)))
            packed.append({"images": count, "seconds": took, "bytes": largest})
        columns = ["images", "seconds", "microseconds per image", "largest process MiB"]
        table = [
            [p["images"], f"{p['seconds']:.1f}", round(1e6 * p["seconds"] / p["images"]),
             round(p["bytes"] / 2**20)]
            for p in packed
        ]  # fmt: skip
        console.table(f"sharding build of tiny JPEGs, {jobs} processes", columns, table)
        grow_index(shards / "bench", rows)
        opened = []
        for _ in range(5):
            result = subprocess.run(
                [sys.executable, "-c", OPEN, shards / "bench"],
                cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            took, memory, count = result.stdout.split()
            opened.append({"samples": int(count), "seconds": float(took), "bytes": int(memory)})
    middle = sorted(opened, key=lambda one: one["seconds"])[len(opened) // 2]
    seconds = [one["seconds"] for one in opened]
    console.table(
        "Opening one set",
        ["samples", "seconds, median", "min-max", "MiB more than before"],
        [[middle["samples"], f"{middle['seconds']:.2f}", f"{min(seconds):.2f}-{max(seconds):.2f}",
          round(max(one["bytes"] for one in opened) / 2**20)]],
    )  # fmt: skip
    if out:
        figures = {"time": time.time(), "packed": packed, "opened": opened}
        out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
