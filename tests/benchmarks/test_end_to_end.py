"""Comparison of the scores of two devices by `benchmarks.end_to_end`, and its failed steps."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import end_to_end
from benchmarks.end_to_end import STOP, STOPPED, compare, failed, main

HEADER = "path,probability,verdict,error\n"


def table(path: Path, *rows: str) -> Path:
    path.write_text(HEADER + "".join(f"{row}\n" for row in rows))
    return path


def test_tables_with_other_or_without_scored_images_are_compared(tmp_path: Path) -> None:
    device = table(tmp_path / "a.csv", "a,0.5,likely AI,", "b,,unreadable,cut off", "c,0.1,x,")
    cpu = table(tmp_path / "b.csv", "a,0.25,likely AI,", "b,0.5,likely AI,")
    row = compare(device, cpu)
    assert row["scored by both"] == 1
    assert row["probability apart"] == {"mean": 0.25, "p99": 0.25, "max": 0.25}
    assert row["refused on one side"] == {"b": ["cut off", ""]}
    row = compare(device, table(tmp_path / "c.csv"))
    assert row["probability apart"] == {"mean": None, "p99": None, "max": None}


def test_failed_steps_are_named_without_the_expected_exit_code() -> None:
    stopped, good, bad = {"rc": 130, "seconds_to_stop": 1.0}, {"rc": 0}, {"rc": 1}
    assert failed({STOP: stopped, "resume": good, "device beside CPU": {"files": 3}}) == []
    assert failed({STOP: stopped, "resume": bad, "evaluate": {"rc": 130}}) == ["resume", "evaluate"]
    assert failed({STOP: bad, "resume": good}) == [STOP]
    for ended in (good, {"rc": 0, "seconds_to_stop": 1.0}):
        (said,) = failed({STOP: ended, "resume": good})
        assert said.startswith(f"{STOP} (it ended before SIGTERM stopped it; give a larger set")


def test_a_folder_with_files_of_an_earlier_run_is_refused(tmp_path: Path) -> None:
    """A finished run would not be trained again, and old tables would be compared."""
    (tmp_path / "auto.csv").write_text(HEADER)
    words = [word for name in ("shards", "images", "work") for word in (f"--{name}", str(tmp_path))]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert f"{tmp_path} is not empty; name a new folder" in " ".join(result.stderr.split())


def test_the_product_runs_as_its_recipe_says_and_with_stored_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compilation was off, although the recipe compiles on a GPU, and no features were stored."""
    ran: list[tuple[str, ...]] = []

    def run(*command: str, stop_at: int | None = None) -> dict[str, int]:
        ran.append(command)
        return {"rc": STOPPED if stop_at else 0}

    monkeypatch.setattr(end_to_end, "run", run)
    words = ["--shards", str(tmp_path), "--images", str(tmp_path), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(main, [*words, "--set", "optim.lr=1"])
    assert result.exit_code == 0, result.output
    trainings = [command for command in ran if command[0] == "train.py"]
    stopped, resumed, head = trainings
    assert stopped == resumed and "optim.lr=1" in stopped
    assert not [word for word in stopped if "compile" in word]
    assert "features.views=1" in head and Path(head[-1]).is_file()  # weights
    assert "--features" in ran[-1] and ran[-1][0] == "evaluate.py"
