"""The page of the benchmarks names every benchmark, with its required options."""

import re
from importlib import import_module

import click
import pytest

from tests.builders import ROOT

PAGE = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
PARTS = {"adapters", "contenders", "detectors", "images", "peers", "resume"}
"""Modules that other benchmarks use."""

NO_JSON = {"gpu_day", "ablation", "mutations"}
BENCHMARKS = sorted({path.stem for path in (ROOT / "benchmarks").glob("*.py")} - PARTS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_table_has_each_benchmark_with_what_it_requires(name: str) -> None:
    command: click.Command = import_module(f"benchmarks.{name}").main
    (typed,) = re.findall(rf"^\| `python -m benchmarks\.{name}\b(.*?)`", PAGE, re.M)
    required = [
        one.human_readable_name if isinstance(one, click.Argument) else one.opts[0]
        for one in command.params if one.required
    ]  # fmt: skip
    assert all(word in typed for word in required)
    options = {option for parameter in command.params for option in parameter.opts}
    assert ("--json" in options) == (name not in NO_JSON)


def test_the_page_names_the_benchmarks_without_json() -> None:
    (sentence,) = re.findall(r"takes `--json FILE`[^.]*\.", PAGE)
    assert set(re.findall(r"`(\w+)`", sentence)) == NO_JSON
