"""Print for each image whether it is AI-generated (the `predict.py` command).

    python predict.py PATH... [--checkpoint RUN] [--format table|csv|jsonl] [--out FILE]

PATH is a file, a folder, a pattern, a zip or tar archive, a parquet table with images, a shard set
(packed images), or `-` for a list of paths on standard input. Each image gives the path, the
probability that it is AI-generated, and the verdict *likely AI*, *uncertain* or *no sign of AI*, or
why it has none. Statements in the file about its origin are added. The exit code is 0; 1 if an
image has no verdict or a file cannot be written; 2 for a wrong command line, no image, or a
detector, trust list or `--out` that cannot be opened (`NotStarted`); 130 after Ctrl-C. With
`--watch`, that is the normal end (0 or 1).

Main entry: `main()`, the click command. Options:

- `--checkpoint RUN`: folder of a training run or of a checkpoint, or name of a shipped detector
  (default: the newest run below `--runs`, else the shipped detector).
- `--detector`: any detector: what `--checkpoint` takes, an .onnx file, hf:OWNER/NAME, timm:NAME or
  a Python file, which `--trust` (no value) allows to run.
- `--fake-label`: the label of an hf: or timm: detector that means fake; may be repeated.
- `--onnx FILE`: the same as `--detector FILE`, for an ONNX file of `python -m model export` whose
  name may end in anything.
- `--out FILE`: file for the results, which are then not printed. If it, or FILE.partial, exists,
  `--resume` is needed (else exit code 2). Its name ends in .partial until it is complete.
- `--format`: table, csv or jsonl (default: by the suffix of FILE, else table).
- `--resume`: if FILE exists (csv or jsonl, complete or interrupted), continue it. It must be of the
  same detector, calibration, threshold and format.
- `--threshold`: probability (0 to 1) from which an image is *likely AI*; below it is *no sign of
  AI*, and nothing is *uncertain*. Default: the thresholds of the detector.
- `--max-fpr`: the largest share of real images that may be called *likely AI*. `--max-miss`: the
  largest share of fakes that may be called *no sign of AI*. Each is above 0 and below 0.5, and
  holds for images like those of the calibration. Give one or both, without `--threshold`. A limit
  that is not given stays the detector's.
- `--watch FOLDER`: instead of PATH, score images as they appear, until Ctrl-C.
- `--heatmap FOLDER`: write PNGs of the regions that changed the score (only with a checkpoint).
- `--trust-list FILE`: PEM file with the certificates of trusted C2PA signers (default: the file in
  DETECTOR_TRUST_LIST, else the list that `python -m model fetch --trust-list` fetched).
- `--report-mistake LABEL`: the true label of all images, `real` or `fake`. Each verdict that
  contradicts it is recorded in the folder `--mistakes` (default: the variable DETECTOR_MISTAKES,
  else `mistakes`); with `--keep-image` (no value), the image is stored there, too.
- `--runs`: the folder of training runs (default `runs`).
- `--device`: auto (default), cpu, cuda or cuda:N. `--backend`: the decoder, auto (default), dali or
  pil. `--batch-size`: images per batch (default 32). `--verbose`: a longer log.

`CONFLICTS` lists options that exclude each other, by the names of their parameters.
"""

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

import cli
import console
import interrupts
from installed import command
from model.c2pa.signatures import TrustList, read_trust_list, usual_trust_list
from model.inference import fitness, inputs, results
from model.inference.run import PredictionRun, predict_all, predict_as_they_come, read_paths

if TYPE_CHECKING:
    from model.inference.prediction import AnyDetector
    from model.mistakes.keep import Label
    from pipeline.loading import Backend

MOST_REASONS = 12
"""Largest number of reasons for skipped files to print; each file extension has its own reason."""

CONFLICTS = {
    "threshold": ("max_fpr", "max_miss"),
    "onnx": ("checkpoint", "detector", "heatmap", "trust", "fake_labels"),
    "label": ("output", "out", "resume", "heatmap", "watch", "trust_list", "batch_size"),
}
"""Parameter of an option -> parameters of the options that it cannot be combined with."""


class NotStarted(click.ClickException):
    """Error before any image was scored: a wrong command line, or no detector. Exit code 2."""

    exit_code = 2


@click.command(cls=console.Command)
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option(
    "--format",
    "output",
    type=click.Choice(results.FORMATS),
    help="Format of the results. Default: from the suffix of --out, else table.",
)
@click.option(
    "--out",
    type=cli.LocalPath(dir_okay=False, writes=True),
    help="File to write results to. Its name ends in .partial until it is complete.",
)
@click.option("--resume", is_flag=True, help="Continue an interrupted --out file.")
@click.option(
    "--threshold",
    type=cli.FiniteRange(0, 1),
    help="Probability at or above which an image is called likely AI. Default: the checkpoint's "
    "calibrated threshold.",
)
@click.option(
    "--heatmap",
    type=cli.LocalPath(file_okay=False),
    help="Folder for heatmaps: for each image a picture of the regions that changed its score.",
)
@click.option(
    "--watch",
    type=cli.LocalPath(exists=True, file_okay=False, path_type=str),
    help="Watch this folder and score new images as they appear, until Ctrl-C.",
)
@click.option(
    "--onnx",
    type=cli.LocalPath(dir_okay=False),
    help="Use this detector, exported by `python -m model export --onnx`. Needs no torch.",
)
@click.option(
    "--trust-list",
    type=cli.LocalPath(dir_okay=False),
    help="PEM file with the certificates that make C2PA signers trusted. Default: the file named "
    "by DETECTOR_TRUST_LIST, else the public list if it was fetched.",
)
@click.option(
    "--report-mistake",
    "label",
    type=click.Choice(["real", "fake"]),
    help="True label of all images: record each wrong verdict (hash, score, detector and label, no "
    "image) in the folder --mistakes. Nothing leaves this machine.",
)
@click.option(
    "--mistakes",
    type=cli.LocalPath(file_okay=False),
    default="mistakes",
    show_default=True,
    envvar="DETECTOR_MISTAKES",
    help=f"Folder for --report-mistake. `{command('evaluate')} --regressions` scores it again.",
)
@click.option(
    "--keep-image", is_flag=True, help="With --report-mistake: also keep a copy of each image."
)
@cli.options(
    "max_fpr", "max_miss", "checkpoint_or_shipped", "detector", "trust", "fake_label", "runs",
    "device", "backend", "batch_size",
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
    label: "Label | None",
    mistakes: Path,
    keep_image: bool,
    checkpoint: Path | None,
    detector: str | None,
    trust: bool,
    fake_labels: tuple[str, ...],
    runs: Path,
    device: str,
    backend: "Backend",
    batch_size: int,
) -> None:
    """For each image of PATH, print a verdict and the probability that it is AI-generated.

    PATH is a file, a folder, a pattern in quotes, a zip or tar archive, a parquet table with
    images, a shard set, or - to read a list of paths from standard input, one per line.

    Without a calibration the number is a score, not a probability. CSV and JSON lines call it
    `probability` in both cases.

    Statements in the file about its origin are printed too. They never change the verdict.

    The exit code is 0 if every image has a verdict, 1 if an image has none (its line
    gives the reason), 2 if nothing could be scored.
    """
    output = output or _format_of(out)
    _check(output)
    anchors = _trust_list(trust_list)
    console.log.info("loading the detector")
    try:
        from model.adapters.open import Opening, load_any

        opening = Opening(trust=trust, fake_labels=fake_labels, runs=runs)
        if onnx:
            from model.inference.onnx_detector import load_onnx

            loaded: AnyDetector = load_onnx(onnx, device=device, threshold=threshold)
        else:
            loaded = load_any(
                detector, checkpoint, opening, device=device, backend=backend, threshold=threshold,
                heatmap=heatmap is not None,
            )  # fmt: skip
        if max_fpr is not None or max_miss is not None:
            loaded = loaded.at_rates(max_fpr, max_miss)
        _check_heatmap(loaded, heatmap)
        file = results.open_results(out, output, loaded.identity, resume) if out else None
    except (ValueError, OSError) as error:
        console.log.debug("traceback", exc_info=True)
        raise NotStarted(console.one_line(error)) from error
    if label:
        _report_mistakes(loaded, paths, label, mistakes, keep_image)
        return
    run = PredictionRun(loaded, output, file, heatmap, anchors)
    try:
        _introduce(run)
        with interrupts.terminations_interrupt():
            if watch:
                predict_as_they_come(run, watch, batch_size)
            else:
                predict_all(run, paths, batch_size)
        _finish(run, paths, watch)
    except KeyboardInterrupt:
        if not watch:
            _stopped(run)
        _finish(run, paths, watch)
    finally:
        if file:
            file.close()


def _format_of(out: Path | None) -> str:
    """Return the output format for the suffix of the results file: `csv`, `jsonl` or `table`."""
    suffix = out.suffix.lower() if out else ""
    formats = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "table", "": "table"}
    if suffix not in formats:
        raise click.UsageError(
            f"there is no format for {suffix}: name a .csv, .jsonl or .txt file, or give --format"
        )
    return formats[suffix]


def _trust_list(file: Path | None) -> TrustList | None:
    """Read the trust list `file`, or the usual one, before a detector is loaded."""
    try:
        return read_trust_list(file) if file else usual_trust_list()
    except ValueError as error:
        raise NotStarted(str(error)) from error


def _check_heatmap(detector: "AnyDetector", folder: Path | None) -> None:
    """Raise `ExplainError` if heatmaps are requested and the detector cannot draw them, before a
    file is made.
    """
    if not folder:
        return
    from model.inference.detector import ImageDetector
    from model.inference.gradcam import check_possible

    assert isinstance(detector, ImageDetector)  # `load_any` refuses heatmaps of other detectors
    check_possible(detector)


def _report_mistakes(
    detector: "AnyDetector", paths: tuple[str, ...], label: "Label", folder: Path, keep_image: bool
) -> None:
    """Score images of which the true label is known, and record each wrong verdict in `folder`.
    Print a line per image. Exit with 1 if an image has no verdict or is not recorded.
    """
    from model.mistakes.add import keep_wrong

    _log_detector(detector)
    failed = total = 0
    for report in keep_wrong(detector, read_paths(paths), label, folder, keep_image=keep_image):
        total += 1
        failed += report.failed
        console.say(report.text)
    if not total:
        raise _no_image(paths)
    if failed:
        raise click.ClickException(f"{failed:,} of {console.counted(total, 'image')} failed")


def _no_image(paths: tuple[str, ...]) -> NotStarted:
    if paths == ("-",):
        return NotStarted("standard input named no image; expected file names, one per line")
    return NotStarted(f"no image in {', '.join(paths)}; name an image, or a folder of images")


def _check(output: str) -> None:
    """Refuse a wrong command line before a detector is loaded, which takes seconds."""
    cli.refuse_conflicts(CONFLICTS)
    given = click.get_current_context().params
    paths, watch, resume = given["paths"], given["watch"], given["resume"]
    if given["onnx"] and given["backend"] == "dali":
        raise click.UsageError("--onnx cannot be combined with --backend dali")
    if given["keep_image"] and not given["label"]:
        raise click.UsageError("--keep-image copies images of wrong verdicts: add --report-mistake")
    if cli.given("mistakes") and not given["label"]:
        raise click.UsageError("--mistakes is a folder of wrong verdicts: add --report-mistake")
    if bool(paths) == bool(watch):
        raise click.UsageError(
            "name images, folders or archives, or give a folder to --watch"
            + (", not both" if watch else "")
        )
    for path in paths:
        if path != "-" and not inputs.is_there(path):
            address = "://" in path
            raise click.UsageError(
                f"{path!r} does not exist"
                + ("; images are read from disk, so download it first" if address else "")
            )
    heatmap = given["heatmap"]
    for path in (*paths, *([watch] if watch else [])):
        if heatmap and path != "-" and inputs.covers(path, heatmap):
            raise click.UsageError(
                f"--heatmap {heatmap} is inside {path}, so its pictures would be scored too; name "
                "a folder outside"
            )
    if resume and not given["out"]:
        raise click.UsageError("--resume continues a results file; name the file with --out")
    if resume and output == "table":
        raise click.UsageError("--resume needs --format csv or jsonl; a table cannot be read back")


def _log_detector(detector: "AnyDetector") -> None:
    """Log the detector and what is known against it."""
    console.log.info("checkpoint: %s, %s", detector.checkpoint, _describe(detector))
    for notice in detector.notices:
        console.log.warning("%s", notice.text)


def _introduce(run: PredictionRun) -> None:
    """Log the detector and the trust list, and write the heading of the results."""
    detector = run.detector
    _log_detector(detector)
    if run.trust:
        console.log.info("C2PA trust list: %s", run.trust.describe())
    heading = results.header(run.output, fitness.score_word(detector.meta))
    if run.out and run.output == "table":
        run.out.write(heading)
    elif not run.out and heading:
        console.say(heading)


def _describe(detector: "AnyDetector") -> str:
    """Describe the decision band and the decoding backend in one line."""
    from model.verdict import describe_band

    return (
        f"{describe_band(detector.band)}; images decoded by {detector.backend} ({detector.reason})"
    )


def _stopped(run: PredictionRun) -> None:
    """Report an interruption by a signal and exit with code 130."""
    hint = ""
    if run.out:
        run.out.close()
        partial = results.unfinished_of(run.out.path)
        place = partial if partial.exists() else run.out.path
        if place.exists():
            hint = f"; the rows so far are in {place}{run.out.go_on}"
    console.note(f"stopped after {console.counted(run.done, 'image')}{hint}")
    raise SystemExit(128 + signal.SIGINT)


def _finish(run: PredictionRun, paths: tuple[str, ...], watch: str | None) -> None:
    """Log the counts of the run, complete the results file and set the exit code."""
    from model.inference.prediction import UNREADABLE
    from model.verdict import VERDICTS

    reasons = run.excluded.most_common(MOST_REASONS)
    for reason, count in reasons:
        console.log.info("%s skipped: %s", console.counted(count, "file"), reason)
    if rest := run.excluded.total() - sum(count for _, count in reasons):
        console.log.info("%s skipped for other reasons", console.counted(rest, "file"))
    if not run.done and not run.skipped and not watch:
        raise _no_image(paths)
    if run.out:
        run.out.finish()
    counts = [(run.verdicts[verdict], verdict) for verdict in (*VERDICTS, UNREADABLE)]
    verdicts = ", ".join(f"{count:,} {verdict}" for count, verdict in counts if count)
    if run.out and run.skipped and not run.done:
        images = "the image is" if run.skipped == 1 else f"all {run.skipped:,} images are"
        console.log.info("nothing new: %s in %s", images, run.out.path)
    else:
        before = f" ({run.skipped:,} were done before)" if run.skipped else ""
        done = console.counted(run.done, "image")
        console.log.info("%s%s at %s: %s", done, before, run.rate, verdicts or "-")
    if run.escaped:
        names = "1 name is" if run.escaped == 1 else f"{run.escaped:,} names are"
        console.log.info("%s not UTF-8: such bytes are written as escapes, such as \\xff", names)
    if run.output == "table":
        console.log.info("%s", fitness.disclaimer(run.detector.meta))
    unreadable = run.verdicts[UNREADABLE] + (run.out.unreadable if run.out else 0)
    if unreadable:
        total = run.done + (len(run.out.names) if run.out else 0)
        again = "; those with a row are not read again: score them into another --out"
        again = again if run.out and run.out.unreadable else ""
        console.note(f"{unreadable:,} of {total:,} images have no verdict{again}")
    if run.undrawn:
        console.note(f"heatmaps that could not be written: {run.undrawn:,}")
    if unreadable or run.undrawn:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
