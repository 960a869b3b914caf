"""`benchmarks.kills` counts kills and lists the files that differ afterward."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import predict
from benchmarks import kills
from tests.builders import ROOT


def test_only_entries_meant_to_differ_are_not_compared(tmp_path: Path) -> None:
    meta, rows = {"created": "now", "step": 3, "sha256": {"meta.json": "a"}}, {"step": 1, "loss": 2}
    for name in ("one", "two", "other"):
        (tmp_path / name / ".build").mkdir(parents=True)
        (tmp_path / name / ".build/notes").write_text(name)
        entries = meta | {"created": name, "step": 4 if name == "other" else 3}
        (tmp_path / name / "meta.json").write_text(json.dumps(entries))
        row = rows | {"images_per_s": len(name), "loss": 9 if name == "other" else 2}
        (tmp_path / name / "metrics.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    (tmp_path / "other/x.7.partial").touch()
    one, two, other = (kills.content(tmp_path / name) for name in ("one", "two", "other"))
    assert kills.differences(one, two) == []
    assert kills.differences(one, other) == [
        "x.7.partial is left over", "meta.json differs", "metrics.jsonl differs",
    ]  # fmt: skip
    assert kills.differences(other, one)[0] == "x.7.partial is missing"


def test_an_unknown_command_is_refused_before_the_inputs_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kills, "finish", lambda *_arguments: 0.0)
    assert tuple(kills.write_inputs(tmp_path, "http://127.0.0.1:9")) == kills.COMMANDS
    work = tmp_path / "work"
    result = CliRunner().invoke(kills.main, ["build", "bild", "--work", str(work)])
    assert result.exit_code == 2
    assert "'bild' is not one of 'build', 'train'" in result.stderr
    assert not work.exists()


@pytest.mark.slow
def test_two_kills_of_predict_change_nothing(tmp_path: Path) -> None:
    """The benchmark runs in a subprocess, because it forks and this process has threads."""
    command = ["-m", "benchmarks.kills", "predict", "--times", "2", "--json", tmp_path / "x.json"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "x.json").read_text())
    assert (row["command"], row["landed"], row["differing"]) == ("predict", 2, [])


def test_restarts_are_starts_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none if the kill came after the work was done."""
    for name in ("start", "ended", "kill", "finish"):
        monkeypatch.setattr(kills, name, lambda *_arguments: None)
    for done, landed, restarts in (("", 3, 3), ("out", 1, 0)):
        (tmp_path / "out").touch()
        row = kills.Row("made", 1.0)
        command = kills.Command(predict.main, [], done)
        kills.kill_in(tmp_path, command, 3, row, random.Random(0))
        assert (row.landed, row.restarts) == (landed, restarts)
