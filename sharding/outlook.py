"""Say before a build decodes anything which validation sets will be too small to calibrate on.

Main entry: `warn_of_small(catalog, scan, only)` logs a warning for each validation set that will
have fewer than `CALIBRATION_FEWEST` images of a class. It takes the `Catalog`, the `SourceScan` (of
`find_sources()` in sharding/scan.py) and the names of the sets to build (empty: all). The set of a
group follows from its name alone, so the listing tells the numbers. Copies and unreadable images,
which are found only by decoding, make them smaller. A set with images of sources whose raw files
are gone is not counted.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from console import counted, log
from sharding.catalog import Catalog
from sharding.format import CALIBRATION_FEWEST, CLASSES
from sharding.scan import SourceScan
from sharding.split import choose_set
from storage import parse_json


def warn_of_small(catalog: Catalog, scan: SourceScan, only: Sequence[str]) -> None:
    """Log which validation sets will have too few images of a class to calibrate on."""
    of_packed = {
        name
        for source in scan.packed_only
        for shares in catalog.sources[source].destinations()
        for name in shares
    }
    counts: dict[str, Counter[int]] = {}
    divided: set[str] = set()  # sets that get only a share of some images
    for table in scan.items.values():
        rows = (table.column(name).to_pylist() for name in ("group", "destination", "label"))
        shares_of: dict[str, Mapping[str, float]] = {}
        for group, destination, label in zip(*rows, strict=True):
            shares = shares_of.setdefault(destination, parse_json(destination))
            held = [name for name in shares if catalog.sets[name] == "val"]
            if not held:
                continue
            divided.update(held if len(shares) > 1 else ())
            for name in held:
                counts.setdefault(name, Counter())
            if (name := choose_set(group, shares)) in held:
                counts[name][label] += 1
    for name, by_label in counts.items():
        is_built = (not only or name in only) and name not in of_packed
        if is_built and min(by_label[label] for label in range(len(CLASSES))) < CALIBRATION_FEWEST:
            real, fake = (
                counted(by_label[label], f"{kind} image") for label, kind in enumerate(CLASSES)
            )
            log.warning(
                "set %s will have about %s and %s; a calibration needs %d of each: add images%s",
                name, real, fake, CALIBRATION_FEWEST,
                ", or raise its share in a catalog of yours" if name in divided else "",
            )  # fmt: skip
