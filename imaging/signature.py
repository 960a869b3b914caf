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

_UNREAD = {
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "JPEG XR": rb"II\xbc",
    "PSD": rb"8BPS",
    "a camera RAW": rb"IIRO|IIRS|MMOR|IIU\0|FUJIFILMCCD-RAW|.{4}ftypcrx |FOVb|\0MRM|II.{4}HEAPCCDR",
    "ICO": rb"\0\0\x01\0",
    "DDS": rb"DDS ",
    "PAM": rb"P7\s",
    "PFM in color": rb"PF\s",
}
"""Patterns of the first bytes of images that are not read."""

_ARCHIVES = {
    "ZIP": rb"PK\x03\x04",
    "tar": rb".{257}ustar",
    "gzip": rb"\x1f\x8b",
    "7z": rb"7z\xbc\xaf\x27\x1c",
    "RAR": rb"Rar!\x1a\x07",
}
"""Patterns of the first bytes of archives."""

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
        return start >= len(data)  # of the directory
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
    if name:
        return (
            f"{subject}it is of a kind that is not read, or its header is damaged or cut off; "
            "export it as PNG, or copy the file again"
        )
    if archive := _first_match(_ARCHIVES, data):
        return (
            f"not an image this program reads but a {archive} archive: unpack it and use the "
            "images in it (in a terminal, predict reads ZIP and tar archives)"
        )
    return f"not an image this program reads (it begins with {_readable(data[:8])})"


def _readable(data: bytes) -> str:
    """Format bytes for a message: as text if printable, else in hexadecimal."""
    text = data.decode("latin-1")
    return f'"{text}"' if text.isascii() and text.isprintable() else data.hex(" ")
