"""Look up the preprocessing with which the published weights of a network were trained.

Main entry: `pretrained_input(name)` takes timm's name of a network with weights (or
`hf-hub:OWNER/NAME`, `local-dir:FOLDER`) and returns a `PretrainedInput`, as timm records it:
`height` and `width` of the input in pixels and whether this size is `fixed`; `mean` and `std` of
red, green and blue (values from 0 to 1); `crop_pct`, the side of the crop divided by that of the
resized image; `interpolation`, Pillow's name of the resize filter; and `squashed`, whether the
aspect ratio was ignored.

It raises `NetworkError` (a `ValueError`) if the network is unknown, its configuration cannot be
read or holds a value of the wrong kind, or its `mean` or `std` has not three numbers (it is not for
RGB images).
`pretrained_config(name)` returns timm's whole record. `first_line(error)` returns the first line of
an exception's text.
"""

import difflib
import math
import operator
from dataclasses import dataclass

from model.lean_import import lean_import
from model.recipe import Triple
from sharding.hub import ask_hub, hub_errors, in_hub_cache, proxy_faults

with lean_import():
    import timm
    from timm.models import PretrainedCfg, load_model_config_from_hf
    from timm.models._hub import load_model_config_from_path


class NetworkError(ValueError):
    """A network that cannot be built, or weights that do not fit it. The message says what
    to do.
    """


@dataclass(frozen=True, kw_only=True)
class PretrainedInput:
    """Preprocessing with which the weights of a network were trained, as timm records it.

    `height` and `width` are the input size in pixels. `fixed` means that the network accepts no
    other size unless it is built with `img_size`. `crop_pct` is the side of the crop divided by the
    side of the resized image. `interpolation` is Pillow's name of the filter. `squashed` means that
    the image was resized without keeping its aspect ratio. `mean` and `std` are for RGB values from
    0 to 1.
    """

    mean: Triple
    std: Triple
    height: int
    width: int
    fixed: bool
    crop_pct: float
    interpolation: str
    squashed: bool


def pretrained_input(name: str) -> PretrainedInput:
    """Return timm's record for a network: from timm's own list, or from the `config.json` of a
    network named `hf-hub:OWNER/NAME` or `local-dir:FOLDER`.

    Raises:
        NetworkError: timm does not know the network, its configuration cannot be read or holds a
            value of the wrong kind, or it is not for RGB images.
    """
    config = pretrained_config(name)
    try:
        _, height, width = map(operator.index, config.input_size)
        mean, std = list(map(float, config.mean)), list(map(float, config.std))
        crop_pct = float(config.crop_pct)
    except (TypeError, ValueError) as error:
        raise NetworkError(
            f"{name} has a configuration that cannot be used ({first_line(error)}); expected "
            "input_size as three whole numbers, mean, std and crop_pct as numbers"
        ) from error
    if len(mean) != 3 or len(std) != 3:
        raise NetworkError(
            f"{name} was made for images of {len(mean)} channels, expected 3 (RGB); use another "
            "network"
        )
    if not all(map(math.isfinite, mean)) or not all(0 < value < math.inf for value in std):
        raise NetworkError(f"{name} has mean {mean} and std {std}, expected numbers, std above 0")
    if min(height, width, crop_pct) <= 0:
        raise NetworkError(
            f"{name} has input_size {config.input_size} and crop_pct {crop_pct}, expected numbers "
            "above 0"
        )
    return PretrainedInput(
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        height=height,
        width=width,
        fixed=bool(config.fixed_input_size),
        crop_pct=crop_pct,
        interpolation=str(config.interpolation),
        squashed=config.crop_mode == "squash",
    )


def pretrained_config(name: str) -> PretrainedCfg:
    """Return timm's configuration of a network's weights.

    Raises:
        NetworkError: as `pretrained_input`.
    """
    source, _, where = name.partition(":")
    config: PretrainedCfg | None = None
    faults: tuple[type[Exception], ...] = (*hub_errors(), LookupError, TypeError, ValueError)
    try:
        if source == "hf-hub":
            repository, _, revision = where.partition("@")
            if not in_hub_cache(repository, "config.json", revision or None):
                ask_hub(repository, "config.json", revision or None)
            with proxy_faults():
                config = PretrainedCfg(**load_model_config_from_hf(where)[0])
        elif source == "local-dir":
            config = PretrainedCfg(**load_model_config_from_path(where)[0])
        else:
            config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except faults as error:
        raise NetworkError(f"timm cannot build {name!r}: {first_line(error)}") from error
    if config is None:
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        more = f"; similar names: {', '.join(near)}" if near else ""
        raise NetworkError(f"timm cannot build {name!r}: unknown network{more}")
    return config


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or the name of its type if the text is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
