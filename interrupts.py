"""Ctrl-C (SIGINT) and SIGTERM: collect them, or end a job so that it can be resumed.

Main entries: `stop_signals()`, `resumable()` and `sigterm_interrupts()`, all context managers.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

import click

import console


@contextlib.contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGINT and SIGTERM in the returned list; a second SIGINT interrupts at once.
    Outside the main thread the list stays empty.
    """
    received: list[signal.Signals] = []

    def note(number: int, _frame: object) -> None:
        received.append(signal.Signals(number))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        console.log.warning("%s: saving, then stopping", received[-1].name)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Exit with code 130 on Ctrl-C and tell the user that the same command resumes the job."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("stopped by Ctrl-C; run the same command again to resume", err=True)
        raise SystemExit(128 + signal.SIGINT) from None


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, so that SIGTERM and Ctrl-C end a job in the same way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
