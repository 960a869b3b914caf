"""Name the format of an image by its first bytes, to say why a file cannot be opened.

Main entries, which take `data`, the bytes of a file:

- `format_of(data)` returns the format as Pillow calls it ("TIFF", "HEIF", ...), or "" for bytes
  that begin like none that is read. TGA and DIB have no signature. Nothing is raised.
- `unread_kind(data)` names a kind of image that is not read, such as "JPEG XL", or returns "".
- `is_cut_off(data, name)` returns True if the header of a WebP or TIFF (`name`: "WEBP" or "TIFF")
  points beyond the end of the file.
- `why_not_opened(data, said)` returns the message about a file that Pillow does not open. `said` is
  what the decoder said, "" if none took the file.
"""

import re

from imaging import jpeg, png
from imaging.av1 import Boxes

_SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": re.escape(png.SIGNATURE),
    "WEBP": rb"RIFF.{4}WEBP",
    "GIF": rb"GIF8",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "BMP": rb"BM.{13}\0\0\0",  # the length of the second header is below 256
    "JPEG2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "QOI": rb"qoif",
    "PPM": rb"P[1-6]\s",
    "AVIF": rb".{4}ftyp(.{4})*?avi[fs]",
    "HEIF": rb".{4}ftyp(.{4})*?(hei[cmsx]|hev[cx]|mif1|msf1)",
}
"""Patterns of the first bytes by format. A file of the kind `ftyp` lists its brands, of 4 bytes."""

_PROLOG = rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(?:<!--(?:(?!-->).)*+-->\s*)*+"
"""Pattern of what precedes the first element of SVG and HTML. Comments are possessive (`*+`): a
comment that could end in two places would double the time per comment.
"""

_UNREAD = {
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "JPEG XR": rb"II\xbc",
    "PSD": rb"8BPS",
    "XCF": rb"gimp xcf",
    "a camera RAW": rb"IIRO|IIRS|MMOR|IIU\0|FUJIFILMCCD-RAW|.{4}ftypcrx |FOVb|\0MRM|II.{4}HEAPCCDR",
    "ICO": rb"\0\0\x01\0",
    "CUR": rb"\0\0\x02\0[^\0]\0",  # a TGA with the same first bytes has zeros here
    "ICNS": rb"icns",
    "DDS": rb"DDS ",
    "KTX": rb"\xabKTX ",
    "PAM": rb"P7\s",
    "PFM in color": rb"PF\s",
    "SGI": rb"\x01\xda[\0\1][\1\2]\0[\1-\3]",
    "PCX": rb"\x0a[\0\2-\5]\x01[\1\2\4\x08]",
    "Sun raster": rb"\x59\xa6\x6a\x95",
    "OpenEXR": rb"\x76\x2f\x31\x01",
    "Radiance HDR": rb"#\?(RADIANCE|RGBE)\s",
    "DPX": rb"SDPX|XPDS",
    "FITS": rb"SIMPLE  =",
    "DICOM": rb"\0{128}DICM",
    "MNG": rb"[\x8a\x8b][MJ]NG\r\n",
    "BPG": rb"BPG\xfb",
    "FLIF": rb"FLIF",
    "DjVu": rb"AT&TFORM",
    "XPM": rb"/\* XPM \*/",
    "XBM": rb"#define \w+_width ",
    "SVG": _PROLOG + rb"<(!DOCTYPE )?svg[\s>]",
    "EMF": rb"\x01\0\0\0.{36} EMF",
    "WMF": rb"\xd7\xcd\xc6\x9a",
    "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
    "PDF": rb"%PDF-",
}
"""Patterns of the first bytes of images and pages that are not read."""

_ARCHIVES = {
    "a ZIP": rb"PK\x03\x04",
    "a tar": rb".{257}ustar",
    "a gzip": rb"\x1f\x8b",
    "a bzip2": rb"BZh[1-9]",
    "an xz": rb"\xfd7zXZ",
    "a Zstandard": rb"\x28\xb5\x2f\xfd",
    "a 7z": rb"7z\xbc\xaf\x27\x1c",
    "a RAR": rb"Rar!\x1a\x07",
}
"""Patterns of the first bytes of archives."""

_OTHER_FILES = {
    "a video: export one picture of it (a live photo has a still image, too)": (
        rb".{4}(ftyp|moov|mdat|wide)|\x1a\x45\xdf\xa3|RIFF.{4}AVI |FLV\x01|\0\0\x01[\xb3\xba]"
        rb"|\x30\x26\xb2\x75\x8e\x66\xcf\x11|\x47.{187}\x47"
    ),
    "an audio file: name an image": rb"ID3|OggS|fLaC|RIFF.{4}WAVE",
    "a Git LFS pointer to a file: fetch the file itself (git lfs pull)": rb"version https://git-lfs",
    "a web page: download the image itself": (
        rb"(?i:" + _PROLOG + rb"<(!doctype )?(html|head|body)\b)"
    ),
    "an old Office document: save the images in it as files": rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "metadata that macOS keeps of a file: use the file itself": rb"\0\x05\x16[\0\7]",
}
"""Kinds of other files, with what to do, and patterns of their first bytes."""

_PICTURES_OF_HEIF = {
    "H.264": rb".{4}ftyp(.{4})*?avc[is]",
    "VVC": rb".{4}ftyp(.{4})*?vvi[cs]",
    "JPEG": rb".{4}ftyp(.{4})*?(jpeg|jpgs)",
    "JPEG 2000": rb".{4}ftyp(.{4})*?j2k[is]",
}
"""Patterns of the first bytes of an HEIF whose pictures are compressed in another way than HEVC."""

_SIGNATURE_BYTES = 300
"""Bytes in which a signature is searched: brands of an AVIF or HEIF, a tar after 257."""


def format_of(data: bytes) -> str:
    """Return the format, as Pillow calls it, whose signature the bytes have, or ""."""
    return _first_match(_SIGNATURES, data)


def _first_match(signatures: dict[str, bytes], data: bytes) -> str:
    start = data[:_SIGNATURE_BYTES]
    if start[4:8] == b"ftyp":
        start = start[: int.from_bytes(start[:4], "big")]
    fits = (name for name, pattern in signatures.items() if re.match(pattern, start, re.DOTALL))
    return next(fits, "")


def unread_kind(data: bytes) -> str:
    """Name the kind of an image that is not read: a format, or a kind of JPEG. Returns "" for every
    other file.
    """
    return jpeg.unread_kind(data) or _first_match(_UNREAD, data)


def is_cut_off(data: bytes, name: str) -> bool:
    """Return whether the header of a WebP or TIFF points beyond the end of the file."""
    if name == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)  # length in the RIFF header
    if name == "TIFF" and data[2:4] in (b"*\0", b"\0*"):
        start = int.from_bytes(data[4:8], "little" if data.startswith(b"II") else "big")
        return start >= len(data)  # start of the TIFF directory
    return False


def why_not_opened(data: bytes, said: str) -> str:
    """Return the message about a file that Pillow does not open. `said` is what the decoder said,
    "" if none took the file.
    """
    name = format_of(data)
    subject = f"{name} does not decode: " if name else ""
    if is_cut_off(data, name):
        return f"{subject}premature end of the file"
    if said:
        return f"{subject}damaged header: {said}"
    if name == "HEIF" and (kind := _kind_of_heif(data)):
        return f"{subject}{kind}"
    if name:
        return (
            f"{subject}it is of a kind that is not read, or its header is damaged or cut off; "
            "export it as PNG, or copy the file again"
        )
    no_image = "not an image this program reads"
    if archive := _first_match(_ARCHIVES, data):
        return (
            f"{no_image} but {archive} archive: unpack it and use the images in it (in a "
            "terminal, predict reads ZIP and tar archives)"
        )
    if kind := _first_match(_OTHER_FILES, data):
        return f"{no_image} but {kind}"
    if not data.strip(b"\0"):
        return f"{no_image} but zero bytes: copy or download it again"
    start = f"it begins with {_readable(data[:8])}"
    if _is_text(data[:_SIGNATURE_BYTES]):
        return f"{no_image} but text ({start}): name an image"
    return f"{no_image} ({start}); if it is an image, export it as PNG"


def _kind_of_heif(data: bytes) -> str:
    """Describe a kind of HEIF that is not read, and what to do; "" for every other file."""
    if next(Boxes(data).inside(0, len(data), b"moov"), None):
        return (
            "it is a sequence of pictures (a burst or an animation), of which none can be read; "
            "export one of them as PNG"
        )
    if other := _first_match(_PICTURES_OF_HEIF, data):
        return f"its picture is compressed as {other}, and only HEVC is read; export it as PNG"
    return ""


def _is_text(start: bytes) -> bool:
    """Return whether the first bytes of a file are text in UTF-8 or UTF-16."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = start[: len(start) // 2 * 2].decode("utf-16", "replace")
    else:
        text = start.decode("utf-8", "surrogateescape").rstrip(_CUT)  # a character may be cut
    return all(c.isprintable() or c in "\t\r\n\ufeff" for c in text) and bool(text)


_CUT = "".join(map(chr, range(0xDC80, 0xDD00)))
"""Bytes that are not UTF-8, as `surrogateescape` decodes them."""


def _readable(data: bytes) -> str:
    """Format bytes for a message: as text if printable, else in hexadecimal."""
    text = data.decode("latin-1")
    return f'"{text}"' if text.isascii() and text.isprintable() else data.hex(" ")
