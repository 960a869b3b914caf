"""Write and read the figures of heads that were each trained without some image sources, measured
on these sources: a JSON file for the model card.

    {"pooled": AUROC of all images,
     "pairs": null or {"mean": mean AUROC of the pairs of a source of reals and one of fakes,
                       "interval": [low, high], "worst": {"real source | fake source": AUROC, ...}},
     "within_subjects": {"auroc": mean in clusters of similar images or null, "clusters": number},
     "perturbed": {name: {"auroc": a, "recall": r, "false_positive_rate": f, "reals": n,
                          "fakes": n}, ...}}

Main entries: `write_new_kinds(figures, path)` writes a `NewKinds` as JSON, and
`read_new_kinds(path)` reads it. `path` is a `Path`. `read_new_kinds()` raises `NewKindsError`, a
ValueError, for a file that holds no such figures. `benchmarks/leave_out.py` computes them, and the
card of a detector shows them.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from checked import checked
from model.shipped.calibration import Band, Count, Share
from storage import parse_json, read_text, write_text


class NewKindsError(ValueError):
    """Error of a file that holds no figures on new kinds. The message says how to write one."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """AUROC over pairs of a source of reals and a source of fakes, each scored by a head that was
    trained without it.
    """

    mean: Share
    interval: Band
    """95 % interval of the mean, resampling sources."""
    worst: dict[str, Share]
    """Lowest values, by `real source | fake source`."""


@dataclass(frozen=True, kw_only=True)
class WithinSubjects:
    """Mean AUROC in clusters of similar images. None if no cluster has both classes."""

    auroc: Share | None
    clusters: Count


@dataclass(frozen=True, kw_only=True)
class AfterPerturbation:
    """Figures after one perturbation: means over sources, and of the AUROC over pairs of sources,
    and the numbers of images.
    """

    auroc: Share
    recall: Share
    false_positive_rate: Share
    reals: Count
    fakes: Count


@dataclass(frozen=True, kw_only=True)
class NewKinds:
    """Figures of heads that were each trained without some sources, on these sources."""

    pooled: Share
    pairs: Pairs | None
    """None if all sources with images of one class have the same class."""
    within_subjects: WithinSubjects
    perturbed: dict[str, AfterPerturbation] = field(default_factory=dict)
    """By the name of the perturbation. Empty if none was measured."""


def write_new_kinds(figures: NewKinds, path: Path) -> None:
    """Write the figures as JSON."""
    write_text(path, json.dumps(asdict(figures), indent=1) + "\n")


def read_new_kinds(path: Path) -> NewKinds:
    """Read the figures that `write_new_kinds` has written.

    Raises:
        NewKindsError: the file holds no such figures.
    """
    try:
        return checked(NewKinds, parse_json(read_text(path)))
    except ValueError as error:
        raise NewKindsError(
            f"{path} has no figures on sources left out of training ({error}); write them in a "
            "checkout: `python -m benchmarks.leave_out --recipe FILE --left-out FILE`"
        ) from error
