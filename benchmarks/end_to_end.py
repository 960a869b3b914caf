"""Train, interrupt, resume, evaluate and predict on the GPU, if there is one, and compare its
scores with those of the CPU.

    python -m benchmarks.end_to_end --shards SET --images FOLDER --work FOLDER [--json FILE]

Main entry: `main()`, this click command. A small network with random weights is trained through
`train.py`, stopped by SIGTERM after step 10 (`STOP_AFTER_STEP`) and resumed by the same command.
`evaluate.py` measures it, and `predict.py` scores images on the device and on the CPU. Then a head
is fitted to the stored features of a small frozen network, with an augmented view, and
`evaluate.py --features` computes and scores features of the set. Whether networks are compiled is
left to the recipe: on a GPU they are. The scores themselves mean nothing: the networks are random
or train for seconds. A script that fails does not stop the other steps. After the last step, the
command then fails with the names of the failed steps. The training that gets SIGTERM fails if its
exit code is not `STOPPED`, also if it ended before the signal (a set that fills too few batches).
If `predict.py` wrote no CSV file, nothing is compared. Start it in the root folder of the project,
or with absolute paths.

- `--shards`: the folder of a packed set, for training, validation and evaluation.
- `--images`: a folder; the images in its subfolders are scored, those directly in it are not.
- `--work`: a new or empty folder for the run, the report and the CSV files of `predict.py`.
- `--batch-size`: images per training batch (default 256).
- `--set KEY=VALUE`: changes the recipe of the first training, `recipes/phase1-fast.toml`; may be
  repeated.
- `--json`: a JSON file: step -> its dict (on the screen, each is cut to 600 characters).

`run(*command, stop_at=None)` runs Python with these arguments (a script of the project and its
options, as text) in the root folder of the project. It returns a dict: exit code (`rc`), `seconds`
and the last 25 `lines` of output. After `LIMIT_S` seconds a script is killed, but only when it
prints its next line. `stop_at` is the number of a training step, or None: once this step is logged,
the script gets SIGTERM, and the dict has `seconds_to_stop`, from the signal to the end.

`compare(device_csv, cpu_csv)` takes the `Path`s of two CSV files of `predict.py` on the same
images. It returns a dict: the numbers `files` and `scored by both`; `probability apart`, how far
the probabilities are apart (`mean`, `p99`, `max`; None if no image has one in both); `verdicts
differ`, how many; and `refused on one side`, a dict, name of a file that only one of the two could
read -> its two errors.

`failed(rows)` takes a dict, name of a step -> dict of `run()` or `compare()`, and returns the names
of the failed steps, a list of texts.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

import cli
import console

ROOT = Path(__file__).parents[1]
STOP_AFTER_STEP = 10
"""Training step after which SIGTERM is sent."""

STOP = "train until SIGTERM"
"""Name of the step in which the training gets SIGTERM."""

STOPPED = 130
"""Exit code of a training that SIGTERM stopped."""

LIMIT_S = 240  # a script that takes longer is killed

SMALL_NETWORK = "test_vit"

SMALL_BACKBONE = (
    f'network.name="{SMALL_NETWORK}"', 'network.head="timm"', "network.blocks=[]",
    "network.pretrained=false", "preprocess.crop_size=160", "preprocess.resize_size=160",
)  # fmt: skip
"""Changes of a recipe with a frozen network: a small one with random weights."""


def run(*command: str, stop_at: int | None = None) -> dict[str, Any]:
    """Run a script of the project and return its exit code, seconds and last lines.

    With `stop_at` the process gets SIGTERM once this step is logged.
    """
    began = time.monotonic()
    lines: list[str] = []
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}, errors="replace",
    )  # fmt: skip
    stopped_at = None
    for line in process.stdout:
        lines.append(line.rstrip())
        logged = line.split("step ")[1].split(":")[0] if "step " in line and ":" in line else ""
        if stop_at and stopped_at is None and logged.isdigit() and int(logged) >= stop_at:
            process.send_signal(signal.SIGTERM)
            stopped_at = time.monotonic()
        if time.monotonic() - began > LIMIT_S:
            process.kill()
    code = process.wait()
    row = {"rc": code, "seconds": round(time.monotonic() - began, 1), "lines": lines[-25:]}
    return row if stopped_at is None else {**row, "seconds_to_stop": time.monotonic() - stopped_at}


def training(recipe: str, shards: Path, work: Path, *changes: str) -> list[str]:
    """Return the command that trains and validates a changed recipe on one set, below `work`."""
    values = (
        f'data.train=["{shards.name}"]', f'data.validate=["{shards.name}"]',
        "data.allow_shared_images=true", *changes,
    )  # fmt: skip
    return [
        "train.py", "--recipe", f"recipes/{recipe}.toml", "--data", str(shards.parent),
        "--runs", str(work / "runs"), *(word for value in values for word in ("--set", value)),
    ]  # fmt: skip


def random_weights(path: Path) -> Path:
    """Write random weights of `SMALL_NETWORK`: frozen networks without a file are refused."""
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model(SMALL_NETWORK).state_dict(), path)
    return path


def compare(device_csv: Path, cpu_csv: Path) -> dict[str, Any]:
    """Compare two result files of `predict.py` on the same images."""
    tables = []
    for path in (device_csv, cpu_csv):
        with path.open(newline="", encoding="utf-8") as stream:
            tables.append({row["path"]: row for row in csv.DictReader(stream)})
    device, cpu = tables
    both = [path for path in device if path in cpu]  # one run may have ended early
    scored = [path for path in both if device[path]["probability"] and cpu[path]["probability"]]
    apart = np.abs(
        [float(device[path]["probability"]) - float(cpu[path]["probability"]) for path in scored]
    )
    differs = [path for path in scored if device[path]["verdict"] != cpu[path]["verdict"]]
    one_side = [path for path in both if bool(device[path]["error"]) != bool(cpu[path]["error"])]
    return {
        "files": len(device),
        "scored by both": len(scored),
        "probability apart": {
            "mean": float(apart.mean()) if scored else None,
            "p99": float(np.percentile(apart, 99)) if scored else None,
            "max": float(apart.max()) if scored else None,
        },
        "verdicts differ": len(differs),
        "refused on one side": {
            Path(path).name: [device[path]["error"], cpu[path]["error"]] for path in one_side
        },
    }


def failed(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return the names of the failed steps. `STOP` fails if SIGTERM did not stop it."""
    names = []
    for name, row in rows.items():
        code = row.get("rc", 0)
        if name == STOP and code == 0:
            names.append(
                f"{name} (it ended before SIGTERM stopped it; give a larger set, or a smaller "
                "--batch-size)"
            )
        elif code and not (name == STOP and code == STOPPED):
            names.append(name)
    return names


@click.command(cls=console.Command)
@click.option("--shards", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--images", type=click.Path(path_type=Path, exists=True), required=True)
@click.option(
    "--work", type=click.Path(path_type=Path, file_okay=False), required=True,
    help="A new folder for runs and reports.",
)  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--set", "overrides", multiple=True, help="Change a value of the recipe.")
@click.option("--json", "out", type=cli.LocalPath(dir_okay=False), help="File for the rows.")
@cli.options()
def main(
    shards: Path,
    images: Path,
    work: Path,
    batch_size: int,
    overrides: tuple[str, ...],
    out: Path | None,
) -> None:
    """Train, evaluate and predict on this machine, and compare its device with the CPU."""
    if work.exists() and any(work.iterdir()):
        raise click.ClickException(f"{work} is not empty; name a new folder, or remove this one")
    work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {}

    def keep(name: str, row: dict[str, Any]) -> None:
        rows[name] = row
        console.say(f"{name}: {json.dumps(row)[:600]}")
        if out:
            out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    train = training(
        "phase1-fast", shards, work, "network.name=convnextv2_atto", "network.pretrained=false",
        "run.epochs=1", "run.log_every=5", f"loading.batch_size={batch_size}", *overrides,
    )  # fmt: skip
    keep(STOP, run(*train, stop_at=STOP_AFTER_STEP))
    keep("resume", run(*train))
    checkpoint = work / "runs/phase1-fast"
    evaluate = ("evaluate.py", "--shards", shards.name, "--data", str(shards.parent))
    keep("evaluate", run(
        *evaluate, "--checkpoint", str(checkpoint), "--out", str(work / "report")
    ))  # fmt: skip
    files = [str(path) for path in sorted(images.iterdir()) if path.is_dir()]
    for device in ("auto", "cpu"):
        keep(f"predict, device {device}", run(
            "predict.py", *files, "--checkpoint", str(checkpoint), "--device", device,
            "--out", str(work / f"{device}.csv"),
        ))  # fmt: skip
    tables = work / "auto.csv", work / "cpu.csv"
    if all(path.exists() for path in tables):
        keep("device beside CPU", compare(*tables))
    weights = random_weights(work / "random.safetensors")
    head = training(
        "clip-phase1", shards, work, *SMALL_BACKBONE, "features.views=1", "run.epochs=2",
        f"loading.batch_size={batch_size}", f'features.store="{work / "features"}"',
    )  # fmt: skip
    keep("train a head", run(*head, "--init-from", str(weights)))
    keep("evaluate features", run(
        *evaluate, "--checkpoint", str(work / "runs/clip-phase1"),
        "--out", str(work / "report-of-features"), "--features", str(work / "features-again"),
    ))  # fmt: skip
    if names := failed(rows):
        raise click.ClickException(f"ended with an error: {', '.join(names)}")


if __name__ == "__main__":
    main()
