"""Refuse a build that would replace all packed images of a source, such as by those of another
folder that has got its name.

Main entry: `refuse_replaced(out, sets, files, tables)` raises `ShardError` for a source that is
packed in one of these sets if no image of its inventory is in the new inventory, of any source. It
changes nothing, and must be called before the new inventory is written.

- `out`: the folder of all sets, a `Path` or `UPath`. `sets`: the names of those in the catalog; a
  build leaves others as they are.
- `files`: dict from each source to the paths of its files in the inventory.
- `tables`: dict from each source to the table of its images in the new inventory.
"""

from collections.abc import Collection, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from console import counted
from sharding.format import ShardError
from sharding.inventory import packed_originals
from sharding.record import packed_sets, packed_sources
from sharding.scan import WORK_FOLDER
from storage import AnyPath


def refuse_replaced(
    out: AnyPath,
    sets: Collection[str],
    files: Mapping[str, Sequence[AnyPath]],
    tables: Mapping[str, pa.Table],
) -> None:
    """Refuse to drop all packed images of a source because other files are listed in their place.

    The bytes of raw files decide, so that a folder may be renamed and its images may move to
    another source. A source whose only file is its inventory has no new image.

    Raises:
        ShardError: a packed source would lose all of its images.
    """
    changed = [name for name, paths in files.items() if name in tables and len(paths) > 1]
    if not changed:
        return
    work = out / WORK_FOLDER
    folder = work / "inventory"
    earlier = [name for name in packed_sets(out, work) if name in sets]
    packed = set[str]().union(*(packed_sources(work / name) for name in earlier))
    for name in sorted(packed.intersection(changed)):
        before = packed_originals(folder, name)
        if before is None or not before.num_rows:
            continue
        originals = before.column("original")
        # First the images of the source itself: for nearly all sources they decide.
        if not any(
            pc.any(pc.is_in(originals, table.column("original").combine_chunks())).as_py()
            for table in (tables[name], *tables.values())
        ):
            raise ShardError(
                f"source {name} is packed with {counted(before.num_rows, 'image')}, such as "
                f"{before.column('origin')[0]}, and none of them is among its "
                f"{counted(tables[name].num_rows, 'image')} now, such as "
                f"{tables[name].column('origin')[0]}: the packed ones would be deleted. If this is "
                "another folder, give its source and its sets other names in its catalog, and "
                f"pass the --catalog of both. To drop the packed images, delete "
                f"{folder / name}.parquet (no set was changed)"
            )
