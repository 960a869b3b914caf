"""Comparison of two runs on the same images: paired intervals, and changed verdicts."""

from typing import Any

import numpy as np
import pytest

from model.evaluation.compare import compare, count_flips, flips, shared_samples
from model.evaluation.report import report
from model.evaluation.scores import ScoresError, ScoreTable
from model.evaluation.side_by_side import ComparedRun, side_by_side
from tests.builders import table_of

ABOUT = {"threshold": 0.5, "temperature": 2.0}


def rows(
    shift: float = 0.0, noise: float = 0.0, number: int = 200, seed: int = 2
) -> list[dict[str, Any]]:
    """Return rows of a set with two sources, half of them fake. `shift` is added to the logits of
    fakes, `noise` scales noise on all logits.
    """
    rng, more = np.random.default_rng(1), np.random.default_rng(seed)
    logits = rng.normal(2 * (np.arange(number) % 2) - 1, 2) + noise * more.normal(size=number)
    return [
        {
            "set": "val", "key": f"k{i:03d}", "label": i % 2, "source": "ab"[i // 2 % 2],
            "generator": "gan" if i % 2 else "camera",
            "logit": float(logits[i] + shift * (i % 2)),
        }
        for i in range(number)
    ]  # fmt: skip


def tables(before: list[dict], after: list[dict]) -> tuple[ScoreTable, ScoreTable]:
    return tuple(table_of(one, ["val"], **ABOUT) for one in (before, after))


def test_the_figures_are_those_of_both_reports() -> None:
    before, after = tables(rows(), rows(1.0, 0.5))
    lines = compare(before, after)
    assert [(line.kind, line.name) for line in lines] == [
        ("overall", ""), ("sources", "a"), ("sources", "b"), ("generators", "gan"),
    ]  # fmt: skip
    reports = [report(table)["sets"]["val"] for table in (before, after)]
    for line in lines:
        own = [r[line.kind] if not line.name else r[line.kind][line.name] for r in reports]
        assert line.images == own[0]["count"]
        for metric, change in line.changes.items():
            assert (change.before, change.after) == (own[0][metric], own[1][metric])


def test_differences_are_paired() -> None:
    """A small gain on every fake is significant, although the intervals of the runs overlap."""
    before, after = tables(rows(), rows(0.6))
    line = compare(before, after)[0]
    gain = line.changes["auroc"]
    alone = [report(table)["sets"]["val"]["overall"]["intervals"]["auroc"] for table in
             (before, after)]  # fmt: skip
    assert alone[0][1] > alone[1][0]  # the two intervals overlap
    assert 0 < gain.low < gain.after - gain.before < gain.high
    assert gain.high - gain.low < 0.5 * min(high - low for low, high in alone)
    unchanged = line.changes["false_positive_rate"]
    assert unchanged.low == unchanged.high == 0


def test_equally_good_runs_rarely_differ() -> None:
    covered = 0
    for seed in range(20):
        pair = (rows(noise=1.5, number=100, seed=1000 * run + seed + 5) for run in (0, 1))
        change = compare(*tables(*pair))[0].changes["auroc"]
        covered += change.low <= 0 <= change.high
    assert 16 <= covered <= 20


def alarms(*called: np.ndarray) -> tuple[ScoreTable, ...]:
    """Return a table for each mask of the reals that a run calls fake. Its fakes are all found, and
    no two scores are equal.
    """
    rng, fakes = np.random.default_rng(len(called[0])), len(called[0])
    return tuple(
        table_of(
            [
                {"set": "val", "key": f"k{i:03d}", "label": int(i >= len(mask)),
                 "logit": float(np.where(i >= len(mask) or mask[i], 2, -2) + rng.uniform(-1, 1))}
                for i in range(len(mask) + fakes)
            ],
            ["val"], **ABOUT,
        )
        for mask in called
    )  # fmt: skip


def test_no_error_of_two_runs_is_no_difference_of_0() -> None:
    none = np.zeros(32, bool)
    before, after = alarms(none, none)
    line = compare(before, after)[0]
    alone = report(before)["sets"]["val"]["overall"]["intervals"]["false_positive_rate"]
    for metric in ("false_positive_rate", "recall"):
        change = line.changes[metric]
        assert (change.before, change.high) == (change.after, -change.low)
        assert 0.05 < alone[1] <= change.high < 0.2
    ranked = line.changes["auroc"]  # perfect twice
    assert (ranked.before, ranked.after, ranked.low) == (1, 1, None)
    assert {change.low for change in compare(before, before)[0].changes.values()} == {0}
    behind = side_by_side([ComparedRun("a", before), ComparedRun("b", after)])["val"]["runs"][1]
    assert behind["recall"]["behind"][1] > 0.05 and behind["auroc"]["behind"] is None


@pytest.mark.parametrize(
    "shared",
    [pytest.param(0, marks=pytest.mark.slow, id="independent"), pytest.param(1, id="correlated")],
)
def test_intervals_of_differences_contain_the_truth(shared: int) -> None:
    """Rates of 5 and 0 %: 80 % of bare percentiles do; 20 and 10 %, the second within the first: 83
    % do.
    """
    rng, covered = np.random.default_rng(3), 0
    rates = ((0.05, 0.0), (0.2, 0.1))[shared]
    for _ in range(60):
        first = rng.random(32) < rates[0]
        second = first & (rng.random(32) < rates[1] / rates[0])
        change = compare(*alarms(first, second))[0].changes["false_positive_rate"]
        covered += change.low <= rates[1] - rates[0] <= change.high
    assert covered >= 56


def test_rows_in_another_order_are_the_same_images() -> None:
    one, two = rows(), rows(1.0)
    straight = compare(*shared_samples(*tables(one, two)))
    turned = compare(*shared_samples(*tables(one, two[::-1])))
    assert straight == turned


def test_different_samples_are_refused_without_intersect() -> None:
    one, two = rows(), rows(1.0)[40:]
    with pytest.raises(ScoresError, match=r"200 and 160 images, 160 of them in both.*--intersec"):
        shared_samples(*tables(one, two))
    before, after = shared_samples(*tables(one, two), intersect=True)
    assert len(before) == len(after) == 160
    assert before.table.column("key").equals(after.table.column("key"))
    assert compare(before, after) == compare(*tables(one[40:], two))
    other = [row | {"key": f"other{row['key']}"} for row in two]
    with pytest.raises(ScoresError, match="no image in common"):
        shared_samples(*tables(one, other), intersect=True)
    turned = [row | {"label": 1 - row["label"]} for row in one]
    with pytest.raises(ScoresError, match="val:k000 is real in one run and fake in the other"):
        shared_samples(*tables(one, turned))


def test_other_files_under_the_same_key_are_refused() -> None:
    """Such as after a set was packed again from images that were compressed anew."""
    again = [row | {"sha256": bytes([number < 3]) * 32} for number, row in enumerate(rows())]
    before, after = tables(rows(), again)
    with pytest.raises(ScoresError, match=r"val:k000 and 2 more are other files .* packed again"):
        shared_samples(before, after)
    assert {len(one) for one in shared_samples(before, after, intersect=True)} == {197}


def test_an_image_that_one_run_could_not_read_is_left_out() -> None:
    one, two = rows(), rows(1.0)
    two[7] |= {"valid": False, "logit": None, "error": "broken"}
    before, after = shared_samples(*tables(one, two))
    assert len(before) == len(after) == 199
    assert "k007" not in before.table.column("key").to_pylist()


def test_flips_use_the_threshold_of_each_run() -> None:
    one, two = rows(), rows(1.0, 0.5)
    before = table_of(one, ["val"], **ABOUT)
    after = table_of(two, ["val"], threshold=0.7, temperature=2.0)
    fake = [table.numbers("probability") for table in (before, after)]
    called = fake[0] >= 0.5, fake[1] >= 0.7
    labels = before.numbers("label")
    changed = flips(before, after)
    expected = np.flatnonzero(called[0] != called[1])
    assert 10 < len(expected) < 150
    assert {flip.key for flip in changed} == {f"k{i:03d}" for i in expected}
    for flip in changed:
        i = int(flip.key[1:])
        assert (flip.before, flip.after, flip.label) == (fake[0][i], fake[1][i], labels[i])
        assert flip.fixed == (called[1][i] == (labels[i] == 1))
    moved = [abs(flip.after - flip.before) for flip in changed]
    assert moved == sorted(moved, reverse=True)
    counted = count_flips(before, changed)
    assert [row[:3] for row in counted] == [("val", "real", 100), ("val", "fake", 100)]
    wrong_before = (called[0] != (labels == 1)).sum()
    wrong_after = (called[1] != (labels == 1)).sum()
    assert wrong_after - wrong_before == sum(row[3] for row in counted) - sum(
        row[4] for row in counted
    )


def test_reference_reals_are_compared() -> None:
    fakes = [row | {"set": "evalgen"} for row in rows() if row["label"]]
    reals = [row | {"set": "photos"} for row in rows() if not row["label"]]
    about = ABOUT | {"reference_reals": {"set": "photos", "why": "test"}}
    moved = [row | {"logit": row["logit"] + 3} for row in reals]
    before, after = (table_of(fakes + one, ["evalgen"], **about) for one in (reals, moved))
    lines = compare(before, after)
    assert [line.kind for line in lines] == ["reference", "sources", "sources", "generators"]
    assert lines[0].changes["false_positive_rate"].low > 0
    assert lines[0].changes["recall"].before == lines[0].changes["recall"].after
    assert {row[0] for row in count_flips(before, flips(before, after))} == {"evalgen"}
    both = fakes + reals + [row | {"set": "others"} for row in reals]
    others = {"reference_reals": about["reference_reals"] | {"set": "others"}}
    with pytest.raises(ScoresError, match="different reference reals"):
        compare(*(table_of(both, ["evalgen"], **ABOUT | one) for one in (about, others)))


def test_intervals_use_the_threshold_of_each_run() -> None:
    """At a higher threshold the same scores have a lower recall and fewer false positives."""
    before = table_of(rows(), ["val"], **ABOUT)
    after = table_of(rows(), ["val"], threshold=0.8, temperature=2.0)
    changes = compare(before, after)[0].changes
    for metric in ("recall", "false_positive_rate"):
        change = changes[metric]
        assert change.low <= change.after - change.before <= change.high < 0
    assert changes["auroc"].low == changes["auroc"].high == 0
