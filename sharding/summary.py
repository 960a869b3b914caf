"""Print the results of the commands that build, pair and audit shard sets (images packed in tars)
as tables and lines in a terminal.

Main entries: four functions, which print to standard output and return nothing. A path is a `Path`,
or a `UPath` for an address.

- `say_what_was_built(built, scan, out)` takes the list of `BuiltSet`s and the `SourceScan` (images
  of each source), and the path of the output. `sharding.build.build()` returns both as the pair
  (`scan`, `built`).
- `say_what_is_missing(catalog, scan, raw)` is for a build that found no image. It takes the
  `Catalog` (from `read_catalog()` of sharding/catalog.py), the `SourceScan` and the path of the
  searched folder.
- `say_what_was_paired(pairs, out)` takes the `Pairs` that `make_pairs()` of sharding/pairs/run.py
  returns, and the path `out` that `make_pairs()` wrote to.
- `say_what_was_audited(name, result, matched)` takes a set's name and its `Audit` (how well
  metadata alone separate real from fake images, as AUROC; from `audit()` of
  sharding/audit/audit.py). `matched` is a `Match` (a subset balanced by metadata; from
  `match_classes()` of sharding/audit/match.py), the reason why there is none (text), or None (not
  wanted). About the subset it prints something only if `matched` is a `Match`.
"""

import shlex

import console
from installed import DEMO
from sharding.audit.audit import Audit, advice_of
from sharding.audit.match import Match
from sharding.build import BuiltSet
from sharding.catalog import Catalog
from sharding.format import CLASSES
from sharding.left_out import files_left_out, left_out
from sharding.pairs.run import Pairs
from sharding.scan import SourceScan
from storage import AnyPath


def say_what_is_missing(catalog: Catalog, scan: SourceScan, raw: AnyPath) -> None:
    """For a build without images: print the known sources, the searched folder and next steps."""
    rows = [
        [
            name,
            (source.root or name) + "/",
            "no image" if name in scan.empty else "not there",
            source.homepage or "-",
        ]
        for name, source in catalog.sources.items()
        if name in scan.missing
    ]
    console.table(
        f"Known sources, looked for in {raw}", ["source", "folder", "found", "get it from"], rows,
        drop=["folder"],
    )  # fmt: skip
    for line in files_left_out(scan):
        console.say(line)
    parent = raw.parent
    option = shlex.join(["--raw", str(parent)])
    if any((parent / (source.root or name)).is_dir() for name, source in catalog.sources.items()):
        console.say(f"{parent} has folders of known sources: did you mean {option}?")
    console.say(
        f"Nothing to build below {raw}{'' if raw.is_dir() else ', which does not exist'}.\n"
        "Download a source of the table with `python -m sharding fetch SOURCE`, or write a\n"
        "catalog for your own images with `python -m sharding describe FOLDER`.\n"
        f"To try everything without a download: {DEMO}"
    )


def say_what_was_built(built: list[BuiltSet], scan: SourceScan, out: AnyPath) -> None:
    """Print the built sets, and the files and images that are in no set."""
    rows = []
    for built_set in built:
        totals = built_set.index["totals"]
        rows.append(
            [
                built_set.name,
                built_set.index["samples"],
                *[totals["label"].get(name, 0) for name in CLASSES],
                len(totals["source"]),
                len(built_set.index["shards"]),
                f"{sum(shard['bytes'] for shard in built_set.index['shards']) / 2**20:.1f}",
                sum(built_set.index["excluded"].values()),
                len(built_set.index["quarantined"]),
                "packed" if built_set.shards_written else "was up to date",
            ]
        )
    columns = [
        "set", "images", *CLASSES, "sources", "shards", "MiB", "excluded", "quarantined",
        "this run",
    ]  # fmt: skip
    least_first = ["MiB", "shards", "sources", "quarantined", "excluded", "this run"]
    console.table(f"Shard sets in {out}", columns, rows, drop=least_first)
    if not any(built_set.shards_written for built_set in built):
        console.say(f"nothing to pack: {console.counted(len(built), 'set')} up to date")
    for line in left_out(built, scan, out):
        console.say(line)
    for source, listing in scan.listings.items():
        for rule, count in listing.read_as.items():
            console.log.debug("%s: %s", source, f"{rule}: {count:,} images" if count else rule)
    if scan.packed_only:
        console.say(f"raw files gone, packed images kept: {', '.join(scan.packed_only)}")


def say_what_was_paired(pairs: Pairs, out: AnyPath) -> None:
    """Print the pairs per source, the images without a partner, and how to pack the pairs."""
    total = sum(pairs.counts.values())
    already = f", {pairs.already:,} of them made before" if pairs.already else ""
    console.table(
        f"Pairs of real and fake images in {out / pairs.name}", ["source", "pairs"],
        list(pairs.counts.items()),
    )  # fmt: skip
    console.say(f"{console.counted(total, 'pair')}{already}")
    for reason, count in sorted(pairs.excluded.items()):
        console.say(f"without a partner: {console.counted(count, 'image')}: {reason}")
    words = ["--raw", out, "--catalog", pairs.catalog, "--out", out / "shards"]
    console.say(f"pack them: python -m sharding build {shlex.join(map(str, words))}")


def say_what_was_audited(name: str, result: Audit, matched: Match | str | None) -> None:
    """Print the AUROCs of an audit, the metadata behind them, and advice."""
    rows = [
        [name, source.reals, source.fakes, source.within, source.from_others, source.note]
        for name, source in result.sources.items()
    ]
    rows.append(["all", result.reals, result.fakes, result.pooled, result.across, ""])
    if result.source_name:
        rows.append(["name of the source alone", "", "", result.source_name, None, ""])
    console.table(
        f"{name}: AUROC of metadata alone (95 % interval)",
        ["source", *CLASSES, "cross-validated", "fitted on other sources", ""],
        rows,
        drop=[*CLASSES, "fitted on other sources"],
    )
    if result.features:
        console.table(
            f"{name}: what carries it (AUROC)",
            ["feature", "alone", "lost without it"],
            [[name, feature.alone, feature.drop] for name, feature in result.features.items()],
        )
    for value in result.shortcuts:
        console.say(str(value))
    console.say()
    console.say(f"{name}: shortcut by metadata: {result.verdict}")
    for line in [*result.notes, *advice_of(result)]:
        console.say(line)
    if isinstance(matched, Match):
        console.say(
            f"matched: {matched.per_class:,} real and {matched.per_class:,} fake images, AUROC of "
            f"metadata {matched.before} before and {matched.after} after"
        )
