"""What a model could learn without looking at pixels: the shortcut report of a shard set.

A classifier that sees nothing but metadata is cross-validated on the label. What it reaches, a
detector may reach too, by the container, the size or the compression, and fail on the next photo.
Groups never cross folds. `docs/audit.md` says how to read the figures.

scikit-learn and matplotlib are the optional extra `audit`, imported where they are used.
"""

import csv
import importlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import numpy as np

from sharding.format import CLASSES, ShardSet, open_shards
from sharding.storage import AnyPath, write_atomically, write_text
from sharding.verify import sets_in

AUDIT_VERSION = 1
"""Of `report.json`; grows when a name or a meaning in it changes."""

FEATURES = {
    "format": (0,),
    "size": (1, 2),
    "aspect": (3,),
    "bits per pixel": (4,),
    "JPEG quality": (5,),
    "JPEG tables": (6,),
    "chroma": (7,),
    "EXIF": (8,),
}
"""Feature -> columns of `Metadata.values`."""

_SOURCE = (9,)
_NAMED = (0, 6, 7, 8, 9)  # columns that hold codes of names, not quantities
_STRATA = (0, 7, 8)  # of these, what a match must agree on exactly: format, chroma, EXIF

FOLDS = 5
MIN_GROUPS = 30
"""Groups of each class below which nothing is estimated: the interval would span half the scale."""

FIT_LIMIT = 20_000
"""Samples that one classifier is fitted on at most; every sample is scored all the same."""

LITTLE, STRONG = 0.60, 0.75
"""The verdict: below the first AUROC metadata gives little away, above the second a lot."""

MATCHED = 0.55
"""A match goes on until metadata alone reaches no more than this AUROC, or what chance explains."""

NO_JPEG = "no JPEG"
"""What stands for the tables and the chroma of other formats."""

_MAX_NAMES = 250  # scikit-learn's limit for one column is 255; the rarest share one code
_ROUNDS = 8
_PERMUTED = 20_000  # held-out samples per fold that importance is measured on


@dataclass(frozen=True, eq=False)
class Metadata:
    """What is known of each sample without its pixels.

    `values` is (samples, 10) float32, columns as in `FEATURES` and then the source: codes into
    `names[column]`, or quantities (pixels, width / height, bits per pixel, 1 to 100), NaN where an
    image has none. `labels` int8, `groups` int64: equal for images that belong together.
    """

    values: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    names: dict[int, list[str]]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sources(self) -> np.ndarray:
        """The source of each sample: a position in `names[9]`."""
        return self.values[:, _SOURCE[0]].astype(np.int64)

    def take(self, rows: np.ndarray) -> "Metadata":
        """These samples only."""
        return Metadata(self.values[rows], self.labels[rows], self.groups[rows], self.names)


@dataclass(frozen=True)
class Estimate:
    """An AUROC, 0 to 1 with 0.5 for guessing, and its 95 % interval.

    The interval leaves out how the folds fell, so on a few hundred images it is somewhat narrow.
    """

    auroc: float
    low: float
    high: float

    def __str__(self) -> str:
        """The figure and its interval."""
        return f"{self.auroc:.3f} ({self.low:.3f}-{self.high:.3f})"


@dataclass(frozen=True, kw_only=True)
class SourceAudit:
    """One source: the AUROC of metadata inside it, and of a classifier fitted on all others."""

    reals: int
    fakes: int
    within: Estimate | None
    from_others: Estimate | None
    note: str


@dataclass(frozen=True, kw_only=True)
class FeatureAudit:
    """One feature: the AUROC it reaches alone, and what the full classifier loses (AUROC, held-out
    folds) when its values are shuffled. What another feature also says costs nothing to lose.
    """

    alone: Estimate
    drop: float


@dataclass(frozen=True, kw_only=True)
class Telling:
    """A value of a feature that tells the classes apart, and its share of fakes.

    Only the common values that are farthest from the set's own share are listed.
    """

    feature: str
    value: str
    images: int
    fake_share: float

    def __str__(self) -> str:
        """The value as a sentence: `format PNG: 100 % fake (109 images)`."""
        fake = self.fake_share >= 0.5
        share = self.fake_share if fake else 1 - self.fake_share
        return (
            f"{self.feature} {self.value}: {100 * share:.0f} % {CLASSES[fake]} "
            f"({self.images:,} images)"
        )


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The report on one set. `across` is the AUROC on sources that the classifier was not fitted
    on, `source_name` that of knowing nothing but which source an image is from. Estimates are None
    where a class is missing or too small, and `notes` say so in words.
    """

    samples: int
    reals: int
    fakes: int
    pooled: Estimate | None
    across: Estimate | None
    source_name: Estimate | None
    sources: dict[str, SourceAudit]
    features: dict[str, FeatureAudit]
    telling: list[Telling]
    verdict: str
    notes: list[str]


@dataclass(frozen=True, eq=False)
class Match:
    """Rows of the set in which the classes agree on metadata, and the AUROC before and after."""

    rows: np.ndarray
    per_class: int
    before: Estimate
    after: Estimate
    rounds: int


def open_sets(folders: Sequence[AnyPath]) -> dict[str, ShardSet]:
    """The sets at or directly below `folders`, by name.

    Raises:
        ShardError: a folder holds none.
        ValueError: two sets have one name, so a sample list could not tell them apart.
    """
    found: dict[str, AnyPath] = {}
    for folder in dict.fromkeys(one for place in folders for one in sets_in(place)):
        if folder.name in found:
            raise ValueError(
                f"{found[folder.name]} and {folder} are both named {folder.name}; audit them one "
                "by one"
            )
        found[folder.name] = folder
    return {name: open_shards([folder]) for name, folder in found.items()}


def metadata_of(shards: ShardSet) -> Metadata:
    """The metadata of every sample, from the index alone.

    The format is that of the published file, before packing.
    """
    pixels = shards.column("width") * np.maximum(1, shards.column("height")).astype(np.float64)
    quality = shards.column("jpeg_quality").astype(np.float64)
    turned = np.where(shards.column("orientation") != 1, 2, 1)
    columns = [
        shards.column("width"),
        shards.column("height"),
        shards.column("width") / np.maximum(1, shards.column("height")),
        8.0 * shards.column("size") / np.maximum(1, pixels),
        np.where(quality > 0, quality, np.nan),
    ]
    named = {
        0: _frequent(*_published_format(shards)),
        6: _frequent(*shards.codes("jpeg_tables")),
        7: _frequent(*shards.codes("chroma")),
        8: (np.where(shards.column("exif"), turned, 0), ["none", "present", "with a rotation"]),
        9: _frequent(*shards.codes("source")),
    }
    values = np.empty((len(shards), 10), np.float32)
    for place, column in enumerate(columns, start=1):
        values[:, place] = column
    for place, (codes, _names) in named.items():
        values[:, place] = codes
    names = {place: found for place, (_codes, found) in named.items()}
    return Metadata(values, shards.column("label"), _groups(shards), names)


def _published_format(shards: ShardSet) -> tuple[np.ndarray, list[str]]:
    """Codes and names of the format before packing."""
    codes, names = shards.codes("format")
    before, names_before = shards.codes("transcoded_from")
    changed = np.array([bool(name) for name in names_before], np.bool_)[before]
    every = list(dict.fromkeys([*names, *filter(None, names_before)]))
    position = {name: number for number, name in enumerate(every)}
    kept = np.array([position[name] for name in names], np.int64)[codes]
    original = np.array([position.get(name, 0) for name in names_before], np.int64)[before]
    return np.where(changed, original, kept), every


def _frequent(codes: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Codes by falling frequency, so that the rarest share one where there are too many."""
    counts = np.bincount(codes, minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    rank = np.empty(len(names), np.int64)
    rank[order] = np.minimum(np.arange(len(names)), _MAX_NAMES)
    kept = [names[code] or NO_JPEG for code in order[:_MAX_NAMES]]
    return rank[codes], [*kept, "others"]


def _groups(shards: ShardSet) -> np.ndarray:
    """A number per group; an image without a group is one of its own."""
    encoded = shards.table.column("group").combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    empty = np.array([not name for name in encoded.dictionary.to_pylist()], np.bool_)[codes]
    return np.where(empty, len(empty) + np.arange(len(codes)), codes.astype(np.int64))


def assign_folds(metadata: Metadata, seed: int) -> np.ndarray:
    """A fold, 0 to 4, per sample: whole groups, dealt out by source, class and size.

    The same idea as scikit-learn's StratifiedGroupKFold, which visits groups one by one in Python
    and would take minutes for 420,000 of them.
    """
    _, first, group, size = np.unique(
        metadata.groups, return_index=True, return_inverse=True, return_counts=True
    )
    fakes = np.bincount(group, weights=metadata.labels)
    kind = (fakes > 0).astype(int) + (fakes == size)
    shuffled = np.random.default_rng(seed).random(len(first))
    order = np.lexsort((shuffled, -size, kind, metadata.sources[first]))
    fold = np.empty(len(first), np.int64)
    fold[order] = np.arange(len(first)) % FOLDS
    return fold[group]


def audit(
    shards: ShardSet,
    *,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda _done: None,
) -> Audit:
    """What metadata alone says of the labels of a set; `on_step(1)` is called `steps_of` times.

    Raises:
        ValueError: the extra `audit` is not installed.
    """
    _extra("sklearn.ensemble")
    metadata = metadata_of(shards)
    folds = assign_folds(metadata, seed)
    everything = [column for columns in FEATURES.values() for column in columns]
    models, scores = _cross_fit(metadata, folds, everything, seed)
    pooled = estimate(metadata.labels, scores, metadata.groups)
    on_step(1)
    sources, across = _audit_sources(metadata, folds, everything, seed, on_step)
    features = {}
    drops = _importance(metadata, models, seed) if pooled else {}
    on_step(1)
    for name, columns in FEATURES.items():
        if pooled:
            alone = _cross_validate(metadata, folds, columns, seed)
            features[name] = FeatureAudit(alone=alone, drop=drops[name])
        on_step(1)
    source_name = None
    if pooled and len(sources) > 1:
        source_name = _cross_validate(metadata, folds, _SOURCE, seed)
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
        telling=_telling(metadata) if pooled else [],
        verdict=verdict_of(pooled),
        notes=_notes(metadata, sources, source_name),
    )


def steps_of(shards: ShardSet) -> int:
    """How often `audit` reports a step."""
    return len(shards.codes("source")[1]) + len(FEATURES) + 3


def verdict_of(pooled: Estimate | None) -> str:
    """`strong`, `some` or `little` by the thresholds of this module; `unknown` without a figure."""
    if pooled is None:
        return "unknown"
    return "little" if pooled.auroc < LITTLE else "some" if pooled.auroc <= STRONG else "strong"


def advice_of(found: Audit) -> list[str]:
    """What to do about the verdict, one sentence each."""
    if found.pooled is None:
        return ["Pack it in one set with more images, or those of the other class, and audit that."]
    inside = {n: s.within for n, s in found.sources.items() if s.within is not None}
    worse = [f"{n} {s.auroc:.2f}" for n, s in inside.items() if s.auroc >= LITTLE]
    if found.verdict == "little" and not worse:
        return ["Metadata gives little away: nothing has to be done about it."]
    if found.verdict == "little":
        first = f"Metadata gives little away over all sources, but not within {', '.join(worse)}."
    else:
        amount = {"some": "something", "strong": "much"}[found.verdict]
        first = (
            f"Metadata alone says {amount} about the label: a good score on such images may come "
            "from the file and not from the picture, and be gone on the next one."
        )
    return [
        first,
        "Train with every image re-encoded and resampled often (augment.train.jpeg, jpeg_quality "
        "and resample in the recipe), and add images of each class in the formats and sizes of "
        "the other.",
        "Measure on a matched sample: python -m sharding audit DIR --match subset.csv, then "
        "python evaluate.py --subset subset.csv",
    ]


def estimate(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> Estimate | None:
    """The AUROC of `scores` for `labels` with its interval; None with too few groups of a class.

    The interval counts groups, not images: images of one group are no independent evidence.
    """
    known = np.isfinite(scores)
    labels, scores, groups = labels[known], scores[known], groups[known]
    reals, fakes = (len(np.unique(groups[labels == label])) for label in (0, 1))
    if min(reals, fakes) < MIN_GROUPS:
        return None
    area = float(_extra("sklearn.metrics").roc_auc_score(labels, scores))
    return Estimate(area, *auroc_interval(area, reals, fakes))


def auroc_interval(area: float, reals: int, fakes: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of an AUROC: all values whose own standard error reaches `area`.

    Newcombe, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic",
    Statistics in Medicine 25 (2006), part 2, method 5: Hanley and McNeil's (1982) variance taken at
    the value under test, so that an AUROC of 1 on few samples has an interval too.
    """
    value = np.linspace(0, 1, 20_001)
    half = (reals + fakes) / 2 - 1
    spread = 1 + half * ((1 - value) / (2 - value) + value / (1 + value))
    variance = value * (1 - value) * spread / (reals * fakes)
    inside = value[(value - area) ** 2 <= z**2 * variance + 1e-12]
    return float(inside.min()), float(inside.max())


def _extra(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"the audit needs scikit-learn and matplotlib ({error}); install the extra `audit`, "
            "as `make setup` does"
        ) from error


def _fit(metadata: Metadata, rows: np.ndarray, columns: Sequence[int], seed: int) -> Any:
    """Gradient-boosted trees on these columns of at most `FIT_LIMIT` of `rows`; None where they
    are all of one class.
    """
    if len(rows) > FIT_LIMIT:
        rows = np.random.default_rng(seed).choice(rows, FIT_LIMIT, replace=False)
    labels = metadata.labels[rows]
    if len(np.unique(labels)) < len(CLASSES):
        return None
    trees = _extra("sklearn.ensemble").HistGradientBoostingClassifier(
        max_iter=30 if len(columns) == 1 else 60,
        learning_rate=0.15,
        max_leaf_nodes=8,
        early_stopping=False,
        categorical_features=[place for place, c in enumerate(columns) if c in _NAMED],
        class_weight="balanced",
        random_state=seed,
    )
    # One thread is as fast at this size, and gives the same trees on any number of cores.
    with _extra("threadpoolctl").threadpool_limits(1):
        return trees.fit(metadata.values[np.ix_(rows, columns)], labels)


Models = list[tuple[np.ndarray, Any]]  # held-out rows, and what was fitted on the others


def _cross_fit(
    metadata: Metadata, folds: np.ndarray, columns: Sequence[int], seed: int
) -> tuple[Models, np.ndarray]:
    """A model per fold, and the score of each sample (log-odds of fake) by the model that has not
    seen its fold; NaN where there is none.
    """
    models: Models = []
    scores = np.full(len(metadata), np.nan)
    for fold in np.unique(folds):
        held_out = np.flatnonzero(folds == fold)
        model = _fit(metadata, np.flatnonzero(folds != fold), columns, seed)
        if model is not None:
            models.append((held_out, model))
            scores[held_out] = model.decision_function(metadata.values[np.ix_(held_out, columns)])
    return models, scores


def _cross_validate(
    metadata: Metadata, folds: np.ndarray, columns: Sequence[int], seed: int
) -> Estimate | None:
    scores = _cross_fit(metadata, folds, columns, seed)[1]
    return estimate(metadata.labels, scores, metadata.groups)


def _audit_sources(
    metadata: Metadata,
    folds: np.ndarray,
    columns: Sequence[int],
    seed: int,
    on_step: Callable[[int], None],
) -> tuple[dict[str, SourceAudit], Estimate | None]:
    """Each source by itself and by the others, and the AUROC over all sources left out in turn."""
    found = {}
    left_out = np.full(len(metadata), np.nan)
    for code in np.unique(metadata.sources):
        here = metadata.sources == code
        one = metadata.take(here)
        fakes = int(one.labels.sum())
        reals = len(one) - fakes
        others = _fit(metadata, np.flatnonzero(~here), columns, seed)
        if others is not None:
            left_out[here] = others.decision_function(one.values[:, columns])
        within = note = None
        counts = [len(np.unique(one.groups[one.labels == label])) for label in (0, 1)]
        if not reals or not fakes:
            note = f"only {CLASSES[bool(fakes)]} images"
        elif min(counts) < MIN_GROUPS:
            note = (
                f"too few: {counts[0]} groups of real and {counts[1]} of fake images, "
                f"{MIN_GROUPS} of each are needed"
            )
        else:
            within = _cross_validate(one, folds[here], columns, seed)
        found[metadata.names[_SOURCE[0]][code]] = SourceAudit(
            reals=reals,
            fakes=fakes,
            within=within,
            from_others=estimate(one.labels, left_out[here], one.groups),
            note=note or "",
        )
        on_step(1)
    return found, estimate(metadata.labels, left_out, metadata.groups)


def _importance(metadata: Metadata, models: Models, seed: int) -> dict[str, float]:
    """Permutation importance (Breiman 2001): the mean drop of the AUROC over the held-out folds
    when the values of one feature are shuffled among the samples.
    """
    area = _extra("sklearn.metrics").roc_auc_score
    everything = [column for columns in FEATURES.values() for column in columns]
    drops: dict[str, list[float]] = {name: [] for name in FEATURES}
    for number, (rows, model) in enumerate(models):
        rng = np.random.default_rng([seed, number])
        rows = rng.permutation(rows)[:_PERMUTED]
        labels, values = metadata.labels[rows], metadata.values[np.ix_(rows, everything)]
        if labels.min() == labels.max():
            continue
        whole = area(labels, model.decision_function(values))
        for name, columns in FEATURES.items():
            shuffled = values.copy()
            places = [everything.index(column) for column in columns]
            shuffled[:, places] = values[rng.permutation(len(rows))][:, places]
            drops[name].append(whole - area(labels, model.decision_function(shuffled)))
    return {name: float(np.mean(found)) if found else 0.0 for name, found in drops.items()}


_BITS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 24])


def _spelled(metadata: Metadata, feature: str) -> tuple[np.ndarray, Callable[[int], str]]:
    """A feature as whole numbers, one per sample, and the words for each; negative: no value."""
    first = metadata.values[:, FEATURES[feature][0]]
    if feature == "size":
        height = metadata.values[:, FEATURES[feature][1]].astype(np.int64)
        code = first.astype(np.int64) * 2**24 + height
        return code, lambda value: f"{value >> 24} x {value & (2**24 - 1)}"
    if feature == "aspect":
        return np.rint(first * 100).astype(np.int64), lambda value: f"{value / 100:.2f}"
    if feature == "bits per pixel":
        code = np.searchsorted(_BITS, first, "right") - 1

        def between(value: int) -> str:
            after = f" to {_BITS[value + 1]:g}" if value + 1 < len(_BITS) else " and more"
            return f"{_BITS[value]:g}{after}"

        return code, between
    if feature == "JPEG quality":
        return np.nan_to_num(first, nan=-1).astype(np.int64), str
    names = metadata.names[FEATURES[feature][0]]
    return first.astype(np.int64), lambda value: names[value]


def _telling(metadata: Metadata, most: int = 16, per_feature: int = 3) -> list[Telling]:
    """The values that say most: rare ones far from the set's share of fakes, or common ones."""
    base = metadata.labels.mean()
    found = []
    for feature in FEATURES:
        codes, words = _spelled(metadata, feature)
        value, place = np.unique(codes, return_inverse=True)
        images = np.bincount(place)
        share = np.bincount(place, weights=metadata.labels) / images
        weight = np.sqrt(images) * np.abs(share - base)
        weight[(value < 0) | (images < MIN_GROUPS) | (np.abs(share - base) < 0.1)] = 0
        for best in np.argsort(-weight, kind="stable")[:per_feature]:
            said = words(int(value[best]))
            if weight[best] > 0 and said != NO_JPEG:  # the format says that already
                one = Telling(
                    feature=feature,
                    value=said,
                    images=int(images[best]),
                    fake_share=float(share[best]),
                )
                found.append((weight[best], one))
    found.sort(key=lambda entry: -entry[0])
    return [one for _weight, one in found[:most]]


def _notes(
    metadata: Metadata, sources: dict[str, SourceAudit], source_name: Estimate | None
) -> list[str]:
    """What a reader must know to read the figures."""
    notes = []
    groups = [len(np.unique(metadata.groups[metadata.labels == label])) for label in (0, 1)]
    if not min(groups):
        notes.append(
            f"There are only {CLASSES[bool(groups[1])]} images here: no shortcut can be measured."
        )
    elif min(groups) < MIN_GROUPS:
        notes.append(
            f"Too few images to measure: {groups[0]:,} groups of real and {groups[1]:,} of fake "
            f"images, {MIN_GROUPS} of each are needed."
        )
    single = [name for name, one in sources.items() if not one.reals or not one.fakes]
    if single and min(groups):
        known = f" (AUROC {source_name} by the name alone)" if source_name else ""
        notes.append(
            f"{len(single)} of {len(sources)} sources have one class only ({', '.join(single)}), "
            f"so whatever tells sources apart tells the classes apart{known}."
        )
    if len(metadata) > FIT_LIMIT:
        notes.append(
            f"Each classifier was fitted on at most {FIT_LIMIT:,} samples; all {len(metadata):,} "
            "were scored."
        )
    return notes


def match_classes(shards: ShardSet, *, seed: int = 0) -> Match:
    """A sample in which real and fake agree on metadata, as many of each.

    Inside a source (sources of one class are taken together) and of equal format, chroma and EXIF,
    images are put in bins of the cross-validated log-odds of fake, the propensity score of
    Rosenbaum and Rubin (1983), 0.2 standard deviations wide (Austin 2011), and as many of each
    class are drawn from a bin as the smaller has. A classifier fitted anew on what is left shows
    what still differs, and the next round matches on that. Bins lie inside the folds: what is held
    out together is balanced, so the last figure is not below 0.5 for having been matched.

    Raises:
        ValueError: too few images can be matched, or they still differ after all rounds.
    """
    where = shards.describe()
    metadata = metadata_of(shards)
    folds = assign_folds(metadata, seed)
    rng = np.random.default_rng(seed)
    everything = [column for columns in FEATURES.values() for column in columns]
    before = None
    rows = np.arange(len(metadata))
    strata = np.column_stack([_home(metadata), metadata.values[:, _STRATA], folds])
    for number in range(_ROUNDS + 1):
        left = metadata.take(rows)
        counts = [len(np.unique(left.groups[left.labels == label])) for label in (0, 1)]
        if min(counts) < MIN_GROUPS:
            raise ValueError(
                f"{where}: only {counts[0]:,} real and {counts[1]:,} fake images (groups of them) "
                f"can be matched on metadata, {MIN_GROUPS} of each are needed; add sources whose "
                "real and fake images have the same formats and sizes, or re-encode both classes "
                "alike before packing"
            )
        scores = _cross_fit(left, folds[rows], everything, seed)[1]
        now = estimate(left.labels, scores, left.groups)
        before = before or now
        if number and (now.auroc <= MATCHED or now.low <= 0.5):
            return Match(rows, int(left.labels.sum()), before, now, number)
        width = max(0.2 * scores.std(), 1e-9)
        cells = np.column_stack([strata[rows], np.floor(scores / width)])
        rows = rows[_balanced(cells, left.labels, rng)]
    raise ValueError(
        f"{where}: after {_ROUNDS} rounds of matching metadata still reaches an AUROC of {now}, "
        f"expected {MATCHED} at most; the classes differ too much to be matched"
    )


def _home(metadata: Metadata) -> np.ndarray:
    """The source of each sample, or -1 where its source has one class only."""
    images = np.bincount(metadata.sources)
    fakes = np.bincount(metadata.sources, weights=metadata.labels)
    both = (fakes > 0) & (fakes < images)
    return np.where(both[metadata.sources], metadata.sources, -1)


def _balanced(cells: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which samples to keep, in order, so that each cell (equal rows) has as many of each class."""
    cell = np.unique(cells, axis=0, return_inverse=True)[1].ravel()
    kept = np.minimum(np.bincount(cell, weights=labels), np.bincount(cell, weights=1 - labels))
    kind = cell * 2 + labels
    order = np.lexsort((rng.random(len(cell)), kind))
    starts = np.cumsum(np.bincount(kind)) - np.bincount(kind)
    rank = np.arange(len(cell)) - starts[kind[order]]
    return np.sort(order[rank < kept[cell[order]]])


def sample_list(chosen: dict[str, tuple[ShardSet, np.ndarray]]) -> str:
    """CSV with the columns `set` and `key`, for `evaluate.py --subset`: set -> (shards, rows)."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["set", "key"])
    for name, (shards, rows) in chosen.items():
        keys = shards.table.column("key").take(rows).to_pylist()
        writer.writerows((name, key) for key in keys)
    return stream.getvalue()


def as_json(shards: ShardSet, found: Audit, match: Match | str | None) -> dict[str, Any]:
    """One set of `report.json`; `match` may be the reason why there is none."""
    entry = {"index_sha256": shards.sha256, **asdict(found), "advice": advice_of(found)}
    if isinstance(match, str):
        return entry | {"match": {"error": match}}
    if match is None:
        return entry | {"match": None}
    matched = {"per_class": match.per_class, "rounds": match.rounds}
    figures = {"auroc_before": asdict(match.before), "auroc_after": asdict(match.after)}
    return entry | {"match": matched | figures}


def write_report(path: AnyPath, seed: int, sets: dict[str, dict[str, Any]]) -> None:
    """Write `report.json`: the version, the seed and an entry of `as_json` per set."""
    report = {"audit_version": AUDIT_VERSION, "seed": seed, "sets": sets}
    write_text(path, json.dumps(report, indent=1, sort_keys=True) + "\n")


_COLOURS = ("#0072B2", "#D55E00")  # blue and vermilion of Okabe and Ito, told apart by everyone


def draw(shards: ShardSet, name: str, found: Audit, path: AnyPath) -> None:
    """Write the histograms of a set as PNG: a panel per feature, the share of each class."""
    figure = _extra("matplotlib.figure").Figure(figsize=(16, 8), layout="constrained")
    metadata = metadata_of(shards)
    pooled = f", AUROC of metadata {found.pooled}" if found.pooled else ""
    figure.suptitle(f"{name}: {found.reals:,} real and {found.fakes:,} fake images{pooled}")
    for axes, feature in zip(figure.subplots(2, 4).flat, FEATURES, strict=True):
        if feature in ("size", "aspect", "bits per pixel", "JPEG quality"):
            _draw_quantity(axes, metadata, feature)
        else:
            _draw_names(axes, metadata, feature)
        alone = found.features.get(feature)
        axes.set_title(feature + (f" (alone {alone.alone.auroc:.2f})" if alone else ""))
        axes.set_ylabel("share of the class")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=100))


def _draw_names(axes: Any, metadata: Metadata, feature: str, most: int = 8) -> None:
    codes, words = _spelled(metadata, feature)
    shown = np.unique(codes)  # most frequent first
    labels = [words(int(code)) for code in shown[:most]]
    codes = np.minimum(np.searchsorted(shown, codes), most)
    labels += ["others"] if len(shown) > most else []
    for label, class_name in enumerate(CLASSES):
        here = codes[metadata.labels == label]
        share = np.bincount(here, minlength=len(labels)) / max(1, len(here))
        places = np.arange(len(labels)) + (label - 0.5) * 0.4
        axes.bar(places, share, 0.4, color=_COLOURS[label], label=class_name)
    long = max(map(len, labels)) > 6 and len(labels) > 3
    axes.set_xticks(range(len(labels)), labels, rotation=45 if long else 0)


def _draw_quantity(axes: Any, metadata: Metadata, feature: str) -> None:
    values = metadata.values[:, FEATURES[feature][0]].astype(np.float64)
    if feature == "size":
        values = np.sqrt(values * metadata.values[:, FEATURES[feature][1]])
        axes.set_xlabel("square root of width x height, pixels")
    else:
        axes.set_xlabel(
            {"aspect": "width / height", "bits per pixel": "8 x bytes / (width x height)"}.get(
                feature, "libjpeg quality; other formats are left out"
            )
        )
    known = np.isfinite(values)
    if not known.any():
        axes.text(0.5, 0.5, "no JPEG", ha="center", transform=axes.transAxes)
        return
    # The farthest hundredth would squeeze all others into a few bars: it stands in the last one.
    low, high = np.percentile(values[known], [0.5, 99.5])
    edges = np.linspace(low, high if high > low else low + 1, 41)
    if feature == "JPEG quality":
        edges = np.arange(np.floor(low), np.ceil(high) + 2) - 0.5
    for label, class_name in enumerate(CLASSES):
        here = values[known & (metadata.labels == label)].clip(edges[0], edges[-1])
        total = max(1, int((metadata.labels == label).sum()))
        weights = np.full(len(here), 1 / total)
        axes.hist(here, edges, weights=weights, color=_COLOURS[label], alpha=0.6, label=class_name)
