"""Robustness to perturbations, and the codec-swap test on detectors made for the test."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from model.evaluation.codec_swap import LOW_QUALITY, container_of, plan_swaps, report_robustness
from model.evaluation.robustness import (
    measure_perturbations,
    sample_by_hash,
    score_perturbations,
    shift_of,
)
from model.evaluation.scoring import CheckpointScorer
from model.score import score_set
from model.verdict import NOT_FINITE
from pipeline import read
from pipeline.loader import open_loader
from pipeline.loading import Loading
from pipeline.perturb import ORIGINAL, PERTURBATIONS, Perturbation
from pipeline.preprocess import Preprocess
from pipeline.read import ShardReader
from sharding.format import ShardSet, codes_of, join_sets, open_shards
from tests.builders import write_shards

CPU = torch.device("cpu")
PREPROCESS = Preprocess(crop_size=64, resize_size=64)
"""Keeps a square image of 64 pixels unchanged, so that the test detectors get its JPEG blocks."""


class Brightness(nn.Module):
    """Detector of content: bright images are fake, whatever their format."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        level = images.float().mean(dim=(1, 2, 3)) / 8 - 16
        return torch.stack([torch.zeros_like(level), level], dim=1)


class Blocking(nn.Module):
    """Detector of compression: 8 x 8 blocks without high frequencies, as in a JPEG, are real;
    blocks with grain are fake.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        turn = torch.cos(torch.pi / 8 * torch.arange(8)[:, None] * (torch.arange(8) + 0.5)) / 2
        blocks = images.float().mean(dim=1).unfold(1, 8, 8).unfold(2, 8, 8)
        high = (turn @ blocks @ turn.T)[..., 4:, 4:].square().mean(dim=(1, 2, 3, 4))
        level = 3 * torch.log(high / 3)
        return torch.stack([torch.zeros_like(level), level], dim=1)


def square(_rng: np.random.Generator, label: int, _number: int) -> tuple[str, int, int]:
    """Return format and size: reals are JPEG, fakes PNG, all 64 x 64."""
    return ("png" if label else "jpg"), 64, 64


def swapped(_rng: np.random.Generator, label: int, number: int) -> tuple[str, int, int]:
    return ("webp" if number % 3 else "png") if label else "jpg", 64, 64


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = {"square": {"square": (square, 40, 40)}, "other": {"other": (swapped, 12, 12)}}
    return write_shards(tmp_path_factory.mktemp("perturbation"), plan)


@pytest.fixture(scope="module")
def shards(sets: Path) -> ShardSet:
    return open_shards([sets / "square"])


def named(*names: str) -> list[Perturbation]:
    return [way for way in PERTURBATIONS if way.name in names]


def test_original_gives_the_scores_of_a_plain_evaluation(shards: ShardSet) -> None:
    net, preprocess = Brightness(), Preprocess(crop_size=32, resize_size=40)
    loader = open_loader(
        shards, preprocess=preprocess, loading=Loading(num_workers=0, backend="pil"), device=CPU
    )
    plain = score_set(net, loader)
    done: list[int] = []
    columns = score_perturbations(
        CheckpointScorer(net, preprocess, CPU), shards, np.arange(len(shards)),
        named("original", "jpeg-30"), done.append,
    )  # fmt: skip
    assert np.array_equal(columns.samples, plain.samples)
    assert np.array_equal(columns.labels, plain.labels)
    np.testing.assert_allclose(columns.logits[0], plain.logits, atol=1e-5)
    assert not np.allclose(columns.logits[1], plain.logits, atol=1e-5)
    assert sum(done) == len(shards)


def test_figures_of_a_perturbation(shards: ShardSet) -> None:
    """The figures equal simple counts, for a perturbation that flips known images."""
    dark = Perturbation("dark", "dark", 1, (lambda pixels, _rng: pixels // 2,))
    rows = np.arange(len(shards))
    columns = score_perturbations(
        CheckpointScorer(Brightness(), PREPROCESS, CPU), shards, rows, [ORIGINAL, dark]
    )
    at = {"temperature": 2.0, "threshold": 0.5}
    first, second = measure_perturbations(columns, codes_of(shards.table.column("group"))[0], **at)
    labels, (before, after) = columns.labels, columns.logits > 0
    assert first["flip_rate"] == 0 and first["shift"]["real"]["mean"] == 0
    for row, called in ((first, before), (second, after)):
        assert row["recall"] == pytest.approx(called[labels == 1].mean())
        assert row["false_positive_rate"] == pytest.approx(called[labels == 0].mean())
    assert second["flip_rate"] == pytest.approx((before != after).mean()) and 0.2 < np.mean(before)
    assert second["flip_rate_fake"] == pytest.approx((before != after)[labels == 1].mean())
    change = (columns.logits[1] - columns.logits[0])[labels == 0]
    assert second["shift"]["real"]["mean"] == pytest.approx(change.mean(), rel=1e-5)
    assert second["shift"]["real"]["high"] < 0


def test_a_failed_perturbation_is_counted_with_its_reason(shards: ShardSet) -> None:
    def refuse(pixels: np.ndarray, _rng: object) -> np.ndarray:
        if pixels.mean() > 128:
            raise ValueError("too bright\nfor this")
        return pixels

    rows = np.arange(len(shards))
    ways = [ORIGINAL, Perturbation("refuse", "refuse", 1, (refuse,))]
    columns = score_perturbations(
        CheckpointScorer(Brightness(), PREPROCESS, CPU), shards, rows, ways
    )
    groups = codes_of(shards.table.column("group"))[0]
    row = measure_perturbations(columns, groups, temperature=1.0, threshold=0.5)[1]
    missing = np.isnan(columns.logits[1])
    assert 5 < missing.sum() < 75
    assert row["failed"] == missing.sum() and row["failed_first"] == "too bright for this"
    assert row["images"] == row["reals"] + row["fakes"] == len(shards) - missing.sum()
    assert set(columns.failures[1]) == set(columns.samples[missing]) and not columns.failures[0]


class Refusing(CheckpointScorer):
    """Cannot prepare bright images, as packed or after a perturbation."""

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        if pixels.mean() > 128:
            raise ValueError("too bright\nto prepare")
        return super().prepare(pixels)


def test_an_image_that_cannot_be_prepared_ends_no_run(shards: ShardSet) -> None:
    """The samples are in reverse, as those of several ranks are in no order: the first failure is
    that of the first image of the set all the same.
    """
    ways = [ORIGINAL, Perturbation("invert", "invert", 1, (lambda pixels, _rng: 255 - pixels,))]
    columns = score_perturbations(
        Refusing(Brightness(), PREPROCESS, CPU), shards, np.arange(len(shards))[::-1], ways
    )
    assert 5 < len(columns.unreadable) < 75
    assert len(columns.samples) + len(columns.unreadable) == len(shards)
    assert {*columns.unreadable.values(), *columns.failures[1].values()} == {
        "too bright to prepare"
    }
    assert np.isnan(columns.logits[1][:-1]).any() and np.isfinite(columns.logits[0]).all()
    for failures in (columns.unreadable, columns.failures[1]):
        assert list(failures) == sorted(failures) and len(failures) > 1


class NoNumber(CheckpointScorer):
    """Gives some images no finite score: bright ones as packed, others after a perturbation."""

    def column(self, variants: Sequence[np.ndarray | str]) -> np.ndarray:
        logits = super().column(variants)
        if logits[0] > 0.5:
            logits[0] = np.nan
        else:
            logits[1:3] = np.nan, np.inf
        return logits


def test_an_image_without_a_finite_score_is_counted_with_its_reason(shards: ShardSet) -> None:
    report = report_robustness(
        NoNumber(Brightness(), PREPROCESS, CPU), shards, named("original", "jpeg-50"),
        temperature=1.0, threshold=0.5, per_class=1000,
    )  # fmt: skip
    assert 5 < report["unreadable"] < 75 and report["images"] + report["unreadable"] == len(shards)
    original, perturbed = report["perturbations"]
    assert (original["images"], original["failed"]) == (report["images"], 0)
    assert (perturbed["images"], perturbed["failed"]) == (0, report["images"])
    assert perturbed["failed_first"] == NOT_FINITE
    swap = report["codec_swap"][0]
    assert swap["failed"] > 0 and swap["failed_first"] == NOT_FINITE
    assert swap["images"] + swap["failed"] == report["images"]


def test_the_hash_of_the_perturbed_images(shards: ShardSet) -> None:
    """It does not depend on the detector or the order of the shards."""
    ways, at = named("original"), {"temperature": 1.0, "threshold": 0.5}
    scorer = CheckpointScorer(Brightness(), PREPROCESS, CPU)
    reversed_ = shards.take(np.arange(len(shards))[::-1])
    first, same, fewer = (
        report_robustness(scorer, of, ways, per_class=count, **at)["images_sha256"]
        for of, count in ((shards, 3), (reversed_, 3), (shards, 2))
    )
    assert first == same != fewer


def test_an_unreadable_image_has_no_column(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = read.decode_image

    def broken(data: bytes, *rest: object) -> np.ndarray:
        return decode(data[:50] if data.startswith(b"\x89PNG") else data, *rest)

    monkeypatch.setattr(read, "decode_image", broken)
    columns = score_perturbations(
        CheckpointScorer(Brightness(), PREPROCESS, CPU),
        shards,
        np.arange(len(shards)),
        named("original"),
    )
    assert len(columns.unreadable) == 40 and set(columns.labels) == {0}
    assert {"does not decode" in reason for reason in columns.unreadable.values()} == {True}


def test_samples_are_chosen_by_hash_equally_from_both_classes(shards: ShardSet) -> None:
    rows = sample_by_hash(shards, 10)
    labels = shards.column("label")[rows]
    assert [(labels == label).sum() for label in (0, 1)] == [10, 10]
    assert np.array_equal(rows, np.sort(rows))
    mixed = shards.take(np.random.default_rng(0).permutation(len(shards)))
    keys = [s.table.column("key").take(sample_by_hash(s, 10)).to_pylist() for s in (shards, mixed)]
    assert set(keys[0]) == set(keys[1])
    assert len(sample_by_hash(shards, 1000)) == len(shards)


def test_an_interval_counts_groups_not_images() -> None:
    rng = np.random.default_rng(3)
    # 50 groups of 20 images with equal changes are 50 observations, not 1000.
    moves = np.repeat(rng.normal(1.0, 1.0, 50), 20)
    grouped = shift_of(moves, np.repeat(np.arange(50), 20), gap=4.0)
    alone = shift_of(moves, np.arange(1000))
    width = grouped.high - grouped.low
    assert width == pytest.approx(2 * 1.96 * moves.std() / 50**0.5, rel=0.03)
    assert width > 4 * (alone.high - alone.low)
    assert grouped.of_gap == pytest.approx(grouped.mean / 4) and alone.of_gap is None
    assert shift_of(moves[:20], np.zeros(20)).low is None


def test_shift_intervals_have_the_stated_coverage() -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(400):
        moves = np.repeat(rng.normal(1.0, 1.0, 40), 3) + rng.normal(0, 0.3, 120)
        shift = shift_of(moves, np.repeat(np.arange(40), 3))
        hits += shift.low <= 1.0 <= shift.high
    assert 0.91 < hits / 400 < 0.98


def test_the_container_is_the_most_common_one(sets: Path, shards: ShardSet) -> None:
    labels = shards.column("label")
    real = container_of(shards, np.flatnonzero(labels == 0))
    assert (real.format, real.chroma, real.share) == ("JPEG", "420", 1.0)
    assert real.quality == np.median(shards.column("jpeg_quality")[labels == 0])
    assert container_of(shards, np.flatnonzero(labels == 1)) is None  # PNG leaves no trace
    other = open_shards([sets / "other"])
    fake = container_of(other, np.flatnonzero(other.column("label") == 1))
    assert (fake.format, fake.share) == ("WEBP", pytest.approx(8 / 12))
    assert fake.describe() == "WebP 80"
    everything = join_sets([other, shards])
    common = container_of(everything, np.arange(len(everything)))
    assert (common.format, common.share) == ("JPEG", pytest.approx(52 / 104))


def test_joined_sets_are_read_as_each_by_itself(sets: Path, shards: ShardSet) -> None:
    other = open_shards([sets / "other"])
    part = other.take(np.arange(20, 4, -3))
    whole = join_sets([part, shards, part])
    assert len(whole) == 2 * len(part) + len(shards)
    keys = whole.table.column("key").to_pylist()
    expected = [one.table.column("key").to_pylist() for one in (part, shards, part)]
    assert keys == [key for own in expected for key in own]
    data = ShardReader(whole).read(range(len(whole)))
    alone = [ShardReader(one).read(range(len(one))) for one in (part, shards, part)]
    assert data == [content for own in alone for content in own]
    assert whole.names("source", np.array([0, len(part)])) == ["other", "square"]
    assert len({whole.sha256, part.sha256, join_sets([shards, part]).sha256}) == 3


def test_swaps_depend_on_the_containers(sets: Path, shards: ShardSet) -> None:
    both = ["all-as-jpeg", "all-as-webp", "leveled"]
    for rows, expected in (
        (np.arange(len(shards)), ["fakes-as-reals", *both]),
        (np.flatnonzero(shards.column("label") == 0), both),
    ):
        _, swaps = plan_swaps(shards, rows)
        assert [swap.name for swap in swaps] == expected
    other = open_shards([sets / "other"])
    containers, swaps = plan_swaps(other, np.arange(len(other)))
    assert [swap.name for swap in swaps] == ["fakes-as-reals", "reals-as-fakes", *both]
    assert swaps[1].what == "reals re-encoded as WebP 80"
    assert swaps[-1].what.startswith("leveled: all shrunk to a shorter side of ")
    assert swaps[2].perturbation.amount == min(LOW_QUALITY, containers["real"].quality)


def test_a_container_detector_is_caught_and_a_content_detector_is_not(shards: ShardSet) -> None:
    verdicts = {}
    for net in (Blocking(), Brightness()):
        verdicts[type(net)] = report_robustness(
            CheckpointScorer(net, PREPROCESS, CPU), shards, named("original", "jpeg-50"),
            temperature=1.0, threshold=0.5, per_class=1000,
        )  # fmt: skip
    caught, content = (verdicts[kind]["codec_swap"][0] for kind in (Blocking, Brightness))
    assert caught["name"] == content["name"] == "fakes-as-reals"
    # As packed, the compression detector looks good ...
    assert caught["before"]["auroc"] > 0.9
    # ... but it calls fakes real once they have the compression of the reals.
    shift = caught["shift"]["fake"]
    assert shift["high"] < 0 and shift["of_gap"] < -0.7
    assert caught["after"]["auroc"] < 0.7 and caught["after"]["recall"] < 0.5
    assert caught["shift"]["real"] is None
    assert caught["before"]["false_positive_rate"] == caught["after"]["false_positive_rate"]
    # The scores and verdicts of the content detector hardly change.
    shift = content["shift"]["fake"]
    assert abs(shift["mean"]) < 0.15
    assert abs(content["after"]["recall"] - content["before"]["recall"]) <= 0.05
    assert verdicts[Blocking]["images"] == verdicts[Blocking]["of"] == 80
    assert verdicts[Blocking]["containers"]["real"]["name"].startswith("JPEG ")
    assert [row["name"] for row in verdicts[Blocking]["perturbations"]] == ["original", "jpeg-50"]
    leveled = verdicts[Blocking]["codec_swap"][-1]
    assert leveled["name"] == "leveled" and leveled["after"]["auroc"] < 0.75
