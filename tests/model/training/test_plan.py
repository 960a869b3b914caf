"""Planning a run: its decisions, and all refusals, before anything is built or written."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import recipes
from model import checkpoint
from model.backbones.pretrained import NetworkError
from model.checkpoint import DamagedError
from model.distributed import DistEnv
from model.network import build
from model.recipe import Recipe
from model.training import assemble as assembling
from model.training.optim import OptimError
from model.training.plan import Weights, plan
from model.training.run import train
from pipeline.loader import LoadError
from pipeline.order import OrderError
from sharding.format import ShardError, content_sha256
from storage import sha256_of
from tests.builders import PREPROCESS, TINY, TINY_RECIPE, small_recipe
from tests.checkpoints import last_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Load = Callable[..., Recipe]

SAVED_TWICE = ["run.epochs=1", "run.save_every=1"]
"""Settings of the run in `saved_twice`."""

DISTILLED = ['replay.sets=["new"]', "replay.ratio=1:8", "replay.distill_weight=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Return a runs folder with a checkpoint of the run `first`, of the tiny recipe's network."""
    runs = tmp_path_factory.mktemp("runs")
    options = {"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16], "patch_size": 2}
    network = replace(TINY, name="convnextv2_atto", options=options)
    seen = {"train": ["old"], "set_sha256": {"old": "a"}}
    checkpoint.save(
        runs / "first" / "step_0000003",
        build(network, pretrained=False),
        recipe=small_recipe("first", network, PREPROCESS),
        state=None,
        record=checkpoint.Record(step=3, epoch=1, metrics={}, selection=0.5, data=seen),
    )
    return runs


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Return the folder of a run that stopped at step 3, with the checkpoint of step 2 kept."""
    runs = tmp_path_factory.mktemp("saved_twice")
    recipe = recipes.load(Recipe, TINY_RECIPE, SAVED_TWICE)
    train(recipe, data, runs, stop_at=2)
    older = shutil.copytree(runs / "tiny/step_0000002", runs / "older")
    train(recipe, data, runs, stop_at=3)
    older.rename(runs / "tiny/step_0000002")
    return runs / "tiny"


def files_below(*folders: Path) -> dict[Path, int]:
    """Map every file and folder to the time of its last change."""
    return {p: p.stat().st_mtime_ns for folder in folders for p in [folder, *folder.rglob("*")]}


def test_a_new_run(load: Load, data: Path, tmp_path: Path) -> None:
    planned = plan(load(), data, tmp_path / "runs")
    assert planned.folder == tmp_path / "runs/tiny"
    assert (planned.resumed, planned.done, planned.best, planned.baseline) == (None, 0, None, None)
    assert (planned.steps, planned.steps_per_epoch, planned.finished) == (10, 5, False)
    assert planned.weights == Weights(kind="random")
    assert planned.teacher is None
    assert list(planned.validation) == ["val"]
    assert planned.dtype == torch.float32
    said = "\n".join(planned.describe())
    assert "fp32 on cpu (no mixed precision on cpu)" in said
    assert "per epoch 80 new samples (40 real, 40 fake) and 0 old ones" in said
    assert "10 steps of 16" in said
    assert "torch.compile off (auto uses it on GPUs only)" in said


def test_parameters_and_rates_are_those_of_the_network_that_is_built(
    load: Load, data: Path, tmp_path: Path
) -> None:
    recipe = load("optim.layer_decay_groups=block", "optim.layer_decay=0.5")
    planned = plan(recipe, data, tmp_path)
    train_state = assembling.assemble(planned)
    assert planned.parameters == sum(p.numel() for p in train_state.net.parameters())
    rates = {group["base_lr"] for group in train_state.optimizer.param_groups}
    assert planned.learning_rates == tuple(sorted(rates))
    assert len(rates) > 2


def test_a_resumed_run_and_a_finished_one(load: Load, data: Path, tmp_path: Path) -> None:
    train(load(), data, tmp_path, stop_at=7)
    planned = plan(load(), data, tmp_path)
    assert planned.resumed == tmp_path / "tiny/step_0000007"
    assert (planned.done, planned.finished) == (7, False)
    assert planned.weights.path == planned.resumed
    assert planned.weights.sha256 == sha256_of(planned.resumed / "weights.safetensors")
    assert planned.describe()[0] == f"resuming from {planned.resumed}"
    # The end of the first epoch was validated; step 7 was not.
    assert planned.best.path == tmp_path / "tiny/step_0000005"
    assert list(planned.best.validation.sets) == ["val"]
    best = train(load(), data, tmp_path)
    planned = plan(load(), data, tmp_path)
    assert planned.finished
    assert planned.best.path == best


def test_distillation_without_replay_has_no_teacher(load: Load, data: Path, trained: Path) -> None:
    unused = ("replay.distill_weight=1", "replay.weight=2")
    planned = plan(load('run.init_from="first"', *unused), data, trained)
    assert planned.teacher is None
    for key in ("distill_weight", "weight"):
        assert any(f"replay.{key} is not used" in line for line in planned.warnings)


def test_a_plan_does_not_touch_the_disk(load: Load, data: Path, trained: Path) -> None:
    before = files_below(data, trained)
    recipe = load('run.init_from="first"', *DISTILLED)
    planned = plan(recipe, data, trained)
    assert planned.baseline == trained / "tiny/baseline_metrics.json"
    assert files_below(data, trained) == before


def test_a_plan_does_not_use_torchs_random_generator(
    load: Load, data: Path, tmp_path: Path
) -> None:
    """`assemble` seeds the generator; two plans in a row must give one network."""
    weights = []
    for _ in range(2):
        net = assembling.assemble(plan(load(), data, tmp_path)).net
        weights.append(net.backbone.stem[0].weight)
    assert torch.equal(*weights)


def test_the_first_weights(load: Load, data: Path, trained: Path, tmp_path: Path) -> None:
    """The recipe's run, unless `init_from` names a checkpoint or an ImageNet file."""
    first = trained / "first/step_0000003"
    digest = sha256_of(first / "weights.safetensors")
    trained_weights = Weights(kind="checkpoint", path=first, sha256=digest)
    named = load('run.init_from="first"')
    assert plan(named, data, trained).weights == trained_weights
    planned = plan(load(), data, tmp_path, init_from=first)
    assert planned.weights == trained_weights
    assert planned.baseline == tmp_path / "tiny/baseline_metrics.json"
    assert f"weights from {first}" in planned.describe()
    file = tmp_path / "imagenet.safetensors"
    shutil.copy(first / "weights.safetensors", file)
    for start, of_timm in ((None, False), (first, False), (file, True)):
        said = "\n".join(plan(load(), data, tmp_path, init_from=start).describe())
        assert ("its weights were trained on" in said) == of_timm
    planned = plan(named, data, trained, init_from=file)
    assert planned.weights == Weights(kind="file", path=file, sha256=digest)
    assert planned.baseline is None


def test_a_run_folder_as_first_weights_means_its_best_checkpoint(
    load: Load, data: Path, trained: Path, tmp_path: Path
) -> None:
    planned = plan(load(), data, tmp_path, init_from=trained / "first")
    assert planned.weights.path == trained / "first/step_0000003"


@pytest.mark.parametrize(
    ("run", "advice"),
    [("phase1", "train.py --phase 1` first"), ("mine", "; train that run first"),
     ("clip-phase1", "the same --runs: the command is in /.*/recipes/clip-phase1.toml, or name")],
)  # fmt: skip
def test_a_missing_first_run_is_named_with_its_command(
    load: Load, data: Path, tmp_path: Path, run: str, advice: str
) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=advice):
        plan(load(f'run.init_from="{run}"'), data, tmp_path)


def test_the_teacher_of_a_resumed_run_is_still_its_start(
    load: Load, data: Path, trained: Path, tmp_path: Path
) -> None:
    runs = shutil.copytree(trained, tmp_path / "runs")
    recipe = load('run.init_from="first"', *DISTILLED)
    assert plan(recipe, data, runs).teacher.path == runs / "first/step_0000003"
    train(recipe, data, runs, stop_at=1)
    planned = plan(recipe, data, runs)
    assert planned.weights.path == runs / "tiny/step_0000001"
    assert planned.teacher.path == runs / "first/step_0000003"
    shutil.rmtree(runs / "first")
    with pytest.raises(checkpoint.CheckpointError, match="starts from the best checkpoint of"):
        plan(recipe, data, runs)


def test_settings_without_effect_on_results_may_change_on_resume(
    load: Load, data: Path, tmp_path: Path
) -> None:
    train(load(), data, tmp_path, stop_at=1)
    other = load(
        "loading.num_workers=1", 'loading.cache="elsewhere"', "loading.cache_gb=1",
        "run.log_every=7", "run.save_every=3",
    )  # fmt: skip
    assert plan(other, data, tmp_path).done == 1
    with pytest.raises(ValueError, match=r"another recipe \(run\.seed"):
        plan(load("run.seed=1"), data, tmp_path)


def test_without_distillation_a_resumed_run_does_not_need_its_start(
    load: Load, data: Path, trained: Path, tmp_path: Path
) -> None:
    runs = shutil.copytree(trained, tmp_path / "runs")
    train(load('run.init_from="first"'), data, runs, stop_at=1)
    shutil.rmtree(runs / "first")
    assert plan(load('run.init_from="first"'), data, runs).done == 1


@pytest.mark.parametrize(
    "changes",
    [['data.train=["old", "exam"]'], ['replay.sets=["exam"]', "replay.ratio=1:8"]],
    ids=["data.train", "replay.sets"],
)
def test_a_test_set_is_not_trained_on(
    load: Load, data: Path, tmp_path: Path, changes: list[str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(data / "new", tmp_path / "data" / "exam")
    path = tmp_path / "data" / "exam" / "index.json"
    index = json.loads(path.read_text()) | {"split": "test"}
    path.write_text(json.dumps(index | {"content_sha256": content_sha256(index)}))
    with pytest.raises(ValueError, match=r"names exam, of the split test: .* split = \"train\""):
        plan(load(*changes), tmp_path / "data", tmp_path / "runs")


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (['data.train=["odl"]'], ShardError, "no shard set at .*odl; .* has the sets new, old"),
        (["data.train=[]"], ValueError, "data.train names no set"),
        (['data.validate=["vall"]'], ShardError, "no shard set at .*vall"),
        (["data.validate=[]"], ValueError, "data.validate names no set"),
        (['data.validate=["val", "val"]'], ValueError, "names val more than once"),
        (['data.train=["old", "./old"]'], ValueError, "data.train names old more than once"),
        (['replay.sets=["old", "old/"]'], ValueError, "replay.sets names old more than once"),
        (["data.repeats.alhpa=2"], LoadError, "repeats names source alhpa; the sources of the new"),
        (
            ['data.train=["new"]', 'replay.sets=["old"]', "replay.ratio=1:8",
             "data.repeats.beta=5"],
            LoadError, "repeats names source beta; the sources of the new samples are gamma",
        ),
        (['data.policy="tarin"'], LoadError, "augmented by policy 'tarin', but the recipe"),
        (
            ['data.train=["new"]', 'replay.sets=["old"]', "replay.ratio=1:8",
             'replay.exclude_sources=["gamma"]'],
            ValueError, "exclude_sources names source gamma; the sets of replay.sets hold alpha",
        ),
        (
            ['data.train=["new"]', 'replay.sets=["old"]', "replay.ratio=1:8",
             'replay.exclude_sources=["alpha", "beta", "dummy"]'],
            ValueError, "there is no old sample to choose",
        ),
        (["loading.batch_size=81"], OrderError, "80 training samples do not fill one batch of 81"),
        (['run.init_from="none"'], checkpoint.CheckpointError, "starts from the best checkpoint"),
        ([*DISTILLED], ValueError, "needs a run that starts from a trained"),
        (['network.name="convnextv9"'], NetworkError, "timm cannot build 'convnextv9'"),
        (["network.options.dept=[1]"], NetworkError, "timm cannot build"),
        (
            ['network.name="mobilenetv2_035"', "network.options={}",
             "optim.layer_decay_groups=stage12", "optim.layer_decay=0.5"],
            OptimError, "layer_decay_groups stage12 has no layer for",
        ),
    ],
)  # fmt: skip
def test_recipes_that_cannot_run_are_refused(
    load: Load, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    changes: list[str], error: type[ValueError], said: str,
) -> None:  # fmt: skip
    """`train` itself refuses them before it builds or writes anything."""
    monkeypatch.setattr("model.training.run.assemble", lambda _plan: pytest.fail("assembled"))
    with pytest.raises(error, match=said):
        train(load(*changes), data, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_validation_set_that_is_damaged_is_refused(
    load: Load, data: Path, tmp_path: Path
) -> None:
    shards = shutil.copytree(data, tmp_path / "shards")
    with (shards / "val/samples.parquet").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ShardError, match=r"val/samples.parquet has sha256"):
        plan(load(), shards, tmp_path)


def test_a_device_or_backend_that_is_not_there_is_refused(
    load: Load, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no such device: gpu"):
        plan(load(), data, tmp_path, device="gpu")
    monkeypatch.setattr("pipeline.loader._is_installed", lambda _module: False)
    with pytest.raises(LoadError, match=r"backend dali: .* is not installed"):
        plan(load("loading.backend=dali"), data, tmp_path)


def test_weights_that_do_not_fit_are_refused(
    load: Load, data: Path, trained: Path, tmp_path: Path
) -> None:
    wider = "network.options.dims=[8, 8, 16, 24]"
    first = trained / "first/step_0000003"
    with pytest.raises(
        NetworkError, match=r"weights in .*step_0000003 do not fit: size mismatch for .* more\)"
    ) as refused:
        plan(load(wider), data, tmp_path, init_from=first)
    assert "\n" not in str(refused.value)
    file = tmp_path / "imagenet.safetensors"
    shutil.copy(first / "weights.safetensors", file)
    with pytest.raises(NetworkError, match=r"does not fit the network: 0 parameters are missing"):
        plan(load(wider), data, tmp_path, init_from=file)
    save_file({"stem.0.weight": torch.zeros(8, 3, 2, 2)}, file)
    with pytest.raises(NetworkError, match=r"parameters are missing \(first: \['stem.0.bias"):
        plan(load(), data, tmp_path, init_from=file)
    file.write_bytes(b"<html>404</html>")
    with pytest.raises(NetworkError, match=r"is no readable \.safetensors file"):
        plan(load(), data, tmp_path, init_from=file)


def test_a_start_that_is_no_checkpoint_is_refused(
    load: Load, data: Path, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=r"is no checkpoint \(it has no meta"):
        plan(load(), data, tmp_path, init_from=tmp_path)
    first = shutil.copytree(trained / "first/step_0000003", tmp_path / "first")
    checkpoint.annotate(first, {"format_version": 0})
    with pytest.raises(checkpoint.CheckpointError, match="has checkpoint version 0"):
        plan(load(), data, tmp_path, init_from=first)


def test_a_damaged_teacher_is_refused(
    load: Load, data: Path, trained: Path, tmp_path: Path
) -> None:
    """Also if the run resumes from its own weights."""
    runs = shutil.copytree(trained, tmp_path / "runs")
    recipe = load('run.init_from="first"', *DISTILLED)
    train(recipe, data, runs, stop_at=1)
    (runs / "first/step_0000003/weights.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(DamagedError, match=r"first/step_0000003/weights\.safetensors is damaged"):
        plan(recipe, data, runs)


def test_unavailable_pretrained_weights_are_refused(
    load: Load, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    named = ['network.name="convnextv2_atto.fcmae_ft_in1k"', "network.pretrained=true"]
    with pytest.raises(NetworkError, match=r"could not be fetched .*--no-pretrained"):
        plan(load(*named), data, tmp_path)


def test_a_run_of_another_recipe_order_or_without_state_is_refused(
    load: Load, data: Path, tmp_path: Path
) -> None:
    train(load(), data, tmp_path, stop_at=2)
    with pytest.raises(ValueError, match=r"another recipe \(optim\.lr was 0\.0002, now 0\.001; 1"):
        plan(load("optim.lr=1e-3"), data, tmp_path)
    with pytest.raises(OrderError, match="global_batch"):
        plan(load(), data, tmp_path, dist=DistEnv(0, 2, 0))
    state = tmp_path / "tiny/step_0000002/state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(checkpoint.CheckpointError, match=r"state\.pt is damaged.*--run NAME"):
        plan(load(), data, tmp_path)
    state.unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"has no state\.pt.*--run NAME"):
        plan(load(), data, tmp_path)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt", "meta.json"])
def test_a_damaged_last_checkpoint_is_reported_and_the_previous_one_resumes(
    saved_twice: Path, data: Path, tmp_path: Path, name: str, logged: list[str]
) -> None:
    recipe = recipes.load(Recipe, TINY_RECIPE, SAVED_TWICE)
    older = shutil.copytree(saved_twice, tmp_path / "tiny") / "step_0000002"
    path = tmp_path / "tiny/step_0000003" / name
    data_of = bytearray(path.read_bytes())
    data_of[len(data_of) // 2] ^= 1
    path.write_bytes(data_of)
    planned = plan(recipe, data, tmp_path)
    assert planned.resumed == older and planned.done == 2
    assert planned.best.path == older
    logged.clear()
    train(recipe, data, tmp_path, stop_at=4)
    assert f"{path} is damaged" in logged[0] and "does not resume from it" in logged[0]
    assert f"resuming from {older}" in logged
    assert last_of(tmp_path / "tiny").name == "step_0000004"


def test_a_checkpoint_without_its_state_is_not_resumed_from(
    saved_twice: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipes.load(Recipe, TINY_RECIPE, SAVED_TWICE)
    older = shutil.copytree(saved_twice, tmp_path / "tiny") / "step_0000002"
    last = tmp_path / "tiny/step_0000003"
    checkpoint.annotate(last, {"selection": 1.0})
    (last / "state.pt").unlink()
    planned = plan(recipe, data, tmp_path)
    assert planned.resumed == older
    assert planned.damaged == (f"{last} has no state.pt",)
    assert planned.best.path == last  # it may be the best that the run has, so it is kept


def test_the_first_weights_are_described_and_recorded(
    load: Load, data: Path, trained: Path, tmp_path: Path
) -> None:
    first = trained / "first/step_0000003"
    digest = sha256_of(first / "weights.safetensors")
    runs = shutil.copytree(trained, tmp_path / "runs")
    assert "first weights: random, not pretrained" in plan(load(), data, runs).describe()
    recipe = load("run.epochs=1")
    train(recipe, data, runs, init_from=first, stop_at=1)
    planned = plan(recipe, data, runs, init_from=first)  # the same command goes on
    assert planned.done == 1
    said = f"first weights: checkpoint first/step_0000003 (sha256 {digest[:12]})"
    assert said in planned.describe()
    kept = checkpoint.read_meta(planned.resumed)["first_weights"]
    assert (kept["kind"], kept["name"]) == ("checkpoint", "first/step_0000003")
    assert (kept["sha256"], kept["sets"]) == (digest, {"a": "old"})
    assert str(tmp_path) not in json.dumps(kept)
    file = tmp_path / "imagenet.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"began from other weights than .*imagenet.safetensors: "):
        plan(recipe, data, runs, init_from=file)


def test_the_license_of_timms_weights_is_recorded(
    load: Load, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.training.plan.check_pretrained", lambda _network: None)
    named = ['network.name="convnextv2_atto.fcmae_ft_in1k"', "network.pretrained=true"]
    kept = plan(load(*named), data, tmp_path).first_weights
    assert (kept["kind"], kept["license"]) == ("timm", "cc-by-nc-4.0")


def test_a_frozen_backbone_of_random_weights_is_refused(
    load: Load, data: Path, trained: Path, tmp_path: Path
) -> None:
    frozen = load("network.freeze_backbone=true")
    with pytest.raises(
        ValueError, match=r"freeze_backbone .*random weights: give weights with --ini"
    ):
        plan(frozen, data, tmp_path)
    assert plan(frozen, data, tmp_path, init_from=trained / "first/step_0000003")


def test_sets_that_share_images_are_refused(load: Load, data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"80 of 80 images of validation set old are also in the train"
    ):
        plan(load('data.validate=["val", "old"]'), data, tmp_path)
    assert plan(load('data.validate=["old"]', "data.allow_shared_images=true"), data, tmp_path)


@pytest.fixture
def copied(data: Path, tmp_path: Path) -> Path:
    return shutil.copytree(data, tmp_path / "copied")


@pytest.mark.parametrize("name", ["old", "val"])
def test_a_tar_that_is_gone_or_cut_is_refused_at_opening(
    load: Load, copied: Path, tmp_path: Path, name: str
) -> None:
    tar = next((copied / name).glob("*.tar"))
    with tar.open("r+b") as stream:
        stream.truncate(10_000)
    with pytest.raises(LoadError, match=rf"{tar.name} has 10,000 bytes, its index says \d"):
        plan(load(), copied, tmp_path)
    tar.unlink()
    with pytest.raises(LoadError, match=rf"{tar.name} is gone.*build or copy the set again"):
        plan(load(), copied, tmp_path)


def test_one_class_is_refused_unless_allowed(load: Load, data: Path, tmp_path: Path) -> None:
    only = ["data.repeats.alpha=0", "data.repeats.beta=0", "loading.batch_size=8"]
    with pytest.raises(ValueError, match=r"all training samples are fake.*allow_one_class=true"):
        plan(load(*only), data, tmp_path)
    assert plan(load(*only, "data.allow_one_class=true"), data, tmp_path).steps


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/", ".x", "a/step_0000001", "", "a\nb"])
def test_bad_run_names_are_refused(load: Load, name: str) -> None:
    with pytest.raises(recipes.RecipeError, match="a run cannot be called"):
        load(f"name={json.dumps(name)}")
