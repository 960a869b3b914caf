"""Look up a suite, which is a named list of sets to evaluate together, in the catalog of data
sources.

Main entry: `open_suite(name, data, catalogs)` takes the name of a suite (such as `wild` or `all`,
from the table `[suites]` of `sharding/catalog-tests.toml`), the path of the folder of all packed
sets (`Path` or `UPath`), and a list of the `Path`s of the user's own catalogs (default: none),
which are read after those of this program. It returns a `Suite`: the `name`, the lists of the names
of its `packed` and of its `missing` sets, and `missing_line`, a sentence that says how to get the
missing ones ("" if none is missing). It raises `ValueError` if there is no such suite (the message
lists all), none of its sets is packed, or a catalog has an error.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sharding.catalog import SHIPPED, read_catalog
from sharding.format import INDEX_FILE
from storage import AnyPath


@dataclass(frozen=True)
class Suite:
    """Packed and missing sets of a suite. `missing_line` says how to get the missing sets."""

    name: str
    packed: list[str]
    missing: list[str]
    missing_line: str


def open_suite(name: str, data: AnyPath, catalogs: Sequence[Path] = ()) -> Suite:
    """Return the suite `name` of the catalog, split into sets packed below `data` and missing sets.
    `catalogs` are the user's own.

    Raises:
        ValueError: no such suite, none of its sets is packed, or a catalog has an error.
    """
    catalog = read_catalog([*SHIPPED, *catalogs])
    if name not in catalog.suites:
        hint = "" if catalogs else "; a suite of your own catalog needs --catalog FILE"
        raise ValueError(f"no suite {name}; the suites are {', '.join(catalog.suites)}{hint}")
    sets = catalog.suites[name]
    packed = [each for each in sets if (data / each / INDEX_FILE).exists()]
    missing = [each for each in sets if each not in packed]
    sources = [
        source_name
        for source_name, source in catalog.sources.items()
        if source.test_only
        and source.fetch
        and any(each in missing for d in source.destinations() for each in d)
    ]
    own = [word for file in catalogs for word in ("--catalog", str(file))]
    module = ["python", "-m", "sharding"]
    fetch = f"`{shlex.join([*module, 'fetch', *sources, *own])}`, then " if sources else ""
    build = shlex.join([*module, "build", "--out", str(data), *own])
    line = (
        f"suite {name}: {len(missing)} of {len(sets)} sets are not packed in {data}: "
        f"{', '.join(missing)}. To get them, run {fetch}`{build}`"
    )
    if not packed:
        raise ValueError(line)
    return Suite(name, packed, missing, line if missing else "")
