"""Prepare web addresses (http, https) of folders for reading, and explain proxies that cannot be
used.

Main entries: `web_path(path)` takes a `UPath` of a web address and returns the one to read from:
its last part is the name of the folder, also if the address ended with a slash, and its client uses
the proxy that the environment names, which is then the option `proxy` of the path. Options that
`path` has are kept. It raises `ValueError` for an address with a query or a fragment, and for a
proxy that cannot be used.

`proxy_fault(reason)` takes an error of a client that finds the proxies of the environment by itself
(requests, pip, the client of the model hub): its type and message as one text, which
`escape.typed_reason_of()` returns. It returns the line for the user if the client refused a proxy,
else None.
"""

import re
from importlib.util import find_spec
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from upath import UPath

from installed import install_command

_OF_SOCKS = {"socksio": "socksio", "socks": "pysocks"}
"""Modules that speak SOCKS, and their packages: the first for the model hub, the second for
requests and pip.
"""

_EXAMPLE = "http://host:3128"

# Errors of httpx, requests and urllib3 for an address that they cannot use. The last two are of
# httpx: for a SOCKS proxy without its library, and for a proxy such as ftp://.
_REFUSAL = re.compile(
    r"([\w.]+\.)?(Invalid(Proxy)?URL|InvalidSchema|LocationParseError)\b"
    r"|(ImportError|ValueError): .*\bproxy\b", re.IGNORECASE
)  # fmt: skip


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
    variable = f"{kind.upper()}_PROXY"
    if proxy.lower().startswith("socks"):
        raise ValueError(
            f"{address} cannot be read through a SOCKS proxy, which {variable} names; set "
            f"{parts.scheme.upper()}_PROXY to one such as {_EXAMPLE}, or NO_PROXY to the host"
        )
    if not _is_proxy(proxy):
        raise ValueError(_no_proxy(variable))
    return proxy, True


def proxy_fault(reason: str) -> str | None:
    """Return the line for an error ("type: message") of a client that refused a proxy of the
    environment, None for any other error. The client of the model hub (httpx) refuses each proxy
    that a variable names, also one that it would not use.
    """
    if not _REFUSAL.match(reason):
        return None
    for name, proxy in getproxies().items():
        variable = f"{name.upper()}_PROXY"
        if name not in ("all", "http", "https") or not proxy:
            continue
        if re.match("socks5h?://", proxy, re.IGNORECASE):
            missing = [package for module, package in _OF_SOCKS.items() if not find_spec(module)]
            if missing:
                return (
                    f"{variable} names a SOCKS proxy, which needs libraries: type "
                    f"`{install_command(' '.join(missing))}`, or set it to one such as {_EXAMPLE}"
                )
        elif not _is_proxy(proxy if "://" in proxy else f"http://{proxy}"):
            return _no_proxy(variable)
    return None


def _is_proxy(proxy: str) -> bool:
    """Return whether a text is the address of an HTTP proxy."""
    try:
        parts = urlsplit(proxy)
        (parts.hostname or "").encode("idna")
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number, or the name of the host no name
        return False
    return is_address and not re.search(r"^\s|[\x00-\x1f\x7f]", proxy)


def _no_proxy(variable: str) -> str:
    """Return the line for a variable that is no address of a proxy. It may contain a password."""
    return (
        f"{variable} is no address of a proxy, expected one such as {_EXAMPLE}; in a password, "
        "write # as %23, / as %2F and @ as %40"
    )
