"""Decoding raises only `DecodeError` (and `MemoryError`), whatever the bytes."""

import io
import re
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFile

from benchmarks.mutations import mutated, mutations, seeds
from imaging import decode as boundary
from imaging.decode import READABLE, DecodeError, as_is, decode, prepare
from imaging.header import claimed_size
from tests.builders import encode, photo

SEEDS = seeds()


def fuzz(kind: str, rounds: int) -> set[str]:
    """Decode `rounds` mutations of a seed file and return the outcomes. Any other exception is
    raised.
    """
    rng = np.random.default_rng(list(SEEDS).index(kind))
    seen = set()
    for _ in range(rounds):
        data = mutated(SEEDS[kind], rng)
        claimed_size(data)
        outcomes = []
        for act in (prepare, decode, as_is):
            try:
                act(data)
                outcomes.append("good")
            except DecodeError as error:
                outcomes.append(str(error))
        reasons = [outcome for outcome in outcomes if outcome != "good"]
        for reason in reasons:
            assert reason.strip() and "\n" not in reason and len(reason) < 300, reason
            assert not re.search(r"object at 0x|\bb['\"]|Error\(|Traceback", reason), reason
        assert outcomes[0] == outcomes[1], "packing and prediction disagree"
        seen |= {"refused" if reasons else "good"}
    return seen


@pytest.mark.parametrize("kind", SEEDS)
def test_a_damaged_file_is_decoded_or_refused_with_one_reason(kind: str) -> None:
    assert fuzz(kind, 40) >= {"refused"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEEDS)
def test_a_thousand_damaged_files_are_decoded_or_refused_with_one_reason(kind: str) -> None:
    assert fuzz(kind, 1000) == {"good", "refused"}


def test_mutations_start_from_every_format() -> None:
    formats = {Image.open(io.BytesIO(data)).format for data in SEEDS.values()}
    assert formats >= set(READABLE)


def test_mutations_are_the_same_every_time() -> None:
    assert list(mutations(70)) == list(mutations(70))


@pytest.mark.parametrize("where", ["_open", "load", "size"])
@pytest.mark.parametrize(
    "error",
    [IndexError("list index out of range"), TypeError("x"), KeyError(256), RecursionError(),
     ZeroDivisionError("division by zero"), OSError("a\nb <_io.BytesIO object at 0xf0>")],
)  # fmt: skip
def test_whatever_a_plugin_raises_becomes_one_reason(
    where: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plugin may raise when it opens, when it decodes, or when a property is read."""

    class Hostile(ImageFile.ImageFile):
        def _open(self) -> None:
            self._mode, self._size = "RGB", (8, 8)
            if where == "_open":
                raise error

        def load(self) -> None:
            raise error

        @property
        def size(self) -> tuple[int, int]:
            if where == "size":
                raise error
            return (8, 8)

    monkeypatch.setattr(boundary, "READABLE", ("HOSTILE",))
    data = b"HOSTILE" + b"!" * 9
    plugin = (lambda stream, _name: Hostile(stream)), (lambda head: head == data)
    monkeypatch.setitem(Image.OPEN, "HOSTILE", plugin)
    for act in (prepare, decode):
        with pytest.raises(DecodeError) as caught:
            act(data)
        assert "0x" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_memory_error_is_not_turned_into_a_decode_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_memory(_image: Image.Image) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(boundary, "to_rgb", without_memory)
    with pytest.raises(MemoryError):
        decode(SEEDS["bmp"])


def test_decoders_print_nothing(capfd: pytest.CaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for _, data in mutations(300, seed=5):
            try:
                decode(data)
            except DecodeError:
                continue
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("name", READABLE)
def test_no_format_is_decoded_when_it_is_opened(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its size could not be refused, nor memory for it reserved, before it is decoded."""
    if name not in Image.SAVE:
        pytest.skip(f"Pillow writes no {name}")
    data = encode(photo(1, 64, 64), name)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    with Image.open(io.BytesIO(data), formats=READABLE) as image:
        assert image.size == (64, 64)


def test_a_large_image_whose_decoder_is_slow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imaging.decode.MAX_SLOW_PIXELS", 63 * 64)
    rle = struct.pack("<2sI2HI", b"BM", 62, 0, 0, 62) + struct.pack(
        "<I2i2H6I", 40, 64, 64, 1, 8, 1, 0, 0, 0, 2, 0
    ) + bytes(8) + b"\0\1"  # fmt: skip
    for data in (rle, encode(photo(1, 64, 64), "QOI")):
        with pytest.raises(DecodeError, match="megapixels, more than the 0 allowed for this form"):
            decode(data)
    assert decode(encode(photo(1, 64, 64), "BMP")).shape == (64, 64, 3)
