"""Make a fake partner of each real image of a shard set, as a raw dataset for `sharding build`.

Main entry: `make_pairs(folder, out, decoder, *, max_megapixels, on_image)` writes the files below
and returns a `Pairs`.

- `folder`: `Path` (or `UPath`) of the folder of a shard set.
- `out`: `pathlib.Path` of the output folder.
- `decoder`: a `Decoder`, a VAE that reconstructs images; `load_decoder()` of
  `sharding/pairs/decoder.py` returns it.
- `max_megapixels`: a number; larger images get no partner. Default: `MAX_MEGAPIXELS`.
- `on_image`: a function, called without arguments after each real image, with or without a partner.
  Leave it out to have no calls; None is not accepted.

A `Pairs` has the `name` of the new set; `catalog`, the path of its catalog; `counts`, a dict from a
source to its number of pairs; `already`, how many of these pairs an earlier run made; and
`excluded`, a dict from a reason to the number of real images without a partner. Files below `out`:

    <set>-pairs/<source>/real/<key>.<suffix>    the real image, its bytes as they are packed
    <set>-pairs/<source>/fake/<key>.<suffix>    its reconstruction, encoded like the real image
    <set>-pairs.json                            set, decoder, and counts of pairs and exclusions
    <set>-pairs.toml                            the catalog, written last
    .pairs/<set>-pairs/started.json             the set, the decoder and `max_megapixels`
    .pairs/<set>-pairs/                         a lock and other files of the run

Errors:

- `ShardError`: the set is missing, damaged or without an image to pair; or the name of a source is
  no folder name; or `out` has pairs of another set, decoder, `max_megapixels` or `VERSION` (see
  started.json), or files of unknown origin; or started.json is damaged.
- `DecoderError`: the GPU has not enough memory, or the decoder's result is no image. Other errors
  of torch are raised as they are.
- `CatalogError`: a name is too long. This is checked at the end, after all images were written.
- `DecodeError`: this machine does not decode a packed image.
- `OSError`: a file cannot be read or written, or another run writes the same pairs.

Complete pairs are not made again. The two images of a pair are one group (related images, which
stay in one split). All pairs form one set, in the same split (train, ...) as the packed set.
`real_samples(shards)` takes a `ShardSet` and returns the row numbers of its real images.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imaging.decode import DecodeError, Facts, prepare
from sharding.catalog import read_catalog, toml_string
from sharding.format import IMAGE_FORMATS, ShardError, ShardSet, open_shards, read_index
from sharding.index import Index
from sharding.lock import locked
from sharding.pairs.decoder import Decoder
from sharding.pairs.match import NoPair, encode_like, refuse_partner
from storage import AnyPath, make_folder, parse_json, read_text, write_bytes, write_text

VERSION = 1
"""Version of the pairs; raised when the same image and decoder give different bytes."""

MAX_MEGAPIXELS = 2.0
"""Largest image that is decoded, by default; `AutoencoderKL` needs about 10 GB for it."""

_MEGA = 1_000_000


@dataclass(frozen=True)
class Pairs:
    """Result of a run: the name of the set of pairs, and its catalog.

    `counts` are pairs by source of the real image. `already` of them existed before. `excluded` are
    real images without a partner, by reason.
    """

    name: str
    catalog: Path
    counts: dict[str, int]
    already: int
    excluded: dict[str, int]


def make_pairs(
    folder: AnyPath,
    out: Path,
    decoder: Decoder,
    *,
    max_megapixels: float = MAX_MEGAPIXELS,
    on_image: Callable[[], None] = lambda: None,
) -> Pairs:
    """Write the pairs of the set in `folder` below `out`; complete pairs are not made again.

    `on_image` is called after each real image.

    Raises:
        ShardError: the set is missing, is damaged or has no real image that can be paired, or `out`
            has pairs of another set or decoder.
        DecoderError: the decoder fails.
        OSError: a file cannot be read or written.
    """
    shards, index = open_shards([folder]), read_index(folder)
    name = f"{_safe(index['set'], 'set')}-pairs"
    work = out / ".pairs" / name
    make_folder(work)
    identity = {
        "version": VERSION, "set": index["set"], "content_sha256": index["content_sha256"],
        "decoder": decoder.name, "decoder_class": decoder.kind, "decoder_sha256": decoder.sha256,
        "max_megapixels": max_megapixels,
    }  # fmt: skip
    with locked(work, out / name):
        _refuse_others(out / name, work / "started.json", identity)
        write_text(work / "started.json", json.dumps(identity, indent=1) + "\n")
        counts, excluded, already = Counter[str](), Counter[str](), 0
        for sample in real_samples(shards).tolist():
            row = shards.table.slice(sample, 1).to_pylist()[0]
            try:
                already += _make_pair(shards, sample, row, out / name, decoder, max_megapixels)
                counts[row["source"]] += 1
            except NoPair as reason:
                excluded[str(reason)] += 1
            on_image()
        if not counts:
            why = "; ".join(f"{count:,} {reason}" for reason, count in sorted(excluded.items()))
            raise ShardError(
                f"{folder} has no real image to pair ({why or 'it has none at all'}); choose "
                "another set, or another --max-megapixels"
            )
        made = {"pairs": dict(sorted(counts.items())), "excluded": dict(sorted(excluded.items()))}
        write_text(out / f"{name}.json", json.dumps(identity | made, indent=1) + "\n")
        catalog, text = out / f"{name}.toml", _catalog_text(name, index, decoder, counts)
        tried = work / "catalog.toml"
        write_text(tried, text)
        read_catalog([tried])  # refuses a name that is too long
        write_text(catalog, text)
    return Pairs(name, catalog, dict(sorted(counts.items())), already, dict(excluded))


def real_samples(shards: ShardSet) -> np.ndarray:
    """Return the rows of the real images, in the order in which the tars store them."""
    rows = np.flatnonzero(shards.column("label") == 0)
    order = np.lexsort([shards.column("offset")[rows], shards.column("shard_code")[rows]])
    return rows[order]


def _refuse_others(folder: Path, started: Path, identity: dict[str, Any]) -> None:
    """Check that a folder of pairs is empty, or is of the same set and decoder.

    Raises:
        ShardError: it is not; the message says what differs.
    """
    if not started.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ShardError(
                f"{folder} holds files, and {started} does not say what made them; choose another "
                "--out, or move them away (nothing was changed)"
            )
        return
    try:
        before = dict(parse_json(read_text(started)))
    except (ValueError, TypeError) as error:
        raise ShardError(
            f"{started} is damaged ({type(error).__name__}); move it and {folder} away"
        ) from error
    differing = [key for key in identity if before.get(key) != identity[key]]
    if differing:
        key = differing[-1] if "max_megapixels" in differing else differing[0]
        raise ShardError(
            f"{folder} was begun with {key} {before.get(key)!r}, this is {identity[key]!r}; choose "
            "another --out, or move it and its .pairs away (nothing was changed)"
        )


def _make_pair(
    shards: ShardSet,
    sample: int,
    row: dict[str, Any],
    folder: Path,
    decoder: Decoder,
    max_megapixels: float,
) -> bool:
    """Write the two images of a pair. Returns True if they existed already.

    Raises:
        NoPair: this image gets no partner.
        ShardError: the image's bytes are not those in the index.
    """
    if row["width"] * row["height"] > max_megapixels * _MEGA:
        raise NoPair(f"more than {max_megapixels:g} megapixels")
    with shards.shard_path(sample).open("rb") as tar:
        tar.seek(row["offset"])
        data = tar.read(row["size"])
    if hashlib.sha256(data).digest() != row["sha256"]:
        raise ShardError(
            f"{shards.name(sample)} has other bytes than the index says; run `python -m sharding "
            "verify` on its set"
        )
    prepared = prepare(data)
    facts, pixels = prepared.facts, prepared.pixels
    source = _safe(row["source"], "source")
    file = f"{_safe(row['key'], 'key')}.{IMAGE_FORMATS[row['format']]}"
    real, fake = (folder / source / kind / file for kind in ("real", "fake"))
    if _is_whole(real, fake, data, facts):
        return True
    refuse_partner(data, facts)
    made = encode_like(decoder.reconstruct(pixels), data, pixels, facts)
    for path, content in ((real, data), (fake, made)):
        make_folder(path.parent)
        write_bytes(path, content)
    return False


def _is_whole(real: Path, fake: Path, data: bytes, facts: Facts) -> bool:
    """Return whether this pair exists: the real image's bytes, and a fake with the same facts."""
    if not (real.is_file() and fake.is_file()) or real.read_bytes() != data:
        return False
    try:
        made = vars(prepare(fake.read_bytes()).facts)
    except DecodeError:
        return False
    return made == vars(facts)


def _safe(name: str, kind: str) -> str:
    """Return the name of a set, a source or an image if it is safe in a path.

    Names in an index of the builder are; an index from elsewhere may have others.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", str(name)):
        raise ShardError(f"{kind} {name!r} is no name for a file or folder; build the set again")
    return name


def _catalog_text(name: str, index: Index, decoder: Decoder, counts: dict[str, int]) -> str:
    """Return the catalog of the pairs, with one source for each source of the real images."""
    lines = [
        f"# Real images of {index['set']} and the same through {decoder.name}: written by",
        "# `python -m sharding pairs` when all of them were there.",
        "",
        "[sets]",
        f'{name} = "{index["split"]}"',
    ]
    for source, count in sorted(counts.items()):
        facts = index["sources"][source]
        lines += [
            "",
            f"[sources.{name}-{source}]",
            f"root = {toml_string(f'{name}/{source}')}",
            f"license = {toml_string(facts['license'])}",
            f"homepage = {toml_string(facts['homepage'])}",
            f'set = "{name}"',
            'policy = "dda"          # crop and flip only, so that pairs stay alike',
            "group = '/(?:real|fake)/([^/]+)[.][a-z]+$'",
            f"expected = {{ real = {count}, fake = {count} }}",
            f'real = [{{ folder = "real", generator = {toml_string(source)} }}]',
            f'fake = [{{ folder = "fake", generator = {toml_string(decoder.name)} }}]',
        ]
        lines += ["synthetic = true"] if facts.get("synthetic") else []
        lines += ["test_only = true"] if index["split"] == "test" else []
    return "\n".join(lines) + "\n"
