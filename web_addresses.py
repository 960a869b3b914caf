"""Prepare web addresses (http, https) of folders for reading.

Main entry: `web_path(path)` takes a `UPath` of a web address and returns the one to read from: its
last part is the name of the folder, also if the address ended with a slash, and its client uses the
proxy that the environment names. Options that `path` has are kept. It raises `ValueError` for an
address with a query or a fragment.
"""

import re

from upath import UPath


def web_path(path: UPath) -> UPath:
    """Return a path of the same web folder without slashes at its end, as a set has the name of its
    folder. It is read through the proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name.

    Raises:
        ValueError: the address has a query or a fragment, which names one file, not a folder.
    """
    address = str(path)
    if match := re.search("[?#]", address):
        raise ValueError(  # without the query: it may be a token
            f"{address[: match.start()]} is followed by {match[0]}, but a query or fragment names "
            "one file, not a folder; use s3://, or a host that needs no token in its addresses"
        )
    # Without `trust_env`, the client of fsspec ignores these variables.
    client = {"trust_env": True} | path.storage_options.get("client_kwargs", {})
    return UPath(address.rstrip("/"), **{**path.storage_options, "client_kwargs": client})
