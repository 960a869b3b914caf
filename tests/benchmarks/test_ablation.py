"""Metrics of the ablation: the unseen sources do not affect the threshold, and the worst loss."""

import numpy as np
import pytest

from benchmarks.ablation import figures, lost, mean_and_std


def scored(
    sources: dict[str, tuple[int, float]], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Make 50 images per source; `sources` gives the label and the mean logit of each."""
    labels = np.repeat([label for label, _ in sources.values()], 50)
    logits = np.concatenate([rng.normal(mean, 1, 50) for _, mean in sources.values()])
    return {"labels": labels, "logits": logits, "source": np.repeat([*sources], 50)}


def scores(unseen: float = 0.0, old: float = -2.0) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    return {
        "val": scored({"photos": (0, old), "renders": (1, 2.0)}, rng),
        "val-phase2": scored({"faces": (0, -2.0), "new": (1, 2.0)}, rng),
        "unseen": scored({"bsds500": (0, unseen), "cats_web": (0, -9.0), "nano": (1, 1.0)}, rng),
    }


def test_unseen_sources_do_not_affect_the_threshold() -> None:
    one, other = (figures(scores(unseen=mean), ["val", "val-phase2"]) for mean in (-1.0, 3.0))
    assert one["threshold"] == other["threshold"]
    assert one["unseen"]["auroc"] > other["unseen"]["auroc"] + 0.2
    assert other["unseen calibrated"]["false_positive_rate"] > 0.4
    assert one["val calibrated"]["false_positive_rate"] <= 0.10


def test_hard_excludes_the_easy_photographs() -> None:
    row = figures(scores(), ["val"])
    assert row["unseen"]["reals"] == 100
    assert row["hard"]["reals"] == 50
    assert row["hard"]["auroc"] < row["unseen"]["auroc"]


def test_worst_loss_is_the_largest_of_one_source() -> None:
    row = {"first": figures(scores(), ["val"]), "second": figures(scores(old=2.0), ["val"])}
    before, after = (row[phase]["val"]["sources"]["photos"] for phase in ("first", "second"))
    assert before > 0.9 and after < 0.1
    assert lost(row, "val") == pytest.approx(before - after)


def test_the_standard_deviation_is_that_of_a_sample() -> None:
    assert mean_and_std([0.5, 0.7]) == "60.0 ± 14.1"
    assert mean_and_std([0.5]) == "50.0"
