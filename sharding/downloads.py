"""Check that a file that arrived is what its name and the catalog say."""

import re
import tarfile
import zipfile
from pathlib import Path

from storage import sha256_of


class FetchError(ValueError):
    """A source that could not be downloaded; the message says what to do."""


def check_hash(path: Path, digest: str) -> None:
    """Check a file against the hash of the catalog."""
    arrived = sha256_of(path)
    if arrived != digest:
        raise FetchError(
            f"{path} has sha256 {arrived[:12]}..., the catalog says {digest[:12]}...; it is not "
            "the file that was meant, or the catalog is out of date"
        )


_MAGIC = {
    ".parquet": (b"PAR1",), ".gz": (b"\x1f\x8b",), ".tgz": (b"\x1f\x8b",), ".bz2": (b"BZh",),
    ".xz": (b"\xfd7zXZ\0",), ".zst": (b"\x28\xb5\x2f\xfd",), ".7z": (b"7z\xbc\xaf\x27\x1c",),
    ".rar": (b"Rar!",), ".png": (b"\x89PNG",), ".jpg": (b"\xff\xd8",), ".jpeg": (b"\xff\xd8",),
}  # fmt: skip
_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html)", re.IGNORECASE)


def check_content(path: Path, suffix: str) -> None:
    """Check that a file begins as its name says: servers send pages (a quota, a login) with status
    200. `suffix` is that of the name it will have, empty for its own.
    """
    suffix = (suffix or path.suffix).lower()
    with path.open("rb") as stream:
        start = stream.read(1024)
    wrong = "a web page" if _PAGE.match(start) and suffix not in (".html", ".htm") else ""
    if suffix == ".zip" and not wrong:
        wrong = "" if zipfile.is_zipfile(path) else "no whole zip archive"
    elif suffix == ".tar" and not wrong:
        wrong = "" if start[257:262] == b"ustar" or tarfile.is_tarfile(path) else "no tar archive"
    elif not wrong and not start.startswith(_MAGIC.get(suffix, b"")):
        wrong = f"no {suffix} file by its first bytes"
    if wrong:
        raise FetchError(
            f"{path.name.removesuffix('.partial')} is {wrong} ({path.stat().st_size:,} bytes); "
            "open its address in a browser to see why (a quota, a login, a move), then run again"
        )
