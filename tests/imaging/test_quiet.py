"""Output of decoders is dropped, other output is not."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from imaging import quiet
from imaging.quiet import without_chatter
from tests.servers import HANG_S

CHATTER = [
    "\x1b[0;31m[ERROR] \x1b[0m[libjpeg_turbo_decoder] Could not decode jpeg code stream",
    "[ERROR] [jpeg_parser] Invalid marker",
    "[ERROR:1@8.586] global loadsave.cpp:1374 imdecode_ imdecode_(''): can't read header",
    "[ WARN:18@11.718] global grfmt_tiff.cpp:122 TIFF_Warning JPEGPreDecode",
    "Corrupt JPEG data: 260 extraneous bytes before marker 0xd9",
    "Warning: unknown JFIF revision number 3.01",
    "libpng warning: iCCP: known incorrect sRGB profile",
]
OTHERS = ["step 100: loss 0.3", "Warning: mine", "[ERROR] disk full", "Corrupt checkpoint"]


def test_only_decoders_are_silent(capfd: pytest.CaptureFixture) -> None:
    with without_chatter(), without_chatter():
        for line in [*CHATTER, *OTHERS]:
            os.write(2, f"{line}\n".encode())
        sys.stderr.write("from Python\n")  # one call: the filter writes at the same time
    os.write(2, b"[ERROR] [jpeg_parser] afterward\n")
    said = capfd.readouterr().err.splitlines()
    assert sorted(said) == sorted([*OTHERS, "from Python", "[ERROR] [jpeg_parser] afterward"])


def test_threads_share_the_filter(capfd: pytest.CaptureFixture) -> None:
    def work() -> None:
        for _ in range(10):
            with without_chatter():
                os.write(2, f"{CHATTER[1]}\n{OTHERS[0]}\n".encode())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capfd.readouterr().err.splitlines() == [OTHERS[0]] * 40


def test_a_traceback_is_still_printed() -> None:
    assert "RuntimeError: mine" in printed("raise RuntimeError('mine')")


DEEP = """def deep(n):
    deep(n - 1) if n else time.sleep(60)
for _ in range(16):
    threading.Thread(target=deep, args=(110,), daemon=True).start()
time.sleep(0.5)
"""
SEGFAULT = "ctypes.string_at(0)"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (SEGFAULT, "Fatal Python error: Segmentation fault"),
        (DEEP + SEGFAULT, "Fatal Python error: Segmentation fault"),  # more than fits in a pipe
        ("ctypes.CDLL(None).perror(b'mine'); ctypes.CDLL(None).abort()", "mine: "),
        ("os.write(2, b'no end of line'); os._exit(0)", "no end of line"),
        ("os.killpg(0, signal.SIGTERM)", "handler"),
    ],
)
def test_the_last_lines_of_a_process_that_dies_are_printed(body: str, expected: str) -> None:
    handler = "signal.signal(signal.SIGTERM, lambda *_: (os.write(2, b'handler'), os._exit(0)))\n"
    assert expected in printed(f"{handler}time.sleep(0.3)\n{body}")


def printed(body: str) -> str:
    """Return what a program prints to standard error that runs `body` with decoders silenced."""
    script = (
        "import ctypes, faulthandler, os, signal, threading, time\n"
        "from imaging.quiet import without_chatter\n"
        "faulthandler.enable()\n"
        f"with without_chatter():\n{textwrap.indent(body, ' ')}"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60,
        start_new_session=True,
    )  # fmt: skip
    return done.stderr


def test_without_a_process_for_the_filter_all_lines_are_printed(
    capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/none")
    before = {*Path("/proc/self/fd").iterdir()}
    with without_chatter():
        os.write(2, f"{CHATTER[0]}\n".encode())
    assert capfd.readouterr().err.splitlines() == [CHATTER[0]]
    assert {*Path("/proc/self/fd").iterdir()} == before


def test_lines_of_a_filter_that_is_slow_are_printed_before_the_block_ends(
    capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(process: subprocess.Popen, timeout: float | None = None) -> int:
        raise subprocess.TimeoutExpired(process.args, timeout or 0)

    with without_chatter():
        os.write(2, f"{CHATTER[0]}\n{OTHERS[0]}\nwithout an end".encode())
        child = quiet._filters[0].process
        os.kill(child.pid, signal.SIGSTOP)
        threading.Timer(0.1, os.kill, [child.pid, signal.SIGCONT]).start()
        monkeypatch.setattr(subprocess.Popen, "wait", late)
    assert capfd.readouterr().err == f"{OTHERS[0]}\nwithout an end"
    monkeypatch.undo()
    assert child.wait(HANG_S) == 0


def test_a_process_that_outlives_the_block_writes_through_the_filter(
    capfd: pytest.CaptureFixture,
) -> None:
    """It holds the filter's input open. A filter that is left must not raise a ResourceWarning."""
    lines = f"{CHATTER[0]}\n{OTHERS[1]}\n".encode()
    script = f"import os; input(); os.write(2, {lines!r})"
    with without_chatter():
        os.write(2, f"{OTHERS[0]}\n".encode())
        number = quiet._filters[0].process.pid
        child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
    assert capfd.readouterr().err.splitlines() == [OTHERS[0]]
    child.communicate(b"\n", HANG_S)
    os.waitpid(number, 0)
    assert capfd.readouterr().err.splitlines() == [OTHERS[1]]


def test_a_filter_that_was_killed_is_not_waited_for(capfd: pytest.CaptureFixture) -> None:
    with without_chatter():
        quiet._filters[0].process.kill()
        quiet._filters[0].process.wait()
    os.write(2, f"{OTHERS[0]}\n".encode())
    assert capfd.readouterr().err.splitlines() == [OTHERS[0]]
