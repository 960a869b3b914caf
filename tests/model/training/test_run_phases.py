"""Phase 2 with replay, gradient accumulation, averaged weights, losses that are not finite."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import recipes
import train as command
from model import checkpoint
from model.calibration.fit import Calibration, CalibrationError
from model.evaluation.run import evaluate
from model.forgetting import SourceChange, forgetting, refusals, unjudged
from model.metrics import measure
from model.recipe import Gate, Recipe
from model.tracking.history import rows_of
from model.training import step as step_module
from model.training.conclude import GateError
from model.training.run import train
from model.training.sets import open_stream
from model.verdict import probability
from pipeline.replay import Replay
from pipeline.stream import open_pool
from sharding.format import open_shards
from tests.builders import ends_alike, losses_of
from tests.checkpoints import last_of
from tests.goldens import Golden

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def phase2(tiny_recipe: Path) -> Path:
    path = tiny_recipe.with_name("tiny2.toml")
    path.write_text(
        f"""
extends = ["{tiny_recipe}"]
name = "tiny2"
[data]
train = ["new"]
validate = ["val", "old"]
[replay]
sets = ["old"]
ratio = "1:4"
[run]
epochs = 2
init_from = "tiny"
"""
    )
    return path


class Died(Exception):
    """Simulates SIGKILL: nothing runs after it."""


@pytest.mark.parametrize(
    ("phase", "kills"),
    [(2, 2), *(pytest.param(phase, 10, marks=pytest.mark.slow) for phase in (1, 2))],
)
def test_a_run_killed_at_random_steps_ends_as_the_uninterrupted_one(
    tiny_recipe: Path, phase2: Path, data: Path, tmp_path: Path, phase: int, kills: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Bit for bit, with old samples replayed in phase 2 and a save at every third step. Each time
    the run resumes from its last save. A step with another seed, epoch or sample would change the
    result.
    """
    settings = [
        "run.log_every=1",
        "run.save_every=3",
        f"run.epochs={4 - phase}",
        "optim.ema_decay=0.5",
    ]
    first = recipes.load(Recipe, tiny_recipe, settings)
    start = train(first, data, tmp_path / "whole")
    recipe = recipes.load(Recipe, phase2, settings) if phase == 2 else first
    if phase == 2:
        train(recipe, data, tmp_path / "whole", init_from=start)
    whole, parts = (tmp_path / name / recipe.name for name in ("whole", "parts"))
    start = start if phase == 2 else None
    steps = [*rows_of(whole)][-1]["step"]
    rng = np.random.default_rng(phase)
    real_step = step_module.train_step
    for last in sorted(rng.choice(np.arange(1, steps), kills, replace=False).tolist()):

        def dying(*arguments: object, step: int, last: int = last, **options: object):
            loss = real_step(*arguments, step=step, **options)
            if step == last:
                raise Died
            return loss

        monkeypatch.setattr(step_module, "train_step", dying)
        with pytest.raises(Died):
            train(recipe, data, tmp_path / "parts", init_from=start)
        torch.manual_seed(last)  # other code may have used the generator
    monkeypatch.setattr(step_module, "train_step", real_step)
    train(recipe, data, tmp_path / "parts", init_from=start)
    ends_alike(whole, parts)
    if phase == 2:
        manifests = [(last_of(run) / "replayed.csv").read_text() for run in (whole, parts)]
        assert manifests[0] == manifests[1] and manifests[0].count("\n") > 10


def test_ten_losses_of_phase_2_never_change(
    tiny_recipe: Path, phase2: Path, data: Path, tmp_path: Path, golden: Golden
) -> None:
    """Golden values as in phase 1; they also cover which old samples are replayed at which
    position.
    """
    train(recipes.load(Recipe, tiny_recipe), data, tmp_path)
    recipe = recipes.load(Recipe, phase2, ["run.log_every=1"])
    train(recipe, data, tmp_path, stop_at=10)
    losses = [round(loss, 6) for loss in losses_of(tmp_path / "tiny2")]
    golden.check("losses_phase2", {"losses": losses}, rtol=1e-3)


@pytest.mark.parametrize("ratio", ["0", "1:1", "1:4", "1:8", "1:16"])
def test_the_replay_ratio_is_the_one_that_is_set(phase2: Path, data: Path, ratio: str) -> None:
    """From `--set` to the batches: the exact number of old samples per epoch, and none for 0."""
    weight = 0 if ratio == "0" else 0.5
    changes = [f"replay.ratio={ratio}", f"replay.distill_weight={weight}"]
    recipe = recipes.load(Recipe, phase2, changes)
    assert recipe.replay.distill_weight == weight
    stream = open_stream(recipe, data, torch.device("cpu"))
    wanted = int(stream.new_per_epoch * recipe.replay.fraction)
    assert stream.replayed_per_epoch == wanted
    epoch = stream.epoch(0)
    share = float(recipe.replay.fraction / (1 + recipe.replay.fraction))
    assert abs(epoch.replayed.sum() - share * len(epoch.replayed)) <= 1
    assert (wanted == 0) == (ratio == "0")
    assert set(epoch.samples[epoch.replayed]) <= set(stream.pool.old)


def test_validations_show_progress(
    tiny_recipe: Path, data: Path, tmp_path: Path, bars: list[tuple[str, int]]
) -> None:
    train(recipes.load(Recipe, tiny_recipe, ["run.epochs=2"]), data, tmp_path)
    images = len(open_shards([data / "val"]))
    assert [bar for bar in bars if "val" in bar[0]] == 2 * [("validating val", images)]


def test_accumulation_changes_only_memory(tiny_recipe: Path, data: Path, tmp_path: Path) -> None:
    losses = {}
    for pieces in (1, 5, 16):
        settings = [
            "network.drop_path_rate=0", "run.log_every=1", f"run.grad_accum_steps={pieces}",
        ]  # fmt: skip
        recipe = recipes.load(Recipe, tiny_recipe, settings)
        train(recipe, data, tmp_path / str(pieces), stop_at=3)
        losses[pieces] = losses_of(tmp_path / str(pieces) / "tiny")
    for pieces in (5, 16):
        np.testing.assert_allclose(losses[pieces], losses[1], rtol=1e-3, err_msg=str(pieces))


def test_averaged_weights_are_saved_and_the_run_resumes_from_the_current_ones(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipes.load(Recipe, tiny_recipe, ["optim.ema_decay=0.9", "run.epochs=1"])
    whole = train(recipe, data, tmp_path / "whole")
    train(recipe, data, tmp_path / "parts", stop_at=3)
    half = last_of(tmp_path / "parts/tiny")
    raw = checkpoint.load_state(half)["net"]
    shown = checkpoint.read_weights(half)
    assert raw.keys() == shown.keys()
    assert not torch.equal(raw["head.fc.weight"], shown["head.fc.weight"])
    again = train(recipe, data, tmp_path / "parts")
    one, other = checkpoint.read_weights(whole), checkpoint.read_weights(again)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_phase_2_reports_forgetting_and_records_replayed_samples(
    tiny_recipe: Path, phase2: Path, data: Path, tmp_path: Path
) -> None:
    train(recipes.load(Recipe, tiny_recipe, ["run.epochs=1"]), data, tmp_path)
    result = CliRunner().invoke(
        command.main, ["--recipe", str(phase2), "--data", str(data), "--runs", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    assert "forgetting:" in result.output
    assert "balanced accuracy per source at 0.5 (with one class: accuracy)" in " ".join(
        result.output.split()
    )
    best = checkpoint.best_of(tmp_path / "tiny2")
    meta = checkpoint.read_meta(best)
    assert f"(step {meta['step']})" in " ".join(result.output.split())
    compared = {row["name"]: row for row in meta["compared"]["sources"]}
    assert compared["old/alpha"]["old"] and not compared["val/gamma"]["old"]
    before = json.loads((tmp_path / "tiny2/baseline_metrics.json").read_text())
    start = checkpoint.read_meta(checkpoint.best_of(tmp_path / "tiny"))
    assert before["sets"]["val"] == start["metrics"]["sets"]["val"]
    assert meta["refused"] == []
    rows = list(csv.DictReader((best / "replayed.csv").read_text().splitlines()))
    old = set(open_pool(data, ["old"], Replay()).shards.table.column("key").to_pylist())
    assert {row["key"] for row in rows} <= old
    new = len(open_pool(data, ["new"], Replay()).shards)
    epochs = math.ceil(meta["epoch"])
    assert 0 < sum(int(row["count"]) for row in rows) <= epochs * (new // 4)


def test_the_gate_marks_and_keeps_what_it_refuses(
    tiny_recipe: Path, phase2: Path, data: Path, tmp_path: Path
) -> None:
    train(recipes.load(Recipe, tiny_recipe, ["run.epochs=1"]), data, tmp_path)
    settings = ["gate.max_fpr=0.0", "optim.lr=1e-2", "run.epochs=1"]
    recipe = recipes.load(Recipe, phase2, settings)
    with pytest.raises(GateError, match=r"is refused: .* more than gate.max_fpr 0.0%"):
        train(recipe, data, tmp_path)
    best = checkpoint.best_of(tmp_path / "tiny2")
    assert checkpoint.read_meta(best)["refused"]
    assert checkpoint.best_of(tmp_path / "tiny")
    result = CliRunner().invoke(
        command.main,
        ["--recipe", str(phase2), "--data", str(data), "--runs", str(tmp_path / "again"),
         "--init-from", str(checkpoint.best_of(tmp_path / "tiny")),
         *(word for setting in settings for word in ("--set", setting))],
    )  # fmt: skip
    assert result.exit_code == 1
    assert "The checkpoint and the one that the run started from are kept" in result.output
    with pytest.raises(GateError, match=r"is refused: .* more than gate.max_fpr 0.0%"):
        train(recipe, data, tmp_path)  # finished, and refused as before


def test_the_gate_limits_false_positives_also_of_a_first_run(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    settings = ["gate.max_fpr=0.0", "optim.lr=1e-2", "run.epochs=1"]
    recipe = recipes.load(Recipe, tiny_recipe, settings)
    for _ in range(2):  # a finished run is refused again
        with pytest.raises(GateError, match=r"is refused: .* more than gate.max_fpr 0.0%"):
            train(recipe, data, tmp_path)
    assert checkpoint.read_meta(checkpoint.best_of(tmp_path / "tiny"))["refused"]


def test_stated_error_rates_hold_on_validation_sets(
    tiny_recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules: list[object] = []

    def noted(rule: object, *_scores: object) -> Calibration:
        rules.append(rule)
        raise CalibrationError("only the rule is of interest")

    monkeypatch.setattr("model.calibration.fit.FEWEST", 1)
    monkeypatch.setattr("model.calibration.calibrate.calibrate_by", noted)
    stated = ["calibration.max_fpr=0.4", "calibration.max_miss=0.4"]
    for name, changes in (("a", []), ("b", stated)):
        recipe = recipes.load(Recipe, tiny_recipe, [f'name="{name}"', "run.epochs=1", *changes])
        train(recipe, data, tmp_path)
    assert rules == ["auto", recipe.calibration]
    assert recipe.calibration.max_fpr == 0.4


def metrics(accuracy: float, fpr: float = 0.0):
    fakes = round(100 * accuracy)
    labels = np.repeat([1, 0], [100, 100])
    called = np.r_[np.arange(100) < fakes, np.arange(100) < round(100 * fpr)].astype(float)
    return measure(labels, called)


def test_the_gate_looks_at_old_sources_and_false_positives() -> None:
    rows = [
        SourceChange(name="val/a", old=True, images=10, before=0.9, after=0.82),
        SourceChange(name="val/b", old=True, images=10, before=0.5, after=0.7),
        SourceChange(name="val/c", old=False, images=10, before=0.9, after=0.1),
    ]
    assert forgetting(rows) == pytest.approx(0.04)
    sets = {"val": metrics(0.9, 0.12)}
    assert refusals(Gate(), rows, sets, 0.5) == []
    (one,) = refusals(Gate(max_forgetting=0.05), rows, sets, 0.5)
    assert one.startswith("val/a lost 8.0%")
    (one,) = refusals(Gate(max_fpr=0.1), rows, sets, 0.5)
    assert one.startswith(
        "val has 12.0% false positives at threshold 0.500, more than gate.max_fpr"
    )


def test_a_loss_at_the_limit_keeps_it() -> None:
    """Though 0.9 - 0.85 is a little more than 0.05 in binary."""
    at = SourceChange(name="val/a", old=True, images=20, before=0.9, after=0.85)
    assert at.lost > 0.05
    assert refusals(Gate(max_forgetting=0.05), [at], {"val": metrics(0.9)}, 0.5) == []
    assert refusals(Gate(max_fpr=0.07), [at], {"val": metrics(0.9, 0.07)}, 0.5) == []
    for limits in (Gate(max_forgetting=0.0499), Gate(max_fpr=0.0699)):
        assert len(refusals(limits, [at], {"val": metrics(0.9, 0.07)}, 0.5)) == 1


def test_a_limit_that_cannot_be_judged_is_not_kept() -> None:
    new = [SourceChange(name="val/c", old=False, images=10, before=0.9, after=0.9)]
    fakes = {"val": measure(np.ones(4, int), np.ones(4))}
    assert forgetting(new) is None and forgetting([]) is None
    said = ["gate.max_forgetting cannot be judged, because no validation set holds an old source"]
    assert refusals(Gate(max_forgetting=0.05), new, fakes, 0.5) == said
    assert refusals(Gate(max_forgetting=0.05), None, fakes, 0.5) == []  # nothing to forget
    said = ["gate.max_fpr cannot be judged, because no validation set holds real images"]
    assert refusals(Gate(max_fpr=0.1), new, fakes, 0.5) == said
    assert refusals(Gate(max_fpr=0.1), new, {**fakes, "other": metrics(0.9)}, 0.5) == []
    assert unjudged(Gate(), False, False) == []


def calibration_at(threshold: float) -> Calibration:
    """A calibration as of a fit: there are too few images here to fit one."""
    return Calibration(
        temperature=2.0, threshold=threshold, threshold_at="auto",
        band=(threshold, threshold), roc=[], reals=40, fakes=30, before={}, after={},
    )  # fmt: skip


def test_the_gate_counts_false_positives_at_the_calibrated_threshold(
    tiny_recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the threshold of the detector that is saved, not at 0.5."""
    monkeypatch.setattr("model.calibration.fit.FEWEST", 1)

    def train_at(threshold: float, name: str) -> Path:
        monkeypatch.setattr(
            "model.calibration.calibrate.calibrate_by", lambda *_: calibration_at(threshold)
        )
        changes = [f"name={name}", "gate.max_fpr=0.0", "optim.lr=1e-2", "run.epochs=1"]
        return train(recipes.load(Recipe, tiny_recipe, changes), data, tmp_path)

    meta = checkpoint.read_meta(train_at(1.0, "high"))
    assert meta["metrics"]["sets"]["val"]["false_positive_rate"] > 0
    with pytest.raises(GateError, match=r"val has 100.0% false positives at threshold 0.000, more"):
        train_at(0.0, "low")


@pytest.mark.slow
def test_distillation_keeps_the_logits_of_old_samples_near_the_teacher(
    tiny_recipe: Path, phase2: Path, data: Path, tmp_path: Path
) -> None:
    """Of two otherwise equal runs, the distilled one stays nearer to its teacher."""
    train(recipes.load(Recipe, tiny_recipe), data, tmp_path)
    away = []
    for name, weight in (("free", 0.0), ("held", 50.0)):
        settings = [f"name={name}", f"replay.distill_weight={weight}", "optim.lr=3e-3",
                    'replay.ratio="1:1"', "run.epochs=3"]  # fmt: skip
        recipe = recipes.load(Recipe, phase2, settings)
        train(recipe, data, tmp_path)
        teacher, _, _ = checkpoint.load_network(checkpoint.best_of(tmp_path / "tiny"))
        student, _, _ = checkpoint.load_network(last_of(tmp_path / name))
        images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
        with torch.inference_mode():
            away.append(float((teacher(images) - student(images)).square().mean()))
    assert away[1] < 0.5 * away[0]
    with pytest.raises(ValueError, match="needs a run that starts from a trained checkpoint"):
        train(
            recipes.load(Recipe, phase2, ["name=x", "replay.distill_weight=1", 'run.init_from=""']),
            data,
            tmp_path,
        )


def test_the_first_bad_loss_ends_the_run_with_its_step_and_samples(
    tiny_recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is checked later, but the error names the step in which it occurred."""
    step = step_module.train_step
    seen: list[list[str]] = []

    def poisoned(train_state, forward: Callable, batch, *arguments, **options):
        table = open_pool(data, ["old"], Replay()).shards.table
        seen.append(table.column("key").take(batch.samples).to_pylist())
        if options["step"] == 2:
            with torch.no_grad():
                next(train_state.net.parameters()).fill_(float("nan"))
        return step(train_state, forward, batch, *arguments, **options)

    monkeypatch.setattr(step_module, "train_step", poisoned)
    recipe = recipes.load(Recipe, tiny_recipe, ["run.log_every=5", "run.epochs=2"])
    with pytest.raises(ValueError, match=r"not finite at step 3 \(first samples: ") as caught:
        train(recipe, data, tmp_path)
    assert all(key in str(caught.value) for key in seen[2][:8])
    assert last_of(tmp_path / "tiny") is None


def test_weights_that_are_not_finite_end_the_run_before_they_are_saved(
    tiny_recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of that step is finite; only the weights show the error."""
    step = step_module.train_step

    def poisoned(train_state, *arguments, **options):
        loss = step(train_state, *arguments, **options)
        if options["step"] == 2:
            with torch.no_grad():
                train_state.net.backbone.stem[0].bias[0] = float("inf")
        return loss

    recipe = recipes.load(Recipe, tiny_recipe, ["run.save_every=1"])
    monkeypatch.setattr(step_module, "train_step", poisoned)
    with pytest.raises(ValueError, match=r"not finite after step 3 \(the first is stem\.0\.bias"):
        train(recipe, data, tmp_path)
    assert last_of(tmp_path / "tiny").name == "step_0000002"


def test_the_last_table_uses_the_calibrated_threshold(
    tiny_recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures equal those of `evaluate.py` for the same set."""

    def in_the_middle(
        _rule: str, _labels: np.ndarray, logits: np.ndarray, *_others: object
    ) -> Calibration:
        return calibration_at(float(np.median(probability(logits, 2.0))))

    monkeypatch.setattr("model.calibration.fit.FEWEST", 1)
    monkeypatch.setattr("model.calibration.calibrate.calibrate_by", in_the_middle)
    arguments = ["--recipe", str(tiny_recipe), "--data", str(data), "--runs", str(tmp_path)]
    result = CliRunner().invoke(command.main, [*arguments, "--set", "run.epochs=1"])
    assert result.exit_code == 0, result.output
    best = checkpoint.best_of(tmp_path / "tiny")
    meta = checkpoint.read_meta(best)
    assert meta["threshold"] != 0.5
    shown = meta["calibrated_metrics"]["sets"]["val"]
    report = evaluate(best, data, ["val"], tmp_path / "report")
    figures = report["sets"]["val"]["overall"]
    assert shown["recall"] != meta["metrics"]["sets"]["val"]["recall"]
    for name in ("accuracy", "recall", "false_positive_rate"):
        assert figures[name] == pytest.approx(shown[name]), name
    row = next(line for line in result.stdout.splitlines() if " val " in line)
    assert f"{shown['false_positive_rate']:.3f}" in row
    assert f"threshold {meta['threshold']:.3f}" in result.stdout
