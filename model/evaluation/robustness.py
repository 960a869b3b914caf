"""Robustness of a detector: the same samples scored after many perturbations.

A perturbation works on the whole decoded image, exactly as packed, and the preprocessing of
evaluation follows; so `original` here and a plain evaluation see the same pixels.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from imaging.decode import DecodeError, decode_image
from model.distributed import DistEnv, all_gather_object
from model.evaluation.bootstrap import Images, group_rows, intervals, resample
from model.metrics import measure
from model.score import probability, score_batches
from pipeline import pil
from pipeline.augment import Preprocess
from pipeline.batch import Batch
from pipeline.perturb import ORIGINAL, Perturbation
from pipeline.read import ReadError, ShardReader
from sharding.format import CLASSES, ShardSet
from storage import cores


@dataclass(frozen=True, eq=False)
class PerturbedScores:
    """Scores of the same images after several perturbations.

    `samples` int64 (N,) are rows of the shard set, `labels` int64 (N,); `logits` is float32 (D, N),
    before any temperature, NaN where an image cannot be perturbed so: `failures[d]` says why
    (sample -> reason). `unreadable` are samples that do not decode at all; they have no column.
    """

    perturbations: tuple[Perturbation, ...]
    samples: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    failures: tuple[dict[int, str], ...]
    unreadable: dict[int, str]


@dataclass(frozen=True)
class Shift:
    """Change of the mean logit of a class. Positive is toward fake."""

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
    """Rows of at most `per_class` images of each class, in the order of the set: those whose files
    have the smallest hashes, so that every run takes the same ones.
    """
    labels = shards.column("label")
    order = np.argsort(np.array(shards.table.column("sha256").to_pylist(), "S32"), kind="stable")
    kept = [order[labels[order] == label][:per_class] for label in range(len(CLASSES))]
    return np.sort(np.concatenate(kept))


@dataclass(frozen=True)
class Scorer:
    """How images are scored: by which network, after which preprocessing, on which device, in
    which precision and on which ranks.
    """

    net: nn.Module
    preprocess: Preprocess
    device: torch.device
    dtype: torch.dtype = torch.float32
    dist: DistEnv = field(default_factory=DistEnv)

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """What the network sees of an image: uint8 (size, size, 3) RGB."""
        return pil.preprocess(pixels, self.preprocess)

    def column(self, variants: Sequence[np.ndarray | str]) -> np.ndarray:
        """The logits of all variants of one image, which are one batch; NaN of a reason."""
        batch = _batch_of(variants, self.device)
        ((_, logits),) = score_batches(self.net, [batch], self.device, self.dtype)
        return logits


class VariantScorer(Protocol):
    """What robustness asks of a detector: `Scorer` of ours, `DetectorScorer` of others.

    `prepare` makes of pixels, uint8 (height, width, 3), what is scored; threads call it. `column`
    gives the logits before any temperature of the prepared variants of one image, float32 (D,), NaN
    where a reason stands in the place of one.
    """

    @property
    def dist(self) -> DistEnv:
        """The ranks."""

    def prepare(self, pixels: np.ndarray) -> Any:
        """See the class."""

    def column(self, variants: Sequence[Any]) -> np.ndarray:
        """See the class."""


def score_perturbations(
    scorer: VariantScorer,
    shards: ShardSet,
    samples: np.ndarray,
    perturbations: Sequence[Perturbation],
    on_images: Callable[[int], None] | None = None,
) -> PerturbedScores:
    """Score `samples` after each perturbation; `on_images(n)` is called as images are done. Over
    many ranks each takes its share, and all of them know the whole.

    Each image is read and decoded once; a thread per core prepares all its variants. The whole grid
    of one image is one batch.
    """
    dist = scorer.dist
    perturbations = tuple(perturbations)
    failures: tuple[dict[int, str], ...] = tuple({} for _ in perturbations)
    unreadable: dict[int, str] = {}
    kept, logits = [], []

    for sample, variants in perturbed_variants(
        shards, samples[dist.rank :: dist.world_size], perturbations, scorer.prepare
    ):
        if isinstance(variants, str):
            unreadable[int(sample)] = variants
        else:
            for row, variant in enumerate(variants):
                if isinstance(variant, str):
                    failures[row][int(sample)] = variant
            kept.append(int(sample))
            logits.append(scorer.column(variants))
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
            {sample: reason for part in parts for sample, reason in part[2][index].items()}
            for index in range(len(perturbations))
        ),
        unreadable={sample: reason for part in parts for sample, reason in part[3].items()},
    )


def perturbed_variants(
    shards: ShardSet,
    samples: np.ndarray,
    perturbations: Sequence[Perturbation],
    prepare: Callable[[np.ndarray], Any],
) -> Iterator[tuple[int, list[Any] | str]]:
    """Each sample, as `prepare` makes it of its pixels after each perturbation, or the reason why
    it cannot be.
    """
    reader = ShardReader(shards)
    codes, formats = shards.codes("format")
    hashes = shards.table.column("sha256")

    def variants_of(sample: int) -> list[Any] | str:
        data = reader.read([sample])[0]
        if isinstance(data, ReadError):
            return str(data)
        orientation = int(shards.column("orientation")[sample])
        try:
            pixels = decode_image(data, formats[codes[sample]], orientation)
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
        arrived = perturbation.apply(pixels, sha256)
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    return prepare(arrived)


def _batch_of(variants: Sequence[np.ndarray | str], device: torch.device) -> Batch:
    """All variants of one sample as a batch; those that are not there are black and not valid."""
    failures = {row: image for row, image in enumerate(variants) if isinstance(image, str)}
    size = next((len(variant) for variant in variants if not isinstance(variant, str)), 1)
    blank = np.zeros((size, size, 3), np.uint8)
    pixels = np.stack(
        [blank if row in failures else variant for row, variant in enumerate(variants)]
    )
    return Batch(
        images=torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2),
        labels=torch.zeros(len(variants), dtype=torch.int64, device=device),
        valid=torch.tensor([row not in failures for row in range(len(variants))]).to(device),
        samples=np.zeros(len(variants), np.int64),
        sources=np.zeros(len(variants), np.int32),
        replayed=np.zeros(len(variants), np.bool_),
        failures=failures,
    )


def measure_perturbations(
    perturbed: PerturbedScores, groups: np.ndarray, *, temperature: float, threshold: float
) -> list[dict[str, Any]]:
    """The figures of each perturbation, as `report.json` holds them.

    `recall`, `false_positive_rate`, `balanced_accuracy` and `auroc` are those of the images that
    could be perturbed, and `intervals` theirs, by groups of images; `flip_rate` is the share of
    them whose verdict at `threshold` is another one than as packed, `flip_rate_real` and
    `flip_rate_fake` that of each class; `shift` is how far each class moves (`Shift`), None for a
    class without images.
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
    """95 % intervals of what `FIGURES` names; as if all images were of one source."""
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
    """`Shift` of each class, by its name, from logits before and after; None without images."""
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
    """The mean of `changes` with its 95 % interval, by the variance that holds where images of one
    group move together (Liang and Zeger 1986, for a mean). With one group there is no telling, and
    no interval.
    """
    changes = np.asarray(changes, np.float64)
    mean = float(changes.mean())
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], weights=changes - mean)
    count = len(sums)
    of_gap = mean / gap if gap and gap > 0 else None
    if count < 2:
        return Shift(len(changes), mean, None, None, of_gap)
    variance = np.square(sums).sum() * count / (count - 1)
    reach = 1.96 * float(np.sqrt(variance)) / len(changes)
    return Shift(len(changes), mean, mean - reach, mean + reach, of_gap)


def group_codes(shards: ShardSet) -> np.ndarray:
    """A number per sample, equal for images of one group (pair, prompt, video): int64 (N,)."""
    encoded = shards.table.column("group").combine_chunks().dictionary_encode()
    return np.asarray(encoded.indices.to_pylist(), np.int64)
