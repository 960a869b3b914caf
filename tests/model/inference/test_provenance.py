"""What files say of themselves, in files made by the libraries that write such things; and that
nothing that they say can raise, reach the network or write to a terminal.
"""

import datetime
import http.server
import io
import json
import random
import threading
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
from model.inference.provenance import MAX_TEXT, Evidence, read_evidence
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


def sign(signer: c2pa.Signer, data: bytes, kind: str, source: str, remote: str = "") -> bytes:
    """The file with a manifest that says how it was made; `remote`: with its address alone."""
    action = {"action": "c2pa.created", "digitalSourceType": SOURCE + source}
    manifest = {
        "claim_generator_info": [{"name": "Example Painter", "version": "2"}],
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


@pytest.mark.parametrize(
    ("texts", "said"),
    [({"parameters": A1111}, "Stable Diffusion settings: a cat on a sofa"),
     ({"prompt": GRAPH}, "ComfyUI: a dog in the rain"),
     ({"workflow": '{"nodes": []}'}, 'ComfyUI: {"nodes": []}'),
     ({"invokeai_metadata": '{"positive_prompt": "x"}'}, "InvokeAI"),
     ({"Software": "NovelAI"}, "NovelAI"),
     ({"Description": "a fox --v 6 Job ID: 12345678-1234-1234"}, "Midjourney: a fox"),
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
    found = read_evidence(encode(PICTURE, "WEBP", exif=exif(Make="workflow:{}", Model="prompt:{}")))
    assert {one.kind for one in found} == {"generator"}
    assert {one.suggests for one in found} == {"AI"}


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
    credit = one(saved('photoshop:Credit="Made with Google AI"/>'))
    assert (credit.value, credit.suggests) == ("credit: Made with Google AI", "AI")


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
    found = one(png(parameters="\x1b[2J\x9b\x07\u202e" + A1111 + "x" * 1000))
    assert found.value.isprintable()
    assert len(found.value) == MAX_TEXT


@pytest.mark.slow
@pytest.mark.skipif(not awkward_files(), reason="AWKWARD_IMAGES names no folder of hostile files")
def test_every_hostile_file_in_a_folder() -> None:
    for path in awkward_files():
        data = Path(path).read_bytes()
        for length in (*range(0, len(data), max(1, len(data) // 10)), len(data)):
            harmless(data[:length])
