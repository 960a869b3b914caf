"""Tests of the file of figures on sources left out of training."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from model.export.new_kinds import (
    AfterPerturbation,
    NewKinds,
    NewKindsError,
    Pairs,
    WithinSubjects,
    read_new_kinds,
    write_new_kinds,
)

FIGURES = NewKinds(
    pooled=0.913,
    pairs=Pairs(mean=0.9, interval=(0.85, 0.94), worst={"a | b": 0.192}),
    within_subjects=WithinSubjects(auroc=0.714, clusters=28),
    perturbed={
        "jpeg-60": AfterPerturbation(
            auroc=0.864, recall=0.59, false_positive_rate=0.06, reals=940, fakes=51
        )
    },
)
NOTHING = NewKinds(pooled=1.0, pairs=None, within_subjects=WithinSubjects(auroc=None, clusters=0))


@pytest.mark.parametrize("figures", [FIGURES, NOTHING, replace(FIGURES, perturbed={})])
def test_figures_are_read_as_they_were_written(figures: NewKinds, tmp_path: Path) -> None:
    write_new_kinds(figures, tmp_path / "left_out.json")
    assert read_new_kinds(tmp_path / "left_out.json") == figures


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pooled": 1.5}, "pooled takes a number from 0 to 1, got 1.5"),
        ({"pooled": float("nan")}, "pooled takes a number from 0 to 1, got NaN"),
        ({"pooled": "high"}, 'pooled takes a number from 0 to 1, got "high"'),
        ({"within_subjects": {}}, "within_subjects.auroc is missing"),
        ({"perturbed": {"a": {"auroc": 1}}}, "perturbed.a.recall is missing"),
        ({"one left out": None}, "unknown key"),
        ([], "it holds list, expected an object"),
        (None, "left_out.json"),
    ],
)
def test_other_files_are_refused(changed: dict | list | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "left_out.json"
    content = asdict(FIGURES) | changed if isinstance(changed, dict) else changed
    path.write_text("{" if changed is None else json.dumps(content))
    with pytest.raises(NewKindsError, match=f"{said}.*benchmarks.leave_out"):
        read_new_kinds(path)
