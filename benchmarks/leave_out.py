"""Measure a head on sources that it has not learned from, by stored features.

    python -m benchmarks.leave_out --recipe recipes/clip-all.toml --init-from FILE [--pairs]

Each source is scored by a head that was trained without it. From these scores come the AUROC of
each pair of a real and a fake source, the share of each real source that is called fake at the
threshold for 5 % false positives over all of them, and what is found of each fake source there;
and the AUROC within subjects: images are put into clusters by their features, and only images of
one cluster are compared, so that a head that knows nothing but the subject gets 0.5. With
`--pairs` the head is trained without both sources of each pair, which is harsher and takes minutes.
Intervals are those of 200 resamplings of sources.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import console
import recipes
from model.calibrate import calibrate_sources, threshold_over_sources
from model.features.leave_out import leave_one_out, refit
from model.features.loader import FeatureLoader
from model.features.prepare import embed_run, source_of, with_features
from model.metrics import measure
from model.recipe import Recipe
from model.score import probability, score_set
from model.training.assemble import assemble
from model.training.plan import RunPlan, plan
from model.training.step import TrainState
from storage import any_path

Scored = Mapping[str, tuple[np.ndarray, np.ndarray]]

CLUSTERS = 60
FEWEST = 8
"""Images of each class that a cluster must hold to be counted."""


def auroc(reals: np.ndarray, fakes: np.ndarray) -> float:
    """The chance that a fake scores higher than a real image."""
    labels = np.r_[np.zeros(len(reals), int), np.ones(len(fakes), int)]
    value = measure(labels, probability(np.r_[reals, fakes]), 0.5).auroc
    assert value is not None
    return value


def of_pairs(real: Mapping[str, np.ndarray], fake: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The AUROC of each pair of sources."""
    return {f"{r} | {f}": auroc(real[r], fake[f]) for r, f in itertools.product(real, fake)}


def interval(values: Mapping[str, float], seed: int = 0) -> tuple[float, float]:
    """95 % of the means when sources are drawn again, real and fake ones each."""
    rng = np.random.default_rng(seed)
    real, fake = ([*dict.fromkeys(k.split(" | ")[side] for k in values)] for side in (0, 1))
    table = np.array([[values[f"{r} | {f}"] for f in fake] for r in real])
    means = [
        table[rng.integers(0, len(real), len(real))][
            :, rng.integers(0, len(fake), len(fake))
        ].mean()
        for _ in range(200)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def within_subjects(
    features: np.ndarray, labels: np.ndarray, logits: np.ndarray
) -> tuple[float, int]:
    """The mean AUROC within clusters that hold both classes, weighed by their images, and how many
    such clusters there are.
    """
    from sklearn.cluster import KMeans

    length = np.linalg.norm(features, axis=1, keepdims=True)
    clusters = KMeans(CLUSTERS, n_init=3, random_state=0).fit_predict(features / length)
    values, sizes = [], []
    for cluster in range(CLUSTERS):
        own = clusters == cluster
        reals, fakes = logits[own & (labels == 0)], logits[own & (labels == 1)]
        if min(len(reals), len(fakes)) >= FEWEST:
            values.append(auroc(reals, fakes))
            sizes.append(own.sum())
    return float(np.average(values, weights=sizes)), len(values)


def left_out_pairs(planned: RunPlan, state: TrainState, scored: Scored) -> dict[str, float]:
    """The AUROC of each pair by a head that was trained without both."""
    pool, loading = planned.stream.pool, planned.recipe.loading
    codes, names = pool.shards.codes("source")
    group_of = planned.recipe.calibration.group_of
    loader = planned.stream.loader
    assert isinstance(loader, FeatureLoader)
    kinds = {name: int(labels[0]) for name, (labels, _) in scored.items()}
    pairs = [(r, f) for r in kinds for f in kinds if (kinds[r], kinds[f]) == (0, 1)]
    values = {}
    with console.progress("leaving out pairs", len(pairs)) as advance:
        for real, fake in pairs:
            members = [n for n in kinds if group_of(n) in (group_of(real), group_of(fake))]
            refit(planned, state, members)
            logits = []
            for name in (real, fake):
                rows = pool.new[codes[pool.new] == names.index(name)]
                part = FeatureLoader(pool.shards.take(rows), loader.source, loading, planned.device)
                logits.append(score_set(state.net, part, planned.dtype).logits)
            values[f"{real} | {fake}"] = auroc(*logits)
            advance(1)
    return values


@click.command(cls=console.Command)
@click.option("--recipe", "recipe_path", type=console.LocalPath(exists=True), required=True)
@click.option("--set", "overrides", multiple=True, help="Change a value of the recipe.")
@click.option("--init-from", type=console.LocalPath(exists=True), help="Weights of the backbone.")
@click.option("--pairs", is_flag=True, help="Train without both sources of each pair as well.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here too.")
@console.options("data", "runs")
def main(
    recipe_path: Path,
    overrides: tuple[str, ...],
    init_from: Path | None,
    pairs: bool,
    out: Path | None,
    data: str,
    runs: Path,
) -> None:
    """Measure a head on sources that it has not learned from."""
    recipe = recipes.load(Recipe, recipe_path, overrides)
    planned = plan(
        replace(recipe, name=f"{recipe.name}-left-out"), any_path(data), runs, init_from=init_from
    )
    state = assemble(planned)
    planned = with_features(planned, state)
    source = source_of(planned.recipe, state.net, torch.float32)
    pool = planned.stream.pool
    embed_run(planned, state, source, [pool.shards])
    scored = leave_one_out(planned, state, source)
    real = {n: z for n, (y, z) in scored.items() if not y.any()}
    fake = {n: z for n, (y, z) in scored.items() if y.all()}
    one = of_pairs(real, fake)
    figures: dict[str, Any] = {"one left out": summary(one)}
    pooled = threshold_over_sources([probability(z) for z in real.values()], 0.05, "pooled")
    figures["at 5 % over all"] = {
        n: float((probability(z) >= pooled).mean()) for n, z in {**real, **fake}.items()
    }
    codes, names = pool.shards.codes("source")
    table = FeatureLoader(pool.shards, source, recipe.loading, planned.device).table(0)
    rows = np.concatenate([pool.new[codes[pool.new] == names.index(name)] for name in scored])
    last = table.rows(rows)[:, -768:].astype(np.float32)
    labels, logits = (np.concatenate([pair[part] for pair in scored.values()]) for part in (0, 1))
    inside, clusters = within_subjects(last, labels, logits)
    figures["within subjects"] = {"auroc": inside, "clusters": clusters}
    figures["pooled"] = auroc(logits[labels == 0], logits[labels == 1])
    for over in ("pooled", "most_sources", "worst_source"):
        fitted = calibrate_sources(scored, replace(recipe.calibration, threshold=over))
        figures[f"threshold {over}"] = {
            "threshold": fitted.threshold, "band": fitted.band, "sources": fitted.sources,
            "temperature": fitted.temperature,
        }  # fmt: skip
    if pairs:
        figures["pairs left out"] = summary(left_out_pairs(planned, state, scored))
    console.say(json.dumps(figures, indent=1))
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def summary(values: Mapping[str, float]) -> dict[str, Any]:
    """Mean, interval, and the worst of some pairs."""
    worst = sorted(values, key=values.__getitem__)[:10]
    return {
        "mean": float(np.mean([*values.values()])),
        "interval": interval(values),
        "worst": {name: round(values[name], 3) for name in worst},
    }


if __name__ == "__main__":
    main()
