"""Read options and print results, log lines, progress bars, tables and errors in a terminal.

Main entries: `@click.command(cls=Command)` (groups: `Group`) prints a `ValueError` or `OSError` as
one line and exits with code 1. The decorator `options("data", "runs")` adds these shared options
(keys of `OPTIONS`). It also adds --verbose, for which the function gets no argument. The decorator
`listen(port, lowest)` adds --host and --port: `port` is the default, `lowest` the smallest allowed
(default 1; 0: any free port). `say(text)` prints a result to standard output, `say_data(text)` a
line of CSV or JSON. `table(title, columns, rows, drop)` prints names of columns, and rows of values
(formatted by `cell()`). In a narrow terminal the columns named in `drop` (default: none) are left
out, the first one first. `progress(label, total, shown)` is a context manager that shows a bar on
standard error (`total` None: unknown; `shown` false: none). It yields `advance(done=1, note="",
total=None)`. This counts `done` more, shows `note` and sets a given `total`. `log` is the logger.

Types of options: `LocalPath` (a path on this machine; keywords of click.Path, and `writes=True` for
a file to write: a link is followed), `AnyAddress` (a folder or an address like s3://; `writes=True`
refuses one that can only be read), `FiniteRange(min, max)` and `Device` (auto, cpu, cuda or
cuda:N). `Command` and `Group` use `plain_errors()`, a context manager that prints an error in one
line. `note(text)` prints a line on standard error, if it can be written.
`given(name)` is whether an option was typed, `counted(2, "image")` is "2 images",
`address("::1", 80)` is "http://[::1]:80".
"""

import contextlib
import io
import logging
import math
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

import click
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import storage
from devices import parse_device
from escape import one_line, printable, without_secrets

log = logging.getLogger("ai_images_detector")

# Width of tables in a pipe or a file, in characters: wide enough that no table is wrapped.
_WIDE = 100_000


class _StandardError(io.TextIOBase):
    """Standard error, looked up again at each call. A text that cannot be written is dropped: a
    full disk, or a pipe without a reader, must not end a training.
    """

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Return its encoding: rich draws bars of ASCII if it is not UTF-8."""
        return sys.stderr.encoding or "utf-8"

    def isatty(self) -> bool:
        return sys.stderr.isatty()

    def write(self, text: str) -> int:
        """Write a text at once, or drop it."""
        stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # under a progress bar
        with contextlib.suppress(OSError):
            stream.write(text)
            stream.flush()
        return len(text)


def _console(stderr: bool) -> Console:
    """Return a rich console for standard output (results), or for standard error (progress and log
    lines), so that results can be piped.
    """
    stream = cast(TextIO, _StandardError()) if stderr else sys.stdout
    width = None if stream.isatty() else _WIDE
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=width)


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
    except KeyboardInterrupt as error:  # its text is the name of another signal than Ctrl-C
        note(f"stopped by {str(error) or 'Ctrl-C'}")
        raise SystemExit(128 + signal.SIGINT) from None
    except click.ClickException as error:
        # click prints this attribute, but its type hints mark the attribute as final
        error.message = _shown(error.message)  # type: ignore[misc]
        raise
    except (ValueError, OSError) as error:
        log.debug("traceback", exc_info=True)
        raise click.ClickException(_shown(one_line(error))) from error


class Command(click.Command):
    """A click command that reports errors by `plain_errors`."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the command line."""
        with plain_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, context: click.Context) -> object:
        """Run the command."""
        with plain_errors():
            return super().invoke(context)


class Group(Command, click.Group):
    """A click group that reports its own errors and those of its commands by `plain_errors`."""

    command_class = Command


def _start_logging(_context: click.Context, _option: click.Parameter, verbose: bool) -> None:
    """Send log lines to standard error; with `verbose` add time, level and module to each line."""
    handler = _LogHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(module)s: %(message)s" if verbose else None)
    )
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    log.propagate = False


class LocalPath(click.Path):
    """Option type for a path of this machine, given as `Path`. Takes the keywords of `click.Path`.

    Refused are addresses such as s3://, and anything that is neither a file nor a folder: reading
    a pipe could block forever, and writing would replace a device. With `writes`, a link becomes
    the path that it names: an atomic write would replace the link.
    """

    def __init__(self, *, writes: bool = False, **keywords: Any) -> None:
        super().__init__(**{"path_type": Path, **keywords})
        self._writes = writes

    def convert(self, value: Any, param: Any, context: Any) -> Any:
        """Check one value and convert it to a `Path`."""
        try:
            path = storage.local_path(value)
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise ValueError(f"{value} is a pipe or a device; expected a file or a folder")
            if self._writes and path.is_symlink():
                link, path = path, path.resolve()
                if link.suffix != path.suffix:  # it may decide the format
                    raise ValueError(f"{link} is a link to {path}, of another suffix; name {path}")
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            self.fail(one_line(error), param, context)
        return super().convert(path, param, context)


class AnyAddress(click.ParamType):
    """Option type for a folder of this machine, given as `Path`, or an address, given as `UPath`.
    With `writes`, a read-only address (http, https) is refused.
    """

    name = "folder or address"

    def __init__(self, *, writes: bool = False) -> None:
        self._parse = storage.writable_path if writes else storage.any_path

    def convert(self, value: Any, param: Any, context: Any) -> storage.AnyPath:
        """Check one value and convert it to a path, without any network access."""
        try:
            path = self._parse(value)
            if storage.is_local(path) and path.exists() and not path.is_dir():
                raise ValueError(f"{value} is not a folder")
        except (ValueError, OSError) as error:
            self.fail(one_line(error), param, context)
        return path


class FiniteRange(click.FloatRange):
    """Option type for a finite number in a range. `click.FloatRange` alone accepts NaN."""

    def convert(self, value: Any, param: Any, context: Any) -> float:
        """Check one value and convert it to a float."""
        converted = super().convert(value, param, context)
        if not math.isfinite(converted):
            self.fail(f"{value} is not a finite number", param, context)
        return converted


class Device(click.ParamType):
    """Option type for a device name, given as text. Only torch can tell whether it exists."""

    name = "device"

    def convert(self, value: str, param: Any, context: Any) -> str:
        """Check the spelling of one device name."""
        try:
            parse_device(value)
        except ValueError as error:
            self.fail(str(error), param, context)
        return value


OPTIONS: dict[str, Callable] = {
    "data": click.option(
        "--data",
        type=AnyAddress(),
        default="data/shards",
        show_default=True,
        help="Folder or address (s3://, hf://, https://) with the shard sets.",
    ),
    "runs": click.option(
        "--runs",
        type=LocalPath(file_okay=False),
        default=Path("runs"),
        show_default=True,
        help="Folder with the training runs.",
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
        type=LocalPath(),  # `checkpoint.find` refuses a file: it may be a detector
        help="Checkpoint folder, run folder (its best checkpoint), or name of a shipped detector. "
        "Default: the newest run.",
    ),
    "detector": click.option(
        "--detector",
        help="Any detector: a value of --checkpoint, an exported .onnx file, hf:OWNER/NAME, "
        "timm:NAME, or a Python file with predict(images).",
    ),
    "trust": click.option(
        "--trust", is_flag=True, help="Allow --detector file.py to run, with your permissions."
    ),
    "fake_label": click.option(
        "--fake-label",
        "fake_labels",
        multiple=True,
        metavar="LABEL",
        help="Label that means AI-generated, for an hf: or timm: detector with unclear labels. May "
        "be repeated.",
    ),
    "device": click.option(
        "--device",
        type=Device(),
        default="auto",
        show_default=True,
        help="Device of the network: auto, cpu, cuda or cuda:N. auto: a GPU if there is one.",
    ),
    "backend": click.option(
        "--backend",
        type=click.Choice(["auto", "dali", "pil"]),
        default="auto",
        show_default=True,
        help="Image decoder: dali (GPU) or pil (CPU). auto: dali if it can be used.",
    ),
    "batch_size": click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        default=32,
        show_default=True,
        help="Images per batch.",
    ),
    "verbose": click.option(
        "--verbose",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_start_logging,
        help="Log more, and show the traceback of an error.",
    ),
}


def options(*names: str) -> Callable[[Callable], Callable]:
    """Add shared options to a command: `@options("data", "runs")`. Always adds `--verbose`."""

    def decorate(function: Callable) -> Callable:
        for name in reversed([*names, "verbose"]):
            function = OPTIONS[name](function)
        return function

    return decorate


def given(name: str) -> bool:
    """Return whether the option of parameter `name` of the running command was typed."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


def refuse_conflicts(conflicts: Mapping[str, Sequence[str]]) -> None:
    """Refuse options of the running command that were given together but contradict each other.

    Args:
        conflicts: parameter of an option -> parameters of the options that it excludes.

    Raises:
        click.UsageError: two such options were given. It names both.
    """
    flags = {option.name: option.opts[0] for option in click.get_current_context().command.params}
    for name, others in conflicts.items():
        for other in others:
            if given(name) and given(other):
                raise click.UsageError(f"{flags[name]} cannot be combined with {flags[other]}")


def listen(port: int, lowest: int = 1) -> Callable[[Callable], Callable]:
    """Add the options --host and --port of a server. Port 0, where allowed, takes a free port."""
    host_help = "Address to listen on; 0.0.0.0 means all addresses."
    port_help = "Port to listen on." if lowest else "Port to listen on; 0 chooses a free port."
    ports = click.IntRange(lowest, 65535)
    add_host = click.option("--host", default="127.0.0.1", show_default=True, help=host_help)
    add_port = click.option("--port", type=ports, default=port, show_default=True, help=port_help)
    return lambda function: add_host(add_port(function))


def address(host: str, port: int) -> str:
    """Return the address of a server, with brackets around an IPv6 address."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def say(text: str = "") -> None:
    """Print a result on standard output, never wrapped, and above a running progress bar.
    On a terminal, control characters are escaped.
    """
    is_terminal = sys.stdout.isatty()
    text = printable(text) if is_terminal else text
    if is_terminal and ERR.is_terminal:
        ERR.print(text, soft_wrap=True)
    else:
        click.echo(_encodable(text))


def say_data(text: str) -> None:
    """Print a line of CSV or JSON on standard output, always in UTF-8. Bytes of a file name that
    are not UTF-8 are written unchanged. On a terminal, print by `say`.
    """
    if sys.stdout.isatty():
        say(text)
    else:
        click.echo(text.encode("utf-8", "surrogateescape"))


def _encodable(text: str) -> str:
    """Escape the characters of `text` that the encoding of standard output does not have."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@contextlib.contextmanager
def progress(label: str, total: int | None, shown: bool = True) -> Iterator[Callable[..., None]]:
    """Show a progress bar on standard error; yields `advance(done=1, note="", total=None)`.

    `advance` adds `done` to the count, shows `note` after the bar, and replaces the total if
    `total` is given. Without a terminal, or with `shown=False`, nothing is drawn, so that logs
    stay clean.
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
