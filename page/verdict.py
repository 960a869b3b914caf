"""Make the HTML cards for one image: its verdict, and the statements in its file about its origin.

Main entry: `verdict_html(detector, result, said, level)` returns the card with the verdict and the
probability on a scale, as HTML (`Markup`).

- `detector`: an `ImageDetector`: that of `page.detector.loaded_detector()`, or with the threshold
  of the slider, `page.cost.at_slider(detector)`.
- `result`: the `Scored` of the image, as `page.scored.score()` returns it; not a refused one.
- `said`: the verdict, "likely AI", "uncertain" or "no sign of AI".
- `level`: level of the HTML heading, an int such as 2.

The others return `Markup` too:

- `scale_html(p, band)` makes the scale from the probability of fake, 0 to 1, and the uncertain band
  (low, high).
- `evidence_html(evidence, level)` lists the statements of the file (a sequence of `Evidence`, such
  as from EXIF or C2PA), which are in `Scored.evidence`. If there are none, the card says so.
  `level` is as above.
- `refused_html(refused)` takes a list of `Scored`s of refused files and lists their names and the
  reasons.
"""

from collections.abc import Sequence

from markupsafe import Markup

from model.inference import fitness, provenance
from model.inference.detector import ImageDetector
from model.inference.provenance import Evidence
from model.verdict import capital, percent
from page.examples import ABOUT
from page.html import KINDS, icon
from page.scored import Scored, data_url, names_ai

_STATES = {"trusted": "trusted", "valid, signer unknown": "unknown", "invalid": "invalid"}


def verdict_html(detector: ImageDetector, result: Scored, said: str, level: int) -> Markup:
    """Return the card with the verdict `said`. `level` is the HTML heading level. The thumbnail is
    for phones, where the image itself is below the card.
    """
    probability = result.prediction.probability
    assert probability is not None  # refused images have no verdict card
    kind = KINDS[said]
    return Markup(
        '<div class="card verdict {}"><img class="thumbnail" src="{}" alt=""><h{} class="said">{}{}'
        '</h{}><p>{}: <strong>{}</strong></p>{}<p class="proof">{}.</p>{}</div>'
    ).format(
        kind, data_url(result.thumbnail), level, icon(kind), capital(said), level,
        capital(fitness.score_label(detector.meta)), percent(probability),
        scale_html(probability, detector.band), capital(fitness.disclaimer(detector.meta)),
        Markup('<p class="quiet">{}</p>').format(ABOUT) if result.is_example else "",
    )  # fmt: skip


def scale_html(p: float, band: tuple[float, float]) -> Markup:
    """Return a scale from "no sign of AI" to "likely AI" with a mark at probability `p`. The middle
    part is the uncertain `band` (low, high).
    """
    low, high = (100 * end for end in band)
    middle = "<span>uncertain</span>" if low < high else ""
    return Markup(
        '<div class="scale" role="img" aria-label="{} on a scale from 0% to 100%; likely AI begins '
        'at {}%"><div class="line"><i class="none" style="width: {}%"></i>'
        '<i class="uncertain" style="width: {}%"></i><i class="likely" style="width: {}%"></i>'
        '<b style="left: {}%"></b></div><div class="ends"><span>no sign of AI</span>{}'
        "<span>likely AI</span></div></div>"
    ).format(
        percent(p), f"{high:.3g}", f"{low:.2f}", f"{high - low:.2f}", f"{100 - high:.2f}",
        f"{100 * p:.2f}", Markup(middle),
    )  # fmt: skip


def evidence_html(evidence: Sequence[Evidence], level: int) -> Markup:
    """Return the card with the statements of the file; signatures are shown with their state."""
    if evidence:
        body = Markup('<ul class="says">{}</ul><p class="quiet">{}</p>').format(
            Markup().join(map(_statement, evidence)), provenance.MEANING
        )
    else:
        body = Markup(
            '<p class="quiet">Nothing about its origin. This is normal: most websites remove such '
            "information.</p>"
        )
    return Markup('<div class="card"><h{}>What the file says</h{}>{}</div>').format(
        level, level, body
    )


def _statement(item: Evidence) -> Markup:
    """Return a list entry. Text of the file is isolated (`bdi`): with another writing direction it
    would reverse the text around it.
    """
    state: Markup | str = ""
    if item.state:  # the value starts with the state, before text of the file
        state = Markup('<span class="state {}">{}</span>').format(_STATES[item.state], item.state)
    names = Markup(' <span class="state ai">names AI</span>') if names_ai(item) else ""
    return Markup(
        '<li><b>{}</b>{} {}<bdi>{}</bdi> <span class="quiet">(<bdi>{}</bdi>)</span></li>'
    ).format(item.kind, names, state, item.value.removeprefix(item.state), item.where)


def refused_html(refused: Sequence[Scored]) -> Markup:
    """Return the card with the refused files and the reasons."""
    items = Markup().join(
        Markup("<li><b><bdi>{}</bdi></b>: {}</li>").format(
            result.printable_name, result.prediction.error
        )
        for result in refused
    )
    return Markup('<div class="card refused">{}<ul>{}</ul></div>').format(icon("refused"), items)
