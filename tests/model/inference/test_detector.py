"""The one way from a file to a verdict: both backends, any order, and nothing read too early."""

import threading
from pathlib import Path

import numpy as np
import pytest

from imaging.decode import DecodeError, ImageFile
from model import load_detector
from model.checkpoint import CheckpointError
from model.inference.prediction import UNREADABLE
from model.score import AT_A_TIME, probability, score_set
from pipeline.loader import open_loader
from pipeline.loading import Loading
from sharding.format import ShardSet
from tests.builders import CPU, KINDS, encode, photo

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def detector(small_runs: Path):
    return load_detector(runs=small_runs)


FILES = [
    encode(photo(n, 60 + n, 90 - n), kind)
    for n, kind in enumerate(("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"))
]


def test_both_backends_agree_and_name_the_same_files(small_runs: Path, detector) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    # What no decoder notices alike is noise in the pixels; a shard's hashes would find it.
    broken = [data for kind, data in KINDS.items() if not kind.startswith("noise")]
    files = [*FILES, encode(photo(9, 64, 96), exif=exif), *broken, *FILES]
    dali = load_detector(runs=small_runs, backend="dali")
    assert dali.reason == "asked for"
    predictions = list(dali.predict(files, batch_size=8))
    expected = list(detector.predict(files, batch_size=8))
    assert [one.name for one in predictions] == [one.name for one in expected]
    names = [*range(len(FILES) + 1), *range(len(files) - len(FILES), len(files))]
    for row in names:
        assert predictions[row].probability == pytest.approx(expected[row].probability, abs=0.02)
    for one, other in zip(predictions, expected, strict=True):
        assert one.error == other.error, (one, other)
        assert (one.verdict == UNREADABLE) == bool(one.error)


def test_the_shards_and_the_files_give_one_score(old: ShardSet, raw: Path, detector) -> None:
    """`evaluate.py`'s way and `predict.py`'s: the same bits in full batches, in small ones
    the same up to rounding.
    """
    files = [raw / origin for origin in old.table.column("origin").to_pylist()]
    loader = open_loader(
        old,
        preprocess=detector.preprocess,
        loading=Loading(backend="pil", num_workers=0),
        device=CPU,
    )
    evaluated = probability(score_set(detector.net, loader).logits)
    probabilities = np.array([one.probability for one in detector.predict(files, AT_A_TIME)])
    small = 1 + 4 + 16
    full = slice(small, small + AT_A_TIME)
    np.testing.assert_array_equal(probabilities[full], evaluated[full])
    np.testing.assert_allclose(probabilities, evaluated, rtol=0, atol=1e-6)


def test_the_size_of_a_batch_changes_a_score_by_rounding_alone(detector) -> None:
    files = [encode(photo(n), "PNG") for n in range(40)]
    one, many = (
        np.array([result.probability for result in detector.predict(files, size)])
        for size in (1, 32)
    )
    np.testing.assert_allclose(one, many, rtol=0, atol=1e-6)
    assert np.ptp(one) > 0.01


def test_any_error_of_reading_is_a_line(detector) -> None:
    def fail(error: Exception):
        def read() -> bytes:
            raise error

        return read

    errors = (DecodeError("a\nb"), PermissionError(13, "Permission denied"), MemoryError())
    predictions = list(detector.predict(ImageFile(str(n), fail(e)) for n, e in enumerate(errors)))
    assert [one.error for one in predictions] == [
        "a b", "Permission denied", "more memory would be needed than there is",
    ]  # fmt: skip
    with pytest.raises(ZeroDivisionError):  # our own mistakes are not taken for bad files
        list(detector.predict([ImageFile("x", fail(ZeroDivisionError()))]))


def test_no_thread_stays_behind(detector) -> None:
    before = threading.active_count()
    predictions = detector.predict(FILES * 20)
    next(predictions)
    predictions.close()
    assert threading.active_count() == before
    assert len(list(detector.predict(FILES))) == len(FILES)
    assert threading.active_count() == before
    assert list(detector.predict([])) == []


def test_a_threshold_that_is_asked_for_leaves_nothing_uncertain(small_runs: Path) -> None:
    strict = load_detector(runs=small_runs, threshold=0.7)
    assert (strict.threshold, strict.band) == (0.7, (0.7, 0.7))
    assert [strict.verdict(p) for p in (0.69, 0.7)] == ["no sign of AI", "likely AI"]
    with pytest.raises(ValueError, match="a threshold is a probability"):
        load_detector(runs=small_runs, threshold=1.5)
    with pytest.raises(CheckpointError, match="no checkpoint below"):
        load_detector(runs=small_runs / "none")
