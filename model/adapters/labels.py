"""Which labels of a classifier mean AI-generated: by clear words, or because a person said so; an
index says nothing, for half of the published detectors have them the other way round.
"""

import re
from collections.abc import Mapping, Sequence

from model.adapters.detector import DetectorError

FAKE_WORDS = frozenset(
    ["fake", "fakes", "ai", "aigc", "generated", "synthetic", "deepfake", "deepfakes", "artificial"]
)
REAL_WORDS = frozenset(["real", "reals", "human", "humans", "authentic", "natural"])
NEGATIONS = frozenset(["not", "non", "no", "or", "vs", "versus", "un"])
"""Words beside which neither of the others is clear: `not ai`, `real or fake`."""

SHOWN = 6
"""Labels that an error names; ImageNet has a thousand."""


def meaning_of(label: str) -> str:
    """`fake`, `real`, or nothing where the words of a label do not say it."""
    words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", label)}
    is_fake, is_real = bool(words & FAKE_WORDS), bool(words & REAL_WORDS)
    if words & NEGATIONS or is_fake == is_real:
        return ""
    return "fake" if is_fake else "real"


def fake_indices(labels: Mapping[int, str], asked: Sequence[str], where: str) -> list[int]:
    """The outputs of a classifier whose probabilities add up to that of AI-generated. `asked` are
    labels that a person named (`--fake-label`); all others are then real.

    Raises:
        DetectorError: a label that was asked for is not there, all of them are one class, or the
            words of a label do not say what it means.
    """
    known = ", ".join(f"{i}: {label!r}" for i, label in list(labels.items())[:SHOWN])
    known += f" and {len(labels) - SHOWN:,} more" if len(labels) > SHOWN else ""
    if asked:
        by_name = {label.lower(): index for index, label in labels.items()}
        if unknown := [name for name in asked if name.lower() not in by_name]:
            raise DetectorError(
                f"{where} has no label {unknown[0]!r}; --fake-label takes one of its own: {known}"
            )
        chosen = sorted({by_name[name.lower()] for name in asked})
    else:
        meanings = {index: meaning_of(label) for index, label in labels.items()}
        if not labels or not all(meanings.values()):
            raise DetectorError(
                f"the labels of {where} ({known or 'none'}) do not say in clear words which mean "
                "AI-generated; name them with --fake-label LABEL"
            )
        chosen = [index for index, meaning in meanings.items() if meaning == "fake"]
    if len(labels) > 1 and not 0 < len(chosen) < len(labels):
        said = "all" if chosen else "none"
        raise DetectorError(
            f"{said} of the labels of {where} ({known}) mean AI-generated; a detector has both "
            "kinds; say with --fake-label LABEL which are"
        )
    return chosen
