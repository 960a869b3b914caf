"""Write image files with provenance metadata: C2PA signatures, EXIF, XMP and generator texts."""

import datetime
import io
import json
from dataclasses import dataclass

import c2pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from model.inference.provenance import Evidence, read_evidence
from tests.builders import encode, photo

SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
PICTURE = Image.fromarray(photo(1))
MIME = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}


def evidence_of(data: bytes) -> Evidence:
    """Read a file that has exactly one piece of evidence."""
    (evidence,) = read_evidence(data)
    return evidence


def png(**texts: str) -> bytes:
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    return encode(PICTURE, "PNG", pnginfo=info)


def exif(**tags: object) -> Image.Exif:
    tags_of_file = Image.Exif()
    inside = tags_of_file.get_ifd(ExifTags.IFD.Exif)
    for name, value in tags.items():
        tag = ExifTags.Base[name]
        (inside if tag in (0x9286, 0x9003) else tags_of_file)[tag] = value
    return tags_of_file


DAYS = datetime.timedelta(days=9)


def certificate(
    name: str, key, signer_name: str, signer_key, *, is_ca: bool,
    organization: str = "Example Images Ltd", valid: datetime.timedelta = DAYS,
) -> x509.Certificate:  # fmt: skip
    now = datetime.datetime.now(datetime.UTC)

    def of(common: str) -> x509.Name:
        part = x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization)
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common), part])

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
        .not_valid_after(now + valid)
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


def sign(
    signer: c2pa.Signer, data: bytes, kind: str, source: str, remote: str = "",
    maker: str = "Example Painter",
) -> bytes:  # fmt: skip
    """Add a C2PA manifest with a digital source type to a file.

    With `remote`, an address, the file has only this address of its manifest.
    """
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


def sign_edit(signer: c2pa.Signer, data: bytes, before: bytes) -> bytes:
    """Sign a JPEG as an edit of `before`, a JPEG with a manifest, which becomes its ingredient."""
    action = {"action": "c2pa.color_adjustments"}
    manifest = {
        "claim_generator_info": [{"name": "Example Editor", "version": "1"}],
        "assertions": [{"label": "c2pa.actions", "data": {"actions": [action]}}],
    }
    settings = {"builder": {"thumbnail": {"enabled": False}}}
    with c2pa.Builder(json.dumps(manifest), context=c2pa.Context.from_dict(settings)) as builder:
        builder.set_intent(c2pa.C2paBuilderIntent.EDIT)
        ingredient = json.dumps({"title": "before.jpg", "relationship": "parentOf"})
        builder.add_ingredient(ingredient, MIME["JPEG"], io.BytesIO(before))
        out = io.BytesIO()
        builder.sign(signer, MIME["JPEG"], io.BytesIO(data), out)
        return out.getvalue()


A1111 = (
    "a cat on a sofa\nNegative prompt: blurry\n"
    "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model: sd15"
)
GRAPH = json.dumps(
    {"3": {"class_type": "KSampler", "inputs": {"seed": 1}},
     "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a dog in the rain"}}}
)  # fmt: skip


def xmp(inside: str) -> bytes:
    start = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description '
    return f"{start}{inside}</rdf:RDF></x:xmpmeta>".encode()


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)


def signer_of(chain: bytes, key: ec.EllipticCurvePrivateKey) -> c2pa.Signer:
    """Make a signer of a certificate chain in PEM; `key` is that of its first certificate."""
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return c2pa.Signer.from_info(
        c2pa.C2paSignerInfo(alg=c2pa.C2paSigningAlg.ES256, sign_cert=chain, private_key=private,
                            ta_url=None)
    )  # fmt: skip


def make_signer() -> c2pa.Signer:
    """Make a signer with a certificate from a new test authority."""
    root_key, key = new_key(), new_key()
    root = certificate("Root", root_key, "Root", root_key, is_ca=True)
    leaf = certificate("Signer", key, "Root", root_key, is_ca=False)
    return signer_of(pem(leaf, root), key)


@dataclass(frozen=True)
class Authority:
    """Certificate authority: a root, and an intermediate that issues certificates to signers."""

    root: x509.Certificate
    intermediate: x509.Certificate
    key: ec.EllipticCurvePrivateKey  # key of the intermediate certificate

    def signer(self, organization: str = "Example Images Ltd", **options) -> c2pa.Signer:
        """Make a signer whose chain does not include the root, as C2PA requires."""
        key = new_key()
        leaf = certificate(
            "Signer", key, "Intermediate", self.key, is_ca=False, organization=organization,
            **options,
        )  # fmt: skip
        return signer_of(pem(leaf, self.intermediate), key)


def make_authority() -> Authority:
    root_key, key = new_key(), new_key()
    root = certificate("Root", root_key, "Root", root_key, is_ca=True)
    return Authority(root, certificate("Intermediate", key, "Root", root_key, is_ca=True), key)


def self_signed(organization: str) -> tuple[c2pa.Signer, x509.Certificate]:
    """Make a signer with a self-signed certificate, which anybody can make in any name."""
    key = new_key()
    leaf = certificate(organization, key, organization, key, is_ca=False, organization=organization)
    return signer_of(pem(leaf), key), leaf
