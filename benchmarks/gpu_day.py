"""Run every measurement that needs a GPU, in stages with time limits, with one command.

    python -m benchmarks.gpu_day --images FOLDER --out FOLDER [--budget SECONDS] [--cpu]

Main entry: `main()`, this click command. Each stage runs in its own process with a time limit. A
stage that fails or exceeds its limit does not stop the later stages, and the results that it has
written are kept. The command fails if a stage did not succeed; the same command again skips the
stages that did. Without a GPU (and `--cpu`) or without JPEGs, it ends with an error at once.

- `--images` (required): a folder of photographs: only JPEGs in `jpeg/`, PNG and WebP in `other/`.
- `--out` (required): the folder that gets a JSON file per measurement, `stages.jsonl` with the exit
  code and seconds of each stage, and `log.txt`.
- `--work`: the folder for packed images and runs (default `gpu-day`).
- `--budget`: seconds for the whole call (default 3600). A stage starts only if at least its minimum
  time is left; otherwise it counts as failed.
- `--only`: a stage to run, such as `selftest`, `pack`, `step` or `loader`; may be repeated. A wrong
  name prints all names. Most stages need the files of `pack`.
- `--cpu`: a dry run on small data. It shows that every stage works; its figures mean nothing. A
  stage of a dry run does not count as done for a GPU.

Functions (paths must be absolute, because stages run in the project's folder):

- `stages_of(images, out, work, cpu)` takes these folders, and whether it is a dry run. It returns a
  list of all `Stage`s (name, command and limits), in the order in which they run.
- `run(stage, out, limit_s, cpu)` runs one stage, stops it after `limit_s` seconds (SIGTERM, and 5 s
  later SIGKILL), adds to the logs in the existing folder `out`, and returns its exit code (124:
  stopped). `cpu`: a dry run.
- `pack(images, work, count, jobs)` writes `count` files in total to `work/raw/`. They are copies of
  the JPEGs in `images/jpeg/`, taken in turn; half are labeled real, half fake. It packs them with
  `jobs` processes as the shard set (tars with an index) `work/shards/bench`, which the stages use.
  It returns nothing. It raises click.ClickException if there is no JPEG. The subcommand `pack
  IMAGES WORK [--count N] [--jobs N]` calls it.
"""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import torch

import console
import interrupts
from benchmarks.loader import SOURCE
from sharding.build import Tolerance, build
from sharding.catalog import read_catalog

ROOT = Path(__file__).parents[1]
LOG_LINES = 300
"""Last lines of a stage's output that are written to `log.txt`."""

GRACE_S = 5
"""Seconds that a stage over its limit has to end itself."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Command with its time limit. It is not started with less than `least_s` seconds left."""

    name: str
    command: tuple[str, ...]
    limit_s: int
    least_s: int


def stages_of(images: Path, out: Path, work: Path, cpu: bool) -> list[Stage]:
    """Return every stage: first what others depend on, then the most important ones."""
    module = (sys.executable, "-m")
    shards = work / "shards/bench"
    cores = str(2 if cpu else os.cpu_count() or 1)
    dry = ("--cpu",) if cpu else ()
    fast = ("--recipe", "recipes/phase1-fast.toml", "--set", "network.pretrained=false")
    tiny = (
        ("--recipe", "recipes/demo-phase1.toml", "--set", "network.pretrained=false")
        if cpu else fast
    )  # fmt: skip
    seconds = "0.5" if cpu else "6"
    small_backbone = [
        word for setting in (
            'network.name="test_vit"', 'network.head="timm"', "network.blocks=[]",
            "preprocess.crop_size=160", "preprocess.resize_size=160",
        ) for word in ("--set", setting)
    ]  # fmt: skip

    def stage(name: str, limit_s: int, least_s: int, *command: str, json_to: str = "") -> Stage:
        written = ("--json", str(out / f"{json_to or name}.json")) if json_to != "-" else ()
        # A dry run is slow and free, so it gets longer limits.
        limit_s *= 5 if cpu else 1
        return Stage(name=name, command=(*command, *written), limit_s=limit_s, least_s=least_s)

    own_loaders = [word for name in ("dali", "dali-reader", "pil", "torchvision", "decode")
                   for word in ("--only", name)]  # fmt: skip
    return [
        stage("selftest", 180, 20, *module, "benchmarks.gpu_selftest", "--images", str(images),
              *dry),
        # REQUIRE_GPU: without a GPU these tests fail, and each failure is printed at once.
        # By estimate 135 s on an H200; each kind of damage builds two pipelines.
        stage("gpu-tests", 200, 20, *(() if cpu else ("env", "REQUIRE_GPU=1")), *module, "pytest",
              "-v", "-m", "gpu and not slow", "tests/pipeline", "--continue-on-collection-errors",
              "-p", "no:cacheprovider", json_to="-"),
        stage("pack", 120, 15, *module, "benchmarks.gpu_day", "pack", str(images), str(work),
              "--count", "240" if cpu else "20480", "--jobs", cores, json_to="-"),
        stage("loader-settings", 120, 20, *module, "benchmarks.gpu_loader", "--only", "settings",
              "--only", "jpeg step", "--shards", str(shards), "--seconds", "0.5" if cpu else "1.5",
              *dry),
        stage("end-to-end", 200, 40, *module, "benchmarks.end_to_end", "--shards", str(shards),
              "--images", str(images), "--work", str(work / f"run-{time.time_ns()}"),
              *(("--batch-size", "8") if cpu else ())),
        stage("step", 170, 40, *module, "benchmarks.step", *tiny, "--rounds", "1",
              *(() if cpu else ("--only", "without compile", "--only", "without fused AdamW")),
              "--seconds", seconds),
        stage("loader", 120, 40, *module, "benchmarks.loader", "--shards", str(shards),
              "--workers", cores, "--repeats", "1", "--batch-size", "30" if cpu else "256",
              "--epochs", "1" if cpu else "4", *own_loaders),
        stage("headroom", 120, 40, *module, "benchmarks.headroom", "--shards", str(shards), *tiny,
              "--rounds", "1", "--seconds", seconds),
        stage("embedding", 90, 30, *module, "benchmarks.embedding", "--shards", str(shards),
              "--rounds", "1", "--seconds", seconds,
              *(small_backbone if cpu else ())),
        stage("loader-memory", 120, 30, *module, "benchmarks.gpu_loader", "--only", "memory",
              "--shards", str(shards), "--batches", "100" if cpu else "1500", *dry),
        stage("step-more", 200, 60, *module, "benchmarks.step", *tiny, "--rounds", "1",
              "--seconds", "0.5" if cpu else "4", "--only", "half the batch",
              "--only", "without channels_last"),  # twice the batch: 149,000 MiB, by arithmetic
    ]  # fmt: skip


def jpegs_of(images: Path) -> list[Path]:
    """Return the files in `images/jpeg`, in the order of their names.

    Raises:
        click.ClickException: there is none.
    """
    folder = images / "jpeg"
    paths = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    if not paths:
        raise click.ClickException(f"no JPEG in {folder}; put photographs there")
    return paths


def pack(images: Path, work: Path, count: int, jobs: int) -> None:
    """Pack `count` JPEGs as `work/shards/bench`, half labeled real and half fake.

    Each JPEG is a copy of one in `images/jpeg` with a different comment: the bytes of all copies
    differ, and decoding takes the same time.
    """
    originals = [path.read_bytes() for path in jpegs_of(images)]
    parts = max(8, jobs)

    def write(index: int) -> None:
        data, label = originals[index % len(originals)], ("real", "fake")[index % 2]
        comment = b"copy %07d" % index
        segment = b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment
        folder = work / "raw" / f"part{index // 2 % parts:02d}" / label
        (folder / f"{index:06d}.jpg").write_bytes(data[:2] + segment + data[2:])

    for old in (work / "raw").glob("part[0-9]*/*/[0-9][0-9][0-9][0-9][0-9][0-9].jpg"):
        old.unlink()  # of an earlier call, which may have written more
    for part in range(parts):
        for label in ("real", "fake"):
            (work / "raw" / f"part{part:02d}" / label).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(write, range(count)))
    sources = "".join(SOURCE.format(number=part) for part in range(parts))
    (work / "catalog.toml").write_text('[sets]\nbench = "train"\n' + sources, encoding="utf-8")
    catalog = read_catalog([work / "catalog.toml"])
    build(catalog, work / "raw", work / "shards", jobs=jobs, tolerance=Tolerance(max_bad=0))


def done_in(out: Path, cpu: bool) -> set[str]:
    """Return the names of the stages that succeeded in an earlier call of the same kind: a dry run
    (`cpu`) does nothing for a run on a GPU.
    """
    path = out / "stages.jsonl"
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = (row for row in map(json.loads, rows) if row["rc"] == 0 and row["cpu"] == cpu)
    return {row["stage"] for row in done}


def run(stage: Stage, out: Path, limit_s: float, cpu: bool) -> int:
    """Run one stage, log its output, and return its exit code, which is 124 after `limit_s`."""
    console.say(f"== {stage.name}: at most {limit_s:.0f} s")
    began = time.monotonic()
    log = out / f"{stage.name}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            if process.poll() is None:  # also after Ctrl-C: the stage has its own session
                _stop(process)
    seconds = round(time.monotonic() - began, 1)
    # DALI prints a line for each damaged file; these are dropped.
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line[:2000] for line in text if not ("ERROR" in line and "jpeg" in line)]
    with (out / "log.txt").open("a", encoding="utf-8") as stream:
        stream.write("\n".join([f"##### {stage.name} rc {code}", *lines[-LOG_LINES:], ""]))
    with (out / "stages.jsonl").open("a", encoding="utf-8") as stream:
        row = {"stage": stage.name, "rc": code, "seconds": seconds, "cpu": cpu}
        stream.write(json.dumps(row) + "\n")
    log.unlink()
    for line in lines[-4:]:
        console.say(line[:300])
    console.say(f"== {stage.name}: exit code {code} after {seconds} s")
    return code


def _stop(process: subprocess.Popen) -> None:
    """End the session of a stage: by SIGTERM, so that the stage ends what it has started in other
    sessions and removes its files, and what is left after `GRACE_S` by SIGKILL.
    """
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@click.group(cls=console.Group, invoke_without_command=True)
@click.option(
    "--images", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with jpeg/ and other/.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for results.")
@click.option(
    "--work", type=click.Path(path_type=Path, file_okay=False), default=Path("gpu-day"),
    show_default=True, help="Packed images and runs.",
)  # fmt: skip
@click.option("--budget", default=3600, show_default=True, help="Seconds for this call.")
@click.option("--only", multiple=True, help="Only this stage; may be repeated.")
@click.option("--cpu", is_flag=True, help="A dry run on small data.")
@click.pass_context
def main(
    context: click.Context,
    images: Path | None,
    out: Path | None,
    work: Path,
    budget: int,
    only: tuple[str, ...],
    cpu: bool,
) -> None:
    """Run every stage that has not succeeded yet; see the module."""
    if command := context.invoked_subcommand:
        _refuse_options_before(context, command)
        return
    if images is None or out is None:
        raise click.UsageError("needs --images FOLDER and --out FOLDER")
    if not cpu and not torch.cuda.is_available():
        raise click.ClickException("no CUDA device here; run this on a GPU, or try --cpu")
    jpegs_of(images)
    end = time.monotonic() + budget
    out, work = out.resolve(), work.resolve()
    out.mkdir(parents=True, exist_ok=True)
    stages = stages_of(images.resolve(), out, work, cpu)
    if unknown := set(only) - {stage.name for stage in stages}:
        names = ", ".join(stage.name for stage in stages)
        raise click.UsageError(f"no stage {', '.join(sorted(unknown))}; there are {names}")
    done, failed = done_in(out, cpu), []
    for stage in stages:
        if stage.name in done or (only and stage.name not in only):
            continue
        left = end - time.monotonic()
        if left < stage.least_s:
            failed.append(f"{stage.name} (no time)")
            continue
        with interrupts.terminations_interrupt():
            code = run(stage, out, min(stage.limit_s, left), cpu)
        if code:
            failed.append(stage.name)
    if failed:
        raise click.ClickException(f"not done: {', '.join(failed)}; run the same command again")


def _refuse_options_before(context: click.Context, command: str) -> None:
    """Refuse options before a subcommand: it has its own, and would not see these."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{parameter.opts[0]} stands before {command}, which does not see it; see "
                f"`python -m benchmarks.gpu_day {command} --help`"
            )


@main.command("pack")
@click.argument("images", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
@click.option("--count", type=click.IntRange(min=1), default=20_480, show_default=True)
@click.option("--jobs", default=2, show_default=True)
def pack_command(images: Path, work: Path, count: int, jobs: int) -> None:
    """Pack copies of the JPEGs of IMAGES as WORK/shards/bench."""
    pack(images, work, count, jobs)


if __name__ == "__main__":
    main()
