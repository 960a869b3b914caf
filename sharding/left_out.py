"""List what a build leaves out: files and images that are in no set, as lines of text.

Main entry: `left_out(built, scan, out)` takes what `sharding.build.build()` returns, the list of
`BuiltSet`s and the `SourceScan`, and the folder of the sets. `files_left_out(scan)` returns the
part on files, from which no set was made.
"""

from collections.abc import Sequence

from console import counted
from sharding.build import BuiltSet, Excluded, why_lacking
from sharding.format import CLASSES, EXCLUDED_FILE, INDEX_FILE
from sharding.scan import SourceScan
from storage import AnyPath


def left_out(built: Sequence[BuiltSet], scan: SourceScan, out: AnyPath) -> list[str]:
    """Return a line per unreadable image, per reason and set, per reason and source, and per set
    that got no image, or no image of a class.
    """
    lines = []
    for built_set in built:
        quarantined = built_set.index["quarantined"]
        lines += [f"quarantined: {entry['path']}: {entry['reason']}" for entry in quarantined[:5]]
        if len(quarantined) > 5:
            lines.append(f"... and more: see quarantined in {out / built_set.name / INDEX_FILE}")
        by_reason: dict[str, list[Excluded]] = {}
        for row in built_set.excluded:
            by_reason.setdefault(row.reason, []).append(row)
        for reason, rows in sorted(by_reason.items()):
            first = " and ".join(filter(None, (rows[0].origin, rows[0].conflicts_with)))
            rest = f"; all: {out / built_set.name / EXCLUDED_FILE}" if len(rows) > 1 else ""
            images = counted(len(rows), "image")
            lines.append(
                f"excluded from {built_set.name}: {images}: {reason} (first: {first}{rest})"
            )
    lines += files_left_out(scan)
    of_name = {built_set.name: built_set for built_set in built}
    for name, kinds in scan.lacking.items():
        one = of_name.get(name)
        what = f"{kinds[0]} image" if one and one.index["samples"] else "image"
        why = why_lacking(one.excluded, CLASSES.index(kinds[0])) if one else ""
        is_lost = why or (one and one.index["quarantined"])
        advice = "" if is_lost else ", or raise its share in a catalog of yours"
        lines.append(f"no {what} went to set {name}{why}; add images{advice}")
    return lines


def files_left_out(scan: SourceScan) -> list[str]:
    """Return a line for each source without images, and one per source and reason for excluded
    files.
    """
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
