"""Train variants of a two-phase recipe; compare them on datasets that neither phase trains on.

    python -m benchmarks.ablation --images IMAGES --init-from WEIGHTS.safetensors --work FOLDER

`IMAGES/manifest.csv` has path (below IMAGES), label (real, fake), source, generator. The names and
their phases (`unseen`: the test) are in `benchmarks/ablation-catalog.toml` and `_source()`. Phase 1
starts from WEIGHTS (MobileNetV2). `STAR` is trained; `--candidates` adds `CANDIDATES`; `--cell
NAME` trains only NAME. `--cell` and `--seed` (default 0, 1 and 2) are repeatable. `--set KEY=VALUE`
changes all recipes, `--threads N` is for torch, `--table` trains nothing. FOLDER gets sets, runs
(finished: skipped), `rows.jsonl`, `tables.md` (also printed). The first error ends it."""

import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import cli
import console
import recipes
from locks import locked
from model import checkpoint
from model.calibration.fit import threshold_at_fpr
from model.export.average import average
from model.metrics import accuracy_of, measure, measure_sources
from model.recipe import Recipe
from model.score import score_set
from model.training.run import train
from model.verdict import probability
from pipeline.loader import open_loader
from pipeline.loading import Loading
from sharding.format import open_shards
from storage import atomic_folder, write_atomically, write_text

FOLDER = Path(__file__).parent
CATALOG = FOLDER / "ablation-catalog.toml"
SETS = ("val", "val-phase2", "unseen")
SEEDS = (0, 1, 2)
MAX_FPR = 0.05
"""Share of the validation reals that the calibrated threshold may call fake."""

EASY = "cats_web"
"""Held-out photographs of cats, a subject that only real training images show. The group "hard" is
"unseen" without this source."""

COMMON = (
    "preprocess.crop_size=192",
    "preprocess.resize_size=216",
    "loading.num_workers=0",
    "run.validate_every=100",
    "network.head=timm",
    "network.freeze_backbone=false",
    "replay.distill_weight=0",
)
PHASE_1, PHASE_2 = "small-phase1.toml", "small-phase2.toml"
SCRATCH_1, SCRATCH_2 = "demo-phase1.toml", "demo-phase2.toml"
EPOCHS = {PHASE_1: 3, PHASE_2: 5, SCRATCH_1: 8, SCRATCH_2: 8}

FLAT = ("optim.layer_decay_groups=none", "optim.layer_decay=1.0", "optim.lr=2e-4")
REPLAY_8 = ("replay.ratio=1:8",)
FLAT_2 = (*FLAT[:2], "optim.lr=1e-4", *REPLAY_8)
DECAYED_2 = ("optim.lr=5e-4", "optim.layer_decay=0.85", *REPLAY_8)
SLOW = ("optim.layer_decay_groups=stage", "optim.layer_decay=0.4", "optim.lr=2e-3")
SLOW_2 = (*SLOW[:2], "optim.lr=1e-3")
EVEN = ("replay.ratio=1:1",)
MORE = ("replay.ratio=3:1",)
DISTILLED = ("replay.distill_weight=0.5",)
STAGES = ("network.head=stages",)
BODY = ("optim.layer_decay_groups=stage", "optim.layer_decay=0.8", "optim.lr=1e-3")
FROZEN = (*FLAT[:2], "optim.lr=3e-4", "network.freeze_backbone=true", "run.epochs=8")
BODY_2 = (*BODY[:2], "optim.lr=5e-4")
ROBUST = recipes.read(recipes.FOLDER / "robust.toml")["augment"]["train"]
SMALL_PREPROCESS = ("preprocess.crop_size=128", "preprocess.resize_size=144")
BLOCK, STAGE12 = (
    (f"optim.layer_decay_groups={layer_decay_groups}", "optim.layer_decay=0.8")
    for layer_decay_groups in ("block", "stage12")
)
HARSH = tuple(f"augment.train.{key}={json.dumps(value)}" for key, value in ROBUST.items())

FIRST: dict[str, tuple[str, ...]] = {
    "original": FLAT,
    "block": ("optim.layer_decay_groups=block", "optim.layer_decay=0.8", "optim.lr=1e-3"),
    "stage": BODY,
    "robust": (*FLAT, *HARSH),
    "slow body": SLOW,
    "stages": (*STAGES, *BODY),
    "frozen": (*STAGES, *FROZEN),
    "scratch": SMALL_PREPROCESS,
    "scratch block": (*SMALL_PREPROCESS, *BLOCK),
    "scratch stage12": (*SMALL_PREPROCESS, *STAGE12),
}
"""Variants of phase 1 by name, as changes to `recipes/small-phase1.toml`. Those whose name begins
with "scratch" change `recipes/demo-phase1.toml`, a small ConvNeXtV2 with random weights.
"""


@dataclass(frozen=True)
class Cell:
    """Recipe of both phases.

    `first` is a name in `FIRST`. `second` are the changes to `recipes/small-phase2.toml`, or to
    `demo-phase2.toml` from scratch. With `of`, nothing is trained: the weights are interpolated
    between the start (`weight` 0) and the end (`weight` 1) of phase 2 of the cell `of`.
    """

    first: str
    second: tuple[str, ...] = FLAT_2
    of: str = ""
    weight: float = 1.0

    @property
    def files(self) -> tuple[str, str]:
        """The recipes of both phases."""
        return (SCRATCH_1, SCRATCH_2) if self.scratch else (PHASE_1, PHASE_2)

    @property
    def scratch(self) -> bool:
        """Whether phase 1 starts from random weights."""
        return self.first.startswith("scratch")


STAR: dict[str, Cell] = {
    "as it ran": Cell("original"),
    "decay block": Cell("block", (*DECAYED_2, "optim.layer_decay_groups=block")),
    "decay stage": Cell("stage", (*DECAYED_2, "optim.layer_decay_groups=stage")),
    "replay none": Cell("original", (*FLAT_2, 'replay.ratio="0"')),
    "replay 1:1": Cell("original", (*FLAT_2, *EVEN)),
    "policy robust": Cell("robust", (*FLAT_2, *HARSH, "data.policy=train")),
}
"""The recipe that the original model was trained with (one learning rate, its policies, 1 old to 8
new images), and cells that change one setting of it each.
"""

CANDIDATES: dict[str, Cell] = {
    "half": Cell("original", of="as it ran", weight=0.5),
    "replay 1:1 half": Cell("original", of="replay 1:1", weight=0.5),
    "replay 1:1 distilled": Cell("original", (*FLAT_2, *EVEN, "replay.distill_weight=0.5")),
    "replay 1:1 distilled half": Cell("original", of="replay 1:1 distilled", weight=0.5),
    "replay 3:1": Cell("original", (*FLAT_2, *MORE, "run.epochs=3")),
    "stage, then 1:1": Cell("stage", (*FLAT_2, *EVEN)),
    "stages, 3:1": Cell("stages", (*STAGES, *BODY_2, *MORE)),
    "stages, 3:1 distilled": Cell("stages", (*STAGES, *BODY_2, *MORE, *DISTILLED)),
    "frozen, 3:1": Cell("frozen", (*STAGES, *FROZEN, *MORE)),
    "frozen, 3:1 distilled": Cell("frozen", (*STAGES, *FROZEN, *MORE, *DISTILLED)),
    "frozen, 3:1 distilled 0.2": Cell(
        "frozen", (*STAGES, *FROZEN, *MORE, "replay.distill_weight=0.2")
    ),
    "frozen, 3:1 distilled 0.1": Cell(
        "frozen", (*STAGES, *FROZEN, *MORE, "replay.distill_weight=0.1")
    ),
    "slow body 1:1": Cell("slow body", (*SLOW_2, *EVEN)),
    "scratch": Cell("scratch", (*SMALL_PREPROCESS, *REPLAY_8)),
    "scratch, decay block": Cell("scratch block", (*SMALL_PREPROCESS, *REPLAY_8, *BLOCK)),
    "scratch, decay stage12": Cell("scratch stage12", (*SMALL_PREPROCESS, *REPLAY_8, *STAGE12)),
    "scratch, 1:1": Cell("scratch", (*SMALL_PREPROCESS, *EVEN)),
}
"""Recipes that might be better than those of `STAR`."""


def lay_out(images: Path, raw: Path) -> None:
    """Copy the files of `manifest.csv` to one folder per source of the catalog. Each held-out
    generator gets its own source.
    """
    if raw.exists():
        return
    with (
        atomic_folder(raw) as partial,
        (images / "manifest.csv").open(encoding="utf-8", newline="") as file,
    ):
        for row in csv.DictReader(file):
            path = Path(row["path"])
            folder = partial / _source(row, path.name) / row["label"]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(images / path, folder / path.name)


def _source(row: Mapping[str, str], name: str) -> str:
    if row["source"] == "cats_dogs" and "cat_breeds" in name:
        return "cats_web"
    if row["source"] == "generators_2022":
        trained = row["generator"] in ("latent-diffusion", "disco-diffusion")
        return "generators_2022" if trained else "generators_2022_unseen"
    if row["source"] == "gpt4o_nanobanana":
        return "nano_banana" if row["generator"] == "nano-banana-pro" else "gpt4o"
    return row["source"]


@dataclass(frozen=True)
class Bench:
    """Folders of the study, and the settings that all runs share."""

    work: Path
    init_from: Path
    common: tuple[str, ...]

    @property
    def shards(self) -> Path:
        """Folder of the packed sets."""
        return self.work / "shards"

    @property
    def runs(self) -> Path:
        """Folder with one folder per run."""
        return self.work / "runs"

    def train(
        self, file: str, name: str, seed: int, changes: Sequence[str], init_from: Path | None
    ) -> Path:
        """Train a run unless it is finished, score its best checkpoint, and return its folder."""
        done = self.runs / name / "done.json"
        if not done.exists():
            path = recipes.FOLDER / file
            settings = [
                f"name={json.dumps(name)}",
                f"run.seed={seed}",
                f"run.epochs={EPOCHS[file]}",
            ]
            settings += [*self.common, *changes]
            recipe = recipes.load(Recipe, path, settings)
            began = time.monotonic()
            best = train(recipe, self.shards, self.runs, init_from=init_from)
            trained = {"best": best.name, "seconds": round(time.monotonic() - began, 1)}
            self.score(best)
            _write(done, trained)
        return self.runs / name / json.loads(done.read_text())["best"]

    def score(self, folder: Path) -> dict[str, dict[str, np.ndarray]]:
        """Return the columns labels, logits, source and generator of every set.

        They are read from `scores.npz` in the run's folder, which is written at the first call.
        """
        path = folder.parent / "scores.npz"
        if not path.exists():
            net, preprocess, _ = checkpoint.load_network(folder)
            columns = {}
            for name in SETS:
                shards = open_shards([self.shards / name])
                loader = open_loader(
                    shards, preprocess=preprocess, loading=Loading(num_workers=0),
                    device=torch.device("cpu"),
                )  # fmt: skip
                with closing(loader):
                    scores = score_set(net, loader)
                columns[f"{name}/labels"] = scores.labels
                columns[f"{name}/logits"] = scores.logits
                for column in ("source", "generator"):
                    names = shards.names(column, scores.samples)
                    columns[f"{name}/{column}"] = np.array(names, np.str_)
            write_atomically(path, lambda partial: _save(partial, columns))
        with np.load(path) as saved:
            return {
                name: {
                    key.partition("/")[2]: saved[key] for key in saved if key.startswith(f"{name}/")
                }
                for name in SETS
            }


def _write(path: Path, figures: Any) -> None:
    write_text(path, json.dumps(figures) + "\n")


def _save(path: Path, columns: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # `np.savez` would append .npz to a path
        np.savez(file, **columns)


def figures(scores: Mapping[str, Mapping[str, np.ndarray]], calibration: Sequence[str]) -> dict:
    """Compute the metrics of one checkpoint for each set, with the accuracy of every source.

    Each set is measured twice: at a threshold of 0.5, and at the threshold for 5 % false positives
    on the reals of the sets in `calibration`.
    """
    labels, logits = (
        np.concatenate([scores[name][column] for name in calibration])
        for column in ("labels", "logits")
    )
    # No temperature: it would change neither the decision at 0.5 nor the order of the scores.
    threshold = threshold_at_fpr(probability(logits[labels == 0]), MAX_FPR)
    result: dict[str, Any] = {"threshold": threshold}
    unseen = scores["unseen"]
    hard = {key: values[unseen["source"] != EASY] for key, values in unseen.items()}
    for group, group_scores in {**scores, "hard": hard}.items():
        labels, sources = group_scores["labels"], group_scores["source"]
        fake = probability(group_scores["logits"])
        for key, at in (("", 0.5), (" calibrated", threshold)):
            result[group + key] = asdict(measure(labels, fake, at)) | {
                "sources": {
                    source: accuracy_of(metrics)
                    for source, metrics in measure_sources(labels, fake, sources, at).items()
                }
            }
    return result


def jobs(cells: Mapping[str, Cell], seeds: Sequence[int]) -> Iterator[tuple[str, Cell, int]]:
    """Yield cells seed by seed, so that a study stopped at any time has a table."""
    for seed in seeds:
        for name, cell in cells.items():
            yield name, cell, seed


def label(kind: str, name: str, seed: int) -> str:
    """Return the name of a run's folder."""
    return f"{kind}-{name}-s{seed}".replace(" ", "-").replace(":", "to")


def run_cell(bench: Bench, cells: Mapping[str, Cell], name: str, seed: int) -> dict[str, Any]:
    """Train both phases of one cell and return its row of metrics.

    Raises:
        BlockingIOError: another process is training one of the runs.
    """
    cell = cells[name]

    def run(folder: str, file: str, changes: Sequence[str], init_from: Path | None) -> Path:
        bench.runs.mkdir(parents=True, exist_ok=True)
        with locked(bench.runs / f"{folder}.lock", BlockingIOError(folder)):
            return bench.train(file, folder, seed, changes, init_from)

    file_1, file_2 = cell.files
    init_from = None if cell.scratch else bench.init_from
    first = run(label("first", cell.first, seed), file_1, FIRST[cell.first], init_from)
    trained = cells[cell.of] if cell.of else cell
    second = run(label("second", cell.of or name, seed), file_2, trained.second, first)
    if cell.of:
        run_folder = bench.runs / label("average", name, seed)
        mixed = run_folder / second.name
        second = mixed if mixed.exists() else average(first, second, cell.weight, run_folder)
    seconds = {
        path.parent.name: json.loads((path.parent / "done.json").read_text())["seconds"]
        for path in (first, second)
        if (path.parent / "done.json").exists()
    }
    return {
        "cell": name,
        "seed": seed,
        "seconds": seconds,
        "first": figures(bench.score(first), ["val"]),
        "second": figures(bench.score(second), ["val", "val-phase2"]),
    }


def read_rows(
    bench: Bench, cells: Mapping[str, Cell], seeds: Sequence[int]
) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the rows of the finished cells, by cell and seed."""
    rows = {}
    for name, cell, seed in jobs(cells, seeds):
        trained = (label("first", cell.first, seed), label("second", cell.of or name, seed))
        if all((bench.runs / run / "done.json").exists() for run in trained):
            rows[name, seed] = run_cell(bench, cells, name, seed)
    return rows


def lost(row: Mapping[str, Any], key: str) -> float:
    """Return the largest loss of accuracy of an old source in phase 2, from 0 to 1."""
    before, after = row["first"][key]["sources"], row["second"][key]["sources"]
    return max(before[source] - after[source] for source in before)


def table(
    rows: Mapping[tuple[str, int], Mapping[str, Any]], cells: Mapping[str, Cell], phase: str
) -> list[list[str]]:
    """Return a line per recipe of phase `first` or `second`: mean ± deviation in percent."""
    groups: dict[str, dict[int, Mapping[str, Any]]] = {}
    for (name, seed), row in sorted(rows.items(), key=lambda item: [*cells].index(item[0][0])):
        groups.setdefault(cells[name].first if phase == "first" else name, {})[seed] = row
    lines = []
    for name, of in groups.items():
        of_phase = [row[phase] for row in of.values()]
        values = [[f[group][figure] for f in of_phase] for group, figure in FIGURES]
        if phase == "second":
            values += [[lost(row, key) for row in of.values()] for key in ("val", "val calibrated")]
        lines.append([name, str(len(of)), *map(mean_and_std, values)])
    return lines


def mean_and_std(values: Sequence[float]) -> str:
    """Format mean ± sample standard deviation, in percent."""
    values = 100 * np.array(values)
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


FIGURES = (
    ("unseen", "auroc"), ("hard", "auroc"), ("unseen", "balanced_accuracy"), ("unseen", "recall"),
    ("unseen", "false_positive_rate"), ("unseen calibrated", "recall"),
    ("unseen calibrated", "false_positive_rate"), ("val", "auroc"), ("val-phase2", "auroc"),
)  # fmt: skip
COLUMNS = (
    "recipe", "seeds", "AUROC", "hard AUROC", "balanced", "recall", "FPR", "recall c", "FPR c",
    "val AUROC", "val-phase2 AUROC", "worst loss", "worst loss c",
)  # fmt: skip
"""Columns of the tables. Those without "val" are of the held-out images. The decision threshold is
0.5, and in columns with "c" the one for 5 % false positives on validation reals. The worst loss is
the largest loss of accuracy of an old source in phase 2.
"""


@click.command(cls=console.Command)
@click.option("--images", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--init-from", type=click.Path(path_type=Path, exists=True), required=True)
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Shards, runs, tables."
)
@click.option("--threads", default=2, help="Threads of torch in this process.")
@click.option(
    "--cell",
    "only",
    multiple=True,
    type=click.Choice([*STAR, *CANDIDATES]),
    help="Train only this cell. May be repeated; the order is kept.",
)
@click.option("--seed", "seeds", type=int, multiple=True, default=SEEDS)
@click.option("--candidates", is_flag=True, help="Train the candidates as well.")
@click.option("--set", "common", multiple=True, help="Change every recipe: --set run.epochs=4.")
@click.option("--table", "only_table", is_flag=True, help="Print the finished rows; train nothing.")
@cli.options()
def main(
    images: Path,
    init_from: Path,
    work: Path,
    threads: int,
    only: tuple[str, ...],
    seeds: tuple[int, ...],
    candidates: bool,
    common: tuple[str, ...],
    only_table: bool,
) -> None:
    """Train every cell with every seed, and print tables of the finished cells.

    WORK/rows.jsonl gets every metric, WORK/tables.md the tables.
    """
    torch.set_num_threads(threads)
    cells = STAR | CANDIDATES
    wanted = {name: cells[name] for name in only} or (cells if candidates else STAR)
    bench = Bench(work, init_from, (*COMMON, *common))
    if not only_table:
        lay_out(images, work / "raw")
        if not (bench.shards / "unseen" / "index.json").exists():
            command = [sys.executable, "-m", "sharding", "build", "--catalog", str(CATALOG)]
            subprocess.run(
                [*command, "--raw", str(work / "raw"), "--out", str(bench.shards)], check=True
            )
    waiting = [] if only_table else list(jobs(wanted, seeds))
    while waiting:
        later = []
        for name, cell, seed in waiting:
            try:
                row = run_cell(bench, cells, name, seed)
            except BlockingIOError:
                later.append((name, cell, seed))
                continue
            aurocs = [row[phase]["unseen"]["auroc"] for phase in ("first", "second")]
            console.say(f"{name}, seed {seed}: unseen AUROC {aurocs[0]:.3f} -> {aurocs[1]:.3f}")
        waiting = later
        if waiting:
            time.sleep(5)
    rows = read_rows(bench, cells, seeds)
    lines = [json.dumps(row, sort_keys=True) for row in rows.values()]
    (work / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = []
    for phase in ("first", "second"):
        shares = table(rows, cells, phase)
        columns = COLUMNS[: len(shares[0])] if shares else COLUMNS
        console.table(f"{phase} phase, held-out sources, percent", columns, shares)
        marks = [columns, ["---"] * len(columns), *shares]
        texts.append("\n".join(f"| {' | '.join(line)} |" for line in marks))
    (work / "tables.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
