"""Everything about talking to a terminal: shared options, logging, progress bars, tables, errors.

Packages return values and raise; only commands print, and they print through this module.
"""

import contextlib
import errno
import logging
import math
import os
import re
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import click
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import storage
from escape import printable, without_secrets

log = logging.getLogger("ai_images_detector")

# Where no terminal gives a width (a pipe, a file), tables are as wide as they are.
_WIDE = 100_000


def _console(stderr: bool) -> Console:
    """Standard output for answers; standard error for progress and log lines, so that the answers
    can be piped. The stream is looked up at each print.
    """
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _WIDE
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)


ERR = _console(stderr=True)


class _LogHandler(logging.Handler):
    """Log lines above a running progress bar, unwrapped."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record, harmless to a terminal and without secrets."""
        ERR.print(_shown(self.format(record)), soft_wrap=True)


def _shown(text: str) -> str:
    return printable(without_secrets(text))


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn a user's mistake into one clear line and exit code 1.

    `ValueError` and `OSError` are what a user can cause; anything else is our bug and keeps its
    traceback. `--verbose` shows the traceback of both.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        click.echo("stopped by Ctrl-C", err=True)
        raise SystemExit(128 + signal.SIGINT) from None
    except click.ClickException as error:
        # click prints this attribute, which its types call final
        error.message = _shown(error.message)  # type: ignore[misc]
        raise
    except (ValueError, OSError) as error:
        log.debug("traceback", exc_info=True)
        raise click.ClickException(_shown(one_line(error))) from error


def one_line(error: Exception) -> str:
    """What an error says: of one of the system's, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and error.filename is None:
            return f"{error.strerror}: standard output, or a temporary file in {gettempdir()}"
        if isinstance(error, ConnectionError | TimeoutError):
            return f"{error.strerror}; check the address and the network"
        if error.filename is None:
            return error.strerror
        name, path = _name_of(error.filename), Path(os.fsdecode(error.filename))
        if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
            return f"there is no folder {_name_of(path.parent)}; make it, or name another"
        if isinstance(error, PermissionError) and path.exists() and not os.access(path, os.R_OK):
            mode = stat.S_IMODE(path.stat().st_mode)
            return f"{name}: not readable by this user (mode {mode:o})"
        return f"{name}: {error.strerror}"
    return str(error) or type(error).__name__


def _name_of(filename: object) -> str:
    name = os.fsdecode(filename) if isinstance(filename, bytes) else str(filename)
    return name if len(name) <= 500 else f"{name[:200]}...{name[-50:]}"


class Command(click.Command):
    """A click command under `plain_errors`."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the command line."""
        with plain_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, context: click.Context) -> object:
        """Run the command."""
        with plain_errors():
            return super().invoke(context)


class Group(click.Group):
    """A group whose own function and commands run under `plain_errors`."""

    command_class = Command

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the command line."""
        with plain_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, context: click.Context) -> object:
        """Run the group."""
        with plain_errors():
            return super().invoke(context)


def _start_logging(_context: click.Context, _option: click.Parameter, verbose: bool) -> None:
    """Send log lines to standard error: the message alone, or with time, level and module."""
    handler = _LogHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(module)s: %(message)s" if verbose else None)
    )
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    log.propagate = False


class LocalPath(click.Path):
    """A path of this machine, as a `Path`: an address is refused, and so is what is neither a file
    nor a folder (a pipe would wait for ever, a device would be replaced). Takes the keywords of
    `click.Path`.
    """

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**{"path_type": Path, **keywords})

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> Any:
        """Check and convert one value."""
        try:
            path = storage.local_path(value)
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise ValueError(f"{value} is a pipe or a device; expected a file or a folder")
        except (ValueError, OSError) as error:
            self.fail(one_line(error), param, context)
        return super().convert(path, param, context)


class AnyAddress(click.ParamType):
    """A folder of this machine, as a `Path`, or an address, as a `UPath`. With `writes` an address
    that can only be read is refused.
    """

    name = "folder or address"

    def __init__(self, *, writes: bool = False) -> None:
        self._parse = storage.writable_path if writes else storage.any_path

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> storage.AnyPath:
        """Check and convert one value; nothing is asked of the network."""
        try:
            path = self._parse(value)
            if storage.is_local(path) and path.exists() and not path.is_dir():
                raise ValueError(f"{value} is no folder")
        except (ValueError, OSError) as error:
            self.fail(one_line(error), param, context)
        return path


class FiniteRange(click.FloatRange):
    """A number in a range; NaN, which compares with nothing, is refused."""

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> float:
        """Check and convert one value."""
        converted = super().convert(value, param, context)
        if not math.isfinite(converted):
            self.fail(f"{value} is no finite number", param, context)
        return converted


class Device(click.ParamType):
    """The name of a device, as text; whether it is here is known to torch alone."""

    name = "device"

    def convert(
        self, value: str, param: click.Parameter | None, context: click.Context | None
    ) -> str:
        """Check one name."""
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", value):
            self.fail(f"no such device: {value}; use auto, cpu, cuda or cuda:N", param, context)
        return value


OPTIONS: dict[str, Callable] = {
    "data": click.option(
        "--data",
        type=AnyAddress(),
        default="data/shards",
        show_default=True,
        help="Folder or address (s3://, hf://, https://) that holds the shard sets.",
    ),
    "runs": click.option(
        "--runs",
        type=LocalPath(file_okay=False),
        default=Path("runs"),
        show_default=True,
        help="Folder that holds the training runs.",
    ),
    "max_fpr": click.option(
        "--max-fpr",
        type=FiniteRange(0, 0.5, min_open=True, max_open=True),
        help="Error rate: at most this share of real images is called likely AI. It holds for "
        "images like those of the calibration.",
    ),
    "max_miss": click.option(
        "--max-miss",
        type=FiniteRange(0, 0.5, min_open=True, max_open=True),
        help="Error rate: at most this share of AI images is called no sign of AI. It holds for "
        "images like those of the calibration.",
    ),
    "checkpoint": click.option(
        "--checkpoint",
        type=LocalPath(file_okay=False),
        help="Checkpoint, a run to take the best one of, or a detector that ships, by its name. "
        "Default: the newest run.",
    ),
    "detector": click.option(
        "--detector",
        help="Any detector: what --checkpoint takes, an exported .onnx, hf:OWNER/NAME, timm:NAME, "
        "or a file.py with predict(images).",
    ),
    "trust": click.option(
        "--trust", is_flag=True, help="Run the program of --detector file.py, with all your rights."
    ),
    "fake_label": click.option(
        "--fake-label",
        "fake_labels",
        multiple=True,
        metavar="LABEL",
        help="Label of an hf: or timm: detector that means AI-generated, where it does not say so "
        "itself. May be repeated.",
    ),
    "device": click.option(
        "--device",
        type=Device(),
        default="auto",
        show_default=True,
        help="auto, cpu, cuda or cuda:N.",
    ),
    "backend": click.option(
        "--backend",
        type=click.Choice(["auto", "dali", "pil"]),
        default="auto",
        show_default=True,
        help="What decodes the images.",
    ),
    "batch_size": click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        default=32,
        show_default=True,
        help="Images scored at a time.",
    ),
    "verbose": click.option(
        "--verbose",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_start_logging,
        help="Say more, and show the traceback of an error.",
    ),
}


def options(*names: str) -> Callable[[Callable], Callable]:
    """Shared options, declared once: `@options("data", "runs")`. `--verbose` always comes along."""

    def decorate(function: Callable) -> Callable:
        for name in reversed([*names, "verbose"]):
            function = OPTIONS[name](function)
        return function

    return decorate


def listen(port: int, lowest: int = 1) -> Callable[[Callable], Callable]:
    """Add the options --host and --port of a server. Port 0, where allowed, takes a free port."""
    host_help = "Address to listen on; 0.0.0.0 for all."
    port_help = "Port to listen on." if lowest else "Port to listen on; 0 takes a free one."
    ports = click.IntRange(lowest, 65535)
    add_host = click.option("--host", default="127.0.0.1", show_default=True, help=host_help)
    add_port = click.option("--port", type=ports, default=port, show_default=True, help=port_help)
    return lambda function: add_host(add_port(function))


def say(text: str = "") -> None:
    """Print lines of a command's answer on standard output, never wrapped; where that is the
    terminal of a running progress bar, above the bar. A terminal gets nothing that it would obey.
    """
    if not sys.stdout.isatty():
        click.echo(_encodable(text))
    elif ERR.is_terminal:
        ERR.print(printable(text), soft_wrap=True)
    else:
        click.echo(_encodable(printable(text)))


def say_data(text: str) -> None:
    """Print a line of CSV or JSON on standard output, in UTF-8 whatever the locale says; bytes of a
    file name that are no UTF-8 stay as they are. A terminal gets it by `say`.
    """
    if sys.stdout.isatty():
        say(text)
    else:
        click.echo(text.encode("utf-8", "surrogateescape"))


def _encodable(text: str) -> str:
    """`text` with escapes for what standard output has no bytes for."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@contextlib.contextmanager
def progress(label: str, total: int | None, shown: bool = True) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error; yields `advance(done=1, note="", total=None)`.

    `done` is added to the count, `note` is shown behind the bar, `total` is what has become known
    of it. Without a terminal, or if it is not to be `shown`, nothing is drawn, so that logs stay
    clean.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    hidden = not (shown and ERR.is_terminal)
    with Progress(*columns, console=ERR, disable=hidden, transient=True) as bar:
        task = bar.add_task(printable(label), total=total, note="")
        yield lambda done=1, note="", total=None: bar.update(
            task, advance=done, note=printable(note), **({} if total is None else {"total": total})
        )


@contextlib.contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """A list that SIGINT and SIGTERM are put into; a second SIGINT interrupts at once."""
    received: list[signal.Signals] = []

    def note(number: int, _frame: object) -> None:
        received.append(signal.Signals(number))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log.warning("%s: saving, then stopping", received[-1].name)

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
    """Say of Ctrl-C that the same command goes on; for what keeps the work that is done."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("stopped by Ctrl-C; the same command goes on from there", err=True)
        raise SystemExit(128 + signal.SIGINT) from None


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that both end a job alike."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def counted(number: int, noun: str) -> str:
    """A count with its noun: `1 image`, `1,234 images`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def cell(value: object) -> str:
    """A value as a table shows it: shares with 3 digits, counts with separators, nothing as '-'."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _is_figure(value: object) -> bool:
    """Numbers, and text that begins like one; they stand to the right."""
    return isinstance(value, int | float) or (isinstance(value, str) and value[:1].isdigit())


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    drop: Sequence[str] = (),
) -> None:
    """Print a table: the first column is text, numbers stand to the right. Texts are shown as they
    are, each whole and on one line. Where the terminal is too narrow, columns of `drop` are left
    out, the first of them first, and said to be; where that does not do, each row is a paragraph
    of all its values.
    """
    console = _console(stderr=False)
    rows = [list(row) for row in rows]
    cells = [[_encodable(printable(cell(value))) for value in row] for row in rows]
    title, names = _encodable(printable(title)), [_encodable(printable(name)) for name in columns]
    if title:
        console.print(Text(title, style="bold"), soft_wrap=True)
    shown = _fitting(console.width, columns, [names, *cells], drop)
    if shown is None:
        _print_paragraphs(console, names, cells)
        return
    grid = Table(header_style="bold")
    for index in shown:
        numeric = any(_is_figure(row[index]) for row in rows)
        grid.add_column(Text(names[index]), justify="right" if numeric else "left", no_wrap=True)
    for row in cells:
        grid.add_row(*(Text(row[index]) for index in shown))
    console.print(grid)
    if len(shown) < len(names):
        left_out = ", ".join(names[index] for index in range(len(names)) if index not in shown)
        console.print(
            f"left out at {console.width} columns: {left_out}; a wider terminal or a pipe has all",
            soft_wrap=True,
        )


def _fitting(
    width: int, columns: Sequence[str], lines: Sequence[Sequence[str]], drop: Sequence[str]
) -> list[int] | None:
    """The indices of the columns that fit a terminal of this width when as few of `drop` as will do
    are left out; None where leaving out all of them is not enough. `lines` are all rows, names
    included.
    """
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    shown = list(range(len(columns)))
    for name in [None, *drop]:
        if name is not None:
            shown.remove(columns.index(name))
        if sum(widths[index] + len("|  ") for index in shown) + len("|") <= width:
            return shown
    return None


def _print_paragraphs(console: Console, names: Sequence[str], cells: Sequence[list[str]]) -> None:
    """The first value of each row, and below it the others that are not empty, with their names, as
    many on a line as have room; none is broken.
    """
    for first, *others in cells:
        console.print(first, soft_wrap=True)
        line = ""
        for name, value in zip(names[1:], others, strict=True):
            if not value:
                continue
            pair = f"{name}: {value}" if name else value
            if line and len(line) + 2 + cell_len(pair) > console.width:
                console.print(line, soft_wrap=True)
                line = ""
            line = f"{line}  {pair}" if line else f"    {pair}"
        console.print(line, soft_wrap=True)
