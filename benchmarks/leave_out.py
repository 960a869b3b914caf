"""Measure a head on sources that were left out of its training, from stored features.

    python -m benchmarks.leave_out --recipe FILE [--init-from WEIGHTS] [--pairs N] [--robustness N]

Main entry: `main()`, this click command. For each source, a head is trained without it (and without
the sources that the recipe's `calibration.together` groups with it). This head scores the source.
Missing features are first computed and written to the recipe's feature store. No run is written. An
error in the input is printed in one line, with exit code 1 (2 for a wrong option, or if the file of
`--recipe` does not exist).

- `--recipe`: a recipe file with a table `[features]` (a head on a frozen backbone), such as
  `recipes/clip-all.toml`. `--set KEY=VALUE` changes a value of it; may be repeated.
- `--init-from`: a `.safetensors` file or a checkpoint folder with the backbone's weights, or the
  name of a fetched backbone, such as clip (default: what the recipe says).
- `--pairs N`: for up to N random pairs of a source of reals and one of fakes, also train a head
  without both, which is harder (seconds a pair).
- `--robustness N`: up to N images of each source are scored again after each perturbation of
  `pipeline/perturb.py`, by the head trained without the source. This computes their features.
- `--data`: the folder or address of the packed sets (default `data/shards`). `--runs`: the folder
  of training runs, where the recipe's starting checkpoint may be (default `runs`).
- `--left-out`: a file for the figures that the card of a detector shows: pooled, one left out,
  within subjects and perturbed, in the format of `model/export/new_kinds.py` (default: none).
- `--json`: a file for what is printed (default: none).

A dict is printed as JSON. Its keys (the first two leave out sources that have both classes; without
sources of reals alone and of fakes alone, "one left out" is null, and what needs pairs is missing):

- "one left out": `mean`, 95 % `interval` and `worst` (the ten lowest) of the AUROCs of all pairs of
  a source of reals and a source of fakes. The interval is from 200 resamples of the sources; those
  that `calibration.together` groups are drawn together.
- "at 5 % over all": source -> share of its images called fake, at the threshold for 5 % false
  positives over all sources of reals together.
- "within subjects": `auroc`, the mean, weighted by images, over `clusters` clusters of similar
  images (by their features), those with at least 8 images of each class. A head that recognizes
  nothing but the subject gets 0.5.
- "pooled": the AUROC of all images.
- "threshold pooled", "threshold most_sources", "threshold worst_source": three calibrations, which
  keep the recipe's error rates: "pooled" over all images together, "most_sources" in three quarters
  of the sources, "worst_source" in every source. Each has `temperature`, `threshold`, `band` ([low,
  high]: the probabilities called uncertain) and `sources` (source -> `false_positive_rate`,
  `recall`, `uncertain` and numbers of images).
- "perturbed", with `--robustness`: perturbation -> `auroc` (mean over pairs of sources),
  `false_positive_rate` and `recall` (means over sources) at the threshold of the recipe's own
  calibration, one of the three above, and the numbers of images, `reals` and `fakes`.
- "pairs left out", with `--pairs`: like "one left out", by heads trained without either source, and
  `pairs`, their number, and `one_left_out`, the mean of "one left out" over the same pairs.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import cli
import console
import recipes
from model.calibration.fit import calibrate_sources, threshold_over_sources
from model.evaluation.robustness import perturbed_variants
from model.export.new_kinds import (
    AfterPerturbation,
    NewKinds,
    Pairs,
    WithinSubjects,
    write_new_kinds,
)
from model.features.loader import FeatureLoader, source_of
from model.metrics import measure
from model.recipe import Recipe
from model.score import autocast, evaluating, logits_of, score_set
from model.shipped.fetch import weights_at
from model.training.assemble import assemble, embed_run, with_features
from model.training.leave_out import groups_of, leave_one_out, refit
from model.training.plan import RunPlan, plan
from model.training.step import TrainState
from model.verdict import probability
from pipeline import pil
from pipeline.perturb import PERTURBATIONS
from storage import any_path

Scored = Mapping[str, tuple[np.ndarray, np.ndarray]]

TOKEN = 768
"""Numbers of a class token of ViT-B. Clusters are made of the last token: it tells the subject."""

CLUSTERS = 60
FEWEST = 8
"""Images of each class that a cluster needs at least to be counted."""


def auroc(reals: np.ndarray, fakes: np.ndarray) -> float:
    """Return the AUROC of the logits of reals and fakes."""
    labels = np.r_[np.zeros(len(reals), int), np.ones(len(fakes), int)]
    value = measure(labels, probability(np.r_[reals, fakes]), 0.5).auroc
    assert value is not None
    return value


def of_pairs(real: Mapping[str, np.ndarray], fake: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the AUROC of each pair of a real and a fake source."""
    return {f"{r} | {f}": auroc(real[r], fake[f]) for r, f in itertools.product(real, fake)}


def interval(
    values: Mapping[str, float], group_of: Callable[[str], str] = str, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean, resampling groups of real and of fake
    sources. `group_of` maps a source to its group. `values` may lack pairs.
    """
    rng = np.random.default_rng(seed)
    sides = [
        np.unique([group_of(key.split(" | ")[side]) for key in values], return_inverse=True)[1]
        for side in (0, 1)
    ]
    aurocs, means = np.array([*values.values()]), []
    for _ in range(200):
        drawn = [rng.integers(0, own.max() + 1, own.max() + 1) for own in sides]
        counts = [
            np.bincount(d, minlength=len(d))[own] for d, own in zip(drawn, sides, strict=True)
        ]
        if (weights := counts[0] * counts[1]).any():
            means.append(np.average(aurocs, weights=weights))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def within_subjects(
    features: np.ndarray, labels: np.ndarray, logits: np.ndarray
) -> tuple[float | None, int]:
    """Return the mean AUROC within clusters that have both classes, and the number of clusters.

    The mean is weighted by the number of images. It is None if there is no such cluster.
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
    return float(np.average(values, weights=sizes)) if values else None, len(values)


def kinds_of(scored: Scored) -> dict[str, int]:
    """Return the label of each source whose images are all real or all fake."""
    return {n: int(y[0]) for n, (y, _) in scored.items() if len(set(y.tolist())) == 1}


def left_out_pairs(
    planned: RunPlan, state: TrainState, scored: Scored, most: int
) -> dict[str, float]:
    """Return the AUROC of up to `most` random pairs of a source of reals and one of fakes, each by
    a head that was trained without both.
    """
    pool, loading = planned.stream.pool, planned.recipe.loading
    codes, names = pool.shards.codes("source")
    groups, group_of = groups_of(planned), planned.recipe.calibration.group_of
    loader = planned.stream.loader
    assert isinstance(loader, FeatureLoader)
    kinds = kinds_of(scored)
    pairs = [(r, f) for r in kinds for f in kinds if (kinds[r], kinds[f]) == (0, 1)]
    chosen = np.random.default_rng(0).permutation(len(pairs))[:most]
    pairs, values = [pairs[i] for i in chosen], {}
    with console.progress("leaving out pairs", len(pairs)) as advance:
        for real, fake in pairs:
            refit(planned, state, sorted({*groups[group_of(real)], *groups[group_of(fake)]}))
            logits = []
            for name in (real, fake):
                rows = pool.new[codes[pool.new] == names.index(name)]
                part = FeatureLoader(pool.shards.take(rows), loader.source, loading, planned.device)
                logits.append(score_set(state.net, part, planned.dtype).logits)
            values[f"{real} | {fake}"] = auroc(*logits)
            advance(1)
    return values


def perturbed_features(
    planned: RunPlan, state: TrainState, rows: np.ndarray
) -> dict[int, np.ndarray]:
    """Return the features of some samples after each perturbation, float32 (perturbations, D) each.

    They are NaN where a perturbation fails. Samples that cannot be decoded or preprocessed are
    missing.
    """
    features = {}
    prepare = partial(pil.preprocess, settings=planned.recipe.preprocess)
    variants = perturbed_variants(planned.stream.pool.shards, rows, PERTURBATIONS, prepare)
    with console.progress("perturbing", len(rows)) as advance, evaluating(state.net):
        for sample, images in variants:
            advance(1)
            if isinstance(images, str):
                continue
            there = [not isinstance(image, str) for image in images]
            if not any(there):
                continue
            pixels = np.stack([image for image in images if not isinstance(image, str)])
            tensor = torch.from_numpy(pixels).to(planned.device).permute(0, 3, 1, 2)
            with torch.inference_mode(), autocast(planned.device, planned.dtype):
                own = state.net.features(tensor).float().cpu()
            features[sample] = np.full((len(images), own.shape[1]), np.nan, np.float32)
            features[sample][there] = own.numpy()
    return features


def subset_of(planned: RunPlan, per_source: int) -> dict[str, np.ndarray]:
    """Return up to `per_source` rows of each source, those whose files have the smallest sha256."""
    pool, used = planned.stream.pool, planned.stream.used_new
    codes, names = pool.shards.codes("source")
    hashes = np.array(pool.shards.table.column("sha256").to_pylist(), "S32")
    return {
        names[code]: (own := used[codes[used] == code])[np.argsort(hashes[own])][:per_source]
        for code in np.unique(codes[used])
    }


def robustness(
    logits: Mapping[str, np.ndarray], kinds: Mapping[str, int], threshold: float
) -> dict[str, AfterPerturbation]:
    """Return metrics of each perturbation: the mean AUROC over pairs of sources, and the mean false
    positive rate and recall over sources at `threshold`, a logit.

    `logits` are (perturbations, N) per source. `kinds` are the labels of the sources, 0 or 1.
    """
    figures = {}
    for index, perturbation in enumerate(PERTURBATIONS):
        own = {name: logits[name][index][np.isfinite(logits[name][index])] for name in kinds}
        real, fake = ({n: z for n, z in own.items() if kinds[n] == k and len(z)} for k in (0, 1))
        figures[perturbation.name] = AfterPerturbation(
            auroc=float(np.mean([*of_pairs(real, fake).values()])),
            false_positive_rate=float(np.mean([(z >= threshold).mean() for z in real.values()])),
            recall=float(np.mean([(z >= threshold).mean() for z in fake.values()])),
            reals=sum(map(len, real.values())),
            fakes=sum(map(len, fake.values())),
        )
    return figures


@click.command(cls=console.Command)
@click.option("--recipe", "recipe_path", type=cli.LocalPath(exists=True), required=True)
@click.option("--set", "overrides", multiple=True, help="Change a value of the recipe.")
@click.option("--init-from", type=cli.LocalPath(), help="Weights of the backbone, or its name.")
@click.option(
    "--pairs",
    "most_pairs",
    type=click.IntRange(min=1),
    help="Random pairs of sources to train without as well.",
)
@click.option(
    "--robustness",
    "per_source",
    type=click.IntRange(min=1),
    help="Images of each source to score after each perturbation as well.",
)
@click.option("--left-out", type=cli.LocalPath(dir_okay=False), help="File for the model card.")
@click.option("--json", "out", type=cli.LocalPath(dir_okay=False), help="File for the figures.")
@cli.options("data", "runs")
def main(
    recipe_path: Path,
    overrides: tuple[str, ...],
    init_from: Path | None,
    most_pairs: int | None,
    per_source: int | None,
    left_out: Path | None,
    out: Path | None,
    data: str,
    runs: Path,
) -> None:
    """Measure a head on sources that were left out of its training."""
    recipe = recipes.load(Recipe, recipe_path, overrides)
    if recipe.features is None or not recipe.features.stored:
        raise click.UsageError(
            f"{recipe_path} has no stored features; give a recipe with a frozen "
            "backbone, such as recipes/clip-all.toml"
        )
    weights = weights_at(init_from) if init_from else None
    planned = plan(
        replace(recipe, name=f"{recipe.name}-left-out"), any_path(data), runs, init_from=weights
    )
    state = assemble(planned)
    planned = with_features(planned, state)
    source = source_of(planned.recipe, state.net, planned.dtype)
    pool = planned.stream.pool
    embed_run(planned, state, source, [pool.shards])
    subset = subset_of(planned, per_source) if per_source else {}
    perturbed = perturbed_features(
        planned, state, np.concatenate([*subset.values(), np.empty(0, np.int64)])
    )
    perturbed_logits: dict[str, np.ndarray] = {}

    def score_perturbed(members: Sequence[str]) -> None:
        for name in set(members) & subset.keys():
            own = np.stack([perturbed[row] for row in subset[name].tolist() if row in perturbed], 1)
            flat = torch.from_numpy(own.reshape(-1, own.shape[-1])).to(planned.device)
            logits = logits_of(state.net, flat, planned.device, torch.float32)
            perturbed_logits[name] = logits.cpu().numpy().reshape(own.shape[:2])

    scored = leave_one_out(planned, state, source, score_perturbed)
    kinds = kinds_of(scored)
    real, fake = ({n: scored[n][1] for n in kinds if kinds[n] == label} for label in (0, 1))
    one = of_pairs(real, fake)
    group_of = recipe.calibration.group_of
    pairs = summary(one, group_of) if one else None
    figures: dict[str, Any] = {"one left out": asdict(pairs) if pairs else None}
    if real:
        pooled = threshold_over_sources([probability(z) for z in real.values()], 0.05, "pooled")
        figures["at 5 % over all"] = {
            n: float((probability(z) >= pooled).mean()) for n, z in {**real, **fake}.items()
        }
    codes, names = pool.shards.codes("source")
    table = FeatureLoader(pool.shards, source, recipe.loading, planned.device).table(0)
    rows = np.concatenate([pool.new[codes[pool.new] == names.index(name)] for name in scored])
    rows = np.delete(rows, list(table.failures(rows)))  # as `scored`, without unreadable images
    width = table.width // state.net.crops  # of the center crop
    last = table.rows(rows)[:, max(0, width - TOKEN) : width].astype(np.float32)
    labels, logits = (np.concatenate([pair[part] for pair in scored.values()]) for part in (0, 1))
    inside, clusters = within_subjects(last, labels, logits)
    within = WithinSubjects(auroc=inside, clusters=clusters)
    figures["within subjects"] = asdict(within)
    figures["pooled"] = auroc(logits[labels == 0], logits[labels == 1])
    for over in ("pooled", "most_sources", "worst_source"):
        fitted = calibrate_sources(scored, replace(recipe.calibration, threshold=over))
        figures[f"threshold {over}"] = {
            "threshold": fitted.threshold, "band": fitted.band, "sources": fitted.sources,
            "temperature": fitted.temperature,
        }  # fmt: skip
    after: dict[str, AfterPerturbation] = {}
    if per_source and one:
        shipped = calibrate_sources(scored, recipe.calibration)
        at = math.log(shipped.threshold / (1 - shipped.threshold)) * shipped.temperature
        after = robustness(perturbed_logits, kinds, at)
        figures["perturbed"] = {name: asdict(entry) for name, entry in after.items()}
    if most_pairs and one:
        both = left_out_pairs(planned, state, scored, most_pairs)
        figures["pairs left out"] = asdict(summary(both, group_of)) | {
            "pairs": len(both),
            "one_left_out": float(np.mean([one[name] for name in both])),
        }
    if left_out:
        write_new_kinds(
            NewKinds(
                pooled=figures["pooled"], pairs=pairs, within_subjects=within, perturbed=after
            ),
            left_out,
        )
    console.say(json.dumps(figures, indent=1))
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def summary(values: Mapping[str, float], group_of: Callable[[str], str]) -> Pairs:
    """Return the mean, the interval and the ten lowest of some pairs."""
    worst = sorted(values, key=values.__getitem__)[:10]
    return Pairs(
        mean=float(np.mean([*values.values()])),
        interval=interval(values, group_of),
        worst={name: round(values[name], 3) for name in worst},
    )


if __name__ == "__main__":
    main()
