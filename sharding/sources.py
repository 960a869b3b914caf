"""List the sources (image data sets) of a catalog: whether each is on disk, whether each is packed
into shard sets, and what the catalog says about it.

Main entries; nothing is printed or written:

- `rows_of(catalog, raw, packed)` returns a list of rows, one per source. A row is a list of texts
  with the headings `COLUMNS`; "-" stands for nothing.
- `facts_of(name, catalog)` returns what the catalog says about the source `name` (page, license,
  size, ...) as a list of lines. It raises `CatalogError` for an unknown name.
- `packed_in(folder)` returns the `Packed` sets directly below a folder.
- `sets_of(source)` returns a sorted list of the names of the sets that the images of a source may
  go to.

Their arguments:

- `catalog`: a `Catalog`, from `read_catalog([BUILT_IN])` of sharding/catalog.py, or of other files.
- `raw`: the raw folder, with a folder for each source as it was downloaded. A `Path`, or a `UPath`
  for an address.
- `packed`: a dict from the name of a source to a list of texts, one per shard set with images of
  this source, such as "val 1,200". Sources that are not packed may be absent.
- `source`: a `Source`, `catalog.sources[name]`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import console
from sharding.catalog import Catalog, CatalogError, Source
from sharding.fetch_spec import BEGUN
from sharding.format import CLASSES, INDEX_FILE, read_index
from sharding.verify import sets_in
from storage import AnyPath

COLUMNS = ("source", "goes to", "on disk", "packed", "images", "size", "license")
"""Headings of the table of `rows_of`."""


@dataclass
class Packed:
    """The shard sets in a folder."""

    images: dict[str, list[str]] = field(default_factory=dict)
    """Sets and numbers of images of each source, such as "val 1,200"."""
    sets: list[list[object]] = field(default_factory=list)
    """A row for each set: name, split, images, sources."""
    damaged: list[str] = field(default_factory=list)
    """Sets whose index cannot be read, each with the reason. They have a row too."""


def packed_in(folder: AnyPath) -> Packed:
    """Read the index of each shard set directly below a folder."""
    packed = Packed()
    for place in sets_in(folder) if any(folder.glob(f"*/{INDEX_FILE}")) else []:
        try:
            index = read_index(place)
        except (ValueError, OSError) as error:
            console.log.debug("traceback", exc_info=True)
            packed.damaged.append(f"{place.name} ({console.one_line(error)})")
            packed.sets.append([place.name, "cannot be read", None, None])
            continue
        packed.sets.append([place.name, index["split"], index["samples"], len(index["sources"])])
        for source, count in index["totals"]["source"].items():
            packed.images.setdefault(source, []).append(f"{index['set']} {count:,}")
    return packed


def rows_of(catalog: Catalog, raw: AnyPath, packed: Mapping[str, list[str]]) -> list[list[str]]:
    """Return one row of `COLUMNS` per source; `packed` gives the sets and image counts of each."""
    return [
        [
            name,
            " ".join(sets_of(source)),
            _on_disk(raw / (source.root or name)),
            ", ".join(packed.get(name, [])) or "-",
            _images(source) or "-",
            source.size or "-",
            source.license,
        ]
        for name, source in catalog.sources.items()
    ]


def _on_disk(folder: AnyPath) -> str:
    if not folder.is_dir():
        return "-"
    return "partly" if (folder / BEGUN).exists() else "yes"


def sets_of(source: Source) -> list[str]:
    """List every set that images of a source may go to."""
    return sorted({name for shares in source.destinations() for name in shares})


def _images(source: Source) -> str:
    """Format the expected number of images per class; empty if the catalog has none."""
    return ", ".join(
        f"{source.expected[kind]:,} {kind}" for kind in CLASSES if kind in source.expected
    )


def facts_of(name: str, catalog: Catalog) -> list[str]:
    """Return all that the catalog says about a source, one fact per line.

    Raises:
        CatalogError: the catalog has no such source.
    """
    if name not in catalog.sources:
        raise CatalogError(f"no source {name}; the catalog has {', '.join(catalog.sources)}")
    source = catalog.sources[name]
    fetch = source.fetch
    brings = "" if fetch is None or fetch.by_hand else f"python -m sharding fetch {name}"
    suites = [suite for suite, sets in catalog.suites.items() if {*sets} & {*sets_of(source)}]
    lines = {
        "title": source.title,
        "page": source.homepage,
        "license": source.license,
        "size": source.size,
        "images": _images(source),
        "goes to": ", ".join(
            f"{set_name} ({catalog.sets[set_name]})" for set_name in sets_of(source)
        ),
        "suites": ", ".join(suites),
        "get it": brings or (" ".join(fetch.by_hand.split()) if fetch else "from its page"),
    }
    shown = [f"    {key}: {value}" for key, value in lines.items() if value]
    return [name, *shown, *(f"    - {fact}" for fact in source.facts)]
