"""Plot of a run's curves."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from model.__main__ import main
from model.recipe import BASELINE_FILE
from model.tracking import curves
from model.tracking.history import HISTORY_FILE


def write_run(folder: Path, steps: int, false_positives: float) -> Path:
    folder.mkdir(parents=True)
    rows = []
    for step in range(1, steps + 1):
        rows.append({"step": step, "kind": "train", "loss": 1 / step, "lr": 1e-3 / step})
        if step % 5 == 0:
            rows.append({"step": step, "kind": "validate", "selection": 0.5})
            rates = {"recall": 0.5, "false_positive_rate": false_positives, "auroc": 0.7}
            fakes = {"recall": 0.9, "false_positive_rate": None, "auroc": None}
            rows.append({"step": step, "kind": "validate/val", **rates})
            rows.append({"step": step, "kind": "validate/val/source", **rates})
            rows.append({"step": step, "kind": "validate/evalgen", **fakes})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / HISTORY_FILE).write_text(lines + '{"step": 99, "ki')  # an incomplete last row
    return folder


def draw(run: Path, out: Path) -> np.ndarray:
    result = CliRunner().invoke(main, ["curves", str(run), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert f"until step 20: {out}" in result.output
    return np.asarray(Image.open(out).convert("RGB")).astype(int)


def test_the_plot_shows_the_logged_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, str, list]] = []
    real = curves._line

    def noted(place, title, points, label=""):
        drawn.append((title, label, points))
        real(place, title, points, label)

    monkeypatch.setattr(curves, "_line", noted)
    one = draw(write_run(tmp_path / "one", 20, 0.1), tmp_path / "one.png")
    points_of = {(title, label): points for title, label, points in drawn}
    assert points_of["loss", "training"] == [(step, 1 / step) for step in range(1, 21)]
    assert points_of["false positives on reals", "val"] == [(s, 0.1) for s in (5, 10, 15, 20)]
    labels = {label for _, label in points_of}
    assert labels == {"", "training", "val", "evalgen"}  # sets, not sources
    other = draw(write_run(tmp_path / "other/one", 20, 0.6), tmp_path / "other.png")
    again = draw(tmp_path / "one", tmp_path / "again.png")
    assert one.shape == other.shape
    assert (one != other).any(), "other figures, the same picture"
    assert (one == again).all()


@pytest.mark.filterwarnings("error")
def test_a_name_of_any_letters_gives_no_warnings(tmp_path: Path) -> None:
    draw(write_run(tmp_path / "写真 क्षᚠ👨", 20, 0.1), tmp_path / "curves.png")


@pytest.mark.parametrize(
    ("rows", "said"), [(None, "is no run (it has no metrics.jsonl)"), ("", "has not logged a step")]
)
def test_a_run_without_rows_is_one_clear_error(tmp_path: Path, rows: str | None, said: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if rows is not None:
        (run / HISTORY_FILE).write_text(rows)
    result = CliRunner().invoke(main, ["curves", str(run), "--out", str(tmp_path / "x.png")])
    assert result.exit_code == 1
    assert said in result.output
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"step": 5, "kind": "train", "lr": 1e-3},
            "a row of step 5 has loss None, expected",
        ),
        ({"step": 5, "kind": "train", "loss": 1, "lr": {}}, "a row of step 5 has lr {}, expected"),
        ({"step": 5, "kind": "validate/val", "recall": "x"}, "a row of step 5 has recall 'x', exp"),
        ([], "baseline_metrics.json has metrics [], expected an object"),
    ],
)
def test_a_damaged_figure_is_one_clear_error(tmp_path: Path, row: dict | list, said: str) -> None:
    run = write_run(tmp_path / "run", 20, 0.1)
    if isinstance(row, dict):
        (run / HISTORY_FILE).write_text(json.dumps(row) + "\n")
    else:
        (run / BASELINE_FILE).write_text("[]")
    result = CliRunner().invoke(main, ["curves", str(run), "--out", str(tmp_path / "x.png")])
    assert result.exit_code == 1 and not isinstance(result.exception, TypeError | KeyError)
    assert said in " ".join(result.output.split())
