"""Printed result of mistakes that were scored again."""

import pytest

import evaluate
from model.mistakes.regressions import OUTCOMES
from report.mistakes import MOST_ROWS, print_regressions


def test_the_advice_for_rows_left_out_names_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = {"verdict": "likely AI", "score": 0.9, "detector": "a"}
    row = {"sha256": "0" * 64, "label": "real", "outcome": "still wrong", "before": verdict,
           "after": verdict, "reason": None}  # fmt: skip
    counts = dict.fromkeys(OUTCOMES, 0) | {"still wrong": MOST_ROWS + 2}
    print_regressions({"detector": "b", "counts": counts, "mistakes": [row] * (MOST_ROWS + 2)})
    said = capsys.readouterr().out
    assert "and 2 more; --out FOLDER writes all" in said
    assert any("--out" in option.opts for option in evaluate.main.params)
