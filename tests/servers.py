"""Serve small datasets on loopback as Hugging Face, Kaggle and plain HTTP do, and download them.

Main entry: `Server`. It answers only the requests that the client libraries send. `Proxy(upstream)`
is a proxy in front of a server. `run_async(work)` runs a coroutine, for tests of servers.
"""

import asyncio
import hashlib
import json
import random
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from sharding.catalog import Fetch, Source
from sharding.fetch import Fetched, fetch_source

Result = TypeVar("Result")

HANG_S = 60
"""Seconds after which a test says that something hangs. What hangs waits longer, or for ever; a
slow machine does not take so long.
"""


def run_async(work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of a coroutine. It runs in a thread of its own, because Playwright's event
    loop stays in the main thread after the first browser test.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


REPO = "owner/set"
MODEL = "owner/detector"
SERVICE = "/api/v1/datasets.DatasetApiService"

# Bodies are read in pieces of 0.25 or 1 MiB; BODY and CUT are larger, so that a cut leaves whole
# pieces.
BODY = random.Random(0).randbytes(3 * 2**20 + 7)
CUT = 2**21 + 5

OLD, NEW = "a" * 40, "b" * 40
"""Revisions of the dataset on the hub."""

FILES = {"data/a.parquet": BODY[:1000], "data/sub/b.parquet": BODY[1000:3000], "README.md": b"hi"}
DATA = {name: body for name, body in FILES.items() if name.startswith("data/")}
HUB = {"hub": REPO, "files": ["data/*.parquet"]}
KAGGLE = {"kaggle": "owner/set", "files": ["keep/*"]}


class Server(ThreadingHTTPServer):
    """Server of `bodies` by path. It records requests, and fails as a test configures it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.bodies: dict[str, bytes] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.status: dict[str, int] = {}
        self.cut: dict[str, int] = {}  # bytes after which one response is cut off
        self.stall: set[str] = set()  # send half, then wait for `go_on`
        self.go_on, self.stalled = threading.Event(), threading.Event()
        self.ranges = "yes"  # or "no", or "wrong": status 206 with the whole body
        self.asked: list[tuple[str, str, str]] = []
        self.tokens: set[str | None] = set()  # of requests for datasets and models
        serve = {"target": self.serve_forever, "kwargs": {"poll_interval": 0.02}}
        threading.Thread(**serve, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """Ignore errors: tests include clients that disconnect."""

    def publish(self, files: dict[str, bytes], sha: str) -> None:
        """Serve a dataset of the hub with `sha` as its newest revision; earlier revisions stay."""
        api = f"/api/datasets/{REPO}"
        sizes = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
        info = json.dumps({"id": REPO, "sha": sha, "siblings": sizes}).encode()
        tree = [
            {"type": "file", "path": name, "size": len(body), "oid": _oid(body)}
            for name, body in files.items()
        ]
        self.bodies |= {
            api: info,
            f"{api}/revision/{sha}": info,
            f"{api}/tree/{sha}": json.dumps(tree).encode(),
        }
        for name, body in files.items():
            path = f"/datasets/{REPO}/resolve/{sha}/{name}"
            self.bodies[path] = body
            self.headers[path] = {"ETag": f'"{_oid(body)}"', "X-Repo-Commit": sha}

    def publish_model(self, files: dict[str, bytes], sha: str) -> None:
        """Serve a model of the hub with `sha` as its newest revision."""
        api = f"/api/models/{MODEL}"
        sizes = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
        info = json.dumps({"id": MODEL, "sha": sha, "siblings": sizes}).encode()
        tree = [
            {"type": "file", "path": name, "size": len(body), "oid": _oid(body)}
            for name, body in files.items()
        ]
        self.bodies |= {
            api: info,
            f"{api}/revision/main": info,
            f"{api}/tree/{sha}": json.dumps(tree).encode(),
        }
        for name, body in files.items():
            path = f"/{MODEL}/resolve/{sha}/{name}"
            self.bodies[path] = body
            self.headers[path] = {"ETag": f'"{_oid(body)}"', "X-Repo-Commit": sha}

    def got(self, part: str = "", method: str = "GET") -> list[tuple[str, str]]:
        """Return (path, Range header) of the requests whose path contains `part`."""
        return [(path, of) for how, path, of in self.asked if how == method and part in path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, with_body: bool = True) -> None:
        server, path = self.server, unquote(urlsplit(self.path).path)
        asked = self.headers.get("Range", "")
        server.asked.append((self.command, path, asked))
        if "owner" in path or path.startswith(SERVICE):
            server.tokens.add(self.headers.get("Authorization"))
        status = server.status.get(f"{self.command} {path}") or server.status.get(path)
        body = server.bodies.get(path)
        if status or body is None:
            body, status = b"{}", status or 404
        headers = {"Content-Type": "application/json", **server.headers.get(path, {})}
        first = 0
        if asked and server.ranges != "no" and status is None:
            first = int(asked.removeprefix("bytes=").removesuffix("-"))
            first = 0 if server.ranges == "wrong" else first
            status = 206 if first < len(body) else 416
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
        headers.setdefault("Content-Length", str(len(body) - first))
        self.send_response(status or 200)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if with_body:
            self._send(path, body[first:])

    def _send(self, path: str, body: bytes) -> None:
        end = self.server.cut.pop(path, None)
        if path in self.server.stall:
            self.wfile.write(body[: len(body) // 2])
            self.server.stalled.set()
            self.server.go_on.wait(2 * HANG_S)
        self.wfile.write(body[:end])
        self.close_connection = end is not None


class Proxy(ThreadingHTTPServer):
    """Proxy that sends the requests for all hosts to the server at `upstream`, and records them as
    texts such as `GET http://host/path`.
    """

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.url, self.upstream = f"http://127.0.0.1:{self.server_port}", upstream
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class _Forward(BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        to = urlsplit(self.path)._replace(scheme="", netloc="").geturl()
        upstream = HTTPConnection(urlsplit(self.server.upstream).netloc)
        # Without the host: a server of S3 would take it for the name of a bucket.
        headers = {name: value for name, value in self.headers.items() if name != "Host"}
        upstream.request(self.command, to, body, headers)
        answer = upstream.getresponse()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.read())
        upstream.close()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        pass


def _oid(body: bytes) -> str:
    """Return the hub's id of a large file, its sha256, with which clients compare local files."""
    return hashlib.sha256(body).hexdigest()


def source(**fetch: object) -> Source:
    return Source(license="x", set="train", real=["**"], fetch=Fetch(**fetch))


def fetched(raw: Path, **fetch: object) -> Fetched:
    return fetch_source("s", source(**fetch), raw)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files that the build would read: none in hidden files or folders."""
    paths = [p for p in folder.rglob("*") if p.is_file()]
    inside = {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}
    return {name: body for name, body in inside.items() if not f"/{name}".count("/.")}
