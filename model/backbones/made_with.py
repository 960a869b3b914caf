"""How images were seen that the weights of a network were made with, as timm records it."""

import difflib
from dataclasses import dataclass

from model.lean_import import lean_import
from model.recipe import Triple

with lean_import():
    import timm
    from timm.models import PretrainedCfg, load_model_config_from_hf
    from timm.models._hub import load_model_config_from_path


class NetworkError(ValueError):
    """A network that cannot be built or filled; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class MadeWith:
    """How the images were seen that the weights of a network were made with, as timm says it.

    `height` and `width` are those of the input in pixels, `fixed` where the network takes no other
    unless it is built for it (`img_size`); `crop_pct` is the crop's share of the resized side.
    `interpolation` is Pillow's name of the filter, `squashed` says that the aspect ratio was lost.
    """

    mean: Triple
    std: Triple
    height: int
    width: int
    fixed: bool
    crop_pct: float
    interpolation: str
    squashed: bool


def made_with(name: str) -> MadeWith:
    """How the weights of a network see images: timm's own list, or the `config.json` of a network
    that is called `hf-hub:OWNER/NAME` or `local-dir:FOLDER`.

    Raises:
        NetworkError: timm does not know the network, or its configuration cannot be read.
    """
    config = pretrained_config(name)
    (_, height, width), mean, std = config.input_size, config.mean, config.std
    if len(mean) != 3 or len(std) != 3:
        raise NetworkError(
            f"{name} was made for images of {len(mean)} channels, expected 3 (RGB); name another "
            "network"
        )
    return MadeWith(
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        height=height,
        width=width,
        fixed=config.fixed_input_size,
        crop_pct=config.crop_pct,
        interpolation=config.interpolation,
        squashed=config.crop_mode == "squash",
    )


def pretrained_config(name: str) -> PretrainedCfg:
    """timm's configuration of a network's weights.

    Raises:
        NetworkError: as `made_with`.
    """
    source, _, where = name.partition(":")
    config: PretrainedCfg | None = None
    try:
        if source == "hf-hub":
            config = PretrainedCfg(**load_model_config_from_hf(where)[0])
        elif source == "local-dir":
            config = PretrainedCfg(**load_model_config_from_path(where)[0])
        else:
            config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except (OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise NetworkError(f"timm cannot build {name!r}: {first_line(error)}") from error
    if config is None:
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        more = f"; the nearest it knows: {', '.join(near)}" if near else ""
        raise NetworkError(f"timm cannot build {name!r}: it knows no such network{more}")
    return config


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
