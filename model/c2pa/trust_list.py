"""Download the public list of C2PA's trust anchors (certificates that vouch for signers of images)
into the cache, with its date and SHA-256.

Main entry: `fetch_trust_list(by_hand)` downloads the PEM file from `ADDRESS` within `TIMEOUT_S`
seconds if `by_hand` is None (the default). Else `by_hand` is the `Path` of the PEM file, which the
user downloaded. The list is written to `c2pa-trust-list.json` in the cache
(`storage.cache_folder()`), and returned as a `TrustList`: `name`, `pem` (the certificates, a text),
`anchors` (their number), `sha256` and `fetched` (today's date, UTC).

It raises `TrustListError` (a `ValueError`) if the download fails, if the file `by_hand` is missing
or cannot be read, or if the data have no certificate, a damaged one or too many, or are too large
(`MAX_BYTES`). It raises `OSError` if the list cannot be stored. After an error the cached list is
as it was.

C2PA also publishes a list of time-stamp authorities, which is not used: all its certificates were
issued under anchors of the first list (August 2026), and c2pa-python 0.38 does not separate the
lists, so that a time-stamp anchor would also be trusted for signatures.
"""

import datetime
import json
import time
from pathlib import Path

import requests

from escape import reason_of, typed_reason_of
from interrupts import within
from model.c2pa.signatures import (
    CACHED,
    MAX_BYTES,
    TrustList,
    TrustListError,
    parse_trust_list,
    read_bounded,
    read_cached,
)
from storage import cache_folder, write_text
from web_addresses import proxy_fault

ADDRESS = (
    "https://raw.githubusercontent.com/c2pa-org/conformance-public/refs/heads/main/trust-list/"
    "C2PA-TRUST-LIST.pem"
)
"""Official list of the C2PA Conformance Program
(https://github.com/c2pa-org/conformance-public).
"""

TIMEOUT_S = 10
"""Time limit of the whole download in seconds; the list is small."""


def fetch_trust_list(by_hand: Path | None = None) -> TrustList:
    """Download the public list, check it and store it in the cache; with `by_hand`, take this file
    instead. On an error the cached list is unchanged.

    Raises:
        TrustListError: there is no answer within `TIMEOUT_S`, or the data is no trust list.
        OSError: the list cannot be stored.
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
    text = json.dumps(kept, indent=1) + "\n"
    if len(text) > MAX_BYTES:  # `read_cached` would refuse it: keep the old list
        raise TrustListError(f"{origin} is too large to keep: more than {MAX_BYTES:,} bytes")
    write_text(path, text)
    return read_cached(path)


def _download(url: str) -> bytes:
    """Return the bytes at an address within `TIMEOUT_S`, whatever the network does.

    Raises:
        TrustListError: the download failed or timed out.
    """
    try:
        return within(TIMEOUT_S, lambda: _read(url))
    except (OSError, ValueError) as error:  # RequestException is an OSError
        reason = proxy_fault(typed_reason_of(error)) or reason_of(error)
        raise TrustListError(
            f"the C2PA trust list was not fetched ({reason}); download it by hand from "
            f"{url} and type: python -m model fetch --trust-list --file C2PA-TRUST-LIST.pem"
        ) from error


def _read(url: str) -> bytes:
    """Return the body of the response, at most `MAX_BYTES`.

    Raises:
        ValueError: the body is longer.
        TimeoutError: the body is not complete after `TIMEOUT_S`.
    """
    data, end = b"", time.monotonic() + TIMEOUT_S
    with requests.get(url, stream=True, timeout=TIMEOUT_S) as response:
        response.raise_for_status()
        for chunk in response.iter_content(2**16):
            data += chunk
            if len(data) > MAX_BYTES:
                raise ValueError(
                    f"the answer has more than {MAX_BYTES:,} bytes, too many for a trust list"
                )
            if time.monotonic() > end:
                raise TimeoutError(f"the answer is not complete after {TIMEOUT_S} s")
    return data
