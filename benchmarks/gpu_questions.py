"""What only a GPU can answer about the DALI backend, in one command, with numbers.

    python -m benchmarks.gpu_questions [--originals FOLDER] [--shards DIR] [--json FILE]

1 does the loader recover from broken images, and is its memory flat; 2, 3, 4 how far decoding, the
JPEG step and the resize on the GPU are from the CPU's, and what the JPEG step costs; 5 does a batch
that a slow kernel reads late still hold its pixels; 6 how the speed follows from threads and from
the share of the JPEG engine. `--cpu` runs it all with CPU operators: that only shows that the
program works.
"""

import itertools
import json
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

import console
from benchmarks.contenders import our_stream
from benchmarks.gpu_operators import (
    LOADS,
    SIZE,
    Table,
    decoding,
    jpeg,
    recompression,
    recompression_speed,
    resizing,
)
from benchmarks.images import write_images
from benchmarks.loader import pack
from pipeline.augment import Draw, stack
from pipeline.batch import Request
from pipeline.dali import DaliBackend
from pipeline.loader import _Requests, draw_by_law

BATCH = 30
RECOVERY_BATCHES = 12
STREAM_BATCHES = 60
SLEEP_CYCLES = 20_000_000
"""How long the training stream is kept busy before it reads a batch: about 10 ms."""


def read_photos(folder: Path, count: int) -> list[np.ndarray]:
    """Up to `count` images below `folder`, RGB uint8, of at least 256 pixels a side."""
    photos = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        if min(pixels.shape[:2]) >= SIZE:
            photos.append(pixels)
        if len(photos) == count:
            break
    if not photos:
        raise ValueError(f"no image of at least {SIZE} pixels a side below {folder}")
    return photos


def requests(files: Sequence[bytes], count: int, bad: dict[int, bytes]) -> Iterator[Request]:
    """`count` batches of crops of `files`; `bad` replaces samples (number from 0 on)."""
    for step in range(count):
        numbers = range(step * BATCH, (step + 1) * BATCH)
        data = [bad.get(number, files[number % len(files)]) for number in numbers]
        draws = [
            Draw(number % 7, number % 5, 240, 240, number % 2 == 1, jpeg=90 * (number % 3 == 0))
            for number in numbers
        ]
        yield Request(data, ["JPEG"] * BATCH, [1] * BATCH, stack(draws))


def backend(device: torch.device, threads: int = 4, load: float = 0.65) -> DaliBackend:
    """The backend under test."""
    return DaliBackend(SIZE, BATCH, device, threads, load)


def damaged(data: bytes) -> dict[str, bytes]:
    """Files that no decoder should take, by what is wrong with them."""
    noise = np.random.default_rng(1).integers(0, 256, len(data), np.uint8).tobytes()
    return {
        "cut in half": data[: len(data) // 2],
        "header only": data[:200],
        "noise": noise,
        "JPEG marker, then noise": data[:2] + noise[2:],
        "a web page": b"<html>404 not found</html>",
        "empty": b"",
    }


def recovery(files: Sequence[bytes], device: torch.device) -> Table:
    """One broken sample in every third batch: which samples are lost, and how far are the others
    from what they are without it? Ends early if the CUDA context does not survive.
    """
    columns = [
        "broken sample", "hw_decoder_load", "batches", "named", "good ones lost",
        "others differ by", "context lives", "error",
    ]  # fmt: skip
    answer = Table("1a Recovery: one broken sample in every third batch", columns, [])
    for load in LOADS if device.type == "cuda" else LOADS[:1]:
        found = backend(device, load=load).run(requests(files, RECOVERY_BATCHES, {}))
        whole = [pixels.images.cpu().int() for pixels in found]
        for kind, data in damaged(files[0]).items():
            places = {
                step * BATCH + 7 * step % BATCH: data for step in range(0, RECOVERY_BATCHES, 3)
            }
            lost, apart, batches, error = set(), 0, 0, "no"
            try:
                found = backend(device, load=load).run(requests(files, RECOVERY_BATCHES, places))
                for step, pixels in enumerate(found):
                    batches += 1
                    lost |= {step * BATCH + row for row in pixels.failures}
                    good = [row for row in range(BATCH) if step * BATCH + row not in places]
                    difference = pixels.images.cpu().int()[good] - whole[step][good]
                    apart = max(apart, int(difference.abs().max()))
            except RuntimeError as problem:
                error = " ".join(str(problem).split())[:80]
            named = f"{len(lost & places.keys())} of {len(places)}"
            alive = is_alive(device)
            answer.rows.append(
                [kind, load, f"{batches} of {RECOVERY_BATCHES}", named,
                 len(lost - places.keys()), apart, "yes" if alive else "NO", error]
            )  # fmt: skip
            if not alive:
                return answer
    return answer


def is_alive(device: torch.device) -> bool:
    """Whether the device still computes."""
    try:
        return int(torch.ones(1000, device=device).sum()) == 1000
    except RuntimeError:
        return False


def memory(files: Sequence[bytes], device: torch.device, batches: int) -> Table:
    """Memory over many batches, one sample in a thousand broken."""
    kinds = list(damaged(files[0]).values())
    bad = {
        number: kinds[place % len(kinds)]
        for place, number in enumerate(range(500, batches * BATCH, 1000))
    }
    marks = sorted({batches * tenth // 10 for tenth in (1, 4, 7, 10)})
    rows, lost = [], 0
    found = backend(device).run(requests(files, batches, bad))
    for step, pixels in enumerate(found, start=1):
        lost += len(pixels.failures)
        if step in marks:
            rows.append([step, lost, resident(), taken(device)])
    columns = ["batches", "broken samples", "host MiB", "GPU MiB"]
    return Table(f"1b Memory: {len(bad)} broken samples in all", columns, rows)


def resident() -> int | None:
    """Memory of this process in MiB."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) // 1024


def taken(device: torch.device) -> int | None:
    """Memory taken on the GPU by anyone, in MiB."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) // 2**20


def stream_safety(files: Sequence[bytes], device: torch.device) -> Table:
    """Checksums of batches that are read late, on a busy stream, and dropped at once, against
    those of batches that are waited for one by one.
    """

    def checksums(late: bool) -> list[int]:
        weights = torch.arange(BATCH * SIZE * SIZE * 3, device=device) % 8191
        sums = []
        for pixels in backend(device).run(requests(files, STREAM_BATCHES, {})):
            if device.type == "cuda":
                if late:
                    torch.cuda._sleep(SLEEP_CYCLES)
                else:
                    torch.cuda.synchronize()
            sums.append((pixels.images.flatten().long() * weights).sum())
            del pixels
        return [int(one) for one in sums]

    rows = []
    streams = {"current": None}
    if device.type == "cuda":
        streams = {"default": torch.cuda.default_stream(), "a side stream": torch.cuda.Stream()}
    for name, stream in streams.items():
        with torch.cuda.stream(stream):
            expected, found = checksums(late=False), checksums(late=True)
        wrong = sum(a != b for a, b in zip(found, expected, strict=True))
        rows.append([name, len(expected), wrong, len(set(expected))])
    columns = ["stream", "batches", "wrong checksums", "different batches"]
    return Table("5 Stream safety", columns, rows)


def speeds(place: Path, device: torch.device, seconds: float) -> Table:
    """Loader images/s under the law of phase 1 over threads and the JPEG engine's share."""
    on_gpu = device.type == "cuda"
    rows = []
    for threads in (1, 2, 4, 8, 16) if on_gpu else (1, 2):
        row: list[object] = [threads]
        for load in (0.0, 0.25, 0.5, 0.65, 0.9, 1.0) if on_gpu else (0.65,):
            row.append(speed(place, device, threads, load, seconds))
        rows.append(row)
    loads = ("0", "0.25", "0.5", "0.65", "0.9", "1") if on_gpu else ("0.65",)
    columns = ["threads", *[f"load {load}" for load in loads]]
    return Table("6 Loader, images/s, by threads and hw_decoder_load", columns, rows)


def speed(place: Path, device: torch.device, threads: int, load: float, seconds: float) -> int:
    """Images/s of one setting, after ten batches that are not counted."""
    stream = our_stream(place, "dali", threads)
    batches = backend(device, threads, load).run(endless_requests(stream))
    for _ in itertools.islice(batches, 10):
        pass
    started, count = time.perf_counter(), 0
    for pixels in batches:
        count += len(pixels.images)
        if time.perf_counter() - started > seconds:
            break
    if device.type == "cuda":
        torch.cuda.synchronize()
    passed = time.perf_counter() - started
    batches.close()
    return round(count / passed)


def endless_requests(stream) -> Iterable[Request]:
    """What the loader would ask of its backend, epoch after epoch."""
    shards, view = stream.pool.shards, stream.loader.view
    for number in itertools.count():
        epoch = stream.epoch(number)
        draws = draw_by_law(shards, stream.augment, stream.law, view, stream.seed, number)
        asked = _Requests(stream.loader, epoch, draws)
        yield from map(asked.make, range(epoch.steps))


@click.command(cls=console.Command)
@click.option("--cpu", is_flag=True, help="A dry run with CPU operators; answers nothing.")
@click.option(
    "--originals",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Photographs to ask with. Default: synthetic ones.",
)
@click.option(
    "--shards",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A packed set for question 6. Default: 3,000 images are packed for it.",
)
@click.option("--only", multiple=True, type=click.Choice(list("123456")), help="These questions.")
@click.option("--batches", default=10_000, show_default=True, help="Of question 1b.")
@click.option("--seconds", default=10.0, show_default=True, help="Of each speed.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the answers here too.")
@console.options()
def main(
    cpu: bool,
    originals: Path | None,
    shards: Path | None,
    only: tuple[str, ...],
    batches: int,
    seconds: float,
    out: Path | None,
) -> None:
    """Answer the questions, a table each."""
    if not cpu and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here, and nothing else can answer (try --cpu)")
    device = torch.device("cpu" if cpu else "cuda:0")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        source = originals or place / "photos"
        if not originals:
            write_images(source, 16)
        photos = read_photos(source, 16)
        files = [jpeg(photo) for photo in photos]
        crops = [np.ascontiguousarray(photo[:SIZE, :SIZE]) for photo in photos]
        if shards:
            (place / "shards").mkdir()
            (place / "shards/bench").symlink_to(shards.resolve(), target_is_directory=True)
        elif not only or "6" in only:
            pack(place, 200 if cpu else 3000, originals, 2)
        on_gpu = not cpu
        questions: list[tuple[str, Callable[[], Table]]] = [
            ("1", lambda: recovery(files, device)),
            ("1", lambda: memory(files, device, batches)),
            ("2", lambda: decoding(photos, on_gpu)),
            ("3", lambda: recompression(crops, on_gpu)),
            ("3", lambda: recompression_speed(crops, on_gpu, seconds)),
            ("4", lambda: resizing(photos, on_gpu)),
            ("5", lambda: stream_safety(files, device)),
            ("6", lambda: speeds(place, device, seconds)),
        ]
        answers = []
        for number, answer in questions:
            if only and number not in only:
                continue
            answers.append(answer())
            console.table(*answers[-1])
            if out:  # after each, so that a crash in the next loses nothing
                where = "CPU operators" if cpu else torch.cuda.get_device_name(device)
                found = {"device": where, "python": platform.python_version()}
                tables = [table._asdict() for table in answers]
                out.write_text(json.dumps({**found, "tables": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
