"""Read the body of a request: a form with image files, one image, or a JSON list of URLs.

Main entries, of which the first two are coroutines:

- `read_images(request, kind, limits)` reads a form or one image, and returns a list with an
  `ImageFile` (`name`, and `read()`, which returns the bytes) for each image. A single image gets
  its name from the parameter `name` of the URL, or without it the name "image 0".
- `read_addresses(request, limits)` returns the list of URLs of a JSON body `{"urls": [...]}`;
  `serve/addresses.py` downloads them.
- `kind_of(request)` returns the content type of the request: "multipart/form-data" for a form,
  "application/json" for a list of URLs (then call `read_addresses()`), or for a single image a type
  that begins with a text of `RAW`, such as "image/png".
- `size_of(request, kind, limits)` returns the size of the body in bytes from its Content-Length
  header, before it is read; without the header, it returns the largest size that is allowed.

Their arguments:

- `request`: a `Request` of FastAPI.
- `kind`: the text from `kind_of()`.
- `limits`: a `Limits` of `serve/limits.py`; `Limits()` has the defaults.

All four raise `Refused` (of `serve/limits.py`) if the request is invalid, not supported or too
large: its `status` is the HTTP status, its `detail` a sentence for the client. The coroutines raise
starlette's ClientDisconnect if the client is gone. Bodies stay in memory; uploaded images are never
written to disk.
"""

import asyncio
import reprlib
from collections.abc import AsyncGenerator
from functools import partial

from fastapi import Request

from imaging.decode import ImageFile
from serve.form import Form, too_many
from serve.limits import MAX_JSON_BYTES, MB, Limits, Refused
from storage import parse_json

PARAMETER = "name"
"""Parameter of the URL: the name of the image, if the body is one image."""
RAW = ("image/", "application/octet-stream")
FORM, LIST = "multipart/form-data", "application/json"
TAKEN = f"{FORM} with files, one image as image/*, or {LIST}"


def kind_of(request: Request) -> str:
    """Return the content type of a request, without its parameters.

    Raises:
        Refused: the content type is not supported, or the body is compressed (status 415). Or the
            URL has a parameter without an effect on this body (400): the client may rely on it.
    """
    if strange := sorted(set(request.query_params) - {PARAMETER}):
        raise Refused(
            400, f"unknown parameter {reprlib.repr(strange[0])}; the URL may have ?{PARAMETER}= "
            "with an image as the body. Error rates and the like are options of the server",
        )  # fmt: skip
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise Refused(415, f"content-encoding {encoding} is not supported; send it uncompressed")
    if kind not in (FORM, LIST) and not kind.startswith(RAW):
        raise Refused(415, f"content type {kind or '(none)'} is not supported; expected {TAKEN}")
    names = request.query_params.getlist(PARAMETER)
    if names and kind in (FORM, LIST):
        own = "each file of a form" if kind == FORM else "each image of a list of URLs"
        raise Refused(
            400, f"?{PARAMETER}= is the name of an image that is the body; {own} has its own name"
        )
    if len(names) > 1:
        raise Refused(400, f"the URL has {len(names)} names (?{PARAMETER}=), but the body is one "
                      "image; send one name")  # fmt: skip
    return kind


def size_of(request: Request, kind: str, limits: Limits) -> int:
    """Return the size of the body in bytes, or the limit if the request does not give the size.

    Raises:
        Refused: the body is too large (status 413).
    """
    largest = min(limits.max_bytes, MAX_JSON_BYTES) if kind == LIST else limits.max_bytes
    said = request.headers.get("content-length", "")
    size = int(said) if said.isdecimal() else largest
    if size > largest:
        raise _too_large(largest)
    return size


async def read_images(request: Request, kind: str, limits: Limits) -> list[ImageFile]:
    """Read the images of a form, or the single image in the body.

    Raises:
        Refused: the body is too large, or the form is invalid, empty, or has too many images.
        starlette.requests.ClientDisconnect: the client disconnected.
    """
    if kind != FORM:
        body = b"".join([part async for part in _bounded(request, limits.max_bytes)])
        return [_image(request.query_params.get(PARAMETER) or "image 0", body)]
    form = Form(request.headers["content-type"], limits.max_files)
    async for part in _bounded(request, limits.max_bytes):
        # In a thread, because a body that nearly contains boundaries takes a second per megabyte.
        await asyncio.to_thread(form.feed, part)
    return [_image(name, data) for name, data in form.finish()]


async def read_addresses(request: Request, limits: Limits) -> list[str]:
    """Read the URLs of the JSON body `{"urls": [...]}`.

    Raises:
        Refused: the body is not such a list, or the list is too long.
        starlette.requests.ClientDisconnect: the client disconnected.
    """
    largest = min(limits.max_bytes, MAX_JSON_BYTES)
    body = b"".join([part async for part in _bounded(request, largest)])
    try:
        content = parse_json(body)
    except ValueError:
        content = None
    urls = content.get("urls") if isinstance(content, dict) else None
    if not urls or not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
        raise Refused(400, 'the body is not a list of URLs; expected {"urls": ["https://..."]}')
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
