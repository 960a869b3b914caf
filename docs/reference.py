"""Write docs/recipe-keys.md, docs/catalog-keys.md and docs/fields.md from the types and field
docstrings of the code.

Run as `python -m docs.reference`, or `make reference`. Main entry: `pages()` takes nothing and
returns a dict: file name of each page -> its Markdown text. recipe-keys.md describes the class
`Recipe`, catalog-keys.md the class `Catalog`, fields.md the classes in `FILES`, which describe JSON
files. `main()` takes nothing, writes all pages to `docs/` and returns nothing. `pages()` and
`main()` raise ValueError if a field of a class has no docstring.

The other functions take a type (`kind`): a dataclass, a TypedDict (without a base) or a type
annotation. `fields_of(kind)` returns a tuple of the `Field`s of a class (`key`, `kind`: its type,
`default`, `meaning`: its docstring, `may_be_absent`), or raises the same ValueError.
`sections(kind)` yields the classes with fields inside a type, itself included. `words(kind)`
returns the type in plain words, such as "list of numbers". `split_range(meaning)` takes a docstring
and returns a pair: the text before " Range: ", and the range after it ("" if none).
"""

import ast
import dataclasses
import functools
import inspect
import operator
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from typing_extensions import is_typeddict

import console
from model.recipe import Recipe
from model.shipped.meta import Meta
from report.fields import Report
from sharding.catalog import Catalog
from sharding.index import Index

FOLDER = Path(__file__).parent

WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything"}

NOTE = "<!-- Written by `make reference`. Change the docstring below the field in the code. -->"

RECIPE_PAGE = f"""# Recipe keys

{NOTE}

A recipe is a TOML file: one of those in `recipes/`, or yours (`python train.py --recipe FILE`).
`--set optim.lr=1e-4` changes one key. An unknown key, a value of another type, a number that is not
finite and a value out of range stop the command with an error of one line.

*Unset*: the key may be left out. The range of a list applies to each number in the list. In a list
of two numbers, the first is the lower one.
"""

CATALOG_PAGE = f"""# Catalog keys

{NOTE}

A catalog is a TOML file that `python -m sharding build --catalog FILE` reads. `python -m sharding
describe` writes one, and [own-data.md](own-data.md#labels-in-a-csv) shows one with labels in a CSV.
An unknown key and a value of another type stop the command with an error of one line.

*By name*: a table whose keys are names, such as `[sources.NAME]`. *Unset*: the key may be left out.
Names of sets and sources have lower-case letters, digits, `-` and `_`.
"""

FIELDS_PAGE = f"""# Fields of index.json, meta.json and report.json

{NOTE}

| file | written by | described below |
|---|---|---|
| `index.json` | `python -m sharding build`, in each shard set | [index.json](#indexjson) |
| `meta.json` | `train.py` and `evaluate.py calibrate`, in checkpoints | [meta.json](#metajson) |
| `report.json` | `evaluate.py`, in each evaluation | [report.json](#reportjson) |

*By name*: an object whose keys are names. *May be absent*: some files lack the field.
"""

FILES: Mapping[str, type] = {"index.json": Index, "meta.json": Meta, "report.json": Report}
"""File -> type of its content."""


@dataclasses.dataclass(frozen=True, eq=False)
class Field:
    """One field of a class: its key in the file, type, default and docstring."""

    key: str
    kind: Any
    default: Any
    meaning: str
    may_be_absent: bool


def pages() -> dict[str, str]:
    """Return the text of each page by its file name."""
    return {
        "recipe-keys.md": _recipe_page(),
        "catalog-keys.md": _catalog_page(),
        "fields.md": _fields_page(),
    }


@functools.cache
def fields_of(kind: type) -> tuple[Field, ...]:
    """Return the fields of a dataclass or TypedDict, inherited ones first.

    Raises:
        ValueError: a field has no docstring.
    """
    docs: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        docs |= _docstrings(owner)
    defaults = getattr(kind, "__dataclass_fields__", {})
    fields = []
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        optional = typing.get_origin(hint) is typing.NotRequired
        if name not in docs:
            raise ValueError(f"{kind.__name__}.{name} has no docstring; add one below the field")
        fields.append(
            Field(
                name.replace("at_0_5", "at_0.5"),
                _unwrapped(typing.get_args(hint)[0] if optional else hint),
                _default(defaults[name]) if name in defaults else dataclasses.MISSING,
                docs[name],
                optional,
            )
        )
    return tuple(fields)


def _unwrapped(kind: Any) -> Any:
    """Return a type with `Annotated[dict, C]`, an object with the fields of C, replaced by C, and
    another `Annotated`, which has a range, by its type.
    """
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Annotated:
        return arguments[1] if isinstance(arguments[1], type) else _unwrapped(arguments[0])
    if not arguments or typing.get_origin(kind) is Literal:
        return kind
    if len(alternatives(kind)) > 1:
        return functools.reduce(operator.or_, map(_unwrapped, arguments))
    return typing.get_origin(kind)[tuple(map(_unwrapped, arguments))]


def _docstrings(owner: type) -> dict[str, str]:
    """Return the text below each annotated name in the body of a class."""
    if owner.__module__ in ("builtins", "typing"):
        return {}
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        ):  # fmt: skip
            docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type alone."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def is_section(kind: Any) -> bool:
    """Return whether a type has fields of its own."""
    return dataclasses.is_dataclass(kind) or is_typeddict(kind)


def sections(kind: Any) -> Iterator[type]:
    """Yield a type with fields and every such type inside it, each once, outermost first."""
    waiting, seen = [kind], set()
    while waiting:
        one = waiting.pop(0)
        if is_section(one) and one not in seen:
            seen.add(one)
            yield one
            waiting += [*_described_bases(one), *(field.kind for field in fields_of(one))]
        else:
            waiting = [*typing.get_args(one), *waiting]


def _described_bases(kind: type) -> list[type]:
    """Return the base classes to which a class adds fields, without those of the same title."""
    return [
        base
        for base in kind.__bases__
        if is_section(base)
        and _title(base) != _title(kind)
        and not kind.__annotations__.keys() & base.__annotations__.keys()
    ]


def words(kind: Any) -> str:
    """Return a type in plain words; a type with fields becomes a link to its section."""
    if is_section(kind):
        return f"[{_title(kind)}](#{_title(kind).lower().replace(' ', '-')})"
    if len(alternatives(kind)) > 1:
        return " or ".join(
            "null" if one is type(None) else words(one) for one in alternatives(kind)
        )
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "text"
    if origin is dict or (isinstance(origin, type) and issubclass(origin, Mapping)):
        inside = words(arguments[1])
        return (
            f"by name{' and name' + inside[7:] if inside.startswith('by name:') else ': ' + inside}"
        )
    if origin is tuple and arguments[-1] is not ...:
        return f"list of {len(arguments)} {_plural(words(arguments[0]))}"
    if origin in (list, tuple, frozenset):
        return f"list of {_plural(words(arguments[0]))}"
    return WORDS[kind]


def _plural(word: str) -> str:
    if word.startswith("list of"):
        return word.replace("list", "lists", 1)
    words_of = word.split(" or ") if "[" in word else [word]
    return " or ".join(one if one.startswith("[") else f"{one}s" for one in words_of)


def _title(kind: type) -> str:
    """Return the name of a class as a heading: `SetReport` as `Set report`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.__name__.removesuffix("Entry")).capitalize()


def split_range(meaning: str) -> tuple[str, str]:
    """Split a field docstring into its meaning and the range that it ends with, if any."""
    text, _, limits = meaning.partition(" Range: ")
    return text, limits


_EXTENDS = Field(
    "extends",
    list[str],
    [],
    "Recipe files to start from. A later file overrides an earlier one, and this recipe overrides "
    "all. They are searched in the folder of this recipe, then in `recipes/`. `.toml` may be left "
    "out.",
    may_be_absent=False,
)
"""Row for the only key that is not a field of `Recipe`: `recipes.read` removes it."""


def _recipe_page() -> str:
    top, parts = [_key_row(_EXTENDS)], []
    for field in fields_of(Recipe):
        inside = next((one for one in _arguments(field.kind) if is_section(one)), None)
        if inside is None:
            top.insert(0, _key_row(field))
            continue
        table = "augment.NAME" if field.key == "augment" else field.key
        needed = field.default is dataclasses.MISSING or field.default is None
        about = field.meaning + ("" if needed else " The table may be left out.")
        rows = [_key_row(one) for one in fields_of(inside)]
        parts.append("\n".join([f"## [{table}]\n\n{about}\n\n{_KEYS_HEAD}", *rows, ""]))
    return "\n".join([RECIPE_PAGE, f"## Top level\n\n{_KEYS_HEAD}", *top, "", *parts])


def _catalog_page() -> str:
    parts = [CATALOG_PAGE]
    for kind in sections(Catalog):
        about = " ".join((inspect.getdoc(kind) or "").split())
        rows = [_key_row(field) for field in fields_of(kind)]
        parts.append("\n".join([f"## {_title(kind)}\n\n{about}\n\n{_KEYS_HEAD}", *rows, ""]))
    return "\n".join(parts)


_KEYS_HEAD = "| key | type | default | range | meaning |\n|---|---|---|---|---|"


def _arguments(kind: Any) -> Iterator[Any]:
    yield kind
    for one in typing.get_args(kind):
        yield from _arguments(one)


def _key_row(field: Field) -> str:
    meaning, limits = split_range(field.meaning)
    choices = [one for one in _arguments(field.kind) if typing.get_origin(one) is Literal]
    if choices and not limits:
        limits = ", ".join(
            f"`{choice}`" if choice else "empty" for choice in typing.get_args(choices[0])
        )
    kind = words(field.kind).replace(" or null", "")
    return f"| `{field.key}` | {kind} | {_shown(field.default)} | {limits} | {meaning} |"


def _shown(default: Any) -> str:
    """Return a default as TOML writes it."""
    if default is dataclasses.MISSING:
        return "required"
    if default is None:
        return "unset"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, str):
        return f'`"{default}"`'
    if isinstance(default, list | tuple | frozenset):
        return "`[" + ", ".join(_shown(one).strip("`") for one in default) + "]`"
    return f"`{default}`"


def _fields_page() -> str:
    parts, done = [FIELDS_PAGE], set()
    for file, content in FILES.items():
        for kind in sections(content):
            if kind in done or _is_of_recipe(kind):
                continue
            done.add(kind)
            about = " ".join((inspect.getdoc(kind) or "").split())
            heading = f"## {file}" if kind is content else f"### {_title(kind)}"
            parts.append(f"{heading}\n\n{_null(about)}\n")
            bases = _described_bases(kind)
            if bases:
                parts.append(f"All fields of {words(bases[0])}, and:\n")
            inherited = {field.key for base in bases for field in fields_of(base)}
            parts.append("| field | type | meaning |\n|---|---|---|")
            parts += [_field_row(field) for field in fields_of(kind) if field.key not in inherited]
            parts.append("")
    return "\n".join(parts)


def _null(text: str) -> str:
    """Return a docstring with None replaced by null, the word of JSON."""
    return re.sub(
        r"\bNone\b", lambda match: "Null" if _begins(text, match.start()) else "null", text
    )


def _begins(text: str, at: int) -> bool:
    return at == 0 or text[:at].endswith(". ")


def _is_of_recipe(kind: type) -> bool:
    """Return whether docs/recipe-keys.md describes the type."""
    return kind in set(sections(Recipe)) or issubclass(kind, Recipe)


def _field_row(field: Field) -> str:
    absent = "; may be absent" if field.may_be_absent else ""
    meaning = _null(split_range(field.meaning)[0])
    kind = "[recipe keys](recipe-keys.md)" if field.key == "recipe" else words(field.kind)
    return f"| `{field.key}` | {kind}{absent} | {meaning} |"


def main() -> None:
    """Write all pages to the folder of this file."""
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        console.say(f"wrote {FOLDER / name}")


if __name__ == "__main__":
    main()
