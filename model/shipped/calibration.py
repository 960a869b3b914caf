"""Define what a calibration stores in a checkpoint's `meta.json`, in the metadata of an ONNX file
or of scores, and in the `calibration.json` of another detector, as `TypedDict`s.

Strangers write such files: `checked(Calibrated, values)` of checked.py refuses impossible values.
Of a calibration only the band is needed; `NotRequired` keys may be missing in such files.
`Share`, `Temperature`, `Count` and `Band` are numbers with a range, for other layouts too. This
module loads no torch.
"""

import sys
from typing import Annotated, NotRequired

from pydantic import AfterValidator
from typing_extensions import TypedDict  # pydantic needs this one up to Python 3.11

from checked import limited, refused

ROUNDING = 1e-12
"""How far a threshold may be outside 0 to 1. A fitted one is the next number above a score, or 1
minus such a number, so it can be just above 1 or just below 0."""

Share = Annotated[
    float, limited("a number from 0 to 1", lambda share: -ROUNDING <= share <= 1 + ROUNDING)
]
Temperature = Annotated[
    float, limited("a finite number above 0", lambda number: 0 < number <= sys.float_info.max)
]
Count = Annotated[
    int, limited("a whole number from 0 to 10**12", lambda number: 0 <= number <= 10**12)
]


def _in_order(band: tuple[float, float]) -> tuple[float, float]:
    if band[0] > band[1]:
        raise refused("two numbers from 0 to 1, the lower one first")
    return band


Band = Annotated[tuple[Share, Share], AfterValidator(_in_order)]


class Fit(TypedDict):
    """How well probabilities fit the labels of the calibration images."""

    nll: NotRequired[float]
    """Negative log-likelihood, natural logarithm."""
    ece: NotRequired[float]
    """Expected calibration error, over 15 bins."""


class SourceRates(TypedDict):
    """Rates of one source at the decision threshold and the band."""

    reals: NotRequired[Count]
    """Real images."""
    fakes: NotRequired[Count]
    """Fake images."""
    false_positive_rate: Share | None
    """Share of the real images called likely AI. Null without real images."""
    recall: Share | None
    """Share of the fake images called likely AI. Null without fake images."""
    uncertain: NotRequired[Share | None]
    """Share of all images called uncertain."""
    uncertain_real: NotRequired[Share | None]
    """Share of the real images called uncertain. Null without real images."""
    uncertain_fake: NotRequired[Share | None]
    """Share of the fake images called uncertain. Null without fake images."""


class LeftOutEntry(TypedDict):
    """Rates of sources by heads trained without them, which a later calibration has kept."""

    temperature: Temperature
    """Divisor of the logits at which they were measured."""
    band: Band
    """Band at which they were measured, as probabilities of fake at that temperature."""
    sources: dict[str, SourceRates]
    """Rates of each source."""


class CalibrationEntry(TypedDict):
    """Calibration, fitted by `evaluate.py calibrate` or at the end of a training run."""

    fitted_on: NotRequired[list[str]]
    """Shard sets whose images were scored."""
    index_sha256: NotRequired[dict[str, str]]
    """Hash of the index of each set in `fitted_on`."""
    reals: NotRequired[Count]
    """Real images."""
    fakes: NotRequired[Count]
    """Fake images."""
    threshold_at: NotRequired[str]
    """Rule that chose the decision threshold: that of `evaluate.py calibrate --threshold`, or
    `max_fpr`, which is `calibration.max_fpr` of the recipe."""
    band: Band
    """Lower end and upper end of *uncertain*, as probabilities of fake. Below: *no sign of AI*. At
    the upper end or above: *likely AI*."""
    roc: NotRequired[list[tuple[Share, Share, Share]]]
    """Threshold, false-positive rate and recall on the calibration images, by rising threshold."""
    before: NotRequired[Fit]
    """Fit at temperature 1."""
    after: NotRequired[Fit]
    """Fit at the fitted temperature."""
    method: NotRequired[str]
    """Scores that the calibration was fitted to: `validation`, `sources left out, <rule>`, or
    `validation sets by source, <rule>`. The rule is `calibration.threshold` of the recipe."""
    sources: NotRequired[dict[str, SourceRates] | None]
    """Rates of each source. With `sources left out`, by a head trained without the source. Empty
    for `validation`."""
    sources_used: NotRequired[dict[str, tuple[int, int]]]
    """By class: sources with enough images for the threshold (`real`) and for the lower end of the
    band (`fake`), and sources with any. 0 if all were joined as one. Empty if the rates hold for
    all images together."""
    at_fpr: NotRequired[list[tuple[Share, Share]]]
    """Pairs for `--max-fpr`: an error rate, and the lowest threshold at which at most that share of
    real images is called fake."""
    at_miss: NotRequired[list[tuple[Share, Share]]]
    """Pairs for `--max-miss`: an error rate, and the highest threshold below which at most that
    share of fakes lies."""
    left_out: NotRequired[LeftOutEntry | None]
    """Rates on left-out sources of the calibration before, if the method of this one is another."""


class Calibrated(TypedDict):
    """Entries of a detector that a calibration sets."""

    temperature: Temperature
    """Divisor of the logits. 1 before calibration."""
    threshold: Share
    """Decision threshold: an image is called fake at or above this probability of fake."""
    calibration: CalibrationEntry | None
    """Fitted temperature, thresholds and band. Null: not calibrated."""
