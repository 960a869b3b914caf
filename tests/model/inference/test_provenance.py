"""Evidence in metadata (EXIF, XMP, texts), in files written by common libraries."""

import json
import struct

import pytest
from PIL import ExifTags, Image

from model.inference.provenance import Evidence, read_evidence
from tests.builders import encode
from tests.provenance_files import (
    A1111,
    GRAPH,
    PICTURE,
    SOURCE,
    evidence_of,
    exif,
    png,
    xmp,
)

# --- metadata that Pillow reads -------------------------------------------------------------------

DRAWN = json.dumps(
    {"nodes": [{"id": 3, "type": "KSampler", "widgets_values": [1, "euler"]}], "links": []}
)  # fmt: skip
JOB = "a7421d2f-b262-44f9-977c-ac23e9c7d3e3"


@pytest.mark.parametrize(
    ("texts", "said"),
    [({"parameters": A1111}, "Stable Diffusion settings: a cat on a sofa"),
     ({"prompt": GRAPH}, "ComfyUI: a dog in the rain"),
     ({"workflow": DRAWN}, 'ComfyUI: {"nodes"'),
     ({"invokeai_metadata": '{"positive_prompt": "x"}'}, "InvokeAI: x"),
     ({"Software": "NovelAI"}, "NovelAI"),
     ({"Source": "Stable Diffusion 8BA2AF87"}, "Stable Diffusion 8BA2AF87"),
     ({"Description": f"a fox --ar 2:1 --v 6 Job ID: {JOB}"}, "Midjourney: a fox"),
     ({"Comment": "made by DALL-E 3"}, "DALL-E 3")],
)  # fmt: skip
def test_generators_are_recognized_in_png_texts(texts: dict[str, str], said: str) -> None:
    evidence = evidence_of(png(**texts))
    assert (evidence.kind, evidence.suggests) == ("generator", "AI")
    assert said in evidence.value
    assert next(iter(texts)) in evidence.where


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("code", [b"ASCII\0\0\0", b"UNICODE\0"])
def test_settings_in_an_exif_comment(kind: str, code: bytes) -> None:
    text = A1111.encode("ascii" if code.startswith(b"A") else "utf-16-be")
    evidence = evidence_of(encode(PICTURE, kind, exif=exif(Orientation=1, UserComment=code + text)))
    assert evidence.value.startswith("Stable Diffusion settings: a cat on a sofa")
    assert "UserComment" in evidence.where


def test_comfyui_in_a_webp() -> None:
    """ComfyUI writes its settings into the tags for the make and model of a camera."""
    tags = exif(Make=f"workflow:{DRAWN}", Model=f"prompt:{GRAPH}")
    evidence = read_evidence(encode(PICTURE, "WEBP", exif=tags))
    assert {one.value[:12] for one in evidence} == {'ComfyUI: {"n', "ComfyUI: a d"}
    assert {one.suggests for one in evidence} == {"AI"}
    empty = exif(Make="workflow:{}", Model="prompt:{}")
    assert read_evidence(encode(PICTURE, "WEBP", exif=empty)) == []  # and no camera either


# Metadata of real photographs that was once mistaken for that of a generator.
PHOTOGRAPHS = [
    {"Artist": "Kendall Evans"}, {"Artist": "Randall Ellis"}, {"Artist": "Marco Dall'E"},
    {"ImageDescription": "Imagen de la catedral de Burgos"},
    {"ImageDescription": "Tramonto visto dalle mura di Lucca"},
    {"ImageDescription": "Fireflies over a meadow; firefly long exposure"},
    {"ImageDescription": "Chinese ideogram on a temple gate"},
    {"ImageDescription": "Not AI-generated. Not made with Midjourney."},
    {"ImageDescription": "The ComfyUI and Stable Diffusion booth at the fair"},
    {"ImageDescription": f"Scan, Job ID: {JOB}"},
    {"UserComment": b"ASCII\0\0\0DALL-E 3 poster at the exhibition"},
    {"UserComment": b"ASCII\0\0\0Steps: 200, up to the tower. Seed: wheat"},
    {"Copyright": "Midjourney Photography, Ohio"},
    {"Software": "Imagenomic Portraiture 3"}, {"Software": "Adobe Photoshop 25.0"},
    {"Software": "Firefly 8SE v1.3"}, {"Software": "Imagen 2.1"}, {"Software": "Midjourneyman 2"},
    {"Software": "ComfyUI-remover"}, {"Make": "Hawkeye Firefly", "Model": "8SE"},
]  # fmt: skip


@pytest.mark.parametrize("tags", PHOTOGRAPHS)
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "HEIF"])
def test_a_photograph_is_not_taken_for_generated(kind: str, tags: dict[str, object]) -> None:
    tags = {"Make": "Canon", "Model": "Canon EOS R5"} | tags
    (evidence,) = read_evidence(encode(PICTURE, kind, exif=exif(**tags)))
    assert (evidence.kind, evidence.suggests) == ("camera", "camera")


@pytest.mark.parametrize(
    "texts",
    [{"parameters": "exposure=20ms gain=1.5 objective=40x"},
     {"workflow": "scan -> register -> stitch"}, {"workflow": '{"nodes": [], "links": []}'},
     {"workflow": '{"nodes": [{"type": "n8n.webhook", "parameters": {}}], "connections": {}}'},
     {"workflow": '{"nodes": [{"type": "camera", "id": 1}], "links": []}'},
     {"prompt": "say cheese"}, {"prompt": '{"1": {"text": "a"}}'}, {"Dream": "a house by the sea"},
     {"sd-metadata": "32 GB card"}, {"generation_data": "2019"}, {"positive_prompt": "x"},
     {"Title": "Panorama dalle Dolomiti"}, {"Author": "Kendall Evans"},
     {"Description": "Imagen 3: plaza mayor"}, {"Source": "imagen escaneada"},
     {"Comment": "my cat, not made with Midjourney"}, {"Comment": '{"steps": 20, "seed": 4}'},
     {"prompt": "p", "steps": "20"}],
)  # fmt: skip
def test_the_name_of_a_text_is_not_evidence(texts: dict[str, str]) -> None:
    assert read_evidence(png(**texts)) == []


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "HEIF"])
@pytest.mark.parametrize(
    "name",
    ["Adobe Firefly", "NovelAI", "Midjourney v6", "Fooocus v2.5.5", "OpenAI DALL\xb7E 3",
     "DALL-E-3", "Draw Things", "InvokeAI 3.4"],
)  # fmt: skip
def test_a_generator_that_signs_as_software(kind: str, name: str) -> None:
    evidence = evidence_of(encode(PICTURE, kind, exif=exif(Software=name.encode())))
    assert (evidence.value, evidence.where, evidence.suggests) == (name, "EXIF Software", "AI")


def test_generators_that_sign_in_other_tags() -> None:
    assert evidence_of(encode(PICTURE, exif=exif(Make="Ideogram AI"))).suggests == "AI"
    signed = exif(Artist=JOB, ImageDescription="Signature: " + "aB3/" * 20 + "==")
    assert evidence_of(encode(PICTURE, exif=signed)).value.startswith("xAI: Signature")
    half = exif(Artist="Ann Bell", ImageDescription="Signature: " + "aB3/" * 20)
    assert read_evidence(encode(PICTURE, exif=half)) == []


def xp_comment(text: str) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.XPComment] = text.encode("utf-16-le")
    return tags


def test_settings_in_a_windows_comment_tag() -> None:
    assert "a cat on a sofa" in evidence_of(encode(PICTURE, exif=xp_comment(A1111))).value


def test_a_numeric_make_is_not_a_camera() -> None:
    """A make with a damaged type was once reported as the camera "(1, 2, 3)"."""
    make = struct.pack("<HHIIIHHH", ExifTags.Base.Make, 3, 3, 26, 0, 1, 2, 3)
    tags = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + make
    assert read_evidence(encode(PICTURE, exif=tags)) == []


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_a_camera(kind: str) -> None:
    tags = exif(Make="Canon", Model="Canon EOS 40D", DateTimeOriginal="2008:05:30 15:56:01")
    evidence = evidence_of(encode(PICTURE, kind, exif=tags))
    when = "" if kind == "TIFF" else ", 2008:05:30 15:56:01"  # Pillow does not write it to TIFF
    assert evidence == Evidence("camera", f"Canon EOS 40D{when}", "EXIF", "camera")
    phone = evidence_of(encode(PICTURE, kind, exif=exif(Make="Apple", Model="iPhone")))
    assert phone.value == "Apple iPhone"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_iptc_source_type(kind: str) -> None:
    def saved(inside: str) -> bytes:
        if kind == "PNG":
            return png(**{"XML:com.adobe.xmp": xmp(inside).decode()})
        return encode(PICTURE, kind, xmp=xmp(inside))

    attribute = f'Iptc4xmpExt:DigitalSourceType="{SOURCE}trainedAlgorithmicMedia"/>'
    assert evidence_of(saved(attribute)) == Evidence(
        "source type", "AI-generated (trainedAlgorithmicMedia)", "XMP", "AI"
    )
    element = f"><I:DigitalSourceType>{SOURCE}digitalCapture</I:DigitalSourceType></rdf:D>"
    assert evidence_of(saved(element)).suggests == "camera"
    label = "&quot;Label&quot;:&quot;1&quot;,&quot;ContentProducer&quot;:&quot;0011&quot;"
    evidence = evidence_of(saved(f"><TC260:AIGC>{{{label}}}</TC260:AIGC></rdf:Description>"))
    assert evidence == Evidence("AI label", "AI-generated, by 0011", "XMP", "AI")
    for text in ("Made with Google AI", "Edited with Google AI", "Made by Google AI"):
        credit = evidence_of(saved(f'photoshop:Credit="{text}"/>'))
        assert (credit.value, credit.suggests) == (f"credit: {text}", "AI")


IN_XMP = [
    (f'I:DigitalSourceType="{SOURCE}trainedAlgorithmicMedia"/>', "AI-generated"),
    ('I:DigitalSourceType="trainedAlgorithmicMedia"/>', "AI-generated"),
    ('DigitalSourceType="digsrctype:trainedAlgorithmicMedia"/>', "AI-generated"),
    (f'I:DigitalSourceType="{SOURCE.replace("source", "Source")}TrainedAlgorithmicMedia"/>',
     "AI-generated (trainedAlgorithmicMedia)"),
    ("><DigitalSourceType>trainedAlgorithmicMedia</DigitalSourceType></D>", "AI-generated"),
    (f"><I:DigitalSourceType rdf:resource='{SOURCE}compositeSynthetic'/></D>",
     "composite with AI-generated parts (compositeSynthetic)"),
    (f'I:DigitalSourceType="{SOURCE}compositeWithTrainedAlgorithmicMedia"/>',
     "edited with generative AI (compositeWithTrainedAlgorithmicMedia)"),
    ('I:DigitalSourceType="http://c2pa.org/digitalsourcetype/trainedAlgorithmicData"/>',
     "AI-generated (trainedAlgorithmicData)"),
    ('xmp:CreatorTool="Draw Things"/>', "Draw Things"),
    ("><xmp:CreatorTool>Adobe Firefly</xmp:CreatorTool></D>", "Adobe Firefly"),
    ("><I:AISystemUsed>Some Model 3</I:AISystemUsed></D>", "Some Model 3"),
    (">" + """<exif:UserComment><rdf:Alt><rdf:li xml:lang="x-default">{&quot;c&quot;:&quot;a cube
     &quot;,"uc":"","model":"m.ckpt","steps":8}</rdf:li></rdf:Alt></exif:UserComment></D>""",
     "Draw Things: a cube"),
    ("><dc:description><rdf:Alt><rdf:li>a cat&#xA;Steps: 8, Sampler: Euler, Guidance Scale: 4.0"
     "</rdf:li></rdf:Alt></dc:description></D>", "Stable Diffusion settings: a cat Steps"),
]  # fmt: skip


@pytest.mark.parametrize(("inside", "said"), IN_XMP)
def test_generators_are_recognized_in_xmp(inside: str, said: str) -> None:
    evidence = evidence_of(encode(PICTURE, xmp=xmp(inside)))
    assert evidence.value.startswith(said)
    assert evidence.suggests == "AI"


@pytest.mark.parametrize("name", ["algorithmicMedia", "composite", "digitalCreation"])
def test_a_source_type_that_is_neither_ai_nor_a_camera(name: str) -> None:
    """By IPTC's definitions. A fractal, for example, is made by an algorithm, not by AI."""
    evidence = evidence_of(encode(PICTURE, xmp=xmp(f'I:DigitalSourceType="{SOURCE}{name}"/>')))
    assert evidence == Evidence("source type", name, "XMP", "")


@pytest.mark.parametrize(
    "inside",
    ['xmp:CreatorTool="Adobe Photoshop 25.0"/>', 'photoshop:Credit="AI / Contributor"/>',
     'dc:title="Midjourney"/>', "><dc:creator>Randall Ellis</dc:creator></D>",
     "><dc:description>Fotos dalle Dolomiti, Adobe Firefly</dc:description></D>",
     "><dc:subject>trainedAlgorithmicMedia, Stable Diffusion</dc:subject></D>",
     'xmp:CreatorTool="Imagenomic Portraiture"/>'],
)  # fmt: skip
def test_text_by_people_in_xmp_is_not_evidence(inside: str) -> None:
    assert read_evidence(encode(PICTURE, xmp=xmp(inside))) == []


def raw_profile(name: str, content: bytes) -> dict[str, str]:
    """Return a profile as ImageMagick writes it: end of the name, length, lines of 72 digits."""
    digits = content.hex()
    lines = "\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
    return {f"Raw profile type {name}": f"\n{name}\n{len(content):8}\n{lines}\n"}


def gif(packet: bytes) -> bytes:
    whole = encode(PICTURE, "GIF")
    trailer = b"\x01" + bytes(range(255, -1, -1)) + b"\0"
    return whole[:-1] + b"!\xff\x0bXMP DataXMP" + packet + trailer + b"\0;"


def extended(packet: bytes) -> bytes:
    """Return a JPEG with extended XMP in two further segments, the second part first."""
    whole, half = encode(PICTURE), packet.index(b"Things")
    added = b""
    for start, part in ((half, packet[half:]), (0, packet[:half])):
        numbers = len(packet).to_bytes(4, "big") + start.to_bytes(4, "big")
        content = b"http://ns.adobe.com/xmp/extension/\0" + b"0" * 32 + numbers + part
        added += b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content
    return whole[:2] + added + whole[2:]


WRITTEN = xmp('xmp:CreatorTool="Draw Things"/>')


@pytest.mark.parametrize(
    "data",
    [encode(PICTURE, xmp=WRITTEN), encode(PICTURE, "WEBP", xmp=WRITTEN),
     encode(PICTURE, "AVIF", xmp=WRITTEN), encode(PICTURE, "HEIF", xmp=WRITTEN),
     encode(PICTURE, "TIFF", tiffinfo={700: WRITTEN}),
     encode(PICTURE, xmp=WRITTEN.decode().encode("utf-16")),
     encode(PICTURE, xmp=WRITTEN.decode().encode("utf-16-be")),
     png(**{"XML:com.adobe.xmp": WRITTEN.decode()}), png(**raw_profile("xmp", WRITTEN)),
     png(**raw_profile("APP1", b"http://ns.adobe.com/xap/1.0/\0" + WRITTEN)),
     gif(WRITTEN), extended(WRITTEN)],
    ids=["jpeg", "webp", "avif", "heic", "tiff", "utf-16", "utf-16-be", "png", "raw", "app1",
         "gif", "extended"],
)  # fmt: skip
def test_xmp_is_read_from_every_container(data: bytes) -> None:
    assert evidence_of(data) == Evidence("generator", "Draw Things", "XMP CreatorTool", "AI")


def test_exif_is_read_from_a_raw_profile_of_imagemagick() -> None:
    tags = exif(Software="NovelAI").tobytes()
    assert evidence_of(png(**raw_profile("APP1", tags))).value == "NovelAI"


def test_damaged_exif_does_not_hide_xmp() -> None:
    whole = encode(PICTURE, "WEBP", exif=b"Exif\0\0XX*\0rubbish", xmp=WRITTEN)
    assert evidence_of(whole).value == "Draw Things"


def test_a_png_text_after_the_pixels_is_read() -> None:
    """The PNG standard allows texts after the pixels, though few programs write them there."""
    data = png(parameters=A1111)
    start = data.index(b"iTXt") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert moved.index(b"IDAT") < moved.index(b"parameters")
    assert evidence_of(moved) == evidence_of(data)


def test_a_label_in_the_text_of_a_png() -> None:
    assert evidence_of(png(AIGC='{"Label":"1"}')).value == "AI-generated"


def test_a_plain_picture_has_no_evidence() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "AVIF"):
        assert read_evidence(encode(PICTURE, kind)) == []
    assert read_evidence(png(Software="GIMP 2.10", Comment="Created with GIMP", Title="Sea")) == []
    words = "Steps to the beach; a firefly at night"
    assert read_evidence(png(Description="Steps to the beach", Title="Paris, 2019")) == [], words
