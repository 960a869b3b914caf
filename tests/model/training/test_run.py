"""Training: both phases on tiny shards, with and without interruptions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import recipes
import train as command
from model import checkpoint
from model.export.hub import sources_of
from model.network import build
from model.recipe import Recipe
from model.tracking.history import rows_of
from model.training.optim import make_optimizer
from model.training.plan import plan
from model.training.run import train
from model.training.step import TrainState, train_step
from pipeline.batch import Batch
from pipeline.order import OrderError
from sharding.format import INDEX_FILE
from tests.builders import ends_alike, losses_of, weights_of
from tests.checkpoints import last_of
from tests.goldens import Golden

# Warnings from inside TensorBoard (protobuf, numpy).
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_a_run_learns_and_writes_everything_down(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipes.load(Recipe, tiny_recipe, ["run.epochs=8", "optim.lr=8e-3", "data.policy=dda"])
    best = train(recipe, data, tmp_path / "runs")
    rows = [*rows_of(best.parent)]
    losses = losses_of(best.parent)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
    validated = [row for row in rows if row["kind"] == "validate/val/gamma"]
    assert len(validated) == 8
    assert {"recall", "false_positive_rate", "auroc", "count"} <= validated[0].keys()
    assert list((best.parent / "tensorboard").iterdir())
    meta = checkpoint.read_meta(best)
    assert meta["selection"] == max(row["selection"] for row in rows if row["kind"] == "validate")
    assert meta["recipe"]["optim"]["lr"] == 8e-3


def test_epochs_between_validations_are_not_scored(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipes.load(Recipe, tiny_recipe, ["run.epochs=3", "run.validate_every=2"])
    best = train(recipe, data, tmp_path / "runs")
    rows = [*rows_of(best.parent)]
    selections = {row["step"]: row["selection"] for row in rows if row["kind"] == "validate"}
    last = max(row["step"] for row in rows)
    assert [3 * step // last for step in selections] == [2, 3]  # the last epoch always
    assert checkpoint.read_meta(best)["selection"] == max(selections.values())


def test_resume_at_any_step_equals_the_uninterrupted_run(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    """Bit for bit, with drop path using torch's random generator: 2 epochs of 3 steps, where the
    second run is stopped after each step.
    """
    recipe = recipes.load(Recipe, tiny_recipe, ["run.log_every=1", "loading.batch_size=26"])
    train(recipe, data, tmp_path / "whole")
    for stop_at in range(1, 6):
        train(recipe, data, tmp_path / "parts", stop_at=stop_at)
        assert last_of(tmp_path / "parts/tiny").name == f"step_{stop_at:07d}"
        torch.manual_seed(99)  # other code may have used the generator
    train(recipe, data, tmp_path / "parts")
    assert last_of(tmp_path / "parts/tiny").name == "step_0000006"
    ends_alike(tmp_path / "whole/tiny", tmp_path / "parts/tiny")


def test_rows_after_the_last_checkpoint_are_not_doubled(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipes.load(Recipe, tiny_recipe, ["run.log_every=1", "run.epochs=1"])
    train(recipe, data, tmp_path, stop_at=3)
    history = tmp_path / "tiny/metrics.jsonl"
    history.write_text(history.read_text() + '{"step": 4, "kind": "train", "loss": 9.9}\n{"st')
    train(recipe, data, tmp_path)
    rows = rows_of(tmp_path / "tiny")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 6))


def test_a_finished_run_is_left_alone(tiny_recipe: Path, data: Path, tmp_path: Path) -> None:
    recipe = recipes.load(Recipe, tiny_recipe, ["run.epochs=1"])
    best = train(recipe, data, tmp_path)
    before = (best / "meta.json").stat().st_mtime_ns
    assert train(recipe, data, tmp_path) == best
    assert (best / "meta.json").stat().st_mtime_ns == before


def test_another_recipe_or_other_shards_are_refused(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipes.load(Recipe, tiny_recipe)
    train(recipe, data, tmp_path, stop_at=2)
    changed = recipes.load(Recipe, tiny_recipe, ["optim.lr=1e-3"])
    with pytest.raises(
        ValueError, match=r"another recipe \(optim\.lr was 0\.0002, now 0\.001; 1 d"
    ):
        train(changed, data, tmp_path)
    other = tmp_path / "data"
    other.mkdir()
    (other / "old").symlink_to(data / "new")
    (other / "val").symlink_to(data / "val")
    with pytest.raises(OrderError, match="cannot resume: the shard set has been built again"):
        train(recipe, other, tmp_path)


def test_a_run_of_other_settings_is_refused(tiny_recipe: Path, data: Path, tmp_path: Path) -> None:
    train(recipes.load(Recipe, tiny_recipe), data, tmp_path, stop_at=2)
    with pytest.raises(ValueError, match=r"another recipe \(network\.head was timm, now stages"):
        train(recipes.load(Recipe, tiny_recipe, ["network.head=stages"]), data, tmp_path)


def test_a_run_continues_after_an_update_unless_its_settings_change(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    """The program that began it did not have the key yet, or had a key that is gone."""
    recipe = recipes.load(Recipe, tiny_recipe)
    last = train(recipe, data, tmp_path, stop_at=2)
    saved = checkpoint.read_meta(last)["recipe"]
    del saved["network"]["head"], saved["replay"], saved["augment"]["train"]["whole_jpeg"]
    checkpoint.annotate(last, {"recipe": saved})
    assert plan(recipe, data, tmp_path).done == 2
    changed = recipes.load(Recipe, tiny_recipe, ["network.head=stages"])
    message = r"\(network\.head was not known to the program .*, default timm, now stages; 1 differ"
    with pytest.raises(ValueError, match=message):
        plan(changed, data, tmp_path)
    checkpoint.annotate(last, {"recipe": saved | {"optim": saved["optim"] | {"momentum": 0.9}}})
    with pytest.raises(ValueError, match=r"another version .*unknown key 'optim\.momentum'"):
        plan(recipe, data, tmp_path)


def with_synthetic(data: Path, folder: Path, source: str) -> Path:
    """Copy the sets with one source marked as synthetic."""
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns(".build"))
    path = folder / "old" / INDEX_FILE
    index = json.loads(path.read_text(encoding="utf-8"))
    index["sources"][source]["synthetic"] = True
    path.write_text(json.dumps(index), encoding="utf-8")
    return folder


def test_phase_2_starts_from_the_best_of_phase_1_and_replays(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    data = with_synthetic(data, tmp_path / "data", "dummy")
    best = train(recipes.load(Recipe, tiny_recipe, ["run.epochs=1"]), data, tmp_path)
    second = [
        'name="second"', 'run.init_from="tiny"', 'data.train=["new"]', 'replay.sets=["old"]',
        "replay.ratio=1:8", "optim.lr=1e-12", "optim.weight_decay=0", "run.epochs=1",
    ]  # fmt: skip
    recipe = recipes.load(Recipe, tiny_recipe, second)
    best_of_second = train(recipe, data, tmp_path)
    for name, weights in weights_of(best_of_second).items():
        torch.testing.assert_close(weights, weights_of(best)[name], rtol=0, atol=1e-9)
    rows = rows_of(tmp_path / "second")
    shares = [row["replay_share"] for row in rows if row["kind"] == "train"]
    assert max(shares) > 0
    known = checkpoint.read_meta(best_of_second)["data"]
    assert known["replay"] == ["old"]
    # The checkpoint records the synthetic sources of the first phase.
    assert known["sources"] == ["alpha", "beta", "dummy", "gamma"]
    assert known["synthetic_sources"] == ["dummy"]
    assert known["titles"] == {"dummy": "dummies"}


def test_a_source_that_is_left_out_is_not_recorded(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    """Else a report would say that training had other images of its generator."""
    left_out = ['data.train=["old", "new"]', "data.repeats={beta=0, gamma=0}"]
    step = train(recipes.load(Recipe, tiny_recipe, left_out), data, tmp_path, stop_at=1)
    meta = checkpoint.read_meta(step)
    known = meta["data"]
    assert known["sources"] == ["alpha", "dummy"]
    assert known["generators"] == ["gan"]
    assert known["train"] == [*known["set_sha256"]] == ["old"]  # `new` has only gamma
    assert sources_of(meta, data).keys() == {"old"}
    assert sources_of(meta, data)["old"].keys() == {"alpha", "dummy"}
    assert known["titles"] == {"dummy": "dummies"}


def test_without_replay_no_old_set_is_recorded(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    """As in the control of an experiment: the recipe names old sets, with the ratio 0."""
    control = ['data.train=["new"]', 'replay.sets=["old"]', "replay.ratio=0"]
    step = train(recipes.load(Recipe, tiny_recipe, control), data, tmp_path, stop_at=1)
    known = checkpoint.read_meta(step)["data"]
    assert (known["train"], known["replay"], known["replayed_per_epoch"]) == (["new"], [], 0)
    assert not (step / checkpoint.REPLAYED_FILE).exists()


def test_phase_2_without_phase_1_says_what_to_run(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipes.load(Recipe, tiny_recipe, ['run.init_from="phase1"'])
    with pytest.raises(checkpoint.CheckpointError, match=r"run `python train\.py --phase 1` first"):
        train(recipe, data, tmp_path)


def test_images_that_could_not_be_decoded_do_not_count(tiny_recipe: Path) -> None:
    """A batch with black, invalid rows changes the weights as the batch of its valid rows does."""
    recipe = recipes.load(Recipe, tiny_recipe, ["network.drop_path_rate=0", "optim.lr=1e-2"])
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    images[2:] = 0
    labels = torch.tensor([0, 1, 1, 1])
    moved = []
    for rows, valid in ((4, [True, True, False, False]), (2, [True, True])):
        torch.manual_seed(0)
        net = build(recipe.network, pretrained=False)
        optimizer = make_optimizer(net.backbone, recipe.optim, fused=False)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        train_state = TrainState(net, optimizer, scaler, torch.device("cpu"), torch.float32)
        batch = Batch(
            images[:rows],
            labels[:rows],
            torch.tensor(valid),
            np.arange(rows),
            np.zeros(rows, np.int32),
            np.zeros(rows),
            {},
        )
        loss = train_step(train_state, net, batch, recipe.optim)
        moved.append((loss, net.backbone.stem[0].weight.detach()))
    torch.testing.assert_close(moved[0], moved[1])


def test_a_missing_validation_set_is_reported_before_training(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipes.load(Recipe, tiny_recipe, ['data.validate=["vall"]'])
    with pytest.raises(ValueError, match=r"no shard set at .*vall"):
        train(recipe, data, tmp_path)
    assert not (tmp_path / "tiny").exists()


def test_a_loss_that_is_not_finite_stops_the_run(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipes.load(Recipe, tiny_recipe, ["network.std=[1e-30, 1e-30, 1e-30]"])
    with pytest.raises(ValueError, match=r"not finite at step 1 \(first samples: \w+_\w+"):
        train(recipe, data, tmp_path)


def test_ten_losses_never_change(
    tiny_recipe: Path, data: Path, tmp_path: Path, golden: Golden
) -> None:
    """Golden values: a change that should not alter numbers must not alter these losses."""
    recipe = recipes.load(Recipe, tiny_recipe, ["run.log_every=1"])
    best = train(recipe, data, tmp_path)
    losses = [round(loss, 6) for loss in losses_of(best.parent)]
    golden.check("losses_phase1", {"losses": losses}, rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --phase 1, --phase 2 or --recipe FILE"),
        (["--phase", "1", "--recipe", "x.toml"], "give --phase 1, --phase 2 or --recipe FILE"),
        (["--phase", "3"], "'3' is not one of '1', '2'"),
        (["--recipe", "none.toml"], "no recipe at none.toml"),
        (["--phase", "1", "--set", "optim.lrr=1"], "unknown key 'optim.lrr'"),
        (["--phase", "1", "--data", "nowhere"], "no shard set at nowhere/phase1"),
    ],
)
def test_mistakes_are_one_clear_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(command.main, arguments)
    assert result.exit_code != 0
    assert said in result.output
    assert "Traceback" not in result.output
