"""From raw folders to shard sets: list, decode once, decide, pack, and write each index last.

Whatever an earlier run has finished is kept, however it ended. Below the output:

    .build/inventory/<source>.parquet      every raw image, described (sharding/inventory.py)
    .build/<set>/<shard>.tar.parquet       the rows of a finished shard, and the mark that it is
    .build/<set>/written.json              which files of the set a build wrote (sharding/record.py)
    <set>/                                 what `sharding/format.py` promises
"""

import contextlib
import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sharding.catalog import Catalog, CatalogError, Source
from sharding.dedupe import SPLIT_RANK, Decision, decide
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
    table_from,
    timm_info,
)  # fmt: skip
from sharding.inventory import (
    finish_source,
    item_table,
    known_facts,
    missing_chunks,
    read_source,
    take_inventory,
)  # fmt: skip
from sharding.listing import Listing, capped, list_source
from sharding.lock import locked
from sharding.plan import plan_shards, sample_key
from sharding.raw import folder_of
from sharding.record import (
    files_of,
    read_record,
    refuse_foreign_files,
    remove_earlier,
    write_record,
)  # fmt: skip
from sharding.write import Written, read_done, write_shard
from storage import (
    AnyPath,
    check_inside,
    check_reachable,
    make_folder,
    sha256_of,
    write_atomically,
    write_text,
)

WORK_FOLDER = ".build"
"""Below the output; only a build reads it."""

COUNT_TOLERANCE = 0.02
"""How far a source may be from the count that its catalog entry expects."""

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""`progress(what, total)` is a context whose value is called with the number of images done."""


@contextlib.contextmanager
def no_progress(_what: str, _total: int) -> Iterator[Callable[[int], None]]:
    """Shows nothing."""
    yield lambda _done: None


@dataclass
class SourceScan:
    """The sources of a catalog that are there: their images as tables, and notes on their layout.

    `packed_only` are sources whose raw files are gone, known from an earlier build; `missing` are
    those that were never there, and `empty` those of them whose folder is, without an image.
    """

    items: dict[str, pa.Table] = field(default_factory=dict)
    listings: dict[str, Listing] = field(default_factory=dict)
    packed_only: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    empty: dict[str, Listing] = field(default_factory=dict)


@dataclass(frozen=True)
class Tolerance:
    """What a build accepts: `max_bad` is the share of a set's images that may be unreadable, and
    `allow_incomplete` lets rules that match no file and training sets of one class pass.
    """

    max_bad: float = 0.01
    allow_incomplete: bool = False


STRICT = Tolerance()


@dataclass(frozen=True)
class BuiltSet:
    """One set after a build: its index, and how many shards this run wrote."""

    name: str
    index: dict[str, Any]
    shards_written: int


def find_sources(
    catalog: Catalog,
    raw: AnyPath,
    out: AnyPath,
    only: Sequence[str] = (),
    tolerance: Tolerance = STRICT,
) -> SourceScan:
    """List the images of every catalog source that is on disk or was packed before.

    With `only`, sources that have no say in those sets are passed over: who is left out of a set
    depends on sets whose split goes before its own, and on no other.

    Raises:
        CatalogError: a layout that does not fit, a source with far fewer images than expected, or a
            rule that matches no file.
    """
    scan = SourceScan()
    lowest = min(
        (SPLIT_RANK[catalog.sets[name]] for name in only if name in catalog.sets), default=0
    )
    for name, source in catalog.sources.items():
        sets = {name for destination in source.destinations() for name in destination}
        if not any(SPLIT_RANK[catalog.sets[name]] >= lowest for name in sets):
            continue
        source = replace(source, root=folder_of(raw, source.root or name))
        if (raw / source.root).is_dir():
            listing = list_source(name, source, raw)
            if listing.items:
                _check_counts(name, source, listing, max(COUNT_TOLERANCE, tolerance.max_bad))
                if listing.unmatched and not tolerance.allow_incomplete:
                    _refuse_unmatched(name, listing, raw / source.root)
                capped(listing, source.cap)
                scan.items[name] = item_table(listing.items)
                scan.listings[name] = replace(listing, items=[])  # ten times the memory
            else:
                scan.missing.append(name)
                scan.empty[name] = listing
        elif (out / WORK_FOLDER / "inventory" / f"{name}.parquet").exists():
            scan.packed_only.append(name)
        else:
            scan.missing.append(name)
    return scan


def _refuse_unmatched(name: str, listing: Listing, folder: AnyPath) -> None:
    """A rule without a file is a misspelled rule, or half a download."""
    shown = "; ".join(listing.unmatched[:4]) + ("; ..." if len(listing.unmatched) > 4 else "")
    raise CatalogError(
        f"source {name}: no file in {folder} fits {shown}. Correct the rule or complete the data; "
        "if it is meant, say optional = true in the rule, or --allow-incomplete"
    )


def _check_counts(name: str, source: Source, listing: Listing, tolerance: float) -> None:
    """A source with far fewer images than were counted elsewhere is half a download."""
    counts = Counter(CLASSES[item.label] for item in listing.items)
    for kind, expected in source.expected.items():
        if abs(counts[kind] - expected) > tolerance * expected:
            raise CatalogError(
                f"source {name} has {counts[kind]:,} {kind} images, its catalog entry expects "
                f"{expected:,}. Complete it (python -m sharding fetch {name}), allow more with "
                f"--max-bad, or say in a catalog of your own: [sources.{name}] expected = {{}}"
            )


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
    """Pack everything of `catalog` below `raw` into sets below `out`, or only the sets `only`.

    Finished sets whose input has not changed are left alone; an interrupted build goes on with what
    is missing. `jobs` is the number of processes, 0 for one per core.

    Raises:
        ShardError: another build runs here, a set lost too many images, or a raw file changed.
        CatalogError, RawError: what lies below `raw` does not fit the catalog.
        OSError: a file that cannot be read or written.
    """
    check_reachable(raw)
    check_reachable(out)
    scan = find_sources(catalog, raw, out, only, tolerance)
    if not scan.listings and not scan.packed_only:
        return scan, []
    work = out / WORK_FOLDER
    for path in (work, work / "inventory"):
        check_inside(path, out)
    make_folder(work / "inventory")
    with locked(work, out):
        for name in _sets_of(catalog, scan, only):
            for path in (out / name, work / name):
                check_inside(path, out)
            refuse_foreign_files(out / name, work / name)
        inventory = _read_everything(scan, raw, work / "inventory", jobs, engine, progress)
        decision = decide(inventory, catalog.sets, catalog.exclude)
        present = sorted(set(decision.wanted.tolist()))
        if unknown := sorted(set(only) - set(present)):
            raise ShardError(
                f"nothing to build for set {', '.join(unknown)}; below {raw} lie images for "
                f"{', '.join(present)}"
            )
        chosen = [name for name in present if not only or name in only]
        builds = {name: _SetBuild(name, catalog, scan, inventory, decision) for name in chosen}
        for one in builds.values():
            one.refuse_many_bad(tolerance.max_bad)
            if not tolerance.allow_incomplete:
                one.refuse_one_class()
        for one in builds.values():
            one.plan(out)
        # The sets' shards share one pool; a set is finished as soon as its last one is there.
        tasks = [task for one in builds.values() for task in one.tasks(raw)]
        if tasks:
            with progress("packing", sum(len(one.samples) for one in builds.values())) as advance:
                advance(sum(w.samples for one in builds.values() for w in one.done.values()))
                for name, written in run_all(_write_one, tasks, engine, jobs):
                    builds[name].done[written.name] = written
                    advance(written.samples)
        return scan, [one.finish() for one in builds.values()]


def _sets_of(catalog: Catalog, scan: SourceScan, only: Sequence[str]) -> list[str]:
    """The sets that the sources may go to, before anything is decoded."""
    names = set()
    for table in scan.items.values():
        for mixture in table.column("destination").unique().to_pylist():
            names |= json.loads(mixture).keys()
    for source in scan.packed_only:
        names.update(*catalog.sources[source].destinations())
    return sorted(name for name in names if not only or name in only)


def _write_one(set_name: str, *task: Any) -> tuple[str, Written]:
    return set_name, write_shard(*task)


def _read_everything(
    scan: SourceScan, raw: AnyPath, folder: AnyPath, jobs: int, engine: Engine, progress: Progress
) -> pa.Table:
    """The inventory of all sources, in the order of the catalog; decodes what is not known."""
    tasks = [
        (str(raw), str(folder), file, chunk)
        for name, table in scan.items.items()
        for file, chunk in missing_chunks(name, table, known_facts(folder, name))
    ]
    if tasks:
        with progress("decoding", sum(chunk.num_rows for *_, chunk in tasks)) as advance:
            for done in run_all(take_inventory, tasks, engine, jobs):
                advance(done)
    tables = [
        finish_source(folder, name, table, scan.listings[name])
        for name, table in scan.items.items()
    ]
    for name in scan.packed_only:
        packed = read_source(folder, name)
        assert packed is not None  # that is how it is known
        table, listing = packed
        scan.listings[name] = listing
        tables.append(table)
    return pa.concat_tables(tables, promote_options="default").unify_dictionaries()


class _SetBuild:
    """One set to build: its samples, and what is left out of it."""

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
        """Inventory rows as rows of the index: with key, split and merged group."""
        pairs = zip(
            table.column("source").to_pylist(), table.column("origin").to_pylist(), strict=True
        )
        keys = [sample_key(source, origin) for source, origin in pairs]
        table = table.drop_columns(["group", "thumbnail", "error", "destination"])
        table = table.append_column("key", pa.array(keys, pa.string()))
        table = table.append_column("group", pa.array(groups, pa.string()))
        return table.append_column("split", pa.array([self.split] * len(keys), pa.string()))

    def refuse_many_bad(self, max_bad: float) -> None:
        """A set that lost more than a few images is not the set that was meant."""
        bad = self.quarantined.num_rows
        if bad > max(1, max_bad * self.total) or (bad and bad == self.total):
            first = self.quarantined.slice(0, 1).to_pylist()[0]
            raise ShardError(
                f"{bad:,} of {self.total:,} images of set {self.name} are unreadable, more than "
                f"{max_bad:.0%}; the first is {first['origin']} ({first['error']}). Mend or remove "
                "them, or allow more with --max-bad"
            )

    def refuse_one_class(self) -> None:
        """A network that is trained on one class learns to name it."""
        labels = self.samples.column("label").unique().to_pylist()
        if self.split == "train" and len(labels) == 1:
            other = CLASSES[1 - labels[0]]
            raise ShardError(
                f"training set {self.name} has {len(self.samples):,} {CLASSES[labels[0]]} images "
                f"and no {other} one; add {other} images, or say --allow-incomplete if it is meant"
            )

    def plan(self, out: AnyPath) -> None:
        """Divide the samples into shards, and see which are there already."""
        self.folder, self.marks = out / self.name, out / WORK_FOLDER / self.name
        make_folder(self.folder)
        make_folder(self.marks)
        self.plans = plan_shards(self.samples, self.split)
        finished = [read_done(plan, self.folder, self.marks) for plan in self.plans]
        self.done: dict[str, Written] = {written.name: written for written in finished if written}
        self.todo = [plan for plan in self.plans if plan.name not in self.done]
        self._refuse_to_lose(out)
        names = files_of(plan.name for plan in self.plans)
        write_record(self.marks, read_record(self.marks) | names)

    def tasks(self, raw: AnyPath) -> Iterator[tuple]:
        """The shards to write; from here until the end this is no set."""
        if self.todo:
            (self.folder / INDEX_FILE).unlink(missing_ok=True)
        for plan in self.todo:
            yield (
                self.name, str(raw), str(self.folder), str(self.marks), plan.name,
                plan.fingerprint, self.samples.take(plan.rows),
            )  # fmt: skip

    def _refuse_to_lose(self, out: AnyPath) -> None:
        """What was packed does not go away because its raw files or its catalog entry did.

        Raises:
            ShardError: the plan needs raw files that are gone, or forgets a source.
        """
        gone = sorted({plan.source for plan in self.todo} & set(self.scan.packed_only))
        if gone:
            raise ShardError(
                f"set {self.name} must be packed again in parts, and the raw files of "
                f"{', '.join(gone)} are gone; put them back (nothing was changed)"
            )
        inventory = out / WORK_FOLDER / "inventory"
        shards = [name for name in read_record(self.marks) if name.endswith(".tar")]
        before = {name.rsplit("-", 2)[0] for name in shards}
        for name in sorted(before - self.catalog.sources.keys()):
            if (inventory / f"{name}.parquet").exists():
                raise ShardError(
                    f"set {self.name} holds source {name}, which this catalog does not name; "
                    "pass the --catalog that describes it, or, to take it out of the set, delete "
                    f"{inventory / name}.parquet (nothing was changed)"
                )

    def finish(self) -> BuiltSet:
        """Write what was left out, the table, and then the index; all follow from the input."""
        folder, plans = self.folder, self.plans
        shards = [self.done[plan.name] for plan in plans]
        tables = [_read_rows(self.marks / f"{plan.name}.parquet") for plan in plans]
        table = pa.concat_tables([SAMPLES_SCHEMA.empty_table(), *tables]).unify_dictionaries()
        table = table.replace_schema_metadata(None)
        write_atomically(
            folder / SAMPLES_FILE,
            lambda path: pq.write_table(table, path, row_group_size=ROW_GROUP),
        )
        write_atomically(folder / EXCLUDED_FILE, self._write_excluded)
        sources = sorted({plan.source for plan in plans})
        quarantined = [
            {"source": row["source"], "path": row["origin"], "reason": row["error"]}
            for row in self.quarantined.to_pylist()
        ]
        index = {
            "format_version": FORMAT_VERSION,
            "set": self.name,
            "split": self.split,
            "classes": list(CLASSES),
            "samples": table.num_rows,
            "samples_sha256": sha256_of(folder / SAMPLES_FILE),
            "shards": [asdict(shard) for shard in shards],
            "totals": _totals(table),
            "sources": {name: self._about(name) for name in sources},
            "quarantined": sorted(quarantined, key=lambda entry: entry["path"]),
            "excluded": dict(sorted(Counter(reason for *_, reason, _ in self.excluded).items())),
            "excluded_sha256": sha256_of(folder / EXCLUDED_FILE),
        }
        index["content_sha256"] = content_sha256(index)
        text = json.dumps(index, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        write_text(folder / TIMM_FILE, json.dumps(timm_info(index), indent=1) + "\n")
        remove_earlier(folder, self.marks, {shard.name for shard in shards})
        if not (folder / INDEX_FILE).exists() or _text_of(folder / INDEX_FILE) != text:
            write_text(folder / INDEX_FILE, text)
        return BuiltSet(self.name, index, len(self.todo))

    def _about(self, name: str) -> dict[str, Any]:
        """What a loader and a reader of the index need to know of a source."""
        source, listing = self.catalog.sources[name], self.scan.listings[name]
        return {
            "license": source.license,
            "homepage": source.homepage,
            "policy": source.policy,
            "replay": source.replay,
            "read_as": listing.read_as,
            "excluded": {reason: entry["files"] for reason, entry in listing.excluded.items()},
            # Only where it holds, so that the index of every other set stays as it is.
            **({"synthetic": True} if source.synthetic else {}),
        }

    def _write_excluded(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["source", "origin", "reason", "conflicts_with"])
            writer.writerows(self.excluded)


def _excluded(
    inventory: pa.Table, decision: Decision, rows: np.ndarray
) -> list[tuple[str, str, str, str]]:
    """(source, origin, reason, origin of the image kept instead or "") of what is left out."""
    others = decision.other[rows]
    origins = inventory.column("origin").take(np.maximum(others, 0)).to_pylist()
    columns = [
        inventory.column("source").take(rows).to_pylist(),
        inventory.column("origin").take(rows).to_pylist(),
        decision.reasons[rows].tolist(),
        [origin if row >= 0 else "" for origin, row in zip(origins, others.tolist(), strict=True)],
    ]
    return sorted(zip(*columns, strict=True))


def _totals(table: pa.Table) -> dict[str, dict[str, int]]:
    """Samples per class, source and generator."""
    labels = Counter(CLASSES[label] for label in table.column("label").to_pylist())
    return {
        "label": dict(sorted(labels.items())),
        "source": dict(sorted(Counter(table.column("source").to_pylist()).items())),
        "generator": dict(sorted(Counter(table.column("generator").to_pylist()).items())),
    }


def _read_rows(path: AnyPath) -> pa.Table:
    return table_from(path.read_bytes()).select(SAMPLES_SCHEMA.names).cast(SAMPLES_SCHEMA)


def _text_of(path: AnyPath) -> str:
    return path.read_text(encoding="utf-8")
