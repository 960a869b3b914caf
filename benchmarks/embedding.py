"""Measure how fast `python -m model embed` computes features, compared with the network alone.

    python -m benchmarks.embedding --shards SET [--network NAME] [--json FILE]

SET is the folder of a packed set, NAME a frozen backbone of timm with random weights, which do not
change the speed. Two rows are measured in turn and printed, and written to FILE, in images/s; the
last line is their ratio. `network` is the forward pass on a batch that stays on the device. `from
shards` reads, decodes and center-crops the images of SET, runs the same forward pass and copies the
features to the host as float16. On a GPU the network is compiled and runs in bf16. Main entry:
`images_per_s()` takes batches and a function to call with each, and returns images/s.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import timm
import torch

import console
from model.checkpoint import versions
from model.device import choose_device, choose_precision, describe, keep_freed_memory
from pipeline.augment import Preprocess
from pipeline.batch import Batch
from pipeline.loader import open_loader
from pipeline.loading import Loading
from pipeline.stream import evaluation_batches
from sharding.format import open_shards

WARM_UP = 5
"""Batches before the clock starts."""


def batches_of(shards: Path, size: int, loading: Loading, device: torch.device) -> Iterator[Batch]:
    """Yield full evaluation batches without end, epoch after epoch."""
    preprocess = Preprocess(crop_size=size, resize_size=round(size * 8 / 7))
    loader = open_loader(
        open_shards([shards]), preprocess=preprocess, loading=loading, device=device
    )
    while True:
        yield from (batch for batch in evaluation_batches(loader) if batch.valid.all())


def images_per_s(
    batches: Iterator[Batch], use: Callable[[Batch], object], device: torch.device, seconds: float
) -> float:
    """Measure images/s over `seconds` after `WARM_UP` batches."""
    for batch in itertools.islice(batches, WARM_UP):
        use(batch)
    synchronize(device)
    began, count = time.perf_counter(), 0
    for batch in batches:
        use(batch)
        count += len(batch)
        if time.perf_counter() - began > seconds:
            break
    synchronize(device)
    return count / (time.perf_counter() - began)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@click.command(cls=console.Command)
@console.options("device")
@click.option(
    "--shards", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True,
    help="A packed set.",
)  # fmt: skip
@click.option(
    "--network",
    default="vit_base_patch16_clip_224",
    show_default=True,
    help="timm name of the backbone.",
)
@click.option("--batch-size", default=256, show_default=True)
@click.option(
    "--seconds", default=8.0, show_default=True, help="Seconds for each row in each round."
)
@click.option("--rounds", default=2, show_default=True, help="Rounds of both rows.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here too.")
def main(
    device: str,
    shards: Path,
    network: str,
    batch_size: int,
    seconds: float,
    rounds: int,
    out: Path | None,
) -> None:
    """Measure embedding from shards against the network alone."""
    place = choose_device(device)
    keep_freed_memory(place)
    dtype, _ = choose_precision("auto", place)
    net = timm.create_model(network, pretrained=False, num_classes=0).eval().to(place)
    size = net.pretrained_cfg["input_size"][-1]
    mean = 255 * torch.tensor(net.pretrained_cfg["mean"], device=place).reshape(1, 3, 1, 1)
    std = 255 * torch.tensor(net.pretrained_cfg["std"], device=place).reshape(1, 3, 1, 1)

    def embed(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(place.type, dtype, enabled=dtype != torch.float32):
            return net((images.float() - mean) / std)

    forward = torch.compile(embed) if place.type == "cuda" else embed
    loading = Loading(batch_size=batch_size)
    source = batches_of(shards, size, loading, place)
    kept = next(source)

    @torch.inference_mode()
    def bare(batch: Batch) -> None:
        forward(batch.images)

    waiting: list[torch.Tensor] = []

    @torch.inference_mode()
    def to_host(batch: Batch) -> None:
        # The features of one batch cross to the host while the next is computed.
        features = forward(batch.images).half()
        waiting.append(features.to("cpu", non_blocking=True))
        if len(waiting) > 2:
            waiting.pop(0)

    rows: dict[str, list[float]] = {"network": [], "from shards": []}
    about = {
        "network": network, "size": size, "batch": batch_size, "precision": describe(dtype),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU",
        "versions": versions(),
    }  # fmt: skip
    for _ in range(rounds):
        for name, batches, use in (
            ("network", itertools.repeat(kept), bare),
            ("from shards", source, to_host),
        ):
            rows[name].append(images_per_s(batches, use, place, seconds))
            console.say(f"{name}: {rows[name][-1]:,.1f} images/s")
            if out:
                out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", "utf-8")
    middle: dict[str, Any] = {name: statistics.median(rates) for name, rates in rows.items()}
    console.say(f"from shards / network: {middle['from shards'] / middle['network']:.3f}")


if __name__ == "__main__":
    main()
