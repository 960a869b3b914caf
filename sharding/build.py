"""Build shard sets: pack the images of raw datasets into tars, as a catalog describes them.

Main entry: `build(catalog, raw, out, *, only=(), jobs=0, engine="local", tolerance, progress)`:
- `catalog`: from `read_catalog()`. `raw`, `out`: folders of raw data and of sets (`Path`, `UPath`).
- `only`: names of sets (empty: all). `jobs`: processes (0: one per core). `engine`: "local", "ray".
- `tolerance` (default: 0.01, no, no): the largest share of unreadable images; whether a catalog
  rule may match no image and a training set lack a class; whether all images of a packed source may
  be replaced.
- `progress(label, images)`: optional; a context manager that yields `done(images since last call)`.
It writes `out/.build` and `out/<set>/` (missing or changed shards). It returns a `SourceScan`
(`missing`: sources without images; `lacking`: classes that no image of a set has) and a list of
`BuiltSet` (`name`; `index`, the dict of index.json; `shards_written` by this call; `excluded`, a
list of `Excluded`), empty if no source has images. `CatalogError`: files contradict the catalog.
`RawError`: broken file. `ShardError`: bad images, no class, raw file or catalog entry of packed
images gone, other images in their place, `only` names a set without images, unknown files in a
set, or an image or its duplicate would be in a set that is built and in one that is not.
`ChangedError` (a `ShardError`): raw file just changed. `ValueError`: no Ray, too many `jobs`, a
link out of `out`. `OSError`: no access, another build, or a command that reads a set to change.
"""

import contextlib
import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import console
from console import counted, log
from sharding.catalog import Catalog
from sharding.dedupe import BOTH_LABELS, Decision, decide
from sharding.executor import Engine, run_all
from sharding.format import (
    CLASSES,
    EXCLUDED_FILE,
    FORMAT_VERSION,
    INDEX_FILE,
    ROW_GROUP,
    SAMPLES_FILE,
    SAMPLES_SCHEMA,
    TIMM_FILE,
    ShardError,
    content_sha256,
    timm_info,
)  # fmt: skip
from sharding.index import Index, Quarantined, SourceEntry, Totals
from sharding.inventory import (
    files_by_source,
    finish_source,
    forget,
    join_facts,
    known_facts,
    missing_chunks,
    read_source,
    take_inventory,
)  # fmt: skip
from sharding.lock import changing, locked
from sharding.outlook import warn_of_small
from sharding.overlaps import refuse_overlaps, warn_of_moves
from sharding.plan import plan_shards, sample_key
from sharding.record import (
    files_of,
    packed_sources,
    read_record,
    refuse_foreign_files,
    remove_earlier,
    write_record,
)  # fmt: skip
from sharding.replaced import refuse_replaced
from sharding.scan import STRICT, WORK_FOLDER, SourceScan, Tolerance, find_sources
from sharding.write import ChangedError, Written, read_done, read_rows, write_shard
from storage import (
    AnyPath,
    check_inside,
    check_reachable,
    make_folder,
    parse_json,
    read_text,
    sha256_of,
    write_atomically,
    write_text,
)

Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]]
"""`progress(what, total)` is a context manager for a progress bar. Its value is called with the
number of newly finished images.
"""


@contextlib.contextmanager
def no_progress(_what: str, _total: int) -> Iterator[Callable[[int], None]]:
    """Show no progress."""
    yield lambda _done: None


@contextlib.contextmanager
def image_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Log `what` with the number of images, and show a progress bar of them."""
    log.info("%s %s", what, counted(total, "image"))
    with console.progress(what, total) as advance:
        yield advance


class Excluded(NamedTuple):
    """Origin of an image that is in no set, and the image that it conflicts with, or ""."""

    source: str
    origin: str
    reason: str
    conflicts_with: str
    label: int

    def __str__(self) -> str:
        other = f": {self.conflicts_with}" if self.conflicts_with else ""
        return f"{self.origin} ({self.reason}{other})"


def why_lacking(excluded: Sequence[Excluded], label: int) -> str:
    """Return the end of a sentence on a missing class that names an excluded image of it, or ""."""
    rows = [row for row in excluded if row.label == label]
    return f": {counted(len(rows), 'image')} excluded, such as {rows[0]}" if rows else ""


@dataclass(frozen=True)
class BuiltSet:
    """Result of building one set: its index, the number of shards that this run wrote, and the
    excluded images, sorted by source and origin.
    """

    name: str
    index: Index
    shards_written: int
    excluded: Sequence[Excluded] = ()


def build(
    catalog: Catalog,
    raw: AnyPath,
    out: AnyPath,
    *,
    only: Sequence[str] = (),
    jobs: int = 0,
    engine: Engine = "local",
    tolerance: Tolerance = STRICT,
    progress: Progress = no_progress,
) -> tuple[SourceScan, list[BuiltSet]]:
    """Pack the sources of `catalog` from `raw` into one shard set per folder below `out`.

    `only` restricts the build to these sets. Finished sets with unchanged input are kept, and an
    interrupted build continues with the missing shards. `jobs` is the number of processes, 0 for
    one per core. Returns the scanned sources and the built sets; without images, no sets.

    Raises:
        ShardError: too many images of a set are unreadable, packed images would be lost, or a raw
            file changed during the build.
        CatalogError, RawError: the files below `raw` do not fit the catalog.
        OSError: another build writes to `out`, another process reads a set whose shards would
            change, or a file cannot be read or written.
    """
    if unknown := sorted(set(only) - catalog.sets.keys()):
        raise ShardError(
            f"no set {', '.join(unknown)} in the catalog, which has {', '.join(catalog.sets)}"
        )
    check_reachable(raw)
    check_reachable(out)
    scan = find_sources(catalog, raw, out, tolerance, only)
    if not scan.listings and not scan.packed_only:
        return scan, []
    warn_of_small(catalog, scan, only)
    work = out / WORK_FOLDER
    for path in (work, work / "inventory"):
        check_inside(path, out)
    make_folder(work / "inventory")
    with locked(work, out), contextlib.ExitStack() as held:
        for name in _sets_of(catalog, scan, only):
            for path in (out / name, work / name):
                check_inside(path, out)
            refuse_foreign_files(out / name, work / name)
        inventory = _read_everything(catalog, scan, raw, out, jobs, engine, tolerance, progress)
        decision = decide(inventory, catalog.sets, catalog.exclude)
        present = sorted(set(decision.wanted.tolist()))
        if empty := sorted(set(only) - set(present)):
            raise ShardError(
                f"no images for set {', '.join(empty)}; {raw} has images for {', '.join(present)}"
            )
        chosen = [name for name in present if not only or name in only]
        builds = {name: _SetBuild(name, catalog, scan, inventory, decision) for name in chosen}
        for one in builds.values():
            one.refuse_many_bad(tolerance.max_bad)
            if not tolerance.allow_incomplete:
                one.refuse_lacking_class()
        for one in builds.values():
            one.plan(out)
        samples = {name: one.samples for name, one in builds.items()}
        refuse_overlaps(out, present, scan, inventory, decision, samples)
        warn_of_moves(out, samples)
        for one in builds.values():
            names = {plan.name for plan in one.plans}
            held.enter_context(changing(one.folder, names, writes=bool(one.todo)))
        # The shards of all sets share one process pool, so that no core waits between sets.
        tasks = [task for one in builds.values() for task in one.tasks(raw)]
        if tasks:
            with (
                _forget_changed_file(work / "inventory"),
                progress("packing", sum(len(one.samples) for one in builds.values())) as advance,
            ):
                advance(sum(w.samples for one in builds.values() for w in one.done.values()))
                for name, written in run_all(_write_one, tasks, engine, jobs):
                    builds[name].done[written.name] = written
                    advance(written.samples)
        scan.lacking = _lacking(inventory, samples, only)
        return scan, [one.finish() for one in builds.values()]


def _sets_of(catalog: Catalog, scan: SourceScan, only: Sequence[str]) -> list[str]:
    """List the sets that images of the scanned sources may go to, before any image is decoded."""
    names = set[str]()
    for table in scan.items.values():
        names.update(*map(parse_json, table.column("destination").unique().to_pylist()))
    for source in scan.packed_only:
        names.update(*catalog.sources[source].destinations())
    return sorted(name for name in names if not only or name in only)


def _lacking(
    inventory: pa.Table, samples: Mapping[str, pa.Table], only: Sequence[str]
) -> dict[str, list[str]]:
    """Map sets to the classes of which they have no image, though a source gives them a share."""
    rows = inventory.select(["destination", "label"]).group_by(["destination", "label"])
    expected = {
        (name, row["label"])
        for row in rows.aggregate([]).to_pylist()
        for name in parse_json(row["destination"])
        if not only or name in only
    }
    packed = {
        (name, label)
        for name, table in samples.items()
        for label in table.column("label").unique().to_pylist()
    }
    lacking: dict[str, list[str]] = {}
    for name, label in sorted(expected - packed):
        lacking.setdefault(name, []).append(CLASSES[label])
    return lacking


def _write_one(set_name: str, *task: Any) -> tuple[str, Written]:
    return set_name, write_shard(*task)


def _read_everything(
    catalog: Catalog, scan: SourceScan, raw: AnyPath, out: AnyPath, jobs: int, engine: Engine,
    tolerance: Tolerance, progress: Progress,
) -> pa.Table:  # fmt: skip
    """Return the inventory of all sources in catalog order; decode new and changed images.

    Raises:
        ShardError: a packed source would lose all of its images.
    """
    folder = out / WORK_FOLDER / "inventory"
    files = files_by_source(folder)
    tasks = [
        (str(raw.absolute()), str(folder.absolute()), file, chunk)
        for name, table in scan.items.items()
        for file, chunk in missing_chunks(name, table, known_facts(files[name]))
    ]
    if tasks:
        with progress("decoding", sum(chunk.num_rows for *_, chunk in tasks)) as advance:
            for done in run_all(take_inventory, tasks, engine, jobs):
                advance(done)
        files = files_by_source(folder)
    tables = {name: join_facts(name, files[name], items) for name, items in scan.items.items()}
    for name in scan.packed_only:
        packed = read_source(folder, name, catalog.sources[name])
        assert packed is not None  # its file is in the list of `find_sources`
        tables[name], scan.listings[name] = packed
    if not tolerance.allow_replaced:
        refuse_replaced(raw, out, catalog.sets, files, tables)
    for name in scan.items:
        source, listing = catalog.sources[name], scan.listings[name]
        finish_source(folder, name, files[name], source, tables[name], listing)
    return pa.concat_tables(tables.values(), promote_options="default").unify_dictionaries()


@contextlib.contextmanager
def _forget_changed_file(folder: AnyPath) -> Iterator[None]:
    """On a `ChangedError`, delete the raw file's rows in the inventory, so that the next build
    decodes the file again, even if its size and time are as before.
    """
    try:
        yield
    except ChangedError as error:
        forget(folder, error.source, error.path)
        raise


class _SetBuild:
    """One set during a build: its samples, and its quarantined and excluded images."""

    def __init__(
        self, name: str, catalog: Catalog, scan: SourceScan, inventory: pa.Table, decision: Decision
    ) -> None:
        self.name, self.catalog, self.scan = name, catalog, scan
        self.split = catalog.sets[name]
        bad = np.asarray(inventory.column("error").to_numpy() != "")
        wanted = decision.wanted == name
        taken = np.flatnonzero((decision.sets == name) & ~bad)
        self.total = int(wanted.sum())
        self.samples = self._samples(inventory.take(taken), decision.groups[taken])
        self.quarantined = inventory.take(np.flatnonzero(wanted & bad)).select(
            ["source", "origin", "error"]
        )
        away = np.flatnonzero(wanted & ~bad & (decision.sets == ""))
        self.excluded = _excluded(inventory, decision, away)

    def _samples(self, table: pa.Table, groups: np.ndarray) -> pa.Table:
        """Convert inventory rows to index rows: add the key, the split and the merged group."""
        pairs = zip(
            table.column("source").to_pylist(), table.column("origin").to_pylist(), strict=True
        )
        keys = [sample_key(source, origin) for source, origin in pairs]
        table = table.drop_columns(["group", "thumbnail", "error", "destination"])
        table = table.append_column("key", pa.array(keys, pa.string()))
        table = table.append_column("group", pa.array(groups, pa.string()))
        return table.append_column("split", pa.array([self.split] * len(keys), pa.string()))

    def refuse_many_bad(self, max_bad: float) -> None:
        """Raise an error if more than `max_bad` of the images are unreadable. One bad image may
        pass unless `max_bad` is 0.
        """
        if not (bad := self.quarantined.num_rows):
            return
        many = bad > 1 or not max_bad
        # Not `bad > max_bad * total`: 0.29 * 100 is less than 29.
        if bad == self.total or (many and bad / self.total > max_bad):
            first = self.quarantined.slice(0, 1).to_pylist()[0]
            raise ShardError(
                f"{bad:,} of {counted(self.total, 'image')} of set {self.name} cannot be read, "
                f"more than {100 * max_bad:g} %; the first is {first['origin']} "
                f"({first['error']}). Repair or remove them, or raise --max-bad"
            )

    def refuse_lacking_class(self) -> None:
        """Raise an error for a training set that lacks a class: no classifier can be trained."""
        labels = self.samples.column("label").unique().to_pylist()
        if self.split == "train" and not labels:
            raise ShardError(
                f"training set {self.name} would be empty: all of its images are excluded, such as "
                f"{self.excluded[0]}; add other images, or pass --allow-incomplete"
            )
        if self.split == "train" and len(labels) == 1:
            kind, other = CLASSES[labels[0]], CLASSES[1 - labels[0]]
            why = why_lacking(self.excluded, 1 - labels[0])
            advice = f"add other {other}" if why else f"add {other}"
            if BOTH_LABELS in why:
                advice = f"correct the labels or {advice}"
            raise ShardError(
                f"training set {self.name} has {counted(len(self.samples), f'{kind} image')} and "
                f"no {other} images{why}; {advice} images, or pass --allow-incomplete"
            )

    def plan(self, out: AnyPath) -> None:
        """Divide the samples into shards, and find the shards that are finished already."""
        self.folder, self.marks = out / self.name, out / WORK_FOLDER / self.name
        make_folder(self.folder)
        make_folder(self.marks)
        self.plans = plan_shards(self.samples, self.split)
        finished = read_done(self.plans, self.folder, self.marks)
        self.done: dict[str, Written] = {written.name: written for written in finished if written}
        self.todo = [plan for plan in self.plans if plan.name not in self.done]
        self._refuse_to_lose(out)
        names = files_of(plan.name for plan in self.plans)
        write_record(self.marks, read_record(self.marks) | names)

    def tasks(self, raw: AnyPath) -> Iterator[tuple]:
        """Yield a task per missing shard."""
        for plan in self.todo:
            yield (
                self.name, *(str(path.absolute()) for path in (raw, self.folder, self.marks)),
                plan.name, plan.fingerprint, self.samples.take(plan.rows),
            )  # fmt: skip

    def _refuse_to_lose(self, out: AnyPath) -> None:
        """Refuse to drop packed images whose raw files or catalog entry are gone.

        Raises:
            ShardError: the plan needs raw files that are gone, or a packed source is not in the
                catalog.
        """
        gone = sorted({plan.source for plan in self.todo} & set(self.scan.packed_only))
        if gone:
            raise ShardError(
                f"set {self.name} has shards to pack again, but the raw files of "
                f"{', '.join(gone)} are gone; restore them and build again (nothing was changed)"
            )
        inventory = out / WORK_FOLDER / "inventory"
        for name in sorted(packed_sources(self.marks) - self.catalog.sources.keys()):
            if (inventory / f"{name}.parquet").exists():
                raise ShardError(
                    f"set {self.name} contains source {name}, which is not in the catalog; pass "
                    "the --catalog that describes the source, or remove the source from the set by "
                    f"deleting {inventory / name}.parquet (nothing was changed)"
                )

    def finish(self) -> BuiltSet:
        """Write the samples table, the excluded images and, last, the index."""
        folder, plans = self.folder, self.plans
        shards = [self.done[plan.name] for plan in plans]
        tables = read_rows(plans, self.marks)
        table = pa.concat_tables([SAMPLES_SCHEMA.empty_table(), *tables]).unify_dictionaries()
        table = table.replace_schema_metadata(None)
        write_atomically(
            folder / SAMPLES_FILE,
            lambda path: pq.write_table(table, path, row_group_size=ROW_GROUP),
        )
        write_atomically(folder / EXCLUDED_FILE, self._write_excluded)
        sources = sorted({plan.source for plan in plans})
        quarantined: list[Quarantined] = [
            {"source": row["source"], "path": row["origin"], "reason": row["error"]}
            for row in self.quarantined.to_pylist()
        ]
        index: Index = {
            "format_version": FORMAT_VERSION,
            "set": self.name,
            "split": self.split,
            "classes": list(CLASSES),
            "samples": table.num_rows,
            "samples_sha256": sha256_of(folder / SAMPLES_FILE),
            "shards": [shard.entry() for shard in shards],
            "totals": _totals(table),
            "sources": {name: self._about(name) for name in sources},
            "quarantined": sorted(quarantined, key=lambda entry: entry["path"]),
            "excluded": dict(sorted(Counter(row.reason for row in self.excluded).items())),
            "excluded_sha256": sha256_of(folder / EXCLUDED_FILE),
            "content_sha256": "",  # set below
        }
        index["content_sha256"] = content_sha256(index)
        text = json.dumps(index, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        write_text(folder / TIMM_FILE, json.dumps(timm_info(index), indent=1) + "\n")
        remove_earlier(folder, self.marks, {shard.name for shard in shards})
        # Workers that wrote a shard have deleted the index (`write_shard`).
        path = folder / INDEX_FILE
        if self.todo or not path.exists() or read_text(path) != text:
            write_text(path, text)
        return BuiltSet(self.name, index, len(self.todo), self.excluded)

    def _about(self, name: str) -> SourceEntry:
        """Return the entry of a source in the index."""
        source, listing = self.catalog.sources[name], self.scan.listings[name]
        entry: SourceEntry = {
            "license": source.license,
            "homepage": source.homepage,
            "policy": source.policy,
            "replay": source.replay,
            "read_as": listing.read_as,
            "excluded": {reason: entry["files"] for reason, entry in listing.excluded.items()},
        }
        # Only if given, so that indexes of sets without a title do not change.
        if source.title:
            entry["title"] = source.title
        if source.synthetic:
            entry["synthetic"] = True
        return entry

    def _write_excluded(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["source", "origin", "reason", "conflicts_with"])
            writer.writerows(row[:4] for row in self.excluded)


def _excluded(inventory: pa.Table, decision: Decision, rows: np.ndarray) -> list[Excluded]:
    """List the excluded images, with the origin of the image kept instead, sorted by source."""
    others = decision.other[rows]
    origins = inventory.column("origin").take(np.maximum(others, 0)).to_pylist()
    columns: list[list[Any]] = [
        inventory.column("source").take(rows).to_pylist(),
        inventory.column("origin").take(rows).to_pylist(),
        decision.reasons[rows].tolist(),
        [origin if row >= 0 else "" for origin, row in zip(origins, others.tolist(), strict=True)],
        inventory.column("label").take(rows).to_pylist(),
    ]
    return sorted(map(Excluded, *columns))


def _totals(table: pa.Table) -> Totals:
    """Count the samples per class, source and generator."""
    labels = Counter(CLASSES[label] for label in table.column("label").to_pylist())
    return {
        "label": dict(sorted(labels.items())),
        "source": dict(sorted(Counter(table.column("source").to_pylist()).items())),
        "generator": dict(sorted(Counter(table.column("generator").to_pylist()).items())),
    }
