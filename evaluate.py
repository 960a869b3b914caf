"""Measure a checkpoint on shard sets: `python evaluate.py --shards evalgen`.

Every sample is scored exactly once. Fakes found (recall) never stand without the false-positive
rate on real images; where a set has no real images, the report says so in words.
"""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

import console
from model.checkpoint import find, git_commit, load_network
from model.device import choose_device, choose_precision, describe, keep_freed_memory
from model.metrics import (
    Metrics,
    measure,
    measure_generators,
    measure_sources,
    what_is_missing,
)  # fmt: skip
from model.score import Scores, probability, score_set
from pipeline import Loading, open_loader
from sharding.format import ShardSet, open_shards, read_index
from sharding.storage import AnyPath, any_path

REPORT_VERSION = 1

COLUMNS = (
    "what", "images", "reals", "fakes", "accuracy", "recall", "false positives", "F1", "AUROC",
)  # fmt: skip


@dataclass(frozen=True)
class Subset:
    """A list of samples to score: the keys of each set, and the file that they are from."""

    file: str
    sha256: str
    keys: Mapping[str, Sequence[str]]


def read_subset(path: Path) -> Subset:
    """Read a CSV file with the columns `set` and `key`, as `sharding audit --match` writes it.

    Raises:
        ValueError: other columns, no sample, or a sample that is listed twice.
    """
    data = path.read_bytes()
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file: {error}") from error
    if not rows or rows[0] != ["set", "key"]:
        raise ValueError(
            f"{path} begins with {','.join(rows[0]) if rows else 'nothing'!r}, expected the header "
            "set,key; `python -m sharding audit DIR --match FILE` writes such a list"
        )
    keys: dict[str, list[str]] = {}
    for number, row in enumerate(rows[1:], start=2):
        if row and len(row) != 2:
            raise ValueError(f"{path}:{number} has {len(row)} values, expected set,key")
        if row:
            keys.setdefault(row[0], []).append(row[1])
    listed = sum(map(len, keys.values()))
    if not listed:
        raise ValueError(f"{path} lists no sample; write the list again")
    different = sum(len(set(of_set)) for of_set in keys.values())
    if different != listed:
        raise ValueError(
            f"{path} lists {listed:,} samples, {listed - different:,} of them again; each must "
            "stand there once"
        )
    return Subset(path.name, hashlib.sha256(data).hexdigest(), keys)


def choose_samples(shards: ShardSet, name: str, subset: Subset) -> ShardSet:
    """The samples of set `name` that `subset` lists, in the order of the set.

    Raises:
        ValueError: the list says nothing of this set, or names keys that it does not hold.
    """
    wanted = set(subset.keys.get(name, ()))
    if not wanted:
        raise ValueError(
            f"{subset.file} lists no sample of {name}, only of {', '.join(subset.keys)}; leave "
            f"out --shards {name}, or list samples of it"
        )
    held = shards.table.column("key").to_pylist()
    rows = np.array([row for row, key in enumerate(held) if key in wanted], np.int64)
    unknown = sorted(wanted.difference(held))
    if unknown:
        raise ValueError(
            f"{len(unknown):,} of the {len(wanted):,} samples that {subset.file} lists of {name} "
            f"are not in that set of {len(held):,} (first: {unknown[0]}); make the list again "
            "from these shards"
        )
    return shards.take(rows)


def report_set(shards: ShardSet, scores: Scores, meta: dict[str, Any]) -> dict[str, Any]:
    """The figures of one set: overall, per source and per generator."""
    fake = probability(scores.logits, meta["temperature"])
    threshold = meta["threshold"]
    overall = measure(scores.labels, fake, threshold)
    groups = {
        "sources": measure_sources(
            scores.labels, fake, shards.names("source", scores.samples), threshold
        ),
        "generators": measure_generators(
            scores.labels, fake, shards.names("generator", scores.samples), threshold
        ),
    }
    return {
        "index_sha256": shards.sha256,
        "overall": asdict(overall),
        **{kind: {name: asdict(m) for name, m in found.items()} for kind, found in groups.items()},
        "unreadable": [f"{shards.name(s)}: {why}" for s, why in sorted(scores.failures.items())],
        "note": what_is_missing(overall),
    }


def evaluate(
    checkpoint: Path,
    data: AnyPath,
    names: Sequence[str],
    *,
    loading: Loading,
    device: str = "auto",
    subset: Subset | None = None,
) -> dict[str, Any]:
    """The report on `names` (sets below `data`), or on a subset of their samples: what
    `report.json` holds.
    """
    for name in names:
        read_index(data / name)  # a wrong name is said before any work is done
    opened = {}
    for name in names:
        whole = open_shards([data / name])
        opened[name] = whole, choose_samples(whole, name, subset) if subset else whole
    net, view, meta = load_network(checkpoint)
    where = choose_device(device)
    keep_freed_memory(where)
    dtype, reason = choose_precision("auto", where)
    console.log.info("%s on %s (%s)", describe(dtype), where, reason)
    net.to(where)
    sets = {}
    for name, (whole, shards) in opened.items():
        loader = open_loader(shards, view=view, loading=loading, device=where)
        console.log.info("%s: images through %s (%s)", name, loader.backend, loader.reason)
        with console.progress(f"scoring {name}", len(shards)) as advance:
            scores = score_set(net, loader, dtype, advance)
        sets[name] = report_set(shards, scores, meta) | {"index_sha256": whole.sha256}
    return {
        "report_version": REPORT_VERSION,
        "checkpoint": str(checkpoint),
        "run": meta["recipe"]["name"],
        "step": meta["step"],
        "commit": git_commit(),
        "threshold": meta["threshold"],
        "temperature": meta["temperature"],
        "subset": None
        if subset is None
        else {
            "file": subset.file,
            "sha256": subset.sha256,
            "samples": sum(len(chosen) for _whole, chosen in opened.values()),
        },
        "sets": sets,
    }


def _row(name: str, found: dict[str, Any]) -> list[Any]:
    metrics = Metrics(**found)
    return [
        name, metrics.count, metrics.reals, metrics.fakes, metrics.accuracy, metrics.recall,
        metrics.false_positive_rate, metrics.f1, metrics.auroc,
    ]  # fmt: skip


def print_report(report: dict[str, Any]) -> None:
    """A table per set, and what a reader must know to read it."""
    if report["subset"]:
        console.say(
            f"only the {report['subset']['samples']:,} samples listed in {report['subset']['file']}"
        )
    for name, found in report["sets"].items():
        rows = [_row("overall", found["overall"])]
        rows += [_row(f"source {source}", m) for source, m in found["sources"].items()]
        rows += [_row(f"generator {gen}", m) for gen, m in found["generators"].items()]
        title = f"{name}: {report['run']} step {report['step']}, fake from {report['threshold']:g}"
        console.table(title, COLUMNS, rows)
        if found["generators"] and found["overall"]["reals"]:
            console.say("A generator's fakes are held against all real images of the set.")
        if found["note"]:
            console.say(found["note"])
        if found["unreadable"]:
            console.say(f"{len(found['unreadable'])} unreadable, first: {found['unreadable'][0]}")


def print_comparison(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Two reports side by side, for the sets, sources and generators that both have."""
    rows = []
    for name in (name for name in before["sets"] if name in after["sets"]):
        one, two = before["sets"][name], after["sets"][name]
        pairs = [(name, one["overall"], two["overall"])]
        for kind in ("sources", "generators"):
            shared = [key for key in one[kind] if key in two[kind]]
            if kind == "generators" or len(shared) > 1:
                pairs += [
                    (f"  {kind[:-1]} {key}", one[kind][key], two[kind][key]) for key in shared
                ]
        for label, first, second in pairs:
            figures = ("auroc", "recall", "false_positive_rate")
            changes = [_change(first[figure], second[figure]) for figure in figures]
            rows.append([label, first["count"], *changes])
    first, second = ((report.get("subset") or {}).get("sha256") for report in (before, after))
    if first != second:
        console.say("The reports are on different samples: another --subset, or none.")
    title = f"{before['run']} step {before['step']} -> {after['run']} step {after['step']}"
    console.table(title, ["set", "images", "AUROC", "recall", "false positives"], rows)


def _change(before: float | None, after: float | None) -> str | None:
    if before is None or after is None:
        return None
    return f"{before:.3f} -> {after:.3f} ({after - before:+.3f})"


def _read_report(path: Path) -> dict[str, Any]:
    report = json.loads(path.read_text(encoding="utf-8"))
    if report.get("report_version") != REPORT_VERSION:
        raise ValueError(f"{path} is not a report of this program (version {REPORT_VERSION})")
    return report


@click.group(cls=console.Group, invoke_without_command=True)
@click.option("--shards", "names", multiple=True, help="Set to measure on. May be repeated.")
@click.option(
    "--subset",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="CSV with set,key: score only these samples. Default of --shards: its sets.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for report.json. Default: evaluation/ beside the checkpoint.",
)
@console.options("checkpoint", "data", "runs", "device", "backend")
@click.pass_context
def main(
    context: click.Context,
    names: tuple[str, ...],
    subset: Path | None,
    out: Path | None,
    checkpoint: Path | None,
    data: str,
    runs: Path,
    device: str,
    backend: str,
) -> None:
    """Measure a checkpoint on one or more shard sets, or compare two reports."""
    if context.invoked_subcommand:
        return
    listed = read_subset(subset) if subset else None
    names = names or tuple(listed.keys if listed else ())
    if not names:
        raise click.UsageError("say which set to measure on, such as --shards evalgen")
    chosen = find(runs, checkpoint)
    console.say(f"checkpoint: {chosen}")
    loading = Loading(backend=backend)
    report = evaluate(chosen, any_path(data), names, loading=loading, device=device, subset=listed)
    folder = "+".join(names) + (f"-{subset.stem}" if subset else "")
    out = out or chosen.parent / "evaluation" / folder
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "report.json.partial"
    partial.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(out / "report.json")
    print_report(report)
    console.say(f"report: {out / 'report.json'}")


@main.command()
@click.argument("before", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("after", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@console.options()
def compare(before: Path, after: Path) -> None:
    """Put two report.json files side by side."""
    print_comparison(_read_report(before), _read_report(after))
    console.say(f"reports: {before} and {after}")


if __name__ == "__main__":
    main()
