"""`python -m sharding fetch | build | verify | audit | ...`: parses, calls, prints."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import click

import console
from sharding.audit import audit, match
from sharding.audit.histograms import draw
from sharding.build import BuiltSet, SourceScan, Tolerance, build
from sharding.catalog import BUILT_IN, SHIPPED, Catalog, read_catalog
from sharding.compare import compare_sets
from sharding.demo.render import make_demo
from sharding.describe import describe
from sharding.executor import Engine
from sharding.format import CLASSES, INDEX_FILE, open_shards, read_index
from sharding.known import COLUMNS, facts_of, rows_of
from sharding.verify import sets_in, verify
from storage import AnyPath, check_reachable, cores, file_name, write_text

RAW = click.option(
    "--raw",
    type=console.AnyAddress(),
    default="data/raw",
    show_default=True,
    help="Folder or address that holds the raw datasets.",
)
CATALOG = click.option(
    "--catalog",
    "catalogs",
    type=console.LocalPath(dir_okay=False, exists=True),
    multiple=True,
    help="A catalog of your own, on top of the built-in one. May be repeated.",
)


@click.group(cls=console.Group)
def main() -> None:
    """Pack raw images into WebDataset shards, check them, and look at them."""


@main.command("fetch")
@click.argument("sources", nargs=-1)
@click.option(
    "--raw",
    type=console.LocalPath(file_okay=False),
    default=Path("data/raw"),
    show_default=True,
    help="Folder that gets one folder per source.",
)
@CATALOG
@click.option(
    "--git-mirror",
    type=console.LocalPath(file_okay=False, exists=True),
    help="Folder of Git directories named OWNER+NAME, read instead of a download.",
)
@console.options()
def fetch_command(
    sources: tuple[str, ...], raw: Path, catalogs: tuple[Path, ...], git_mirror: Path | None
) -> None:
    """Download SOURCES, or all with a known download but the test sets; run again to resume."""
    from sharding.fetch import fetch_all  # its libraries take most of a second

    results = []
    catalog = read_catalog([*SHIPPED, *catalogs])
    by_name_only = read_catalog(SHIPPED).sources.keys() - read_catalog([BUILT_IN]).sources.keys()
    sources = sources or tuple(
        name for name, s in catalog.sources.items() if s.fetch and name not in by_name_only
    )
    for fetched in fetch_all(catalog, raw, sources, console.progress, git_mirror):
        console.say(f"{fetched.source}: {fetched.status}: {fetched.note}")
        results.append(fetched)
    failed = [fetched.source for fetched in results if fetched.status == "failed"]
    if failed:
        raise click.ClickException(
            f"{len(failed)} of {len(results)} sources failed: {', '.join(failed)}; what arrived is "
            "kept, and the same command goes on from there"
        )


@main.command("build")
@RAW
@click.option(
    "--out",
    type=console.AnyAddress(writes=True),
    default="data/shards",
    show_default=True,
    help="Folder or address that gets one folder per set.",
)
@CATALOG
@click.option("--set", "only", multiple=True, help="Build only this set. May be repeated.")
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Tasks at a time. Default: one per processor core."
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Processes of this machine, or the Ray cluster of RAY_ADDRESS.",
)
@click.option(
    "--max-bad",
    type=console.FiniteRange(0, 1),
    default=0.01,
    show_default=True,
    help="Share of images that may be unreadable or missing; more fails the build.",
)
@click.option(
    "--allow-incomplete",
    is_flag=True,
    help="Build although a rule matches no file, or a training set has one class.",
)
@console.options()
def build_command(
    raw: AnyPath,
    out: AnyPath,
    catalogs: tuple[Path, ...],
    only: tuple[str, ...],
    jobs: int | None,
    engine: Engine,
    max_bad: float,
    allow_incomplete: bool,
) -> None:
    """Pack every dataset of the catalog that lies below RAW; run again to resume."""
    catalog = read_catalog([*SHIPPED, *catalogs])

    @contextlib.contextmanager
    def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
        console.log.info("%s %s images", what, f"{total:,}")
        with console.progress(what, total) as advance:
            yield advance

    scan, built = build(
        catalog, raw, out,
        only=only, jobs=jobs or 0, engine=engine,
        tolerance=Tolerance(max_bad, allow_incomplete), progress=progress,
    )  # fmt: skip
    if not built:
        _say_what_is_missing(catalog, scan, raw)
        raise SystemExit(1)
    _say_what_was_built(built, scan, out)


def _say_what_is_missing(catalog: Catalog, scan: SourceScan, raw: AnyPath) -> None:
    """With nothing to build: what is known, where it was looked for, what to do."""
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
        f"Known sources, looked for in {raw}", ["source", "folder", "found", "get it from"], rows
    )
    _say_what_was_excluded(scan)
    console.say(
        f"Nothing to build below {raw}{'' if raw.is_dir() else ', which is not there'}.\n"
        "Get a dataset of the table with `python -m sharding fetch SOURCE`, or let\n"
        "`python -m sharding describe FOLDER` write a catalog for your own images.\n"
        "To see everything work without a download: make demo"
    )


def _say_what_was_built(built: list[BuiltSet], scan: SourceScan, out: AnyPath) -> None:
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
    console.table(f"Shard sets in {out}", columns, rows)
    for built_set in built:
        for entry in built_set.index["quarantined"][:5]:
            console.say(f"quarantined: {entry['path']}: {entry['reason']}")
        if len(built_set.index["quarantined"]) > 5:
            console.say(f"... and more: see quarantined in {out / built_set.name / INDEX_FILE}")
        for reason, count in built_set.index["excluded"].items():
            console.say(f"excluded from {built_set.name}: {count:,} images: {reason}")
    _say_what_was_excluded(scan)
    for source, listing in scan.listings.items():
        for rule, count in listing.read_as.items():
            console.log.debug("%s: %s", source, f"{rule}: {count:,} images" if count else rule)
    if scan.packed_only:
        console.say(f"raw files gone, kept as packed: {', '.join(scan.packed_only)}")


def _say_what_was_excluded(scan: SourceScan) -> None:
    """Files that belong to no set, and why, by source."""
    for source, listing in (scan.listings | scan.empty).items():
        if source in scan.empty:
            console.say(f"no image: {source}")
        for reason, entry in listing.excluded.items():
            console.say(
                f"excluded: {source}: {entry['files']:,} files: {reason} "
                f"(first: {entry['first'][0]})"
            )


@main.command()
@click.argument("folder", type=console.AnyAddress())
@console.options()
def show(folder: AnyPath) -> None:
    """Print what the shard set in FOLDER holds."""
    index = read_index(folder)
    shards = open_shards([folder])
    sources, source_names = shards.codes("source")
    generators, generator_names = shards.codes("generator")
    formats, format_names = shards.codes("format")
    labels = shards.column("label")
    rows = []
    for s, source in enumerate(source_names):
        for g, generator in enumerate(generator_names):
            for label, class_name in enumerate(CLASSES):
                here = (sources == s) & (generators == g) & (labels == label)
                if not here.any():
                    continue
                used = [name for f, name in enumerate(format_names) if (formats[here] == f).any()]
                widths, heights = shards.column("width")[here], shards.column("height")[here]
                rows.append(
                    [
                        source, class_name, generator, int(here.sum()),
                        f"{widths.min()}-{widths.max()} x {heights.min()}-{heights.max()}",
                        " ".join(used), index["sources"][source]["license"],
                    ]
                )  # fmt: skip
    columns = ["source", "class", "generator", "images", "pixels", "formats", "license"]
    console.table(f"{folder} ({index['split']}, {len(index['shards'])} shards)", columns, rows)
    console.say(f"index sha256 {shards.sha256[:16]}, {len(index['quarantined'])} quarantined")


@main.command("list")
@click.argument("sources", nargs=-1)
@RAW
@click.option(
    "--out",
    type=console.AnyAddress(),
    default="data/shards",
    show_default=True,
    help="Folder or address of the packed sets.",
)
@CATALOG
@console.options()
def list_command(
    sources: tuple[str, ...], raw: AnyPath, out: AnyPath, catalogs: tuple[Path, ...]
) -> None:
    """List the known sources: what is on disk and packed, and licenses; of SOURCES every fact."""
    catalog = read_catalog([*SHIPPED, *catalogs])
    if sources:
        for line in (line for name in sources for line in facts_of(name, catalog)):
            console.say(line)
        return
    check_reachable(raw)
    check_reachable(out)
    packed: dict[str, list[str]] = {}
    sets = []
    for folder in sets_in(out) if any(out.glob(f"*/{INDEX_FILE}")) else []:
        index = read_index(folder)
        sets.append([folder.name, index["split"], index["samples"], len(index["sources"])])
        for source, count in index["totals"]["source"].items():
            packed.setdefault(source, []).append(f"{index['set']} {count:,}")
    console.table(f"Known sources; on disk: {raw}", COLUMNS, rows_of(catalog, raw, packed))
    if sets:
        console.table(f"Sets in {out}", ["set", "split", "images", "sources"], sets)
    for name, listed in catalog.suites.items():
        console.say(f"suite {name}: {', '.join(listed)}")
    console.say("what is known of one: python -m sharding list SOURCE")
    console.say("get one: python -m sharding fetch SOURCE     pack: python -m sharding build")


@main.command("verify")
@click.argument("folder", type=console.AnyAddress())
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Tasks at a time. Default: one per processor core."
)
@console.options()
def verify_command(folder: AnyPath, jobs: int | None) -> None:
    """Check the set in FOLDER, or all sets below it: bytes, images, counts, and splits."""
    check_reachable(folder)
    folders = sets_in(folder)
    total = sum(read_index(each)["samples"] for each in folders)
    with console.progress("verifying", total) as advance:
        faults = verify(folders, jobs=jobs or 0, on_images=advance)
    for fault in faults[:20]:
        console.say(fault)
    names = ", ".join(each.name for each in folders)
    if faults:
        raise click.ClickException(
            f"{len(faults):,} faults in {names}, {min(20, len(faults))} of them above. Delete a "
            "damaged shard and run the build again: it is packed anew"
        )
    console.say(f"{names}: {total:,} images as the index says, no image in two splits")


@main.command("diff")
@click.argument("before", type=console.AnyAddress())
@click.argument("after", type=console.AnyAddress())
@console.options()
def diff(before: AnyPath, after: AnyPath) -> None:
    """Say what differs between two shard sets; exit 1 if anything does."""
    difference = compare_sets(open_shards([before]), open_shards([after]))
    if not difference:
        console.say(f"{before} and {after} hold the same samples")
        return
    rows = [
        [what, where, count]
        for what, counts in difference.counts.items()
        for where, count in sorted(counts.items())
    ]
    if rows:
        console.table(f"{before} -> {after}", ["", "source, class", "images"], rows)
    for key, changes in list(difference.changed.items())[:20]:
        console.say(f"changed: {key}: {'; '.join(changes)}")
    added, removed, changed = (
        len(difference.added),
        len(difference.removed),
        len(difference.changed),
    )
    console.say(f"{added:,} added, {removed:,} removed, {changed:,} changed")
    raise SystemExit(1)


@main.command("describe")
@click.argument("folder", type=console.LocalPath(exists=True, file_okay=False))
@click.option(
    "--out",
    type=console.LocalPath(dir_okay=False),
    default=Path("my-catalog.toml"),
    show_default=True,
    help="Catalog to write; an existing file is not overwritten.",
)
@console.options()
def describe_command(folder: Path, out: Path) -> None:
    """Propose a catalog for the images in FOLDER, by the names of its folders."""
    if out.exists():
        raise click.ClickException(f"{out} exists; choose another --out, or remove it")
    description = describe(folder)
    rows = [[path, kind, count] for path, (kind, count) in description.folders.items()]
    rows += [[path, "?", count] for path, count in description.undecided.items()]
    console.table(f"{folder}, by the names of its folders", ["folder", "class", "images"], rows)
    write_text(out, description.text)
    for reason, count in description.unread.items():
        console.say(f"excluded: {count:,} images: {reason}")
    if description.undecided:
        console.say(f"{len(description.undecided)} folders have no class: say it in {out}, then")
    command = f"python -m sharding build --raw {folder.absolute().parent} --catalog {out}"
    console.say(f"check {out}, then: {command}")


@main.command("audit")
@click.argument("folders", type=console.AnyAddress(), nargs=-1, required=True)
@click.option(
    "--out",
    type=console.LocalPath(file_okay=False),
    default=Path("data/audit"),
    show_default=True,
    help="Folder for report.json and a PNG per set.",
)
@click.option(
    "--match",
    "sample_file",
    type=console.LocalPath(dir_okay=False),
    help="CSV to write: samples in which real and fake agree on metadata.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Another seed, other folds and samples.",
)
@console.options()
def audit_command(
    folders: tuple[AnyPath, ...], out: Path, sample_file: Path | None, seed: int
) -> None:
    """Report what a model could learn of the sets in FOLDERS without looking at pixels."""
    for folder in folders:
        check_reachable(folder)
    sets = audit.open_sets(folders)
    out.mkdir(parents=True, exist_ok=True)
    results, entries, chosen = [], {}, {}
    for name, shards in sets.items():
        with console.progress(f"auditing {name}", audit.steps_of(shards)) as advance:
            result = audit.audit(shards, seed=seed, on_step=advance)
        draw(shards, name, result, out / file_name(name, ".png"))
        matched: match.Match | str | None = None
        if sample_file:
            try:
                matched = match.match_classes(shards, seed=seed)
                chosen[name] = shards, matched.rows
            except match.MatchError as error:
                matched = str(error)
        entries[name] = audit.as_json(shards, result) | {"match": match.as_json(matched)}
        results.append((name, result, matched))
    audit.write_report(out / "report.json", seed, entries)
    for said in results:
        _say_what_was_audited(*said)
    console.say(f"report: {out / 'report.json'}, histograms: {out / '<set>.png'}")
    if sample_file:
        missing = [matched for _name, _result, matched in results if isinstance(matched, str)]
        if missing:
            raise ValueError(f"{sample_file} is not written: " + "\n".join(missing))
        sample_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(sample_file, match.sample_list(chosen))
        console.say(f"sample list: {sample_file}; python evaluate.py --subset {sample_file}")


def _say_what_was_audited(
    name: str, result: audit.Audit, matched: match.Match | str | None
) -> None:
    """The figures, the values behind them, and what to do."""
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
    for line in [*result.notes, *audit.advice_of(result)]:
        console.say(line)
    if isinstance(matched, match.Match):
        console.say(
            f"matched: {matched.per_class:,} real and {matched.per_class:,} fake images, AUROC of "
            f"metadata {matched.before} before and {matched.after} after"
        )


@main.command()
@click.argument("folder", type=console.LocalPath())
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Another seed, other images.",
)
@console.options()
def demo(folder: Path, seed: int) -> None:
    """Make seeded, synthetic raw datasets and their catalog in FOLDER."""
    with console.progress("drawing", None) as advance:
        counts = make_demo(
            folder,
            seed=seed,
            jobs=cores(),
            on_done=lambda _done, total: advance(1, f"of {total}"),
        )
    console.table(
        f"Synthetic raw datasets in {folder / 'raw'}", ["source", "images"], counts.items()
    )
    console.say(
        f"pack them: python -m sharding build --raw {folder / 'raw'} "
        f"--catalog {folder / 'catalog.toml'} --out {folder / 'shards'}"
    )


if __name__ == "__main__":
    main()
