"""Comparison of any number of runs; ranks and stability against values computed by hand."""

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from model.evaluation.compare import shared_samples
from model.evaluation.report import report
from model.evaluation.scores import ScoresError
from model.evaluation.side_by_side import (
    FIGURES,
    MEAN,
    ComparedRun,
    common_threshold,
    mean_of,
    named_runs,
    ranks,
    side_by_side,
    spearman,
    stability,
)
from model.metrics import measure
from report.comparison import comparison_page
from tests.builders import table_of

ABOUT = {"threshold": 0.5, "temperature": 2.0}


def rows(noise: float, seed: int = 2, number: int = 240) -> list[dict[str, Any]]:
    """Return rows of sources a and b (both classes), c (only reals) and d (only fakes). More
    `noise` makes a worse run.
    """
    rng, more = np.random.default_rng(1), np.random.default_rng(seed)
    labels = np.where(np.arange(number) % 6 < 4, np.arange(number) % 2, 0)
    logits = rng.normal(3 * labels - 1.5, 1) + noise * more.normal(size=number)
    return [
        {
            "set": "val", "key": f"k{i:03d}", "label": int(labels[i]),
            "source": {1: "d", 4: "c", 5: "c"}.get(i % 6, "ab"[i // 2 % 2]),
            "generator": f"gan-{i % 3}" if labels[i] else "camera", "logit": float(logits[i]),
        }
        for i in range(number)
    ]  # fmt: skip


def runs(*noises: float, **about: Any) -> list[ComparedRun]:
    tables = [table_of(rows(n, i), ["val"], **(ABOUT | about)) for i, n in enumerate(noises)]
    shared = shared_samples(*tables)
    return [ComparedRun(f"run {i}", table, 10.0 * (i + 1)) for i, table in enumerate(shared)]


def test_figures_are_those_of_each_report() -> None:
    compared = runs(3.0, 0.2, 1.5)
    entry = side_by_side(compared)["val"]
    assert entry["best"] in ("run 1", MEAN) and len(entry["runs"]) == 4
    values = [run["auroc"]["value"] for run in entry["runs"]]
    assert values == sorted(values, reverse=True)
    assert [run["behind"] for run in (entry["runs"][0]["auroc"],)] == [None]
    for run in compared:
        own = next(line for line in entry["runs"] if line["name"] == run.name)
        overall = report(run.scores)["sets"]["val"]["overall"]
        for name, metric in (("auroc", "auroc"), ("recall_at_1", "tpr_at_fpr_1"),
                             ("recall_at_5", "tpr_at_fpr_5"), ("recall", "recall")):  # fmt: skip
            assert own[name]["value"] == overall[metric]
            assert [own[name]["low"], own[name]["high"]] == overall["intervals"][metric]
        assert own["ece"] == overall["ece"]
        probabilities = run.scores.numbers("probability")
        labels = run.scores.numbers("label").astype(int)
        sources = np.array(run.scores.table.column("source").to_pylist())
        # c has no fakes, so all fakes of the set are used; likewise the reals for d.
        for source, label in (("c", 1), ("d", 0)):
            kept = (labels == label) | (sources == source)
            of_source = asdict(measure(labels[kept], probabilities[kept]))["auroc"]
            assert entry["sources"][source][run.name] == of_source


def unread(table: list[dict[str, Any]], *sets: str) -> list[dict[str, Any]]:
    return [row | ({"valid": False} if row["set"] in sets else {}) for row in table]


def test_images_that_no_run_could_read() -> None:
    """A set without any other image is empty; without any image, the comparison is refused."""
    table = rows(0.5)
    other = [{**row, "set": "other"} for row in table]
    first = table_of(table + other, ["val", "other"], **ABOUT)
    half = table_of(unread(table, "val") + other, ["val", "other"], **ABOUT)
    shared = shared_samples(first, half)
    compared = side_by_side([ComparedRun(f"run {i}", table) for i, table in enumerate(shared)])
    assert (compared["val"]["images"], compared["other"]["images"]) == (0, 240)
    none = table_of(unread(table + other, "val", "other"), ["val", "other"], **ABOUT)
    with pytest.raises(ScoresError, match="no image that all of them could read"):
        side_by_side([ComparedRun("run", table) for table in shared_samples(first, none)])


def test_differences_to_the_best_are_paired() -> None:
    """A small loss on every image is significant in the paired interval."""
    entry = side_by_side(runs(0.0, 0.9))["val"]
    by_name = {run["name"]: run for run in entry["runs"]}
    worse = by_name["run 1"]["auroc"]
    assert entry["best"] == "run 0"
    assert worse["behind"][0] < worse["behind"][1] < 0


def test_the_mean_run_averages_probabilities() -> None:
    compared = runs(0.5, 2.0, images=1)
    mean = mean_of(compared)
    expected = (
        compared[0].scores.numbers("probability") + compared[1].scores.numbers("probability")
    ) / 2
    assert np.array_equal(mean.scores.numbers("probability"), expected)
    assert mean.images_per_s == pytest.approx(1 / (1 / 10 + 1 / 20))
    assert mean.scores.evaluation["threshold"] == 0.5
    slow = [*compared, ComparedRun("x", compared[0].scores, None)]
    assert mean_of(slow).images_per_s is None


def test_ranks_by_hand() -> None:
    assert ranks(np.array([0.9, 0.5, 0.7])).tolist() == [1, 3, 2]
    assert ranks(np.array([0.9, 0.5, 0.9, 0.1])).tolist() == [1.5, 3, 1.5, 4]


def test_stability_by_hand() -> None:
    """Three sources rank four runs 1234, 1243 and 4321. By 1 - 6 sum(d^2) / (n (n^2 - 1)), the
    first two have 1 - 6 * 2 / 60 = 0.8 (one swap). The first and the last have -1 (reversed). The
    second and the last have differences 3, 1, -2, -2, so 1 - 6 * 18 / 60 = -0.8.
    """
    values = np.array([[0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.6, 0.7], [0.1, 0.2, 0.3, 0.4]])
    assert spearman(values[0], values[1]) == pytest.approx(0.8)
    assert spearman(values[0], values[2]) == pytest.approx(-1)
    assert spearman(values[1], values[2]) == pytest.approx(-0.8)
    result = stability(values)
    assert result["sources"] == 3 and result["least"] == pytest.approx(-1)
    assert result["mean"] == pytest.approx((0.8 - 1 - 0.8) / 3)
    assert spearman(np.ones(4), values[0]) is None
    assert stability(np.ones((2, 4))) is None


def test_a_common_threshold_by_hand() -> None:
    """Of ten reals of two runs, at most one may be called fake at 10 %."""
    reals = [np.array([0.1, 0.2, 0.3, 0.4, 0.5]), np.array([0.6, 0.7, 0.8, 0.85, 0.9])]
    threshold = common_threshold(reals, 0.10)
    assert 0.85 < threshold < 0.9 and common_threshold(reals, 0.05) > 0.9
    assert common_threshold([np.array([])], 0.05) is None
    entry = side_by_side(runs(0.2, 3.0))["val"]
    rates = [run["common"]["5"]["false_positive_rate"] for run in entry["runs"]
             if run["name"] != MEAN]  # fmt: skip
    assert np.mean(rates) <= 0.05 and min(rates) < max(rates)


def test_worst_lines_and_ranks() -> None:
    entry = side_by_side(runs(0.2, 1.0, 4.0))["val"]
    of_source = Counter(row["source"] for row in rows(0.2))
    of_generator = Counter(row["generator"] for row in rows(0.2) if row["label"] == 1)
    for run in entry["runs"]:
        sources = {name: values[run["name"]] for name, values in entry["sources"].items()}
        assert run["worst_source"]["value"] == min(sources.values())
        generators = {name: values[run["name"]] for name, values in entry["generators"].items()}
        assert run["worst_generator"]["value"] == min(generators.values())
        source, generator = run["worst_source"], run["worst_generator"]
        assert source["images"] == of_source[source["name"]]
        assert generator["images"] == of_generator[generator["name"]]
        assert run["worst_perturbation"] is None
        if run["name"] == MEAN:
            assert run["ranks"] is None
        else:
            assert run["ranks"] == [1 + int(run["name"][-1])] * 2
    assert entry["stability"] == {"sources": 4, "mean": 1.0, "least": 1.0}


def test_a_set_without_reals_has_no_false_positives() -> None:
    """So none is the best, and none is behind it: recall alone ranks nothing."""
    fakes = [row | {"label": 1} for row in rows(0.5)]
    better = [row | {"logit": row["logit"] + 1} for row in fakes]
    tables = shared_samples(*(table_of(one, ["val"], **ABOUT) for one in (fakes, better)))
    compared = {
        "val": side_by_side([ComparedRun(str(i), table) for i, table in enumerate(tables)])["val"]
    }
    entry = compared["val"]
    assert entry["common"] == {"1": None, "5": None} and entry["reals"] == 0
    assert entry["best"] is None and '<tr class="best' not in comparison_page(compared, "")
    assert [run["name"] for run in entry["runs"]] == ["0", "1", MEAN]
    for run in entry["runs"]:
        assert [run[figure]["behind"] for figure in FIGURES] == [None] * 5
        assert run["auroc"]["value"] is None and run["recall"]["value"] is not None
        assert run["worst_generator"] is None


def test_runs_that_cannot_be_compared() -> None:
    one = table_of(rows(0.1), ["val"], **ABOUT)
    other = table_of(rows(0.1)[:100], ["val"], **ABOUT)
    with pytest.raises(ScoresError, match="240, 240 and 100 images, 100 of them in all"):
        shared_samples(one, one, other)
    assert [len(table) for table in shared_samples(one, one, other, intersect=True)] == [100] * 3
    renamed = table_of([row | {"set": "val"} for row in rows(0.1)], ["other"], **ABOUT)
    with pytest.raises(ScoresError, match="no set in common"):
        side_by_side([ComparedRun("a", one), ComparedRun("b", renamed)])


def test_names_of_runs_are_unique() -> None:
    assert named_runs(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]
    assert named_runs(["a", "a (2)", "a"]) == ["a", "a (2)", "a (3)"]
    assert named_runs(["a", "a", "a (2)", "a (2)"]) == ["a", "a (3)", "a (2)", "a (2) (2)"]
    assert named_runs([MEAN]) == [f"{MEAN} (2)"]
