"""THE OTHER DISK CONTRACT: a checkpoint is a folder, and exists once its `meta.json` does.

`weights.safetensors` (plain timm names), `state.pt` (what only training needs; read with
`weights_only=True`) and `meta.json`, written last. Prediction needs weights and meta, and nothing
from the command line. Of each file `meta.json` holds the SHA-256 (`sha256`), of itself that of its
other entries: a file that has changed is refused when it is loaded. A run's own checkpoints are
called `step_` and at least seven digits; what has another name in its folder is left alone.

`model/layout/meta.py` describes every field of `meta.json`. `model/inference/fitness.py` reads the
reasons against relying on a detector from it.

A detector that ships is a checkpoint too: its weights are the head alone, and its meta says in
`backbone` where the others are (`model/shipped/backbone.py`).
"""

import contextlib
import functools
import hashlib
import json
import pickle
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import recipes
from installed import CHECKOUT, DEMO, command
from model.network import Detector, build, check_weights_file, load_weights
from model.recipe import STEP_FOLDER, Network
from model.score import DEFAULT_THRESHOLD
from model.shipped import backbone
from pipeline.augment import Preprocess
from sharding.format import CLASSES
from storage import atomic_folder, is_partial, sha256_of, text_fault, write_text

if TYPE_CHECKING:
    from model.recipe import ResolvedRecipe

FORMAT_VERSION = 2

WEIGHTS_FILE = "weights.safetensors"
HUB_WEIGHTS_FILE = "model.safetensors"
"""Their name in a folder for the Hugging Face Hub (`model/export/hub.py`), a checkpoint too."""
STATE_FILE = "state.pt"
META_FILE = "meta.json"
REPLAYED_FILE = "replayed.csv"
_HASHED = (WEIGHTS_FILE, HUB_WEIGHTS_FILE, STATE_FILE, REPLAYED_FILE)


class CheckpointError(ValueError):
    """A checkpoint that is missing or cannot be used; the message says what to do."""


class NoCheckpointError(CheckpointError):
    """No run has a checkpoint, and none was named."""


class DamagedError(CheckpointError):
    """A file of a checkpoint that is not as it was written; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a checkpoint keeps of its training: the step and epoch, what validation measured, the
    figure that the best checkpoint has most of, the sets with their hashes, where the run's first
    weights came from, and why the run ended with it, empty where it went on.
    """

    step: int
    epoch: float
    metrics: Mapping[str, Any]
    selection: float | None
    data: Mapping[str, Any]
    first_weights: Mapping[str, Any] | None = None
    ended: str = ""


def save(
    folder: Path,
    net: Detector,
    *,
    recipe: "ResolvedRecipe",
    record: Record,
    state: Mapping[str, Any] | None,
    replayed: Sequence[tuple[int, str]] | None = None,
) -> None:
    """Write a checkpoint: everything under a temporary name, then one rename. When this returns the
    checkpoint is on the disk, and survives a power cut.

    `recipe` is the run's recipe, resolved; `state` is what resuming needs, `replayed` (epoch, key)
    of the old samples that came in so far.
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
                text = "epoch,key\n" + "".join(f"{epoch},{key}\n" for epoch, key in replayed)
                (partial / REPLAYED_FILE).write_text(text, encoding="utf-8")
            meta = {
                "format_version": FORMAT_VERSION,
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "created_ns": time.time_ns(),
                "step": record.step,
                "epoch": record.epoch,
                "classes": list(CLASSES),
                "preprocess": asdict(recipe.preprocess),
                "temperature": 1.0,
                "threshold": DEFAULT_THRESHOLD,
                "calibration": None,
                "calibrated_metrics": None,
                "metrics": record.metrics,
                "selection": record.selection,
                "ended": record.ended or None,
                "compared": None,
                "refused": [],
                "data": record.data,
                "recipe": asdict(recipe),
                "first_weights": record.first_weights,
                "commit": git_commit(),
                "versions": versions(),
            }
            seal(partial, meta)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder} could not be written ({reason}); the checkpoint before it is kept, and the "
            "same command goes on from there"
        ) from error


def seal(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write `meta.json` beside the files of a new checkpoint, with the SHA-256 of each."""
    hashes = {name: sha256_of(folder / name) for name in _HASHED if (folder / name).exists()}
    _write_meta(folder, {**meta, "sha256": hashes})


def annotate(folder: Path, changes: Mapping[str, Any]) -> None:
    """Change entries of `meta.json`; it is replaced as a whole."""
    meta = read_meta(folder)
    spec = backbone.spec_of(meta, str(folder / META_FILE))
    changed = backbone.recalibrated(meta, changes, spec, folder) if spec else {**meta, **changes}
    _write_meta(folder, changed)


def _write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    sealed = {**meta, "sha256": {**meta["sha256"], META_FILE: _meta_sha256(meta)}}
    write_text(folder / META_FILE, _text_of(sealed))


def _text_of(meta: Mapping[str, Any]) -> str:
    return json.dumps(meta, indent=1, sort_keys=True) + "\n"


def _meta_sha256(meta: Mapping[str, Any]) -> str:
    """The hash of all entries but that hash itself."""
    files = {name: sha256 for name, sha256 in meta["sha256"].items() if name != META_FILE}
    return hashlib.sha256(_text_of({**meta, "sha256": files}).encode()).hexdigest()


def read_meta(folder: Path) -> dict[str, Any]:
    """The parsed `meta.json`.

    Raises:
        CheckpointError: no checkpoint there, another version, or other classes.
        DamagedError: `meta.json` is not as it was written.
    """
    with _names_another(folder):
        return _read_meta(folder)


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META_FILE
    if not path.exists():
        raise CheckpointError(f"{folder} is no checkpoint (it has no {META_FILE})")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: it is no JSON ({text_fault(error)})") from error
    if not isinstance(meta, dict):
        raise DamagedError(f"{path} is damaged: it holds {type(meta).__name__}, expected an object")
    hashes, version = meta.get("sha256"), meta.get("format_version")
    if isinstance(hashes, dict) and hashes.get(META_FILE) != _meta_sha256(meta):
        raise DamagedError(f"{path} is damaged: its entries are not those that were written")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint version {version}, expected {FORMAT_VERSION}; train it "
            "again, as another run, with `--run NAME`"
        )
    if not isinstance(hashes, dict):
        raise DamagedError(f"{path} is damaged: it has no hashes of the checkpoint's files")
    if tuple(meta["classes"]) != CLASSES:
        raise CheckpointError(f"{folder} knows {meta['classes']}, expected {list(CLASSES)}")
    return meta


def _verify(folder: Path, meta: Mapping[str, Any], name: str) -> None:
    """Hold a file of a checkpoint against the hash in its meta.

    Raises:
        DamagedError: it is missing or has changed.
        OSError: it may not be read.
    """
    path = folder / name
    try:
        sha256 = sha256_of(path)
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    if sha256 != meta["sha256"].get(name):
        raise DamagedError(
            f"{path} is damaged: its {path.stat().st_size:,} bytes are not those that were written "
            "(SHA-256)"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def verify(folder: Path) -> dict[str, Any]:
    """The meta of a checkpoint, all of whose files are as they were written.

    Raises:
        CheckpointError: it is damaged or cannot be used.
    """
    meta = _read_meta(folder)
    for name in meta["sha256"]:
        # What was left out of a copy on purpose is missed when it is asked for.
        if name != META_FILE and ((folder / name).exists() or name == _weights_name(meta)):
            _verify(folder, meta, name)
    return meta


def whole_checkpoints(run: Path) -> tuple[list[Path], list[str]]:
    """The checkpoints of a run whose files are as they were written, oldest step first, and of each
    other one why it is not used.
    """
    whole, reasons = [], []
    for folder in checkpoints_of(run):
        try:
            verify(folder)
        except (CheckpointError, OSError) as error:
            reasons.append(_one_line(error))
        else:
            whole.append(folder)
    return whole, reasons


@contextlib.contextmanager
def _names_another(folder: Path) -> Iterator[None]:
    """An error about a damaged checkpoint goes on with a whole one of its run, where there is one.

    Raises:
        DamagedError: as the block, and what to do.
    """
    try:
        yield
    except DamagedError as error:
        others = [other for other in whole_checkpoints(folder.parent)[0] if other != folder]
        advice = (
            f"{others[-1]} is whole: name it instead"
            if others
            else f"no whole checkpoint lies beside {folder}; take it from a copy, or train again"
        )
        raise DamagedError(f"{error}; {advice}") from error


def load_network(folder: Path) -> tuple[Detector, Preprocess, dict[str, Any]]:
    """The network with its weights (on the CPU, ready for evaluation), its preprocessing and its
    meta.
    """
    meta = read_meta(folder)
    network = recipes.build(Network, meta["recipe"]["network"], str(folder / META_FILE))
    net = build(network, pretrained=False, empty=True)
    load_weights(net, read_weights(folder), str(folder), assign=True)
    net = net.to(torch.float32).to(memory_format=torch.channels_last)
    return net.eval(), Preprocess(**meta["preprocess"]), _meta_in_use(folder, meta)


def _meta_in_use(folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """The meta with the calibration for the backbone that is in use."""
    spec = backbone.spec_of(meta, str(folder / META_FILE))
    if spec is None:
        return meta
    return backbone.with_calibration(meta, spec, backbone.locate(spec, folder)[1])


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
    spec = backbone.spec_of(meta, str(folder / META_FILE))
    others = backbone.locate(spec, folder)[0] if spec else None
    check_weights_file(net, folder / _weights_name(meta), str(folder), others)
    return _meta_in_use(folder, meta)


def check_weights(folder: Path) -> str:
    """The SHA-256 of the file that holds the weights of a checkpoint.

    Raises:
        CheckpointError: as `read_meta`.
        DamagedError: the file is missing or has changed.
    """
    with _names_another(folder):
        meta = _read_meta(folder)
        _verify(folder, meta, _weights_name(meta))
    return meta["sha256"][_weights_name(meta)]


def _weights_name(meta: Mapping[str, Any]) -> str:
    return HUB_WEIGHTS_FILE if HUB_WEIGHTS_FILE in meta["sha256"] else WEIGHTS_FILE


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The network's weights by their timm names, on the CPU.

    Raises:
        CheckpointError: as `read_meta`.
        DamagedError: the file is missing or has changed.
        BackboneError: of a detector that ships the backbone is not here, or is another one.
    """
    with _names_another(folder):
        meta = _read_meta(folder)
        _verify(folder, meta, _weights_name(meta))
    weights = load_file(folder / _weights_name(meta))
    spec = backbone.spec_of(meta, str(folder / META_FILE))
    return backbone.read_backbone(spec, folder) | weights if spec else weights


def load_state(folder: Path, *, lazy: bool = False) -> dict[str, Any]:
    """What resuming needs; tensors on the CPU. With `lazy` they stay in the file until they are
    used.

    Raises:
        CheckpointError: the checkpoint was stored for prediction only, or its state is damaged.
    """
    path = folder / STATE_FILE
    if not path.exists():
        raise CheckpointError(f"{folder} has no {STATE_FILE}, so training cannot go on from it")
    with _names_another(folder):
        _verify(folder, _read_meta(folder), STATE_FILE)
    try:
        return _interned(torch.load(path, map_location="cpu", weights_only=True, mmap=lazy))
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({_one_line(error)}); name a checkpoint of this program"
        ) from error


def _interned(value: Any) -> Any:
    """The same dictionaries with the keys that Python code has: torch stores a key that two of them
    share once, and writes other bytes where the keys are equal and not the same.
    """
    if isinstance(value, dict):
        return {
            sys.intern(key) if isinstance(key, str) else key: _interned(inner)
            for key, inner in value.items()
        }
    return [_interned(inner) for inner in value] if isinstance(value, list) else value


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest step first; what a killed process left half written is
    none, nor is a folder that has another name than the run gives.
    """
    if is_partial(run):
        return []
    folders = (path.parent for path in run.glob(f"step_*/{META_FILE}"))
    named = {int(m[1]): path for path in folders if (m := STEP_FOLDER.fullmatch(path.name))}
    return [named[step] for step in sorted(named)]


def last_of(run: Path) -> Path | None:
    """The checkpoint with most steps, or None."""
    return next(reversed(checkpoints_of(run)), None)


def best_of(run: Path) -> Path | None:
    """The checkpoint with the highest selection figure (the later one of equals), or None.

    Raises:
        CheckpointError: as `read_meta`.
    """
    return best_among(checkpoints_of(run))


def best_among(checkpoints: Sequence[Path]) -> Path | None:
    """That of the highest selection figure (the last one of equals), or None."""
    best, most = None, float("-inf")
    for folder in checkpoints:
        selection = read_meta(folder)["selection"]
        figure = float("-inf") if selection is None else selection
        if figure >= most:
            best, most = folder, figure
    return best


def runs_below(runs: Path) -> list[Path]:
    """The runs that have a checkpoint, in `runs` and, where names hold a slash, further below."""
    with_checkpoint: list[Path] = []
    for folder in sorted(path for path in runs.glob("*") if path.is_dir()):
        if folder.name.startswith(".") or is_partial(folder) or STEP_FOLDER.fullmatch(folder.name):
            continue
        with_checkpoint += [folder] if checkpoints_of(folder) else []
        if not folder.is_symlink():  # links may lead in a circle
            with_checkpoint += runs_below(folder)
    return with_checkpoint


def prune(run: Path, keep: Collection[Path]) -> None:
    """Remove all checkpoints of a run but those in `keep`, which are on the disk already."""
    for folder in checkpoints_of(run):
        if folder not in keep:
            (folder / META_FILE).unlink()  # from here on it does not exist
            shutil.rmtree(folder)


def find(runs: Path, named: Path | None = None, *, shipped: bool = False) -> Path:
    """The checkpoint that is meant: `named` itself, the best one of the run `named`, or the
    detector that ships under that name; with nothing named the best one of the newest run below
    `runs`, or, where there is no run and `shipped` allows it, the default detector that ships.

    Raises:
        CheckpointError: there is none; the message says how to get one.
    """
    if named:
        own = backbone.DETECTORS / named
        best = named if (named / META_FILE).exists() else best_of(named)
        if best is None and len(named.parts) == 1 and (own / META_FILE).exists():
            return own
        if best is None:
            ships = ", ".join(backbone.shipped_names())
            raise CheckpointError(
                f"{named} is neither a checkpoint nor a run that has one"
                + (f", nor a detector that ships ({ships})" if ships else "")
            )
        return best
    candidates = runs_below(runs)
    default = backbone.DETECTORS / backbone.DEFAULT_DETECTOR
    if not candidates and shipped and (default / META_FILE).exists():
        return default
    if not candidates:
        raise NoCheckpointError(
            f"no checkpoint below {runs}; train one with `{command('train')} --phase 1`, see the "
            f"whole flow with `{DEMO}` (then --runs demo/runs), name one with --checkpoint "
            "FOLDER, or take the one that ships: `python -m model fetch`, then --checkpoint clip"
        )

    def created(run: Path) -> int:
        return read_meta(checkpoints_of(run)[-1])["created_ns"]

    return find(runs, max(candidates, key=created))


@functools.cache
def git_commit() -> str:
    """The commit this program runs from, with '-dirty' if files differ; '' outside a checkout."""
    if not CHECKOUT:  # what git found here would be a repository that the environment lies in
        return ""
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
