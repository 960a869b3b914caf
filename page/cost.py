"""Show the threshold slider of the web page, and the expected verdicts per 100 images.

Main entry: `show_threshold(detector)` puts the slider, a text (`rule_sentence()`) and a table
(`hundred_html()`) on the page (Streamlit), and returns nothing. `detector` is the `ImageDetector`
that `page.detector.loaded_detector()` returns. The table is computed from the measured ROC curve in
the detector's calibration; without such a curve, a warning replaces it.

`at_slider(detector)` returns the detector with the threshold of the slider and no uncertain
verdict: both ends of its band are this threshold. If the slider was not moved or not yet drawn, it
returns `detector` itself. `rule_sentence(detector)` returns a text: which probabilities give which
verdict, and the default threshold if the slider was moved. `percentages(values)` takes
probabilities and returns a dict, probability -> its text, such as "89.98%". Probabilities with
different percentages have different texts.

`hundred_html(roc, band)` returns the table as HTML (`Markup`): of 100 real images and 100
fakes, how many get each verdict.

- `roc`: the ROC curve, a list of one or more rows (threshold, share of reals, share of fakes), all
  from 0 to 1; a share is that of the scores at or above the threshold. It is
  `detector.meta["calibration"]["roc"]`.
- `band`: the uncertain band of probabilities, (low, high).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import streamlit as st
from markupsafe import Markup

from model.inference import fitness
from model.inference.detector import ImageDetector
from page.figures import Row, VerdictShares, measured_on, of_hundred, verdict_shares
from page.html import show


def at_slider(detector: ImageDetector) -> ImageDetector:
    """Return the detector with the threshold that is set on the slider."""
    threshold = st.session_state.get("threshold", detector.threshold)
    if threshold == detector.threshold:
        return detector
    return replace(detector, asked=(threshold, threshold))


def show_threshold(detector: ImageDetector) -> None:
    """Show the slider, and the verdicts of 100 fakes and 100 real images at its threshold."""
    calibration = detector.meta["calibration"]
    curve = calibration.get("roc", []) if calibration else []
    steps = [row[0] for row in curve] or [step / 20 for step in range(1, 20)]
    labels = percentages([*steps, detector.threshold])
    # Streamlit stores the label of the chosen option, so labels must be unique.
    options = sorted({labels[step]: step for step in (*steps, detector.threshold)}.values())
    with st.container(key="cost"):
        show(Markup("<h2>Results at this threshold</h2>"))
        st.select_slider(
            f"Threshold: likely AI at or above this {fitness.score_word(detector.meta)}",
            options,
            value=detector.threshold,
            key="threshold",
            format_func=labels.__getitem__,
        )
        show(Markup('<p class="quiet">{}</p>').format(rule_sentence(detector)))
        if not curve:
            uncalibrated = (
                "This detector is not calibrated: its numbers are scores, not probabilities. "
            )
            show(
                Markup(
                    '<p class="warning">{}Its error rates at each threshold were not measured, so '
                    "no figures are shown here.</p>"
                ).format("" if calibration else uncalibrated)
            )
            return
        show(hundred_html(curve, at_slider(detector).band))
        show(Markup('<p class="quiet">{}</p>').format(measured_on(detector.meta)))


def percentages(values: Iterable[float]) -> dict[float, str]:
    """Format each value with the same number of digits: at least 3, and as many as keep different
    percentages apart.
    """
    values = list(values)
    different = len({100 * value for value in values})
    for digits in range(3, 18):  # 17 digits distinguish all floats
        texts = {value: f"{100 * value:.{digits}g}%" for value in values}
        if len(set(texts.values())) == different:
            break
    return texts


def rule_sentence(detector: ImageDetector) -> str:
    """Describe in one sentence which probabilities give which verdict."""
    ours = at_slider(detector)
    low, high = ours.band
    said = percentages([low, high, detector.threshold])
    doubt = f", uncertain from there to {said[high]}" if low != high else ""
    own = f" The detector's default threshold is {said[detector.threshold]}."
    aside = own if ours is not detector else ""
    return f"No sign of AI below {said[low]}{doubt}, likely AI from {said[high]} on.{aside}"


def hundred_html(roc: Sequence[Row], band: tuple[float, float]) -> Markup:
    """Return a table: of 100 real images and 100 fakes, how many get each verdict."""
    reals, fakes = verdict_shares(list(roc), band)
    is_doubt = band[0] < band[1]
    rows = [_row("Of 100 real images", reals, is_doubt), _row("Of 100 fakes", fakes, is_doubt)]
    return Markup(
        '<div class="card scroll"><table class="hundred"><caption class="for-readers">Approximate '
        "verdicts of 100 real images and 100 fakes</caption><thead><tr><td></td>"
        '<th scope="col">no sign of AI</th><th scope="col">uncertain</th>'
        '<th scope="col">likely AI</th></tr></thead><tbody>{}</tbody></table></div>'
    ).format(Markup().join(rows))


def _row(title: str, of: VerdictShares, is_doubt: bool) -> Markup:
    cells = [
        _cell("none", of.no_sign),
        _cell("uncertain", of.uncertain),
        _cell("likely", of.likely),
    ]
    if not is_doubt:
        cells[1] = Markup("<td>-</td>")
    return Markup('<tr><th scope="row">{}</th>{}</tr>').format(title, Markup().join(cells))


def _cell(kind: str, share: float) -> Markup:
    return Markup(
        '<td>{}<span class="bar {}" aria-hidden="true"><i style="width: {}%"></i></span></td>'
    ).format(of_hundred(share), kind, f"{100 * share:.1f}")
