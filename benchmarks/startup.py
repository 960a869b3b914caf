"""Measure how long each command takes to print its help or to refuse a wrong option.

    python -m benchmarks.startup [--rounds N] [--json FILE]

`lines()` has the command lines: each of `COMMANDS` with `--help` and with a wrong option, and those
of `REFUSALS`. Each runs N times (default 5), every time in a new process, in the order A B C A B C.
An empty Python and one that imports torch are measured for comparison. The command prints a table:
median, minimum and maximum of the seconds, and `cpu`, the CPU time of the process, which other
programs hardly change. FILE (JSON; default: none) gets the (seconds, CPU seconds) of all runs of
each command line.

Main entry: `timed(arguments)` takes the list of arguments of one Python process (such as
`["train.py", "--help"]`), runs it in the folder of the project, and returns its (seconds, CPU
seconds). Its exit code and output are ignored. `lines()` returns a dict, command line -> arguments.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

import cli
import console

ROOT = Path(__file__).parent.parent

COMMANDS = (
    "train.py", "evaluate.py", "evaluate.py calibrate", "evaluate.py compare",
    "predict.py",
    "-m sharding", "-m sharding fetch", "-m sharding build", "-m sharding show",
    "-m sharding list", "-m sharding verify", "-m sharding diff", "-m sharding describe",
    "-m sharding audit", "-m sharding demo", "-m sharding pairs", "-m pipeline",
    "-m pipeline preview",
    "-m pipeline order", "-m model", "-m model import", "-m model fetch", "-m model embed",
    "-m model curves", "-m model average", "-m model export", "-m model push",
    "-m serve", "-m ai_images_detector",
    "-m ai_images_detector app",
)  # fmt: skip

RECIPE = "train.py --phase 1 --set"
REFUSALS = (
    "train.py --phase 3", f"{RECIPE} optim.rate=1", f"{RECIPE} optim.lr=-1",
    "train.py --recipe nowhere.toml", "evaluate.py --robustness 0",
    "evaluate.py --shards val --device gpu", "predict.py nowhere.jpg",
    "predict.py README.md --threshold 2", "-m sharding build --jobs 0",
    "-m sharding no-such-command", "-m pipeline order --batch 1 DIR",
    "-m serve --port 65536", "-m model average nowhere nowhere --run x",
    "-m model export --hub x --hub-place y",
)  # fmt: skip


def lines() -> dict[str, list[str]]:
    """Return the arguments of Python to measure, by the command line that a person types."""
    helps = [f"{command} --help" for command in COMMANDS]
    wrong = [f"{command} --no-such-option" for command in COMMANDS]
    typed = {line: line.split() for line in (*helps, *wrong, *REFUSALS)}
    return {"-c pass": ["-c", "pass"], "-c 'import torch'": ["-c", "import torch"]} | typed


def timed(arguments: list[str]) -> tuple[float, float]:
    """Run Python with arguments; returns the wall-clock seconds and the CPU seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@click.command(cls=console.Command)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Of each.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
@cli.options()
def main(rounds: int, json_file: Path | None) -> None:
    """Measure how long each command takes to print its help or an error."""
    measured: dict[str, list[tuple[float, float]]] = {line: [] for line in lines()}
    with console.progress("starting", rounds * len(measured)) as advance:
        for _ in range(rounds):
            for line, arguments in lines().items():
                measured[line].append(timed(arguments))
                advance()
    rows = []
    for line, times in measured.items():
        walls = sorted(wall for wall, _ in times)
        used = statistics.median(cpu for _, cpu in times)
        rows.append([line, statistics.median(walls), walls[0], walls[-1], used])
    title = f"Start-up, medians of {rounds} rounds, load {os.getloadavg()[0]:.1f}"
    console.table(title, ["python", "seconds", "min", "max", "cpu"], rows)
    if json_file:
        json_file.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
