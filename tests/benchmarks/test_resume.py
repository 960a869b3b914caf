"""An interrupted measurement goes on with the rows that it lacks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from benchmarks import gpu_loader, gpu_selftest, loader
from benchmarks import step as step_benchmark
from benchmarks.resume import kept


def good(rate: float) -> dict[str, Any]:
    return {"images_per_s": rate, "within": rate, "start_s": 1.0, "bytes": 0, "version": "",
            "others": 0.0}  # fmt: skip


def test_only_a_file_of_the_same_measurement_is_continued(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    assert kept(out, "H200", True) == {}
    out.write_text('{"title": "H200", "rows": [1]}')
    assert kept(out, "H200", True)["rows"] == [1]
    assert kept(out, "H200", False) == kept(out, "CPU", True) == {}  # such as a dry run
    out.write_text('{"title": "H2')
    assert kept(out, "H200", True) == {}
    with pytest.raises(click.UsageError, match="--resume needs --json FILE"):
        kept(None, "H200", True)


def test_a_setting_with_a_row_is_not_measured_again(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A setting that ended with an error is."""
    measured: list[str] = []

    def way(shards: Path, device: object, seconds: float, done: list) -> list[dict[str, Any]]:
        measured.append("jpeg step")
        return [{"way": "none", "images_per_s": 1}][len(done) :]

    def rate(requests: object, setting: tuple, *_: object) -> float:
        measured.append(f"{setting[1]} threads")
        if len(measured) == 1:
            raise RuntimeError("cut off")
        return 5.0

    monkeypatch.setattr(gpu_loader, "jpeg_step", way)
    monkeypatch.setattr(gpu_loader, "images_per_s", rate)
    monkeypatch.setattr(gpu_loader, "requests_of", lambda *_, **__: iter(()))
    out = tmp_path / "rows.json"
    words = ["--shards", str(data / "val"), "--cpu", "--json", str(out), "--only", "settings"]
    words += ["--only", "jpeg step"]
    for expected in (["2 threads", "2 threads", "jpeg step"], ["2 threads", "jpeg step"]):
        measured.clear()
        result = CliRunner().invoke(gpu_loader.main, [*words, "--resume"])
        assert result.exit_code == 0, result.output
        assert measured == expected  # in the order of --only
    rows = json.loads(out.read_text())
    assert [row["policy"] for row in rows["settings"]] == ["without jpeg", "phase 1"]
    assert len(rows["jpeg step"]) == 1


def test_a_loader_with_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    """Loaders run in the order in which they are asked for."""
    ran: list[str] = []

    def run(name: str, *arguments: object) -> dict[str, Any]:
        if "--prepare" in arguments:
            return {}
        ran.append(name)
        return good(2.0)

    def measure(done: dict[str, list]) -> dict[str, list]:
        ran.clear()
        names = ["dali", "dali-reader", "pil"]
        pythons = dict.fromkeys(names, "python")
        return loader.measure(names, tmp_path, 1, 1, pythons, (1, 1), lambda _: None, done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "run", run)
        first = measure({})
        assert ran == ["dali", "dali-reader", "pil"]
        again = measure({**first, "dali-reader": [{"failed": "killed", "log": []}]})
    assert ran == ["dali-reader"]
    assert again == first


def test_a_row_of_the_step_is_not_measured_again(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def measure(way: step_benchmark.Way, *_: object) -> dict[str, Any]:
        measured.append(way.batch)
        if len(measured) == 2:
            return {"failed": "no memory"}
        return {"ms_per_step": 1, "images_per_s": 1, "share_of_peak": 1, "bytes": 1, "steps": 1}

    monkeypatch.setattr(step_benchmark, "measure", measure)
    monkeypatch.setattr(step_benchmark, "matrix_peak", lambda *_: 1.0)
    words = ["--recipe", str(tiny_recipe), "--device", "cpu", "--rounds", "1", "--resume"]
    words += ["--only", "half the batch", "--json", str(tmp_path / "step.json")]
    for expected in ([16, 8], [16, 8, 8]):
        result = CliRunner().invoke(step_benchmark.main, words)
        assert result.exit_code == 0, result.output
        assert measured == expected


def test_an_answer_of_the_self_test_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def check(name: str) -> Callable[[gpu_selftest.Given], object]:
        def answer(given: gpu_selftest.Given) -> object:
            asked.append(name)
            if asked == ["good", "bad"]:
                raise RuntimeError("cut off")
            return [1, 2, 3]

        return answer

    monkeypatch.setattr(gpu_selftest, "read_folder", lambda _: [b"one"])
    monkeypatch.setattr(gpu_selftest, "CHECKS", {name: check(name) for name in ("good", "bad")})
    words = ["--images", str(tmp_path), "--cpu", "--json", str(tmp_path / "a.json"), "--resume"]
    for _ in range(2):
        CliRunner().invoke(gpu_selftest.main, words)
    assert asked == ["good", "bad", "bad"]
    answers = json.loads((tmp_path / "a.json").read_text())
    assert answers["bad"] == [1, 2, 3] and answers["title"] == "CPU, 1 JPEGs"
