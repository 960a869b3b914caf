"""What speaks against relying on a detector, from its meta alone: for the terminal, the page, the
model card and the HTTP answers alike.

A checkpoint's `meta.json` has in `data` the `sources` that it was trained on, which of them are
synthetic (`synthetic_sources`) and what others measured against it (`known_against`, a line each);
in `calibration` what was measured on sources left out of training. A key that is not there says
nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

FITNESS_KEYS = ("sources", "synthetic_sources", "known_against")
"""What is read of a meta's `data`."""

MOST_CALLED_AI = 0.10
"""Of the real images of a source left out of training, the share called AI that is still a detector
as it should be; the goal that this project set itself."""

LEAST_FOUND = 0.10
"""Of the generated images of such a source, the share called AI below which they are missed."""

NAMED = 4
"""Sources that a notice names; a longer list is read by nobody, and the card has all of them."""

PROOF = "a {word} is not a proof"
"""What stands beside every verdict; `word` is that of `word_for`."""


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A reason not to rely on a detector: `kind` for programs, `text` (one line) for people."""

    kind: Literal["synthetic", "uncalibrated", "known"]
    text: str


def notices(meta: Mapping[str, Any]) -> list[Notice]:
    """All that speaks against a detector with this `meta`, the gravest first; often nothing."""
    data, calibration = meta.get("data") or {}, meta["calibration"]
    texts: list[tuple[Literal["synthetic", "uncalibrated", "known"], str]] = []
    if synthetic := data.get("synthetic_sources"):
        texts.append(("synthetic", _of_synthetic(synthetic, data["sources"])))
    texts += [("known", text) for text in data.get("known_against") or ()]
    if not calibration:
        texts.append(
            (
                "uncalibrated",
                "this detector is not calibrated: its numbers are scores and no probabilities, and "
                "what its threshold costs was not measured",
            )
        )
    texts += [("known", text) for text in _of_left_out(calibration or {})]
    return [Notice(kind=kind, text=text) for kind, text in texts]


def word_for(meta: Mapping[str, Any]) -> str:
    """What a detector's number is: a `probability` where it is calibrated, else a `score`."""
    return "probability" if meta["calibration"] else "score"


def number(meta: Mapping[str, Any]) -> str:
    """The same as a label before the number itself."""
    return (
        "probability that it is AI-generated" if meta["calibration"] else "score for AI-generated"
    )


def proof(meta: Mapping[str, Any]) -> str:
    """The sentence that stands beside every verdict, without a capital and a full stop."""
    return PROOF.format(word=word_for(meta))


def _of_synthetic(synthetic: list[str], sources: list[str]) -> str:
    if set(synthetic) >= set(sources):
        return (
            "this detector was trained on synthetic images alone, which a program drew: it shows "
            "that the commands work, and its verdicts on other pictures mean nothing"
        )
    return (
        f"this detector was trained in part on synthetic images, which a program drew "
        f"({', '.join(synthetic)}): what it learned from them says nothing about other pictures"
    )


def _of_left_out(calibration: Mapping[str, Any]) -> list[str]:
    """Sources that went badly while a head was trained without them, the worst first."""
    sources = calibration.get("sources") or {}
    called = {
        name: rates["false_positive_rate"]
        for name, rates in sources.items()
        if rates["false_positive_rate"] is not None
        and rates["false_positive_rate"] > MOST_CALLED_AI
    }
    missed = {
        name: rates["recall"]
        for name, rates in sources.items()
        if rates["recall"] is not None and rates["recall"] < LEAST_FOUND
    }
    how = "each measured while it was left out of training"
    texts = []
    if called:
        worst = sorted(called, key=lambda name: (-called[name], name))
        texts.append(
            "of real images of a kind that is new to it this detector called AI: "
            f"{_shares(called, worst, f'over {_percent(MOST_CALLED_AI)}')} ({how})"
        )
    if missed:
        worst = sorted(missed, key=lambda name: (missed[name], name))
        shares = _shares(missed, worst, f"under {_percent(LEAST_FOUND)}")
        texts.append(
            f"of generated images of a kind that is new to it this detector found: {shares} ({how})"
        )
    return texts


def _shares(rates: Mapping[str, float], worst: list[str], limit: str) -> str:
    """The rates of the `NAMED` worst sources in words, and how many others are beyond the limit."""
    text = ", ".join(f"{_percent(rates[name])} of {name}" for name in worst[:NAMED])
    others = len(worst) - NAMED
    return text if others < 1 else f"{text}, and {limit} of {others} more"


def _percent(share: float) -> str:
    """A share for reading; a measurement on some images is never none of all."""
    return f"{100 * share:.0f} %" if share >= 0.005 else "under 1 %"
