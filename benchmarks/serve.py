"""Measure the HTTP API under load, compared with `predict.py` on the same files in the same run.

    python -m benchmarks.serve FOLDER [--hostile FOLDER] [--checkpoint NAME] [--images N]

Main entry: `main()`, this click command. Its arguments and options:

- FOLDER: the folder with the photographs;
- `--hostile` (`bad`; default: none): a folder of damaged or malicious files;
- `--images` (default 128): number of photographs of FOLDER that are used;
- `--rounds` (default 2): how often everything is measured;
- `--json` (`out`; default: none): the JSON file to write the figures to;
- `--checkpoint`: a checkpoint folder, a run's folder (its best checkpoint is taken), or the name of
  a shipped detector. Default: the newest run below `--runs` (default `runs`), or else the shipped
  detector;
- `--device` (default `auto`) and `--batch-size` (default 32) of both programs.

Each round runs the loop of `predict.py` over the files. Then the files are sent to `python -m
serve` on this machine three times: by 1 client, by 8 and by 32 at the same time. Each client has
its own connection and sends one file per request. After the rounds, each file below `--hostile` is
sent alone. The status must be 422, with the error of `predict.py`, if `predict.py` cannot read the
file. Otherwise it must be 413 for more than 50 MiB, else 200. At the end the server gets SIGTERM
during `LAST` (16) requests, or one per photograph if there are fewer.

A table of images/s, CPU milliseconds per image and response times is printed. `ratio` is the
server's images per second divided by those of `predict.py`. `CPU ratio` is the CPU time per image
of `predict.py` divided by the server's (without the clients); it is more reliable next to other
programs. The largest difference of a probability is printed too. The exit code is 1 if an image got
no answer with status 200, a hostile file is answered wrongly, or the server ends with an error.
This needs Linux (`/proc`).

The parts: `started(arguments, log)` starts the server with these options and returns (process,
port). `files` is a dict, path -> bytes. `predict(detector, files, batch_size, out)`, `load(port,
files, clients)`, `hostile(port, folder, detector)` and `stop(process, port, files)` each return a
dict of what they measured; `detector` is a loaded `ImageDetector`.
"""

import http.client
import json
import os
import platform
import queue
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

import cli
import console
from devices import cores
from imaging.decode import IMAGE_SUFFIXES, ImageFile, read_file
from model import load_detector
from model.inference import results
from model.inference.detector import ImageDetector
from model.inference.run import PredictionRun

ROOT = Path(__file__).parents[1]
CLIENTS = (1, 8, 32)
LAST = 16
"""Requests at most that the server is answering when it gets SIGTERM."""


def started(arguments: list[str], log: Path) -> tuple[subprocess.Popen, int]:
    """Start a server; returns its process and port once it listens."""
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve", "--port", "0", *arguments], cwd=ROOT, stderr=errors
        )
    while not (port := re.search(r"listening on http://127.0.0.1:(\d+)", log.read_text())):
        if process.poll() is not None:
            raise RuntimeError(log.read_text())
        time.sleep(0.1)
    return process, int(port[1])


def post(connection: http.client.HTTPConnection, path: Path, data: bytes) -> tuple[int, bytes]:
    name = quote(os.fsencode(path.name))
    headers = {"Content-Type": "application/octet-stream"}
    connection.request("POST", f"/predict?name={name}", data, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def cpu_of(process: int) -> float:
    """Return the CPU seconds of a process so far (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(port: int, files: dict[Path, bytes], clients: int) -> dict[str, Any]:
    """Send every file once, from `clients` threads.

    Returns `passed` and `seconds` (wall clock in all, and of each request), the count of each
    status, and the rows of status 200 by path.
    """
    waiting: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for path in files:
        waiting.put(path)
    seconds: list[float] = []
    answers: list[tuple[Path, int, bytes]] = []

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while True:
            try:
                path = waiting.get_nowait()
            except queue.Empty:
                connection.close()
                return
            began = time.perf_counter()
            status, body = post(connection, path, files[path])
            seconds.append(time.perf_counter() - began)
            answers.append((path, status, body))

    threads = [threading.Thread(target=work) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    passed = time.perf_counter() - began
    return {
        "passed": passed,
        "seconds": sorted(seconds),
        "statuses": Counter(str(status) for _, status, _ in answers),
        "rows": {
            path: json.loads(body)["images"][0] for path, status, body in answers if status == 200
        },
    }


def predict(
    detector: ImageDetector, files: dict[Path, bytes], batch_size: int, out: Path
) -> dict[str, float]:
    """Time `predict.py --out OUT` with a loaded detector; returns wall-clock and CPU seconds."""
    out.unlink(missing_ok=True)
    file = results.open_results(out, "jsonl", detector.identity, resume=False)
    run = PredictionRun(detector, "jsonl", file)
    images = (ImageFile(str(path), lambda path=path: read_file(path)) for path in files)
    began, cpu = time.perf_counter(), time.process_time()
    for _ in run.over(images, batch_size):
        pass
    used = {"passed": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    file.finish()
    file.close()
    return used


def mean_batch(port: int, before: tuple[float, float] = (0, 0)) -> tuple[float, float]:
    """Return the numbers of images and batches that the server has scored since `before`."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    images, batches = (
        float(re.search(rf"^detector_batch_images_{what} (.*)$", text, re.M)[1])
        for what in ("sum", "count")
    )
    return images - before[0], batches - before[1]


def hostile(port: int, folder: Path, detector: ImageDetector) -> dict[str, Any]:
    """Send every file below a folder alone; returns statuses, wrong answers and longest time."""
    statuses: Counter[str] = Counter()
    wrong, slowest = [], 0.0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        began = time.perf_counter()
        try:
            status, body = post(connection, path, data)
        finally:
            connection.close()
        slowest = max(slowest, time.perf_counter() - began)
        statuses[str(status)] += 1
        (said,) = detector.predict([data])
        expected = 422 if said.error else 413 if len(data) > 50 * 2**20 else 200
        row = json.loads(body).get("images", [{}])[0] if body[:1] == b"{" else {}
        if status != expected or (status != 413 and row.get("error") != said.error):
            wrong.append(f"{path.name}: {status}, {row.get('error')!r} for {said.error!r}")
    return {"statuses": statuses, "wrong": wrong, "slowest": slowest}


def stop(process: subprocess.Popen, port: int, files: dict[Path, bytes]) -> dict[str, Any]:
    """Send SIGTERM during `LAST` requests, one for each file at most.

    Returns their number, statuses and the server's exit code.
    """
    answers: list[str] = []

    def work(path: Path) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            answers.append(str(post(connection, path, files[path])[0]))
        except OSError as error:
            answers.append(type(error).__name__)
        connection.close()

    threads = [threading.Thread(target=work, args=(path,)) for path in list(files)[:LAST]]
    for thread in threads:
        thread.start()
    time.sleep(0.3)  # the server has accepted all of them
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    return {
        "requests": len(threads), "statuses": Counter(answers), "code": process.wait(120),
    }  # fmt: skip


def middle(rounds: list[dict[str, Any]], what: str) -> float:
    return statistics.median(one[what] for one in rounds)


def row_of(
    way: str, rounds: list[dict[str, Any]], images: int, beside: list[dict[str, Any]]
) -> list[object]:
    passed, cpu = middle(rounds, "passed"), middle(rounds, "cpu")
    seconds = sorted(second for one in rounds for second in one["seconds"])
    at = [1000 * seconds[min(len(seconds) - 1, int(q * len(seconds)))] for q in (0.5, 0.99)]
    batches = sum(one["batches"] for one in rounds)
    return [
        way, f"{images / passed:.1f}", f"{middle(beside, 'passed') / passed:.2f}",
        f"{1000 * cpu / images:.1f}", f"{middle(beside, 'cpu') / cpu:.2f}",
        *(f"{ms:,.0f}" for ms in at),
        f"{sum(one['batch_images'] for one in rounds) / batches:.1f}",
        sum(images - len(one["rows"]) for one in rounds),
    ]  # fmt: skip


@click.command(cls=console.Command)
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--hostile", "bad", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--images", type=click.IntRange(min=1), default=128, show_default=True, help="Images per round."
)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=2, show_default=True, help="Rounds of each way."
)
@click.option("--json", "out", type=cli.LocalPath(dir_okay=False), help="File for the figures.")
@cli.options("checkpoint", "runs", "device", "batch_size")
def main(
    folder: Path, bad: Path | None, images: int, rounds: int, out: Path | None,
    checkpoint: Path | None, runs: Path, device: str, batch_size: int,
) -> None:  # fmt: skip
    """Measure the API and `predict.py` in turn, and print one table."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise click.ClickException(f"no image below {folder}; put photographs there")
    files = {path: path.read_bytes() for path in paths[:: max(1, len(paths) // images)][:images]}
    detector = load_detector(checkpoint, runs=runs, device=device, backend="pil")
    expected = dict(zip(files, detector.predict(files, batch_size), strict=True))
    arguments = ["--runs", str(runs), "--device", device, "--batch-size", str(batch_size)]
    arguments += ["--checkpoint", str(checkpoint)] if checkpoint else []
    figures: dict[str, Any] = {"predict": [], **{str(count): [] for count in CLIENTS}}
    with tempfile.TemporaryDirectory() as place:
        process, port = started(arguments, Path(place) / "log")
        try:
            load(port, dict(list(files.items())[:8]), 4)  # warm-up
            for _ in range(rounds):
                figures["predict"].append(
                    predict(detector, files, batch_size, Path(place) / "out.jsonl")
                )
                for count in CLIENTS:
                    before, cpu = mean_batch(port), cpu_of(process.pid)
                    one = load(port, files, count)
                    one["cpu"] = cpu_of(process.pid) - cpu
                    one["batch_images"], one["batches"] = mean_batch(port, before)
                    figures[str(count)].append(one)
                    console.log.info("%d clients: %s", count, dict(one["statuses"]))
            wrongs = hostile(port, bad, detector) if bad else None
            ended = stop(process, port, files)
        finally:
            process.kill()
            process.wait()
    beside = figures["predict"]
    rows: list[list[object]] = [
        ["predict.py", f"{len(files) / middle(beside, 'passed'):.1f}", "1",
         f"{1000 * middle(beside, 'cpu') / len(files):.1f}", "1", *"----"]
    ]  # fmt: skip
    rows += [row_of(f"{n} clients", figures[str(n)], len(files), beside) for n in CLIENTS]
    title = (
        f"{len(files)} images of {sum(map(len, files.values())) / len(files) / 1000:.0f} kB, "
        f"{rounds} rounds, batch {batch_size}, {detector.identity}, {cores()} cores"
    )
    columns = [
        "way",
        "images/s",
        "ratio",
        "CPU ms",
        "CPU ratio",
        "p50 ms",
        "p99 ms",
        "batch",
        "lost",
    ]
    console.table(title, columns, rows)
    difference = max(
        abs(row["probability"] - expected[path].probability)
        for count in CLIENTS
        for one in figures[str(count)]
        for path, row in one["rows"].items()
        if row["probability"] is not None
    )
    console.say(f"largest difference of a probability from predict.py's: {difference:.1e}")
    if wrongs:
        console.say(f"hostile: {dict(wrongs['statuses'])}, slowest {wrongs['slowest']:.1f} s")
        for line in wrongs["wrong"]:
            console.say(f"  not as predict.py: {line}")
    requests = f"{ended['requests']} request{'s' if ended['requests'] > 1 else ''}"
    console.say(f"SIGTERM with {requests}: {dict(ended['statuses'])}, exit code {ended['code']}")
    if out:
        plain = {"title": title, "python": platform.python_version(), "rows": rows,
                 "difference": difference, "hostile": wrongs, "stopped": ended}  # fmt: skip
        out.write_text(json.dumps(plain, indent=1) + "\n")
    lost = sum(int(row[-1]) for row in rows[1:])
    raise SystemExit(bool(lost or ended["code"] or (wrongs and wrongs["wrong"])))


if __name__ == "__main__":
    main()
