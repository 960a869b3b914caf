"""Complete a recipe: fill in the preprocessing that the recipe leaves out, from timm's record of
the network's weights.

Main entry: `resolved(recipe)` takes a `Recipe`, the settings of a training run
(`recipes.load(Recipe, path)` reads one from TOML). It returns a `ResolvedRecipe`. Settings that the
recipe gives are kept; these have values in any case:

- `preprocess.crop_size` and `preprocess.resize_size`: in pixels. A crop size that is left out is
  `img_size` of `network.options` if that is an int, else timm's.
- `preprocess.interpolation`: the resize filter.
- `network.mean` and `network.std`: three numbers each, for pixels from 0 to 1.
- `network.crops`: 2 with `preprocess.detail_crop`, else 1.
- `network.options`: with the entry `img_size` if the network is built for one size and the crop has
  another.

It raises `NetworkError` (a `ValueError`) if timm does not know the network, its configuration (of
`hf-hub:OWNER/NAME` or `local-dir:FOLDER`) cannot be read, or the network is not for RGB images. It
raises another `ValueError`:

- if the crop is smaller than 16 pixels or larger than the resized image;
- for `preprocess.detail_crop` with `network.head` `timm`, which reads one crop;
- for `network.crops` 2 without `preprocess.detail_crop`.

`describe_preprocess(recipe, of_timm=...)` takes a `ResolvedRecipe` and returns a list of lines for
the user: the preprocessing, then, if the first weights are timm's (`of_timm`, the default), its
differences from that of the weights. `normalization_warnings(recipe)` takes
the same and returns a line for mean and for std if they differ from those of the weights (often
none). `nearest_filter(name)` returns the resize filter `name` (Pillow's name) if it is `bilinear`,
`bicubic` or `lanczos`, else `bilinear`.
"""

import math
from dataclasses import fields, replace

from model.backbones.pretrained import pretrained_input
from model.recipe import Recipe, ResolvedRecipe
from pipeline.preprocess import FILTERS, Filter, Preprocess


def resolved(recipe: Recipe) -> ResolvedRecipe:
    """Return the recipe with mean, std, crop size, resize size and filter filled in from timm's
    record of the network's weights, and with `img_size` for a network that is built for one size.
    Settings that the recipe gives are kept.

    Raises:
        NetworkError: timm does not know the network.
        ValueError: the crop is larger than the resized image, or the head cannot read two crops.
    """
    network, stated = recipe.network, recipe.preprocess
    made = pretrained_input(network.name)
    options = dict(network.options)
    built_for = options.get("img_size")
    crop_size = stated.crop_size
    if crop_size is None:
        crop_size = built_for if isinstance(built_for, int) else made.height
    resize_size = stated.resize_size
    if resize_size is None:
        resize_size = math.floor(crop_size / min(1, made.crop_pct))
    if made.fixed and not options.keys() & {"img_size", "dynamic_img_size"}:
        options |= {} if (made.height, made.width) == (crop_size,) * 2 else {"img_size": crop_size}
    preprocess = Preprocess(
        crop_size=crop_size,
        resize_size=resize_size,
        interpolation=stated.interpolation or nearest_filter(made.interpolation),
        detail_crop=stated.detail_crop,
    )
    if preprocess.detail_crop and network.head == "timm":
        raise ValueError(
            "preprocess.detail_crop needs a head that reads two crops: set network.head to stages "
            "or class_tokens, or leave detail_crop out"
        )
    if network.crops > preprocess.crops:
        raise ValueError(
            "network.crops is 2 without preprocess.detail_crop; leave crops out, and set "
            "preprocess.detail_crop=true for a second crop"
        )
    network = replace(
        network,
        mean=network.mean or made.mean,
        std=network.std or made.std,
        options=options,
        crops=preprocess.crops,
    )
    values = {own.name: getattr(recipe, own.name) for own in fields(recipe)}
    return ResolvedRecipe(**values | {"network": network, "preprocess": preprocess})


def nearest_filter(name: str) -> Filter:
    """Return the filter `name` (Pillow's name) if both backends have it, else bilinear."""
    return next((known for known in FILTERS if known == name), "bilinear")


def describe_preprocess(recipe: ResolvedRecipe, *, of_timm: bool = True) -> list[str]:
    """Describe the preprocessing in one line, followed by a line for each difference from the
    preprocessing of timm's weights of the network. Without `of_timm`, its first weights are others:
    random ones or a checkpoint's, so nothing is said of timm's.
    """
    seen, made = recipe.preprocess, pretrained_input(recipe.network.name)
    lines = [
        f"input: center crop of {seen.crop_size} x {seen.crop_size} pixels, shorter side "
        f"{seen.resize_size} ({seen.interpolation}), mean {_list(recipe.network.mean)}, std "
        f"{_list(recipe.network.std)}"
    ]
    if seen.detail_crop:
        lines.append(f"second input: {seen.crop_size} x {seen.crop_size} pixels, not resized")
    if not of_timm:
        return lines
    resize = math.floor(made.height / min(1, made.crop_pct))
    if (seen.crop_size, seen.resize_size, seen.interpolation) != (
        made.height, resize, made.interpolation,
    ) or made.squashed:  # fmt: skip
        squashed = ", squashed to a square" if made.squashed else ""
        lines.append(
            f"its weights were trained on {made.width} x {made.height} pixels, shorter side "
            f"{resize} ({made.interpolation}{squashed})"
        )
    if made.interpolation not in FILTERS and seen.interpolation == "bilinear":
        lines.append(
            f"the filter {made.interpolation} of its weights is in neither backend (they have "
            f"{', '.join(FILTERS)}): bilinear is used instead"
        )
    return lines


def normalization_warnings(recipe: ResolvedRecipe) -> list[str]:
    """Return a line for the recipe's mean and for its std if they differ from those of timm's
    weights.
    """
    network, made = recipe.network, pretrained_input(recipe.network.name)
    return [
        f"network.{name} is {_list(ours)}, but timm's weights of {network.name} were made with "
        f"{_list(theirs)}: leave it out, unless your weights are not timm's"
        for name, ours, theirs in (
            ("mean", network.mean, made.mean),
            ("std", network.std, made.std),
        )
        if ours != theirs
    ]


def _list(numbers: tuple[float, ...] | None) -> str:
    return str([round(number, 4) for number in numbers or ()])
