"""The middleware between Streamlit and the browser: headers, and a memory limit for uploads."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

import app_server
from tests.servers import HANG_S, run_async

UPLOAD = "/_stcore/upload_file/session/file"
MB = 2**20


class Streamlit:
    """Fake Streamlit application that stores uploads in the same kind of store."""

    def __init__(self) -> None:
        self.file_storage: dict[str, dict[str, SimpleNamespace]] = {}
        self.uploaded_file_mgr = self
        self.fails = False
        self.is_open = True

    def is_active_session(self, session: str) -> bool:
        return self.is_open and session == "session"

    def remove_session_files(self, session: str) -> None:
        self.file_storage.pop(session, None)

    async def upload(self, request: Request) -> Response:
        data = await request.body()
        if self.fails:
            raise RuntimeError("the connection broke")
        files = self.file_storage.setdefault("session", {})
        files[str(len(files))] = SimpleNamespace(data=data)
        return Response(status_code=204)

    async def page(self, _request: Request) -> Response:
        return Response("page")


@pytest.fixture
def streamlit(monkeypatch: pytest.MonkeyPatch) -> Streamlit:
    inner = Streamlit()
    monkeypatch.setattr(app_server, "get_instance", lambda: inner)
    monkeypatch.setattr(app_server, "MAX_HELD_BYTES", 4 * MB)
    return inner


@pytest.fixture
def guard(streamlit: Streamlit) -> app_server.UploadGuard:
    routes = [Route("/", streamlit.page), Route(UPLOAD, streamlit.upload, methods=["PUT"])]
    return app_server.UploadGuard(Starlette(routes=routes))


def test_every_answer_has_the_headers(guard: app_server.UploadGuard) -> None:
    client = TestClient(guard)
    for answer in (client.get("/"), client.get("/none"), client.put(UPLOAD, content=bytes(9 * MB))):
        for name, value in app_server.HEADERS.items():
            assert answer.headers[name] == value or "{host}" in value
        policy = answer.headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in policy
        assert "connect-src 'self' ws://testserver wss://testserver data:" in policy
    answer = client.get("/", headers={"host": "a; script-src *"})
    assert "connect-src 'self' data: blob:;" in answer.headers["Content-Security-Policy"]


def test_all_uploads_together_are_limited_and_memory_is_freed(
    streamlit: Streamlit, guard: app_server.UploadGuard
) -> None:
    client = TestClient(guard)
    sizes = [MB, 2 * MB, 10, 10]  # small files count as a megabyte
    assert [client.put(UPLOAD, content=bytes(size)).status_code for size in sizes] == [
        204, 204, 204, 503,
    ]  # fmt: skip
    assert "try again later" in client.put(UPLOAD, content=b"x").text
    assert guard.arriving == 0
    streamlit.file_storage.clear()  # pages are closed
    assert client.put(UPLOAD, content=bytes(MB)).status_code == 204


def test_an_upload_that_ends_after_its_page_was_closed_is_deleted(
    streamlit: Streamlit, guard: app_server.UploadGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_server, "GRACE_S", 0.1)
    forget, before, ended = app_server._forget_if_closed, [], threading.Event()

    def late(session: str) -> None:
        before.append((app_server.held(), time.monotonic() - began))
        forget(session)
        ended.set()

    monkeypatch.setattr(app_server, "_forget_if_closed", late)
    streamlit.is_open = False
    with TestClient(guard) as client:
        began = time.monotonic()
        assert client.put(UPLOAD, content=bytes(MB)).status_code == 204
        assert ended.wait(HANG_S)
        assert app_server.held() == 0
    ((held, after),) = before
    assert held == MB and after >= 0.1  # a page may reconnect until then


def test_an_interrupted_upload_frees_its_memory(
    streamlit: Streamlit, guard: app_server.UploadGuard
) -> None:
    streamlit.fails = True
    client = TestClient(guard)
    for _ in range(10):
        with pytest.raises(RuntimeError, match="broke"):
            client.put(UPLOAD, content=bytes(2 * MB))
    assert guard.arriving == 0


@pytest.mark.usefixtures("streamlit")
def test_an_upload_that_stops_frees_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_server, "IDLE_S", 0.05)
    parts = [{"type": "http.request", "body": b"a", "more_body": True}]

    async def reading(_scope: object, receive, _send: object) -> None:
        while (await receive()).get("more_body"):
            pass

    async def upload() -> list[int]:
        guard, statuses = app_server.UploadGuard(reading), []

        async def receive() -> dict:
            return parts.pop() if parts else await asyncio.Event().wait()

        async def send(message: dict) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        headers = [(b"content-length", b"1048576")]
        await guard({"type": "http", "method": "PUT", "path": UPLOAD, "headers": headers},
                    receive, send)  # fmt: skip
        assert guard.arriving == 0
        return statuses

    assert run_async(upload()) == [408]


def test_simultaneous_uploads_are_counted_together(streamlit: Streamlit) -> None:
    """Ten uploads of 1 MB are in progress at once, and four fit. An upload without a stated size
    counts as the largest size that Streamlit accepts.
    """
    begun, go_on = [], asyncio.Event()

    async def slow(_scope: object, _receive: object, send) -> None:
        begun.append(1)
        await go_on.wait()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def together(headers: list[tuple[bytes, bytes]]) -> list[int]:
        guard, statuses = app_server.UploadGuard(slow), []

        async def send(message: dict) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        scope = {"type": "http", "method": "PUT", "path": UPLOAD, "headers": headers}
        tasks = [asyncio.create_task(guard(scope, None, send)) for _ in range(10)]
        await asyncio.sleep(0.01)
        go_on.set()
        await asyncio.gather(*tasks)
        assert guard.arriving == 0
        return statuses

    statuses = run_async(together([(b"content-length", b"1048576")]))
    assert sorted(statuses) == [204] * 4 + [503] * 6
    go_on.clear()
    assert run_async(together([])) == [503] * 10
