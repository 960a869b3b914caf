"""Train a detector on shard sets and write its checkpoints to `runs/` (the `train.py` command).

    python train.py [--phase 1|2] [--recipe FILE] [--folder DIR] [--set KEY=VALUE] [--dry-run]

Main entry: `main()`, the click command with these options. Give either `--phase` or `--recipe`;
with `--folder`, one of them or neither.

- `--phase`: 1 is the recipe `recipes/phase1.toml`, which trains on images of older generators. 2 is
  `recipes/phase2.toml`, which starts from the best checkpoint of phase 1 and trains on images of
  newer generators plus a few old ones.
- `--recipe`: a recipe (TOML file, or name of a built-in one). It names the shard sets (packed
  images) and all settings.
- `--folder`: packs the images in DIR/real and DIR/fake first, as sets below `--data`, and trains on
  them with the recipe of `--recipe` or `--phase`, or else `recipes/clip-phase1.toml`. A published
  division (folders named train, val or test, or a column of a CSV table) is kept.
- `--set`: changes a value of the recipe, such as optim.lr=1e-4; may be repeated.
- `--dry-run`: tries a few steps and prints the plan. No checkpoint is written. With `--folder`, the
  images are packed nevertheless.
- `--run`: name of the run (default: the recipe's, or with `--folder` DIR's name).
- `--init-from`: initial weights (a checkpoint folder, a run, a .safetensors file or the name of a
  fetched backbone). Default: as in the recipe; with `--folder` alone the fetched CLIP.
- `--no-pretrained`: starts from random weights instead of timm's. It is refused with `--init-from`,
  with `--folder` alone and in phase 2, which starts from a checkpoint.
- `--data`: folder or address of the shard sets (default `data/shards`).
- `--runs`: folder of all runs (default `runs`).
- `--verbose`: more log lines, with tracebacks.

Checkpoints are folders `<runs>/<run>/step_<N>`; the path of the best one and its validation metrics
are printed. A wrong recipe or missing data ends with one line and exit code 1, a wrong option with
exit code 2. The exit code is 1 too if the gate (the recipe's limits for the result) refuses the
trained checkpoint. An interrupted run ends with exit code 130, and the same command resumes the
run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

import cli
import console
import interrupts
from storage import any_path


def _print_validation(meta: Mapping[str, Any]) -> None:
    """Print the validation metrics of a checkpoint per set and per source, at its calibrated
    decision threshold, or at 0.5 without a calibration.
    """
    from model.metrics import Validation

    title = f"{meta['recipe']['name']}, step {meta['step']}, threshold {meta['threshold']:.3f}"
    validation = Validation.from_json(meta.get("calibrated_metrics") or meta["metrics"], title)
    rows = [
        [name, m.count, accuracy, m.recall, m.false_positive_rate, m.auroc]
        for name, m in (*validation.sets.items(), *validation.sources.items())
        for accuracy in [m.accuracy if m.reals and m.fakes else None]
    ]
    columns = ["validation", "images", "accuracy", "recall", "false positives", "AUROC"]
    console.table(title, columns, rows, drop=["images", "accuracy", "AUROC"])


@click.command(cls=console.Command)
@click.option(
    "--phase",
    type=click.Choice(["1", "2"]),
    help="Train recipes/phase1.toml or recipes/phase2.toml.",
)
@click.option(
    "--recipe",
    "recipe_path",
    type=cli.LocalPath(dir_okay=False),
    help="Recipe to train instead of --phase: a TOML file, or the name of a built-in recipe.",
)
@click.option(
    "--folder",
    type=cli.LocalPath(exists=True, file_okay=False),
    help="Folder with real/ and fake/: pack their images into shard sets, then train on them.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    help="Change a recipe value, such as optim.lr=1e-4. May be repeated.",
)
@click.option("--run", "name", help="Name of the run. Default: that of the recipe, or of --folder.")
@click.option(
    "--init-from",
    type=cli.LocalPath(),
    help="Initial weights: a checkpoint folder, a run, the .safetensors file of a backbone, or the "
    "name of a fetched backbone, such as clip. Default: as in the recipe.",
)
@click.option("--no-pretrained", is_flag=True, help="Start from random weights, not from timm's.")
@click.option("--dry-run", is_flag=True, help="Try a few steps, print the plan and exit.")
@cli.options("data", "runs")
def main(
    phase: str | None,
    recipe_path: Path | None,
    folder: Path | None,
    overrides: tuple[str, ...],
    name: str | None,
    init_from: Path | None,
    no_pretrained: bool,
    dry_run: bool,
    data: str,
    runs: Path,
) -> None:
    """Train a detector. Run the same command again to resume an interrupted run.

    On several GPUs: torchrun --nproc-per-node 4 -m -- train --phase 1
    """
    if no_pretrained and (init_from or (folder and not recipe_path and not phase)):
        raise click.UsageError(
            "--no-pretrained starts from random weights; it cannot be combined with --init-from, "
            "or with --folder alone, which starts from a fetched backbone"
        )
    named = (phase is not None) + (recipe_path is not None)
    if named != 1 and not (folder and not named):
        raise click.UsageError(
            "give --phase 1, --phase 2 or --recipe FILE, or --folder DIR for your own images"
        )
    import recipes
    from model.recipe import Recipe

    if recipe_path or phase:
        path = recipe_path or recipes.FOLDER / f"phase{phase}.toml"
    else:
        from model.launch.folder import RECIPE as FOLDER_RECIPE

        path = recipes.FOLDER / FOLDER_RECIPE
    extra = [f"name={json.dumps(name, ensure_ascii=False)}"] if name else []
    extra += ["network.pretrained=false"] if no_pretrained else []
    settings = [*overrides, *extra]
    recipe = recipes.load(Recipe, path, settings)
    if no_pretrained and recipe.run.init_from:
        raise click.UsageError(
            f"--no-pretrained starts from random weights, but {recipe.name} starts from the best "
            f"checkpoint of the run {recipe.run.init_from!r}; leave it out"
        )
    from model import checkpoint
    from model.distributed import init_distributed
    from model.launch.dry_run import dry_run as try_out
    from model.launch.folder import default_weights, with_folder
    from model.shipped.fetch import weights_at
    from model.training.run import Interrupted, train

    if folder and not named and not init_from:
        init_from = default_weights()
    elif init_from:
        init_from = weights_at(init_from)
    with init_distributed() as dist, interrupts.terminations_interrupt():
        if folder:
            changed = recipes.changed_keys(settings)
            with interrupts.resumable():  # the packing goes on where it was
                recipe = with_folder(recipe, folder, any_path(data), changed=changed, dist=dist)
        if dry_run:
            try_out(recipe, any_path(data), runs, init_from=init_from, dist=dist)
            return
        try:
            # Training itself saves first. Before and after it, a signal ends the command.
            with interrupts.resumable():
                best = train(recipe, any_path(data), runs, init_from=init_from, dist=dist)
        except Interrupted as stopped:
            if dist.is_main:
                console.note(f"{stopped}; run the same command again to resume")
            raise SystemExit(130) from None
    if dist.is_main:
        meta = checkpoint.read_meta(best)
        _print_validation(meta)
        chosen = f"step {meta['step']}, selection {meta['selection']:.4f}"
        console.say(f"best checkpoint: {best} ({chosen})")


if __name__ == "__main__":
    main()
