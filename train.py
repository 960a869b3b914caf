"""Train the detector: `python train.py --phase 1`, then `python train.py --phase 2`.

Phase 1 learns from the old sets; phase 2 starts from phase 1's best checkpoint and learns the new
sets with a little of the old ones replayed. Interrupted runs go on where they stopped.

What takes seconds to load (torch, timm) is imported inside the functions that use it, after the
command line has been checked.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

import console
from storage import any_path


def _print_validation(meta: Mapping[str, Any]) -> None:
    """Print the validation of a checkpoint, per set and source, at the threshold that it decides
    by: that of its calibration, as `evaluate.py` does, or 0.5 where there is none.
    """
    from model.training.validation import Validation

    validation = Validation.from_json(meta.get("calibrated_metrics") or meta["metrics"])
    rows = [
        [name, m.count, m.accuracy, m.recall, m.false_positive_rate, m.auroc]
        for name, m in (*validation.sets.items(), *validation.sources.items())
    ]
    columns = ["validation", "images", "accuracy", "recall", "false positives", "AUROC"]
    title = f"{meta['recipe']['name']}, step {meta['step']}, fake from {meta['threshold']:.3f}"
    console.table(title, columns, rows, drop=["images", "accuracy", "AUROC"])


@click.command(cls=console.Command)
@click.option("--phase", type=click.Choice(["1", "2"]), help="Take recipes/phase1 or phase2.toml.")
@click.option(
    "--recipe",
    "recipe_path",
    type=console.LocalPath(dir_okay=False),
    help="Another recipe file, instead of --phase.",
)
@click.option(
    "--folder",
    type=console.LocalPath(exists=True, file_okay=False),
    help="Train on the images in its folders real/ and fake/, which are packed first.",
)
@click.option("--set", "overrides", multiple=True, help="Change a value: --set optim.lr=1e-4.")
@click.option("--run", "name", help="Name of the run. Default: the recipe's.")
@click.option(
    "--init-from",
    type=console.LocalPath(),
    help="Start from this checkpoint folder or .safetensors file of a backbone, or from the "
    "backbone that was fetched under this name, such as clip.",
)
@click.option("--no-pretrained", is_flag=True, help="Start from random weights, not timm's.")
@click.option("--dry-run", is_flag=True, help="Try a few steps, say what would run, then stop.")
@console.options("data", "runs")
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
    """Train a phase; run the same command again to go on after an interruption.

    On several GPUs: torchrun --nproc-per-node 4 train.py --phase 1
    """
    named = (phase is not None) + (recipe_path is not None)
    if named != 1 and not (folder and not named):
        raise click.UsageError(
            "say --phase 1, --phase 2 or --recipe FILE (or --folder DIR, for your own images)"
        )
    import recipes
    from model.recipe import Recipe

    if recipe_path or phase:
        path = recipe_path or recipes.FOLDER / f"phase{phase}.toml"
    else:
        from model.launch.folder import RECIPE as FOLDER_RECIPE

        path = recipes.FOLDER / FOLDER_RECIPE
    extra = [f"name={json.dumps(name)}"] if name else []
    extra += ["network.pretrained=false"] if no_pretrained else []
    recipe = recipes.load(Recipe, path, [*overrides, *extra])
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
    with init_distributed() as dist:
        if not dist.is_main:
            console.log.setLevel(logging.WARNING)
        if folder:
            recipe = with_folder(recipe, folder, any_path(data), keep_name=bool(name), dist=dist)
        if dry_run:
            try_out(recipe, any_path(data), runs, init_from=init_from, dist=dist)
            return
        try:
            best = train(recipe, any_path(data), runs, init_from=init_from, dist=dist)
        except Interrupted as stopped:
            if dist.is_main:
                console.say(f"{stopped}; the same command goes on from there")
            raise SystemExit(130) from None
    if dist.is_main:
        meta = checkpoint.read_meta(best)
        _print_validation(meta)
        chosen = f"step {meta['step']}, selection {meta['selection']:.4f}"
        console.say(f"best checkpoint: {best} ({chosen})")


if __name__ == "__main__":
    main()
