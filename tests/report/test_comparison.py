"""Comparison of five runs: the table, and the page in a browser, on a phone and in dark mode."""

import csv
import io
import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import evaluate
from model.evaluation.run import SPEED_FILE
from model.evaluation.scores import read_scores, write_scores
from model.evaluation.side_by_side import ComparedRun, side_by_side
from report.comparison import (
    NOT_ALIKE,
    _speed_beside,
    comparison_page,
    print_side_by_side,
    ranks_text,
    read_runs,
    stability_sentence,
)
from tests.browser import unprinted, violations
from tests.builders import table_of
from tests.report.test_page import CONTRAST, HOSTILE, robustness, rows


def folders(tmp_path: Path, count: int = 5, name: str = "val") -> list[Path]:
    """Make folders of runs, each a bit worse than the previous; the last has a hostile name."""
    made = []
    plain = rows(name, 60, 60)
    for index in range(count):
        rng = np.random.default_rng(index)
        noisy = [row | {"logit": row["logit"] + 2 * index * float(rng.normal())} for row in plain]
        called = f"detector-{index}" if index < 4 else f"owner/{'long' * 20}{HOSTILE}"
        detector = {"kind": "hf", "name": called, "sha256": "0" * 64}
        table = table_of(noisy, [name], detector=detector)
        if index == 0:
            table.evaluation["sets"][name]["robustness"] = robustness()
        folder = tmp_path / f"run-{index}"
        folder.mkdir()
        write_scores(folder / "scores.parquet", [table.table], table.evaluation)
        (folder / SPEED_FILE).write_text(json.dumps({"images_per_s": 10.0 * (index + 1)}))
        made.append(folder)
    return made


def compare(*arguments: object) -> Any:
    return CliRunner().invoke(evaluate.main, ["compare", *map(str, arguments)])


def test_five_runs_are_one_table(tmp_path: Path) -> None:
    paths = folders(tmp_path)
    result = compare(*paths, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for word in ("detector-0", "mean of all", "Spearman", "behind the best"):
        assert word in result.output
    assert f"page: {tmp_path / 'out/comparison.html'}" in result.output
    written = json.loads((tmp_path / "out/comparison.json").read_text())["sets"]["val"]
    table = list(csv.DictReader(io.StringIO((tmp_path / "out/comparison.csv").read_text())))
    assert [row["name"] for row in table] == [run["name"] for run in written["runs"]]
    assert len(table) == 6 and written["stability"]["sources"] == 3
    for row, run in zip(table, written["runs"], strict=True):
        assert float(row["auroc"]) == run["auroc"]["value"]
        assert float(row["worst_source"]) == run["worst_source"]["value"]
        behind = run["auroc"]["behind"]
        assert row["auroc_behind_low"] == ("" if behind is None else str(behind[0]))
    first = next(run for run in written["runs"] if run["name"] == "detector-0")
    assert first["worst_perturbation"]["value"] == 0.95 and first["images_per_s"] == 10
    mean = next(run for run in written["runs"] if run["name"] == "mean of all")
    assert mean["images_per_s"] == pytest.approx(1 / sum(1 / (10 * i) for i in range(1, 6)))


@pytest.mark.parametrize("other", [{"images_sha256": "b"}, {"perturbations": {"images": 40}}, {}])
def test_robustness_on_other_images_is_not_compared(
    tmp_path: Path, other: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = folders(tmp_path, 2)
    entry = robustness()
    lines = [line | other.get("perturbations", {}) for line in entry["perturbations"]]
    for path, measured in zip(
        paths, (entry, entry | other | {"perturbations": lines}), strict=True
    ):
        scores = read_scores(path / "scores.parquet")
        scores.evaluation["sets"]["val"]["robustness"] = measured
        write_scores(path / "scores.parquet", [scores.table], scores.evaluation)
    sets = side_by_side(read_runs(paths)[0])
    print_side_by_side(sets)
    said = NOT_ALIKE in " ".join(capsys.readouterr().out.split())
    assert said == (NOT_ALIKE in comparison_page(sets, "")) == bool(other)
    by_name = {run["name"]: run["worst_perturbation"] for run in sets["val"]["runs"]}
    assert by_name["mean of all"] is None
    assert [by_name[f"detector-{i}"] is None for i in (0, 1)] == [bool(other)] * 2


def test_the_run_that_was_trained_on_a_set_is_named(tmp_path: Path) -> None:
    paths = folders(tmp_path, 3)
    scores = read_scores(paths[1] / "scores.parquet")
    write_scores(
        paths[1] / "scores.parquet", [scores.table], {**scores.evaluation, "trained_on": ["val"]}
    )
    result = compare(*paths, "--out", tmp_path / "out")
    said = "TRAINED ON val: detector-1. These figures, and those of the mean of all, say nothing"
    assert said in " ".join(result.output.split())
    assert said in (tmp_path / "out/comparison.html").read_text()
    written = json.loads((tmp_path / "out/comparison.json").read_text())["sets"]["val"]["runs"]
    names = {run["name"] for run in written if run["trained_on"]}
    assert names == {"detector-1", "mean of all"}
    assert "TRAINED ON" not in compare(paths[0], paths[2]).output
    scores = read_scores(paths[2] / "scores.parquet")
    write_scores(
        paths[2] / "scores.parquet",
        [scores.table],
        {**scores.evaluation, "maybe_trained_on": ["val"]},
    )
    said = "PERHAPS TRAINED ON IMAGES OF val, by another set of that name: detector-2. These"
    output = " ".join(compare(*paths, "--out", tmp_path / "out").output.split())
    assert said in output and "TRAINED ON val: detector-1. These" in output
    assert said in (tmp_path / "out/comparison.html").read_text()


def test_the_folder_of_a_run_is_answered_with_its_reports(tmp_path: Path) -> None:
    (run,) = folders(tmp_path, 1)
    for name in ("mine", "val"):
        report = tmp_path / "runs/one/evaluation" / name
        report.mkdir(parents=True)
        (report / "scores.parquet").write_bytes((run / "scores.parquet").read_bytes())
    for folder in (tmp_path / "runs/one", tmp_path / "runs/one/evaluation"):
        named = "one of the reports below: " + ", ".join(
            str(tmp_path / "runs/one/evaluation" / name) for name in ("mine", "val")
        )
        assert named in compare(folder, run).output.replace("\n", " ")
    (tmp_path / "none").mkdir()
    assert "evaluate.py --shards SET`, and name" in compare(tmp_path / "none", run).output


def test_two_runs_print_their_flips_and_the_table(tmp_path: Path) -> None:
    paths = folders(tmp_path, 2)
    result = compare(*paths, "--flips", tmp_path / "flips.csv")
    assert result.exit_code == 0, result.output
    assert "to wrong" in result.output and "mean of all" in result.output
    assert (tmp_path / "flips.csv").exists()
    for arguments, said in (
        ((paths[0],), "two runs or more"),
        ((*paths, paths[0], "--flips", "x.csv"), "--flips compares exactly two runs"),
    ):
        refused = compare(*arguments)
        assert refused.exit_code == 2 and said in refused.stderr


def test_a_folder_whose_name_is_not_utf8_is_escaped_in_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = folders(tmp_path, 2)
    odd = paths[0].rename(tmp_path / os.fsdecode(b"caf\xe9"))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "compare", str(odd)])
    result = compare(odd, paths[1], "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert rf"{tmp_path}/caf\xe9" in (tmp_path / "out/comparison.html").read_text("utf-8")
    assert json.loads((tmp_path / "out/comparison.json").read_bytes())["runs"][0].endswith(
        r"caf\xe9"
    )


def test_a_run_without_a_speed_has_none(tmp_path: Path) -> None:
    paths = folders(tmp_path, 2)
    (paths[0] / SPEED_FILE).unlink()
    wrong = ("NaN", "-1", "0", "true", '"nan"', "Infinity", "null", f"1{'0' * 400}")
    for text in ("[]", *(f'{{"images_per_s": {value}}}' for value in wrong)):
        (paths[1] / SPEED_FILE).write_text(text)
        assert _speed_beside(paths[1] / "scores.parquet") is None
    assert [run.images_per_s for run in read_runs(paths)[0]] == [None, None]


def test_one_image_is_counted_as_one_image(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [ComparedRun(name, table_of(rows("val", 1, 1), ["val"])) for name in "ab"]
    sets = side_by_side(runs)
    print_side_by_side(sets)
    assert "val: 1 fake and 1 real" in capsys.readouterr().out
    assert "1 fake and 1 real image." in comparison_page(sets, "")


def test_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert ranks_text(None) is None
    assert ranks_text([2.0, 2.0]) == "2" and ranks_text([1.0, 2.5]) == "1 to 2.5"
    assert "Too few" in stability_sentence(None)
    print_side_by_side({})
    assert "95 % intervals" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_in_a_browser(chromium: Any, tmp_path: Path, width: int, height: int, scheme: str) -> None:
    assert compare(*folders(tmp_path), "--out", tmp_path / "out").exit_code == 0
    address = (tmp_path / "out/comparison.html").as_uri()
    context = chromium.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    said, asked, lock = [], [], threading.Lock()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))

    def note(route: Any) -> None:
        with lock:
            asked.append(route.request.url)
        route.continue_()

    page.route("**/*", note)
    page.goto(address)
    assert [url for url in asked if not url.startswith("data:")] == [address] and not said
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    contrast = page.evaluate(CONTRAST)
    assert contrast["dark"] == (scheme == "dark") and min(contrast["ratios"].values()) > 4.5
    lines = page.locator("table.side tbody tr")
    assert lines.count() == 6 and page.locator("tr.best").count() == 1
    for line in lines.all():
        box = line.bounding_box()
        cells = [cell.bounding_box() for cell in line.locator("td").all()]
        if width < 760:  # a card for each run: nothing to scroll to
            assert all(0 <= cell["x"] and cell["x"] + cell["width"] <= width for cell in cells)
            assert cells[0]["width"] == cells[1]["width"]  # a long name has the whole line
            assert line.locator(".word").first.is_visible()
        assert box["height"] > 20 and len(cells) == 13
    for box in page.locator(".scroll").all():  # wide tables scroll in their own box, by keyboard
        fits = box.evaluate("(e) => e.scrollWidth <= e.clientWidth")
        assert fits or (width < 760 and box.get_attribute("tabindex") == "0")
    for bar in page.locator(".bars .row").all():
        assert re.search(r"\d(\s%)?\s+[\d.]+ to [\d.]+(\s%)?$", bar.inner_text().strip())
    assert unprinted(page) == set()
    page.emulate_media(media="print")
    assert lines.first.locator(".word").first.is_visible()  # a page of paper cuts wide tables off
    assert violations(page) == []
    context.close()
