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
import json
import math
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from checked import checked
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
    """Convert nested dicts (parsed TOML) to the dataclass `kind`; unknown keys are errors.

    `where` names the source in messages. `changed` lists the keys that were given by --set.

    Raises:
        RecipeError: an unknown or missing key, a wrong type, a value out of range or not finite.
    """

    def as_list(key: str, text: str) -> str:
        written = f"{key}={json.dumps(_items_of(text))}"
        return f"--set '{written}'" if key in changed else written

    try:
        return checked(kind, values, where, as_list)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _items_of(text: str) -> list[Any]:
    """Split a text that was given for a list into its items, numbers and texts."""
    inside = text.removeprefix("[").removesuffix("]") if text.startswith("[") else text
    apart = [_number_or_text(item) for item in inside.split()]
    if all(isinstance(item, int | float) for item in apart):  # such as `0.5 1.0`
        return apart
    return [_number_or_text(item.strip()) for item in inside.split(",")]


def _number_or_text(item: str) -> int | float | str:
    value = _parsed(f"item={item}")[1]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else item.strip("\"'")


def _file_of(path: Path) -> Path:
    """Return `path`, or the built-in recipe of that name if `path` is no file."""
    return path if path.is_file() else _built_in(path) or path


def _built_in(path: Path) -> Path | None:
    """Return the built-in recipe that a path names; None if it names none."""
    shipped = FOLDER / f"{path.name.removesuffix('.toml')}.toml"
    is_name = path.parent in (Path(), Path("recipes"))
    return shipped if is_name and shipped.is_file() else None


def _base_of(file: Path, base: str) -> Path:
    """Return the recipe `base` that `file` extends: next to `file`, or built-in, whatever the
    working directory is. A `file` with the name of a built-in recipe can extend that recipe by this
    name.
    """
    beside = [file.parent / base, file.parent / f"{base.removesuffix('.toml')}.toml"]
    others = (path for path in beside if path.is_file() and not path.samefile(file))
    own = next((path for path in beside if path.is_file()), beside[0])  # `file` itself, or no file
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
"""Numbers of Python that TOML does not have: `.5` and `5.`."""


def _parsed(override: str) -> tuple[str, Any]:
    """Split an override `path.to.key=value`. A value that is not valid TOML is taken as text,
    except numbers such as `.5` or `5.`, and `True` and `False`.
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
