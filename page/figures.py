"""Compute, from the detector's `meta.json`, the error rates that the web page shows. All rates and
shares are from 0 to 1, and no function changes anything.

Main entries: `rates(meta)` takes the parsed `meta.json` (a dict, such as `detector.meta`) and
returns `CalibratedRates`, or None if it has no calibration. `CalibratedRates` has

- `recall` and `false_positives`: the shares of fakes and of real images that are called likely AI,
  each a `Measured`: `share`, `images` (number of images on which it was measured), `lowest` and
  `highest` (extreme shares of single sources, or None);
- `uncertain`: the share of uncertain images, or None;
- `left_out`: True if each source was scored by a detector that was trained without this source.

`measured_on(meta)` takes the same and returns a text: on which images the rates of its calibration
were measured.

`verdict_shares(roc, band)` returns two `VerdictShares`, of the real and of the fake images: the
shares `no_sign` (no sign of AI), `uncertain` and `likely` (likely AI).

- `roc`: the ROC curve `meta["calibration"]["roc"]`, a list of `Row`s with at least one entry. A
  `Row` is (threshold, share of reals, share of fakes with a score at or above the threshold).
- `band`: the uncertain band, (low, high).

`of_hundred(share)` formats a share as a count of 100, as text ("under 1" and
"over 99" at the ends).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from console import counted
from model.verdict import left_out_sources, shares_at


@dataclass(frozen=True)
class Measured:
    """A rate (0 to 1) measured on `images` images. `lowest` and `highest` are the extreme rates of
    single sources; None if sources were not measured separately.
    """

    share: float
    images: int
    lowest: float | None = None
    highest: float | None = None


@dataclass(frozen=True)
class CalibratedRates:
    """Rates at the checkpoint's calibrated threshold.

    `recall` is the share of fakes called likely AI, `false_positives` the share of real images
    called likely AI, `uncertain` the share of all images in the band (None if not measured).
    `left_out` is true if every source was scored by a head that was trained without this source.
    """

    recall: Measured
    false_positives: Measured
    uncertain: float | None
    left_out: bool


def rates(meta: Mapping[str, Any]) -> CalibratedRates | None:
    """Return the rates in the meta of a checkpoint; None if it has none: without a calibration, or
    with one that has neither sources left out nor a curve and the numbers of its images.
    """
    calibration = meta["calibration"]
    if not calibration:
        return None
    sources = list(left_out_sources(meta).values())
    recall = _over_sources(sources, "recall", ("fakes",))
    false_positives = _over_sources(sources, "false_positive_rate", ("reals",))
    uncertain = _over_sources(sources, "uncertain", ("reals", "fakes"))
    if recall and false_positives and uncertain:
        return CalibratedRates(recall, false_positives, uncertain.share, True)
    curve = calibration.get("roc")
    if not curve or not {"reals", "fakes"} <= calibration.keys():
        return None
    reals_called, fakes_called = shares_at(curve, meta["threshold"])
    return CalibratedRates(
        Measured(fakes_called, calibration["fakes"]),
        Measured(reals_called, calibration["reals"]),
        None,
        False,
    )


def measured_on(meta: Mapping[str, Any]) -> str:
    """Describe the images of the calibration, and by which detectors they were scored."""
    calibration = meta["calibration"]
    images = "images"
    if {"reals", "fakes"} <= calibration.keys():
        images = f"{calibration['reals']:,} real and {calibration['fakes']:,} fake images"
    if sources := left_out_sources(meta):
        return (
            f"Measured on {images} of {counted(len(sources), 'source')}, each scored by a detector "
            "trained without its source: these images were of a new kind for the detector, as "
            "yours may be."
        )
    return (
        f"Measured on {images} of the kinds that the detector was trained on. On other kinds of "
        "images, expect more errors."
    )


def _over_sources(
    sources: list[dict[str, Any]], rate: str, images: tuple[str, ...]
) -> Measured | None:
    """Return the mean of a rate over the images of all sources that have it; None without any."""
    known = [
        (source[rate], count)
        for source in sources
        if source.get(rate) is not None and (count := sum(source.get(name, 0) for name in images))
    ]
    if not known:
        return None
    shares, counts = zip(*known, strict=True)
    mean = sum(share * count for share, count in known) / sum(counts)
    return Measured(mean, sum(counts), min(shares), max(shares))


Row = tuple[float, float, float]


@dataclass(frozen=True)
class VerdictShares:
    """Share of the images of one class that get each verdict; the three shares sum to 1."""

    no_sign: float
    uncertain: float
    likely: float


def verdict_shares(
    roc: list[Row], band: tuple[float, float]
) -> tuple[VerdictShares, VerdictShares]:
    """Return the shares of each verdict for real and for fake images, with the band (low, high)."""
    low, high = (shares_at(roc, end) for end in band)
    reals, fakes = (
        VerdictShares(1 - at_low, at_low - at_high, at_high)
        for at_low, at_high in zip(low, high, strict=True)
    )
    return reals, fakes


def of_hundred(share: float) -> str:
    """Format a share as a count of 100, but never 0 or 100, which no finite sample can prove."""
    if share < 0.005:
        return "under 1"
    return "over 99" if share > 0.995 else f"{100 * share:.0f}"
