"""Download files from the web, so that an interrupted download resumes.

Main entries: `ask(session, url, path, sha256)` asks the server for the size and the version of a
file, and returns a `Remote`. `download(session, remote, progress)` downloads the rest of this file
and returns nothing. `receive(session, remote, progress)` does so too, but does not check the
content, and leaves the complete file at `remote.partial`.

- `session`: a `requests.Session` with `session.headers["Accept-Encoding"] = "identity"`, so that
  the server states the lengths of uncompressed files.
- `url`: the address of the file, a text.
- `path`: the `Path` to save the file at, in an existing folder. An incomplete file is saved next to
  it as `<name>.partial` (a long name is cut).
- `sha256`: the expected SHA-256, 64 hexadecimal digits, or "" (not checked).
- `progress`: `progress(label, total)` returns a context manager that yields `f`. `total` is the
  size in whole MiB, or None if it is not known; `f(n)` is called for n more MiB (a float).

A `Remote` has the three last arguments of `ask()`, `size` (bytes, None if not known), `version`
(the strong ETag, "" if there is none) and `partial` (the `Path` of the incomplete file).
`download()` resumes any incomplete file that it finds. It does not check whether this file is of
the same version. The caller must store `version` when a download begins, and before the next try
delete `partial` if the new `version` is different or "".

`download()` raises `FetchError` (a `ValueError`) if the file has another length than the server
stated, the content is wrong (the file is then deleted), or the response has no length and is not
chunked. Errors of requests (no connection, a transfer that breaks off, an HTTP error) and `OSError`
pass through. `ask()` raises errors of requests, among them the HTTP errors 429, 500, 502, 503 and
504. After any other HTTP error it returns a `Remote` with `size` None and `version` "".

`size_of(path)` returns the size of a file in bytes, or 0 if there is none. `MIB` is 2**20.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import requests

from sharding.downloads import FetchError, check_content, check_hash
from storage import file_name, naming, publish

TIMEOUT_S = (10, 60)
"""Seconds to connect, and to wait for the next bytes."""

MIB = 2**20

CHUNK = MIB // 4
"""Bytes per write. If a connection breaks, at most this many received bytes are lost."""

Progress = Callable[[str, int | None], AbstractContextManager[Callable[..., None]]]
"""`progress(label, total)` is a context manager with the value `advance(done)`, as in `console`."""


@dataclass(frozen=True)
class Remote:
    """File to download: its address, target, size and version; the server reports the last two."""

    url: str
    path: Path
    size: int | None
    version: str  # ETag, which changes with the file; "" if there is none or it does not matter
    sha256: str  # from the catalog; "" if it gives none

    @property
    def partial(self) -> Path:
        """Path of the file until it is complete."""
        return self.path.with_name(file_name(self.path.name, ".partial"))


def size_of(path: Path) -> int:
    """Return the size of a file in bytes, 0 if there is none."""
    return path.stat().st_size if path.is_file() else 0


def ask(session: requests.Session, url: str, path: Path, sha256: str) -> Remote:
    """Ask the server for the size and the version of a file."""
    response = session.head(url, allow_redirects=True, timeout=TIMEOUT_S)
    if response.status_code in (429, 500, 502, 503, 504):
        response.raise_for_status()
    facts = response.headers if response.ok else {}  # some servers refuse HEAD
    size = int(facts.get("Content-Length", 0)) or None
    version = facts.get("ETag") or ""
    return Remote(url, path, size, "" if version.startswith("W/") else version, sha256)


def download(session: requests.Session, remote: Remote, progress: Progress) -> None:
    """Download the rest of a file, and give the file its name when complete."""
    receive(session, remote, progress)
    _accept(remote)


def receive(session: requests.Session, remote: Remote, progress: Progress) -> None:
    """Download the rest of a file to `remote.partial`. After an error, received bytes are kept."""
    if remote.partial.is_symlink():  # the folder may come from a stranger
        remote.partial.unlink()
    have = size_of(remote.partial)
    if have and have == remote.size:
        return
    with _open(session, remote, have) as response, naming(remote.partial):
        have = have if response.status_code == 206 else 0
        size = _expected(response, have)
        bar = progress(f"{remote.path.name}, MiB", size and size // MIB)
        with bar as advance, remote.partial.open("ab" if have else "wb") as stream:
            advance(have / MIB)
            for chunk in response.iter_content(CHUNK):
                stream.write(chunk)
                advance(len(chunk) / MIB)
    if size is not None and size_of(remote.partial) != size:
        raise FetchError(
            f"{remote.url} has {size:,} bytes, of which {size_of(remote.partial):,} arrived; "
            "run the command again to resume"
        )


def _accept(remote: Remote) -> None:
    """Check a complete file and give it its name; delete the file if the check fails."""
    try:
        check_content(remote.partial, remote.path.suffix)
        if remote.sha256:
            check_hash(remote.partial, remote.sha256)
    except FetchError:
        remote.partial.unlink()
        raise
    publish(remote.partial, remote.path)


def _open(session: requests.Session, remote: Remote, have: int) -> requests.Response:
    """Request the file from byte `have` on (status 206); a server may send the whole file."""
    url = remote.url
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and remote.version:
        headers["If-Range"] = remote.version
    response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S)
    begins = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    if have and (response.status_code == 416 or (response.status_code == 206 and not begins)):
        response.close()
        return _open(session, remote, 0)
    response.raise_for_status()
    return response


def _expected(response: requests.Response, have: int) -> int | None:
    """Return the length of the whole file; None for a chunked response, whose end is marked."""
    if "Content-Length" in response.headers:
        return have + int(response.headers["Content-Length"])
    if response.headers.get("Transfer-Encoding", "").lower() == "chunked":
        return None
    raise FetchError(
        f"{response.url}: the server gives no length, so an incomplete file could not be "
        "detected; download the file by hand"
    )
