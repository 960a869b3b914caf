"""Turn a logit into a probability of fake, and this into one of three verdicts, with the uncertain
band of a detector.

Main entry: `verdict(probability, band)` returns one of `VERDICTS`: "no sign of AI" below the band,
"uncertain" in it, "likely AI" at or above its upper end. It raises `ValueError` if the probability
is NaN or infinite (`NOT_FINITE` is the reason as text).

- `probability`: probability of fake, float from 0 to 1.
- `band`: (low, high), such as (0.3, 0.7). With low equal to high, no verdict is "uncertain".

`probability(logits, temperature)` converts an array of logits (fake minus real) to probabilities of
fake, float64. A logit that is not finite gives NaN.

`temperature_of(meta)` returns the temperature of a detector's calibration, None without one.

`band_of(meta)` returns the (low, high) of a checkpoint. `meta` is its parsed `meta.json`, a dict.
Without a calibration, low and high are both its decision threshold.

`band_at(meta, band, max_fpr, max_miss)` returns the (low, high) for chosen error rates. `max_fpr`
is the largest share of real images that may be called likely AI; it sets high. `max_miss` is the
largest share of fakes that may be called no sign of AI; it sets low. The checkpoint stores
thresholds for some rates; of these, the next smaller one counts. With None (the default), this end
stays as in `band`, the band in use until now. If low would be above high, it is set to high. It
raises `ValueError` for a rate that is not above 0 and below 0.5, or if the checkpoint has no
threshold for the rate, such as without a calibration.

`describe_band(band)` returns these thresholds as words: "no sign of AI below 0.3, likely AI from
0.7, uncertain between", or "likely AI from 0.5" with low equal to high.

`left_out_sources(meta)` returns the error rates of the sources that were left out of training, a
dict, name -> rates as in `meta.json`; empty if the calibration was fitted otherwise.
`left_out_rates(meta)` returns them also after another calibration, as a `LeftOut`: `sources`, and
the `band` at which they were measured. `keep_left_out(meta, changes)` takes changes of a meta, such
as a new calibration, and returns them with these rates.

`shares_at(roc, threshold)` returns (share of reals, share of fakes) with a score of at least
`threshold`. `roc` is the ROC curve `meta["calibration"]["roc"]`, a list of (threshold, share of
reals, share of fakes).

`percent(p)` formats a probability such as "42.0%" ("under 0.1%" and "over 99.9%" at the ends).
`capital(text)` makes the first letter upper case.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from installed import command

CALIBRATION_KEYS = ("temperature", "threshold", "calibration")
"""Keys of a checkpoint's `meta.json`, or of another detector, that a calibration sets."""

VERDICTS = ("no sign of AI", "uncertain", "likely AI")
"""Verdicts for a probability of fake below the band, inside it, and at or above its upper end."""

NOT_FINITE = (
    "its score is not a finite number: the detector gives no verdict on it, or its weights or "
    "precision are at fault"
)
"""Reason why an image that was decoded has no verdict."""

LEFT_OUT = "sources left out"
"""Start of the `method` of a calibration by detectors that had not seen the source."""


def left_out_sources(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the rates of each source by a detector that was trained without it, or {}."""
    calibration = meta["calibration"] or {}
    of_left_out = calibration.get("method", "").startswith(LEFT_OUT)
    return (calibration.get("sources") or {}) if of_left_out else {}


class LeftOut(NamedTuple):
    """Rates of each source by a detector that was trained without it, and the band (low, high) at
    which they were measured. The ends of the band are probabilities at the temperature in use.
    """

    sources: Mapping[str, Any]
    band: tuple[float, float]


def left_out_rates(meta: Mapping[str, Any]) -> LeftOut | None:
    """Return the rates of left-out sources from the calibration in use, or from an earlier one that
    it has kept; None without any.
    """
    if sources := left_out_sources(meta):
        return LeftOut(sources, band_of(meta))
    kept = (meta["calibration"] or {}).get("left_out")
    if not kept:
        return None
    low, high = (_at_temperature(p, kept["temperature"], meta["temperature"]) for p in kept["band"])
    return LeftOut(kept["sources"], (low, high))


def _at_temperature(p: float, fitted: float, now: float) -> float:
    """Convert a probability `p` at the temperature `fitted` to the temperature `now`."""
    if not 0 < p < 1:
        return float(p)
    logit = math.log(p / (1 - p)) * fitted
    return float(probability(np.array(logit), now) if math.isfinite(logit) else logit > 0)


def keep_left_out(meta: Mapping[str, Any], changes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return changes of a meta. A new calibration without rates of left-out sources gets those of
    `meta`, with their band and temperature: they stay valid, because a calibration changes no
    weights.
    """
    new, old = changes.get("calibration"), meta["calibration"]
    if not new or not old or left_out_sources(changes):
        return changes
    kept = old.get("left_out")
    if sources := left_out_sources(meta):
        kept = {"temperature": meta["temperature"], "band": old["band"], "sources": sources}
    return {**changes, "calibration": {**new, "left_out": kept}} if kept else changes


def shares_at(roc: Sequence[Sequence[float]], threshold: float) -> tuple[float, float]:
    """Return the shares of reals and of fakes with a score of at least `threshold`: those of a row
    of the curve, or interpolated between two rows.
    """
    rows = sorted(map(tuple, roc))
    # Add both ends of the curve: all scores are at least 0, none is above 1. A row can be just
    # outside.
    first, last = (min(0.0, rows[0][0]), 1.0, 1.0), (max(1.0, rows[-1][0]), 0.0, 0.0)
    at, reals, fakes = zip(first, *rows, last, strict=True)
    return float(np.interp(threshold, at, reals)), float(np.interp(threshold, at, fakes))


def temperature_of(meta: Mapping[str, Any]) -> float | None:
    """Return the temperature of a detector's calibration; None without one."""
    return float(meta["temperature"]) if meta["calibration"] else None


def band_of(meta: Mapping[str, Any]) -> tuple[float, float]:
    """Return (low, high) of the uncertain band in a checkpoint's meta. Without a calibration, both
    are the decision threshold.
    """
    calibration = meta["calibration"]
    low, high = calibration["band"] if calibration else (meta["threshold"],) * 2
    return float(low), float(high)


def describe_band(band: tuple[float, float]) -> str:
    """Return at which numbers each verdict begins. With low equal to high, nothing is uncertain."""
    low, high = band
    if low == high:
        return f"likely AI from {high:g}"
    return f"no sign of AI below {low:g}, likely AI from {high:g}, uncertain between"


def band_at(
    meta: Mapping[str, Any],
    band: tuple[float, float],
    max_fpr: float | None = None,
    max_miss: float | None = None,
) -> tuple[float, float]:
    """Return the band (low, high) for requested error rates, on images like those of the
    calibration: at most the share `max_fpr` of real images is called likely AI, and at most the
    share `max_miss` of fakes is called no sign of AI.

    None keeps this end of `band`. A rate that is not among the stored rates gets the threshold of
    the next smaller one.

    Raises:
        ValueError: a rate is outside 0 to 0.5, or the checkpoint has no threshold for it.
    """
    low, high = band
    if max_fpr is not None:
        high = _at_rate(meta, "at_fpr", max_fpr)
    if max_miss is not None:
        low = _at_rate(meta, "at_miss", max_miss)
    return min(low, high), high


def _at_rate(meta: Mapping[str, Any], key: str, asked: float) -> float:
    if not isinstance(asked, int | float | np.number) or not 0 < asked < 0.5:
        raise ValueError(f"an error rate is a number above 0 and below 0.5, got {asked!r}")
    rows = (meta["calibration"] or {}).get(key)
    if not rows:
        raise ValueError(
            "this detector has no thresholds for error rates: calibrate it "
            f"({command('evaluate')} calibrate --shards VAL)"
        )
    within = [(float(rate), float(threshold)) for rate, threshold in rows if rate <= asked]
    if not within:
        raise ValueError(
            f"this detector has no threshold for an error rate of {asked:g}: its calibration, or "
            "too many sources of it, has too few images; the smallest rate is "
            f"{min(rate for rate, _ in rows):g}"
        )
    return max(within)[1]


def percent(p: float) -> str:
    """Format a probability as a percentage, never as 0% or 100%."""
    if p < 0.001:
        return "under 0.1%"
    return "over 99.9%" if p > 0.999 else f"{100 * p:.1f}%"


def capital(text: str) -> str:
    """Make the first letter upper case. `str.capitalize` would also turn `AI` into `ai`."""
    return text[:1].upper() + text[1:]


def probability(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return the probability of fake, float64: the softmax of the two logits at a temperature. A
    logit that is not finite gives NaN.
    """
    logits = np.asarray(logits, np.float64)
    finite = np.where(np.isfinite(logits), logits, np.nan)
    with np.errstate(invalid="ignore"):
        # 1 / (1 + exp(-x)) would overflow for very negative x.
        return np.exp(-np.logaddexp(0.0, -finite / temperature))


def verdict(probability: float, band: tuple[float, float]) -> str:
    """Return one of `VERDICTS` for a probability of fake.

    Raises:
        ValueError: the probability is NaN or infinite, so it cannot be compared with the band.
    """
    if not math.isfinite(probability):
        raise ValueError(f"an image has no verdict: {NOT_FINITE}")
    return VERDICTS[int(probability >= band[0]) + int(probability >= band[1])]
