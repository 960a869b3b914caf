"""Augmentation parameters: what they depend on, that they keep their ranges, golden values."""

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from imaging.jpeg import CHROMAS
from pipeline.augment import (
    GRID,
    LEAST_SIGMA,
    AugmentParams,
    AugmentPolicy,
    PolicyTable,
    SampleKeys,
    center_crop_params,
    sample_params,
)
from pipeline.color import IDENTITY
from pipeline.philox import uniform
from pipeline.pil import apply as apply_to
from pipeline.pil import gaussian_blur, jpeg_round_trip
from pipeline.preprocess import FILTERS, Preprocess
from tests.builders import HARSH, PREPROCESS, color_matrix, photo
from tests.goldens import Golden

PHASE1 = AugmentPolicy(
    scale=(0.6, 1.0), ratio=(0.85, 1.15), hflip=0.5, color_jitter=0.3, brightness=0.06,
    resample=0.3, resample_scale=(0.8, 0.95), jpeg=0.3, jpeg_quality=(80, 95),
    blur=0.2, blur_sigma=(0.1, 0.5), grayscale=0.03,
)  # fmt: skip


def params_of(
    augment: AugmentPolicy,
    preprocess: Preprocess,
    width: int,
    height: int,
    seed: int,
    epoch: int,
    sample: int,
) -> AugmentParams:
    size = np.array([width]), np.array([height])
    samples = np.array([sample])
    batch = sample_params(
        PolicyTable([augment]),
        np.array([0]),
        preprocess,
        *size,
        SampleKeys(seed, epoch, samples),
    )
    return batch.row(0)


def center_params(preprocess: Preprocess, width: int, height: int) -> AugmentParams:
    return center_crop_params(preprocess, np.array([width]), np.array([height])).row(0)


def apply(pixels: np.ndarray, params: AugmentParams, size: int) -> np.ndarray:
    out = torch.zeros((size, size, 3), dtype=torch.uint8)
    apply_to(pixels, params, out)
    return out.numpy()


def many_params(
    augment: AugmentPolicy, count: int = 4000, width: int = 500, height: int = 375
) -> list[AugmentParams]:
    sizes = np.full(count, width), np.full(count, height)
    rows = np.zeros(count, np.int64)
    samples = np.arange(count)
    batch = sample_params(
        PolicyTable([augment]), rows, Preprocess(), *sizes, SampleKeys(7, 2, samples)
    )
    return list(batch.rows())


@pytest.mark.parametrize("count", [1, 4, 35])
def test_uniform_gives_the_numbers_of_numpys_philox(count: int) -> None:
    """NumPy's generator is the reference of the vectorized one, also for sample numbers above 32
    bits.
    """
    samples = np.array([0, 1, 7, 1309, 2**33 + 5])
    numbers = uniform(70, 3, samples, count)
    for row, sample in enumerate(samples.tolist()):
        stream = np.random.Philox(key=[70, 3], counter=[0, sample, 0, 0])
        expected = np.random.Generator(stream).random(count)
        np.testing.assert_array_equal(numbers[row], expected)


def test_parameters_do_not_depend_on_their_batch() -> None:
    together = many_params(PHASE1, 300)
    alone = [params_of(PHASE1, Preprocess(), 500, 375, 7, 2, sample) for sample in range(300)]
    assert together == alone


def test_probabilities_and_ranges_are_those_of_the_policy() -> None:
    params = many_params(PHASE1)
    share = lambda test: sum(map(test, params)) / len(params)  # noqa: E731
    assert abs(share(lambda d: d.hflip) - 0.5) < 0.03
    assert abs(share(lambda d: d.color != IDENTITY) - 0.3) < 0.03
    assert abs(share(lambda d: d.resample > 0) - 0.3) < 0.03
    assert abs(share(lambda d: d.jpeg > 0) - 0.3) < 0.03
    assert abs(share(lambda d: d.blur > 0) - 0.2) < 0.03
    assert abs(share(lambda d: d.grayscale) - 0.03) < 0.015
    assert {d.jpeg for d in params if d.jpeg} == set(range(80, 96))
    assert {d.resample for d in params if d.resample} == set(range(205, 244))
    assert all(0.1 <= d.blur <= 0.5 for d in params if d.blur)


def test_a_harsh_policy_samples_all_its_extra_operations() -> None:
    params = many_params(HARSH)
    share = lambda test: sum(map(test, params)) / len(params)  # noqa: E731
    counts = [sum(map(bool, (d.jpeg, d.jpeg2, d.jpeg3))) for d in params if d.jpeg]
    assert all(abs(counts.count(number) / len(counts) - 1 / 3) < 0.05 for number in (1, 2, 3))
    assert all(not (d.jpeg2 or d.jpeg3) for d in params if not d.jpeg)
    assert all(d.jpeg2 for d in params if d.jpeg3)
    assert all(40 <= q <= 95 for d in params for q in (d.jpeg, d.jpeg2, d.jpeg3) if q)
    assert abs(share(lambda d: d.webp > 0) - 0.3) < 0.03
    assert {d.webp for d in params if d.webp} == set(range(40, 91))
    kinds = [d.filter for d in params if d.resample]
    assert all(abs(kinds.count(k) / len(kinds) - 1 / 3) < 0.05 for k in range(3))
    assert abs(share(lambda d: bool(d.grid_top or d.grid_left)) - 0.4 * 255 / 256) < 0.03
    assert {d.grid_top for d in params} == {d.grid_left for d in params} == set(range(16))


def test_the_shift_of_jpeg_blocks_covers_the_period_of_chroma() -> None:
    """Blocks of chroma, at half the resolution, begin at other pixels after a shift of 8."""
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    whole = jpeg_round_trip(pixels, 10)
    for shift in (GRID // 2, GRID):
        cut = jpeg_round_trip(np.ascontiguousarray(pixels[shift:, shift:]), 10)
        inside = np.s_[8:64, 8:64]  # upsampling of chroma reaches over the border
        equal = np.array_equal(cut[inside], whole[shift:, shift:][inside])
        assert equal == (shift == GRID)


def test_the_whole_image_is_compressed_as_often_and_as_much_as_the_policy_says() -> None:
    policy = replace(PHASE1, whole_jpeg=0.6, whole_jpeg_quality=(35, 90))
    params = many_params(policy)
    share = sum(d.whole_jpeg > 0 for d in params) / len(params)
    assert abs(share - 0.6) < 0.03
    assert {d.whole_jpeg for d in params if d.whole_jpeg} == set(range(35, 91))
    assert all(CHROMAS[d.whole_chroma] == "420" for d in params)
    without = [d._replace(whole_jpeg=0) for d in params]
    assert without == many_params(PHASE1)  # nothing else changes
    largest = AugmentPolicy(scale=(1.0, 1.0), ratio=(1.0, 1.0), whole_jpeg=1.0)
    crops = [d[:4] for d in many_params(largest, 300)]  # of 500 x 375: somewhere along the width
    assert {(top, height, width) for top, _, height, width in crops} == {(0, 375, 375)}
    assert len({left for _, left, _, _ in crops}) > 60


def test_the_whole_image_is_resized_and_compressed_as_the_policy_says() -> None:
    """As a web site does: the crop is one of the resized image, of 500 x 375 pixels here."""
    policy = AugmentPolicy(
        whole_resize=0.6, whole_resize_scale=(0.3, 1.0), resample_filters=("bilinear", "lanczos"),
        whole_webp=0.3, whole_webp_quality=(40, 90),
    )  # fmt: skip
    params = many_params(policy)
    resized = [d for d in params if d.whole_height]
    assert abs(len(resized) / len(params) - 0.6) < 0.03
    assert abs(sum(d.whole_webp > 0 for d in params) / len(params) - 0.3) < 0.03
    assert {d.whole_webp for d in params if d.whole_webp} == set(range(40, 91))
    assert {d.whole_filter for d in resized} == {0, 2}
    assert all(abs(d.whole_width / d.whole_height - 500 / 375) < 0.02 for d in resized)
    smallest = min(d.whole_height for d in resized)
    assert smallest == Preprocess().crop_size  # not 0.3 of 375: small images are left alone
    assert max(d.whole_height for d in resized) > 365
    for d in params:
        height, width = (d.whole_height or 375), (d.whole_width or 500)
        assert d.height == d.width == height and d.top == 0 and d.left + d.width <= width
    plain = many_params(AugmentPolicy())
    assert all(d.whole_height == d.whole_width == d.whole_webp == 0 for d in plain)


def test_operations_happen_independently_of_each_other() -> None:
    policy = replace(
        PHASE1, hflip=0.5, color_jitter=0.5, resample=0.5, jpeg=0.5, blur=0.5, grayscale=0.5,
        jpeg_grid_shift=0.5, webp=0.5, webp_quality=(40, 90),
    )  # fmt: skip
    happened = np.array(
        [
            (d.hflip, d.color != IDENTITY, d.resample > 0, d.jpeg > 0, d.blur > 0, d.grayscale,
             d.grid_top + d.grid_left > 0, d.webp > 0)
            for d in many_params(policy)
        ]
    )  # fmt: skip
    together = np.corrcoef(happened.T)
    assert np.abs(together - np.eye(len(together))).max() < 0.07  # four sigma of 4,000 samples


def test_extra_operations_do_not_change_the_other_parameters() -> None:
    mild = AugmentPolicy(hflip=0.5, jpeg=0.5, jpeg_quality=(40, 90), blur=0.5, grayscale=0.5)
    harsh = replace(mild, num_jpegs=(1, 3), jpeg_grid_shift=1.0, webp=1.0, webp_quality=(10, 90))
    for one, other in zip(many_params(mild, 200), many_params(harsh, 200), strict=True):
        assert one[:10] == other[:10]


def test_crops_stay_inside_and_cover_the_scale() -> None:
    """torchvision's crop, which trained the original, is the reference."""
    crops = many_params(PHASE1)
    areas = np.array([d.width * d.height / (500 * 375) for d in crops])
    torch.manual_seed(0)
    image = torch.zeros(3, 375, 500)
    params = transforms.RandomResizedCrop.get_params
    theirs = [params(image, (0.6, 1.0), (0.85, 1.15)) for _ in range(4000)]
    reference = np.array([h * w / (500 * 375) for _, _, h, w in theirs])
    assert areas.min() >= 0.595
    assert abs(areas.mean() - reference.mean()) < 0.006
    assert abs(areas.std() - reference.std()) < 0.004
    for d in crops:
        assert 0 <= d.top <= 375 - d.height
        assert 0 <= d.left <= 500 - d.width
        assert 0.84 < d.width / d.height < 1.16


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 900), (900, 3), (17, 16)])
def test_very_small_and_very_long_images_have_a_crop(width: int, height: int) -> None:
    for d in [center_params(PREPROCESS, width, height), *many_params(HARSH, 50, width, height)]:
        assert 1 <= d.height <= height
        assert 1 <= d.width <= width
        assert apply(photo(1, width, height), d, 48).shape == (48, 48, 3)


def test_parameters_depend_on_seed_epoch_and_sample_and_nothing_else() -> None:
    one = params_of(HARSH, PREPROCESS, 90, 70, 1, 2, 3)
    for _ in range(3):
        params_of(HARSH, PREPROCESS, 90, 70, 1, 2, 4)
    assert params_of(HARSH, PREPROCESS, 90, 70, 1, 2, 3) == one
    others = [(0, 2, 3), (1, 0, 3), (1, 2, 0)]
    assert all(params_of(HARSH, PREPROCESS, 90, 70, *other) != one for other in others)


def test_one_probability_does_not_change_the_other_parameters() -> None:
    without = params_of(
        AugmentPolicy(hflip=0.5, jpeg=0.5, jpeg_quality=(40, 90)), PREPROCESS, 90, 70, 1, 1, 1
    )
    more = AugmentPolicy(
        hflip=0.5, jpeg=0.5, jpeg_quality=(40, 90), blur=1.0, grayscale=1.0, color_jitter=1.0
    )
    assert params_of(more, PREPROCESS, 90, 70, 1, 1, 1)[:5] == without[:5]
    assert params_of(more, PREPROCESS, 90, 70, 1, 1, 1).jpeg == without.jpeg


def test_parameters_equal_the_golden_values(golden: Golden) -> None:
    """Golden values: if these parameters change, so does every training run of a given seed."""
    params = params_of(PHASE1, Preprocess(), 500, 375, 70, 0, 1309)
    names = ("top", "left", "height", "width", "hflip", "resample", "jpeg", "grayscale", "blur")
    assert params[:5] == tuple(getattr(params, name) for name in names[:5])
    golden.check("augment", {name: getattr(params, name) for name in names}, rtol=1e-7)
    color = np.diag(np.reshape(params.color, (3, 4))).tolist()
    golden.check("augment_color", {"diagonal": [round(x, 8) for x in color]}, rtol=1e-6)


@pytest.mark.parametrize("size", [(576, 576), (864, 576), (576, 1000), (1152, 1440)])
def test_the_evaluation_crop_equals_torchvisions_resize_and_center_crop(
    size: tuple[int, int],
) -> None:
    """Compare with torchvision's Resize(288) + CenterCrop(256), which trained the original. Pixels
    are the same if the crop falls on whole pixels, except at the border, where torchvision's resize
    still sees pixels outside the crop.
    """
    pixels = np.asarray(Image.fromarray(photo(5)).resize(size, Image.Resampling.BICUBIC))
    ours = apply(pixels, center_params(Preprocess(), *size), 256)
    reference = transforms.Compose([transforms.Resize(288), transforms.CenterCrop(256)])
    difference = np.abs(ours.astype(int) - np.asarray(reference(Image.fromarray(pixels))))
    assert difference[2:-2, 2:-2].max() <= 2
    assert difference.mean() < 0.2


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (301, 640), (100, 3000)])
def test_the_evaluation_crop_is_rounded_by_less_than_a_pixel(size: tuple[int, int]) -> None:
    side = min(size) * 256 / 288
    params = center_params(Preprocess(), *size)
    assert params.width == params.height
    assert abs(params.width - side) <= 0.5
    assert abs(params.left - (size[0] - side) / 2) <= 0.75
    assert abs(params.top - (size[1] - side) / 2) <= 0.75


def test_color_matrices_change_brightness_contrast_saturation_and_hue() -> None:
    def turn(rgb: tuple[float, ...], **change: float) -> np.ndarray:
        return np.array(color_matrix(**change)).reshape(3, 4) @ np.array([*rgb, 1.0])

    np.testing.assert_allclose(turn((10, 20, 30)), (10, 20, 30), atol=1e-3)
    np.testing.assert_allclose(turn((10, 20, 30), brightness=1.5), (15, 30, 45), atol=1e-2)
    np.testing.assert_allclose(turn((127.5,) * 3, contrast=1.4), (127.5,) * 3, atol=1e-2)
    np.testing.assert_allclose(turn((0, 0, 0), contrast=0.8), (25.5,) * 3, atol=1e-2)
    gray = turn((200, 100, 50), saturation=0.0)
    np.testing.assert_allclose(gray, np.full(3, 0.299 * 200 + 0.587 * 100 + 0.114 * 50), atol=0.5)
    np.testing.assert_allclose(turn((90, 90, 90), hue=0.3), (90, 90, 90), atol=0.3)
    assert np.abs(turn((200, 100, 50), hue=0.1) - (200, 100, 50)).max() > 10


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hflip": 1.2}, "hflip must be from 0 to 1"),
        ({"scale": (0.9, 0.5)}, "scale must be 0 < low <= high"),
        ({"scale": [0.9, 0.5]}, "scale must be 0 < low <= high"),
        ({"ratio": (0.5,)}, "ratio must be 0 < low <= high"),
        ({"scale": (0.5, 1.5)}, "scale is a share of the area"),
        ({"jpeg_quality": (50, 101)}, "at most 100"),
        ({"num_jpegs": (1, 4)}, "jpegs is at most 3"),
        ({"whole_jpeg": 1.5}, "whole_jpeg must be from 0 to 1"),
        ({"whole_resize": 1.5}, "whole_resize must be from 0 to 1"),
        ({"whole_webp": -0.5}, "whole_webp must be from 0 to 1"),
        ({"whole_resize_scale": (0.0, 1.0)}, "whole_resize_scale must be"),
        ({"whole_resize_scale": (0.5, 2.5)}, "whole_resize_scale is at most 2"),
        ({"whole_webp_quality": (50, 101)}, "whole_webp_quality is at most 100"),
        ({"whole_jpeg_quality": (0, 90)}, "whole_jpeg_quality must be"),
        ({"whole_jpeg_quality": (50, 101)}, "whole_jpeg_quality is at most 100"),
        (
            {"match_pair_jpeg": True, "whole_jpeg": 0.5},
            "set whole_jpeg, whole_resize and whole_webp",
        ),
        ({"match_pair_jpeg": True, "whole_resize": 0.5}, "set whole_jpeg, whole_resize and"),
        ({"resample_filters": ()}, "resample_filters takes one or more of bilinear, bicubic"),
    ],
)
def test_impossible_ranges_are_refused(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AugmentPolicy(**values)


def test_a_blur_below_the_least_sigma_changes_nothing() -> None:
    """A checkerboard is the hardest case: each pixel differs most from its neighbors."""
    checkerboard = np.indices((70, 45)).sum(axis=0) % 2 * 255
    images = [np.repeat(checkerboard[..., None], 3, axis=2).astype(np.uint8), photo(1, 70, 45)]
    for image in images:
        for sigma in (0.1, 0.2, LEAST_SIGMA):
            np.testing.assert_array_equal(gaussian_blur(image, sigma), image)
    assert (gaussian_blur(images[0], 0.27) != images[0]).any()


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 9), (9, 1), (2, 2), (32, 5), (33, 7), (64, 3), (97, 40)]
)
def test_blur_in_bands_equals_a_blur_of_the_whole_image(shape: tuple[int, int]) -> None:
    image = photo(2, shape[1], shape[0])
    taps = np.exp(-0.5 * (np.arange(-1, 2) / 0.45) ** 2)
    taps /= taps.sum()
    expected = image.astype(np.float64)
    for axis in (0, 1):
        size = shape[axis]
        around = [np.abs(np.arange(-1, size - 1)), np.arange(size), np.arange(1, size + 1)]
        around[2][-1] = max(size - 2, 0)
        around[0][0] = min(1, size - 1)
        expected = sum(w * expected.take(i, axis) for w, i in zip(taps, around, strict=True))
    np.testing.assert_allclose(gaussian_blur(image, 0.45), expected, atol=0.501)


def test_a_new_field_is_checked_by_its_type() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Longer(AugmentPolicy):
        sepia: float = 0.0
        sepia_scale: tuple[float, float] = (1.0, 1.0)

    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="sepia must be from 0 to 1"):
            Longer(sepia=wrong)
    with pytest.raises(ValueError, match=r"sepia_scale must be 0 < low <= high, got .2, 1."):
        Longer(sepia_scale=(2, 1))


def test_every_field_has_a_check() -> None:
    unchecked = {"resample_filters", "match_pair_jpeg"}
    for field in fields(AugmentPolicy):
        if field.name not in unchecked:
            wrong = 1.5 if field.type is float else (0, 1)
            with pytest.raises(ValueError, match=f"{field.name} must be"):
                AugmentPolicy(**{field.name: wrong})


EVERYTHING = replace(
    HARSH, vflip=0.5, whole_jpeg=0.5, whole_jpeg_quality=(50, 90), whole_resize=0.5,
    whole_resize_scale=(0.8, 0.9), whole_webp=0.5, whole_webp_quality=(50, 90),
)  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(AugmentPolicy)])
def test_every_setting_changes_what_is_sampled(name: str) -> None:
    if name == "match_pair_jpeg":
        pytest.skip("it takes the JPEG of a partner: tests/pipeline/test_pairs.py")
    value = getattr(EVERYTHING, name)
    assert value != getattr(AugmentPolicy(), name), f"EVERYTHING lacks {name}"
    other = value / 2 if isinstance(value, float) else value[1:] * len(value)
    changed = many_params(replace(EVERYTHING, **{name: other}), 50)
    assert changed != many_params(EVERYTHING, 50)


def test_a_filter_that_is_named_more_often_is_chosen_more_often() -> None:
    filters = ("bilinear",) * 5 + ("lanczos",)
    params = many_params(replace(PHASE1, resample=1.0, resample_filters=filters))
    share = np.mean([FILTERS.index("lanczos") == p.filter for p in params])
    assert share == pytest.approx(1 / 6, abs=0.02)


def linear_and_offset(params: list[AugmentParams]) -> tuple[np.ndarray, np.ndarray]:
    """Return the color matrices, (N, 3, 3), and the offsets of the channels, (N, 3)."""
    matrices = np.reshape([d.color for d in params], (-1, 3, 4))
    return matrices[..., :3], matrices[..., 3]


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_color_setting_gives_its_own_factor_in_its_own_range(name: str) -> None:
    """The factor follows from the trace of the matrix: 3 f, 1 + 2 s, or 1 + 2 cos of the hue."""
    params = many_params(AugmentPolicy(color_jitter=1.0, **{name: 0.2}), 500)
    linear, _ = linear_and_offset(params)
    trace = np.trace(linear, axis1=1, axis2=2)
    factor = trace / 3 if name in ("brightness", "contrast") else (trace - 1) / 2
    if name == "hue":
        factor = np.arccos(factor.clip(-1, 1)) / (2 * np.pi)
    low, high = (0.0, 0.2) if name == "hue" else (0.8, 1.2)
    assert low - 1e-3 <= factor.min() < low + 0.02 and high - 0.02 < factor.max() <= high + 1e-3
    for d, value in zip(params, factor.tolist(), strict=True):
        signs = (value, -value) if name == "hue" else (value,)
        wanted = [color_matrix(**{name: sign}) for sign in signs]
        assert min(np.abs(np.subtract(d.color, one)).max() for one in wanted) < 0.01


def test_the_factors_of_color_are_independent() -> None:
    policy = AugmentPolicy(color_jitter=1.0, brightness=0.2, contrast=0.2, saturation=0.2)
    linear, offset = linear_and_offset(many_params(policy))
    contrast = 1 - offset[:, 0] / 127.5
    both = (linear @ np.ones(3))[:, 0]  # gray stays gray: brightness times contrast
    saturation = (np.trace(linear, axis1=1, axis2=2) / both - 1) / 2
    together = np.corrcoef([both / contrast, contrast, saturation])
    assert np.abs(together - np.eye(3)).max() < 0.07  # four sigma of 4,000 samples


def test_a_small_image_is_not_enlarged_to_the_crop() -> None:
    """Web sites leave small images alone. Enlarging them would mark all small sources."""
    policy = AugmentPolicy(whole_resize=1.0, whole_resize_scale=(0.3, 1.0))
    assert all(d.whole_height == 0 for d in many_params(policy, 300, 200, 150))


def test_the_filter_of_a_whole_image_does_not_depend_on_its_size() -> None:
    policy = AugmentPolicy(
        whole_resize=1.0, whole_resize_scale=(0.3, 1.0), resample=1.0,
        resample_filters=("bilinear", "lanczos"), resample_scale=(0.5, 0.9),
    )  # fmt: skip
    params = [d for d in many_params(policy) if d.whole_height > Preprocess().crop_size]
    columns = [(d.whole_filter, d.whole_height, d.filter, d.resample) for d in params]
    together = np.corrcoef(np.transpose(columns))
    assert np.abs(together - np.eye(4)).max() < 0.08
