"""Output of decoders is dropped, other output is not."""

import os
import subprocess
import sys
import threading

import pytest

from imaging.quiet import without_chatter

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
        sys.stderr.write("from Python\n")  # one call: the filter's thread writes at the same time
    os.write(2, b"[ERROR] [jpeg_parser] afterward\n")
    said = capfd.readouterr().err.splitlines()
    assert sorted(said) == sorted([*OTHERS, "from Python", "[ERROR] [jpeg_parser] afterward"])


def test_threads_share_the_filter(capfd: pytest.CaptureFixture) -> None:
    def work() -> None:
        for _ in range(50):
            with without_chatter():
                os.write(2, f"{CHATTER[1]}\n{OTHERS[0]}\n".encode())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capfd.readouterr().err.splitlines() == [OTHERS[0]] * 200


def test_a_traceback_is_still_printed() -> None:
    script = (
        "from imaging.quiet import without_chatter\n"
        "with without_chatter():\n raise RuntimeError('mine')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "RuntimeError: mine" in done.stderr
