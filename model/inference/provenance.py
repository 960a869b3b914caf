"""What an image file itself says of where it comes from: shown beside the score, never part of it.

Everything here is easily stripped or forged: anybody can write it, and most platforms delete it.
Only a C2PA signature (`signatures.py`) says that somebody stood up for it, and then only that they
did.
"""

import functools
import html
import io
import itertools
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from PIL import ExifTags, Image

from imaging.decode import READABLE, without_warnings
from imaging.jpeg import before_scan, segments
from installed import install_extra
from model.inference import signatures
from model.inference.generators import is_named, is_signature, settings_across, settings_in
from model.inference.signatures import State, TrustList

log = logging.getLogger("ai_images_detector")

MEANING = (
    "What the file says of itself. It is easily stripped or forged, and never changes the score."
)
"""What must stand beside evidence wherever it is shown."""

MAX_TEXT = 300
"""Characters of a value that are kept."""

MAX_EVIDENCE = 20
"""Statements that are kept of one file; the last of more says how many are not shown."""


@dataclass(frozen=True)
class Evidence:
    """One thing that a file says.

    `kind` is what sort of thing: "C2PA", "source type" (IPTC's), "AI label" (China's GB 45438),
    "generator" (settings or the name that an image generator leaves), "camera", and "more" where
    `MAX_EVIDENCE` left some out. `value` is one printable line of at most `MAX_TEXT` characters,
    `where` says where in the file it stands. `suggests` is what it would mean if it were true:
    "AI", "camera", or "" where it says neither. `state` is what checking a C2PA signature gave, and
    "" for everything that is not signed.
    """

    kind: str
    value: str
    where: str
    suggests: Literal["AI", "camera", ""] = ""
    state: State | Literal[""] = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.value} ({self.where})"


def read_evidence(data: bytes, trust: TrustList | None = None) -> list[Evidence]:
    """Read what the bytes of an image file say; empty if nothing. At most `MAX_EVIDENCE`
    statements, those that suggest something first where there are more. It never raises, whatever
    the bytes are, and never asks the network.

    Signers are looked up in `trust`, which `signatures.usual_trust_list()` gives; without a list
    every signer is unknown.
    """
    found: list[Evidence] = []
    head = _without_pixels(data)
    for look in (functools.partial(_c2pa, trust=trust), _metadata):
        try:
            found += look(data, head)
        except Exception as error:  # hostile files make parsers raise almost anything
            log.debug("evidence: %s: %s", type(error).__name__, error, exc_info=True)
    found = list(dict.fromkeys(found))
    if len(found) <= MAX_EVIDENCE:
        return found
    kept = sorted(found, key=lambda one: not one.suggests)[: MAX_EVIDENCE - 1]
    left = f"{len(found) - len(kept):,} further statements are not shown"
    return [*kept, Evidence("more", left, "the whole file")]


# --- C2PA: signed manifests (https://c2pa.org/specifications) -------------------------------------


def _c2pa(data: bytes, head: bytes, trust: TrustList | None) -> Iterator[Evidence]:
    """The manifest that is embedded in a file; the library is loaded only for a file with one.

    The state comes first: no name that a file gives can push it out of the line, or precede it.
    """
    if not signatures.has_manifest(head):
        return
    if not signatures.is_readable():
        yield Evidence(
            "C2PA", "a manifest, which the library c2pa-python would read; "
            f"{install_extra('evidence')}", "C2PA",
        )  # fmt: skip
        return
    try:
        manifest = signatures.read_manifest(data, trust)
    except Exception as error:  # the library's own errors, of many kinds
        yield Evidence("C2PA", _line(f"a manifest that cannot be read: {error}"), "C2PA")
        return
    sources = list(dict.fromkeys(map(_source_type, manifest.source_types)))
    by = "signed by" if manifest.state == "trusted" else "signed in the name of"
    said = [f"{by} {manifest.signer}"]
    said += [f"made with {manifest.makers[0]}"] if manifest.makers else []
    said += map(_in_words, sources)
    # OpenAI signs "made with ChatGPT"; some signers leave the source type out.
    suggested = _suggested(sources) or (
        "AI" if any(is_named("claim_generator", name) for name in manifest.makers) else ""
    )
    value = f"{manifest.state} ({manifest.why}): {', '.join(said)}"
    yield Evidence("C2PA", _line(value), "C2PA manifest", suggested, manifest.state)


# As IPTC defines them (https://cv.iptc.org/newscodes/digitalsourcetype/): compositeSynthetic is a
# "mix or composite of several elements, at least one of which is Generative AI"; algorithmicMedia
# (a fractal) is "not based on any sampled training data", so it is not among them.
# trainedAlgorithmicData is C2PA's own term (https://c2pa.org/specifications).
_MADE_BY_AI = {
    "trainedAlgorithmicMedia": "AI-generated",
    "trainedAlgorithmicData": "AI-generated",
    "compositeWithTrainedAlgorithmicMedia": "edited with generative AI",
    "compositeSynthetic": "composite with AI-generated parts",
}
_TAKEN = {"digitalCapture", "computationalCapture", "negativeFilm", "positiveFilm", "print"}
_SPELLED = {name.lower(): name for name in (*_MADE_BY_AI, *_TAKEN)}


def _source_type(value: str) -> str:
    """Name of a source type from its address, its code (`digsrctype:print`) or the bare name, in
    the vocabulary's own spelling where it is one that speaks for a machine or a camera.
    """
    name = re.split(r"[/:#]", _line(value).rstrip("/ "))[-1].strip()
    return _SPELLED.get(name.replace(" ", "").lower(), name)


def _in_words(source: str) -> str:
    """A source type with what it means, where it speaks for a machine or a camera."""
    meaning = _MADE_BY_AI.get(source, "taken with a camera" if source in _TAKEN else "")
    return f"{meaning} ({source})" if meaning else source


def _suggested(sources: list[str]) -> Literal["AI", "camera", ""]:
    if _MADE_BY_AI.keys() & set(sources):
        return "AI"
    return "camera" if _TAKEN & set(sources) else ""


# --- where metadata stands: EXIF, XMP, texts ------------------------------------------------------


def _metadata(data: bytes, head: bytes) -> list[Evidence]:
    """All other kinds; no pixel is decoded."""
    is_jpeg, is_png = data.startswith(b"\xff\xd8"), data.startswith(_PNG)
    if is_jpeg and not any(mark in head for mark in _JPEG_MARKS):
        return []
    with without_warnings():  # odd metadata is what is looked for
        # Without its pixels Pillow finds what stands behind them in a PNG and decodes nothing.
        with Image.open(io.BytesIO(head if is_png else data), formats=READABLE) as image:
            info, exif = dict(image.info), _exif(image)
    packets = [info.pop("xmp", b""), info.pop("XML:com.adobe.xmp", b""), *_hidden_xmp(info, head)]
    xmp = "\n".join(_xmp_text(packet) for packet in packets if packet)[:_MAX_READ]
    skipped = {"exif", "icc_profile"}
    texts = _bounded({str(key): value for key, value in info.items() if key not in skipped})
    exif = _bounded(exif)
    found = [*_said_in_xmp(xmp), *_labels(xmp, "XMP")]
    for key, text in texts.items():
        where = f"text {_line(key)[:40]}"
        found += _labels(f'"AIGC":{text}' if key == "AIGC" else "", "PNG text")
        found += _generator(key, text, where)
    together = settings_across(texts)
    found += [Evidence("generator", _line(together), "texts", "AI")] if together else []
    for tag, text in exif.items():
        where = f"EXIF {tag}"
        found += [*_labels(text, where), *_generator(tag, text, where)]
    return found + _signed_by_grok(exif) + list(_camera(exif))


# EXIF, XMP (its extension too), a comment: a JPEG without them has nothing to say, and need not
# be parsed.
_EXTENDED_XMP = b"http://ns.adobe.com/xmp/extension/\0"
_JPEG_MARKS = (b"Exif\0", b"ns.adobe.com/xap/", _EXTENDED_XMP, b"\xff\xfe")
_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_CHUNKS = 100_000
_MAX_READ = 500_000  # characters of one text that are looked at: a large graph has 300,000
_MAX_READ_IN_ALL = 4_000_000


def _without_pixels(data: bytes) -> bytes:
    """What stands around the pixels of a JPEG or PNG, so that little is searched; of any other
    file, or an odd one, all of it.
    """
    if data.startswith(b"\xff\xd8"):
        return before_scan(data)
    if not data.startswith(_PNG):
        return data
    kept, at = [_PNG], len(_PNG)
    for _ in range(_MAX_CHUNKS):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind != b"IDAT":
            kept.append(data[at : at + 12 + length])
        at += 12 + length
        if kind == b"IEND" or at >= len(data):
            break
    return b"".join(kept)


def _bounded(values: Mapping[str, Any]) -> dict[str, str]:
    """Values as text, none longer than `_MAX_READ` and all of them `_MAX_READ_IN_ALL`."""
    texts, left = {}, _MAX_READ_IN_ALL
    for name, value in values.items():
        texts[name] = _text(value)[: min(left, _MAX_READ)]
        left -= len(texts[name])
    return {name: text for name, text in texts.items() if text}


def _exif(image: Image.Image) -> dict[str, Any]:
    """EXIF by the names of its tags; empty where it cannot be read."""
    info, raw = image.info, _raw_profile(image.info.get("Raw profile type APP1"))
    try:
        if image.format == "PNG" and not info.keys() & {"exif", "Raw profile type exif"}:
            base = Image.Exif()  # Pillow would decode the pixels in search of it
            if raw.startswith(b"Exif\0"):
                base.load(raw)
        else:
            base = image.getexif()
        tags = {**base, **base.get_ifd(ExifTags.IFD.Exif)}
    except Exception as error:  # XMP and texts of the same file are still read
        log.debug("EXIF: %s: %s", type(error).__name__, error)
        return {}
    return {
        ExifTags.TAGS.get(tag, str(tag)): (
            _windows_text(value) if tag in _WINDOWS_TAGS else _utf8(value)
        )
        for tag, value in tags.items()
    }


_WINDOWS_TAGS = range(0x9C9B, 0x9CA0)  # XPTitle, XPComment, XPAuthor, XPKeywords, XPSubject
_CODES = {b"ASCII\0\0\0": "ascii", b"UNICODE\0": "utf-16", b"JIS\0\0\0\0\0": "iso2022_jp"}


def _windows_text(value: Any) -> Any:
    """An XP tag as text: UTF-16 in bytes, whatever the type that the file declares."""
    try:
        return bytes(value).decode("utf-16-le", "replace") if len(value) > 1 else value
    except (TypeError, ValueError):
        return value


def _utf8(value: Any) -> Any:
    """A tag that Pillow took for Latin-1, as programs write it ("DALL·E"): UTF-8 where it is."""
    try:
        return value.encode("latin-1").decode("utf-8")
    except (AttributeError, UnicodeError):
        return value


def _text(value: Any) -> str:
    """Text of a value; a comment may begin with the name of its encoding. Numbers and structures
    are no text: "".
    """
    if not isinstance(value, bytes):
        return str(value).strip("\0") if isinstance(value, str) else ""
    encoding = _CODES.get(value[:8])
    if encoding is None:
        return value.decode("utf-8", "replace").strip("\0")
    if encoding == "utf-16":  # the byte order is often not said: whichever leaves more plain text
        options = [value[8:].decode(f"utf-16-{order}", "replace") for order in ("be", "le")]
        return max(options, key=lambda text: sum(c < "\u0250" for c in text))
    return value[8:].decode(encoding, "replace")


# What a terminal obeys: control sequences (ECMA-48), with their parameters, and titles.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?|\x1b."
)


def _line(text: str) -> str:
    """One printable line: a file must not be able to write to a terminal."""
    plain = _ESCAPES.sub(" ", text[: 20 * MAX_TEXT])
    plain = " ".join("".join(c if c.isprintable() else " " for c in plain).split())
    return plain if len(plain) <= MAX_TEXT else plain[: MAX_TEXT - 1] + "…"


# --- XMP (ISO 16684-1; where it stands in files: XMP specification part 3) ------------------------


def _hidden_xmp(info: Mapping[Any, Any], head: bytes) -> list[bytes]:
    """XMP that Pillow does not give: ImageMagick's raw profiles, a GIF's application extension,
    what goes on in further segments of a JPEG.
    """
    app1 = _raw_profile(info.get("Raw profile type APP1"))
    packets = [_raw_profile(info.get("Raw profile type xmp"))]
    packets += [app1.partition(b"\0")[2]] if b"ns.adobe.com/xap/" in app1[:40] else []
    if head.startswith(b"GIF8"):
        at = head.find(b"XMP DataXMP")
        end = head.find(b"\x01\xff\xfe\xfd", at)  # the "magic trailer" that leads parsers out
        packets += [head[at + 11 : end]] if 0 <= at < end else []
    if head.startswith(b"\xff\xd8"):
        parts = [head[one.start + 4 : one.end] for one in segments(head) if one.marker == 0xE1]
        start = len(_EXTENDED_XMP)  # then 32 characters of a hash, 4 bytes of length, 4 of offset
        parts = [part[start:] for part in parts if part.startswith(_EXTENDED_XMP)]
        parts.sort(key=lambda part: (part[:32], part[36:40]))
        packets.append(b"".join(part[40:] for part in parts))
    return packets


def _raw_profile(text: Any) -> bytes:
    """The bytes of ImageMagick's `Raw profile type ...`: name, length, lines of hexadecimals."""
    try:
        return bytes.fromhex(text[: 2 * _MAX_READ].split(None, 2)[2])
    except (TypeError, ValueError, IndexError):
        return b""


def _xmp_text(packet: bytes | str) -> str:
    if isinstance(packet, str):
        return packet
    packet = packet[: 4 * _MAX_READ]
    if b"\0" not in packet[:16]:
        return packet.decode("utf-8", "replace")
    return packet.decode("utf-16-be" if packet[:1] in (b"\0", b"\xfe") else "utf-16-le", "replace")


_MAX_VALUES = 30  # of one property: more than are shown


def _xmp_values(xmp: str, name: str) -> Iterator[str]:
    """Values of a property, at most `_MAX_VALUES` in each form, under any prefix or none: an
    attribute, the text of an element, or what its `rdf:resource` names.
    """
    attribute = rf"(?<=[\s:]){name}\s{{0,9}}=\s{{0,9}}(?:\"([^\"<>]*)\"|'([^'<>]*)')"
    for value in itertools.islice(re.finditer(attribute, xmp), _MAX_VALUES):
        yield html.unescape(value[1] or value[2] or "")
    opened = rf"<(?:[\w.-]{{1,40}}:)?{name}(\s[^<>]{{0,1000}})?>"
    closed = re.compile(rf"</(?:[\w.-]{{1,40}}:)?{name}\s{{0,9}}>")
    for element in itertools.islice(re.finditer(opened, xmp), _MAX_VALUES):
        resource = re.search(r"resource\s{0,9}=\s{0,9}[\"']([^\"'<>]*)", element[1] or "")
        end = closed.search(xmp, element.end(), element.end() + 100_000)
        if resource:
            yield html.unescape(resource[1])
        elif end:
            yield html.unescape(re.sub(r"<[^<>]*>", " ", xmp[element.end() : end.start()])).strip()


# Which program wrote it (xmp, tiff, stEvt), and where Draw Things and others keep settings.
_PROPERTIES = (
    "CreatorTool", "Software", "softwareAgent",
    "UserComment", "description", "parameters", "prompt", "workflow",
)  # fmt: skip

# What Google credits images of its models with, and photographs that they edited ("Credit: Edited
# with Google AI": https://www.fonearena.com/blog/438871/google-photos-ai-metadata-edited-photos.html).
_CREDIT = re.compile(r"(?:(?:Made|Edited) with|Made by) Google AI\.?", re.IGNORECASE)


def _said_in_xmp(xmp: str) -> Iterator[Evidence]:
    """IPTC's digital source type, the credit of Google's images, IPTC's "AI system used"
    (Photo Metadata Standard 2025.1), programs and their settings.
    """
    for value in _xmp_values(xmp, "DigitalSource(?:[Ff]ile)?Type"):
        name = _source_type(value)
        if name:
            yield Evidence("source type", _line(_in_words(name)), "XMP", _suggested([name]))
    for value in _xmp_values(xmp, "Credit"):
        if _CREDIT.fullmatch(value.strip()):
            yield Evidence("source type", _line(f"credit: {value}"), "XMP", "AI")
    for value in _xmp_values(xmp, "AISystemUsed"):
        if value.strip():
            yield Evidence("generator", _line(value), "XMP AISystemUsed", "AI")
    for name in _PROPERTIES:
        for value in _xmp_values(xmp, name):
            yield from _generator(name, value, f"XMP {name}")


def _generator(field: str, text: str, where: str) -> Iterator[Evidence]:
    """A generator that a field names, or whose settings stand in it."""
    settings = settings_in(text)
    if settings or is_named(field, text):
        yield Evidence("generator", _line(settings or text), where, "AI")


def _labels(text: str, where: str) -> Iterator[Evidence]:
    """The label that China asks of generators (GB 45438-2025): a JSON object named AIGC, with
    `Label` 1 for AI-generated, 2 for probably and 3 for suspected.
    """
    if "AIGC" not in text:
        return
    text = html.unescape(text)
    label = re.search(r'"Label"\s{0,9}:\s{0,9}"?([123])"?', text)
    if label:
        means = {"1": "AI-generated", "2": "probably AI-generated", "3": "suspected AI-generated"}
        maker = re.search(r'"ContentProducer"\s{0,9}:\s{0,9}"([^"]{1,100})"', text)
        by = f", by {maker[1]}" if maker else ""
        yield Evidence("AI label", _line(means[label[1]] + by), where, "AI")


# --- EXIF ----------------------------------------------------------------------------------------


_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def _signed_by_grok(exif: Mapping[str, str]) -> list[Evidence]:
    """xAI signs its pictures by a UUID as the artist and a signature in base64 as the description
    (remove-ai-watermarks, `xai_signature`).
    """
    artist, description = exif.get("Artist", "").strip(), exif.get("ImageDescription", "").strip()
    if re.fullmatch(_UUID, artist) and re.fullmatch(r"Signature: [\w+/]{40,1000}=*", description):
        return [Evidence("generator", _line(f"xAI: {description}"), "EXIF ImageDescription", "AI")]
    return []


def _camera(exif: Mapping[str, str]) -> Iterator[Evidence]:
    """Make, model and time, as a camera or a phone writes them."""
    make, model = (_line(exif.get(tag, "")) for tag in ("Make", "Model"))
    if not (make or model) or is_signature(make):
        return
    if any(re.match(r"\{|(prompt|workflow):\s*\{", text) for text in (make, model)):
        return  # a generator's settings
    # Many models begin with their make: "Canon", "Canon EOS 40D".
    camera = model if model.lower().startswith(make.lower()) else f"{make} {model}".strip()
    time = exif.get("DateTimeOriginal") or exif.get("DateTime") or ""
    yield Evidence("camera", _line(f"{camera}, {time}" if time else camera), "EXIF", "camera")
