"""Check that commands killed at random times end with the same bytes as an undisturbed run.

    python -m benchmarks.kills [COMMAND...] [--times 30] [--seed N] [--work FOLDER] [--json FILE]

COMMAND is `build`, `train`, `predict`, `fetch`, `evaluate` or `export`; default: all. First, each
command runs twice undisturbed on small inputs made for it. Files that differ between these two runs
count as differences, too. Then the command is started in a new folder. At a random time within the
duration of an undisturbed run, all its processes get SIGKILL, and it is started again if it has
work left. After up to four kills in one folder, it runs to its end. The names and bytes of all
files are then compared with the undisturbed run, except for folders in `LEFT_OUT` and JSON entries
in `MEANT_TO_DIFFER`. This is repeated in new folders until `--times` kills have hit a running
process. `--seed` (default 0) draws the moments of the kills. `--work` is a folder for all files,
new or with only `inputs` and `inputs.log` (default: temporary). A table with a `Row` per command is
printed, and written to `--json`. The exit code is 1 if files differ or a command fails, 2 for an
unknown COMMAND.

Main entry: `kill_often(name, command, work, times, rng)` kills one command and returns its `Row`:

- `command`: the argument `name`. `seconds`: duration of an undisturbed run, within which the
  moments are drawn.
- `landed`: kills of a running process. `late`: starts that ended before the kill came.
- `restarts`: starts after a kill that landed. There is none if the command had done its work.
- `folders`: new folders used for the killed runs. `files`: number of compared files of one run.
- `differing`: a list of texts, empty if all is well. Each is a failure of a killed command, or a
  difference between files; `undisturbed: ` marks those between the two undisturbed runs.

Its arguments:

- `name`: a text for the names of folders and for messages.
- `command`: a `Command(group, words, done)`. `group` is a click command, `words` the list of its
  arguments. `done` is the path (text) of a file or folder that exists once the command has
  finished, or "" if it can always run again. Relative paths are in the folder of the run.
- `work`: an existing folder (Path) for the folders of the runs. If one of them exists,
  FileExistsError is raised. The folder of a killed run is deleted if its files are the same as
  those of the undisturbed run; all others stay. The output of the command is in `FOLDER.log` next
  to each folder.
- `times`: number of kills that must hit a running process. `rng`: random.Random, for the moments.

`kill_often()` raises click.ClickException if the undisturbed command fails or takes more than
`LIMIT_S` seconds, or if it is so short that it nearly always ends before the kill.

`write_inputs(work, address)` writes the inputs of the six commands above to `work` (an absolute,
existing Path) and returns a dict, name -> `Command`. `address` is that of the server of `fetch`,
which `with serving() as address` runs.

Processes are forked, so this needs Linux or macOS. The builder has no worker processes here
(`--jobs 1`); `tests/sharding/test_build_robust.py` kills its workers.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

import cli
import console
import evaluate
import interrupts
import predict
import train
from model.__main__ import main as model
from sharding.__main__ import main as sharding
from storage import write_text

COMMANDS = ("build", "train", "predict", "fetch", "evaluate", "export")  # of `write_inputs`

LEFT_OUT = {
    ".build": "the builder's notes on raw files contain their modification times",
    "tensorboard": "its files contain times, and their names a process id",
}
"""Folders that are not compared, with the reason. No other command reads them."""

MEANT_TO_DIFFER = {
    "meta.json": {"created", "created_ns", "sha256/meta.json"},
    "metrics.jsonl": {
        "images_per_s", "wait_share", "wait_read", "wait_decode", "stall_p50_ms", "stall_p99_ms",
        "stall_max_ms", "ready", "read_ms", "decode_ms",
    },
}  # fmt: skip
"""JSON entries with a time, a speed or a hash of these, by file name. They are not compared."""

MOST_PER_FOLDER = 4
"""Largest number of kills in one folder before the command runs to its end."""

LIMIT_S = 600
"""Seconds after which a command counts as hanging."""

RECIPE = f"""
extends = ["{Path(__file__).with_name("tiny.toml")}"]
name = "tiny"
[data]
policy = "train"
[augment.train]
scale = [0.6, 1.0]
jpeg = 0.5
[network]
drop_path_rate = 0.2
[optim]
lr = 0.001
[loading]
batch_size = 8
num_workers = 1
[run]
epochs = 2
log_every = 1
save_every = 2
"""

CATALOG = """
[sets]
old = "train"
val = "val"

[sources.alpha]
license = "test"
set = { old = 0.7, val = 0.3 }
real = [{ folder = "real", generator = "camera" }]
fake = [{ folder = "fake", generator = "gan" }]
"""

DOWNLOADS = {"a.bin": 3 * 2**20 + 7, "b.bin": 2**20 + 1, "c.bin": 5 * 2**19}
"""Size in bytes of each file to fetch. Files are written in pieces of 1 MiB; larger ones make sure
that a kill leaves a part of a file."""


@dataclass(frozen=True)
class Command:
    """Command to kill. `words` are its arguments. `done` is a path that exists once the command has
    finished; empty if the command can always run again. Paths are relative to its working folder.
    """

    group: click.Command
    words: Sequence[str]
    done: str = ""


@dataclass
class Row:
    """Result for one command. `landed` counts kills of a running process, `late` kills after its
    end, `restarts` the starts after a kill that landed. `differing` lists the differences from the
    undisturbed run.
    """

    command: str
    seconds: float
    landed: int = 0
    late: int = 0
    restarts: int = 0
    folders: int = 0
    files: int = 0
    differing: list[str] = field(default_factory=list)


def write_inputs(work: Path, address: str) -> dict[str, Command]:
    """Write images, sets and a checkpoint below `work`, and return the commands to kill."""
    rng = np.random.default_rng(0)
    for number in range(80):
        label = ("real", "fake")[number % 2]
        coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
        pixels = np.asarray(Image.fromarray(coarse).resize((72, 60)), np.uint8).copy()
        pixels[::2, ::2] //= 2 if label == "fake" else 1
        path = work / "raw/alpha" / label / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)
    (work / "catalog.toml").write_text(CATALOG)
    (work / "tiny.toml").write_text(RECIPE)
    urls = [f"{address}/{name}" for name in DOWNLOADS]
    (work / "downloads.toml").write_text(
        f'[sets]\nold = "train"\n[sources.big]\nlicense = "test"\nset = "old"\nreal = ["**"]\n'
        f"fetch = {{ urls = {json.dumps(urls)} }}\n"
    )
    catalog, raw, sets, runs = (
        str(work / name) for name in ("catalog.toml", "raw", "sets", "runs")
    )  # fmt: skip
    build = ["build", "--catalog", catalog, "--raw", raw, "--jobs", "1"]
    fit = ["--recipe", str(work / "tiny.toml"), "--data", sets]
    if not (work / "runs/tiny").exists():
        finish(Command(sharding, [*build, "--out", sets]), work)
        finish(Command(train.main, [*fit, "--runs", runs]), work)
    best = ["--checkpoint", f"{runs}/tiny", "--data", sets]
    return {
        "build": Command(sharding, [*build, "--out", "sets"]),
        "train": Command(train.main, [*fit, "--runs", "runs"]),
        "predict": Command(
            predict.main,
            [f"{raw}/alpha/real", "--out", "results.csv", "--resume", "--runs", runs,
             "--batch-size", "4", "--device", "cpu"],
        ),
        "fetch": Command(
            sharding, ["fetch", "big", "--raw", "raw", "--catalog", str(work / "downloads.toml")]
        ),
        "evaluate": Command(
            evaluate.main, ["--shards", "val", "--shards", "old", "--out", "report", *best]
        ),
        # An existing folder for the hub is complete, and the command refuses to replace it.
        "export": Command(
            model,
            ["export", "--onnx", "--images", f"{raw}/alpha/real", "--out", "onnx", "--hub", "hub",
             *best],
            done="hub",
        ),
    }  # fmt: skip


class _Slow(BaseHTTPRequestHandler):
    """Serve `DOWNLOADS` slowly, in small pieces, also from a byte offset."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        name = self.path[1:]
        body = random.Random(name).randbytes(DOWNLOADS[name])
        asked = self.headers.get("Range", "")
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        with contextlib.suppress(OSError):  # the client was killed
            for at in range(first, len(body) if with_body else 0, 2**17):
                self.wfile.write(body[at : at + 2**17])
                time.sleep(0.02)


@contextlib.contextmanager
def serving() -> Any:
    """Run the download server in its own process; yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Slow)
    server.daemon_threads = True
    child = fork(server.serve_forever, Path(os.devnull))
    server.server_close()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        kill(child)


def fork(function: Callable[[], object], log: Path) -> int:
    """Run `function` in a forked process with a process group of its own; returns the process id.

    The process ends with the exit code of `function`. Its output is appended to `log`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the threads of libraries are idle here, so fork is safe
        child = os.fork()
    if child:
        with contextlib.suppress(OSError):  # the child does it as well; the first call succeeds
            os.setpgid(child, child)
        return child
    code = 70
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for standard in (1, 2):
            os.dup2(stream, standard)
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def start(command: Command, folder: Path) -> int:
    """Start a command in `folder`; returns its process id."""

    def run() -> None:
        os.chdir(folder)
        torch.set_num_threads(1)
        command.group.main(list(command.words), standalone_mode=True)

    return fork(run, log_of(folder))


def log_of(folder: Path) -> Path:
    """Return the log file of the commands in `folder`, which is next to the folder."""
    return folder.with_name(f"{folder.name}.log")


def kill(child: int) -> None:
    """Kill a process and its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)


def ended(child: int, seconds: float) -> int | None:
    """Wait up to `seconds` for a process; returns its exit code, or None if it still runs."""
    until = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(min(0.002, max(0, until - time.monotonic())))


def finish(command: Command, folder: Path) -> float:
    """Run a command to its end, and return the seconds it took.

    Raises:
        ClickException: the command hangs, or its exit code is not 0.
    """
    began = time.monotonic()
    child = start(command, folder)
    code = ended(child, LIMIT_S)
    if code is None:
        kill(child)
    if code != 0:
        last = log_of(folder).read_text(errors="replace").strip().splitlines()[-3:]
        what = f"exit code {code}" if code is not None else f"no end after {LIMIT_S} s"
        raise click.ClickException(f"{' '.join(command.words[:2])}: {what}: {' / '.join(last)}")
    return time.monotonic() - began


def content(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file below `folder` by its path, without `LEFT_OUT`."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not LEFT_OUT.keys() & set(name.parts):
            files[name.as_posix()] = hashlib.sha256(lasting(path)).hexdigest()
    return files


def lasting(path: Path) -> bytes:
    """Return the bytes of a file, without the entries in `MEANT_TO_DIFFER`."""
    data = path.read_bytes()
    if path.name not in MEANT_TO_DIFFER:
        return data
    lines = data.splitlines() if path.suffix == ".jsonl" else [data]
    kept = []
    for line in lines:
        entries = json.loads(line)
        for name in MEANT_TO_DIFFER[path.name]:
            *outer, last = name.split("/")
            place = entries
            for key in outer:
                place = place.get(key, {})
            place.pop(last, None)
        kept.append(json.dumps(entries))
    return "\n".join(kept).encode()


def differences(expected: dict[str, str], got: dict[str, str]) -> list[str]:
    """Return a line for each file that is missing, is left over or differs."""
    return [
        *(f"{name} is missing" for name in sorted(expected.keys() - got.keys())),
        *(f"{name} is left over" for name in sorted(got.keys() - expected.keys())),
        *(f"{name} differs" for name in sorted(expected) if got.get(name, expected[name])
          != expected[name]),
    ]  # fmt: skip


def kill_often(name: str, command: Command, work: Path, times: int, rng: random.Random) -> Row:
    """Kill a command until `times` kills have hit it, in as many new folders as needed."""
    seconds, contents = [], []
    for index in range(2):
        folder = work / f"{name}-undisturbed-{index}"
        folder.mkdir()
        seconds.append(finish(command, folder))
        contents.append(content(folder))
    row = Row(name, min(seconds), files=len(contents[0]))
    row.differing += [f"undisturbed: {what}" for what in differences(*contents)]
    while row.landed < times:
        folder = work / f"{name}-{row.folders}"
        folder.mkdir()
        row.folders += 1
        wanted = min(rng.randint(1, MOST_PER_FOLDER), times - row.landed)
        try:
            kill_in(folder, command, wanted, row, rng)
        except click.ClickException as error:
            row.differing.append(f"{folder.name}: {error.message}")
        else:
            changes = differences(contents[0], content(folder))
            row.differing += [f"{folder.name}: {what}" for what in changes]
            if not changes:
                shutil.rmtree(folder)
        if row.late > 10 * times:
            raise click.ClickException(f"{name} ends before it is killed; give it more work")
        console.log.info("%s: %d of %d kills, %d folders", name, row.landed, times, row.folders)
    console.log.info("%s", asdict(row))
    return row


def kill_in(folder: Path, command: Command, wanted: int, row: Row, rng: random.Random) -> None:
    """Kill a command in `folder` up to `wanted` times, while it has work; then let it finish."""
    killed = False
    for number in range(wanted):
        row.restarts += killed
        began = time.monotonic()
        child = start(command, folder)
        code = ended(child, rng.uniform(0, row.seconds))
        killed = code is None
        if code is None:
            kill(child)
            row.landed += 1
        else:
            row.late += 1
            if not number:  # an undisturbed run; its duration is newer than the one in `row`
                row.seconds = time.monotonic() - began
            if code:
                raise click.ClickException(f"after a kill it ended with exit code {code}")
        if code is not None or (command.done and (folder / command.done).exists()):
            break
    if not (command.done and (folder / command.done).exists()):
        row.restarts += killed
        finish(command, folder)


@click.command(cls=console.Command)
@click.argument("commands", metavar="[COMMAND]...", nargs=-1, type=click.Choice(COMMANDS))
@click.option("--times", type=click.IntRange(1, 10_000), default=30, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--work",
    type=cli.LocalPath(),
    help="New folder to work in. Folders that differ are kept; `inputs` may exist already.",
)
@click.option("--json", "json_file", type=cli.LocalPath(dir_okay=False))
@cli.options()
def main(
    commands: tuple[str, ...], times: int, seed: int, work: Path | None, json_file: Path | None
) -> None:
    """Kill COMMANDS (default: all) at random times, and compare their files in the end."""
    rows = []
    # SIGTERM ends the server as well.
    with (
        interrupts.terminations_interrupt(),
        tempfile.TemporaryDirectory() as temporary,
        serving() as address,
    ):
        os.environ["NO_PROXY"] = "127.0.0.1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        work = (work or Path(temporary)).absolute()
        (work / "inputs").mkdir(parents=True, exist_ok=True)
        known = write_inputs(work / "inputs", address)
        for name in commands or COMMANDS:
            rng = random.Random(f"{seed} {name}")
            rows.append(kill_often(name, known[name], work, times, rng))
    columns = [
        "command", "seconds", "kills in time", "kills too late", "restarts", "folders",
        "files each", "same bytes",
    ]  # fmt: skip
    console.table(
        f"SIGKILL at random times, seed {seed}",
        columns,
        [
            [row.command, f"{row.seconds:.1f}", row.landed, row.late, row.restarts, row.folders,
             row.files, "no" if row.differing else "yes"]
            for row in rows
        ],
    )  # fmt: skip
    for row in rows:
        for what in row.differing[:20]:
            console.say(f"{row.command}: {what}")
    if json_file:
        write_text(json_file, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if any(row.differing for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
