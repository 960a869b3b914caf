"""Run the commands of the package, `python -m sharding COMMAND`: download, pack and check images.

Main entry: `main()`, a click group. Each command parses its options, calls functions of the package
and prints the result. An error is one line and exit code 1, a wrong command line 2, Ctrl-C 130.
Shared options (defaults in parentheses):

- --raw, for `fetch`, `build`, `list`: folder of the raw datasets (data/raw). In `build` and `list`
  (`RAW`), it may be an address.
- --catalog, for `fetch`, `build`, `list`: a TOML file to add (may be repeated).
- --jobs (`JOBS`), for `build` and `verify`: number of parallel tasks (one per core).

Every command has --verbose (more log lines). A packed set may be at an address.

    fetch [SOURCE...]  download catalog sources to --raw (none named: all with a known download,
                       except published test sets); --git-mirror: folder with Git repositories,
                       named OWNER+NAME, to read instead (none; one not there is downloaded)
    build              pack raw images into shard sets (tars with an index), one subfolder each of
                       --out (data/shards); --set: a set to build (default: all; may be repeated);
                       --engine: local (processes, the default) or ray (a Ray cluster); --max-bad:
                       allowed fraction of unreadable or missing images, 0 to 1 (0.01);
                       --allow-incomplete: a flag to accept catalog rules that match no file, and
                       training sets that lack a class
    show FOLDER        count the images of the set there by source, class and generator
    list [SOURCE...]   print the known sources and the sets in the folder --out (data/shards), or
                       only all facts about each SOURCE
    verify FOLDER      check the set or sets there against their index; exit code 1 for faults
    diff BEFORE AFTER  list the samples that differ between two sets; exit code 1 if any do
    describe FOLDER    write a proposed catalog for its images to a new file --out (my-catalog.toml)
    audit FOLDER...    write to the folder --out (data/audit) report.json and a PNG per set: how
                       well metadata alone separates real from fake images; --match: CSV file to
                       write, of samples that metadata does not separate; --seed: of both (0)
    pairs SET          write a fake partner of each real image of the set (a folder), and a catalog,
                       to --out (data/pairs); --decoder, required: the VAE, a folder, or OWNER/NAME
                       or OWNER/NAME/vae on the Hugging Face hub; --max-megapixels: larger images
                       are left out (2); --device: auto, cpu, cuda or cuda:N (auto)
    demo FOLDER        make synthetic raw images in FOLDER/raw, and FOLDER/catalog.toml; --seed (0)
"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

import cli
import console
import interrupts
from devices import cores
from storage import AnyPath, check_reachable, file_name, write_text

if TYPE_CHECKING:
    from sharding.executor import Engine

RAW = click.option(
    "--raw",
    type=cli.AnyAddress(),
    default="data/raw",
    show_default=True,
    help="Folder or address that holds the raw datasets.",
)
JOBS = click.option(
    "--jobs", type=click.IntRange(min=1), help="Tasks at a time. Default: one per processor core."
)


@click.group(cls=console.Group)
def main() -> None:
    """Download raw images, pack them into WebDataset shards, and check the shards."""


@main.command("fetch")
@click.argument("sources", nargs=-1)
@click.option(
    "--raw",
    type=cli.LocalPath(file_okay=False),
    default=Path("data/raw"),
    show_default=True,
    help="Folder to download to, one subfolder per source.",
)
@click.option(
    "--git-mirror",
    type=cli.LocalPath(file_okay=False, exists=True),
    help="Folder of Git directories named OWNER+NAME, to read instead of downloading.",
)
@cli.options("catalog")
def fetch_command(
    sources: tuple[str, ...], raw: Path, catalogs: tuple[Path, ...], git_mirror: Path | None
) -> None:
    """Download the raw files of SOURCES. Run again to resume.

    Without SOURCES: all sources of catalog.toml with a known download (EvalGEN too), and none of
    catalog-tests.toml.
    """
    from sharding.catalog import BUILT_IN, SHIPPED, read_catalog
    from sharding.fetch import fetch_all

    results = []
    catalog = read_catalog([*SHIPPED, *catalogs])
    by_name_only = read_catalog(SHIPPED).sources.keys() - read_catalog([BUILT_IN]).sources.keys()
    sources = sources or tuple(
        name for name, s in catalog.sources.items() if s.fetch and name not in by_name_only
    )
    with interrupts.resumable():
        for fetched in fetch_all(catalog, raw, sources, console.progress, git_mirror):
            console.say(f"{fetched.source}: {fetched.status}: {fetched.note}")
            results.append(fetched)
    failed = [fetched.source for fetched in results if fetched.status == "failed"]
    if failed:
        raise click.ClickException(
            f"{len(failed)} of {console.counted(len(results), 'source')} failed: "
            f"{', '.join(failed)}; the downloaded files are kept, so do what is said above and "
            "run the same command again"
        )


@main.command("build")
@RAW
@click.option(
    "--out",
    type=cli.AnyAddress(writes=True),
    default="data/shards",
    show_default=True,
    help="Folder or address to write to, one subfolder per set.",
)
@click.option("--set", "only", multiple=True, help="Build only this set. May be repeated.")
@JOBS
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where tasks run: local processes, or the Ray cluster at RAY_ADDRESS.",
)
@click.option(
    "--max-bad",
    type=cli.FiniteRange(0, 1),
    default=0.01,
    show_default=True,
    help="Maximum fraction of unreadable or missing images before the build fails.",
)
@click.option(
    "--allow-incomplete",
    is_flag=True,
    help="Build even if a rule or `group` matches no file, a training set lacks a class, or a "
    "download has not finished.",
)
@cli.options("catalog")
def build_command(
    raw: AnyPath,
    out: AnyPath,
    catalogs: tuple[Path, ...],
    only: tuple[str, ...],
    jobs: int | None,
    engine: "Engine",
    max_bad: float,
    allow_incomplete: bool,
) -> None:
    """Pack the datasets in the raw folder into shard sets. Run again to resume."""
    from sharding.build import Tolerance, build, image_progress
    from sharding.catalog import SHIPPED, read_catalog
    from sharding.summary import say_what_is_missing, say_what_was_built

    catalog = read_catalog([*SHIPPED, *catalogs])

    with interrupts.resumable():
        scan, built = build(
            catalog, raw, out,
            only=only, jobs=jobs or 0, engine=engine,
            tolerance=Tolerance(max_bad, allow_incomplete), progress=image_progress,
        )  # fmt: skip
    if not built:
        say_what_is_missing(catalog, scan, raw)
        raise SystemExit(1)
    say_what_was_built(built, scan, out)


@main.command()
@click.argument("folder", type=cli.AnyAddress())
@cli.options()
def show(folder: AnyPath) -> None:
    """Print the images of the shard set in FOLDER by source, class and generator."""
    from sharding.contents import COLUMNS, rows_of_set
    from sharding.format import open_shards, read_index

    index = read_index(folder)
    shards = open_shards([folder])
    title = f"{folder} ({index['split']}, {console.counted(len(index['shards']), 'shard')})"
    rows = rows_of_set(shards, index)
    console.table(title, COLUMNS, rows, drop=["license", "formats", "pixels"])
    console.say(f"index sha256 {shards.sha256[:16]}, {len(index['quarantined'])} quarantined")


@main.command("list")
@click.argument("sources", nargs=-1)
@RAW
@click.option(
    "--out",
    type=cli.AnyAddress(),
    default="data/shards",
    show_default=True,
    help="Folder or address with the packed sets.",
)
@cli.options("catalog")
def list_command(
    sources: tuple[str, ...], raw: AnyPath, out: AnyPath, catalogs: tuple[Path, ...]
) -> None:
    """List the known sources, or print all facts about SOURCES."""
    from sharding.catalog import SHIPPED, read_catalog
    from sharding.sources import COLUMNS, facts_of, packed_in, rows_of

    catalog = read_catalog([*SHIPPED, *catalogs])
    if sources:
        for line in (line for name in sources for line in facts_of(name, catalog)):
            console.say(line)
        return
    check_reachable(raw)
    check_reachable(out)
    packed = packed_in(out)
    title = f"Known sources ('on disk' means in {raw})"
    drop = ["license", "goes to", "size", "images"]
    console.table(title, COLUMNS, rows_of(catalog, raw, packed.images), drop=drop)
    if packed.sets:
        console.table(f"Sets in {out}", ["set", "split", "images", "sources"], packed.sets)
    for name, listed in catalog.suites.items():
        console.say(f"suite {name}: {', '.join(listed)}")
    console.say("all facts about a source: python -m sharding list SOURCE")
    console.say("download it: python -m sharding fetch SOURCE     pack: python -m sharding build")
    if packed.damaged:
        raise click.ClickException(
            f"{len(packed.damaged)} of {console.counted(len(packed.sets), 'set')} cannot be read: "
            f"{'; '.join(packed.damaged)}"
        )


@main.command("verify")
@click.argument("folder", type=cli.AnyAddress())
@JOBS
@cli.options()
def verify_command(folder: AnyPath, jobs: int | None) -> None:
    """Check the shard set in FOLDER, or all sets directly in it, against the index."""
    from sharding.format import read_index
    from sharding.verify import sets_in, unfinished_in, verify

    check_reachable(folder)
    folders = sets_in(folder)
    total = sum(read_index(each)["samples"] for each in folders)
    with console.progress("verifying", total) as advance:
        unfinished = unfinished_in(folder)
        damaged = verify(folders, jobs=jobs or 0, on_images=advance)
    faults = unfinished + damaged
    for fault in faults[:20]:
        console.say(fault)
    names = ", ".join(each.name for each in folders)
    if faults:
        remedy = (
            "Delete the damaged shards, if any, and build all sets again in one build, with the "
            "--catalog of each and without --set"
        )
        raise click.ClickException(
            f"{console.counted(len(faults), 'fault')} (listed above: {min(20, len(faults))}). "
            f"{remedy if damaged else 'Run the build again to pack what is missing'}"
        )
    images = console.counted(total, "image")
    console.say(f"{names}: {images} match the index, no image is in two splits")


@main.command("diff")
@click.argument("before", type=cli.AnyAddress())
@click.argument("after", type=cli.AnyAddress())
@cli.options()
def diff(before: AnyPath, after: AnyPath) -> None:
    """List the samples that differ between two shard sets; exit code 1 if any do."""
    from sharding.compare import compare_sets
    from sharding.format import open_shards

    difference = compare_sets(open_shards([before]), open_shards([after]))
    if not difference:
        console.say(f"{before} and {after} contain the same samples")
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
    kinds = ("added", "removed", "changed")
    console.say(", ".join(f"{len(getattr(difference, kind)):,} {kind}" for kind in kinds))
    raise SystemExit(1)


@main.command("describe")
@click.argument("folder", type=cli.LocalPath(exists=True, file_okay=False))
@click.option(
    "--out",
    type=cli.LocalPath(dir_okay=False, writes=True),
    default=Path("my-catalog.toml"),
    show_default=True,
    help="Catalog to write; an existing file is not overwritten.",
)
@cli.options()
def describe_command(folder: Path, out: Path) -> None:
    """Propose a catalog for the images in FOLDER, with classes from folder names."""
    if out.exists():
        raise click.ClickException(f"{out} exists; choose another --out, or remove it")
    from sharding.describe import describe, first_names

    description = describe(folder)
    rows = [
        [path, f.kind, f.generator, f.split or "-", f.images, first_names(f.holding)]
        for path, f in description.folders.items()
    ]
    rows += [[path, "?", "?", "-", count, "."] for path, count in description.undecided.items()]
    columns = ["folder", "class", "generator", "split", "images", "in its folders"]
    console.table(f"{folder}: proposed classes", columns, rows, drop=["in its folders", "split"])
    for split, count in description.published.items():
        images = console.counted(count, "image")
        console.say(f"{images} of a published {split} split: only they go to the {split} set")
    for note in description.notes:
        console.say(note)
    write_text(out, description.text)
    for reason, count in description.unread.items():
        console.say(f"excluded: {console.counted(count, 'file')}: {reason}")
    kinds = {entry.kind for entry in description.folders.values()}
    if len(kinds) == 1:
        (missing,) = {"real", "fake"} - kinds
        console.say(f"no folder of {missing} images by its name: training needs both classes")
    if description.undecided:
        rules = console.counted(len(description.undecided), "rule")
        console.say(f"{rules} without a class: uncomment a line for each, real or fake, in {out}")
    words = shlex.join(["--raw", str(folder.absolute().parent), "--catalog", str(out)])
    console.say(f"check {out}, then: python -m sharding build {words}")


@main.command("audit")
@click.argument("folders", type=cli.AnyAddress(), nargs=-1, required=True)
@click.option(
    "--out",
    type=cli.LocalPath(file_okay=False),
    default=Path("data/audit"),
    show_default=True,
    help="Folder for report.json and one PNG per set.",
)
@click.option(
    "--match",
    "sample_file",
    type=cli.LocalPath(dir_okay=False, writes=True),
    help="CSV file to write: samples whose metadata does not separate real from fake.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Seed of the cross-validation folds and the matched samples.",
)
@cli.options()
def audit_command(
    folders: tuple[AnyPath, ...], out: Path, sample_file: Path | None, seed: int
) -> None:
    """Report how well metadata alone separates real from fake in the sets in FOLDERS."""
    from sharding.audit import audit, match
    from sharding.audit.histograms import draw
    from sharding.summary import say_what_was_audited

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
        say_what_was_audited(*said)
    console.say(f"report: {out / 'report.json'}, histograms: {out / '<set>.png'}")
    if sample_file:
        missing = [matched for _name, _result, matched in results if isinstance(matched, str)]
        if missing:
            raise ValueError(f"{sample_file} was not written: " + "\n".join(missing))
        sample_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(sample_file, match.sample_list(chosen))
        console.say(f"sample list: {sample_file}")
        for line in match.commands(chosen, sample_file):
            console.say(f"to score it: {line}")


@main.command("pairs")
@click.argument("folder", metavar="SET", type=cli.AnyAddress())
@click.option(
    "--decoder",
    "name",
    required=True,
    help="VAE in diffusers format: a folder, or OWNER/NAME or OWNER/NAME/vae on the hub.",
)
@click.option(
    "--out",
    type=cli.LocalPath(file_okay=False),
    default=Path("data/pairs"),
    show_default=True,
    help="Folder for the pairs and their catalog.",
)
@click.option(
    "--max-megapixels",
    type=cli.FiniteRange(0.001, 200),
    default=2.0,
    show_default=True,
    help="Exclude larger images; nothing is scaled or tiled.",
)
@click.option(
    "--device",
    type=cli.Device(),
    default="auto",
    show_default=True,
    help="Device that runs the VAE: auto, cpu, cuda or cuda:N.",
)
@cli.options()
def pairs_command(
    folder: AnyPath, name: str, out: Path, max_megapixels: float, device: str
) -> None:
    """Make a fake partner of each real image of SET with a VAE. Run again to resume."""
    from sharding.format import open_shards
    from sharding.pairs.decoder import load_decoder
    from sharding.pairs.run import make_pairs, real_samples
    from sharding.summary import say_what_was_paired

    check_reachable(folder)
    total = len(real_samples(open_shards([folder])))
    decoder = load_decoder(name, device)
    with interrupts.resumable(), console.progress("pairing", total) as advance:
        pairs = make_pairs(
            folder, out, decoder, max_megapixels=max_megapixels, on_image=lambda: advance(1)
        )
    say_what_was_paired(pairs, out)


@main.command()
@click.argument("folder", type=cli.LocalPath())
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Seed of the synthetic images.",
)
@cli.options()
def demo(folder: Path, seed: int) -> None:
    """Create synthetic raw datasets and their catalog in FOLDER."""
    from sharding.demo.render import make_demo

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
    paths = {"--raw": "raw", "--catalog": "catalog.toml", "--out": "shards"}
    words = shlex.join(word for key, name in paths.items() for word in (key, str(folder / name)))
    console.say(f"pack them: python -m sharding build {words}")


if __name__ == "__main__":
    main()
