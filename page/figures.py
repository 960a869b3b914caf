"""How often a detector is right and wrong, from its own meta: what the first screen and the slider
show. Pure functions; nothing here knows a figure of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measured:
    """A share of `images` images; `lowest` and `highest` are those of single sources, None where
    only all together were measured.
    """

    share: float
    images: int
    lowest: float | None = None
    highest: float | None = None


@dataclass(frozen=True)
class Rates:
    """What was measured at the checkpoint's own threshold: fakes called likely AI, and real images
    called that; `uncertain` is the share of all images in the band, None where that is not known.
    `left_out` says whether every source was scored by a head that had not seen it.
    """

    recall: Measured
    false_positives: Measured
    uncertain: float | None
    left_out: bool
    fitted_on: tuple[str, ...]


def rates(meta: Mapping[str, Any]) -> Rates | None:
    """The rates of a checkpoint; None where nothing is calibrated."""
    calibration = meta["calibration"]
    if not calibration:
        return None
    sources = (calibration.get("sources") or {}).values()
    fitted_on = tuple(calibration["fitted_on"])
    if sources:
        images = sum(source["reals"] + source["fakes"] for source in sources)
        uncertain = sum(
            source["uncertain"] * (source["reals"] + source["fakes"]) for source in sources
        )
        return Rates(
            _over_sources(list(sources), "recall", "fakes"),
            _over_sources(list(sources), "false_positive_rate", "reals"),
            uncertain / images,
            True,
            fitted_on,
        )
    _, reals_called, fakes_called = row_at(calibration["roc"], meta["threshold"])
    return Rates(
        Measured(fakes_called, calibration["fakes"]),
        Measured(reals_called, calibration["reals"]),
        None,
        False,
        fitted_on,
    )


def _over_sources(sources: list[dict[str, Any]], rate: str, images: str) -> Measured:
    known = [source for source in sources if source[rate] is not None]
    count = sum(source[images] for source in known)
    shares = [source[rate] for source in known]
    mean = sum(source[rate] * source[images] for source in known) / count
    return Measured(mean, count, min(shares), max(shares))


Row = tuple[float, float, float]


def row_at(roc: list[Row], threshold: float) -> Row:
    """(threshold, share of reals, share of fakes) from a threshold on. One that was set by hand
    lies between two rows: the lower one promises no less.
    """
    return max((row for row in roc if row[0] <= threshold), default=roc[0])


@dataclass(frozen=True)
class Ends:
    """The shares of the images of one kind that end in each verdict; they add up to 1."""

    no_sign: float
    uncertain: float
    likely: float


def ends(roc: list[Row], band: tuple[float, float]) -> tuple[Ends, Ends]:
    """Where real and where fake images end with a `band`."""
    low, high = (row_at(roc, end) for end in band)
    reals, fakes = (
        Ends(1 - low[column], low[column] - high[column], high[column]) for column in (1, 2)
    )
    return reals, fakes


def of_hundred(share: float) -> str:
    """A share as a count of 100; a measurement on some images is never none or all of them."""
    if share < 0.005:
        return "under 1"
    return "over 99" if share > 0.995 else f"{100 * share:.0f}"
