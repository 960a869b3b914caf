"""From scores to `report.json`: protocols, figures with their intervals, and the sentence on top.

`report(scores)` needs no network and no images: `evaluate.py` calls it after scoring, and
`evaluate.py --scores FILE` on a file of scores, with the same result. The layout:

    {"report_version": 2,
     "headline": [sentence, ...],            # one per set; says first where reals are missing
     "checkpoint": path, "run": name, "step": n, "commit": commit,
     "temperature": t, "threshold": p, "band": [low, high], "calibration": null or as in meta.json,
     "subset": null or {"file": name, "sha256": hash, "samples": n},
     "reals": null or {"set": set, "why": text, "images": n},     # whose real images stand beside
     "intervals": {"level": 0.95, "draws": n, "seed": n},
     "sets": {set: {
         "index_sha256": hash, "split": split,
         "overall": FIGURES,                 # of the set's own images
         "beside": FIGURES or null,          # its fakes with the reals of another set, where it
                                             # has none of its own and another has
         "classes": {"real": FIGURES, "fake": FIGURES},     # each class by itself, if there
         "sources": {source: FIGURES},       # of the source's own images
         "generators": {generator: FIGURES}, # its fakes with all reals, as overall or beside
         "verdicts": {"real" or "fake": {verdict: n}},
         "protocols": {"all": PROTOCOL, "first": PROTOCOL or null} or null,  # null without fakes
         "unreadable": [text, ...], "note": text or null}}}

FIGURES are the fields of `model.metrics.Metrics`, `groups` (how many independent groups of images
they rest on) and `intervals`: {metric: [low, high]} for those that have one.

PROTOCOL, of the fakes by generator, each generator counting alike:

    {"images": n, "prompts": n, "generators": {generator: RECALL},
     "mean": r, "spread": r or null, "interval": [low, high],          # at the threshold
     "mean_at_half": r, "spread_at_half": r or null}                   # at 0.5, as others publish

RECALL is {"images": n, "recall": r, "interval": [low, high], "recall_at_half": r}.
"""

REPORT_VERSION = 2
