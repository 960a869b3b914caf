"""The words for a probability of fake: a checkpoint's band of doubt, and what is said around it.

Apart from `model/calibrate.py`, which finds the band: predicting needs nothing to fit with.
"""

import math
from collections.abc import Mapping
from typing import Any

VERDICTS = ("no sign of AI", "uncertain", "likely AI")
"""By where the probability of fake lies: below the band, in it, at its upper end or above."""

NOT_FINITE = "its score is not a finite number; the weights or the precision are at fault"
"""Why an image has no verdict though it was read."""


def band_of(meta: Mapping[str, Any]) -> tuple[float, float]:
    """(low, high) of a checkpoint's meta; both are its threshold where it is not calibrated."""
    calibration = meta["calibration"]
    low, high = calibration["band"] if calibration else (meta["threshold"],) * 2
    return float(low), float(high)


def percent(p: float) -> str:
    """A probability for reading; never a certainty."""
    if p < 0.001:
        return "under 0.1%"
    return "over 99.9%" if p > 0.999 else f"{100 * p:.1f}%"


def capital(text: str) -> str:
    """A sentence's beginning; `str.capitalize` would make `AI` lower case."""
    return text[:1].upper() + text[1:]


def verdict(probability: float, band: tuple[float, float]) -> str:
    """One of `VERDICTS` for a probability of fake.

    Raises:
        ValueError: it is not a finite number, and no comparison with it would say anything.
    """
    if not math.isfinite(probability):
        raise ValueError(f"an image has no verdict: {NOT_FINITE}")
    return VERDICTS[int(probability >= band[0]) + int(probability >= band[1])]
