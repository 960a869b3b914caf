"""What an image file itself says of where it comes from: shown beside the score, never part of it.

Everything here is easily stripped or forged: anybody can write it, and most platforms delete it.
Only a C2PA signature says that somebody stood up for it, and then only that they did.
"""

import functools
import html
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from PIL import ExifTags, Image

from imaging.decode import READABLE, without_warnings
from imaging.jpeg import before_scan

log = logging.getLogger("ai_images_detector")

MEANING = (
    "What the file says of itself. It is easily stripped or forged, and never changes the score."
)
"""What must stand beside evidence wherever it is shown."""

MAX_TEXT = 300
"""Characters of a value that are kept."""


@dataclass(frozen=True)
class Evidence:
    """One thing that a file says.

    `kind` is what sort of thing: "C2PA", "source type" (IPTC's), "AI label" (China's GB 45438),
    "generator" (settings that an image generator leaves), "camera". `value` is one printable line
    of at most `MAX_TEXT` characters, `where` says where in the file it stands. `suggests` is what
    it would mean if it were true: "AI", "camera", or "" where it says neither.
    """

    kind: str
    value: str
    where: str
    suggests: Literal["AI", "camera", ""] = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.value} ({self.where})"


def read_evidence(data: bytes) -> list[Evidence]:
    """What the bytes of an image file say; empty if nothing. It never raises, whatever they are,
    and never asks the network.
    """
    found: list[Evidence] = []
    head = _without_pixels(data)
    for look in (_c2pa, _metadata):
        try:
            found += look(data, head)
        except Exception as error:  # hostile files make parsers raise almost anything
            log.debug("evidence, %s: %s: %s", look.__name__, type(error).__name__, error)
    return list(dict.fromkeys(found))


# --- C2PA: signed manifests (https://c2pa.org/specifications) -------------------------------------


def _c2pa(data: bytes, head: bytes) -> Iterator[Evidence]:
    """The manifest that is embedded in a file; the library is loaded only for a file with one."""
    if b"jumb" not in head or b"c2pa" not in head:
        return
    reader = _c2pa_reader()
    if reader is None:
        yield Evidence(
            "C2PA", "a manifest, which the library c2pa-python would read; install the extra "
            "`evidence`, as `make setup` does", "C2PA",
        )  # fmt: skip
        return
    try:
        store = json.loads(reader(data))
    except Exception as error:  # the library's own errors, of many kinds
        yield Evidence("C2PA", _line(f"a manifest that cannot be read: {error}"), "C2PA")
        return
    active = store["manifests"][store["active_manifest"]]
    sources = _source_types(store["manifests"])
    signature = active.get("signature_info") or {}
    said = [f"signed by {signature.get('issuer') or signature.get('common_name') or 'nobody'}"]
    made = [info.get("name") for info in active.get("claim_generator_info") or []]
    made = [name for name in [*made, active.get("claim_generator")] if name]
    said += [f"made with {made[0]}"] if made else []
    said += map(_in_words, sources)
    said.append(_validity(store))
    yield Evidence("C2PA", _line(", ".join(said)), "C2PA manifest", _suggested(sources))


@functools.cache
def _c2pa_reader() -> Any:
    """Bytes -> the manifest store as JSON; None where the library is not installed."""
    try:
        import c2pa
    except ImportError:
        return None
    # A manifest may name addresses to fetch it or its certificate's state from: never asked.
    offline = {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_trust": False}
    context = c2pa.Context.from_dict({"verify": offline})

    def read(data: bytes) -> str:
        with c2pa.Reader(None, io.BytesIO(data), context=context) as reader:
            return reader.json()

    return read


def _validity(store: Mapping[str, Any]) -> str:
    """Whether the signature fits the file. Whose it is, is not checked: that takes a trust list."""
    state = store.get("validation_state")
    if state in ("Valid", "Trusted"):
        return "the signature fits the file (whether the signer is who it says was not checked)"
    codes = [status.get("code", "") for status in store.get("validation_status") or []]
    return f"NOT VALID: {codes[0] if codes else state}"


def _source_types(value: Any) -> list[str]:
    """Every `digitalSourceType` in a manifest store, by its last part."""
    if isinstance(value, Mapping):
        own = value.get("digitalSourceType")
        own = [own.rstrip("/").rpartition("/")[2]] if isinstance(own, str) and own else []
        inner = [name for child in value.values() for name in _source_types(child)]
        return list(dict.fromkeys(own + inner))
    if isinstance(value, list):
        return list(dict.fromkeys(name for child in value for name in _source_types(child)))
    return []


# https://cv.iptc.org/newscodes/digitalsourcetype/
_MADE_BY_AI = {
    "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia", "algorithmicMedia",
    "trainedAlgorithmicData",
}  # fmt: skip
_TAKEN = {"digitalCapture", "computationalCapture", "negativeFilm", "positiveFilm", "print"}


def _in_words(source: str) -> str:
    """A source type with what it means, where it speaks for a machine or a camera."""
    meaning = {"AI": "AI-generated", "camera": "taken with a camera", "": ""}[_suggested([source])]
    return f"{meaning} ({source})" if meaning else source


def _suggested(sources: list[str]) -> Literal["AI", "camera", ""]:
    if _MADE_BY_AI & set(sources):
        return "AI"
    return "camera" if _TAKEN & set(sources) else ""


# --- what Pillow finds: XMP, EXIF, the text of a PNG ----------------------------------------------


def _metadata(data: bytes, head: bytes) -> list[Evidence]:
    """All other kinds; no pixel is decoded."""
    is_jpeg, is_png = data.startswith(b"\xff\xd8"), data.startswith(_PNG)
    if is_jpeg and not any(mark in head for mark in _JPEG_MARKS):
        return []
    with without_warnings():  # odd metadata is what is looked for
        # Without its pixels Pillow finds what stands behind them in a PNG and decodes nothing.
        with Image.open(io.BytesIO(head if is_png else data), formats=READABLE) as image:
            info, exif = dict(image.info), _exif(image)
    texts = {
        str(key): _text(value) for key, value in info.items() if key not in ("exif", "icc_profile")
    }
    xmp = texts.pop("xmp", "") or texts.pop("XML:com.adobe.xmp", "")
    found = [*_iptc(xmp), *_labels(xmp, "XMP")]
    for key, text in texts.items():
        found += _labels(f'"AIGC":{text}' if key == "AIGC" else "", "PNG text")
        found += _settings(key, text, f"text {key!r}")
    for tag, text in exif.items():
        found += [*_labels(text, f"EXIF {tag}"), *_settings(tag, text, f"EXIF {tag}")]
    return found + list(_camera(exif))


# EXIF, XMP, a comment: a JPEG without them has nothing to say, and need not be parsed.
_JPEG_MARKS = (b"Exif\0", b"ns.adobe.com/xap/", b"\xff\xfe")
_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_CHUNKS = 100_000


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


def _exif(image: Image.Image) -> dict[str, str]:
    """EXIF by the names of its tags, as text."""
    if image.format == "PNG" and not image.info.keys() & {"exif", "Raw profile type exif"}:
        return {}  # Pillow would decode the pixels in search of it
    base = image.getexif()
    tags = {**base, **base.get_ifd(ExifTags.IFD.Exif)}
    return {ExifTags.TAGS.get(tag, str(tag)): _text(value) for tag, value in tags.items()}


_CODES = {b"ASCII\0\0\0": "ascii", b"UNICODE\0": "utf-16", b"JIS\0\0\0\0\0": "iso2022_jp"}


def _text(value: Any) -> str:
    """A value of any type as text; a comment may begin with the name of its encoding."""
    if not isinstance(value, bytes):
        return str(value)
    encoding = _CODES.get(value[:8])
    if encoding is None:
        return value.decode("utf-8", "replace")
    if encoding == "utf-16":  # the byte order is often not said: whichever leaves more plain text
        options = [value[8:].decode(f"utf-16-{order}", "replace") for order in ("be", "le")]
        return max(options, key=lambda text: sum(c < "\u0250" for c in text))
    return value[8:].decode(encoding, "replace")


def _line(text: str) -> str:
    """One printable line: a file must not be able to write to a terminal."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    plain = " ".join(plain.split())
    return plain if len(plain) <= MAX_TEXT else plain[: MAX_TEXT - 1] + "…"


def _iptc(xmp: str) -> Iterator[Evidence]:
    """IPTC's digital source type, and who is credited where that names AI (Google's images)."""
    types = re.findall(r"newscodes/digitalsourcetype/(\w+)", xmp)
    for name in dict.fromkeys(types):
        yield Evidence("source type", _in_words(name), "XMP", _suggested([name]))
    credit = re.search(r"photoshop:Credit(?:=[\"']|>)([^\"'<]{1,200})", xmp)
    if credit and re.search(r"\bAI\b", credit[1]):
        yield Evidence("source type", _line(f"credit: {html.unescape(credit[1])}"), "XMP", "AI")


def _labels(text: str, where: str) -> Iterator[Evidence]:
    """The label that China asks of generators (GB 45438-2025): a JSON object named AIGC, with
    `Label` 1 for AI-generated, 2 for probably and 3 for suspected.
    """
    text = html.unescape(text[:100_000])
    if "AIGC" not in text:
        return
    label = re.search(r'"Label"\s*:\s*"?([123])"?', text)
    if label:
        means = {"1": "AI-generated", "2": "probably AI-generated", "3": "suspected AI-generated"}
        maker = re.search(r'"ContentProducer"\s*:\s*"([^"]{1,100})"', text)
        by = f", by {maker[1]}" if maker else ""
        yield Evidence("AI label", _line(means[label[1]] + by), where, "AI")


# Where generators keep their settings: name of the text -> program. All of these are plain text or
# JSON that begins with the prompt or holds it.
_TEXTS = {
    "parameters": "Stable Diffusion web UI",
    "prompt": "ComfyUI", "workflow": "ComfyUI",
    "invokeai_metadata": "InvokeAI", "invokeai_graph": "InvokeAI", "sd-metadata": "InvokeAI",
    "Dream": "InvokeAI", "fooocus_scheme": "Fooocus", "generation_data": "TensorArt",
}  # fmt: skip

# Programs that name themselves in a text or an EXIF tag.
_PROGRAMS = re.compile(
    r"Stable ?Diffusion|ComfyUI|InvokeAI|NovelAI|Midjourney|DALL[-·. ]?E|Firefly|Fooocus|"
    r"Draw Things|SwarmUI|Imagen|Ideogram|Leonardo\.ai|AI[- ]generated|Made with Google AI|"
    r"FLUX\.[12]",
    re.IGNORECASE,
)
_SETTINGS = re.compile(r"\bSteps: \d+, .{0,200}(Sampler|Seed|CFG scale): ", re.DOTALL)
_GRAPH = re.compile(r"(prompt|workflow):\s*\{")  # ComfyUI's, in the tags Make and Model of a WebP
_MIDJOURNEY = re.compile(r"\bJob ID: [0-9a-f]{8}-[0-9a-f]{4}-")


def _settings(name: str, text: str, where: str) -> Iterator[Evidence]:
    """What a generator wrote: its settings under a known name, or its own name."""
    text = text[:100_000]
    if _SETTINGS.search(text):
        yield Evidence("generator", _line(f"Stable Diffusion settings: {text}"), where, "AI")
    elif _MIDJOURNEY.search(text):
        yield Evidence("generator", _line(f"Midjourney: {text}"), where, "AI")
    elif name in ("Make", "Model", "ImageDescription") and re.match(
        r"(prompt|workflow):\s*\{", text
    ):
        yield Evidence("generator", _line(f"ComfyUI: {text}"), where, "AI")  # in a WebP's EXIF
    elif name in _TEXTS and text.strip():
        prompt = _prompt_in(text) if name == "prompt" else text
        yield Evidence("generator", _line(f"{_TEXTS[name]}: {prompt}"), where, "AI")
    elif name in ("Software", "Source", "Title", "Description", "Comment", "comment", "Artist",
                  "ImageDescription", "UserComment", "Make", "Author"):  # fmt: skip
        if _PROGRAMS.search(text):
            yield Evidence("generator", _line(text), where, "AI")


def _prompt_in(graph: str) -> str:
    """The texts in a ComfyUI graph, which is JSON: node -> {class_type, inputs}."""
    try:
        nodes = json.loads(graph).values()
        texts = [node["inputs"].get("text") for node in nodes if isinstance(node, dict)]
        texts = [text for text in texts if isinstance(text, str) and text.strip()]
    except (ValueError, AttributeError, KeyError, RecursionError):
        return graph
    return " | ".join(texts) or graph


def _camera(exif: Mapping[str, str]) -> Iterator[Evidence]:
    """Make, model and time, as a camera or a phone writes them."""
    make, model = (_line(exif.get(tag, "")).strip("\0 ") for tag in ("Make", "Model"))
    if not (make or model) or _GRAPH.match(make) or _GRAPH.match(model):
        return
    # Many models begin with their make: "Canon", "Canon EOS 40D".
    camera = model if model.lower().startswith(make.lower()) else f"{make} {model}".strip()
    time = exif.get("DateTimeOriginal") or exif.get("DateTime") or ""
    yield Evidence("camera", _line(f"{camera}, {time}" if time else camera), "EXIF", "camera")
