"""Print results, log lines, progress bars, tables and errors in a terminal.

Main entries: `@click.command(cls=Command)` (groups: `Group`) prints a `ValueError` or `OSError` as
one line and exits with code 1. `say(text)` prints a result to standard output, `say_data(text)` a
line of CSV or JSON. `table(title, columns, rows, drop)` prints names of columns, and rows of values
(formatted by `cell()`). In a narrow terminal the columns named in `drop` (default: none) are left
out, the first one first. `progress(label, total, shown)` is a context manager that shows a bar on
standard error, or without a terminal a line a minute (`total` None: unknown; `shown` false: none).
It yields `advance(done=1, note="", total=None)`. This counts `done` more, shows `note` and sets a
given `total`. `log` is the logger; `rank_log` is for warnings about one rank's own samples.

`Command` and `Group` use `plain_errors()`, a context manager that prints an error in one line.
`note(text)` prints a line on standard error, if it can be written. `counted(2, "image")` is "2
images", `duration(700)` is "12 min", `address("::1", 80)` is "http://[::1]:80". Options of
commands: cli.py.
"""

import contextlib
import io
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

import click
from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from escape import as_utf8, one_line, printable, without_secrets

log = logging.getLogger("ai_images_detector")

rank_log = logging.getLogger("ai_images_detector.rank")
"""Logger of messages about the samples or the machine of one rank of a run on several GPUs. Its
warnings come from every rank, those of `log` only from rank 0, because all ranks have the same.
"""

# Without a handler, Python prints the warnings of matplotlib, such as one about a missing home
# folder. A program that imports this one can still handle them.
logging.getLogger("matplotlib").addHandler(logging.NullHandler())

# Width of tables in a pipe or a file, in characters: wide enough that no table is wrapped.
_WIDE = 100_000

# Shortest time between two lines on progress, in seconds. Longer work has longer times.
_LINE_S = 60.0


class _StandardError(io.TextIOBase):
    """Standard error: `sys.stderr` is looked up at each call. A text that cannot be written is
    dropped: a full disk, or a pipe without a reader, must not end a training.
    """

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Return the encoding of the stream: rich draws bars in ASCII unless it is UTF-8."""
        return getattr(sys.stderr, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return sys.stderr is not None and sys.stderr.isatty()

    def write(self, text: str) -> int:
        """Write a text at once, or drop it."""
        stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # if a bar runs
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.write(text)
                stream.flush()
        return len(text)


def _standard_output() -> TextIO:
    """Return standard output.

    Raises:
        OSError: it was closed.
    """
    if sys.stdout is None:
        raise OSError("standard output is closed; the result could not be printed")
    return sys.stdout


def _console(stderr: bool) -> Console:
    """Return a rich console for standard output (results), or for standard error (progress and log
    lines), so that results can be piped.
    """
    stream = cast(TextIO, _StandardError()) if stderr else _standard_output()
    width = None if stream.isatty() else _WIDE
    console = Console(file=stream, highlight=False, markup=False, emoji=False, width=width)
    if not (console.width and console.height):  # rich crops all text if COLUMNS or LINES is 0
        columns, lines = shutil.get_terminal_size()
        console.size = ConsoleDimensions(console.width or columns, console.height or lines)
    return console


ERR = _console(stderr=True)


def note(text: str) -> None:
    """Print a line on standard error, above a running progress bar and without wrapping. Control
    characters are escaped and secrets removed. A line that cannot be written is dropped.
    """
    ERR.print(_shown(text), soft_wrap=True)


class _LogHandler(logging.Handler):
    """Print log lines by `note`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        note(self.format(record))


def _shown(text: str) -> str:
    return printable(without_secrets(text))


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn a `ValueError` or `OSError` into one line on standard error and exit code 1.

    These two types are errors that a user can cause. Any other exception is a bug of this program
    and keeps its traceback. `--verbose` shows the traceback in both cases.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as error:  # its text: the signal, "" for Ctrl-C
        note(f"stopped by {str(error) or 'Ctrl-C'}")
        raise SystemExit(128 + signal.SIGINT) from None
    except click.ClickException as error:
        # click prints this attribute, but its type hints mark the attribute as final
        error.message = _shown(error.message)  # type: ignore[misc]
        raise
    except (ValueError, OSError) as error:
        log.debug("traceback", exc_info=True)
        raise click.ClickException(_shown(one_line(error))) from error


def _open_closed_streams() -> None:
    """Open the null device in place of standard streams that are closed (`>&-`). Otherwise the next
    opened file would get the descriptor of standard output or error, and native code would print
    into it. `sys.stdout` stays None, so that printing a result is an error.
    """
    for name, mode in (("stdin", "r"), ("stdout", ""), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if mode:
                setattr(sys, name, os.fdopen(descriptor, mode))


def _check_current_folder() -> None:
    """Check that the current folder exists: libraries report a missing one in unclear words.

    Raises:
        FileNotFoundError: the folder was removed.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise FileNotFoundError("the current folder was removed; change to another one") from None


class Command(click.Command):
    """A click command that reports errors by `plain_errors`."""

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the first sentence of the help, whole: click cuts it to a part of a line."""
        return super().get_short_help_str(max(limit, 1000))

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the command line."""
        _open_closed_streams()
        with plain_errors():
            _check_current_folder()
            return super().make_context(*args, **kwargs)

    def invoke(self, context: click.Context) -> object:
        """Run the command."""
        with plain_errors():
            return super().invoke(context)


class Group(Command, click.Group):
    """A click group that reports its own errors and those of its commands by `plain_errors`."""

    command_class = Command


def start_logging(_context: click.Context, _option: click.Parameter, verbose: bool) -> None:
    """Send log lines to standard error; with `verbose` add time, level and module to each line."""
    handler = _LogHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(module)s: %(message)s" if verbose else None)
    )
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    log.propagate = False


def address(host: str, port: int) -> str:
    """Return the address of a server, with brackets around an IPv6 address."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def say(text: str = "") -> None:
    """Print a result on standard output, never wrapped, and above a running progress bar.
    On a terminal, control characters are escaped.
    """
    is_terminal = _standard_output().isatty()
    text = printable(text) if is_terminal else text
    if is_terminal and ERR.is_terminal:
        ERR.print(text, soft_wrap=True)
    else:
        click.echo(_encodable(text))


def say_data(text: str) -> None:
    """Print a line of CSV or JSON on standard output, always in UTF-8. On a terminal, print by
    `say`.
    """
    if _standard_output().isatty():
        say(text)
    else:
        click.echo(as_utf8(text).encode())


def _encodable(text: str) -> str:
    """Escape the characters of `text` that the encoding of standard output does not have."""
    encoding = sys.stdout.encoding or "utf-8"
    return as_utf8(text).encode(encoding, "backslashreplace").decode(encoding)


@contextlib.contextmanager
def progress(label: str, total: int | None, shown: bool = True) -> Iterator[Callable[..., None]]:
    """Show a progress bar on standard error; yields `advance(done=1, note="", total=None)`.

    `advance` adds `done` to the count, shows `note` after the bar, and replaces the total if
    `total` is given. Without a terminal, as in the log of a batch job, work that lasts longer than
    a minute prints a line instead, each minute or, later, each fiftieth of the time so far. With
    `shown=False` nothing is printed.
    """
    if shown and not ERR.is_terminal:
        yield _progress_lines(label, total)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=ERR, disable=not shown, transient=True) as bar:
        task = bar.add_task(printable(label), total=total, note="")
        yield lambda done=1, note="", total=None: bar.update(
            task, advance=done, note=printable(note), **({} if total is None else {"total": total})
        )


def _progress_lines(label: str, total: int | None) -> Callable[..., None]:
    """Return an `advance` of `progress()` that logs lines such as `scoring val: 600 of 1,000, about
    2 min left`. The remaining time is estimated from the speed since the previous line.
    """
    size, count, begun = total, 0, time.monotonic()
    last: tuple[float, int] | None = None  # time and count of the last line

    def advance(done: int = 1, note: str = "", total: int | None = None) -> None:
        nonlocal size, count, last
        size, count, now = size if total is None else total, count + done, time.monotonic()
        if last is None:  # a resumed command first reports the work of earlier runs
            last = (now, count)
        seconds, more = now - last[0], count - last[1]
        if seconds < max(_LINE_S, (now - begun) / 50):
            return
        last = (now, count)
        of = "" if size is None else f" of {size:,}"
        left = ""
        if size is not None and size > count and more:
            left = f", about {duration((size - count) / more * seconds)} left"
        log.info("%s: %s%s%s%s", label, f"{round(count):,}", of, left, f" ({note})" if note else "")

    return advance


def duration(seconds: float) -> str:
    """Format a time: `0.012 s`, `64 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for unit, name, decimals in ((86400, "days", 1), (3600, "h", 1), (60, "min", 0)):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.{decimals}f} {name}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def counted(number: int, noun: str) -> str:
    """Format a count with its noun: `1 image`, `1,234 images`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def cell(value: object) -> str:
    """Format a value for a table: floats with 3 decimals, integers with separators, None as '-'."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _is_figure(value: object) -> bool:
    """Return whether a value is a number, or text that begins with a digit (right-aligned)."""
    return isinstance(value, int | float) or (isinstance(value, str) and value[:1].isdigit())


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    drop: Sequence[str] = (),
) -> None:
    """Print a table with right-aligned numbers; each cell stays on one line and is never cut.

    In a terminal that is too narrow, the columns in `drop` are left out one by one, from the first,
    and listed below the table. If that is not enough, each row is printed as a paragraph.
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
            f"left out at {console.width} columns: {left_out}; a wider terminal or a pipe shows "
            "all columns",
            soft_wrap=True,
        )


def _fitting(
    width: int, columns: Sequence[str], lines: Sequence[Sequence[str]], drop: Sequence[str]
) -> list[int] | None:
    """Return the indices of the columns that fit into `width` characters, with as few columns of
    `drop` left out as possible, or None if all other columns are too wide. `lines` are the column
    names and all rows.
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
    """Print each row as its first value, and below it the other values that are not empty, with
    their column names. A line takes as many values as fit; no value is broken.
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
