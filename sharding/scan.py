"""Find the images of each source of a catalog, as files below the raw folder or packed before.

Main entry: `find_sources(catalog, raw, out, tolerance, only)` returns a `SourceScan`; nothing is
decoded or written.

- `catalog`: from `read_catalog()` of sharding/catalog.py.
- `raw`, `out`: the folders of the raw data and of the sets, each a `Path` or `UPath`.
- `tolerance`: a `Tolerance` (`max_bad`: the largest share of missing or unreadable images;
  `allow_incomplete`: whether a catalog rule, or `group`, may match no image, and a download may be
  unfinished). Default: 1 %, False.
- `only`: names of the sets to build (default: all). Downloads for other sets may be unfinished.

A source of the user takes the place of a source of this program (`SHIPPED`) with the same root,
unless the latter was packed before or the user changed a key of it: two sources would divide the
same images.

It raises `CatalogError` if the files contradict the catalog, `RawError` for a broken archive, and
`OSError` if a folder cannot be read.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

import pyarrow as pa

from console import counted, log
from sharding.catalog import SHIPPED, Catalog, CatalogError, Source, read_catalog
from sharding.fetch_spec import BEGUN
from sharding.format import CLASSES
from sharding.inventory import item_table
from sharding.listing import Listing, links_in, list_source
from sharding.raw import folder_of
from sharding.split import capped
from storage import AnyPath, is_local

WORK_FOLDER = ".build"
"""Folder below the output with intermediate results; only a build reads it."""

COUNT_TOLERANCE = 0.02
"""Allowed relative difference between a source's image count and `expected` in the catalog."""


@dataclass
class SourceScan:
    """Result of `find_sources`: the images of each source, and notes on the source's layout.

    `items` and `listings` contain the sources with raw images. `packed_only` names the sources that
    an earlier build packed and whose raw files are gone. `missing` names the sources that have no
    images at all. `empty` contains those of `missing` whose folder exists. `lacking` maps a set of
    which a build has no image of a class, though it could have got some, to these classes.
    """

    items: dict[str, pa.Table] = field(default_factory=dict)
    listings: dict[str, Listing] = field(default_factory=dict)
    packed_only: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    empty: dict[str, Listing] = field(default_factory=dict)
    lacking: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Tolerance:
    """Limits of a build: `tolerance` of `build()`."""

    max_bad: float = 0.01
    allow_incomplete: bool = False
    allow_replaced: bool = False


STRICT = Tolerance()


def find_sources(
    catalog: Catalog,
    raw: AnyPath,
    out: AnyPath,
    tolerance: Tolerance = STRICT,
    only: Sequence[str] = (),
) -> SourceScan:
    """List the images of every catalog source that is on disk or was packed before.

    Raises:
        CatalogError: a layout does not fit the catalog, the number of images differs from
            `expected`, a rule, or every pattern of `group`, matches no file, or a download has
            not finished.
    """
    scan = SourceScan()
    inventory = out / WORK_FOLDER / "inventory"
    replaced = _replaced(catalog, raw)
    for name, source in catalog.sources.items():
        source = replace(source, root=folder_of(raw, source.root or name))
        is_there = (raw / source.root).is_dir()
        is_packed = (inventory / f"{name}.parquet").exists()
        if is_there and name in replaced and not is_packed:
            log.info(
                "folder %s is source %s of your catalog, not the built-in source %s",
                source.root, replaced[name], name,
            )  # fmt: skip
        elif is_there:
            is_wanted = not only or not set(only).isdisjoint(*source.destinations())
            is_unfinished = is_wanted and (raw / source.root / BEGUN).exists()
            if is_unfinished and not tolerance.allow_incomplete:
                names = [name, *(other for other, own in replaced.items() if own == name)]
                fetched = [each for each in names if catalog.sources[each].fetch]
                _refuse_unfinished(name, raw / source.root, fetched)
            listing = list_source(name, source, raw)
            if not listing.items and is_packed:
                scan.packed_only.append(name)  # only the files were deleted, not the folder
            elif listing.items:
                _check_counts(name, source, listing, max(COUNT_TOLERANCE, tolerance.max_bad))
                if listing.unmatched and not tolerance.allow_incomplete:
                    _refuse_unmatched(name, listing, raw / source.root)
                capped(listing, source.cap)
                scan.items[name] = item_table(listing.items)
                scan.listings[name] = replace(listing, items=[])  # the table takes a tenth of it
            else:
                scan.missing.append(name)
                scan.empty[name] = listing
        elif is_packed:
            scan.packed_only.append(name)
        else:
            scan.missing.append(name)
    return scan


def _replaced(catalog: Catalog, raw: AnyPath) -> dict[str, str]:
    """Map a shipped source to the source of the user that has the same root."""
    by_root: dict[object, list[str]] = defaultdict(list)
    for name, source in catalog.sources.items():
        by_root[_place(raw, folder_of(raw, source.root or name))].append(name)
    several = [names for names in by_root.values() if len(names) > 1]
    shipped = read_catalog(SHIPPED).sources if several else {}
    return {
        name: own
        for names in several
        for own in names
        if own not in shipped
        for name in names
        if catalog.sources[name] == shipped.get(name)
    }


def _place(raw: AnyPath, root: str) -> object:
    """Return a value that identifies a folder: `RAID` and `raid` are one folder on a disk that
    ignores case, as on macOS.
    """
    if is_local(raw) and (raw / root).is_dir():
        facts = (raw / root).stat()
        return facts.st_dev, facts.st_ino
    return PurePosixPath(root)


def _refuse_unfinished(name: str, folder: AnyPath, fetched: Sequence[str]) -> None:
    """Raise an error for a download that runs or was interrupted: it may lack a whole class.
    `fetched` are the sources of this folder that `fetch` downloads.
    """
    finish = f"`python -m sharding fetch {fetched[0]}`" if fetched else "the command that began it"
    raise CatalogError(
        f"source {name}: its download to {folder} has not finished (it is running, or was "
        f"interrupted). Finish it with {finish}, or pass --allow-incomplete to pack what is there"
    )


def _refuse_unmatched(name: str, listing: Listing, folder: AnyPath) -> None:
    """Raise an error for rules, or patterns of `group`, without a file: they are misspelled, or the
    data are incomplete.
    """
    shown = "; ".join(listing.unmatched[:4]) + ("; ..." if len(listing.unmatched) > 4 else "")
    raise CatalogError(
        f"source {name}: no file in {folder} matches {shown}{links_in(listing)}. Correct the rule "
        "or pattern, or complete the data. If this is intended, set optional = true in the rule, "
        "remove the pattern, or pass --allow-incomplete"
    )


def _check_counts(name: str, source: Source, listing: Listing, tolerance: float) -> None:
    """Raise an error if the image counts differ from `expected`: a download may be incomplete."""
    counts = Counter(CLASSES[item.label] for item in listing.items)
    for kind, expected in source.expected.items():
        if abs(counts[kind] - expected) > tolerance * expected:
            advice = (
                f"Complete the data (python -m sharding fetch {name})"
                if counts[kind] < expected
                else "Remove what is not part of it"
            )
            raise CatalogError(
                f"source {name} has {counted(counts[kind], f'{kind} image')}, the catalog expects "
                f"{expected:,}. {advice}, raise "
                "--max-bad, or turn off the check in your own catalog: "
                f"[sources.{name}] expected = {{}}"
            )
