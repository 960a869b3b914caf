"""Run every measurement that needs a GPU, in stages with time limits, with one command.

    python -m benchmarks.gpu_day --images FOLDER --out FOLDER [--budget SECONDS] [--cpu]

Main entry: `main()`, this click command. Each stage runs in its own process with a time limit. The
first stages answer what no GPU has answered yet. A plan is printed first: the limit of each stage,
their sums, and for which stages the budget is enough. A stage that fails or exceeds its limit does
not stop the later stages, and the results that it has written are kept. The command fails if a
stage did not succeed. The same command again skips the stages that did, and most others (`RESUMED`)
go on with the rows that they lack. Without a GPU (and `--cpu`) or without JPEGs, it ends with an
error at once.

- `--images` (required): a folder of photographs: only JPEGs in `jpeg/`, PNG and WebP in `other/`.
- `--out` (required): the folder that gets a JSON file per measurement, `stages.jsonl` with the exit
  code and seconds of each stage, and `log.txt`. A later call, also on another machine, needs these
  files to know what was measured.
- `--work`: the folder for packed images and runs (default `gpu-day`). Without its sets, they are
  packed again.
- `--budget`: seconds for the whole call (default 3600). A stage starts only if at least its minimum
  time is left; otherwise it counts as failed.
- `--only`: a stage to run, such as `pack`, `loader` or `headroom`; may be repeated. A wrong name
  prints all names. Most stages need the files of `pack`.
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
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch

import console
import interrupts
from benchmarks.end_to_end import SMALL_BACKBONE
from benchmarks.loader import SOURCE
from sharding.build import Tolerance, build
from sharding.catalog import read_catalog
from sharding.format import open_shards

ROOT = Path(__file__).parents[1]
LOG_LINES = 300
"""Last lines of a stage's output that are written to `log.txt`."""

GRACE_S = 5
"""Seconds that a stage over its limit has to end itself."""


OPEN_CHECKS = (
    "machine", "operations", "one image in batches of 30, 7 and 1", "damaged files",
    "hand-over between streams",
)  # fmt: skip
"""Checks of the self-test that no GPU has answered in full."""

ANSWERED_CHECKS = ("decoder alone", "a batch of different operations", "kinds of files")

PACKED = {"pack": "shards/bench", "pack-small": "small/shards/bench"}
"""Stage -> folder of its set below `--work`."""

RESUMED = {"gpu_loader", "gpu_selftest", "loader", "step"}
"""Benchmarks that go on with the rows of their JSON file."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Command with its time limit. It is not started with less than `least_s` seconds left."""

    name: str
    command: tuple[str, ...]
    limit_s: int
    least_s: int


def only(*names: str) -> list[str]:
    """Return the options that choose these rows of a benchmark."""
    return [word for name in names for word in ("--only", name)]


def stages_of(images: Path, out: Path, work: Path, cpu: bool) -> list[Stage]:
    """Return every stage in the order in which they run: first the set, then the questions that
    docs/log.md leaves open, at the end what an H200 has answered before.
    """
    shards = ("--shards", str(work / PACKED["pack"]))
    cores = str(2 if cpu else os.cpu_count() or 1)
    dry = ("--cpu",) if cpu else ()
    recipe = "demo-phase1" if cpu else "phase1-fast"
    training = ("--recipe", f"recipes/{recipe}.toml", "--set", "network.pretrained=false")
    original = ("--recipe", f"recipes/{'demo-phase1' if cpu else 'phase1'}.toml", *training[2:])
    once = ("--rounds", "1", "--seconds", "0.5" if cpu else "6")
    loading = ("--workers", cores, "--repeats", "1", "--batch-size", "30" if cpu else "256")
    backbone = [word for value in SMALL_BACKBONE for word in ("--set", value)] if cpu else []

    def stage(name: str, limit_s: int, least_s: int, *command: str) -> Stage:
        # A dry run is slow and free, so it gets longer limits.
        limit_s *= 5 if cpu else 1
        command = (sys.executable, "-m", *command)
        return Stage(name=name, command=command, limit_s=limit_s, least_s=least_s)

    def packing(name: str, limit_s: int, place: Path, count: str) -> Stage:
        return stage(name, limit_s, 15, "benchmarks.gpu_day", "pack", str(images), str(place),
                     "--count", count, "--jobs", cores)  # fmt: skip

    def bench(name: str, limit_s: int, least_s: int, program: str, *options: str) -> Stage:
        options = (*options, "--json", str(out / f"{name}.json"))
        resume = ("--resume",) if program in RESUMED else ()
        return stage(name, limit_s, least_s, f"benchmarks.{program}", *options, *resume)

    def tests(name: str, limit_s: int, *paths: str) -> Stage:
        # REQUIRE_GPU: without a GPU these tests fail, and each failure is printed at once.
        command = ("pytest", "-v", "-m", "gpu and not slow", *paths,
                   "--continue-on-collection-errors", "-p", "no:cacheprovider")  # fmt: skip
        made = stage(name, limit_s, 20, *command)
        environment = () if cpu else ("env", "REQUIRE_GPU=1")
        return replace(made, command=(*environment, *made.command))

    return [
        packing("pack", 60, work, "240" if cpu else "20480"),
        bench("loader", 90, 40, "loader", *shards, *loading, "--epochs", "1" if cpu else "4",
              *only("dali", "dali-reader")),
        bench("headroom", 120, 40, "headroom", *shards, *training, *once),
        bench("headroom-pil", 90, 40, "headroom", *shards, *training, *once,
              "--set", 'loading.backend="pil"'),
        bench("jpeg-step", 40, 15, "gpu_loader", *shards, *dry, *only("jpeg step"),
              "--seconds", "0.5" if cpu else "1.5"),
        bench("selftest", 90, 20, "gpu_selftest", "--images", str(images), *dry,
              *only(*OPEN_CHECKS)),
        # Twice the batch would need 149,000 MiB, by arithmetic.
        bench("step-more", 150, 60, "step", *training, *once,
              *only("without channels_last", "half the batch")),
        bench("loader-memory", 80, 30, "gpu_loader", *shards, *dry, *only("memory"),
              "--batches", "100" if cpu else "1500", "--memory-s", "50"),
        bench("embedding", 120, 30, "embedding", *shards, *once, *backbone),
        bench("step-phase1", 110, 60, "step", *original, *once, *only("as train.py")),
        # A pipeline takes 2 s to build on an H200, and each kind of damage builds two.
        tests("gpu-tests", 80, "tests/pipeline/test_dali.py",
              "tests/model/training/test_step_waits.py"),
        packing("pack-small", 30, work / "small", "120" if cpu else "5120"),
        bench("end-to-end", 240, 60, "end_to_end",
              "--shards", str(work / PACKED["pack-small"]), "--images", str(images),
              "--work", str(work / f"run-{time.time_ns()}"), "--batch-size", "8" if cpu else "256"),
        bench("loader-settings", 90, 20, "gpu_loader", *shards, *dry, *only("settings"),
              "--seconds", "0.5" if cpu else "1.5"),
        tests("loader-tests", 130, "tests/pipeline", "--ignore", "tests/pipeline/test_dali.py"),
        bench("loader-others", 100, 40, "loader", *shards, *loading, "--epochs", "1",
              *only("pil", "torchvision", "decode")),
        bench("selftest-files", 90, 20, "gpu_selftest", "--images", str(images), *dry,
              *only(*ANSWERED_CHECKS)),
        bench("step", 170, 60, "step", *training, *once,
              *(() if cpu else only("without compile", "without fused AdamW"))),
    ]  # fmt: skip


def plan_of(stages: list[Stage], budget: int) -> list[list[object]]:
    """Return a row for each stage: its limit in seconds, the sum of the limits up to it, and
    whether the budget is enough for it.
    """
    rows: list[list[object]] = []
    total = 0
    for stage in stages:
        total += stage.limit_s
        fits = "yes" if total <= budget else "only if others end earlier"
        rows.append([stage.name, stage.limit_s, total, fits])
    return rows


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


def done_in(out: Path, work: Path, cpu: bool) -> set[str]:
    """Return the names of the stages that succeeded in an earlier call of the same kind: a dry run
    (`cpu`) does nothing for a run on a GPU. A stage of `PACKED` is not done if its set is not in
    `work`, as on another machine.
    """
    path = out / "stages.jsonl"
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = (row for row in map(json.loads, rows) if row["rc"] == 0 and row["cpu"] == cpu)
    names = {row["stage"] for row in done}
    for name in names & PACKED.keys():
        try:
            open_shards([work / PACKED[name]])
        except (OSError, ValueError):
            names = names - {name}
    return names


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
@click.option("--only", "asked", multiple=True, help="Only this stage; may be repeated.")
@click.option("--cpu", is_flag=True, help="A dry run on small data.")
@click.pass_context
def main(
    context: click.Context,
    images: Path | None,
    out: Path | None,
    work: Path,
    budget: int,
    asked: tuple[str, ...],
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
    if unknown := set(asked) - {stage.name for stage in stages}:
        names = ", ".join(stage.name for stage in stages)
        raise click.UsageError(f"no stage {', '.join(sorted(unknown))}; there are {names}")
    done, failed = done_in(out, work, cpu), []
    left_over = [
        stage for stage in stages
        if stage.name not in done and (not asked or stage.name in asked)
    ]  # fmt: skip
    console.table(
        f"limits in seconds, for a budget of {budget}",
        ["stage", "at most", "sum", "the budget is enough"], plan_of(left_over, budget),
    )  # fmt: skip
    for stage in left_over:
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
