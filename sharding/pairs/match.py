"""Encode the fake image of a pair like the file of its real partner, so that only pixels differ.

Main entry: `encode_like(upright, partner, pixels, facts)` returns the bytes of a JPEG, PNG or WebP
with the partner's quality, chroma subsampling, orientation, alpha and metadata. The metadata that
is kept depends on the format:

- PNG: EXIF and the color profile.
- WebP: EXIF, the color profile and XMP.
- JPEG: everything but a list of further images (MPF).

The arguments:

- `upright`: pixels of the fake image, uint8 (height, width, 3) RGB, of the same size as `pixels`.
- `partner`: bytes of the real image's file, a JPEG, PNG or WebP.
- `pixels` and `facts`: the decoded pixels of the partner (same dtype and layout) and its `Facts`
  (format, size, JPEG quality, EXIF orientation, ...); both are fields of `prepare(partner)` of
  imaging/decode.py.

All pixels are upright, that is, already turned by the EXIF orientation. If all pixels of the
partner are gray, the fake image becomes gray too. `encode_like()` raises `NoPair` if Pillow cannot
read or write the metadata, or if the facts of the new file, which it decodes again, differ from
`facts`.

Call `refuse_partner(data, facts)` first: it takes the partner's bytes and facts, returns nothing,
and raises `NoPair` if no such file can be written. `CHROMA_NAMES` maps "420" and others to Pillow's
names of chroma subsamplings.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from imaging import jpeg
from imaging.decode import Facts, prepare
from imaging.orientation import is_transposed, mirrored, webp_chunks
from imaging.quiet import without_warnings

CHROMA_NAMES = {"420": "4:2:0", "422": "4:2:2", "444": "4:4:4"}
"""Pillow's name of each chroma subsampling in the index, except for Gray."""

_METADATA = frozenset((*range(0xE0, 0xF0), jpeg.COM))


class NoPair(Exception):
    """Error of an image that gets no partner; images are counted by the message, the reason."""


def refuse_partner(data: bytes, facts: Facts) -> None:
    """Check that a partner of this image can be encoded, before the decoder runs.

    Raises:
        NoPair: it cannot; the message is the reason.
    """
    if facts.format == "JPEG" and facts.chroma not in jpeg.CHROMAS:
        raise NoPair(f"JPEG of chroma {facts.chroma}, which the encoder does not write")
    with _readable(), _opened(data, facts.format) as image:
        mode = image.mode
    if mode in ("P", "1"):
        raise NoPair("palette image, whose few colors a decoder does not keep")


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Turn Pillow's errors on metadata into `NoPair`."""
    try:
        with without_warnings():
            yield
    except (OSError, ValueError, SyntaxError) as error:
        raise NoPair("metadata that Pillow does not read and write") from error


def encode_like(upright: np.ndarray, partner: bytes, pixels: np.ndarray, facts: Facts) -> bytes:
    """Encode `upright`, (height, width, 3) uint8 RGB, like the file `partner`; returns the bytes.

    `pixels` are the partner's upright pixels, and `facts` its facts.

    Raises:
        NoPair: the facts of the new file differ.
    """
    image = Image.fromarray(_stored(upright, facts.orientation))
    if _is_gray(pixels):  # a fake with color would differ from a gray partner
        image = image.convert("L")
        image = image if facts.chroma == "Gray" else image.convert("RGB")
    with _readable(), _opened(partner, facts.format) as original:
        if facts.format == "JPEG":
            data = _jpeg_like(image, partner, original, facts.chroma)
        else:
            original.load()
            data = _png_or_webp_like(image, partner, original, facts.format)
    _check_alike(data, facts)
    return data


def _check_alike(data: bytes, facts: Facts) -> None:
    made = prepare(data).facts
    differing = [name for name, value in vars(facts).items() if getattr(made, name) != value]
    if differing:
        raise NoPair(f"{', '.join(differing)} cannot be written as in the partner")


def _opened(data: bytes, image_format: str) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=[image_format])


def _stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and mirror upright pixels as a file stores them; inverse of `orientation.upright`."""
    rows, columns = mirrored(orientation)
    pixels = upright[:: -1 if rows else 1, :: -1 if columns else 1]
    return np.ascontiguousarray(pixels.swapaxes(0, 1) if is_transposed(orientation) else pixels)


def _is_gray(pixels: np.ndarray) -> bool:
    return bool((pixels == pixels[:, :, :1]).all())


def _save(image: Image.Image, image_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def _jpeg_like(image: Image.Image, partner: bytes, original: Image.Image, chroma: str) -> bytes:
    """Encode a JPEG with the partner's quantization tables, chroma, progression and metadata.

    Huffman tables are optimized where the partner's are not the standard ones.
    """
    tables = original.quantization  # type: ignore[attr-defined]
    options: dict[str, Any] = {"qtables": tables, "progressive": False}
    if chroma != "Gray":
        image = image.convert("RGB")
        options["subsampling"] = CHROMA_NAMES[chroma]
    else:
        image = image.convert("L")
    markers = [segment.marker for segment in jpeg.segments(jpeg.before_scan(partner))]
    if jpeg.PROGRESSIVE in markers:
        options["progressive"] = True
    data = _save(image, "JPEG", **options)
    if jpeg.PROGRESSIVE not in markers and _huffman(data) != _huffman(partner):
        data = _save(image, "JPEG", **options, optimize=True)
    own = b"".join(data[start:end] for marker, start, end in _header(data) if marker in _METADATA)
    return data[:2] + b"".join(_metadata(partner)) + data[2 + len(own) :]


def _header(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the segments before the pixels, as marker, start and end."""
    for marker, start, end in jpeg.lenient_segments(data):
        if marker == jpeg.SOS:
            return
        yield marker, start, end


def _huffman(data: bytes) -> set[bytes]:
    """Return the Huffman tables as a set, because encoders write them in one segment or in four."""
    tables: set[bytes] = set()
    for marker, start, end in _header(data):
        at = start + 4
        while marker == jpeg.DHT and at + 17 <= end:
            length = 17 + sum(data[at + 1 : at + 17])
            tables.add(data[at : at + length])
            at += length
    return tables


def _metadata(data: bytes) -> Iterator[bytes]:
    """Yield the metadata segments of a JPEG, without the directory of further images (MPF)."""
    for marker, start, end in _header(data):
        if marker in _METADATA and data[start + 4 : start + 8] != b"MPF\0":
            yield data[start:end]


def _png_or_webp_like(
    image: Image.Image, partner: bytes, original: Image.Image, image_format: str
) -> bytes:
    """Encode a PNG or WebP in the partner's mode, with its alpha, EXIF and color profile."""
    alpha = original.getchannel("A") if original.mode in ("LA", "RGBA") else None
    image = image.convert("L" if original.mode in ("L", "LA") else "RGB")
    if alpha:
        image.putalpha(alpha)
    kept = {key: original.info[key] for key in ("exif", "icc_profile") if original.info.get(key)}
    if image_format == "PNG":
        return _save(image, "PNG", compress_level=6, **kept)
    if original.info.get("xmp"):
        kept["xmp"] = original.info["xmp"]
    if _is_lossless(partner):
        return _save(image, "WEBP", lossless=True, exact=True, **kept)
    return _save(image, "WEBP", quality=_webp_quality(original, len(partner), kept), **kept)


def _is_lossless(data: bytes) -> bool:
    """Return whether a WebP has a chunk of a lossless image."""
    return any(kind == b"VP8L" for kind, _, _ in webp_chunks(data))


def _webp_quality(original: Image.Image, size: int, kept: dict[str, Any]) -> int:
    """Return the quality at which the partner's pixels are encoded to a file of nearly its size.

    A WebP does not store its quality.
    """
    low, high, sizes = 1, 100, {}
    while low < high:
        middle = (low + high) // 2
        sizes[middle] = len(_save(original, "WEBP", quality=middle, **kept))
        low, high = (middle + 1, high) if sizes[middle] < size else (low, middle)
    sizes[low] = len(_save(original, "WEBP", quality=low, **kept))
    return min(sizes, key=lambda quality: (abs(sizes[quality] - size), quality))
