"""Train a recipe from start to end: plan, build, run the training loop, calibrate the best
checkpoint and refuse it if it fails the gate (the recipe's limits on forgetting, false positives
and recorded mistakes).

Main entry: `train(recipe, data, runs, *, init_from, stop_at, dist)`. All after `*` may be left out.
On several ranks, all call it. Each uses its GPU, or the CPU if there is none.

- `recipe`: a `Recipe`, as `recipes.load(Recipe, path)` reads it from a TOML file.
- `data`: the `Path` (or `UPath`) of the folder of all shard sets (packed images).
- `runs`: the `Path` of the folder of all runs.
- `init_from`: the `Path` of the first weights, a checkpoint folder or an ImageNet `.safetensors`
  file; None: those that the recipe says.
- `stop_at`: the step to stop after, counted from the start of the run. If the run has already
  reached this step, one more step is done. None: train to the end. A fit (`optim.solver` lbfgs)
  takes only None.
- `dist`: a `DistEnv`, as `init_distributed()` yields it; None: one process.

It writes checkpoints (`step_<number>`) and the history (`metrics.jsonl`, `tensorboard`) to
`runs/<recipe.name>`, resumes an interrupted run, and returns the `Path` of the best checkpoint. A
finished run is not trained again. If its calibration or the verdict of the gate is missing, this is
done now. Then the path of its best checkpoint is returned, or `GateError` is raised.

A run that stops at `stop_at`, before its end, is neither calibrated nor judged by the gate. It
saves a checkpoint, and the path is that of the best checkpoint so far (before the first validation:
the one just saved). The path does not show whether the run is finished; the bool `plan(recipe,
data, runs).finished` of `model/training/plan.py` does. Errors:

- `ValueError`: wrong input, a run of another recipe in the folder, a damaged checkpoint (in the
  run: only if all are), a checkpoint that cannot be written (a full disk), or a loss or weight that
  is not finite. Also, without waiting, if another training of this run holds the lock on
  `LOCK_FILE` in the folder.
- `OSError`: another file cannot be read or written.
- `GateError` of `model/training/conclude.py` (a `ValueError`, so catch it first): the gate refuses
  the checkpoint. Every rank raises it.
- `Interrupted` (no `ValueError`): after a signal to stop, once a checkpoint is saved, also while
  the run waits for images or validates. A validation that was stopped is done first when the run is
  resumed. A fit saves no checkpoint: the same call fits again.

`run_steps(planned, train_state, stop_at)` is the training loop alone. It takes a `RunPlan` and the
`TrainState` made from it. It returns a pair: a text that says why the run is finished, or "" if it
only stopped at `stop_at`; and the best checkpoint (a `Best`). `run_fit()` takes and returns the
same; it fits the head to all stored features at once.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

import console
import interrupts
from locks import locked
from model import checkpoint
from model.device import one_thread
from model.distributed import (
    DistEnv,
    all_gather_object,
    all_reduce_any,
    all_reduce_sum,
    check_alike,
    on_main,
)
from model.features.fit import fit_head, gather, reset_head
from model.metrics import Validation
from model.recipe import LOCK_FILE, Recipe, flat_settings
from model.tracking.history import History
from model.tracking.tracker import Tracker
from model.training.assemble import assemble, compile_network, with_features
from model.training.conclude import conclude, conclude_again, start_on_mistakes
from model.training.plan import RunPlan, plan
from model.training.saving import save
from model.training.step import (
    TrainState,
    first_bad,
    not_finite_in,
    share_buffers,
    take_step,
)
from model.training.validation import (
    Best,
    Gain,
    read_validation,
    validate,
    write_validation,
)
from pipeline.batch import Batch
from pipeline.monitor import LoaderStats
from sharding.lock import reading
from storage import AnyPath


class Interrupted(Exception):
    """A signal stopped the run after a checkpoint was saved."""


def train(
    recipe: Recipe,
    data: AnyPath,
    runs: Path,
    *,
    init_from: Path | None = None,
    stop_at: int | None = None,
    dist: DistEnv | None = None,
) -> Path:
    """Train `recipe` to its end, or up to step `stop_at`, and return its best checkpoint.

    `init_from` is a checkpoint folder or an ImageNet `.safetensors` file for the first weights; it
    overrides the recipe. If `runs` contains a run of the same recipe, it is resumed. With several
    ranks (`dist`) every rank calls this function; rank 0 writes.

    Raises:
        ValueError: an error in the data, recipe or checkpoint, or a loss that is not finite.
        GateError: the gate refuses the best checkpoint.
        Interrupted: after SIGINT, SIGTERM or SIGHUP, once the checkpoint is saved.
    """
    dist, folder = dist or DistEnv(), runs / recipe.name
    with contextlib.ExitStack() as held:
        # An existing folder is locked before planning, because another training may be changing it.
        # A new folder is created after planning, so that a refused run leaves nothing behind. Rank
        # 0 decides: another machine may not see rank 0's folder; `check_alike` reports that below.
        is_new = on_main(dist, lambda: not folder.exists())
        if not is_new:
            held.enter_context(_locked(folder, dist, is_new))
        planned = plan(recipe, data, runs, init_from=init_from, dist=dist)
        check_alike(dist, _seen(planned))
        if is_new:
            held.enter_context(_locked(folder, dist, is_new))
        held.enter_context(reading(planned.stream.pool.shards, *planned.validation.values()))
        for line in planned.damaged:
            console.log.warning("%s; this run does not resume from it", line)
        for line in planned.warnings:
            console.log.warning("%s", line)
        if planned.finished and planned.best:
            conclude_again(planned, planned.best)
            return planned.best.path
        for line in planned.describe():
            console.log.info("%s", line)
        return _run(planned, stop_at)


def _seen(planned: RunPlan) -> dict[str, str]:
    """Return what must be equal on all ranks: otherwise they would train at different steps or on
    different images without an error.
    """
    return {
        "checkpoint to resume": planned.resumed.name if planned.resumed else "none",
        "first weights": planned.weights.sha256 or planned.weights.kind,
        "training sets": planned.stream.pool.shards.sha256,
        **{f"set {name}": shards.sha256 for name, shards in planned.validation.items()},
    }


@contextlib.contextmanager
def _locked(folder: Path, dist: DistEnv, is_new: bool) -> Iterator[None]:
    """Lock the folder of a run for one training. The lock ends with the process.

    Raises:
        ValueError: another training holds the lock, or, with `is_new`, has written checkpoints
            since.
    """
    busy = ValueError(
        f"another training is writing {folder}, or `calibrate` reads it; wait for it to end, or "
        "use --run NAME"
    )
    with contextlib.ExitStack() as held:

        def acquire() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / LOCK_FILE, busy))
            if is_new and checkpoint.checkpoints_of(folder):
                raise ValueError(
                    f"another training has just written {folder}; run the command again"
                )

        on_main(dist, acquire)
        yield


def _run(planned: RunPlan, stop_at: int | None) -> Path:
    """Build and run the plan, then judge and calibrate; returns the best checkpoint."""
    train_state = assemble(planned)
    planned = with_features(planned, train_state)
    baseline = _baseline(planned, train_state)
    start = start_on_mistakes(planned)
    if planned.recipe.optim.solver == "lbfgs":
        ended, best = run_fit(planned, train_state, stop_at)
    else:
        ended, best = run_steps(planned, train_state, stop_at)
    if ended:
        conclude(planned, best, baseline, start)
    return best.path


def run_steps(planned: RunPlan, train_state: TrainState, stop_at: int | None) -> tuple[str, Best]:
    """Train the remaining steps of the plan, up to step `stop_at`. Return the reason why the run
    is finished (empty if it is not) and the best checkpoint.

    Raises:
        ValueError: the loss or a weight is not finite.
        Interrupted: after SIGINT, SIGTERM or SIGHUP, once the checkpoint is saved.
    """
    recipe, stream, dist = planned.recipe, planned.stream, planned.dist
    settings, steps, done, best = recipe.run, planned.steps, planned.done, planned.best
    gain, over, saved, logged = planned.gain, "", done, done
    saving = validating = _left_to_validate(planned)
    stopping, at_end, validation = False, False, None
    forward = compile_network(planned, train_state)
    with (
        one_thread(planned.features is not None),
        interrupts.stop_signals() as received,
        _tracker(planned) as tracker,
        History(planned.folder, done, tracker, validated=not validating)
        if dist.is_main
        else contextlib.nullcontext() as history,
        contextlib.closing(stream.loader),
        console.progress("training", steps, shown=dist.is_main) as advance,
    ):
        advance(done)
        stats = LoaderStats(stream.pool.shards.codes("source")[1], dist.world_size)
        batches = stats.timed(stream.batches(done, settings.epochs))
        while True:
            if validating and (validation := _validate_unless_stopped(planned, train_state)):
                _log_validation(history, done, validation)
                gain = gain.after(done, validation.selection)
                over = _why_over(planned, done, gain)
                stats.reset()
            stopping = stopping or (validating and validation is None)
            if saving and (validation is not None or done > saved):
                if history is not None:
                    history.sync()
                best = save(planned, train_state, done, validation, best, gain=gain, ended=over)
                saved = done
            if stopping or ((over or at_end) and all_reduce_any(dist, bool(received))):
                name = received[0].name if received else "a signal to another rank"
                raise Interrupted(f"stopped by {name} at step {done} of {steps}")
            if over or at_end:
                break
            batch, validation = _next_unless_stopped(batches), None
            # Agree before the step: a rank must not wait in its step for a rank without a batch.
            stopping = all_reduce_any(dist, batch is None or bool(received))
            if batch is not None and not stopping:
                loss = take_step(train_state, forward, batch, recipe, step=done, steps=steps)
                done += 1
                for failure in stream.loader.name_failures(batch):
                    console.rank_log.warning("not decoded: %s", failure)
                epoch = -(-done // planned.steps_per_epoch)
                advance(1, f"epoch {epoch} of {settings.epochs}, {stats.note()}")
            at_end = stop_at is not None and done >= stop_at
            validating = _is_due(planned, done) and not stopping
            due = settings.save_every and done % settings.save_every == 0
            saving = bool(validating or due or stopping or at_end)
            if done > logged and (saving or done % settings.log_every == 0):
                _refuse_bad_loss(planned, train_state)
                _refuse_bad_weights(train_state, done)
                _log_step(history, stats, train_state, done, loss)
                logged = done
    assert best is not None  # the last step is always saved
    return over, best


def run_fit(planned: RunPlan, train_state: TrainState, stop_at: int | None) -> tuple[str, Best]:
    """Fit the head to the stored features of all epochs, in place of the steps of `run_steps`.
    Returns the reason why the run is finished, and its checkpoint.

    Raises:
        ValueError: the head cannot be fitted, or `stop_at` is given.
        Interrupted: after SIGINT, SIGTERM or SIGHUP. Nothing is saved: the same command fits again.
    """
    if stop_at is not None:
        raise ValueError("a fit (optim.solver lbfgs) has no steps to stop at; leave out stop_at")
    recipe, dist, done = planned.recipe, planned.dist, planned.steps
    samples = gather(planned.stream, recipe.run.epochs, dist)
    if planned.weights.kind != "checkpoint":  # a new head may be random: start at 0
        reset_head(train_state.net)
    with (
        interrupts.stop_signals() as received,
        _tracker(planned) as tracker,
        History(planned.folder, 0, tracker)
        if dist.is_main
        else contextlib.nullcontext() as history,
        console.progress("fitting", recipe.optim.iterations, shown=dist.is_main) as advance,
    ):

        def interrupted() -> Interrupted:
            name = received[0].name if received else "a signal to another rank"
            return Interrupted(f"stopped by {name} before the fit ended; nothing was saved")

        def on_evaluation() -> None:
            if all_reduce_any(dist, bool(received)):
                raise interrupted()
            advance(1)

        fit = fit_head(train_state.net, samples, recipe.optim, dist, on_evaluation)
        count = int(all_reduce_sum(dist, torch.tensor(len(samples.labels))))
        over = (
            f"fitted to {count:,} features in {fit.iterations} iterations of L-BFGS, "
            f"largest gradient {fit.gradient:.1e}"
        )
        console.log.info("%s, loss %.4f", over, fit.loss)
        if not fit.converged:
            console.log.warning(
                "the fit has not converged after %d iterations (largest gradient %.1e): use --run "
                "NAME with a higher optim.iterations than %d",
                *(fit.iterations, fit.gradient, recipe.optim.iterations),
            )
        validation = _validate_unless_stopped(planned, train_state)
        if validation is None:
            raise interrupted()
        if history is not None:
            history.write(done, "train", {"loss": fit.loss, "lr": 0.0})
        _log_validation(history, done, validation)
        if history is not None:
            history.sync()
        gain = planned.gain.after(done, validation.selection)
        best = save(planned, train_state, done, validation, None, gain=gain, ended=over)
    return over, best


def _is_due(planned: RunPlan, done: int) -> bool:
    """Return whether the run is validated after `done` steps."""
    epoch, rest = divmod(done, planned.steps_per_epoch)
    every = planned.recipe.run.validate_every
    return done > 0 and not rest and (epoch % every == 0 or done == planned.steps)


def _left_to_validate(planned: RunPlan) -> bool:
    """Return whether a signal stopped the validation that the checkpoint to resume should have."""
    return (
        planned.resumed is not None
        and _is_due(planned, planned.done)
        and not checkpoint.read_meta(planned.resumed)["metrics"]
    )


def _validate_unless_stopped(planned: RunPlan, train_state: TrainState) -> Validation | None:
    """Compute the metrics of the validation sets; None if a signal to stop came to a rank."""
    try:
        return _validate(planned, train_state)
    except interrupts.Stopped:
        return None


def _next_unless_stopped(batches: Iterator[Batch]) -> Batch | None:
    """Wait for the next batch; None if a signal to stop came to this rank."""
    try:
        with interrupts.stoppable():
            return next(batches)
    except interrupts.Stopped:
        return None


def _tracker(planned: RunPlan) -> contextlib.AbstractContextManager[Tracker | None]:
    """Return the recipe's tracker on rank 0, a context manager that connects on entry; else a null
    context.
    """
    recipe = planned.recipe
    if not (recipe.run.tracker and planned.dist.is_main):
        return contextlib.nullcontext()
    settings = flat_settings(asdict(recipe))
    return Tracker(recipe.run.tracker, planned.folder, recipe.name, settings)


def _why_over(planned: RunPlan, done: int, gain: Gain) -> str:
    """Return why the run is finished after `done` steps, as stored in `meta.json`; empty if it
    is not.
    """
    if done == planned.steps:
        return "every step is done"
    most = planned.recipe.run.stop_after_no_gain
    if not most or gain.validations_since < most:
        return ""
    reason = (
        f"no gain in {gain.validations_since} validations over {gain.highest:.4f} of step "
        f"{gain.step} (run.stop_after_no_gain)"
    )
    console.log.info("stopped at step %d of %d: %s", done, planned.steps, reason)
    return reason


def _validate(planned: RunPlan, train_state: TrainState) -> Validation:
    """Compute the metrics of the plan's validation sets."""
    recipe = planned.recipe
    share_buffers(train_state)
    return validate(
        train_state, planned.validation, recipe.preprocess, recipe.loading, planned.features
    )


def _baseline(planned: RunPlan, train_state: TrainState) -> Validation | None:
    """Return the metrics before the first step if the run starts from a trained detector, else
    None. They are written to a file, so that a resumed run can still compute forgetting.
    """
    if (path := planned.baseline) is None:
        return None
    console.log.info("metrics before training: %s", path)
    if planned.resumed:  # the file of a run without a checkpoint may be of other weights
        return read_validation(path)
    validation = _validate(planned, train_state)
    on_main(planned.dist, lambda: write_validation(path, validation))
    return validation


_OTHER_RUN = (
    "start another run (--run NAME) with a lower optim.lr, or with --set run.precision=fp32"
)
"""Advice for a run whose numbers are not finite: with the same recipe the run would fail again."""


def _refuse_bad_loss(planned: RunPlan, train_state: TrainState) -> None:
    """Stop the run if a loss was not finite since the last check.

    Raises:
        ValueError: a loss is not finite; the message has the first such step and the first samples
            of its rank.
    """
    dist, stream = train_state.dist, planned.stream
    where = first_bad(all_gather_object(dist, int(train_state.bad_step)))
    if where is None:
        return
    bad, rank = where
    index, step = divmod(bad, planned.steps_per_epoch)
    epoch = stream.epoch(index)
    samples = epoch.samples[epoch.positions(step, rank, dist.world_size)]
    keys = ", ".join(stream.pool.shards.text("key", sample) for sample in samples[:8])
    raise ValueError(
        f"the loss is not finite at step {bad + 1} (first samples: {keys}); {_OTHER_RUN}"
    )


def _refuse_bad_weights(train_state: TrainState, done: int) -> None:
    """Stop the run if a weight is not finite, before such a checkpoint replaces a good one.

    Raises:
        ValueError: a weight is not finite; the message names the first.
    """
    if name := not_finite_in(train_state):
        raise ValueError(
            f"the weights are not finite after step {done} (the first is {name}); {_OTHER_RUN}"
        )


def _log_step(
    history: History | None,
    stats: LoaderStats,
    train_state: TrainState,
    done: int,
    loss: torch.Tensor,
) -> None:
    """Log one row on the steps since the last row: the mean loss and the speed of all ranks, and
    the times and contents of rank 0's batches.
    """
    mean = all_reduce_sum(train_state.dist, loss).item() / train_state.dist.world_size
    rate = train_state.optimizer.param_groups[-1]["lr"]
    row = {"loss": mean, "lr": rate, **stats.row()}
    if history is None:
        return
    history.write(done, "train", row)
    console.log.info(
        "step %d: loss %.3f, %.0f images/s, %.0f %% of the time waiting for images "
        "(%.0f %% reading, %.0f %% decoding; longest wait %.0f ms)",
        *(done, row["loss"], row["images_per_s"], 100 * row["wait_share"]),
        *(100 * row["wait_read"], 100 * row["wait_decode"], row["stall_max_ms"]),
    )


def _log_validation(history: History | None, done: int, validation: Validation) -> None:
    """Log one row per set and source, and one line in the terminal."""
    if history is None:
        return
    history.write(done, "validate", {"selection": validation.selection})
    for name, metrics in [*validation.sets.items(), *validation.sources.items()]:
        history.write(done, f"validate/{name}", asdict(metrics))
    figures = ", ".join(
        f"{name} accuracy {m.accuracy:.3f}" + (f" AUROC {m.auroc:.3f}" if m.auroc else "")
        for name, m in validation.sets.items()
    )
    console.log.info("step %d: %s", done, figures)
