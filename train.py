"""Train the detector: `python train.py --phase 1`, then `python train.py --phase 2`.

Phase 1 learns from the old sets; phase 2 starts from phase 1's best checkpoint and learns the new
sets with a little of the old ones replayed. Interrupted runs go on where they stopped.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard import SummaryWriter

import console
import recipes
from model import checkpoint
from model.device import choose_device, choose_precision, describe
from model.metrics import Metrics, measure
from model.network import Detector, Network, build, load_backbone_file, load_weights
from model.optim import Optim, make_optimizer, schedule, set_learning_rate
from model.score import autocast, probability, score
from pipeline import (
    Augment,
    Batch,
    Loader,
    Loading,
    Replay,
    View,
    check_state,
    draw_by_law,
    draw_centre,
    draw_old,
    evaluation_epoch,
    open_loader,
    state_of,
    training_epoch,
)  # fmt: skip
from pipeline.order import Epoch, replay_rng
from sharding.format import CLASSES, ShardSet, open_shards


@dataclass(frozen=True, kw_only=True)
class Data:
    """Shard sets to learn from and to validate on, and the augmentation law of most sources."""

    train: list[str]
    validate: list[str]
    law: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """How long, how seeded, how often. `start` names a run whose best checkpoint is the start."""

    epochs: int
    seed: int = 70
    start: str = ""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    log_every: int = 50
    save_every: int = 0  # steps; 0 saves at the end of each epoch


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run computes; `recipes/` holds them as TOML."""

    name: str
    data: Data
    augment: dict[str, Augment]
    network: Network
    optim: Optim
    run: Run
    loading: Loading = field(default_factory=Loading)
    replay: Replay = field(default_factory=Replay)
    view: View = field(default_factory=View)


@dataclass(frozen=True, eq=False)
class Streams:
    """What an epoch is drawn from: new samples, and the old ones that may be replayed."""

    shards: ShardSet
    new: np.ndarray
    old: np.ndarray
    replayed: int  # old samples per epoch


@dataclass(frozen=True, eq=False)
class Trainer:
    """The moving parts of a run; functions below act on them."""

    net: Detector
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    dtype: torch.dtype


def open_streams(recipe: Recipe, data: Path) -> Streams:
    """Open the new and, with replay, the old sets as one shard set."""
    replay = recipe.replay
    old_sets = replay.sets if replay.ratio else []
    shards = open_shards([data / name for name in [*recipe.data.train, *old_sets]])
    count = sum(len(open_shards([data / name])) for name in recipe.data.train)
    codes, names = shards.codes("source")
    allowed = np.array(
        [bool(shards.sources[n]["replay"]) and n not in replay.leave_out for n in names], np.bool_
    )
    rows = np.arange(len(shards))
    new, old = rows[:count], rows[count:]
    return Streams(shards, new, old[allowed[codes[old]]], math.floor(count * replay.ratio))


def order_epoch(recipe: Recipe, streams: Streams, number: int, global_batch: int) -> Epoch:
    """The samples of epoch `number`, old ones drawn afresh: a pure function of its arguments."""
    shards, old = streams.shards, streams.old
    replayed = draw_old(
        old,
        shards.codes("source")[0][old],
        shards.column("label")[old],
        streams.replayed,
        replay_rng(recipe.run.seed, number),
    )
    return training_epoch(
        streams.new,
        seed=recipe.run.seed,
        number=number,
        global_batch=global_batch,
        shuffle=recipe.loading.shuffle,
        old=replayed,
    )


def train(
    recipe: Recipe,
    data: Path,
    runs: Path,
    *,
    start: Path | None = None,
    stop_at: int | None = None,
) -> Path:
    """Run `recipe` to its end, or up to step `stop_at`, and return its best checkpoint.

    `start` is a checkpoint folder or an ImageNet `.safetensors` file to begin from instead of what
    the recipe says. A run of the same recipe in `runs` is continued.

    Raises:
        ValueError: whatever stops the run: data, recipe, checkpoint, a loss that is not finite.
        Interrupted: after SIGINT or SIGTERM, once the checkpoint is saved.
    """
    folder = runs / recipe.name
    resumed = _resumable(folder, recipe)
    streams = open_streams(recipe, data)
    device = choose_device("auto")
    loader = open_loader(streams.shards, view=recipe.view, loading=recipe.loading, device=device)
    per_epoch = order_epoch(recipe, streams, 0, loader.global_batch).steps
    steps = per_epoch * recipe.run.epochs
    trainer = _assemble(recipe, device, runs, start, resumed)
    done = _restore(trainer, resumed, recipe, loader, per_epoch) if resumed else 0
    if done == steps:
        console.log.info("%s is finished; nothing to do", folder)
        return checkpoint.best_of(folder)
    _announce(recipe, streams, loader, trainer, steps, resumed, done)
    forward = _compile(trainer, recipe)
    stop = _listen_for_signals()
    with RunLog(folder, done) as log, console.progress("training", steps) as advance:
        advance(done)
        for batch in log.timed(run_batches(recipe, streams, loader, done)):
            set_learning_rate(trainer.optimizer, schedule(recipe.optim, done, steps))
            loss = train_step(trainer, forward, batch, recipe.optim)
            done += 1
            ended = done % per_epoch == 0
            log.count(batch, loader.name_failures(batch))
            if done % recipe.run.log_every == 0 or ended or device.type == "cpu":
                _stop_unless_finite(loss, done, batch, streams.shards)
            if done % recipe.run.log_every == 0 or ended:
                log.training(done, loss.item(), trainer.optimizer.param_groups[-1]["lr"])
            advance(1, f"epoch {(done - 1) // per_epoch + 1}/{recipe.run.epochs} {log.note}")
            found = validate(trainer, recipe, data) if ended else None
            if found:
                log.validation(done, found)
            due = recipe.run.save_every and done % recipe.run.save_every == 0
            if ended or due or stop or done == stop_at:
                state = _state(trainer, recipe, streams, loader, done, per_epoch)
                _save(folder, trainer, recipe, streams, done, per_epoch, found, state)
            if stop:
                raise Interrupted(f"stopped by a signal at step {done} of {steps}")
            if done == stop_at:
                break
    return checkpoint.best_of(folder)


class Interrupted(Exception):
    """A signal asked the run to stop; everything is saved."""


def run_batches(recipe: Recipe, streams: Streams, loader: Loader, start: int) -> Iterator[Batch]:
    """All batches of a run from global step `start` on, epoch after epoch."""
    number = start // order_epoch(recipe, streams, 0, loader.global_batch).steps
    while number < recipe.run.epochs:
        epoch = order_epoch(recipe, streams, number, loader.global_batch)
        draws = draw_by_law(
            streams.shards, recipe.augment, recipe.data.law, recipe.view, recipe.run.seed, number
        )
        yield from loader.batches(epoch, draws, max(0, start - number * epoch.steps))
        number += 1


def train_step(
    trainer: Trainer, forward: torch.nn.Module, batch: Batch, optim: Optim
) -> torch.Tensor:
    """One optimizer step; returns the loss, a scalar on the device, mean over valid images."""
    trainer.net.train()
    trainer.optimizer.zero_grad(set_to_none=True)
    with autocast(trainer.device, trainer.dtype):
        logits = forward(batch.images)
    losses = cross_entropy(
        logits.float(), batch.labels, reduction="none", label_smoothing=optim.label_smoothing
    )
    loss = (losses * batch.valid).sum() / batch.valid.sum().clamp(min=1)
    trainer.scaler.scale(loss).backward()
    trainer.scaler.unscale_(trainer.optimizer)
    torch.nn.utils.clip_grad_norm_(trainer.net.parameters(), optim.clip)
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    return loss.detach()


@dataclass(frozen=True)
class Validation:
    """Metrics per set and per source of each set, and the figure that picks the best checkpoint."""

    sets: dict[str, Metrics]
    sources: dict[str, Metrics]
    selection: float


def validate(trainer: Trainer, recipe: Recipe, data: Path) -> Validation:
    """Score every validation set; each set counts alike in the selection figure (AUROC, or
    accuracy where a set has one class).
    """
    sets, sources = {}, {}
    for name in recipe.data.validate:
        shards = open_shards([data / name])
        loader = open_loader(
            shards, view=recipe.view, loading=recipe.loading, device=trainer.device
        )
        epoch = evaluation_epoch(len(shards), loader.global_batch)
        batches = loader.batches(epoch, draw_centre(shards, recipe.view))
        scores = score(trainer.net, batches, trainer.device, trainer.dtype)
        fake = probability(scores.logits)
        sets[name] = measure(scores.labels, fake)
        codes, names = shards.codes("source")
        for code, source in enumerate(names):
            rows = codes[scores.samples] == code
            sources[f"{name}/{source}"] = measure(scores.labels[rows], fake[rows])
    figures = [m.accuracy if m.auroc is None else m.auroc for m in sets.values()]
    return Validation(sets, sources, float(np.mean(figures)))


def _resumable(folder: Path, recipe: Recipe) -> Path | None:
    """The last checkpoint of this very recipe, or None where the run is new."""
    last = checkpoint.last_of(folder)
    if last is None:
        return None
    before = _flat(checkpoint.read_meta(last)["recipe"])
    now = _flat(json.loads(json.dumps(asdict(recipe))))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        key = changed[0]
        raise ValueError(
            f"{folder} holds a run of another recipe ({key} was {before.get(key)}, now "
            f"{now.get(key)}; {len(changed)} differ); use --run NAME for a new run"
        )
    return last


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one level: {"optim.lr": ...}."""
    flat = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _assemble(
    recipe: Recipe, device: torch.device, runs: Path, start: Path | None, resumed: Path | None
) -> Trainer:
    """Network with its first weights, optimizer and scaler, on the device."""
    torch.manual_seed(recipe.run.seed)
    torch.backends.cudnn.benchmark = True
    first = resumed or start or _start_of(recipe, runs)
    net = build(recipe.network, pretrained=recipe.network.pretrained and first is None)
    if first and first.suffix == ".safetensors":
        load_backbone_file(net, first)
    elif first:
        from_net, _, _ = checkpoint.load_network(first)
        load_weights(net, from_net.backbone.state_dict(), str(first))
    if first:
        console.log.info("weights from %s", first)
    net.to(device)
    dtype, reason = choose_precision(recipe.run.precision, device)
    console.log.info("%s on %s (%s)", describe(dtype), device, reason)
    optimizer = make_optimizer(net.backbone, recipe.optim, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return Trainer(net, optimizer, scaler, device, dtype)


def _start_of(recipe: Recipe, runs: Path) -> Path | None:
    """The best checkpoint of the run this recipe starts from, if it names one."""
    if not recipe.run.start:
        return None
    best = checkpoint.best_of(runs / recipe.run.start)
    if best is None:
        raise checkpoint.CheckpointError(
            f"{recipe.name} starts from the best checkpoint of {runs / recipe.run.start}, which "
            "has none; run `python train.py --phase 1` first, or name one with --init CHECKPOINT"
        )
    return best


def _state(
    trainer: Trainer, recipe: Recipe, streams: Streams, loader: Loader, done: int, per_epoch: int
) -> dict[str, Any]:
    """All that resuming needs besides the weights."""
    number = (done - 1) // per_epoch
    epoch = order_epoch(recipe, streams, number, loader.global_batch)
    return {
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "order": state_of(epoch, done - number * per_epoch, streams.shards.sha256),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if trainer.device.type == "cuda" else [],
    }


def _restore(trainer: Trainer, folder: Path, recipe: Recipe, loader: Loader, per_epoch: int) -> int:
    """Put the training state back; returns how many steps are done."""
    state = checkpoint.load_state(folder)
    number, step = check_state(
        state["order"],
        seed=recipe.run.seed,
        global_batch=loader.global_batch,
        index_sha256=loader.shards.sha256,
    )
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    if trainer.device.type == "cuda":
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return number * per_epoch + step


def _save(
    folder: Path,
    trainer: Trainer,
    recipe: Recipe,
    streams: Streams,
    done: int,
    per_epoch: int,
    found: Validation | None,
    state: dict[str, Any],
) -> None:
    """Write a checkpoint, then prune the older ones."""
    sets = {"train": recipe.data.train, "replay": recipe.replay.sets}
    checkpoint.save(
        folder / f"step_{done:07d}",
        trainer.net,
        recipe=recipe,
        step=done,
        epoch=(done - 1) // per_epoch + 1,
        metrics=asdict(found) if found else {},
        selection=found.selection if found else None,
        data={**sets, "index_sha256": streams.shards.sha256},
        state=state,
    )
    checkpoint.prune(folder)


def _announce(
    recipe: Recipe,
    streams: Streams,
    loader: Loader,
    trainer: Trainer,
    steps: int,
    resumed: Path | None,
    done: int,
) -> None:
    """Every choice that was made for the user, each in a line."""
    say = console.log.info
    parameters = sum(p.numel() for p in trainer.net.parameters())
    rates = {group["base_lr"] for group in trainer.optimizer.param_groups}
    say(
        "%s: %s, %.1f M parameters, %d learning rates from %.2g to %.2g",
        *(recipe.name, recipe.network.name, parameters / 1e6),
        *(len(rates), min(rates), max(rates)),
    )
    labels = streams.shards.column("label")[streams.new]
    counts = ", ".join(f"{int((labels == c).sum()):,} {name}" for c, name in enumerate(CLASSES))
    say("%s new samples (%s) and %s old ones per epoch; %d epochs, %s steps of %d",
        f"{len(streams.new):,}", counts, f"{streams.replayed:,}", recipe.run.epochs, f"{steps:,}",
        loader.global_batch)  # fmt: skip
    say("images through %s (%s)", loader.backend, loader.reason)
    if resumed:
        say("resuming from %s at step %d", resumed, done)


def _compile(trainer: Trainer, recipe: Recipe) -> torch.nn.Module:
    """The network as the loop calls it, compiled where that pays."""
    wanted = recipe.run.compile
    on = wanted == "on" or (wanted == "auto" and trainer.device.type == "cuda")
    reason = (
        "asked for"
        if wanted != "auto"
        else f"{'pays' if on else 'does not pay'} on {trainer.device.type}"
    )
    console.log.info("torch.compile %s (%s)", "on" if on else "off", reason)
    return torch.compile(trainer.net) if on else trainer.net


def _listen_for_signals() -> list[int]:
    """A list that SIGINT or SIGTERM makes non-empty; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        console.log.warning("%s: saving, then stopping", signal.Signals(number).name)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, note)
        signal.signal(signal.SIGTERM, note)
    return received


def _stop_unless_finite(loss: torch.Tensor, step: int, batch: Batch, shards: ShardSet) -> None:
    if not torch.isfinite(loss):
        keys = ", ".join(shards.text("key", sample) for sample in batch.samples[:8])
        raise ValueError(
            f"the loss is {loss.item()} at step {step} (first samples: {keys}); "
            "lower optim.lr, or use --set run.precision=fp32"
        )


class RunLog:
    """`metrics.jsonl` and TensorBoard of a run, and the counts between two log lines."""

    def __init__(self, folder: Path, done: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        if self.path.exists():  # what an interrupted run logged past its checkpoint comes again
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= done]
            self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self.note = ""
        self._reset()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_error: object) -> None:
        self.board.close()

    def _reset(self) -> None:
        self.images = self.replayed = self.unreadable = 0
        self.waited, self.since = 0.0, time.perf_counter()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; notes how long the loop waited for each."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def count(self, batch: Batch, failures: list[str]) -> None:
        """Add a batch to the counts, and name what could not be decoded."""
        self.images += len(batch)
        self.replayed += int(batch.replayed.sum())
        self.unreadable += len(failures)
        for failure in failures:
            console.log.warning("not decoded: %s", failure)

    def training(self, step: int, loss: float, lr: float) -> None:
        """A row about the steps since the last one."""
        passed = time.perf_counter() - self.since
        row = {
            "loss": loss,
            "lr": lr,
            "images_per_s": self.images / passed,
            "wait_share": self.waited / passed,
            "replay_share": self.replayed / self.images,
            "unreadable": self.unreadable,
        }
        self.note = f"loss {loss:.3f} {row['images_per_s']:.0f} images/s"
        self._write(step, "train", row)
        self._reset()

    def validation(self, step: int, found: Validation) -> None:
        """Rows per set and source, and a table for the person watching."""
        self._write(step, "validate", {"selection": found.selection})
        rows = []
        for name, metrics in [*found.sets.items(), *found.sources.items()]:
            self._write(step, f"validate/{name}", asdict(metrics))
            rows.append(
                [name, metrics.count, metrics.accuracy, metrics.recall,
                 metrics.false_positive_rate, metrics.auroc]
            )  # fmt: skip
        columns = ["validation", "images", "accuracy", "recall", "false positives", "AUROC"]
        console.table(f"Step {step}", columns, rows)
        self._reset()

    def _write(self, step: int, kind: str, row: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, "kind": kind, **row}) + "\n")
        for name, value in row.items():
            if value is not None:
                self.board.add_scalar(f"{kind}/{name}", value, step)


@click.command(cls=console.Command)
@click.option("--phase", type=click.Choice(["1", "2"]), help="Take recipes/phase1 or phase2.toml.")
@click.option(
    "--recipe",
    "recipe_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Another recipe file, instead of --phase.",
)
@click.option("--set", "overrides", multiple=True, help="Change a value: --set optim.lr=1e-4.")
@click.option("--run", "name", help="Name of the run. Default: the recipe's.")
@click.option(
    "--init",
    type=click.Path(path_type=Path, exists=True),
    help="Start from this checkpoint folder or ImageNet .safetensors file.",
)
@console.options("data", "runs")
def main(
    phase: str | None,
    recipe_path: Path | None,
    overrides: tuple[str, ...],
    name: str | None,
    init: Path | None,
    data: Path,
    runs: Path,
) -> None:
    """Train a phase; run the same command again to go on after an interruption."""
    if (phase is None) == (recipe_path is None):
        raise click.UsageError("say --phase 1, --phase 2 or --recipe FILE")
    path = recipe_path or recipes.FOLDER / f"phase{phase}.toml"
    naming = [f"name={json.dumps(name)}"] if name else []
    recipe = recipes.load(Recipe, path, [*overrides, *naming])
    try:
        best = train(recipe, data, runs, start=init)
    except Interrupted as stopped:
        console.say(f"{stopped}; the same command goes on from there")
        raise SystemExit(130) from None
    meta = checkpoint.read_meta(best)
    console.say(f"best checkpoint: {best} (step {meta['step']}, selection {meta['selection']:.4f})")


if __name__ == "__main__":
    main()
