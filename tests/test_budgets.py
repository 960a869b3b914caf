"""Budgets that keep the code and its tests small: files, functions, parameters, flags, names."""

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
FLAGS = 17
"""Options of one command; `--help` and `--verbose` of every command count too. Evaluate and predict
take any detector, which is three: which, whether its program is trusted, what its labels mean."""

PRODUCT = (
    "app.py", "app_server.py", "console.py", "evaluate.py", "predict.py", "storage.py", "train.py",
    "escape.py", "imaging/**/*.py", "model/**/*.py", "page/**/*.py", "pipeline/**/*.py",
    "recipes/**/*.py", "report/**/*.py",
    "serve/**/*.py", "sharding/**/*.py",
)  # fmt: skip

MOST_FUNCTIONS = {"found": 10}
"""A name that says nothing of its type -> the most functions that may bind it."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions_of(tree: ast.AST) -> Iterator[Function]:
    """Every function and method, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions inside it."""
    waiting: list[ast.AST] = [*ast.iter_child_nodes(function)]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, Function):
            yield node
            waiting += ast.iter_child_nodes(node)


def binds(function: Function, name: str) -> bool:
    """Whether a parameter or a local variable of the function has this name."""
    return any(
        (isinstance(node, ast.arg) and node.arg == name)
        or (isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store))
        for node in own_nodes(function)
    )  # fmt: skip


def binding_functions(name: str) -> list[str]:
    """`file:line function` of each function of the product that binds the name."""
    return [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        for pattern in PRODUCT
        for path in sorted(ROOT.glob(pattern))
        for function in functions_of(ast.parse(path.read_text(encoding="utf-8")))
        if binds(function, name)
    ]


@pytest.mark.parametrize("name", MOST_FUNCTIONS)
def test_names_that_say_nothing_are_rare(name: str) -> None:
    binding = binding_functions(name)
    most = MOST_FUNCTIONS[name]
    assert len(binding) <= most, (
        f"{len(binding)} functions bind {name!r}, at most {most} may; name what it is instead: "
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
def test_what_binds_a_name(source: str, expected: bool) -> None:
    assert binds(next(functions_of(ast.parse(source))), "found") == expected


def is_command(function: Function) -> bool:
    """Whether click fills the parameters of a function."""
    return any("command" in ast.unparse(decorator) for decorator in function.decorator_list)


FILES = sorted(path for pattern in (*PRODUCT, "tests/**/*.py") for path in ROOT.glob(pattern))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= FILE_LINES, f"{lines} lines; split it by purpose"
    for function in functions_of(ast.parse(path.read_text(encoding="utf-8"))):
        length = function.end_lineno - function.lineno + 1
        assert length <= FUNCTION_LINES, f"{function.name} has {length} lines"
        if is_command(function):
            continue  # click passes each option as a parameter
        arguments = function.args
        count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
        count -= bool(arguments.args and arguments.args[0].arg in ("self", "cls"))
        assert count <= PARAMETERS, f"{function.name} has {count} parameters"


def test_no_folder_of_model_grows_into_a_heap() -> None:
    folders = {path.parent for path in (ROOT / "model").rglob("*.py")}
    for folder in folders:
        count = len(list(folder.glob("*.py")))
        assert count <= MODEL_FILES, f"{folder.relative_to(ROOT)} holds {count} files"


def keys_of(kind: type) -> int:
    """The keys that a dataclass of the recipe takes, with those of its sections."""
    count = 0
    for field in dataclasses.fields(kind):
        nested = field.type if dataclasses.is_dataclass(field.type) else None
        count += keys_of(nested) if nested else 1
    return count


def test_the_recipe_stays_readable() -> None:
    assert keys_of(Recipe) <= RECIPE_KEYS


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command of the project by name."""
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


def test_no_command_grows_too_many_flags() -> None:
    for name, command in commands():
        count = sum(isinstance(parameter, click.Option) for parameter in command.params)
        assert count <= FLAGS, f"{name} has {count} options"
