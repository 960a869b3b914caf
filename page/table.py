"""Show a table of many uploaded images, one row each, sorted in the browser, with a CSV download.

Main entry: `show_table(detector, scored, verdicts)` puts the table on the page (Streamlit), with
`summary()` and the refused files above it and the download below. It returns the id of the image to
show in full: the row that the visitor chose, or `first_of(scored)`, the first image that was not
refused (if all were refused, the first).

- `detector`: the `ImageDetector` that `page.cost.at_slider()` returns. It has the threshold of the
  slider, and gave the verdicts. The CSV has its `identity`.
- `scored`: the results, a dict, file id -> `Scored` (prediction or refusal), as
  `page.scored.score_all()` returns it. It has at least one entry.
- `verdicts`: a dict with the same file ids -> "likely AI", "uncertain", "no sign of AI", or
  "unreadable" for a refused file. A missing id raises KeyError.

`summary(scored, verdicts)` returns the number of images in all and per verdict, and of files that
name AI or have an invalid signature, as text. `row(key, result, verdict)` returns the values of one
row as a dict for `table.js`; `key` is the file id, `result` its `Scored`. `as_csv(detector, scored,
verdicts)` returns the table as text in the format of `predict.py --format csv`. `HERE` is the
folder of this module.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import streamlit as st
from markupsafe import Markup

from console import counted
from model.inference import fitness, results
from model.inference.detector import ImageDetector
from model.verdict import capital, percent
from page.html import KINDS, show
from page.scored import Scored, data_url
from page.verdict import refused_html

HERE = Path(__file__).parent

_table = st.components.v2.component(
    "table",
    html='<div class="card scroll"><table class="images"><caption class="for-readers"></caption>'
    "<thead><tr></tr></thead><tbody></tbody></table></div>",
    js=(HERE / "table.js").read_text(encoding="utf-8"),
    isolate_styles=False,
)


def summary(scored: Mapping[str, Scored], verdicts: Mapping[str, str]) -> str:
    """Return the number of images in all and per verdict, and of files that name AI or have an
    invalid signature, as text.
    """
    counts = Counter(verdicts.values())
    said = [", ".join(f"{counts[name]} {name}" for name in KINDS if name in counts)]
    if naming := sum(result.names_ai for result in scored.values()):
        said.append(f"{counted(naming, 'file')} {'names' if naming == 1 else 'name'} AI")
    if broken := sum(result.is_badly_signed for result in scored.values()):
        verb = "has" if broken == 1 else "have"
        said.append(f"{counted(broken, 'file')} {verb} an invalid signature")
    return f"{len(scored)} images: {'; '.join(said)}"


def show_table(
    detector: ImageDetector, scored: Mapping[str, Scored], verdicts: Mapping[str, str]
) -> str:
    """Show the table; returns the id of the image to show in full."""
    show(Markup("<h2>{}</h2>").format(summary(scored, verdicts)))
    refused = [result for result in scored.values() if result.prediction.error]
    if refused:
        show(refused_html(refused))
    picked = st.session_state.get("table", {}).get("chosen")
    chosen = picked if picked in scored else first_of(scored)
    _table(
        key="table",
        data={
            "rows": [row(key, scored[key], verdicts[key]) for key in scored],
            "number": f"{capital(fitness.score_word(detector.meta))} of AI",
            "chosen": chosen,
        },
        on_chosen_change=lambda: None,
    )
    st.download_button(
        "Download as CSV",
        as_csv(detector, scored, verdicts).encode("utf-8-sig"),  # with a BOM for Excel
        "verdicts.csv",
        "text/csv",
        on_click="ignore",
    )
    return chosen


def first_of(scored: Mapping[str, Scored]) -> str:
    """Return the id of the first image that was not refused, or of the first image."""
    return next((key for key in scored if not scored[key].prediction.error), next(iter(scored)))


def row(key: str, result: Scored, verdict: str) -> dict[str, object]:
    """Return the values of one table row for `table.js`."""
    probability = result.prediction.probability
    marks = [("names AI", "ai")] if result.names_ai else []
    marks += [("invalid signature", "invalid")] if result.is_badly_signed else []
    return {
        "id": key,
        "name": result.printable_name,
        "picture": data_url(result.thumbnail) if result.thumbnail else "",
        "verdict": capital(verdict),
        "kind": KINDS[verdict],
        "marks": marks,  # (text, CSS class)
        "probability": probability,
        "said": "" if probability is None else percent(probability),
    }


def as_csv(
    detector: ImageDetector, scored: Mapping[str, Scored], verdicts: Mapping[str, str]
) -> str:
    """Return the table in the format of `predict.py --format csv`."""
    lines = [results.header("csv")]
    for key, result in scored.items():
        values = results.row(
            path=result.name,
            probability=result.prediction.probability,
            verdict=verdicts[key],
            error=result.prediction.error,
            provenance=result.evidence,
            checkpoint=detector.identity,
        )
        lines.append(results.line("csv", values))
    return "\n".join(lines) + "\n"
