"""Decode and augment batches of images with NVIDIA DALI on a GPU or the CPU: the fast backend.
Importing this module needs DALI.

Main entry: `DaliBackend(shape, batch_size, device, threads, hw_decoder_load, stall_error_s)`.

- `shape`: (height, width) of the output images in pixels, the field `shape` of a `Preprocess`.
- `batch_size`: largest number of images in a batch.
- `device`: `torch.device`, a GPU or the CPU.
- `threads`: number of CPU threads.
- `hw_decoder_load`: share of the JPEGs, 0 to 1, that the GPU's JPEG engine decodes (default 0.65).
- `stall_error_s`: seconds to wait for a request (default 900).

Its `run(requests, start)` yields one `DecodedBatch` per request: `images`, uint8 (B, *shape, 3) RGB
on the device; `failures`, a dict, position in the batch -> reason, for images that cannot be read
or decoded, or whose crop reaches outside the image (these are black); and `timing`, a
`BatchTiming`.

- `requests`: an iterable of `Request`s of pipeline/batch.py (encoded images of one batch and their
  augmentation parameters), which a background thread reads ahead.
- `start`: number of the first step, which only messages show (default 0).

`run()` raises `StallError` (pipeline/monitor.py) if no request comes in `stall_error_s` seconds,
and RuntimeError if the GPU is lost or has no memory left. An image that fails does not end a batch.
Errors of `requests` pass through.

A pipeline whose run came to its end is kept for the next run. `close()` frees it, and its memory on
the GPU; the code that creates a backend closes it. After `close()`, a new run builds a pipeline
again.

The DALI operators are in `pipeline/dali_graph.py`. This module does on the CPU what DALI cannot:
before the operators, the steps that change the whole image (resizing, JPEG, WebP); after them, the
WebP compression with which some augmentations end. Files that DALI does not decode are decoded by
`imaging/decode.py`.
"""

import os
import queue
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # read when DALI loads its own OpenCV
from nvidia import nvimgcodec

from imaging.decode import decode_image, png_of
from imaging.jpeg import CHROMAS, has_end
from imaging.orientation import UPRIGHT
from imaging.quiet import without_chatter
from pipeline.augment import AugmentBatch, blank
from pipeline.batch import PLACEHOLDER, BatchTiming, DecodedBatch, Request
from pipeline.dali_graph import HW_DECODER_LOAD, columns_of, graph
from pipeline.loading import STALL_ERROR_S
from pipeline.monitor import WorkerStatus
from pipeline.pil import JPEG_SIDE, apply_whole, encode_jpeg, refuse_crop_outside, webp_round_trip
from pipeline.read_ahead import DECODER, ReadAhead


class DaliBackend:
    """Decodes requests in order; see `run`."""

    def __init__(
        self,
        shape: tuple[int, int],
        batch_size: int,
        device: torch.device,
        threads: int,
        hw_decoder_load: float = HW_DECODER_LOAD,
        stall_error_s: float = STALL_ERROR_S,
    ):
        self.stall_error_s = stall_error_s
        self.shape = shape
        self.batch_size = batch_size
        self.device = device
        self.threads = threads
        self.hw_decoder_load = hw_decoder_load
        self.status = WorkerStatus(["reader", "DALI"])
        self._repair: Callable[[bytes, int, AugmentBatch], torch.Tensor] | None = None
        self._idle: tuple[_Source, Any] | None = None  # pipeline of an ended run, for the next one

    def run(self, requests: Iterable[Request], start: int = 0) -> Iterator[DecodedBatch]:
        """Yield the pixels of each request, uint8 (B, *shape, 3) on the device. The first
        request is that of step `start`.
        """
        with without_chatter():
            yield from self._run(requests, start)

    def close(self) -> None:
        """Free the pipelines that are kept for later runs, and their memory on the GPU."""
        self._idle = self._repair = None

    def _run(self, requests: Iterable[Request], start: int) -> Iterator[DecodedBatch]:
        fed: queue.Queue[Request] = queue.Queue()
        waited = 0.0
        on_host = map(self._on_host, requests)
        with ReadAhead(on_host, self.status, start, self.stall_error_s) as ahead:

            def feed() -> tuple:
                nonlocal waited
                began = time.perf_counter()
                request = ahead.next()
                waited += time.perf_counter() - began
                fed.put(request)
                return columns_of(request.data, request.orientations, request.params, self.shape)

            source, pipe = self._take_pipeline()
            source.feed = feed
            step = start
            while True:
                ready, before, began = ahead.ready, waited, time.perf_counter()
                failures: dict[int, str]
                try:
                    with self.status.at(DECODER, "decoding", step):
                        images, failures = _tensor_of(pipe.run(*self._stream)), {}
                except StopIteration:
                    # Keep the pipeline for the next run: building one takes 2 s on an H200. The
                    # pipeline of a run that was stopped early still has batches and is not used
                    # again.
                    pipe.reset()
                    source.feed = None
                    self._idle = source, pipe
                    return
                except RuntimeError as error:
                    if self._device_failed(error) or fed.empty():  # empty: `requests` failed
                        raise
                    images, failures = self._one_by_one(fed.queue[0])
                request = fed.get()
                failures = {
                    row: why for row, why in failures.items() if row not in request.failures
                }
                images = self._to_webp(images, request.params, failures)
                read_s = waited - before
                decode_s = time.perf_counter() - began - read_s
                timing = BatchTiming(read_s=read_s, decode_s=decode_s, ready=ready)
                self.status.finished(DECODER)
                step += 1
                yield DecodedBatch(images, request.failures | failures, timing)

    def _on_host(self, request: Request) -> Request:
        """Decode on the CPU, before the graph, the images that the graph must not get or cannot
        process (`_by_host`). Other damaged images fail in the graph; the reference decoder then
        gives the reason.
        """
        params = request.params
        whole = params.whole_jpeg | params.whole_height | params.whole_webp
        rows = [
            row
            for row, (data, image_format) in enumerate(
                zip(request.data, request.formats, strict=True)
            )
            if row not in request.failures
            and (whole[row] or not _may_reach_graph(data, image_format))
        ]
        if not rows:
            return request
        data, orientations = list(request.data), list(request.orientations)
        failures = dict(request.failures)
        with ThreadPoolExecutor(self.threads) as pool:
            made = pool.map(lambda row: self._by_host(request, row), rows)
            for row, result in zip(rows, made, strict=True):
                if isinstance(result, ValueError):
                    failures[row], result = str(result), PLACEHOLDER[0]
                data[row], orientations[row] = result, UPRIGHT
        lost = failures.keys() - request.failures.keys()
        params = blank(params, sorted(lost)) if lost else params
        return replace(
            request, data=data, orientations=orientations, failures=failures, params=params
        )

    @staticmethod
    def _by_host(request: Request, row: int) -> bytes | ValueError:
        """Decode an image with the reference decoder and apply the steps for the whole image:
        DALI's JPEG operator supports only one chroma subsampling, and only images of one size.
        Returns the image as a PNG, or the error of the decoder or of a step. If the last of these
        steps is a JPEG, returns the JPEG, so that the graph decodes a fake exactly as its partner.
        """
        params = request.params.row(row)
        try:
            pixels = decode_image(*_member(request, row))
            if params.whole_jpeg and not params.whole_webp:
                pixels = apply_whole(pixels, params._replace(whole_jpeg=0))
                if max(pixels.shape) <= JPEG_SIDE:
                    return encode_jpeg(pixels, params.whole_jpeg, CHROMAS[params.whole_chroma])
                return png_of(pixels, level=0)
            return png_of(apply_whole(pixels, params), level=0)
        except ValueError as error:
            return error

    def _device_failed(self, error: RuntimeError) -> bool:
        """Return whether `error` means that the GPU is lost or out of memory, rather than that a
        sample is bad. A lost GPU raises an error at the next call. The message of DALI contains the
        name of CUDA's error, or DALI's own text for no memory.
        """
        if self.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return True
        return bool(_CUDA_ERROR.search(_reason(error)))

    def _to_webp(
        self, images: torch.Tensor, params: AugmentBatch, failures: dict[int, str]
    ) -> torch.Tensor:
        """Apply WebP, the last step of a harsh policy, on the CPU: DALI cannot encode WebP. Each
        crop of an image is compressed by itself, as by the reference backend.
        """
        rows = [row for row in np.flatnonzero(params.webp).tolist() if row not in failures]
        if not rows:
            return images
        images = images.clone()  # DALI owns the memory of the batch
        height, width = self.shape
        crops = images[rows].cpu().numpy().reshape(-1, width, width, 3)
        qualities = np.repeat(params.webp[rows], height // width).tolist()
        with ThreadPoolExecutor(self.threads) as pool:
            done = np.stack(list(pool.map(webp_round_trip, crops, qualities)))
        images[rows] = torch.from_numpy(done).reshape(-1, height, width, 3).to(images.device)
        return images

    @property
    def _stream(self) -> tuple[torch.cuda.Stream, ...]:
        """CUDA stream on which the batch is used, or () on the CPU. DALI passes the batch and takes
        its memory back in the order of this stream, so neither side waits for the other on the CPU.
        """
        on_gpu = self.device.type == "cuda"
        return (torch.cuda.current_stream(self.device),) if on_gpu else ()

    def _take_pipeline(self) -> "tuple[_Source, Any]":
        """Take the idle pipeline, or build one if there is none. Runs never share a pipeline."""
        idle, self._idle = self._idle, None
        if idle is None:
            source = _Source()
            # A lambda, because DALI inspects the code object of its source.
            idle = source, self._build(lambda: source.next(), self.batch_size, depth=2)
        return idle

    def _build(self, feed: Callable[[], tuple], batch_size: int, depth: int) -> Any:
        on_gpu = self.device.type == "cuda"
        pipe = graph(
            feed,
            self.shape,
            on_gpu,
            self.hw_decoder_load,
            batch_size=batch_size,
            num_threads=self.threads,
            device_id=self._device_id if on_gpu else None,
            prefetch_queue_depth=depth,
        )
        pipe.build()
        return pipe

    @property
    def _device_id(self) -> int:
        """Number of the GPU. `cuda` without a number is the current GPU of this rank."""
        index = self.device.index
        return torch.cuda.current_device() if index is None else index

    def _one_by_one(self, request: Request) -> tuple[torch.Tensor, dict[int, str]]:
        """Redo a lost batch with the same graph, one image at a time, so that only the bad images
        are lost and the good ones are bit-identical.
        """
        if self._repair is None:
            self._repair = self._build_repair()
        images = torch.zeros(
            (len(request.data), *self.shape, 3), dtype=torch.uint8, device=self.device
        )
        failures = {}
        for row, data in enumerate(request.data):
            params = request.params.take(np.array([row]))
            try:
                images[row] = self._repair(data, request.orientations[row], params)
            except RuntimeError as error:
                if self._device_failed(error):
                    raise
                try:
                    images[row] = self._by_reference(request, row, params)
                except ValueError as reason:
                    failures[row] = str(reason)
        return images, failures

    def _by_reference(self, request: Request, row: int, params: AugmentBatch) -> torch.Tensor:
        """Decode an image that DALI does not decode with the reference decoder, then apply the same
        graph.

        Raises:
            ValueError: the image does not decode, or the graph refuses it.
        """
        pixels = decode_image(*_member(request, row))
        refuse_crop_outside(pixels, params.row(0))
        assert self._repair is not None  # `_one_by_one` has built it
        try:
            return self._repair(png_of(pixels, level=0), UPRIGHT, params)
        except RuntimeError as error:
            raise ValueError(_reason(error)) from error

    def _build_repair(self) -> Callable[[bytes, int, AugmentBatch], torch.Tensor]:
        waiting: list[tuple] = []
        # A lambda, because DALI inspects the code object of its source.
        pipe = self._build(lambda: waiting.pop(), 1, depth=1)

        def decode(data: bytes, orientation: int, params: AugmentBatch) -> torch.Tensor:
            waiting.append(columns_of([data], [orientation], params, self.shape))
            return _tensor_of(pipe.run(*self._stream))[0]

        return decode


class _Source:
    """Source of a pipeline's batches: calls the function `feed` of the run that uses it."""

    feed: Callable[[], tuple] | None = None

    def next(self) -> tuple:
        """Return the next batch."""
        assert self.feed is not None  # set while a run uses the pipeline
        return self.feed()


def _tensor_of(outputs: tuple) -> torch.Tensor:
    """Return the batch as a tensor without a copy. DALI keeps the buffer as long as the tensor
    exists.
    """
    return torch.from_dlpack(outputs[0].as_tensor())


def _may_reach_graph(data: bytes, image_format: str) -> bool:
    """Return whether DALI's parser accepts the image and, for a JPEG, whether it has its end
    marker. In a batch, an image that the parser refuses may end the process (DALI 2.4). For a JPEG
    without its end, a GPU's decoder silently makes up the missing pixels.
    """
    if image_format == "JPEG" and not has_end(data):
        return False
    try:
        return nvimgcodec.CodeStream(data).height > 0  # reading `height` parses the header, in 4 us
    except RuntimeError:
        return False


def _member(request: Request, row: int) -> tuple[bytes, str, int]:
    """Return the arguments of `decode_image` for one row."""
    return request.data[row], request.formats[row], request.orientations[row]


# Error names of CUDA's runtime and driver, and DALI's texts for a lack of memory.
_CUDA_ERROR = re.compile(
    r"\bcudaError[A-Z]\w+|\bCUDA_ERROR_[A-Z_]+"
    r"|CUDA allocation failed|Can't allocate \d+ bytes on (device|host)|std::bad_alloc"
)

_SOURCE_LINE = re.compile(r"\[/[^\]]*\] ?|Current pipeline object is no longer valid\.")


def _reason(error: RuntimeError) -> str:
    """Extract the cause from DALI's message, as one line of at most 200 characters: without the
    operator's name, the traceback of its definition and the lines of DALI's source.
    """
    cause = str(error).rpartition("encountered:")[2]
    cause = " ".join(_SOURCE_LINE.sub(" ", cause.partition("Stacktrace")[0]).split())
    return (cause or type(error).__name__)[:200]
