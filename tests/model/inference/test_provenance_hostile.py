"""Hostile metadata cannot raise an exception, take long or write to a terminal."""

import io
import random
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import c2pa
import pytest
from PIL import ExifTags, Image, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from escape import printable
from model.inference.provenance import MAX_EVIDENCE, MAX_TEXT, read_evidence
from tests.builders import KINDS, awkward_files, encode, photo
from tests.provenance_files import (
    A1111,
    GRAPH,
    MIME,
    PICTURE,
    SOURCE,
    evidence_of,
    exif,
    make_signer,
    png,
    sign,
    xmp,
)


@pytest.fixture(scope="module")
def signer() -> c2pa.Signer:
    return make_signer()


def all_kinds(signer: c2pa.Signer) -> Iterator[bytes]:
    """Yield one small file of each format, with much metadata."""
    small = Image.fromarray(photo(2, 24, 20))
    tags = exif(Make="Canon", Model="x", UserComment=b"UNICODE\0" + A1111.encode("utf-16-le"))
    packet = xmp(f'a="{SOURCE}trainedAlgorithmicMedia" AIGC "Label":"1"/>')
    yield encode(small, "JPEG", exif=tags, xmp=packet)
    yield encode(small, "WEBP", exif=tags, xmp=packet)
    yield encode(small, "TIFF", exif=tags)
    info = PngInfo()
    info.add_text("parameters", A1111, zip=True)
    info.add_itxt("prompt", GRAPH, zip=True)
    yield encode(small, "PNG", pnginfo=info, exif=tags)
    for kind in MIME:
        yield sign(signer, encode(small, kind), kind, "trainedAlgorithmicMedia")


def harmless(data: bytes) -> None:
    for evidence in read_evidence(data):
        for text in (evidence.kind, evidence.value, evidence.where):
            assert printable(text) == text and "\n" not in text
            assert len(text) <= MAX_TEXT


def large_text() -> str:
    """Return a text that unpacks to more than the megabyte that Pillow allows."""
    return "".join(random.Random(1).choices("abcdefghij ", k=1_100_000))


def texts_of(*texts: tuple[str, str], zipped: bool = False) -> bytes:
    info = PngInfo()
    for key, text in texts:
        info.add_text(key, text, zip=zipped)
    return encode(Image.fromarray(photo(2, 24, 20)), "PNG", pnginfo=info)


def camera_with(segment: bytes) -> bytes:
    """Return a JPEG from a camera with one more segment, which Pillow refuses."""
    data = encode(Image.fromarray(photo(2, 24, 20)), "JPEG", exif=exif(Make="Canon", Model="x"))
    return data[:2] + segment + data[2:]


@pytest.mark.parametrize(
    ("data", "kinds"),
    [
        (texts_of(("parameters", A1111), ("note", large_text()), zipped=True),
         ["unreadable", "generator"]),
        (texts_of(("parameters", A1111), ("Title", "hello")).replace(b"hello", b"jello"),
         ["unreadable", "generator"]),
        (camera_with(b"\xff\xe2\0\x0eICC_PROFILE\0"), ["camera"]),
        (camera_with(b"\xff\xee\0\7Adobe"), ["camera"]),
        (camera_with(b"\xff\xe1\0\x08Exif\0\0"), ["camera"]),
    ],
)  # fmt: skip
def test_a_bad_part_does_not_hide_the_others(data: bytes, kinds: list[str]) -> None:
    assert [one.kind for one in read_evidence(data)] == kinds


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_parts_are_opened_without_the_tables_of_the_file(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of a hundred parts was opened together with all tables or palettes of the file."""
    data = encode(Image.fromarray(photo(2, 24, 20)), kind)
    if kind == "JPEG":
        parts = b"\xff\xe0\0\6JFIF" + b"\xff\xfe\0\4ab" * 99 + b"\xff\xdd\0\4\0\0" * 3000
        data = data[:2] + parts + data[2:]
    else:
        parts = chunk(b"zTXt", b"a\0\5x") + chunk(b"tEXt", b"parameters\0" + A1111.encode()) * 99
        data = data[:33] + parts + chunk(b"PLTE", b"abc") * 3000 + data[33:]
    sizes: list[int] = []
    opened = Image.open

    def counted(stream: io.BytesIO, **options: Any) -> Image.Image:
        sizes.append(stream.getbuffer().nbytes)
        return opened(stream, **options)

    monkeypatch.setattr(Image, "open", counted)
    kinds = [one.kind for one in read_evidence(data)]
    assert kinds == ([] if kind == "JPEG" else ["unreadable", "generator"])
    assert len(sizes) > 99
    assert sum(sizes) < 4 * len(data) + 100_000


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_numbers_in_exif_are_not_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array of fractions takes 40 times its bytes in memory, and is no evidence."""
    tags, fractions = Image.Exif(), (TiffImagePlugin.IFDRational(1, 10),) * 500
    tags.update({0x010F: "Canon", 0x0110: "x", 0xC62A: fractions})  # Make, Model, BaselineNoise
    tags.get_ifd(ExifTags.IFD.Exif).update({0x9003: "2021:01:01 00:00:00", 0x9201: fractions})
    data = encode(Image.fromarray(photo(2, 24, 20)), kind, exif=tags.tobytes())
    calls: list[int] = []
    monkeypatch.setattr(TiffImagePlugin, "IFDRational", lambda *of: calls.append(len(of)) or 0.1)
    assert [one.value for one in read_evidence(data)] == ["Canon x, 2021:01:01 00:00:00"]
    assert not calls


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG."""
    checksum = zlib.crc32(kind + content)
    return len(content).to_bytes(4, "big") + kind + content + checksum.to_bytes(4, "big")


def test_an_impossible_entity_is_kept_as_it_is() -> None:
    packet = xmp(f'exif:UserComment="&#{"9" * 5000};" x:parameters="{A1111}"/>')
    data = encode(Image.fromarray(photo(2, 24, 20)), "JPEG", xmp=packet)
    assert [one.kind for one in read_evidence(data)] == ["generator"]


def test_damaged_files_never_raise(signer: c2pa.Signer) -> None:
    rng = random.Random(1)
    for whole in all_kinds(signer):
        assert read_evidence(whole)
        for length in range(0, len(whole), max(1, len(whole) // 60)):
            harmless(whole[:length])
        for _ in range(60):
            changed = bytearray(whole)
            for _ in range(rng.randint(1, 20)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            harmless(bytes(changed))
    for data in KINDS.values():
        harmless(data)
        harmless(data + b"jumb c2pa")


def test_a_text_that_decompresses_to_50_mb_is_harmless() -> None:
    info = PngInfo()
    info.add_text("parameters", "Steps: 1, Seed: 2" + " " * 50_000_000, zip=True)
    harmless(encode(PICTURE, "PNG", pnginfo=info))


def test_a_file_cannot_write_to_the_terminal() -> None:
    evidence = evidence_of(
        png(parameters="\x1b[2J\x1b]0;title\x07\x9b31m\x07\u202e" + A1111 + "x" * 1000)
    )
    assert evidence.value.isprintable()
    assert evidence.value.startswith("Stable Diffusion settings: a cat")
    assert len(evidence.value) == MAX_TEXT


def test_a_prompt_is_shown_as_people_write_it() -> None:
    prompt = "\u0639\u06a9\u0633\u200c\u0647\u0627\u06cc 👨\u200d👩\u200d👧"
    (evidence,) = read_evidence(png(parameters=A1111.replace("a cat", f"{prompt}\u200b\u202ecat")))
    assert evidence.value.startswith(f"Stable Diffusion settings: {prompt} cat")


def test_a_file_with_many_statements_gives_limited_evidence() -> None:
    """15,000 statements give `MAX_EVIDENCE` statements, including those that suggest AI."""
    texts = {f"parameters {n}\x1b[2J'": f"{n} {A1111}" for n in range(15_000)}
    evidence = read_evidence(encode(PICTURE, "PNG", pnginfo=many(texts)))
    assert len(evidence) == MAX_EVIDENCE
    assert evidence[-1].value == "14,981 further statements are not shown"
    assert all(len(str(one)) < 2 * MAX_TEXT and one.where.isprintable() for one in evidence)
    assert "'text" not in evidence[0].where
    types = "".join(f"<DigitalSourceType>type{n}</DigitalSourceType>" for n in range(15_000))
    last = 'xmp:CreatorTool="Midjourney">'
    evidence = read_evidence(png(**{"XML:com.adobe.xmp": xmp(last + types).decode()}))
    assert len(evidence) == MAX_EVIDENCE
    assert evidence[0].value == "Midjourney"
    assert (
        len(evidence_of(encode(PICTURE, xmp=xmp(f'DigitalSourceType="{"a" * 9000}"'))).value)
        == MAX_TEXT
    )


def many(texts: dict[str, str]) -> PngInfo:
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    return info


@pytest.mark.parametrize(
    "text",
    ["a" + " " * 400_000 + "b", "--a" * 150_000, "Steps: 1 " * 50_000, "{" * 400_000,
     '{"prompt":' * 40_000, '"class_type" ' * 30_000, "<DigitalSourceType>" * 20_000,
     "<UserComment>" * 30_000 + "</UserComment>", ' CreatorTool="' * 30_000, "\x1b[" * 200_000,
     "&amp;" * 90_000, '" -s1 -S1' * 50_000],
)  # fmt: skip
def test_no_text_takes_long(text: str) -> None:
    began = time.process_time()
    harmless(png(parameters=text))
    harmless(png(**{"XML:com.adobe.xmp": text}))
    assert time.process_time() - began < 4


@pytest.mark.slow
@pytest.mark.skipif(not awkward_files(), reason="AWKWARD_IMAGES names no folder of hostile files")
def test_every_hostile_file_in_a_folder() -> None:
    for path in awkward_files():
        data = Path(path).read_bytes()
        for length in (*range(0, len(data), max(1, len(data) // 10)), len(data)):
            harmless(data[:length])
