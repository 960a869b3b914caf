"""Say of images whether they are real or AI-generated: `python predict.py dir/`.

What takes seconds to load (torch, timm) is imported inside the functions that use it, after the
command line has been checked.
"""

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

import console
from model.inference import fitness, inputs, results
from model.inference.run import Run, predict_all, predict_as_they_come
from model.inference.signatures import read_trust_list, usual_trust_list

if TYPE_CHECKING:
    from model.inference.run import Loaded
    from pipeline.loading import Backend


class NotStarted(click.ClickException):
    """Nothing was scored: a mistake in the command, or no detector."""

    exit_code = 2


@click.command(cls=console.Command)
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option(
    "--format",
    "output",
    type=click.Choice(results.FORMATS),
    help="How results are written. Default: by the name of --out, else a table.",
)
@click.option(
    "--out",
    type=console.LocalPath(dir_okay=False),
    help="Write results to this file as they come; it has .partial added until it is complete.",
)
@click.option("--resume", is_flag=True, help="Go on with --out after an interruption.")
@click.option(
    "--threshold",
    type=console.FiniteRange(0, 1),
    help="Likely AI from this probability on. Default: what the checkpoint was calibrated to.",
)
@click.option(
    "--heatmap",
    type=console.LocalPath(file_okay=False),
    help="Folder for a picture of each image that shows what moved its score.",
)
@click.option(
    "--watch",
    type=console.LocalPath(exists=True, file_okay=False, path_type=str),
    help="Folder that fills: predict what comes into it, until Ctrl-C.",
)
@click.option(
    "--onnx",
    type=console.LocalPath(dir_okay=False),
    help="Exported detector (`python -m model export --onnx`) to use; torch is then not needed.",
)
@click.option(
    "--trust-list",
    type=console.LocalPath(dir_okay=False),
    help="PEM file of anchors that C2PA signers are trusted by. Default: DETECTOR_TRUST_LIST, or "
    "the public list where it was fetched.",
)
@console.options(
    "max_fpr", "max_miss", "checkpoint", "detector", "trust", "fake_label", "runs", "device",
    "backend", "batch_size",
)  # fmt: skip
def main(
    paths: tuple[str, ...],
    output: str | None,
    out: Path | None,
    resume: bool,
    threshold: float | None,
    max_fpr: float | None,
    max_miss: float | None,
    heatmap: Path | None,
    watch: str | None,
    onnx: Path | None,
    trust_list: Path | None,
    checkpoint: Path | None,
    detector: str | None,
    trust: bool,
    fake_labels: tuple[str, ...],
    runs: Path,
    device: str,
    backend: "Backend",
    batch_size: int,
) -> None:
    """Print, for each image of PATH..., the probability that it is AI-generated, and a verdict.

    Of a checkpoint that is not calibrated it is a score and no probability; CSV and JSON lines
    call both `probability`.

    PATH is a file, a folder, a pattern in quotes, a zip or tar archive, a shard set, or - for a
    list of them on standard input, one a line. What the file says of itself stands beside the
    verdict and never changes it.

    The exit code is 0 if every image has a verdict, 1 if some could not be read (each is a line
    with the reason), 2 if nothing could be done.
    """
    output = output or _format_of(out)
    _check(paths, watch, output, out, resume)
    if onnx and (checkpoint or detector or heatmap or backend == "dali"):
        raise click.UsageError(
            "--onnx takes no --checkpoint, no --detector, no --heatmap and no --backend dali"
        )
    rates = max_fpr is not None or max_miss is not None
    if rates and threshold is not None:
        raise click.UsageError("--threshold takes no --max-fpr and no --max-miss")
    try:
        anchors = read_trust_list(trust_list) if trust_list else usual_trust_list()
    except ValueError as error:
        raise NotStarted(str(error)) from error
    console.log.info("loading the detector")
    try:
        from model.adapters.open import Opening, load_any

        opening = Opening(trust=trust, fake_labels=fake_labels, runs=runs)
        loaded = load_any(
            str(onnx) if onnx else detector, checkpoint, opening, device=device, backend=backend,
            threshold=threshold, heatmap=heatmap is not None,
        )  # fmt: skip
        if rates:
            loaded = loaded.at_rates(max_fpr, max_miss)
        file = results.open_results(out, output, loaded.identity, resume) if out else None
    except (ValueError, OSError) as error:
        console.log.debug("traceback", exc_info=True)
        raise NotStarted(console.one_line(error)) from error
    run = Run(loaded, output, file, heatmap, anchors)
    console.log.info("checkpoint: %s, %s", loaded.checkpoint, _describe(loaded))
    if anchors:
        console.log.info("C2PA trust list: %s", anchors.describe())
    for notice in loaded.notices:
        console.log.warning("%s", notice.text)
    heading = results.header(output, fitness.word_for(loaded.meta))
    if file and output == "table":
        file.write(heading)
    elif not out and heading:
        console.say(heading)
    try:
        with console.sigterm_interrupts():
            if watch:
                predict_as_they_come(run, watch, batch_size)
            else:
                predict_all(run, paths, batch_size)
        _finish(run, paths, watch)
    except KeyboardInterrupt:
        if not watch:
            _stopped(run, out)
        _finish(run, paths, watch)
    finally:
        if file:
            file.close()


def _format_of(out: Path | None) -> str:
    """By the name of the results file."""
    suffix = out.suffix.lower() if out else ""
    return {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}.get(suffix, "table")


def _check(
    paths: tuple[str, ...], watch: str | None, output: str, out: Path | None, resume: bool
) -> None:
    """What is wrong with the command, before seconds are spent on loading a detector."""
    if bool(paths) == bool(watch):
        raise click.UsageError(
            "name images, folders or archives, or a folder to --watch"
            + (", not both" if watch else "")
        )
    for path in paths:
        if path != "-" and not inputs.is_there(path):
            raise click.UsageError(f"{path!r} does not exist")
    if resume and not out:
        raise click.UsageError("--resume goes on with a file; name it with --out")
    if resume and output == "table":
        raise click.UsageError("--resume reads what is in --out; that takes --format csv or jsonl")


def _describe(detector: "Loaded") -> str:
    """The band, and the backend where it is not the usual one."""
    low, high = detector.band
    band = (
        f"likely AI from {high:g}"
        if low == high
        else f"no sign of AI below {low:g}, likely AI from {high:g}, uncertain between"
    )
    return f"{band}; images through {detector.backend} ({detector.reason})"


def _stopped(run: Run, out: Path | None) -> None:
    """Ctrl-C, or SIGTERM: what is done is kept."""
    hint = f"; {results.partial_of(out)} is kept, and --resume goes on with it" if out else ""
    click.echo(f"stopped after {console.counted(run.done, 'image')}{hint}", err=True)
    raise SystemExit(128 + signal.SIGINT)


def _finish(run: Run, paths: tuple[str, ...], watch: str | None) -> None:
    """Say what has been done, and what has not; the exit code tells."""
    from model.inference.prediction import UNREADABLE
    from model.verdict import VERDICTS

    for reason, count in run.excluded.items():
        console.log.info("%s skipped: %s", console.counted(count, "file"), reason)
    if not run.done and not run.skipped and not watch:
        if paths == ("-",):
            raise NotStarted("standard input named no image; it takes names of files, one a line")
        raise NotStarted(f"no image in {', '.join(paths)}; name a photo, or a folder of some")
    if run.out:
        run.out.finish()
    counts = [(run.verdicts[verdict], verdict) for verdict in (*VERDICTS, UNREADABLE)]
    verdicts = ", ".join(f"{count:,} {verdict}" for count, verdict in counts if count)
    if run.out and run.skipped and not run.done:
        images = "the image is" if run.skipped == 1 else f"all {run.skipped:,} images are"
        console.log.info("nothing new: %s in %s", images, run.out.path)
    else:
        before = f", {run.skipped:,} were there already" if run.skipped else ""
        done = console.counted(run.done, "image")
        console.log.info("%s%s at %s: %s", done, before, run.rate, verdicts or "-")
    if run.output == "table":
        console.log.info("%s", fitness.proof(run.detector.meta))
    unreadable = run.verdicts[UNREADABLE] + (run.out.unreadable if run.out else 0)
    if unreadable:
        total = run.done + (len(run.out.names) if run.out else 0)
        click.echo(f"{unreadable:,} of {total:,} images could not be read", err=True)
    if run.undrawn:
        click.echo(f"{run.undrawn:,} heatmaps could not be written", err=True)
    if unreadable or run.undrawn:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
