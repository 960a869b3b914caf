"""What `benchmarks.serve` prints of its last requests is what it sent."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.serve import LAST, main, stop

SERVER = """
import signal, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.mark.parametrize("count", [3, LAST + 4])
def test_the_last_requests_are_counted(count: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with process:
        port = int(process.stdout.readline())
        ended = stop(process, port, {Path(f"{index}.jpg"): b"data" for index in range(count)})
    assert ended["requests"] == sum(ended["statuses"].values()) == min(count, LAST)
    assert ended["code"] == 0


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 1 and "no image below" in result.stderr
