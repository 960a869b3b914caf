"""Train a recipe: what is needed is put together, then the loop runs, judges and calibrates."""

import contextlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import console
from model import checkpoint
from model.calibrate import CalibrationError
from model.device import choose_device, choose_precision, describe, keep_freed_memory
from model.distributed import DistEnv, all_gather_object, all_reduce_any, all_reduce_sum
from model.network import Detector, build, load_backbone_file, load_weights
from model.recipe import Recipe
from model.training.forgetting import changes, forgetting, refusals
from model.training.history import History
from model.training.optim import make_optimizer, schedule, set_learning_rate
from model.training.resume import restore, resumable, save
from model.training.step import TrainState, average_of, train_step, wrap_ddp
from model.training.validation import Validation, calibrate_checkpoint, remembered, validate
from pipeline.loader import open_loader
from pipeline.monitor import LoaderStats
from pipeline.stream import Stream, open_pool
from sharding.format import CLASSES, read_index
from storage import AnyPath


class Refused(ValueError):
    """The gate does not let a trained checkpoint pass; the message says why."""


class Interrupted(Exception):
    """A signal asked the run to stop; everything is saved."""


def train(
    recipe: Recipe,
    data: AnyPath,
    runs: Path,
    *,
    init_from: Path | None = None,
    stop_at: int | None = None,
    dist: DistEnv | None = None,
) -> Path:
    """Run `recipe` to its end, or up to step `stop_at`, and return its best checkpoint.

    `init_from` is a checkpoint folder or an ImageNet `.safetensors` file to begin from instead of
    what the recipe says. A run of the same recipe in `runs` is continued. On many `dist` each calls
    this; the first one writes.

    Raises:
        ValueError: whatever stops the run: data, recipe, checkpoint, a loss that is not finite.
        Interrupted: after SIGINT or SIGTERM, once the checkpoint is saved.
    """
    dist = dist or DistEnv()
    folder = runs / recipe.name
    resumed = resumable(folder, recipe)
    device = choose_device("auto", dist.local_rank)
    keep_freed_memory(device)
    stream = open_stream(recipe, data, device, dist)
    for name in recipe.data.validate:
        read_index(data / name)  # a missing set is said now, not after an epoch
    steps = stream.steps_per_epoch * recipe.run.epochs
    train_state = _assemble(recipe, device, runs, init_from, resumed, dist)
    done = restore(train_state, resumed, stream) if resumed else 0
    if done == steps:
        console.log.info("%s is finished; nothing to do", folder)
        best = _best_of(folder, dist)
        _calibrate(best, recipe, data, device, dist)
        return best
    _announce(recipe, stream, train_state, steps)

    def check() -> Validation:
        folders = [data / name for name in recipe.data.validate]
        return validate(train_state, folders, recipe.preprocess, recipe.loading)

    before = None
    if _continues(recipe, init_from):  # kept, so that a resumed run knows it too
        console.log.info("what the detector knows before: %s", folder / "baseline_metrics.json")
        before = remembered(folder / "baseline_metrics.json", check, dist.is_main)
    forward = _compile(train_state, recipe)
    with (
        console.stop_signals() as received,
        History(folder, done) if dist.is_main else contextlib.nullcontext() as history,
        console.progress("training", steps, shown=dist.is_main) as advance,
    ):
        advance(done)
        stats = LoaderStats(stream.pool.shards.codes("source")[1])
        for batch in stats.timed(stream.batches(done, recipe.run.epochs)):
            set_learning_rate(train_state.optimizer, schedule(recipe.optim, done, steps))
            loss = train_step(
                train_state, forward, batch, recipe.optim,
                step=done, grad_accum_steps=recipe.run.grad_accum_steps,
                distill_weight=recipe.replay.distill_weight,
            )  # fmt: skip
            done += 1
            ended = done % stream.steps_per_epoch == 0
            for failure in stream.loader.name_failures(batch):
                console.log.warning("not decoded: %s", failure)
            stopping = all_reduce_any(dist, bool(received))
            due = recipe.run.save_every and done % recipe.run.save_every == 0
            saving = ended or due or stopping or done == stop_at
            if saving or done % recipe.run.log_every == 0:
                _refuse_bad_loss(train_state, stream)
                _log_step(history, stats, train_state, done, loss)
            number = -(-done // stream.steps_per_epoch)
            advance(1, f"epoch {number} of {recipe.run.epochs}, {stats.note()}")
            wanted = number % recipe.run.validate_every == 0 or done == steps
            found = check() if ended and wanted else None
            if found:
                _log_validation(history, done, found)
                stats.reset()
            if saving:
                save(folder, train_state, recipe, stream, done, found)
            if stopping and done < steps:
                name = received[0].name if received else "a signal to another rank"
                raise Interrupted(f"stopped by {name} at step {done} of {steps}")
            if done == stop_at:
                break
    judging = before and done == steps and dist.is_main
    reasons = _judge(folder, recipe, stream, before) if judging else []
    best = _best_of(folder, dist)
    if done == steps:
        _calibrate(best, recipe, data, device, dist)
    if reasons:
        raise Refused(f"{best} is refused: {'; '.join(reasons)}. It is kept, and so is its start")
    return best


def _best_of(folder: Path, dist: DistEnv) -> Path:
    """As the rank knows it that saves: another would look while that one prunes."""
    return all_gather_object(dist, checkpoint.best_of(folder) if dist.is_main else None)[0]


def _calibrate(
    best: Path, recipe: Recipe, data: AnyPath, device: torch.device, dist: DistEnv
) -> None:
    """Calibrate the best checkpoint of a finished run on its validation sets, if they allow it."""
    if checkpoint.read_meta(best)["calibration"]:
        return
    sets = [data / name for name in recipe.data.validate]
    try:
        found = calibrate_checkpoint(best, sets, recipe.loading, device, dist=dist)
    except CalibrationError as error:
        console.log.warning("not calibrated: %s", error)
        return
    console.log.info(
        "calibrated on %s: temperature %.2f, likely AI from %.3f, likely real below %.3f",
        *(", ".join(recipe.data.validate), found.temperature, found.threshold, found.band[0]),
    )


def open_stream(
    recipe: Recipe, data: AnyPath, device: torch.device, dist: DistEnv | None = None
) -> Stream:
    """The run's batches on this rank, from the sets below `data`."""
    dist = dist or DistEnv()
    pool = open_pool(data, recipe.data.train, recipe.replay)
    loader = open_loader(
        pool.shards, preprocess=recipe.preprocess, loading=recipe.loading, device=device,
        rank=dist.rank, world_size=dist.world_size,
    )  # fmt: skip
    return Stream(
        loader,
        pool,
        recipe.replay,
        recipe.augment,
        recipe.data.policy,
        recipe.run.seed,
        recipe.data.repeats,
    )


def _continues(recipe: Recipe, init_from: Path | None) -> bool:
    """Whether the run goes on from a trained detector, which it may then make forget."""
    trained = init_from is not None and init_from.suffix != ".safetensors"
    return trained or (init_from is None and bool(recipe.run.init_from))


def _judge(folder: Path, recipe: Recipe, stream: Stream, before: Validation) -> list[str]:
    """Hold the best checkpoint against what was known before, say what changed, and mark it where
    the gate refuses it; returns the gate's reasons.
    """
    best = checkpoint.best_of(folder)
    after = Validation.from_json(checkpoint.read_meta(best)["metrics"])
    names = stream.pool.shards.codes("source")[1]
    codes = stream.pool.shards.codes("source")[0][stream.pool.new]
    rows = changes(before.sources, after.sources, {names[code] for code in np.unique(codes)})
    console.table(
        f"{recipe.name}: accuracy per source, before and after (step {best.name[5:].lstrip('0')})",
        ["set/source", "", "images", "before", "after", "change"],
        [
            [r.name, "old" if r.old else "new", r.images, r.before, r.after, f"{-r.lost:+.3f}"]
            for r in rows
        ],
    )
    worst = max((row.lost for row in rows if row.old), default=0.0)
    console.say(
        f"forgetting: {forgetting(rows):.3f} on average over the old sources, "
        f"{max(worst, 0.0):.3f} at worst"
    )
    reasons = refusals(recipe.gate, rows, after.sets)
    found = {"forgetting": forgetting(rows), "worst": worst, "sources": [asdict(r) for r in rows]}
    checkpoint.annotate(best, {"compared": found, "refused": reasons})
    return reasons


def _assemble(
    recipe: Recipe,
    device: torch.device,
    runs: Path,
    init_from: Path | None,
    resumed: Path | None,
    dist: DistEnv,
) -> TrainState:
    """Network with its first weights, optimizer and scaler, on the device."""
    torch.manual_seed(recipe.run.seed)
    torch.backends.cudnn.benchmark = True
    first = resumed or init_from or _start_of(recipe, runs)
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
    train_state = TrainState(net, optimizer, scaler, device, dtype, dist)
    train_state.ema = average_of(net) if recipe.optim.ema_decay else None
    if recipe.replay.distill_weight:
        train_state.teacher = _teacher(recipe, runs, init_from).to(device)
    if dist.world_size > 1:  # equal weights, but each rank drops other paths
        torch.manual_seed(recipe.run.seed + 1_000_003 * (1 + dist.rank))
    return train_state


def _teacher(recipe: Recipe, runs: Path, init_from: Path | None) -> Detector:
    """What replayed samples are held to: the detector that the run starts from."""
    folder = init_from or _start_of(recipe, runs)
    if folder is None or folder.suffix == ".safetensors":
        raise ValueError("replay.distill_weight needs a run that starts from a trained checkpoint")
    net, _, _ = checkpoint.load_network(checkpoint.find(runs, folder))
    return net.requires_grad_(False).to(memory_format=torch.channels_last)


def _start_of(recipe: Recipe, runs: Path) -> Path | None:
    """The best checkpoint of the run this recipe starts from, if it names one."""
    if not recipe.run.init_from:
        return None
    best = checkpoint.best_of(runs / recipe.run.init_from)
    if best is None:
        raise checkpoint.CheckpointError(
            f"{recipe.name} starts from the best checkpoint of {runs / recipe.run.init_from}, "
            "which has none; run `python train.py --phase 1` first, or name one with --init-from "
            "CHECKPOINT"
        )
    return best


def _announce(recipe: Recipe, stream: Stream, train_state: TrainState, steps: int) -> None:
    """What will run, and every choice that was made for the user, each in a line."""
    say = console.log.info
    pool, loader = stream.pool, stream.loader
    parameters = sum(p.numel() for p in train_state.net.parameters())
    rates = {group["base_lr"] for group in train_state.optimizer.param_groups}
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


def _compile(train_state: TrainState, recipe: Recipe) -> torch.nn.Module:
    """The network as the loop calls it, compiled where that pays."""
    wanted, where = recipe.run.compile, train_state.device.type
    on = wanted == "on" or (wanted == "auto" and where == "cuda")
    reason = f"{'pays' if on else 'does not pay'} on {where}" if wanted == "auto" else "asked for"
    console.log.info("torch.compile %s (%s)", "on" if on else "off", reason)
    net = wrap_ddp(train_state)
    return torch.compile(net) if on else net


def _refuse_bad_loss(train_state: TrainState, stream: Stream) -> None:
    """End the run if a loss since the last look was not finite.

    Raises:
        ValueError: the first such step, and the first of its samples.
    """
    bad = max(all_gather_object(train_state.dist, int(train_state.bad_step)))
    if bad < 0:
        return
    number, step = divmod(bad, stream.steps_per_epoch)
    epoch = stream.epoch(number)
    samples = epoch.samples[epoch.positions(step)]
    keys = ", ".join(stream.pool.shards.text("key", sample) for sample in samples[:8])
    raise ValueError(
        f"the loss is not finite at step {bad + 1} (first samples: {keys}); lower optim.lr, or use "
        "--set run.precision=fp32"
    )


def _log_step(
    history: History | None,
    stats: LoaderStats,
    train_state: TrainState,
    done: int,
    loss: torch.Tensor,
) -> None:
    """One row about the steps since the last: the loss of all ranks, the rest of the first."""
    mean = all_reduce_sum(train_state.dist, loss).item() / train_state.dist.world_size
    rate = train_state.optimizer.param_groups[-1]["lr"]
    row = {"loss": mean, "lr": rate, **stats.row()}
    if history is None:
        return
    history.write(done, "train", row)
    console.log.info(
        "step %d: loss %.3f, %.0f images/s, %.0f %% of the time waiting for them "
        "(%.0f %% for bytes, %.0f %% for pixels; at most %.0f ms)",
        *(done, row["loss"], row["images_per_s"], 100 * row["wait_share"]),
        *(100 * row["wait_read"], 100 * row["wait_decode"], row["stall_max_ms"]),
    )


def _log_validation(history: History | None, done: int, found: Validation) -> None:
    """Rows per set and source, and a line for the person watching."""
    if history is None:
        return
    history.write(done, "validate", {"selection": found.selection})
    for name, metrics in [*found.sets.items(), *found.sources.items()]:
        history.write(done, f"validate/{name}", asdict(metrics))
    figures = ", ".join(
        f"{name} accuracy {m.accuracy:.3f}" + (f" AUROC {m.auroc:.3f}" if m.auroc else "")
        for name, m in found.sets.items()
    )
    console.log.info("step %d: %s", done, figures)
