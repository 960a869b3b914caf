"""Measure how well metadata alone predicts the label (real or fake) of the images in a shard set.

Main entry: `audit(shards, *, seed=0, on_step=...)` takes a `ShardSet` (`open_shards([folder])` of
`sharding/format.py`) and returns an `Audit`. `seed`: the seed of folds and trees. `on_step(1)` is
called after each of at most `steps_of(shards)` steps. ValueError: no scikit-learn.
`write_report(path, seed, {name: as_json(shards, audit)})` writes JSON.

An `AurocEstimate` is an AUROC (`auroc`, 0.5: guessing) and its 95 % interval (`low`, `high`); None
if a class has fewer groups than `MIN_GROUPS`, unless it is clearly above 0.5. Fields of an `Audit`:

- `samples`, `reals`, `fakes`: numbers of images.
- `pooled`: the `AurocEstimate` over all images. If None, `features` and `shortcuts` are empty.
- `across`: like `pooled`, but each source is scored by a fit on the others. None for one source.
- `source_name`: an `AurocEstimate` by the source's name alone. None for one source, or if `pooled`
  is.
- `sources`: dict, source -> `SourceAudit`: `reals`, `fakes`, `within` (`AurocEstimate` by a fit on
  it), `from_others` (by one on the others), `note` (why no `within`). After the 250 largest:
  "others".
- `features`: dict, feature -> `FeatureAudit`: `alone`, the `AurocEstimate` by a fit on this feature
  only, and `drop` (float), the AUROC lost by shuffling it.
- `shortcuts`: values that predict the label: `feature`, `value`, `images`, `fake_share` (0 to 1).
- `verdict`: little, some, strong or unknown. `notes`: texts on how to read the figures.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from installed import command
from sharding.audit.libraries import import_extra, one_thread
from sharding.audit.metadata import (
    FEATURES,
    MAX_NAMES,
    NAMED,
    NO_JPEG,
    SOURCE,
    Metadata,
    assign_folds,
    metadata_of,
    spelled,
)
from sharding.format import CLASSES, ShardSet, open_shards
from sharding.verify import sets_in
from storage import AnyPath, write_text

AUDIT_VERSION = 3
"""Version of `report.json`. It increases when a name or its meaning changes."""

MIN_GROUPS = 30
"""Groups per class below which guessing cannot be distinguished from a shortcut. An AUROC on fewer
groups is given only if it is above 0.5 and its interval is no wider than that of guessing on this
many groups."""

NAMED_SOURCES = 6
"""Largest number of sources of one class that a note names. The other sources are counted."""

FIT_LIMIT = 20_000
"""Largest number of samples that a classifier is fitted on. All samples are scored."""

LITTLE, STRONG = 0.60, 0.75
"""Verdict thresholds: an AUROC below the first is "little", above the second "strong"."""

_PERMUTED = 20_000  # largest number of held-out samples per fold for permutation importance


@dataclass(frozen=True)
class AurocEstimate:
    """AUROC and its 95 % interval, which ignores the variation between splits into folds: on a few
    hundred images it is somewhat too narrow.
    """

    auroc: float
    low: float
    high: float

    def __str__(self) -> str:
        """Format as `0.731 (0.702-0.760)`."""
        return f"{self.auroc:.3f} ({self.low:.3f}-{self.high:.3f})"


@dataclass(frozen=True, kw_only=True)
class SourceAudit:
    """Result for one source. `note` is the reason if `within` is None, else empty."""

    reals: int
    fakes: int
    within: AurocEstimate | None
    from_others: AurocEstimate | None
    note: str


@dataclass(frozen=True, kw_only=True)
class FeatureAudit:
    """Result for one feature. `drop` is measured with the full classifier on held-out folds. It is
    small if other features have the same information.
    """

    alone: AurocEstimate
    drop: float


@dataclass(frozen=True, kw_only=True)
class Shortcut:
    """A common value whose share of fakes differs much from that of the set."""

    feature: str
    value: str
    images: int
    fake_share: float

    def __str__(self) -> str:
        """Format as a sentence: `format PNG: 100 % fake (109 images)`."""
        is_fake = self.fake_share >= 0.5
        share = self.fake_share if is_fake else 1 - self.fake_share
        return (
            f"{self.feature} {self.value}: {100 * share:.0f} % {CLASSES[is_fake]} "
            f"({self.images:,} images)"
        )


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Report on one set."""

    samples: int
    reals: int
    fakes: int
    pooled: AurocEstimate | None
    across: AurocEstimate | None
    source_name: AurocEstimate | None
    sources: dict[str, SourceAudit]
    features: dict[str, FeatureAudit]
    shortcuts: list[Shortcut]
    verdict: str
    notes: list[str]


def open_sets(folders: Sequence[AnyPath]) -> dict[str, ShardSet]:
    """Open the sets at or directly below `folders`, by name.

    Raises:
        ShardError: a folder has no shard set.
        ValueError: two sets have the same name, so a sample list could not distinguish them.
    """
    folder_of: dict[str, AnyPath] = {}
    for folder in dict.fromkeys(set_folder for given in folders for set_folder in sets_in(given)):
        if folder.name in folder_of:
            raise ValueError(
                f"{folder_of[folder.name]} and {folder} are both named {folder.name}; audit them "
                "separately"
            )
        folder_of[folder.name] = folder
    return {name: open_shards([folder]) for name, folder in folder_of.items()}


@one_thread()
def audit(
    shards: ShardSet,
    *,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda _done: None,
) -> Audit:
    """Measure how well metadata alone predicts the label. `on_step(1)` is called `steps_of` times.

    Raises:
        ValueError: the extra `audit` is not installed.
    """
    metadata = metadata_of(shards)
    folds = assign_folds(metadata, seed)
    everything = [column for columns in FEATURES.values() for column in columns]
    models, scores = cross_fit(metadata, folds, everything, seed)
    pooled = estimate(metadata.labels, scores, metadata.groups)
    on_step(1)
    sources, across = _audit_sources(metadata, folds, everything, seed, pooled, on_step)
    features = {}
    drops = _importance(metadata, models, seed) if pooled else {}
    on_step(1)
    for name, columns in FEATURES.items():
        alone = _cross_validate(metadata, folds, columns, seed) if pooled else None
        if alone:
            features[name] = FeatureAudit(alone=alone, drop=drops[name])
        on_step(1)
    source_name = None
    if pooled and len(sources) > 1:
        source_name = _cross_validate(metadata, folds, SOURCE, seed)
    on_step(1)
    fakes = int(metadata.labels.sum())
    return Audit(
        samples=len(metadata),
        reals=len(metadata) - fakes,
        fakes=fakes,
        pooled=pooled,
        across=across,
        source_name=source_name,
        sources=sources,
        features=dict(sorted(features.items(), key=lambda item: -item[1].alone.auroc)),
        shortcuts=_shortcuts(metadata) if pooled else [],
        verdict=verdict_of(pooled),
        notes=_notes(metadata, sources, pooled, source_name),
    )


def steps_of(shards: ShardSet) -> int:
    """Return how many times `audit` calls `on_step`."""
    return min(np.unique(shards.codes("source")[0]).size, MAX_NAMES + 1) + len(FEATURES) + 3


def verdict_of(pooled: AurocEstimate | None) -> str:
    """Return `strong`, `some` or `little` by the thresholds `LITTLE` and `STRONG`, or `unknown` for
    None.
    """
    if pooled is None:
        return "unknown"
    return "little" if pooled.auroc < LITTLE else "some" if pooled.auroc <= STRONG else "strong"


def advice_of(result: Audit) -> list[str]:
    """Return what to do about the verdict, one sentence each."""
    if result.pooled is None:
        return ["Pack these and more images of both classes in one set, and audit that set."]
    inside = {n: s.within for n, s in result.sources.items() if s.within is not None}
    worse = [f"{n} {s.auroc:.2f}" for n, s in inside.items() if s.auroc >= LITTLE]
    if result.verdict == "little" and not worse:
        return ["Metadata says little about the label: there is nothing to do."]
    if result.verdict == "little":
        first = f"Metadata says little over all sources, but more within {', '.join(worse)}."
    else:
        amount = {"some": "something", "strong": "much"}[result.verdict]
        first = (
            f"Metadata alone says {amount} about the label: a good score on such images may come "
            "from the files, not the pictures, and may not hold on other images."
        )
    return [
        first,
        "Train with images that are often re-encoded and resampled (augment.train.jpeg, "
        "jpeg_quality and resample in the recipe), and add images of each class in the formats "
        "and sizes of the other class.",
        "Evaluate on a matched sample: python -m sharding audit DIR --match subset.csv, then "
        f"{command('evaluate')} --subset subset.csv",
    ]


def count_groups(labels: np.ndarray, groups: np.ndarray) -> tuple[int, int]:
    """Count the groups of real (0) and of fake (1) images."""
    reals, fakes = (len(np.unique(groups[labels == label])) for label in (0, 1))
    return reals, fakes


def estimate(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> AurocEstimate | None:
    """Compute the AUROC of `scores` for `labels` and its interval. Returns None if a class has too
    few groups (`MIN_GROUPS`) for a meaningful figure.

    The interval counts groups, not images, because images of one group are not independent.
    """
    known = np.isfinite(scores)
    labels, scores, groups = labels[known], scores[known], groups[known]
    reals, fakes = count_groups(labels, groups)
    if not min(reals, fakes):
        return None
    area = float(import_extra("sklearn.metrics").roc_auc_score(labels, scores))
    low, high = auroc_interval(area, reals, fakes)
    if min(reals, fakes) < MIN_GROUPS and (low <= 0.5 or high - low > _widest()):
        return None
    return AurocEstimate(area, low, high)


@functools.cache
def _widest() -> float:
    """Width of the interval of guessing on `MIN_GROUPS` groups of each class, 0.28."""
    low, high = auroc_interval(0.5, MIN_GROUPS, MIN_GROUPS)
    return high - low


def auroc_interval(area: float, reals: int, fakes: int, z: float = 1.96) -> tuple[float, float]:
    """Compute the interval of an AUROC `area`: all values v with |v - area| <= z * standard error
    of v.

    Newcombe, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic",
    Statistics in Medicine 25 (2006), part 2, method 5: Hanley and McNeil's (1982) variance at the
    tested value, so that an AUROC of 1 on few samples has an interval too.
    """
    value = np.linspace(0, 1, 20_001)
    half = (reals + fakes) / 2 - 1
    inflation = 1 + half * ((1 - value) / (2 - value) + value / (1 + value))
    variance = value * (1 - value) * inflation / (reals * fakes)
    inside = value[(value - area) ** 2 <= z**2 * variance + 1e-12]
    return float(inside.min()), float(inside.max())


def _fit(metadata: Metadata, rows: np.ndarray, columns: Sequence[int], seed: int) -> Any:
    """Fit gradient-boosted trees on `columns` of at most `FIT_LIMIT` of `rows`; None if all rows
    have one class.
    """
    if len(rows) > FIT_LIMIT:
        rows = np.random.default_rng(seed).choice(rows, FIT_LIMIT, replace=False)
    labels = metadata.labels[rows]
    smaller = int(np.bincount(labels, minlength=len(CLASSES)).min())
    if not smaller:
        return None
    values = metadata.values[rows[:, None], columns]
    # scikit-learn cannot bin a column without a value: the JPEG quality if there is no JPEG.
    values[:, np.isnan(values).all(axis=0)] = 0
    trees = import_extra("sklearn.ensemble").HistGradientBoostingClassifier(
        max_iter=30 if len(columns) == 1 else 60,
        learning_rate=0.15,
        max_leaf_nodes=8,
        # With scikit-learn's default of 20, few samples cannot be split where the classes differ.
        min_samples_leaf=max(1, min(20, smaller // 5)),
        early_stopping=False,
        categorical_features=[index for index, c in enumerate(columns) if c in NAMED],
        class_weight="balanced",
        random_state=seed,
    )
    return trees.fit(values, labels)


Models = list[tuple[np.ndarray, Any]]  # held-out rows, and the model fitted on all other rows


def cross_fit(
    metadata: Metadata, folds: np.ndarray, columns: Sequence[int], seed: int
) -> tuple[Models, np.ndarray]:
    """Fit a model per fold. Returns the models, and each sample's score (log-odds of fake) by the
    model that was not fitted on its fold, NaN if there is none. There are no models if no value
    differs between samples: all scores are 0.
    """
    models: Models = []
    values = metadata.values[:, columns]
    if ((values == values[:1]) | (np.isnan(values) & np.isnan(values[:1]))).all():
        return models, np.zeros(len(metadata))  # trees would give each fold its own rounding errors
    scores = np.full(len(metadata), np.nan)
    for fold in np.unique(folds):
        held_out = np.flatnonzero(folds == fold)
        model = _fit(metadata, np.flatnonzero(folds != fold), columns, seed)
        if model is not None:
            models.append((held_out, model))
            scores[held_out] = model.decision_function(values[held_out])
    return models, scores


def _cross_validate(
    metadata: Metadata, folds: np.ndarray, columns: Sequence[int], seed: int
) -> AurocEstimate | None:
    scores = cross_fit(metadata, folds, columns, seed)[1]
    return estimate(metadata.labels, scores, metadata.groups)


def _audit_sources(
    metadata: Metadata,
    folds: np.ndarray,
    columns: Sequence[int],
    seed: int,
    pooled: AurocEstimate | None,
    on_step: Callable[[int], None],
) -> tuple[dict[str, SourceAudit], AurocEstimate | None]:
    """Measure each source by itself and by a model of the other sources. `pooled` is the estimate
    over all images; a single source gets this estimate. The last value is the AUROC over all
    sources, each scored by the model of the other sources.
    """
    audits = {}
    held_out = np.full(len(metadata), np.nan)
    for code in np.unique(metadata.sources):
        here = metadata.sources == code
        source_metadata = metadata.take(here)
        fakes = int(source_metadata.labels.sum())
        reals = len(source_metadata) - fakes
        others = _fit(metadata, np.flatnonzero(~here), columns, seed)
        if others is not None:
            held_out[here] = others.decision_function(source_metadata.values[:, columns])
        within, note = None, ""
        counts = count_groups(source_metadata.labels, source_metadata.groups)
        if not reals or not fakes:
            note = f"only {CLASSES[bool(fakes)]} images"
        elif here.all():
            within = pooled
        else:
            within = _cross_validate(source_metadata, folds[here], columns, seed)
        if within is None and not note:
            note = (
                f"too few: {counts[0]} groups of real and {counts[1]} of fake images; "
                f"{MIN_GROUPS} of each are needed"
            )
        audits[metadata.names[SOURCE[0]][code]] = SourceAudit(
            reals=reals,
            fakes=fakes,
            within=within,
            from_others=estimate(source_metadata.labels, held_out[here], source_metadata.groups),
            note=note,
        )
        on_step(1)
    return audits, estimate(metadata.labels, held_out, metadata.groups)


def _importance(metadata: Metadata, models: Models, seed: int) -> dict[str, float]:
    """Compute the permutation importance (Breiman 2001): the mean drop of the AUROC over the
    held-out folds when the values of one feature are shuffled among the samples.
    """
    area = import_extra("sklearn.metrics").roc_auc_score
    everything = [column for columns in FEATURES.values() for column in columns]
    drops: dict[str, list[float]] = {name: [] for name in FEATURES}
    for fold, (rows, model) in enumerate(models):
        rng = np.random.default_rng([seed, fold])
        rows = rng.permutation(rows)[:_PERMUTED]
        labels, values = metadata.labels[rows], metadata.values[rows[:, None], everything]
        if labels.min() == labels.max():
            continue
        variants = np.stack([values] * (1 + len(FEATURES)))
        for shuffled, columns in zip(variants[1:], FEATURES.values(), strict=True):
            positions = [everything.index(column) for column in columns]
            shuffled[:, positions] = values[rng.permutation(len(rows))][:, positions]
        # One call for all variants is much faster than one call each, if samples are few.
        scores = model.decision_function(np.concatenate(variants)).reshape(len(variants), -1)
        whole, *rest = (area(labels, row) for row in scores)
        for name, shuffled_area in zip(FEATURES, rest, strict=True):
            drops[name].append(whole - shuffled_area)
    return {name: float(np.mean(losses)) if losses else 0.0 for name, losses in drops.items()}


def _shortcuts(metadata: Metadata, most: int = 16, per_feature: int = 3) -> list[Shortcut]:
    """Find the values that predict the label best: far from the set's share of fakes, or common."""
    base = metadata.labels.mean()
    # A value that all images of a small class have also counts as common.
    common = min(MIN_GROUPS, int(np.bincount(metadata.labels, minlength=len(CLASSES)).min()))
    weighted = []
    for feature in FEATURES:
        codes, words = spelled(metadata, feature)
        value, index = np.unique(codes, return_inverse=True)
        images = np.bincount(index)
        share = np.bincount(index, weights=metadata.labels) / images
        weight = np.sqrt(images) * np.abs(share - base)
        weight[(value < 0) | (images < common) | (np.abs(share - base) < 0.1)] = 0
        for best in np.argsort(-weight, kind="stable")[:per_feature]:
            said = words(int(value[best]))
            if weight[best] > 0 and said != NO_JPEG:  # the feature "format" reports this
                shortcut = Shortcut(
                    feature=feature,
                    value=said,
                    images=int(images[best]),
                    fake_share=float(share[best]),
                )
                weighted.append((weight[best], shortcut))
    weighted.sort(key=lambda entry: -entry[0])
    return [shortcut for _weight, shortcut in weighted[:most]]


def _notes(
    metadata: Metadata,
    sources: dict[str, SourceAudit],
    pooled: AurocEstimate | None,
    source_name: AurocEstimate | None,
) -> list[str]:
    """Return what a reader must know to interpret the figures."""
    notes = []
    groups = count_groups(metadata.labels, metadata.groups)
    if not min(groups):
        kind = f"only {CLASSES[bool(groups[1])]}" if max(groups) else "no"
        notes.append(f"There are {kind} images: no shortcut can be measured.")
    elif min(groups) < MIN_GROUPS:
        counted = f"{groups[0]:,} groups of real and {groups[1]:,} of fake images"
        notes.append(
            f"Few images: {counted}. They are enough only because metadata separates them so well."
            if pooled
            else f"Too few images to measure: {counted}; {MIN_GROUPS} of each are needed."
        )
    single = [
        name
        for name, source_audit in sources.items()
        if not source_audit.reals or not source_audit.fakes
    ]
    if min(groups) and single:
        known = f" (AUROC {source_name} by the name alone)" if source_name else ""
        named = ", ".join(single[:NAMED_SOURCES])
        named += f" and {len(single) - NAMED_SOURCES} more" if len(single) > NAMED_SOURCES else ""
        notes.append(
            f"{len(single)} of {len(sources)} sources have one class only ({named}), "
            f"so a feature that reveals the source also reveals the class{known}."
        )
    if len(metadata) > FIT_LIMIT:
        notes.append(
            f"Each classifier was fitted on at most {FIT_LIMIT:,} samples; all {len(metadata):,} "
            "were scored."
        )
    return notes


def as_json(shards: ShardSet, result: Audit) -> dict[str, Any]:
    """Convert the audit of one set to its entry in `report.json`."""
    return {"index_sha256": shards.sha256, **asdict(result), "advice": advice_of(result)}


def write_report(path: AnyPath, seed: int, sets: dict[str, dict[str, Any]]) -> None:
    """Write `report.json`: the version, the seed, and the entry of each set (`as_json`)."""
    report = {"audit_version": AUDIT_VERSION, "seed": seed, "sets": sets}
    write_text(path, json.dumps(report, indent=1, sort_keys=True) + "\n")
