"""A picture is decoded if and only if all its pixels are there, whatever else is unusual."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from imaging import jpeg, png
from imaging.decode import DecodeError, as_is, decode, prepare
from tests.builders import encode, photo

IMAGE = Image.fromarray(photo(6, 64, 64))
JPEG = encode(IMAGE, quality=90, subsampling=2)
PROGRESSIVE = encode(IMAGE, quality=90, progressive=True)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def inserted(data: bytes, where: bytes, content: bytes) -> bytes:
    at = data.index(where)
    return data[:at] + content + data[at:]


def changed(data: bytes, at: int, content: bytes) -> bytes:
    return data[:at] + content + data[at + len(content) :]


def sampled(data: bytes, *factors: int) -> bytes:
    """Change the sampling factors of a 4:2:0 JPEG to others with as many blocks: another, whole
    picture.
    """
    at = data.index(b"\xff\xc0") + 11
    for component, factor in enumerate(factors):
        data = changed(data, at + 3 * component, bytes([factor]))
    return data


PROFILE_SEGMENT = segment(0xE2, b"ICC_PROFILE\0\1\1" + SRGB)
SCAN = JPEG.index(b"\xff\xda")
WARNED = {
    "bytes between segments": inserted(JPEG, b"\xff\xdb", b"\0\0\0"),
    "bytes that look like an escape": inserted(JPEG, b"\xff\xdb", b"\xff\0\x12"),
    "filled before a marker": inserted(JPEG, b"\xff\xdb", b"\xff\xff\xff"),
    "zeros before the end": JPEG[:-2] + bytes(600) + JPEG[-2:],
    "two bytes before the end": JPEG[:-2] + b"\x12\x34" + JPEG[-2:],
    "scan ends at 0": changed(JPEG, SCAN + 11, b"\0\0\0"),
    "JFIF 3": changed(JPEG, JPEG.index(b"JFIF\0") + 5, b"\3"),
    "profile behind the frame": inserted(JPEG, b"\xff\xc4", PROFILE_SEGMENT),
    "profile in wrong parts": inserted(JPEG, b"\xff\xdb", segment(0xE2, b"ICC_PROFILE\0\7\3ab")),
    "damaged EXIF": inserted(JPEG, b"\xff\xdb", segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff")),
    "EXIF without content": inserted(JPEG, b"\xff\xdb", segment(0xE1, b"Exif\0\0")),
    "cut Adobe": inserted(JPEG, b"\xff\xdb", segment(0xEE, b"Adobe\0")),
    "unknown Adobe transform": inserted(JPEG, b"\xff\xdb", segment(0xEE, b"Adobe\0\x64\0\0\0\0\7")),
    "a film behind": JPEG + b"\0\0\0\x18ftypmp42" + bytes(5000),
    "empty comment": inserted(JPEG, b"\xff\xdb", segment(0xFE, b"")),
}  # fmt: skip


@pytest.mark.parametrize("kind", WARNED)
def test_a_jpeg_whose_warnings_lose_nothing_is_decoded(kind: str) -> None:
    data = WARNED[kind]
    pixels = decode(data)
    np.testing.assert_array_equal(pixels, np.asarray(IMAGE_AS_JPEG))
    packed = prepare(data)
    np.testing.assert_array_equal(packed.pixels, pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of metadata
        stored = np.asarray(Image.open(io.BytesIO(packed.data)).convert("RGB"))
    np.testing.assert_array_equal(stored, pixels)


IMAGE_AS_JPEG = Image.open(io.BytesIO(JPEG))


@pytest.mark.parametrize("factors", [(0x21, 0x12, 0x21), (0x12, 0x21, 0x21), (0x41, 0x11, 0x11),
                                     (0x14, 0x11, 0x11), (0x12, 0x12, 0x12)])  # fmt: skip
def test_unusual_sampling_is_decoded_as_by_libjpeg(factors: tuple[int, ...]) -> None:
    data = sampled(JPEG, *factors)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)
    np.testing.assert_array_equal(prepare(data).pixels, expected)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_cmyk_of_any_sampling_is_decoded(subsampling: int) -> None:
    data = encode(IMAGE.convert("CMYK"), subsampling=subsampling)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(prepare(data).pixels, expected)


THUMBNAIL = segment(0xE1, b"Exif\0\0II*\0" + encode(IMAGE.resize((9, 9))))
CUT = {
    "half": JPEG[: len(JPEG) // 2],
    "without an end": JPEG[:-2],
    "95 %": JPEG[: len(JPEG) * 95 // 100],
    "half, with a thumbnail": inserted(JPEG, b"\xff\xdb", THUMBNAIL)[: -len(JPEG) // 3],
    "half, bytes between segments": WARNED["bytes between segments"][: len(JPEG) // 2],
    "half, unusual sampling": sampled(JPEG, 0x21, 0x12, 0x21)[: len(JPEG) // 2],
    "half, cmyk": encode(IMAGE.convert("CMYK"))[:2000],
    "progressive, half": PROGRESSIVE[: len(PROGRESSIVE) // 2],
    "progressive, without an end": PROGRESSIVE[:-2],
    "progressive, zeros before a scan, half":
        inserted(PROGRESSIVE, b"\xff\xda", bytes(3))[: len(PROGRESSIVE) // 2],
}  # fmt: skip
DAMAGED = {
    "a part gone": JPEG[: SCAN + 400] + JPEG[SCAN + 900 :],
    "a part gone, bytes between segments":
        inserted(JPEG[: SCAN + 400] + JPEG[SCAN + 900 :], b"\xff\xdb", b"\0\0\0"),
    "a part gone, cmyk": encode(IMAGE.convert("CMYK"))[:1500] + b"\xff\xd9",
}  # fmt: skip


@pytest.mark.parametrize("kind", CUT | DAMAGED)
def test_missing_or_damaged_pixels_are_refused(kind: str) -> None:
    data = (CUT | DAMAGED)[kind]
    said = "premature end" if kind in CUT else "JPEG does not decode"
    for act in (prepare, decode):
        with pytest.raises(DecodeError, match=said):
            act(data)
    assert jpeg.has_end(data) == (kind in DAMAGED)


@pytest.mark.parametrize("kind", WARNED)
def test_the_end_marker_is_found_in_unusual_files(kind: str) -> None:
    assert jpeg.has_end(WARNED[kind])


def test_many_scans_are_refused_before_decoding() -> None:
    at = PROGRESSIVE.rindex(b"\xff\xda")
    scan = PROGRESSIVE[at:-2]
    for count in (jpeg.MAX_SCANS + 1, 3000):
        data = PROGRESSIVE[:at] + scan * count + PROGRESSIVE[-2:]
        for act in (prepare, decode, as_is):
            with pytest.raises(DecodeError, match=r"scans, more than the limit of 100"):
                act(data)
    film = PROGRESSIVE + b"\xff\xda\0\4ab" * 3000  # after the end marker, so no scans
    np.testing.assert_array_equal(decode(film), decode(PROGRESSIVE))


# --- PNG ------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def with_chunk(content: bytes) -> bytes:
    at = PNG.index(b"IDAT") - 4
    return PNG[:at] + content + PNG[at:]


def with_text(**kept: object) -> bytes:
    info = PngInfo()
    info.add_itxt(**kept) if "lang" in kept else info.add_text(**kept)
    return encode(IMAGE, "PNG", pnginfo=info)


PNG = encode(IMAGE, "PNG")
LONG = "x" * 2**21
PROFILE = struct.pack(">I", len(SRGB) + 2**21) + SRGB[4:] + bytes(2**21)
ODD_PNG = {
    "large profile": encode(IMAGE, "PNG", icc_profile=PROFILE),
    "large packed text": with_text(key="workflow", value=LONG, zip=True),
    "large text": with_text(key="parameters", value=LONG),
    "large packed XMP": with_text(key="XML:com.adobe.xmp", value=LONG, zip=True, lang=""),
    "text with a wrong checksum": with_chunk(chunk(b"tEXt", b"a\0b")[:-1] + b"?"),
    "profile that does not unpack": with_chunk(chunk(b"iCCP", b"x\0\0garbage")),
    "packed text that does not unpack": with_chunk(chunk(b"zTXt", b"Comment\0\0garbage")),
    "short iTXt": with_chunk(chunk(b"iTXt", b"x")),
    "short gAMA": with_chunk(chunk(b"gAMA", b"\0")),
    "short pHYs": with_chunk(chunk(b"pHYs", b"\0\0")),
    "short cHRM": with_chunk(chunk(b"cHRM", b"\0\0")),
    "empty sRGB": with_chunk(chunk(b"sRGB", b"")),
    "EXIF of garbage": with_chunk(chunk(b"eXIf", b"garbage")),
    "unknown chunk": with_chunk(chunk(b"quIt", b"garbage")),
    "animation without frames": with_chunk(chunk(b"acTL", bytes(8))),
    "cut animation control": with_chunk(chunk(b"acTL", bytes(3))),
    "bytes behind": PNG + b"trailing" * 99,
    "without IEND": PNG[:-12],
}


@pytest.mark.parametrize("kind", ODD_PNG)
def test_damaged_metadata_does_not_stop_the_decoding_of_a_png(kind: str) -> None:
    prepared = prepare(ODD_PNG[kind])
    np.testing.assert_array_equal(prepared.pixels, np.asarray(IMAGE))
    np.testing.assert_array_equal(decode(ODD_PNG[kind]), np.asarray(IMAGE))


@pytest.mark.parametrize("kind", ["half", "palette gone", "pixels changed"])
def test_a_png_without_all_its_pixels_is_refused(kind: str) -> None:
    palette = encode(IMAGE.convert("P"), "PNG")
    data = {
        "half": PNG[: len(PNG) // 2],
        "palette gone": palette.replace(b"PLTE", b"PLTe"),
        "pixels changed": changed(PNG, PNG.index(b"IDAT") + 300, b"\x55\xaa\x55\xaa"),
    }[kind]
    for act in (prepare, decode):
        with pytest.raises(DecodeError, match=r"PNG does not decode|palette is missing"):
            act(data)


def test_only_a_plain_png_keeps_its_bytes() -> None:
    assert png.is_plain(PNG)
    for kind in ("text with a wrong checksum", "unknown chunk", "without IEND"):
        assert not png.is_plain(ODD_PNG[kind])
    assert not png.is_plain(encode(IMAGE, "PNG", save_all=True, append_images=[IMAGE.rotate(9)]))


def test_the_still_picture_of_an_animation_is_decoded() -> None:
    frames = [IMAGE.rotate(turn) for turn in (90, 180)]
    for default in (False, True):
        data = encode(IMAGE, "PNG", save_all=True, append_images=frames, default_image=default)
        np.testing.assert_array_equal(decode(data), np.asarray(IMAGE))


def test_an_animated_webp_of_one_frame_is_turned_into_a_png() -> None:
    """libwebp's simple decoder, and so torchvision and dwebp, refuse it."""
    still = encode(photo(1, 40, 30), "WEBP")
    size = (39).to_bytes(3, "little") + (29).to_bytes(3, "little")
    chunks = {
        b"VP8X": b"\x02\0\0\0" + size,
        b"ANIM": bytes(6),
        b"ANMF": bytes(6) + size + bytes(4) + still[12:],
    }
    body = b"WEBP" + b"".join(
        name + len(data).to_bytes(4, "little") + data for name, data in chunks.items()
    )
    prepared = prepare(b"RIFF" + len(body).to_bytes(4, "little") + body)
    assert prepared.facts.transcoded_from == "WEBP"
    np.testing.assert_array_equal(prepared.pixels, prepare(still).pixels)
