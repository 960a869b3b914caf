"""What files say of themselves, in files made by the libraries that write such things; and that
nothing that they say can raise, reach the network or write to a terminal.
"""

import datetime
import http.server
import io
import json
import random
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import c2pa
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from model.inference import provenance
from model.inference.provenance import MAX_EVIDENCE, MAX_TEXT, Evidence, read_evidence
from tests.builders import KINDS, awkward_files, encode, photo

SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
PICTURE = Image.fromarray(photo(1))
MIME = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}


def one(data: bytes) -> Evidence:
    (found,) = read_evidence(data)
    return found


def png(**texts: str) -> bytes:
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    return encode(PICTURE, "PNG", pnginfo=info)


def exif(**tags: object) -> Image.Exif:
    found = Image.Exif()
    inside = found.get_ifd(ExifTags.IFD.Exif)
    for name, value in tags.items():
        tag = ExifTags.Base[name]
        (inside if tag in (0x9286, 0x9003) else found)[tag] = value
    return found


# --- C2PA -----------------------------------------------------------------------------------------


def certificate(name: str, key, signer_name: str, signer_key, *, is_ca: bool) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)

    def of(common: str) -> x509.Name:
        organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example Images Ltd")
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common), organization])

    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    usage |= {"digital_signature": not is_ca, "key_cert_sign": is_ca, "crl_sign": is_ca}
    builder = (
        x509.CertificateBuilder()
        .subject_name(of(name))
        .issuer_name(of(signer_name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=9))
        .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key()), False
        )
    )
    if not is_ca:
        mail = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(mail, False)
    return builder.sign(signer_key, hashes.SHA256())


@pytest.fixture(scope="module")
def signer() -> c2pa.Signer:
    """A signer whose certificate a test authority has signed."""
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = certificate("Root", root_key, "Root", root_key, is_ca=True)
    own = certificate("Signer", key, "Root", root_key, is_ca=False)
    chain = b"".join(c.public_bytes(serialization.Encoding.PEM) for c in (own, root))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return c2pa.Signer.from_info(
        c2pa.C2paSignerInfo(alg=c2pa.C2paSigningAlg.ES256, sign_cert=chain, private_key=private,
                            ta_url=None)
    )  # fmt: skip


def sign(
    signer: c2pa.Signer, data: bytes, kind: str, source: str, remote: str = "",
    maker: str = "Example Painter",
) -> bytes:  # fmt: skip
    """The file with a manifest that says how it was made; `remote`: with its address alone."""
    action = {"action": "c2pa.created", "digitalSourceType": SOURCE + source}
    manifest = {
        "claim_generator_info": [{"name": maker, "version": "2"}],
        "assertions": [{"label": "c2pa.actions", "data": {"actions": [action]}}],
    }
    settings = {"builder": {"thumbnail": {"enabled": False}}}
    with c2pa.Builder(json.dumps(manifest), context=c2pa.Context.from_dict(settings)) as builder:
        if remote:
            builder.set_remote_url(remote)
            builder.set_no_embed()
        out = io.BytesIO()
        builder.sign(signer, MIME[kind], io.BytesIO(data), out)
        return out.getvalue()


@pytest.mark.parametrize("kind", MIME)
def test_a_signed_manifest_is_read_and_checked(signer: c2pa.Signer, kind: str) -> None:
    signed = sign(signer, encode(PICTURE, kind), kind, "trainedAlgorithmicMedia")
    found = one(signed)
    assert (found.kind, found.suggests) == ("C2PA", "AI")
    for said in ("signed by Example Images Ltd", "made with Example Painter", "AI-generated",
                 "trainedAlgorithmicMedia", "the signature fits the file"):  # fmt: skip
        assert said in found.value
    middle = bytearray(signed)
    middle[-30] ^= 1
    assert "NOT VALID" in one(bytes(middle)).value
    taken = one(sign(signer, encode(PICTURE, kind), kind, "digitalCapture"))
    assert taken.suggests == "camera"


def test_a_manifest_elsewhere_is_not_asked_for(signer: c2pa.Signer) -> None:
    """A picture must not be able to make its reader call an address."""
    asked = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/manifest.c2pa"
        data = sign(signer, encode(PICTURE), "JPEG", "trainedAlgorithmicMedia", address)
        assert address.encode() in data
        read_evidence(data)
        # Even where the bytes look as if there were a manifest, and the library is asked.
        read_evidence(data + b"jumb c2pa")
        provenance._c2pa_reader.cache_clear()
        with pytest.raises(c2pa.C2paError):
            provenance._c2pa_reader()(data)
        assert not asked
        with pytest.raises(c2pa.C2paError):
            c2pa.Reader("image/jpeg", io.BytesIO(data))  # the library's own default does ask
        assert asked
        server.shutdown()


def test_without_the_library_a_manifest_is_said_to_be_there(
    signer: c2pa.Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = sign(signer, encode(PICTURE), "JPEG", "trainedAlgorithmicMedia")
    monkeypatch.setattr(provenance, "_c2pa_reader", lambda: None)
    assert "install the extra `evidence`" in one(data).value


# --- what Pillow reads ----------------------------------------------------------------------------

A1111 = (
    "a cat on a sofa\nNegative prompt: blurry\n"
    "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model: sd15"
)
GRAPH = json.dumps(
    {"3": {"class_type": "KSampler", "inputs": {"seed": 1}},
     "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a dog in the rain"}}}
)  # fmt: skip

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
def test_what_generators_leave_in_a_png(texts: dict[str, str], said: str) -> None:
    found = one(png(**texts))
    assert (found.kind, found.suggests) == ("generator", "AI")
    assert found.value.startswith(said) or said in found.value
    assert next(iter(texts)) in found.where


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("code", [b"ASCII\0\0\0", b"UNICODE\0"])
def test_settings_in_an_exif_comment(kind: str, code: bytes) -> None:
    text = A1111.encode("ascii" if code.startswith(b"A") else "utf-16-be")
    found = one(encode(PICTURE, kind, exif=exif(Orientation=1, UserComment=code + text)))
    assert found.value.startswith("Stable Diffusion settings: a cat on a sofa")
    assert "UserComment" in found.where


def test_comfyui_in_a_webp() -> None:
    """It takes the tags of a camera's make and model for it."""
    tags = exif(Make=f"workflow:{DRAWN}", Model=f"prompt:{GRAPH}")
    found = read_evidence(encode(PICTURE, "WEBP", exif=tags))
    assert {one.value[:12] for one in found} == {'ComfyUI: {"n', "ComfyUI: a d"}
    assert {one.suggests for one in found} == {"AI"}
    empty = exif(Make="workflow:{}", Model="prompt:{}")
    assert read_evidence(encode(PICTURE, "WEBP", exif=empty)) == []  # and no camera either


# What real photographs have in them: cases that were once taken for a generator's.
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
def test_a_photograph_is_no_generators(kind: str, tags: dict[str, object]) -> None:
    tags = {"Make": "Canon", "Model": "Canon EOS R5"} | tags
    (found,) = read_evidence(encode(PICTURE, kind, exif=exif(**tags)))
    assert (found.kind, found.suggests) == ("camera", "camera")


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
def test_a_name_of_a_text_says_nothing(texts: dict[str, str]) -> None:
    assert read_evidence(png(**texts)) == []


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "HEIF"])
@pytest.mark.parametrize(
    "name",
    ["Adobe Firefly", "NovelAI", "Midjourney v6", "Fooocus v2.5.5", "OpenAI DALL\xb7E 3",
     "DALL-E-3", "Draw Things", "InvokeAI 3.4"],
)  # fmt: skip
def test_a_generator_that_signs_as_software(kind: str, name: str) -> None:
    found = one(encode(PICTURE, kind, exif=exif(Software=name.encode())))
    assert (found.value, found.where, found.suggests) == (name, "EXIF Software", "AI")


def test_makers_that_sign_elsewhere() -> None:
    assert one(encode(PICTURE, exif=exif(Make="Ideogram AI"))).suggests == "AI"
    signed = exif(Artist=JOB, ImageDescription="Signature: " + "aB3/" * 20 + "==")
    assert one(encode(PICTURE, exif=signed)).value.startswith("xAI: Signature")
    half = exif(Artist="Ann Bell", ImageDescription="Signature: " + "aB3/" * 20)
    assert read_evidence(encode(PICTURE, exif=half)) == []


def xp_comment(text: str) -> Image.Exif:
    found = Image.Exif()
    found[ExifTags.Base.XPComment] = text.encode("utf-16-le")
    return found


def test_settings_in_a_comment_of_windows() -> None:
    assert "a cat on a sofa" in one(encode(PICTURE, exif=xp_comment(A1111))).value


def test_a_number_is_no_camera() -> None:
    """A damaged type made a camera of it by the name of "(1, 2, 3)"."""
    make = struct.pack("<HHIIIHHH", ExifTags.Base.Make, 3, 3, 26, 0, 1, 2, 3)
    tags = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + make
    assert read_evidence(encode(PICTURE, exif=tags)) == []


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_a_camera(kind: str) -> None:
    tags = exif(Make="Canon", Model="Canon EOS 40D", DateTimeOriginal="2008:05:30 15:56:01")
    found = one(encode(PICTURE, kind, exif=tags))
    when = "" if kind == "TIFF" else ", 2008:05:30 15:56:01"  # which Pillow does not write there
    assert found == Evidence("camera", f"Canon EOS 40D{when}", "EXIF", "camera")
    phone = one(encode(PICTURE, kind, exif=exif(Make="Apple", Model="iPhone")))
    assert phone.value == "Apple iPhone"


def xmp(inside: str) -> bytes:
    start = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description '
    return f"{start}{inside}</rdf:RDF></x:xmpmeta>".encode()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_iptc_source_type(kind: str) -> None:
    def saved(inside: str) -> bytes:
        if kind == "PNG":
            return png(**{"XML:com.adobe.xmp": xmp(inside).decode()})
        return encode(PICTURE, kind, xmp=xmp(inside))

    attribute = f'Iptc4xmpExt:DigitalSourceType="{SOURCE}trainedAlgorithmicMedia"/>'
    assert one(saved(attribute)) == Evidence(
        "source type", "AI-generated (trainedAlgorithmicMedia)", "XMP", "AI"
    )
    element = f"><I:DigitalSourceType>{SOURCE}digitalCapture</I:DigitalSourceType></rdf:D>"
    assert one(saved(element)).suggests == "camera"
    label = "&quot;Label&quot;:&quot;1&quot;,&quot;ContentProducer&quot;:&quot;0011&quot;"
    found = one(saved(f"><TC260:AIGC>{{{label}}}</TC260:AIGC></rdf:Description>"))
    assert found == Evidence("AI label", "AI-generated, by 0011", "XMP", "AI")
    for text in ("Made with Google AI", "Edited with Google AI", "Made by Google AI"):
        credit = one(saved(f'photoshop:Credit="{text}"/>'))
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
def test_what_generators_leave_in_xmp(inside: str, said: str) -> None:
    found = one(encode(PICTURE, xmp=xmp(inside)))
    assert found.value.startswith(said)
    assert found.suggests == "AI"


@pytest.mark.parametrize("name", ["algorithmicMedia", "composite", "digitalCreation"])
def test_a_source_type_that_is_neither_ai_nor_a_camera(name: str) -> None:
    """By IPTC's definitions; a fractal is made by an algorithm, not by AI."""
    found = one(encode(PICTURE, xmp=xmp(f'I:DigitalSourceType="{SOURCE}{name}"/>')))
    assert found == Evidence("source type", name, "XMP", "")


@pytest.mark.parametrize(
    "inside",
    ['xmp:CreatorTool="Adobe Photoshop 25.0"/>', 'photoshop:Credit="AI / Contributor"/>',
     'dc:title="Midjourney"/>', "><dc:creator>Randall Ellis</dc:creator></D>",
     "><dc:description>Fotos dalle Dolomiti, Adobe Firefly</dc:description></D>",
     "><dc:subject>trainedAlgorithmicMedia, Stable Diffusion</dc:subject></D>",
     'xmp:CreatorTool="Imagenomic Portraiture"/>'],
)  # fmt: skip
def test_what_people_write_in_xmp(inside: str) -> None:
    assert read_evidence(encode(PICTURE, xmp=xmp(inside))) == []


def raw_profile(name: str, content: bytes) -> dict[str, str]:
    """As ImageMagick writes it: the last part of the name, the length, lines of 72 digits."""
    digits = content.hex()
    lines = "\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
    return {f"Raw profile type {name}": f"\n{name}\n{len(content):8}\n{lines}\n"}


def gif(packet: bytes) -> bytes:
    whole = encode(PICTURE, "GIF")
    trailer = b"\x01" + bytes(range(255, -1, -1)) + b"\0"
    return whole[:-1] + b"!\xff\x0bXMP DataXMP" + packet + trailer + b"\0;"


def extended(packet: bytes) -> bytes:
    """A JPEG whose XMP goes on in two further segments, the second part first."""
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
def test_where_xmp_stands(data: bytes) -> None:
    assert one(data) == Evidence("generator", "Draw Things", "XMP CreatorTool", "AI")


def test_exif_where_imagemagick_puts_it() -> None:
    tags = exif(Software="NovelAI").tobytes()
    assert one(png(**raw_profile("APP1", tags))).value == "NovelAI"


def test_damaged_exif_hides_nothing_else() -> None:
    whole = encode(PICTURE, "WEBP", exif=b"Exif\0\0XX*\0rubbish", xmp=WRITTEN)
    assert one(whole).value == "Draw Things"


def test_a_claim_without_a_source_type(signer: c2pa.Signer) -> None:
    plain = one(sign(signer, encode(PICTURE), "JPEG", "empty"))
    assert plain.suggests == ""
    named = one(sign(signer, encode(PICTURE), "JPEG", "empty", maker="ChatGPT"))
    assert named.suggests == "AI"


def test_a_text_behind_the_pixels() -> None:
    """As the standard allows, though few write it so."""
    data = png(parameters=A1111)
    start = data.index(b"iTXt") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert moved.index(b"IDAT") < moved.index(b"parameters")
    assert one(moved) == one(data)


def test_a_label_in_the_text_of_a_png() -> None:
    assert one(png(AIGC='{"Label":"1"}')).value == "AI-generated"


def test_a_plain_picture_says_nothing() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "AVIF"):
        assert read_evidence(encode(PICTURE, kind)) == []
    assert read_evidence(png(Software="GIMP 2.10", Comment="Created with GIMP", Title="Sea")) == []
    words = "Steps to the beach; a firefly at night"
    assert read_evidence(png(Description="Steps to the beach", Title="Paris, 2019")) == [], words


# --- hostile files --------------------------------------------------------------------------------


def all_kinds(signer: c2pa.Signer) -> Iterator[bytes]:
    """One small file of each container, full of things to say."""
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
    for found in read_evidence(data):
        for text in (found.kind, found.value, found.where):
            assert text.isprintable()
            assert len(text) <= MAX_TEXT


def test_no_damage_makes_it_raise(signer: c2pa.Signer) -> None:
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


def test_a_text_that_unpacks_to_much_is_not_unpacked() -> None:
    info = PngInfo()
    info.add_text("parameters", "Steps: 1, Seed: 2" + " " * 50_000_000, zip=True)
    harmless(encode(PICTURE, "PNG", pnginfo=info))


def test_a_file_cannot_write_to_the_terminal() -> None:
    found = one(png(parameters="\x1b[2J\x1b]0;title\x07\x9b31m\x07\u202e" + A1111 + "x" * 1000))
    assert found.value.isprintable()
    assert found.value.startswith("Stable Diffusion settings: a cat")
    assert len(found.value) == MAX_TEXT


def test_a_file_that_says_much_says_little() -> None:
    """15,000 statements become a row of `MAX_EVIDENCE`, what suggests AI among them."""
    texts = {f"parameters {n}\x1b[2J'": f"{n} {A1111}" for n in range(15_000)}
    found = read_evidence(encode(PICTURE, "PNG", pnginfo=many(texts)))
    assert len(found) == MAX_EVIDENCE
    assert found[-1].value == "14,981 further statements are not shown"
    assert all(len(str(one)) < 2 * MAX_TEXT and one.where.isprintable() for one in found)
    assert "'text" not in found[0].where
    types = "".join(f"<DigitalSourceType>type{n}</DigitalSourceType>" for n in range(15_000))
    last = 'xmp:CreatorTool="Midjourney">'
    found = read_evidence(png(**{"XML:com.adobe.xmp": xmp(last + types).decode()}))
    assert len(found) == MAX_EVIDENCE
    assert found[0].value == "Midjourney"
    assert len(one(encode(PICTURE, xmp=xmp(f'DigitalSourceType="{"a" * 9000}"'))).value) == MAX_TEXT


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
