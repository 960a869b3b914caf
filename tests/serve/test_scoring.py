"""Many requests at once: shared batches, limits, timeouts, and a stop that answers all requests."""

import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from imaging.decode import ImageFile
from model.inference.detector import ImageDetector
from serve import scoring
from serve.api import FETCHERS, Service, make_app
from serve.limits import MB, Limits, Refused
from serve.metrics import ServerMetrics
from tests.builders import encode, photo
from tests.serve.conftest import Gate, Serve
from tests.servers import HANG_S, run_async

PHOTO = encode(photo(1))
JPEG = {"content-type": "image/jpeg"}


def send(client: TestClient, count: int = 1) -> Any:
    return client.post("/predict", files=[("image", (str(n), PHOTO)) for n in range(count)])


def wait_for(state: Callable[[], bool], seconds: float = HANG_S) -> None:
    """Wait until `state()` is true; fail after `seconds`."""
    until = time.monotonic() + seconds
    while not state():
        assert time.monotonic() < until, "the expected state was not reached"
        time.sleep(0.005)


def test_images_of_many_requests_are_scored_together(
    serve: Serve, gate: Gate, detector: ImageDetector
) -> None:
    client, service = serve(batch_size=8)
    files = [encode(photo(number)) for number in range(13)]
    with ThreadPoolExecutor(13) as pool:
        first = pool.submit(client.post, "/predict", content=files[0], headers=JPEG)
        assert gate.entered.wait(HANG_S)
        others = [
            pool.submit(client.post, "/predict", content=data, headers=JPEG) for data in files[1:]
        ]
        wait_for(lambda: service.scorer.waiting == 13 and service.scorer.unread == 0)
        gate.open.set()
        answers = [future.result() for future in (first, *others)]
    assert gate.sizes == [1, 8, 4]
    for data, answer in zip(files, answers, strict=True):
        (expected,) = detector.predict([data])
        assert answer.json()["images"][0]["probability"] == pytest.approx(
            expected.probability, abs=1e-6
        )


def test_a_full_queue_is_429_and_later_accepts_images_again(serve: Serve, gate: Gate) -> None:
    client, service = serve(queue=4, max_files=4)
    with ThreadPoolExecutor(2) as pool:
        taken = [pool.submit(send, client, 3)]
        assert gate.entered.wait(HANG_S)
        refused = send(client, 2)  # all or none
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert "3 images of at most 4" in refused.json()["detail"]
        assert client.get("/readyz").status_code == 200
        taken.append(pool.submit(send, client, 1))
        wait_for(lambda: service.scorer.waiting == 4)
        ready = client.get("/readyz")
        assert (ready.status_code, ready.text) == (503, "the queue is full\n")
        assert client.get("/healthz").text == "ok\n"
        gate.open.set()
        assert [future.result().status_code for future in taken] == [200, 200]
    assert service.scorer.waiting == service.scorer.unread == 0
    assert send(client, 4).status_code == 200


def test_bodies_in_memory_are_bounded(serve: Serve, gate: Gate) -> None:
    client, service = serve(max_bytes=MB, held_bytes=MB)
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(send, client)
        assert gate.entered.wait(HANG_S)
        assert 0 < service.held < MB
        big = client.post("/predict", content=bytes(MB - 10), headers=JPEG)
        assert big.status_code == 429 and int(big.headers["retry-after"])
        gate.open.set()
        assert taken.result().status_code == 200
    assert service.held == 0
    assert client.post("/predict", content=bytes(MB - 10), headers=JPEG).status_code == 422


def test_a_request_over_the_time_limit_is_504_and_is_not_scored(serve: Serve, gate: Gate) -> None:
    with ThreadPoolExecutor(1) as pool:
        for timeout_s in (0.3, 3.0, 30.0):  # on a busy machine the first one may be late too
            client, service = serve(timeout_s=timeout_s, batch_size=1)
            first = pool.submit(send, client, 1)
            if gate.entered.wait(timeout_s):
                break
        late = send(client, 5)
        assert late.status_code == 504 and f"within {timeout_s:g} s" in late.json()["detail"]
        assert first.result().status_code == 504
    gate.open.set()
    wait_for(lambda: service.scorer.waiting == 0)
    assert gate.sizes == [1]  # none of the five late images was scored
    assert service.held == service.in_flight == 0


def test_an_error_in_scoring_is_500_and_the_server_goes_on(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, service = serve()

    def fails(*_arguments: object) -> None:
        raise RuntimeError("no memory on the device")

    with monkeypatch.context() as patch:
        patch.setattr(ImageDetector, "score", fails)
        assert send(client, 3).status_code == 500
        patch.setattr(ImageDetector, "preprocess_file", fails)
        assert send(client, 3).status_code == 500
    # The answer is sent with the first error; the other images leave the queue after it.
    wait_for(lambda: service.scorer.waiting == service.scorer.unread == 0)
    assert send(client, 3).status_code == 200


def test_small_images_do_not_wait_for_large_ones(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least as many large images as threads are blocked in decoding."""
    monkeypatch.setattr("serve.scoring.LARGE_PIXELS", 100 * 100)
    preprocess, go_on = ImageDetector.preprocess_file, threading.Event()
    at_once: list[int] = []

    def held_back(self: ImageDetector, file: Any) -> Any:
        if len(file.read()) == len(large):
            at_once.append(1)
            go_on.wait(2 * HANG_S)
        return preprocess(self, file)

    large = encode(photo(1, 200, 200))
    monkeypatch.setattr(ImageDetector, "preprocess_file", held_back)
    client, _ = serve()
    with ThreadPoolExecutor(20) as pool:
        waiting = [
            pool.submit(client.post, "/predict", content=large, headers=JPEG) for _ in range(20)
        ]
        wait_for(lambda: bool(at_once))
        assert send(client).status_code == 200
        assert at_once == [1]  # one at a time
        go_on.set()
        assert {future.result().status_code for future in waiting} == {200}


def test_a_stopping_server_refuses_new_requests_and_answers_accepted_ones(
    serve: Serve, gate: Gate
) -> None:
    client, service = serve()
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(send, client, 3)
        assert gate.entered.wait(HANG_S)
        service.stopping = True
        assert service.in_flight == 1
        ready, refused = client.get("/readyz"), send(client)
        assert (ready.status_code, ready.text) == (503, "stopping\n")
        assert refused.status_code == 503 and int(refused.headers["retry-after"])
        gate.open.set()
        assert taken.result().status_code == 200
    assert service.in_flight == 0


# --- clients that break the protocol --------------------------------------------------------------


def ask(
    service: Service,
    *messages: dict[str, Any],
    after: Callable[[], object] | None = None,
    kind: bytes = b"image/jpeg",
) -> int:
    """Return the status of a request with the body `messages`. The client then sends nothing more;
    it disconnects when `after` returns, or never without `after`.
    """
    statuses: list[int] = []

    async def run() -> None:
        waiting = list(messages)

        async def receive() -> dict[str, Any]:
            if waiting:
                return waiting.pop(0)
            if after is None:
                await asyncio.sleep(60)
            else:
                await asyncio.to_thread(after)
            return {"type": "http.disconnect"}

        async def answer(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        scope = {
            "type": "http", "method": "POST", "path": "/predict", "query_string": b"",
            "headers": [(b"content-type", kind)], "http_version": "1.1",
        }  # fmt: skip
        await make_app(service)(scope, receive, answer)

    run_async(run())
    (status,) = statuses
    return status


def test_a_client_that_leaves_ends_its_downloads(
    detector: ImageDetector, caplog: pytest.LogCaptureFixture
) -> None:
    """The host accepts connections and never answers. One request has half of the threads."""
    service = Service(detector, Limits(allow_urls=True, allow_private_urls=True))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        body = json.dumps({"urls": [url] * 12}).encode()
        whole = {"type": "http.request", "body": body, "more_body": False}
        connections: list[socket.socket] = []

        def accept() -> None:
            connections.extend(silent.accept()[0] for _ in range(FETCHERS // 2))
            silent.settimeout(0.3)
            with pytest.raises(TimeoutError):
                silent.accept()

        began = time.monotonic()
        assert ask(service, whole, after=accept, kind=b"application/json") == 499
        service.close()  # waits for all threads
        assert time.monotonic() - began < HANG_S
        for connection in connections:
            connection.close()
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]
    assert service.held == service.in_flight == 0


def test_a_body_that_never_arrives_is_408(detector: ImageDetector) -> None:
    service = Service(detector, Limits(timeout_s=0.2))
    part = {"type": "http.request", "body": PHOTO[:10], "more_body": True}
    assert ask(service, part) == 408
    assert service.held == service.in_flight == 0
    service.close()


@pytest.mark.parametrize("large", [False, True])
def test_images_that_a_stop_drops_are_refused(
    detector: ImageDetector, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """Two images wait for the only thread, which reads the first, or decodes it if it is large."""
    held, decode = threading.Event(), ImageDetector.preprocess_file

    def slow(_self: ImageDetector, image: ImageFile) -> np.ndarray:
        held.wait(2 * HANG_S)
        return decode(detector, image)

    monkeypatch.setattr(scoring, "threads", lambda: 1)
    monkeypatch.setattr(scoring, "LARGE_PIXELS", 0 if large else 10**9)
    monkeypatch.setattr(ImageDetector, "preprocess_file", slow)
    scorer = scoring.BackgroundScorer(detector, Limits(), ServerMetrics())
    first, *others = scorer.submit(ImageFile(str(n), lambda: PHOTO) for n in range(3))
    thread = scorer._large_reader if large else scorer._readers
    wait_for(lambda: thread._work_queue.qsize() == 2)
    closing = threading.Thread(target=scorer.close)
    closing.start()
    for job in others:
        with pytest.raises(Refused, match="the server is stopping") as caught:
            job.done.result(10)
        assert caught.value.status == 503
    held.set()
    closing.join(HANG_S)
    assert first.done.result(10)["verdict"] and scorer.waiting == scorer.unread == 0


def test_images_of_ended_requests_hold_no_memory(
    detector: ImageDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They leave the queue at once, although the thread for large images is busy."""
    monkeypatch.setattr(scoring, "LARGE_PIXELS", 1)
    began, go_on, decoded = threading.Event(), threading.Event(), []

    decode = ImageDetector.preprocess_file

    def preprocess_file(_self: ImageDetector, file: ImageFile) -> np.ndarray:
        decoded.append(file.name)
        began.set()
        assert go_on.wait(30)
        return decode(detector, file)

    monkeypatch.setattr(ImageDetector, "preprocess_file", preprocess_file)
    scorer = scoring.BackgroundScorer(detector, Limits(), ServerMetrics())
    jobs = scorer.submit([ImageFile(str(n), lambda: PHOTO) for n in range(5)])
    assert began.wait(HANG_S)
    wait_for(lambda: sum(bool(job.data) for job in jobs) == 5)
    for job in jobs:
        assert job.done.cancel()
    assert scorer.waiting == scorer.unread == 0
    assert [job.data for job in jobs] == [b""] * 5
    go_on.set()
    later = scorer.submit([ImageFile("later", lambda: PHOTO)])
    assert later[0].done.result(30)["probability"] is not None
    assert decoded == ["0", "later"]
    scorer.close()
    assert scorer.waiting == scorer.unread == 0


def test_a_disconnected_client_frees_its_queue_slots(detector: ImageDetector, gate: Gate) -> None:
    service = Service(detector, Limits(batch_size=1))
    whole = {"type": "http.request", "body": PHOTO, "more_body": False}
    assert ask(service, whole, after=lambda: gate.entered.wait(HANG_S)) == 499
    gone = ask(
        service, {"type": "http.request", "body": PHOTO, "more_body": True}, after=lambda: None
    )
    assert gone == 499
    assert ask(service, whole, after=lambda: time.sleep(0.1)) == 499  # it was still waiting
    gate.open.set()
    wait_for(lambda: service.scorer.waiting == 0)
    assert gate.sizes == [1]
    assert service.held == service.in_flight == 0
    service.close()
