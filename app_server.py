"""Serve the web page `app.py` with limited memory: `streamlit run app_server.py`.

Main entry: `app`, the ASGI application that Streamlit starts: its own server for `app.py` behind
the middleware `UploadGuard`. `UploadGuard(app)` takes the ASGI application that it protects. For
each HTTP request:

- An upload is a PUT request to a path that contains `UPLOADS`. It is refused if all uploads
  together would exceed `MAX_HELD_BYTES`: those in memory, those being received, and this one. Then
  it gets status 503, and its body is not read.
- The size of an upload is its Content-Length. Without one, the largest size that Streamlit accepts
  is assumed. A size below `LEAST_BYTES` counts as `LEAST_BYTES`.
- Files of a page that was closed during the upload are deleted after `GRACE_S` seconds.
- Other uploads and all other requests are passed on.
- Every response gets the security headers `HEADERS`.

The environment variable DETECTOR_UPLOADS_MB sets `MAX_HELD_BYTES`, in MiB (default 1024). It is
read at the import. Streamlit has no settings for such a limit or such headers.

`held()` takes nothing and returns the bytes (int) of all uploads in memory, each file counted with
at least `LEAST_BYTES`. It works only while Streamlit's server runs.
"""

import asyncio
import os
import re
from pathlib import Path
from typing import cast

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from streamlit import config
from streamlit.runtime import get_instance
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.starlette import App

from page.session import GRACE_S

_UPLOADS_MB = os.environ.get("DETECTOR_UPLOADS_MB") or "1024"
if not _UPLOADS_MB.isdecimal() or not int(_UPLOADS_MB):
    raise SystemExit(
        f"Error: DETECTOR_UPLOADS_MB is {_UPLOADS_MB!r}, expected a whole number above 0"
    )

MAX_HELD_BYTES = int(_UPLOADS_MB) * 2**20
"""Limit for the uploads of all visitors together, in bytes."""

IDLE_S = 20.0
"""Seconds without a byte after which an upload is ended. Until then its memory is reserved."""

LEAST_BYTES = 2**20
"""Smallest size that a file is counted with, in bytes: previews of small files take memory too."""

UPLOADS = "/_stcore/upload_file/"

HEADERS = {
    # Streamlit's page needs inline scripts, eval and blobs. Other hosts and frames are forbidden.
    # Not every browser takes 'self' for the page's own websocket, so its host is named.
    "Content-Security-Policy": (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' {host}"
        "data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class UploadGuard:
    """ASGI middleware: refuse uploads above `MAX_HELD_BYTES` with status 503, pass other requests
    to Streamlit, and add `HEADERS` to every response.
    """

    def __init__(self, app: ASGIApp):
        self.app = app
        self.arriving = 0  # bytes of uploads that are being received

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers_for(Headers(scope=scope)))
            await send(message)

        if scope["method"] == "PUT" and UPLOADS in scope["path"]:
            await self._upload(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        said = Headers(scope=scope).get("content-length", "")
        largest = config.get_option("server.maxUploadSize") * 2**20  # Streamlit refuses more
        size = max(int(said) if said.isdecimal() else largest, LEAST_BYTES)
        if held() + self.arriving + size > MAX_HELD_BYTES:
            text = "The memory for images is full; try again later.\n"
            await PlainTextResponse(text, 503)(scope, receive, send)
            return
        arrived = False

        async def receive_soon() -> Message:
            nonlocal arrived
            async with asyncio.timeout(None if arrived else IDLE_S):
                message = await receive()
            arrived = not message.get("more_body", False)
            return message

        self.arriving += size
        try:
            await self.app(scope, receive_soon, send)
        except TimeoutError:
            text = f"No part of the upload arrived in {IDLE_S:g} seconds.\n"
            await PlainTextResponse(text, 408)(scope, receive, send)
        finally:
            self.arriving -= size
            session = scope["path"].partition(UPLOADS)[2].partition("/")[0]
            if not get_instance().is_active_session(session):
                asyncio.get_running_loop().call_later(GRACE_S, _forget_if_closed, session)


def _forget_if_closed(session: str) -> None:
    """Delete the files of a session that is closed. Streamlit deletes the files that a closing page
    has, but also accepts files that arrive later, and never deletes these.
    """
    if not get_instance().is_active_session(session):
        cast(MemoryUploadedFileManager, get_instance().uploaded_file_mgr).remove_session_files(
            session
        )


def headers_for(request: Headers) -> dict[str, str]:
    """Return `HEADERS` for a request, with the host that it names."""
    host = request.get("host", "")
    sockets = f"ws://{host} wss://{host} " if re.fullmatch(r"[\w.:\[\]-]+", host) else ""
    return {name: value.replace("{host}", sockets) for name, value in HEADERS.items()}


def held() -> int:
    """Return the bytes of all uploads in memory, each file counted with at least `LEAST_BYTES`."""
    store = cast(MemoryUploadedFileManager, get_instance().uploaded_file_mgr)
    sessions = list(store.file_storage.values())
    return sum(max(len(file.data), LEAST_BYTES) for one in sessions for file in list(one.values()))


app = App(Path(__file__).parent / "app.py", middleware=[Middleware(UploadGuard)])
