"""Refuse a build that would put an image into two sets, or related images into two splits.

Main entry: `refuse_overlaps(out, present, scan, inventory, decision, built)` looks at the sets that
earlier builds packed into `out` and that are not built now. It raises `ShardError` if an image of
such a set, or a duplicate of one, would be in a set that is built, or if a near-duplicate of one,
or an image of its group, would be in a set of another split. It changes nothing.

`warn_of_moves(out, built)` logs how many images an earlier build packed into another set than this
one does: detectors trained before may have learned from images that are in a test set now.

- `present`: the names of the sets that the catalogs of this build send images to.
- `scan`, `inventory`, `decision`: the `SourceScan`, the table of all images of these catalogs, and
  the `Decision` about them.
- `built`: dict from each set that is built to the table of its images, with the columns of
  `samples.parquet` that are known before packing.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from console import counted, log
from escape import reason_of
from sharding.dedupe import Decision, near_duplicates
from sharding.format import SAMPLES_FILE, SAMPLES_SCHEMA, ShardError, table_from
from sharding.inventory import packed_prints
from sharding.plan import sample_key
from sharding.record import packed_sets, packed_sources
from sharding.scan import WORK_FOLDER, SourceScan
from storage import MAX_TABLE_BYTES, AnyPath, read_plain


def refuse_overlaps(
    out: AnyPath,
    present: Sequence[str],
    scan: SourceScan,
    inventory: pa.Table,
    decision: Decision,
    built: Mapping[str, pa.Table],
) -> None:
    """Refuse a set of an earlier build that is not built now, if one of its images, or a duplicate,
    is in a set that is built now, or if a related image is in a built set of another split. Log
    each packed set that gets no image of its sources any more, such as after raw files were
    deleted.

    Raises:
        ShardError: an image, or its duplicate, would be in two sets, or related images in two
            splits; or the table of a set is damaged.
    """
    work = out / WORK_FOLDER
    losing = np.flatnonzero((decision.sets == "") & (decision.other >= 0))
    winning = decision.sets[decision.other[losing]]
    undescribed: dict[str, pa.Table] = {}
    for name in packed_sets(out, work):
        if name in built:
            continue
        packed = _packed_images(out / name)
        keys, hashes = packed.column("key"), packed.column("sha256")
        if name not in present:
            undescribed[name] = packed
        for set_name, samples in built.items():
            lost = inventory.take(pa.array(losing[winning == set_name]))
            names = map(sample_key, *(lost.column(n).to_pylist() for n in ("source", "origin")))
            ties = (
                (keys, samples.column("key").combine_chunks()),
                (hashes, samples.column("sha256").combine_chunks()),
                (keys, pa.array(names, pa.string())),
            )
            both = [pc.is_in(values, here) for values, here in ties]
            count = pc.sum(pc.or_(pc.or_(*both[:2]), both[2])).as_py()
            if not count:
                continue
            said = f"{count:,} of its images, or duplicates of them, would be in set {set_name} too"
            if name in present:
                raise ShardError(
                    f"set {name} is out of date: {said}. Build it in the same run: add --set "
                    f"{name}, or leave out --set (no set was changed)"
                )
            raise _refusal(out, name, said)
        if name not in present and not packed_sources(work / name).isdisjoint(scan.listings):
            log.warning("set %s is out of date: no image goes to it any more; it is kept", name)
    splits = {name: table.column("split")[0].as_py() for name, table in built.items() if len(table)}
    _refuse_relatives(out, undescribed, inventory, decision, splits)


def warn_of_moves(out: AnyPath, built: Mapping[str, pa.Table]) -> None:
    """Log how many packed images change their set, from which to which. Call it before packing: a
    build that is interrupted later logs the same when it is run again.
    """
    packed: dict[str, pa.ChunkedArray] = {}
    for name in packed_sets(out, out / WORK_FOLDER):
        if name in built:
            # Ignore a damaged table, whose content is unknown: the build replaces it.
            with contextlib.suppress(ShardError):
                packed[name] = _packed_images(out / name).column("sha256")
    if not packed:
        return
    names = [*packed]
    set_of = np.repeat(np.arange(len(names)), [len(hashes) for hashes in packed.values()])
    chunks = [chunk for hashes in packed.values() for chunk in hashes.chunks]
    known = pa.chunked_array(chunks, packed[names[0]].type)
    moves = Counter[tuple[str, str]]()
    for name, table in built.items():
        where = pc.index_in(table.column("sha256"), value_set=known).drop_null()
        counts = np.bincount(set_of[where.to_numpy()], minlength=len(names))
        moves += Counter({(old, name): int(count) for old, count in zip(names, counts, strict=True)
                          if old != name})  # fmt: skip
    if moves:
        log.warning(
            "%s packed before %s set (%s); detectors trained before may have learned from those "
            "that were in a training set",
            counted(moves.total(), "image"),
            "changes its" if moves.total() == 1 else "change their",
            ", ".join(f"{old} -> {new}: {count:,}" for (old, new), count in sorted(moves.items())),
        )


def _refusal(out: AnyPath, name: str, said: str) -> ShardError:
    return ShardError(
        f"this build packs nothing into set {name}, and {said}. Correct the catalog, pass the "
        f"--catalog of that set too, or delete {out / name} and build again (no set was changed)"
    )


def _refuse_relatives(
    out: AnyPath,
    packed: Mapping[str, pa.Table],
    inventory: pa.Table,
    decision: Decision,
    splits: Mapping[str, str],
) -> None:
    """Refuse packed sets with near-duplicates of images of another split, or images of their group.

    `packed` are the sets that no catalog of this build describes; `splits` are those of built sets.

    Raises:
        ShardError: a set has such images.
    """
    tables = {
        name: table
        for name, table in packed.items()
        if len(table) and {*splits.values()} - {table.column("split")[0].as_py()}
    }
    if not tables:
        return
    good = np.asarray(pc.equal(inventory.column("error"), "").to_numpy(), bool)
    rows = np.flatnonzero(good & np.array([name in splits for name in decision.sets], bool))
    here = inventory.take(pa.array(rows))
    sets = decision.sets[rows].tolist()
    set_of_group = dict(zip(here.column("group").to_pylist(), sets, strict=True))
    set_of_group |= dict(zip(decision.groups[rows].tolist(), sets, strict=True))
    prints = [_prints(table, out / WORK_FOLDER / "inventory") for table in tables.values()]
    # This build's images come first: `near_duplicates` pairs each row with the first of equal hash.
    phash = [table.column("phash").to_numpy() for table in (here, *tables.values())]
    columns = [here.column("thumbnail"), *(column for column, _groups in prints)]
    thumbnails = [_thumbnails(column) for column in columns]
    pairs = near_duplicates(np.concatenate(phash), np.concatenate(thumbnails))
    pairs = pairs[pairs[:, 0] < len(rows)]
    start = len(rows)
    for (name, table), (column, groups) in zip(tables.items(), prints, strict=True):
        split, known = table.column("split")[0].as_py(), np.asarray(column.is_valid())
        a, b = pairs[(start <= pairs[:, 1]) & (pairs[:, 1] < start + len(table))].T
        b = b - start
        # Without a thumbnail, only equal hashes count.
        alike = known[b] | (phash[0][a] == table.column("phash").to_numpy()[b])
        related = {*zip(b[alike].tolist(), (sets[row] for row in a[alike].tolist()), strict=True)}
        for row, names in enumerate(groups):
            related |= {(row, set_of_group[group]) for group in names if group in set_of_group}
        counts = Counter(other for _row, other in related if splits[other] != split)
        for other, count in sorted(counts.items()):
            raise _refusal(
                out, name,
                f"{count:,} of its images are near-duplicates of images of set {other}, or in a "
                f"group with them, but the splits are {split} and {splits[other]}",
            )  # fmt: skip
        start += len(table)


def _prints(table: pa.Table, folder: AnyPath) -> tuple[pa.ChunkedArray, list[set[str]]]:
    """Return the thumbnails of the images of a packed set, null if they are unknown, and the groups
    of each image: the one in the set, after merging near-duplicates, and the one before.
    """
    thumbnails: dict[str, bytes] = {}
    groups: dict[str, str] = {}
    for source in table.column("source").unique().to_pylist():
        if (known := packed_prints(folder, source)) is not None:
            origins = known.column("origin").to_pylist()
            thumbnails |= zip(origins, known.column("thumbnail").to_pylist(), strict=True)
            groups |= zip(origins, known.column("group").to_pylist(), strict=True)
    origins, merged = (table.column(name).to_pylist() for name in ("origin", "group"))
    column = pa.chunked_array([pa.array([thumbnails.get(o) for o in origins], pa.binary(256))])
    return column, [{group, groups.get(o, group)} for o, group in zip(origins, merged, strict=True)]


def _thumbnails(column: pa.ChunkedArray) -> np.ndarray:
    """Return thumbnails as an array, (n, 256) uint8; unknown ones are black."""
    texts = [text or bytes(256) for text in column.to_pylist()]
    return np.frombuffer(b"".join(texts), np.uint8).reshape(-1, 256)


def _packed_images(folder: AnyPath) -> pa.Table:
    """Return the table of the images of a packed set, empty if it is unfinished.

    Raises:
        ShardError: its table is damaged.
    """
    path = folder / SAMPLES_FILE
    try:
        table = (
            table_from(read_plain(path, MAX_TABLE_BYTES))
            if path.exists()
            else SAMPLES_SCHEMA.empty_table()
        )
        return table.select(["key", "sha256", "source", "origin", "split", "group", "phash"])
    except (KeyError, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        reason = reason_of(error)
        raise ShardError(
            f"{path} is damaged ({reason}); delete {folder} and build it again"
        ) from error
