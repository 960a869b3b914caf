"""Check the API key of each request, add security headers to each response, and count the requests.

Main entry: `Guard(app, service, key)`, an ASGI middleware. The result is an ASGI application.

- `app`: the ASGI application to protect, from `make_app()` of `serve/api.py`.
- `service`: the `Service` of `serve/api.py`, in whose metrics the requests are counted and timed.
- `key`: the API key, an ASCII text; with an empty one, none is required.

A client sends the key as `Authorization: Bearer KEY` or `X-API-Key: KEY`. A request for a path of
`WITH_KEY` without the right key gets status 401. Other requests are passed to the application, and
`HEADERS` are added to all responses. `PATHS` are the paths that the metrics list by name.
"""

import hmac
import time

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import console
from serve.api import CLIENT_IS_GONE, Service, Text

PATHS = ("/predict", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json")
WITH_KEY = ("/predict", "/metrics")
"""Paths that require the API key, if the server has one."""

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Guard:
    """ASGI middleware around the routes. `key` is the API key; if it is empty, none is required."""

    def __init__(self, app: ASGIApp, service: Service, key: str):
        self.app, self.service, self.key = app, service, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "other"
        began, status = time.monotonic(), 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            if path in WITH_KEY and not self._knows(Headers(scope=scope)):
                detail = "the API key is missing or wrong; send Authorization: Bearer KEY"
                headers = {"WWW-Authenticate": "Bearer"}
                await Text({"detail": detail}, 401, headers)(scope, receive, send_with_headers)
            else:
                await self.app(scope, receive, send_with_headers)
        except h11.LocalProtocolError:
            status = 400  # invalid HTTP; uvicorn has answered
        finally:
            passed = time.monotonic() - began
            self.service.metrics.requests.labels(path, str(status)).inc()
            if status != CLIENT_IS_GONE:
                self.service.metrics.seconds.labels(path).observe(passed)
            console.log.debug("%s %s %d, %.0f ms", scope["method"], path, status, 1000 * passed)

    def _knows(self, headers: Headers) -> bool:
        """Return whether a request has the key. The comparison takes constant time."""
        if not self.key:
            return True
        scheme, _, said = headers.get("authorization", "").partition(" ")
        said = said if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(said.strip().encode(), self.key)
