"""Define the routes of the HTTP API and the service that scores the images of a request.

Main entries: `make_app(service)` takes a `Service` and returns a FastAPI application with POST
`/predict` and GET `/healthz` (200 while the process runs), `/readyz` (503 and the reason if it is
not ready), `/metrics` (for Prometheus) and `/docs` (an HTML page), also by HEAD. It checks no API
key: see `serve/guard.py`.

`Service(detector, limits, metrics)` starts the threads that score:

- `detector`: an `ImageDetector`, from `model.load_detector()`.
- `limits`: a `Limits` of `serve/limits.py`, which must be given. `Limits()` has all defaults.
- `metrics`: a `ServerMetrics` of `serve/metrics.py` (default: a new one).

`Service()` raises ValueError if this machine's list of trusted C2PA signers cannot be used. That is
the file that the variable DETECTOR_TRUST_LIST names, else the downloaded list, if there is one.

A caller sets the attribute `stopping` to true to refuse new requests. `close()` ends the threads:
images that are decoded are still scored, the others are refused. `not_ready()` returns why the
service is not ready (stopping, a full queue, no scoring thread), or "".

The coroutine `Service.predict(request)` takes a FastAPI request. Its body is one of these:

- A form (multipart/form-data) with image files, under any field names.
- One image (image/... or application/octet-stream). `?name=` in the URL gives its name (default
  "image 0").
- With `limits.allow_urls`: JSON (application/json) with a list of URLs, `{"urls": [...]}`.

It returns a JSON response with the fields of an `Answer`. Its status is 200. If the request has
only one image and it cannot be read, the status is 422, and `detail` has the reason. The fields:

- `images`: a list with a `Row` for each image, in the order of the request: `path` (the file name
  or URL that was sent), `probability` of AI, 0 to 1 (null if unreadable), `verdict` ("likely AI",
  "uncertain", "no sign of AI" or "unreadable"), `error` (the reason if unreadable, else ""),
  `provenance` (a list of `Statement`: what the file says about its origin, with the fields of
  `Evidence` in model/inference/provenance.py) and `checkpoint` (identity of the detector).
- `band`: [low, high], between which a verdict is "uncertain". `threshold`: the decision threshold.
- `calibrated`: whether the detector is calibrated (else the probability is only a score).
- `notices`: a list of `Reason`s not to rely on the detector: `kind` ("synthetic", "known",
  "uncalibrated" or "threshold") and `text`.

It raises `Refused` with the HTTP status if the request is invalid, too large or not allowed, or the
server is busy, too slow or stopping. The application turns this into a JSON response (`Problem`).
It raises `ClientDisconnect` if the client is gone. Unexpected errors pass through (status 500).

The other classes, `STATUSES`, `BODY`, `NAME`, `KEY` and `NO_KEY` describe requests and answers for
the API's documentation.
`Text` is a JSON response in UTF-8.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

from fastapi import FastAPI, Request, Security
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from escape import as_json
from imaging.decode import DecodeError, ImageFile
from model.c2pa.signatures import State
from model.inference.detector import ImageDetector
from model.inference.fitness import Kind
from model.inference.provenance import MEANING
from serve import addresses, uploads
from serve.docs import docs_page
from serve.limits import Limits, Refused
from serve.metrics import ServerMetrics
from serve.scoring import BackgroundScorer

FETCHERS = 8
"""Number of threads that fetch URLs; one request uses at most half of them."""

FETCH_SHARE = 0.5
"""Part of the request's time limit that is allowed for fetching its URLs. A URL that takes longer
gets an error in its row, and the other images are still scored.
"""

CLIENT_IS_GONE = 499
"""Status for requests whose client disconnected; it appears in the metrics only."""


class Statement(BaseModel):
    """One statement in the file about its origin, such as EXIF or C2PA."""

    kind: str
    value: str
    where: str
    suggests: Literal["AI", "camera", ""]
    state: State | Literal[""]


class Row(BaseModel):
    """Result of one image, with the columns of `predict.py`. `path` is the name that was sent."""

    path: str
    probability: float | None
    verdict: str
    error: str
    provenance: list[Statement]
    checkpoint: str


class Reason(BaseModel):
    """A reason not to rely on the detector."""

    kind: Kind
    text: str


class Answer(BaseModel):
    """The images, in the order of the request. The verdict is "no sign of AI" for a probability
    below `band[0]`, "likely AI" at or above `band[1]`, and "uncertain" between. A probability is
    not a proof.
    """

    images: list[Row]
    band: tuple[float, float]
    threshold: float
    calibrated: bool
    notices: list[Reason]


class Problem(BaseModel):
    """The reason why a request was refused."""

    detail: str


class UnreadableImage(Answer, Problem):
    """Answer to a request with a single image that cannot be read."""


STATUSES: dict[int | str, dict[str, Any]] = {
    200: {"model": Answer, "description": "A row for each image; an unreadable image has an error "
          "instead of a probability."},
    400: {"model": Problem, "description": "The form or list is invalid or has no image."},
    401: {"model": Problem, "description": "The API key is missing or wrong."},
    403: {"model": Problem, "description": "This server does not fetch URLs, or not this URL."},
    408: {"model": Problem, "description": "The body did not arrive within the time limit."},
    413: {"model": Problem, "description": "Too many bytes or too many images."},
    415: {"model": Problem, "description": "Unsupported content type, or a compressed body."},
    422: {"model": UnreadableImage, "description": "The only image of the request cannot be read."},
    429: {"model": Problem, "description": "The server is busy; retry after Retry-After seconds."},
    503: {"model": Problem, "description": "The server is stopping."},
    504: {"model": Problem, "description": "The images were not scored within the time limit."},
}  # fmt: skip

BINARY = {"type": "string", "format": "binary"}
BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {"type": "object", "additionalProperties": {"type": "array", "items": BINARY}}
        },
        "image/*": {"schema": BINARY},
        "application/octet-stream": {"schema": BINARY},
        "application/json": {
            "schema": {
                "type": "object", "required": ["urls"],
                "properties": {"urls": {"type": "array", "items": {"type": "string"}}},
            }
        },
    },
}  # fmt: skip
NAME = {
    "name": uploads.PARAMETER, "in": "query", "schema": {"type": "string"},
    "description": "Name of the image in the answer, if the body is one image.",
}  # fmt: skip

# Only for the documentation: `serve.guard.Guard` checks the key.
KEY = [
    Security(HTTPBearer(scheme_name="bearer", auto_error=False)),
    Security(APIKeyHeader(scheme_name="header", name="X-API-Key", auto_error=False)),
]
NO_KEY: dict[str, Any] = {}
"""Security requirement of a server without a key: requests need none."""


class Text(JSONResponse):
    """JSON response in UTF-8; bytes of a name that are not UTF-8 are escaped."""

    def render(self, content: Any) -> bytes:
        """Return the body as bytes."""
        return as_json(content, allow_nan=False).encode()


@dataclass(eq=False)
class Service:
    """A detector that answers requests.

    While `stopping` is true, new requests are refused. `in_flight` counts the accepted requests
    without an answer. `held` is the memory reserved for their bodies, in bytes.
    """

    detector: ImageDetector
    limits: Limits
    metrics: ServerMetrics = field(default_factory=ServerMetrics)
    stopping: bool = False
    in_flight: int = 0
    held: int = 0

    def __post_init__(self) -> None:
        self.notices = [asdict(notice) for notice in self.detector.notices]
        self.scorer = BackgroundScorer(self.detector, self.limits, self.metrics)
        self.fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch")

    def close(self) -> None:
        """Stop all threads. Decoded images are still scored; other waiting images are refused."""
        self.fetchers.shutdown(cancel_futures=True)
        self.scorer.close()

    def not_ready(self) -> str:
        """Return why the server is not ready for requests; empty if it is ready."""
        if self.stopping:
            return "stopping"
        if not self.scorer.works:
            return "the scoring thread has ended"
        return "the queue is full" if self.scorer.is_full else ""

    async def predict(self, request: Request) -> Response:
        """Score the images of one request.

        Raises:
            Refused: the request is invalid or too large, or the server is busy or stopping.
        """
        if self.stopping:
            raise Refused(503, "the server is stopping; try again later", 1)
        until = time.monotonic() + self.limits.timeout_s
        kind = uploads.kind_of(request)
        if kind == uploads.LIST and not self.limits.allow_urls:
            raise Refused(403, "this server does not fetch URLs; send the image files")
        size = uploads.size_of(request, kind, self.limits)
        if kind == uploads.LIST:
            size = self.limits.max_bytes  # limit for all URLs together
        if self.held + size > self.limits.held_bytes:
            detail = "the memory for requests is full; try again later"
            raise Refused(429, detail, self.scorer.retry_after)
        self.in_flight += 1
        self._hold(size)
        try:
            files = await self._files(request, kind, until)
            return self._answer(await self._rows(request, files, until))
        finally:
            self._hold(-size)
            self.in_flight -= 1

    def _hold(self, size: int) -> None:
        self.held += size
        self.metrics.held.set(self.held)

    async def _files(self, request: Request, kind: str, until: float) -> list[ImageFile]:
        """Read the images of a request.

        Raises:
            Refused: the body is invalid, or did not arrive in time.
            ClientDisconnect: the client disconnected.
        """
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                if kind != uploads.LIST:
                    return await uploads.read_images(request, kind, self.limits)
                urls = await uploads.read_addresses(request, self.limits)
        except TimeoutError:
            detail = f"the body did not arrive within {self.limits.timeout_s:g} s"
            raise Refused(408, detail) from None
        return await self._fetched(request, urls, until)

    async def _fetched(self, request: Request, urls: list[str], until: float) -> list[ImageFile]:
        """Fetch the images behind URLs. Reading an image raises the error of a failed fetch.

        Raises:
            Refused: none of the URLs may be fetched, or the time limit was reached.
            ClientDisconnect: the client disconnected.
        """
        by = until - (1 - FETCH_SHARE) * self.limits.timeout_s
        allowance, turns = addresses.Allowance(self.limits, by), asyncio.Semaphore(FETCHERS // 2)
        loop, work = asyncio.get_running_loop(), partial(_body_or_error, self.limits, allowance)

        async def fetched(url: str) -> bytes | DecodeError | Refused:
            async with turns:
                return await loop.run_in_executor(self.fetchers, work, url)

        try:
            bodies = await self._in_time(request, asyncio.gather(*map(fetched, urls)), until)
        finally:
            allowance.end()
        refused = [body for body in bodies if isinstance(body, Refused)]
        if len(refused) == len(urls):
            raise refused[0]
        pairs = zip(urls, bodies, strict=True)
        return [ImageFile(url, partial(_raised, body)) for url, body in pairs]

    async def _in_time(
        self, request: Request, work: asyncio.Future[list[Any]], until: float
    ) -> list[Any]:
        """Return the result of `work`, or cancel it when the time is over or the client has left.

        Raises:
            Refused: the time limit was reached.
            ClientDisconnect: the client disconnected.
        """
        gone = asyncio.ensure_future(_disconnected(request))
        either: set[asyncio.Future[Any]] = {work, gone}
        try:
            left = max(0.0, until - time.monotonic())
            await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise ClientDisconnect if gone.done() else self._too_late()
        finally:
            gone.cancel()
            # Take the error of a canceled `gather`, or asyncio logs it.
            work.add_done_callback(_take_error)
            work.cancel()

    def _too_late(self) -> Refused:
        return Refused(
            504,
            f"the images were not scored within {self.limits.timeout_s:g} s; send fewer images, or "
            "try again later",
            self.scorer.retry_after,
        )

    async def _rows(
        self, request: Request, files: list[ImageFile], until: float
    ) -> list[dict[str, Any]]:
        """Score the images; returns a row for each.

        Raises:
            Refused: the queue is full, or the time limit was reached.
            ClientDisconnect: the client disconnected.
        """
        jobs = self.scorer.submit(files)
        rows = asyncio.gather(*(asyncio.wrap_future(job.done) for job in jobs))
        return await self._in_time(request, rows, until)  # canceled: jobs without a row are, too

    def _answer(self, rows: list[dict[str, Any]]) -> Response:
        answer = {
            "images": rows, "band": self.detector.band, "threshold": self.detector.threshold,
            "calibrated": bool(self.detector.meta["calibration"]), "notices": self.notices,
        }  # fmt: skip
        if len(rows) == 1 and rows[0]["error"]:
            return Text({"detail": f"{rows[0]['path']}: {rows[0]['error']}", **answer}, 422)
        return Text(answer)


def _take_error(done: asyncio.Future[Any]) -> None:
    if not done.cancelled():
        done.exception()


def _body_or_error(
    limits: Limits, allowance: addresses.Allowance, url: str
) -> bytes | DecodeError | Refused:
    try:
        return addresses.fetch(url, limits, allowance)
    except (addresses.AddressError, Refused) as error:
        return error


def _raised(body: bytes | DecodeError | Refused) -> bytes:
    if isinstance(body, Refused):  # an error in one row: a redirect must not affect other rows
        raise DecodeError(body.detail)
    if isinstance(body, DecodeError):
        raise body
    return body


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_app(service: Service) -> FastAPI:
    """Build the FastAPI application of a service. Requests reach it through `serve.guard.Guard`."""
    app = FastAPI(
        title="AI image detector",
        summary="Is an image a real photograph or AI-generated?",
        description="Each image gets a probability and a verdict. The metadata of its file is "
        f"shown too: {MEANING[0].lower()}{MEANING[1:]}",
        docs_url=None,  # FastAPI's pages load scripts from another host
        redoc_url=None,
    )

    @app.exception_handler(Refused)
    async def refuse(_request: Request, error: Refused) -> Response:
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Text({"detail": error.detail}, error.status, headers)

    @app.exception_handler(ClientDisconnect)
    async def forget(_request: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_IS_GONE)

    @app.post(
        "/predict", responses=STATUSES, response_model=Answer, dependencies=KEY,
        openapi_extra={"requestBody": BODY, "parameters": [NAME], "security": [NO_KEY]},
    )  # fmt: skip
    async def predict(request: Request) -> Response:
        """Score one or many images.

        Send images as the files of a form, or one image as the body (`?name=` gives its name), or a
        list of URLs if the server allows URLs.
        """
        return await service.predict(request)

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> Response:
        """Return 200 while the process is running."""
        return PlainTextResponse("ok\n")

    @app.get(
        "/readyz", response_class=PlainTextResponse,
        responses={503: {"description": "Not ready; the text gives the reason."}},
    )  # fmt: skip
    async def readyz() -> Response:
        """Return 200 if new requests are accepted, 503 if the queue is full or the server stops."""
        reason = service.not_ready()
        return PlainTextResponse(f"{reason or 'ready'}\n", 503 if reason else 200)

    @app.get(
        "/metrics", response_class=PlainTextResponse, dependencies=KEY,
        responses={401: STATUSES[401]}, openapi_extra={"security": [NO_KEY]},
    )  # fmt: skip
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page(app.openapi(), service.limits))

    app.openapi()  # made before HEAD is added, which GET implies (RFC 9110)
    for route in app.routes:
        if isinstance(route, APIRoute) and route.methods and "GET" in route.methods:
            route.methods.add("HEAD")
    return app
