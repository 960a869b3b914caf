"""Check the values of a JSON or TOML file against a type: a dataclass, a `TypedDict`, or a dict of
them. The file may come from a stranger.

Main entry: `checked(kind, values, where)` takes the type, the parsed file, and the name of the file
for errors. It returns the values as a `kind`, or raises `ValueError` with one line: the key, what
it takes, and what it has. `limited()` gives a number of a layout its range, `one_of()` a
text its choices.
"""

import dataclasses
import datetime
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError
from typing_extensions import is_typeddict

T = TypeVar("T")

MOST_ERRORS = 1000
"""Largest number of wrong values of which the first one is named: pydantic lists all of them, which
takes minutes for a million.
"""

LONGEST = 100
"""Largest number of characters of a key or a value in an error."""


def checked(
    kind: type[T],
    values: Any,
    where: str = "",
    as_list: Callable[[str, str], str] | None = None,
    *,
    ignore_unknown: bool = False,
) -> T:
    """Return `values`, nested dicts of a parsed file, as a `kind`. Keys that a dataclass does not
    have are errors, or ignored with `ignore_unknown`; those that a `TypedDict` does not have are
    ignored.

    `where` names the file in errors. `as_list(key, text)` is given for TOML that a person writes:
    it returns the notation of a list where `text` is in place of one.

    Raises:
        ValueError: an unknown or missing key, a wrong type, a value out of range or not finite.
    """
    try:
        if not isinstance(values, Mapping):
            raise ValueError(f"it holds {type(values).__name__}, expected an object")
        if not ignore_unknown:
            _refuse_unknown(kind, values, prefix="")
        return _built(kind, values, as_list)
    except (ValueError, RecursionError) as error:
        fault = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise ValueError(f"{where}: {fault:.1000}" if where else f"{fault:.1000}") from error


def limited(takes: str, allows: Callable[[Any], bool]) -> BeforeValidator:
    """Return the range of a number in a layout, for `Annotated`. `takes` says in words what numbers
    `allows(number)` returns True for.
    """

    def check(value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and allows(value)):
            raise refused(takes)
        return value

    return BeforeValidator(check)


def one_of(choices: Collection[str], takes: str = "") -> AfterValidator:
    """Return the choices of a text in a layout, for `Annotated`, if they are known as a list.
    `takes` describes them in words, where they are many.
    """

    def check(text: str) -> str:
        if text not in choices:
            raise refused(takes or " or ".join(map(repr, choices)))
        return text

    return AfterValidator(check)


def refused(takes: str) -> PydanticCustomError:
    """Return the error of a validator of pydantic, of a value that is not what its key takes."""
    return PydanticCustomError("limited", "{takes}", {"takes": takes})


def _built(
    kind: type[T], values: Mapping[str, Any], as_list: Callable[[str, str], str] | None
) -> T:
    plain: type = kind  # mypy does not take `type[T]` as hashable
    try:
        built = _checks_of(plain).validate_python(values)
    except ValidationError as error:
        if error.error_count() > MOST_ERRORS:
            raise ValueError(f"{error.error_count():,} values are missing or wrong") from None
        raise ValueError(_in_words(error.errors(include_url=False)[0], as_list)) from error
    _refuse_misread(built, values, prefix="")
    return built


@functools.cache
def _checks_of(kind: type) -> TypeAdapter[Any]:
    """Return the checks of a type, which take longer to make than to run."""
    return TypeAdapter(kind)


_TAKES = {
    "list": "a list", "tuple": "a list", "dict": "an object", "dataclass": "an object",
    "mapping": "an object", "int": "a whole number", "float": "a number", "bool": "true or false",
    "string": "a text",
}  # fmt: skip
"""Expected type of a value in words, by the first part of pydantic's error type."""

_SCALARS = (bool, int, float, str)


def _in_words(mistake: Mapping[str, Any], as_list: Callable[[str, str], str] | None) -> str:
    """Describe one pydantic error: the key, the expected type, the value, the right notation."""
    *outer, last = mistake["loc"] or ("recipe" if as_list else "it",)
    name = _short(".".join(map(str, [*outer, last])))
    kind, value = mistake["type"], mistake["input"]
    if kind.startswith("recursion"):
        return "it is nested too deeply"
    if kind == "missing":
        if isinstance(last, int):
            return f"{_short('.'.join(map(str, outer)))} has {last} values, which is too few"
        return f"{name} is missing; add it" if as_list else f"{name} is missing"
    if kind in ("too_short", "too_long"):
        limit = "at least {min_length:,}" if kind == "too_short" else "at most {max_length:,}"
        return f"{name} takes a length of {limit.format(**mistake['ctx'])}, got {len(value):,}"
    takes = _TAKES.get(kind.partition("_")[0])
    if kind in ("limited", "literal_error"):
        takes = mistake["ctx"]["takes" if kind == "limited" else "expected"]
    if takes is None or not isinstance(value, str | int | float | bool | list | dict | None):
        said = mistake["msg"].removeprefix("Value error, ")
        return f"{name}: {said}" if mistake["loc"] or as_list else said
    if takes == "an object" and as_list:
        takes = "a table"
    said = f"{name} takes {takes}, got {_shown(value)}"
    if takes == "a list" and as_list and isinstance(value, str) and len(value) <= LONGEST:
        said += f": {as_list(name, value)}"
    return said


def _shown(value: Any) -> str:
    return _short(json.dumps(value, default=str))  # a date is no JSON


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 20]} ... {text[-15:]}"


def _refuse_misread(built: Any, given: Any, prefix: str) -> None:
    """Raise `ValueError` for the first value of `given`, nested dicts, that is a date, not finite,
    or in `built` of another type. Pydantic's strict mode would also refuse lists for tuples, and
    1e3 for a whole number.
    """
    name = _short(prefix.rstrip("."))
    if isinstance(given, datetime.date | datetime.time):
        raise ValueError(f"{name} takes no date or time, got {given}; quote it as a text")
    both = isinstance(built, _SCALARS) and isinstance(given, _SCALARS)
    if both and any(isinstance(built, kind) != isinstance(given, kind) for kind in (bool, str)):
        takes = _TAKES[type(built).__name__.replace("str", "string")]
        raise ValueError(f"{name} takes {takes}, got {_shown(given)}")
    if isinstance(built, float) and not math.isfinite(built):
        raise ValueError(f"{name} must be a finite number, got {built}")
    if isinstance(given, Mapping):
        for key, entry in given.items():
            of = built.get(key) if isinstance(built, Mapping) else getattr(built, key, None)
            if of is not None:
                _refuse_misread(of, entry, f"{prefix}{key}.")
    elif isinstance(given, list | tuple) and isinstance(built, list | tuple):
        for of, entry in zip(built, given, strict=True):
            _refuse_misread(of, entry, prefix)


def _refuse_unknown(kind: Any, value: Any, prefix: str) -> None:
    """Raise `ValueError` for the first key that a dataclass in `kind` does not have.

    Pydantic refuses unknown keys too, but its message does not list the known names.
    """
    arguments = typing.get_args(kind)
    is_class = isinstance(kind, type) and dataclasses.is_dataclass(kind)
    if isinstance(value, Mapping) and (is_class or is_typeddict(kind)):
        known = _hints_of(kind)
        for key, entry in value.items():
            if key in known:
                _refuse_unknown(known[key], entry, f"{prefix}{key}.")
            elif is_class:
                raise ValueError(
                    f"unknown key '{_short(f'{prefix}{key}')}'; {_nearest(key, known)}"
                )
    elif isinstance(value, Mapping) and typing.get_origin(kind) is dict:
        for key, entry in value.items():
            _refuse_unknown(arguments[1], entry, f"{prefix}{key}.")
    elif isinstance(value, list) and typing.get_origin(kind) in (list, tuple):
        for index, entry in enumerate(value):
            _refuse_unknown(arguments[0], entry, f"{prefix}{index}.")
    elif typing.get_origin(kind) in (typing.Union, types.UnionType):
        for member in arguments:
            _refuse_unknown(member, value, prefix)


@functools.cache
def _hints_of(kind: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass or `TypedDict`."""
    return typing.get_type_hints(kind)


def _nearest(key: str, known: Collection[str]) -> str:
    """List the known names with a spelling close to `key`, nearest first, or else all names."""
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
