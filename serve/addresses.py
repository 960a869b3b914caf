"""Images behind http and https addresses, for a server that was told to fetch them.

Whoever may name an address could otherwise look through this server at what only it can reach. So a
name is resolved once, every address behind it is checked, and the connection goes to the one that
was checked; a redirect is another address, checked likewise. Proxies of the environment are not
used.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from urllib.parse import SplitResult, urljoin, urlsplit

from imaging.decode import DecodeError
from serve.limits import MB, Limits, Refused

MAX_REDIRECTS = 3
PART = 2**16
REDIRECTS = (301, 302, 303, 307, 308)


class FetchError(DecodeError):
    """An address that gives no image; the message says why."""


class Allowance:
    """How many bytes the addresses of one request may bring together; threads share it."""

    def __init__(self, limits: Limits):
        self.total = self.left = limits.max_bytes
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        """Count `size` bytes.

        Raises:
            FetchError: more than are left.
        """
        with self._lock:
            if size > self.left:
                raise FetchError(f"the addresses bring more than {self.total / MB:g} MB together")
            self.left -= size


def fetch(url: str, limits: Limits, allowance: Allowance, until: float) -> bytes:
    """The bytes behind an address; nothing is waited for after `until`, a time of the monotonic
    clock.

    Raises:
        Refused: an address that this server is not to ask.
        FetchError: there is nothing to be had.
    """
    for _ in range(MAX_REDIRECTS + 1):
        parts, port = _checked(url)
        addresses = _resolved(parts, port, limits.allow_private_urls)
        with contextlib.ExitStack() as ended:
            sock = ended.enter_context(_connected(addresses, port, until))
            # The time limit of a socket is for each read; this one is for all of them. It has the
            # connection under another number, since TLS takes the socket over.
            twin = ended.enter_context(sock.dup())
            alarm = threading.Timer(max(0.0, until - time.monotonic()), _cut, [twin])
            ended.callback(alarm.cancel)
            alarm.start()
            try:
                answer = ended.enter_context(_ask(sock, parts, port, ended))
                where = answer.headers.get("Location")
                if answer.status not in REDIRECTS or not where:
                    return _body(answer, allowance)
                url = urljoin(url, where)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if time.monotonic() >= until:
                    raise FetchError("the address took too long to answer") from error
                if isinstance(error, FetchError):
                    raise
                reason = type(error).__name__
                raise FetchError(f"the address cannot be fetched ({reason})") from error
    raise FetchError(f"the address redirects more than {MAX_REDIRECTS} times")


def _checked(url: str) -> tuple[SplitResult, int]:
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
        host = (parts.hostname or "").encode("idna")
        url.encode("ascii")
    except ValueError:
        raise FetchError("this is no address; expected https://host/path") from None
    if parts.scheme not in ("http", "https"):
        raise Refused(403, f"only http and https addresses are fetched, got {parts.scheme[:20]!r}")
    if not host or parts.username is not None or parts.password is not None:
        raise FetchError("an address needs a host, and no user or password")
    return parts, port


def _resolved(parts: SplitResult, port: int, private: bool) -> list[str]:
    """The addresses of a host, each of them one that may be asked."""
    host = parts.hostname or ""
    try:
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise FetchError(f"the host {host[:100]} is not known") from None
    addresses = [str(entry[4][0]) for entry in entries]
    if not private and not all(map(is_public, addresses)):
        raise Refused(403, f"{host[:100]} is not a public host, and this server asks no other")
    return addresses


def is_public(address: str) -> bool:
    """Whether an IP address is one of the whole internet, and so is the one that it stands for."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.sixtofour is not None and not is_public(str(ip.sixtofour)):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _connected(addresses: list[str], port: int, until: float) -> socket.socket:
    """A connection to the first of `addresses` that answers."""
    for address in addresses:
        left = until - time.monotonic()
        if left <= 0:
            break
        with contextlib.suppress(OSError):
            return socket.create_connection((address, port), timeout=left)
    raise FetchError("the host does not answer")


def _ask(
    sock: socket.socket, parts: SplitResult, port: int, ended: contextlib.ExitStack
) -> http.client.HTTPResponse:
    """The head of the answer; what else is opened for it is closed by `ended`."""
    if parts.scheme == "https":
        context = ssl.create_default_context()
        secure = context.wrap_socket(
            sock, server_hostname=parts.hostname, do_handshake_on_connect=False
        )
        sock = ended.enter_context(secure)
        secure.do_handshake()
    connection = http.client.HTTPConnection(parts.hostname or "", port)
    connection.default_port = {"https": 443}.get(parts.scheme, 80)  # what Host: leaves out
    connection.sock = sock
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {"Accept": "image/*, */*;q=0.1", "User-Agent": "ai-images-detector"}
    connection.request("GET", target, headers=headers)
    return connection.getresponse()


def _body(answer: http.client.HTTPResponse, allowance: Allowance) -> bytes:
    if answer.status != 200:
        raise FetchError(f"the address answers with status {answer.status}")
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise FetchError("the address answers with a compressed body, which was not asked for")
    parts = []
    while part := answer.read(PART):
        allowance.take(len(part))
        parts.append(part)
    if answer.length:
        raise FetchError("the answer of the address breaks off")
    return b"".join(parts)


def _cut(sock: socket.socket) -> None:
    """End whatever a connection waits for."""
    with contextlib.suppress(OSError):  # it has ended meanwhile
        sock.shutdown(socket.SHUT_RDWR)
