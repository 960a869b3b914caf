"""Stages of `benchmarks.gpu_day`: a failed one does not end the others, and a new call resumes."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu_day, loader
from benchmarks.gpu_day import (
    ANSWERED_CHECKS,
    OPEN_CHECKS,
    PACKED,
    ROOT,
    Stage,
    done_in,
    main,
    pack,
    plan_of,
    run,
    stages_of,
)
from benchmarks.gpu_selftest import CHECKS
from benchmarks.images import write_images
from sharding.format import open_shards
from tests import conftest, failures


def stage(code: str, name: str = "stage") -> Stage:
    return Stage(name=name, command=(sys.executable, "-c", code), limit_s=60, least_s=1)


def test_output_of_a_stage_over_its_time_limit_is_kept(tmp_path: Path) -> None:
    """The stage can also remove what it has made."""
    text = "trap 'echo removed; exit 1' TERM; echo a row; sleep 60 & wait"
    shell = replace(stage(""), command=("sh", "-c", text))
    for limit_s in (1.0, 10.0):  # on a busy machine the shell may start later
        assert run(shell, tmp_path, limit_s, cpu=False) == 124
        if "a row" in (log := (tmp_path / "log.txt").read_text().splitlines()):
            break
    assert {"a row", "removed"} <= {*log}
    assert done_in(tmp_path, tmp_path, cpu=False) == set()


def test_a_stage_ends_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage has its own session, so Ctrl-C does not reach it."""
    wait, stages = subprocess.Popen.wait, []

    def interrupted(process: subprocess.Popen, timeout: float | None = None) -> int:
        stages.append(process)
        if len(stages) == 1:
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(stage("import time; time.sleep(60)"), tmp_path, 30, cpu=False)
    assert stages[0].returncode == -signal.SIGTERM


def test_a_contender_ends_with_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would run on beside the next measurements."""
    wait, started = subprocess.Popen.wait, []

    def interrupted(process: subprocess.Popen, timeout: float | None = None) -> int:
        started.append(process)
        if len(started) == 1:
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    endless = tmp_path / "endless"
    endless.write_text("#!/bin/sh\nexec sleep 60\n")
    endless.chmod(0o755)
    with pytest.raises(KeyboardInterrupt):
        loader.run("pil", tmp_path, 1, str(endless), (1, 1))
    assert started[0].returncode == -signal.SIGKILL


def test_files_of_an_earlier_call_are_not_packed(tmp_path: Path) -> None:
    jpegs = tmp_path / "images/jpeg"
    jpegs.mkdir(parents=True)
    for path in write_images(tmp_path / "made", 8):
        path.rename(jpegs / path.name)
    work = tmp_path / "work"
    old = work / "raw/part00/real/000999.jpg"
    old.parent.mkdir(parents=True)
    old.write_bytes(next(jpegs.iterdir()).read_bytes())
    mine = work / "raw/mine.jpg"
    mine.write_bytes(b"precious")
    pack(tmp_path / "images", work, 16, 1)
    assert len(open_shards([work / "shards/bench"])) == 16
    assert not old.exists() and mine.exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--images . --out out", "no CUDA device here; run this on a GPU, or try --cpu"),
        ("--images . --out out --cpu", "no JPEG in jpeg; put photographs there"),
        ("pack . work", "no JPEG in jpeg; put photographs there"),
        ("--images . pack . work", "--images stands before pack, which does not see it"),
        ("--work elsewhere pack . work", "--work stands before pack, which does not see it"),
    ],
)
def test_what_is_missing_is_one_line_at_the_start(
    line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # also on a machine with a GPU
    result = CliRunner().invoke(main, line.split())
    assert result.exit_code in (1, 2) and f"Error: {said}" in result.stderr
    assert not list(tmp_path.iterdir()), "something was written"


def test_only_a_stage_with_exit_code_0_is_done(tmp_path: Path) -> None:
    assert run(stage("raise SystemExit(3)", "bad"), tmp_path, 30, cpu=False) == 3
    assert run(stage("print('fine')", "good"), tmp_path, 30, cpu=False) == 0
    assert run(stage("print(1)", "dry"), tmp_path, 30, cpu=True) == 0
    assert done_in(tmp_path, tmp_path, cpu=False) == {"good"}  # a dry run measured no GPU
    assert done_in(tmp_path, tmp_path, cpu=True) == {"dry"}
    rows = [json.loads(line) for line in (tmp_path / "stages.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["rc"]) for row in rows] == [("bad", 3), ("good", 0), ("dry", 0)]


def test_a_set_that_is_not_there_is_packed_again(data: Path, tmp_path: Path) -> None:
    """As on another machine, to which the answers were brought."""
    rows = [{"stage": name, "rc": 0, "cpu": False} for name in (*PACKED, "loader")]
    (tmp_path / "stages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert done_in(tmp_path, tmp_path / "none", cpu=False) == {"loader"}
    (tmp_path / "work/shards").mkdir(parents=True)
    (tmp_path / "work" / PACKED["pack"]).symlink_to(data / "val")
    assert done_in(tmp_path, tmp_path / "work", cpu=False) == {"pack", "loader"}


def test_two_short_calls_answer_the_open_questions_first(tmp_path: Path) -> None:
    """Of 900 s, starting the machine and carrying files take two minutes."""
    stages = stages_of(tmp_path, tmp_path, tmp_path, cpu=False)
    rows = {name: (total, fits) for name, _, total, fits in plan_of(stages, 780)}
    for name in ("loader", "headroom", "headroom-pil", "jpeg-step", "selftest", "step-more",
                 "loader-memory"):  # fmt: skip
        assert rows[name][1] == "yes", name
    assert rows["step"] == (sum(stage.limit_s for stage in stages), "only if others end earlier")
    assert max(stage.limit_s for stage in stages) < 300, "a stage that no short call can end"
    assert sorted((*OPEN_CHECKS, *ANSWERED_CHECKS)) == sorted(CHECKS)
    assert len({stage.name for stage in stages}) == len(stages)


def test_the_plan_has_only_the_stages_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jpegs = tmp_path / "images/jpeg"
    jpegs.mkdir(parents=True)
    (jpegs / "a.jpg").write_bytes(b"one")
    out, ran = tmp_path / "out", []
    out.mkdir()
    (out / "stages.jsonl").write_text('{"stage": "loader", "rc": 0, "cpu": true}\n')
    monkeypatch.setattr(gpu_day, "run", lambda stage, *_: ran.append(stage.name) or 0)
    words = ["--cpu", "--images", str(tmp_path / "images"), "--out", str(out)]
    words += ["--only", "loader", "--only", "headroom", "--only", "step", "--budget", "700"]
    result = CliRunner().invoke(main, [*words, "--work", str(tmp_path / "work")])
    assert result.exit_code == 0, result.output
    assert ran == ["headroom", "step"]
    assert "loader" not in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if "headroom" in line]
    assert line.split()[1::2] == ["headroom", "600", "600", "yes"], line


def test_each_call_trains_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """The run of a call that was stopped may be finished: it would not be trained again."""
    works = []
    for _ in range(2):
        stages = {stage.name: stage for stage in stages_of(tmp_path, tmp_path, tmp_path, cpu=True)}
        command = stages["end-to-end"].command
        works.append(command[command.index("--work") + 1])
    assert len(set(works)) == 2


def test_the_gpu_tests_say_what_failed_although_they_are_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    stages = {stage.name: stage for stage in stages_of(tmp_path, folder, tmp_path, cpu=False)}
    command = stages["gpu-tests"].command
    assert "gpu and not slow" in command
    test = tmp_path / "test_it.py"
    test.write_text(
        "import os, pytest\n"
        "@pytest.mark.gpu\ndef test_wrong():\n    assert 1 == 2, 'this reason'\n"
        "@pytest.mark.gpu\ndef test_killed():\n    os.kill(os.getpid(), 9)\n"
    )
    (tmp_path / "conftest.py").write_text("from tests.failures import pytest_runtest_logreport\n")
    own = [str(test) if word == "tests/pipeline/test_dali.py" else word for word in command]
    own.remove("tests/model/training/test_step_waits.py")
    folder.mkdir()
    assert run(replace(stages["gpu-tests"], command=tuple(own)), folder, 300, cpu=False) == -9
    text = (folder / "log.txt").read_text()
    assert "test_it.py::test_wrong" in text and "this reason" in text
    assert conftest.pytest_runtest_logreport is failures.pytest_runtest_logreport


@pytest.mark.slow
def test_dry_run_runs_every_stage_once(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for path in write_images(tmp_path / "made", 40):
        target = images / "jpeg" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    command = [
        sys.executable, "-m", "benchmarks.gpu_day", "--cpu", "--images", str(images),
        "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    rows = (tmp_path / "out/stages.jsonl").read_text().splitlines()
    assert {json.loads(row)["rc"] for row in rows} == {0}
    assert {"selftest.json", "step.json", "loader.json", "headroom.json", "embedding.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "==" not in again.stdout, "a stage that was done ran again"
