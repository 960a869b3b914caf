"""Runs of the DALI backend: which errors end one, and the pipeline that later runs use again."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from imaging.decode import decode_image
from imaging.orientation import UPRIGHT
from pipeline.augment import AugmentParams, stack
from pipeline.batch import DecodedBatch, Request
from pipeline.dali import DaliBackend, _reason
from pipeline.monitor import StallError
from pipeline.pil import JPEG_SIDE, apply_whole
from pipeline.stream import Stream, evaluation_batches
from tests.builders import KINDS, encode, photo
from tests.servers import HANG_S

SIZE = 64
CPU = torch.device("cpu")
WHOLE = AugmentParams(top=0, left=0, height=SIZE, width=SIZE)
FILES = [encode(photo(i, SIZE, SIZE)) for i in range(8)]

MESSAGE = """Critical error in pipeline:
Error in CPU operator `nvidia.dali.fn.decoders.image`,
which was used in the pipeline definition with the following traceback:

  File "/home/CUDA/pipeline/dali.py", line 95, in graph
    image = fn.decoders.image(

encountered:

[/opt/dali/dali/operators/imgcodec/image_decoder.h:1002] Failed to decode sample #0 : {cause}
Current pipeline object is no longer valid."""


def test_the_reason_is_the_cause_in_dalis_message() -> None:
    error = RuntimeError(MESSAGE.format(cause="no such\ncode stream"))
    assert _reason(error) == "Failed to decode sample #0 : no such code stream"


@pytest.mark.parametrize(
    "cause",
    [
        "CUDA runtime API error cudaErrorIllegalAddress (700)", "CUDA allocation failed",
        "Can't allocate 123456 bytes on device 0.",
    ],
)  # fmt: skip
def test_a_lost_gpu_is_distinguished_from_a_bad_sample(
    monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    """By an error of CUDA or by the texts of DALI's messages, never by a folder name like "CUDA".
    The texts for no memory are those of DALI 2.4.
    """
    sample = RuntimeError(MESSAGE.format(cause="corrupt"))
    memory = RuntimeError(MESSAGE.format(cause=cause))
    backend = DaliBackend((SIZE, SIZE), 1, CPU, threads=1)
    assert not backend._device_failed(memory)
    backend.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    assert not backend._device_failed(sample)
    assert backend._device_failed(memory)

    def lost(_device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert backend._device_failed(sample)


def request(count: int = 8, *, broken: bool = False) -> Request:
    """A batch; the last image of a broken one is lost in DALI's decoder."""
    files, formats = FILES[: count - broken], ["JPEG"] * (count - broken)
    if broken:
        files, formats = [*files, KINDS["noise in a png"]], [*formats, "PNG"]
    return Request(files, formats, [1] * count, stack([WHOLE] * count))


RUNS = {
    "whole batches": [request()] * 5,
    "a broken image in the middle": [request(), request(broken=True), request(), request(5)],
    "a broken image at the end": [request(), request(broken=True)],
    "nothing": [],
    "whole batches again": [request()] * 2,
}


def test_later_runs_use_the_same_pipeline(pipelines: list) -> None:
    backend = DaliBackend((SIZE, SIZE), 8, CPU, threads=1)
    (first,) = (pixels.images.clone() for pixels in backend.run([request()]))
    for name, requests in RUNS.items():
        pixels = [
            DecodedBatch(one.images.clone(), one.failures, one.timing)
            for one in backend.run(requests)
        ]
        assert len(pixels) == len(requests), name
        for one, asked in zip(pixels, requests, strict=True):
            good = [row for row in range(len(asked.data)) if row not in one.failures]
            assert len(good) == len(asked.data) - ("PNG" in asked.formats)
            assert torch.equal(one.images[good], first[good]), name
    assert len(pipelines) == 2  # one for all runs, and one that decodes image by image
    backend.close()
    assert [pipeline() for pipeline in pipelines] == [None, None]
    list(backend.run([request()]))
    assert len(pipelines) == 3


def test_a_run_that_is_stopped_early_leaves_its_batches_to_no_other(pipelines: list) -> None:
    backend = DaliBackend((SIZE, SIZE), 8, CPU, threads=1)
    stopped = backend.run([request()] * 6)
    next(stopped)
    inside = backend.run([request(3)] * 2)  # while the first one is not finished
    assert [len(pixels.images) for pixels in inside] == [3, 3]
    stopped.close()
    assert pipelines[0]() is None
    assert [len(pixels.images) for pixels in backend.run([request(5)] * 4)] == [5] * 4


@pytest.mark.parametrize("error", [OSError, RuntimeError, StallError])
def test_a_run_that_an_error_ends_frees_its_pipeline(pipelines: list, error: type) -> None:
    """Also if the error stays in the queue of the reader's thread, for a graph that asks again."""

    def failing() -> Iterator[Request]:
        yield request()
        if error is StallError:
            time.sleep(0.5)
        raise error("gone")

    stall_error_s = 0.1 if error is StallError else HANG_S
    backend = DaliBackend((SIZE, SIZE), 8, CPU, threads=1, stall_error_s=stall_error_s)
    with pytest.raises(error) as caught:
        for _ in backend.run(failing()):
            pass
    assert pipelines[0]() is not None  # in the frames of the traceback
    del caught
    assert pipelines[0]() is None


def test_the_epochs_of_a_loader_use_one_pipeline(
    make_stream: Callable[..., Stream], pipelines: list
) -> None:
    stream = make_stream(backend="dali", num_workers=1)
    assert len(list(stream.batches(0, 3))) == 3 * stream.steps_per_epoch
    for _ in range(2):
        list(evaluation_batches(stream.loader))
    assert len(pipelines) == 1
    stream.loader.close()
    assert pipelines[0]() is None


def test_cuda_without_a_number_is_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of `torchrun` sets its GPU and may be asked for `cuda`."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    places = [torch.device("cuda"), torch.device("cuda", 1)]
    assert [DaliBackend((8, 8), 1, place, threads=1)._device_id for place in places] == [2, 1]


WHOLE_STEPS = {
    "resized": ((SIZE, SIZE), {"whole_height": 50, "whole_width": 40}),
    "webp": ((SIZE, SIZE), {"whole_webp": 60}),
    "jpeg, then webp": ((SIZE, SIZE), {"whole_jpeg": 60, "whole_webp": 60}),
    "too long for a jpeg": ((8, JPEG_SIDE + 1), {"whole_jpeg": 60}),
}


@pytest.mark.parametrize("name", WHOLE_STEPS)
def test_steps_for_the_whole_image_give_dali_a_png_without_compression(name: str) -> None:
    """The PNG stays in memory. Compressing it took most of the time of a view."""
    (height, width), steps = WHOLE_STEPS[name]
    pixels = np.full((height, width, 3), 200, np.uint8)
    params = WHOLE._replace(**steps)
    data = [encode(pixels, "PNG")]
    png = DaliBackend._by_host(Request(data, ["PNG"], [UPRIGHT], stack([params])), 0)
    assert isinstance(png, bytes)
    expected = apply_whole(pixels, params)
    np.testing.assert_array_equal(decode_image(png, "PNG", UPRIGHT), expected)
    assert len(png) > expected.nbytes


def test_the_repair_of_an_image_takes_a_png_without_compression() -> None:
    pixels = np.full((SIZE, SIZE, 3), 200, np.uint8)
    backend = DaliBackend((SIZE, SIZE), 1, CPU, threads=1)
    pngs = []
    backend._repair = lambda data, *_: pngs.append(data)
    params = stack([WHOLE])
    backend._by_reference(Request([encode(pixels, "PNG")], ["PNG"], [UPRIGHT], params), 0, params)
    np.testing.assert_array_equal(decode_image(pngs[0], "PNG", UPRIGHT), pixels)
    assert len(pngs[0]) > pixels.nbytes
