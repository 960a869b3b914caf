"""Determine the license of a checkpoint's weights from the record of how it was trained.

Main entry: `license_of(meta)` takes the parsed `meta.json` (a dict, from `read_meta(folder)` of
`model/checkpoint.py`) and returns a `License`:

- `id`: the license on the Hugging Face Hub, in lower case. It is `other` (a) if training started
  from random weights, (b) for a shipped head, if `meta` has no license of its backbone, (c) if timm
  names no license for the weights.
- `text`: the license in words, for people, with the reason.
- `base`: timm's name of the weights from which training started, or of a shipped head's backbone.
  It is "" if training started from random weights, if no license is known, or if the license is not
  certain (see below; `id` is then the likely license).

Trained weights keep the license of the first weights; a shipped head has that of its backbone. In
three cases the license is not certain. It is then that of timm's weights for the same network, and
`text` says so:

- The record does not reach the first weights (an old run), and the recipe does not have
  `network.pretrained`. (If it has, timm's weights are taken as the first ones, and the license is
  certain.)
- The first weights were a file.
- The checkpoint is an average of checkpoints whose first weights differ or are not recorded.

Licenses of training images are not included. It raises no errors of its own.

`first_of(weights)` takes the entry `first_weights` of a meta (a dict or None), follows it through
earlier checkpoints to the first weights, and returns their record, or None if a record on the way
is missing. `ORIGINAL_BASE` is timm's name of the first weights of an imported detector: the older
project whose checkpoints `model/export/import_original.py` converts.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import timm

from model.shipped.backbone import KEY, KEY_INSIDE, KNOWN


class License(NamedTuple):
    """License of weights. `id` is the lower-case name on the Hugging Face Hub, `text` is for
    people. `base` is the name of the weights from which training started, "" if not recorded.
    """

    id: str
    text: str
    base: str


ORIGINAL_BASE = "convnextv2_base.fcmae_ft_in1k"
"""The weights from which the original project started, according to its card."""


def license_of(meta: Mapping[str, Any]) -> License:
    """Return the license of the weights of a checkpoint with this `meta`.

    Fine-tuned weights keep the license of the weights from which training started
    (`first_weights`). If the record does not name them (a file, an old run), the license of timm's
    weights for the same network is used: it is the strictest possible with this project's recipes.
    A shipped detector has the license of its backbone. Licenses of training data are not included;
    they are in the index of each set.
    """
    if spec := meta.get(KEY) or meta.get(KEY_INSIDE):
        base, said = spec.get("name", "without a name"), spec.get("license")
        if not said:
            return License("other", f"no license is recorded for the backbone {base}", "")
        text = f"{said.upper()}, the license of the backbone {base}, on which the head was trained"
        return License(said.lower(), text, base)
    network = meta["recipe"]["network"]
    first = first_of(meta.get("first_weights"))
    imported = "imported_from" in (meta["data"] or {})
    if first and first["kind"] == "random":
        text = "chosen by whoever trained it, because training started from random weights"
        return License("other", text, "")
    sha256 = first.get("sha256") if first else None
    for known in KNOWN:
        if known.license and sha256 in [file.sha256 for file in known.files]:
            said = f"{known.license.upper()}, the license of the backbone {known.name}"
            return License(known.license, f"{said}, on which the head was trained", known.name)
    # `pretrained` is no proof for an average: one of its runs may have begun from a file.
    assumed = network["pretrained"] and "average" not in meta
    is_timm = first["kind"] == "timm" if first else assumed
    name = first["name"] if first and is_timm else network["name"]
    config = timm.models.get_pretrained_cfg(ORIGINAL_BASE if imported else name)
    if config is None or not config.license:
        return License("other", f"timm names no license for weights of {name}", "")
    base = f"{config.architecture}.{config.tag}" if config.tag else config.architecture
    said = ((first or {}).get("license") if is_timm else None) or config.license
    if imported:
        text = (
            f"{said.upper()}, the license of timm's {base}, from which training started; its card "
            "says MIT"
        )
    elif is_timm:
        text = f"{said.upper()}, the license of timm's {base}, from which training started"
    else:
        text = (
            f"{said.upper()} if training started from timm's {base}; the record does not name the "
            "first weights"
        )
    return License(said.lower(), text, base if imported or is_timm else "")


def first_of(weights: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Follow a chain of checkpoints to the first weights. Return None if the record ends before."""
    while weights and weights["kind"] == "checkpoint":
        weights = weights.get("first_weights")
    return weights
