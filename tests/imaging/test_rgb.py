"""Every mode becomes 8-bit RGB, scaled by what the file declares, or is refused with a reason."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from imaging import rgb
from imaging.decode import DecodeError, as_is, decode, prepare
from imaging.rgb import to_rgb
from tests.builders import encode, photo, png_of_rows

RAMP = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
GRAY = np.rint(255 * RAMP).astype(int)


def tiff(values: np.ndarray, **tags: object) -> bytes:
    """Encode `values` as a TIFF with tags, `tag262=0` for tag number 262."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for number, value in tags.items():
        info[int(number.removeprefix("tag"))] = value
    return encode(Image.fromarray(values), "TIFF", tiffinfo=info)


@pytest.mark.parametrize("bad", [[], [np.nan], [np.inf], [-np.inf], [np.nan, np.inf, -np.inf]])
def test_a_float_tiff_is_scaled_by_its_finite_values(bad: list[float]) -> None:
    values = RAMP.copy()
    values.flat[1000 : 1000 + len(bad)] = bad
    pixels = decode(tiff(values))
    expected = GRAY.copy()
    shown = {"nan": 0, "inf": 255, "-inf": 0}
    expected.flat[1000 : 1000 + len(bad)] = [shown[str(value)] for value in bad]
    np.testing.assert_array_equal(pixels, np.repeat(expected[:, :, None], 3, axis=2))


def test_a_float_tiff_without_a_finite_value_is_refused() -> None:
    with pytest.raises(DecodeError, match="no pixel has a finite value"):
        decode(tiff(np.full((8, 8), np.nan, np.float32)))


def test_a_camera_raw_is_refused_and_not_read_as_its_preview() -> None:
    """A RAW is a TIFF whose first picture is small, and whose other directories Pillow ignores."""
    values = photo(1, 16, 12)
    dng, nef = tiff(values, tag50706=b"\1\4\0\0"), tiff(values, tag254=1, tag330=8)
    plain = tiff(values)  # a directory of 126 bytes at byte 8, where a CR2 has its signature
    start = len(plain).to_bytes(4, "little")
    cr2 = plain[:4] + start + b"CR\2\0" + plain[12:] + plain[8:134]
    for data in (dng, nef, cr2):
        for read in (decode, prepare, as_is):
            with pytest.raises(DecodeError, match=r"RAW .* a preview of 16 x 12 .* export it"):
                read(data)
    for data in (plain, tiff(values, tag254=1), tiff(values, tag254=0, tag330=8)):
        np.testing.assert_array_equal(decode(data), values)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_keep_their_range(kind: str) -> None:
    data = encode(Image.fromarray(np.rint(RAMP * 65535).astype(np.uint16)), kind)
    assert np.abs(decode(data)[:, :, 0].astype(int) - GRAY).max() <= 1


def test_12_bits_in_16_are_scaled_where_the_file_says_so() -> None:
    values = np.rint(RAMP * 4095).astype(np.uint16)
    declared = tiff(values, tag281=4095)
    assert np.abs(decode(declared)[:, :, 0].astype(int) - GRAY).max() <= 1
    for data in (tiff(values), encode(Image.fromarray(values), "PNG")):
        with pytest.raises(DecodeError, match=r"at most 4,095, nearly black .* convert it to 8"):
            decode(data)


def color_tiff(
    values: np.ndarray, white: int = 0, order: str = "<", *, planar: bool, deflate: bool,
    alpha: int, colors: int = 2,
) -> bytes:  # fmt: skip
    """Encode uint16 (height, width, channels) as a TIFF, which Pillow cannot write. `alpha` is the
    tag of a fourth channel, `white` the tag MaxSampleValue, 0 for none; `colors` is 1 for gray, 2
    for RGB, 5 for CMYK.
    """
    height, width, channels = values.shape
    planes = list(values.transpose(2, 0, 1)) if planar else [values]
    strips = [plane.astype(f"{order}u2").tobytes() for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    starts = np.cumsum([8, *map(len, strips)]).tolist()
    tags = {
        256: [width], 257: [height], 258: [16] * channels, 259: [8 if deflate else 1],
        262: [colors], 273: starts[:-1], 277: [channels], 278: [height],
        279: [len(strip) for strip in strips],
        281: [white] * channels, 284: [2 if planar else 1], 338: [alpha],
    }  # fmt: skip
    tags = {tag: tags[tag] for tag in tags if tags[tag][0]}
    entries, far = b"", b""
    for tag, numbers in tags.items():
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            at = starts[-1] + 2 + 12 * len(tags) + 4 + len(far)
            packed, far = struct.pack(f"{order}I", at), far + packed
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + packed
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, starts[-1])
    count, end = struct.pack(f"{order}H", len(tags)), bytes(4)
    return head + b"".join(strips) + count + entries + end + far


COLOR = np.random.default_rng(0).integers(0, 4096, (24, 32, 4)).astype(np.uint16)
LAYOUTS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize("order", ["<", ">"])
def test_planes_of_16_bits_that_are_not_rgb(order: str) -> None:
    layout = {"planar": True, "deflate": False, "alpha": 0}
    gray = decode(color_tiff(COLOR[:, :, :1] * 16, 0, order, **layout, colors=1))
    assert np.abs(gray[:, :, 0].astype(int) - (COLOR[:, :, 0] >> 4)).max() <= 1
    with pytest.raises(DecodeError, match="CMYK of 16 bits in one plane per channel is not read"):
        decode(color_tiff(COLOR * 16, 0, order, **layout, colors=5))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("planar", "deflate"), LAYOUTS)
@pytest.mark.parametrize(("channels", "alpha"), [(3, 0), (4, 2)])
def test_16_bits_of_color_are_scaled_where_the_file_says_so(
    order: str, planar: bool, deflate: bool, channels: int, alpha: int
) -> None:
    """Pillow reads the upper 8 bits: nothing of 12 bits, a quarter of the brightness of 14."""
    layout = {"planar": planar, "deflate": deflate, "alpha": alpha}
    values = COLOR[:, :, :channels]
    full = decode(color_tiff(values * 16, 0, order, **layout))
    np.testing.assert_array_equal(full, values[:, :, :3] >> 4)
    with pytest.raises(DecodeError, match="at most 4,095, nearly black if 65,535 is white"):
        decode(color_tiff(values, 0, order, **layout))
    for shift, white in ((0, 4095), (2, 16383)):
        data = color_tiff(values << shift, white, order, **layout)
        if planar and deflate:
            with pytest.raises(DecodeError, match=f"{white:,} is white, and .* the upper 8 can be"):
                decode(data)
        else:
            expected = np.rint((values[:, :, :3] << shift) * (255 / white))
            np.testing.assert_array_equal(decode(data), expected)


def test_color_that_is_multiplied_by_alpha_is_refused_if_it_had_to_be_scaled() -> None:
    layout = {"planar": False, "deflate": False, "alpha": 1}
    assert decode(color_tiff(COLOR, **layout)).shape == (24, 32, 3)
    with pytest.raises(DecodeError, match="4,095 is white, and of 16 bits only the upper 8 can be"):
        decode(color_tiff(COLOR, 4095, **layout))


@pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_a_png_of_12_bits_in_16_is_refused(color_type: int, channels: int) -> None:
    values = COLOR[:, :, :channels]

    def png(values: np.ndarray) -> bytes:
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        return png_of_rows(32, 24, 16, color_type, rows)

    for read in (decode, prepare):
        with pytest.raises(DecodeError, match="PNG does not decode: values of at most 4,0"):
            read(png(values))
    colors = values[:, :, :3] if channels > 2 else values[:, :, :1]
    assert np.abs(decode(png(values * 16)).astype(int) - (colors >> 4)).max() <= 1


def test_values_are_inverted_where_zero_is_white() -> None:
    values = np.rint((1 - RAMP) * 65535).astype(np.uint16)
    assert np.abs(decode(tiff(values, tag262=0))[:, :, 0].astype(int) - GRAY).max() <= 1


@pytest.mark.parametrize(
    "values", [np.rint(RAMP * 255).astype(np.int32), np.rint(RAMP * 1e6 - 7).astype(np.int32)]
)
def test_32_bit_integers_are_refused_unless_the_file_says_what_is_white(
    values: np.ndarray,
) -> None:
    with pytest.raises(DecodeError, match=r"integers from .* nothing says which value is white"):
        decode(tiff(values))
    low, high = int(values.min()), int(values.max())
    declared = tiff(values, tag340=low, tag341=high)
    assert np.abs(decode(declared)[:, :, 0].astype(int) - GRAY).max() <= 1


def test_converting_in_bands_changes_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decode(tiff(RAMP))
    monkeypatch.setattr(rgb, "BAND_PIXELS", 64 * 5)
    np.testing.assert_array_equal(decode(tiff(RAMP)), whole)


# --- depths of a JPEG 2000 -----------------------------------------------------------------------

# `opj_compress -n 1` of a PPM of 12 x 8 pixels with 16 bits: columns of 65,535, 40,000 and 0.
RGB_OF_16_BITS = base64.b64decode(
    "/0//UQAvAAAAAAAMAAAACAAAAAAAAAAAAAAADAAAAAgAAAAAAAAAAAADDwEBDwEBDwEB/1IADAAAAAEBAAQEAAH/XA"
    "AEQID/ZAAlAAFDcmVhdGVkIGJ5IE9wZW5KUEVHIHZlcnNpb24gMi41LjD/kAAKAAAAAACnAAH/k9/4lJg7DQz7PjiE"
    "xGLwAMHCPBP9QgGBBT2lHmw/NiDXSrmxBYHvmxB/SnhgWoAFQDAtH2JP6U8MC1AAqAYFqABUAwLUACoBgWoAFQDAtQ"
    "AKgI+5TQwLUACoBgWj7En9KeGBagAVAMC1AAqAYFqABUAwLUACoBgWoAFQDAtQAKgGBagAVAMC1AAqAYFqABUAwLUA"
    "CoBgWoGAgP/Z"
)


def jpeg2000(image: Image.Image, *depths: int, jp2: bool) -> bytes:
    """Encode an image, lossless, and state other bits of its channels. A value of 128 is the middle
    one of any depth, and the other values differ from the middle one as before.
    """
    data = bytearray(encode(image, "JPEG2000", no_jp2=not jp2))
    start = data.index(b"\xff\x4f\xff\x51") + 42
    data[start : start + 3 * len(depths) : 3] = bytes(bits - 1 for bits in depths)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (RGB_OF_16_BITS, "16-bit RGB"),
        *(
            (jpeg2000(Image.new(mode, (9, 8)), *depths, jp2=jp2), said)
            for jp2 in (False, True)
            for mode, depths, said in (
                ("LA", [9, 8], "9-bit LA"), ("RGB", [16, 16, 16], "16-bit RGB"),
                ("RGB", [8, 8, 12], "8/12-bit RGB"), ("RGB", [4, 4, 4], "4-bit RGB"),
                ("RGBA", [10, 10, 10, 10], "10-bit RGBA"), ("RGBA", [1, 1, 1, 8], "1-bit RGBA"),
            )
        ),
        (jpeg2000(Image.new("L", (9, 8)), 9, jp2=True), "9-bit L"),
    ],
)  # fmt: skip
def test_a_jpeg_2000_of_a_depth_that_pillow_reads_wrong_is_refused(data: bytes, said: str) -> None:
    """Pillow made white of more bits black, and white of 4 bits a level of 240."""
    for read in (decode, prepare, lambda data: to_rgb(Image.open(io.BytesIO(data)))):
        with pytest.raises(ValueError, match=f"^JPEG2000 .*: {said} is not read; export it as PNG"):
            read(data)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "YCbCr"])
def test_a_codestream_without_a_color_space_is_refused(mode: str) -> None:
    """Nothing says whether it is RGB; the YCbCr of ffmpeg was scored as RGB."""
    image = Image.fromarray(photo(1, 64, 48)).convert(mode)
    data = encode(image, "JPEG2000", no_jp2=True)
    with pytest.raises(DecodeError, match=r"does not say whether it is RGB or YCbCr; convert"):
        decode(data)
    boxed = decode(encode(image, "JPEG2000"))
    transformed = decode(encode(image.convert("RGB"), "JPEG2000", no_jp2=True, mct=1))
    np.testing.assert_array_equal(transformed, image.convert("RGB"))
    np.testing.assert_array_equal(boxed, image.convert("RGB"))
    assert decode(encode(image.convert("L"), "JPEG2000", no_jp2=True)).shape == (48, 64, 3)


def test_a_codestream_of_fewer_colors_than_pixels_is_ycbcr() -> None:
    """Channels of half the size are read: only YCbCr has them."""
    data = bytearray(encode(Image.new("YCbCr", (8, 8), (128, 90, 90)), "JPEG2000", no_jp2=True))
    start = data.index(b"\xff\x51") + 40
    data[start + 4 : start + 6] = data[start + 7 : start + 9] = b"\2\2"
    with Image.open(io.BytesIO(data)) as image:
        assert rgb._states_colors(image)


@pytest.mark.parametrize("sharing", [(2, 2), (2, 1), (4, 1)])
def test_an_uncompressed_tiff_of_ycbcr_with_chroma_subsampling_is_named(
    sharing: tuple[int, int],
) -> None:
    """It was called truncated, as Pillow expects a color of its own for each pixel."""
    across, down = sharing
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    size = 16 * 16 + 2 * (16 // across) * (16 // down)
    tags.update({256: 16, 257: 16, 258: (8, 8, 8), 259: 1, 262: 6, 277: 3, 278: 16, 279: size})
    tags.update({273: 0, 530: sharing})
    stream = io.BytesIO()
    stream.write(b"II*\0\x08\0\0\0")
    tags[273] = 8 + len(tags.tobytes(8))
    stream.write(tags.tobytes(8) + bytes([128]) * size)
    with pytest.raises(DecodeError, match=r"^TIFF .*: YCbCr with chroma subsampling and without"):
        decode(stream.getvalue())
    whole = Image.new("YCbCr", (16, 16), (128, 90, 90))
    np.testing.assert_array_equal(decode(encode(whole, "TIFF")), whole.convert("RGB"))


def test_the_depth_of_alpha_in_a_jpeg_2000_does_not_matter() -> None:
    data = jpeg2000(Image.new("RGBA", (9, 8), "white"), 8, 8, 8, 1, jp2=True)
    assert (decode(data) == 255).all()


def test_a_jpeg_2000_with_a_palette_of_few_bits_is_refused() -> None:
    plain = encode(Image.new("L", (9, 8)), "JPEG2000")
    start = plain.index(b"jp2h") - 4
    end = start + int.from_bytes(plain[start : start + 4], "big")

    def with_palette(bits: int) -> bytes:
        colors = struct.pack(">I4sHB3B6B", 20, b"pclr", 2, 3, *[bits - 1] * 3, *range(10, 16))
        mapped = struct.pack(">I4s12B", 20, b"cmap", 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 2)
        header = plain[start + 4 : end - 4] + struct.pack(">I", 16)  # sRGB in place of gray
        size = struct.pack(">I", end - start + 40)
        return plain[:start] + size + header + colors + mapped + plain[end:]

    assert (decode(with_palette(8)) == (10, 11, 12)).all()
    with pytest.raises(DecodeError, match=r"^JPEG2000 .*: 4/8-bit P is not read"):
        decode(with_palette(4))


@pytest.mark.parametrize("jp2", [False, True])
@pytest.mark.parametrize("mode", ["L", "LA"])
@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_gray_of_few_bits_in_a_jpeg_2000_is_scaled(bits: int, mode: str, jp2: bool) -> None:
    levels = np.arange(2**bits)
    image = Image.fromarray((levels + 128 - 2**bits // 2).astype(np.uint8)[None]).convert(mode)
    pixels = decode(jpeg2000(image.resize((2**bits, 4), 0), bits, jp2=jp2))
    np.testing.assert_array_equal(pixels[2, :, 1], np.rint(levels * 255 / (2**bits - 1)))


# --- profiles -------------------------------------------------------------------------------------

IMAGE = Image.fromarray(photo(4, 64, 48))
LINEAR = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_profile_of_rgb_changes_no_pixel_and_no_byte(kind: str) -> None:
    options = {"quality": 90} if kind in ("JPEG", "WEBP") else {}
    plain, tagged = (
        encode(IMAGE, kind, **options, **more) for more in ({}, {"icc_profile": LINEAR})
    )
    np.testing.assert_array_equal(decode(tagged), decode(plain))
    assert (prepare(tagged).data == tagged) == (kind != "TIFF")


@pytest.mark.parametrize("profile", [b"no profile", LINEAR])
def test_a_profile_that_is_not_for_cmyk_is_ignored(profile: bytes) -> None:
    data = encode(IMAGE.convert("CMYK"), icc_profile=profile)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)


def test_cmyk_is_converted_by_its_own_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """No CMYK profile may be distributed here. The test checks that the profile is used, and for
    RGB.
    """
    asked = []

    def convert(image: Image.Image, ours: object, target: object, outputMode: str) -> Image.Image:
        asked.append((image.mode, outputMode))
        return Image.new("RGB", image.size, (1, 2, 3))

    monkeypatch.setattr(ImageCms, "profileToProfile", convert)
    data = encode(IMAGE.convert("CMYK"), icc_profile=LINEAR)
    assert (prepare(data).pixels == (1, 2, 3)).all()
    assert asked == [("CMYK", "RGB")]
