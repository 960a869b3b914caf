"""Score shard sets with a detector and write a report of its accuracy (the `evaluate.py` command).

    python evaluate.py --shards SET [--checkpoint RUN | --detector NAME] [--out FOLDER]

Main entry: `main()`, a click group, also without a subcommand. One of these says what is scored:

- `--shards SET` (may be repeated): a shard set, a folder of packed images below `--data` (default
  `data/shards`). Every sample is scored exactly once, on any number of ranks (processes);
- `--suite NAME`: all packed sets of a suite of the catalog, such as `wild` or `all`. If some are
  not packed, the report on the others is written, and the exit code is 1;
- `--subset FILE`: a CSV file with the columns set and key. Only the samples that it lists are
  scored. `--shards` may be given, too: then only the listed samples of these sets are scored;
- `--scores FILE`: an earlier `scores.parquet`. Only the report is written again, without network or
  images, to the folder of FILE. Or a CSV table of another detector's scores (columns of
  `model/score_tables/csv_table.py`), of the images of the `--shards` if given;
- `--regressions FOLDER`: mistakes that `predict.py --report-mistake` recorded in FOLDER. The new
  verdicts are added to the records. The exit code is 1 if this detector is wrong where another one
  was right, or if no image can be scored. `--images FOLDER` is searched for images without a
  recorded copy, or with one that has changed.

With which detector, and how:

- `--checkpoint RUN`: a run's folder, a checkpoint folder or the name of a shipped detector.
  Default: the newest run below `--runs` (default `runs`). If there is none: an error, but with
  `--regressions` the shipped detector;
- `--detector NAME`: any detector: what `--checkpoint` takes, FILE.onnx, `hf:OWNER/NAME`,
  `timm:NAME` or FILE.py (only with `--trust`). `--fake-label LABEL` (repeatable): a label of a
  classifier that means fake;
- `--device` (auto, cpu, cuda, cuda:N) and `--backend` (auto, dali, pil: decoder) say how to run;
- `--reference-reals SET`: its real images give the false-positive rate of the other sets. Default:
  those of the set that the catalogs name for a set without real images;
- `--catalog FILE` (may be repeated): your own catalog, with more suites and reference sets;
- `--robustness [N]`: also scores N images per class (default 1000) after JPEG, resizing and more;
- `--features STORE`: a folder of stored features of a frozen backbone, scored instead of images.
  Missing ones are computed.

`--out FOLDER` gets `scores.parquet`, `report.json`, CSV tables, `speed.json` and `report.html`.
Default: `<run's folder>/evaluation/<sets>`, or `<folder of --runs>/<name>/evaluation/<sets>` for a
detector NAME or a table, not from a run; for a checkpoint in no run, <name> is `checkpoint-`, its
folder and a hash of its place. (In <sets>, the set `folders/mine` is `folders-mine`.) With
`--regressions` it gets only `regressions.json` (default: no file). An error is one line and exit
code 1; wrong options (see `CONFLICTS`) give 2.

Subcommands: `calibrate --shards SET` fits temperature and thresholds on validation sets and stores
them with the detector. `compare RUN RUN...` prints the differences between reports. See `--help`.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import cli
import console
from installed import command
from storage import any_path, file_name, write_text

if TYPE_CHECKING:
    from model.calibration.fit import Over, ThresholdAt
    from model.evaluation.scores import ScoreTable
    from model.inference.prediction import AnyDetector
    from pipeline.loading import Backend

PER_CLASS = 1000
"""Default number of images per class for --robustness. The 95 % interval of a rate of 5 % is then
+-1.4 points, and all perturbations together cost as much as scoring 27,000 to 54,000 images.
"""

REGRESSIONS_FILE = "regressions.json"
"""Result of `--regressions` in the folder `--out`."""

CONFLICTS = {
    "scores": (
        "suite", "subset", "robustness", "regressions", "images", "features", "checkpoint",
        "detector", "trust", "fake_labels", "device", "backend",
    ),
    "checkpoint": ("detector",),
    "suite": ("names", "subset"),
    "regressions": (
        "names", "suite", "subset", "reference_reals", "catalogs", "robustness", "features",
    ),
}  # fmt: skip
"""Parameter of an option -> parameters of the options that it cannot be combined with."""


@click.group(cls=console.Group, invoke_without_command=True)
@click.option("--shards", "names", multiple=True, help="Shard set to measure on. May be repeated.")
@click.option("--suite", help="Measure on all packed sets of a suite: wild, generators, all, ...")
@click.option(
    "--reference-reals",
    help="Set whose real images are used for the false-positive rate of the other sets.",
)
@click.option(
    "--subset",
    type=cli.LocalPath(exists=True, dir_okay=False),
    help="CSV file with columns set,key: score only these samples. Without --shards, all sets in "
    "the file are used.",
)
@click.option(
    "--scores",
    type=cli.LocalPath(exists=True, dir_okay=False),
    help="Write the report again from this scores.parquet, without network or images; or that on "
    "the scores of another detector in a CSV table (path, label, score; docs/detectors.md).",
)
@click.option(
    "--robustness",
    type=click.IntRange(1, 2**31 - 1),
    is_flag=False,
    flag_value=PER_CLASS,
    metavar="[N]",
    help="Also score N images per class (default 1000) after JPEG, WebP, AVIF, resizing and more.",
)
@click.option(
    "--out",
    type=cli.LocalPath(file_okay=False),
    help="Folder for the report and the scores. Default: evaluation/ in the run's folder.",
)
@click.option(
    "--features",
    type=cli.LocalPath(file_okay=False),
    help="Score the features in this feature store instead of images (frozen backbones only).",
)
@click.option(
    "--regressions",
    type=cli.LocalPath(exists=True, file_okay=False),
    help=f"Score the mistakes in this folder (`{command('predict')} --report-mistake`) again, "
    "instead of a set: which are fixed or new? Without --checkpoint and without a run: by the "
    "shipped detector.",
)
@click.option(
    "--images",
    type=cli.LocalPath(exists=True, file_okay=False),
    help="With --regressions: folder to search, by file content, for images without a copy, or "
    "with one that has changed.",
)
@cli.options(
    "catalog", "checkpoint", "detector", "trust", "fake_label", "data", "runs", "device", "backend"
)
@click.pass_context
def main(
    context: click.Context,
    names: tuple[str, ...],
    suite: str | None,
    reference_reals: str | None,
    subset: Path | None,
    scores: Path | None,
    robustness: int | None,
    out: Path | None,
    features: Path | None,
    regressions: Path | None,
    images: Path | None,
    catalogs: tuple[Path, ...],
    checkpoint: Path | None,
    detector: str | None,
    trust: bool,
    fake_labels: tuple[str, ...],
    data: str,
    runs: Path,
    device: str,
    backend: "Backend",
) -> None:
    """Measure a detector on shard sets, or on recorded mistakes.

    The commands below calibrate it, or compare runs.

    On several GPUs: torchrun --nproc-per-node 4 -m -- evaluate --shards evalgen
    """
    if subcommand := context.invoked_subcommand:
        _refuse_options_before(context, subcommand)
        return
    cli.refuse_conflicts(CONFLICTS)
    if scores:
        _report_on_scores(scores, names, data, runs, out, reference_reals, catalogs)
        return
    if images and not regressions:
        raise click.UsageError("--images is for recorded mistakes: add --regressions FOLDER")
    if not (names or subset or suite or regressions):
        raise click.UsageError("no set to measure on; name one, such as --shards evalgen")
    from model.adapters.open import Opening, load_any

    opening = Opening(trust=trust, fake_labels=fake_labels, runs=runs)
    if regressions:
        load = partial(load_any, detector, checkpoint, opening, device=device, backend=backend)
        _measure_mistakes(regressions, images, out, load)
        return
    from model.distributed import init_distributed
    from model.evaluation.plan import Options
    from model.evaluation.run import choose_subject, evaluate
    from model.evaluation.scores import SCORES_FILE
    from model.evaluation.suites import open_suite
    from pipeline.loading import Loading
    from pipeline.subset import read_subset
    from report.files import folder_of, write_report
    from report.terminal import print_report

    listed = read_subset(subset) if subset else None
    chosen_suite = open_suite(suite, any_path(data), catalogs) if suite else None
    names = tuple(chosen_suite.packed) if chosen_suite else names
    names = tuple(dict.fromkeys(names or (listed.keys if listed else ())))
    folder = file_name(suite or folder_of(names, data), f"-{subset.stem}" if subset else "")
    with contextlib.ExitStack() as held:
        with init_distributed() as dist:
            chosen, made = choose_subject(detector, checkpoint, opening, device, dist)
            out = out or made / "evaluation" / folder
            options = Options(
                loading=Loading(backend=backend), device=device, subset=listed, catalogs=catalogs,
                reference_reals=reference_reals, robustness=robustness or 0, features=features,
            )  # fmt: skip
            report = evaluate(
                chosen, any_path(data), names, out, options=options, dist=dist, held=held
            )
        if dist.is_main:
            written = write_report(report, out / SCORES_FILE, any_path(data), out)
            print_report(report)
            said = f"checkpoint: {chosen}" if isinstance(chosen, Path) else f"detector: {chosen!r}"
            console.say(said)
            console.say(f"scores: {out / SCORES_FILE}")
            say_files(written)
            _refuse_gaps(report, chosen_suite.missing_line if chosen_suite else "")


def _refuse_options_before(context: click.Context, subcommand: str) -> None:
    """Refuse options before a subcommand, because the subcommand would ignore them."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        own = isinstance(parameter, click.Option) and parameter.expose_value
        if own and source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{parameter.opts[0]} stands before {subcommand}, which does not see it; put it "
                f"after: {command('evaluate')} {subcommand} {parameter.opts[0]} ..."
            )


def _measure_mistakes(
    folder: Path, images: Path | None, out: Path | None, load: Callable[[], "AnyDetector"]
) -> None:
    """Score the mistakes recorded in `folder` again with the detector that `load` returns.

    Its verdicts are added to the records. `out` gets `regressions.json`. The exit code is 1 if an
    image is wrong now that another detector got right.
    """
    from model.mistakes.keep import read_mistakes

    mistakes = read_mistakes(folder)
    from model.mistakes.regressions import measure_again, record, report_of
    from report.mistakes import print_regressions

    if out:
        out.mkdir(parents=True, exist_ok=True)
    loaded = load()
    with console.progress("measuring", len(mistakes)) as advance:
        rows = measure_again(folder, mistakes, loaded, images, advance)
    if not any(row.after for row in rows):
        raise click.ClickException(f"no image of {folder} could be scored: {rows[0].reason}")
    record(folder, rows)
    result = report_of(rows, loaded)
    print_regressions(result)
    console.say(f"checkpoint: {loaded.checkpoint}")
    if out:
        file = out / REGRESSIONS_FILE
        write_text(file, json.dumps(result, indent=1) + "\n")
        console.say(f"report: {file}")
    if newly := result["counts"]["newly wrong"]:
        raise click.ClickException(
            f"newly wrong: {console.counted(newly, 'image')} that another detector got right"
        )


def _report_on_scores(
    scores: Path, names: Sequence[str], data: str, runs: Path, out: Path | None,
    reference_reals: str | None, catalogs: Sequence[Path],
) -> None:  # fmt: skip
    """Write and print the report again from a scores file, or that on a CSV table of scores."""
    is_table = scores.suffix.lower() == ".csv"
    if names and not is_table:
        raise click.UsageError("--scores cannot be combined with --shards, except for a CSV table")
    for option, value in (("--reference-reals", reference_reals), ("--catalog", catalogs)):
        if value and not names:
            raise click.UsageError(
                f"--scores cannot be combined with {option}, except for a CSV table with --shards"
            )
    from model.evaluation.run import lock_output, report_on
    from report.files import folder_of, write_report
    from report.terminal import print_report

    if is_table:
        from model.adapters.detector import output_name
        from model.evaluation.scores import SCORES_FILE, write_scores
        from model.score_tables.csv_table import read_scores

        names = list(dict.fromkeys(names))
        tables, about = read_scores(scores, names, any_path(data), reference_reals, catalogs)
        made = runs / output_name("scores", scores.stem, scores) / "evaluation"
        out = out or (made / file_name(folder_of(names, data), "") if names else made)
    folder = out or scores.parent
    with contextlib.ExitStack() as held:
        lock_output(folder, held)
        if is_table:
            scores = folder / SCORES_FILE
            write_scores(scores, tables, about)
            console.say(f"scores: {scores}")
        report = report_on(scores)
        written = write_report(report, scores, any_path(data), folder)
    print_report(report)
    say_files(written)
    _refuse_gaps(report)


def _refuse_gaps(report: Mapping[str, Any], missing_line: str = "") -> None:
    """End with an error if a set of a written report has no score, or sets are missing."""
    from model.evaluation.report import without_scores

    if faults := [fault for fault in (without_scores(report), missing_line) if fault]:
        raise click.ClickException("; ".join(faults))


def say_files(written: Sequence[Path]) -> None:
    """Print where the report files are. The page is last, because a person opens the page."""
    report, *tables, page = written
    console.say(f"report: {report}")
    console.say(f"tables: {', '.join(str(path) for path in tables)}")
    console.say(f"page: {page}")


@main.command()
@click.option(
    "--shards",
    "names",
    multiple=True,
    required=True,
    help="Validation set (split val) to fit on. May be repeated.",
)
@click.option(
    "--threshold",
    "threshold_at",
    type=click.Choice(["auto", "fpr5", "fpr1", "0.5"]),
    default="auto",
    show_default=True,
    help="Decision threshold. auto: 0.5, or higher if needed for at most 5 % false positives.",
)
@click.option(
    "--over",
    type=click.Choice(["pooled", "most_sources", "worst_source"]),
    help="With an error rate: which images keep to it. All together, three sources of four, or "
    "every source, without the small ones. Default: most_sources.",
)
@cli.options(
    "max_fpr", "max_miss", "checkpoint", "detector", "trust", "fake_label", "data", "runs",
    "device", "backend",
)  # fmt: skip
def calibrate(
    names: tuple[str, ...],
    threshold_at: "ThresholdAt",
    over: "Over | None",
    max_fpr: float | None,
    max_miss: float | None,
    checkpoint: Path | None,
    detector: str | None,
    trust: bool,
    fake_labels: tuple[str, ...],
    data: str,
    runs: Path,
    device: str,
    backend: "Backend",
) -> None:
    """Fit temperature, thresholds and the uncertain band.

    They are stored in the checkpoint, or below --runs for a detector of another project. An ONNX
    file is refused: calibrate its checkpoint, and export it again. Only sets of the split val are
    accepted: a test set must not influence the calibration.
    """
    from model.adapters.open import Opening
    from model.calibration.calibrate import calibrate_checkpoint, calibrate_other, run_locked
    from model.device import choose_device
    from model.distributed import init_distributed
    from model.evaluation.run import choose_subject
    from model.export.hub import CARD_FILE
    from model.recipe import Calibrating
    from pipeline.loading import Loading
    from report.terminal import print_calibration

    rule: ThresholdAt | Calibrating = threshold_at
    if max_fpr is not None or max_miss is not None:
        if cli.given("threshold_at"):
            raise click.UsageError("--threshold cannot be combined with --max-fpr or --max-miss")
        rule = Calibrating(
            threshold=over or Calibrating.threshold,
            max_fpr=Calibrating.max_fpr if max_fpr is None else max_fpr,
            max_miss=Calibrating.max_miss if max_miss is None else max_miss,
        )
    elif over:
        raise click.UsageError("--over is for an error rate: add --max-fpr or --max-miss")
    opening = Opening(trust=trust, fake_labels=fake_labels, runs=runs)
    folders = [any_path(data) / name for name in dict.fromkeys(names)]
    with init_distributed() as dist:
        chosen, _ = choose_subject(detector, checkpoint, opening, device, dist)
        if isinstance(chosen, Path):
            where = choose_device(device, dist.local_rank)
            with run_locked(chosen, dist):
                calibration = calibrate_checkpoint(
                    chosen, folders, Loading(backend=backend), where, rule=rule, dist=dist
                )
            said = f"checkpoint: {chosen}"
            if (chosen / CARD_FILE).is_file():
                said += (
                    f"\n{chosen / CARD_FILE} still has the thresholds of before; for a new model "
                    "card, export the detector again (python -m model export)"
                )
        else:
            calibration, path = calibrate_other(chosen, folders, runs, rule, dist)
            said = f"calibration: {path}"
    if dist.is_main:
        print_calibration(calibration)
        console.say(said)


@main.command()
@click.argument("paths", metavar="RUN...", nargs=-1, required=True, type=cli.LocalPath(exists=True))
@click.option("--intersection", is_flag=True, help="Compare only the images that all runs scored.")
@click.option(
    "--flips",
    type=cli.LocalPath(dir_okay=False, writes=True),
    help="CSV file to write: every image whose verdict changed between the two runs.",
)
@click.option(
    "--out",
    type=cli.LocalPath(file_okay=False),
    help="Folder to write comparison.html, comparison.json and comparison.csv to.",
)
@cli.options()
def compare(
    paths: tuple[Path, ...], intersection: bool, flips: Path | None, out: Path | None
) -> None:
    """Compare the reports of two or more runs.

    Each RUN is the folder of a report, or a file in it. Two runs are also compared image by image:
    which verdicts changed, and the interval of the change of each figure.
    """
    if len(paths) < 2:
        raise click.UsageError("expected two runs or more, got one")
    if flips and len(paths) > 2:
        raise click.UsageError("--flips compares exactly two runs")
    from model.evaluation.side_by_side import side_by_side
    from report.comparison import print_side_by_side, read_runs, write_comparison
    from report.terminal import print_comparison

    runs, excluded = read_runs(paths, intersect=intersection)
    if any(excluded):
        left_out = " and ".join(f"{n:,} of {p}" for n, p in zip(excluded, paths, strict=True))
        both = "both" if len(paths) == 2 else "all"
        console.say(
            f"compared on {len(runs[0].scores):,} images that {both} scored; excluded: {left_out}"
        )
    if len(runs) == 2:
        before, after = (run.scores for run in runs)
        _say_flips(before, after, flips, print_comparison)
    compared = side_by_side(runs)
    print_side_by_side(compared)
    if out:
        for path in write_comparison(compared, paths, out):
            console.say(f"{'page' if path.suffix == '.html' else 'table'}: {path}")
    console.say(f"reports: {' and '.join(map(str, paths))}")


def _say_flips(
    before: "ScoreTable", after: "ScoreTable", file: Path | None, say: Callable[..., None]
) -> None:
    """Print the verdicts that changed between two runs, and write them to `file` if given."""
    from model.evaluation.compare import Flip
    from model.evaluation.compare import flips as find_flips
    from report.tables import table_csv

    changed = find_flips(before, after)
    say(before, after, changed)
    if file:
        write_text(file, table_csv([field.name for field in fields(Flip)], map(asdict, changed)))
        console.say(f"flips: {file}")


if __name__ == "__main__":
    main()
