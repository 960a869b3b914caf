"""What goes into which shard: items in, shard plans out. Pure, and the same for the same items."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

from sharding.format import FORMAT_VERSION, shard_name
from sharding.layouts import Item

MAX_SAMPLES = 2048
MAX_BYTES = 256 * 2**20
"""A shard ends at whichever comes first: large enough to stream, small enough to redo."""


@dataclass(frozen=True)
class ShardPlan:
    """One tar to write. `fingerprint` changes whenever its content would."""

    name: str
    split: str
    items: tuple[tuple[str, Item], ...]  # (key, item)
    fingerprint: str


def sample_key(item: Item) -> str:
    """A key that is unique in its set, free of dots, and the same on every machine."""
    return f"{item.source}_{hashlib.sha256(item.origin.encode()).hexdigest()[:16]}"


def plan_shards(items: Iterable[Item], split: str) -> list[ShardPlan]:
    """The shards of one set. Inside a source, items go in the order of their keys' hashes.

    So a shard mixes the labels and generators of its source, and adding a file moves no other
    file past its neighbours.

    Raises:
        ValueError: two files with one key (a hash collision, or a path listed twice).
    """
    keyed = sorted((item.source, sample_key(item), item) for item in items)
    for (_, left, a), (_, right, b) in pairwise(keyed):
        if left == right:
            raise ValueError(f"{a.origin} and {b.origin} have one key, {left}; rename one of them")
    plans = []
    for source, entries in groupby(keyed, key=lambda entry: entry[0]):
        for number, chunk in enumerate(_chunks((key, item) for _, key, item in entries)):
            name = shard_name(source, split, number)
            plans.append(ShardPlan(name, split, chunk, _fingerprint(name, chunk)))
    return plans


def _chunks(entries: Iterable[tuple[str, Item]]) -> Iterator[tuple[tuple[str, Item], ...]]:
    chunk: list[tuple[str, Item]] = []
    size = 0
    for key, item in entries:
        if chunk and (len(chunk) == MAX_SAMPLES or size + item.size > MAX_BYTES):
            yield tuple(chunk)
            chunk, size = [], 0
        chunk.append((key, item))
        size += item.size
    if chunk:
        yield tuple(chunk)


def _fingerprint(name: str, chunk: tuple[tuple[str, Item], ...]) -> str:
    """Everything a shard is made from, files by size and time of change."""
    content = [FORMAT_VERSION, name, [[key, *item._replace(path="")] for key, item in chunk]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
