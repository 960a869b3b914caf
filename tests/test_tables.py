"""Tables at any width and in a pipe: values are complete, or their column is listed as left out."""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

import console
import train
from model.calibration.fit import Calibration, calibrate_by
from model.evaluation.compare import MetricChange, flips
from model.metrics import Metrics
from report.comparison import _with_interval
from report.terminal import (
    _difference,
    _figure,
    print_calibration,
    print_comparison,
    print_report,
)
from sharding.__main__ import main as sharding
from sharding.audit.audit import Audit, AurocEstimate, FeatureAudit, SourceAudit
from sharding.build import BuiltSet
from sharding.format import read_index
from sharding.scan import SourceScan
from sharding.summary import say_what_was_audited, say_what_was_built
from tests.builders import CALIBRATION
from tests.report.test_page import made, page_of, robustness, rows

LONG = "stable-diffusion-xl-base-1.0-refiner_of_a_gallery"
WIDTHS = (60, 80, 100, 140)

Call = tuple[str, list[str], list[list[Any]], list[str]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """Record the tables that commands print: title, columns, rows and droppable columns."""
    made: list[Call] = []

    def note(title: str, columns: Any, rows: Any, drop: Any = ()) -> None:
        made.append((title, list(columns), [list(row) for row in rows], list(drop)))

    with monkeypatch.context() as patch:
        patch.setattr(console, "table", note)
        yield made


def printed(call: Call, width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Print a table at this width; returns its lines."""
    stream = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(
            console, "_console",
            lambda **_stream: Console(file=stream, width=width, highlight=False, markup=False),
        )  # fmt: skip
        TABLE(*call)
    return stream.getvalue().splitlines()


TABLE: Callable = console.table


def check(call: Call, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that each value is complete in its row, unless its column is listed as left out."""
    _, columns, table, drop = call
    lines = printed(call, width, monkeypatch)
    text = "\n".join(lines)
    assert "…" not in text
    said = re.search(rf"^left out at {width} columns: (.*); a wider", text, re.MULTILINE)
    left_out = said[1].split(", ") if said else []
    assert left_out == [name for name in columns if name in set(drop) & set(left_out)]
    is_grid = "━" in text
    for line in lines:
        assert not set(line) & set("┃│┏└") or len(line) <= width, line
    at = 0
    for row in table:
        first = console.cell(row[0])
        values = [
            (name, console.cell(value))
            for name, value in zip(columns[1:], row[1:], strict=True)
            if name not in left_out
        ]
        if is_grid:
            cells = [first, *(value for _, value in values)]
            pattern = r"│\s+" + r"\s+│\s+".join(map(re.escape, cells)) + r"\s+│"
            assert re.search(pattern.replace(r"\s+\s+", r"\s+"), text), (width, cells, text)
        else:
            at = lines.index(first, at) + 1
            paragraph = []
            while at < len(lines) and lines[at].startswith("    "):
                paragraph += lines[at][4:].split("  ")
                at += 1
            assert paragraph == [
                f"{name}: {value}" if name else value for name, value in values if value
            ]


def lengthened(call: Call) -> Call:
    """Return the same table with long names."""
    title, columns, table, drop = call
    return title, columns, [[f"{row[0]} {LONG}", *row[1:]] for row in table], drop


def check_all(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    for call in calls:
        for version in (call, lengthened(call)):
            for width in WIDTHS:
                check(version, width, monkeypatch)
            lines = printed(version, console._WIDE, monkeypatch)  # a pipe gets all columns
            assert "━" in "\n".join(lines) and not lines[-1].startswith("left out")


def test_tables_of_a_report(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report, scores = made(
        [*rows("val", 60, 80), *rows("evalgen", 0, 60, seed=1)], "val", "evalgen",
        reference_reals={"set": "val", "why": "named"},
    )  # fmt: skip
    report["sets"]["val"]["robustness"] = robustness()
    print_report(report)
    (overall,) = [row for _, _, of, _ in calls for row in of if row[0] == "overall" and not row[1]]
    assert overall[3] is None and overall[4]  # of fakes alone, accuracy is their recall
    print_comparison(scores, scores, flips(scores, scores))
    fitted = CALIBRATION | {"fitted_on": None, "index_sha256": None}
    settings = {name: value for name, value in fitted.items() if value is not None}
    more = {"temperature": 1.5, "threshold": 0.6, "roc": [], "at_fpr": [(0.05, 0.766)]}
    print_calibration(Calibration(**settings | more))
    by_rate = {"threshold_at": "max_fpr", "method": "sources left out, worst_source",
               "sources_used": {"real": (6, 65), "fake": (0, 3)}}  # fmt: skip
    one_threshold = {"band": (0.6, 0.6)}
    print_calibration(Calibration(**settings | more | by_rate | one_threshold))
    said = capsys.readouterr().out
    assert "decision threshold 0.600 (max_fpr, sources left out, worst_source)" in said
    assert "decision threshold: 6 of 65 sources with real images; the others have too few" in said
    assert "at most 1 % false positives: -, 5 %: 0.766" in said
    first, second = re.findall("^verdicts: .*", said, re.M)
    assert first.endswith("uncertain between") and second == "verdicts: likely AI from 0.6"
    assert "all 3 sources with fake images together, because each has too few" in said
    assert "not the lowest" not in said and [row[0] for row in calls[-1][2]] == [
        "uncalibrated", "fitted",
    ]  # fmt: skip
    # 32 images of each class that hardly overlap: the lowest NLL has a lower temperature.
    labels = np.repeat([0, 1], 32)
    logits = np.concatenate([np.linspace(-9, 1, 32), np.linspace(-1, 9, 32)])
    fitted = calibrate_by("auto", labels, logits, labels, 3.0)
    print_calibration(fitted)
    assert [row[:2] for row in calls[-1][2]] == [
        ["uncalibrated", 1.0], ["until now", 3.0], ["fitted", fitted.temperature],
    ]  # fmt: skip
    assert "with few images the fit leans toward doubt" in capsys.readouterr().out
    assert len(calls) >= 7
    check_all(calls, monkeypatch)


def test_an_interval_that_does_not_contain_0_is_seen_not_to() -> None:
    """Of 490 real images, 6 more are called fake: the interval begins at two of them."""
    change = MetricChange(0.002, 0.014, 0.0041, 0.0224)
    assert _difference(change) == "0.002 -> 0.014 (+0.004 to +0.022)"
    figures = {"recall": 0.003, "intervals": {"recall": (0.0006, 0.0123)}}
    assert _figure(figures, "recall") == "0.003 (0.001-0.012)"
    assert _with_interval({"value": 0.003, "low": 0.0006, "high": 0.0123}) == "0.003 (0.001-0.012)"
    report, scores = made(rows("val", 9, 9), "val")
    report["sets"]["val"]["robustness"] = robustness()
    for line in report["sets"]["val"]["robustness"]["perturbations"]:
        line["intervals"]["false_positive_rate"] = (0.004, 0.0122)
    assert "0.4 to 1.2\N{NO-BREAK SPACE}%" in page_of(report, scores)


def test_tables_of_shard_sets(
    data: Path, raw: Path, tmp_path: Path, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (
        ["list", "--raw", raw, "--out", data, "--catalog", raw / "catalog.toml"],
        ["show", data / "val"],
        ["describe", raw, "--out", tmp_path / "mine.toml"],
        ["diff", data / "old", data / "new"],
        ["build", "--raw", tmp_path / "none", "--out", tmp_path],
    ):
        result = CliRunner().invoke(sharding, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    index = read_index(data / "val")
    say_what_was_built([BuiltSet("val", index, 1)], SourceScan(), data)
    estimate = AurocEstimate(0.81234, 0.7, 0.9)
    source = SourceAudit(reals=1234, fakes=5, within=estimate, from_others=None, note="few fakes")
    audit = Audit(
        samples=9, reals=4, fakes=5, pooled=estimate, across=estimate, source_name=estimate,
        sources={"gamma": source}, features={"width": FeatureAudit(alone=estimate, drop=0.12345)},
        shortcuts=[], verdict="strong", notes=[],
    )  # fmt: skip
    say_what_was_audited("val", audit, None)
    assert len(calls) >= 9, [title for title, *_ in calls]
    check_all(calls, monkeypatch)


def test_the_last_table_of_training(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {
        "count": 12345, "reals": 1, "fakes": 2, "accuracy": 0.9444, "balanced_accuracy": 0.9,
        "recall": 0.85, "auroc": 0.999,
    }  # fmt: skip
    figures = dict.fromkeys(field.name for field in fields(Metrics)) | figures
    metrics = {"sets": {"val": figures}, "sources": {"val/gamma": figures}, "selection": 0.9}
    meta = {"recipe": {"name": "phase1"}, "step": 7, "threshold": 0.6824, "metrics": metrics}
    train._print_validation(meta)
    (call,) = calls
    assert call[0] == "phase1, step 7, threshold 0.682"
    check_all(calls, monkeypatch)
    assert "left out at 60 columns: images" in "\n".join(printed(call, 60, monkeypatch))
