"""Feed files that break image software to every image reader of this project, and print failures.

    python -m benchmarks.hostile FOLDER [--seconds S] [--memory GB] [--json FILE]

Every file below FOLDER is decoded, prepared as in `predict` by both backends (Pillow and DALI),
packed, verified, and loaded for one epoch by both backends. Each stage is a child process. It is
killed if it makes no progress for S seconds (default 60; ten times as long in stages other than
decoding), or if it uses more memory than GB, in units of 2^30 bytes (default 8). After a kill or a
crash, the decoding stage goes on with the next file; any other stage is over.

In the packed set, the files, sorted by path, count as real and as fake in turn. Each class needs a
file that can be decoded; otherwise packing and loading count as crashes.

Outcomes are compared between the backends and with Pillow's own decoding. A difference that matches
none of `EXPLANATIONS` is unexplained. Tables of crashes, slow files and differences are printed;
`--json` gets the results of all stages. The exit code is 1 after a crash, a kill, an unexplained
difference, a fault that `verify` reports, or a sample that loads differently or not at all; else 0.

Main entries, called one after the other with the same folders:

- `run_all(folder, work, seconds, memory)` takes the folder of files, an empty scratch folder that
  exists (both Paths, absolute), S, and the memory limit in bytes (int). It yields the pair (name,
  result) of each stage of `STAGES`. The result is a dict:
    - `lines`: what the stage said about the files, a list of dicts.
    - `bad`: a list with a pair for each crash and kill: the number of the file that the stage had
      reached (when loading: of the batch; when packing: 0), and the reason.
    - `seconds`: how long the stage took.
    - `peak`: its largest memory in bytes (0 without Linux's `/proc`; then there is no limit).
    - `words`: how many lines the stage wrote to standard error (int).
- `report(folder, stages, work)` takes `dict(run_all(...))` and both folders, prints the tables and
  returns the number of failures (int).

`main()` has three more parameters, `child`, `work` and `start`, for the child processes only.
`python -m benchmarks.mutations FOLDER COUNT` makes damaged files to try.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

import cli
import console

ROOT = Path(__file__).parents[1]
SIDE = 96
"""Side of the network's input, in pixels."""

LEAST_DIFFERENCE = 1.0
"""Mean difference, in levels from 0 to 255, at or above which two pictures count as different.
Resizing alone makes a difference of 0.5.
"""

STAGES = ("decode", "predict pil", "predict dali", "build", "load pil", "load dali")

EXPLANATIONS = {
    "DALI decodes part of a damaged JPEG that has its end marker": lambda row: (
        row.get("backends") == "shown by DALI alone" and row["format"] in ("JPEG", "MPO")
    ),
    "Pillow decodes part of a damaged image": lambda row: (
        "remature end" in row["reason"] or "Corrupt JPEG data" in row["reason"]
    ),
    "Pillow refuses the file because of its metadata": lambda row: (
        not row["reason"] and row["pillow"] == "refused"
    ),
    "values above 8 bits are scaled, Pillow clips them": lambda row: row["mode"][:1] in ("I", "F"),
    "refused because its white level is unknown": lambda row: "which is white" in row["reason"],
    "refused for its size or number of scans": lambda row: "more than" in row["reason"],
    "Pillow reads a missing palette as gray": lambda row: "palette is missing" in row["reason"],
    "Pillow rotates or blends the first frame of an animation": lambda row: row["frames"] > 1,
    "an orientation that Pillow does not read there": lambda row: row["turned"],
    "CMYK by its own profile": lambda row: row["mode"] == "CMYK",
    # DALI never sees a TIFF, so both backends decode it by the same function.
    "libtiff leaves a part of a damaged TIFF undefined": lambda row: (
        row["format"] == "TIFF" and row["differs"] == "pixels between backends"
    ),
}  # fmt: skip
"""Names of expected differences, each with a test on a file's row. The first match is used."""


# --- stages, each in a child process --------------------------------------------------------------


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def say(line: dict[str, Any]) -> None:
    """Print a line of JSON for the parent."""
    print(json.dumps(line), flush=True)


def decode_all(folder: Path, start: int, _work: Path) -> None:
    """Decode every file from number `start` on, and compare with Pillow."""
    from imaging.decode import DecodeError, decode, read_file

    for number, path in enumerate(files_in(folder)[start:], start):
        say({"at": number})
        began = time.monotonic()
        row: dict[str, Any] = {"file": number, "reason": "", "shape": None}
        pixels = None
        try:
            data = read_file(path)
            pixels = decode(data)
            row["shape"] = pixels.shape
        except (DecodeError, OSError) as error:
            data, row["reason"] = b"", str(error) or type(error).__name__
        row["seconds"] = time.monotonic() - began
        say(row | by_pillow(path, pixels))


def by_pillow(path: Path, pixels: np.ndarray | None) -> dict[str, Any]:
    """Return Pillow's outcome for a file, and the mean difference of its pixels from `pixels`."""
    from PIL import Image, ImageOps

    from imaging.orientation import orientation_of

    row: dict[str, Any] = {"pillow": "refused", "mode": "", "frames": 1, "turned": False}
    row["format"] = ""
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            row["format"], row["mode"] = image.format, image.mode
            if image.format in ("JPEG", "PNG", "WEBP"):
                ours = orientation_of(path.read_bytes(), image.format)
                row["turned"] = ours != image.getexif().get(0x0112, 1)
            theirs = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), np.int16)
        row["pillow"] = "good"
        if pixels is not None:
            same = theirs.shape == pixels.shape
            row["difference"] = float(np.abs(theirs - pixels).mean()) if same else None
            row["pillow"] = "same" if same and row["difference"] < LEAST_DIFFERENCE else "differs"
        with Image.open(path) as image:  # last: damage in a later frame raises here
            row["frames"] = getattr(image, "n_frames", 1)
    return row


def predict_all(folder: Path, backend: str, work: Path) -> None:
    """Prepare every file for a network as `predict` does; writes the pixels to `work`."""
    import torch

    from imaging.decode import ImageFile, read_file
    from model.inference.detector import ImageDetector
    from pipeline.preprocess import Preprocess

    preprocess, paths = Preprocess(crop_size=SIDE, resize_size=SIDE), files_in(folder)
    detector = ImageDetector(
        Path(), None, preprocess, {}, torch.device("cpu"), torch.float32, backend
    )
    files = (ImageFile(str(n), lambda path=path: read_file(path)) for n, path in enumerate(paths))
    keep = np.lib.format.open_memmap(
        work / f"predict-{backend}.npy", "w+", np.uint8, (len(paths), SIDE, SIDE, 3)
    )
    for names, pixels, failures in detector._preprocessed(files, 32, 0):
        keep[[int(name) for name in names]] = torch.as_tensor(pixels).cpu().numpy()
        reasons = {names[row]: reason for row, reason in failures.items()}
        say({"at": int(names[-1]), "reasons": reasons})


CATALOG = """
[sets]
hostile = "train"
[sources.files]
license = "measured only"
set = "hostile"
real = ["real"]
fake = ["fake"]
"""


def build_all(folder: Path, _name: str, work: Path) -> None:
    """Pack every file, and verify the set."""
    import sharding.catalog
    from imaging.decode import IMAGE_SUFFIXES
    from sharding.build import Tolerance, build
    from sharding.verify import verify

    for number, path in enumerate(files_in(folder)):
        suffix = path.suffix.lower() if path.suffix.lower() in IMAGE_SUFFIXES else ".png"
        link = work / "raw/files" / ("real", "fake")[number % 2] / f"{number:06d}{suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, link)
    (work / "catalog.toml").write_text(CATALOG)
    catalog = sharding.catalog.read_catalog([work / "catalog.toml"])
    say({"at": 0})
    _, (built,) = build(
        catalog, work / "raw", work / "shards", jobs=1, tolerance=Tolerance(max_bad=1.0)
    )
    say({"at": 0, "packed": built.index["samples"]})
    refused = {
        str(int(Path(entry["path"]).stem.rpartition("/")[2])): entry["reason"]
        for entry in built.index["quarantined"]
    }
    say({"at": 0, "reasons": refused, "faults": verify([work / "shards/hostile"], jobs=1)})


def load_all(_folder: Path, backend: str, work: Path) -> None:
    """Load the packed set for one epoch; writes the pixels to `work`."""
    import torch

    from pipeline.loader import open_loader
    from pipeline.loading import Loading
    from pipeline.order import evaluation_epoch
    from pipeline.params import eval_params
    from pipeline.preprocess import Preprocess
    from sharding.format import open_shards

    shards, preprocess = (
        open_shards([work / "shards/hostile"]),
        Preprocess(crop_size=SIDE, resize_size=SIDE),
    )
    loading = Loading(batch_size=32, num_workers=1, backend=backend)
    loader = open_loader(shards, preprocess=preprocess, loading=loading, device=torch.device("cpu"))
    keep = np.lib.format.open_memmap(
        work / f"load-{backend}.npy", "w+", np.uint8, (len(shards), SIDE, SIDE, 3)
    )
    epoch = evaluation_epoch(np.arange(len(shards)), 32)
    for step, batch in enumerate(loader.batches(epoch, eval_params(shards, preprocess))):
        rows = np.flatnonzero(epoch.valid[epoch.positions(step, 0, 1)])
        images = batch.images.permute(0, 2, 3, 1).cpu().numpy()
        keep[batch.samples[rows]] = images[rows]
        reasons = {str(batch.samples[row]): why for row, why in batch.failures.items()}
        say({"at": step, "reasons": reasons})


# --- the parent -----------------------------------------------------------------------------------


def run_child(
    stage: str, folder: Path, work: Path, start: int, seconds: float, memory: int
) -> tuple[list[dict[str, Any]], str, int]:
    """Run a stage; returns its lines, how it failed (empty: not), and its peak memory in bytes."""
    command = [sys.executable, "-m", "benchmarks.hostile", str(folder), "--child", stage]
    command += ["--work", str(work), "--start", str(start)]
    said, log = work / "said.jsonl", work / f"{stage.replace(' ', '-')}.log"
    peak, ended = 0, ""
    with said.open("wb") as out, log.open("ab") as errors:
        child = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=errors)
        size, since = 0, time.monotonic()
        while child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.1)
            peak = max(peak, memory_of(child.pid))
            if said.stat().st_size != size:
                size, since = said.stat().st_size, time.monotonic()
            if peak > memory:
                ended = f"{peak / 2**30:.1f} GB of memory"
            elif time.monotonic() - since > seconds * (1 if stage == "decode" else 10):
                ended = "hangs"
            if ended:
                child.kill()
    if child.returncode and not ended:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no word"]
        ended = f"crash, exit code {child.returncode}: {lines[-1][:120]}"
    lines = said.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")], ended, peak


def memory_of(process: int) -> int:
    """Return the peak resident memory in bytes; 0 where there is no Linux /proc."""
    with contextlib.suppress(OSError, IndexError):
        status = Path(f"/proc/{process}/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    return 0


def run_all(
    folder: Path, work: Path, seconds: float, memory: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each stage with its lines, failures, seconds, peak memory and count of stderr lines."""
    count = len(files_in(folder))
    for stage in STAGES:
        console.log.info("%s", stage)
        began, start = time.monotonic(), 0
        result: dict[str, Any] = {"lines": [], "bad": [], "peak": 0}
        while True:
            lines, ended, peak = run_child(stage, folder, work, start, seconds, memory)
            result["lines"] += lines
            result["peak"] = max(result["peak"], peak)
            at = max([line["at"] for line in lines if "at" in line], default=start)
            if ended:
                result["bad"].append((at, ended))
            start = at + 1
            if not ended or stage != "decode" or start >= count:
                break
        result["seconds"] = time.monotonic() - began
        log = work / f"{stage.replace(' ', '-')}.log"
        result["words"] = len(log.read_text(errors="replace").splitlines())
        yield stage, result


def reasons_of(result: dict[str, Any]) -> dict[int, str]:
    said = [line["reasons"] for line in result["lines"] if "reasons" in line]
    return {int(name): reason for reasons in said for name, reason in reasons.items()}


def differing(work: Path, kind: str) -> list[int]:
    """Return the rows whose pixels differ between the backends, without the outermost pixels.

    Resizing treats the edge differently in each backend.
    """
    paths = [work / f"{kind}-{backend}.npy" for backend in ("pil", "dali")]
    if not all(path.exists() for path in paths):
        return []
    one, other = (np.load(path, mmap_mode="r") for path in paths)
    means = [
        np.abs(a[1:-1, 1:-1].astype(np.int16) - b[1:-1, 1:-1]).mean()
        for a, b in zip(one, other, strict=True)
    ]
    return [row for row, mean in enumerate(means) if mean >= LEAST_DIFFERENCE]


def compare(stages: dict[str, dict[str, Any]], work: Path) -> dict[int, dict[str, Any]]:
    """Return a row per file; its entry `differs` names what differs, or is empty."""
    rows = {
        row["file"]: row | {"differs": ""} for row in stages["decode"]["lines"] if "file" in row
    }
    pil, dali = (reasons_of(stages[f"predict {name}"]) for name in ("pil", "dali"))
    packed = reasons_of(stages["build"])
    pixels = set(differing(work, "predict"))
    whole = not (stages["predict pil"]["bad"] or stages["predict dali"]["bad"])
    for number, row in rows.items():
        if row["pillow"] != "same" and (row["pillow"] == "refused") != bool(row["reason"]):
            row["differs"] = "Pillow's outcome"
        elif row["pillow"] == "differs":
            row["differs"] = "Pillow's pixels"
        if whole and pil.get(number, "") != dali.get(number, ""):
            row["differs"] = "outcome or reason between backends"
            row["backends"] = "other reasons" if number in dali else "shown by DALI alone"
        elif whole and number in pixels and number not in pil:
            row["differs"] = "pixels between backends"
        if whole and bool(packed.get(number)) != bool(pil.get(number)):
            row["differs"] = "packed but not predicted, or the reverse"
    return rows


def explanation(row: dict[str, Any]) -> str:
    return next((name for name, fits in EXPLANATIONS.items() if fits(row)), "unexplained")


def report(folder: Path, stages: dict[str, dict[str, Any]], work: Path) -> int:
    """Print the table; returns the number of crashes, hangs and unexplained differences."""
    paths = [str(path.relative_to(folder)) for path in files_in(folder)]
    rows = compare(stages, work)
    lines = [
        [stage, len(result["bad"]), f"{result['seconds']:.0f}", f"{result['peak'] / 2**20:,.0f}",
         result["words"]] for stage, result in stages.items()
    ]  # fmt: skip
    console.table(
        f"{len(paths):,} files",
        ["stage", "crashes and hangs", "s", "peak MiB", "stderr lines"],
        lines,
    )
    for stage, result in stages.items():
        for at, ended in result["bad"]:
            console.say(f"{stage}: {ended}; at or behind {paths[min(at, len(paths) - 1)]}")
    faults = [fault for line in stages["build"]["lines"] for fault in line.get("faults", [])]
    loaded = [reasons_of(stages[f"load {name}"]) for name in ("pil", "dali")]
    unlike = differing(work, "load")
    console.say(
        f"verify: {len(faults)} faults; loading: {len(loaded[0])} and {len(loaded[1])} samples "
        f"failed, {len(unlike)} differ between backends"
    )
    for fault in [*faults[:9], *(f"sample {row}" for row in unlike[:9])]:
        console.say(f"  {fault}")
    slowest = sorted(rows.values(), key=lambda row: -row["seconds"])[:5]
    console.table(
        "slowest to decode", ["file", "s", "outcome"],
        [[paths[row["file"]], f"{row['seconds']:.2f}", row["reason"][:60]] for row in slowest],
    )  # fmt: skip
    named = Counter(explanation(row) for row in rows.values() if row["differs"])
    console.table(
        "differences by name", ["why", "files"], [[name, count] for name, count in named.items()]
    )
    for row in rows.values():
        if row["differs"] and explanation(row) == "unexplained":
            facts = {key: row[key] for key in ("differs", "reason", "pillow", "mode")}
            console.say(f"unexplained: {paths[row['file']]}: {facts}")
    good = sum(not row["reason"] for row in rows.values())
    console.say(f"{good:,} good, {len(rows) - good:,} refused with a reason")
    bad = sum(len(result["bad"]) for result in stages.values())
    return bad + named["unexplained"] + len(faults) + len(unlike) + sum(map(len, loaded))


@click.command(cls=console.Command)
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--seconds", default=60.0, show_default=True, help="Limit per file.")
@click.option("--memory", default=8.0, show_default=True, help="Limit in GB per process.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write all rows here too.")
@click.option("--child", hidden=True)
@click.option("--work", type=click.Path(path_type=Path), hidden=True)
@click.option("--start", default=0, hidden=True)
@cli.options()
def main(
    folder: Path, seconds: float, memory: float, out: Path | None, child: str | None,
    work: Path | None, start: int,
) -> None:  # fmt: skip
    """Run every file below FOLDER through everything that reads images, and print one table."""
    if child:
        act, _, backend = child.partition(" ")
        act_of = {
            "decode": decode_all,
            "predict": predict_all,
            "build": build_all,
            "load": load_all,
        }
        act_of[act](folder, start if act == "decode" else backend, work)
        return
    with tempfile.TemporaryDirectory() as name:
        stages = dict(run_all(folder.resolve(), Path(name), seconds, round(memory * 2**30)))
        if out:
            out.write_text(json.dumps(stages) + "\n", encoding="utf-8")
        bad = report(folder.resolve(), stages, Path(name))
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
