"""Tests of partners: a fake has the same file format and metadata as its real image."""

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from imaging.decode import prepare
from sharding.pairs.match import NoPair, encode_like, refuse_partner
from tests.builders import encode, oriented, photo

PHOTO = Image.fromarray(photo(3, 91, 70))
EXIF = Image.Exif()
EXIF[0x010F] = "Maker"

FILES = {
    "4:4:4": encode(PHOTO, quality=90, subsampling="4:4:4"),
    "4:2:2": encode(PHOTO, quality=71, subsampling="4:2:2"),
    "4:2:0": encode(PHOTO, quality=60, subsampling="4:2:0"),
    "own tables": encode(PHOTO, qtables=[list(range(1, 65)), [9] * 64]),
    "progressive": encode(PHOTO, quality=80, progressive=True),
    "optimized": encode(PHOTO, quality=80, optimize=True),
    "gray JPEG": encode(PHOTO.convert("L"), quality=77),
    "profile and comment": encode(PHOTO, icc_profile=b"p" * 5000, comment=b"hello", exif=EXIF),
    "PNG": encode(PHOTO, "PNG"),
    "gray PNG": encode(PHOTO.convert("L"), "PNG"),
    "alpha PNG": encode(PHOTO.convert("RGBA"), "PNG", exif=EXIF),
    "WebP": encode(PHOTO, "WEBP", quality=63),
    "lossless WebP": encode(PHOTO, "WEBP", lossless=True),
    **{
        f"{kind} turned {turn}": oriented(PHOTO, kind, "exif", turn)
        for kind, turn in (("JPEG", 6), ("JPEG", 3), ("JPEG", 7), ("PNG", 8), ("WEBP", 5))
    },
    "JPEG turned by XMP": oriented(PHOTO, "JPEG", "xmp attribute", 6),
}  # fmt: skip


def through(pixels: np.ndarray) -> np.ndarray:
    """Return every pixel a little darker, as a stand-in for a decoder."""
    return (pixels.astype(np.float32) * 0.98).astype(np.uint8)


def partner_of(data: bytes) -> bytes:
    prepared = prepare(data)
    assert not prepared.facts.transcoded_from
    refuse_partner(data, prepared.facts)
    return encode_like(through(prepared.pixels), data, prepared.pixels, prepared.facts)


@pytest.mark.parametrize("name", FILES)
def test_a_partner_has_the_facts_and_the_pixels_of_its_image(name: str) -> None:
    prepared, made = prepare(FILES[name]), prepare(partner_of(FILES[name]))
    assert made.facts == prepared.facts
    expected = through(prepared.pixels).astype(int)
    # Both images are upright. The codec changes this noise by some levels (quality 60: 8).
    assert np.abs(made.pixels - expected).mean() < 12
    turned = np.abs(made.pixels - expected[::-1, ::-1]).mean()
    assert turned > 2 * np.abs(made.pixels - expected).mean()


@pytest.mark.parametrize("name", FILES)
def test_a_partner_has_about_as_many_bytes_as_its_image(name: str) -> None:
    """Otherwise the bits per pixel would separate the classes; darkening changes 1 pixel in 50."""
    assert abs(len(partner_of(FILES[name])) / len(FILES[name]) - 1) < 0.06


def test_the_quantization_tables_are_equal_and_in_the_same_order() -> None:
    """The index contains only a hash of the sorted tables; here every entry is compared."""
    with Image.open(io.BytesIO(partner_of(FILES["own tables"]))) as made:
        assert made.quantization == {0: list(range(1, 65)), 1: [9] * 64}


def test_metadata_is_copied_and_further_frames_are_not() -> None:
    data = FILES["profile and comment"]
    with Image.open(io.BytesIO(partner_of(data))) as made:
        assert made.info["icc_profile"] == b"p" * 5000 and made.info["comment"] == b"hello"
        assert made.getexif()[0x010F] == "Maker"
    stream = io.BytesIO()
    PHOTO.save(stream, "MPO", save_all=True, append_images=[PHOTO])
    assert b"MPF\0" in stream.getvalue() and b"MPF\0" not in partner_of(stream.getvalue())


def test_a_jpeg_has_only_the_metadata_of_its_partner() -> None:
    """Pillow adds a JFIF segment, which is removed. A JFIF segment of the partner is kept once."""
    plain = FILES["4:2:0"]
    bare = plain[:2] + plain[2 + 2 + int.from_bytes(plain[4:6], "big") :]  # without its JFIF
    for data, count in ((plain, 1), (bare, 0)):
        assert data.count(b"JFIF\0") == count == partner_of(data).count(b"JFIF\0")


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"quality": 80}), ("WEBP", {"lossless": True})]
)
def test_profile_and_exif_of_other_formats_are_copied(kind: str, options: dict) -> None:
    data = encode(PHOTO, kind, icc_profile=b"p" * 500, exif=EXIF, **options)
    with Image.open(io.BytesIO(partner_of(data))) as made:
        assert made.info["icc_profile"] == b"p" * 500 and made.getexif()[0x010F] == "Maker"


@pytest.mark.parametrize("lossless", [False, True])
def test_xmp_of_a_webp_is_copied(lossless: bool) -> None:
    xmp = b"<x:xmpmeta><rdf:RDF></rdf:RDF></x:xmpmeta>"
    partner = encode(PHOTO, "WEBP", xmp=xmp, lossless=lossless)
    with Image.open(io.BytesIO(partner_of(partner))) as made:
        assert made.info["xmp"] == xmp


def test_colors_below_full_transparency_are_kept() -> None:
    image = PHOTO.copy()
    image.putalpha(Image.new("L", PHOTO.size, 0))
    data = encode(image, "WEBP", lossless=True, exact=True)
    prepared = prepare(data)
    made = encode_like(np.array(PHOTO), data, prepared.pixels + 1, prepared.facts)
    with Image.open(io.BytesIO(made)) as opened:
        pixels = np.array(opened)
    assert (pixels[..., :3] == np.array(PHOTO)).all() and not pixels[..., 3].any()


def test_the_partner_of_a_gray_image_is_gray() -> None:
    gray = PHOTO.convert("L").convert("RGB")
    prepared = prepare(encode(gray, "PNG"))
    tinted = prepared.pixels.copy()
    tinted[..., 0] //= 2
    made = encode_like(tinted, prepared.data, prepared.pixels, prepared.facts)
    pixels = prepare(made).pixels
    assert (pixels == pixels[..., :1]).all()


def test_a_partner_has_the_alpha_channel_of_its_image() -> None:
    image = PHOTO.copy()
    image.putalpha(Image.fromarray(photo(5, 91, 70)[..., 0]))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        data = encode(image, kind, **options)
        with Image.open(io.BytesIO(partner_of(data))) as made:
            assert made.getchannel("A").tobytes() == image.getchannel("A").tobytes()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode(PHOTO.quantize(64), "PNG"), "palette"),
        (encode(PHOTO.convert("1"), "PNG"), "palette"),
        (oriented(PHOTO, "PNG", "raw xmp", 6), "orientation cannot be written"),
        (
            simplejpeg.encode_jpeg(photo(1, 96, 64), colorsubsampling="440"),
            "JPEG of chroma 440, which the encoder does not write",
        ),
    ],
)
def test_an_image_that_the_encoder_cannot_match_gets_no_partner(data: bytes, reason: str) -> None:
    with pytest.raises(NoPair, match=reason):
        partner_of(data)


@pytest.mark.parametrize("error", [OSError("odd"), ValueError("odd"), SyntaxError("odd")])
def test_an_image_with_unreadable_metadata_gets_no_partner(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(FILES["WebP"])

    def fails(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(NoPair, match="metadata that Pillow does not read"):
        refuse_partner(prepared.data, prepared.facts)
