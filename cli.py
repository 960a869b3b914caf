"""Options of the commands, and types of their values.

Main entry: the decorator `options("data", "runs")` adds these shared options (keys of `OPTIONS`) to
a command. It also adds --verbose, for which the function gets no argument. The decorator
`listen(port, lowest)` adds --host and --port: `port` is the default, `lowest` the smallest allowed
(default 1; 0: any free port).

Types: `LocalPath` (a path on this machine; keywords of click.Path, and `writes=True` for a file to
write: a link is followed), `AnyAddress` (a folder or an address like s3://; `writes=True` refuses
one that can only be read), `FiniteRange(min, max)` and `Device` (auto, cpu, cuda or cuda:N).

`given(name)` is whether an option was typed. `refuse_conflicts({"a": ["b"]})` refuses two options
that were given together.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

import console
import storage
from devices import parse_device
from escape import one_line


class LocalPath(click.Path):
    """Option type for a path of this machine, given as `Path`. Takes the keywords of `click.Path`.

    Refuses addresses such as s3://, pipes and devices: reading a pipe could block forever, and
    writing would replace a device. With `writes`, a link becomes the path that it names: an atomic
    write would replace the link.
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
                if link.suffix != path.suffix:  # the suffix may decide the format
                    raise ValueError(f"{link} is a link to {path}, of another suffix; name {path}")
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: links in a loop
            self.fail(one_line(error), param, context)
        return super().convert(path, param, context)


class AnyAddress(click.ParamType):
    """Option type for a folder of this machine, given as `Path`, or an address, given as `UPath`.
    With `writes`, a read-only address (http, https) is refused.
    """

    name = "folder or address"

    def __init__(self, *, writes: bool = False) -> None:
        self._writes = writes

    def convert(self, value: Any, param: Any, context: Any) -> storage.AnyPath:
        """Check one value and convert it to a path, without any network access."""
        try:
            if self._writes and str(value).partition("://")[0].lower() in storage.READ_ONLY:
                raise ValueError(
                    f"{value} can only be read; write to a folder or to s3://bucket/folder"
                )
            path = storage.any_path(value)
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


def _checkpoint(default: str) -> Callable:
    """Return the option --checkpoint of commands that use `default` without it."""
    return click.option(
        "--checkpoint",
        type=LocalPath(),  # `checkpoint.find` refuses a file: it may be a detector
        help="Checkpoint folder, run folder (its best checkpoint), or name of a shipped detector. "
        f"Default: {default}.",
    )


OPTIONS: dict[str, Callable] = {
    "data": click.option(
        "--data",
        type=AnyAddress(),
        default="data/shards",
        show_default=True,
        help="Folder or address (s3://, hf://, https://) with the shard sets.",
    ),
    "catalog": click.option(
        "--catalog",
        "catalogs",
        type=LocalPath(dir_okay=False, exists=True),
        multiple=True,
        help="Your own catalog (TOML), added to the built-in one. May be repeated.",
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
    "checkpoint": _checkpoint("the newest run"),
    "checkpoint_or_shipped": _checkpoint("the newest run, else the shipped detector"),
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
        callback=console.start_logging,
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
