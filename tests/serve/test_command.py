"""The command `python -m serve`: its options, and a real server from start to stop."""

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from model.inference.detector import ImageDetector
from serve.__main__ import main
from serve.server import bound_socket
from tests.builders import ROOT, encode, photo
from tests.servers import HANG_S

PHOTO = encode(photo(1))


@dataclass
class Running:
    """A server in another process, on loopback."""

    process: subprocess.Popen
    port: int
    log: Path

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG_S)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def send(self, data: bytes) -> bytes:
        """Send any bytes and return the answer; empty if the server closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=HANG_S) as sock:
            try:
                sock.sendall(data)
                with contextlib.suppress(OSError):  # the server may have closed the connection
                    sock.shutdown(socket.SHUT_WR)
                return b"".join(iter(lambda: sock.recv(2**16), b""))
            except (ConnectionResetError, BrokenPipeError):
                return b""

    def predict(self, data: bytes = PHOTO) -> tuple[int, bytes]:
        kind = {"Content-Type": "image/jpeg"}
        return self.ask("POST", "/predict", data, **kind, Authorization="Bearer k")


@pytest.fixture(scope="module")
def running(served_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "serve", "--runs", served_runs, "--port", "0",
               "--max-mb", "1", "--device", "cpu", "--batch-size", "1"]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, stderr=out, env={**os.environ, "DETECTOR_API_KEY": "k"}
        )
    for _ in range(1200):
        if port := re.search(r"listening on http://127.0.0.1:(\d+)", log.read_text()):
            break
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    yield Running(process, int(port[1]), log)
    process.kill()
    process.wait()


def test_a_real_server_from_start_to_stop(running: Running, detector: ImageDetector) -> None:
    assert running.ask("GET", "/readyz") == (200, b"ready\n")
    assert running.ask("POST", "/predict", PHOTO)[0] == 401
    (expected,) = detector.predict([PHOTO])
    status, body = running.predict()
    assert status == 200 and repr(expected.probability).encode() in body

    # The server refuses while the client is still sending; the client still gets the answer.
    status, body = running.predict(bytes(30 * 2**20))
    assert status == 413 and b"more than 1 MB" in body
    head = b"GET /healthz HTTP/1.1\r\nHost: a\r\n"
    for hostile in (
        b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 9, head + b"a b: c\r\n\r\n",
        head + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", b"GET /" + b"a" * 2**20,
        head + b"A: " + b"b" * 2**20, b"POST /predict HTTP/1.1\r\nHost: a\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ):  # fmt: skip
        assert re.match(rb"(HTTP/1.1 4|$)", running.send(hostile)), hostile[:50]
    assert running.ask("GET", "/healthz") == (200, b"ok\n")

    # A request whose body is still arriving at the signal is answered.
    late = socket.create_connection(("127.0.0.1", running.port), timeout=HANG_S)
    late.sendall(
        b"POST /predict HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer k\r\n"
        b"Content-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(PHOTO)
    )
    with ThreadPoolExecutor(30) as pool:
        taken = [pool.submit(running.predict, encode(photo(seed))) for seed in range(30)]
        wait(taken, HANG_S, FIRST_COMPLETED)
        running.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + HANG_S
        while running.ask("GET", "/readyz") != (503, b"stopping\n"):
            assert time.monotonic() < until, "the server is not stopping"
            time.sleep(0.01)
        assert running.predict()[0] == 503
        with late:
            late.sendall(PHOTO)
            assert late.recv(2**16).startswith(b"HTTP/1.1 200")
        statuses = {future.result()[0] for future in taken}
    assert statuses <= {200, 503} and 200 in statuses
    assert running.process.wait(HANG_S) == 0
    assert "stopped; all requests were answered" in running.log.read_text()
    assert "Traceback" not in running.log.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "65536"], "65536 is not in the range"),
        (["--max-files", "9", "--queue", "8"], "--max-files 9 is more than --queue 8"),
        (["--allow-private-urls"], "add --allow-urls"),
        (["--timeout", "0"], "is not in the range"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and said in result.stderr
    result = CliRunner().invoke(main, env={"DETECTOR_API_KEY": " "})
    assert result.exit_code == 2 and "DETECTOR_API_KEY is empty" in result.stderr


def test_a_used_port_or_a_missing_checkpoint_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["--port", port])
    assert result.exit_code == 1
    assert re.fullmatch(rf"(.*\n)*Error: port {port} .* in use; .*--port.*\n", result.stderr)
    (tmp_path / "none").mkdir()
    result = CliRunner().invoke(main, ["--port", "0", "--runs", str(tmp_path / "none")])
    assert result.exit_code == 1 and "no checkpoint below" in result.stderr


def test_the_command_line_is_checked_before_anything_heavy_is_loaded() -> None:
    program = (
        "import sys\nfrom serve.__main__ import main\n"
        "try:\n    main(['--no-such-option'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'fastapi', 'uvicorn', 'timm', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize("port", [-1, 65536, 70000])
def test_a_port_that_does_not_exist_is_not_bound(port: int) -> None:
    with pytest.raises(ValueError, match=f"there is no port {port}; use 0 to 65535"):
        bound_socket("127.0.0.1", port)
