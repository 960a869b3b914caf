"""THE OTHER DISK CONTRACT: a checkpoint is a folder, and exists once its `meta.json` does.

`weights.safetensors` (plain timm names), `state.pt` (what only training needs; read with
`weights_only=True`) and `meta.json`, written last. Prediction needs weights and meta, and nothing
from the command line.

Of `meta.json`: `temperature` divides the logits, `threshold` is the probability of fake from which
on an image is called fake, and `calibration` is null, or what `model/calibrate.py` fitted:

    {"fitted_on": [set, ...], "index_sha256": {set: hash}, "reals": n, "fakes": n,
     "threshold_at": "auto" | "fpr5" | "fpr1" | "0.5",
     "threshold_fpr_1": p or null, "threshold_fpr_5": p, "band": [low, high],
     "roc": [[threshold, false-positive rate, recall], ...],
     "before": {"nll": x, "ece": x}, "after": {"nll": x, "ece": x}}

Verdicts: below low likely real, from high on likely AI, between them uncertain.
"""

import functools
import json
import pickle
import platform
import shutil
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import recipes
from model.network import Detector, Network, build, check_weights_file, load_weights
from model.score import DEFAULT_THRESHOLD
from pipeline.augment import Preprocess
from sharding.format import CLASSES
from storage import atomic_folder, is_partial, sha256_of, write_text

if TYPE_CHECKING:
    from model.recipe import Recipe

FORMAT_VERSION = 2

WEIGHTS_FILE = "weights.safetensors"
HUB_WEIGHTS_FILE = "model.safetensors"
"""Their name in a folder for the Hugging Face Hub (`model/export/hub.py`), a checkpoint too."""
STATE_FILE = "state.pt"
META_FILE = "meta.json"
REPLAYED_FILE = "replayed.csv"


class CheckpointError(ValueError):
    """A checkpoint that is missing or cannot be used; the message says what to do."""


def save(
    folder: Path,
    net: Detector,
    *,
    recipe: "Recipe",
    step: int,
    epoch: float,
    metrics: Mapping[str, Any],
    selection: float | None,
    data: Mapping[str, Any],
    state: Mapping[str, Any] | None,
    replayed: Sequence[tuple[int, str]] | None = None,
) -> None:
    """Write a checkpoint: everything under a temporary name, then one rename.

    `recipe` is the run's recipe (a dataclass with `network` and `preprocess`), `metrics` what
    validation found, `selection` the figure that the best checkpoint has most of, `data` says which
    sets were trained on and their hash, `state` is what resuming needs, `replayed` (epoch, key) of
    the old samples that came in so far.
    """
    try:
        with atomic_folder(folder, replace=True) as partial:
            weights = {
                name: value.contiguous() for name, value in net.backbone.state_dict().items()
            }
            save_file(weights, partial / WEIGHTS_FILE)
            if state is not None:
                torch.save(dict(state), partial / STATE_FILE)
            if replayed is not None:
                lines = [f"{epoch},{key}\n" for epoch, key in replayed]
                (partial / REPLAYED_FILE).write_text(
                    "epoch,key\n" + "".join(lines), encoding="utf-8"
                )
            meta = {
                "format_version": FORMAT_VERSION,
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "created_ns": time.time_ns(),
                "step": step,
                "epoch": epoch,
                "classes": list(CLASSES),
                "preprocess": asdict(recipe.preprocess),
                "temperature": 1.0,
                "threshold": DEFAULT_THRESHOLD,
                "calibration": None,
                "metrics": metrics,
                "selection": selection,
                "compared": None,
                "refused": [],
                "data": data,
                "recipe": asdict(recipe),
                "commit": git_commit(),
                "versions": versions(),
            }
            text = json.dumps(meta, indent=1, sort_keys=True) + "\n"
            (partial / META_FILE).write_text(text, encoding="utf-8")
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder} could not be written ({reason}); the checkpoint before it is kept, and the "
            "same command goes on from there"
        ) from error


def annotate(folder: Path, changes: Mapping[str, Any]) -> None:
    """Change entries of `meta.json`; it is replaced as a whole."""
    meta = {**read_meta(folder), **changes}
    write_text(folder / META_FILE, json.dumps(meta, indent=1, sort_keys=True) + "\n")


def read_meta(folder: Path) -> dict[str, Any]:
    """The parsed `meta.json`.

    Raises:
        CheckpointError: no checkpoint there, another version, or other classes.
    """
    path = folder / META_FILE
    if not path.exists():
        raise CheckpointError(f"{folder} is no checkpoint (it has no {META_FILE})")
    meta = json.loads(path.read_text(encoding="utf-8"))
    if meta.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint version {meta.get('format_version')}, expected "
            f"{FORMAT_VERSION}; train it again, as another run, with `--run NAME`"
        )
    if tuple(meta["classes"]) != CLASSES:
        raise CheckpointError(f"{folder} knows {meta['classes']}, expected {list(CLASSES)}")
    return meta


def load_network(folder: Path) -> tuple[Detector, Preprocess, dict[str, Any]]:
    """The network with its weights (on the CPU, ready for evaluation), its preprocessing and its
    meta.
    """
    meta = read_meta(folder)
    network = recipes.build(Network, meta["recipe"]["network"], str(folder / META_FILE))
    net = build(network, pretrained=False, empty=True)
    load_weights(net, read_weights(folder), str(folder), assign=True)
    net = net.to(torch.float32).to(memory_format=torch.channels_last)
    return net.eval(), Preprocess(**meta["preprocess"]), meta


def check(folder: Path, net: Detector | None = None) -> dict[str, Any]:
    """The meta of a checkpoint whose weights fit `net` (made by `build` with `empty`, and of no use
    afterward), or the network that the checkpoint describes; no weight is read.

    Raises:
        CheckpointError: as `read_meta`.
        NetworkError: a network that timm does not know, or weights that do not fit it.
    """
    meta = read_meta(folder)
    if net is None:
        network = recipes.build(Network, meta["recipe"]["network"], str(folder / META_FILE))
        net = build(network, pretrained=False, empty=True)
    check_weights_file(net, _weights_file(folder), str(folder))
    return meta


def weights_sha256(folder: Path) -> str:
    """The hash of the file that holds the weights of a checkpoint."""
    return sha256_of(_weights_file(folder))


def _weights_file(folder: Path) -> Path:
    path = folder / WEIGHTS_FILE
    return path if path.exists() else folder / HUB_WEIGHTS_FILE


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The backbone's weights by their timm names, on the CPU."""
    read_meta(folder)
    return load_file(_weights_file(folder))


def load_state(folder: Path, *, lazy: bool = False) -> dict[str, Any]:
    """What resuming needs; tensors on the CPU. With `lazy` they stay in the file until they are
    used.

    Raises:
        CheckpointError: the checkpoint was stored for prediction only, or its state is damaged.
    """
    path = folder / STATE_FILE
    if not path.exists():
        raise CheckpointError(f"{folder} has no {STATE_FILE}, so training cannot go on from it")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=lazy)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} cannot be read ({reason}); remove {folder} to go on from the checkpoint "
            "before it"
        ) from error


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest step first; what a killed process left half written is
    none.
    """
    folders = (path.parent for path in run.glob(f"step_*/{META_FILE}"))
    return sorted(folder for folder in folders if not is_partial(folder) and not is_partial(run))


def last_of(run: Path) -> Path | None:
    """The checkpoint with most steps, or None."""
    return max(checkpoints_of(run), default=None)


def best_of(run: Path) -> Path | None:
    """The checkpoint with the highest selection figure (the later one of equals), or None."""
    checkpoints = checkpoints_of(run)

    def rank(folder: Path) -> tuple[float, str]:
        selection = read_meta(folder)["selection"]
        return (float("-inf") if selection is None else selection, folder.name)

    return max(checkpoints, key=rank, default=None)


def prune(run: Path, keep: Collection[Path]) -> None:
    """Remove all checkpoints of a run but those in `keep`."""
    for folder in checkpoints_of(run):
        if folder not in keep:
            (folder / META_FILE).unlink()  # from here on it does not exist
            shutil.rmtree(folder)


def find(runs: Path, named: Path | None = None) -> Path:
    """The checkpoint that is meant: `named` itself, the best one of the run `named`, or, with
    nothing named, the best one of the newest run below `runs`.

    Raises:
        CheckpointError: there is none; the message says how to get one.
    """
    if named:
        best = named if (named / META_FILE).exists() else best_of(named)
        if best is None:
            raise CheckpointError(f"{named} is neither a checkpoint nor a run that has one")
        return best
    newest = {run: last for run in sorted(runs.glob("*")) if (last := last_of(run))}
    if not newest:
        raise CheckpointError(
            f"no checkpoint below {runs}; train one with `python train.py --phase 1`, see the "
            "whole flow on synthetic data with `make demo` (then pass --runs demo/runs), or name "
            "one with --checkpoint FOLDER"
        )
    run = max(newest, key=lambda run: read_meta(newest[run])["created_ns"])
    return find(runs, run)


@functools.cache
def git_commit() -> str:
    """The commit this program runs from, with '-dirty' if files differ; '' outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    names = ("torch", "timm", "pillow", "simplejpeg", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
