"""Prepare web addresses (http, https) of folders for reading.

Main entry: `web_path(path)` takes a `UPath` of a web address and returns the one to read from: its
last part is the name of the folder, also if the address ended with a slash, and its client uses the
proxy that the environment names, which is then the option `proxy` of the path. Options that `path`
has are kept. It raises `ValueError` for an address with a query or a fragment, and for a proxy that
cannot be used.
"""

import re
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from upath import UPath


def web_path(path: UPath) -> UPath:
    """Return a path of the same web folder without slashes at its end, as a set has the name of its
    folder. It is read through the proxy that HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY name.

    Raises:
        ValueError: the address has a query or a fragment, which names one file, not a folder. Or
            its proxy cannot be used.
    """
    address = str(path)
    if match := re.search("[?#]", address):
        raise ValueError(  # without the query: it may be a token
            f"{address[: match.start()]} is followed by {match[0]}, but a query or fragment names "
            "one file, not a folder; use s3://, or a host that needs no token in its addresses"
        )
    options = dict(path.storage_options)
    client = options.get("client_kwargs", {})
    if "trust_env" not in client and "proxy" not in options:
        # By itself, the client (aiohttp) knows neither ALL_PROXY nor a proxy without `http://`, nor
        # a network in NO_PROXY. With `trust_env` it reads passwords from ~/.netrc, too.
        proxy, trust_env = _proxy_of(address)
        options |= {"proxy": proxy} if proxy else {}
        options["client_kwargs"] = {"trust_env": trust_env} | client
    return UPath(address.rstrip("/"), **options)


def _proxy_of(address: str) -> tuple[str, bool]:
    """Return the proxy of the environment for an address, "" for none, and whether the client may
    look there, too: not if it would find a proxy where there is none.

    Raises:
        ValueError: the proxy is a SOCKS proxy, or no address.
    """
    from requests.utils import get_environ_proxies  # slow import

    parts = urlsplit(address)
    proxies = get_environ_proxies(address)  # none, if NO_PROXY names the host
    kind = parts.scheme if parts.scheme in proxies else "all"
    if kind not in proxies:
        is_excepted = bool(getproxies()) and not proxies
        return "", not is_excepted or bool(proxy_bypass(parts.hostname or ""))
    proxy = proxies[kind] if "://" in proxies[kind] else f"http://{proxies[kind]}"
    variable, example = f"{kind.upper()}_PROXY", "http://host:3128"
    if proxy.lower().startswith("socks"):
        raise ValueError(
            f"{address} cannot be read through a SOCKS proxy, which {variable} names; set "
            f"{parts.scheme.upper()}_PROXY to one such as {example}, or NO_PROXY to the host"
        )
    try:
        is_address = bool(urlsplit(proxy).hostname) and urlsplit(proxy).port != 0
    except ValueError:  # the port is no number
        is_address = False
    if not is_address:  # it may contain a password
        raise ValueError(
            f"{variable} is no address of a proxy, expected one such as {example}; in a password, "
            "write # as %23, / as %2F and @ as %40"
        )
    return proxy, True
