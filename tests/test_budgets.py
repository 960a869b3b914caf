"""Size limits for code and tests: lines, parameters, options, recipe keys and vague names."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from model.recipe import Recipe
from tests.builders import ROOT

FILE_LINES = 500
FUNCTION_LINES = 80
PARAMETERS = 8
MODEL_FILES = 12
RECIPE_KEYS = 100
FLAGS = 22
"""Largest number of options of a command, with `--verbose`. Evaluate and predict need three options
for any detector (its name, trust in its program, the meaning of its labels), and predict three for
a decision (a threshold, or two error rates) and three to record mistakes."""

PRODUCT = (
    "app.py", "app_server.py", "cli.py", "console.py", "evaluate.py", "predict.py", "storage.py",
    "train.py", "checked.py", "devices.py", "escape.py", "interrupts.py", "locks.py",
    "web_addresses.py",
    "imaging/**/*.py", "model/**/*.py", "page/**/*.py", "pipeline/**/*.py", "recipes/**/*.py",
    "report/**/*.py", "serve/**/*.py", "sharding/**/*.py",
)  # fmt: skip

MOST_FUNCTIONS = {"found": 10}
"""Vague variable name -> largest number of functions that may bind it."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions_of(tree: ast.AST) -> Iterator[Function]:
    """Yield all functions and methods, nested ones included."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """Yield the nodes of a function, without the nodes of nested functions."""
    waiting: list[ast.AST] = [*ast.iter_child_nodes(function)]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, Function):
            yield node
            waiting += ast.iter_child_nodes(node)


def binds(function: Function, name: str) -> bool:
    """Return whether the function has a parameter or local variable with this name."""
    return any(
        (isinstance(node, ast.arg) and node.arg == name)
        or (isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store))
        for node in own_nodes(function)
    )  # fmt: skip


def binding_functions(name: str) -> list[str]:
    """Return `file:line function` for each function of the product that binds the name."""
    return [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        for pattern in PRODUCT
        for path in sorted(ROOT.glob(pattern))
        if name in (text := path.read_text(encoding="utf-8"))  # else no function can bind it
        for function in functions_of(ast.parse(text))
        if binds(function, name)
    ]


@pytest.mark.parametrize("name", MOST_FUNCTIONS)
def test_meaningless_names_are_rare(name: str) -> None:
    binding = binding_functions(name)
    most = MOST_FUNCTIONS[name]
    assert len(binding) <= most, (
        f"{len(binding)} functions bind {name!r}, at most {most} may; use a meaningful name in: "
        f"{', '.join(binding)}"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(found): ...", True),
        ("def f():\n    for found in []: ...", True),
        ("def f():\n    return [found for found in []]", True),
        ("def f():\n    if found := 1: ...", True),
        ("def f():\n    return found", False),
        ("def f():\n    def g():\n        found = 1", False),
    ],
)
def test_binds_finds_every_kind_of_binding(source: str, expected: bool) -> None:
    assert binds(next(functions_of(ast.parse(source))), "found") == expected


def is_command(function: Function) -> bool:
    """Return whether a function is a click command, whose parameters are its options."""
    return any("command" in ast.unparse(decorator) for decorator in function.decorator_list)


FILES = sorted(path for pattern in (*PRODUCT, "tests/**/*.py") for path in ROOT.glob(pattern))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    assert lines <= FILE_LINES, f"{lines} lines; split it by purpose"
    for function in functions_of(ast.parse(text)):
        length = function.end_lineno - function.lineno + 1
        assert length <= FUNCTION_LINES, f"{function.name} has {length} lines"
        if is_command(function):
            continue  # click passes each option as a parameter
        arguments = function.args
        count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
        count -= bool(arguments.args and arguments.args[0].arg in ("self", "cls"))
        assert count <= PARAMETERS, f"{function.name} has {count} parameters"


def test_folders_of_model_stay_small() -> None:
    folders = {path.parent for path in (ROOT / "model").rglob("*.py")}
    for folder in folders:
        count = len(list(folder.glob("*.py")))
        assert count <= MODEL_FILES, f"{folder.relative_to(ROOT)} holds {count} files"


def keys_of(kind: type) -> int:
    """Count the keys of a recipe dataclass, nested sections included."""
    count = 0
    for field in dataclasses.fields(kind):
        nested = field.type if dataclasses.is_dataclass(field.type) else None
        count += keys_of(nested) if nested else 1
    return count


def test_the_number_of_recipe_keys_stays_small() -> None:
    assert keys_of(Recipe) <= RECIPE_KEYS


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield the name and command of every command of the project."""
    import evaluate
    import predict
    import train
    from model.__main__ import main as model
    from pipeline.__main__ import main as pipeline
    from serve.__main__ import main as serve
    from sharding.__main__ import main as sharding

    groups = {"sharding": sharding, "pipeline": pipeline, "model": model, "evaluate": evaluate.main}
    for name, group in groups.items():
        for child in getattr(group, "commands", {}).values():
            yield f"{name} {child.name}", child
    yield "train", train.main
    yield "evaluate", evaluate.main
    yield "predict", predict.main
    yield "serve", serve


def test_the_number_of_options_per_command_stays_small() -> None:
    for name, command in commands():
        count = sum(isinstance(parameter, click.Option) for parameter in command.params)
        assert count <= FLAGS, f"{name} has {count} options"
