"""Terminal output: escaped file names, tables that are never cut, errors of one line."""

import contextlib
import io
import logging
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

import cli
import console
import escape
import interrupts
from tests.builders import ROOT

HOSTILE = "a\x1b[2J\x9b31m\rb [red]FLUX.1 [dev][/base] :skull: \u202e"
SHOWN = r"a\x1b[2J\x9b31m\rb [red]FLUX.1 [dev][/base] :skull: \u202e"


def in_a_terminal(code: str, columns: int = 200) -> str:
    """Run a Python program in a terminal of this width; returns its output with Unix line ends."""
    ours, its = pty.openpty()
    size = {"COLUMNS": str(columns), "LINES": str(min(columns, 25))}
    environment = os.environ | size | {"TERM": "xterm", "PYTHONUTF8": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", f"import console\n{code}"],
        cwd=ROOT, stdin=its, stdout=its, stderr=its, env=environment, close_fds=True,
    ) as process:  # fmt: skip
        os.close(its)
        received = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the program closed its end
                break
            if not part:
                break
            received += part
    os.close(ours)
    assert process.returncode == 0, received.decode()
    text = received.decode().replace("\r\n", "\n")
    return re.sub(
        r"\x1b\[[\d;?]*[mhlKA]", "", text
    )  # escape sequences of rich: colors, progress bar


PRINTING = [
    f"console.say({HOSTILE!r})",
    f"console.say_data({HOSTILE!r})",
    f"console.table({HOSTILE!r}, [{HOSTILE!r}, 'n'], [[{HOSTILE!r}, 1]])",
    f"with console.progress({HOSTILE!r}, 2) as advance: advance(1, {HOSTILE!r})",
    f"console.start_logging(None, None, False); console.log.info('%s', {HOSTILE!r})",
]
"""Statements that print a file name in each way."""


def test_file_names_cannot_send_control_characters_to_a_terminal() -> None:
    """All in one process, with a mark behind each statement."""
    lines = [line for code in PRINTING for line in (code, "print('NEXT', flush=True)")]
    *outputs, rest = in_a_terminal("\n".join(lines)).split("NEXT\n")
    assert len(outputs) == len(PRINTING) and not rest
    for code, received in zip(PRINTING, outputs, strict=True):
        assert SHOWN in received, code
        assert not set(received) & set("\x1b\x9b\u202e"), (code, received)
        assert "\rb" not in received, code  # only the progress bar may return to the line start


def test_a_size_of_0_counts_as_not_set() -> None:
    """Such as COLUMNS=0: rich would crop all text to nothing."""
    code = (
        "console.start_logging(None, None, False); console.log.info('a warning')\n"
        "console.say('a result'); console.table('', ['name'], [['a row']])\n"
        "with console.progress('a bar', 2) as advance: advance()\n"
    )
    received = in_a_terminal(code, columns=0)
    for text in ("a warning", "a result", "a row", "a bar"):
        assert text in received


def test_matplotlib_prints_nothing_about_its_own_folder() -> None:
    """As for a user without a home folder. torchmetrics imports it, also where nothing is drawn."""
    code = "import console, model.metrics, matplotlib; print(matplotlib.get_cachedir())"
    environment = os.environ | {"MPLCONFIGDIR": f"{os.devnull}/none"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert not done.stderr
    assert "matplotlib-" in done.stdout  # a temporary folder


def test_a_table_is_never_cut() -> None:
    """In a terminal that is too narrow, each row is printed as a paragraph."""
    columns = ["what", "reals", "recall", "false positives", "AUROC"]
    row = ["generator FLUX.1 [schnell]", 12345, "0.944 (0.90-0.98)", "0.123456789", "0.5"]
    code = f"console.table('set', {columns}, [{row}])"
    for width in (200, 80, 40):
        received = in_a_terminal(code, width)
        assert "…" not in received
        for value in ("generator FLUX.1 [schnell]", "12,345", "0.123456789"):
            assert value in received, (width, received)
    assert "recall: 0.944 (0.90-0.98)" in received  # of 40 columns


def test_progress_bars_are_of_the_encoding_of_standard_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """rich takes lines of other characters where it is UTF-8."""
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "latin-1"))
    assert console.ERR.encoding == "latin-1"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0123, "0.012 s"), (64, "64 s"), (700, "12 min"), (8000, "2.2 h"), (3e5, "3.5 days")],
)
def test_durations_have_readable_units(seconds: float, said: str) -> None:
    assert console.duration(seconds) == said


def test_without_a_terminal_long_work_prints_a_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then each fiftieth of the time so far. What a resumed command had done takes no time."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(console, "time", clock)
    monkeypatch.setattr(console.log, "handlers", [])
    console.start_logging(None, None, False)  # type: ignore[arg-type]
    with console.progress("scoring", 1_000_000) as advance:
        advance(200_000)
        for clock.now in range(1, 131):
            advance(1000, "2 failed" if clock.now > 100 else "")
        clock.now = 10_000.0
        advance(70_000)
        for clock.now in (10_190.0, 10_210.0):
            advance(100)
    with console.progress("comparing", None) as advance, console.progress("x", 2, False) as none:
        for clock.now in (10_211.0, 10_272.0):
            advance(5)
            none(1)
    with console.progress("backbone, MiB", 100) as advance:
        for clock.now, more in ((10_273.0, 0.5), (10_334.0, 74.7), (10_396.0, 44.8)):
            advance(more)
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 260,000 of 1,000,000, about 12 min left",
        "scoring: 320,000 of 1,000,000, about 11 min left (2 failed)",
        "scoring: 400,000 of 1,000,000, about 20.6 h left",
        "scoring: 400,200 of 1,000,000, about 7.3 days left",
        "comparing: 10",
        "backbone, MiB: 75 of 100, about 20 s left",
        "backbone, MiB: 120 of 100",
    ]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8"])
def test_standard_output_of_any_encoding_takes_every_name(encoding: str) -> None:
    code = (
        "import console; console.say('東京 \\udce9'); console.say_data('東京 \\udce9');"
        "console.table('東京', ['東京'], [['東京 \\udce9']])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stdout.splitlines()
    escaped = "東京 " if encoding == "utf-8" else r"\u6771\u4eac "
    assert lines[0].decode(encoding) == rf"{escaped}\xe9"
    assert lines[1] == r"東京 \xe9".encode()  # data is UTF-8, whatever the encoding


def run(action, *arguments: str):
    """Run a command that calls `action`."""

    @click.command(cls=console.Command)
    @click.option("--path", type=cli.LocalPath())
    @cli.options()
    def command(path) -> None:
        action()

    return CliRunner().invoke(command, arguments)


def raiser(error: BaseException):
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError(HOSTILE), 1, f"Error: {SHOWN}"),
        (
            OSError(28, "No space left on device", "out.csv"),
            1,
            "Error: out.csv: No space left on device",
        ),
        (
            OSError(28, "No space left on device", b"caf\xe9"),
            1,
            r"Error: caf\xe9: No space left on device",
        ),
        (
            OSError(28, "No space left on device"),
            1,
            "Error: No space left on device: standard output, or a temporary file in",
        ),
        (OSError("no answer"), 1, "Error: no answer"),
        (ValueError(), 1, "Error: ValueError"),
        (click.UsageError(f"{HOSTILE} is wrong"), 2, f"{SHOWN} is wrong"),
        (ValueError("https://me:secret@host/a does not answer"), 1, "https://***@host/a does not"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (KeyboardInterrupt("SIGTERM"), 130, "stopped by SIGTERM"),
    ],
)
def test_a_mistake_is_one_harmless_line(error: BaseException, code: int, said: str) -> None:
    result = run(raiser(error))
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.stderr and "Aborted" not in result.stderr
    assert "secret" not in result.stderr


def test_a_missing_folder_and_an_unreadable_file_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError) as caught:
        (tmp_path / "none" / "x.csv").write_text("")
    said = escape.one_line(caught.value)
    assert said == f"there is no folder {tmp_path / 'none'}; create it, or name another folder"
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"")
    path.chmod(0o600)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root can read every file
    said = escape.one_line(PermissionError(13, "Permission denied", str(path)))
    assert said == f"{path}: not readable by this user (mode 600)"


def test_a_file_below_a_closed_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """There `Path.exists` raises an error. Root can search every folder."""
    error = PermissionError(13, "Permission denied", "closed/x")

    def closed(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(Path, "stat", closed)
    monkeypatch.setattr(os, "stat", closed)
    said = escape.one_line(error)
    monkeypatch.undo()
    assert said == "closed/x: Permission denied"


def test_ctrl_c_says_that_the_command_can_resume() -> None:
    def action() -> None:
        with interrupts.resumable():
            raise KeyboardInterrupt

    result = run(action)
    assert result.exit_code == 130
    assert result.stderr == "stopped by Ctrl-C; run the same command again to resume\n"


@pytest.mark.parametrize("fault", ["no reader", "full disk"])
def test_a_line_that_cannot_be_written_does_not_end_a_training(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the one of the signal handler, in `train.py 2>&1 | tee log`. Results do fail."""
    reads, writes = os.pipe()
    os.close(reads)
    broken = os.fdopen(writes, "w", 1) if fault == "no reader" else Path("/dev/full").open("w", 1)
    monkeypatch.setattr(sys, "stderr", broken)
    monkeypatch.setattr(console.log, "handlers", [console._LogHandler()])
    with interrupts.stop_signals() as received:
        signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM]
    with pytest.raises(SystemExit) as caught, interrupts.resumable():
        raise KeyboardInterrupt
    assert caught.value.code == 130
    monkeypatch.setattr(sys, "stdout", broken)
    with pytest.raises(OSError):
        console.say("a result")
    with contextlib.suppress(OSError):
        broken.close()


WITH_CLOSED_STREAMS = """
import sys
import click, console

@click.command(cls=console.Command)
def command() -> None:
    with open(sys.executable) as file:
        console.note(f"descriptor {file.fileno()}")
    console.say_data(f"input {len(sys.stdin.buffer.read())}")
    console.say("a text")
    console.table("a table", ["column"], [["value"]])

command()
"""


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_closed_standard_streams(closed: int) -> None:
    """As by `<&-`, `>&-` and `2>&-`. Python sets them to None."""
    done = subprocess.run(
        [sys.executable, "-c", WITH_CLOSED_STREAMS],
        cwd=ROOT, input="abc", capture_output=True, text=True, preexec_fn=lambda: os.close(closed),
    )  # fmt: skip
    if closed == 1:
        problem = "Error: standard output is closed; the result could not be printed\n"
        assert (done.returncode, done.stderr) == (1, f"descriptor 3\n{problem}")
        return
    assert (done.returncode, done.stderr) == (0, "" if closed == 2 else "descriptor 3\n")
    size, text, title, *_table = done.stdout.splitlines()
    assert (size, text, title) == (f"input {3 if closed else 0}", "a text", "a table")


def test_a_current_folder_that_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    result = run(lambda: None)
    assert result.stderr == "Error: the current folder was removed; change to another one\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_termination_is_called_by_its_name(number: signal.Signals) -> None:
    def action() -> None:
        with interrupts.resumable():
            signal.raise_signal(number)

    result = run(action)
    assert result.exit_code == 130
    assert result.stderr == f"stopped by {number.name}; run the same command again to resume\n"


@pytest.mark.parametrize("handling", [interrupts.stop_signals, interrupts.terminations_interrupt])
def test_nohup_is_respected(handling: Callable) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handling() as received:
            signal.raise_signal(signal.SIGHUP)
        assert not received
    finally:
        signal.signal(signal.SIGHUP, before)


def test_counts_have_their_nouns() -> None:
    assert [console.counted(n, "image") for n in (0, 1, 1234)] == [
        "0 images", "1 image", "1,234 images",
    ]  # fmt: skip


def test_a_bug_keeps_its_traceback() -> None:
    assert isinstance(run(raiser(KeyError("a"))).exception, KeyError)


def test_a_log_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(console, "ERR", console.Console(file=stream, width=200))
    handler = console._LogHandler()
    record = logging.LogRecord("x", 20, "", 0, "from %s", ("https://h/a?sig=secret",), None)
    handler.emit(record)
    assert stream.getvalue() == "from https://h/a?***\n"


def test_a_bar_inside_of_another_is_shown_below_it() -> None:
    """As a validation during a training."""
    shown = in_a_terminal(
        "with console.progress('training', 3) as outer:\n"
        "    with console.progress('validating val', 2) as inner:\n"
        "        inner(1)\n"
        "    outer(1)\n"
        "console.say('end')"
    )
    below = re.compile(r"training \S+ 0/3 .*\nvalidating val \S+ 0/2 ")
    assert below.search(shown) and shown.endswith("end\n"), shown
