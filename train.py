"""Train the detector: `python train.py --phase 1`, then `python train.py --phase 2`.

Phase 1 learns from the old sets; phase 2 starts from phase 1's best checkpoint and learns the new
sets with a little of the old ones replayed. Interrupted runs go on where they stopped.
"""

import contextlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch
from torch.nn.functional import cross_entropy

import console
import recipes
from model import checkpoint
from model.device import choose_device, choose_precision, describe, keep_freed_memory
from model.history import History
from model.metrics import Metrics, measure, measure_sources
from model.network import Detector, Network, build, load_backbone_file, load_weights
from model.optim import Optim, make_optimizer, schedule, set_learning_rate
from model.score import autocast, probability, score_set
from pipeline import Augment, Batch, Loading, Meter, Replay, Stream, View, open_loader, open_pool
from sharding.format import CLASSES, open_shards, read_index
from sharding.storage import AnyPath, any_path


@dataclass(frozen=True, kw_only=True)
class Data:
    """Shard sets to learn from and to validate on, and the augmentation law of most sources.

    `repeats` says how often a source comes in an epoch, where that is not once: 2.5 is every image
    twice and half of them once more, 0 leaves a source out.
    """

    train: list[str]
    validate: list[str]
    law: str
    repeats: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(times < 0 for times in self.repeats.values()):
            raise ValueError(f"repeats must not be negative, got {self.repeats}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """How long, how seeded, how often. `start` names a run whose best checkpoint is the start.

    `log_every` and `save_every` are in steps; a checkpoint is saved at each epoch's end anyway.
    """

    epochs: int
    seed: int = 70
    start: str = ""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    log_every: int = 50
    save_every: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.log_every < 1 or self.save_every < 0 or self.seed < 0:
            raise ValueError("needs epochs and log_every of at least 1, no negative number")


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
class Trainer:
    """The moving parts of a run; the functions below act on them."""

    net: Detector
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Validation:
    """Metrics per set and per `set/source`, and the figure that picks the best checkpoint."""

    sets: dict[str, Metrics]
    sources: dict[str, Metrics]
    selection: float


class Interrupted(Exception):
    """A signal asked the run to stop; everything is saved."""


def train(
    recipe: Recipe,
    data: AnyPath,
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
    device = choose_device("auto")
    keep_freed_memory(device)
    stream = open_stream(recipe, data, device)
    for name in recipe.data.validate:
        read_index(data / name)  # a missing set is said now, not after an epoch
    steps = stream.epoch(0).steps * recipe.run.epochs
    trainer = _assemble(recipe, device, runs, start, resumed)
    done = _restore(trainer, resumed, stream) if resumed else 0
    if done == steps:
        console.log.info("%s is finished; nothing to do", folder)
        return checkpoint.best_of(folder)
    _announce(recipe, stream, trainer, steps)
    forward = _compile(trainer, recipe)
    with (
        _signals() as received,
        History(folder, done) as history,
        console.progress("training", steps) as advance,
    ):
        advance(done)
        meter = Meter(stream.pool.shards.codes("source")[1])
        for batch in meter.timed(stream.batches(done, recipe.run.epochs)):
            set_learning_rate(trainer.optimizer, schedule(recipe.optim, done, steps))
            loss = train_step(trainer, forward, batch, recipe.optim)
            done += 1
            ended = done % stream.steps_per_epoch == 0
            for failure in stream.loader.name_failures(batch):
                console.log.warning("not decoded: %s", failure)
            if ended or done % recipe.run.log_every == 0:
                _log_step(history, meter, trainer, stream, batch, done, loss)
            number = -(-done // stream.steps_per_epoch)
            advance(1, f"epoch {number} of {recipe.run.epochs}, {meter.note()}")
            found = validate(trainer, recipe, data) if ended else None
            if found:
                _log_validation(history, done, found)
                meter.reset()
            due = recipe.run.save_every and done % recipe.run.save_every == 0
            if ended or due or received or done == stop_at:
                _save(folder, trainer, recipe, stream, done, found)
            if received and done < steps:
                raise Interrupted(f"stopped by {received[0].name} at step {done} of {steps}")
            if done == stop_at:
                break
    return checkpoint.best_of(folder)


def open_stream(recipe: Recipe, data: AnyPath, device: torch.device) -> Stream:
    """The run's batches, from the sets below `data`."""
    pool = open_pool(data, recipe.data.train, recipe.replay)
    loader = open_loader(pool.shards, view=recipe.view, loading=recipe.loading, device=device)
    return Stream(
        loader,
        pool,
        recipe.replay,
        recipe.augment,
        recipe.data.law,
        recipe.run.seed,
        recipe.data.repeats,
    )


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


def validate(trainer: Trainer, recipe: Recipe, data: AnyPath) -> Validation:
    """Score every validation set. In the selection figure each set counts alike, by its balanced
    accuracy, or by its accuracy where it has one class only: not by its AUROC, which does not see
    a checkpoint that calls everything fake.
    """
    sets, sources = {}, {}
    for name in recipe.data.validate:
        shards = open_shards([data / name])
        loader = open_loader(
            shards, view=recipe.view, loading=recipe.loading, device=trainer.device
        )
        scores = score_set(trainer.net, loader, trainer.dtype)
        fake = probability(scores.logits)
        sets[name] = measure(scores.labels, fake)
        by_source = measure_sources(scores.labels, fake, shards.names("source", scores.samples))
        sources |= {f"{name}/{source}": found for source, found in by_source.items()}
    figures = [
        m.accuracy if m.balanced_accuracy is None else m.balanced_accuracy for m in sets.values()
    ]
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
    console.log.info("going on from %s", last)
    return last


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one level: {"optim.lr": ...}."""
    flat = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
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
        load_weights(net, checkpoint.read_weights(first), str(first))
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


def _restore(trainer: Trainer, folder: Path, stream: Stream) -> int:
    """Put the training state back; returns how many steps are done."""
    state = checkpoint.load_state(folder)
    done = stream.resume(state["order"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    if trainer.device.type == "cuda":
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return done


def _save(
    folder: Path,
    trainer: Trainer,
    recipe: Recipe,
    stream: Stream,
    done: int,
    found: Validation | None,
) -> None:
    """Write a checkpoint with all that resuming needs, then prune the older ones."""
    on_gpu = trainer.device.type == "cuda"
    state = {
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "order": stream.state(done),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if on_gpu else [],
    }
    checkpoint.save(
        folder / f"step_{done:07d}",
        trainer.net,
        recipe=recipe,
        step=done,
        epoch=done / stream.steps_per_epoch,
        metrics=asdict(found) if found else {},
        selection=found.selection if found else None,
        data={
            "train": recipe.data.train,
            "replay": recipe.replay.sets,
            "replayed_per_epoch": stream.replayed_per_epoch,
            "index_sha256": stream.pool.shards.sha256,
        },
        state=state,
    )
    checkpoint.prune(folder)


def _announce(recipe: Recipe, stream: Stream, trainer: Trainer, steps: int) -> None:
    """What will run, and every choice that was made for the user, each in a line."""
    say = console.log.info
    pool, loader = stream.pool, stream.loader
    parameters = sum(p.numel() for p in trainer.net.parameters())
    rates = {group["base_lr"] for group in trainer.optimizer.param_groups}
    spread = f"{len(rates)} learning rates from {min(rates):.2g} to {max(rates):.2g}"
    say(
        "%s: %s, %.1f M parameters, %s",
        *(recipe.name, recipe.network.name, parameters / 1e6),
        spread if len(rates) > 1 else f"learning rate {max(rates):.2g}",
    )
    labels = pool.shards.column("label")[stream.new(0)]
    counts = ", ".join(f"{int((labels == c).sum()):,} {name}" for c, name in enumerate(CLASSES))
    left = (len(labels) + stream.replayed_per_epoch) % loader.global_batch
    say(
        "per epoch %s new samples (%s) and %s old ones, less the last %d that fill no batch; "
        "%d epochs, %s steps of %d",
        *(f"{len(labels):,}", counts, f"{stream.replayed_per_epoch:,}", left),
        *(recipe.run.epochs, f"{steps:,}", loader.global_batch),
    )
    say("images through %s (%s)", loader.backend, loader.reason)


def _compile(trainer: Trainer, recipe: Recipe) -> torch.nn.Module:
    """The network as the loop calls it, compiled where that pays."""
    wanted, where = recipe.run.compile, trainer.device.type
    on = wanted == "on" or (wanted == "auto" and where == "cuda")
    reason = f"{'pays' if on else 'does not pay'} on {where}" if wanted == "auto" else "asked for"
    console.log.info("torch.compile %s (%s)", "on" if on else "off", reason)
    return torch.compile(trainer.net) if on else trainer.net


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """A list that SIGINT and SIGTERM are put into; a second SIGINT interrupts at once."""
    received: list[signal.Signals] = []

    def note(number: int, _frame: object) -> None:
        received.append(signal.Signals(number))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        console.log.warning("%s: saving, then stopping", received[-1].name)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _log_step(
    history: History,
    meter: Meter,
    trainer: Trainer,
    stream: Stream,
    batch: Batch,
    done: int,
    loss: torch.Tensor,
) -> None:
    """One row about the steps since the last; a loss that is not finite ends the run."""
    if not torch.isfinite(loss):
        keys = ", ".join(stream.pool.shards.text("key", sample) for sample in batch.samples[:8])
        raise ValueError(
            f"the loss is {loss.item()} at step {done} (first samples: {keys}); "
            "lower optim.lr, or use --set run.precision=fp32"
        )
    rate = trainer.optimizer.param_groups[-1]["lr"]
    row = {"loss": loss.item(), "lr": rate, **meter.row()}
    history.write(done, "train", row)
    console.log.info(
        "step %d: loss %.3f, %.0f images/s, %.0f %% of the time waiting for them "
        "(%.0f %% for bytes, %.0f %% for pixels; at most %.0f ms)",
        *(done, row["loss"], row["images_per_s"], 100 * row["wait_share"]),
        *(100 * row["wait_read"], 100 * row["wait_decode"], row["stall_max_ms"]),
    )


def _log_validation(history: History, done: int, found: Validation) -> None:
    """Rows per set and source, and a line for the person watching."""
    history.write(done, "validate", {"selection": found.selection})
    for name, metrics in [*found.sets.items(), *found.sources.items()]:
        history.write(done, f"validate/{name}", asdict(metrics))
    figures = ", ".join(
        f"{name} accuracy {m.accuracy:.3f}" + (f" AUROC {m.auroc:.3f}" if m.auroc else "")
        for name, m in found.sets.items()
    )
    console.log.info("step %d: %s", done, figures)


def _print_validation(meta: Mapping[str, Any]) -> None:
    """What validation found for a checkpoint, per set and source."""
    rows = [
        [name, m.count, m.accuracy, m.recall, m.false_positive_rate, m.auroc]
        for kind in ("sets", "sources")
        for name, m in ((n, Metrics(**found)) for n, found in meta["metrics"][kind].items())
    ]
    columns = ["validation", "images", "accuracy", "recall", "false positives", "AUROC"]
    console.table(f"{meta['recipe']['name']}, step {meta['step']}", columns, rows)


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
    data: str,
    runs: Path,
) -> None:
    """Train a phase; run the same command again to go on after an interruption."""
    if (phase is None) == (recipe_path is None):
        raise click.UsageError("say --phase 1, --phase 2 or --recipe FILE")
    path = recipe_path or recipes.FOLDER / f"phase{phase}.toml"
    naming = [f"name={json.dumps(name)}"] if name else []
    recipe = recipes.load(Recipe, path, [*overrides, *naming])
    try:
        best = train(recipe, any_path(data), runs, start=init)
    except Interrupted as stopped:
        console.say(f"{stopped}; the same command goes on from there")
        raise SystemExit(130) from None
    meta = checkpoint.read_meta(best)
    _print_validation(meta)
    console.say(f"best checkpoint: {best} (step {meta['step']}, selection {meta['selection']:.4f})")


if __name__ == "__main__":
    main()
