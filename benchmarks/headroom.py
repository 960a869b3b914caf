"""Measure whether the loader or the training step limits training speed.

    python -m benchmarks.headroom [--shards DIR] [--recipe FILE] [--seconds S] [--json FILE]

Main entry: `main()`, this click command. Three modes run in turn: `step` trains on a few batches
that stay on the device, which is the upper limit; `loader` takes batches and does nothing with
them; `full` is training as by `train.py`, with its functions, precision and compilation. A table
with images/s, ms per step and waiting times is printed. So are the GPU memory of the loader and the
AU (accelerator utilization of MLPerf Storage): the time of a step in `step` divided by that in
`full`, the median of the rounds. An AU of 1 means that the loader costs nothing; more than 1 is
noise. Beside the AU the limit is printed: "step-bound" if the AU is at least `ENOUGH` (0.95), else
"loader-bound". A small set has many starts of epochs, whose first batch takes seconds. Where the
clock met some, the speed and the AU without them are printed too. No run is saved.

- `--shards`: the folder of the only packed set to use, without replay (default: the sets of the
  recipe, below `--data`).
- `--data`: the folder of the packed sets (default `data/shards`).
- `--recipe`: the recipe file (default `recipes/phase1.toml`). `--set KEY=VALUE` changes it; may be
  repeated.
- `--seconds`: the time per mode and round (default 60). `--rounds`: default 3.
- `--device`: `auto` (default: a GPU if there is one), `cpu`, `cuda` or `cuda:N`.
- `--json`: a file for the figures of every mode and round (`runs`), the AU of each round (`au`, and
  `au_within` without the starts of epochs), and the limit (`verdict`).

`run(batches, use, stats, device, seconds, steps_per_epoch=0)` measures one mode. It calls
`use(batch)` for each `Batch` of the iterable `batches` until `seconds` have passed or the batches
end. `stats` is a `LoaderStats(names of the sources)` of `pipeline.monitor`; `run()` passes the
batches through it to time the waiting. `device` is the torch.device of the work. It returns the
dict of `stats.row()` with more keys: `steps`, `images_per_s` and `ms_per_step`; `epoch_starts_ms`,
the waits for the first batches of epochs, each of `steps_per_epoch` batches (0: without epochs);
and `images_per_s_within` and `ms_per_step_within`, as if each of these waits had been the median of
the others. The first `WARM_UP` batches are not counted, so more are needed.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

import cli
import console
import recipes
from model.device import describe
from model.recipe import Gate, Recipe
from model.training.assemble import assemble, compile_network
from model.training.plan import plan
from model.training.step import train_step
from pipeline.batch import Batch
from pipeline.monitor import LoaderStats
from pipeline.replay import Replay
from pipeline.stream import Stream

WARM_UP = 8
"""Batches before the clock starts: compilation, cuDNN's choices, the loader's queues."""

CACHED = 4
"""Batches that `step` repeats; more than one, so that the images do not stay in a cache."""

ENOUGH = 0.95
"""AU at or above which the step, not the loader, limits the speed."""


def endless(stream: Stream) -> Iterator[Batch]:
    """Return training batches without end, epoch after epoch."""
    return stream.batches(0, 10**9)


def keep(batch: Batch) -> Batch:
    """Copy a batch, so that the loader can reuse its buffer."""
    return replace(batch, images=batch.images.clone())


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(
    batches: Iterable[Batch],
    use: Callable[[Batch], object],
    stats: LoaderStats,
    device: torch.device,
    seconds: float,
    steps_per_epoch: int = 0,
) -> dict[str, Any]:
    """Use batches for `seconds` after `WARM_UP` batches.

    Returns the loader's statistics, with images/s and ms per step, also without epoch starts.
    """
    batches = iter(batches)
    for batch in itertools.islice(batches, WARM_UP):
        use(batch)
    synchronize(device)
    stats.reset()
    started, steps = time.perf_counter(), 0
    for batch in stats.timed(batches):
        use(batch)
        steps += 1
        if time.perf_counter() - started > seconds:
            break
    synchronize(device)
    passed = time.perf_counter() - started
    starts, others = divided(stats.stalls, steps_per_epoch)
    usual = statistics.median(others) if others else 0.0
    within = passed - sum(max(0.0, wait - usual) for wait in starts)
    return {
        **stats.row(), "steps": steps, "epoch_starts_ms": [1000 * wait for wait in starts],
        "images_per_s": steps * len(batch) / passed, "ms_per_step": 1000 * passed / steps,
        "images_per_s_within": steps * len(batch) / within,
        "ms_per_step_within": 1000 * within / steps,
    }  # fmt: skip


def divided(waits: list[float], steps_per_epoch: int) -> tuple[list[float], list[float]]:
    """Divide the waits after `WARM_UP` batches: those for the first batch of an epoch, and all
    others.
    """
    starts, others = [], []
    for step, wait in enumerate(waits, start=WARM_UP):
        is_start = steps_per_epoch and step % steps_per_epoch == 0
        (starts if is_start else others).append(wait)
    return starts, others


def memory_used(device: torch.device) -> int | None:
    """Return the bytes in use on the GPU by all processes; None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def reserved(device: torch.device) -> int:
    """Return the bytes that torch holds on the GPU; 0 on a CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def middle(runs: list[dict[str, Any]], name: str) -> float:
    """Return the median of one figure over the rounds."""
    return statistics.median(one[name] for one in runs)


def row_of(mode: str, runs: list[dict[str, Any]]) -> list[object]:
    """Return a line of the table."""
    rates = [one["images_per_s"] for one in runs]
    stalls = [None] * 3
    if mode != "step":
        names = ("stall_p50_ms", "stall_p99_ms", "stall_max_ms")
        stalls = [f"{middle(runs, name):.1f}" for name in names]
    return [
        mode,
        round(statistics.median(rates)),
        f"{min(rates):,.0f}-{max(rates):,.0f}",
        f"{middle(runs, 'ms_per_step'):.1f}",
        *stalls,
    ]


def au_of(runs: dict[str, list[dict[str, Any]]], name: str) -> list[float]:
    """Return the AU of each round, by the duration of a step of this name."""
    return [
        alone[name] / both[name] for alone, both in zip(runs["step"], runs["full"], strict=True)
    ]


def epoch_starts(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return a line for each mode in which the clock met starts of epochs, and one for the AU."""
    lines = []
    for mode, rounds in runs.items():
        waits = [wait for one in rounds for wait in one["epoch_starts_ms"]]
        if waits:
            lines.append(
                f"{mode}: {len(waits)} starts of epochs, up to {max(waits):,.0f} ms; without them "
                f"{middle(rounds, 'images_per_s_within'):,.0f} images/s"
            )
    if any(one["epoch_starts_ms"] for one in runs["full"]):
        share = statistics.median(au_of(runs, "ms_per_step_within"))
        lines.append(f"AU without them: {share:.1%}")
    return lines


@click.command(cls=console.Command)
@cli.options("data", "device")
@click.option(
    "--shards",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A packed set to train on. Default: those that the recipe names, below --data.",
)
@click.option(
    "--recipe",
    "recipe_path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=recipes.FOLDER / "phase1.toml",
    help="Recipe to train. Default: phase 1.",
)
@click.option("--set", "overrides", multiple=True, help="Change a value of the recipe.")
@click.option("--seconds", default=60.0, show_default=True, help="Seconds per mode and round.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Rounds of the three modes.",
)
@click.option("--json", "out", type=cli.LocalPath(dir_okay=False), help="File for the figures.")
def main(
    data: Path,
    device: str,
    shards: Path | None,
    recipe_path: Path,
    overrides: tuple[str, ...],
    seconds: float,
    rounds: int,
    out: Path | None,
) -> None:
    """Measure step, loader and both, and print which is the limit."""
    recipe = recipes.load(Recipe, recipe_path, overrides)
    if shards:
        data, names = shards.parent, replace(recipe.data, train=[shards.name])
        recipe = replace(recipe, data=names, replay=Replay())
    # Nothing is validated or saved, so the training set can stand in for the validation set.
    trained = replace(recipe.data, validate=recipe.data.train, allow_shared_images=True)
    # A new name: a run of this name in the folder of runs would be resumed.
    unsaved = replace(recipe, data=trained, gate=Gate(), name=f"headroom-{time.time_ns()}")
    planned = plan(unsaved, data, Path("runs"), device=device)
    place, stream = planned.device, planned.stream
    stats = LoaderStats(stream.pool.shards.codes("source")[1])
    before, own = memory_used(place), reserved(place)
    batches = endless(stream)
    cached = [keep(batch) for batch in itertools.islice(batches, CACHED)]
    # The copies of the batches are torch's memory, not the loader's.
    copies = reserved(place) - own
    loader_bytes = None if before is None else memory_used(place) - before - copies
    batches.close()
    for line in planned.describe():
        console.log.info("%s", line)
    train_state = assemble(planned)
    forward = compile_network(planned, train_state)

    def step(batch: Batch) -> None:
        train_step(train_state, forward, batch, recipe.optim)

    modes: dict[str, tuple[Callable[[], Iterator[Batch]], Callable[[Batch], object]]] = {
        "step": (lambda: itertools.cycle(cached), step),
        "loader": (lambda: endless(stream), lambda _batch: None),
        "full": (lambda: endless(stream), step),
    }
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU"
    precision = describe(train_state.dtype)
    title = (
        f"{recipe.network.name}, {precision}, batch {recipe.loading.batch_size}, {name}, "
        f"images through {stream.loader.backend}, {rounds} rounds of {seconds:g} s"
    )
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    for number in range(rounds):
        for mode, (source, use) in modes.items():
            steps = 0 if mode == "step" else stream.steps_per_epoch
            runs[mode].append(run(source(), use, stats, place, seconds, steps))
            console.log.info(
                "round %d, %s: %.0f images/s", number + 1, mode, runs[mode][-1]["images_per_s"]
            )
            if out:  # after each mode, so that a crash loses one
                rows = {"title": title, "loader_bytes": loader_bytes, "runs": runs}
                out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    au = au_of(runs, "ms_per_step")
    share = statistics.median(au)
    bound = "step-bound" if share >= ENOUGH else "loader-bound"
    columns = [
        "mode", "images/s", "min-max", "ms per step", "stall p50 ms", "p99", "max",
    ]  # fmt: skip
    console.table(title, columns, [row_of(mode, figures) for mode, figures in runs.items()])
    memory = "-" if loader_bytes is None else f"{loader_bytes / 2**20:,.0f} MiB"
    console.say(f"AU {share:.1%} ({min(au):.1%}-{max(au):.1%}): {bound}")
    for line in epoch_starts(runs):
        console.say(line)
    console.say(f"GPU memory of the loader alone: {memory}")
    if out:
        figures = {
            "title": title, "au": au, "au_within": au_of(runs, "ms_per_step_within"),
            "verdict": bound, "loader_bytes": loader_bytes, "runs": runs,
        }  # fmt: skip
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
