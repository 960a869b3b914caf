"""The detail crop: where it lies, and that both backends take the same pixels for it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline import pil
from pipeline.augment import (
    AugmentBatch,
    AugmentPolicy,
    PolicyTable,
    SampleKeys,
    center_crop_params,
    sample_params,
)
from pipeline.batch import Request
from pipeline.dali import DaliBackend
from pipeline.preprocess import Preprocess
from tests.builders import HARSH, encode, photo

ONE = Preprocess(crop_size=32, resize_size=36, interpolation="bicubic")
TWO = replace(ONE, detail_crop=True)

COUNT = 200
SIZES = np.random.default_rng(5).integers(10, 300, (2, COUNT))


def sampled(policy: AugmentPolicy, preprocess: Preprocess, epoch: int = 0) -> AugmentBatch:
    keys = SampleKeys(7, epoch, np.arange(COUNT))
    none = np.zeros(COUNT, np.int64)
    return sample_params(PolicyTable([policy]), none, preprocess, *SIZES, keys)


def test_the_input_has_the_crops_one_below_the_other() -> None:
    assert (ONE.crops, ONE.shape, TWO.crops, TWO.shape) == (1, (32, 32), 2, (64, 32))
    pixels = photo(3, 90, 70)
    image, plain = pil.preprocess(pixels, TWO), pil.preprocess(pixels, ONE)
    np.testing.assert_array_equal(image[:32], plain)
    np.testing.assert_array_equal(image[32:], pixels[19:51, 29:61])


@pytest.mark.parametrize(
    "params",
    [
        center_crop_params(TWO, *SIZES),
        sampled(HARSH, TWO),
        sampled(AugmentPolicy(scale=(0.01, 0.3), ratio=(0.5, 2.0)), TWO),
    ],
    ids=["center", "harsh", "small crops"],
)
def test_the_detail_is_a_square_inside_the_crop(params: AugmentBatch) -> None:
    largest = np.minimum(32, np.minimum(params.height, params.width))
    np.testing.assert_array_equal(params.detail_side, largest)
    for start, inner, outer in (
        (params.top, params.detail_top, params.height),
        (params.left, params.detail_left, params.width),
    ):
        assert (start <= inner).all() and (inner + params.detail_side <= start + outer).all()


def test_the_detail_of_training_is_anywhere_and_that_of_evaluation_in_the_middle() -> None:
    widths, heights = np.full(COUNT, 132), np.full(COUNT, 132)
    whole = replace(TWO, resize_size=32)
    center = center_crop_params(whole, widths, heights)
    assert set(center.detail_top) == set(center.detail_left) == {50}
    none = np.zeros(COUNT, np.int64)
    params = sample_params(
        PolicyTable([AugmentPolicy()]), none, whole, widths, heights,
        SampleKeys(7, 0, np.arange(COUNT)),
    )  # fmt: skip
    for place in (params.detail_top, params.detail_left):
        assert place.min() < 5 and place.max() > 95 and abs(place.mean() - 50) < 8
    assert abs(np.corrcoef(params.detail_top, params.detail_left)[0, 1]) < 0.2


def test_the_detail_changes_no_other_parameter() -> None:
    one, two = sampled(HARSH, ONE), sampled(HARSH, TWO)
    for name in ("top", "left", "height", "width", "resample", "jpeg", "blur", "whole_jpeg"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert not one.detail_side.any() and two.detail_side.all()


def test_both_backends_take_the_same_detail() -> None:
    """Flips, JPEG, blur and the rest apply to each crop by itself."""
    rng = np.random.default_rng(2)
    data = [encode(photo(n, *rng.integers(40, 200, 2).tolist()), "PNG") for n in range(24)]
    sizes = np.array([pil.decode_image(d, "PNG", 1).shape[1::-1] for d in data]).T
    for policy in (HARSH, replace(HARSH, vflip=1.0, whole_jpeg=1.0, whole_jpeg_quality=(60, 90))):
        params = sample_params(
            PolicyTable([policy]), np.zeros(24, np.int64), TWO, *sizes,
            SampleKeys(1, 0, np.arange(24)),
        )  # fmt: skip
        request = Request(data, ["PNG"] * 24, [1] * 24, params)
        by_pil = pil.decode_request(request, TWO.shape)
        (by_dali,) = DaliBackend(TWO.shape, 24, torch.device("cpu"), threads=2).run([request])
        assert not by_pil.failures and not by_dali.failures
        assert by_pil.images.shape == by_dali.images.shape == (24, 64, 32, 3)
        apart = np.abs(by_pil.images.numpy().astype(int) - by_dali.images.numpy().astype(int))
        upper, lower = apart[:, :32].mean(), apart[:, 32:].mean()
        assert lower < 1.5 * upper + 0.2, f"{lower:.2f} below, {upper:.2f} above"
        detail = by_pil.images[:, 32:].float()
        assert (detail - by_pil.images[:, :32].float()).abs().mean() > 5  # not the same crop twice


def test_a_detail_outside_the_image_is_refused() -> None:
    params = center_crop_params(TWO, np.array([300]), np.array([300])).row(0)
    inside = params._replace(top=0, left=0, height=40, width=40)
    with pytest.raises(ValueError, match="its crop reaches to 165 x 165"):
        pil.apply(photo(1, 60, 50), inside, torch.empty((64, 32, 3), dtype=torch.uint8))
