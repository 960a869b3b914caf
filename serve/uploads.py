"""The body of a request as images: a form with files, one image as it is, or a list of addresses.

Bodies stay in memory, so that nothing of what people send is ever written to a disk.
"""

import json
from collections.abc import AsyncGenerator
from functools import partial

from fastapi import Request

from imaging.decode import ImageFile
from serve.form import Form, too_many
from serve.limits import MB, Limits, Refused

MAX_JSON_BYTES = MB // 4
RAW = ("image/", "application/octet-stream")
FORM, LIST = "multipart/form-data", "application/json"
TAKEN = f"{FORM} with files, one image as image/*, or {LIST}"


def kind_of(request: Request) -> str:
    """The content type of a request, without its parameters.

    Raises:
        Refused: it is none of those that are taken, or the body is compressed.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise Refused(415, f"a body in content-encoding {encoding} is not taken; send it as it is")
    if kind not in (FORM, LIST) and not kind.startswith(RAW):
        raise Refused(415, f"content type {kind or '(none)'} is not taken; expected {TAKEN}")
    return kind


def size_of(request: Request, kind: str, limits: Limits) -> int:
    """How many bytes the body may turn out to have.

    Raises:
        Refused: more than are taken.
    """
    largest = min(limits.max_bytes, MAX_JSON_BYTES) if kind == LIST else limits.max_bytes
    said = request.headers.get("content-length", "")
    size = int(said) if said.isdecimal() else largest
    if size > largest:
        raise _too_large(largest)
    return size


async def read_images(request: Request, kind: str, limits: Limits) -> list[ImageFile]:
    """The images of a form, or the one that is the body.

    Raises:
        Refused: too large, too many, none, or no form.
        starlette.requests.ClientDisconnect: the client went away.
    """
    if kind != FORM:
        body = b"".join([part async for part in _bounded(request, limits.max_bytes)])
        return [_image(request.query_params.get("name") or "image 0", body)]
    form = Form(request.headers["content-type"], limits.max_files)
    async for part in _bounded(request, limits.max_bytes):
        form.feed(part)
    return [_image(name, data) for name, data in form.finish()]


async def read_addresses(request: Request, limits: Limits) -> list[str]:
    """The addresses of `{"urls": [...]}`.

    Raises:
        Refused: it is no such list, or too long.
        starlette.requests.ClientDisconnect: the client went away.
    """
    largest = min(limits.max_bytes, MAX_JSON_BYTES)
    body = b"".join([part async for part in _bounded(request, largest)])
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    urls = content.get("urls") if isinstance(content, dict) else None
    if not urls or not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
        raise Refused(400, 'the body is no list of addresses; expected {"urls": ["https://..."]}')
    if len(urls) > limits.max_files:
        raise too_many(limits.max_files)
    return urls


async def _bounded(request: Request, largest: int) -> AsyncGenerator[bytes, None]:
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > largest:
            raise _too_large(largest)
        yield part


def _image(name: str, data: bytes) -> ImageFile:
    return ImageFile(name, partial(bytes, data))


def _too_large(largest: int) -> Refused:
    return Refused(413, f"the body of the request has more than {largest / MB:g} MB")
