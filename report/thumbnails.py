"""Find the worst misclassified images of an evaluation, and make small pictures of them.

Main entries: `worst_mistakes(scores, name, threshold, count)` returns a list of `Misclassified`s:
at most `count` reals called fake, the highest probability first, then at most `count` fakes that
are not called fake (some may be uncertain), the lowest probability first.

- `scores`: the scores of all images, a `ScoreTable` (from `read_scores(path)` of
  `model/evaluation/scores.py`).
- `name`: the name of a set in these scores; another name raises ValueError.
- `threshold`: the decision threshold, a probability of fake.
- `count`: the largest number of mistakes per class.

A `Misclassified` has the texts `set`, `key`, `source`, `generator` and `origin` (the image's own
path below the raw folder), `label` (0 real, 1 fake) and `probability` (of fake, 0 to 1).

`thumbnails(shards, mistakes)` returns a dict from (set, key) to a JPEG of at most `SIDE` pixels as
a data: URL (text). Images that cannot be read or decoded are left out.

- `shards`: dict, set name -> `ShardSet` (packed images, from `open_shards([folder])` of
  `sharding/format.py`), with the sets of all mistakes; a missing one raises KeyError.
- `mistakes`: any number of `Misclassified`s.

`MOST` is the largest number of pictures on a page.
"""

import base64
import contextlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from imaging.decode import DecodeError
from model.evaluation.scores import ScoreTable
from pipeline.read import ShardReader
from sharding.format import ShardSet

SIDE = 160
"""Longer side of a thumbnail, in pixels."""

MOST = 48
"""Largest number of pictures on a page, over all sets, so that the file stays below 2 MB."""


@dataclass(frozen=True)
class Misclassified:
    """A misclassified image; `probability` is the probability of fake."""

    set: str
    key: str
    source: str
    generator: str
    origin: str
    label: int
    probability: float


def worst_mistakes(
    scores: ScoreTable, name: str, threshold: float, count: int
) -> list[Misclassified]:
    """Return at most `count` reals of set `name` called fake, highest probability first, then at
    most `count` fakes not called fake, lowest probability first.
    """
    probabilities, labels = scores.numbers("probability"), scores.numbers("label")
    in_set = scores.of_set(name) & scores.numbers("valid").astype(bool)
    mistakes = []
    for label in (0, 1):
        wrong = np.flatnonzero(
            in_set & (labels == label) & ((probabilities >= threshold) != (label == 1))
        )
        order = np.argsort(probabilities[wrong] if label else -probabilities[wrong], kind="stable")
        mistakes += wrong[order[:count]].tolist()
    columns = ("set", "key", "source", "generator", "origin", "label", "probability")
    rows = scores.table.select(columns).take(np.array(mistakes, np.int64)).to_pylist()
    return [Misclassified(**row) for row in rows]


def thumbnails(
    shards: Mapping[str, ShardSet], mistakes: Iterable[Misclassified]
) -> dict[tuple[str, str], str]:
    """Return (set, key) -> a picture as a data: URL. Images that cannot be decoded are left out."""
    pictures = {}
    wanted: dict[str, list[str]] = {}
    for mistake in mistakes:
        wanted.setdefault(mistake.set, []).append(mistake.key)
    for name, keys in wanted.items():
        shard_set = shards[name]
        mask = pc.is_in(shard_set.table.column("key"), value_set=pc.cast(keys, "string"))
        rows = np.flatnonzero(np.array(mask.to_pylist()))
        held = shard_set.table.column("key").take(rows).to_pylist()
        reader = ShardReader(shard_set)
        for key, row in zip(held, rows.tolist(), strict=True):
            with contextlib.suppress(DecodeError):
                pictures[name, key] = _small(reader.pixels(row))
    return pictures


def _small(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
