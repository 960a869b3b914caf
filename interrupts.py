"""Handle Ctrl-C (SIGINT) and SIGTERM with three context managers, which take no arguments.

`stop_signals()` yields a list to which each received signal (`signal.Signals`) is added, so that a
loop can save its state and stop. A Ctrl-C that comes after any earlier signal raises
`KeyboardInterrupt` and is not added. `resumable()` yields nothing; if its block raises
`KeyboardInterrupt`, it prints that the same command resumes the job, and raises SystemExit with
exit code 130. `sigterm_interrupts()` yields nothing; in its block, SIGTERM raises
`KeyboardInterrupt("SIGTERM")`. At the end of a block, the earlier signal handlers are restored.
Outside the main thread, `stop_signals()` and `sigterm_interrupts()` do not react to signals.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

import console


@contextlib.contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Yield a list to which each received SIGINT and SIGTERM is added. A SIGINT after the first
    signal raises `KeyboardInterrupt`. Outside the main thread the list stays empty.
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
    except KeyboardInterrupt as error:
        by = str(error) or "Ctrl-C"
        console.note(f"stopped by {by}; run the same command again to resume")
        raise SystemExit(128 + signal.SIGINT) from None


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, so that SIGTERM and Ctrl-C end a job in the same way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
