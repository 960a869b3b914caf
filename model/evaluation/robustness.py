"""Measure the robustness of a detector: score the same samples before and after many perturbations
(such as JPEG compression), and compare the scores.

Main entries: `score_perturbations(scorer, shards, samples, perturbations, on_images)` scores the
samples after each perturbation. All ranks of `scorer.dist` must call it; each scores a part and
gets the whole result.

- `scorer`: the detector as a `VariantScorer`, below.
- `shards`: a set of packed images, from `open_shards([folder])` of `sharding/format.py`.
- `samples`: row numbers in this set, an int64 array (`sample_by_hash(shards, per_class)` chooses at
  most `per_class` images of each class, the same ones in every run).
- `perturbations`: a list of `Perturbation`, such as `PERTURBATIONS` of `pipeline/perturb.py`.
  `ORIGINAL` must be in it.
- `on_images`: None (default) or a function that is called with 1 after each image of this rank.

It returns `PerturbedScores`. An image that cannot be read or decoded is no error:

- `samples`, `labels`: int64 (N,), the row numbers and classes of the N images that were decoded.
- `logits`: float32 (perturbations, N), of fake minus real (positive: more likely fake), before the
  temperature; not finite where a perturbation failed.
- `failures`: one dict per perturbation, row number -> why it failed on this image, or that its
  score is not finite.
- `unreadable`: a dict, row number -> reason, of the images that are not among the N. An image
  without a finite score as packed is one of them.

`measure_perturbations(perturbed, groups, *, temperature, threshold)` takes the `PerturbedScores`,
the codes of their groups (`codes_of()`), the temperature (1.0: none), and the decision threshold on
probabilities after the temperature. It returns a list with one dict per perturbation for
`report.json`: `name`, `images`, the metrics (`FIGURES`) and their `intervals`, `flip_rate` (the
share of changed verdicts), `shift` and more. `shift` is a dict, "real" and "fake" -> a `Shift` as a
dict, or None if there is no image of this class: `images`, the `mean` change of the logit, its
interval `low` to `high`, and `of_gap`, the change as a share of the gap between the classes. The
function raises `ValueError` without `ORIGINAL`.

A `VariantScorer` has `dist` (a `DistEnv`) and two methods. `prepare(pixels)` preprocesses an image,
uint8 (height, width, 3), after each perturbation; several threads call it. `column(variants)` takes
the list of these results for one image. Where a perturbation failed, the entry is the reason, a
text. It returns the logits, float32 (perturbations,), with NaN for a text.

`CheckpointScorer` and `DetectorScorer` of `scoring.py` are such scorers.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from devices import cores
from escape import reason_of
from imaging.decode import DecodeError
from model.distributed import DistEnv, all_gather_object
from model.evaluation.bootstrap import Images, Z, group_rows, intervals, resample
from model.metrics import measure
from model.score import join_failures
from model.verdict import NOT_FINITE, probability
from pipeline.perturb import ORIGINAL, Perturbation
from pipeline.read import ShardReader
from sharding.format import CLASSES, ShardSet


@dataclass(frozen=True, eq=False)
class PerturbedScores:
    """Scores of N images after each of D perturbations.

    `samples`, int64 (N,), are rows of the shard set; `labels` is int64 (N,). `logits`, float32
    (D, N), are before the temperature, and not finite where a perturbation failed on an image:
    `failures[d]` maps the sample to the reason. `unreadable` maps samples that cannot be decoded,
    or have no finite score as packed, to the reason; these samples are not among the N.
    """

    perturbations: tuple[Perturbation, ...]
    samples: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    failures: tuple[dict[int, str], ...]
    unreadable: dict[int, str]


@dataclass(frozen=True)
class Shift:
    """Change of the mean logit of a class. A positive change is toward fake."""

    images: int
    """Images of the class."""
    mean: float
    """Change of the mean logit."""
    low: float | None
    """Lower end of the 95 % interval of `mean`. None with one group of images."""
    high: float | None
    """Upper end of the 95 % interval of `mean`."""
    of_gap: float | None
    """`mean` as a share of the distance between the mean logits of fakes and reals as packed."""


def sample_by_hash(shards: ShardSet, per_class: int) -> np.ndarray:
    """Return the rows of at most `per_class` images of each class, int64, in set order.

    The images with the smallest SHA-256 are chosen, so every run uses the same images.
    """
    labels = shards.column("label")
    order = np.argsort(np.array(shards.table.column("sha256").to_pylist(), "S32"), kind="stable")
    kept = [order[labels[order] == label][:per_class] for label in range(len(CLASSES))]
    return np.sort(np.concatenate(kept))


class VariantScorer(Protocol):
    """Interface for scoring perturbed images: `CheckpointScorer` for checkpoints, `DetectorScorer`
    for all other detectors.
    """

    @property
    def dist(self) -> DistEnv:
        """The ranks that share the images."""

    def prepare(self, pixels: np.ndarray) -> Any:
        """Preprocess an image, uint8 (height, width, 3), for `column`. Must be thread-safe."""

    def column(self, variants: Sequence[Any]) -> np.ndarray:
        """Return the logits, before the temperature, of the prepared variants of one image: float32
        (D,). A variant that could not be made is given as its reason (a string) and gets NaN.
        """


def score_perturbations(
    scorer: VariantScorer,
    shards: ShardSet,
    samples: np.ndarray,
    perturbations: Sequence[Perturbation],
    on_images: Callable[[int], None] | None = None,
) -> PerturbedScores:
    """Score `samples` after each perturbation. The ranks divide the samples, and every rank returns
    the scores of all samples. `on_images(n)` is called after every n images of this rank.

    Each image is read and decoded once. One thread per core prepares the variants. All variants of
    one image form one batch.

    Raises:
        ValueError: `ORIGINAL` is not among the perturbations.
    """
    dist = scorer.dist
    perturbations = tuple(perturbations)
    original = [perturbation.name for perturbation in perturbations].index(ORIGINAL.name)
    failures: tuple[dict[int, str], ...] = tuple({} for _ in perturbations)
    unreadable: dict[int, str] = {}
    kept, logits = [], []

    for sample, variants in perturbed_variants(
        shards, samples[dist.rank :: dist.world_size], perturbations, scorer.prepare
    ):
        as_packed = variants if isinstance(variants, str) else variants[original]
        if isinstance(as_packed, str):
            unreadable[int(sample)] = as_packed
        elif not np.isfinite((column := scorer.column(variants))[original]):
            unreadable[int(sample)] = NOT_FINITE
        else:
            for row in np.flatnonzero(~np.isfinite(column)).tolist():
                failed = isinstance(variants[row], str)
                failures[row][int(sample)] = variants[row] if failed else NOT_FINITE
            kept.append(int(sample))
            logits.append(column)
        if on_images:
            on_images(1)
    parts = all_gather_object(dist, (kept, logits, failures, unreadable))
    rows = np.array([sample for part in parts for sample in part[0]], np.int64)
    columns = [column for part in parts for column in part[1]]
    order = np.argsort(rows, kind="stable")
    scores = np.stack(columns, axis=1) if columns else np.empty((len(perturbations), 0), np.float32)
    return PerturbedScores(
        perturbations=perturbations,
        samples=rows[order],
        labels=shards.column("label")[rows[order]].astype(np.int64),
        logits=scores[:, order],
        failures=tuple(
            join_failures(part[2][index] for part in parts) for index in range(len(perturbations))
        ),
        unreadable=join_failures(part[3] for part in parts),
    )


def perturbed_variants(
    shards: ShardSet,
    samples: np.ndarray,
    perturbations: Sequence[Perturbation],
    prepare: Callable[[np.ndarray], Any],
) -> Iterator[tuple[int, list[Any] | str]]:
    """Yield (sample, variants): the result of `prepare` after each perturbation.

    A perturbation that fails, or whose result cannot be prepared, gives its reason (a string) in
    place of the variant. A sample that cannot be read or decoded gives a reason in place of the
    list.
    """
    reader = ShardReader(shards)
    hashes = shards.table.column("sha256")

    def variants_of(sample: int) -> list[Any] | str:
        try:
            pixels = reader.pixels(sample)
        except DecodeError as error:
            return str(error)
        sha256 = hashes[int(sample)].as_py()
        return [
            _variant_of(pixels, perturbation, sha256, prepare) for perturbation in perturbations
        ]

    workers = cores()
    waiting: deque = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="perturb") as pool:
        for sample in samples.tolist():
            waiting.append((sample, pool.submit(variants_of, sample)))
            if len(waiting) > 2 * workers:
                ready, future = waiting.popleft()
                yield ready, future.result()
        for ready, future in waiting:
            yield ready, future.result()


def _variant_of(
    pixels: np.ndarray,
    perturbation: Perturbation,
    sha256: bytes,
    prepare: Callable[[np.ndarray], Any],
) -> Any:
    try:
        return prepare(perturbation.apply(pixels, sha256))
    except (ValueError, OSError) as error:
        return reason_of(error, longest=1000)


def measure_perturbations(
    perturbed: PerturbedScores, groups: np.ndarray, *, temperature: float, threshold: float
) -> list[dict[str, Any]]:
    """Return the entry of each perturbation in `report.json`.

    Only images that could be perturbed count. `recall`, `false_positive_rate`, `balanced_accuracy`
    and `auroc` have `intervals`, resampled by groups of images. `flip_rate` is the share of images
    whose verdict at `threshold` differs from the verdict as packed; `flip_rate_real` and
    `flip_rate_fake` are the same per class. `shift` is the `Shift` of each class, None for a class
    without images.
    """
    names = [perturbation.name for perturbation in perturbed.perturbations]
    before = perturbed.logits[names.index(ORIGINAL.name)]
    rows = []
    for index, perturbation in enumerate(perturbed.perturbations):
        after = perturbed.logits[index]
        there = np.isfinite(after) & np.isfinite(before)
        labels = perturbed.labels[there]
        probabilities = probability(after[there], temperature)
        flipped = (probabilities >= threshold) != (
            probability(before[there], temperature) >= threshold
        )
        metrics = asdict(measure(labels, probabilities, threshold))
        failed = perturbed.failures[index]
        rows.append(
            {
                "name": perturbation.name,
                "family": perturbation.family,
                "amount": perturbation.amount,
                "what": perturbation.what,
                "images": len(labels),
                **{key: metrics[key] for key in FIGURES},
                "intervals": _intervals(
                    labels, probabilities, groups[perturbed.samples[there]], threshold
                ),
                "flip_rate": _share(flipped),
                "flip_rate_real": _share(flipped[labels == 0]),
                "flip_rate_fake": _share(flipped[labels == 1]),
                "shift": shifts(perturbed.labels, before, after, groups[perturbed.samples]),
                "failed": len(failed),
                "failed_first": next(iter(failed.values()), None),
            }
        )
    return rows


FIGURES = ("reals", "fakes", "recall", "false_positive_rate", "balanced_accuracy", "auroc")


def _intervals(
    labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray, threshold: float
) -> dict[str, list[float]]:
    """Return the 95 % intervals of the metrics in `FIGURES`. All images count as one source."""
    if not len(labels):
        return {}
    images = Images(np.flatnonzero(labels == 0), np.flatnonzero(labels == 1))
    grouped = group_rows(groups, np.zeros(len(labels), np.int64), labels)
    ends_of = intervals(
        images, grouped, resample(probabilities, {"": images}, grouped, threshold)[""]
    )
    return {name: ends for name, ends in ends_of.items() if name in FIGURES}


def _share(flags: np.ndarray) -> float | None:
    return float(flags.mean()) if len(flags) else None


def shifts(
    labels: np.ndarray, before: np.ndarray, after: np.ndarray, groups: np.ndarray
) -> dict[str, dict[str, Any] | None]:
    """Return the `Shift` of each class by name, as a dict, from logits before and after a
    perturbation; None for a class without images.
    """
    there = np.isfinite(before) & np.isfinite(after)
    means = [before[there & (labels == label)] for label in (0, 1)]
    gap = float(means[1].mean() - means[0].mean()) if all(map(len, means)) else None
    shift_of_class: dict[str, dict[str, Any] | None] = {}
    for label, name in enumerate(CLASSES):
        rows = there & (labels == label)
        shift = shift_of((after - before)[rows], groups[rows], gap) if rows.any() else None
        shift_of_class[name] = asdict(shift) if shift else None
    return shift_of_class


def shift_of(changes: np.ndarray, groups: np.ndarray, gap: float | None = None) -> Shift:
    """Return the mean of `changes` with its 95 % interval.

    The variance is cluster-robust: images of one group may change together (Liang and Zeger 1986,
    for a mean). With a single group there is no interval.
    """
    changes = np.asarray(changes, np.float64)
    mean = float(changes.mean())
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], weights=changes - mean)
    count = len(sums)
    of_gap = mean / gap if gap and gap > 0 else None
    if count < 2:
        return Shift(len(changes), mean, None, None, of_gap)
    variance = np.square(sums).sum() * count / (count - 1)
    reach = Z * float(np.sqrt(variance)) / len(changes)
    return Shift(len(changes), mean, mean - reach, mean + reach, of_gap)
