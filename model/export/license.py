"""Which license binds the weights of a checkpoint, as far as its record says."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import timm


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
    began from. Where the record does not name them (phase 2, a file), it is the license of timm's
    own for that network, the strictest that this project's recipes can lead to. Licenses of the
    training data are another matter: the index of each set has them.
    """
    network = meta["recipe"]["network"]
    imported = "imported_from" in meta["data"]
    config = timm.models.get_pretrained_cfg(ORIGINAL_BASE if imported else network["name"])
    if config is None or not config.license:
        return License("other", f"timm names none for weights of {network['name']}", "")
    base = f"{config.architecture}.{config.tag}" if config.tag else config.architecture
    name = config.license.upper()
    if imported:
        text = f"{name}, that of timm's {base}, which it was fine-tuned from; its card says MIT"
    elif network["pretrained"]:
        text = f"{name}, that of timm's {base}, which it was fine-tuned from"
    else:
        text = f"{name} if it goes back to timm's {base}; its record names no first weights"
    known = imported or network["pretrained"]
    return License(config.license.lower(), text, base if known else "")
