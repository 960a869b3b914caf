"""Hooks of all tests. Processes that run tests load the fixtures, in tests/fixtures.py."""

import gc
import os
from collections.abc import Iterator

import pytest

from tests.failures import pytest_runtest_logreport as pytest_runtest_logreport  # a hook


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-golden", action="store_true",
        help="run only the tests with golden values, and write the values instead of comparing",
    )  # fmt: skip


def pytest_sessionstart(session: pytest.Session) -> None:
    """Load the fixtures, but not in the process that distributes tests to workers (`-n 2`): what
    the fixtures import takes seconds, and the workers start after it.
    """
    plugins = session.config.pluginmanager
    if not plugins.has_plugin("dsession"):
        plugins.import_plugin("tests.fixtures")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU if there is none, unless REQUIRE_GPU is set: then they fail.

    With --write-golden, deselect all tests without golden values.
    """
    if config.getoption("write_golden"):
        others = [item for item in items if "golden" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    import torch  # slow, and unused where tests are only distributed

    if torch.cuda.is_available() or os.environ.get("REQUIRE_GPU"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect no garbage while tests are collected: there is none, and each time Python visits the
    million objects of all imported libraries.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
