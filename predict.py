"""Say of images whether they are real or AI-generated: `python predict.py dir/`."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

import console
from model import Prediction, load_detector
from sharding.decode import IMAGE_SUFFIXES

COLUMNS = ("path", "probability", "verdict", "error")


def find_images(paths: Iterable[Path]) -> Iterator[Path]:
    """Files as they are; of folders every image inside, by its name, in sorted order."""
    for path in paths:
        if path.is_dir():
            inside = sorted(path.rglob("*"))
            yield from (p for p in inside if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES)
        else:
            yield path


def as_table(result: Prediction) -> str:
    """One line a person reads: probability of fake, verdict, path."""
    if result.error:
        return f"    -  {result.verdict:<11}  {result.name}: {result.error}"
    return f"{result.probability:5.3f}  {result.verdict:<11}  {result.name}"


def as_jsonl(result: Prediction) -> str:
    """One JSON object per line."""
    values = (result.name, result.probability, result.verdict, result.error)
    return json.dumps(dict(zip(COLUMNS, values, strict=True)), ensure_ascii=False)


@click.command(cls=console.Command)
@click.argument(
    "paths",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path, exists=True),
    metavar="PATH...",
)
@click.option(
    "--format",
    "output",
    type=click.Choice(["table", "csv", "jsonl"]),
    default="table",
    show_default=True,
    help="How results are printed.",
)
@console.options("checkpoint", "runs", "device", "batch_size")
def main(
    paths: tuple[Path, ...],
    output: str,
    checkpoint: Path | None,
    runs: Path,
    device: str,
    batch_size: int,
) -> None:
    """Print, for each image of PATH..., the probability that it is AI-generated, and a verdict.

    An image that cannot be read is one line with the reason, and the exit code is then 1.
    """
    detector = load_detector(checkpoint, runs=runs, device=device)
    images = list(find_images(paths))
    if not images:
        raise click.ClickException(f"no image in {', '.join(map(str, paths))}")
    if output == "table":
        console.say(f"checkpoint: {detector.checkpoint} (fake from {detector.threshold:g})")
    else:  # standard output is for the rows alone
        console.log.info("checkpoint: %s", detector.checkpoint)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if output == "csv":
        writer.writerow(COLUMNS)
    unreadable = 0
    with console.progress("predicting", len(images)) as advance:
        for result in detector.predict(images, batch_size):
            unreadable += bool(result.error)
            if output == "csv":
                writer.writerow([result.name, result.probability, result.verdict, result.error])
            else:
                console.say(as_table(result) if output == "table" else as_jsonl(result))
            advance()
    if unreadable:
        click.echo(f"{unreadable} of {len(images)} images could not be read", err=True)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
