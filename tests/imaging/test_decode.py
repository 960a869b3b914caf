"""Any file is decoded to the right pixels and facts, or refused with one clear reason."""

import io
import shutil
import struct
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from imaging.decode import (
    IMAGE_SUFFIXES,
    READABLE,
    DecodeError,
    as_is,
    decode,
    decode_image,
    prepare,
    without_warnings,
)
from model.inference.inputs import find_images
from sharding.describe import CONTAINERS
from tests.builders import encode, photo

PIXELS = photo(1, 93, 71)
IMAGE = Image.fromarray(PIXELS)


@pytest.mark.parametrize("quality", [5, 30, 50, 75, 90, 96, 100])
def test_jpeg_quality_is_estimated_exactly_for_libjpeg(quality: int) -> None:
    assert prepare(encode(PIXELS, quality=quality)).facts.jpeg_quality == quality


@pytest.mark.parametrize(("subsampling", "chroma"), [(0, "444"), (1, "422"), (2, "420")])
def test_chroma_is_recorded(subsampling: int, chroma: str) -> None:
    assert prepare(encode(PIXELS, subsampling=subsampling)).facts.chroma == chroma


@pytest.mark.parametrize("image_format", ["HEIF", "AVIF", "TIFF"])
def test_a_converted_image_has_exif_only_if_its_file_has(image_format: str) -> None:
    exif = Image.Exif()
    exif[0x010F] = "camera"
    assert not prepare(encode(PIXELS, image_format)).facts.exif
    if image_format != "TIFF":  # its tags are no EXIF block
        assert prepare(encode(PIXELS, image_format, exif=exif)).facts.exif


@pytest.mark.parametrize(
    ("image", "image_format", "options"),
    [
        (IMAGE, "JPEG", {"quality": 90}),
        (IMAGE, "JPEG", {"quality": 90, "progressive": True}),
        (IMAGE.convert("L"), "JPEG", {}),
        (IMAGE, "PNG", {}),
        (IMAGE.convert("RGBA"), "PNG", {}),
        (IMAGE.convert("P"), "PNG", {}),
        (IMAGE.convert("1"), "PNG", {}),
        (IMAGE.convert("LA"), "PNG", {}),
        (IMAGE, "WEBP", {"quality": 80}),
        (IMAGE.convert("RGBA"), "WEBP", {"lossless": True}),
    ],
    ids=["jpeg", "progressive", "gray", "png", "rgba", "palette", "1bit", "la", "webp", "webpa"],
)
def test_plain_files_keep_their_bytes(image, image_format, options) -> None:
    data = encode(image, image_format, **options)
    prepared = prepare(data)
    assert prepared.data == data
    assert (prepared.facts.format, prepared.facts.transcoded_from) == (image_format, "")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(prepared.pixels, expected)


def deep_png(mode: str) -> bytes:
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    return encode(Image.fromarray(values), mode)


@pytest.mark.parametrize(
    ("data", "was"),
    [
        (encode(IMAGE, "GIF"), "GIF"),
        (encode(IMAGE, "BMP"), "BMP"),
        (encode(IMAGE, "TIFF"), "TIFF"),
        (encode(IMAGE, "AVIF", quality=80), "AVIF"),
        (encode(IMAGE, "HEIF", quality=80), "HEIF"),
        (encode(IMAGE.convert("CMYK"), "JPEG"), "JPEG"),
        (encode(IMAGE, "JPEG", keep_rgb=True), "JPEG"),
        (encode(IMAGE, "WEBP", save_all=True, append_images=[IMAGE.rotate(9)]), "WEBP"),
        (encode(IMAGE, "PNG", save_all=True, append_images=[IMAGE.rotate(9)]), "PNG"),
        (deep_png("PNG"), "PNG"),
    ],
    ids=["gif", "bmp", "tiff", "avif", "heic", "cmyk", "rgb-jpeg", "webp-anim", "apng", "png16"],
)
def test_any_other_file_becomes_an_8_bit_rgb_png(data: bytes, was: str) -> None:
    prepared = prepare(data)
    assert (prepared.facts.format, prepared.facts.transcoded_from) == ("PNG", was)
    stored = Image.open(io.BytesIO(prepared.data))
    assert (stored.format, stored.mode) == ("PNG", "RGB")
    np.testing.assert_array_equal(np.asarray(stored), prepared.pixels)


def test_16_bit_gray_keeps_its_range() -> None:
    """`convert("RGB")` alone would clip all values above 255 to white."""
    pixels = prepare(deep_png("PNG")).pixels
    assert pixels.min() == 0
    assert 250 <= pixels.max() <= 255
    assert len(np.unique(pixels)) > 200


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_ends_upright(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PIXELS, image_format, exif=exif)
    prepared = prepare(data)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(prepared.pixels, np.asarray(expected))
    assert (prepared.facts.width, prepared.facts.height) == expected.size


JPEG, PNG, WEBP = encode(PIXELS), encode(PIXELS, "PNG"), encode(PIXELS, "WEBP")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "not an image this program reads"),
        (JPEG[: len(JPEG) // 2], "JPEG does not decode"),
        (JPEG[:-2], "JPEG does not decode"),
        (JPEG[:30], "JPEG does not decode"),
        (PNG[: len(PNG) // 2], "PNG does not decode"),
        (WEBP[: len(WEBP) // 2], "WEBP does not decode: premature end of the file"),
        (b"\0\0\0\x18ftypmp42" + bytes(999), "not an image this program reads"),
    ],
    ids=["empty", "html", "half", "no-end", "header", "png-half", "webp-half", "video"],
)
def test_a_file_that_cannot_be_decoded_has_a_reason(data: bytes, said: str) -> None:
    with pytest.raises(DecodeError, match=said):
        prepare(data)


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
def test_an_archive_is_called_one(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(JPEG)
    data = Path(shutil.make_archive(str(tmp_path / "packed"), kind, folder)).read_bytes()
    name = {"zip": "ZIP", "tar": "tar", "gztar": "gzip"}[kind]
    with pytest.raises(DecodeError, match=f"but a {name} archive: unpack it and use the images"):
        prepare(data)


CUT = [(name, {}) for name in READABLE]
CUT += [("TIFF", {"compression": kind}) for kind in ("tiff_lzw", "tiff_adobe_deflate", "packbits")]


@pytest.mark.parametrize(("name", "options"), CUT)
def test_a_file_that_is_cut_off_is_called_by_its_format(name: str, options: dict) -> None:
    """Pillow does not open a file whose header it cannot read, as if it were no image."""
    data = encode(PIXELS, name, **options)
    for length in (len(data) - 40, len(data) // 2, 200, 48):
        with pytest.raises(DecodeError, match=f"^{name} does not decode: "):
            decode(data[:length])


def test_a_tiff_of_a_kind_that_is_not_read_is_called_a_tiff() -> None:
    data = encode(PIXELS, "TIFF")
    bits = data.replace(struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 7, 7, 7))
    with pytest.raises(DecodeError, match=r"TIFF .*: it is of a kind that is not read, or its"):
        decode(bits)
    packed = encode(PIXELS, "TIFF", compression="tiff_lzw")  # 5, of which WebP is 50,001
    webp = packed.replace(struct.pack("<2HI2H", 259, 3, 1, 5, 0),
                          struct.pack("<2HI2H", 259, 3, 1, 50_001, 0))  # fmt: skip
    with pytest.raises(DecodeError, match=r"TIFF .*: damaged pixels, or a compression that is not"):
        decode(webp)


def lossless_jpeg() -> bytes:
    """Return a JPEG of 8 x 8 pixels that are 228, 128, 128. No segment says in which color space:
    ffmpeg writes YCbCr so.
    """
    bits = "10" + f"{228 - 128:b}" + 3 * 64 * "0"  # codes of a difference of 7 bits, and of none
    head = struct.pack(">HB2H10B", 17, 8, 8, 8, 3, 1, 17, 0, 2, 17, 0, 3, 17, 0)
    codes = struct.pack(">H19B", 21, 0, 1, 1, *bytes(14), 0, 7)
    scan = struct.pack(">H10B", 12, 3, 1, 0, 2, 0, 3, 0, 1, 0, 0)
    coded = int(bits.ljust(208, "1"), 2).to_bytes(26, "big")
    return b"\xff\xd8\xff\xc3%b\xff\xc4%b\xff\xda%b%b\xff\xd9" % (head, codes, scan, coded)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (lossless_jpeg(), "lossless JPEG"),
        (JPEG.replace(b"\xff\xc0", b"\xff\xc5"), "hierarchical JPEG"),
        (JPEG.replace(b"\xff\xc0", b"\xff\xf7"), "JPEG-LS"),
        (JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "12-bit JPEG"),
        (b"\xff\x0a" + bytes(99), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "JPEG XL"),
        (encode(IMAGE, "ICO"), "ICO"),
        (b"8BPS" + bytes(99), "PSD"),
        (b"\0\0\0\x18ftypcrx " + bytes(99), "a camera RAW"),
    ],
)
def test_a_kind_of_image_that_is_not_read_is_named(data: bytes, kind: str) -> None:
    for read in (decode, prepare, as_is):
        with pytest.raises(DecodeError, match=f"^{kind} is not read; export it as PNG$"):
            read(data)


def test_files_of_all_formats_that_are_read_are_images_by_their_names() -> None:
    suffixes = Image.registered_extensions()
    of_formats = {suffix for suffix, name in suffixes.items() if name in {*READABLE, "MPO"}}
    other_files = {".icb", ".pfm", ".vda", ".vst"}  # fonts, audio plugins, old names of TGA
    assert of_formats - other_files == IMAGE_SUFFIXES
    assert not IMAGE_SUFFIXES & CONTAINERS


@pytest.mark.parametrize(("suffix", "name"), [(".hif", "HEIF"), (".mpo", "MPO"), (".apng", "PNG")])
def test_a_file_of_a_camera_or_an_animation_is_found_in_a_folder(
    suffix: str, name: str, tmp_path: Path
) -> None:
    options = {"save_all": True, "append_images": [IMAGE.rotate(9)]}
    data = encode(IMAGE, name, **({} if name == "HEIF" else options))
    (tmp_path / f"DSC02{suffix.upper()}").write_bytes(data)
    (file,) = find_images([str(tmp_path)], Counter())
    assert decode(file.read()).shape == PIXELS.shape


def test_a_decompression_bomb_is_refused_before_decoding() -> None:
    bomb = encode(Image.new("1", (15_000, 15_000)), "PNG", compress_level=1)
    assert len(bomb) < 2**20
    with pytest.raises(DecodeError, match="megapixels, more than the 200 allowed"):
        prepare(bomb)


def test_the_reference_decoder_equals_pillow_without_fast_variants() -> None:
    """Exact DCT and smooth chroma: the fast variants delete the traces that a detector reads."""
    for subsampling in (0, 1, 2):
        data = encode(PIXELS, quality=80, subsampling=subsampling)
        expected = np.asarray(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(decode_image(data, "JPEG"), expected)


def test_threads_leave_the_warning_filters_as_they_were() -> None:
    """One thread leaves its block while another is still inside."""
    before = list(warnings.filters)
    one, two = without_warnings(), without_warnings()
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    warnings.warn("from the second one", UserWarning, stacklevel=1)  # an error in these tests
    two.__exit__(None, None, None)
    assert list(warnings.filters) == before
    with pytest.raises(UserWarning):
        warnings.warn("again", UserWarning, stacklevel=1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_prediction_decodes_the_pixels_that_are_packed(kind: str, orientation: int) -> None:
    """`decode` and `as_is` return what `prepare` returns, without its other work."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(IMAGE, kind, **({} if kind == "GIF" else {"exif": exif}))
    packed = prepare(data)
    np.testing.assert_array_equal(decode(data), packed.pixels)
    height, width = packed.pixels.shape[:2]
    kept = data, packed.facts.format, packed.facts.orientation, width, height
    assert as_is(data) == (None if packed.facts.transcoded_from else kept)


@pytest.mark.parametrize("primary", [0, 1])
def test_a_heic_of_several_pictures_shows_the_primary_one(primary: int) -> None:
    pictures = [
        Image.new("RGB", (128, 128), (200, 30, 30)),
        Image.new("RGB", (160, 96), (30, 30, 200)),
    ]
    data = encode(
        pictures[0], "HEIF", save_all=True, append_images=pictures[1:], primary_index=primary
    )
    for pixels in (decode(data), prepare(data).pixels):
        assert pixels.shape[1::-1] == pictures[primary].size
        assert np.abs(pixels - np.array(pictures[primary].getpixel((0, 0)), int)).max() < 9
