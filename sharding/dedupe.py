"""Find duplicates in all sources and assign each image to a set, so that splits never overlap.

Main entry: `decide(inventory, split_of, exclude)` changes nothing and returns a `Decision`.

- `inventory`: a pyarrow table with one row per raw image of all sources: the concatenated tables of
  `join_facts()` in sharding/inventory.py. The columns `error`, `sha256` (of the bytes
  to pack), `original` (SHA-256 of the bytes that were read), `phash`, `thumbnail`, `group`, `label`
  and `destination` (JSON, a dict from set to share) are used.
- `split_of`: dict from the name of a set to "train", "val" or "test"; `sets` of a `Catalog`. It
  must have every set that a `destination` names (`KeyError` if an image goes to a missing one).
- `exclude`: a collection of texts, the first hexadecimal digits (lower case) of the SHA-256 of
  images that may go to no shard set, of the bytes to pack or of those that were read; `exclude` of
  a `Catalog`. Default: empty.

A `Decision` has five NumPy arrays with one value per row:

- `wanted`: the set that the image was meant for.
- `sets`: its final set, or "" if it is excluded.
- `reasons`: why it is excluded, or "" if it is not.
- `other`: the row of the image that is kept instead, or -1. If the same bytes (as packed) are
  labeled real in one row and fake in another, all rows with these bytes are excluded, and it is
  the first one of the other label.
- `groups`: the name of its group.

A row with an `error` (an image that cannot be decoded) keeps its set: the caller drops such rows.

Related images (a pair, a prompt, a video, near-duplicates) form one group, also across sources. If
the images of a group would go to several splits, only those of the highest-ranked split
(`SPLIT_RANK`) are kept. Of exact duplicates one is kept, or none if they are labeled real and fake.
Images that are excluded for such labels do not decide the split of a group, but they still connect
similar images to one group.

`near_duplicates(phash, thumbnails)` takes uint64 (n,) and uint8 (n, 256) and returns pairs of rows,
(m, 2). Both rows have equal perceptual hashes, or hashes that differ in at most `MAX_BITS` bits and
thumbnails that differ by at most `MAX_DIFFERENCE` gray levels on average.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.format import codes_of
from sharding.split import choose_set
from storage import parse_json

MAX_BITS = 6
"""Maximum number of different bits in the pHashes (64 bits) of near-duplicates."""

MAX_DIFFERENCE = 8.0
"""Maximum mean difference of the thumbnails of near-duplicates, in gray levels (0 to 255). Together
with MAX_BITS, at least 98.9 % of re-encoded and resized copies are found, and none of 72,000 pairs
of different images (docs/log.md)."""

BOTH_LABELS = "are labeled real and fake"
"""End of the reason of images that are excluded because their content has both labels."""

EXCLUDED_BY_CATALOG = "its SHA-256 stands in a list that the catalog excludes"

SPLIT_RANK = {"train": 0, "val": 1, "test": 2}
"""Priority of the splits for duplicates: test before val before train."""


@dataclass(frozen=True)
class Decision:
    """Assignment of the images to sets; every array has one entry per image, (n,).

    `wanted` is the set of an image before duplicates are removed. `sets` is its final set, or "" if
    the image is excluded for the reason in `reasons`. `other` is the row of the image that is kept
    instead, or -1 (for bytes labeled real and fake, a row with these bytes of the other label).
    `groups` is the name of its group after merging.
    """

    wanted: np.ndarray  # object
    sets: np.ndarray  # object
    reasons: np.ndarray  # object
    other: np.ndarray  # int64
    groups: np.ndarray  # object


def decide(
    inventory: pa.Table, split_of: Mapping[str, str], exclude: Collection[str] = ()
) -> Decision:
    """Assign every row of an inventory to a set, or exclude it.

    `split_of` gives the split of each set; of two sets with the same split, the first one keeps a
    duplicate. `exclude` contains the first digits of the SHA-256 of images that go to no set,
    as files or as they are packed.
    """
    n = inventory.num_rows
    good = np.asarray(pc.equal(inventory.column("error"), "").to_numpy(), bool)
    hashes = (inventory.column(name) for name in ("sha256", "original"))
    named = good & np.logical_or.reduce([_begins_with(column, exclude) for column in hashes])
    good &= ~named
    rows = np.flatnonzero(good)
    group_code, group_names = codes_of(inventory.column("group"))
    sha = _bytes_of(inventory.column("sha256"), 32).view(np.uint64)
    phash = inventory.column("phash").to_numpy()
    thumbnails = _bytes_of(inventory.column("thumbnail"), 256)
    near = near_duplicates(phash[rows], thumbnails[rows])
    near = rows[near]
    same, same_of = _same_bytes(sha, rows)
    edges = np.concatenate([near, np.stack([same, same_of], axis=1)])
    component = _components(len(group_names), group_code[edges])[group_code]
    names = _component_names(component, group_code, group_names)
    destination_code, destinations = codes_of(inventory.column("destination"))
    share_of = [parse_json(destination) for destination in destinations]
    chosen: dict[tuple[int, int], str] = {}
    sets = np.empty(n, object)
    for row, key in enumerate(zip(component.tolist(), destination_code.tolist(), strict=True)):
        if key not in chosen:
            chosen[key] = choose_set(names[key[0]], share_of[key[1]])
        sets[row] = chosen[key]
    decision = Decision(
        sets.copy(),
        sets,
        np.full(n, "", object),
        np.full(n, -1),
        np.array([names[c] for c in component], object),
    )
    labels = inventory.column("label").to_numpy()
    files = _bytes_of(inventory.column("original"), 32).view(np.uint64)
    good &= ~_exclude_both_labels(decision, sha, files, labels, good)
    ranks = {name: SPLIT_RANK[split] for name, split in split_of.items()}
    rank = np.array([ranks[name] for name in decision.wanted], np.int8)
    losing = _losing(rank, component, good)
    decision.sets[losing] = ""
    _keep_one_of_each(decision, sha, files, good, split_of)
    _name_winners(decision, losing, rank, component, near, good)
    decision.sets[named] = ""
    decision.reasons[named] = EXCLUDED_BY_CATALOG
    return decision


def _begins_with(hashes: pa.ChunkedArray, beginnings: Collection[str]) -> np.ndarray:
    """Return a mask of the hashes that begin with one of `beginnings` (hexadecimal digits)."""
    if not beginnings:
        return np.zeros(len(hashes), bool)
    lengths = sorted({len(digits) for digits in beginnings})
    texts = [digest.hex() for digest in hashes.to_pylist()]
    return np.array([any(text[:n] in beginnings for n in lengths) for text in texts], bool)


def _exclude_both_labels(
    decision: Decision, sha: np.ndarray, files: np.ndarray, labels: np.ndarray, good: np.ndarray
) -> np.ndarray:
    """Exclude all images whose bytes or pixels are labeled real and fake; return a mask of them."""
    both = np.zeros(len(good), bool)
    for run in _runs(sha, np.flatnonzero(good)):
        if len(set(labels[run].tolist())) > 1:
            both[run] = True
            decision.reasons[run] = f"the same {_equal_part(files[run])} {BOTH_LABELS}"
            for label in (0, 1):
                decision.other[run[labels[run] == label]] = run[labels[run] != label][0]
    decision.sets[both] = ""
    return both


def _equal_part(files: np.ndarray) -> str:
    """Return what images that are packed as the same bytes have in common: the bytes of their
    files, or only the pixels.
    """
    return "bytes" if (files == files[0]).all() else "pixels"


def _losing(rank: np.ndarray, component: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Return the rows whose group has an image of a higher-ranked split."""
    best = np.full(component.max(initial=-1) + 1, -1, np.int8)
    np.maximum.at(best, component[good], rank[good])
    return np.flatnonzero(good & (rank < best[component]))


def _keep_one_of_each(
    decision: Decision,
    sha: np.ndarray,
    files: np.ndarray,
    good: np.ndarray,
    split_of: Mapping[str, str],
) -> None:
    """Keep the first of images that are packed as the same bytes, by set and row."""
    order = {name: index for index, name in enumerate(_by_rank(split_of))}
    for run in _runs(sha, np.flatnonzero(good)):
        kept = [row for row in run.tolist() if decision.sets[row]]
        kept.sort(key=lambda row: (order[str(decision.sets[row])], row))
        for row in kept[1:]:
            part = _equal_part(files[[row, kept[0]]])
            decision.reasons[row] = f"the same {part} as an image of {decision.sets[kept[0]]}"
            decision.other[row] = kept[0]
            decision.sets[row] = ""


def _name_winners(
    decision: Decision,
    losing: np.ndarray,
    rank: np.ndarray,
    component: np.ndarray,
    near: np.ndarray,
    good: np.ndarray,
) -> None:
    """Name for each of the rows `losing` one image of the winning split that is kept: a direct
    near-duplicate if there is one.
    """
    won = good.copy()
    won[losing] = False
    # Replace an excluded exact copy by the copy that is kept.
    kept = np.where(won & (decision.other >= 0), decision.other, np.arange(len(rank)))
    winners = np.flatnonzero(won)
    one_of = np.full(component.max(initial=-1) + 1, -1)
    one_of[component[winners[::-1]]] = kept[winners[::-1]]
    direct = np.full(len(rank), -1)
    for a, b in ((near[:, 0], near[:, 1]), (near[:, 1], near[:, 0])):
        higher = won[b] & (rank[a] < rank[b])
        direct[a[higher]] = kept[b[higher]]
    for row in losing:
        winner = direct[row] if direct[row] >= 0 else one_of[component[row]]
        what = "near-duplicate of" if direct[row] >= 0 else "belongs to the group of"
        decision.reasons[row] = f"{what} an image of {decision.sets[winner]}"
        decision.other[row] = winner


def _by_rank(split_of: Mapping[str, str]) -> list[str]:
    return sorted(split_of, key=lambda name: -SPLIT_RANK[split_of[name]])


def near_duplicates(phash: np.ndarray, thumbnails: np.ndarray) -> np.ndarray:
    """Return pairs of near-duplicate rows, (m, 2): equal pHashes, or pHashes within `MAX_BITS` and
    thumbnails within `MAX_DIFFERENCE`.

    `phash` is (n,) uint64, `thumbnails` (n, 256) uint8. Each row is paired with the first row of
    equal pHash, whatever their thumbnails (a brightened copy keeps its pHash). Only the first 16
    rows of each pHash are compared with other pHashes.

    The search divides the 64 bits into k + 6 bands. Two hashes that differ in at most 6 bits agree
    on at least k bands, so a sort by each choice of k bands puts them into one run of equal keys.
    The cost is linear in n: 84 sorts with k = 3, or 462 with k = 5. The longer keys of k = 5 keep
    the runs short for millions of images.
    """
    star, rows = _equal_hashes(phash)
    pairs_of_bands = [star]
    hashes = phash[rows]
    keep = 3 if len(rows) < 4_000_000 else 5
    edges = np.linspace(0, 64, MAX_BITS + keep + 1).astype(int)
    masks = [((1 << (b - a)) - 1) << a for a, b in pairwise(edges.tolist())]
    for bands in combinations(masks, keep):
        key = hashes & np.uint64(sum(bands))
        # Report a pair only for the first matching choice of bands, or it would come repeatedly.
        before = [mask for mask in masks[: masks.index(bands[-1])] if mask not in bands]
        order = np.argsort(key, kind="stable")
        key = key[order]
        active = np.arange(len(key) - 1)
        distance = 0
        while len(active):
            distance += 1
            active = active[active + distance < len(key)]
            active = active[key[active] == key[active + distance]]
            if not len(active):  # saves most of the time if there are few images
                break
            a, b = order[active], order[active + distance]
            differing = hashes[a] ^ hashes[b]
            bits = np.bitwise_count(differing)
            close = (bits > 0) & (bits <= MAX_BITS)
            for mask in before:
                close &= (differing & np.uint64(mask)) != 0
            pairs = np.stack([rows[a[close]], rows[b[close]]], axis=1)
            pairs_of_bands.append(pairs[_alike(thumbnails, pairs)])
    pairs = np.sort(np.concatenate(pairs_of_bands), axis=1)
    # Each pair as one integer: `np.unique` of rows takes ten times as long.
    return np.stack(np.divmod(np.unique(pairs @ [len(phash), 1]), max(len(phash), 1)), axis=1)


def _equal_hashes(phash: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of each row with the first row of equal hash, and the first 16 rows per hash."""
    order = np.argsort(phash, kind="stable")
    equal = np.r_[False, phash[order[1:]] == phash[order[:-1]]][: len(order)]
    start = np.maximum.accumulate(np.where(equal, 0, np.arange(len(order))))
    star = np.stack([order[start[equal]], order[equal]], axis=1)
    return star, order[np.arange(len(order)) - start < 16]


def _alike(thumbnails: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return a mask of the pairs with similar thumbnails; computed in parts to save memory."""
    alike = np.empty(len(pairs), bool)
    for start in range(0, len(pairs), 65536):
        a, b = thumbnails[pairs[start : start + 65536].T].astype(np.int16)
        alike[start : start + 65536] = np.abs(a - b).mean(axis=1) <= MAX_DIFFERENCE
    return alike


def _same_bytes(sha: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows whose bytes occurred before, and for each the first row with these bytes."""
    runs = _runs(sha, rows)
    if not runs:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return (
        np.concatenate([run[1:] for run in runs]),
        np.concatenate([np.full(len(run) - 1, run[0]) for run in runs]),
    )


def _runs(sha: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Group `rows` by equal hash: groups of two or more rows, in ascending order."""
    keys = sha[rows]
    order = np.lexsort(keys.T)  # stable: equal hashes keep the order of rows
    equal = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    starts = np.flatnonzero(np.r_[True, ~equal])
    ends = np.r_[starts[1:], len(rows)]
    long = ends - starts > 1
    return [rows[order[a:b]] for a, b in zip(starts[long], ends[long], strict=True)]


def _components(count: int, edges: np.ndarray) -> np.ndarray:
    """Return the connected component of each of `count` nodes: the smallest node it reaches."""
    label = np.arange(count)
    edges = edges[edges[:, 0] != edges[:, 1]] if len(edges) else np.empty((0, 2), np.int64)
    while len(edges):
        a, b = label[edges[:, 0]], label[edges[:, 1]]
        edges, a, b = edges[a != b], a[a != b], b[a != b]
        low, high = np.minimum(a, b), np.maximum(a, b)
        np.minimum.at(label, high, low)
        while (label != label[label]).any():
            label = label[label]
    return label


def _component_names(
    component: np.ndarray, group_code: np.ndarray, group_names: list[str]
) -> dict[int, str]:
    """Name each component by the alphabetically first of its groups."""
    names: dict[int, str] = {}
    for code, part in dict(zip(group_code.tolist(), component.tolist(), strict=True)).items():
        name = group_names[code]
        if part not in names or name < names[part]:
            names[part] = name
    return names


def _bytes_of(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """Convert a column of fixed-size bytes to an array (n, width) of uint8."""
    if not len(column):
        return np.empty((0, width), np.uint8)
    chunks = [
        np.frombuffer(chunk.buffers()[1], np.uint8)[
            chunk.offset * width : (chunk.offset + len(chunk)) * width
        ].reshape(-1, width)
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.ascontiguousarray(np.concatenate(chunks))
