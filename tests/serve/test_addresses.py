"""URLs are fetched only with --allow-urls, and from private hosts only if they are allowed too."""

import datetime
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from escape import as_utf8
from model.inference.detector import ImageDetector
from serve import addresses
from serve.limits import MB, Limits
from tests.builders import encode, photo
from tests.serve.conftest import Serve
from tests.servers import HANG_S

PHOTO = encode(photo(1))


class Site(ThreadingHTTPServer):
    """Web server on loopback; `asked` lists the path and Host header of each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str | None]] = []
        self.go_on, self.pause_s = threading.Event(), 0.05
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Host"]))
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to?"))
            self.end_headers()
            return
        self.send_response({"/gone": 404}.get(self.path, 200))
        size = {"/huge": 3 * MB, "/cut": len(PHOTO) + 9}.get(self.path, len(PHOTO))
        if self.path != "/slow/unsized":
            self.send_header("Content-Length", str(size))
        if self.path == "/zipped":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        for start in range(0, size, 100):
            if self.path.startswith("/slow"):
                self.server.go_on.wait(self.server.pause_s)
            self.wfile.write(bytes(100) if self.path == "/huge" else PHOTO[start : start + 100])

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the tests include clients that disconnect
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # the proxy must not be used
    one = Site()
    yield one
    one.go_on.set()
    one.shutdown()
    one.server_close()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, site: Site) -> list[str]:
    """Fake name resolution: `public.example` has a public IP address, `mixed.example` a public and
    a private one. All connections lead to `site`; the list collects the IP address of each.
    """
    known = {
        "public.example": ["93.184.215.14"],
        "mixed.example": ["93.184.215.14", "10.0.0.1"],
        "other.example": ["93.184.215.14"],
    }
    resolve, connect, connected = socket.getaddrinfo, socket.create_connection, []

    def resolved(host: str, port: int, *rest: int, **kind: int) -> list[tuple]:
        if host in known:
            return [(2, 1, 6, "", (address, port)) for address in known[host]]
        return resolve(host, port, *rest, **kind)

    def connection(address: tuple[str, int], timeout: float) -> socket.socket:
        connected.append(address[0])
        return connect(("127.0.0.1", site.server_port), timeout)

    monkeypatch.setattr(addresses.socket, "getaddrinfo", resolved)
    monkeypatch.setattr(addresses.socket, "create_connection", connection)
    return connected


@pytest.mark.parametrize(
    ("address", "is_public"),
    [("93.184.215.14", True), ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
     ("::ffff:93.184.215.14", True), ("127.0.0.1", False), ("0.0.0.0", False), ("10.1.2.3", False),
     ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False),
     ("100.64.0.1", False), ("224.0.0.1", False), ("255.255.255.255", False), ("240.0.0.1", False),
     ("::1", False), ("::", False), ("fe80::1%eth0", False), ("fd00::1", False), ("ff02::1", False),
     ("fec0::1", False),
     ("::ffff:127.0.0.1", False), ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False),
     ("2001:0:1::1", False)],
)  # fmt: skip
def test_which_ip_addresses_are_public(address: str, is_public: bool) -> None:
    assert addresses.is_public(address) == is_public


def test_a_private_address_is_403_and_is_not_contacted(serve: Serve, site: Site) -> None:
    client, service = serve(allow_urls=True)
    port = site.server_port
    for url in (
        site.url("/a"), site.url("/a", "localhost"), f"http://[::1]:{port}/a",
        f"http://[::ffff:127.0.0.1]:{port}/a", f"http://2130706433:{port}/", f"http://0:{port}/",
        f"http://127.1:{port}/", "ftp://public.example/a", "file:///etc/passwd",
    ):  # fmt: skip
        answer = client.post("/predict", json={"urls": ["http://127.0.0.1:9/", url]})
        assert answer.status_code == 403, url
        assert "not a public host" in answer.json()["detail"] or "only http" in answer.text
    assert not site.asked
    assert service.held == service.in_flight == 0


def test_a_public_url_is_fetched_from_the_checked_ip_address(
    serve: Serve, site: Site, names: list[str], detector: ImageDetector
) -> None:
    client, _ = serve(allow_urls=True)
    (expected,) = detector.predict([PHOTO])
    urls = [site.url("/a?b#c", "public.example"), "http://public.example/to?/b"]
    answer = client.post("/predict", json={"urls": urls})
    assert answer.status_code == 200, answer.text
    rows = answer.json()["images"]
    assert [row["path"] for row in rows] == urls
    for row in rows:
        assert row["probability"] == pytest.approx(expected.probability, abs=1e-6)
    assert set(names) == {"93.184.215.14"}
    assert sorted(site.asked) == [
        ("/a?b", f"public.example:{site.server_port}"), ("/b", "public.example"),
        ("/to?/b", "public.example"),
    ]  # fmt: skip
    assert client.post("/predict", json={"urls": ["http://mixed.example/a"]}).status_code == 403
    for where in ("http://127.0.0.1:1/", "file:///etc/passwd", "//localhost/"):
        url = f"http://public.example/to?{where}"
        assert client.post("/predict", json={"urls": [url]}).status_code == 403, where
    assert set(names) == {"93.184.215.14"}
    refused = "http://public.example/to?ftp://elsewhere/"  # a site must not spoil other rows
    answer = client.post("/predict", json={"urls": [urls[0], refused]})
    assert answer.status_code == 200, answer.text
    assert ["only http and https" in row["error"] for row in answer.json()["images"]] == [
        False, True,
    ]  # fmt: skip


def test_https_checks_the_certificate_of_the_host_name(
    serve: Serve, site: Site, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection goes to an IP address, but the certificate must match the host name."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "public.example")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("public.example")]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "site.pem"
    pem.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    site.socket = context.wrap_socket(site.socket, server_side=True)
    client, _ = serve(allow_urls=True)
    urls = [f"https://{host}/a" for host in ("public.example", "other.example")]
    unknown = client.post("/predict", json={"urls": urls[:1]})
    assert unknown.status_code == 422 and "SSLCertVerificationError" in unknown.text
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    rows = client.post("/predict", json={"urls": urls}).json()["images"]
    assert rows[0]["error"] == "" and "SSLCertVerificationError" in rows[1]["error"]
    assert site.asked == [("/a", "public.example")]


def test_a_url_that_cannot_be_fetched_gets_an_error_row(serve: Serve, site: Site) -> None:
    client, _ = serve(allow_urls=True, allow_private_urls=True, max_bytes=2 * MB, timeout_s=HANG_S)
    said = {
        site.url("/gone"): "status 404", site.url("/huge"): "more than 2 MB together",
        site.url("/cut"): "incomplete", site.url("/zipped"): "compressed",
        site.url("/to?/to?/to?/to?/to?/"): "redirects more than 3",
        f"https://127.0.0.1:{site.server_port}/": "SSLError",
        "http://127.0.0.1:9/": "does not answer", "http://no.invalid/": "cannot be resolved",
        "http://": "must have a host", "http://a:b@127.0.0.1/": "password",
        "http://127.0.0.1:x/": "not a URL", "http://127.0.0.1:99999/": "not a URL",
        site.url("/\ud800"): "not a URL", site.url("/a b\r\nX: y"): "InvalidURL",
        f"http://{'a' * 70}.example/": "not a URL",
    }  # fmt: skip
    body = json.dumps({"urls": [*said, site.url("/fine")]})
    answer = client.post("/predict", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    rows = answer.json()["images"]
    for (url, words), row in zip(said.items(), rows, strict=False):
        assert row["verdict"] == "unreadable" and words in row["error"], (url, row)
    assert [row["path"] for row in rows] == [as_utf8(url) for url in (*said, site.url("/fine"))]
    assert rows[-1]["error"] == ""
    assert client.post("/predict", json={"urls": [site.url("/gone")]}).status_code == 422


def test_a_slow_url_fails_alone(serve: Serve, site: Site) -> None:
    """The site sends a byte often, so that no single read reaches a timeout."""
    paths = ("/slow", "/slow/unsized", "/fine")  # without a length, an early end looks complete
    for timeout_s in (1.0, 5.0, 25.0):  # on a busy machine "/fine" may be late too
        site.pause_s = timeout_s / 20  # the slow ones take longer than `timeout_s`
        client, _ = serve(allow_urls=True, allow_private_urls=True, timeout_s=timeout_s)
        answer = client.post("/predict", json={"urls": [site.url(path) for path in paths]})
        if answer.status_code == 200 and not answer.json()["images"][-1]["error"]:
            break
    assert answer.status_code == 200, answer.text
    *slow, fine = answer.json()["images"]
    assert [image["error"] for image in slow] == ["the URL took too long to answer"] * 2
    assert not fine["error"]


def test_a_slow_lookup_of_a_name_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's resolver has no deadline of its own, and may wait for half a minute."""
    answered, resolve = threading.Event(), socket.getaddrinfo

    def slow(*arguments: object, **named: object) -> list:
        answered.wait(2 * HANG_S)
        return resolve(*arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    began = time.monotonic()
    with pytest.raises(addresses.AddressError, match="took too long to answer"):
        addresses.fetch("http://localhost:9/", Limits(), addresses.Allowance(Limits(), began + 0.3))
    assert time.monotonic() - began < HANG_S
    answered.set()


def test_no_connection_is_begun_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that was not asked was said not to answer."""
    monkeypatch.setattr(addresses, "_resolved", lambda *_: ["127.0.0.1"])
    with pytest.raises(addresses.AddressError, match="took too long to answer"):
        addresses.fetch("http://localhost:9/", Limits(), addresses.Allowance(Limits(), 0.0))


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b'{"urls": []}', b'{"urls": "http://a"}', b'{"urls": [1]}', b"\xff",
     b'{"urls": {"a": 1}}', b"[" * 100_000, b'{"urls": [NaN]}'],
)  # fmt: skip
def test_an_invalid_url_list_is_400(serve: Serve, body: bytes) -> None:
    client, _ = serve(allow_urls=True)
    answer = client.post("/predict", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and '{"urls": ' in answer.json()["detail"]


def test_a_too_long_url_list_is_413(serve: Serve) -> None:
    client, _ = serve(allow_urls=True, max_files=4)
    assert client.post("/predict", json={"urls": ["http://a"] * 5}).status_code == 413
    assert client.post("/predict", json={"urls": ["x" * MB]}).status_code == 413
