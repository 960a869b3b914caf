"""Questions about single operators on a GPU: how far from the CPU's result, and how fast.

Each function answers with a `Table`; `benchmarks.gpu_questions` runs and prints them.
"""

import io
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from imaging.decode import decode_image
from pipeline.dali import _jpeg, _resize
from pipeline.pil import jpeg_round_trip, resize

LOADS = (0.0, 0.65, 1.0)
"""`hw_decoder_load`: none, DALI's default and all of the JPEGs to the JPEG engine."""

SIZE = 256


class Table(NamedTuple):
    """An answer."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


def encodings(photo: np.ndarray) -> dict[str, bytes]:
    """A photograph, uint8 (height, width, 3), as JPEGs of each kind that decoders treat apart."""
    height, width = photo.shape[:2]
    even = photo[: height // 16 * 16, : width // 16 * 16]
    odd = photo[: height // 16 * 16 - 1, : width // 16 * 16 - 1]
    kinds: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        f"chroma {name}": (even, {"subsampling": name}) for name in ("4:2:0", "4:2:2", "4:4:4")
    }
    kinds["chroma 4:2:0, odd size"] = odd, {"subsampling": "4:2:0"}
    kinds["chroma 4:2:2, odd size"] = odd, {"subsampling": "4:2:2"}
    kinds["progressive"] = even, {"subsampling": "4:2:0", "progressive": True}
    kinds["grey"] = even[:, :, 1], {}
    return {name: jpeg(pixels, **options) for name, (pixels, options) in kinds.items()}


def jpeg(pixels: np.ndarray, **options: Any) -> bytes:
    """Pixels as Pillow encodes them."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "JPEG", quality=92, **options)
    return stream.getvalue()


def run_operator(
    items: Sequence[np.ndarray], operator: Callable[[Any], Any], on_gpu: bool
) -> list[np.ndarray]:
    """`operator` on each item in a pipeline of one batch; the results on the host."""

    @pipeline_def(
        batch_size=len(items), num_threads=4, device_id=0 if on_gpu else None,
        prefetch_queue_depth=1,
    )  # fmt: skip
    def pipe():
        return operator(fn.external_source(source=lambda: list(items), batch=True))

    built = pipe()
    built.build()
    (outputs,) = built.run()
    found = outputs.as_cpu() if on_gpu else outputs
    return [np.array(found.at(row)) for row in range(len(items))]


def distance(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> list[float]:
    """Mean, 99th percentile and maximum of the absolute difference, in grey levels."""
    pairs = zip(found, expected, strict=True)
    apart = np.concatenate([np.abs(a.astype(int) - b.astype(int)).ravel() for a, b in pairs])
    return [float(apart.mean()), float(np.percentile(apart, 99)), float(apart.max())]


def decoding(photos: Sequence[np.ndarray], on_gpu: bool) -> Table:
    """How far DALI's decoder is from the exact one of the pil backend."""
    rows = []
    kinds = [encodings(photo) for photo in photos]
    for kind in kinds[0]:
        files = [found[kind] for found in kinds]
        expected = [decode_image(data, "JPEG") for data in files]
        for fancy in (True, False):
            for load in LOADS if on_gpu else LOADS[:1]:

                def decode(data: Any, fancy: bool = fancy, load: float = load) -> Any:
                    return fn.decoders.image(
                        data,
                        device="mixed" if on_gpu else "cpu",
                        output_type=types.RGB,
                        jpeg_fancy_upsampling=fancy,
                        use_fast_idct=False,
                        hw_decoder_load=load,
                    )

                found = run_operator([np.frombuffer(f, np.uint8) for f in files], decode, on_gpu)
                rows.append([kind, "yes" if fancy else "no", load, *distance(found, expected)])
    columns = ["JPEG", "fancy up-sampling", "hw_decoder_load", "mean", "p99", "max"]
    return Table("2 Decoding: difference to libjpeg, grey levels", columns, rows)


def recompression(crops: Sequence[np.ndarray], on_gpu: bool) -> Table:
    """How far the JPEG step is from libjpeg's: the GPU's operator, and ours over the host."""
    rows = []
    for quality in (30, 60, 80, 95):
        expected = [jpeg_round_trip(crop, quality) for crop in crops]
        for name, operator in _jpeg_ways(quality, on_gpu).items():
            if name != "none":
                found = run_operator(crops, operator, on_gpu)
                rows.append([quality, name, *distance(found, expected)])
    columns = ["quality", "way", "mean", "p99", "max"]
    return Table("3a JPEG step: difference to libjpeg, grey levels", columns, rows)


def recompression_speed(crops: Sequence[np.ndarray], on_gpu: bool, seconds: float) -> Table:
    """Images/s of a batch through each way of the JPEG step, and through none."""
    batch = [crops[row % len(crops)] for row in range(30)]
    rows = []
    for name, operator in _jpeg_ways(90, on_gpu).items():

        @pipeline_def(
            batch_size=len(batch), num_threads=4, device_id=0 if on_gpu else None,
            prefetch_queue_depth=2,
        )  # fmt: skip
        def pipe(operator: Callable[[Any], Any] = operator):
            return operator(fn.external_source(source=lambda: batch, batch=True))

        built = pipe()
        built.build()
        for _ in range(10):
            built.run()
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            built.run()
            count += len(batch)
        if on_gpu:
            torch.cuda.synchronize()
        rows.append([name, round(count / (time.perf_counter() - started))])
    return Table("3b JPEG step of every image of 256 x 256", ["way", "images/s"], rows)


def _jpeg_ways(quality: int, on_gpu: bool) -> dict[str, Callable[[Any], Any]]:
    def sent(image: Any) -> Any:
        return image.gpu() if on_gpu else image

    ways = {
        "none": sent,
        "libjpeg on the host (ours)": lambda image: _jpeg(sent(image), quality, on_gpu),
    }
    if on_gpu:
        ways["GPU operator"] = lambda image: fn.jpeg_compression_distortion(
            image.gpu(), quality=quality
        )
    return ways


def resizing(photos: Sequence[np.ndarray], on_gpu: bool) -> Table:
    """How far the resize is from that of the pil backend."""
    rows = []
    for side in (128, 205, SIZE, 333, 512):
        expected = []
        for photo in photos:
            out = torch.empty((side, side, 3), dtype=torch.uint8)
            resize(torch.from_numpy(photo.copy()), out)
            expected.append(out.numpy())
        found = run_operator(
            photos,
            lambda image, side=side: _resize(image.gpu() if on_gpu else image, float(side)),
            on_gpu,
        )
        rows.append([f"to {side} x {side}", *distance(found, expected)])
    columns = ["resize", "mean", "p99", "max"]
    return Table("4 Resize: difference to the pil backend, grey levels", columns, rows)
