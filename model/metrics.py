"""Pure functions from scores to numbers. Every figure this project prints is computed here.

`labels` are 0 real, 1 fake; `probabilities` are those of fake. A metric that needs both classes is
None where one is missing: EvalGEN, for one, holds no real images, so its "accuracy" is recall.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.functional.classification import binary_auroc, binary_f1_score

from model.score import DEFAULT_THRESHOLD


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Counts, and shares in 0 to 1.

    `recall` is the share of fakes called fake, `false_positive_rate` the share of reals called
    fake; `balanced_accuracy` is the mean of recall and of the share of reals called real; `f1` is
    that of the class fake.
    """

    count: int
    reals: int
    fakes: int
    accuracy: float | None
    balanced_accuracy: float | None
    recall: float | None
    false_positive_rate: float | None
    f1: float | None
    auroc: float | None


def measure(
    labels: np.ndarray, probabilities: np.ndarray, threshold: float = DEFAULT_THRESHOLD
) -> Metrics:
    """All metrics of one group of images; an image is called fake from `threshold` on."""
    fake = labels == 1
    called = probabilities >= threshold
    fakes, reals = int(fake.sum()), int((~fake).sum())
    both = bool(fakes and reals)
    return Metrics(
        count=len(labels),
        reals=reals,
        fakes=fakes,
        accuracy=float((called == fake).mean()) if len(labels) else None,
        balanced_accuracy=_balanced_accuracy(called, fake) if both else None,
        recall=float(called[fake].mean()) if fakes else None,
        false_positive_rate=float(called[~fake].mean()) if reals else None,
        f1=_f1(called, fake) if both else None,
        auroc=auroc(labels, probabilities) if both else None,
    )


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve; `scores` may be any increasing function of the probability."""
    # float64 and no rescaling: torchmetrics squashes values outside 0 to 1 through a sigmoid,
    # where large logits would tie.
    ranks = np.unique(scores, return_inverse=True)[1].astype(np.float64)
    scaled = torch.from_numpy(ranks / max(1.0, ranks.max()))
    return float(binary_auroc(scaled, torch.from_numpy(np.asarray(labels, np.int64))))


def _balanced_accuracy(called: np.ndarray, fake: np.ndarray) -> float:
    return float((called[fake].mean() + (~called[~fake]).mean()) / 2)


def _f1(called: np.ndarray, fake: np.ndarray) -> float:
    return float(
        binary_f1_score(torch.from_numpy(called.astype(int)), torch.from_numpy(fake.astype(int)))
    )


def measure_sources(
    labels: np.ndarray,
    probabilities: np.ndarray,
    sources: Sequence[str],
    threshold: float = DEFAULT_THRESHOLD,
) -> dict[str, Metrics]:
    """Metrics of each source's own images."""
    sources = np.asarray(sources, object)
    result = {}
    for name in sorted(set(sources)):
        rows = sources == name
        result[name] = measure(labels[rows], probabilities[rows], threshold)
    return result


def measure_generators(
    labels: np.ndarray,
    probabilities: np.ndarray,
    generators: Sequence[str],
    threshold: float = DEFAULT_THRESHOLD,
) -> dict[str, Metrics]:
    """Metrics per generator of fakes; each is held against all the reals given."""
    generators = np.asarray(generators, object)
    result = {}
    for name in sorted(set(generators[labels == 1])):
        rows = (labels == 0) | (generators == name)
        result[name] = measure(labels[rows], probabilities[rows], threshold)
    return result


def what_is_missing(metrics: Metrics) -> str | None:
    """A plain sentence where one class is missing, else None."""
    if metrics.count == 0:
        return "There are no images here."
    if not metrics.reals:
        return (
            "There are no real images here: recall says how many fakes are found and nothing about "
            "false alarms. Read it beside a false-positive rate on real photographs."
        )
    if not metrics.fakes:
        return "There are no fake images here: only the false-positive rate can be measured."
    return None
