"""Measure the speed of the training step, its share of the device's peak, and its options.

    python -m benchmarks.step [--recipe FILE] [--set KEY=VALUE] [--seconds S] [--json FILE]

The step of `model/training/step.py` runs on random images that stay on the device, without loader
and disk, for S seconds (default 10) per row in each of `--rounds` rounds (default 2). The recipe
(default: phase 1; `--set` changes a value) gives the network, image size, batch and optimizer. A
row is a `Way`: all options of the step. The first row has the options of `train.py` on `--device`
(default `auto`), without EMA, distillation and gradient accumulation; each further row differs from
it in one option. `--only NAME`, which may be repeated, measures only the first row and the row of
this name, such as "with compile". `--resume` keeps the rows that the file of `--json` has of an
interrupted call with the same title. The table has images/s, the ratio to the first row, `of the
peak` and memory; `--json` gets all figures. `of the peak` divides the operations per second of a
step by those of a large matrix product of the same dtype, timed in the same run. The operations of
forward and backward are counted by torch's FlopCounterMode, those of convolutions by
`backward_of_conv()`. The optimizer's time is included, its operations are not. The exit code is 1
if the first row fails.

Main entry: `measure(way, recipe, device, seconds, peaks)` measures one row.

- `way`: `Way(batch=64, dtype="bf16", channels_last=True, compiled=False, fused=False)`. `dtype` is
  a key of `DTYPES`, `compiled` means torch.compile, `fused` the fused AdamW of torch. All fields
  are passed by keyword; `batch` and `dtype` must be given, the others have these defaults.
  `ways_of(base, on_gpu)` returns a dict, name -> `Way`: the first row `base` and all others.
- `recipe`: a complete recipe, `resolved(recipes.load(Recipe, path))`. `recipes` is the package of
  this name, `Recipe` is in `model/recipe.py`, `resolved()` in `model/backbones/resolve.py`.
- `device`: a torch.device.
- `seconds`: the time to measure; at least `LEAST` steps are timed, after `WARM_UP` others.
- `peaks`: a dict, key of `DTYPES` -> operations per second: for `way.dtype`, the result of
  `matrix_peak(device, DTYPES[way.dtype], seconds)`. If `way.dtype` is not in it, KeyError is raised
  after the measurement.

It returns a dict of figures: `ms_per_step`, `images_per_s`, `operations` (of a step),
`share_of_peak` (about 0 to 1), `bytes` (peak memory, or None) and `steps`. If torch raises a
RuntimeError or torch.compile fails (out of memory, no compiler), the dict is `{"failed": reason}`;
other errors are raised.
"""

import gc
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import cli
import console
import recipes
from benchmarks.resume import kept, resumable
from installed import versions
from model.backbones.resolve import resolved
from model.device import (
    choose_compile,
    choose_device,
    choose_precision,
    describe,
    keep_freed_memory,
)
from model.network import build
from model.recipe import Recipe
from model.training.optim import make_optimizer
from model.training.step import TrainState, train_step
from pipeline.batch import Batch

WARM_UP = 5
"""Steps before the clock starts: compilation, cuDNN's choices, allocations."""

LEAST = 3
"""Smallest number of timed steps, even if they take longer than `--seconds`."""

COUNTED = 8
"""Images of the step whose operations are counted."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Way:
    """Options of a training step."""

    batch: int
    dtype: str
    channels_last: bool = True
    compiled: bool = False
    fused: bool = False


def ways_of(base: Way, on_gpu: bool) -> dict[str, Way]:
    """Return `base`, and copies with one option changed each, by name."""
    others = [name for name in DTYPES if name != base.dtype and (on_gpu or name != "fp16")]
    return {
        "as train.py": base,
        "without channels_last" if base.channels_last else "with channels_last": replace(
            base, channels_last=not base.channels_last
        ),
        "without compile" if base.compiled else "with compile": replace(
            base, compiled=not base.compiled
        ),
        "without fused AdamW" if base.fused else "with fused AdamW": replace(
            base, fused=not base.fused
        ),
        **{f"in {name}": replace(base, dtype=name) for name in others},
        "half the batch": replace(base, batch=max(1, base.batch // 2)),
        "twice the batch": replace(base, batch=2 * base.batch),
    }


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Return the seconds of each call after `WARM_UP` calls. A GPU is synchronized after each."""
    for _ in range(WARM_UP):
        work()
    synchronize(device)
    durations = []
    while len(durations) < LEAST or sum(durations) < seconds:
        began = time.perf_counter()
        work()
        synchronize(device)
        durations.append(time.perf_counter() - began)
    return durations


def matrix_peak(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Return the operations per second of the fastest of several products of square matrices."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = seconds_of(lambda: left @ right, device, seconds)
    return 2 * side**3 / min(times)


def random_batch(way: Way, shape: tuple[int, int], device: torch.device) -> Batch:
    """Make a batch of noise in the layout of the loader."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (way.batch, 3, *shape), dtype=torch.uint8, generator=rng).to(
        device
    )
    layout = torch.channels_last if way.channels_last else torch.contiguous_format
    none = np.zeros(way.batch, np.int32)
    return Batch(
        images=images.contiguous(memory_format=layout),
        labels=torch.arange(way.batch, device=device) % 2,
        valid=torch.ones(way.batch, dtype=torch.bool, device=device),
        samples=np.arange(way.batch),
        sources=none,
        replayed=none.astype(np.bool_),
        failures={},
    )


def backward_of_conv(
    grad_shape: torch.Size, images_shape: torch.Size, weight_shape: torch.Size, *rest: Any, **_: Any
) -> int:
    """Count the operations of a convolution's backward pass: the gradients of the images and of
    the weight have as many as the forward pass. torch counts the second without the groups: for a
    depthwise convolution, as many times too much as it has channels.
    """
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = rest
    forward = conv_flop_count(images_shape, weight_shape, grad_shape, transposed)
    return forward * (wanted[0] + wanted[1])


CONVOLUTIONS = {torch.ops.aten.convolution_backward: backward_of_conv}


def operations(train_state: TrainState, batch: Batch, recipe: Recipe) -> int:
    """Count the floating-point operations of one step, forward and backward."""
    with FlopCounterMode(display=False, custom_mapping=CONVOLUTIONS) as counter:
        train_step(train_state, train_state.net, batch, recipe.optim)
    return counter.get_total_flops()


def begin_memory(device: torch.device) -> None:
    """Free unused memory and reset the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif platform.system() == "Linux":
        Path("/proc/self/clear_refs").write_text("5")


def highest_memory(device: torch.device) -> int | None:
    """Return the peak bytes of the GPU's tensors, or of the process on Linux; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if platform.system() != "Linux":
        return None
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def measure(
    way: Way, recipe: Recipe, device: torch.device, seconds: float, peaks: dict[str, float]
) -> dict[str, Any]:
    """Measure one way; returns its figures, or `failed` with the reason."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    begin_memory(device)
    try:
        net = build(recipe.network, pretrained=False)
        if not way.channels_last:
            net = net.to(memory_format=torch.contiguous_format)
        net = net.to(device)
        optimizer = make_optimizer(net.backbone, recipe.optim, fused=way.fused)
        dtype = DTYPES[way.dtype]
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        train_state = TrainState(net, optimizer, scaler, device, dtype)
        # Counted on few images: an uncompiled step of the whole batch needs more memory than a
        # compiled one, and would be the peak.
        few = random_batch(
            replace(way, batch=min(way.batch, COUNTED)), recipe.preprocess.shape, device
        )
        work = operations(train_state, few, recipe) * way.batch // len(few)
        del few
        begin_memory(device)
        batch = random_batch(way, recipe.preprocess.shape, device)
        forward = torch.compile(net) if way.compiled else net
        times = seconds_of(
            lambda: train_step(train_state, forward, batch, recipe.optim), device, seconds
        )
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        # Out of memory, no compiler, or an operator without this dtype: the other ways still run.
        return {"failed": (str(error).strip() or type(error).__name__).splitlines()[0][:150]}
    middle = statistics.median(times)
    return {
        "ms_per_step": 1000 * middle,
        "images_per_s": way.batch / middle,
        "operations": work,
        "share_of_peak": work / middle / peaks[way.dtype],
        "bytes": highest_memory(device),
        "steps": len(times),
    }


@click.command(cls=console.Command)
@cli.options("device")
@click.option(
    "--recipe",
    "recipe_path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=recipes.FOLDER / "phase1.toml",
    help="Network, image size, batch, precision and optimizer. Default: phase 1.",
)
@click.option("--set", "overrides", multiple=True, help="Change a value of the recipe.")
@click.option("--seconds", default=10.0, show_default=True, help="Seconds per row and round.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=2, show_default=True, help="Rounds of all rows."
)
@click.option("--only", multiple=True, help="Measure the first row and this; may be repeated.")
@click.option("--json", "out", type=cli.LocalPath(dir_okay=False), help="File for the figures.")
@resumable
def main(
    device: str,
    recipe_path: Path,
    overrides: tuple[str, ...],
    seconds: float,
    rounds: int,
    only: tuple[str, ...],
    out: Path | None,
    resume: bool,
) -> None:
    """Measure the training step, and the effect of each of its options."""
    recipe = resolved(recipes.load(Recipe, recipe_path, overrides))
    place = choose_device(device)
    keep_freed_memory(place)
    torch.backends.cudnn.benchmark = True
    on_gpu = place.type == "cuda"
    base = Way(
        batch=recipe.loading.batch_size,
        dtype=describe(choose_precision(recipe.run.precision, place)[0]),
        compiled=choose_compile(recipe.run.compile, place)[0],
        fused=on_gpu,
    )
    ways = ways_of(base, on_gpu)
    if strange := set(only) - set(ways):
        raise click.UsageError(f"no row {', '.join(strange)}; there are {', '.join(ways)}")
    ways = {name: way for name, way in ways.items() if not only or name in ("as train.py", *only)}
    used = dict.fromkeys(way.dtype for way in ways.values())
    peaks = {name: matrix_peak(place, DTYPES[name], min(seconds, 2.0)) for name in used}
    device_name = torch.cuda.get_device_name(place) if on_gpu else platform.processor() or "CPU"
    title = (
        f"{recipe.network.name} at {recipe.preprocess.crop_size}, {base.dtype}, "
        f"batch {base.batch}, {device_name}, {rounds} rounds of {seconds:g} s"
    )
    about = {
        "title": title, "peaks": peaks, "threads": torch.get_num_threads(), "versions": versions(),
    }  # fmt: skip
    earlier = kept(out, title, resume).get("rows", {})
    rows_of: dict[str, list[dict[str, Any]]] = {
        name: [row for row in earlier.get(name, []) if "failed" not in row] for name in ways
    }
    for number, (name, way) in itertools.product(range(rounds), ways.items()):
        if len(rows_of[name]) > number or (rows_of[name] and "failed" in rows_of[name][-1]):
            continue
        rows_of[name].append(measure(way, recipe, place, seconds, peaks))
        rate = rows_of[name][-1].get("images_per_s")
        said = f"{rate:.1f} images/s" if rate else rows_of[name][-1]["failed"]
        console.log.info("round %d, %s: %s", number + 1, name, said)
        if out:  # after each row, so that a crash loses one
            text = json.dumps({**about, "rows": rows_of}, indent=1)
            out.write_text(text + "\n", encoding="utf-8")
    show(title, rows_of)
    reached = ", ".join(f"{name} {peak / 1e12:.3g}" for name, peak in peaks.items())
    console.say(f"matrix peak in this run, 10^12 operations per second: {reached}")
    if "failed" in rows_of["as train.py"][-1]:
        reason = rows_of["as train.py"][-1]["failed"]
        raise click.ClickException(f"the step itself failed: {reason}")


def show(title: str, rows_of: dict[str, list[dict[str, Any]]]) -> None:
    """Print a table of medians over the rounds, with the speed relative to the first row."""

    def middle(runs: list[dict[str, Any]], name: str) -> float:
        return statistics.median(run[name] for run in runs)

    rows: list[list[object]] = []
    first = rows_of["as train.py"]
    for name, runs in rows_of.items():
        if "failed" in runs[-1]:
            rows.append([name, None, None, None, None, None, runs[-1]["failed"]])
            continue
        rate = middle(runs, "images_per_s")
        against = None if "failed" in first[-1] else rate / middle(first, "images_per_s")
        memory = None if runs[-1]["bytes"] is None else f"{middle(runs, 'bytes') / 2**20:,.0f}"
        rates = [run["images_per_s"] for run in runs]
        share = f"{100 * middle(runs, 'share_of_peak'):.1f} %"
        shown = f"{rate:,.1f}", f"{min(rates):,.1f}-{max(rates):,.1f}"
        rows.append([name, *shown, against and f"{against:.2f}", share, memory, ""])
    columns = ["step", "images/s", "min-max", "ratio", "of the peak", "memory MiB", ""]
    console.table(title, columns, rows)


if __name__ == "__main__":
    main()
