"""Run a plan over processes, resume what an earlier run left, and write the index last."""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sharding.catalog import Catalog
from sharding.format import (
    CLASSES,
    FORMAT_VERSION,
    INDEX_FILE,
    SAMPLES_FILE,
    SAMPLES_SCHEMA,
    ShardError,
)  # fmt: skip
from sharding.layouts import Item, read_folders
from sharding.plan import ShardPlan, plan_shards
from sharding.write import Written, read_done, write_atomically, write_shard

WORK_FOLDER = ".build"
"""Inside a set: the rows of finished shards, and the lock. Only a build reads it."""


@dataclass(frozen=True)
class Scan:
    """What the raw folder holds of a catalogue."""

    items: list[Item]
    left_out: dict[str, dict[str, int]]  # source -> reason -> files
    found: list[str]  # sources with a folder
    missing: list[str]  # sources without


@dataclass(frozen=True)
class BuiltSet:
    """One set after a build: its index, and how many shards this run wrote."""

    name: str
    index: dict[str, Any]
    shards_written: int


def scan(catalog: Catalog, raw: Path) -> Scan:
    """List every image of every catalogue source that is on disk."""
    items: list[Item] = []
    left_out: dict[str, dict[str, int]] = {}
    found, missing = [], []
    for name, source in catalog.sources.items():
        if not (raw / (source.root or name)).is_dir():
            missing.append(name)
            continue
        found.append(name)
        listed, skipped = read_folders(name, source, raw)
        items += listed
        for (_, reason), count in sorted(skipped.items()):
            left_out.setdefault(name, {})[reason] = count
    return Scan(items, left_out, found, missing)


def build_set(
    name: str,
    found: Scan,
    catalog: Catalog,
    out: Path,
    *,
    jobs: int,
    max_bad: float,
    on_samples: Callable[[int], None] = lambda _count: None,
) -> BuiltSet:
    """Pack the items of set `name` into `out/name`.

    A finished set whose input has not changed is left alone; an interrupted one continues with the
    shards that are missing. `max_bad` is the share of images that may be unreadable.
    `on_samples(n)` is called as shards finish.

    Raises:
        ShardError: another build runs on this set, or too many of its images are unreadable.
        OSError: a file that cannot be read or written.
    """
    folder = out / name
    work = folder / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    with _locked(folder, work):
        items = [item for item in found.items if item.set == name]
        plans = plan_shards(items, catalog.sets[name])
        done = {plan.name: read_done(plan, folder, work) for plan in plans}
        todo = [plan for plan in plans if done[plan.name] is None]
        on_samples(sum(len(plan.items) for plan in plans if done[plan.name]))
        index_path = folder / INDEX_FILE
        if todo:
            index_path.unlink(missing_ok=True)  # from here until the end this is no set
        for plan, written in _write_all(todo, folder, work, jobs):
            done[plan.name] = written
            on_samples(len(plan.items))
        _refuse_many_bad(name, items, list(done.values()), max_bad)
        index = _finish(name, plans, done, found, catalog, folder, work)
        return BuiltSet(name, index, len(todo))


@contextlib.contextmanager
def _locked(folder: Path, work: Path) -> Iterator[None]:
    """Hold the set for one builder; the lock goes with the process, however it ends."""
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"another build is writing {folder}; wait for it to end") from None
        yield


def _write_all(
    plans: Sequence[ShardPlan], folder: Path, work: Path, jobs: int
) -> Iterator[tuple[ShardPlan, Written]]:
    """Write shards in `jobs` processes; yields each as it is done."""
    if jobs == 1 or len(plans) < 2:
        for plan in plans:
            yield plan, write_shard(plan, folder, work)
        return
    # Forking a process that has threads (a progress bar, a test runner) can deadlock.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sharding.write", "webdataset"])  # seconds, paid once
    with ProcessPoolExecutor(min(jobs, len(plans)), mp_context=context) as pool:
        futures = {pool.submit(write_shard, plan, folder, work): plan for plan in plans}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _refuse_many_bad(
    name: str, items: Sequence[Item], shards: Sequence[Written], max_bad: float
) -> None:
    """A set that lost more than a few images is not the set that was meant."""
    bad = [entry for shard in shards for entry in shard.quarantine]
    if len(bad) > max(1, max_bad * len(items)) or len(bad) == len(items):
        raise ShardError(
            f"{len(bad):,} of {len(items):,} images of set {name} are unreadable, more than "
            f"{max_bad:.0%}; the first is {bad[0]['path']} ({bad[0]['reason']}). Mend or remove "
            "them, or allow more with --max-bad"
        )


def _finish(
    name: str,
    plans: Sequence[ShardPlan],
    done: dict[str, Written],
    found: Scan,
    catalog: Catalog,
    folder: Path,
    work: Path,
) -> dict[str, Any]:
    """Write `samples.parquet` and then `index.json`; both depend on the input alone."""
    shards = [done[plan.name] for plan in plans]
    kept = [plan for plan in plans if done[plan.name].samples]
    table = pa.concat_tables(
        [pq.read_table(work / f"{plan.name}.parquet", schema=SAMPLES_SCHEMA) for plan in kept]
    ).unify_dictionaries()
    table = table.replace_schema_metadata(None)
    write_atomically(folder / SAMPLES_FILE, lambda path: pq.write_table(table, path))
    sources = sorted({plan.items[0][1].source for plan in plans})
    index = {
        "format_version": FORMAT_VERSION,
        "set": name,
        "split": catalog.sets[name],
        "classes": list(CLASSES),
        "samples": table.num_rows,
        "samples_sha256": hashlib.sha256((folder / SAMPLES_FILE).read_bytes()).hexdigest(),
        "shards": [
            {key: value for key, value in asdict(shard).items() if key != "quarantine"}
            for shard in shards
            if shard.samples
        ],
        "totals": _totals(table),
        "sources": {source: _about(catalog, source) for source in sources},
        "quarantine": [entry for shard in shards for entry in shard.quarantine],
        "left_out": {s: found.left_out[s] for s in sources if s in found.left_out},
    }
    text = json.dumps(index, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    _remove_strangers(folder, {shard["name"] for shard in index["shards"]})
    write_atomically(folder / INDEX_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    return index


def _totals(table: pa.Table) -> dict[str, dict[str, int]]:
    """Samples per class, source and generator."""
    labels = Counter(CLASSES[label] for label in table.column("label").to_pylist())
    return {
        "label": dict(sorted(labels.items())),
        "source": dict(sorted(Counter(table.column("source").to_pylist()).items())),
        "generator": dict(sorted(Counter(table.column("generator").to_pylist()).items())),
    }


def _about(catalog: Catalog, name: str) -> dict[str, Any]:
    """What a loader and a reader of the index need to know of a source."""
    source = catalog.sources[name]
    return {
        "licence": source.licence,
        "homepage": source.homepage,
        "law": source.law,
        "replay": source.replay,
    }


def _remove_strangers(folder: Path, names: set[str]) -> None:
    """Delete shards of an earlier, different plan: a set holds what its index lists."""
    for path in [*folder.glob("*.tar"), *folder.glob("*.idx"), *folder.glob("*.partial")]:
        if path.with_suffix(".tar").name not in names:
            path.unlink()
