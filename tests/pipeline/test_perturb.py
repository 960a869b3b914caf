"""Each perturbation does what its name says, and the same every time."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from imaging.decode import prepare
from pipeline import perturb
from pipeline.perturb import ORIGINAL, PERTURBATIONS, Perturbation
from tests.builders import encode, photo

BY_NAME = {way.name: way for way in PERTURBATIONS}
IMAGE = photo(5, 150, 100)
SHA = bytes(range(32))
RNG = np.random.default_rng(0)


def changed(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - two).mean())


def blocking(image: np.ndarray) -> float:
    """Ratio of the mean step across borders of 8 x 8 blocks to that inside blocks."""
    steps = np.abs(np.diff(image.astype(float).mean(axis=2), axis=1)).mean(axis=0)
    border = np.arange(len(steps)) % 8 == 7
    return float(steps[border].mean() / steps[~border].mean())


def test_the_documented_perturbations_exist() -> None:
    assert len(BY_NAME) == len(PERTURBATIONS)
    assert PERTURBATIONS[0] is ORIGINAL
    expected = {f"jpeg-{quality}" for quality in range(30, 100, 10)}
    expected |= {"web", "hard", "screenshot", "scale-0.25", "scale-2", "jpeg-90-60"}
    assert expected <= set(BY_NAME)
    assert {way.family for way in PERTURBATIONS} >= {"WebP", "AVIF", "blur", "noise"}


@pytest.mark.parametrize("name", BY_NAME)
def test_a_perturbation_gives_the_same_uint8_rgb_every_time(name: str) -> None:
    before = IMAGE.copy()
    IMAGE.setflags(write=False)
    first, second = (BY_NAME[name].apply(IMAGE, SHA) for _ in range(2))
    assert first.dtype == np.uint8
    assert first.ndim == 3 and first.shape[2] == 3
    assert np.array_equal(first, second)
    assert np.array_equal(IMAGE, before)
    same = first.shape == IMAGE.shape and np.array_equal(first, IMAGE)
    assert same == (name == "original")


@pytest.mark.parametrize(
    ("name", "width", "height", "expected"),
    [
        ("scale-0.25", 150, 100, (38, 25)), ("scale-2", 150, 100, (300, 200)),
        ("scale-0.25", 1, 1, (1, 1)), ("screenshot", 150, 100, (1080, 1920)),
        ("screenshot", 5000, 100, (1080, 1920)), ("web", 1600, 900, (768, 432)),
        ("web", 700, 500, (700, 500)), ("hard", 400, 1024, (200, 512)),
        ("jpeg-90-cut-60", 150, 100, (147, 97)), ("jpeg-90-cut-60", 4, 4, (4, 4)),
        ("jpeg-50", 1, 1, (1, 1)), ("webp-50", 3, 1, (3, 1)), ("avif-50", 3, 1, (3, 1)),
        ("blur-2", 1, 1, (1, 1)),
    ],
)  # fmt: skip
def test_output_sizes(name: str, width: int, height: int, expected: tuple[int, int]) -> None:
    arrived = BY_NAME[name].apply(photo(1, width, height), SHA)
    assert arrived.shape[1::-1] == expected


@pytest.mark.parametrize("quality", [90, 60, 30])
def test_jpeg_equals_a_file_saved_by_pillow(quality: int) -> None:
    """The perturbed pixels are those of a file that Pillow saves, with the quality and chroma of
    the name.
    """
    data = encode(IMAGE, quality=quality)  # Pillow's own default is 4:2:0
    file = prepare(data)
    assert (file.facts.format, file.facts.jpeg_quality, file.facts.chroma) == (
        "JPEG", quality, "420",
    )  # fmt: skip
    assert np.array_equal(BY_NAME[f"jpeg-{quality}"].apply(IMAGE), file.pixels)


@pytest.mark.parametrize("chroma", ["420", "422", "444", "Gray"])
def test_jpeg_chroma(chroma: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    decode = perturb.decode_image
    monkeypatch.setattr(
        perturb, "decode_image", lambda data, kind: files.append(data) or decode(data, kind)
    )
    perturb.jpeg(IMAGE, RNG, quality=71, chroma=chroma)
    facts = prepare(files[0]).facts
    assert (facts.chroma, facts.jpeg_quality) == (chroma, 71)


@pytest.mark.parametrize(("name", "magic"), [("webp-80", b"WEBP"), ("avif-50", b"avif")])
def test_webp_and_avif_are_really_encoded(
    name: str, magic: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    save = Image.Image.save

    def spy(image: Image.Image, stream: io.BytesIO, *args: object, **options: object) -> None:
        save(image, stream, *args, **options)
        written.append(stream.getvalue())

    monkeypatch.setattr(Image.Image, "save", spy)
    arrived = BY_NAME[name].apply(IMAGE)
    assert magic in written[0][:16]
    assert len(written) == 1
    # The image has changed, but not more than a lossy file of this quality changes it.
    assert 0.5 < changed(arrived, IMAGE) < 12
    with Image.open(io.BytesIO(written[0])) as file:
        assert np.array_equal(np.asarray(file.convert("RGB")), arrived)


def test_worse_quality_loses_more() -> None:
    for family in ("JPEG", "WebP", "AVIF"):
        ways = sorted((w for w in PERTURBATIONS if w.family == family), key=lambda way: -way.amount)
        lost = [changed(way.apply(IMAGE), IMAGE) for way in ways]
        assert lost == sorted(lost) and lost[0] < lost[-1], family


def test_two_jpegs_are_applied_in_order_and_the_cut_moves_the_blocks() -> None:
    once = BY_NAME["jpeg-90"].apply(IMAGE)
    assert np.array_equal(BY_NAME["jpeg-90-60"].apply(IMAGE), BY_NAME["jpeg-60"].apply(once))
    moved = BY_NAME["jpeg-90-cut-60"].apply(IMAGE)
    assert np.array_equal(moved, BY_NAME["jpeg-60"].apply(np.ascontiguousarray(once[3:, 3:])))
    assert blocking(BY_NAME["jpeg-30"].apply(photo(2, 320, 320))) > 1.05


def test_noise_depends_on_the_file_and_has_its_sigma() -> None:
    gray = np.full((200, 300, 3), 128, np.uint8)
    for name, sigma in (("noise-4", 4.0), ("noise-10", 10.0)):
        grain = BY_NAME[name].apply(gray, SHA).astype(float) - 128
        assert grain.std() == pytest.approx(sigma, rel=0.02)
        assert abs(grain.mean()) < 0.1
        assert abs(np.corrcoef(grain[..., 0].ravel(), grain[..., 1].ravel())[0, 1]) < 0.02
    one, two = (BY_NAME["noise-4"].apply(gray, sha) for sha in (SHA, SHA[::-1]))
    assert not np.array_equal(one, two)
    grains = [BY_NAME[n].apply(gray, SHA).astype(float).ravel() for n in ("noise-4", "noise-10")]
    assert abs(np.corrcoef(*grains)[0, 1]) < 0.02


def test_blur_is_gaussian() -> None:
    point = np.zeros((41, 41, 3), np.uint8)
    point[20, 20] = 255
    for name, sigma in (("blur-1", 1.0), ("blur-2", 2.0)):
        soft = BY_NAME[name].apply(np.ascontiguousarray(point)).astype(float)[..., 0]
        offset = np.arange(41) - 20
        weight = soft.sum(axis=0)
        assert (weight * offset**2).sum() / weight.sum() == pytest.approx(sigma**2, rel=0.3)
    expected = Image.fromarray(IMAGE).filter(ImageFilter.GaussianBlur(1.0))
    assert np.array_equal(BY_NAME["blur-1"].apply(IMAGE), np.asarray(expected))


def test_a_screenshot_shows_the_whole_image_between_bars() -> None:
    white = np.full((100, 200, 3), 255, np.uint8)
    screen = BY_NAME["screenshot"].apply(white)
    assert screen.shape == (1920, 1080, 3)
    lit = np.flatnonzero(screen.min(axis=(1, 2)) == 255)
    assert len(lit) == 540 and lit[0] == 690
    assert screen[:690].max() == screen[1230:].max() == 0


def test_impossible_perturbations_are_errors_with_a_reason() -> None:
    with pytest.raises(ValueError, match=r"40000 x 16000 pixels, more than 200,000,000"):
        perturb.scale(np.zeros((800, 2000, 3), np.uint8), RNG, factor=20)
    with pytest.raises(ValueError, match="encod"):
        BY_NAME["webp-80"].apply(np.zeros((2, 17000, 3), np.uint8))
    for name in ("jpeg-80", "avif-75"):
        with pytest.raises(ValueError, match=r"70000 x 2 pixels, no (JPEG|AVIF): "):
            BY_NAME[name].apply(np.zeros((2, 70_000, 3), np.uint8))


def test_a_perturbation_without_steps_returns_the_image() -> None:
    assert np.array_equal(Perturbation("nothing", "", 0, ()).apply(IMAGE[:, ::-1]), IMAGE[:, ::-1])
