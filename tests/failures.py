"""Print failed tests at once on a GPU, where a run may be stopped before its end.

Main entry: `pytest_runtest_logreport(report)`, a hook of pytest, imported by tests/conftest.py. It
is in a file of its own so that the test of the hook can import it.
"""

import os
import sys

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """With REQUIRE_GPU, print a failure at once."""
    if os.environ.get("REQUIRE_GPU") and report.failed:
        sys.stderr.write(f"\n{report.nodeid}\n{report.longreprtext}\n")
        sys.stderr.flush()
