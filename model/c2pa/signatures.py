"""Read C2PA manifests (https://c2pa.org/specifications) from image files, check their signatures,
and read the list of trusted signers.

Main entries: `read_manifest(data, trust)` takes the bytes of a file and a `TrustList` (None: no
signer is trusted). It returns a `Manifest`:

- `state` of the signature (a `State`): "trusted", "valid, signer unknown" or "invalid".
- `why`: the reason for the state, a text.
- `claim`: the `Claim` that was signed: `signer` (the name in the certificate, "nobody" if there is
  none), `makers` (a list of the programs that made the file) and `source_types` (a list of the
  kinds of origin, C2PA's `digitalSourceType`).
- `earlier`: a list of the claims of other manifests in the file, of its ingredients such as the
  image before an edit. `state` says nothing about them: the signer of a file does not vouch for its
  ingredients.

If there is no manifest or it cannot be read, the library c2pa-python raises exceptions of many
types, so catch `Exception`.

`usual_trust_list()` returns the `TrustList` that the environment variable `DETECTOR_TRUST_LIST`
names (a PEM file), else the downloaded public list, else None. It raises `TrustListError` for a
list that cannot be used. Anybody can make a certificate in any name, for example "Adobe"; only such
a list of trust anchors (certificates of authorities that verify their signers) shows which signer
is genuine.

A `TrustList` has `name`, `pem` (the certificates as text), `anchors` (their number), `sha256` (of
the file), `fetched` (day of the download; None for a file that the user named) and `describe()`,
which returns one line. Three functions return one or raise `TrustListError`:

- `read_trust_list(path, origin)` reads a PEM file. `origin` is the name of the option with the path
  (default `--trust-list`), for error messages.
- `parse_trust_list(data, name, origin, fetched)` reads the bytes of such a file. `name` and
  `fetched` (a date, or None, the default) are stored in the list; `origin` begins error messages.
- `read_cached(path)` reads the public list as it is stored in the cache (file `CACHED`).

`path` is a `Path`. `read_bounded(path, origin)` returns the bytes of a file of at most `MAX_BYTES`.
`has_manifest(head)` says whether the first bytes of a file seem to contain a manifest;
`is_readable()` says whether c2pa-python is installed. `FETCH` is the command that downloads the
public list, and `OFFLINE` the settings of the library that forbid network access.
"""

import base64
import contextlib
import datetime
import functools
import hashlib
import io
import logging
import os
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from escape import one_line
from storage import OWN_CACHE, cache_folder, parse_json, read_plain

log = logging.getLogger("ai_images_detector")

State = Literal["trusted", "valid, signer unknown", "invalid"]
"""Result of checking a signature.

*trusted*: the signature matches the file, and its certificate was issued under an anchor of the
trust list. *valid, signer unknown*: the signature matches the file, but anybody may have made it.
*invalid*: the file or the manifest was changed after signing, or the certificate is not valid for
signing.
"""

# --- the list of trust anchors --------------------------------------------------------------------

MAX_BYTES = 2**20
"""Maximum size of a trust list; the public list has 40 kB."""

MAX_ANCHORS = 1000

STALE_DAYS = 90
"""Age in days from which on `describe` advises to download the list again."""

VARIABLE = "DETECTOR_TRUST_LIST"
"""Environment variable with the path of a trust list, like `predict.py --trust-list`."""

CACHED = "c2pa-trust-list.json"
"""Name of the public list in `cache_folder()`, written by `model/c2pa/trust_list.py`."""

FETCH = "python -m model fetch --trust-list"

_BLOCK = re.compile(r"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]*)-----END CERTIFICATE-----")
_BEGIN = "-----BEGIN CERTIFICATE-----"


class TrustListError(ValueError):
    """Raised for a trust list that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class TrustList:
    """Trust anchors. `name` is shown in the evidence. `pem` contains only the certificates.
    `sha256` is the hash of the file. `fetched` is the download day (UTC) of the public list, None
    for a file that the user named.
    """

    name: str
    pem: str
    anchors: int
    sha256: str
    fetched: datetime.date | None = None

    def describe(self, today: datetime.date | None = None) -> str:
        """Return one line: name of the list, number of anchors, hash and age."""
        line = f"{self.name}, {self.anchors:,} anchors, SHA-256 {self.sha256[:16]}..."
        if self.fetched is None:
            return line
        days = ((today or datetime.datetime.now(datetime.UTC).date()) - self.fetched).days
        line += f", {days:,} day{'' if days == 1 else 's'} old"
        return f"{line}; `{FETCH}` downloads the newest" if days >= STALE_DAYS else line


def usual_trust_list() -> TrustList | None:
    """Return the list that `DETECTOR_TRUST_LIST` names, or the public list if it was downloaded, or
    None. The list is read once per process. If this user may not read the public list, one warning
    is logged.

    Raises:
        TrustListError: the list cannot be used.
    """
    cached = None
    with contextlib.suppress(ValueError):  # without a home folder there is no download
        cached = cache_folder() / CACHED
    return _usual_trust_list(os.environ.get(VARIABLE), cached)


@functools.lru_cache(maxsize=2)
def _usual_trust_list(named: str | None, cached: Path | None) -> TrustList | None:
    if named:
        return read_trust_list(Path(named), VARIABLE)
    try:
        if cached is None or not cached.is_file():
            return None
        cached.open("rb").close()
    except PermissionError as error:  # another user's cache
        log.warning("%s; no C2PA trust list is used. %s", one_line(error), OWN_CACHE)
        return None
    return read_cached(cached)


def read_trust_list(path: Path, origin: str = "--trust-list") -> TrustList:
    """Read a PEM file of anchors, such as the public C2PA list. Text between the certificates is
    ignored. `origin` is the option or variable with the path, for error messages.

    Raises:
        TrustListError: the file is missing or too large, has no certificate, or has a damaged one.
    """
    return parse_trust_list(read_bounded(path, origin), path.name[:60], f"{origin}: {path}")


def read_bounded(path: Path, origin: str) -> bytes:
    """Read a regular file of at most `MAX_BYTES`.

    Raises:
        TrustListError: not a regular file, not readable, or too large.
    """
    try:
        return read_plain(path, MAX_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise TrustListError(f"{origin}: {path} cannot be read ({reason}); name a PEM file") from (
            error
        )


def parse_trust_list(
    data: bytes, name: str, origin: str, fetched: datetime.date | None = None
) -> TrustList:
    """Parse the bytes of a PEM file and check that each block is a certificate.

    Raises:
        TrustListError: no certificate, a damaged one, or more than `MAX_ANCHORS`.
    """
    text = data.decode("utf-8", "replace")
    blocks = _BLOCK.findall(text)
    if not text.count(_BEGIN):
        raise TrustListError(
            f"{origin} holds no certificate; expected a PEM file with `{_BEGIN}`, such as the "
            f"public C2PA list, which `{FETCH}` downloads"
        )
    if len(blocks) > MAX_ANCHORS:
        raise TrustListError(
            f"{origin} holds {len(blocks):,} certificates, at most {MAX_ANCHORS:,} are accepted"
        )
    store = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # used only to parse certificates
    pems = []
    for index, block in enumerate(blocks):
        try:
            der = base64.b64decode("".join(block.split()), validate=True)
            store.load_verify_locations(cadata=der)
        except (ValueError, ssl.SSLError) as error:
            raise _damaged(origin, index) from error
        pems.append(ssl.DER_cert_to_PEM_cert(der))
    if len(blocks) != text.count(_BEGIN):
        raise _damaged(origin, len(blocks))
    return TrustList(name, "".join(pems), len(pems), hashlib.sha256(data).hexdigest(), fetched)


def _damaged(origin: str, index: int) -> TrustListError:
    return TrustListError(
        f"{origin} is damaged: certificate {index + 1} cannot be read; get the file again"
    )


def read_cached(path: Path) -> TrustList:
    """Read the downloaded public list.

    Raises:
        TrustListError: the file is damaged.
    """
    try:
        kept = parse_json(read_bounded(path, "the fetched C2PA trust list"))
        data = kept["pem"].encode("utf-8", "surrogateescape")
        day = datetime.date.fromisoformat(kept["fetched"][:10])
        if hashlib.sha256(data).hexdigest() != kept["sha256"]:
            raise ValueError("SHA-256 differs")
        return parse_trust_list(data, f"C2PA list of {day}", str(path), day)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrustListError(
            f"{path}, the fetched C2PA trust list, is damaged; delete it, or run `{FETCH}`"
        ) from error


# --- manifests ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """What one manifest says. `signer` is the name in its certificate, `makers` are the programs
    that it names, `source_types` every `digitalSourceType` in it.
    """

    signer: str
    makers: list[str]
    source_types: list[str]


@dataclass(frozen=True)
class Manifest:
    """The active manifest of a file. `state` is that of the signature of `claim`, `why` its reason
    in words. `earlier` are the claims of the other manifests, those of ingredients, in the order of
    the store; their signatures are not checked.
    """

    state: State
    why: str
    claim: Claim
    earlier: list[Claim]


def has_manifest(head: bytes) -> bool:
    """Return whether the metadata of a file seems to contain a manifest."""
    return b"jumb" in head and b"c2pa" in head


def is_readable() -> bool:
    """Return whether the library that reads manifests is installed."""
    try:
        import c2pa  # noqa: F401
    except ImportError:
        return False
    return True


def read_manifest(data: bytes, trust: TrustList | None) -> Manifest:
    """Read the manifest embedded in the bytes of a file, and check its signature against `trust`.

    Raises:
        Exception: the manifest cannot be read; the library raises many types of its own.
    """
    import c2pa

    with c2pa.Reader(None, io.BytesIO(data), context=_context(trust)) as reader:
        store = parse_json(reader.json())
    others = dict(store["manifests"])
    active = others.pop(store["active_manifest"])
    state, why = _state(store, trust)
    return Manifest(state, why, _claim(active), [_claim(other) for other in others.values()])


def _claim(manifest: Mapping[str, Any]) -> Claim:
    signature = manifest.get("signature_info") or {}
    makers = [info.get("name") for info in manifest.get("claim_generator_info") or []]
    return Claim(
        signer=str(signature.get("issuer") or signature.get("common_name") or "nobody"),
        makers=[str(name) for name in [*makers, manifest.get("claim_generator")] if name],
        source_types=list(dict.fromkeys(_source_types(manifest))),
    )


# A manifest may contain URLs: of a remote manifest, of a certificate's status (OCSP) and of a
# person's identity (CAWG). By default the library requests them; here it never uses the network.
OFFLINE: dict[str, dict[str, Any]] = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "core": {"decode_identity_assertions": False, "allowed_network_hosts": []},
}


@functools.lru_cache(maxsize=4)
def _context(trust: TrustList | None) -> Any:
    """Return a library context with a trust list. Settings of a context are not global, unlike
    those of `c2pa.load_settings`, so threads with different lists do not affect each other.
    """
    import c2pa

    settings: dict[str, Any] = {**OFFLINE, "verify": {**OFFLINE["verify"], "verify_trust": False}}
    if trust:
        settings["verify"]["verify_trust"] = True
        settings["trust"] = {"trust_anchors": trust.pem}
    return c2pa.Context.from_dict(settings)


_IN_WORDS = {
    "assertion.dataHash.mismatch": "the file was changed after it was signed",
    "assertion.boxesHash.mismatch": "the file was changed after it was signed",
    "assertion.bmffHash.mismatch": "the file was changed after it was signed",
    "assertion.hashedURI.mismatch": "the manifest was changed after it was signed",
    "claimSignature.mismatch": "the signature does not match the manifest",
    "signingCredential.expired": "the certificate has expired, and no time stamp shows that it was "
    "valid when the file was signed",
    "signingCredential.revoked": "the certificate was revoked",
    "signingCredential.invalid": "the certificate is not valid for signing",
}


def _state(store: Mapping[str, Any], trust: TrustList | None) -> tuple[State, str]:
    """Return the state of a manifest store as reported by the library, and the reason."""
    state = store.get("validation_state")
    if state == "Trusted" and trust:
        return "trusted", trust.name
    if state in ("Valid", "Trusted"):
        why = f"not in {trust.name}" if trust else "no trust list"
        return "valid, signer unknown", why
    codes = [status.get("code", "") for status in store.get("validation_status") or []]
    # An unknown signer alone does not make a file invalid.
    codes = [code for code in codes if code != "signingCredential.untrusted"] or [str(state)]
    words = _IN_WORDS.get(codes[0])
    return "invalid", f"{codes[0]}: {words}" if words else codes[0]


def _source_types(value: Any) -> Iterator[str]:
    """Yield every `digitalSourceType` in a manifest, unchanged."""
    if isinstance(value, Mapping):
        own = value.get("digitalSourceType")
        if isinstance(own, str) and own:
            yield own
        value = value.values()
    elif not isinstance(value, list):
        return
    for child in value:
        yield from _source_types(child)
