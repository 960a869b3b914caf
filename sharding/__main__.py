"""`python -m sharding build | show | demo`: parses, calls, prints."""

import os
import sys
from pathlib import Path

import click

import console
from sharding.build import BuiltSet, Scan, build_set, scan
from sharding.catalog import BUILT_IN, Catalog, read_catalog
from sharding.demo import make_demo
from sharding.format import CLASSES, INDEX_FILE, open_shards, read_index


def _cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@click.group(cls=console.Group)
def main() -> None:
    """Pack raw images into WebDataset shards, and look at them."""


@main.command()
@click.option(
    "--raw",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("data/raw"),
    show_default=True,
    help="Folder that holds the raw datasets.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("data/shards"),
    show_default=True,
    help="Folder that gets one folder per set.",
)
@click.option(
    "--catalog",
    "catalogs",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    multiple=True,
    help="A catalogue of your own, beside the built-in one. May be repeated.",
)
@click.option("--set", "only", multiple=True, help="Build only this set. May be repeated.")
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Processes. Default: one per processor core."
)
@click.option(
    "--max-bad",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="Share of a set's images that may be unreadable; more fails the build.",
)
@console.options()
def build(
    raw: Path,
    out: Path,
    catalogs: tuple[Path, ...],
    only: tuple[str, ...],
    jobs: int | None,
    max_bad: float,
) -> None:
    """Pack every dataset of the catalogue that lies below RAW; run again to resume."""
    catalog = read_catalog([BUILT_IN, *catalogs])
    found = scan(catalog, raw)
    sets = sorted({item.set for item in found.items})
    if unknown := sorted(set(only) - set(sets)):
        raise click.ClickException(
            f"nothing to build for set {', '.join(unknown)}; below {raw} lie images for "
            f"{', '.join(sets) or 'no set'}"
        )
    if not sets:
        _say_what_is_missing(catalog, found, raw)
        raise SystemExit(1)
    chosen = [name for name in sets if not only or name in only]
    total = sum(item.set in chosen for item in found.items)
    jobs = jobs or _cores()
    with console.progress("packing", total) as advance:
        built = [
            build_set(name, found, catalog, out, jobs=jobs, max_bad=max_bad, on_samples=advance)
            for name in chosen
        ]
    _say_what_was_built(built, found, out)


def _say_what_is_missing(catalog: Catalog, found: Scan, raw: Path) -> None:
    """With nothing to build: what is known, where it was looked for, what to do."""
    rows = [
        [
            name,
            (source.root or name) + "/",
            "no image" if name in found.found else "not there",
            source.homepage or "-",
        ]
        for name, source in catalog.sources.items()
    ]
    console.table(
        f"Known sources, looked for in {raw}", ["source", "folder", "found", "get it from"], rows
    )
    console.say(
        f"Nothing to build below {raw.absolute()}.\n"
        "Download and unpack a dataset of the table into the folder beside its name, or describe "
        "your own\nfolders in a catalogue and pass --catalog FILE (the grammar is in "
        "sharding/catalog.py).\nTo see everything work without a download: make demo"
    )


def _say_what_was_built(built: list[BuiltSet], found: Scan, out: Path) -> None:
    rows = []
    for one in built:
        totals = one.index["totals"]
        rows.append(
            [
                one.name,
                one.index["samples"],
                *[totals["label"].get(name, 0) for name in CLASSES],
                len(totals["source"]),
                len(one.index["shards"]),
                f"{sum(shard['bytes'] for shard in one.index['shards']) / 2**20:.1f}",
                len(one.index["quarantine"]),
                "packed" if one.shards_written else "was up to date",
            ]
        )
    columns = ["set", "images", *CLASSES, "sources", "shards", "MiB", "quarantined", "this run"]
    console.table(f"Shard sets in {out}", columns, rows)
    for one in built:
        for entry in one.index["quarantine"][:5]:
            console.say(f"quarantined: {entry['path']}: {entry['reason']}")
        if len(one.index["quarantine"]) > 5:
            console.say(f"... and more: see quarantine in {out / one.name / INDEX_FILE}")
    for source, reasons in found.left_out.items():
        for reason, count in reasons.items():
            console.say(f"left out: {source}: {count:,} files {reason}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@console.options()
def show(folder: Path) -> None:
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
                        " ".join(used), index["sources"][source]["licence"],
                    ]
                )  # fmt: skip
    columns = ["source", "class", "generator", "images", "pixels", "formats", "licence"]
    console.table(f"{folder} ({index['split']}, {len(index['shards'])} shards)", columns, rows)
    console.say(f"index sha256 {shards.sha256[:16]}, {len(index['quarantine'])} quarantined")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Another seed, other images.")
@console.options()
def demo(folder: Path, seed: int) -> None:
    """Make seeded, synthetic raw datasets and their catalogue in FOLDER."""
    with console.progress("drawing", None) as advance:
        counts = make_demo(
            folder,
            seed=seed,
            jobs=_cores(),
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
