"""The routes of the HTTP API, and what a request goes through."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from imaging.decode import DecodeError, ImageFile
from model.inference.detector import ImageDetector
from model.inference.provenance import MEANING
from model.inference.signatures import State
from serve import addresses, uploads
from serve.docs import docs_page
from serve.limits import Limits, Refused
from serve.metrics import Metrics
from serve.scoring import Scorer

FETCHERS = 8
"""Addresses that are asked at a time."""

FETCH_SHARE = 0.5
"""Of the time that a request has, what its addresses may take: a slow one costs its own row."""

CLIENT_IS_GONE = 499
"""The status, in the metrics alone, of a request whose client went away."""


class Statement(BaseModel):
    """One thing that a file says of itself."""

    kind: str
    value: str
    where: str
    suggests: Literal["AI", "camera", ""]
    state: State | Literal[""]


class Row(BaseModel):
    """One image, in the columns of `predict.py`: `path` is the name that it was sent under."""

    path: str
    probability: float | None
    verdict: str
    error: str
    provenance: list[Statement]
    checkpoint: str


class Reason(BaseModel):
    """What speaks against relying on the detector."""

    kind: Literal["synthetic", "uncalibrated", "known"]
    text: str


class Answer(BaseModel):
    """The images in the order in which they were sent. Below `band[0]` an image shows no sign of
    AI, from `band[1]` on it is likely AI; a probability is not a proof.
    """

    images: list[Row]
    band: tuple[float, float]
    threshold: float
    calibrated: bool
    notices: list[Reason]


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str


class UnreadableImage(Answer, Problem):
    """The only image of a request cannot be read."""


STATUSES: dict[int | str, dict[str, Any]] = {
    200: {"model": Answer, "description": "A row for each image; one that cannot be read has an "
          "error in place of a probability."},
    400: {"model": Problem, "description": "The form or list cannot be read, or holds no image."},
    401: {"model": Problem, "description": "The API key is missing or another one."},
    403: {"model": Problem, "description": "Addresses are not fetched here, or not this one."},
    408: {"model": Problem, "description": "The body did not arrive within the time limit."},
    413: {"model": Problem, "description": "Too many bytes or too many images."},
    415: {"model": Problem, "description": "Another content type or a compressed body."},
    422: {"model": UnreadableImage, "description": "The only image of the request cannot be read."},
    429: {"model": Problem, "description": "Too much is waiting; Retry-After says for how long."},
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
        "application/json": {
            "schema": {
                "type": "object", "required": ["urls"],
                "properties": {"urls": {"type": "array", "items": {"type": "string"}}},
            }
        },
    },
}  # fmt: skip


class Text(JSONResponse):
    """JSON in UTF-8; names that have no UTF-8 are written with escapes."""

    def render(self, content: Any) -> bytes:
        """The bytes of the body."""
        try:
            return json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            return json.dumps(content, allow_nan=False).encode()


@dataclass(eq=False)
class Service:
    """One detector that answers requests. While it is `stopping` it takes none; `in_flight` counts
    those that were taken and have no answer, `held` the bytes of their bodies.
    """

    detector: ImageDetector
    limits: Limits
    metrics: Metrics = field(default_factory=Metrics)
    stopping: bool = False
    in_flight: int = 0
    held: int = 0

    def __post_init__(self) -> None:
        self.notices = [asdict(notice) for notice in self.detector.notices]
        self.scorer = Scorer(self.detector, self.limits, self.metrics)
        self.fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch")

    def close(self) -> None:
        """End the threads; what is still waiting is scored or dropped."""
        self.fetchers.shutdown(cancel_futures=True)
        self.scorer.close()

    def not_ready(self) -> str:
        """Why no request should be sent here now; empty if one may."""
        if self.stopping:
            return "stopping"
        if not self.scorer.works:
            return "the thread that scores has ended"
        return "the queue is full" if self.scorer.is_full else ""

    async def predict(self, request: Request) -> Response:
        """Answer one request with scores.

        Raises:
            Refused: there are none.
        """
        if self.stopping:
            raise Refused(503, "the server is stopping; try again later", 1)
        until = time.monotonic() + self.limits.timeout_s
        kind = uploads.kind_of(request)
        if kind == uploads.LIST and not self.limits.allow_urls:
            raise Refused(403, "this server fetches no addresses; send the images themselves")
        size = uploads.size_of(request, kind, self.limits)
        if kind == uploads.LIST:
            size = self.limits.max_bytes  # what the addresses may bring
        if self.held + size > self.limits.held_bytes:
            detail = "the server holds as many images as it may; try again later"
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
        """The images of a request.

        Raises:
            Refused: the body is not what it should be, or took too long.
            ClientDisconnect: the client went away.
        """
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                if kind != uploads.LIST:
                    return await uploads.read_images(request, kind, self.limits)
                urls = await uploads.read_addresses(request, self.limits)
        except TimeoutError:
            detail = f"the body did not arrive within {self.limits.timeout_s:g} s"
            raise Refused(408, detail) from None
        return await self._fetched(urls, until)

    async def _fetched(self, urls: list[str], until: float) -> list[ImageFile]:
        """What is behind addresses; one that cannot be had raises when it is read."""
        loop = asyncio.get_running_loop()
        by = until - (1 - FETCH_SHARE) * self.limits.timeout_s
        work = partial(_body_or_error, self.limits, addresses.Allowance(self.limits), by)
        bodies = asyncio.gather(*(loop.run_in_executor(self.fetchers, work, url) for url in urls))
        try:
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                pairs = zip(urls, await bodies, strict=True)
        except TimeoutError:
            raise self._too_late() from None
        return [ImageFile(url, partial(_raised, body)) for url, body in pairs]

    def _too_late(self) -> Refused:
        return Refused(
            504,
            f"the images were not scored within {self.limits.timeout_s:g} s; send fewer at a time, "
            "or try again later",
            self.scorer.retry_after,
        )

    async def _rows(
        self, request: Request, files: list[ImageFile], until: float
    ) -> list[dict[str, Any]]:
        """A row for each image.

        Raises:
            Refused: the queue is full, or it took too long.
            ClientDisconnect: nobody waits for the answer any more.
        """
        jobs = self.scorer.submit(files)
        rows = asyncio.gather(*(asyncio.wrap_future(job.done) for job in jobs))
        gone = asyncio.ensure_future(_disconnected(request))
        either: set[asyncio.Future[Any]] = {rows, gone}
        try:
            left = max(0.0, until - time.monotonic())
            await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if rows.done():
                return rows.result()
            raise ClientDisconnect if gone.done() else self._too_late()
        finally:
            gone.cancel()
            rows.cancel()  # and with it every job that has no row yet

    def _answer(self, rows: list[dict[str, Any]]) -> Response:
        answer = {
            "images": rows, "band": self.detector.band, "threshold": self.detector.threshold,
            "calibrated": bool(self.detector.meta["calibration"]), "notices": self.notices,
        }  # fmt: skip
        if len(rows) == 1 and rows[0]["error"]:
            return Text({"detail": f"{rows[0]['path']}: {rows[0]['error']}", **answer}, 422)
        return Text(answer)


def _body_or_error(
    limits: Limits, allowance: addresses.Allowance, until: float, url: str
) -> bytes | DecodeError:
    try:
        return addresses.fetch(url, limits, allowance, until)
    except addresses.FetchError as error:
        return error


def _raised(body: bytes | DecodeError) -> bytes:
    if isinstance(body, DecodeError):
        raise body
    return body


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_app(service: Service) -> FastAPI:
    """The application around a service; `serve.guard.Guard` stands before it."""
    app = FastAPI(
        title="AI image detector",
        summary="Is an image a real photograph or AI-generated?",
        description=f"Each image gets a probability and a verdict. {MEANING}",
        docs_url=None,  # FastAPI's pages load their scripts from another host
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
        "/predict", responses=STATUSES, openapi_extra={"requestBody": BODY}, response_model=Answer
    )
    async def predict(request: Request) -> Response:
        """Score one or many images.

        They come as the files of a form, one as the body itself (`?name=` is what it is called), or
        where the server allows it as a list of addresses.
        """
        return await service.predict(request)

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> Response:
        """Whether the process lives."""
        return PlainTextResponse("ok\n")

    @app.get(
        "/readyz", response_class=PlainTextResponse,
        responses={503: {"description": "Not ready; the text says why."}},
    )  # fmt: skip
    async def readyz() -> Response:
        """Whether a request would be taken: the detector is loaded, the queue has room."""
        reason = service.not_ready()
        return PlainTextResponse(f"{reason or 'ready'}\n", 503 if reason else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page(app.openapi(), service.limits))

    return app
