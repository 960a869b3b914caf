"""Measure the throughput, start-up time and memory of data loaders on the same images and
augmentations: this project's two backends (Pillow and DALI) and other libraries.

    python -m benchmarks.loader [--images N] [--repeats N] [--peers-python PATH] [--json FILE]

The images are N JPEGs (default 3000) of ImageNet's size, made and packed here (`--originals
FOLDER`: from real JPEGs), or those of the packed set `--shards`. The augmentation policy is that of
phase 1. Each loader runs in its own process; loaders take turns (A B C A B C ...), so that other
programs affect all alike. PATH is the Python interpreter of libraries that this project does not
install. `--only NAME` (repeatable) chooses loaders and their order. `--resume` keeps what FILE has
of an interrupted call and runs only the loaders that it lacks. `--workers`, `--batch-size` and
`--epochs` are the same for all, but `read` has one process and loads about `READ_IMAGES` images.
The speed is measured from the first batch to the last; the time before is the start-up. Once a
second, the memory of a loader's processes is added up (PSS, with shared pages once); the largest
sum counts.

A run is calm if other programs used at most `CALM` of the CPU time. This share is measured on Linux
only; elsewhere it is 0, and every run is calm. Memory is 0 there, too. The printed table has a row
per loader, from its calm runs, if any; `--json` gets the figures of all runs. Compare only the
ratios to torchvision's loader (`BASE`) within one call. The exit code is 1 if a loader failed.

Main entry: `measure(names, place, workers, repeats, pythons, size, keep, done)` runs each loader
until it has `repeats` calm runs, but each at most `2 * repeats` times.

- `names`: a list of keys of `benchmarks.contenders.CONTENDERS`, such as `["pil", "torchvision"]`.
- `place`: an absolute folder (Path) that `pack()` or `unpack()` has filled; it gets logs, too.
- `workers`: processes or threads of each loader (int). `repeats`: calm runs of each (int).
- `pythons`: a dict with the path of a Python interpreter for each name, such as `sys.executable`.
- `size`: the pair (batch size, epochs).
- `keep`: called with the result so far after each run, such as `lambda runs: None`.
- `done`: runs of an earlier call, such as an earlier result (default: none). They count.

It returns a dict, name -> list of runs. A run is a dict with `images_per_s`, `within` (the same
without the waits for the first batch of later epochs), `start_s` (seconds), `bytes` (memory),
`version` (of the library, "" if none is used) and `others` (the share of the CPU time that other
programs used, 0 to 1). If the loader is not installed, the run is `{"missing": package}`. If it
failed or took more than `TIMEOUT_S` seconds, the run has `failed` (the reason) and `log` (the last
lines of its output). Neither is run again.

First fill `place`, an empty folder, by one of these, which return nothing. `pack(place, images,
originals, workers)` makes the images and packs them with `workers` processes; `images` is their
number, `originals` the folder of real JPEGs (Path), or None to draw the images. `unpack(place,
folder)` takes those of a packed set (Path of its folder; ValueError if not all are JPEGs).
"""

import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

import cli
import console
import interrupts
from benchmarks.contenders import CONTENDERS
from benchmarks.images import write_copies, write_images
from benchmarks.peers import BATCH
from benchmarks.resume import kept, resumable
from pipeline.read import ShardReader
from sharding.build import Tolerance, build
from sharding.catalog import read_catalog
from sharding.format import CLASSES, open_shards

ROOT = Path(__file__).parents[1]
BASE = "torchvision"
"""Contender to which the others' speed is compared."""

CALM = 0.1
"""Largest share of the CPU time that other programs may use during a run that counts, of 1."""

TIMEOUT_S = 600
"""Seconds after which a contender is killed and counts as failed."""

SOURCE = """
[sources.part{number:02d}]
license = "measured only"
set = "bench"
real = ["real"]
fake = ["fake"]
"""


def pack(place: Path, images: int, originals: Path | None, workers: int) -> None:
    """Write JPEGs to `images` and pack them as `shards/bench`.

    There are several shards of equal size, because some loaders divide shards among their workers.
    """
    folder = place / "images"
    if originals:
        write_copies(folder, originals, images)
    else:
        write_images(folder, images)
    parts = max(8, workers)
    for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
        link = place / "raw" / f"part{number % parts:02d}" / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.hardlink_to(path)
    sources = [SOURCE.format(number=number) for number in range(parts)]
    (place / "catalog.toml").write_text('[sets]\nbench = "train"\n' + "".join(sources))
    catalog = read_catalog([place / "catalog.toml"])
    build(catalog, place / "raw", place / "shards", jobs=workers, tolerance=Tolerance(max_bad=0))


def unpack(place: Path, folder: Path) -> None:
    """Link a packed set as `shards/bench`, and write its JPEGs to `images`.

    Raises:
        ValueError: the set has images other than JPEGs, which not all contenders read.
    """
    shards = open_shards([folder])
    formats = set(shards.codes("format")[1])
    if formats != {"JPEG"}:
        raise ValueError(f"{folder} has {', '.join(sorted(formats))} images; use a set of JPEGs")
    (place / "shards").mkdir()
    (place / "shards/bench").symlink_to(folder.resolve(), target_is_directory=True)
    reader = ShardReader(shards)
    for row, label in enumerate(shards.column("label").tolist()):
        path = place / "images" / CLASSES[label] / f"{row:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(reader.read([row])[0])


def run(
    name: str, place: Path, workers: int, python: str, size: tuple[int, int], *options: str
) -> dict[str, Any]:
    """Run a contender once; returns images_per_s, start_s and bytes, or `missing` or `failed`.

    `size` is the batch size and the number of epochs.
    """
    out, log = place / "result.json", place / f"{name}.log"
    out.unlink(missing_ok=True)
    command = [python, "-m", "benchmarks.contenders", name, str(place), str(workers), str(out)]
    command += map(str, size)
    started, largest, before = time.monotonic(), 0, cpu_seconds()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, *options], cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() - started < TIMEOUT_S:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                largest = max(largest, memory_of(process.pid))
        finally:
            if process.poll() is None:  # also after Ctrl-C: the contender has its own session
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if not out.exists():
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        return {"failed": f"exit code {process.returncode}: {lines[-1]}", "log": lines[-20:]}
    passed = time.monotonic() - started
    (all_before, own_before), (all_after, own_after) = before, cpu_seconds()
    others_s = (all_after - all_before) - (own_after - own_before)
    marks = json.loads(out.read_text())
    if "first" not in marks:
        return marks
    return {
        "images_per_s": marks["images"] / (marks["last"] - marks["first"]),
        "within": marks["within"],
        "start_s": marks["first"] - started,
        "bytes": largest,
        "version": marks["version"],
        "others": max(0.0, others_s) / passed / (os.cpu_count() or 1),
    }


def cpu_seconds() -> tuple[float, float]:
    """Return the CPU seconds of all programs since boot, and of this one with its ended children.

    Both are 0 where there is no Linux /proc.
    """
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0, 0.0
    user, nice, system, _idle, _wait, *served = stat.read_text().split("\n")[0].split()[1:8]
    ticks = sum(map(int, (user, nice, system, *served[:2])))
    return ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def calm_runs(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the calm runs, or all finished runs if none was calm; see the module."""
    done = [one for one in runs if "images_per_s" in one]
    return [one for one in done if one["others"] <= CALM] or done


def memory_of(process: int) -> int:
    """Return the memory (PSS) of a process and its children in bytes; 0 without a Linux /proc."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
        own = 1024 * int(text.partition("\nPss:")[2].split()[0])
        children = Path(f"/proc/{process}/task").glob("*/children")
        pids = [int(child) for path in children for child in path.read_text().split()]
    except (OSError, IndexError):  # the process has just ended
        return 0
    return own + sum(map(memory_of, pids))


def row_of(name: str, runs: list[dict[str, Any]], base: float | None) -> list[object]:
    """Return a line of the table."""
    title = CONTENDERS[name].title
    for one in runs:
        if "missing" in one:
            return [title, "not installed", *[None] * 6]
        if "failed" in one:
            return [title, "failed", *[None] * 6]
    counted = calm_runs(runs)
    rates = [one["images_per_s"] for one in counted]
    ratio = statistics.median(rates) / base if base else None
    return [
        title,
        runs[0]["version"] or "-",
        round(statistics.median(rates)),
        f"{min(rates):,.0f}-{max(rates):,.0f}",
        f"{ratio:.2f}" if ratio and name != "read" else None,
        f"{statistics.median(one['start_s'] for one in counted):.1f}",
        round(max(one["bytes"] for one in runs) / 2**20) or None,
        f"{sum(one['others'] <= CALM for one in runs)} of {len(runs)}",
    ]


def measure(
    names: list[str],
    place: Path,
    workers: int,
    repeats: int,
    pythons: dict[str, str],
    size: tuple[int, int],
    keep: Callable[[dict[str, list[dict[str, Any]]]], None],
    done: Mapping[str, list[dict[str, Any]]] = MappingProxyType({}),
) -> dict[str, list[dict[str, Any]]]:
    """Run each contender until it has `repeats` calm runs, or `2 * repeats` runs in all.

    A contender that is missing or fails is not run again. `keep` is called with all runs so far
    after each run. Finished runs of `done`, those of an earlier call, count.
    """
    runs = {name: [one for one in done.get(name, []) if "images_per_s" in one] for name in names}
    for name in names:
        if enough(runs[name], repeats):
            continue
        prepared = run(name, place, workers, pythons[name], size, "--prepare")
        runs[name] += [prepared] if prepared else []
    for number in range(2 * repeats):
        for name in names:
            if enough(runs[name], repeats) or any("images_per_s" not in one for one in runs[name]):
                continue
            runs[name].append(run(name, place, workers, pythons[name], size))
            keep(runs)
            last = runs[name][-1]
            rate = last.get("failed") or (
                f"{last['images_per_s']:,.0f} images/s, others {last['others']:.0%}"
            )
            console.log.info("run %d, %s: %s", number + 1, name, rate)
    return runs


def enough(runs: list[dict[str, Any]], repeats: int) -> bool:
    """Return whether a contender has `repeats` calm runs, or `2 * repeats` in all."""
    calm = sum(one.get("others", 1.0) <= CALM for one in runs)
    return calm >= repeats or len(runs) >= 2 * repeats


@click.command(cls=console.Command)
@click.option(
    "--images", type=click.IntRange(min=1), default=3000, show_default=True, help="Images to load."
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Runs of each contender.",
)
@click.option("--workers", default=2, show_default=True, help="Processes or threads per loader.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=BATCH,
    show_default=True,
    help="Images per batch.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Times that the images are loaded.",
)
@click.option(
    "--originals",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Real JPEGs to load, with copies at other qualities. Default: synthetic ones.",
)
@click.option(
    "--shards",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A packed set of JPEGs to load instead; --images is ignored then.",
)
@click.option("--peers-python", help="Interpreter for loaders that this project does not install.")
@click.option("--only", multiple=True, type=click.Choice(list(CONTENDERS)), help="Only these.")
@click.option("--json", "out", type=cli.LocalPath(dir_okay=False), help="File for the figures.")
@resumable
@cli.options()
def main(
    images: int,
    repeats: int,
    workers: int,
    batch_size: int,
    epochs: int,
    originals: Path | None,
    shards: Path | None,
    peers_python: str | None,
    only: tuple[str, ...],
    out: Path | None,
    resume: bool,
) -> None:
    """Measure the loaders in turn, and print one table."""
    names = list(dict.fromkeys(only or CONTENDERS))
    peers = ("spdl", "litdata", "streaming", "energon")
    other = os.path.abspath(peers_python) if peers_python else sys.executable  # noqa: PTH100
    pythons = {name: other if name in peers else sys.executable for name in names}
    # SIGTERM as Ctrl-C, so that it, too, ends the contender and removes the images.
    with interrupts.terminations_interrupt(), tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if shards:
            unpack(place, shards)
        else:
            pack(place, images, originals, workers)
        sizes = [path.stat().st_size for path in (place / "images").rglob("*.jpg")]
        title = (
            f"{len(sizes):,} JPEGs of {sum(sizes) / len(sizes) / 1000:.0f} kB, phase 1 policy, "
            f"batch {batch_size}, {epochs} epochs, {workers} workers, {repeats} runs"
        )

        def keep(runs: dict[str, list[dict[str, Any]]]) -> None:
            if out:  # after each run, so that a crash loses one
                figures = {"title": title, "python": platform.python_version(), "runs": runs}
                out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

        size, done = (batch_size, epochs), kept(out, title, resume).get("runs", {})
        runs = measure(names, place, workers, repeats, pythons, size, keep, done)
        keep(runs)
    rates = [one["images_per_s"] for one in calm_runs(runs.get(BASE, []))]
    base = statistics.median(rates) if rates else None
    columns = [
        "loader", "version", "images/s", "min-max", "ratio", "start-up s", "memory MiB",
        "calm runs",
    ]  # fmt: skip
    console.table(title, columns, [row_of(name, runs[name], base) for name in names])
    for name in names if epochs > 1 else []:
        if rates := [one["within"] for one in calm_runs(runs[name])]:
            rate = statistics.median(rates)
            console.say(f"{name}: {rate:,.0f} images/s without the starts of later epochs")
    failed = {name: one for name in names for one in runs[name] if "failed" in one}
    for name, one in failed.items():
        console.say(f"{name}: {one['failed']}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
