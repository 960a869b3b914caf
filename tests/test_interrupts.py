"""Signals that stop a loop end its waits, whatever the code in them catches. So does a deadline."""

import contextlib
import signal
import threading
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import interrupts
from imaging.decode import boundary
from sharding.__main__ import main as sharding
from train import main as train

AGAIN = "; run the same command again to resume"


def test_a_signal_is_no_fault_of_an_image() -> None:
    """`boundary` turns every `Exception` of a decoder into a failed image."""
    with interrupts.stop_signals(), pytest.raises(interrupts.Stopped), interrupts.stoppable():
        with boundary("JPEG"):
            signal.raise_signal(signal.SIGTERM)


def test_a_block_that_swallows_the_signal_ends_with_it() -> None:
    with interrupts.stop_signals() as received, pytest.raises(interrupts.Stopped):
        with interrupts.stoppable(), contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM]


def test_a_signal_before_the_block_ends_it_at_once() -> None:
    with interrupts.stop_signals(), pytest.raises(interrupts.Stopped):
        signal.raise_signal(signal.SIGHUP)
        with interrupts.stoppable():
            raise AssertionError("the block ran")


def test_without_stop_signals_nothing_is_raised() -> None:
    with interrupts.stop_signals(), contextlib.suppress(interrupts.Stopped):
        signal.raise_signal(signal.SIGTERM)
    with interrupts.stoppable():
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("function", "command", "arguments", "said"),
    [
        ("sharding.fetch.fetch_all", sharding, ["fetch"], AGAIN),
        ("model.launch.dry_run.dry_run", train, ["--phase", "1", "--dry-run"], ""),
    ],
)
def test_a_signal_ends_a_command_as_ctrl_c_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals, function: str,
    command: click.Command, arguments: list[str], said: str,
) -> None:  # fmt: skip
    def stopped(*_arguments: object, **_options: object) -> None:
        signal.raise_signal(number)
        raise AssertionError("it went on")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(function, stopped)
    ignored = signal.signal(number, lambda *_: None)  # without a handler it would end pytest
    result = CliRunner().invoke(command, arguments)
    signal.signal(number, ignored)
    assert result.exit_code == 130, result.output
    assert result.stderr.splitlines()[-1] == f"stopped by {number.name}{said}"


def test_work_that_is_late_is_left_behind() -> None:
    go_on = threading.Event()
    with pytest.raises(TimeoutError, match=r"^no answer within 0\.01 s$"):
        interrupts.within(0.01, go_on.wait)
    go_on.set()


def test_work_in_time_gives_its_result_or_its_error() -> None:
    assert interrupts.within(60, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        interrupts.within(60, lambda: 1 // 0)
