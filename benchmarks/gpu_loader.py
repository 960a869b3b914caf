"""Measure the DALI backend on a GPU: its speed by settings, and its memory over many batches.

    python -m benchmarks.gpu_loader --shards SET --json FILE [--only PART] [--seconds S] [--cpu]

Main entry: `main()`, this click command. Three functions yield their results as dicts, one per
measurement. Each dict is printed at once, and FILE is written anew with all dicts so far, so that a
crash loses only one. FILE is a JSON object: part -> list of its dicts, and `title`, the device and
the number of images.

- `--shards`: the folder of a packed set of JPEGs.
- `--json`: FILE; optional.
- `--only`: `jpeg step`, `settings`, `more settings` or `memory` (`PARTS`); may be repeated, and
  the parts run in this order. Default: all.
- `--resume`: dicts of FILE are kept, apart from errors and those of `memory`, and not measured
  again.
- `--seconds`: the time per dict of all parts but `memory` (default 2).
- `--batches` and `--memory-s`: batches and seconds at most of `memory` (default 1500 and 90).
- `--cpu`: a dry run with CPU operators, whose figures mean nothing. Without a GPU or `--cpu`, the
  command ends with an error.

The functions take SET (`shards`, a Path), the device (a torch.device: `cuda:0`, or `cpu` for a dry
run), and `seconds`:

- `settings(shards, device, seconds, more, done)`: images/s of reading, decoding and augmenting,
  for the settings of the part `settings`, or with `more` of `more settings`. The keys are
  `batch` (batch size), `threads` (of DALI), `share` (of the JPEGs that the GPU's JPEG engine
  decodes; DALI's `hw_decoder_load`), `policy`, and `images_per_s`, or `error` (a text). `policy` is
  "phase 1" (the recipe's augmentation) or the name of one that omits operations (`WITHOUT`). On a
  GPU, the first dict is for the settings that training uses (`OWN`).
- `jpeg_step(shards, device, seconds, done)`: images/s of three ways to compress pictures of SET as
  JPEG and decode them. Noise would have 2.5 times the bytes of photographs, and libjpeg's time
  grows with them.
  The keys are `way` and `images_per_s`. `way` is "none" (no JPEG), "libjpeg on the host" (as in
  training) or "DALI's GPU operator" (only on a GPU).
- `memory(shards, device, batches, seconds)`: memory, about ten times while `batches` batches are
  loaded. It ends early after `seconds`. Every fiftieth batch has a damaged image. The keys are
  `batches`, `images` and `seconds` so far, `host_mib` and `gpu_mib` (memory in MiB; None if not
  known), `damaged` (damaged images so far) and `named` (those that were reported as failures).

`done` (default: none) are dicts of an earlier call, which are not measured again.
"""

import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from nvidia.dali import fn, pipeline_def

import cli
import console
import recipes
from benchmarks import peers
from benchmarks.gpu_selftest import damaged_png
from benchmarks.resume import kept, resumable
from imaging.decode import decode_image
from pipeline import pil
from pipeline.augment import AugmentPolicy
from pipeline.batch import Request
from pipeline.dali import HW_DECODER_LOAD, DaliBackend
from pipeline.dali_graph import _jpeg
from pipeline.loader import _Requests, open_loader
from pipeline.loading import Loading
from pipeline.params import train_params
from pipeline.preprocess import Preprocess
from pipeline.read import ShardReader
from pipeline.replay import Replay
from pipeline.stream import Stream, open_pool
from sharding.format import open_shards

WARM_UP = 10
"""Batches before the clock starts."""

OWN = (256, 16, HW_DECODER_LOAD)
"""Batch size, threads and share that the product chooses on a GPU with 16 cores."""

SETTINGS = (
    OWN, (256, 4, HW_DECODER_LOAD), (256, 8, HW_DECODER_LOAD), (256, 16, 0.0), (256, 16, 0.3),
    (256, 16, 1.0),
)  # fmt: skip
"""Settings of the part `settings`, which also has `WITHOUT`: all that is measured in a minute."""

MORE_SETTINGS = (
    (256, 16, 0.9), (256, 16, 0.15), (256, 8, 0.3), (256, 4, 1.0), (64, 16, 0.65),
    (512, 16, 0.65), (30, 16, 0.65), (30, 16, 0.3), (30, 4, 0.65),
)  # fmt: skip

WITHOUT: dict[str, dict[str, float]] = {
    "without jpeg": {"jpeg": 0.0},
    "without resample": {"resample": 0.0},
    "without jitter and blur": {"color_jitter": 0.0, "blur": 0.0},
    "crop and flip alone": {
        "jpeg": 0.0,
        "resample": 0.0,
        "color_jitter": 0.0,
        "blur": 0.0,
        "grayscale": 0.0,
    },
}

BROKEN_EVERY = 50
"""One batch of so many contains a damaged image, in `memory`."""


def requests_of(shards: Path, batch: int, device: torch.device, **changes: float) -> Iterator:
    """Yield the loader's requests to its backend, epoch after epoch, with the policy of phase 1."""
    pool = open_pool(shards.parent, [shards.name], Replay())
    preprocess = recipes.build(Preprocess, peers.RECIPE["preprocess"], "phase1")
    augment = recipes.build(dict[str, AugmentPolicy], peers.RECIPE["augment"], "phase1")
    augment = {name: replace(policy, **changes) for name, policy in augment.items()}
    loading = Loading(batch_size=batch, backend="dali", num_workers=1)
    loader = open_loader(pool.shards, preprocess=preprocess, loading=loading, device=device)
    stream = Stream(loader, pool, Replay(), augment, "train", 1)
    for number in itertools.count():
        epoch = stream.epoch(number)
        params_for = train_params(
            pool.shards, augment, stream.policy, preprocess, stream.seed, number
        )
        yield from map(_Requests(loader, epoch, params_for).make, range(epoch.steps))


def images_per_s(
    requests: Iterator[Request], setting: tuple[int, int, float], device: torch.device, s: float
) -> float:
    """Measure images/s of the backend over `s` seconds after `WARM_UP` batches."""
    batch, threads, share = setting
    batches = DaliBackend((peers.SIZE, peers.SIZE), batch, device, threads, share).run(requests)
    for _ in itertools.islice(batches, WARM_UP):
        pass
    synchronize(device)
    began, count = time.perf_counter(), 0
    for pixels in batches:
        count += len(pixels.images)
        if time.perf_counter() - began > s:
            break
    synchronize(device)
    passed = time.perf_counter() - began
    batches.close()
    return count / passed


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wanted(on_gpu: bool, more: bool) -> list[tuple[tuple[int, int, float], str]]:
    """Return the settings of a part, each with the name of the operations that it omits."""
    if not on_gpu:
        dry = (30, 1 if more else 2, HW_DECODER_LOAD)
        return [(dry, "")] if more else [(dry, ""), (dry, "without jpeg")]
    if more:
        return [(setting, "") for setting in MORE_SETTINGS]
    without = [(OWN, name) for name in WITHOUT]
    return [(OWN, ""), *without, *((setting, "") for setting in SETTINGS[1:])]


def has(done: Sequence[dict[str, Any]], row: dict[str, Any]) -> bool:
    """Return whether a row of `done` has all values of `row`."""
    return any(row.items() <= other.items() for other in done)


def settings(
    shards: Path,
    device: torch.device,
    seconds: float,
    more: bool = False,
    done: Sequence[dict[str, Any]] = (),
) -> Iterator[dict[str, Any]]:
    """Yield a row for the product's setting, for each omitted operation and for other settings."""
    for setting, name in wanted(device.type == "cuda", more):
        row: dict[str, Any] = dict(zip(("batch", "threads", "share"), setting, strict=True))
        row["policy"] = name or "phase 1"
        if has(done, row):
            continue
        requests = requests_of(shards, setting[0], device, **WITHOUT.get(name, {}))
        try:
            row["images_per_s"] = round(images_per_s(requests, setting, device, seconds))
        except Exception as error:  # the other settings are still measured
            row["error"] = f"{type(error).__name__}: {error}"[:400]
        yield row


def pictures_of(shards: Path, count: int) -> list[np.ndarray]:
    """Return `count` pictures of a set, uint8 (SIZE, SIZE, 3), its images in turn."""
    opened, square = open_shards([shards]), Preprocess(crop_size=peers.SIZE, resize_size=peers.SIZE)
    rows = np.arange(min(count, len(opened)))
    files = zip(ShardReader(opened).read(rows), opened.names("format", rows), strict=True)
    pictures = [pil.preprocess(decode_image(*file), square) for file in files]
    return [pictures[number % len(pictures)] for number in range(count)]


def jpeg_step(
    shards: Path, device: torch.device, seconds: float, done: Sequence[dict[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """Yield images/s of each way of the JPEG step, on 256 images of 256 x 256 pixels."""
    on_gpu = device.type == "cuda"
    ways: dict[str, Callable[[Any], Any]] = {
        "none": lambda image: image,
        "libjpeg on the host": lambda image: _jpeg(image, 90, on_gpu),
    }
    if on_gpu:
        ways["DALI's GPU operator"] = lambda image: fn.jpeg_compression_distortion(
            image, quality=90
        )
    ways = {name: way for name, way in ways.items() if not has(done, {"way": name})}
    batch = pictures_of(shards, 256) if ways else []
    for name, way in ways.items():

        @pipeline_def(
            batch_size=len(batch), num_threads=16 if on_gpu else 2,
            device_id=0 if on_gpu else None, prefetch_queue_depth=2,
        )  # fmt: skip
        def pipe(way: Callable[[Any], Any] = way):
            images = fn.external_source(source=lambda: batch, batch=True)
            return way(images.gpu() if on_gpu else images)

        built = pipe()
        built.build()
        for _ in range(3):
            built.run()
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            built.run()
            count += len(batch)
        synchronize(device)
        yield {"way": name, "images_per_s": round(count / (time.perf_counter() - began))}


def memory(shards: Path, device: torch.device, batches: int, seconds: float) -> Iterator[dict]:
    """Yield memory in MiB ten times over `batches` batches; stops after `seconds`."""
    batch, threads, share = OWN if device.type == "cuda" else (30, 2, HW_DECODER_LOAD)

    broken = damaged_png()

    def damaged() -> Iterator[Request]:
        for step, request in enumerate(requests_of(shards, batch, device)):
            if step % BROKEN_EVERY == BROKEN_EVERY - 1:
                request.data[step % batch], request.formats[step % batch] = broken, "PNG"
            yield request

    lost, images, began = 0, 0, time.monotonic()
    backend = DaliBackend((peers.SIZE, peers.SIZE), batch, device, threads, share)
    for step, pixels in enumerate(backend.run(damaged()), start=1):
        lost += len(pixels.failures)
        images += len(pixels.images)
        late = time.monotonic() - began > seconds
        if step % max(1, batches // 10) == 0 or late:
            yield {
                "batches": step, "images": images, "named": lost,
                "damaged": step // BROKEN_EVERY, "host_mib": host_mib(), "gpu_mib": gpu_mib(device),
                "seconds": round(time.monotonic() - began, 1),
            }  # fmt: skip
        if step == batches or late:
            return


def host_mib() -> int | None:
    """Return the resident memory of this process in MiB; None where there is no Linux /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) // 1024


def gpu_mib(device: torch.device) -> int | None:
    """Return the GPU memory in use by all processes, in MiB; None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) // 2**20


PARTS = ("jpeg step", "settings", "more settings", "memory")


@click.command(cls=console.Command)
@click.option(
    "--shards", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True,
    help="A packed set of JPEGs.",
)  # fmt: skip
@click.option("--seconds", default=2.0, show_default=True, help="Seconds per row.")
@click.option(
    "--batches",
    type=click.IntRange(min=1),
    default=1500,
    show_default=True,
    help="Batches of the part `memory`.",
)
@click.option("--memory-s", default=90.0, show_default=True, help="Seconds for the part `memory`.")
@click.option("--only", multiple=True, type=click.Choice(PARTS), help="Only this part.")
@click.option("--json", "out", type=cli.LocalPath(dir_okay=False), help="File for the rows.")
@resumable
@click.option("--cpu", is_flag=True, help="A dry run with CPU operators.")
@cli.options()
def main(
    shards: Path,
    seconds: float,
    batches: int,
    memory_s: float,
    only: tuple[str, ...],
    out: Path | None,
    resume: bool,
    cpu: bool,
) -> None:
    """Measure the DALI backend on a GPU; see the module."""
    if not cpu and not torch.cuda.is_available():
        raise ValueError("no CUDA device here; run this on a GPU, or try --cpu")
    device = torch.device("cpu" if cpu else "cuda:0")
    images = len(open_shards([shards]))
    title = f"{torch.cuda.get_device_name(device) if not cpu else 'CPU'}, {images:,} images"
    answers: dict[str, Any] = {"title": title, **kept(out, title, resume)}
    for name in dict.fromkeys(only or PARTS):
        done = [row for row in answers.get(name, []) if "error" not in row and name != "memory"]
        if name == "memory":
            rows = memory(shards, device, batches, memory_s)
        elif name == "jpeg step":
            rows = jpeg_step(shards, device, seconds, done)
        else:
            rows = settings(shards, device, seconds, name == "more settings", done)
        answers[name] = done
        for row in rows:
            answers[name] = [*answers[name], row]
            console.say(f"{name}: {json.dumps(row)}")
            if out:
                out.write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
