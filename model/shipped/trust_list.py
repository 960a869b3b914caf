"""Bring the public list of C2PA's trust anchors into the cache, with the day and its SHA-256.

One list is enough. C2PA keeps a second one, of authorities for time stamps, whose certificates were
all issued under anchors of the first (August 2026). The library does not keep the two apart
(c2pa-python 0.38): an anchor for time stamps would vouch for signers as well.
"""

import datetime
import json
import threading
import time
from pathlib import Path

import requests

from escape import without_secrets
from model.inference.signatures import (
    CACHED,
    MAX_BYTES,
    TrustList,
    TrustListError,
    parse_trust_list,
    read_bounded,
    read_cached,
)
from storage import cache_folder, write_text

ADDRESS = (
    "https://raw.githubusercontent.com/c2pa-org/conformance-public/refs/heads/main/trust-list/"
    "C2PA-TRUST-LIST.pem"
)
"""The official list of the C2PA Conformance Program
(https://github.com/c2pa-org/conformance-public).
"""

TIMEOUT_S = 10
"""So long all of it may take: it is small."""


def fetch_trust_list(by_hand: Path | None = None) -> TrustList:
    """The public list, downloaded, checked to be one and kept; or the file `by_hand` in its place.
    What was kept before stays where this fails.

    Raises:
        TrustListError: no answer within `TIMEOUT_S`, or the answer is no trust list.
        OSError: it cannot be kept.
    """
    if by_hand:
        data, origin = read_bounded(by_hand, "--file"), f"--file: {by_hand}"
    else:
        data, origin = _download(ADDRESS), f"the file at {ADDRESS}"
    trust = parse_trust_list(data, "", origin)
    path = cache_folder() / CACHED
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {
        "origin": str(by_hand) if by_hand else ADDRESS,
        "fetched": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "sha256": trust.sha256,
        "pem": data.decode("utf-8", "surrogateescape"),
    }
    write_text(path, json.dumps(kept, indent=1) + "\n")
    return read_cached(path)


def _download(url: str) -> bytes:
    """The bytes at an address, within `TIMEOUT_S` whatever the network does.

    Raises:
        TrustListError: they do not come.
    """
    answers: list[bytes | Exception] = []

    def ask() -> None:
        try:
            answers.append(_read(url))
        except (OSError, ValueError) as error:  # RequestException is an OSError
            answers.append(error)

    # Looking up a name may take longer than any timeout of a connection.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(TIMEOUT_S)
    answer = answers[0] if answers else TimeoutError(f"no answer within {TIMEOUT_S} s")
    if isinstance(answer, bytes):
        return answer
    reason = without_secrets(" ".join(str(answer).split()))[:200] or type(answer).__name__
    raise TrustListError(
        f"the C2PA trust list did not come ({reason}); download it by hand from {url} and give it: "
        "python -m model fetch --trust-list --file C2PA-TRUST-LIST.pem"
    ) from answer


def _read(url: str) -> bytes:
    """The body of an answer, at most `MAX_BYTES` of it."""
    data, end = b"", time.monotonic() + TIMEOUT_S
    with requests.get(url, stream=True, timeout=TIMEOUT_S) as response:
        response.raise_for_status()
        for chunk in response.iter_content(2**16):
            data += chunk
            if len(data) > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES:,} bytes, which no trust list has")
            if time.monotonic() > end:
                raise TimeoutError(f"it is not complete after {TIMEOUT_S} s")
    return data
