"""List the known reasons not to rely on a detector, as lines for the terminal, the page, the model
card and the HTTP API.

Main entry: `notices(meta, band)` takes the parsed `meta.json` of a checkpoint (or the same dict of
an ONNX file or third-party detector; a loaded detector has it as `detector.meta`), and the
uncertain band in use, (low, high), or None (default) for the band of `meta`. It returns a list of
`Notice` (may be empty), the most serious first. Each has a line of `text` and a `kind`: "synthetic"
(trained on synthetic images), "known" (a measured weakness), "uncalibrated", or "threshold" (the
error rates at a requested band). They are read from two keys of `meta`:

- `data`: a dict, which may be missing. Each of its keys `FITNESS_KEYS` is optional, but if
  "synthetic_sources" is there, "sources" must be there too. "titles" is a dict, source -> what its
  images are; a notice calls a source without a title by its name.
- `calibration`: None, or a dict. Its `sources`, if there, is a dict, source (dataset) -> its rates
  `false_positive_rate` and `recall` (0 to 1, or None), measured with a detector that was trained
  without this source, and its `left_out` has those that were measured before it was fitted
  (`model.verdict.left_out_rates`). A meta without the key `calibration` raises `KeyError`.

A notice on these rates is about the sources whose false-positive rate is above `MOST_CALLED_AI`, or
about those whose recall is below `LEAST_FOUND`. It names at most `NAMED` of them, the worst, and
counts the others.

Three functions take `meta` and return words for the user. `score_word()` returns what the
detector's number is called: "probability" if it is calibrated, else "score". `score_label()`
returns a longer label for the number, and `disclaimer()` the sentence shown with every verdict,
such as "a probability is not a proof" (`PROOF` is its pattern).

`generators_seen(meta)` returns the names of the generators whose images the weights were trained
on, sorted.

`with_sources_of(before, data)` takes two records of training data and returns the second one, with
the sources, synthetic sources and titles of both.

`sets_seen(meta)` returns a dict, hash of the index -> name, of all sets that the weights were
trained on, also by the runs whose weights this one began from. Their images measure nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from model.verdict import LeftOut, band_of, left_out_rates, shares_at

FITNESS_KEYS = ("sources", "synthetic_sources", "titles", "known_against")
"""Keys of a meta's `data` that this module reads."""

MOST_CALLED_AI = 0.10
"""Highest acceptable false-positive rate (0 to 1) on a source left out of training. A source above
it gets a notice. The value is this project's goal."""

LEAST_FOUND = 0.10
"""Recall (0 to 1) below which a source left out of training gets a notice."""

NAMED = 4
"""Most sources that a notice names. The model card lists all of them."""

PROOF = "a {word} is not a proof"
"""Sentence shown with every verdict; `word` is the result of `score_word`."""


Kind = Literal["synthetic", "uncalibrated", "known", "threshold"]


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A reason not to rely on a detector: `kind` for programs, `text` (one line) for people."""

    kind: Kind
    text: str


def notices(meta: Mapping[str, Any], band: tuple[float, float] | None = None) -> list[Notice]:
    """Return all notices on a detector with this `meta`, the most serious first. May be empty.
    `band` is the band in use, None for that of `meta`.
    """
    data, calibration = meta.get("data") or {}, meta["calibration"]
    texts: list[tuple[Kind, str]] = []
    if synthetic := data.get("synthetic_sources"):
        texts.append(("synthetic", _of_synthetic(synthetic, data.get("sources", []))))
    texts += [("known", text) for text in data.get("known_against") or ()]
    if not calibration:
        texts.append(
            (
                "uncalibrated",
                "this detector is not calibrated: its numbers are scores, not probabilities, and "
                "the error rates at its threshold were not measured",
            )
        )
    titles = data.get("titles") or {}
    if rates := left_out_rates(meta):
        texts += [("known", text) for text in _of_left_out(rates, titles)]
    curve = calibration.get("roc") if calibration else None
    # The curve has no rates beyond its ends, where most scores of a good detector are.
    if curve and band and band != band_of(meta) and _is_within(curve, band):
        texts.append(("threshold", _at_band(curve, band)))
    return [Notice(kind=kind, text=text) for kind, text in texts]


def score_word(meta: Mapping[str, Any]) -> str:
    """Return the word for a detector's number: `probability` if calibrated, else `score`."""
    return "probability" if meta["calibration"] else "score"


def score_label(meta: Mapping[str, Any]) -> str:
    """Return the label to print before a detector's number."""
    return (
        "probability that it is AI-generated" if meta["calibration"] else "score for AI-generated"
    )


def disclaimer(meta: Mapping[str, Any]) -> str:
    """Return the sentence shown with every verdict, in lower case and without a full stop."""
    return PROOF.format(word=score_word(meta))


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


def _is_within(curve: Sequence[Sequence[float]], band: tuple[float, float]) -> bool:
    thresholds = [row[0] for row in curve]
    return min(thresholds) <= band[0] and band[1] <= max(thresholds)


def _at_band(curve: Sequence[Sequence[float]], band: tuple[float, float]) -> str:
    """Return a notice with the rates of a calibration at a requested band."""
    (low, high), (reals, fakes) = band, shares_at(curve, band[1])
    text = (
        f"at the threshold in use, {high:.3g}, {_percent(reals)} of the real images and "
        f"{_percent(fakes)} of the fakes of the calibration are likely AI"
    )
    if low == high:
        return text
    reals, fakes = (1 - share for share in shares_at(curve, low))
    return f"{text}; below {low:.3g}, {_percent(reals)} and {_percent(fakes)} are no sign of AI"


def _of_left_out(rates: LeftOut, titles: Mapping[str, str]) -> list[str]:
    """Return notices on sources with a bad result when left out of training, the worst first."""
    called = {
        name: of_source["false_positive_rate"]
        for name, of_source in rates.sources.items()
        if of_source["false_positive_rate"] is not None
        and of_source["false_positive_rate"] > MOST_CALLED_AI
    }
    missed = {
        name: of_source["recall"]
        for name, of_source in rates.sources.items()
        if of_source["recall"] is not None and of_source["recall"] < LEAST_FOUND
    }
    how = (
        f"each measured with that source left out of training, at the threshold {rates.band[1]:.3g}"
    )
    texts = []
    if called:
        worst = sorted(called, key=lambda name: (-called[name], name))
        texts.append(
            "this detector called many real images of new kinds AI: "
            f"{_shares(called, worst, f'over {_percent(MOST_CALLED_AI)}', titles)} ({how})"
        )
    if missed:
        worst = sorted(missed, key=lambda name: (missed[name], name))
        shares = _shares(missed, worst, f"under {_percent(LEAST_FOUND)}", titles)
        texts.append(f"this detector found few generated images of new kinds: {shares} ({how})")
    return texts


def _shares(
    rates: Mapping[str, float], worst: list[str], limit: str, titles: Mapping[str, str]
) -> str:
    """Return the rates of the `NAMED` worst sources, and the number of other sources beyond the
    limit, as text.
    """
    named = [(rates[name], titles.get(name, name)) for name in worst[:NAMED]]
    text = "; ".join(f"{_percent(rate)} of {title}" for rate, title in named)  # titles have commas
    others = len(worst) - NAMED
    return text if others < 1 else f"{text}; and {limit} of {others} more kinds"


def _percent(share: float) -> str:
    """Format a share (0 to 1) as percent, never as 0 %: only some images were measured."""
    return f"{100 * share:.0f} %" if share >= 0.005 else "under 1 %"


def sets_seen(meta: Mapping[str, Any]) -> dict[str, str]:
    """Return hash -> name of the sets that the weights were trained on: by their own run (replayed
    sets count), and before it, as recorded in `first_weights`, or in `data` of an average or of an
    ONNX file. The key is the hash, because another set may later be packed under the same name.
    """
    data, began = meta["data"] or {}, meta.get("first_weights") or {}
    own = {sha256: name for name, sha256 in data.get("set_sha256", {}).items()}
    return data.get("earlier_sets", {}) | began.get("sets", {}) | own


def generators_seen(meta: Mapping[str, Any]) -> list[str]:
    """Return the generators of the fakes that the weights were trained on, sorted; recorded in the
    same places as the sets (`sets_seen`). Empty if the detector's file does not name them.
    """
    data, began = meta["data"] or {}, meta.get("first_weights") or {}
    recorded = [data.get("generators"), data.get("earlier_generators"), began.get("generators")]
    return sorted({name for names in recorded for name in names or ()})


def with_sources_of(before: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data`, the record of training data in a meta, with the sources, synthetic sources and
    titles of another such record added: weights have also learned from the data of their first
    weights.
    """
    return {
        **data,
        "sources": sorted({*before.get("sources", ()), *data.get("sources", ())}),
        "synthetic_sources": sorted(
            {*before.get("synthetic_sources", ()), *data.get("synthetic_sources", ())}
        ),
        "titles": dict(sorted({**before.get("titles", {}), **data.get("titles", {})}.items())),
    }
