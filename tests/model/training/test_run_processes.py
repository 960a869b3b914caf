"""Training processes: several ranks, signals, kills at any moment, a full disk."""

import contextlib
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import recipes
from model import checkpoint
from model.recipe import Recipe
from model.tracking.history import rows_of
from model.training import saving
from model.training.run import Interrupted, train
from pipeline.read import ShardReader
from tests import forked
from tests.builders import ROOT, can_mount, losses_of, same
from tests.checkpoints import last_of
from tests.servers import HANG_S

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def command(recipe: Path, data: Path, runs: Path, *settings: str) -> list[object]:
    changes = [word for setting in settings for word in ("--set", setting)]
    return ["--recipe", recipe, "--data", data, "--runs", runs, *changes]


def wait_for_rows(run: Path, count: int, running: forked.Running | subprocess.Popen) -> None:
    """Wait until the history of a run has this many rows."""
    process = getattr(running, "process", running)
    alive = process.is_alive if hasattr(process, "is_alive") else lambda: process.poll() is None
    history, deadline = run / "metrics.jsonl", time.monotonic() + HANG_S
    while not history.exists() or history.read_text().count("\n") < count:
        assert alive(), "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow  # the test below sends the signal to the loading workers, too
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(
    tiny_recipe: Path, data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    running = forked.start(
        command(tiny_recipe, data, tmp_path / "runs", "run.epochs=300"), tmp_path / "answer.json"
    )
    wait_for_rows(tmp_path / "runs/tiny", 1, running)
    os.kill(running.process.pid, number)
    ended = running.wait()
    assert ended.status == 130
    assert f"stopped by {number.name} at step" in ended.stderr
    last = last_of(tmp_path / "runs/tiny")
    step = checkpoint.read_meta(last)["step"]
    recipe = recipes.load(Recipe, tiny_recipe, ["run.epochs=300"])
    train(recipe, data, tmp_path / "runs", stop_at=step + 2)
    assert checkpoint.read_meta(last_of(tmp_path / "runs/tiny"))["step"] == step + 2


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_whole_group_saves_and_the_same_command_goes_on(
    tiny_recipe: Path, data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """A terminal, `timeout`, systemd and batch systems send signals this way: loader workers get
    them too.
    """
    settings = ["run.epochs=300", "loading.num_workers=2"]
    arguments = command(tiny_recipe, data, tmp_path / "runs", *settings)
    running = forked.start(arguments, tmp_path / "answer.json", OWN_GROUP="1")
    wait_for_rows(tmp_path / "runs/tiny", 3, running)
    os.killpg(running.process.pid, number)
    ended = running.wait()
    assert ended.status == 130, ended
    assert f"stopped by {number.name} at step" in ended.stderr
    last = last_of(tmp_path / "runs/tiny")
    assert checkpoint.read_meta(last)["step"] > 0
    deadline = time.monotonic() + HANG_S
    with pytest.raises(ProcessLookupError):  # no worker is left running
        while time.monotonic() < deadline:
            os.killpg(running.process.pid, 0)
            time.sleep(0.2)


def test_a_signal_ends_the_wait_for_a_worker_that_hangs(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    """Not only after `loading.stall_error_s`, here 900 seconds."""
    settings = [
        "loading.num_workers=1",
        "loading.batch_size=1",
        "run.epochs=300",
        "run.log_every=1",
    ]
    running = forked.start(
        command(tiny_recipe, data, tmp_path / "runs", *settings), tmp_path / "answer.json"
    )
    wait_for_rows(tmp_path / "runs/tiny", 1, running)
    parent = running.process.pid
    for worker in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        os.kill(int(worker), signal.SIGSTOP)
    time.sleep(0.5)  # it takes the batches that are ready, then waits
    os.kill(parent, signal.SIGTERM)
    ended = running.wait()
    assert ended.status == 130, ended
    assert "stopped by SIGTERM at step" in ended.stderr
    assert last_of(tmp_path / "runs/tiny")


@pytest.mark.parametrize(("is_last", "swallowed"), [(False, False), (True, False), (False, True)])
def test_a_signal_ends_a_validation_and_the_resumed_run_does_it_first(
    tiny_recipe: Path, data: Path, tmp_path: Path, is_last: bool, swallowed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The run ends as an uninterrupted one, also where the last step is not validated yet."""
    recipe, run = recipes.load(Recipe, tiny_recipe), tmp_path / "stopped/tiny"
    read = ShardReader.read

    def hang(self: ShardReader, samples: object) -> object:
        validating = [folder.name for folder in self.shards.folders] == ["val"]
        if validating and bool(checkpoint.checkpoints_of(run)) == is_last:
            with contextlib.suppress(BaseException if swallowed else ()):
                signal.raise_signal(signal.SIGTERM)
                time.sleep(HANG_S)
        return read(self, samples)

    with monkeypatch.context() as patch:
        patch.setattr(ShardReader, "read", hang)
        with pytest.raises(Interrupted, match=f"SIGTERM at step {10 if is_last else 5} of 10"):
            train(recipe, data, run.parent)
    meta = checkpoint.read_meta(last_of(run))
    assert (meta["step"], meta["metrics"], meta["ended"]) == (10 if is_last else 5, {}, None)
    assert train(recipe, data, run.parent).name == train(recipe, data, tmp_path / "whole").name
    assert same(last_of(run), last_of(tmp_path / "whole/tiny"))
    rows, whole = (
        [(row["kind"], row["step"]) for row in rows_of(one)]
        for one in (run, tmp_path / "whole/tiny")
    )
    assert rows == whole


def test_a_signal_in_the_last_save_stops_before_the_calibration(
    tiny_recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = recipes.load(Recipe, tiny_recipe), tmp_path / "stopped/tiny"
    save = saving.save

    def signalled(*arguments: object, ended: str, **rest: object) -> object:
        if ended:
            signal.raise_signal(signal.SIGTERM)
        return save(*arguments, ended=ended, **rest)

    with monkeypatch.context() as patch:
        patch.setattr("model.training.run.save", signalled)
        with pytest.raises(Interrupted, match="stopped by SIGTERM at step 10 of 10"):
            train(recipe, data, run.parent)
    assert checkpoint.read_meta(last_of(run))["calibration"] is None
    train(recipe, data, run.parent)
    train(recipe, data, tmp_path / "whole")
    assert same(last_of(run), last_of(tmp_path / "whole/tiny"))


@pytest.mark.slow
def test_a_terminal_that_is_closed_saves(tiny_recipe: Path, data: Path, tmp_path: Path) -> None:
    """The system sends SIGHUP, and nothing can be printed any more."""
    settings = ["run.epochs=300", "loading.num_workers=2"]
    arguments = map(str, command(tiny_recipe, data, tmp_path / "runs", *settings))
    terminal, its_end = pty.openpty()
    running = subprocess.Popen(
        ["setsid", "--ctty", sys.executable, "train.py", *arguments],
        cwd=ROOT, stdin=its_end, stdout=its_end, stderr=its_end,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(its_end)
    wait_for_rows(tmp_path / "runs/tiny", 3, running)
    os.close(terminal)
    assert running.wait(HANG_S) == 130
    last = last_of(tmp_path / "runs/tiny")
    assert checkpoint.read_meta(last)["step"] >= 3


@pytest.mark.slow
def test_two_trainings_in_one_folder_are_refused(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    arguments = command(tiny_recipe, data, tmp_path / "runs", "run.epochs=300")
    first = forked.start(arguments, tmp_path / "first.json")
    wait_for_rows(tmp_path / "runs/tiny", 1, first)
    second = forked.start(arguments, tmp_path / "second.json").wait()
    assert second.status == 1
    assert "another training is writing" in second.stderr and "Traceback" not in second.stderr
    os.kill(first.process.pid, signal.SIGTERM)
    assert first.wait().status == 130
    steps = [row["step"] for row in rows_of(tmp_path / "runs/tiny") if row["kind"] == "train"]
    assert len(steps) == len(set(steps))


def can_mount_images() -> bool:
    """Return whether this process may mount an ext4 file system from a file."""
    return can_mount() and bool(shutil.which("mkfs.ext4")) and Path("/dev/loop-control").exists()


@pytest.mark.slow
@pytest.mark.skipif(not can_mount_images(), reason="mounting an ext4 image needs root and loop")
def test_a_power_cut_loses_no_checkpoint(tiny_recipe: Path, data: Path, tmp_path: Path) -> None:
    """The image of a file system is copied while a run writes to it. A copy holds what a disk would
    hold after a power cut. Each copy is mounted and the same command resumes the run.
    """
    disk, image = tmp_path / "disk", tmp_path / "disk.img"
    disk.mkdir()
    with image.open("wb") as stream:
        stream.truncate(64 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    settings = ["run.save_every=1", "run.epochs=6", "run.validate_every=6"]
    settings.append("loading.batch_size=4")
    arguments = command(tiny_recipe, data, disk, *settings)
    running = forked.start_on_image(image, disk, arguments, tmp_path / "answer.json")
    seen = Path(f"/proc/{running.process.pid}/root{disk}/tiny")
    copies: list[tuple[Path, int]] = []
    while running.process.is_alive() and len(copies) < 12:
        time.sleep(0.2)
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if not (saved := checkpoint.checkpoints_of(seen)):
                continue
            os.kill(running.process.pid, signal.SIGSTOP)
            saved = checkpoint.checkpoints_of(seen)
            copy = shutil.copy(image, tmp_path / f"cut{len(copies)}.img")
            copies.append((copy, int(saved[0].name[5:])))
            os.kill(running.process.pid, signal.SIGCONT)
    running.process.kill()
    running.process.join()
    assert len(copies) == 12, "the run was over before; make it longer"
    again = [*arguments, "--set", "run.save_every=0"]  # does not affect the result, and saves time
    for copy, least in copies:
        ended = forked.start_on_image(copy, disk, again, tmp_path / "again.json").wait()
        assert ended.status == 0, ended.stderr
        resumed = re.search(r"resuming from \S+/step_(\d+)", ended.stderr)
        assert resumed and int(resumed[1]) >= least, ended.stderr
        assert "damaged" not in ended.stderr


def test_an_old_checkpoint_is_removed_after_the_new_one_is_on_the_disk(
    tiny_recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order of writes to the disk: each file, its folder, the rename, the run's folder."""
    happened: list[tuple[str, str]] = []
    fsync, replace, prune = os.fsync, Path.replace, saving.prune

    def noting_fsync(descriptor: int) -> None:
        happened.append(("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def noting_replace(self: Path, target: Path) -> Path:
        happened.append(("rename", str(target)))
        return replace(self, target)

    def noting_prune(run: Path, keep: set[Path]) -> None:
        happened.append(("prune", str(run)))
        prune(run, keep)

    monkeypatch.setattr("os.fsync", noting_fsync)
    monkeypatch.setattr(Path, "replace", noting_replace)
    monkeypatch.setattr(saving, "prune", noting_prune)
    train(recipes.load(Recipe, tiny_recipe), data, tmp_path, stop_at=1)
    run = str(tmp_path / "tiny")
    new, last = f"{run}/step_0000001", happened.index(("prune", run))
    renamed = happened.index(("rename", new))
    files = [Path(name).name for kind, name in happened[:renamed] if kind == "sync"]
    assert {"weights.safetensors", "state.pt", "meta.json", "metrics.jsonl"} <= set(files)
    assert ("sync", run) in happened[renamed:last]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread as the processes do: sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("kills", "epochs", "real"),
    [(2, 2, False), (10, 20, True)],
)
@pytest.mark.slow  # the fast variant is in test_run_phases.py
def test_a_kill_loses_at_most_the_steps_since_the_last_save(
    tiny_recipe: Path, data: Path, tmp_path: Path, kills: int, epochs: int, real: bool
) -> None:
    """SIGKILL at random moments (of `python train.py` itself in the slow variant). The resumed run
    ends bit for bit as an uninterrupted one.
    """
    every, steps, rng = 5, 20 * epochs, random.Random(kills)
    settings = ["run.log_every=1", f"run.save_every={every}", f"run.epochs={epochs}"]
    settings.append("loading.batch_size=4")  # an epoch has 20 steps, and its end is always saved
    arguments = command(tiny_recipe, data, tmp_path, *settings)
    run = tmp_path / "tiny"
    killed = 0
    for _ in range(kills):
        before = len(losses_of(run)) if run.exists() else 0
        if real:
            words = [sys.executable, "train.py", *map(str, arguments)]
            one = os.environ | {
                "OMP_NUM_THREADS": "1"
            }  # as many threads as the run in this process
            running = subprocess.Popen(words, cwd=ROOT, env=one, stderr=subprocess.DEVNULL)
        else:
            running = forked.start(arguments, tmp_path / "answer.json")
        process = getattr(running, "process", running)
        wait_for_rows(run, before + 1, running)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.wait() if real else process.join()
        logged = max(row["step"] for row in rows_of(run) if row["kind"] == "train")
        last = last_of(run)
        saved = checkpoint.read_meta(last)["step"] if last else 0
        # A step is logged before it is saved: the save of the last logged step may be incomplete.
        assert logged - 1 - saved < every
        killed += logged < steps
    assert killed == kills, "a run was over before it was killed; make it longer"
    recipe = recipes.load(Recipe, tiny_recipe, settings)
    with one_thread():
        train(recipe, data, tmp_path)
        train(recipe, data, tmp_path / "whole")
    assert same(last_of(run), last_of(tmp_path / "whole/tiny"))
    logged = [row["step"] for row in rows_of(run) if row["kind"] == "train"]
    assert logged == list(range(1, steps + 1))


@pytest.mark.skipif(not can_mount(), reason="mounting a small file system needs root")
@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_checkpoint(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    """On a real file system with room for one checkpoint but not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    full, roomy = forked.start_on_small_disk(
        disk, ["260k", "64m"], command(tiny_recipe, data, disk, "run.save_every=1"),
        tmp_path / "answer.json",
    )  # fmt: skip
    roomy.wait()
    ended = full.wait()
    assert ended.status == 1
    assert "No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert roomy.wait().status == 0, roomy.wait()
    best = checkpoint.best_of(tmp_path / "disk-kept/tiny")
    with one_thread():
        whole = train(recipes.load(Recipe, tiny_recipe, ["run.save_every=1"]), data, tmp_path / "w")
    one, other = checkpoint.read_weights(best), checkpoint.read_weights(whole)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_ranks_learn_as_one_with_the_same_batch(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    settings = ["network.drop_path_rate=0", "run.log_every=1", "optim.clip_grad_norm=0.5"]
    settings.append("run.epochs=1")
    train(recipes.load(Recipe, tiny_recipe, settings), data, tmp_path / "one")
    two = command(tiny_recipe, data, tmp_path / "two", *settings, "loading.batch_size=8")
    ended = [running.wait() for running in forked.start_ranks(2, two, tmp_path)]
    assert [one.status for one in ended] == [0, 0], ended
    assert [one.stdout.count("best checkpoint:") for one in ended] == [1, 0]  # only rank 0 prints
    agree(tmp_path / "one/tiny", tmp_path / "two/tiny")


def test_a_refusal_ends_all_ranks_alike(
    tiny_recipe: Path, small_runs: Path, data: Path, tmp_path: Path
) -> None:
    start = checkpoint.best_of(small_runs / "small")
    line = command(tiny_recipe, data, tmp_path / "runs", "run.epochs=1", "gate.max_fpr=0.0")
    ranks = forked.start_ranks(2, [*line, "--init-from", start], tmp_path)
    ended = [running.wait() for running in ranks]
    assert [one.status for one in ended] == [1, 1], ended
    assert all("more than gate.max_fpr 0.0%" in one.stderr for one in ended), ended


@pytest.mark.slow
def test_torchrun_starts_the_ranks(tiny_recipe: Path, data: Path, tmp_path: Path) -> None:
    settings = ["network.drop_path_rate=0", "run.log_every=1"]
    train(recipes.load(Recipe, tiny_recipe, settings), data, tmp_path / "one")
    two = command(tiny_recipe, data, tmp_path / "two", *settings, "loading.batch_size=8")
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py", *two]
    subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=ROOT, check=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    agree(tmp_path / "one/tiny", tmp_path / "two/tiny")


def agree(one: Path, two: Path) -> None:
    """Compare the losses and validation metrics of two runs."""
    np.testing.assert_allclose(losses_of(two), losses_of(one), rtol=2e-3)
    metas = [checkpoint.read_meta(last_of(run)) for run in (one, two)]
    counts = [meta["metrics"]["sets"]["val"]["count"] for meta in metas]
    assert counts[0] == counts[1]
    aurocs = [meta["metrics"]["sets"]["val"]["auroc"] for meta in metas]
    assert abs(aurocs[0] - aurocs[1]) < 0.02


@pytest.mark.slow
def test_a_run_of_two_ranks_resumes_on_one(tiny_recipe: Path, data: Path, tmp_path: Path) -> None:
    settings = ["network.drop_path_rate=0", "run.log_every=1", "run.epochs=3"]
    recipe = recipes.load(Recipe, tiny_recipe, settings)
    train(recipe, data, tmp_path / "one")
    two = command(tiny_recipe, data, tmp_path, *settings, "loading.batch_size=8")
    ranks = forked.start_ranks(2, [*two, "--set", "run.save_every=2"], tmp_path)
    wait_for_rows(tmp_path / "tiny", 4, ranks[0])
    os.kill(ranks[1].process.pid, signal.SIGTERM)  # sent to one rank, stops both
    assert [running.wait().status for running in ranks] == [130, 130]
    state = checkpoint.load_state(last_of(tmp_path / "tiny"))
    assert len(state["rng"]) == 2
    assert state["order"]["global_batch"] == 16
    train(recipe, data, tmp_path)
    agree(tmp_path / "one/tiny", tmp_path / "tiny")
