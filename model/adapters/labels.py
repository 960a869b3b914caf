"""Find out which outputs of an image classifier mean AI-generated, from the words of their labels
or from the user's choice.

Main entry: `fake_indices(labels, asked, where)` takes `labels`, a dict with the label of each
output (index -> text), `asked`, a list of the labels that the user named with `--fake-label` (may
be empty), and `where`, the name of the classifier for messages. It returns the list of indices of
the outputs that mean AI-generated.

If `asked` has labels, exactly these mean AI-generated. Case is ignored, so labels must differ in
more than case. If it is empty, the words of each label decide. `meaning_of(label)` returns "fake"
or "real" for a label with words of either `FAKE_WORDS` or `REAL_WORDS`. It returns "" for a label
with words of both or neither, or with one of `NEGATIONS` ("not real").

`fake_indices()` raises `DetectorError` if a named label does not exist, if no label is named and
the words of a label do not decide, or if a classifier with two or more outputs has all of them fake
or all of them real. A classifier with a single output may get an empty list: its label then means
real. The position of an output is no hint: half of the published detectors have fake first, half
have real first.
"""

import re
from collections.abc import Mapping, Sequence

from model.adapters.detector import DetectorError

FAKE_WORDS = frozenset(
    ["fake", "fakes", "ai", "aigc", "generated", "synthetic", "deepfake", "deepfakes", "artificial"]
)
REAL_WORDS = frozenset(["real", "reals", "human", "humans", "authentic", "natural"])
NEGATIONS = frozenset(["not", "non", "no", "or", "vs", "versus", "un"])
"""Words that make a label unclear: `not ai`, `real or fake`."""

SHOWN = 6
"""Maximum number of labels in an error message; ImageNet has a thousand."""


def meaning_of(label: str) -> str:
    """Return `fake` or `real` according to the words of a label, or "" if they are not clear."""
    words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", label)}
    is_fake, is_real = bool(words & FAKE_WORDS), bool(words & REAL_WORDS)
    if words & NEGATIONS or is_fake == is_real:
        return ""
    return "fake" if is_fake else "real"


def fake_indices(labels: Mapping[int, str], asked: Sequence[str], where: str) -> list[int]:
    """Return the indices of the labels that mean AI-generated. The probability of AI-generated is
    the sum over these outputs.

    `asked` are the labels that the user named (`--fake-label`); all other labels then mean real.
    `where` is the name of the classifier, for messages.

    Raises:
        DetectorError: a label in `asked` does not exist, all labels are of one class, or the words
            of a label are not clear.
    """
    known = ", ".join(f"{i}: {label!r}" for i, label in list(labels.items())[:SHOWN])
    known += f" and {len(labels) - SHOWN:,} more" if len(labels) > SHOWN else ""
    if asked:
        by_name = {label.lower(): index for index, label in labels.items()}
        if unknown := [name for name in asked if name.lower() not in by_name]:
            raise DetectorError(
                f"{where} has no label {unknown[0]!r}; --fake-label takes one of these: {known}"
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
            f"{said} of the labels of {where} ({known}) mean AI-generated, but a detector needs "
            "both kinds; name the labels that mean AI-generated with --fake-label LABEL"
        )
    return chosen
