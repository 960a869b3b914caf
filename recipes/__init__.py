"""Read a recipe, a TOML file with the settings of a training run, into a frozen dataclass.

Main entry: `load(kind, path, overrides)` takes the dataclass `kind`, the file, and texts such as
`optim.lr=1e-4` that change values. It returns a `kind`. An unknown key, a wrong type or a value out
of range raises `RecipeError`. `build()` does the same for values that are nested dicts already,
`read()` returns a recipe as nested dicts, `read_toml()` any TOML file, `changed_keys()` the keys
that such texts change.

A recipe can extend others: `extends = ["phase1.toml", "demo.toml"]` first takes all values of these
files (from the same folder; a later file overrides an earlier one), then the recipe's own values.

Built-in recipes are in `FOLDER`. If no such file exists, in the current folder or beside the recipe
that extends it, a name means the built-in recipe: `demo-phase1`, `demo-phase1.toml` and
`recipes/demo-phase1.toml` are the same.
"""

import codecs
import dataclasses
import datetime
import difflib
import functools
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from storage import read_plain

FOLDER = Path(__file__).parent

T = TypeVar("T")


class RecipeError(ValueError):
    """Error in a recipe. The message names the file, the key, and what is expected."""


def load(kind: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Read the recipe at `path` into the dataclass `kind`, then apply `overrides` such as
    `optim.lr=1e-4`.

    Raises:
        RecipeError: no such file, invalid TOML, an unknown or missing key, a value out of range.
    """
    values = read(path)
    for override in overrides:
        _apply(values, override)
    return build(kind, values, str(path), changed_keys(overrides))


def changed_keys(overrides: Sequence[str]) -> set[str]:
    """Return the keys that `overrides` such as `optim.lr=1e-4` change. `data={train=["a"]}` changes
    `data` and `data.train`.
    """
    changed: set[str] = set()
    for name, value in map(_parsed, overrides):
        changed |= {name, *_keys_in(value, f"{name}.")}
    return changed


def _keys_in(value: Any, prefix: str) -> set[str]:
    """Return the keys of a nested table, each after `prefix`."""
    keys: set[str] = set()
    for key, entry in value.items() if isinstance(value, Mapping) else ():
        keys |= {prefix + key, *_keys_in(entry, f"{prefix}{key}.")}
    return keys


def build(kind: type[T], values: Mapping[str, Any], where: str, changed: Collection[str] = ()) -> T:
    """Convert nested dicts (parsed TOML or JSON) to the dataclass `kind`; unknown keys are errors.

    `where` names the source in messages. `changed` lists the keys that were given by --set.

    Raises:
        RecipeError: an unknown or missing key, a wrong type, a value out of range or not finite.
    """
    _refuse_unknown(kind, values, where, prefix="")
    plain: type = kind  # mypy does not take `type[T]` as hashable
    try:
        built = _checks_of(plain).validate_python(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_in_words(error.errors()[0], changed):.1000}") from error
    _refuse_misread(built, values, where, prefix="")
    return built


@functools.cache
def _checks_of(kind: type) -> TypeAdapter[Any]:
    """Return the checks of a dataclass, which take longer to make than to run."""
    return TypeAdapter(kind)


_TAKES = {
    "list": "a list", "tuple": "a list", "dict": "a table", "dataclass": "a table",
    "mapping": "a table", "int": "a whole number", "float": "a number", "bool": "true or false",
    "string": "a text",
}  # fmt: skip
"""Expected type of a value in words, by the first part of pydantic's error type."""

_SCALARS = (bool, int, float, str)

MAX_SHOWN = 200
"""Most characters of a value, a key or a name in an error."""


def _short(value: Any) -> str:
    """Return a value as in a recipe, cut if it is long."""
    text = json.dumps(value, default=str)  # a date is no JSON
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _in_words(mistake: Mapping[str, Any], changed: Collection[str]) -> str:
    """Describe one pydantic error: the key, the expected type, the value, the right notation."""
    *tables, last = mistake["loc"] or ("recipe",)
    name = ".".join(map(str, mistake["loc"]))[:MAX_SHOWN] or "recipe"
    value, takes = mistake["input"], _TAKES.get(mistake["type"].partition("_")[0])
    if mistake["type"] == "missing":
        if isinstance(last, int):
            return f"{'.'.join(map(str, tables))} has {last} values, which is too few"
        return f"{name} is missing; add it"
    if takes is None or not isinstance(value, str | int | float | bool | list | dict):
        return f"{name}: {mistake['msg'].removeprefix('Value error, ')}"
    said = f"{name} takes {takes}, got {_short(value)}"
    if takes == "a list" and isinstance(value, str) and len(value) <= MAX_SHOWN:
        written = f"{name}={json.dumps(_items_of(value))}"
        said += f": --set '{written}'" if name in changed else f": {written}"
    return said


def _items_of(text: str) -> list[Any]:
    """Return the items that a text for a list means: numbers as such, and texts."""
    inside = text.removeprefix("[").removesuffix("]") if text.startswith("[") else text
    apart = [_number_or_text(item) for item in inside.split()]
    if all(isinstance(item, int | float) for item in apart):  # `0.5 1.0`
        return apart
    return [_number_or_text(item.strip()) for item in inside.split(",")]


def _number_or_text(item: str) -> int | float | str:
    value = _parsed(f"item={item}")[1]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else item.strip("\"'")


def _refuse_misread(built: Any, given: Any, where: str, prefix: str) -> None:
    """Raise `RecipeError` for the first value of `given`, nested dicts, that is a date, not finite,
    or in `built` of another type. Pydantic's strict mode would also refuse lists for tuples, and
    1e3 for a whole number.
    """
    name = prefix.rstrip(".")
    if isinstance(given, datetime.date | datetime.time):
        raise RecipeError(f"{where}: {name} takes no date or time, got {given}; quote it as a text")
    both = isinstance(built, _SCALARS) and isinstance(given, _SCALARS)
    if both and any(isinstance(built, kind) != isinstance(given, kind) for kind in (bool, str)):
        takes = _TAKES[type(built).__name__.replace("str", "string")]
        raise RecipeError(f"{where}: {name} takes {takes}, got {_short(given)}")
    if isinstance(built, float) and not math.isfinite(built):
        raise RecipeError(f"{where}: {name} must be a finite number, got {built}")
    if isinstance(given, Mapping):
        for key, entry in given.items():
            of = built.get(key) if isinstance(built, Mapping) else getattr(built, key, None)
            _refuse_misread(of, entry, where, f"{prefix}{key}.")
    elif isinstance(given, list | tuple) and isinstance(built, list | tuple):
        for of, entry in zip(built, given, strict=True):
            _refuse_misread(of, entry, where, prefix)


def _file_of(path: Path) -> Path:
    """Return `path`, or the built-in recipe of that name if `path` is no file."""
    return path if path.is_file() else _built_in(path) or path


def _built_in(path: Path) -> Path | None:
    """Return the built-in recipe that a path names; None if it names none."""
    shipped = FOLDER / f"{path.name.removesuffix('.toml')}.toml"
    is_name = path.parent in (Path(), Path("recipes"))
    return shipped if is_name and shipped.is_file() else None


def _base_of(file: Path, base: str) -> Path:
    """Return the recipe that `file` extends by the name `base`: beside it, or built-in. The working
    directory does not matter. A recipe of a built-in name extends the built-in one by this name.
    """
    beside = [file.parent / base, file.parent / f"{base.removesuffix('.toml')}.toml"]
    others = (path for path in beside if path.is_file() and not path.samefile(file))
    own = next((path for path in beside if path.is_file()), beside[0])  # itself, or missing
    return next(others, _built_in(Path(base)) or own).absolute()


def read(path: Path, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe as nested dicts, merged with the recipes that it extends. `within` are the
    files that extend it.

    Raises:
        RecipeError: no such file, invalid TOML, or recipes that extend each other in a circle.
    """
    file = _file_of(path)
    if file.resolve() in within:
        raise RecipeError(f"{file} extends itself; a recipe can extend only other recipes")
    try:
        values = read_toml(file)
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
        raise RecipeError(f"no recipe at {path}; built-in recipes: {known}") from None
    merged: dict[str, Any] = {}
    bases = values.pop("extends", [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise RecipeError(f'{file}: extends takes a list of recipes, such as ["phase1.toml"]')
    for base in bases:
        _merge(merged, read(_base_of(file, base), (*within, file.resolve())))
    return _merge(merged, values)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file as nested dicts. A byte order mark is allowed.

    Raises:
        FileNotFoundError: the file does not exist.
        RecipeError: the file is not UTF-8, or is invalid TOML.
    """
    try:
        return _toml(read_plain(path).removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); save "
            "it as UTF-8"
        ) from error
    except ValueError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error


MAX_DEPTH = 100
"""Most tables and lists in each other, and most parts of a key, in a TOML file."""

_TEXT_OR_COMMENT = re.compile(
    r'"""(?:[^"\\]++|\\.|"(?!""))*+"{0,5}'
    r"|'''(?:[^']++|'(?!''))*+'{0,5}"
    r'|"(?:[^"\\\n]++|\\.)*+"?'
    r"|'[^'\n]*+'?"
    r"|#[^\n]*+",
    re.DOTALL,
)
"""A text or comment of TOML, also one that does not end; each character is read once."""


def _toml(text: str) -> dict[str, Any]:
    """Parse TOML, which may come from a stranger.

    Raises:
        tomllib.TOMLDecodeError: the text is not TOML.
        ValueError: a key or a value is nested too deeply, or a number has too many digits.
    """
    keys = re.findall(r"(?:^|[\n,\[\]{}])([^\n,\[\]{}=]*+)", _TEXT_OR_COMMENT.sub("", text))
    if any(key.count(".") >= MAX_DEPTH for key in keys):  # tomllib takes the square of memory
        raise ValueError("it is nested too deeply")
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # of int()
        raise ValueError("a number in it has too many digits") from error
    inside: list[Any] = [values]
    for _level in range(MAX_DEPTH):
        parts = (each.values() if isinstance(each, dict) else each for each in inside)
        inside = [part for each in parts for part in each if isinstance(part, dict | list)]
        if not inside:
            return values
    raise ValueError("it is nested too deeply")


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Update `base` with `changes`: tables are merged key by key, other values are replaced."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value
    return base


_FRACTION = re.compile(r"[+-]?([0-9]+\.|[0-9]*\.[0-9]+)([eE][+-]?[0-9]+)?")
"""Numbers that Python writes so and TOML does not know: `.5` and `5.`."""


def _parsed(override: str) -> tuple[str, Any]:
    """Split an override `path.to.key=value`. A value that is not valid TOML is taken as text, but
    for numbers such as `.5` or `5.`, and `True` and `False`.
    """
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        raise RecipeError(f"--set takes KEY=VALUE, such as optim.lr=1e-4; got {override!r}")
    if name.count(".") >= MAX_DEPTH:
        raise RecipeError(f"--set {name:.100}: the key is nested too deeply")
    try:
        value = _toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
        if _FRACTION.fullmatch(value):
            value = float(value)
        elif value in ("True", "False"):
            value = value == "True"
    except ValueError as error:
        raise RecipeError(f"--set {name:.100}: the value cannot be used: {error}") from error
    return name.strip(), value


def _apply(values: dict[str, Any], override: str) -> None:
    """Apply one override `path.to.key=value`."""
    name, value = _parsed(override)
    *tables, key = name.split(".")
    for part in tables:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--set {override}: {part} is a value, not a table")
    values[key] = value


def _refuse_unknown(kind: Any, value: Any, where: str, prefix: str) -> None:
    """Raise `RecipeError` for the first key that the dataclass `kind` does not have.

    Pydantic refuses unknown keys too, but its message does not list the known names.
    """
    arguments = typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        known = _hints_of(kind)
        for key, entry in value.items():
            if key not in known:
                name = f"{prefix}{key}"[:MAX_SHOWN]
                raise RecipeError(f"{where}: unknown key '{name}'; {_nearest(key, known)}")
            _refuse_unknown(known[key], entry, where, f"{prefix}{key}.")
    elif isinstance(value, Mapping) and typing.get_origin(kind) is dict:
        for key, entry in value.items():
            _refuse_unknown(arguments[1], entry, where, f"{prefix}{key}.")
    elif isinstance(value, list) and typing.get_origin(kind) in (list, tuple):
        for index, entry in enumerate(value):
            _refuse_unknown(arguments[0], entry, where, f"{prefix}{index}.")
    elif typing.get_origin(kind) in (typing.Union, types.UnionType):
        for member in arguments:
            _refuse_unknown(member, value, where, prefix)


@functools.cache
def _hints_of(kind: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass."""
    return typing.get_type_hints(kind)


def _nearest(key: str, known: Collection[str]) -> str:
    """List the known names with a spelling close to `key`, nearest first, or else all names."""
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
