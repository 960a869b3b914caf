"""Bugs from the training code of other detectors, and the test here that would detect each.

| bug | test |
|---|---|
| the AMP scaler is never restored (a misspelled key) | test_the_scaler_state_is_restored_on_resume |
| without AMP there is no scaler, and `.scale()` crashes | tests/model/training/test_run.py::test_ten_losses_never_change |
| the schedule advances once per step and once more per epoch | test_one_step_of_the_schedule_per_optimizer_step |
| incomplete AMP: a scaler without autocast, or autocast around one block | test_autocast_is_on_around_the_whole_network, test_gradients_are_scaled |
| layer-wise rates are stored and never applied | tests/model/training/test_optim.py::test_after_warm_up_there_are_as_many_rates_as_groups, tests/model/training/test_optim.py::test_the_rates_are_used_by_the_step |
| an unreadable image becomes a black one labeled real | test_an_unreadable_image_is_never_a_black_real_one, test_an_unreadable_image_counts_nothing_whatever_replayed_ones_count, tests/model/training/test_run.py::test_images_that_could_not_be_decoded_do_not_count, tests/sharding/test_build.py::test_bad_files_are_quarantined_with_their_reason |
| a bad file is retried by recursion until the recursion limit | tests/pipeline/test_loader.py::test_a_whole_bad_batch_is_survived, tests/pipeline/test_loader.py::test_too_many_bad_images_stop_the_run |
| classes depend on the order of directories | tests/sharding/test_catalog.py::test_labels_come_from_whole_path_parts_and_never_from_their_order, tests/sharding/test_listing.py::test_cashbowman_has_doubled_folders_and_reversed_order |
| a dot in a file name breaks the reader | tests/sharding/test_write.py::test_any_file_name_is_stored_and_read_back |
| checkpoints are unpickled, which runs their code | test_nothing_is_unpickled, tests/model/test_checkpoint.py::test_the_state_is_read_without_running_code, tests/model/export/test_import_original.py::test_anything_else_is_refused |
| EXIF orientation is ignored | tests/imaging/test_decode.py::test_every_orientation_ends_upright, tests/pipeline/test_dali.py::test_both_decode_to_the_same_pixels |
| evaluation on several GPUs counts padding | tests/pipeline/test_order.py::test_evaluation_covers_every_sample_once_on_any_ranks |
| the README names missing files | tests/test_readme.py::test_python_commands_parse |
"""  # noqa: E501

import ast
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import recipes
from model import checkpoint
from model.distributed import DistEnv
from model.network import build
from model.recipe import Network, Optim, Recipe
from model.score import score_set
from model.tracking.history import rows_of
from model.training.optim import make_optimizer, schedule
from model.training.run import train
from model.training.step import TrainState, average_of, first_bad, train_step, wrap_ddp
from pipeline.batch import Batch
from pipeline.loader import open_loader
from pipeline.loading import Loading
from pipeline.replay import Replay
from pipeline.stream import Pool, Stream, evaluation_batches
from sharding.format import ShardSet
from tests.builders import BACKENDS, CPU, HARSH, PREPROCESS, ROOT, TINY, broken_copy
from tests.checkpoints import last_of
from tests.ranks import two_ranks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_the_table_names_existing_tests() -> None:
    named = re.findall(r"(?:([\w/]+\.py)::)?\b(test_\w+)\b(?!\.py)(?!/)", __doc__)
    assert len(named) > 20
    for file, name in named:
        text = (ROOT / file if file else Path(__file__)).read_text()
        assert f"def {name}(" in text, f"{file}::{name}"


def test_the_first_bad_step_is_that_of_the_rank_where_it_began() -> None:
    """The other ranks have it one step later, from the gradients."""
    assert first_bad([-1, -1]) is None
    assert first_bad([3, 2, -1]) == (2, 1)
    assert first_bad([-1, 0]) == (0, 1)


def test_the_scaler_state_is_restored_on_resume(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    """In fp16, including the count of steps since the last change of the scale."""
    recipe = recipes.load(Recipe, tiny_recipe, ["run.precision=fp16", "run.epochs=1"])
    train(recipe, data, tmp_path / "whole")
    train(recipe, data, tmp_path / "parts", stop_at=3)
    half = checkpoint.load_state(last_of(tmp_path / "parts/tiny"))["scaler"]
    assert (half["scale"], half["_growth_tracker"]) == (65536.0, 3)
    train(recipe, data, tmp_path / "parts")
    whole, parts = (
        checkpoint.load_state(last_of(tmp_path / name / "tiny"))["scaler"]
        for name in ("whole", "parts")
    )
    assert whole == parts
    assert parts["_growth_tracker"] == 5


def test_a_run_resumes_in_another_precision(
    tiny_recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a run of a CPU on a GPU without bf16, where the scaler has no saved state."""
    recipe = recipes.load(Recipe, tiny_recipe, [])
    train(recipe, data, tmp_path, stop_at=3)
    half = (torch.float16, "as on an old GPU")
    monkeypatch.setattr("model.training.plan.choose_precision", lambda *_: half)
    train(recipe, data, tmp_path, stop_at=6)
    saved = checkpoint.load_state(last_of(tmp_path / "tiny"))["scaler"]
    assert saved["_growth_tracker"] == 3


def test_one_step_of_the_schedule_per_optimizer_step(
    tiny_recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two epochs, with accumulation: each rate of the schedule is used exactly once."""
    used = []
    step = torch.optim.AdamW.step

    def noted(self, *arguments: object, **options: object):
        used.append(max(group["lr"] for group in self.param_groups))
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    recipe = recipes.load(Recipe, tiny_recipe, ["run.log_every=1", "run.grad_accum_steps=4"])
    train(recipe, data, tmp_path)
    wanted = [recipe.optim.lr * schedule(recipe.optim, step, 10) for step in range(10)]
    assert len(set(wanted)) == 10
    assert used == pytest.approx(wanted)
    logged = [row["lr"] for row in rows_of(tmp_path / "tiny") if row["kind"] == "train"]
    assert logged == pytest.approx(wanted)


def small_trainer(dtype: torch.dtype, scale: float = 1.0) -> TrainState:
    torch.manual_seed(0)
    net = build(TINY, pretrained=False)
    optimizer = make_optimizer(net.backbone, OPTIM, fused=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
    return TrainState(net, optimizer, scaler, CPU, dtype)


OPTIM = Optim(lr=1e-3, clip_grad_norm=1e9)


def small_batch() -> Batch:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8))
    labels, valid = torch.tensor([0, 1, 1, 0]), torch.ones(4, dtype=torch.bool)
    none = np.zeros(4, np.bool_)
    return Batch(images, labels, valid, np.arange(4), np.zeros(4, np.int32), none, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_is_on_around_the_whole_network(dtype: torch.dtype) -> None:
    """Every convolution and linear layer outputs the dtype, from the stem to the head, while
    weights and gradients stay float32.
    """
    train_state, seen = small_trainer(dtype), {}
    names = {module: name for name, module in train_state.net.named_modules()}

    def look(module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        seen[names[module]] = output.dtype

    for module in names:
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(look)
    train_step(train_state, train_state.net, small_batch(), OPTIM)
    assert {"backbone.stem.0", "backbone.head.fc"} <= seen.keys()
    assert set(seen.values()) == {dtype}
    for parameter in train_state.net.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("parts", [1, 2])
def test_a_replayed_image_counts_as_so_many_copies(parts: int) -> None:
    batch, order = small_batch(), [0, 1, 1, 1, 2, 3]
    weighed = replace(batch, replayed=np.array([False, True, False, False]))
    copied = replace(
        batch, images=batch.images[order], labels=batch.labels[order], valid=batch.valid[[0] * 6],
        samples=batch.samples[order], replayed=np.zeros(6, bool),
    )  # fmt: skip
    results = []
    for given, weight in ((weighed, 3.0), (copied, 1.0), (weighed, 1.0)):
        state = small_trainer(torch.float32)
        loss = train_step(
            state, state.net, given, OPTIM, grad_accum_steps=parts, replay_weight=weight
        )
        results.append([loss, *(parameter.grad for parameter in state.learning)])
    torch.testing.assert_close(results[0], results[1])
    assert abs(results[0][0] - results[2][0]) > 1e-3


def test_gradients_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are scaled in the backward pass and unscaled before clipping and the step."""
    inside, used = [], []
    clip = torch.nn.utils.clip_grad_norm_

    def clipping(parameters, most: float):
        parameters = list(parameters)
        used.append(parameters[-1].grad.clone())
        return clip(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipping)
    for scale in (1.0, 1024.0):
        train_state = small_trainer(torch.float32, scale)
        last = list(train_state.net.parameters())[-1]
        last.register_hook(lambda gradient: inside.append(gradient.clone()))
        train_step(train_state, train_state.net, small_batch(), OPTIM)
    torch.testing.assert_close(inside[1], 1024 * inside[0])
    torch.testing.assert_close(used[1], used[0])
    torch.testing.assert_close(used[0], inside[0])


def rank_1_dies_in_a_step(dist: DistEnv) -> None:
    state = replace(small_trainer(torch.float32, 1.0), dist=dist)
    forward = wrap_ddp(state)
    if not dist.is_main:
        state.net.register_forward_hook(lambda *_: os._exit(1))
    train_step(state, forward, small_batch(), OPTIM)


def test_a_rank_that_dies_in_a_step_ends_the_others_with_one_line() -> None:
    """The gradients are exchanged by torch's DDP, not by `model/distributed.py`."""
    first, _ = two_ranks(rank_1_dies_in_a_step)
    assert first == "RankError: another rank has ended or does not answer; see its message"


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_puts_the_network_in_training_mode_and_frozen_parts_in_evaluation_mode(
    frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step calls `net.train()` only if the mode is not right yet: it takes 3 ms for a ViT-B."""
    net = build(replace(TINY, freeze_backbone=frozen, drop_path_rate=0.0), pretrained=False)
    calls = []
    train_of = type(net).train
    monkeypatch.setattr(
        type(net), "train", lambda self, mode=True: (calls.append(mode), train_of(self, mode))[1]
    )
    optimizer = make_optimizer(net.backbone, OPTIM, fused=False)
    state = TrainState(
        net, optimizer, torch.amp.GradScaler("cpu", enabled=False), CPU, torch.float32
    )
    learning = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(parameter) for parameter in state.learning} == learning
    batch = small_batch()
    for before in (True, False):
        type(net).train(net, before)
        net.training = before
        calls.clear()
        for _ in range(2):
            train_step(state, net, batch, OPTIM)
            assert net.training is not frozen
        assert len(calls) == (before == frozen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unreadable_image_is_never_a_black_real_one(
    data: Path, old: ShardSet, tmp_path: Path, backend: str
) -> None:
    """In training its row keeps its label and is ignored; in evaluation it gets no score and is
    listed.
    """
    bad = [int(np.flatnonzero(old.column("label") == label)[0]) for label in (0, 1)]
    shards = broken_copy(data, tmp_path, bad, "all")
    loading = Loading(batch_size=8, backend=backend, num_workers=0)
    loader = open_loader(shards, preprocess=PREPROCESS, loading=loading, device=CPU)
    pool = Pool(shards, np.arange(len(shards)), np.empty(0, np.int64))
    stream = Stream(loader, pool, Replay(), {"train": HARSH, "dda": HARSH}, "train", 1)
    lost = {}
    for batch in stream.batches(0, 1):
        labels = shards.column("label")[batch.samples]
        assert batch.labels.tolist() == labels.tolist()
        black = (batch.images.amax(dim=(1, 2, 3)) == 0).numpy()
        assert not (black & batch.valid.numpy()).any()
        lost |= {int(batch.samples[row]): int(labels[row]) for row in np.flatnonzero(~batch.valid)}
    assert lost == dict(zip(bad, (0, 1), strict=True))
    scores = score_set(build(TINY, pretrained=False), loader)
    assert scores.failures.keys() == set(bad)
    assert not set(bad) & set(scores.samples.tolist())
    assert len(scores.samples) == len(shards) - len(bad)
    assert sum(int((~batch.valid).sum()) for batch in evaluation_batches(loader)) == len(bad)


OWN = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not {".venv", "tests"} & set(path.relative_to(ROOT).parts)
]


def unpicklers(text: str) -> list[str]:
    """Find calls in Python code that may execute code from a file."""
    calls = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        calls += [name] if re.search(r"(pickle|dill|joblib|shelve|marshal)\.\w*load", name) else []
        if name.endswith(("torch.load", "load_state_dict_from_url")):
            calls += [] if options.get("weights_only") == "True" else [name]
        calls += [name] if options.get("allow_pickle", "False") != "False" else []
        unsafe = name.endswith("yaml.load") or name in ("eval", "exec")
        calls += [name] if unsafe else []
    return calls


def test_nothing_is_unpickled() -> None:
    assert len(OWN) > 50
    assert {path.name: calls for path in OWN if (calls := unpicklers(path.read_text()))} == {}
    assert unpicklers("torch.load(p)\nnp.load(p, allow_pickle=True)\npickle.loads(b)") == [
        "torch.load", "np.load", "pickle.loads",
    ]  # fmt: skip
    assert unpicklers("torch.load(p, weights_only=False)") == ["torch.load"]


@pytest.mark.parametrize(("step", "share"), [(0, 0.9), (80, 0.1), (10_000, 0.01)])
def test_an_average_follows_the_first_steps(step: int, share: float) -> None:
    """With a decay of 0.99 from the first step on, a short run would be validated and saved with
    the weights that it began from.
    """
    state = small_trainer(torch.float32)
    state.ema = average_of(state.net)
    first = [parameter.clone() for parameter in state.net.parameters()]
    train_step(state, state.net, small_batch(), replace(OPTIM, ema_decay=0.99), step=step)
    for averaged, now, was in zip(
        state.ema.parameters(), state.net.parameters(), first, strict=True
    ):
        torch.testing.assert_close(averaged, was + share * (now - was), rtol=1e-6, atol=1e-7)


def test_an_average_has_the_statistics_of_the_batch_norms() -> None:
    """Validation normalizes with them: the first ones, 0 and 1, would fit no image."""
    net = build(Network(name="mobilenetv2_035", pretrained=False), pretrained=False)
    optimizer = make_optimizer(net.backbone, OPTIM, fused=False)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(net, optimizer, scaler, CPU, torch.float32, ema=average_of(net))
    before = net.backbone.bn1.running_mean.clone()
    train_step(state, net, small_batch(), replace(OPTIM, ema_decay=0.9), step=5)
    assert not torch.equal(net.backbone.bn1.running_mean, before)
    for (name, averaged), (_, buffer) in zip(
        state.ema.named_buffers(), net.named_buffers(), strict=True
    ):
        assert torch.equal(averaged, buffer), name


@pytest.mark.parametrize(("weight", "distill"), [(3.0, 0.0), (1.0, 0.5)])
def test_an_unreadable_image_counts_nothing_whatever_replayed_ones_count(
    weight: float, distill: float
) -> None:
    """Its pixels and label change neither the loss nor the distance to the teacher."""
    batch = replace(
        small_batch(), valid=torch.tensor([True, True, False, True]),
        replayed=np.array([False, True, True, False]),
    )  # fmt: skip
    images, labels = batch.images.clone(), batch.labels.clone()
    images[2], labels[2] = 0, 0
    results = []
    for given in (batch, replace(batch, images=images, labels=labels)):
        state = small_trainer(torch.float32)
        torch.manual_seed(1)
        state.teacher = build(TINY, pretrained=False).eval()
        torch.manual_seed(2)  # of the drop path
        loss = train_step(
            state, state.net, given, OPTIM, replay_weight=weight, distill_weight=distill
        )
        results.append([loss, *(parameter.grad for parameter in state.learning)])
    torch.testing.assert_close(results[0], results[1])
