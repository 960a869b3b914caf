"""Apply `AugmentParams` with NVIDIA DALI: the fast backend. The only file that imports nvidia.

One graph, with CPU operators or, on a GPU, `mixed` decoding. Encoded bytes and the columns of the
draws come in from outside, so the graph holds no dice and no state. `Pipeline.run()` is driven
directly: after a bad sample it loses that one batch, which is then repaired sample by sample;
DALIGenericIterator would end the epoch early without a word.
"""

import gc
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from imaging.decode import DecodeError, decode_image
from imaging.jpeg import CHROMAS
from pipeline.augment import BLUR_TAPS, GRAY, GRID, LEAST_SIGMA, AugmentBatch
from pipeline.batch import BatchTiming, Pixels, Request
from pipeline.monitor import STALL_ERROR_S, StallError, WorkerStatus, stalled
from pipeline.pil import encode_jpeg, webp_round_trip

QUEUE_BATCHES = 4
"""Batches of encoded bytes read ahead of the decoder."""

HW_DECODER_LOAD = 0.65
"""Share of JPEGs that a GPU's JPEG engine takes where it has one, the others go to its cores:
DALI's own default.
"""

# A column of the graph: name, element type, dimensions per sample.
COLUMNS = (
    ("data", types.UINT8, 1),
    ("anchor", types.INT32, 1),
    ("shape", types.INT32, 1),
    ("hflip", types.INT32, 0),
    ("color_jitter", types.BOOL, 0),
    ("matrix", types.FLOAT, 2),
    ("offset", types.FLOAT, 1),
    ("resample", types.FLOAT, 0),
    ("jpeg", types.INT32, 0),
    ("blur", types.FLOAT, 0),
    ("grayscale", types.BOOL, 0),
    ("side", types.FLOAT, 0),
    ("filter", types.INT32, 0),
    ("jpeg2", types.INT32, 0),
    ("jpeg3", types.INT32, 0),
    ("moved", types.BOOL, 0),
    ("grid", types.INT32, 1),
)

# DALI's names of `augment.FILTERS`.
_FILTERS = np.array(
    [int(kind) for kind in (types.INTERP_LINEAR, types.INTERP_CUBIC, types.INTERP_LANCZOS3)],
    np.int32,
)


@pipeline_def(enable_conditionals=True)
def graph(
    feed: Callable[[], tuple], size: int, on_gpu: bool, hw_decoder_load: float = HW_DECODER_LOAD
) -> Any:
    """Encoded images and columns in, (size, size, 3) uint8 out; the order is that of `augment`."""
    columns = fn.external_source(
        source=feed,
        num_outputs=len(COLUMNS),
        batch=True,
        dtype=[column[1] for column in COLUMNS],
        ndim=[column[2] for column in COLUMNS],
    )
    data, anchor, shape, hflip, color_jitter, matrix, offset, resample, jpeg, blur, grayscale = (
        columns[:11]
    )
    side, kind, jpeg2, jpeg3, moved, grid = columns[11:]
    image = fn.decoders.image(
        data,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=True,
        jpeg_fancy_upsampling=True,
        use_fast_idct=False,
        hw_decoder_load=hw_decoder_load,
    )
    image = fn.slice(image, anchor, shape, axes=(0, 1))
    image = _resize(image, side)
    image = fn.flip(image, horizontal=hflip)
    if color_jitter:
        image = _color(image, matrix, offset)
    if resample > 0.0:
        kind = fn.reinterpret(kind, dtype=types.INTERP_TYPE)
        image = _resize(_resize(image, resample, kind), side, kind)
    if jpeg > 0:
        image = _jpeg(image, jpeg, on_gpu)
    if jpeg2 > 0:
        image = _jpeg(image, jpeg2, on_gpu)
    if jpeg3 > 0:
        image = _jpeg(image, jpeg3, on_gpu)
    if blur > 0.0:
        image = fn.gaussian_blur(image, sigma=blur, window_size=BLUR_TAPS)
    if grayscale:
        rows = np.array(GRAY, np.float32).reshape(3, 4)
        image = _color(image, rows[:, :3].ravel().tolist(), rows[:, 3].tolist())
    if moved:
        image = fn.slice(image, start=grid, shape=[size, size], axes=[0, 1])
    return image


def _resize(image: Any, side: Any, kind: Any = types.INTERP_LINEAR) -> Any:
    """As Pillow does it: antialiased, and without shifting the grid by part of a pixel."""
    return fn.resize(
        image,
        resize_x=side,
        resize_y=side,
        interp_type=kind,
        antialias=True,
        subpixel_scale=False,
    )


def _color(image: Any, matrix: Any, offset: Any) -> Any:
    turned = fn.coord_transform(image, M=matrix, T=offset, dtype=types.UINT8)
    return fn.reshape(turned, layout="HWC")


def _jpeg(image: Any, quality: Any, on_gpu: bool) -> Any:
    """A real libjpeg round trip. DALI's GPU operator is another algorithm, so a GPU batch comes
    to the host for it: 200 kB per image that is drawn.
    """
    if not on_gpu:
        return fn.jpeg_compression_distortion(image, quality=quality)
    return fn.jpeg_compression_distortion(image.cpu(), quality=quality, device="cpu").gpu()


def columns_of(data: list[bytes], params: AugmentBatch, size: int) -> tuple:
    """What the graph is fed for one batch, in the order of `COLUMNS`."""
    color = params.color.reshape(-1, 3, 4)
    return (
        [np.frombuffer(item, np.uint8) for item in data],
        np.stack([params.top, params.left], axis=1),
        np.stack([params.height, params.width], axis=1),
        params.hflip.astype(np.int32),
        params.color_jitter,
        np.ascontiguousarray(color[:, :, :3]),
        np.ascontiguousarray(color[:, :, 3]),
        params.resample.astype(np.float32),
        params.jpeg,
        np.where(params.blur >= LEAST_SIGMA, params.blur, 0).astype(np.float32),
        params.grayscale,
        (size + GRID * params.moved).astype(np.float32),
        _FILTERS[params.filter],
        params.jpeg2,
        params.jpeg3,
        params.moved,
        np.stack([params.grid_top, params.grid_left], axis=1),
    )


READER, DECODER = 0, 1
"""Who stands where on the backend's board."""


class DaliBackend:
    """Decodes requests in order; see `run`."""

    def __init__(
        self,
        size: int,
        batch_size: int,
        device: torch.device,
        threads: int,
        hw_decoder_load: float = HW_DECODER_LOAD,
        stall_error_s: float = STALL_ERROR_S,
    ):
        self.stall_error_s = stall_error_s
        self.size = size
        self.batch_size = batch_size
        self.device = device
        self.threads = threads
        self.hw_decoder_load = hw_decoder_load
        self.status = WorkerStatus(["reader", "DALI"])
        self._repair: Callable[[bytes, AugmentBatch], torch.Tensor] | None = None

    def run(self, requests: Iterable[Request], start: int = 0) -> Iterator[Pixels]:
        """Yield the pixels of each request, uint8 (B, size, size, 3) on the device; the first is
        that of step `start`.
        """
        try:
            yield from self._run(requests, start)
        finally:
            # A DALI pipeline is part of a reference cycle: without this it keeps its memory, on the
            # GPU too, until Python happens to look for cycles.
            gc.collect()

    def _run(self, requests: Iterable[Request], start: int) -> Iterator[Pixels]:
        fed: queue.Queue[Request] = queue.Queue()
        waited = 0.0
        wanted = map(self._as_partners, requests)
        with _ReadAhead(wanted, self.status, start, self.stall_error_s) as ahead:

            def feed() -> tuple:
                nonlocal waited
                began = time.perf_counter()
                request = ahead.next()
                waited += time.perf_counter() - began
                fed.put(request)
                return columns_of(request.data, request.params, self.size)

            pipe = self._build(feed, self.batch_size, depth=2)
            step = start
            while True:
                ready, before, began = ahead.ready, waited, time.perf_counter()
                try:
                    with self.status.at(DECODER, "decoding", step):
                        images, failures = _tensor_of(pipe.run(*self._stream)), {}
                except StopIteration:
                    return
                except RuntimeError as error:
                    if "CUDA" in str(error):
                        raise  # the device is gone, not one sample
                    images, failures = self._one_by_one(fed.queue[0])
                request = fed.get()
                images = self._to_webp(images, request.params, failures)
                read_s = waited - before
                decode_s = time.perf_counter() - began - read_s
                timing = BatchTiming(read_s=read_s, decode_s=decode_s, ready=ready)
                self.status.finished(DECODER)
                step += 1
                yield Pixels(images, request.failures | failures, timing)

    def _as_partners(self, request: Request) -> Request:
        """The first step of a policy for pairs, on the host: DALI's JPEG operator knows one chroma,
        and this way the graph decodes a fake as it decodes its partner. What does not decode is
        left to the graph, which says so.
        """
        params = request.params
        rows = [row for row in np.flatnonzero(params.pair_jpeg) if row not in request.failures]
        if not rows:
            return request

        def encoded(row: int) -> bytes:
            of = request.data[row], request.formats[row], request.orientations[row]
            try:
                pixels = decode_image(*of)
            except DecodeError:
                return request.data[row]
            return encode_jpeg(pixels, int(params.pair_jpeg[row]), CHROMAS[params.pair_chroma[row]])

        data = list(request.data)
        with ThreadPoolExecutor(self.threads) as pool:
            for row, found in zip(rows, pool.map(encoded, rows), strict=True):
                data[row] = found
        return replace(request, data=data)

    def _to_webp(
        self, images: torch.Tensor, params: AugmentBatch, failures: dict[int, str]
    ) -> torch.Tensor:
        """The last step of a harsh policy, on the host: DALI does not encode WebP."""
        rows = [row for row in np.flatnonzero(params.webp).tolist() if row not in failures]
        if not rows:
            return images
        images = images.clone()  # the batch is DALI's own memory
        pixels = images[rows].cpu().numpy()
        with ThreadPoolExecutor(self.threads) as pool:
            done = list(pool.map(webp_round_trip, pixels, params.webp[rows].tolist()))
        images[rows] = torch.from_numpy(np.stack(done)).to(images.device)
        return images

    @property
    def _stream(self) -> tuple[torch.cuda.Stream, ...]:
        """The stream that the batch is used on: DALI hands it over in the order of that stream and
        takes the memory back in it, so that neither side waits for the other on the host.
        """
        on_gpu = self.device.type == "cuda"
        return (torch.cuda.current_stream(self.device),) if on_gpu else ()

    def _build(self, feed: Callable[[], tuple], batch_size: int, depth: int) -> Any:
        on_gpu = self.device.type == "cuda"
        pipe = graph(
            feed,
            self.size,
            on_gpu,
            self.hw_decoder_load,
            batch_size=batch_size,
            num_threads=self.threads,
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=depth,
        )
        pipe.build()
        return pipe

    def _one_by_one(self, request: Request) -> tuple[torch.Tensor, dict[int, str]]:
        """Redo a lost batch with the same graph, one image at a time, so that only the bad ones
        are lost and the good ones keep their exact bits.
        """
        if self._repair is None:
            self._repair = self._build_repair()
        images = torch.zeros(
            (len(request.data), self.size, self.size, 3), dtype=torch.uint8, device=self.device
        )
        failures = {}
        for row, data in enumerate(request.data):
            try:
                images[row] = self._repair(data, request.params.take(np.array([row])))
            except RuntimeError as error:
                failures[row] = _reason(error)
        return images, failures

    def _build_repair(self) -> Callable[[bytes, AugmentBatch], torch.Tensor]:
        waiting: list[tuple] = []
        pipe = self._build(lambda: waiting.pop(), 1, depth=1)  # DALI inspects its source's code

        def decode(data: bytes, params: AugmentBatch) -> torch.Tensor:
            waiting.append(columns_of([data], params, self.size))
            return _tensor_of(pipe.run(*self._stream))[0]

        return decode


class _ReadAhead:
    """Runs an iterable in a thread, `QUEUE_BATCHES` ahead; an error there is raised here."""

    def __init__(
        self, requests: Iterable[Request], status: WorkerStatus, start: int, stall_error_s: float
    ):
        self._requests, self._status, self._start = requests, status, start
        self._stall_error_s = stall_error_s
        self._queue: queue.Queue = queue.Queue(QUEUE_BATCHES)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name="shard-reader", daemon=True)

    def __enter__(self) -> "_ReadAhead":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stopped.set()
        self._thread.join(5)  # a read that hangs may do so for ever

    @property
    def ready(self) -> int:
        """Batches of encoded bytes that wait to be decoded."""
        return self._queue.qsize()

    def next(self) -> Request:
        """The next request; `StopIteration` after the last.

        Raises:
            StallError: none came for `stall_error_s` seconds.
        """
        try:
            item = self._queue.get(timeout=self._stall_error_s)
        except queue.Empty:
            raise StallError(stalled(self._stall_error_s, self._status.describe())) from None
        if isinstance(item, BaseException):
            self._put(item)  # the graph may ask again while it drains
            raise item
        return item

    def _read(self) -> None:
        requests = iter(self._requests)
        step = self._start
        try:
            while not self._stopped.is_set():
                with self._status.at(READER, "reading", step):
                    request = next(requests)
                self._put(request)
                self._status.finished(READER)
                step += 1
        except Exception as error:  # StopIteration too: it ends the run on the other side
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue


def _tensor_of(outputs: tuple) -> torch.Tensor:
    """The batch without a copy; DALI keeps the buffer as long as the tensor lives."""
    return torch.from_dlpack(outputs[0].as_tensor())


def _reason(error: RuntimeError) -> str:
    """The one line of DALI's message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line and "Current pipeline" not in line]
    return (errors or lines)[-1][:200]
