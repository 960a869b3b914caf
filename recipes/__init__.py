"""Recipes: a TOML file in, a frozen dataclass out. A key that nobody knows is an error.

A recipe may start from others: `extends = ["phase1.toml", "demo.toml"]` takes every value of those
files (in the same folder, a later one over an earlier one) and changes only what stands below it.

The recipes that ship lie in `FOLDER`. Where no file is there, their names mean them: `demo-phase1`,
`demo-phase1.toml`, and `recipes/demo-phase1.toml`, which exists in a checkout alone.
"""

import codecs
import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

FOLDER = Path(__file__).parent

T = TypeVar("T")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message says where and what is known instead."""


def load(kind: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Read the recipe at `path` as a `kind`, with `overrides` such as `optim.lr=1e-4` on top.

    Raises:
        RecipeError: no such file, broken TOML, an unknown or missing key, a value out of range.
    """
    values = read(path)
    for override in overrides:
        _apply(values, override)
    changed = {override.partition("=")[0].strip() for override in overrides}
    return build(kind, values, str(path), changed)


def build(kind: type[T], values: Mapping[str, Any], where: str, changed: Collection[str] = ()) -> T:
    """`values` (nested dicts, as TOML or JSON gives them) as a `kind`, strictly; see `load`.
    `changed` names the keys that --set has given.
    """
    _refuse_unknown(kind, values, where, prefix="")
    try:
        built = TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_in_words(error.errors()[0], changed)}") from error
    _refuse_not_finite(built, where, prefix="")
    return built


_TAKES = {
    "list": "a list", "tuple": "a list", "dict": "a table", "dataclass": "a table",
    "mapping": "a table", "int": "a whole number", "float": "a number", "bool": "true or false",
    "string": "a text",
}  # fmt: skip
"""What a key takes, by the beginning of pydantic's name for the mistake."""


def _in_words(mistake: Mapping[str, Any], changed: Collection[str]) -> str:
    """What is wrong with one value: the key, what it takes, what it got, how it is written."""
    *tables, last = mistake["loc"] or ("recipe",)
    name = ".".join(map(str, mistake["loc"])) or "recipe"
    value, takes = mistake["input"], _TAKES.get(mistake["type"].partition("_")[0])
    if mistake["type"] == "missing":
        if isinstance(last, int):
            return f"{'.'.join(map(str, tables))} has {last} values, which is too few"
        return f"{name} is missing; add it"
    if takes is None or not isinstance(value, str | int | float | bool | list | dict):
        return f"{name}: {mistake['msg'].removeprefix('Value error, ')}"
    said = f"{name} takes {takes}, got {json.dumps(value)}"
    if takes == "a list" and isinstance(value, str):
        written = f"{name}={json.dumps([value])}"
        said += f": --set '{written}'" if name in changed else f": {written}"
    return said


def _refuse_not_finite(value: Any, where: str, prefix: str) -> None:
    """Walk a value; the first NaN or infinity in it is an error."""
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where}: {prefix.rstrip('.')} must be a finite number, got {value}")
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _refuse_not_finite(entry, where, f"{prefix}{key}.")
    elif isinstance(value, list | tuple):
        for entry in value:
            _refuse_not_finite(entry, where, prefix)


def _file_of(path: Path) -> Path:
    """The recipe file that `path` means: where none is there, the one that ships of that name."""
    shipped = FOLDER / f"{path.name.removesuffix('.toml')}.toml"
    is_name = path.parent in (Path(), Path("recipes"))
    return shipped if is_name and not path.exists() and shipped.is_file() else path


def read(path: Path) -> dict[str, Any]:
    """The values of a recipe with those it extends, as TOML has them.

    Raises:
        RecipeError: no such file, or broken TOML.
    """
    file = _file_of(path)
    try:
        values = read_toml(file)
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
        raise RecipeError(f"no recipe at {path}; built in are {known}") from None
    merged: dict[str, Any] = {}
    for base in values.pop("extends", []):
        beside = file.parent / base
        shipped = _file_of(Path(base))
        _merge(merged, read(shipped if not beside.exists() and shipped.exists() else beside))
    return _merge(merged, values)


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file; a byte order mark is passed over.

    Raises:
        FileNotFoundError: it is not there.
        RecipeError: it is not UTF-8, or broken TOML.
    """
    try:
        return tomllib.loads(path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); save "
            "it as UTF-8"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` on top; tables are merged key by key, everything else is replaced."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value
    return base


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one `path.to.key=value`; the value is TOML where it parses as TOML, else plain text."""
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        raise RecipeError(f"--set takes KEY=VALUE, such as optim.lr=1e-4; got {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *tables, key = name.strip().split(".")
    for part in tables:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--set {override}: {part} is a value, not a table")
    values[key] = value


def _refuse_unknown(kind: Any, value: Any, where: str, prefix: str) -> None:
    """Walk a type and a value together; the first key that a dataclass lacks is an error.

    Pydantic alone would say so too, but without the names that are known.
    """
    arguments = typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        known = typing.get_type_hints(kind)
        for key, entry in value.items():
            if key not in known:
                raise RecipeError(f"{where}: unknown key '{prefix}{key}'; {_nearest(key, known)}")
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


def _nearest(key: str, known: Collection[str]) -> str:
    """The known names that are spelled like `key`, the nearest first; all of them if none is."""
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    return f"the nearest known: {', '.join(near)}" if near else f"known: {', '.join(sorted(known))}"
