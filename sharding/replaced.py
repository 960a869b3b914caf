"""Refuse a build that would replace all packed images of a source, such as by those of another
folder that has got its name.

Main entry: `refuse_replaced(raw, out, sets, files, tables)` raises `ShardError` for sources that
are packed in one of these sets if no image of their inventory is in the new inventory, of any
source, or still in the raw folder. It changes nothing, and must be called before the new inventory
is written.

- `raw`: the folder of the raw files, a `Path` or `UPath`.
- `out`: the folder of all sets, likewise. `sets`: the names of those in the catalog; a build leaves
  others as they are.
- `files`: dict from each source to the paths of its files in the inventory.
- `tables`: dict from each source to the table of its images in the new inventory.
"""

import contextlib
import hashlib
from collections.abc import Collection, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from console import counted
from sharding.format import ShardError
from sharding.inventory import packed_originals
from sharding.raw import RawError, read_all
from sharding.record import packed_sets, packed_sources
from sharding.scan import WORK_FOLDER
from storage import AnyPath

LOOKED_AT = 1000
"""Number of packed images of a source that are looked for in the raw folder. A source that only
grew beyond its cap has all of them there.
"""


def refuse_replaced(
    raw: AnyPath,
    out: AnyPath,
    sets: Collection[str],
    files: Mapping[str, Sequence[AnyPath]],
    tables: Mapping[str, pa.Table],
) -> None:
    """Refuse to drop all packed images of a source because other files are listed in their place.

    The bytes of raw files decide, so that a folder may be renamed and its images may move to
    another source. A source whose only file is its inventory has no new image.

    Raises:
        ShardError: packed sources would lose all of their images.
    """
    changed = [name for name, paths in files.items() if name in tables and len(paths) > 1]
    if not changed:
        return
    work = out / WORK_FOLDER
    folder = work / "inventory"
    earlier = [name for name in packed_sets(out, work) if name in sets]
    packed = set[str]().union(*(packed_sources(work / name) for name in earlier))
    replaced: dict[str, str] = {}
    for name in sorted(packed.intersection(changed)):
        before = packed_originals(folder, name)
        if before is None or not before.num_rows:
            continue
        originals = before.column("original")
        # Compare with the source itself first: that suffices for nearly all sources.
        if any(
            pc.any(pc.is_in(originals, table.column("original").combine_chunks())).as_py()
            for table in (tables[name], *tables.values())
        ) or _still_there(raw, before):
            continue
        replaced[name] = (
            f"source {name} had {counted(before.num_rows, 'image')}, such as "
            f"{before.column('origin')[0]}, and none of them is among its "
            f"{counted(tables[name].num_rows, 'image')} now, such as "
            f"{tables[name].column('origin')[0]}"
        )
    if replaced:
        inventories = ", ".join(f"{folder / name}.parquet" for name in replaced)
        raise ShardError(
            f"{'; '.join(replaced.values())}: what is packed of them would be deleted. If this is "
            "another folder, give its source and its sets other names in its catalog, and pass the "
            "--catalog of both. If all images were replaced or compressed again on purpose, delete "
            f"{inventories} (no set was changed)"
        )


def _still_there(raw: AnyPath, before: pa.Table) -> bool:
    """Return whether a raw file of an image that is not listed any more is unchanged, such as an
    image that exceeds a `cap` now. The first `LOOKED_AT` images are looked for.
    """
    for row in before.slice(0, LOOKED_AT).to_pylist():
        with contextlib.suppress(RawError, OSError):
            for data in read_all(raw, [row]):
                if isinstance(data, bytes) and hashlib.sha256(data).digest() == row["original"]:
                    return True
    return False
