"""List what a build leaves out: files and images that are in no set, as lines of text.

Main entry: `left_out(built, scan, out)` takes what `sharding.build.build()` returns, the list of
`BuiltSet`s and the `SourceScan`, and the folder of the sets. `files_left_out(scan)` returns the
part that is about files which no set was made of.
"""

from collections.abc import Sequence

from console import counted
from sharding.build import BuiltSet
from sharding.format import INDEX_FILE
from sharding.scan import SourceScan
from storage import AnyPath


def left_out(built: Sequence[BuiltSet], scan: SourceScan, out: AnyPath) -> list[str]:
    """Return a line per unreadable image, reason and set, and per source and reason."""
    lines = []
    for built_set in built:
        quarantined = built_set.index["quarantined"]
        lines += [f"quarantined: {entry['path']}: {entry['reason']}" for entry in quarantined[:5]]
        if len(quarantined) > 5:
            lines.append(f"... and more: see quarantined in {out / built_set.name / INDEX_FILE}")
        lines += [
            f"excluded from {built_set.name}: {counted(count, 'image')}: {reason}"
            for reason, count in built_set.index["excluded"].items()
        ]
    return lines + files_left_out(scan)


def files_left_out(scan: SourceScan) -> list[str]:
    """Return a line for each source without images, and per source and reason."""
    lines = []
    for source, listing in (scan.listings | scan.empty).items():
        if listing.ungrouped:
            lines.append(f"{source}: {listing.ungrouped}")
        if source in scan.empty:
            lines.append(f"no image in source: {source}")
        lines += [
            f"excluded: {source}: {counted(entry['files'], 'file')}: {reason} "
            f"(first: {entry['first'][0]})"
            for reason, entry in listing.excluded.items()
        ]
    return lines
