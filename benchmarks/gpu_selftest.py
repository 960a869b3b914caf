"""Check that DALI's operators on a GPU give the same pixels as DALI's CPU operators and as Pillow.

    python -m benchmarks.gpu_selftest --images FOLDER [--json FILE] [--only CHECK] [--cpu]

Main entry: `main()`, this click command. The checks (`CHECKS`: name -> function) run one after
another, in this order. Each takes a `Given` and returns its answer. A `Given` has 60 encoded JPEGs
(repeated if there are fewer; 30 of a single one), the other encoded images and the torch.device.
The answer, or the error that it raised, is printed (up to 900 characters) and written to FILE at
once, so that a crash loses one check. Differences are in levels from 0 to 255, as [mean, 99th
percentile, maximum] (`difference(images, expected)` of two uint8 arrays); people judge them: no
difference makes the command fail.

- `--images`: a folder of photographs: JPEGs in `jpeg/`, and any PNG or WebP in `other/`.
- `--json`: the file for the answers (check -> answer), and `title`: the device and the number of
  JPEGs.
- `--resume`: answers that the file has of an earlier call with this title are kept; checks that
  raised an error run again.
- `--only`: a key of `CHECKS`, such as `operations` or `"damaged files"`; may be repeated. Default:
  all.
- `--cpu`: use DALI's CPU operators in place of the GPU's: a test of this program, for a machine
  without GPU.

The command fails if the check `operations` (each operation of the augmentation graph) was asked for
and raised an error, if `jpeg/` has no file, or if there is no GPU and no `--cpu`.
"""

import io
import json
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

import cli
import console
from benchmarks.resume import kept, resumable
from imaging.decode import png_of
from pipeline.augment import AugmentParams, concatenate, stack
from pipeline.batch import Request
from pipeline.dali import DaliBackend
from pipeline.pil import decode_request

SIZE = 256
BATCH = 30
ENGINE_SHARES = (0.0, 0.65, 1.0)
"""Values of `hw_decoder_load`, the share of JPEGs that the GPU's JPEG engine decodes: none, DALI's
default, all.
"""

SLEEP_CYCLES = 20_000_000
"""GPU cycles for which a stream is kept busy before it reads a batch: about 10 ms."""

ORIENTATION = 0x0112
"""The EXIF tag of the orientation."""

PACKAGES = (
    "torch", "torchvision", "timm", "triton", "numpy", "pillow", "pyarrow", "simplejpeg",
    "nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12", "nvidia-nvjpeg-cu12",
)  # fmt: skip

# A color matrix: brighter, a little less contrast, more saturation, a small rotation of the hue.
COLOR = (
    0.934, 0.104, 0.020, 1.9, 0.027, 1.003, 0.028, 1.9, 0.036, 0.080, 0.942, 1.9,
)  # fmt: skip

OPERATIONS: dict[str, dict[str, Any]] = {
    "crop and resize": {},
    "crop and resize bicubic": {"crop_filter": 1},
    "crop and resize lanczos": {"crop_filter": 2},
    "hflip": {"hflip": True},
    "vflip": {"vflip": True},
    "color": {"color": COLOR},
    "resample bilinear": {"resample": 220, "filter": 0},
    "resample bicubic": {"resample": 220, "filter": 1},
    "resample lanczos": {"resample": 220, "filter": 2},
    "jpeg 90": {"jpeg": 90},
    "jpeg 30": {"jpeg": 30},
    "three jpegs": {"jpeg": 90, "jpeg2": 80, "jpeg3": 85},
    "blur": {"blur": 0.5},
    "grayscale": {"grayscale": True},
    "jpeg_grid_shift": {"grid_top": 3, "grid_left": 13},
    "webp": {"webp": 80},
    "whole resize and jpeg": {
        "whole_height": 320, "whole_width": 400, "whole_filter": 2, "whole_jpeg": 70,
        "whole_chroma": 2,
    },
    "whole webp": {"whole_webp": 80},
    "everything": {
        "crop_filter": 1, "hflip": True, "color": COLOR, "resample": 220, "filter": 2, "jpeg": 88,
        "blur": 0.4, "grid_top": 1, "grid_left": 15,
    },
}  # fmt: skip
"""Each operation alone, and most of them in one sample. Those for the whole image run on the CPU
before the graph, with a resize by the graph. Frozen backbones crop with the bicubic filter.
"""

DETAIL = {"detail_top": 3, "detail_left": 11, "detail_side": 128, "crop_filter": 1}
"""Operation of a second crop, below the first one: a batch of another shape."""


class Given(NamedTuple):
    """Input of every check: encoded photographs, other encoded images and the device."""

    jpegs: list[bytes]
    others: list[bytes]
    device: torch.device


Check = Callable[[Given], Any]


def difference(images: np.ndarray, expected: np.ndarray) -> list[float]:
    """Return the mean, 99th percentile and maximum of the absolute difference, in levels."""
    apart = np.abs(images.astype(np.int16) - expected.astype(np.int16))
    return [round(float(apart.mean()), 4), float(np.percentile(apart, 99)), int(apart.max())]


def request_of(files: list[bytes], first: int = 0, **operation: Any) -> Request:
    """Return a request for crops of `files`, three quarters of each side, with one operation.

    `first` is the index of the first file, which determines where the crops are. If the operation
    resizes the whole image, the crops are of the result.
    """
    params, formats, orientations = [], [], []
    for index, data in enumerate(files, start=first):
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            orientation = image.getexif().get(ORIENTATION, 1)
            formats.append(image.format)
        if orientation >= 5:
            width, height = height, width
        orientations.append(orientation)
        height = operation.get("whole_height") or height
        width = operation.get("whole_width") or width
        top, left = min(index % 9, height // 4), min(index % 5, width // 4)
        crop = top, left, max(1, height * 3 // 4 - top), max(1, width * 3 // 4 - left)
        params.append(AugmentParams(*crop, **operation))
    return Request(list(files), formats, orientations, stack(params))


def pixels_of(
    device: torch.device,
    requests: list[Request],
    batch: int,
    share: float = 0.65,
    shape: tuple[int, int] = (SIZE, SIZE),
) -> list[tuple[np.ndarray, dict[int, str]]]:
    """Run requests through the DALI backend; returns images (uint8 on the host) and failures."""
    with closing(DaliBackend(shape, batch, device, 4, share)) as backend:
        return [
            (pixels.images.cpu().numpy(), dict(pixels.failures))
            for pixels in backend.run(iter(requests))
        ]


def machine(given: Given) -> Any:
    """Return the GPU, its driver and the versions of the packages."""
    card = None
    if given.device.type == "cuda":
        query = "--query-gpu=name,driver_version,memory.total,clocks.sm"
        card = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=False,
        ).stdout.strip()  # fmt: skip
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "card": card, "kernel": platform.release(), "python": platform.python_version(),
        "cores": os.cpu_count(), "cuda": torch.version.cuda, "versions": versions,
    }  # fmt: skip


def decoder(given: Given) -> Any:
    """Compare the GPU's decoder alone with libjpeg, by `hw_decoder_load` and chroma upsampling.

    `worst image` is the largest mean difference of one image.
    """
    files = [np.frombuffer(data, np.uint8) for data in given.jpegs[:BATCH]]

    def decode(device: str, share: float, fancy: bool) -> list[np.ndarray]:
        @pipeline_def(
            batch_size=len(files), num_threads=4, device_id=None if device == "cpu" else 0,
            prefetch_queue_depth=1,
        )  # fmt: skip
        def pipe():
            data = fn.external_source(source=lambda: files, batch=True)
            return fn.decoders.image(
                data, device=device, output_type=types.RGB, jpeg_fancy_upsampling=fancy,
                hw_decoder_load=share,
            )  # fmt: skip

        built = pipe()
        built.build()
        (out,) = built.run()
        out = out.as_cpu() if device != "cpu" else out
        return [np.array(out.at(index)) for index in range(len(files))]

    expected = decode("cpu", 0.65, True)
    answer = {}
    for share in ENGINE_SHARES:
        for fancy in (True, False):
            images = decode("mixed" if given.device.type == "cuda" else "cpu", share, fancy)
            pairs = list(zip(images, expected, strict=True))
            flat = [
                np.concatenate([image.ravel() for image in side])
                for side in zip(*pairs, strict=True)
            ]
            worst = max(difference(*pair)[0] for pair in pairs)
            answer[f"share {share}, fancy {fancy}"] = [*difference(*flat), f"worst image {worst}"]
    return answer


def operations(given: Given) -> Any:
    """Compare the GPU and CPU operators for each operation of the graph, and list failures."""
    # One pipeline per device, because building one takes two seconds on a GPU.
    files = given.jpegs[:BATCH]
    answer = {}
    for shape, named in (
        ((SIZE, SIZE), OPERATIONS),
        ((2 * SIZE, SIZE), {"a second crop": DETAIL}),
    ):
        requests = [request_of(files, **operation) for operation in named.values()]
        on_device = pixels_of(given.device, requests, BATCH, shape=shape)
        on_cpu = pixels_of(torch.device("cpu"), requests, BATCH, shape=shape)
        for name, (images, failures), (expected, _) in zip(named, on_device, on_cpu, strict=True):
            answer[name] = [*difference(images, expected), failures]
    return answer


def mixed_batch(given: Given) -> Any:
    """Compare one batch in which neighboring samples have different operations."""
    files = given.jpegs[:BATCH]
    names = [list(OPERATIONS)[index % len(OPERATIONS)] for index in range(len(files))]
    singles = [
        request_of([data], **OPERATIONS[name]) for data, name in zip(files, names, strict=True)
    ]
    params = concatenate([single.params for single in singles])
    request = Request(files, ["JPEG"] * len(files), [1] * len(files), params)
    [(images, failures)] = pixels_of(given.device, [request], BATCH)
    [(expected, _)] = pixels_of(torch.device("cpu"), [request], BATCH)
    rows = {
        f"{index} {names[index]}": difference(images[index], expected[index])
        for index in range(min(len(files), len(OPERATIONS)))
    }
    return {"all": difference(images, expected), "failures": failures, "rows": rows}


def encoded(pixels: np.ndarray, image_format: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    """Encode (height, width, 3) uint8 pixels with Pillow."""
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, image_format, **options)
    return stream.getvalue()


def kinds_of_files(given: Given) -> dict[str, bytes]:
    """Encode one photograph in each way that decoders treat differently."""
    with Image.open(io.BytesIO(given.jpegs[0])) as image:
        photo = np.asarray(image.convert("RGB").resize((401, 299)))
    kinds = {}
    for orientation in range(1, 9):
        tags = Image.Exif()
        tags[ORIENTATION] = orientation
        kinds[f"exif {orientation}"] = encoded(photo, exif=tags, quality=92)
    for chroma in ("4:4:4", "4:2:2", "4:2:0"):
        kinds[chroma] = encoded(photo, quality=92, subsampling=chroma)
    kinds |= {
        "progressive": encoded(photo, quality=92, progressive=True),
        "restart markers": encoded(photo, quality=92, restart_marker_blocks=4),
        "gray": encoded(photo, mode="L", quality=92),
        "cmyk": encoded(photo, mode="CMYK", quality=92),
        "tiny": encoded(photo[:17, :19], quality=92),
        "wide": encoded(np.tile(photo, (1, 12, 1)), quality=90),
        "png": encoded(photo, "PNG"),
        "png palette": encoded(photo, "PNG", mode="P"),
        "webp": encoded(photo, "WEBP", quality=90),
    }
    return kinds | {f"other {index}": data for index, data in enumerate(given.others[:6])}


def files(given: Given) -> Any:
    """Compare the GPU's graph with the Pillow backend on each kind of file, and list failures."""
    kinds = kinds_of_files(given)
    requests = [request_of([data] * 3) for data in kinds.values()]
    answer = {}
    for name, request, (images, failures) in zip(
        kinds, requests, pixels_of(given.device, requests, 3), strict=True
    ):
        expected = decode_request(request, (SIZE, SIZE)).images.numpy()
        answer[name] = [*difference(images, expected), failures]
    return answer


def batch_sizes(given: Given) -> Any:
    """Check whether an image gets the same pixels in batches of 30, 7 and 1."""
    answer = {}
    for share in ENGINE_SHARES:

        def run(count: int, firsts: tuple[int, ...] = (0,), share: float = share) -> list:
            requests = [request_of(given.jpegs[i : i + count], first=i) for i in firsts]
            return [images for images, _ in pixels_of(given.device, requests, count, share)]

        thirty, again = run(BATCH, (0, 0))
        [seven] = run(7)
        single = np.concatenate(run(1, tuple(range(7))))
        changed = (single != thirty[:7]).reshape(7, -1).any(1)
        answer[f"share {share}"] = {
            "again": difference(again, thirty),
            "7 against 30": difference(seven, thirty[:7]),
            "1 against 30": difference(single, thirty[:7]),
            "images of 7 that change between 1 and 30": int(changed.sum()),
        }
    return answer


def damaged_files(good: bytes) -> dict[str, bytes]:
    """Return copies of a JPEG with the damage that downloads and disks cause."""
    noise = np.random.default_rng(1).integers(0, 256, len(good), np.uint8).tobytes()
    half = len(good) // 2
    return {
        "cut at 95 %": good[: len(good) * 95 // 100],
        "cut in half": good[:half],
        "no end marker": good[:-2],
        "header only": good[:400],
        "noise after the first marker": good[:2] + noise[2:],
        "noise in the scan": good[:half] + noise[: len(good) // 4] + good[len(good) * 3 // 4 :],
        "a web page": b"<html>404 not found</html>",
        "empty": b"",
        "noise in a png": damaged_png(),
    }


def damaged_png() -> bytes:
    """Return a PNG with a sound header and noise in its pixels. Unlike damaged JPEGs, it reaches
    DALI's decoder, so that the batch is repaired image by image.
    """
    rng = np.random.default_rng(1)
    data = png_of(rng.integers(0, 256, (64, 64, 3), np.uint8))
    middle = len(data) // 2
    noise = rng.integers(0, 256, middle // 2, np.uint8).tobytes()
    return data[:middle] + noise + data[middle + len(noise) :]


def damage(given: Given) -> Any:
    """Put two damaged files into a batch: check which are reported, and that the others are equal.

    The intact batch after each damaged one is compared with the first batch.
    """
    answer: dict[str, Any] = {}
    bad_rows = (7, 29)
    good_rows = [row for row in range(BATCH) if row not in bad_rows]
    kinds = damaged_files(given.jpegs[0])
    for share in ENGINE_SHARES if given.device.type == "cuda" else ENGINE_SHARES[:1]:
        requests = [request_of(given.jpegs[:BATCH])]
        for name, data in kinds.items():
            requests += [request_of(given.jpegs[:BATCH]), request_of(given.jpegs[:BATCH])]
            for row in bad_rows:
                requests[-2].data[row] = data
                requests[-2].formats[row] = "PNG" if name.endswith("png") else "JPEG"
        done = []
        try:
            with closing(DaliBackend((SIZE, SIZE), BATCH, given.device, 4, share)) as backend:
                for pixels in backend.run(iter(requests)):
                    done.append((pixels.images.cpu().numpy(), dict(pixels.failures)))
        except Exception as error:  # the batches before it are still compared
            answer[f"share {share}: ended"] = f"ERROR {type(error).__name__}: {error}"[:600]
        for index, name in enumerate(kinds):
            if 2 + 2 * index >= len(done):
                break
            (images, failures), (after, _) = done[1 + 2 * index], done[2 + 2 * index]
            answer[f"{name}, share {share}"] = {
                "named": sorted(failures),
                "good ones differ": difference(images[good_rows], done[0][0][good_rows]),
                "next batch differs": difference(after, done[0][0])[2],
                "reason": next(iter(failures.values()), "")[:160],
            }
    return answer


def hand_over(given: Given) -> Any:
    """Read batches late, on a busy stream, and drop them at once; count overwritten batches."""
    requests = [request_of(given.jpegs[index : index + BATCH]) for index in range(BATCH)] * 2
    on_gpu = given.device.type == "cuda"

    def checksums(late: bool) -> list[int]:
        sums = []
        with closing(DaliBackend((SIZE, SIZE), BATCH, given.device, 4)) as backend:
            for pixels in backend.run(iter(requests)):
                if on_gpu and late:
                    torch.cuda._sleep(SLEEP_CYCLES)
                elif on_gpu:
                    torch.cuda.synchronize()
                sums.append(pixels.images.long().sum() + (pixels.images[:, ::7].long() * 31).sum())
                del pixels
        return [int(value) for value in sums]

    streams: dict[str, Any] = {"CPU": None}
    if on_gpu:
        streams = {"default": torch.cuda.default_stream(), "side": torch.cuda.Stream()}
    answer = {}
    for name, stream in streams.items():
        with torch.cuda.stream(stream):
            waited, late = checksums(False), checksums(True)
        wrong = sum(a != b for a, b in zip(waited, late, strict=True))
        answer[name] = {"batches": len(waited), "wrong": wrong}
    return answer


CHECKS: dict[str, Check] = {
    "machine": machine,
    "decoder alone": decoder,
    "operations": operations,
    "a batch of different operations": mixed_batch,
    "kinds of files": files,
    "one image in batches of 30, 7 and 1": batch_sizes,
    "damaged files": damage,
    "hand-over between streams": hand_over,
}


def read_folder(folder: Path) -> list[bytes]:
    """Return the files of a folder in the order of their names; empty if it does not exist."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path.read_bytes() for path in paths if path.is_file()]


@click.command(cls=console.Command)
@click.option(
    "--images", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True,
    help="Folder with jpeg/ and, optionally, other/.",
)  # fmt: skip
@click.option("--json", "out", type=cli.LocalPath(dir_okay=False), help="File for the answers.")
@click.option("--only", multiple=True, type=click.Choice(list(CHECKS)), help="Only this check.")
@resumable
@click.option("--cpu", is_flag=True, help="A dry run with CPU operators.")
@cli.options()
def main(images: Path, out: Path | None, only: tuple[str, ...], resume: bool, cpu: bool) -> None:
    """Compare the DALI backend on a GPU with its CPU operators and with Pillow."""
    if not cpu and not torch.cuda.is_available():
        raise ValueError("no CUDA device here; run this on a GPU, or try --cpu")
    jpegs = read_folder(images / "jpeg")
    if not jpegs:
        raise ValueError(f"no JPEG in {images / 'jpeg'}; put photographs there")
    given = Given(
        (jpegs * BATCH)[: 2 * BATCH],
        read_folder(images / "other"),
        torch.device("cpu" if cpu else "cuda:0"),
    )
    title = f"{'CPU' if cpu else torch.cuda.get_device_name(given.device)}, {len(jpegs)} JPEGs"
    answers: dict[str, Any] = {"title": title, **kept(out, title, resume)}
    began = time.monotonic()
    for name, check in CHECKS.items():
        answered = name in answers and "ERROR" not in answers[name]
        if answered or (only and name not in only):
            continue
        try:
            answers[name] = check(given)
        except Exception as error:  # the other checks still run
            text = f"{type(error).__name__}: {error}"[:1500]
            answers[name] = {"ERROR": text, "where": traceback.format_exc()[-1500:]}
        seconds = time.monotonic() - began
        console.say(f"[{seconds:6.1f} s] {name}: {json.dumps(answers[name], default=str)[:900]}")
        if out:
            out.write_text(json.dumps(answers, indent=1, default=str) + "\n", encoding="utf-8")
    ran = answers.get("operations", {}).get("everything")
    if (not only or "operations" in only) and not isinstance(ran, list):
        raise click.ClickException(f"the augmentation graph did not run on the device: {ran}")


if __name__ == "__main__":
    main()
