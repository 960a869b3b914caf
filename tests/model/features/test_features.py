"""Feature store: heads equal to those from pixels, resuming, ranks, damage, refusals."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import recipes
from model import checkpoint
from model.__main__ import main as command
from model.features import embed as embedding
from model.features.embed import Embedder, embed, embed_sets
from model.features.loader import FeatureLoader, FeatureSource
from model.features.store import (
    FeatureError,
    View,
    backbone_id,
    files_of,
    is_there,
    missing_of,
    open_table,
    read_file,
)
from model.network import Detector, build
from model.recipe import Features, Network, Recipe
from model.training import assemble
from model.training.assemble import views_of
from model.training.plan import plan
from model.training.run import train
from pipeline.augment import AugmentPolicy
from pipeline.loader import LoadError
from pipeline.loading import Loading
from pipeline.read import _Files
from pipeline.stream import evaluation_batches
from sharding.format import ShardSet, open_shards
from tests.builders import HARSH, ROOT, SMALL_PREPROCESS, TINY, broken_copy, build_all, losses_of

CPU = torch.device("cpu")
FROZEN = replace(TINY, freeze_backbone=True, head="stages")
AUGMENT = {"train": HARSH, "dda": AugmentPolicy()}


@pytest.fixture(scope="module")
def net() -> Detector:
    torch.manual_seed(11)
    return build(FROZEN, pretrained=False).eval()


@pytest.fixture(scope="module")
def weights(net: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    state = net.backbone.state_dict()
    save_file({n: w.contiguous() for n, w in state.items() if "stage_head" not in n}, path)
    return path


def source_in(store: Path, net: Detector, network: Network = FROZEN) -> FeatureSource:
    identity = backbone_id(net, network, SMALL_PREPROCESS, torch.float32)
    return FeatureSource(
        store=store, backbone=identity, view=View(augment=AUGMENT, policy="train", seed=5)
    )


def embedder(net: Detector, rank: int = 0, world_size: int = 1, batch: int = 7) -> Embedder:
    loading = Loading(batch_size=batch, num_workers=0, backend="pil")
    return Embedder(
        net=net, device=CPU, dtype=torch.float32, loading=loading, rank=rank, world_size=world_size
    )


def arrow_files(store: Path) -> list[Path]:
    return sorted(store.glob("*/*/*/*.arrow"))


def settings(*more: str) -> list[str]:
    return [
        "network.freeze_backbone=true", 'network.head="stages"', "network.drop_path_rate=0.0",
        "optim.lr=0.02", "run.epochs=3", "run.log_every=1", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("views", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_head_from_stored_features_equals_one_from_pixels(
    views: int, tiny_recipe: Path, data: Path, weights: Path, tmp_path: Path
) -> None:
    """The same views in the same order: phase 1, then phase 2 with replayed samples."""
    ends = {}
    for stored in ("true", "false"):
        runs = tmp_path / stored
        features = [
            f"features.views={views}", f"features.stored={stored}",
            f'features.store="{tmp_path / "store"}"', "run.epochs=2",
        ]  # fmt: skip
        first = recipes.load(Recipe, tiny_recipe, settings(*features))
        start = train(first, data, runs, init_from=weights)
        second = replace(
            first,
            name="tiny2",
            data=replace(first.data, train=["new"]),
            replay=replace(first.replay, sets=["old"], ratio="1:2"),
        )
        best = train(second, data, runs, init_from=start)
        losses = losses_of(runs / "tiny2")
        head = load_file(checkpoint.checkpoints_of(runs / "tiny2")[-1] / "weights.safetensors")
        meta = checkpoint.read_meta(best)
        ends[stored] = losses, head["stage_head.fc.weight"].numpy(), meta
    (losses, head, meta), (losses_px, head_px, meta_px) = ends["true"], ends["false"]
    assert len(losses) > 3
    np.testing.assert_allclose(losses, losses_px, atol=2e-3)
    np.testing.assert_allclose(head, head_px, atol=2e-3)
    assert np.abs(head).max() > 0.02  # the head has learned
    assert meta["step"] == meta_px["step"]
    figures = [m["metrics"]["sets"]["val"]["nll"] for m in (meta, meta_px)]
    assert figures[0] == pytest.approx(figures[1], abs=2e-3)


def test_views_equal_the_augmentation_of_training_from_pixels(
    net: Detector, data: Path, tmp_path: Path
) -> None:
    """Views 1 and 2 differ from view 0 and from each other, and every subset has the same ones."""
    shards = open_shards([data / "new", data / "old"])
    source = source_in(tmp_path, net)
    for number in (0, 1, 2):
        assert embed_sets(embedder(net), [shards], source, number) == len(shards)
    tables = [
        open_table(source.store, source.backbone, shards, source.numbered(n)) for n in (0, 1, 2)
    ]
    everything = np.arange(len(shards))
    center, one, two = (table.rows(everything).astype(np.float32) for table in tables)
    assert np.abs(center - one).mean() > 0.01
    assert np.abs(one - two).mean() > 0.01
    turned = open_shards([data / "old", data / "new"])
    apart = open_table(source.store, source.backbone, turned, source.numbered(1))
    count = len(open_shards([data / "new"]))
    np.testing.assert_array_equal(
        apart.rows(np.arange(len(shards))), np.roll(one, -count, axis=0).astype(np.float16)
    )
    picked = shards.take(np.array([9, 2, 30, 2]))
    some = open_table(source.store, source.backbone, picked, source.numbered(1))
    np.testing.assert_array_equal(some.rows(np.arange(4)), one[[9, 2, 30, 2]].astype(np.float16))


@pytest.mark.parametrize("batch", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 64))])
def test_files_do_not_depend_on_the_batch_or_the_ranks(
    batch: int, net: Detector, old: ShardSet, tmp_path: Path
) -> None:
    one, counted, counts = source_in(tmp_path / "one", net), list[int](), list[int]()
    embed_sets(embedder(net), [old], one, 1)
    many = source_in(tmp_path / "many", net)
    for r in range(3):
        files = missing_of(many.store, many.backbone, old, many.numbered(1), rank=r, world_size=3)
        counts.append(embed(embedder(net, r, 3, batch), old, many, 1, files, counted.append))
    assert sum(counts) == sum(counted) == len(old)
    assert min(counts) < len(old)
    table, other = (
        open_table(s.store, s.backbone, old, s.numbered(1)).rows(np.arange(len(old)))
        for s in (one, many)
    )
    np.testing.assert_allclose(table.astype(float), other.astype(float), atol=2e-3)
    first, second = arrow_files(tmp_path / "one"), arrow_files(tmp_path / "many")
    assert [f.name for f in first] == [f.name for f in second]


def test_an_interrupted_run_resumes_at_the_next_shard(
    net: Detector, old: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_in(tmp_path, net)
    whole = source_in(tmp_path / "whole", net)
    embed_sets(embedder(net), [old], whole, 0)
    real, written = embedding.write_file, []

    def dies_at_the_second(*arguments: object) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(real(*arguments))

    monkeypatch.setattr(embedding, "write_file", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        embed_sets(embedder(net), [old], source, 0)
    monkeypatch.setattr(embedding, "write_file", real)
    assert len(arrow_files(tmp_path)) == 1
    first = {path: path.stat().st_mtime_ns for path in arrow_files(tmp_path)}
    rest = embed_sets(embedder(net), [old], source, 0)
    assert 0 < rest < len(old)
    assert all(path.stat().st_mtime_ns == changed for path, changed in first.items())
    for file, other in zip(
        files_of(source.store, source.backbone, old, View()),
        files_of(whole.store, whole.backbone, old, View()),
        strict=True,
    ):
        assert file.path.read_bytes() == other.path.read_bytes()
    assert embed_sets(embedder(net), [old], source, 0) == 0  # nothing is missing


def test_other_weights_settings_or_shards_are_computed_anew(
    net: Detector, old: ShardSet, tmp_path: Path
) -> None:
    source = source_in(tmp_path, net)
    embed_sets(embedder(net), [old], source, 1)
    all_files = len(files_of(source.store, source.backbone, old, source.numbered(1)))

    def missing(source: FeatureSource, shards: ShardSet = old, number: int = 1) -> int:
        return len(missing_of(source.store, source.backbone, shards, source.numbered(number)))

    assert missing(source) == 0
    assert missing(source, number=2) == all_files
    assert missing(replace(source, view=replace(source.view, seed=6))) == all_files
    of_one = missing(replace(source, view=replace(source.view, policy="dda")))
    assert 0 < of_one < all_files  # the index names `dda` for source beta
    for name, count in (("unused", 0), ("dda", all_files - of_one)):
        augment = AUGMENT | {name: replace(HARSH, hflip=0.9)}
        assert missing(replace(source, view=replace(source.view, augment=augment))) == count
    crop = replace(source.backbone, preprocess=replace(SMALL_PREPROCESS, resize_size=40))
    assert missing(replace(source, backbone=crop)) == all_files
    assert missing(replace(source, backbone=replace(source.backbone, precision="bf16"))) > 0
    other = build(FROZEN, pretrained=False)
    assert missing(source_in(tmp_path, other)) == all_files
    learned = build(FROZEN, pretrained=False)
    learned.load_state_dict(net.state_dict())
    torch.nn.init.normal_(learned.backbone.stage_head.fc.weight)
    assert missing(source_in(tmp_path, learned)) == 0  # the head is not part of the identity
    changed = ("0" * 64, *old.shard_sha256[1:])
    assert missing(source, replace(old, shard_sha256=changed)) == 1


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped id", "not arrow"])
def test_a_damaged_file_is_computed_anew(
    damage: str, net: Detector, old: ShardSet, tmp_path: Path
) -> None:
    source = source_in(tmp_path, net)
    embed_sets(embedder(net), [old], source, 0)
    victim = arrow_files(tmp_path)[0]
    whole = victim.read_bytes()
    victim.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "emptied": b"",
            "flipped id": whole.replace(b'"view": 0', b'"view": 7'),
            "not arrow": b"x" * len(whole),
        }[damage]
    )
    with pytest.raises(FeatureError, match=r"arrow is missing or has other features.*embed"):
        open_table(source.store, source.backbone, old, View())
    assert embed_sets(embedder(net), [old], source, 0) > 0
    assert victim.read_bytes() == whole


def test_images_that_cannot_be_decoded_are_left_out(
    net: Detector, data: Path, tmp_path: Path
) -> None:
    shards = broken_copy(data, tmp_path, [0, 3], "all")
    source = source_in(tmp_path / "store", net)
    embed_sets(embedder(net), [shards], source, 0)
    loader = FeatureLoader(shards, source, Loading(batch_size=9), CPU)
    table = loader.table(0)
    assert not table.rows(np.array([0, 3])).any()
    failures = table.failures(np.arange(len(shards)))
    assert list(failures) == [0, 3]
    batches = list(evaluation_batches(loader))
    valid = np.concatenate([batch.valid.numpy() for batch in batches])
    assert not valid[[0, 3]].any()
    assert len(valid) > len(shards) and valid.sum() == len(shards) - 2
    named = [line for batch in batches for line in loader.name_failures(batch)]
    assert len(named) == 2  # padding repeats sample 0 and is not named again
    assert shards.text("key", 3) in named[1]


def test_a_disk_that_fails_loses_no_image(
    net: Detector, old: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that cannot be read now may be read later, so its shard is not stored without it."""
    source, read = source_in(tmp_path, net), _Files.read
    lost = int(old.column("offset")[5])

    def failing(files: _Files, code: int, offset: int, size: int) -> bytes:
        if (code, offset) == (old.column("shard_code")[5], lost):
            raise PermissionError(13, "token expired")
        return read(files, code, offset, size)

    with monkeypatch.context() as patched, pytest.raises(LoadError) as caught:
        patched.setattr(_Files, "read", failing)
        embed_sets(embedder(net), [old], source, 0)
    assert f"{old.name(5)} cannot be read: [Errno 13] token expired; nothing of" in str(
        caught.value
    )
    embed_sets(embedder(net), [old], source, 0)
    table = open_table(source.store, source.backbone, old, source.numbered(0))
    assert not table.failures(np.arange(len(old)))


def test_two_sets_of_one_name_keep_their_features(
    net: Detector, old: ShardSet, raw: Path, tmp_path: Path
) -> None:
    """Two data folders share the default store; both have a set `old`, of other images."""
    shutil.copytree(raw, tmp_path / "raw")
    (tmp_path / "raw/alpha/real/003.webp").unlink()
    sets = [old, open_shards([build_all(tmp_path / "raw", tmp_path / "data") / "old"])]
    assert sets[0].shards == sets[1].shards
    source = source_in(tmp_path / "store", net)
    for shards in sets:
        assert embed_sets(embedder(net), [shards], source, 0) > 0
    assert [embed_sets(embedder(net), [shards], source, 0) for shards in sets] == [0, 0]


def test_ranks_share_the_shards_of_all_sets(
    net: Detector, old: ShardSet, new: ShardSet, tmp_path: Path
) -> None:
    """The rank after the last shard of the first set computes the first shard of the second."""
    ranks, source = len(old.shards) + 1, source_in(tmp_path, net)
    last = embedder(net, ranks - 1, ranks)
    assert embed_sets(last, [old], source, 0) == 0
    assert embed_sets(last, [old, new], source, 0) > 0
    assert [path.name.rpartition("-")[0] for path in arrow_files(tmp_path)] == [new.shards[0][:-4]]


def test_a_limit_of_the_system_is_not_a_missing_file(
    net: Detector, old: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_in(tmp_path, net)
    embed_sets(embedder(net), [old], source, 0)

    def full(_path: str) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("pyarrow.memory_map", full)
    with pytest.raises(FeatureError, match=r"no more mapped files; raise .* vm\.max_map_count"):
        open_table(source.store, source.backbone, old, source.numbered(0))


def test_many_broken_images_stop_the_embedding(net: Detector, data: Path, tmp_path: Path) -> None:
    shards = broken_copy(data, tmp_path, list(range(10)), "all")
    with pytest.raises(LoadError, match=r"10 of .* samples cannot be decoded"):
        embed_sets(embedder(net), [shards], source_in(tmp_path / "store", net), 0)


def test_a_part_of_a_shard_is_not_embedded(net: Detector, old: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match="of them; compute the features of whole sets"):
        embed_sets(embedder(net), [old.take(np.arange(3))], source_in(tmp_path, net), 0)


def test_features_that_are_not_finite_are_refused(old: ShardSet, tmp_path: Path) -> None:
    broken = build(FROZEN, pretrained=False).eval()
    next(p for p in broken.parameters() if not p.requires_grad).data.fill_(torch.nan)
    with pytest.raises(FeatureError, match="are not finite in float16"):
        embed_sets(embedder(broken), [old], source_in(tmp_path, broken), 0)
    assert not arrow_files(tmp_path)


def test_a_backbone_that_learns_and_an_unknown_precision_have_no_store(
    net: Detector, tiny_recipe: Path
) -> None:
    with pytest.raises(recipes.RecipeError, match=r"needs a frozen backbone: set network\.freeze"):
        recipes.load(Recipe, tiny_recipe, ["features.views=1"])
    with pytest.raises(FeatureError, match="frozen backbone only"):
        backbone_id(build(TINY, pretrained=False), TINY, SMALL_PREPROCESS, torch.float32)
    with pytest.raises(KeyError, match="float64"):  # it was stored as fp32
        backbone_id(net, FROZEN, SMALL_PREPROCESS, torch.float64)


def test_files_are_memory_mapped_without_an_open_descriptor(
    net: Detector, old: ShardSet, tmp_path: Path
) -> None:
    source = source_in(tmp_path, net)
    embed_sets(embedder(net), [old], source, 0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    table = open_table(source.store, source.backbone, old, View())
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not table.parts[0].features.flags.owndata
    assert not table.parts[0].features.flags.writeable


def test_plain_pyarrow_reads_the_files(net: Detector, old: ShardSet, tmp_path: Path) -> None:
    source = source_in(tmp_path, net)
    embed_sets(embedder(net), [old], source, 0)
    file = files_of(source.store, source.backbone, old, View())[0]
    assert is_there(file)
    with pa.memory_map(str(file.path)) as stream:
        table = pa.ipc.open_file(stream).read_all()
    assert table.column_names == ["offset", "valid", "features"]
    np.testing.assert_array_equal(
        np.array(table.column("features").to_pylist(), np.float16), read_file(file).features
    )
    about = json.loads(table.schema.metadata[b"ai_images_detector.features"])
    assert about["shard_sha256"] == old.shard_sha256[file.shard_code]
    described = json.loads((source.store / source.backbone.folder / "backbone.json").read_text())
    assert described["network"] == "convnextv2_atto"


def test_a_run_is_the_same_after_an_interruption(
    tiny_recipe: Path, data: Path, weights: Path, tmp_path: Path
) -> None:
    store = [f'features.store="{tmp_path / "store"}"', "features.views=2"]
    recipe = recipes.load(Recipe, tiny_recipe, settings(*store))
    whole = train(recipe, data, tmp_path / "whole", init_from=weights)
    train(recipe, data, tmp_path / "parts", init_from=weights, stop_at=4)
    parts = train(recipe, data, tmp_path / "parts")
    first, second = (load_file(path / "weights.safetensors") for path in (whole, parts))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_epochs_take_the_center_crop_and_the_augmented_views_in_turn(
    tiny_recipe: Path, data: Path, weights: Path, tmp_path: Path
) -> None:
    for views, expected in ((0, [0, 0, 0]), (1, [0, 1, 0]), (2, [0, 1, 2]), (5, [0, 1, 2])):
        recipe = recipes.load(Recipe, tiny_recipe, settings(f"features.views={views}"))
        planned = plan(recipe, data, tmp_path, init_from=weights)
        assert [planned.stream.view(epoch) for epoch in range(3)] == expected
        assert list(views_of(recipe)) == sorted(set(expected))


@pytest.mark.parametrize("value", [-1, 1001])
def test_a_number_of_views_has_bounds(value: int) -> None:
    with pytest.raises(ValueError, match="views must be 0 to 1000"):
        Features(views=value)


def test_the_command_computes_the_features_that_training_reads(
    tiny_recipe: Path, data: Path, weights: Path, tmp_path: Path
) -> None:
    words = [
        "embed", "new", "--recipe", str(tiny_recipe), "--init-from", str(weights),
        "--data", str(data), "--runs", str(tmp_path / "runs"),
    ]  # fmt: skip
    for setting in settings(f'features.store="{tmp_path / "store"}"', "features.views=1"):
        words += ["--set", setting]
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 0, result.output
    counts = {name: len(open_shards([data / name])) for name in ("old", "new", "val")}
    computed = sum(counts.values()) + counts["old"]  # old is trained on: views 0 and 1
    assert f"features of {computed} images were computed" in result.output
    files = {path: path.stat().st_mtime_ns for path in arrow_files(tmp_path / "store")}
    again = CliRunner().invoke(command, words)
    assert "features of 0 images were computed" in again.output
    recipe = recipes.load(Recipe, tiny_recipe, words[11::2])
    train(recipe, data, tmp_path / "runs", init_from=weights)
    assert {path: path.stat().st_mtime_ns for path in arrow_files(tmp_path / "store")} == files


def test_the_local_engine_computes_in_this_process(
    tiny_recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    monkeypatch.setattr(assemble, "embed_part", lambda *_, **__: ran.append(os.getpid()) or 7)
    words = [
        "embed", "--recipe", str(tiny_recipe), "--data", str(data), "--runs", str(tmp_path),
        "--set", "features.views=0", "--set", "network.freeze_backbone=true",
    ]  # fmt: skip
    result = CliRunner().invoke(command, [*words, "--jobs", "4"])
    assert result.exit_code == 2 and "add --engine ray" in result.output and not ran
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 0, result.output
    assert ran == [os.getpid()] and "features of 7 images were computed" in result.output


def test_the_command_requires_a_features_table(
    tiny_recipe: Path, data: Path, tmp_path: Path
) -> None:
    words = ["embed", "--recipe", str(tiny_recipe), "--data", str(data)]
    result = CliRunner().invoke(command, [*words, "--runs", str(tmp_path)])
    assert result.exit_code == 1
    assert "has no [features]; set the number of stored views" in result.output


@pytest.mark.slow
def test_ray_computes_the_same_files(
    tiny_recipe: Path, data: Path, weights: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    stores = {engine: tmp_path / engine for engine in ("local", "ray")}
    for engine, store in stores.items():
        words = [
            "-m", "model", "embed", "--recipe", tiny_recipe, "--init-from", weights,
            "--data", data, "--runs", tmp_path / "runs", "--engine", engine,
            "--jobs", "2" if engine == "ray" else "1",
        ]  # fmt: skip
        for setting in settings(f'features.store="{store}"', "features.views=1"):
            words += ["--set", setting]
        subprocess.run(
            [sys.executable, *map(str, words)], check=True, timeout=240, cwd=ROOT,
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
    one, two = ({p.relative_to(s): p for p in arrow_files(s)} for s in stores.values())
    assert one.keys() == two.keys()
    for name, path in one.items():
        with pa.memory_map(str(path)) as first, pa.memory_map(str(two[name])) as second:
            tables = [pa.ipc.open_file(stream).read_all() for stream in (first, second)]
            features = [np.array(t.column("features").to_pylist(), np.float32) for t in tables]
            np.testing.assert_allclose(*features, atol=2e-3)
