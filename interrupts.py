"""Interrupt work: by Ctrl-C (SIGINT), SIGTERM and SIGHUP, with four context managers that take no
arguments, or after some seconds.

`stop_signals()` yields a list to which each received signal (`signal.Signals`) is added, so that a
loop can save its state and stop. A Ctrl-C that comes after any earlier signal raises
`KeyboardInterrupt` and is not added. `stoppable()` yields nothing; it is for a part of that loop
that may wait for long and changes nothing that is saved. In its block, the signal raises `Stopped`
at once; one that came before raises it at the beginning, and one that code in the block has
swallowed raises it at the end. Without a block of `stop_signals()` around it, it does nothing.
`terminations_interrupt()` yields nothing; in its block, SIGTERM raises
`KeyboardInterrupt("SIGTERM")`, and SIGHUP alike. `resumable()` does the same, and if its block
raises `KeyboardInterrupt`, it prints that the same command resumes the job, and raises SystemExit
with exit code 130. At the end of a block, the earlier signal handlers are restored. Outside the
main thread, none of these blocks reacts to signals.

`within(seconds, work)` returns the result of `work()`, a function without arguments, or raises its
error; if there is neither after `seconds`, it raises `TimeoutError`.

SIGHUP comes when a terminal is closed or its connection is lost. A SIGHUP that is ignored, as under
`nohup`, stays ignored.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

import console

Result = TypeVar("Result")

_TERMINATIONS = [signal.SIGTERM, signal.SIGHUP]

_received: list[signal.Signals] = []
"""Signals received by the running block of `stop_signals()`."""

_stoppable = False
"""True inside a block of `stoppable()`."""


class Stopped(BaseException):
    """A signal to stop came in, or before, a block of `stoppable()`. Like `KeyboardInterrupt` it is
    no subclass of `Exception`: decoders turn every `Exception` into a failed image, and the code
    that builds DALI pipelines tries another way.
    """


@contextlib.contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Yield a list to which each received SIGINT, SIGTERM and SIGHUP is added. A SIGINT after the
    first signal raises `KeyboardInterrupt`. Outside the main thread the list stays empty.
    """
    global _received
    received: list[signal.Signals] = []

    def note(number: int, _frame: object) -> None:
        global _stoppable
        received.append(signal.Signals(number))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        console.log.warning("%s: saving, then stopping", received[-1].name)
        if _stoppable:
            _stoppable = False
            raise Stopped

    before, _received = _received, received
    try:
        with _handled([signal.SIGINT, *_TERMINATIONS], note):
            yield received
    finally:
        _received = before


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let a signal end the block at once: `stop_signals()` alone only records it, and the block may
    wait for a long time. Drop what an ended block has computed: it may be incomplete.

    Raises:
        Stopped: a signal came in the block, or before it.
    """
    global _stoppable
    try:
        _stoppable = True
        if _received:
            raise Stopped
        yield
        if _received:  # the block may have swallowed `Stopped`, as callbacks do
            raise Stopped
    finally:
        _stoppable = False


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Exit with code 130 on Ctrl-C, SIGTERM and SIGHUP, and tell the user that the same command
    resumes the job.
    """
    try:
        with terminations_interrupt():
            yield
    except KeyboardInterrupt as error:
        by = str(error) or "Ctrl-C"
        console.note(f"stopped by {by}; run the same command again to resume")
        raise SystemExit(128 + signal.SIGINT) from None


@contextlib.contextmanager
def terminations_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP, so that they end a job as Ctrl-C does."""

    def interrupt(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    with _handled(_TERMINATIONS, interrupt):
        yield


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """Return the result of `work()`, which runs in a thread and is left behind if it is late: a
    name lookup has no deadline, and each IP address of a host may use up the whole of a timeout.

    Raises:
        TimeoutError: there is no result after `seconds`.
    """
    answer: Future[Result] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([answer], timeout=seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answer.result()


@contextlib.contextmanager
def _handled(
    numbers: Iterable[signal.Signals], handler: Callable[[int, object], None]
) -> Iterator[None]:
    """Handle signals with `handler` until the block ends, except a SIGHUP that `nohup` ignores.
    Outside the main thread, where Python handles no signals, change nothing.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
