"""What the product keeps to by count: names that say nothing stay rare."""

import ast
from collections.abc import Iterator

import pytest

from tests.builders import ROOT

PRODUCT = (
    "app.py", "console.py", "evaluate.py", "predict.py", "storage.py", "train.py",
    "imaging/**/*.py", "model/**/*.py", "pipeline/**/*.py", "recipes/**/*.py", "report/**/*.py",
    "sharding/**/*.py",
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
