"""Prediction with a checkpoint: both backends, every input type, errors, and threads."""

import io
import pickle
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from imaging.decode import DecodeError, ImageFile, decode, decode_image
from imaging.orientation import UPRIGHT
from model import load_detector
from model.checkpoint import CheckpointError
from model.inference.prediction import (
    UNREADABLE,
    DecodedImage,
    Picture,
    Prediction,
    as_source,
    preprocess_ahead,
)
from model.score import AT_A_TIME, score_set
from model.verdict import probability
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
    # Noise in the pixels is left out: the two decoders do not detect the same cases.
    broken = [data for kind, data in KINDS.items() if not kind.startswith("noise")]
    files = [*FILES, encode(photo(9, 64, 96), exif=exif), *broken, *FILES]
    dali = load_detector(runs=small_runs, backend="dali")
    assert dali.reason == "asked for"
    predictions = dali.predict(files, batch_size=8)
    expected = detector.predict(files, batch_size=8)
    assert [one.name for one in predictions] == [one.name for one in expected]
    names = [*range(len(FILES) + 1), *range(len(files) - len(FILES), len(files))]
    for row in names:
        assert predictions[row].probability == pytest.approx(expected[row].probability, abs=0.02)
    for one, other in zip(predictions, expected, strict=True):
        assert one.error == other.error, (one, other)
        assert (one.verdict == UNREADABLE) == bool(one.error)


def test_an_icon_gets_no_verdict(small_runs: Path, detector) -> None:
    """Neither as a file, whichever backend decodes it, nor as pixels."""
    icons = [encode(photo(1, 31, 200)), encode(photo(1, 200, 31), "PNG"), photo(1, 200, 31)]
    sizes = ["31 x 200", "200 x 31", "200 x 31"]
    for one in (detector, load_detector(runs=small_runs, backend="dali")):
        *small, enough = one.predict([*icons, encode(photo(1, 32, 200))])
        assert [prediction.verdict for prediction in small] == 3 * [UNREADABLE]
        for prediction, size in zip(small, sizes, strict=True):
            assert prediction.error == (
                f"{size} pixels: too small to judge; each side needs at least 32 pixels"
            )
        assert enough.probability is not None


def test_shards_and_files_give_the_same_scores(old: ShardSet, raw: Path, detector) -> None:
    """`evaluate.py` and `predict.py` give identical scores in full batches, and scores equal up to
    rounding in small batches.
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


def test_a_batch_size_below_one_is_refused(detector) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        detector.predict([encode(photo(1)), encode(photo(2))], batch_size=0)


def test_the_batch_size_changes_scores_only_by_rounding(detector) -> None:
    files = [encode(photo(n), "PNG") for n in range(40)]
    one, many = (
        np.array([result.probability for result in detector.predict(files, size)])
        for size in (1, 32)
    )
    np.testing.assert_allclose(one, many, rtol=0, atol=1e-6)
    assert np.ptp(one) > 0.01


def test_a_reading_error_gives_a_one_line_error(detector) -> None:
    def fail(error: Exception):
        def read() -> bytes:
            raise error

        return read

    errors = (DecodeError("a\nb"), PermissionError(13, "Permission denied"), MemoryError())
    predictions = detector.predict(ImageFile(str(n), fail(e)) for n, e in enumerate(errors))
    assert [one.error for one in predictions] == [
        "a b", "Permission denied", "not enough memory to read it",
    ]  # fmt: skip
    with pytest.raises(ZeroDivisionError):  # a bug in the code is not reported as a bad file
        detector.predict(ImageFile("x", fail(ZeroDivisionError())))


def test_no_thread_remains_after_predicting(detector) -> None:
    before = threading.active_count()
    predictions = detector.stream(FILES * 20)
    next(predictions)
    predictions.close()
    assert threading.active_count() == before
    assert len(detector.predict(FILES)) == len(FILES)
    detector.predict(FILES[0])
    assert threading.active_count() == before
    assert detector.predict([]) == []


def test_a_requested_threshold_leaves_nothing_uncertain(small_runs: Path) -> None:
    strict = load_detector(runs=small_runs, threshold=0.7)
    assert (strict.threshold, strict.band) == (0.7, (0.7, 0.7))
    assert [strict.verdict(p) for p in (0.69, 0.7)] == ["no sign of AI", "likely AI"]
    for wrong in (1.5, "0.5"):
        with pytest.raises(ValueError, match=f"a threshold is a probability, .*, got {wrong!r}"):
            load_detector(runs=small_runs, threshold=wrong)
    with pytest.raises(CheckpointError, match="there is no folder"):
        load_detector(runs=small_runs / "none")
    with pytest.raises(ValueError, match="https://x/y is an address; expected a path"):
        load_detector("https://x/y")


def test_rates_change_only_their_end_of_the_band_in_use(small_runs: Path) -> None:
    """The other end comes from the calibration or from an earlier call."""
    detector = load_detector(runs=small_runs)
    rates = {"band": [0.3, 0.6], "at_fpr": [[0.01, 0.9]], "at_miss": [[0.05, 0.1]]}
    detector = replace(detector, meta=detector.meta | {"calibration": rates})
    assert detector.at_rates(max_miss=0.05).band == (0.1, 0.6)
    assert detector.at_rates(max_fpr=0.01).band == (0.3, 0.9)
    assert detector.at_rates(max_fpr=0.01).at_rates(max_miss=0.05).band == (0.1, 0.9)
    # A requested threshold has no error rate, so it is no end of a band that keeps to one.
    asked = replace(detector, asked=(0.7, 0.7))
    for one in ({"max_fpr": 0.01}, {"max_miss": 0.05}):
        with pytest.raises(ValueError, match=r"threshold 0\.7 is in use .* without a threshold"):
            asked.at_rates(**one)
    assert asked.at_rates(max_fpr=0.01, max_miss=0.05).band == (0.1, 0.9)
    with pytest.raises(ValueError, match=r"an error rate is a number .*, got '0\.01'"):
        detector.at_rates(max_fpr="0.01")


def test_every_input_type_gives_the_same_prediction(detector, tmp_path: Path) -> None:
    """As path, bytes, array or PIL image. A PNG, which every decoder reads identically."""
    data = encode(photo(3, 70, 50), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    picture, array = Image.open(io.BytesIO(data)), decode(data)
    picture.filename = str(path)
    given = {
        str(path): str(path), path: str(path), data: "image 0", ImageFile("b", lambda: data): "b",
    }  # fmt: skip
    results = [detector.predict(image) for image in given]
    results += [detector.predict(image) for image in (picture, Image.fromarray(array), array)]
    names = [*given.values(), str(path), "image 0", "image 0"]
    assert [result.name for result in results] == names
    assert len({result.probability for result in results}) == 1
    many = detector.predict([path, data, picture, array, array[:, :, 0]])
    assert [one.name for one in many] == [str(path), "image 1", str(path), "image 3", "image 4"]
    assert many[0].probability == pytest.approx(results[0].probability, abs=1e-6)
    gray = Image.fromarray(array[:, :, 0])
    deep = Image.fromarray(array[:, :, 0].astype(np.uint16) * 257)
    shades = [detector.predict(image).probability for image in (array[:, :, 0], gray, deep)]
    assert shades[0] == shades[1] == shades[2] != results[0].probability
    assert detector.predict(iter([array]))[0].name == "image 0"
    buffer = bytearray(data)
    for given_bytes in (buffer, memoryview(data)):
        result = detector.predict(given_bytes)
        assert (result.name, result.probability) == ("image 0", results[0].probability)
    source = as_source(buffer)
    buffer[:] = bytes(len(buffer))  # filled with the next image while this one waits
    assert isinstance(source, ImageFile) and source.read() == data


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_pil_image_is_turned_only_by_its_exif(detector, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo(9, 64, 96), kind, exif=exif)
    expected = detector.preprocess_file(data)
    picture = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(detector.preprocess_file(picture), expected)
    turned = ImageOps.exif_transpose(picture)
    np.testing.assert_array_equal(detector.preprocess_file(turned), expected)


def test_a_pil_image_of_any_mode_is_scored_or_refused_alone(detector) -> None:
    shades = np.full((64, 64), 200, np.uint8)
    gray = Image.fromarray(shades)
    dark, wide, below, premultiplied, good = detector.predict(
        [
            Image.fromarray(shades.astype(np.int32)),
            Image.fromarray(shades.astype(np.int32) * 1000),
            Image.fromarray(shades.astype(np.int32) - 201),
            gray.convert("LA").convert("La"),
            gray,
        ]
    )
    said = "an image of mode I: values of at most 200, nearly black if 65,535 is white"
    assert dark.error.startswith(said)
    assert dark.error.endswith("; convert it to 8 bits, or to values up to 65,535")
    assert "integers from 200,000 to 200,000, and nothing says which value is white" in wide.error
    assert "integers from -1 to -1, and nothing says which value is white" in below.error
    assert premultiplied.probability == pytest.approx(good.probability, abs=1e-6)


def test_input_that_is_not_an_image_is_refused(detector, tmp_path: Path) -> None:
    for array, said in (
        (np.zeros((4, 4, 3)), "dtype float64, expected uint8 of (height, width, 3)"),
        (np.zeros((2, 4, 4, 3), np.uint8), "shape (2, 4, 4, 3)"),
        (np.zeros((4, 4, 4), np.uint8), "shape (4, 4, 4)"),
        (np.zeros((0, 4), np.uint8), "shape (0, 4)"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            detector.predict(array)
    record = {"bytes": FILES[0], "path": "a.png"}  # of Hugging Face; its keys were two paths
    for nothing in (3, None, [3], torch.zeros(4, 4), record, [record]):
        with pytest.raises(TypeError, match="an image is a path, the bytes of a file, a PIL image"):
            detector.predict(nothing)
    (tmp_path / "cut.png").write_bytes(encode(photo(1), "PNG")[:-400])
    with Image.open(tmp_path / "cut.png") as picture:
        cut = detector.predict(picture)
    assert (cut.verdict, cut.probability) == (UNREADABLE, None) and cut.error
    whole = encode(np.random.default_rng(1).integers(0, 256, (300, 300, 3), np.uint8), "PNG")
    second = whole.index(b"IDAT", whole.index(b"IDAT") + 4)
    (tmp_path / "bad.png").write_bytes(whole[:second] + b"ID?T" + whole[second + 4 :])
    with Image.open(tmp_path / "bad.png") as picture:  # Pillow raises SyntaxError
        bad, good = detector.predict([picture, tmp_path / "cut.png"])
    assert bad.verdict == good.verdict == UNREADABLE and "PNG does not decode" in bad.error
    assert detector.predict(tmp_path / "none.png").error == "No such file or directory"
    for address in ("https://example.com/a.jpg", Path("https://example.com/a.jpg")):
        assert detector.predict(address).error.startswith("an address; images are read from disk")
    opened = len(list(Path("/dev/fd").iterdir()))
    assert detector.predict(tmp_path).error == "a folder; name the image files in it"
    assert len(list(Path("/dev/fd").iterdir())) == opened


def test_dali_takes_arrays_too(small_runs: Path, detector) -> None:
    dali = load_detector(runs=small_runs, backend="dali")
    array = decode(FILES[1])
    (one, other) = (each.predict([array])[0].probability for each in (dali, detector))
    assert one == pytest.approx(other, abs=1e-6)  # the network sees the same pixels


def test_dali_takes_preprocessed_images_as_png_without_compression(detector) -> None:
    """The PNG stays in memory: compressing it took most of the time of such an image."""
    gray = DecodedImage("a", np.full((90, 120, 3), 200, np.uint8))
    for image in (gray, as_source(encode(gray.pixels, "PNG"))):
        png, pixels = detector._for_dali(image), detector.preprocess_file(gray)
        np.testing.assert_array_equal(decode_image(png, "PNG", UPRIGHT), pixels)
        assert len(png) > pixels.nbytes


def test_arrays_with_negative_strides_and_reused_ones(detector) -> None:
    image = photo(1, 60, 60)
    expected = [p.probability for p in detector.predict([image[:, ::-1].copy(), image])]
    flipped, straight = detector.predict([image[:, ::-1], image])
    assert [flipped.probability, straight.probability] == expected
    frame, frames = np.empty_like(image), [photo(seed, 60, 60) for seed in range(6)]

    def video() -> Iterator[np.ndarray]:
        for pixels in frames:
            frame[:] = pixels
            yield frame

    seen = [p.probability for p in detector.stream(video())]
    assert seen == [p.probability for p in detector.predict(frames)]


def test_an_open_file_is_no_list_of_images(detector, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(FILES[0])
    with (tmp_path / "a.jpg").open("rb") as file, pytest.raises(TypeError, match="BufferedReader"):
        detector.predict(file)


@pytest.mark.parametrize(
    "image",
    [photo(1), "a.png", Path("a.png"), FILES[0], bytearray(FILES[0]), Image.new("RGB", (8, 8)),
     ImageFile("a", lambda: FILES[0])],
    ids=lambda image: type(image).__name__,
)  # fmt: skip
def test_a_stream_of_one_image_is_refused_at_once(detector, image: Picture) -> None:
    """The rows of an array and the letters of a path would be images, each with a verdict."""
    said = f"got one {type(image).__name__}; pass it to predict"
    with pytest.raises(TypeError, match=said):
        detector.stream(image)  # not only when the first prediction is asked for


def test_a_stream_of_a_sequence_without_an_iterator(detector) -> None:
    class Files:
        def __getitem__(self, row: int) -> bytes:
            return FILES[:2][row]

    assert [one.verdict for one in detector.stream(Files())] == [
        one.verdict for one in detector.predict(FILES[:2])
    ]


def test_a_copy_for_another_process_scores_alike(detector) -> None:
    copy = pickle.loads(pickle.dumps(detector))
    assert copy.predict(FILES[0]) == detector.predict(FILES[0])
    assert copy.lock is not detector.lock


def test_a_stream_of_something_else_is_refused_at_once(detector) -> None:
    for nothing in (3, None, io.BytesIO(FILES[0])):
        with pytest.raises(TypeError, match="an image is a path, the bytes of a file"):
            detector.stream(nothing)


def test_dali_is_not_started_for_one_image(
    small_runs: Path, detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    dali = load_detector(runs=small_runs, backend="dali")
    monkeypatch.setattr("pipeline.dali.DaliBackend.run", lambda *_: pytest.fail("started"))
    assert dali.predict(FILES[1]).probability == detector.predict(FILES[1]).probability


def test_a_detector_has_one_identity_from_every_folder(
    detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(detector.checkpoint.parent)
    near = load_detector(detector.checkpoint.name)
    assert near.checkpoint == Path(detector.checkpoint.name)
    assert near.identity == detector.identity


def test_repr_of_detector_and_prediction_is_short(detector) -> None:
    assert repr(detector) == (
        f"ImageDetector({detector.identity!r}, likely AI from a score of 0.5)"
    )
    prediction = Prediction(name="a", probability=0.12345, verdict="uncertain")
    assert repr(prediction) == "Prediction('a', 'uncertain', probability=0.123)"
    refused = Prediction(name="a", probability=None, verdict=UNREADABLE, error="cut")
    assert repr(refused) == "Prediction('a', 'unreadable', error='cut')"


def test_an_image_that_cannot_be_preprocessed_ends_no_run() -> None:
    """Such as one that the processor of a published detector refuses."""

    def refuse_narrow(image: DecodedImage) -> np.ndarray:
        if image.pixels.shape[1] == 1:
            raise ValueError("the number of\nchannels is not clear")
        return image.pixels[:8, :8]

    images = [
        DecodedImage("a", photo(1)),
        DecodedImage("b", photo(2)[:, :1]),
        DecodedImage("c", photo(3)),
    ]
    ((names, pixels, failures),) = preprocess_ahead(images, refuse_narrow, (8, 8), 3, start=1)
    assert names == ["a", "b", "c"]
    assert failures == {1: "the number of channels is not clear"}
    assert pixels[0].any() and not pixels[1].any() and pixels[2].any()
