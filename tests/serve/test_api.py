"""Answers of the HTTP API: the same rows as `predict.py`, or a status and a reason."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from model.inference import results
from model.inference.detector import ImageDetector
from model.inference.provenance import read_evidence
from serve import uploads
from serve.api import Service, make_app
from serve.guard import WITH_KEY
from serve.limits import MB
from tests.builders import KINDS, encode, photo
from tests.provenance_files import png
from tests.serve.conftest import Serve

ROUNDING = 1e-6
"""How far a probability may lie from that of another batch size: how a processor adds up depends on
the size of a batch. 2e-7 at most were seen on a CPU (docs/python.md).
"""

PHOTO = encode(photo(1))
JPEG = {"content-type": "image/jpeg"}


def form(*files: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("image", (f"{number}.jpg", data)) for number, data in enumerate(files)]


# --- scores ---------------------------------------------------------------------------------------


def test_an_answer_has_the_rows_of_predict(serve: Serve, detector: ImageDetector) -> None:
    """Names, columns, verdicts, errors and provenance are equal; probabilities up to rounding."""
    settings = "a castle\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 8x8"
    files = [png(parameters=settings), *KINDS.values(), *(encode(photo(n)) for n in range(9))]
    client, _ = serve()
    answer = client.post("/predict", files=form(*files))
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert content["band"] == [0.3, 0.6] and content["threshold"] == 0.6
    assert content["calibrated"] is True
    expected = list(detector.predict(files))
    assert len(content["images"]) == len(files)
    for number, (row, said) in enumerate(zip(content["images"], expected, strict=True)):
        assert tuple(row) == results.COLUMNS
        assert row["path"] == f"{number}.jpg"
        assert row["checkpoint"] == detector.identity
        assert (row["verdict"], row["error"]) == (said.verdict, said.error)
        if said.error:
            assert row["probability"] is None
        else:
            assert row["probability"] == pytest.approx(said.probability, abs=ROUNDING)
        values = {**row, "provenance": read_evidence(files[number])}
        assert json.loads(results.line("jsonl", values)) == row
    assert content["images"][0]["provenance"][0]["kind"] == "generator"
    assert len({row["probability"] for row in content["images"]}) > 9


def test_the_answer_contains_the_notices_of_the_detector(
    detector: ImageDetector, serve: Serve
) -> None:
    client, service = serve()
    assert client.post("/predict", files=form(PHOTO)).json()["notices"] == []
    meta = {**detector.meta, "calibration": None}
    unfit = Service(replace(detector, meta=meta), service.limits)
    answer = TestClient(make_app(unfit)).post("/predict", files=form(PHOTO)).json()
    unfit.close()
    assert answer["calibrated"] is False and answer["band"] == [0.6, 0.6]
    (notice,) = answer["notices"]
    assert notice["kind"] == "uncalibrated" and "not calibrated" in notice["text"]


def test_batches_of_one_give_the_same_bits_as_predict(
    serve: Serve, detector: ImageDetector
) -> None:
    """With batches of one image, other requests have no influence."""
    files = [encode(photo(number)) for number in range(12)]
    client, _ = serve(batch_size=1)
    rows = client.post("/predict", files=form(*files)).json()["images"]
    alone = [detector.predict(data).probability for data in files]
    assert [row["probability"] for row in rows] == alone


def test_the_body_can_be_one_image(serve: Serve, detector: ImageDetector) -> None:
    client, _ = serve()
    (expected,) = detector.predict([PHOTO])
    for kind in ("image/jpeg", "image/x-odd; q=1", "application/octet-stream", "IMAGE/PNG"):
        answer = client.post(
            "/predict?name=a%2Fb.jpg", content=PHOTO, headers={"content-type": kind}
        )
        assert answer.status_code == 200, answer.text
        (row,) = answer.json()["images"]
        assert (row["path"], row["probability"]) == ("a/b.jpg", expected.probability)
    answer = client.post("/predict", content=PHOTO, headers=JPEG)
    assert answer.json()["images"][0]["path"] == "image 0"


def test_a_name_in_the_url_means_nothing_for_other_bodies(serve: Serve) -> None:
    client, _ = serve()
    answers = {
        "each file of a form has its own name": client.post(
            "/predict?name=x", files={"image": ("a.jpg", PHOTO)}
        ),
        "each image of a list of URLs has": client.post("/predict?name=", json={"urls": ["a"]}),
        "send one name": client.post("/predict?name=a&name=b", content=PHOTO, headers=JPEG),
    }
    for said, answer in answers.items():
        assert answer.status_code == 400 and said in answer.json()["detail"]


def test_any_file_name_is_accepted(serve: Serve) -> None:
    client, _ = serve()
    for name in ("später ☂.jpg", "a\u202eb.jpg", "../../a b", "x" * 500, "=1+1"):
        answer = client.post("/predict", files={"image": (name, PHOTO)})
        assert answer.status_code == 200, answer.text
        assert answer.json()["images"][0]["path"] == name
    answer = client.post(
        "/predict",
        content=multipart(FILE.replace("a.jpg", "\udce9"), PHOTO),
        headers={"content-type": FORM},
    )
    assert answer.json()["images"][0]["path"] == "\N{REPLACEMENT CHARACTER}"


# --- files that are not images --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_image_is_422_with_the_error_of_predict(
    serve: Serve, detector: ImageDetector, kind: str
) -> None:
    client, _ = serve()
    (said,) = detector.predict([KINDS[kind]])
    for answer in (
        client.post("/predict?name=x", content=KINDS[kind], headers=JPEG),
        client.post("/predict", files={"image": ("x", KINDS[kind])}),
    ):
        assert answer.status_code == (422 if said.error else 200), answer.text
        assert answer.json()["images"][0]["error"] == said.error
        if said.error:
            assert answer.json()["detail"] == f"x: {said.error}"


def test_many_bad_images_get_error_rows(serve: Serve) -> None:
    client, _ = serve()
    answer = client.post("/predict", files=form(KINDS["html"], KINDS["empty"]))
    assert answer.status_code == 200
    assert [row["verdict"] for row in answer.json()["images"]] == ["unreadable"] * 2


def multipart(head: str, data: bytes = b"x", tail: bytes = b"\r\n--x--\r\n") -> bytes:
    return f"--x\r\n{head}\r\n\r\n".encode("utf-8", "surrogateescape") + data + tail


FILE = 'Content-Disposition: form-data; name="a"; filename="a.jpg"'
FORM = "multipart/form-data; boundary=x"

BODIES = {
    "no boundary": ("multipart/form-data", multipart(FILE), 400, "no boundary"),
    "a long boundary": (f"multipart/form-data; boundary={'b' * 999}", b"", 400, "boundary"),
    "a wrong boundary": ("multipart/form-data; boundary=y", multipart(FILE), 400, "form"),
    "an empty form": (FORM, b"", 400, "ends before"),
    "a form that ends at once": (FORM, b"--x--\r\n", 400, "no file"),
    "no name": (FORM, multipart("Content-Disposition: form-data"), 400, "a text"),
    "no header": (FORM, multipart("odd"), 400, "form"),
    "a wrong header": (FORM, multipart("a: b"), 400, "no Content-Disposition"),
    "a text": (FORM, multipart('Content-Disposition: form-data; name="a"'), 400, "-F image=@"),
    "noise": (FORM, bytes(range(256)) * 40, 400, "form"),
    "many headers": (FORM, multipart("\r\n".join(f"a{n}: b" for n in range(5000))), 400, "form"),
    "a huge header": (FORM, multipart("a: " + "b" * 900_000), 400, "form"),
    "a truncated form": (FORM, multipart(FILE, PHOTO, b""), 400, "ends before"),
    "many files": (FORM, b"".join(multipart(FILE, b"", b"\r\n") for _ in range(5)) + b"--x--", 413,
                   "more than 4 images"),
    "a large file": (FORM, multipart(FILE, bytes(MB)), 413, "more than 1 MB"),
    "a large image": ("image/png", bytes(MB + 1), 413, "more than 1 MB"),
    "an empty image": ("image/png", b"", 422, "empty"),
    "an archive": ("image/png", b"PK\3\4" + bytes(60), 422, "a ZIP archive: unpack it"),
    "no content type": ("", PHOTO, 415, "expected multipart/form-data"),
    "an unsupported type": ("text/html", PHOTO, 415, "text/html"),
    "a list of URLs": ("application/json", b'{"urls": ["http://a"]}', 403, "fetch URLs"),
}  # fmt: skip


@pytest.mark.parametrize("what", BODIES)
def test_a_wrong_body_gets_a_status_and_a_sentence(serve: Serve, what: str) -> None:
    kind, body, status, said = BODIES[what]
    client, service = serve(max_bytes=MB, max_files=4)

    def in_parts() -> Iterator[bytes]:
        for start in range(0, len(body), 2**16):
            yield body[start : start + 2**16]

    for content in (body, in_parts()):  # with a length, and without one
        answer = client.post("/predict", content=content, headers={"content-type": kind})
        assert answer.status_code == status, answer.text
        assert said in answer.json()["detail"]
    assert service.held == service.in_flight == service.scorer.waiting == 0
    assert client.post("/predict", files=form(PHOTO)).status_code == 200


def test_wrong_methods_paths_and_encodings_are_refused(serve: Serve) -> None:
    client, _ = serve()
    assert client.get("/predict").status_code == 405
    assert client.post("/nothing").status_code == 404
    compressed = client.post("/predict", content=PHOTO, headers=JPEG | {"content-encoding": "gzip"})
    assert compressed.status_code == 415 and "gzip" in compressed.json()["detail"]
    strange = client.post("/predict?max_fpr=0.01", content=PHOTO, headers=JPEG)
    assert strange.status_code == 400 and "unknown parameter 'max_fpr'" in strange.json()["detail"]


# --- the key, the metrics, the docs page ----------------------------------------------------------


def test_without_the_key_nothing_is_scored(serve: Serve) -> None:
    client, _ = serve(key="s3cret")
    wrong = ({}, {"authorization": "Bearer s3cre"}, {"authorization": "Basic s3cret"},
             {"x-api-key": "s3cret2"}, {"authorization": b"Bearer \xff\xfe"})  # fmt: skip
    for headers in wrong:
        for answer in (
            client.post("/predict", files=form(PHOTO), headers=headers),
            client.get("/metrics", headers=headers),
        ):
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "s3cret" not in answer.text
    for headers in ({"authorization": "bearer s3cret"}, {"X-API-Key": "s3cret"}):
        assert client.post("/predict", files=form(PHOTO), headers=headers).status_code == 200
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"])
def test_head_is_answered_as_get_and_other_methods_are_405_with_those_allowed(
    serve: Serve, path: str
) -> None:
    """Probes of some monitors send HEAD."""
    client, service = serve()
    assert client.head(path).status_code == client.get(path).status_code == 200
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        answer = client.request(method, path)
        assert answer.status_code == 405
        assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}
    service.stopping = True
    assert client.head("/readyz").status_code == 503
    assert set(client.get("/openapi.json").json()["paths"]["/healthz"]) == {"get"}


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"])
def test_images_are_sent_by_post_alone(serve: Serve, method: str) -> None:
    answer = serve()[0].request(method, "/predict")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_metrics_count_requests_and_images(serve: Serve) -> None:
    client, _ = serve()
    client.post("/predict", files=form(PHOTO, KINDS["html"]))
    client.post("/predict", files=form(KINDS["html"]))
    client.get("/a" * 50)
    figures = client.get("/metrics").text
    for line in (
        'detector_requests_total{path="/predict",status="200"} 1.0',
        'detector_requests_total{path="/predict",status="422"} 1.0',
        'detector_requests_total{path="other",status="404"} 1.0',
        'detector_images_total{verdict="unreadable"} 2.0',
        "detector_batch_images_count 1.0",
        'detector_request_seconds_count{path="/predict"} 2.0',
        "detector_queue_images 0.0",
        "detector_held_bytes 0.0",
    ):
        assert f"{line}\n" in figures, line


def test_the_docs_page_needs_no_other_host_and_describes_every_route(serve: Serve) -> None:
    from openapi_spec_validator import validate

    client, _ = serve(max_files=7)
    document = client.get("/openapi.json").json()
    validate(document)
    page = client.get("/docs")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"<script|src=|https?://(?!HOST)", page.text)
    assert "at most 7 images" in page.text and "addresses at most" not in page.text
    with_addresses = serve(allow_urls=True)[0].get("/docs").text
    assert "50 MB, a list of addresses at most 0.25 MB" in " ".join(with_addresses.split())
    assert "(<code>?name=</code> gives its name)" in page.text and "`" not in page.text
    for path in document["paths"]:
        assert f" {path}</code>" in page.text
    assert set(document["paths"]) == {"/predict", "/healthz", "/readyz", "/metrics"}
    statuses = document["paths"]["/predict"]["post"]["responses"]
    assert {"200", "401", "403", "408", "413", "415", "422", "429", "503", "504"} <= set(statuses)


def test_the_document_describes_all_that_a_client_may_send(serve: Serve) -> None:
    """A generated client can send only what the document has."""
    document = serve()[0].get("/openapi.json").json()
    predict = document["paths"]["/predict"]["post"]
    bodies = [body.removesuffix("*") for body in predict["requestBody"]["content"]]
    assert sorted(bodies) == sorted([uploads.FORM, uploads.LIST, *uploads.RAW])
    assert [(one["in"], one["name"]) for one in predict["parameters"]] == [
        ("query", uploads.PARAMETER)
    ]
    keys = document["components"]["securitySchemes"]
    assert [(one["type"], one.get("scheme") or one["name"]) for one in keys.values()] == [
        ("http", "bearer"), ("apiKey", "X-API-Key"),
    ]  # fmt: skip
    for path, operations in document["paths"].items():
        for operation in operations.values():
            alternatives = [{name: []} for name in keys] + [{}] if path in WITH_KEY else []
            assert operation.get("security", []) == alternatives, path
            assert ("401" in operation["responses"]) == (path in WITH_KEY), path
