"""Time one data loader in its own process; `benchmarks.loader` starts one process per loader.

    python -m benchmarks.contenders NAME PLACE WORKERS OUT BATCH EPOCHS [--prepare]

- NAME: a key of `CONTENDERS`. `pil` and `dali` are this project's loader. `read` and `decode` do
  only a part of its work. `torchvision`, `webdataset`, `dali-reader`, `spdl`, `litdata`,
  `streaming` and `energon` are other libraries.
- PLACE: a folder that `pack()` or `unpack()` of `benchmarks.loader` filled: `images/` and
  `shards/`.
- WORKERS: the number of the loader's processes or threads. `read` always has one process.
- OUT: a file that gets the result as JSON, or `{"missing": package}` if the library is not
  installed.
- BATCH and EPOCHS: images per batch, and how often all images are loaded. `read` loads about
  `READ_IMAGES` images instead, in whole epochs (a little less if BATCH does not divide the number
  of images).
- `--prepare`: measure nothing, but write to PLACE the files that the library needs, once before the
  first measurement (`litdata`, `streaming`, `energon`). OUT gets `{}` if the library is installed.

Main entry: `measure(contender, place, workers)` times one loader in this process. It takes a
`Contender` (a value of `CONTENDERS`), PLACE (Path) and WORKERS (int). If the contender has
`prepare`, `contender.prepare(place)` must have run once. `main()` sets `BATCH` and `EPOCHS` of
`benchmarks.peers` before; their defaults are 30 and 1. `measure()` returns a dict:

- `first` and `last`: the moments of the first and the last batch (`time.monotonic`, which all
  processes of a machine share).
- `images`: the number of images in all batches but the first.
- `within`: images/s without the time between the last batch of an epoch and the first of the next.
- `version`: that of the library, "" for `read`, `decode` and `pil`.

If the library is missing, it raises ImportError, or `LoadError` (a ValueError) for `dali`.
`is_installed(contender)` tells before.
"""

import importlib.metadata
import importlib.util
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks import peers

READ_IMAGES = 30_000
"""Images that `read_samples` reads at least, in several epochs: a few thousand take under a second.
"""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Loader to time. `images` yields the size of each batch. `needs` is the module that it imports
    and `package` the package that provides this module; both may be empty.
    """

    title: str
    images: Callable[[Path, int], Iterator[int]]
    prepare: Callable[[Path], None] | None = None
    needs: str = ""
    package: str = ""


def our_stream(place: Path, backend: str, workers: int):
    """Open this project's training stream with the augmentation policy of phase 1."""
    import recipes
    from model.device import choose_device
    from pipeline.augment import AugmentPolicy
    from pipeline.loader import open_loader
    from pipeline.loading import Loading
    from pipeline.preprocess import Preprocess
    from pipeline.replay import Replay
    from pipeline.stream import Stream, open_pool

    pool = open_pool(place / "shards", ["bench"], Replay())
    loading = Loading(batch_size=peers.BATCH, backend=backend, num_workers=workers)
    preprocess = recipes.build(Preprocess, peers.RECIPE["preprocess"], "phase1")
    augment = recipes.build(dict[str, AugmentPolicy], peers.RECIPE["augment"], "phase1")
    device = choose_device("auto")
    loader = open_loader(pool.shards, preprocess=preprocess, loading=loading, device=device)
    return Stream(loader, pool, Replay(), augment, "train", 1)


def our_images(place: Path, backend: str, workers: int) -> Iterator[int]:
    """Yield the size of each batch of this project's loader, once the batch is on the device."""
    import torch

    for batch in our_stream(place, backend, workers).batches(0, peers.EPOCHS):
        if batch.images.is_cuda:
            torch.cuda.current_stream().synchronize()
        yield len(batch)


def read_samples(place: Path, _workers: int) -> Iterator[int]:
    """Plan, read bytes and sample parameters without decoding, in this process alone."""
    from pipeline.loader import _Requests
    from pipeline.params import train_params

    stream = our_stream(place, "pil", 0)
    shards, preprocess = stream.pool.shards, stream.loader.preprocess
    for number in range(-(-READ_IMAGES // len(shards))):
        epoch = stream.epoch(number)
        params_for = train_params(
            shards, stream.augment, stream.policy, preprocess, stream.seed, number
        )
        requests = _Requests(stream.loader, epoch, params_for)
        for step in range(epoch.steps):
            yield len(requests.make(step).data)


def decode_batch(paths: list[Path]) -> int:
    """Decode files to pixels and return how many there were."""
    from imaging.decode import decode_image

    return sum(decode_image(path.read_bytes(), "JPEG").shape[0] > 0 for path in paths)


def decode_images(place: Path, workers: int) -> Iterator[int]:
    """Only decode, in `workers` processes: the limit of any loader that decodes on the CPU."""
    paths = sorted((place / "images").rglob("*.jpg"))
    batches = [paths[first : first + peers.BATCH] for first in range(0, len(paths), peers.BATCH)]
    with multiprocessing.Pool(workers) as pool:
        yield from pool.imap_unordered(decode_batch, batches * peers.EPOCHS)


CONTENDERS = {
    "read": Contender(title="read: plan, reads, params; 1 process", images=read_samples),
    "decode": Contender(title="decode only (limit on a CPU)", images=decode_images),
    "pil": Contender(
        title="ours, pil", images=lambda place, workers: our_images(place, "pil", workers)
    ),
    "dali": Contender(
        title="ours, dali",
        images=lambda place, workers: our_images(place, "dali", workers),
        needs="nvidia.dali",
        package="nvidia-dali-cuda120",
    ),
    "torchvision": Contender(
        title="torchvision ImageFolder (the original's)",
        images=peers.torchvision_images,
        needs="torchvision",
        package="torchvision",
    ),
    "webdataset": Contender(
        title="webdataset",
        images=peers.webdataset_images,
        needs="webdataset",
        package="webdataset",
    ),
    "dali-reader": Contender(
        title="DALI's own reader",
        images=peers.dali_images,
        needs="nvidia.dali",
        package="nvidia-dali-cuda120",
    ),
    "spdl": Contender(title="SPDL", images=peers.spdl_images, needs="spdl.io", package="spdl-io"),
    "litdata": Contender(
        title="LitData",
        images=peers.litdata_images,
        prepare=peers.prepare_litdata,
        needs="litdata",
        package="litdata",
    ),
    "streaming": Contender(
        title="MosaicML Streaming",
        images=peers.streaming_images,
        prepare=peers.prepare_streaming,
        needs="streaming",
        package="mosaicml-streaming",
    ),
    "energon": Contender(
        title="Megatron-Energon",
        images=peers.energon_images,
        prepare=peers.prepare_energon,
        needs="megatron.energon",
        package="megatron-energon",
    ),
}


def is_installed(contender: Contender) -> bool:
    """Return whether the module that a contender needs can be imported."""
    try:
        return not contender.needs or importlib.util.find_spec(contender.needs) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def measure(contender: Contender, place: Path, workers: int) -> dict[str, float | str]:
    """Run a contender to its end. Returns the times and counts that the module describes."""
    moments, sizes = [], []
    for size in contender.images(place, workers):
        moments.append(time.monotonic())
        sizes.append(size)
    package = contender.package
    return {
        "first": moments[0], "last": moments[-1], "images": sum(sizes[1:]),
        "within": images_per_s_within(moments, sizes, peers.EPOCHS),
        "version": importlib.metadata.version(package) if package else "",
    }  # fmt: skip


def images_per_s_within(moments: list[float], sizes: list[int], epochs: int) -> float:
    """Return images/s within the epochs, which have equally many batches: neither the first batch
    of an epoch counts nor the wait for it.
    """
    per_epoch = max(1, len(sizes) // epochs)
    inner = [step for step in range(1, len(sizes)) if step % per_epoch]
    seconds = sum(moments[step] - moments[step - 1] for step in inner)
    return sum(sizes[step] for step in inner) / seconds if seconds else 0.0


@click.command()
@click.argument("name", type=click.Choice(list(CONTENDERS)), metavar="NAME")
@click.argument("place", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("workers", type=click.IntRange(min=1))
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("batch", type=click.IntRange(min=1))
@click.argument("epochs", type=click.IntRange(min=1))
@click.option("--prepare", is_flag=True, help="Only write the files that the library needs.")
def main(
    name: str, place: Path, workers: int, out: Path, batch: int, epochs: int, prepare: bool
) -> None:
    """Time the loader NAME on the images in PLACE; `benchmarks.loader` calls this."""
    peers.BATCH, peers.EPOCHS = batch, epochs
    contender = CONTENDERS[name]
    if not is_installed(contender):
        result = {"missing": contender.package}
    elif prepare:
        result = {}
        if contender.prepare:
            contender.prepare(place)
    else:
        result = measure(contender, place, workers)
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
