"""The orientation is read from every kind of metadata and applied."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from imaging.decode import as_is, decode, decode_image, prepare
from imaging.orientation import TILE_PX, carries_exif, orientation_of, upright, upright_copy
from tests.builders import ORIENTED_PLACES, encode, oriented, photo

IMAGE = Image.fromarray(photo(2, 40, 30))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("image_format", "place"), ORIENTED_PLACES)
def test_the_orientation_is_read_and_applied(
    image_format: str, place: str, orientation: int
) -> None:
    data = oriented(IMAGE, image_format, place, orientation)
    assert orientation_of(data, image_format) == orientation
    prepared = prepare(data)
    assert (prepared.facts.orientation, prepared.facts.transcoded_from) == (orientation, "")
    assert as_is(data).orientation == orientation
    turned = Image.Exif()
    turned[0x0112] = orientation
    lossless = encode(prepared_as_stored(data, image_format), "PNG", exif=turned)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(lossless)))
    np.testing.assert_array_equal(prepared.pixels, np.asarray(expected))
    np.testing.assert_array_equal(decode(data), prepared.pixels)


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1)])
@pytest.mark.parametrize(("image_format", "place"), ORIENTED_PLACES)
def test_an_image_one_pixel_wide_or_high_has_strides_that_torch_takes(
    image_format: str, place: str, size: tuple[int, int]
) -> None:
    """An array whose axis of one pixel has a negative stride counts as contiguous for NumPy."""
    for orientation in range(1, 9):
        data = oriented(Image.fromarray(photo(2, *size)), image_format, place, orientation)
        prepared = prepare(data)
        packed = decode_image(prepared.data, image_format, orientation)
        for pixels in (prepared.pixels, decode(data), packed):
            assert min(pixels.strides) > 0
            np.testing.assert_array_equal(pixels, packed)
        assert packed.shape[:2] == (size[::-1] if orientation < 5 else size)


def prepared_as_stored(data: bytes, image_format: str) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=[image_format]) as image:
        return image.convert("RGB")


@pytest.mark.parametrize("shape", [(1, 1), (TILE_PX, 1), (TILE_PX + 1, 2 * TILE_PX - 1)])
def test_a_copy_has_the_pixels_of_the_view_in_c_order(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for orientation in range(1, 9):
        copy = upright_copy(pixels, orientation)
        assert copy.flags.c_contiguous
        np.testing.assert_array_equal(copy, upright(pixels, orientation))


@pytest.mark.parametrize("stated", [0, 9, 255])
@pytest.mark.parametrize(("image_format", "place"), ORIENTED_PLACES)
def test_an_invalid_orientation_counts_as_upright(
    image_format: str, place: str, stated: int
) -> None:
    assert orientation_of(oriented(IMAGE, image_format, place, stated), image_format) == 1


def test_exif_has_priority_over_xmp() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encode(IMAGE, "JPEG", exif=exif, xmp=b'<rdf:Description tiff:Orientation="6"/>')
    assert orientation_of(data, "JPEG") == 3


def test_carries_exif_ignores_xmp() -> None:
    assert carries_exif(oriented(IMAGE, "JPEG", "exif", 1), "JPEG")
    assert not carries_exif(oriented(IMAGE, "JPEG", "xmp element", 6), "JPEG")
    assert not carries_exif(encode(IMAGE, "PNG"), "PNG")


@pytest.mark.parametrize("image_format", ["TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", [3, 6, 7])
def test_formats_that_are_transcoded_end_upright(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    flat = Image.new("RGB", (64, 32))
    flat.paste((250, 250, 250), (0, 0, 16, 8))  # marks the top left corner
    options = {} if image_format == "TIFF" else {"quality": 100}
    facts = prepare(encode(flat, image_format, exif=exif, **options))
    expected = upright(np.asarray(flat), orientation)
    assert facts.facts.orientation == 1
    assert facts.pixels.shape == expected.shape
    assert np.abs(facts.pixels.astype(int) - expected).mean() < 3


@pytest.mark.parametrize(("orientation", "shape"), [(0, (30, 40)), (1, (30, 40)), (6, (40, 30))])
def test_xmp_does_not_turn_an_avif(orientation: int, shape: tuple[int, int]) -> None:
    """Converters turn the pixels, or write the box that turns them, and copy the XMP as it was."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "camera", orientation
    options = {"exif": exif.tobytes()} if orientation else {}
    plain, tagged = (
        decode(encode(IMAGE, "AVIF", **options, **more))
        for more in ({}, {"xmp": b'<rdf:Description tiff:Orientation="8"/>'})
    )
    assert plain.shape[:2] == shape
    np.testing.assert_array_equal(tagged, plain)


def text_chunk(keyword: bytes, content: bytes) -> bytes:
    """Return a compressed iTXt chunk of a PNG."""
    body = b"iTXt" + keyword + b"\0\1\0\0\0" + zlib.compress(content, 9)
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def test_compressed_texts_cannot_fill_the_memory() -> None:
    """Sixty chunks of 16 KB that hold 16 MiB each."""
    plain = encode(IMAGE, "PNG")
    bomb = text_chunk(b"XML:com.adobe.xmp", bytes(2**24))
    data = plain[:33] + 60 * bomb + plain[33:]
    assert len(data) < 2**21
    tracemalloc.start()
    assert orientation_of(data, "PNG") == 1
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


def test_a_large_comment_does_not_hide_the_orientation() -> None:
    plain, turned = encode(IMAGE, "PNG"), b'<x tiff:Orientation="6"/>'
    chunks = text_chunk(b"workflow", bytes(2**24)) + text_chunk(b"XML:com.adobe.xmp", turned)
    assert orientation_of(plain[:33] + chunks + plain[33:], "PNG") == 6
