"""Removal of the checkpoints that a run no longer needs, also below their readers."""

from pathlib import Path

import pytest

from model import checkpoint, load_detector
from model.network import build
from model.training.saving import prune
from tests.builders import TINY
from tests.checkpoints import last_of
from tests.model.test_checkpoint import save


def test_best_and_last_are_kept_and_others_pruned(tmp_path: Path) -> None:
    net = build(TINY, pretrained=False)
    for step, selection in ((1, 0.6), (2, 0.9), (3, None), (4, 0.7)):
        save(tmp_path, net, step=step, selection=selection)
    prune(tmp_path, {checkpoint.best_of(tmp_path), last_of(tmp_path)})
    assert [p.name for p in checkpoint.checkpoints_of(tmp_path)] == ["step_0000002", "step_0000004"]
    assert checkpoint.best_of(tmp_path).name == "step_0000002"
    assert last_of(tmp_path).name == "step_0000004"


@pytest.mark.parametrize("last_call", ["refusal_of", "weights_name", "_verify", "load_file"])
def test_a_run_that_is_trained_meanwhile_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_call: str
) -> None:
    """A training replaces the best checkpoint just before `last_call` reads it."""
    older = save(tmp_path / "run")
    call = getattr(checkpoint, last_call)

    def replaced_first(*arguments):
        if older.exists():
            prune(tmp_path / "run", {save(tmp_path / "run", step=2, selection=0.9)})
        return call(*arguments)

    monkeypatch.setattr(checkpoint, last_call, replaced_first)
    detector = load_detector(tmp_path / "run", device="cpu")
    assert not older.exists() and detector.checkpoint.name == "step_0000002"
    with pytest.raises(checkpoint.ReplacedError, match=r"is not there: .* name the run, "):
        checkpoint.check_weights(older)


def test_pruning_leaves_what_a_link_points_to(tmp_path: Path) -> None:
    save(tmp_path / "run", step=1)
    moved = (tmp_path / "run/step_0000001").rename(tmp_path / "moved")
    (tmp_path / "run/step_0000001").symlink_to(moved)
    prune(tmp_path / "run", ())
    assert not list((tmp_path / "run").iterdir()) and checkpoint.verify(moved)


def test_what_killed_processes_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = build(TINY, pretrained=False)
    for step in (1, 2):
        save(tmp_path, net, step=step)
    (tmp_path / "step_0000003.4194303.partial").mkdir()
    (tmp_path / "step_0000003 notes.partial").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", lambda _folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, {tmp_path / "step_0000002"})
    prune(tmp_path, {tmp_path / "step_0000002"})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_0000002", "step_0000003 notes.partial",
    ]  # fmt: skip
