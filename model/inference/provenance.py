"""Read what the metadata of an image file says about its origin: C2PA manifests, source type, AI
labels, settings of generators, camera data.

Main entry: `read_evidence(data, trust)` takes the bytes of an image file and the `TrustList`
(certificates) of C2PA signers, which `usual_trust_list()` in `signatures.py` returns. None (the
default): no signer is known. It returns a list of `Evidence`, at most `MAX_EVIDENCE`. Each has:

- `kind`: "C2PA", "source type", "AI label", "generator" or "camera". If the file has more than the
  maximum, the last entry has the kind "more"; its `value` says how many others are left out.
- `value`: a line of text.
- `where`: the place in the file.
- `suggests`: "AI", "camera" or "".
- `state` of a C2PA signature: "trusted", "valid, signer unknown" or "invalid"; else "".

The list may be empty, and nothing is ever raised.

The program shows this evidence next to the score, which does not depend on it. Metadata is easily
stripped or forged (`MEANING` is this warning); only a C2PA signature (`signatures.py`) proves
something, and only that its signer made the statement.
"""

import functools
import html
import itertools
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from console import counted
from escape import printable
from imaging.jpeg import APP1, segments
from imaging.quiet import without_warnings
from model.c2pa import signatures
from model.c2pa.signatures import State, TrustList
from model.inference.generators import is_named, is_signature, settings_across, settings_in
from model.inference.metadata import (
    MAX_CHUNKS,
    MAX_READ,
    exif_of,
    open_metadata,
    raw_profile,
    without_pixels,
)

log = logging.getLogger("ai_images_detector")

MEANING = (
    "What the file says of itself. It is easily stripped or forged, and never changes the score."
)
"""Explanation that must be shown with evidence."""

MAX_TEXT = 300
"""Maximum length of a value, in characters; longer values are cut."""

MAX_EVIDENCE = 20
"""Maximum number of statements per file. If a file has more, the last one gives the number of
statements that are not shown."""


@dataclass(frozen=True)
class Evidence:
    """One statement in a file about its origin.

    `kind` is "C2PA", "source type" (of IPTC), "AI label" (China's GB 45438), "generator" (settings
    or name of an image generator), "camera", "unreadable" (parts of the metadata are damaged or too
    large), or "more" (`MAX_EVIDENCE` was exceeded). `value` is
    one printable line of at most `MAX_TEXT` characters. `where` is the location in the file.
    `suggests` is the origin if the statement is true: "AI", "camera", or "" for neither. `state` is
    the result of checking a C2PA signature, "" without a signature.
    """

    kind: str
    value: str
    where: str
    suggests: Literal["AI", "camera", ""] = ""
    state: State | Literal[""] = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.value} ({self.where})"


def read_evidence(data: bytes, trust: TrustList | None = None) -> list[Evidence]:
    """Return the evidence in the bytes of an image file; may be empty.

    Returns at most `MAX_EVIDENCE` statements. If a file has more, statements that suggest an origin
    come first. Never raises, whatever the bytes are, and never uses the network. C2PA signers are
    checked against `trust` (see `signatures.usual_trust_list`); with None every signer is unknown.
    """
    evidence: list[Evidence] = []
    head = without_pixels(data)
    for look in (functools.partial(_c2pa, trust=trust), _metadata):
        try:
            for item in look(data, head):  # keep the items before an error
                evidence.append(item)
        except Exception as error:  # hostile files cause any exception
            log.debug("evidence: %s: %s", type(error).__name__, error, exc_info=True)
    evidence = list(dict.fromkeys(evidence))
    if len(evidence) <= MAX_EVIDENCE:
        return evidence
    kept = sorted(evidence, key=lambda item: not item.suggests)[: MAX_EVIDENCE - 1]
    left = f"{len(evidence) - len(kept):,} further statements are not shown"
    return [*kept, Evidence("more", left, "the whole file")]


# --- C2PA: signed manifests (https://c2pa.org/specifications) -------------------------------------


def _c2pa(data: bytes, head: bytes, trust: TrustList | None) -> Iterator[Evidence]:
    """Yield the evidence of the C2PA manifest in a file, if any. The library `c2pa` is imported
    only for a file with a manifest.

    The value begins with the state of the signature. So no name in the file can come before the
    state, or make it be cut off. Each ingredient that states an origin is a statement of its own,
    without a state: the signer of the file does not vouch for it.
    """
    if not signatures.has_manifest(head):
        return
    if not signatures.is_readable():
        yield Evidence(
            "C2PA", "a manifest; reading it needs the library of the extra `evidence`: "
            "pip install c2pa-python", "C2PA",  # without paths: visitors of the page see it
        )  # fmt: skip
        return
    try:
        manifest = signatures.read_manifest(data, trust)
    except Exception as error:  # the library has many types of errors
        yield Evidence("C2PA", _line(f"a manifest that cannot be read: {error}"), "C2PA")
        return
    by = "signed by" if manifest.state == "trusted" else "signed in the name of"
    said, suggested = _claimed(manifest.claim, by)
    value = f"{manifest.state} ({manifest.why}): {said}"
    yield Evidence("C2PA", _line(value), "C2PA manifest", suggested, manifest.state)
    for claim in manifest.earlier:
        said, suggested = _claimed(claim, "signed in the name of")
        if claim.source_types or suggested:
            value = f"not checked, of an earlier version or a part: {said}"
            yield Evidence("C2PA", _line(value), "C2PA ingredient", suggested)


def _claimed(claim: signatures.Claim, by: str) -> tuple[str, Literal["AI", "camera", ""]]:
    """Return a C2PA claim in words, which begin with `by`, and the origin that it suggests."""
    sources = list(dict.fromkeys(map(_source_type, claim.source_types)))
    made = [f"made with {claim.makers[0]}"] if claim.makers else []
    # Some signers state no source type, but name a generator, such as "made with ChatGPT".
    suggested = _suggested(sources) or (
        "AI" if any(is_named("claim_generator", name) for name in claim.makers) else ""
    )
    return ", ".join([f"{by} {claim.signer}", *made, *map(_in_words, sources)]), suggested


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
    """Return the name of a source type, given as URL, as code (`digsrctype:print`) or as bare name.
    A source type of AI or camera gets the spelling of the IPTC vocabulary.
    """
    name = re.split(r"[/:#]", _line(value).rstrip("/ "))[-1].strip()
    return _SPELLED.get(name.replace(" ", "").lower(), name)


def _in_words(source: str) -> str:
    """Return a source type as text, with its meaning if it suggests AI or camera."""
    meaning = _MADE_BY_AI.get(source, "taken with a camera" if source in _TAKEN else "")
    return f"{meaning} ({source})" if meaning else source


def _suggested(sources: list[str]) -> Literal["AI", "camera", ""]:
    if _MADE_BY_AI.keys() & set(sources):
        return "AI"
    return "camera" if _TAKEN & set(sources) else ""


# --- metadata containers: EXIF, XMP, texts --------------------------------------------------------


def _metadata(data: bytes, head: bytes) -> Iterator[Evidence]:
    """Yield all evidence other than C2PA. No pixel is decoded."""
    if data.startswith(b"\xff\xd8") and not any(mark in head for mark in _JPEG_MARKS):
        return
    with without_warnings():  # Pillow warns about odd metadata
        image, unreadable = open_metadata(data, head)
        with image:
            info, exif = dict(image.info), exif_of(image)
    if unreadable:
        yield Evidence(
            "unreadable", f"{counted(unreadable, 'part')} of the metadata, damaged or too large",
            "the whole file",
        )  # fmt: skip
    packets = [info.pop("xmp", b""), info.pop("XML:com.adobe.xmp", b""), *_hidden_xmp(info, head)]
    xmp = "\n".join(_xmp_text(packet) for packet in packets if packet)[:MAX_READ]
    skipped = {"exif", "icc_profile"}
    texts = _bounded({str(key): value for key, value in info.items() if key not in skipped})
    exif = _bounded(exif)
    yield from _said_in_xmp(xmp)
    yield from _labels(xmp, "XMP")
    for key, text in texts.items():
        yield from _labels(f'"AIGC":{text}' if key == "AIGC" else "", "PNG text")
        yield from _generator(key, text, f"text {_line(key)[:40]}")
    if together := settings_across(texts):
        yield Evidence("generator", _line(together), "texts", "AI")
    for tag, text in exif.items():
        yield from _labels(text, f"EXIF {tag}")
        yield from _generator(tag, text, f"EXIF {tag}")
    yield from _signed_by_grok(exif)
    yield from _camera(exif)


# Marks of EXIF, XMP, extended XMP and comments. A JPEG without any of them is not parsed.
_EXTENDED_XMP = b"http://ns.adobe.com/xmp/extension/\0"
_JPEG_MARKS = (b"Exif\0", b"ns.adobe.com/xap/", _EXTENDED_XMP, b"\xff\xfe")
_MAX_READ_IN_ALL = 4_000_000


def _bounded(values: Mapping[str, Any]) -> dict[str, str]:
    """Convert values to text, each of at most `MAX_READ` characters, all together of at most
    `_MAX_READ_IN_ALL`. Empty texts are dropped.
    """
    texts, left = {}, _MAX_READ_IN_ALL
    for name, value in values.items():
        texts[name] = _text(value)[: min(left, MAX_READ)]
        left -= len(texts[name])
    return {name: text for name, text in texts.items() if text}


_CODES = {b"ASCII\0\0\0": "ascii", b"UNICODE\0": "utf-16", b"JIS\0\0\0\0\0": "iso2022_jp"}


def _text(value: Any) -> str:
    """Return a value as text; "" for numbers and structures. A comment may begin with the name of
    its encoding.
    """
    if not isinstance(value, bytes):
        return str(value).strip("\0") if isinstance(value, str) else ""
    encoding = _CODES.get(value[:8])
    if encoding is None:
        return value.decode("utf-8", "replace").strip("\0")
    if encoding == "utf-16":  # no byte order: choose the more plausible text
        options = [value[8:].decode(f"utf-16-{order}", "replace") for order in ("be", "le")]
        return max(options, key=lambda text: sum(c < "\u0250" for c in text))
    return value[8:].decode(encoding, "replace")


# Terminal escape sequences: control sequences (ECMA-48) with their parameters, and titles.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?|\x1b."
)


def _line(text: str) -> str:
    """Return one printable line of at most `MAX_TEXT` characters. A file must not be able to send
    escape sequences to a terminal.
    """
    plain = " ".join(printable(_ESCAPES.sub(" ", text[: 20 * MAX_TEXT]), " ").split())
    return plain if len(plain) <= MAX_TEXT else plain[: MAX_TEXT - 1] + "…"


# --- XMP (ISO 16684-1; its location in files: XMP specification part 3) ---------------------------


def _hidden_xmp(info: Mapping[Any, Any], head: bytes) -> list[bytes]:
    """Return XMP packets that Pillow does not return: ImageMagick's raw profiles, a GIF's
    application extension, and extended XMP in further segments of a JPEG.
    """
    app1 = raw_profile(info.get("Raw profile type APP1"))
    packets = [raw_profile(info.get("Raw profile type xmp"))]
    packets += [app1.partition(b"\0")[2]] if b"ns.adobe.com/xap/" in app1[:40] else []
    if head.startswith(b"GIF8"):
        at = head.find(b"XMP DataXMP")
        end = head.find(b"\x01\xff\xfe\xfd", at)  # start of the "magic trailer" after the packet
        packets += [head[at + 11 : end]] if 0 <= at < end else []
    if head.startswith(b"\xff\xd8"):
        every = itertools.islice(segments(head), MAX_CHUNKS)
        parts = [head[part.start + 4 : part.end] for part in every if part.marker == APP1]
        start = len(_EXTENDED_XMP)  # followed by a hash (32 bytes), a length (4) and an offset (4)
        parts = [part[start:] for part in parts if part.startswith(_EXTENDED_XMP)]
        parts.sort(key=lambda part: (part[:32], part[36:40]))
        packets.append(b"".join(part[40:] for part in parts))
    return packets


def _xmp_text(packet: bytes | str) -> str:
    if isinstance(packet, str):
        return packet
    packet = packet[: 4 * MAX_READ]
    if b"\0" not in packet[:16]:
        return packet.decode("utf-8", "replace")
    return packet.decode("utf-16-be" if packet[:1] in (b"\0", b"\xfe") else "utf-16-le", "replace")


def _unescaped(text: str) -> str:
    """Replace HTML entities such as `&amp;`; return the text unchanged if one is impossible."""
    try:
        return html.unescape(text)
    except ValueError:  # an entity with thousands of digits
        return text


_MAX_VALUES = 30  # values read of one property; fewer are shown


def _xmp_values(xmp: str, name: str) -> Iterator[str]:
    """Yield the values of an XMP property with any prefix or none, at most `_MAX_VALUES` per form:
    an attribute; an element's text or `rdf:resource`.
    """
    attribute = rf"(?<=[\s:]){name}\s{{0,9}}=\s{{0,9}}(?:\"([^\"<>]*)\"|'([^'<>]*)')"
    for value in itertools.islice(re.finditer(attribute, xmp), _MAX_VALUES):
        yield _unescaped(value[1] or value[2] or "")
    opened = rf"<(?:[\w.-]{{1,40}}:)?{name}(\s[^<>]{{0,1000}})?>"
    closed = re.compile(rf"</(?:[\w.-]{{1,40}}:)?{name}\s{{0,9}}>")
    for element in itertools.islice(re.finditer(opened, xmp), _MAX_VALUES):
        resource = re.search(r"resource\s{0,9}=\s{0,9}[\"']([^\"'<>]*)", element[1] or "")
        end = closed.search(xmp, element.end(), element.end() + 100_000)
        if resource:
            yield _unescaped(resource[1])
        elif end:
            yield _unescaped(re.sub(r"<[^<>]*>", " ", xmp[element.end() : end.start()])).strip()


# Properties that name the program (xmp, tiff, stEvt) or contain settings (Draw Things and others).
_PROPERTIES = (
    "CreatorTool", "Software", "softwareAgent",
    "UserComment", "description", "parameters", "prompt", "workflow",
)  # fmt: skip

# Credit that Google writes into images of its models and into photographs edited by them ("Credit:
# Edited with Google AI":
# https://www.fonearena.com/blog/438871/google-photos-ai-metadata-edited-photos.html).
_CREDIT = re.compile(r"(?:(?:Made|Edited) with|Made by) Google AI\.?", re.IGNORECASE)


def _said_in_xmp(xmp: str) -> Iterator[Evidence]:
    """Yield the evidence in XMP: IPTC's digital source type, Google's credit, IPTC's "AI system
    used" (Photo Metadata Standard 2025.1), and generators with their settings.
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
    """Yield the generator that a field names or whose settings it contains, if any."""
    settings = settings_in(text)
    if settings or is_named(field, text):
        yield Evidence("generator", _line(settings or text), where, "AI")


def _labels(text: str, where: str) -> Iterator[Evidence]:
    """Yield the AI label that China requires (GB 45438-2025), if any: a JSON object named AIGC,
    with `Label` 1 for AI-generated, 2 for probably and 3 for suspected AI-generated.
    """
    if "AIGC" not in text:
        return
    text = _unescaped(text)
    label = re.search(r'"Label"\s{0,9}:\s{0,9}"?([123])"?', text)
    if label:
        means = {"1": "AI-generated", "2": "probably AI-generated", "3": "suspected AI-generated"}
        maker = re.search(r'"ContentProducer"\s{0,9}:\s{0,9}"([^"]{1,100})"', text)
        by = f", by {maker[1]}" if maker else ""
        yield Evidence("AI label", _line(means[label[1]] + by), where, "AI")


# --- EXIF ----------------------------------------------------------------------------------------


_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def _signed_by_grok(exif: Mapping[str, str]) -> list[Evidence]:
    """Return the evidence that xAI made the image: it writes a UUID as the artist and a base64
    signature as the description (remove-ai-watermarks, `xai_signature`).
    """
    artist, description = exif.get("Artist", "").strip(), exif.get("ImageDescription", "").strip()
    if re.fullmatch(_UUID, artist) and re.fullmatch(r"Signature: [\w+/]{40,1000}=*", description):
        return [Evidence("generator", _line(f"xAI: {description}"), "EXIF ImageDescription", "AI")]
    return []


def _camera(exif: Mapping[str, str]) -> Iterator[Evidence]:
    """Yield make, model and time as written by a camera or a phone, if any."""
    make, model = (_line(exif.get(tag, "")) for tag in ("Make", "Model"))
    if not (make or model) or is_signature(make):
        return
    if any(re.match(r"\{|(prompt|workflow):\s*\{", text) for text in (make, model)):
        return  # the text is a generator's settings
    # Many model names begin with the make: "Canon", "Canon EOS 40D".
    camera = model if model.lower().startswith(make.lower()) else f"{make} {model}".strip()
    time = exif.get("DateTimeOriginal") or exif.get("DateTime") or ""
    yield Evidence("camera", _line(f"{camera}, {time}" if time else camera), "EXIF", "camera")
