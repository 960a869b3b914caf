"""Batches are the same for any number of workers and ranks and after a resume; bad images change no
good ones.
"""

import gc
import hashlib
import pickle
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.batch import Batch
from pipeline.loader import LoadError, _Requests, choose_backend, open_loader
from pipeline.loading import Loading
from pipeline.order import OrderError
from pipeline.params import train_params
from pipeline.read import ReadError, ShardReader
from pipeline.replay import Replay
from pipeline.stream import Pool, Stream, evaluation_batches, open_pool
from sharding.format import ShardError, ShardSet
from tests.builders import BACKENDS, CPU, HARSH, PREPROCESS, broken_copy


def facts(batch: Batch) -> tuple:
    """Return everything in a batch in a form that can be compared."""
    digest = hashlib.sha256(batch.images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
    return (
        digest.hexdigest(), tuple(batch.samples.tolist()), tuple(batch.labels.tolist()),
        tuple(batch.valid.tolist()), tuple(batch.replayed.tolist()), tuple(batch.failures),
    )  # fmt: skip


def all_facts(stream: Stream, start: int = 0, epochs: int = 2) -> list[tuple]:
    return [facts(batch) for batch in stream.batches(start, epochs)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_has_the_documented_shapes_and_dtypes(make_stream: Callable, backend: str) -> None:
    stream = make_stream(backend=backend, num_workers=0)
    batch = next(stream.batches(0, 1))
    assert batch.images.shape == (6, 3, 48, 48)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == torch.int64
    labels = stream.pool.shards.column("label")[batch.samples]
    assert batch.labels.tolist() == labels.tolist()
    assert batch.valid.all()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_number_of_workers_does_not_change_batches(make_stream: Callable, backend: str) -> None:
    expected = all_facts(make_stream(backend=backend, num_workers=0))
    assert len(expected) == 2 * make_stream().steps_per_epoch
    assert all_facts(make_stream(backend=backend, num_workers=3)) == expected


def test_spawned_workers_make_the_same_batches(make_stream: Callable) -> None:
    """A spawned process has only the pickled data."""
    stream = make_stream(num_workers=0)
    params_for = train_params(stream.pool.shards, stream.augment, "train", PREPROCESS, 3, 0)
    requests = _Requests(stream.loader, stream.epoch(0), params_for)
    sent = pickle.loads(pickle.dumps(requests))
    assert torch.equal(sent[2].images, requests[2].images)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_share_the_batches_of_one(make_stream: Callable, backend: str) -> None:
    whole = list(make_stream(backend=backend, num_workers=0, batch_size=8).batches(0, 1))
    ranks = [
        list(
            make_stream(backend=backend, num_workers=0, batch_size=4, rank=r, world_size=2).batches(
                0, 1
            )
        )
        for r in (0, 1)
    ]
    assert len(whole) == len(ranks[0]) == len(ranks[1])
    for one, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(one.images, torch.cat([part.images for part in parts]))
        assert one.samples.tolist() == [s for part in parts for s in part.samples.tolist()]


@pytest.mark.parametrize(
    ("backend", "every"),
    [
        ("pil", 12),
        pytest.param("dali", 8, marks=pytest.mark.slow),
        *(pytest.param(b, 1, marks=pytest.mark.slow) for b in BACKENDS),
    ],
)
def test_resume_at_any_step_equals_the_uninterrupted_run(
    make_stream: Callable, backend: str, every: int
) -> None:
    """Resume at steps of two epochs: step 0, two steps of one epoch, the last step, and after the
    end.
    """
    stream = make_stream(backend=backend, num_workers=0)
    expected = all_facts(stream)
    for done in sorted({*range(0, len(expected), every), len(expected) - 1}):
        state = stream.state(done)
        assert set(map(type, state.values())) <= {int, str}
        again = make_stream(backend=backend, num_workers=0)
        assert again.resume(state) == done
        assert all_facts(again, done) == expected[done:]
    assert all_facts(stream, len(expected)) == []


def test_a_state_of_four_ranks_resumes_on_two(make_stream: Callable) -> None:
    """Only the global batch must be the same."""
    saved = make_stream(batch_size=2, world_size=4).state(3)
    whole = list(make_stream(num_workers=0, batch_size=8).batches(3, 1))
    ranks = []
    for rank in (0, 1):
        stream = make_stream(num_workers=0, batch_size=4, rank=rank, world_size=2)
        ranks.append(list(stream.batches(stream.resume(saved), 1)))
    for one, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(one.images, torch.cat([part.images for part in parts]))
    with pytest.raises(OrderError, match="global_batch was 8 and is 6"):
        make_stream(batch_size=3, world_size=2).resume(saved)


def test_a_state_does_not_need_the_order_of_its_epoch(make_stream: Callable) -> None:
    """A run asks for it at each checkpoint."""
    pool = make_stream().pool
    many = Pool(pool.shards, np.zeros(300_000, np.int64), pool.old)
    stream = make_stream(pool=many, ratio="0")
    tracemalloc.start()
    try:
        state = stream.state(stream.steps_per_epoch + 2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (state["epoch"], state["step"]) == (1, 2)
    assert peak < many.new.nbytes / 4


def test_a_repeated_image_gets_another_augmentation(make_stream: Callable) -> None:
    stream = replace(make_stream(ratio="0", num_workers=0), repeats={"gamma": 2})
    assert stream.steps_per_epoch == 2 * len(stream.pool.new) // 6
    seen: dict[int, list[bytes]] = {}
    for batch in stream.batches(0, 1):
        for sample, image in zip(batch.samples.tolist(), batch.images, strict=True):
            seen.setdefault(sample, []).append(image.contiguous().numpy().tobytes())
    twice = [images for images in seen.values() if len(images) == 2]
    assert len(twice) > len(stream.pool.new) - 6  # the last partial batch is dropped
    assert all(first != second for first, second in twice)
    with pytest.raises(
        LoadError, match="repeats names source delta; the sources of the new samples are gamma"
    ):
        replace(stream, repeats={"delta": 2}).epoch(0)


def test_resume_with_another_index_is_refused(make_stream: Callable, data: Path) -> None:
    state = make_stream().state(1)
    other = make_stream(pool=open_pool(data, ["val"], Replay()), ratio="0")
    with pytest.raises(OrderError, match="cannot resume: the shard set has been built again"):
        other.resume(state)


def test_resume_with_another_order_is_refused(make_stream: Callable, data: Path) -> None:
    stream = make_stream()
    state = stream.state(23)
    less = replace(stream.replay, exclude_sources=["alpha"])
    new, old = np.split(np.arange(len(stream.pool.shards)), [len(stream.pool.new) + 1])
    for name, other in (
        ("replay.ratio was 1:8 and is 1:2", make_stream(ratio="1:2")),
        ("loading.shuffle was global and is block", make_stream(shuffle="block")),
        ("data.repeats was none and is gamma 2.0", replace(stream, repeats={"gamma": 2})),
        ("replay.exclude_sources was none and is alpha",
         replace(stream, replay=less, pool=open_pool(data, ["new"], less))),
        (f"data.train was {len(new) - 1} images and is {len(new)} images",
         replace(stream, pool=replace(stream.pool, new=new, old=old))),
    ):  # fmt: skip
        with pytest.raises(OrderError, match=rf"{name}\), so the order of samples would change"):
            other.resume(state)
    assert replace(make_stream(ratio=0.125), repeats={"gamma": 1}).resume(state) == 23


def test_replay_counts_are_exact_over_an_epoch_and_within_one_per_batch(
    make_stream: Callable,
) -> None:
    stream = make_stream(backend="pil", num_workers=0, batch_size=9)
    assert stream.replayed_per_epoch == len(stream.pool.new) // 8
    epoch = stream.epoch(0)
    share = stream.replayed_per_epoch / (stream.replayed_per_epoch + len(stream.pool.new))
    assert abs(epoch.replayed.sum() - share * len(epoch.samples)) < 1
    for batch in stream.batches(0, 1):
        assert abs(batch.replayed.sum() - share * 9) < 1
        assert (batch.samples[batch.replayed] >= len(stream.pool.new)).all()


def test_a_missing_set_to_replay_is_named_as_a_missing_training_set(data: Path) -> None:
    said = f"no shard set at {data / 'gone'}; {data} has the sets new, old, val"
    with pytest.raises(ShardError, match=f"^{said}$"):
        open_pool(data, ["gone"], Replay())
    with pytest.raises(ShardError, match=f"^replay.sets: {said}$"):
        open_pool(data, ["new"], Replay(sets=("gone",), ratio="1:2"))


def test_each_epoch_and_each_seed_has_other_augmentations(make_stream: Callable) -> None:
    seen: dict[int, list[bytes]] = {}
    for seed in (3, 4):
        stream = make_stream(ratio="0", num_workers=0, seed=seed)
        for batch in stream.batches(0, 2):
            for sample, image in zip(batch.samples.tolist(), batch.images, strict=True):
                seen.setdefault(sample, []).append(image.contiguous().numpy().tobytes())
    often = [images for images in seen.values() if len(images) == 4]
    assert len(often) > len(stream.pool.new) / 2  # less what fills no batch
    assert all(len(set(images)) == 4 for images in often)


def test_each_epoch_replays_other_samples(make_stream: Callable) -> None:
    stream = make_stream(ratio="1:8")
    chosen = [set(e.samples[e.replayed].tolist()) for e in map(stream.epoch, range(3))]
    assert chosen[0] != chosen[1] != chosen[2]
    assert chosen[0] == set(stream.epoch(0).samples[stream.epoch(0).replayed].tolist())


def test_the_replayed_samples_of_an_epoch_are_chosen_once_for_all_checkpoints(
    make_stream: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost of saving does not grow with the epochs that are over."""
    stream, numbers = make_stream(ratio="1:2"), []
    steps, epoch_of = stream.steps_per_epoch, Stream.epoch

    def noted(self: Stream, number: int, **options: bool):
        numbers.append(number)
        return epoch_of(self, number, **options)

    monkeypatch.setattr(Stream, "epoch", noted)
    saved = [dict(stream.replayed_until(done)) for done in (steps, 2 * steps, 3 * steps + 1, 1)]
    assert numbers == [0, 1, 2, 3, 0]
    assert Counter(saved[0]) < Counter(saved[1]) and Counter(saved[3]) < Counter(saved[0])
    assert saved[2] == dict(make_stream(ratio="1:2").replayed_until(3 * steps + 1))
    resumed, whole = make_stream(ratio="1:2"), make_stream(ratio="1:2").replayed_until(4 * steps)
    stream.replayed_until(3 * steps)
    resumed.keep_replayed(stream.replayed_state())
    numbers.clear()
    list(resumed.batches(3 * steps, 4))
    assert dict(resumed.replayed_until(4 * steps)) == dict(whole)
    assert numbers == [3]


def test_the_record_of_replayed_samples_does_not_grow_with_the_epochs(
    make_stream: Callable,
) -> None:
    """Each epoch added 200 bytes per replayed sample to rank 0, and a line to each checkpoint."""
    stream, kept = make_stream(ratio="1:2"), []
    for epochs in (20, 40):
        rows = [*stream.replayed_until(epochs * stream.steps_per_epoch)]
        state = stream.replayed_state()
        kept.append((len(rows), len(state["samples"]), len(state["counts"])))
    assert kept[0] == kept[1] == 3 * (len(stream.pool.old),)


def test_sources_marked_no_replay_are_never_old(make_stream: Callable) -> None:
    pool = make_stream().pool
    codes, names = pool.shards.codes("source")
    assert {names[code] for code in codes[pool.old]} == {"alpha", "beta"}


def test_each_source_keeps_its_policy(old: ShardSet) -> None:
    """The index names the policy dda for `beta`, which changes nothing here. Other sources are
    augmented.
    """
    from pipeline.augment import AugmentPolicy

    params_for = train_params(
        old, {"train": HARSH, "dda": AugmentPolicy()}, "train", PREPROCESS, 1, 0
    )
    codes, names = old.codes("source")
    drawn = list(params_for(np.arange(len(old)), np.zeros(len(old), int)).rows())
    for sample, params in enumerate(drawn):
        if names[codes[sample]] == "beta":
            assert (params.jpeg, params.hflip, params.resample, params.grayscale) == (
                0,
                False,
                0,
                False,
            )
    assert any(drawn[s].jpeg for s in range(len(old)) if names[codes[s]] == "alpha")
    with pytest.raises(LoadError, match="source beta is augmented by policy 'dda'"):
        train_params(old, {"train": HARSH}, "train", PREPROCESS, 1, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_size", [1, 7, 80, 81])
def test_evaluation_sees_every_sample_once(old: ShardSet, backend: str, batch_size: int) -> None:
    loading = Loading(batch_size=batch_size, backend=backend, num_workers=0)
    loader = open_loader(old, preprocess=PREPROCESS, loading=loading, device=CPU)
    seen = [s for b in evaluation_batches(loader) for s in b.samples[b.valid.numpy()].tolist()]
    assert seen == list(range(len(old)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", ["half", "all"])
def test_broken_images_are_named_and_change_no_other(
    data: Path, old: ShardSet, tmp_path: Path, backend: str, cut: str
) -> None:
    """The run ends normally, broken images are named, and all others are bit-identical to a run
    without broken ones.

    DALI accepts a JPEG that ends early with an end marker, and Pillow accepts half a WebP. Only the
    checksum finds these.
    """
    bad, few = [0, 26], np.arange(40)
    shards = broken_copy(data, tmp_path, bad, cut).take(few)
    pool = Pool(shards, few, np.empty(0, np.int64))
    whole = Pool(old.take(few), few, np.empty(0, np.int64))

    def run(pool: Pool) -> dict[int, tuple[bool, bytes, str]]:
        check = cut == "half"
        loading = Loading(batch_size=8, backend=backend, num_workers=0, verify_checksums=check)
        loader = open_loader(pool.shards, preprocess=PREPROCESS, loading=loading, device=CPU)
        stream = Stream(loader, pool, Replay(), {"train": HARSH, "dda": HARSH}, "train", 1)
        rows = {}
        for batch in stream.batches(0, 1):
            names = loader.name_failures(batch)
            for row, sample in enumerate(batch.samples.tolist()):
                pixels = batch.images[row].contiguous().numpy().tobytes()
                reason = names[list(batch.failures).index(row)] if row in batch.failures else ""
                rows[sample] = (bool(batch.valid[row]), pixels, reason)
        return rows

    good, damaged = run(whole), run(pool)
    assert damaged.keys() == good.keys() == set(few)
    assert {sample for sample, (valid, _, _) in damaged.items() if not valid} == set(bad)
    for sample, (valid, pixels, reason) in damaged.items():
        if sample not in bad:
            assert (valid, pixels) == good[sample][:2]
        elif not valid:
            assert set(pixels) == {0}
            assert shards.text("key", sample) in reason
            assert len(reason.splitlines()) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_bad_batch_is_survived(data: Path, tmp_path: Path, backend: str) -> None:
    shards = broken_copy(data, tmp_path, list(range(4)), "all")
    loading = Loading(batch_size=4, backend=backend, num_workers=0)
    loader = open_loader(shards, preprocess=PREPROCESS, loading=loading, device=CPU)
    batches = list(evaluation_batches(loader))
    assert not batches[0].valid.any()
    assert all(batch.valid.all() for batch in batches[1:])
    assert len(batches) == 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_many_bad_images_stop_the_run(
    data: Path, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.loader.MIN_SEEN", 20)
    shards = broken_copy(data, tmp_path, list(range(10)), "all")
    loading = Loading(batch_size=10, backend=backend, num_workers=0)
    loader = open_loader(shards, preprocess=PREPROCESS, loading=loading, device=CPU)
    with pytest.raises(LoadError, match="10 of 20 samples cannot be decoded, more than 5%"):
        list(evaluation_batches(loader))


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_many_bad_images_in_a_short_set_stop_the_run_at_its_end(
    data: Path, tmp_path: Path, backend: str
) -> None:
    """The set has fewer samples than `MIN_SEEN`. A single bad sample stops no run."""
    loading = Loading(batch_size=16, backend=backend, num_workers=0)
    for bad, name in (([3], "one"), (list(range(5)), "many")):
        shards = broken_copy(data, tmp_path / name, bad, "all")
        loader = open_loader(shards, preprocess=PREPROCESS, loading=loading, device=CPU)
        if name == "one":
            assert sum(len(batch.failures) for batch in evaluation_batches(loader)) == 1
        else:
            with pytest.raises(LoadError, match="5 of 80 samples cannot be decoded, more than 5%"):
                list(evaluation_batches(loader))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_truncated_tar_and_a_missing_one_are_named(
    data: Path, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tars are whole when the loader is opened, and damaged afterwards."""
    shards = broken_copy(data, tmp_path, [], "all")
    dummy = tmp_path / "old/dummy-train-00000.tar"
    loading = Loading(batch_size=16, backend=backend, num_workers=0)
    monkeypatch.setattr("pipeline.loader.MAX_BAD_SHARE", 1.0)
    loader = open_loader(shards, preprocess=PREPROCESS, loading=loading, device=CPU)
    dummy.write_bytes(dummy.read_bytes()[:2000])
    reasons = [r for batch in evaluation_batches(loader) for r in loader.name_failures(batch)]
    assert len(reasons) == 10
    assert all("dummy-train-00000.tar" in r for r in reasons)
    assert all("tar has 2,000 bytes, its index says" in r for r in reasons)
    dummy.unlink()
    (item,) = ShardReader(shards).read([len(shards) - 1])
    assert isinstance(item, ReadError) and "cannot be read" in str(item)


def test_changed_bytes_are_found_by_their_hash(data: Path, tmp_path: Path) -> None:
    shards = broken_copy(data, tmp_path, [5], "half")
    assert all(isinstance(data, bytes) for data in ShardReader(shards).read([5, 6]))
    for threads in (0, 2):
        bad, good = ShardReader(shards, verify_checksums=True, threads=threads).read([5, 6])
        assert isinstance(bad, ReadError) and "have changed since" in str(bad)
        assert isinstance(good, bytes)


def test_the_backend_is_chosen_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto", CPU) == ("pil", "no CUDA device")
    assert choose_backend("dali", CPU) == ("dali", "asked for")
    assert choose_backend("auto", torch.device("cuda")) == ("dali", "CUDA device and DALI found")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    backend, reason = choose_backend("auto", torch.device("cuda"))
    assert (backend, reason) == ("pil", "nvidia-dali-cuda120 is not installed")
    with pytest.raises(LoadError, match="backend dali: nvidia-dali-cuda120 is not installed"):
        choose_backend("dali", CPU)
    for other in ("DALI", "pillow"):  # any other text would decode with Pillow
        with pytest.raises(LoadError, match=f"no such backend: {other}; use auto, dali or pil"):
            choose_backend(other, CPU)


def test_a_worker_does_not_destroy_pipelines_of_dali_that_are_garbage_here(
    old: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for their threads, which a fork does not copy, and never give a batch."""
    frozen, seed = gc.get_freeze_count(), torch.manual_seed
    loading = Loading(batch_size=4, backend="dali", num_workers=2)
    loader = open_loader(old, preprocess=PREPROCESS, loading=loading, device=CPU)
    cycle: list[Any] = [evaluation_batches(loader)]
    next(cycle[0])
    cycle.append(cycle)
    # torch's worker calls this first.
    monkeypatch.setattr(torch, "manual_seed", lambda number: (gc.collect(), seed(number))[1])
    loading = Loading(batch_size=4, backend="pil", num_workers=1, stall_error_s=20)
    one = open_loader(old, preprocess=PREPROCESS, loading=loading, device=CPU)
    gc.disable()
    try:
        del cycle, loader
        batches = evaluation_batches(one)
        assert next(batches).samples.tolist() == [0, 1, 2, 3]
        batches.close()
    finally:
        gc.enable()
        gc.collect()
    assert gc.get_freeze_count() == frozen


@pytest.mark.parametrize("backend", BACKENDS)
def test_iteration_may_stop_in_the_middle_of_an_epoch(old: ShardSet, backend: str) -> None:
    loading = Loading(batch_size=4, backend=backend, num_workers=1)
    loader = open_loader(old, preprocess=PREPROCESS, loading=loading, device=CPU)
    for _ in range(2):
        batches = evaluation_batches(loader)
        assert next(batches).samples.tolist() == [0, 1, 2, 3]
        batches.close()


@pytest.mark.gpu
def test_the_gpu_graph_agrees_with_the_reference(old: ShardSet) -> None:
    """nvJPEG's inverse DCT may differ by rounding; everything else is as on the CPU."""
    images = {}
    for backend, device in (("pil", CPU), ("dali", torch.device("cuda"))):
        loading = Loading(batch_size=8, backend=backend, num_workers=2)
        loader = open_loader(old, preprocess=PREPROCESS, loading=loading, device=device)
        batches = [batch.images.cpu().int() for batch in evaluation_batches(loader)]
        images[backend] = torch.cat(batches)
    difference = (images["pil"] - images["dali"]).abs().float()
    assert difference.mean() < 1.0


def test_the_record_of_replayed_samples_ends_with_the_steps_that_were_done(
    make_stream: Callable,
) -> None:
    stream = make_stream(ratio="1:2")
    steps, batch = stream.steps_per_epoch, stream.loader.global_batch
    keys = stream.pool.shards.table.column("key").to_pylist()
    epochs = [stream.epoch(number) for number in (0, 1)]
    order = [
        (is_old, keys[sample])
        for epoch in epochs
        for sample, is_old in zip(epoch.samples, epoch.replayed, strict=True)
    ]
    for done in (1, steps - 1, steps + 2):
        expected = Counter(key for is_old, key in order[: done * batch] if is_old)
        assert expected and dict(stream.replayed_until(done)) == expected
