"""Which license binds the weights of a checkpoint, as far as its record says."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import timm

from model.shipped.backbone import KEY, KEY_INSIDE


class License(NamedTuple):
    """`id` as the Hugging Face Hub spells it, in small letters; `text` is what people read, and
    `base` the timm weights that training began from, empty where the record names none.
    """

    id: str
    text: str
    base: str


ORIGINAL_BASE = "convnextv2_base.fcmae_ft_in1k"
"""What the original project's card names as its start."""


def license_of(meta: Mapping[str, Any]) -> License:
    """From a checkpoint's `meta.json`: fine-tuned weights stay under the license of those they
    began from, which `first_weights` records. Where the record does not name them (a file, an old
    run), it is the license of timm's own for that network, the strictest that this project's
    recipes can lead to. A detector that ships names that of its backbone. Licenses of the training
    data are another matter: the index of each set has them.
    """
    if spec := meta.get(KEY) or meta.get(KEY_INSIDE):
        base, said = spec["name"], spec["license"]
        if not said:
            return License("other", f"none is recorded for the backbone {base}", "")
        text = f"{said.upper()}, that of the backbone {base}, on which the head was trained"
        return License(said.lower(), text, base)
    network = meta["recipe"]["network"]
    first = first_of(meta.get("first_weights"))
    imported = "imported_from" in meta["data"]
    if first and first["kind"] == "random":
        text = "nobody's but the trainer's: it began from random weights"
        return License("other", text, "")
    is_timm = first["kind"] == "timm" if first else network["pretrained"]
    name = first["name"] if first and is_timm else network["name"]
    config = timm.models.get_pretrained_cfg(ORIGINAL_BASE if imported else name)
    if config is None or not config.license:
        return License("other", f"timm names none for weights of {name}", "")
    base = f"{config.architecture}.{config.tag}" if config.tag else config.architecture
    said = ((first or {}).get("license") if is_timm else None) or config.license
    if imported:
        text = f"{said.upper()}, that of timm's {base}, which it was tuned from; its card says MIT"
    elif is_timm:
        text = f"{said.upper()}, that of timm's {base}, which it was fine-tuned from"
    else:
        text = f"{said.upper()} if it goes back to timm's {base}; its record names no first weights"
    return License(said.lower(), text, base if imported or is_timm else "")


def first_of(weights: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The weights that a chain of checkpoints goes back to; None where the record ends before."""
    while weights and weights["kind"] == "checkpoint":
        weights = weights.get("first_weights")
    return weights
