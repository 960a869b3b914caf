"""The verdict on one image: the number on its scale, and what the file says."""

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
    """The card with the verdict `said`; its heading is one of `level`."""
    probability = result.prediction.probability
    assert probability is not None  # what was refused is not shown
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
    """A probability as a mark on a line from no sign of AI to likely AI, with where it is
    uncertain.
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
    """What the file says of itself, each signature with its state."""
    if evidence:
        body = Markup('<ul class="says">{}</ul><p class="quiet">{}</p>').format(
            Markup().join(map(_statement, evidence)), provenance.MEANING
        )
    else:
        body = Markup(
            '<p class="quiet">Nothing of where it comes from. That is usual: most sites strip it.'
            "</p>"
        )
    return Markup('<div class="card"><h{}>What the file says</h{}>{}</div>').format(
        level, level, body
    )


def _statement(item: Evidence) -> Markup:
    value = Markup("{}").format(item.value)
    if item.state:  # it begins the value: no name that a file gives can come before it
        rest = item.value.removeprefix(item.state)
        value = Markup('<span class="state {}">{}</span>{}').format(
            _STATES[item.state], item.state, rest
        )
    names = Markup(' <span class="state ai">names AI</span>') if item.suggests == "AI" else ""
    return Markup('<li><b>{}</b>{} {} <span class="quiet">({})</span></li>').format(
        item.kind, names, value, item.where
    )


def refused_html(refused: Sequence[Scored]) -> Markup:
    """Which files were refused, and why."""
    items = Markup().join(
        Markup("<li><b>{}</b>: {}</li>").format(result.name, result.prediction.error)
        for result in refused
    )
    return Markup('<div class="card refused">{}<ul>{}</ul></div>').format(icon("refused"), items)
