"""Parity of the backends: the same parameters give the same pixels with Pillow and with DALI.

Each stage is tested alone, on images that reveal differences. The input of a stage is identical,
because one gray level of difference before a JPEG quantizer may become forty after it.
"""

import functools
import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from imaging.decode import decode_image, prepare
from imaging.jpeg import CHROMAS
from pipeline.augment import AugmentParams, stack
from pipeline.batch import PLACEHOLDER, Request
from pipeline.dali import DaliBackend
from pipeline.pil import JPEG_SIDE, WEBP_SIDE, decode_request
from tests.builders import ORIENTED_PLACES, color_matrix, encode, oriented, photo

SIZE = 64

# Pillow rounds resize coefficients to fixed point, and values after each direction. DALI computes
# in float. Measured here: mean 0.2 to 0.4, at most 3 gray levels.
RESIZE_MEAN, RESIZE_P99 = 0.5, 3
# Bicubic and Lanczos overshoot at hard edges. Pillow clips to 0 .. 255 after each direction, DALI
# once at the end. Measured on pixels of only 0 and 255: mean 1.9, p99 13; on others: mean 0.55.
SHARP_MEAN, HARD_EDGES_MEAN, HARD_EDGES_P99 = 0.6, 2.5, 16
# Color and blur are the same sums in float32, rounded once: ties may be rounded differently.
ROUNDING = 1

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu, id="cuda")]

# nvJPEG's inverse DCT and chroma filter round differently from libjpeg's.
NVJPEG_MEAN, NVJPEG_P99 = 1.0, 6


def scenes() -> dict[str, np.ndarray]:
    """Make test images of SIZE x SIZE pixels. Extreme values are included, because images of medium
    values hide most mistakes.
    """
    base = photo(3, SIZE, SIZE)
    gray = np.repeat(base.mean(2, keepdims=True).astype(np.uint8), 3, axis=2)
    saturated = np.where(base > 128, 255, 0).astype(np.uint8)
    return {
        "plain": base, "dark": base // 6, "bright": 255 - base // 8, "gray": gray,
        "saturated": saturated, "black": np.zeros_like(base), "white": np.full_like(base, 255),
    }  # fmt: skip


SCENES = scenes()
WHOLE = AugmentParams(top=0, left=0, height=SIZE, width=SIZE)

STAGES = {
    "nothing": (WHOLE, 0),
    "hflip": (WHOLE._replace(hflip=True), 0),
    "vflip": (WHOLE._replace(vflip=True), 0),
    "jpeg 30": (WHOLE._replace(jpeg=30), 0),
    "jpeg 75": (WHOLE._replace(jpeg=75), 0),
    "jpeg 97": (WHOLE._replace(jpeg=97), 0),
    "color": (WHOLE._replace(color=color_matrix(1.05, 0.94, 1.06, 0.02)), ROUNDING),
    "strong color": (WHOLE._replace(color=color_matrix(1.3, 1.4, 0.5, -0.2)), ROUNDING),
    "hardly blurred": (WHOLE._replace(blur=0.25), ROUNDING),
    "blur of nothing": (WHOLE._replace(blur=0.2), 0),
    "weak blur": (WHOLE._replace(blur=0.3), ROUNDING),
    "blur": (WHOLE._replace(blur=0.8), ROUNDING),
    "grayscale": (WHOLE._replace(grayscale=True), ROUNDING),
    "three jpegs": (WHOLE._replace(jpeg=40, jpeg2=90, jpeg3=60), 0),
    "webp": (WHOLE._replace(webp=60), 0),
    "jpeg, then webp": (WHOLE._replace(jpeg=70, webp=80), 0),
    **{
        f"as a partner of chroma {name}": (WHOLE._replace(whole_jpeg=60, whole_chroma=code), 0)
        for code, name in enumerate(CHROMAS)
    },
    "as a partner, then jpeg": (WHOLE._replace(whole_jpeg=75, whole_chroma=2, jpeg=50), 0),
}


def _not_wanted(_request: Request) -> None:
    raise AssertionError("the graph does not take a batch of good images")


@functools.cache
def _backend(shape: tuple[int, int], batch_size: int, device: torch.device) -> DaliBackend:
    """Build a backend for all tests of this size: its later runs use the same pipeline."""
    backend = DaliBackend(shape, batch_size, device, threads=2)
    backend._one_by_one = _not_wanted  # its repair may use the reference itself
    return backend


def both(
    data: list[bytes],
    params: list[AugmentParams],
    shape: tuple[int, int] = (SIZE, SIZE),
    device: torch.device = CPU,
) -> tuple[np.ndarray, np.ndarray]:
    """Decode the same images and parameters with Pillow and with DALI: uint8 (B, *shape, 3)."""
    facts = [prepare(item).facts for item in data]
    request = Request(
        data, [f.format for f in facts], [f.orientation for f in facts], stack(params)
    )
    pil = decode_request(request, shape)
    (dali,) = _backend(shape, len(data), device).run([request])
    assert not pil.failures
    assert not dali.failures
    return pil.images.numpy().astype(int), dali.images.cpu().numpy().astype(int)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_gives_the_same_pixels(stage: str, device: torch.device) -> None:
    params, tolerance = STAGES[stage]
    data = [encode(pixels, "PNG") for pixels in SCENES.values()]
    pil, dali = both(data, [params] * len(data), device=device)
    for name, one, other in zip(SCENES, pil, dali, strict=True):
        difference = np.abs(one - other)
        assert difference.max() <= tolerance, f"{stage} on {name}: {difference.max()}"
        assert difference.mean() <= 0.02 * tolerance, f"{stage} on {name}: {difference.mean()}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "params",
    [
        AugmentParams(top=5, left=9, height=40, width=37),
        AugmentParams(top=0, left=0, height=11, width=13),
        AugmentParams(top=3, left=0, height=50, width=64),
        WHOLE._replace(top=5, left=9, height=40, width=37, crop_filter=1),
        AugmentParams(top=0, left=0, height=11, width=13, crop_filter=1),
        WHOLE._replace(top=5, left=9, height=40, width=37, crop_filter=2),
        WHOLE._replace(resample=52),
        WHOLE._replace(resample=60),
        WHOLE._replace(resample=20, filter=1),
        WHOLE._replace(resample=83, filter=1),
        WHOLE._replace(resample=20, filter=2),
        WHOLE._replace(resample=83, filter=2),
        WHOLE._replace(grid_top=3, grid_left=15),
    ],
    ids=[
        "crop",
        "enlarge",
        "squeeze",
        "bicubic crop",
        "bicubic enlarge",
        "lanczos crop",
        "resample",
        "weak resample",
        "bicubic down",
        "bicubic up",
        "lanczos down",
        "lanczos up",
        "moved",
    ],
)
def test_resizing_gives_almost_the_same_pixels(params: AugmentParams, device: torch.device) -> None:
    data = [encode(pixels, "PNG") for pixels in SCENES.values()]
    pil, dali = both(data, [params] * len(data), device=device)
    for name, one, other in zip(SCENES, pil, dali, strict=True):
        difference = np.abs(one - other)
        sharp = bool(params.filter or params.crop_filter)
        mean, p99 = (SHARP_MEAN if sharp else RESIZE_MEAN), RESIZE_P99
        if sharp and name == "saturated":
            mean, p99 = HARD_EDGES_MEAN, HARD_EDGES_P99
        assert difference.mean() < mean, f"{name}: {difference.mean()}"
        assert np.percentile(difference, 99) <= p99, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(500, 375), (1024, 1024), (256, 256), (2, 3), (1, 1)])
def test_photographs_of_any_size_resize_alike(size: tuple[int, int], device: torch.device) -> None:
    pixels = np.asarray(Image.fromarray(photo(4)).resize(size, Image.Resampling.BICUBIC))
    params = AugmentParams(top=0, left=0, height=size[1], width=size[0])
    pil, dali = both([encode(pixels, "PNG")], [params], device=device)
    assert np.abs(pil - dali).mean() < RESIZE_MEAN
    assert np.percentile(np.abs(pil - dali), 99) <= RESIZE_P99


# Where an antialiasing filter reaches outside the image, DALI repeats the outermost pixel and torch
# ignores the outside. With the bilinear filter, this is an eighth of the weight in the outermost
# pixels and none inside. So the difference is an eighth of the difference between the outermost
# pixel and the mean of its neighbors: at most 32 gray levels along a side and 60 in a corner.
# Measured on photographs: 13.
FRAME_BOUND, CORNER_BOUND = 32 + 1, 60 + 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", [100, 160, 333])
def test_resizes_differ_only_in_the_outermost_pixels(side: int, device: torch.device) -> None:
    worst = np.indices((side, side)).sum(0) // 4 % 2 * 255
    worst[0], worst[-1], worst[:, 0], worst[:, -1] = 255, 0, 255, 0
    scenes = [photo(5, side, side), np.repeat(worst[:, :, None], 3, axis=2).astype(np.uint8)]
    params = AugmentParams(top=0, left=0, height=side, width=side)
    pil, dali = both([encode(one, "PNG") for one in scenes], [params] * 2, device=device)
    difference = np.abs(pil - dali).max(axis=3)
    assert difference[:, 1:-1, 1:-1].max() <= RESIZE_P99
    corners = difference[:, :: SIZE - 1, :: SIZE - 1].copy()
    assert corners.max() <= CORNER_BOUND
    difference[:, :: SIZE - 1, :: SIZE - 1] = 0
    assert RESIZE_P99 < difference.max() <= FRAME_BOUND


IMAGE = Image.fromarray(photo(8, SIZE, SIZE))
ALPHA = Image.merge("RGBA", (*IMAGE.split(), Image.linear_gradient("L").resize((SIZE, SIZE))))


def with_orientation(orientation: int, image_format: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(IMAGE, image_format, exif=exif)


FILES = {
    "jpeg 420": encode(IMAGE, quality=80, subsampling=2),
    "jpeg 422": encode(IMAGE, quality=80, subsampling=1),
    "jpeg 444": encode(IMAGE, quality=80, subsampling=0),
    "jpeg progressive": encode(IMAGE, progressive=True),
    "jpeg gray": encode(IMAGE.convert("L")),
    "png": encode(IMAGE, "PNG"),
    "png gray": encode(IMAGE.convert("L"), "PNG"),
    "png gray alpha": encode(ALPHA.convert("LA"), "PNG"),
    "png alpha": encode(ALPHA, "PNG"),
    "png palette": encode(IMAGE.convert("P"), "PNG"),
    "png palette transparent": encode(IMAGE.convert("P"), "PNG", transparency=3),
    "png palette half transparent": encode(
        IMAGE.convert("P"), "PNG", transparency=bytes(range(0, 250, 5))
    ),
    "png 1 bit": encode(IMAGE.convert("1"), "PNG"),
    "webp": encode(IMAGE, "WEBP", quality=80),
    "webp lossless": encode(IMAGE, "WEBP", lossless=True),
    "webp alpha": encode(ALPHA, "WEBP", quality=80),
    **{f"jpeg turned {o}": with_orientation(o, "JPEG") for o in range(2, 9)},
    "png turned 6": with_orientation(6, "PNG"),
    "webp turned 6": with_orientation(6, "WEBP"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FILES)
def test_both_decode_to_the_same_pixels(name: str, device: torch.device) -> None:
    """Every kind of file in a shard decodes to identical pixels, a JPEG on a GPU to nearly
    identical ones.
    """
    data = FILES[name]
    assert prepare(data).data == data, "packing transcodes this kind, so the test proves nothing"
    pil, dali = both([data], [WHOLE], device=device)
    if device.type == "cuda" and name.startswith("jpeg"):
        difference = np.abs(pil - dali)
        assert difference.mean() < NVJPEG_MEAN
        assert np.percentile(difference, 99) <= NVJPEG_P99
    else:
        np.testing.assert_array_equal(pil, dali)


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("image_format", "place"), ORIENTED_PLACES)
def test_both_apply_the_orientation_of_the_index(
    image_format: str, place: str, device: torch.device
) -> None:
    """Every kind of metadata with an orientation, for square and other pictures."""
    data, expected = [], []
    for width, height in ((64, 64), (72, 56)):
        image = Image.fromarray(photo(11, width, height))
        for orientation, turn in TURNS.items():
            data.append(oriented(image, image_format, place, orientation))
            stored = Image.fromarray(decode_image(data[-1], image_format))
            expected.append(np.asarray(stored.transpose(turn))[3:43, 5:45])
    crop = AugmentParams(top=3, left=5, height=40, width=40)
    pil, dali = both(data, [crop] * len(data), shape=(40, 40), device=device)
    assert not any(prepare(item).facts.transcoded_from for item in data)
    for row, pixels in enumerate(expected):
        np.testing.assert_array_equal(pil[row], pixels)
        if device.type == "cuda" and image_format == "JPEG":
            assert np.abs(dali[row] - pixels.astype(int)).mean() < NVJPEG_MEAN
        else:
            np.testing.assert_array_equal(dali[row], pixels)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", [1, 3, 8])
def test_the_orientation_in_the_index_overrides_the_file(number: int, device: torch.device) -> None:
    data = with_orientation(6, "PNG")
    request = Request([data], ["PNG"], [number], stack([WHOLE]))
    expected = IMAGE if number == 1 else IMAGE.transpose(TURNS[number])
    (dali,) = _backend((SIZE, SIZE), 1, device).run([request])
    np.testing.assert_array_equal(dali.images[0].cpu(), np.asarray(expected))
    np.testing.assert_array_equal(
        decode_request(request, (SIZE, SIZE)).images[0], np.asarray(expected)
    )


ODD = {
    "three bytes between segments": FILES["jpeg 420"].replace(b"\xff\xdb", b"\0\0\0\xff\xdb", 1),
    "colors of print": encode(IMAGE.convert("CMYK")),
    "16 bits": encode(Image.fromarray(np.asarray(IMAGE.convert("L"), np.uint16) * 257), "PNG"),
    "animated": encode(IMAGE, "PNG", save_all=True, append_images=[IMAGE.rotate(9)]),
}


@pytest.mark.parametrize("name", ODD)
def test_files_that_dali_decodes_differently_are_transcoded(name: str) -> None:
    prepared = prepare(ODD[name])
    assert prepared.facts.transcoded_from
    pil, dali = both([prepared.data], [WHOLE])
    np.testing.assert_array_equal(pil, dali)


@pytest.mark.parametrize("device", DEVICES)
def test_images_that_dali_refuses_are_decoded_by_the_reference(device: torch.device) -> None:
    """A batch with an image that only the reference decodes, and one that neither decodes."""
    good, odd = FILES["jpeg 420"], ODD["three bytes between segments"]
    bad = b"\xff\xd8" + odd[200:]
    request = Request([good, odd, bad, good], ["JPEG"] * 4, [1] * 4, stack([WHOLE] * 4))
    pil = decode_request(request, (SIZE, SIZE))
    (dali,) = DaliBackend((SIZE, SIZE), 4, device, threads=2).run([request])
    assert set(pil.failures) == {2}
    assert dali.failures == pil.failures
    if device.type == "cpu":
        np.testing.assert_array_equal(dali.images, pil.images)


def test_a_whole_image_step_that_fails_loses_only_its_image() -> None:
    """A side of 0 pixels stands for any size that the resizing refuses."""
    good = WHOLE._replace(whole_height=SIZE, whole_width=SIZE, whole_filter=1)
    refused = good._replace(whole_width=0)
    params = stack([good, refused, good])
    request = Request([FILES["png"]] * 3, ["PNG"] * 3, [1] * 3, params)
    pil = decode_request(request, (SIZE, SIZE))
    (dali,) = DaliBackend((SIZE, SIZE), 3, CPU, threads=2).run([request])
    assert set(pil.failures) == set(dali.failures) == {1}


def test_images_that_dalis_parser_refuses_never_reach_the_graph() -> None:
    """Such an image in a batch ended the process in most runs."""
    turned = oriented(IMAGE, "WEBP", "exif", 6)
    longer = turned.index(b"EXIF") + 4
    webp = turned[:longer] + b"\xff\xff\0\0" + turned[longer + 4 :]
    good, odd = FILES["jpeg 420"], ODD["three bytes between segments"]
    formats = ["JPEG", "WEBP", "JPEG", "PNG"] * 2
    request = Request([good, webp, odd, b"no image"] * 2, formats, [1] * 8, stack([WHOLE] * 8))
    backend = DaliBackend((SIZE, SIZE), 8, CPU, threads=2)
    checked = backend._on_host(request)
    assert set(checked.failures) == {1, 3, 5, 7}
    assert [new is old for new, old in zip(checked.data, request.data, strict=True)] == [
        True, False, False, False] * 2  # fmt: skip
    backend._one_by_one = _not_wanted
    (dali,) = backend.run([request])
    pil = decode_request(request, (SIZE, SIZE))
    assert dali.failures == pil.failures
    np.testing.assert_array_equal(dali.images, pil.images)


@pytest.mark.parametrize(
    "steps", [{"whole_height": 50, "whole_width": 40}, {"whole_jpeg": 20}, {"whole_webp": 20}]
)
def test_images_that_dalis_parser_refuses_keep_the_steps_for_the_whole_image(steps: dict) -> None:
    params = AugmentParams(top=0, left=0, height=30, width=30)._replace(**steps)
    odd = ODD["three bytes between segments"]
    request = Request([odd, b"no image"], ["JPEG"] * 2, [1] * 2, stack([params] * 2))
    pil = decode_request(request, (SIZE, SIZE))
    (dali,) = _backend((SIZE, SIZE), 2, CPU).run([request])
    assert dali.failures == pil.failures and set(pil.failures) == {1}
    difference = np.abs(dali.images.numpy().astype(int) - pil.images.numpy().astype(int))
    assert difference.mean() < RESIZE_MEAN


def test_webp_compresses_each_crop_by_itself() -> None:
    """At SIZE + 2 pixels a WebP of both crops would have blocks of both at their border."""
    size = SIZE + 2
    params = AugmentParams(0, 0, size, size, detail_side=size, webp=30)
    pil, dali = both([encode(photo(5, size, size), "PNG")], [params], (2 * size, size))
    np.testing.assert_array_equal(pil, dali)


def test_a_bad_image_changes_no_pixel_of_batches_of_any_size() -> None:
    """Batches as in prediction: small ones first, and a last one that is not full."""
    good, bad = FILES["jpeg 420"], FILES["jpeg 420"][:-2]
    others = [encode(photo(seed, SIZE, SIZE)) for seed in range(8)]
    groups = [[good], others[:4], [*others[:3], bad, *others[4:]], [bad, *others[1:]], others[2:7]]
    requests = [
        Request(group, ["JPEG"] * len(group), [1] * len(group), stack([WHOLE] * len(group)))
        for group in groups
    ]
    images = [
        one.images.clone() for one in DaliBackend((SIZE, SIZE), 8, CPU, threads=2).run(requests)
    ]
    for request, pixels in zip(requests, images, strict=True):
        np.testing.assert_array_equal(pixels, decode_request(request, (SIZE, SIZE)).images)


def test_a_crop_outside_the_image_has_the_same_reason_in_both() -> None:
    outside = WHOLE._replace(top=1)
    request = Request([FILES["png"]] * 2, ["PNG"] * 2, [1] * 2, stack([outside, WHOLE]))
    (dali,) = DaliBackend((SIZE, SIZE), 2, CPU, threads=1).run([request])
    assert dali.failures == decode_request(request, (SIZE, SIZE)).failures
    assert "its crop reaches to 64 x 65" in dali.failures[0]


@pytest.mark.parametrize("kept", [0.5, 0.95, "without its last two bytes"])
@pytest.mark.parametrize("kind", ["jpeg 420", "jpeg progressive", "jpeg turned 6"])
def test_a_jpeg_that_is_cut_off_never_reaches_the_gpu(kind: str, kept: float | str) -> None:
    """The GPU's decoder would silently fill in the missing pixels. This test shows that DALI gets a
    placeholder.
    """
    whole = FILES[kind]
    cut = whole[: int(len(whole) * kept)] if isinstance(kept, float) else whole[:-2]
    request = Request([whole, cut, whole], ["JPEG"] * 3, [1] * 3, stack([WHOLE] * 3))
    backend = _backend((SIZE, SIZE), 3, CPU)
    checked = backend._on_host(request)
    assert checked.data[0] is whole and checked.data[2] is whole
    assert checked.data[1] == PLACEHOLDER[0]
    (dali,) = backend.run([request])
    assert dali.failures == decode_request(request, (SIZE, SIZE)).failures
    assert set(dali.failures) == {1}


OTHER_VALUES = {
    "top": 9, "left": 9, "height": 30, "width": 30, "hflip": True, "vflip": True,
    "color": color_matrix(1.2), "resample": 40, "jpeg": 60, "blur": 0.7, "grayscale": True,
    "filter": 2, "jpeg2": 30, "jpeg3": 30, "grid_top": 5, "grid_left": 5, "webp": 20,
    "whole_jpeg": 20, "whole_chroma": 3, "crop_filter": 2, "whole_width": 60,
    "whole_height": 60, "whole_filter": 2, "whole_webp": 20, "detail_top": 9, "detail_left": 9,
    "detail_side": 30,
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("field", AugmentParams._fields)
def test_both_backends_apply_every_field(field: str, device: torch.device) -> None:
    """A new field that one backend ignores fails here."""
    before = AugmentParams(top=2, left=3, height=50, width=48)
    if field == "filter":  # has an effect only with `resample`
        before = before._replace(resample=24)
    if field == "whole_chroma":
        before = before._replace(whole_jpeg=90)
    if field in ("whole_width", "whole_height", "whole_filter"):
        before = before._replace(whole_width=55, whole_height=55)
    detail = field.startswith("detail_")
    if detail:
        before = before._replace(detail_side=40)
    after = before._replace(**{field: OTHER_VALUES[field]})
    shape = ((2 if detail else 1) * SIZE, SIZE)
    pil, dali = both([encode(IMAGE, "PNG")] * 2, [before, after], shape, device)
    for name, images in (("pil", pil), ("dali", dali)):
        assert np.abs(images[0] - images[1]).mean() > 0.5, f"{name} ignores {field}"


@pytest.mark.parametrize("device", DEVICES)
def test_mixed_parameters_in_one_batch_keep_their_order(device: torch.device) -> None:
    """DALI's conditional operators split and merge a batch."""
    params = [stage for stage, _ in STAGES.values()] * 2
    data = [encode(photo(i, SIZE, SIZE), "PNG") for i in range(len(params))]
    pil, dali = both(data, params, device=device)
    assert np.abs(pil - dali).max() <= ROUNDING


@pytest.mark.parametrize("device", DEVICES)
def test_the_jpeg_stage_is_libjpeg(device: torch.device) -> None:
    """A DALI release whose CPU operator uses the algorithm of its GPU operator would fail here."""
    params = [WHOLE._replace(jpeg=quality) for quality in (40, 60, 80, 95)]
    _, dali = both([encode(SCENES["plain"], "PNG")] * 4, params, device=device)
    for quality, pixels in zip((40, 60, 80, 95), dali, strict=True):
        stored = encode(SCENES["plain"], quality=quality, subsampling="4:2:0")
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(stored))))


@pytest.mark.parametrize(
    ("longer", "field"), [(WEBP_SIDE, "whole_webp"), (JPEG_SIDE, "whole_jpeg")]
)
def test_an_image_too_long_for_a_format_is_not_compressed(longer: int, field: str) -> None:
    """libwebp and libjpeg have a longest side; an error would end the run."""
    plain = AugmentParams(top=0, left=0, height=8, width=40)
    for width, changes in ((longer, True), (longer + 1, False)):
        image = encode(photo(4, width, 8), "PNG")
        params = [plain, plain._replace(**{field: 30})]
        for images in both([image] * 2, params, (8, 8)):
            assert (np.abs(images[0] - images[1]).mean() > 0.5) == changes


def test_an_error_of_the_requests_is_not_taken_for_a_bad_batch() -> None:
    def failing() -> Iterator[Request]:
        yield Request(
            [encode(IMAGE, "PNG")], ["PNG"], [1], stack([AugmentParams(0, 0, SIZE, SIZE)])
        )
        raise RuntimeError("the disk is gone")

    seen = []
    with pytest.raises(RuntimeError, match="the disk is gone"):
        seen.extend(DaliBackend((SIZE, SIZE), 1, CPU, threads=1).run(failing()))
