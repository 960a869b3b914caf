"""What an image of Pillow shows of its file: refusals hold for objects as for files."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFile, TiffImagePlugin

from imaging.decode import READABLE, DecodeError, decode
from imaging.opened import bytes_or_pixels
from tests.builders import encode, photo
from tests.imaging.test_av1 import CROPPED
from tests.imaging.test_decode import lossless_jpeg

IMAGE = Image.fromarray(photo(1, 64, 48))
CODESTREAM = encode(IMAGE.convert("YCbCr"), "JPEG2000", no_jp2=True)


def raw() -> bytes:
    """Return the start of a DNG: a TIFF with the version of DNG."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[50706] = b"\1\4\0\0"
    return encode(IMAGE, "TIFF", tiffinfo=tags)


@pytest.mark.parametrize("name", sorted({*READABLE, "MPO"} - {"HEIF"}))
def test_an_image_that_is_not_loaded_is_read_as_its_file(name: str) -> None:
    data = encode(IMAGE, name)
    image = Image.open(io.BytesIO(data))
    assert bytes_or_pixels(image) == data
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(image.convert("RGB"), expected)  # it can still be loaded
    pixels = bytes_or_pixels(image)
    assert isinstance(pixels, np.ndarray)
    np.testing.assert_array_equal(pixels, expected)


def test_a_heif_has_the_pixels_of_the_picture_that_is_chosen() -> None:
    data = encode(IMAGE, "HEIF")
    np.testing.assert_array_equal(bytes_or_pixels(Image.open(io.BytesIO(data))), decode(data))


def test_a_part_of_a_file_has_its_own_pixels() -> None:
    """Those of a frame that a caller has chosen, a smaller scale, or a change in memory."""
    frames = encode(IMAGE, "GIF", save_all=True, append_images=[Image.new("RGB", (64, 48), "red")])
    second = Image.open(io.BytesIO(frames))
    second.seek(1)
    small = Image.open(io.BytesIO(encode(IMAGE)))
    small.draft("RGB", (32, 24))
    changed = Image.open(io.BytesIO(encode(IMAGE, "PNG")))
    changed.paste("red", (0, 0, 64, 48))
    for image, size in ((second, (64, 48)), (small, (32, 24)), (changed, (64, 48))):
        expected = np.asarray(image.convert("RGB"))
        pixels = bytes_or_pixels(image)
        assert pixels.shape[1::-1] == size
        np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(
    ("data", "said"),
    [(lossless_jpeg(), "lossless JPEG"), (raw(), "RAW"), (CROPPED, "cropped"), (CODESTREAM, "RGB")],
)
def test_refusals_of_files_hold_for_opened_images(data: bytes, said: str) -> None:
    content = bytes_or_pixels(Image.open(io.BytesIO(data)))
    with pytest.raises(DecodeError, match=said):
        decode(content)


@pytest.mark.parametrize(("data", "said"), [(lossless_jpeg(), "lossless JPEG"), (raw(), "RAW")])
def test_a_loaded_image_is_refused_if_it_shows_why(data: bytes, said: str) -> None:
    image = Image.open(io.BytesIO(data))
    image.load()
    with pytest.raises(DecodeError, match=f"{said}.*; export"):
        bytes_or_pixels(image)


def test_a_format_that_only_pillow_reads_has_pixels() -> None:
    image = Image.open(io.BytesIO(encode(IMAGE, "PCX")))
    assert isinstance(image, ImageFile.ImageFile)
    np.testing.assert_array_equal(bytes_or_pixels(image), IMAGE)


def test_an_image_whose_file_is_closed_has_a_reason() -> None:
    with Image.open(io.BytesIO(encode(IMAGE))) as image:
        pass
    with pytest.raises(DecodeError, match="closed"):
        bytes_or_pixels(image)
