"""Measure whether a detector reacts to the content of images or to their file compression.

The codec-swap test gives the images of each class the usual compression of the other class.
Besides, it gives both classes the same compression, in three ways: JPEG, WebP, and shrunk to a
common size, then JPEG. Scores that follow the compression show that the detector learned it.

Main entry: `report_robustness(scorer, shards, perturbations, *, temperature, threshold, per_class,
on_images)` scores images before and after all perturbations and re-encodings. All ranks must call
it; all get the result.

- `scorer`: the detector as a `VariantScorer` (`CheckpointScorer` of `scoring.py` for a checkpoint's
  network, `DetectorScorer` for other detectors).
- `shards`: an opened set of packed images, from `open_shards([folder])` of `sharding/format.py`.
- `perturbations`: a list of `Perturbation` with `ORIGINAL` in it, such as `PERTURBATIONS` of
  `pipeline/perturb.py`. Without `ORIGINAL` it raises `ValueError`, but only after the scoring.
- `temperature`: the logits are divided by it (1.0: unchanged).
- `threshold`: the decision threshold on the resulting probability.
- `per_class`: the most images of each class, those with the smallest SHA-256.
- `on_images`: None (default) or a function that is called with 1 after each image of this rank.

It writes nothing and returns the entry `robustness` of `report.json`, a dict:

- `images`, `of`, `unreadable`: the numbers of scored images, of images in the set, and of chosen
  images that cannot be decoded. `images_sha256`: a hash of the scored images.
- `perturbations`: a list with a dict per perturbation, from `measure_perturbations()` of
  `robustness.py`: `name`, `images`, metrics such as `recall`, `intervals`, `flip_rate` (share of
  changed verdicts), `shift` and more.
- `codec_swap`: a list with a dict per re-encoding: `name`, `what` (a text), `images`, `shift`,
  `before` and `after` (dicts of metrics such as `recall`).
- `containers`: a dict, "real" and "fake" -> the usual compression of this class, a dict: the fields
  of `Container`, and `name`, such as "JPEG 90 420". None: no image of this class is lossy, so the
  other class is not re-encoded like it.

`shift` is a dict, "real" and "fake" -> how the logits of this class changed (fake minus real,
before the temperature), or None for a class that has no images or is not re-encoded. The change is
a dict: `images`, `mean` (positive: toward fake), its 95 % interval `low` to `high` (None with one
group of images), and `of_gap`: `mean` divided by the gap between the classes as packed (mean logit
of the fakes minus that of the reals; None if it is not positive).

A `Container` is the most common lossy compression of a class: `format` ("JPEG" or "WEBP"), `chroma`
(such as "420"), `quality` (the median; always 80 for WebP) and `share` (of the images of the
class). `container_of(shards, samples)` returns the `Container` of these images (row numbers,
int64), or None if none is lossy (images converted by the build do not count). A `Swap` is one
re-encoding. `plan_swaps(shards, samples)` returns the containers (a dict by class) and the list of
swaps. `measure_swaps(perturbed, swaps, groups, *, temperature, threshold)` takes the
`PerturbedScores`, the swaps and the codes of the set's groups. It returns the list `codec_swap`.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from imaging.jpeg import CHROMAS
from model.evaluation.robustness import (
    FIGURES,
    PerturbedScores,
    VariantScorer,
    measure_perturbations,
    sample_by_hash,
    score_perturbations,
    shifts,
)
from model.metrics import measure
from model.verdict import probability
from pipeline.perturb import ORIGINAL, Perturbation, fit_shorter, jpeg, webp
from sharding.format import CLASSES, ShardSet, codes_of

LOW_QUALITY = 75
"""Highest JPEG quality of the tests that re-encode both classes; libjpeg's default. A class with a
lower median quality lowers the quality of these tests.
"""


@dataclass(frozen=True)
class Container:
    """Most common lossy file format of the images of a class."""

    format: str
    """`JPEG` or `WEBP`."""
    chroma: str
    """Chroma subsampling of a JPEG, such as `420`."""
    quality: int
    """Median libjpeg quality, estimated from the quantization tables. 80 for WebP, because WebP
    files do not state a quality."""
    share: float
    """Share of the class in this format."""

    def describe(self) -> str:
        """Return the compression as text: `JPEG 90 420` or `WebP 80`."""
        if self.format == "WEBP":
            return f"WebP {self.quality}"
        return f"JPEG {self.quality} {self.chroma if self.chroma else '420'}"

    def perturbation(self, name: str) -> Perturbation:
        """Return the perturbation `name` that re-encodes an image with this compression."""
        step = (
            partial(webp, quality=self.quality)
            if self.format == "WEBP"
            else partial(jpeg, quality=self.quality, chroma=self.chroma)
        )
        return Perturbation(name, "codec swap", self.quality, (step,))


def container_of(shards: ShardSet, samples: np.ndarray) -> Container | None:
    """Return the most common lossy compression of `samples`: WebP, or JPEG with one chroma. None if
    no image is lossy: lossless formats such as PNG leave no trace in the pixels.
    """
    formats, chromas = shards.names("format", samples), shards.names("chroma", samples)
    published = shards.names("transcoded_from", samples)
    quality = shards.column("jpeg_quality")[samples]
    kinds = np.array(
        [
            f"{form} {chroma}".strip() if form in ("JPEG", "WEBP") and not was else ""
            for form, chroma, was in zip(formats, chromas, published, strict=True)
        ],
        object,
    )
    counts = {kind: int((kinds == kind).sum()) for kind in sorted(set(kinds)) if kind}
    if not counts:
        return None
    kind = max(counts, key=counts.__getitem__)
    form, _, chroma = kind.partition(" ")
    if form == "WEBP":
        return Container("WEBP", "", 80, counts[kind] / len(samples))
    median = int(np.median(quality[kinds == kind]))
    chroma = chroma if chroma in CHROMAS else "420"
    return Container("JPEG", chroma, max(1, median), counts[kind] / len(samples))


@dataclass(frozen=True, eq=False)
class Swap:
    """One codec-swap test. `reals` and `fakes` select the classes to re-encode with `perturbation`;
    the other class stays as packed. `what` describes the test for the report.
    """

    name: str
    what: str
    perturbation: Perturbation
    reals: bool
    fakes: bool


def plan_swaps(
    shards: ShardSet, samples: np.ndarray
) -> tuple[dict[str, Container | None], list[Swap]]:
    """Return the container of each class (class name -> `Container` or None) and the tests to run.

    A class without a lossy container cannot give its compression to the other class.
    """
    labels = shards.column("label")[samples]
    of = {name: samples[labels == label] for label, name in enumerate(CLASSES)}
    containers = {
        name: container_of(shards, rows) if len(rows) else None for name, rows in of.items()
    }
    real, fake = containers["real"], containers["fake"]
    swaps = []
    if real and len(of["fake"]):
        way = real.perturbation("fakes-as-reals")
        swaps.append(Swap(way.name, f"fakes re-encoded as {real.describe()}", way, False, True))
    if fake and len(of["real"]):
        way = fake.perturbation("reals-as-fakes")
        swaps.append(Swap(way.name, f"reals re-encoded as {fake.describe()}", way, True, False))
    quality = min(
        [LOW_QUALITY] + [c.quality for c in (real, fake) if c is not None and c.format == "JPEG"]
    )
    shorter = np.minimum(shards.column("width"), shards.column("height"))
    side = min(int(np.median(shorter[rows])) for rows in of.values() if len(rows))
    both = (
        ("all-as-jpeg", f"all as JPEG {quality} 420", (partial(jpeg, quality=quality),)),
        ("all-as-webp", "all as WebP 80", (partial(webp, quality=80),)),
        (
            "leveled",
            f"leveled: all shrunk to a shorter side of {side} at most, then JPEG {quality} 420",
            (partial(fit_shorter, shorter=side), partial(jpeg, quality=quality)),
        ),
    )
    for name, what, steps in both:
        swaps.append(Swap(name, what, Perturbation(name, "codec swap", quality, steps), True, True))
    return containers, swaps


def measure_swaps(
    perturbed: PerturbedScores,
    swaps: Sequence[Swap],
    groups: np.ndarray,
    *,
    temperature: float,
    threshold: float,
) -> list[dict[str, Any]]:
    """Return the entry of each test in `report.json`: the shift of each re-encoded class (`shift`,
    as in `measure_perturbations`), and the metrics of `FIGURES` before and after, on the `images`
    that could be re-encoded and scored; `failed` counts the others.
    """
    names = [perturbation.name for perturbation in perturbed.perturbations]
    before = perturbed.logits[names.index(ORIGINAL.name)]
    labels, sample_groups = perturbed.labels, groups[perturbed.samples]
    rows = []
    for swap in swaps:
        re_encoded = perturbed.logits[names.index(swap.name)]
        moved = (swap.reals & (labels == 0)) | (swap.fakes & (labels == 1))
        after = np.where(moved, re_encoded, before)
        there = np.isfinite(before) & np.isfinite(after)
        rates_before, rates_after = (
            asdict(measure(labels[there], probability(logits[there], temperature), threshold))
            for logits in (before, after)
        )
        shift = shifts(labels, before, after, sample_groups)
        failures = perturbed.failures[names.index(swap.name)]
        reasons = [failures[sample] for sample in perturbed.samples[~there].tolist()]
        rows.append(
            {
                "name": swap.name,
                "what": swap.what,
                "images": int(there.sum()),
                "shift": {
                    "real": shift["real"] if swap.reals else None,
                    "fake": shift["fake"] if swap.fakes else None,
                },
                "before": {key: rates_before[key] for key in FIGURES},
                "after": {key: rates_after[key] for key in FIGURES},
                "failed": len(reasons),
                "failed_first": reasons[0] if reasons else None,
            }
        )
    return rows


def report_robustness(
    scorer: VariantScorer,
    shards: ShardSet,
    perturbations: Sequence[Perturbation],
    *,
    temperature: float,
    threshold: float,
    per_class: int,
    on_images: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Score `per_class` images of each class (`sample_by_hash`) under all perturbations and codec
    swaps. Return the entry `robustness` of one set in `report.json`:

    {"images": n, "of": n, "unreadable": n, "images_sha256": text,
     "perturbations": rows of `measure_perturbations`,
     "containers": {"real" or "fake": null or the fields of `Container`, and "name"},
     "codec_swap": rows of `measure_swaps`}
    """
    samples = sample_by_hash(shards, per_class)
    containers, swaps = plan_swaps(shards, samples)
    ways = [*perturbations, *(swap.perturbation for swap in swaps)]
    perturbed = score_perturbations(scorer, shards, samples, ways, on_images)
    groups = codes_of(shards.table.column("group"))[0]
    at = {"temperature": temperature, "threshold": threshold}
    rows = measure_perturbations(perturbed, groups, **at)[: len(perturbations)]
    hashes = shards.table.column("sha256").take(perturbed.samples).to_pylist()
    return {
        "images": len(perturbed.samples),
        "of": len(shards),
        "unreadable": len(perturbed.unreadable),
        "images_sha256": hashlib.sha256(b"".join(sorted(hashes))).hexdigest(),
        "perturbations": rows,
        "containers": {
            name: container and asdict(container) | {"name": container.describe()}
            for name, container in containers.items()
        },
        "codec_swap": measure_swaps(perturbed, swaps, groups, **at),
    }
