"""Measure the speed of `sharding build` against a simple packing loop and against only decoding.

    python -m benchmarks.packing [--images N] [--originals FOLDER] [--json FILE]

N JPEGs (at least 400) are packed: synthetic ones, or variants of the JPEGs in FOLDER. There are
`--repeats` rounds (default 3). In each, every contender runs once on `FEW` images and once on all,
with `--jobs` processes (default 2; the loop has one). The difference of the two times gives
images/s without the time of the start. If it is not positive in each round, the contender's row has
no speed, and a line says that there are too few images. A table of speed, start-up seconds and
memory is printed. `--json` gets the seconds and images/s of every run, and the memory. `build`
decodes and checks every image, finds duplicates, hashes, packs and indexes. The loop packs images
that Pillow can decode. img2dataset runs if its command is given (`--img2dataset`). The contender
with simplejpeg shows the limit: it only reads the files and decodes them.

Main entry: `measure(raw, name, jobs, img2dataset)` runs one contender once, into a temporary
folder.

- `raw`: an absolute folder (Path) with the JPEGs in `bench/real/` and `bench/fake/`, as `.jpg`
  files; `write_images(raw / "bench", count)` of `benchmarks.images` makes them.
- `name`: "sharding build", "ShardWriter loop, Pillow check", "bare simplejpeg decode (limit)", or,
  if its command is given, "img2dataset, webdataset output".
- `jobs`: the number of processes (int).
- `img2dataset`: the path of that command ("": none).

It returns the pair (seconds, peak memory of the largest process in bytes). It raises
subprocess.CalledProcessError if the contender fails. `commands(raw, out, jobs, img2dataset)` takes
also the existing folder to pack into; it writes the scripts of the contenders there and returns a
dict, name -> command line (a list) of a contender.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

import cli
import console
from benchmarks.images import write_copies, write_images

ROOT = Path(__file__).parents[1]
LOOP_NAME, LIMIT_NAME = "ShardWriter loop, Pillow check", "bare simplejpeg decode (limit)"

FEW = 200
"""Images of the short run of each round."""

CATALOG = """
[sets]
bench = "train"
[sources.bench]
license = "measured only"
set = "bench"
real = ["**/real"]
fake = ["**/fake"]
"""

LOOP = """
import io, sys
from pathlib import Path
import webdataset
from PIL import Image

folder, out = map(Path, sys.argv[1:3])
with webdataset.ShardWriter(f"{out}/%05d.tar", maxcount=2048, verbose=0) as writer:
    for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
        data = path.read_bytes()
        try:
            Image.open(io.BytesIO(data)).convert("RGB")
        except OSError:
            continue
        label = int(path.parent.name == "fake")
        writer.write({"__key__": f"{number:08d}", "jpg": data, "cls": label})
"""

LIMIT = """
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import simplejpeg

def decode(paths):
    for path in paths:
        simplejpeg.decode_jpeg(Path(path).read_bytes(), fastdct=False, fastupsample=False)

if __name__ == "__main__":
    jobs = int(sys.argv[3])
    paths = sorted(map(str, Path(sys.argv[1]).rglob("*.jpg")))
    with ProcessPoolExecutor(jobs) as pool:
        list(pool.map(decode, [paths[start::jobs] for start in range(jobs)]))
"""


def commands(raw: Path, out: Path, jobs: int, img2dataset: str) -> dict[str, list[str]]:
    """Return the command of each contender, which packs `raw` into `out`."""
    (out / "loop.py").write_text(LOOP)
    (out / "limit.py").write_text(LIMIT)
    (out / "catalog.toml").write_text(CATALOG)
    files = sorted(raw.rglob("*.jpg"))
    (out / "list.txt").write_text("\n".join(f"file://{path}" for path in files))
    build = ["-m", "sharding", "build", "--raw", raw, "--catalog", out / "catalog.toml"]
    lines = {
        "sharding build": [*build, "--out", out / "shards", "--jobs", jobs],
        LOOP_NAME: [out / "loop.py", raw, out],
        LIMIT_NAME: [out / "limit.py", raw, out, jobs],
    }
    lines = {name: [sys.executable, *map(str, command)] for name, command in lines.items()}
    if img2dataset:
        lines["img2dataset, webdataset output"] = [
            img2dataset, "--url_list", str(out / "list.txt"), "--output_folder", str(out / "i2d"),
            "--output_format", "webdataset", "--resize_mode", "no", "--enable_wandb", "False",
            "--processes_count", str(jobs), "--thread_count", "4",
            "--number_sample_per_shard", "2048",
        ]  # fmt: skip
    return lines


def seconds_and_memory(command: list[str]) -> tuple[float, int]:
    """Run a command; returns its seconds and the peak memory of its largest process in bytes."""
    # `resource` keeps the maximum over all children, so each run is a grandchild.
    code = (
        "import resource, subprocess, sys\n"
        "result = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=-1)\n"
        "sys.exit(result.stderr.decode()[-2000:]) if result.returncode else None\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", code, *command],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return time.perf_counter() - started, int(result.stdout)


def measure(raw: Path, name: str, jobs: int, img2dataset: str) -> tuple[float, int]:
    """Return `seconds_and_memory` of one run of a contender into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        return seconds_and_memory(commands(raw, Path(folder), jobs, img2dataset)[name])


def rates_of(spent: dict[str, list[float]], count: int) -> list[float]:
    """Return the images/s of each round, for `count` more images in the run with all; none if a
    run with all was not longer than the one with few.
    """
    longer = [a - b for a, b in zip(spent["all"], spent["few"], strict=True)]
    return [count / seconds for seconds in longer] if min(longer) > 0 else []


def row_of(
    name: str, rates: dict[str, list[float]], few_s: list[float], memory: int
) -> list[object]:
    """Return a line of the table; a figure that was not measured is None."""
    used = f"{memory / 2**20:.0f}"
    if not (own := rates[name]):
        return [name, *[None] * 6, used]
    speed = statistics.median(own)
    start = statistics.median(few_s) - FEW / speed
    to_loop, to_limit = (
        f"{speed / statistics.median(rates[other]):.2f}" if rates[other] else None
        for other in (LOOP_NAME, LIMIT_NAME)
    )
    return [
        name, round(speed), f"{min(own):,.0f}-{max(own):,.0f}", to_loop, to_limit,
        f"{start:.1f}", f"{(420_000 / speed + start) / 60:.0f}", used,
    ]  # fmt: skip


@click.command(cls=console.Command)
@click.option(
    "--images",
    type=click.IntRange(min=2 * FEW),
    default=6000,
    show_default=True,
    help="Images to pack.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Runs of each contender.",
)
@click.option("--jobs", default=2, show_default=True, help="Processes.")
@click.option(
    "--originals",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Real JPEGs to pack, with copies at other qualities. Default: synthetic ones.",
)
@click.option("--img2dataset", default="", help="Path of its command. Default: not run.")
@click.option("--json", "out", type=cli.LocalPath(dir_okay=False), help="File for the figures.")
def main(
    images: int,
    repeats: int,
    jobs: int,
    originals: Path | None,
    img2dataset: str,
    out: Path | None,
) -> None:
    """Measure the packers in turn, and print one table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = folder / "all" / "bench"
        paths = write_copies(raw, originals, images) if originals else write_images(raw, images)
        for path in paths[:FEW]:
            copy = folder / "few" / path.relative_to(folder / "all")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        size = sum(path.stat().st_size for path in paths) / len(paths)
        with tempfile.TemporaryDirectory() as empty:
            names = list(commands(raw, Path(empty), jobs, img2dataset))
        times: dict[str, dict[str, list[float]]] = {n: {"few": [], "all": []} for n in names}
        memory = dict.fromkeys(names, 0)
        for _ in range(repeats):
            for contender in names:
                for kind in ("few", "all"):
                    took, largest = measure(folder / kind, contender, jobs, img2dataset)
                    times[contender][kind].append(took)
                    memory[contender] = max(memory[contender], largest)
    rates = {name: rates_of(spent, images - FEW) for name, spent in times.items()}
    rows = [row_of(name, rates, times[name]["few"], memory[name]) for name in names]
    title = f"{images:,} JPEGs of {size / 1000:.0f} kB on average, {jobs} processes, {repeats} runs"
    columns = [
        "packer", "images/s", "min-max", "/ loop", "/ limit", "start-up s",
        "420k images, min", "largest process MiB",
    ]  # fmt: skip
    console.table(title, columns, rows)
    for name in names:
        if not rates[name]:
            console.say(f"{name}: too few images for a speed; try more than --images {images}")
    if out:
        figures = {"title": title, "seconds": times, "images_per_s": rates, "bytes": memory}
        out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
