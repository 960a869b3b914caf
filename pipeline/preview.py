"""A picture of what the network is fed: the same samples through both backends, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from imaging.jpeg import CHROMAS
from pipeline.augment import FILTERS, IDENTITY, AugmentParams

GAIN = 16
"""How much differences between the backends are multiplied by, around mid-gray."""

CELL = 256
_TEXT, _GAP, _HEAD = 300, 8, 28
_COLUMNS = ("as packed, and the crop", "pil", "dali", f"dali - pil, x {GAIN}")


@dataclass(frozen=True, eq=False)
class Row:
    """One sample: its whole image, its parameters, and what each backend made of it, all uint8 RGB.

    `dali` is None where that backend is not there. `lines` say what it is.
    """

    whole: np.ndarray
    params: AugmentParams
    pil: np.ndarray
    dali: np.ndarray | None
    lines: Sequence[str]


def picture_of(rows: Sequence[Row]) -> Image.Image:
    """The rows below each other."""
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


def _cells(row: Row) -> tuple[Image.Image | None, ...]:
    pil, difference = _square(row.pil), None
    if row.dali is not None:
        change = row.dali.astype(np.int16) - row.pil
        difference = _square(np.clip(128 + GAIN * change, 0, 255).astype(np.uint8))
    dali = None if row.dali is None else _square(row.dali)
    return _with_crop(row.whole, row.params), pil, dali, difference


def _square(pixels: np.ndarray) -> Image.Image:
    """Pixels stay pixels: enlarged or reduced without smoothing."""
    return Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST)


def _with_crop(whole: np.ndarray, params: AugmentParams) -> Image.Image:
    """The whole image in a cell, with the crop as a frame."""
    scale = CELL / max(whole.shape[:2])
    size = (max(1, round(whole.shape[1] * scale)), max(1, round(whole.shape[0] * scale)))
    image = Image.fromarray(whole).resize(size, Image.Resampling.BILINEAR)
    corners = (params.left, params.top, params.left + params.width, params.top + params.height)
    box = [round(value * scale) for value in corners]
    box[2:] = [min(value, edge) - 1 for value, edge in zip(box[2:], size, strict=True)]
    if box[2] > box[0] and box[3] > box[1]:
        ImageDraw.Draw(image).rectangle(box, outline=(255, 0, 255), width=2)
    return image


def words_of(params: AugmentParams) -> list[str]:
    """What the parameters do, a line each; nothing for what they leave alone."""
    words = [f"crop {params.width} x {params.height} at {params.left}, {params.top}"]
    pair = f"as its real partner: JPEG {params.pair_jpeg}, {CHROMAS[params.pair_chroma]}"
    words += [pair] if params.pair_jpeg else []
    words += ["horizontal flip"] if params.hflip else []
    words += ["color jitter"] if params.color != IDENTITY else []
    how = f" ({FILTERS[params.filter]})" if params.filter else ""
    words += [f"resample to {params.resample} and back{how}"] if params.resample else []
    jpegs = ", ".join(str(q) for q in (params.jpeg, params.jpeg2, params.jpeg3) if q)
    words += [f"JPEG {jpegs}"] if jpegs else []
    moved = params.grid_top or params.grid_left
    words += [f"blocks begin at {params.grid_left}, {params.grid_top}"] if moved else []
    words += [f"blur {params.blur:.2f}"] if params.blur else []
    words += ["grayscale"] if params.grayscale else []
    return words + ([f"WebP {params.webp}"] if params.webp else [])
