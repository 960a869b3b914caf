"""Download images from http and https URLs, for the server option `--allow-urls`.

Main entry: `fetch(url, limits, allowance)` returns the body as bytes.

- `url`: the URL, text.
- `limits`: the `Limits` of the server; only `allow_private_urls` is used (True: hosts need not be
  public).
- `allowance`: `Allowance(limits, until)`, one for all URLs of a request. It holds how many bytes
  they together may still send, `limits.max_bytes` at first; its `take(size)` subtracts some, and
  raises `AddressError` if fewer are left. `until` is the deadline, in seconds of
  `time.monotonic()`. `end()` ends all downloads at once, for a request that has ended.

It follows up to `MAX_REDIRECTS` redirects. It raises `Refused` (serve/limits.py, status 403) for a
URL that is not http or https, or whose host is not public. It raises `AddressError` (a
`DecodeError`) in these cases:

- The URL is damaged, or has a user or password.
- The host name cannot be resolved, or the connection fails.
- The answer has another status than 200 (such as 404), or is one redirect too many.
- The body is compressed or incomplete, or has more bytes than `allowance` has left.
- The host name is not resolved, or the answer not complete, at the deadline.

A client must not use this server to reach hosts that only the server can reach (SSRF). So each host
name is resolved once, all its IP addresses are checked (`is_public(address)`, a text) unless
private hosts are allowed, and the connection goes to one of these addresses. Every redirect is
checked in the same way. Proxy settings of the environment are not used.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from urllib.parse import SplitResult, urljoin, urlsplit

from imaging.decode import DecodeError
from interrupts import within
from serve.limits import MB, Limits, Refused

MAX_REDIRECTS = 3
PART = 2**16
REDIRECTS = (301, 302, 303, 307, 308)


class AddressError(DecodeError):
    """Error of fetching one URL. The message gives the reason."""


class Allowance:
    """Bytes and time that all URLs of one request share. Thread-safe."""

    def __init__(self, limits: Limits, until: float):
        self.total = self.left = limits.max_bytes
        self.until = until
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()

    @contextlib.contextmanager
    def limiting(self, sock: socket.socket) -> Iterator[None]:
        """Shut a connection down at the deadline or when `end` is called, if the block still runs.
        A socket timeout limits each single read; this limits all reads together.
        """
        with sock.dup() as twin:  # TLS detaches the original
            alarm = threading.Timer(max(0.0, self.until - time.monotonic()), _cut, [twin])
            alarm.start()
            with self._lock:
                self._open.add(twin)
                if time.monotonic() >= self.until:  # `end` was already called
                    _cut(twin)
            try:
                yield
            finally:
                alarm.cancel()
                with self._lock:
                    self._open.discard(twin)

    def end(self) -> None:
        """End all downloads now."""
        with self._lock:
            self.until = 0.0
            for twin in self._open:
                _cut(twin)

    def take(self, size: int) -> None:
        """Take `size` bytes from the budget.

        Raises:
            AddressError: fewer than `size` bytes are left.
        """
        with self._lock:
            if size > self.left:
                raise AddressError(f"the URLs give more than {self.total / MB:g} MB together")
            self.left -= size


def fetch(url: str, limits: Limits, allowance: Allowance) -> bytes:
    """Download the body behind a URL, following redirects, until the deadline of `allowance`.

    Raises:
        Refused: a URL that this server must not fetch.
        AddressError: the URL gives no body, or not in time.
    """
    for _ in range(MAX_REDIRECTS + 1):
        parts, port = _checked(url)
        addresses = _resolved(parts, port, limits.allow_private_urls, allowance.until)
        with contextlib.ExitStack() as ended:
            sock = ended.enter_context(_connected(addresses, port, allowance.until))
            ended.enter_context(allowance.limiting(sock))
            try:
                answer = ended.enter_context(_ask(sock, parts, port, ended))
                where = answer.headers.get("Location")
                if answer.status not in REDIRECTS or not where:
                    body = _body(answer, allowance)
                    if time.monotonic() >= allowance.until:  # the body may be cut off
                        raise AddressError("the URL took too long to answer")
                    return body
                url = urljoin(url, where)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if time.monotonic() >= allowance.until:
                    raise AddressError("the URL took too long to answer") from error
                if isinstance(error, AddressError):
                    raise
                reason = type(error).__name__
                raise AddressError(f"the URL cannot be fetched ({reason})") from error
    raise AddressError(f"the URL redirects more than {MAX_REDIRECTS} times")


def _checked(url: str) -> tuple[SplitResult, int]:
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
        host = (parts.hostname or "").encode("idna")
        url.encode("ascii")
    except ValueError:
        raise AddressError(
            "not a URL; expected https://host/path, with other characters than ASCII as %XX"
        ) from None
    if parts.scheme not in ("http", "https"):
        raise Refused(403, f"only http and https URLs are fetched, got {parts.scheme[:20]!r}")
    if not host or parts.username is not None or parts.password is not None:
        raise AddressError("a URL must have a host, and no user or password")
    return parts, port


def _resolved(parts: SplitResult, port: int, private: bool, until: float) -> list[str]:
    """Resolve a host to its IP addresses and check that all may be contacted.

    Raises:
        Refused: an IP address is not public, and `private` is false.
        AddressError: the host name cannot be resolved, or not before `until`.
    """
    left = until - time.monotonic()
    if left <= 0:
        raise AddressError("the URL took too long to answer")
    host = parts.hostname or ""
    try:
        entries = within(left, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except TimeoutError:
        raise AddressError("the URL took too long to answer") from None
    except (OSError, UnicodeError):
        raise AddressError(f"the host {host[:100]} cannot be resolved") from None
    addresses = [str(entry[4][0]) for entry in entries]
    if not private and not all(map(is_public, addresses)):
        raise Refused(403, f"{host[:100]} is not a public host; only public hosts are allowed")
    return addresses


def is_public(address: str) -> bool:
    """Return whether an IP address is public. For IPv4-mapped and 6to4 addresses, the embedded IPv4
    address must be public too.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.sixtofour is not None and not is_public(str(ip.sixtofour)):
            return False
        if ip.is_site_local:  # private by an older standard
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _connected(addresses: list[str], port: int, until: float) -> socket.socket:
    """Connect to the first of the IP `addresses` that answers.

    Raises:
        AddressError: none answers before `until`.
    """
    for address in addresses:
        left = until - time.monotonic()
        if left <= 0:
            raise AddressError("the URL took too long to answer")
        with contextlib.suppress(OSError):
            return socket.create_connection((address, port), timeout=left)
    raise AddressError("the host does not answer")


def _ask(
    sock: socket.socket, parts: SplitResult, port: int, ended: contextlib.ExitStack
) -> http.client.HTTPResponse:
    """Send the request and read the head of the response. Sockets that are opened here are closed
    by `ended`.
    """
    if parts.scheme == "https":
        context = ssl.create_default_context()
        secure = context.wrap_socket(
            sock, server_hostname=parts.hostname, do_handshake_on_connect=False
        )
        sock = ended.enter_context(secure)
        secure.do_handshake()
    connection = http.client.HTTPConnection(parts.hostname or "", port)
    connection.default_port = {"https": 443}.get(parts.scheme, 80)  # omitted in the Host header
    connection.sock = sock
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {"Accept": "image/*, */*;q=0.1", "User-Agent": "ai-images-detector"}
    connection.request("GET", target, headers=headers)
    return connection.getresponse()


def _body(answer: http.client.HTTPResponse, allowance: Allowance) -> bytes:
    if answer.status != 200:
        raise AddressError(f"the URL answers with status {answer.status}")
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise AddressError("the URL answers with a compressed body, which was not requested")
    parts = []
    while part := answer.read(PART):
        allowance.take(len(part))
        parts.append(part)
    if answer.length:
        raise AddressError("the answer of the URL is incomplete")
    return b"".join(parts)


def _cut(sock: socket.socket) -> None:
    """Shut down a connection, which ends all its pending reads and writes."""
    with contextlib.suppress(OSError):  # may be closed already
        sock.shutdown(socket.SHUT_RDWR)
