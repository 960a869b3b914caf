"""What a decoder works on may be larger than the picture: frames of an AVIF, tiles of a TIFF."""

import base64
import io
import random
import struct
from collections.abc import Callable

import pytest
from PIL import Image, TiffImagePlugin

from imaging import av1, decode
from imaging.av1 import frame_pixels, is_cropped
from imaging.decode import DecodeError, as_is, prepare
from imaging.decode_lock import pixels_of
from tests.builders import encode, photo

AVIF = encode(photo(1, 80, 70), "AVIF", speed=10)


def box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + kind + content


def content_of(data: bytes, kind: bytes) -> bytes:
    """Return the content of the first box of a type."""
    at = data.index(kind) - 4
    return data[at + 8 : at + int.from_bytes(data[at : at + 4], "big")]


def wrong_size(data: bytes, width: int, height: int) -> bytes:
    """Return an AVIF whose box `ispe` states another size."""
    stated = content_of(data, b"ispe")
    return data.replace(stated, stated[:4] + struct.pack(">2I", width, height))


def grid_of(tile: bytes, *, inline: bool = False) -> bytes:
    """Return an AVIF that shows the picture of another one (80 x 70) twice, side by side."""
    coded = content_of(tile, b"mdat")
    layout = struct.pack(">4B2H", 0, 0, 0, 1, 2 * 80, 70)
    ispe = box(b"ispe", bytes(4), struct.pack(">2I", 2 * 80, 70))
    kept = [box(kind, content_of(tile, kind)) for kind in (b"ispe", b"pixi", b"av1C")]
    links = struct.pack(">HB2B", 1, 2, 1, 3) + b"".join(
        struct.pack(">HB3B", item, 3, 2, 3, 0x84) for item in (2, 3)
    )
    infos = [
        box(b"infe", b"\2" + bytes(3), struct.pack(">2H", item, 0), kind + b"\0")
        for item, kind in ((1, b"grid"), (2, b"av01"), (3, b"av01"))
    ]

    def meta(start: int) -> bytes:
        places = [(1, start, len(layout))] + [(n, start + len(layout), len(coded)) for n in (2, 3)]
        located = [struct.pack(">4H2I", n, inline, 0, 1, at, size) for n, at, size in places]
        return box(
            b"meta", bytes(4), box(b"hdlr", bytes(8), b"pict", bytes(13)),
            box(b"pitm", bytes(4), b"\0\1"),
            box(b"iloc", b"\1\0\0\0\x44\0", struct.pack(">H", 3), *located),
            box(b"iinf", bytes(4), struct.pack(">H", 3), *infos),
            box(b"iref", bytes(4), box(b"dimg", struct.pack(">4H", 1, 2, 2, 3))),
            box(b"iprp", box(b"ipco", ispe, *kept),
                box(b"ipma", bytes(4), struct.pack(">I", 3), links)),
            box(b"idat", layout + coded) if inline else b"",
        )  # fmt: skip

    head = box(b"ftyp", b"avif", bytes(4), b"avifmif1miaf")
    if inline:
        return head + meta(0)
    return head + meta(len(head) + len(meta(0)) + 8) + box(b"mdat", layout + coded)


def animation() -> bytes:
    pictures = [Image.fromarray(photo(n, 80, 70)) for n in range(2)]
    return encode(pictures[0], "AVIF", speed=10, save_all=True, append_images=pictures[1:])


@pytest.mark.parametrize(
    "data",
    [AVIF, wrong_size(AVIF, 8, 7), grid_of(AVIF), grid_of(AVIF, inline=True), animation(),
     encode(Image.fromarray(photo(1, 80, 70)).convert("RGBA"), "AVIF", speed=10)],
    ids=["plain", "wrong", "grid", "inline grid", "animation", "alpha"],
)  # fmt: skip
def test_the_frame_of_an_avif_is_that_of_its_sequence_header(data: bytes) -> None:
    assert frame_pixels(data) == 80 * 70
    assert frame_pixels(data[:40]) == 0


@pytest.mark.parametrize("inline", [False, True])
def test_a_grid_of_frames_is_decoded(inline: bool) -> None:
    data = grid_of(AVIF, inline=inline)
    assert prepare(data).pixels.shape == (70, 160, 3)
    assert pixels_of(data) == 160 * 70


def test_the_header_of_a_sequence_with_timing_is_read() -> None:
    fields = [
        (0, 5), (1, 1), (1, 32), (1, 32), (1, 1), (1, 3), (0, 2),  # ticks, equal intervals
        (1, 1), (9, 5), (1, 32), (3, 10),  # decoder model with delays of 10 bits
        (1, 1), (1, 5),  # display delays; two operating points
        (0, 12), (9, 5), (0, 1), (1, 1), (5, 21), (1, 1), (3, 4), (0, 12), (2, 5), (0, 1), (0, 1),
        (9, 4), (8, 4), (639, 10), (359, 9),
    ]  # fmt: skip
    bits = "".join(f"{value:0{count}b}" for value, count in fields)
    header = int(bits.ljust(256, "0"), 2).to_bytes(32, "big")
    coded = content_of(AVIF, b"mdat")
    unit = b"\x0a\x20" + header  # a sequence header of 32 bytes
    assert len(unit) < len(coded)
    assert frame_pixels(AVIF.replace(coded, unit.ljust(len(coded), b"\x80"))) == 640 * 360


# `avifenc --min 0 --max 20 -s 10 -y 444 --crop 8,8,16,8` of a PNG of 32 x 24 pixels.
CROPPED = base64.b64decode(
    "AAAAHGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZgAAARttZXRhAAAAAAAAAChoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAA"
    "AAAAbGliYXZpZgAAAAAOcGl0bQAAAAAAAQAAAB5pbG9jAAAAAEQAAAEAAQAAAAEAAAE/AAAAjgAAAChpaW5mAAAAAAAB"
    "AAAAGmluZmUCAAAAAAEAAGF2MDFDb2xvcgAAAACTaXBycAAAAHNpcGNvAAAAFGlzcGUAAAAAAAAAIAAAABgAAAAQcGl4"
    "aQAAAAADDAwMAAAADGF2MUOBQGAAAAAAE2NvbHJuY2x4AAEADQAGgAAAAChjbGFwAAAAEAAAAAEAAAAIAAAAAQAAAAAA"
    "AAABAAAAAAAAAAEAAAAYaXBtYQAAAAAAAAABAAEFAQKDBIUAAACWbWRhdBIACglYET92NAQ0GiAyfxKAAwwwxAC8rUeH"
    "xH7vJz9bPedfPm1zPByDzb+g91fazsBHJ+tEsKdkNo67cBY5mcLQCh+jtMhu3qG51qmQZQI/WvKpA+B/QeqPgVHWQmxJ"
    "q7qkmEeFRZwJtSCmN+1kvwlOQmAauTyhoazxKMSntoDZe1hjJGaeHDu1vfpgX4A="
)
CROP = content_of(CROPPED, b"clap")


def test_a_cropped_avif_is_refused() -> None:
    for read in (decode.decode, prepare, as_is):
        with pytest.raises(DecodeError, match="a cropped AVIF, of which all would be read; export"):
            read(CROPPED)
    whole = CROPPED.replace(CROP[:16], struct.pack(">4I", 64, 2, 24, 1))
    assert decode.decode(whole).shape == (24, 32, 3)


def test_a_crop_of_another_item_does_not_refuse_the_primary_one() -> None:
    used = content_of(CROPPED, b"ipma")
    assert is_cropped(CROPPED, (32, 24))
    assert decode.decode(CROPPED.replace(used, used[:-1] + b"\0")).shape == (24, 32, 3)
    thumbnail = CROPPED.replace(used, used[:8] + b"\0\2" + used[10:])  # 1 is the primary item
    assert not is_cropped(thumbnail, (32, 24))
    wide = b"\1\0\0\1" + used[4:8] + struct.pack(">IB5H", 1, 5, 1, 2, 0x8003, 4, 0x8005)
    pitm = box(b"pitm", b"\1\0\0\0", struct.pack(">I", 1))
    ipco = box(b"ipco", content_of(CROPPED, b"ipco"))
    meta = box(b"meta", bytes(4), pitm, box(b"iprp", ipco, box(b"ipma", wide)))
    assert is_cropped(meta, (32, 24))  # numbers of 4 and 2 bytes


def test_a_crop_in_a_track_is_read() -> None:
    data = box(b"stsd", bytes(8), box(b"av01", bytes(78), box(b"clap", CROP)))
    for kind in (b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        data = box(kind, data)
    assert is_cropped(box(b"ftyp", b"avis") + data, (32, 24))
    assert not is_cropped(box(b"ftyp", b"avis") + data, (16, 8))
    assert not is_cropped(box(b"ftyp", b"avif") + data, (32, 24))  # its primary item is shown
    assert not is_cropped(animation(), (80, 70))


def tiled(side: int) -> bytes:
    """Return the header of a TIFF of 64 x 64 pixels in one square tile."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.update({256: 64, 257: 64, 258: 8, 259: 1, 262: 1, 277: 1})
    tags.update({322: side, 323: side, 324: 8, 325: side**2})
    stream = io.BytesIO()
    tags.save(stream)
    return stream.getvalue() + bytes(side**2)


@pytest.mark.parametrize(
    ("make", "size"), [(lambda: wrong_size(AVIF, 8, 7), 80 * 70), (lambda: tiled(128), 128**2)]
)
def test_the_limit_and_the_budget_hold_for_what_is_decoded(
    make: Callable[[], bytes], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, reserved, reserve = make(), [], decode.decoding
    monkeypatch.setattr(decode, "decoding", lambda count: reserved.append(count) or reserve(count))
    assert prepare(data).pixels.size < 3 * size
    assert decode.decode(data).size < 3 * size
    assert pixels_of(data) == size
    assert reserved == [size, size]
    monkeypatch.setattr(decode, "MAX_PIXELS", size - 1)
    for read in (prepare, decode.decode, as_is):
        with pytest.raises(DecodeError, match="1 megapixels, more than the"):
            read(data)


def test_a_damaged_avif_has_a_size_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av1, "MAX_PARTS", 500)
    rng = random.Random(1)
    for whole in (AVIF, grid_of(AVIF), grid_of(AVIF, inline=True), animation()):
        for _ in range(60):
            changed = bytearray(whole)
            for _ in range(rng.randint(1, 20)):
                changed[rng.randrange(min(len(changed), 900))] = rng.randrange(256)
            try:
                assert frame_pixels(bytes(changed)) >= 0
            except ValueError as error:
                assert str(error) in (
                    "an AVIF of more than 500 parts", "an AVIF whose pictures overlap"
                )  # fmt: skip
    with pytest.raises(ValueError, match="of more than 500 parts"):
        frame_pixels(box(b"free") * 501)


@pytest.mark.parametrize("large", [b"", bytes(100)], ids=["of no bytes", "of bytes"])
def test_pieces_and_properties_of_items_are_counted(large: bytes) -> None:
    """Numbers of a piece may have 0 bytes, so that the end of the box does not end the list."""
    sizes = b"\x44\0" if large else b"\0\0"
    items = [struct.pack(">3H", 1, 0, 65_535) + 8 * 25_000 * large[:1] for _ in range(40)]
    iloc = box(b"iloc", bytes(4), sizes, struct.pack(">H", len(items)), *items)
    with pytest.raises(ValueError, match="of more than 20,000 parts"):
        frame_pixels(AVIF + box(b"meta", bytes(4), iloc))
    links = struct.pack(">HB", 1, 255) + bytes(255)
    ipma = box(b"ipma", bytes(4), struct.pack(">I", 100), *[links] * 100)
    meta = box(b"meta", bytes(4), box(b"pitm", bytes(4), b"\0\1"), box(b"iprp", ipma))
    with pytest.raises(ValueError, match="of more than 20,000 parts"):
        is_cropped(meta, (32, 24))
