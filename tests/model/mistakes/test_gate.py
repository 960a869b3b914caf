"""Tests of the phase 2 gate on kept mistakes and of `evaluate.py --regressions`, with real
training."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import evaluate
import predict
from model import checkpoint
from model.inference.detector import ImageDetector, load_detector
from model.mistakes.gate import MOST_HASHES, NO_COPY, START_FILE, refusal
from model.mistakes.keep import (
    Label,
    Mistake,
    MistakeError,
    Verdict,
    keep_mistake,
    read_mistakes,
)
from model.mistakes.regressions import Regression
from model.network import build
from model.recipe import Gate
from model.training import conclude, run
from model.training.conclude import GateError
from model.verdict import VERDICTS
from tests.builders import TINY, encode, hashes, photo, train_tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("no_workers"),
]

FROZEN = (
    "network.freeze_backbone=true", 'network.head="stages"', "network.drop_path_rate=0.0",
)  # fmt: skip
SECOND = (
    'run.init_from="tiny"', 'data.train=["new"]', 'data.validate=["val", "old"]',
    'replay.sets=["old"]', 'replay.ratio="1:4"', "run.epochs=2", "optim.lr=3e-2",
)  # fmt: skip

WRONG = Verdict(
    detector="another", score=0.9, verdict=VERDICTS[2], band=(0.5, 0.5), date="2026"
)  # fmt: skip


class Died(Exception):
    """Error that ends a run like SIGKILL."""


@dataclass(frozen=True)
class Trained:
    """Two checkpoints: `first`, and a second one that was trained from it with `settings`.

    The two give opposite verdicts on the images `flipped`, and equal ones on `same`.
    """

    data: Path
    runs: Path
    settings: tuple[str, ...]
    first: ImageDetector
    flipped: list[bytes]
    same: list[bytes]

    def again(self, name: str, *settings: str, **options: int) -> Path:
        """Train the second run again under another name. Return its best checkpoint."""
        train_tiny(self.data, self.runs, *self.settings, f'name="{name}"', *settings, **options)
        return checkpoint.best_of(self.runs / name)

    def label(self, image: bytes, *, right: bool) -> Label:
        """Return the label with which the first checkpoint is right, or wrong."""
        said_fake = self.first.predict(image).verdict == VERDICTS[2]
        return "fake" if said_fake == right else "real"

    def keep(self, folder: Path, image: bytes, *, right: bool, copy: bool = True) -> str:
        """Keep a mistake of another detector with a label that makes the first checkpoint right or
        wrong. Return the hash of the image.
        """
        label = self.label(image, right=right)
        given = replace(WRONG, verdict=VERDICTS[0]) if label == "fake" else WRONG
        keep_mistake(folder, image, label, given, copy_named="a.jpg" if copy else None)
        return hashlib.sha256(image).hexdigest()


@pytest.fixture(
    scope="module", params=[pytest.param("pixels", marks=pytest.mark.slow), "stored features"]
)
def trained(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    runs, settings, weights = tmp_path_factory.mktemp("runs"), (), None
    if request.param == "stored features":
        store, weights = tmp_path_factory.mktemp("store"), runs / "backbone.safetensors"
        settings = (*FROZEN, f'features.store="{store}"')
        torch.manual_seed(11)
        net = build(replace(TINY, freeze_backbone=True, head="stages"), pretrained=False)
        state = net.backbone.state_dict()
        save_file({n: w.contiguous() for n, w in state.items() if "stage_head" not in n}, weights)
    train_tiny(data, runs, *settings, init_from=weights)
    settings = (*settings, *SECOND)
    train_tiny(data, runs, *settings, 'name="second"')
    first, second = (load_detector(runs / name) for name in ("tiny", "second"))
    images = [encode(photo(seed)) for seed in range(60)]
    before, after = ([one.verdict for one in each.predict(images)] for each in (first, second))
    assert VERDICTS[1] not in {*before, *after}
    flipped = [image for image, *two in zip(images, before, after, strict=True) if len({*two}) > 1]
    same = [image for image in images if image not in flipped]
    assert len(flipped) > 5 and len(same) > 5
    return Trained(data, runs, settings, first, flipped, same)


def test_the_gate_refuses_newly_wrong_mistakes(
    trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """This holds for pixels and for stored features. The folder of the mistakes is unchanged."""
    folder = tmp_path / "kept"
    newly = sorted(trained.keep(folder, image, right=True) for image in trained.flipped[:2])
    trained.keep(folder, trained.flipped[2], right=False)
    trained.keep(folder, trained.same[0], right=False)
    trained.keep(folder, trained.same[1], right=True)
    trained.keep(folder, trained.flipped[3], right=True, copy=False)
    before = hashes(folder)
    with pytest.raises(GateError) as caught:
        trained.again("refused", f'gate.mistakes="{folder}"', "gate.max_newly_wrong=1")
    names = ", ".join(each[:12] for each in newly)
    said = (
        f"2 of the kept mistakes in {folder} became wrong in training, more than "
        f"gate.max_newly_wrong 1: {names}."
    )
    assert said in str(caught.value) and "\n" not in str(caught.value)
    output = " ".join(capfd.readouterr().out.split())
    assert "6 kept mistakes in" in output
    assert "2 newly wrong, 1 still wrong, 2 fixed, 1 not measurable" in output
    assert f"not measurable, 1: {NO_COPY}" in output
    assert hashes(folder) == before
    meta = checkpoint.read_meta(checkpoint.best_of(trained.runs / "refused"))
    assert meta["compared"]["mistakes"] == {
        "counts": {
            "newly wrong": 2, "still wrong": 1, "uncertain": 0, "fixed": 2, "not measurable": 1,
        },
        "newly_wrong": newly,
    }  # fmt: skip
    assert meta["refused"] == [said.removesuffix(".")]


def test_max_newly_wrong_mistakes_pass_the_gate(trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    trained.keep(folder, trained.flipped[0], right=True)
    best = trained.again("passes", f'gate.mistakes="{folder}"', "gate.max_newly_wrong=1")
    meta = checkpoint.read_meta(best)
    assert meta["refused"] == [] and meta["compared"]["mistakes"]["counts"]["newly wrong"] == 1


def test_a_resumed_run_uses_the_stored_verdicts_of_its_initial_detector(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops in training, then before the gate, and is refused after it resumes."""
    folder = tmp_path / "kept"
    newly = trained.keep(folder, trained.flipped[0], right=True)
    line = ("interrupted", f'gate.mistakes="{folder}"', "run.save_every=1")
    trained.again(*line, stop_at=2)
    start = trained.runs / "interrupted" / START_FILE
    said = start.read_text()
    assert json.loads(said).keys() == {newly}

    def dies(*_arguments: object) -> None:
        raise Died

    start.write_text("[]")
    with monkeypatch.context() as patched, pytest.raises(MistakeError) as caught:
        patched.setattr(run, "assemble", dies)  # refused before anything is built
        trained.again(*line)
    assert "has no readable verdicts" in str(caught.value) and "--run" in str(caught.value)
    start.write_text(said)
    trained.keep(folder, trained.flipped[1], right=True)

    with monkeypatch.context() as patched, pytest.raises(Died):
        patched.setattr(conclude, "_calibrate", dies)
        trained.again(*line)
    best = checkpoint.best_of(trained.runs / "interrupted")
    assert checkpoint.read_meta(best)["compared"] is None
    with pytest.raises(GateError, match=f"1 of the kept mistakes.* became wrong.*{newly[:12]}"):
        trained.again(*line)
    mistakes = checkpoint.read_meta(best)["compared"]["mistakes"]
    assert mistakes["counts"]["not measurable"] == 1 and mistakes["newly_wrong"] == [newly]
    with pytest.raises(GateError, match=newly[:12]):
        trained.again(*line)  # a finished run is refused again


def test_a_mistake_of_one_checkpoint_is_measured_with_the_next(
    trained: Trained, tmp_path: Path
) -> None:
    """The commands keep a mistake of the first checkpoint, then measure the first, the second and
    again the first checkpoint, which is newly wrong because the second one was right.
    """
    folder, image = tmp_path / "kept", tmp_path / "mine.jpg"
    image.write_bytes(trained.flipped[0])
    label = trained.label(trained.flipped[0], right=False)
    runs = [trained.runs / name for name in ("tiny", "second")]
    result = CliRunner().invoke(
        predict.main,
        [str(image), "--report-mistake", label, "--mistakes", str(folder), "--keep-image",
         "--checkpoint", str(runs[0])],
    )  # fmt: skip
    assert result.exit_code == 0 and "kept, with its image" in result.output, result.output
    rows = [measured(folder, run_folder, tmp_path) for run_folder in (*runs, runs[0])]
    assert [row["outcome"] for row in rows] == ["still wrong", "fixed", "newly wrong"]
    first, second = rows[1]["before"], rows[1]["after"]
    assert first["detector"].startswith("tiny/step_")
    assert second["detector"].startswith("second/step_")
    assert {first["verdict"], second["verdict"]} == {VERDICTS[0], VERDICTS[2]}
    assert first["score"] == pytest.approx(trained.first.predict(image).probability)
    assert rows[2]["before"] == second and rows[2]["after"]["score"] == first["score"]
    (mistake,) = read_mistakes(folder)
    assert [each.detector for each in mistake.verdicts] == [second["detector"], first["detector"]]


def measured(folder: Path, run_folder: Path, tmp_path: Path) -> dict:
    """Return the only row of `evaluate.py --regressions`, and check the exit code."""
    report = tmp_path / "again" / "regressions.json"
    line = ["--regressions", folder, "--checkpoint", run_folder, "--out", report.parent]
    result = CliRunner().invoke(evaluate.main, [str(part) for part in line])
    (row,) = json.loads(report.read_text())["mistakes"]
    assert f"1 {row['outcome']}" in result.output
    assert result.exit_code == (row["outcome"] == "newly wrong")
    return row


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (
            lambda _folder: None,
            r"is no folder; give the folder that `python predict.py --report-mistake`",
        ),
        (lambda folder: folder.mkdir(), r"has no mistakes"),
        (
            lambda folder: keep_mistake(folder, b"x", "real", WRONG),
            r"has 1 mistake but no copy of an image.*--keep-image",
        ),
    ],
)
def test_mistakes_that_cannot_be_measured_are_refused_before_the_run(
    prepare: Callable[[Path], object], said: str, data: Path, small_runs: Path, tmp_path: Path
) -> None:
    prepare(tmp_path / "kept")
    start = checkpoint.best_of(small_runs / "small")
    setting = f'gate.mistakes="{tmp_path / "kept"}"'
    with pytest.raises(MistakeError, match=said):
        train_tiny(data, tmp_path / "runs", setting, init_from=start)
    assert not (tmp_path / "runs").exists()


def test_a_run_without_an_initial_detector_warns_that_the_gate_is_not_used(
    data: Path, tmp_path: Path, logged: list[str]
) -> None:
    train_tiny(data, tmp_path, 'gate.mistakes="none"', stop_at=1)
    assert any("gate.mistakes (none) is not used: this run starts from no" in x for x in logged)
    assert not (tmp_path / "tiny" / START_FILE).exists()


def test_a_refusal_names_the_first_hashes_and_counts_the_rest() -> None:
    rows = [
        Regression(
            mistake=Mistake(sha256=f"{index:064x}"[::-1], label="real", verdicts=(WRONG,)),
            outcome="newly wrong" if index else "fixed", before=WRONG, after=WRONG,
        )
        for index in range(MOST_HASHES + 3)
    ]  # fmt: skip
    assert refusal(Gate(mistakes="kept", max_newly_wrong=MOST_HASHES + 2), rows) == []
    (line,) = refusal(Gate(mistakes="kept", max_newly_wrong=MOST_HASHES + 1), rows)
    assert line.endswith(f"{rows[MOST_HASHES].mistake.sha256[:12]} and 2 more")
    assert line.count(", ") == MOST_HASHES
    (line,) = refusal(Gate(mistakes="kept"), rows[: MOST_HASHES + 1])
    assert "more than gate.max_newly_wrong 0" in line and " and " not in line
