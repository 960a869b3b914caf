"""Check that a downloaded file has the content that its name and the catalog promise.

Main entries: two functions. They return nothing and leave the file as it is. They raise
`FetchError` (a `ValueError`) if the content is wrong, and `OSError` if the file cannot be read.
`path` is a `pathlib.Path`.

- `check_content(path, suffix)` checks that the file is of the type that `suffix` names, such as
  ".zip"; "" means the suffix of `path`. It looks at the first bytes (in a zip archive, at the end).
  A web page (`<html` or `<!doctype html`, also behind comments or an XML declaration), which some
  servers send instead of the file, is refused, except as ".html", ".htm" or ".xhtml". If the type
  of the suffix is unknown, every file except a web page is accepted.
- `check_hash(path, digest)` compares the file's SHA-256 with `digest`, the 64 hexadecimal digits
  (lower case) in the catalog.
"""

import re
import zipfile
from pathlib import Path

from imaging.tar import is_tar
from storage import sha256_of


class FetchError(ValueError):
    """Error of a download of images or weights; the message says what to do."""


def check_hash(path: Path, digest: str) -> None:
    """Check the SHA-256 of a file against the catalog.

    Raises:
        FetchError: the hashes differ.
    """
    arrived = sha256_of(path)
    if arrived != digest:
        raise FetchError(
            f"{path} has sha256 {arrived[:12]}..., the catalog says {digest[:12]}...; the "
            "address now gives another file, or the catalog is wrong; correct the catalog"
        )


_MAGIC = {
    ".parquet": (b"PAR1",), ".gz": (b"\x1f\x8b",), ".tgz": (b"\x1f\x8b",), ".bz2": (b"BZh",),
    ".xz": (b"\xfd7zXZ\0",), ".zst": (b"\x28\xb5\x2f\xfd",), ".7z": (b"7z\xbc\xaf\x27\x1c",),
    ".rar": (b"Rar!",), ".png": (b"\x89PNG",), ".jpg": (b"\xff\xd8",), ".jpeg": (b"\xff\xd8",),
}  # fmt: skip
_PAGE = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*"
    rb"(?:(?:<!--(?:(?!-->).)*-->|<\?xml(?:(?!\?>).)*\?>)\s*)*"  # comments and an XML declaration
    rb"<(?:!doctype\s+html|html)",
    re.IGNORECASE | re.DOTALL,
)
_PAGES = (".html", ".htm", ".xhtml")


def check_content(path: Path, suffix: str) -> None:
    """Check that the first bytes of a file fit its type: servers send web pages with status 200.

    `suffix` is the suffix of the file's final name, or "" for the suffix of `path`.

    Raises:
        FetchError: the content is of another type.
    """
    suffix = (suffix or path.suffix).lower()
    with path.open("rb") as stream:
        start = stream.read(16_384)
    wrong = "a web page" if _PAGE.match(start) and suffix not in _PAGES else ""
    if suffix == ".zip" and not wrong:
        wrong = "" if zipfile.is_zipfile(path) else "not a complete zip archive"
    elif suffix == ".tar" and not wrong:
        wrong = "" if start[257:262] == b"ustar" or is_tar(path) else "not a tar archive"
    elif not wrong and not start.startswith(_MAGIC.get(suffix, b"")):
        wrong = f"not a {suffix} file by its first bytes"
    if wrong:
        raise FetchError(
            f"{path.name.removesuffix('.partial')} is {wrong} ({path.stat().st_size:,} bytes); "
            "open its address in a browser to see why (quota, login, moved file), then run again"
        )
