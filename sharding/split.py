"""Choose which images of a source are packed, and into which set.

`capped(listing, cap)` takes a `Listing` (of `list_source()` in `sharding/listing.py`) and a dict,
class ("real" or "fake") -> largest number of its images. It removes the items beyond it, in place.
`choose_set(group, share_of)` returns the set of a group; `share_of` is a dict, set -> share, and
the shares sum to 1. `hash_point(text)` returns a number from 0 to below 1. No file is read.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from sharding.format import CLASSES
from sharding.listing import Item, Listing


def capped(listing: Listing, cap: Mapping[Any, int]) -> None:
    """Keep at most `cap[class]` items of each class, in the order of a hash of their groups.

    Whole groups are kept: an image and its partner stay together. A part of a group is kept only if
    each group of the class is larger than the cap. The hash is another one than in `choose_set`, or
    all kept groups would go to the first set. The choice depends only on this source.
    """
    if not cap:
        return
    groups: dict[str, list[Item]] = {}
    for item in listing.items:
        groups.setdefault(item.group, []).append(item)
    order = sorted(groups, key=lambda group: hash_point(f"cap {group}"))
    room = [cap.get(name, len(listing.items)) for name in CLASSES]
    kept: set[Item] = set()
    for group in order:
        need = [sum(item.label == label for item in groups[group]) for label in range(len(CLASSES))]
        if all(n <= r for n, r in zip(need, room, strict=True)):
            kept.update(groups[group])
            room = [r - n for n, r in zip(need, room, strict=True)]
    for label in {0, 1} - {item.label for item in kept}:
        of_label = (item for group in order for item in groups[group] if item.label == label)
        kept.update(item for item, _ in zip(of_label, range(room[label]), strict=False))
    reason = "beyond the cap of " + ", ".join(f"{count:,} {name}" for name, count in cap.items())
    for item in listing.items:
        if item not in kept:
            listing.exclude(reason, item.origin)
    listing.items = [item for item in listing.items if item in kept]


def hash_point(text: str) -> float:
    """Map a text to a point in [0, 1) by its hash, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def choose_set(group: str, share_of: Mapping[str, float]) -> str:
    """Choose the set of a group: the shares divide [0, 1), and the group's hash is a point in it.

    The choice depends only on the group's name, the first one of the groups that near-duplicates
    join: a new file moves old ones to another set only if it changes that name.
    """
    point = hash_point(group)
    for name, share in share_of.items():
        if point < share:
            return name
        point -= share
    return name
