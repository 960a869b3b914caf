"""Make the HTML cards for one image: its verdict, and the statements in its file about its origin.

Main entries, which return HTML as `Markup`: `verdict_html(detector, result, said, level)` takes the
loaded `ImageDetector`, the result (`Scored`; a refused image is not allowed), the verdict `said`
("likely AI", "uncertain" or "no sign of AI") and the level of the HTML heading (`level`, such as
2). The card shows the probability on a scale. `scale_html(p, band)` makes this scale from the
probability and the band of uncertain ones (low, high). `evidence_html(evidence, level)` takes a
list of statements of the file (`Evidence`, such as from EXIF or C2PA) and shows them as a list; if
it is empty, the card says so. `refused_html(refused)` takes a list of the results of refused files
and lists their names and the reasons.
"""

from collections.abc import Sequence

from markupsafe import Markup

from model.inference import fitness, provenance
from model.inference.detector import ImageDetector
from model.inference.provenance import Evidence
from model.verdict import capital, percent
from page.examples import ABOUT
from page.html import KINDS, icon
from page.scored import Scored

_STATES = {"trusted": "trusted", "valid, signer unknown": "unknown", "invalid": "invalid"}


def verdict_html(detector: ImageDetector, result: Scored, said: str, level: int) -> Markup:
    """Return the card with the verdict `said`. `level` is the HTML heading level."""
    probability = result.prediction.probability
    assert probability is not None  # refused images have no verdict card
    kind = KINDS[said]
    return Markup(
        '<div class="card verdict {}"><h{} class="said">{}{}</h{}><p>{}: <strong>{}</strong></p>{}'
        '<p class="proof">{}.</p>{}</div>'
    ).format(
        kind, level, icon(kind), capital(said), level, capital(fitness.number(detector.meta)),
        percent(probability), scale_html(probability, detector.band),
        capital(fitness.proof(detector.meta)),
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
    value = Markup("{}").format(item.value)
    if item.state:  # the value starts with the state, so text of the file cannot come before it
        rest = item.value.removeprefix(item.state)
        value = Markup('<span class="state {}">{}</span>{}').format(
            _STATES[item.state], item.state, rest
        )
    names = Markup(' <span class="state ai">names AI</span>') if item.suggests == "AI" else ""
    return Markup('<li><b>{}</b>{} {} <span class="quiet">({})</span></li>').format(
        item.kind, names, value, item.where
    )


def refused_html(refused: Sequence[Scored]) -> Markup:
    """Return the card with the refused files and the reasons."""
    items = Markup().join(
        Markup("<li><b>{}</b>: {}</li>").format(result.name, result.prediction.error)
        for result in refused
    )
    return Markup('<div class="card refused">{}<ul>{}</ul></div>').format(icon("refused"), items)
