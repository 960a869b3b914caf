"""Measure a checkpoint on shard sets: `python evaluate.py --shards evalgen`.

Every sample is scored exactly once, on any number of ranks, and its score saved, so that every
figure can be found again without the network. Fakes found (recall) never stand without the
false-positive rate on real images; where there are none, the report says so first.
"""

import json
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

import console
from model import evaluation
from model.bootstrap import DRAWS
from model.calibrate import ThresholdAt
from model.checkpoint import find, git_commit, load_network
from model.codec_swap import report_delivery
from model.compare import Flip, shared_samples
from model.compare import flips as find_flips
from model.device import choose_device, choose_precision, describe, keep_freed_memory
from model.distributed import Ranks, joined
from model.robustness import PER_CLASS
from model.score import score_set
from model.score_table import SCORES_FILE, read_scores, rows_of, write_scores
from model.validation import calibrate_checkpoint
from pipeline import Loading, View, open_loader
from pipeline.delivery import DELIVERIES
from pipeline.subset import Subset, choose_samples, read_subset
from report import table_csv, write_page, write_text
from report.terminal import print_calibration, print_comparison, print_report
from sharding.catalog import BUILT_IN, read_catalog
from sharding.format import CLASSES, ShardSet, join_sets, open_shards, read_index
from sharding.storage import AnyPath, any_path

REPORT_FILE = "report.json"


def choose_reals(
    data: AnyPath, opened: Mapping[str, ShardSet], asked: str | None
) -> dict[str, Any] | None:
    """The set whose real images stand beside, and why; see `model/evaluation.py`.

    Recall without a false-positive rate says nothing, so a set without real images gets those of
    the set that the catalogue names for it (`[reals]`), if it is at hand.

    Raises:
        ValueError: the set that was asked for has no real images.
    """
    if asked:
        if not _count_reals(data, asked):
            raise ValueError(f"--reals {asked}: that set has no real images; name one that has")
        return {"set": asked, "why": "--reals", "for_all": True}
    defaults = read_catalog([BUILT_IN]).reals
    for name, shards in opened.items():
        other = defaults.get(name)
        if (shards.column("label") == 0).any() or other is None:
            continue
        if (data / other / "index.json").exists() and _count_reals(data, other):
            return {"set": other, "why": "the catalogue's default", "for_all": False}
    return None


def _count_reals(data: AnyPath, name: str) -> int:
    labels = open_shards([data / name]).column("label")
    return int((labels == CLASSES.index("real")).sum())


def evaluate(
    checkpoint: Path,
    data: AnyPath,
    names: Sequence[str],
    out: Path,
    *,
    loading: Loading,
    device: str = "auto",
    subset: Subset | None = None,
    reals: str | None = None,
    delivery: int = 0,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Score `names` (sets below `data`), or a subset of their samples; write `scores.parquet` to
    `out` and return the report on it. `delivery` is how many images of each class are scored once
    more through every delivery. On many ranks each calls this; the first one writes, and the
    others return an empty report.
    """
    ranks = ranks or Ranks()
    for name in [*names, *([reals] if reals else [])]:
        read_index(data / name)  # a wrong name is said before any work is done
    whole = {name: open_shards([data / name]) for name in names}
    opened = {
        name: choose_samples(shards, name, subset) if subset else shards
        for name, shards in whole.items()
    }
    beside = choose_reals(data, opened, reals)
    measured = len(opened)
    if beside and beside["set"] not in opened:
        shards = open_shards([data / beside["set"]])
        only = np.flatnonzero(shards.column("label") == CLASSES.index("real"))
        opened[beside["set"]] = shards.take(only)
        console.log.info("%s: its %s real images (%s)", beside["set"], len(only), beside["why"])
    net, view, meta = load_network(checkpoint)
    where = choose_device(device, ranks.local)
    keep_freed_memory(where)
    dtype, reason = choose_precision("auto", where)
    console.log.info("%s on %s (%s)", describe(dtype), where, reason)
    net.to(where)
    parts = []
    for name, shards in opened.items():
        loader = open_loader(
            shards, view=view, loading=loading, device=where, rank=ranks.rank, world=ranks.world
        )
        console.log.info("%s: images through %s (%s)", name, loader.backend, loader.reason)
        with console.progress(f"scoring {name}", len(shards), ranks.first) as advance:
            scores = score_set(
                net, loader, dtype, lambda done: advance(done * ranks.world), ranks
            )  # fmt: skip
        parts.append(rows_of(name, shards, scores, meta["temperature"]))
    delivered = {}
    for name in list(opened)[:measured] if delivery else ():
        delivered[name] = deliver(
            net, with_reals(opened, name, beside), view, meta, dtype, delivery, where,
            label=f"delivering {name}", ranks=ranks,
        )  # fmt: skip
    if not ranks.first:
        return {}
    about = {
        "checkpoint": str(checkpoint),
        "run": meta["recipe"]["name"],
        "step": meta["step"],
        "commit": git_commit(),
        "precision": describe(dtype),
        "backend": loader.backend,
        **{name: meta[name] for name in ("temperature", "threshold", "calibration")},
        "subset": None
        if subset is None
        else {
            "file": subset.file,
            "sha256": subset.sha256,
            "samples": sum(len(opened[name]) for name in names),
        },
        "sets": {
            name: {
                "index_sha256": whole[name].sha256,
                "split": read_index(data / name)["split"],
                "delivery": delivered.get(name),
            }
            for name in list(opened)[:measured]
        },
        "reals": beside,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_scores(out / SCORES_FILE, parts, about)
    return report_on(out / SCORES_FILE)


def report_on(path: Path) -> dict[str, Any]:
    """The report on a file of scores."""
    scores = read_scores(path)
    with console.progress("intervals", DRAWS * len(scores.evaluation["sets"])) as advance:
        return evaluation.report(scores, advance)


def with_reals(
    opened: Mapping[str, ShardSet], name: str, beside: Mapping[str, Any] | None
) -> ShardSet:
    """What set `name` is delivered with: itself, or its fakes and the reals that stand beside, as
    in its report.
    """
    own = opened[name]
    labels = own.column("label")
    if not beside or beside["set"] == name or not (beside["for_all"] or (labels == 1).all()):
        return own
    other = opened[beside["set"]]
    reals = other.take(np.flatnonzero(other.column("label") == 0))
    return join_sets([own.take(np.flatnonzero(labels == 1)), reals])


def deliver(
    net: nn.Module,
    shards: ShardSet,
    view: View,
    meta: Mapping[str, Any],
    dtype: torch.dtype,
    per_class: int,
    device: torch.device,
    *,
    label: str,
    ranks: Ranks,
) -> dict[str, Any]:
    """The entry `delivery` of one set; says how many images it is about."""
    counts = np.bincount(shards.column("label"), minlength=2)
    taken = np.minimum(counts, per_class)
    numbers = (f"{n:,}" for pair in zip(taken, counts, strict=True) for n in pair)
    console.log.info("%s: %s of %s real and %s of %s fake images", label, *numbers)
    with console.progress(label, int(taken.sum()), ranks.first) as advance:
        return report_delivery(
            net, shards, DELIVERIES, view=view, device=device, dtype=dtype,
            temperature=meta["temperature"], threshold=meta["threshold"], per_class=per_class,
            on_images=lambda done: advance(done * ranks.world), ranks=ranks,
        )  # fmt: skip


def write_report(report: Mapping[str, Any], scores: Path, data: AnyPath, out: Path) -> list[Path]:
    """Write `report.json`, the tables and the page, each under another name first; the page shows
    pictures of those sets that are still below `data` as they were scored.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_text(out / REPORT_FILE, text)
    shards = {}
    for name, found in report["sets"].items():
        try:
            shards[name] = open_shards([data / name])
        except (ValueError, OSError) as error:
            console.log.info("%s: no pictures on the page: %s", name, error)
            continue
        if shards[name].sha256 != found["index_sha256"]:
            console.log.info(
                "%s: no pictures on the page: the set at %s is another one", name, data
            )
            del shards[name]
    command = shlex.join(["python", *sys.argv])
    return [out / REPORT_FILE, *write_page(report, read_scores(scores), shards, out, command)]


def scores_beside(path: Path) -> Path:
    """The file of scores that is meant by `path`: itself, or that of its report or folder.

    Raises:
        ValueError: there is none.
    """
    found = path / SCORES_FILE if path.is_dir() else path
    found = found.with_name(SCORES_FILE) if found.suffix != ".parquet" else found
    if not found.exists():
        raise ValueError(f"there is no {SCORES_FILE} at {path}; run `python evaluate.py` again")
    return found


@click.group(cls=console.Group, invoke_without_command=True)
@click.option("--shards", "names", multiple=True, help="Set to measure on. May be repeated.")
@click.option("--reals", help="Set whose real images give the false-positive rate of the others.")
@click.option(
    "--subset",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="CSV with set,key: score only these samples. Default of --shards: its sets.",
)
@click.option(
    "--scores",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The report on a scores.parquet, without a network or images.",
)
@click.option(
    "--delivery",
    type=click.IntRange(min=1),
    is_flag=False,
    flag_value=PER_CLASS,
    metavar="[N]",
    help="Score N images of each class (1000) through JPEG, WebP, AVIF, resizing and more.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the report and the scores. Default: evaluation/ beside the checkpoint.",
)
@console.options("checkpoint", "data", "runs", "device", "backend")
@click.pass_context
def main(
    context: click.Context,
    names: tuple[str, ...],
    reals: str | None,
    subset: Path | None,
    scores: Path | None,
    delivery: int | None,
    out: Path | None,
    checkpoint: Path | None,
    data: str,
    runs: Path,
    device: str,
    backend: str,
) -> None:
    """Measure a checkpoint on one or more shard sets, calibrate it, or compare two reports.

    On several GPUs: torchrun --nproc-per-node 4 evaluate.py --shards evalgen
    """
    if context.invoked_subcommand:
        return
    if scores:
        if names or subset or reals or delivery:
            raise click.UsageError(
                "--scores takes no --shards, --subset, --reals or --delivery: it has its own"
            )
        report = report_on(scores)
        written = write_report(report, scores, any_path(data), out or scores.parent)
        print_report(report)
        say_files(written)
        return
    listed = read_subset(subset) if subset else None
    names = tuple(dict.fromkeys(names or (listed.keys if listed else ())))
    if not names:
        raise click.UsageError("say which set to measure on, such as --shards evalgen")
    chosen = find(runs, checkpoint)
    folder = "+".join(names) + (f"-{subset.stem}" if subset else "")
    out = out or chosen.parent / "evaluation" / folder
    with joined() as ranks:
        _speak_for(ranks)
        report = evaluate(
            chosen, any_path(data), names, out, loading=Loading(backend=backend), device=device,
            subset=listed, reals=reals, delivery=delivery or 0, ranks=ranks,
        )  # fmt: skip
    if ranks.first:
        written = write_report(report, out / SCORES_FILE, any_path(data), out)
        print_report(report)
        console.say(f"checkpoint: {chosen}")
        console.say(f"scores: {out / SCORES_FILE}")
        say_files(written)


def say_files(written: Sequence[Path]) -> None:
    """Where the report is; the page last, because it is what a person opens."""
    report, *tables, page = written
    console.say(f"report: {report}")
    console.say(f"tables: {', '.join(str(path) for path in tables)}")
    console.say(f"page: {page}")


def _speak_for(ranks: Ranks) -> None:
    """The first rank speaks for all."""
    if not ranks.first:
        console.log.setLevel(logging.WARNING)


@main.command()
@click.option(
    "--shards", "names", multiple=True, required=True, help="Validation set. May be repeated."
)
@click.option(
    "--threshold-at",
    type=click.Choice(["auto", "fpr5", "fpr1", "0.5"]),
    default="auto",
    show_default=True,
    help="Decision threshold; auto: 0.5, or higher where 5 % false positives ask for it.",
)
@console.options("checkpoint", "data", "runs", "device", "backend")
def calibrate(
    names: tuple[str, ...],
    threshold_at: ThresholdAt,
    checkpoint: Path | None,
    data: str,
    runs: Path,
    device: str,
    backend: str,
) -> None:
    """Fit temperature, thresholds and the uncertain band, and keep them in the checkpoint.

    Only sets of the split val are taken: what is fitted to a test set says nothing about it.
    """
    chosen = find(runs, checkpoint)
    folders = [any_path(data) / name for name in dict.fromkeys(names)]
    with joined() as ranks:
        _speak_for(ranks)
        found = calibrate_checkpoint(
            chosen, folders, Loading(backend=backend), choose_device(device, ranks.local),
            threshold_at=threshold_at, ranks=ranks,
        )  # fmt: skip
    if ranks.first:
        print_calibration(found)
        console.say(f"checkpoint: {chosen}")


@main.command()
@click.argument("before", type=click.Path(path_type=Path, exists=True))
@click.argument("after", type=click.Path(path_type=Path, exists=True))
@click.option("--intersection", is_flag=True, help="Compare the images that both were measured on.")
@click.option(
    "--flips",
    type=click.Path(path_type=Path, dir_okay=False),
    help="CSV of every image whose verdict is another one.",
)
@console.options()
def compare(before: Path, after: Path, intersection: bool, flips: Path | None) -> None:
    """Put two runs side by side: folders of reports, or their files."""
    tables = [read_scores(scores_beside(path)) for path in (before, after)]
    one, two = shared_samples(*tables, intersect=intersection)
    left_out = [len(table) - len(one) for table in tables]
    if any(left_out):
        console.say(
            f"on {len(one):,} images that both scored; left out are {left_out[0]:,} of "
            f"{before} and {left_out[1]:,} of {after}"
        )
    changed = find_flips(one, two)
    print_comparison(one, two, changed)
    if flips:
        write_text(flips, table_csv([field.name for field in fields(Flip)], map(asdict, changed)))
        console.say(f"flips: {flips}")
    console.say(f"reports: {before} and {after}")


if __name__ == "__main__":
    main()
