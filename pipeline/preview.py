"""Write a PNG of augmented samples of a shard set, as the two backends (Pillow and DALI) make them,
side by side.

Main entry: `write_preview(folder, out, recipe, policy, count, seed)` writes the PNG.

- `folder`: folder of the shard set, a `Path`, or a `UPath` for an address.
- `out`: `Path` of the PNG to write.
- `recipe`: `Path` of the recipe file with the preprocessing and the augmentation policies.
- `policy`: name of the policy for the sources that have no policy in the set's index. If it is
  None, the policy that the recipe names (`data.policy`) is used.
- `count`: number of samples.
- `seed`: int from 0 on, which selects the samples and the augmentations.

It returns a pair: N, the number of samples shown (fewer than `count` in a smaller set), and the
absolute difference of the backends in gray levels, an int16 array (N, height, width, 3), with the
`shape` of the recipe's `Preprocess`. Without DALI, the difference is None, and only Pillow's images
are shown.

It raises `ShardError` if `folder` has no set, `LoadError` if a sample cannot be read or decoded or
the recipe does not describe a policy that is used, and `RecipeError` if the recipe is missing or
wrong, or names no policy while `policy` is None. It raises `OSError` if the PNG cannot be written.

`picture_of(rows)` arranges `PreviewRow`s, one per sample, in one picture. `Policies` is the part of
the recipe that is read, and `words_of(params)` describes the parameters of one image in lines of
text. `CELL` is the side of an image in pixels, `GAIN` the factor by which differences are enlarged.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import console
import recipes
from imaging.decode import decode_image
from imaging.jpeg import CHROMAS
from pipeline.augment import LEAST_SIGMA, AugmentParams, AugmentPolicy
from pipeline.batch import Request
from pipeline.color import IDENTITY
from pipeline.loader import LoadError, choose_backend
from pipeline.params import ParamsFor, train_params
from pipeline.pil import decode_request
from pipeline.preprocess import FILTERS, Preprocess, PreprocessSettings
from pipeline.read import ReadError, ShardReader
from sharding.format import CLASSES, ShardSet, open_shards
from storage import AnyPath

GAIN = 16
"""Factor by which differences between the backends are multiplied, around mid-gray."""

CELL = 256
_TEXT, _GAP, _HEAD = 300, 8, 28
_COLUMNS = ("as packed, and the crop", "pil", "dali", f"dali - pil, x {GAIN}")


@dataclass(frozen=True, kw_only=True)
class Policies:
    """The part of a recipe that describes preprocessing and augmentation."""

    augment: dict[str, AugmentPolicy]
    preprocess: PreprocessSettings = field(default_factory=PreprocessSettings)


@dataclass(frozen=True, eq=False)
class PreviewRow:
    """One sample: its whole image, its parameters, and the result of each backend, all uint8 RGB
    (height, width, 3).

    `dali` is None if that backend is not installed. `lines` describe the sample: key, class,
    policy.
    """

    whole: np.ndarray
    params: AugmentParams
    pil: np.ndarray
    dali: np.ndarray | None
    lines: Sequence[str]


def write_preview(
    folder: AnyPath, out: Path, recipe: Path, policy: str | None, count: int, seed: int
) -> tuple[int, np.ndarray | None]:
    """Write a PNG of `count` samples of a shard set as both backends see them, augmented by the
    policies of a recipe.

    `policy` is for sources for which the index names none; None means the recipe's.

    Returns:
        The number of samples in the picture, and the absolute difference of the backends in gray
        levels (int16, the shape of the batch), or None without DALI.

    Raises:
        LoadError: a sample that cannot be read or decoded.
        RecipeError: a recipe that cannot be used.
    """
    opened = open_shards([folder])
    values = recipes.read(recipe)
    policies = recipes.build(
        Policies,
        {key: values[key] for key in ("augment", "preprocess") if key in values},
        str(recipe),
    )
    policy = policy or values.get("data", {}).get("policy", "")
    if not policy:
        raise recipes.RecipeError(f"{recipe} names no data.policy; name one with --policy")
    preprocess = _filled(policies.preprocess, recipe)
    _announce_defaults(recipe, policies.preprocess, preprocess)
    samples = _spread(opened, count, seed)
    params_for = train_params(opened, policies.augment, policy, preprocess, seed, 0)
    request = _request(opened, samples, params_for)
    shape = preprocess.shape
    pil = decode_request(request, shape)
    if pil.failures:
        row, reason = next(iter(pil.failures.items()))
        raise LoadError(f"{opened.name(samples[row])}: {reason}")
    dali = _by_dali(request, shape)
    rows = [
        PreviewRow(
            whole=decode_image(data, request.formats[row], request.orientations[row]),
            params=params,
            pil=pil.images[row].numpy(),
            dali=None if dali is None else dali[row],
            lines=_lines(opened, sample, policy),
        )
        for row, (sample, data, params) in enumerate(
            zip(samples.tolist(), request.data, request.params.rows(), strict=True)
        )
    ]
    picture_of(rows).save(out, "PNG")
    change = None if dali is None else np.abs(dali.astype(np.int16) - pil.images.numpy())
    return len(rows), change


def _filled(stated: PreprocessSettings, recipe: Path) -> Preprocess:
    """Return the preprocessing with defaults for what the recipe leaves out. `resize_size` is then
    at least `crop_size`; training crops do not depend on it.

    Raises:
        RecipeError: the sizes do not fit together.
    """
    values = {name: value for name, value in asdict(stated).items() if value is not None}
    least = max(Preprocess.resize_size, stated.crop_size or 0)
    return recipes.build(Preprocess, {"resize_size": least} | values, f"{recipe}: preprocess")


def _announce_defaults(recipe: Path, stated: PreprocessSettings, preprocess: Preprocess) -> None:
    """Name the preprocessing settings that the recipe leaves out and training takes from the
    network's weights.
    """
    names = ("crop_size", "resize_size", "interpolation")
    used = [f"{n}={getattr(preprocess, n)}" for n in names if getattr(stated, n) is None]
    if used:
        console.say(
            f"{recipe} leaves out settings that training takes from the network's weights; shown "
            f"with {', '.join(used)}. Set them in [preprocess] to see what the network sees."
        )


def _spread(shards: ShardSet, count: int, seed: int) -> np.ndarray:
    """Choose `count` samples at random, evenly over sources and classes."""
    kinds = 2 * shards.codes("source")[0] + shards.column("label")
    shuffled = np.random.default_rng(seed).permutation(len(shards))
    kind = kinds[shuffled]
    turn = np.zeros(len(shards), np.int64)
    for code in np.unique(kind):
        here = kind == code
        turn[here] = np.arange(here.sum())
    return shuffled[np.lexsort((kind, turn))][:count]


def _request(shards: ShardSet, samples: np.ndarray, params_for: ParamsFor) -> Request:
    data = []
    for sample, image in zip(samples.tolist(), ShardReader(shards).read(samples), strict=True):
        if isinstance(image, ReadError):
            raise LoadError(f"{shards.name(sample)}: {image}")
        data.append(image)
    return Request(
        data,
        shards.names("format", samples),
        shards.column("orientation")[samples].tolist(),
        params_for(samples, np.zeros(len(samples), np.int64)),
    )


def _by_dali(request: Request, shape: tuple[int, int]) -> np.ndarray | None:
    """Decode the request with DALI, on the GPU if there is one. Without DALI, logs a warning and
    returns None.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        choose_backend("dali", device)
    except LoadError as error:
        console.log.warning("%s; the picture shows the backend pil only", error)
        return None
    from pipeline.dali import DaliBackend

    with contextlib.closing(DaliBackend(shape, len(request.data), device, threads=2)) as dali:
        (pixels,) = dali.run([request])
    return pixels.images.cpu().numpy()


def _lines(shards: ShardSet, sample: int, policy: str) -> list[str]:
    (source,), (generator,) = (
        shards.names(name, np.array([sample])) for name in ("source", "generator")
    )
    label = CLASSES[int(shards.column("label")[sample])]
    kept = shards.sources[source]["policy"]
    return [shards.text("key", sample), f"{label}, {generator}", f"policy {kept or policy}"]


def picture_of(rows: Sequence[PreviewRow]) -> Image.Image:
    """Arrange the rows in one picture, from top to bottom."""
    width = len(_COLUMNS) * (CELL + _GAP) + _TEXT
    sheet = Image.new("RGB", (width, _HEAD + len(rows) * (CELL + _GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for index, title in enumerate(_COLUMNS):
        pen.text((index * (CELL + _GAP) + 4, 6), title, "black", font)
    for index, row in enumerate(rows):
        top = _HEAD + index * (CELL + _GAP)
        for column, cell in enumerate(_cells(row)):
            if cell is not None:
                sheet.paste(cell, (column * (CELL + _GAP), top))
        text = "\n".join([*row.lines, *words_of(row.params)])
        corner = (len(_COLUMNS) * (CELL + _GAP) + 4, top)
        pen.multiline_text(corner, text, "black", font, spacing=3)
    return sheet


def _cells(row: PreviewRow) -> tuple[Image.Image | None, ...]:
    pil, difference = _square(row.pil), None
    if row.dali is not None:
        change = row.dali.astype(np.int16) - row.pil
        difference = _square(np.clip(128 + GAIN * change, 0, 255).astype(np.uint8))
    dali = None if row.dali is None else _square(row.dali)
    return _with_crop(row.whole, row.params), pil, dali, difference


def _square(pixels: np.ndarray) -> Image.Image:
    """Resize to a cell without smoothing, so that single pixels stay visible."""
    return Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST)


def _with_crop(whole: np.ndarray, params: AugmentParams) -> Image.Image:
    """Fit the whole image into a cell and draw the crop as a frame."""
    height, width = (params.whole_height or whole.shape[0], params.whole_width or whole.shape[1])
    scale = CELL / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(whole).resize(size, Image.Resampling.BILINEAR)
    corners = (params.left, params.top, params.left + params.width, params.top + params.height)
    box = [round(value * scale) for value in corners]
    box[2:] = [min(value, edge) - 1 for value, edge in zip(box[2:], size, strict=True)]
    if box[2] > box[0] and box[3] > box[1]:
        ImageDraw.Draw(image).rectangle(box, outline=(255, 0, 255), width=2)
    return image


def words_of(params: AugmentParams) -> list[str]:
    """Describe the parameters, one line for each operation that is on."""
    words = [f"crop {params.width} x {params.height} at {params.left}, {params.top}"]
    if params.whole_height:
        words.append(f"whole image: {params.whole_width} x {params.whole_height}")
    if params.whole_jpeg:
        words.append(f"whole image: JPEG {params.whole_jpeg}, {CHROMAS[params.whole_chroma]}")
    words += [f"whole image: WebP {params.whole_webp}"] if params.whole_webp else []
    side = params.detail_side
    words += [f"detail {side} x {side} at {params.detail_left}, {params.detail_top}"] * bool(side)
    words += ["horizontal flip"] if params.hflip else []
    words += ["vertical flip"] if params.vflip else []
    words += ["color jitter"] if params.color != IDENTITY else []
    how = f" ({FILTERS[params.filter]})" if params.filter else ""
    words += [f"resample to {params.resample} and back{how}"] if params.resample else []
    jpegs = ", ".join(str(q) for q in (params.jpeg, params.jpeg2, params.jpeg3) if q)
    words += [f"JPEG {jpegs}"] if jpegs else []
    moved = params.grid_top or params.grid_left
    words += [f"blocks begin at {params.grid_left}, {params.grid_top}"] if moved else []
    words += [f"blur {params.blur:.2f}"] if params.blur >= LEAST_SIGMA else []
    words += ["grayscale"] if params.grayscale else []
    return words + ([f"WebP {params.webp}"] if params.webp else [])
