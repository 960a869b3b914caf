"""Order and replay: exact counts, the same on any number of ranks and from any step."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest

from pipeline.order import (
    ORDER_VERSIONS,
    REPEAT,
    REPLAY,
    OrderError,
    check_state,
    evaluation_epoch,
    mixing_of,
    repeat,
    rng_of,
    state_of,
    training_epoch,
)
from pipeline.replay import Replay, interleave, sample_old, share_out


def epoch(count: int = 1000, batch: int = 24, number: int = 0, new=None, **options):
    new = np.arange(count) if new is None else new
    return training_epoch(new, seed=5, number=number, global_batch=batch, **options)


@pytest.mark.parametrize("shuffle", ["global", "block"])
@pytest.mark.parametrize("count", [24, 1000, 40_000])
def test_every_sample_appears_at_most_once(shuffle: str, count: int) -> None:
    samples = epoch(count, shuffle=shuffle).samples
    assert len(samples) == count // 24 * 24
    assert len(np.unique(samples)) == len(samples)


@pytest.mark.parametrize("shuffle", ["global", "block"])
def test_epochs_differ_and_repeat_by_seed(shuffle: str) -> None:
    first, second = epoch(shuffle=shuffle), epoch(number=1, shuffle=shuffle)
    assert not np.array_equal(first.samples, second.samples)
    assert np.array_equal(first.samples, epoch(shuffle=shuffle).samples)
    assert not np.array_equal(first.samples, np.sort(first.samples))


@pytest.mark.parametrize("shuffle", ["global", "block"])
def test_an_epoch_without_samples_is_refused_in_one_line(shuffle: str) -> None:
    """Such as of sources that are all repeated 0 times."""
    with pytest.raises(OrderError, match=r"^0 training samples do not fill one batch of 24; "):
        epoch(0, shuffle=shuffle)


@pytest.mark.parametrize(("ranks", "batch"), [(2, 12), (3, 8), (4, 6)])
def test_ranks_see_the_batch_of_one_rank(ranks: int, batch: int) -> None:
    whole = epoch()
    for step in range(whole.steps):
        parts = [whole.samples[whole.positions(step, r, ranks)] for r in range(ranks)]
        assert all(len(part) == batch for part in parts)
        assert np.array_equal(np.concatenate(parts), whole.samples[whole.positions(step)])


@pytest.mark.parametrize("count", [1, 23, 24, 25, 100])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_covers_every_sample_once_on_any_ranks(count: int, ranks: int) -> None:
    whole = evaluation_epoch(np.arange(count), 4 * ranks)
    seen = []
    for step in range(whole.steps):
        for rank in range(ranks):
            rows = whole.positions(step, rank, ranks)
            assert len(whole.samples[rows]) == 4
            seen += whole.samples[rows][whole.valid[rows]].tolist()
    assert sorted(seen) == list(range(count))


def test_too_few_samples_are_an_error() -> None:
    with pytest.raises(OrderError, match="no sample to evaluate"):
        evaluation_epoch(np.arange(0), 4)
    with pytest.raises(OrderError, match="7 training samples do not fill one batch of 24"):
        epoch(7)


NOW = {
    "seed": 5, "global_batch": 24, "index_sha256": "abc", "content_sha256": "def",
    "shuffle": "global",
    "settings": {"replay.ratio": "1:8"},
}  # fmt: skip


@pytest.mark.parametrize(
    "changed", ["order_version", "seed", "global_batch", "content_sha256", "loading.shuffle",
                "replay.ratio"],
)  # fmt: skip
def test_a_state_of_another_run_is_refused(changed: str) -> None:
    state = state_of(number=2, step=17, **NOW)
    assert check_state(state, **NOW) == (2, 17)
    with pytest.raises(OrderError, match=rf"cannot resume: .* \({changed} was other and is"):
        check_state(state | {changed: "other"}, **NOW)


def test_a_state_of_an_earlier_version_resumes() -> None:
    """It has neither the shuffle nor the settings, and only the order of blocks is a new one."""
    before = {
        "order_version": 1, "seed": 5, "epoch": 2, "step": 17, "global_batch": 24,
        "index_sha256": "abc",
    }  # fmt: skip
    assert check_state(before, **NOW) == (2, 17)
    assert check_state(state_of(number=2, step=17, **NOW), **{**NOW, "index_sha256": "x"})
    with pytest.raises(OrderError, match="index_sha256 was abc and is x"):
        check_state(before, **{**NOW, "index_sha256": "x"})
    with pytest.raises(OrderError, match="order_version was 1 and is 2"):
        check_state(before, **{**NOW, "shuffle": "block"})


@pytest.mark.parametrize("replay_ratio", ["1:8", "1:1", "1:16", "3:7"])
@pytest.mark.parametrize("new", [20_000, 1003])
def test_replay_is_exact_over_an_epoch_and_within_one_in_any_batch(
    replay_ratio: str, new: int
) -> None:
    ratio = Replay(sets=["x"], ratio=replay_ratio).fraction
    count = int(new * ratio)
    samples, replayed = interleave(np.arange(new), np.arange(10**6, 10**6 + count))
    assert replayed.sum() == count
    assert np.array_equal(samples >= 10**6, replayed)
    share = Fraction(count, new + count)
    for batch in (9, 28, 64):
        per_batch = replayed[: len(replayed) // batch * batch].reshape(-1, batch).sum(1)
        assert np.abs(per_batch - float(share * batch)).max() < 1
    if replay_ratio == "1:8" and new == 20_000:
        assert count == 2500


def pools(**sizes: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make samples, sources and labels, for sources given as name=(real, fake) counts."""
    sources = np.concatenate([np.full(sum(n), i) for i, n in enumerate(sizes.values())])
    labels = np.concatenate([np.repeat([0, 1], n) for n in sizes.values()])
    return np.arange(len(sources)) + 500, sources, labels


def counts(chosen, samples, sources, labels) -> dict[tuple[int, int], int]:
    rows = np.searchsorted(samples, chosen)
    pairs, n = np.unique(np.stack([sources[rows], labels[rows]]), axis=1, return_counts=True)
    return {(int(s), int(c)): int(k) for (s, c), k in zip(pairs.T, n, strict=True)}


def test_quotas_are_equal_and_balanced_by_class() -> None:
    pool = pools(a=(900, 100), b=(0, 300), c=(500, 500))
    drawn_from = counts(sample_old(*pool, 300, rng_of(1, 0, REPLAY)), *pool)
    assert drawn_from == {(0, 0): 50, (0, 1): 50, (1, 1): 100, (2, 0): 50, (2, 1): 50}


def test_small_sources_give_all_and_the_others_share_the_rest() -> None:
    pool = pools(a=(4, 2), b=(400, 400), c=(400, 3))
    drawn_from = counts(sample_old(*pool, 206, rng_of(1, 0, REPLAY)), *pool)
    assert drawn_from == {(0, 0): 4, (0, 1): 2, (1, 0): 50, (1, 1): 50, (2, 0): 97, (2, 1): 3}


def test_old_samples_are_chosen_anew_each_epoch_and_never_twice_in_one() -> None:
    pool = pools(a=(500, 500), b=(500, 500))
    first, second = (sample_old(*pool, 200, rng_of(1, number, REPLAY)) for number in (0, 1))
    assert len(np.unique(first)) == len(np.unique(second)) == 200
    assert len(np.intersect1d(first, second)) < 60


class Compared(np.ndarray):
    """Array that counts its comparisons with a number."""

    count = 0

    def __eq__(self, other: object) -> np.ndarray:
        Compared.count += np.ndim(other) == 0
        return np.asarray(self) == other


def test_many_sources_are_not_compared_one_by_one_with_all_samples() -> None:
    """It takes minutes for 100 million samples of 2,000 sources, in each epoch and on each rank."""
    sources = np.tile(np.arange(50), 20)
    counted = sources.view(Compared)
    old = sample_old(np.arange(1000), counted, np.arange(1000) // 500, 100, rng_of(1, 0, REPLAY))
    assert np.bincount(sources[old]).tolist() == [2] * 50
    assert np.array_equal(
        repeat(np.arange(1000), counted, {49: 2}, rng_of(1, 0, REPEAT)),
        np.r_[np.concatenate([np.arange(code, 1000, 50) for code in range(50)]), 49:1000:50],
    )
    assert Compared.count == 0


def test_a_pool_that_is_too_small_is_used_again() -> None:
    pool = pools(a=(3, 4))
    chosen = sample_old(*pool, 17, rng_of(1, 0, REPLAY))
    assert len(chosen) == 17
    assert np.bincount(chosen - 500).min() >= 2


def test_share_out_gives_quotas_with_the_sum_and_within_the_sizes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(0, 50, rng.integers(1, 8)).tolist()
        count = int(rng.integers(0, 200))
        quotas = share_out(count, sizes, rng)
        assert sum(quotas) == min(count, sum(sizes))
        assert all(q <= size for q, size in zip(quotas, sizes, strict=True))


def test_sources_are_repeated_the_given_number_of_times() -> None:
    samples, sources = np.arange(1000), np.repeat([0, 1, 2], [100, 300, 600])
    repeated = repeat(samples, sources, {0: 2.5, 2: 0.25}, rng_of(1, 0, REPEAT))
    times = np.bincount(repeated, minlength=1000)
    assert sorted(times[:100].tolist()) == [2] * 50 + [3] * 50
    assert (times[100:400] == 1).all()
    assert times[400:].sum() == 150 and times[400:].max() == 1
    again = repeat(samples, sources, {0: 2.5, 2: 0.25}, rng_of(1, 1, REPEAT))
    assert len(again) == len(repeated)
    assert not np.array_equal(np.bincount(again, minlength=1000), times)  # other samples each epoch
    assert len(repeat(samples, sources, {1: 0}, rng_of(1, 0, REPEAT))) == 700


def test_repeat_index_counts_earlier_appearances() -> None:
    made = training_epoch(np.array([4, 4, 4, 9, 7, 7]), seed=1, number=0, global_batch=6)
    for sample in (4, 7, 9):
        here = made.samples == sample
        assert made.repeat_index[here].tolist() == list(range(here.sum()))


def test_mixing_is_one_for_a_random_order_and_ranks_the_shuffles() -> None:
    count, batch = 100_000, 64
    sources = np.repeat(np.arange(10), count // 10)

    def mixing(shuffle: str):
        samples = training_epoch(
            np.arange(count), seed=3, number=0, global_batch=batch, shuffle=shuffle
        ).samples
        return mixing_of(samples, sources[samples], batch)

    good, block = mixing("global"), mixing("block")
    none = mixing_of(np.arange(count), sources, batch)
    assert abs(good.distance - 1) < 0.02 and abs(good.batches - 1) < 0.1
    assert block.distance > 0.8
    assert none.distance == 0 and none.batches > 30
    assert 1 < block.batches < none.batches / 4


def test_a_block_shuffle_reads_in_runs() -> None:
    """Each piece of a shard is needed within one window of blocks, and never again."""
    samples = training_epoch(
        np.arange(100_000), seed=3, number=0, global_batch=50, shuffle="block"
    ).samples
    place = {}
    for position, block in enumerate((samples // 256).tolist()):
        first, _ = place.get(block, (position, 0))
        place[block] = first, position
    longest = max(last - first for first, last in place.values())
    assert longest <= 2 * 64 * 256


@pytest.mark.parametrize("replayed", [0, 10_000])
def test_machines_together_read_a_block_shuffle_little_more_than_once(replayed: int) -> None:
    """If each needed all runs of a window, 16 machines would fetch a bucket 16 times an epoch."""
    count, machines = 80_000, 16
    made = training_epoch(
        np.arange(count), seed=3, number=0, global_batch=4096, shuffle="block",
        old=np.arange(count, count + replayed),
    )  # fmt: skip
    parts = made.samples.reshape(-1, machines, 4096 // machines)
    blocks = [np.unique(part[part < count] // 256) for part in parts.swapaxes(0, 1)]
    assert sum(map(len, blocks)) < 2 * count / 256
    assert max(map(len, blocks)) < 3 * count / 256 / machines
    # The part of a machine is not of one region of the set, where all samples are of one source.
    assert all(np.ptp(part) > count / 256 / 2 for part in blocks)


def test_ranks_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(OrderError, match=r"24 images cannot be shared by 5 ranks; use a multiple"):
        epoch().positions(0, 0, 5)


def test_an_unknown_shuffle_is_refused() -> None:
    with pytest.raises(OrderError, match="shuffled by global or block, got 'blocks'"):
        epoch(shuffle="blocks")


def test_the_rest_goes_to_other_sources_and_classes_each_time() -> None:
    """An epoch with fewer old samples than sources replays not always those of the first sources,
    and not always a real image of each.
    """
    pool = pools(a=(50, 50), b=(50, 50), c=(50, 50))
    for count, share in ((1, 1 / 6), (3, 1 / 2)):
        total: dict[tuple[int, int], int] = {}
        for number in range(300):
            chosen = sample_old(*pool, count, rng_of(1, number, REPLAY))
            for stratum, times in counts(chosen, *pool).items():
                total[stratum] = total.get(stratum, 0) + times
        assert len(total) == 6
        assert all(abs(times / 300 - share) < 0.1 for times in total.values())


@pytest.mark.parametrize(
    ("shuffle", "version", "digest"),
    [("global", 1, "d97a9c62b61ec358"), ("block", 2, "d3dab441ad721f01")],
)
def test_an_order_changes_only_with_its_version(shuffle: str, version: int, digest: str) -> None:
    """A run that resumes in another order sees some images twice and others never, unless the
    version refuses it: raise it in `ORDER_VERSIONS` if a digest changes.
    """
    count = 40_000
    old = sample_old(*pools(a=(400, 400), b=(300, 0)), 5_001, rng_of(5, 3, REPLAY)) + count
    new = repeat(
        np.arange(count), np.arange(count) // 9_000, {1: 0.3, 2: 2.5}, rng_of(5, 3, REPEAT)
    )
    third = epoch(number=3, shuffle=shuffle, old=old, new=np.sort(new))
    content = third.samples.astype("<i8").tobytes() + third.replayed.tobytes()
    assert ORDER_VERSIONS[shuffle] == version
    assert hashlib.sha256(content).hexdigest()[:16] == digest
