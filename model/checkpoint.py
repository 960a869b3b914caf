"""Write, read, check and find checkpoints, which are folders with the state of a trained network.

A checkpoint has `weights.safetensors` (timm's names), `state.pt` (only to resume training) and
`meta.json` with the SHA-256 of every file (`Meta` of `model/shipped/meta.py`). A run is a folder of
checkpoints, `step_` and at least seven digits. All folders are `Path`s. Main entries:

- `save(folder, net, *, recipe, record, state, replayed)` writes a checkpoint, also over an older
  one. `net`: `Detector` of `network.py`. `recipe`: `resolved(Recipe)` of `backbones/resolve.py`.
  `record`: a `Record`: `step`, `epoch`, `selection` (highest in the best one, or None), `metrics`
  (may be {}) and `data` go to `meta.json`; more may be left out. `state`: any dict to resume from,
  or None. `replayed`: pairs (key of a replayed sample, count), or None. `CheckpointError`: failed.
- `load_network(folder)` returns the `Detector` (CPU, evaluation mode), `Preprocess` and meta
  (dict). `CheckpointError`: no usable checkpoint. `DamagedError`, its subclass: a missing or
  changed file. Another `ValueError`: weights do not fit, or a backbone is not fetched.
- `find(runs, named=None, *, shipped=False)` returns a folder. `named`: a `Path` of a checkpoint or
  a run (gives its best), or a shipped detector, `Path("clip")`; else `CheckpointError`. None: the
  best of the newest run in `runs`, without runs whose best one the gate refused, else the shipped
  detector if `shipped`, or `NoCheckpointError`.
"""

import contextlib
import hashlib
import json
import logging
import pickle
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import recipes
from escape import reason_of, text_fault
from installed import DEMO, IN_CHECKOUT, command, git_commit, versions
from locks import locked
from model.network import Detector, build, check_weights_file, load_weights
from model.recipe import STEP_FOLDER, Network
from model.score import DEFAULT_THRESHOLD
from model.shipped import backbone
from model.shipped.entries import CheckpointEntries, checked_meta
from model.shipped.meta import Meta
from model.verdict import keep_left_out
from pipeline.preprocess import Preprocess
from sharding.format import CLASSES
from storage import atomic_folder, is_partial, parse_json, read_text, sha256_of, write_text

if TYPE_CHECKING:
    from model.recipe import ResolvedRecipe

log = logging.getLogger("ai_images_detector")

FORMAT_VERSION = 2

WEIGHTS_FILE = "weights.safetensors"
HUB_WEIGHTS_FILE = "model.safetensors"
"""Name of the weights file in a folder for the Hugging Face Hub."""
STATE_FILE = "state.pt"
META_FILE = "meta.json"
REPLAYED_FILE = "replayed.csv"
_HASHED = (WEIGHTS_FILE, HUB_WEIGHTS_FILE, STATE_FILE, REPLAYED_FILE)


class CheckpointError(ValueError):
    """A checkpoint that is missing or cannot be used. The message says what to do."""


class NoCheckpointError(CheckpointError):
    """No run has a checkpoint, and the user named none."""


class DamagedError(CheckpointError):
    """A file of a checkpoint, named in the message, that is missing or has changed."""


class ReplacedError(CheckpointError):
    """A checkpoint that its training has deleted: it keeps only its best and its newest one."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """Training record in a checkpoint's meta. `selection` chooses the best checkpoint (highest),
    `data` names the sets with their hashes, `first_weights` is the origin of the run's first
    weights, and `ended` is the reason why the run ended with this checkpoint, empty if it
    continued.
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
    replayed: Iterable[tuple[str, int]] | None = None,
) -> None:
    """Write a checkpoint under a temporary name, then rename it. When `save` returns, the
    checkpoint is on the disk and survives a power cut.

    `state` is what resuming needs. `replayed` yields the key of each replayed sample, and how often
    it came so far.
    """
    try:
        with atomic_folder(folder, replace=True) as partial:
            weights = {name: w.contiguous() for name, w in net.backbone.state_dict().items()}
            save_file(weights, partial / WEIGHTS_FILE)
            if state is not None:
                torch.save(dict(state), partial / STATE_FILE)
            if replayed is not None:
                with (partial / REPLAYED_FILE).open("w", encoding="utf-8") as stream:
                    stream.write("key,count\n")
                    stream.writelines(f"{key},{count}\n" for key, count in replayed)
            meta = {
                "format_version": FORMAT_VERSION,
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "created_ns": time.time_ns(),
                "step": record.step,
                "epoch": record.epoch,
                "classes": list(CLASSES),
                "preprocess": asdict(recipe.preprocess),
                **uncalibrated(),
                "metrics": record.metrics,
                "selection": record.selection,
                "ended": record.ended or None,
                "data": record.data,
                "recipe": asdict(recipe),
                "first_weights": record.first_weights,
                "commit": git_commit(),
                "versions": versions(),
            }
            seal(partial, meta)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} could not be written ({reason_of(error)}); earlier checkpoints are kept, "
            "and the same command resumes from the last one, if there is one"
        ) from error


def uncalibrated() -> dict[str, Any]:
    """Return the entries of `meta.json` that a calibration or comparison sets later."""
    return {
        "temperature": 1.0, "threshold": DEFAULT_THRESHOLD, "calibration": None,
        "calibrated_metrics": None, "compared": None, "refused": [],
    }  # fmt: skip


def seal(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write the `meta.json` of a new checkpoint, with the SHA-256 of each of its files."""
    hashes = {name: sha256_of(folder / name) for name in _HASHED if (folder / name).exists()}
    _write_meta(folder, {**meta, "sha256": hashes})


def annotate(folder: Path, changes: Mapping[str, Any]) -> None:
    """Change entries of `meta.json`. A new calibration keeps the left-out rates of the last one."""
    read_meta(folder)  # raises for a folder that is no checkpoint
    with locked(folder, is_folder=True):  # another process may change other entries
        meta = read_meta(folder)
        if spec := backbone.spec_of(meta, str(folder / META_FILE)):
            _write_meta(folder, backbone.recalibrated(meta, changes, spec, folder))
        else:
            _write_meta(folder, {**meta, **keep_left_out(meta, changes)})


def _write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    sealed = {**meta, "sha256": {**meta["sha256"], META_FILE: _meta_sha256(meta)}}
    write_text(folder / META_FILE, _text_of(sealed))


def _text_of(meta: Mapping[str, Any]) -> str:
    return json.dumps(meta, indent=1, sort_keys=True) + "\n"


def _meta_sha256(meta: Mapping[str, Any]) -> str:
    """Hash all entries of the meta except this hash."""
    files = {name: sha256 for name, sha256 in meta["sha256"].items() if name != META_FILE}
    return hashlib.sha256(_text_of({**meta, "sha256": files}).encode()).hexdigest()


def read_meta(folder: Path) -> Meta:
    """Return the parsed `meta.json`.

    Raises:
        CheckpointError: there is no checkpoint, or it has another version or other classes.
        DamagedError: `meta.json` has changed since it was written, or has an entry of a wrong type.
        ReplacedError: the training of its run has removed it.
    """
    with _advised(folder):
        return _read_meta(folder)


def _read_meta(folder: Path) -> Meta:
    path = folder / META_FILE
    if not path.exists():
        raise CheckpointError(f"{folder} is no checkpoint (it has no {META_FILE})")
    try:
        meta = parse_json(read_text(path))
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: it is not JSON ({text_fault(error)})") from error
    if not isinstance(meta, dict):
        raise DamagedError(f"{path} is damaged: it holds {type(meta).__name__}, expected an object")
    hashes, version = meta.get("sha256"), meta.get("format_version")
    if isinstance(hashes, dict) and hashes.get(META_FILE) != _meta_sha256(meta):
        raise DamagedError(f"{path} is damaged: its entries have changed since it was written")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint version {version}, expected {FORMAT_VERSION}; train it "
            "again, as another run, with `--run NAME`"
        )
    if not isinstance(hashes, dict):
        raise DamagedError(f"{path} is damaged: it has no hashes of the checkpoint's files")
    if (classes := meta.get("classes")) != list(CLASSES):
        raise CheckpointError(f"{folder} has classes {classes}, expected {list(CLASSES)}")
    try:
        return cast(Meta, checked_meta(CheckpointEntries, meta, f"{path} cannot be used"))
    except ValueError as error:
        raise DamagedError(str(error)) from error


def _verify(folder: Path, meta: Mapping[str, Any], name: str) -> None:
    """Check a file of a checkpoint against its hash in the meta.

    Raises:
        DamagedError: the file is missing or has changed.
        OSError: the file is not readable.
    """
    path = folder / name
    try:
        sha256 = sha256_of(path)
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    if sha256 != meta["sha256"].get(name):
        raise DamagedError(
            f"{path} is damaged: its {path.stat().st_size:,} bytes do not have the SHA-256 of the "
            "written file"
        )


def verify(folder: Path) -> Meta:
    """Check all files of a checkpoint and return its meta.

    Raises:
        CheckpointError: a file is damaged, or the checkpoint cannot be used.
    """
    meta = _read_meta(folder)
    for name in _HASHED:  # other names in the meta may be paths out of the folder
        # A copy may lack files such as state.pt on purpose; loading them reports it.
        recorded = name in meta["sha256"] and (folder / name).exists()
        if recorded or name == weights_name(meta):
            _verify(folder, meta, name)
    return meta


def whole_checkpoints(run: Path) -> tuple[list[Path], list[str]]:
    """Return the undamaged checkpoints of a run, oldest first, and why each other is not used."""
    whole, reasons = [], []
    for folder in checkpoints_of(run):
        try:
            verify(folder)
        except (CheckpointError, OSError) as error:
            reasons.append(reason_of(error))
        else:
            whole.append(folder)
    return whole, reasons


@contextlib.contextmanager
def _advised(folder: Path) -> Iterator[None]:
    """Add to a `DamagedError` of the block which undamaged checkpoint of the run can be used
    instead. An error about a checkpoint that is no longer there becomes a `ReplacedError`.

    Raises:
        DamagedError, ReplacedError: the error of the block, with advice.
    """
    try:
        yield
    except (CheckpointError, FileNotFoundError) as error:
        run, is_step = folder.parent, STEP_FOLDER.fullmatch(folder.name)
        if is_step and not folder.exists() and checkpoints_of(run):
            raise ReplacedError(
                f"{folder} is not there: a training keeps only its best and its newest checkpoint; "
                f"name the run, {run}, to use its best one"
            ) from error
        if not isinstance(error, DamagedError):
            raise
        others = [other for other in whole_checkpoints(run)[0] if other != folder]
        advice = (
            f"{others[-1]} is undamaged: use it instead"
            if others
            else f"no undamaged checkpoint in the run of {folder}; restore a copy, or train again"
        )
        raise DamagedError(f"{error}; {advice}") from error


def load_network(folder: Path) -> tuple[Detector, Preprocess, Meta]:
    """Return the network (on the CPU, in evaluation mode), its preprocessing and its meta."""
    meta = read_meta(folder)
    network = recipes.build(Network, meta["recipe"]["network"], str(folder / META_FILE))
    net = build(network, pretrained=False, empty=True)
    load_weights(net, read_weights(folder), str(folder), assign=True)
    net = net.to(torch.float32).to(memory_format=torch.channels_last)
    return net.eval(), Preprocess(**meta["preprocess"]), _meta_in_use(folder, meta)


def _meta_in_use(folder: Path, meta: Meta) -> Meta:
    """Return the meta with the calibration for the cached backbone file."""
    spec = backbone.spec_of(meta, str(folder / META_FILE))
    if spec is None:
        return meta
    in_use = backbone.with_calibration(meta, spec, backbone.locate(spec, folder)[1])
    return cast(Meta, in_use)


def check(folder: Path, net: Detector | None = None) -> Meta:
    """Check by the file headers that a checkpoint's weights fit a network, and return its meta. The
    network is `net` (made by `build` with `empty`, unusable afterward), or the checkpoint's own.

    Raises:
        CheckpointError: as `read_meta`.
        NetworkError: timm does not know the network, or the weights do not fit it.
    """
    meta = read_meta(folder)
    if net is None:
        network = recipes.build(Network, meta["recipe"]["network"], str(folder / META_FILE))
        net = build(network, pretrained=False, empty=True)
    spec = backbone.spec_of(meta, str(folder / META_FILE))
    others = backbone.locate(spec, folder)[0] if spec else None
    with _advised(folder):
        check_weights_file(net, folder / weights_name(meta), str(folder), others)
    return _meta_in_use(folder, meta)


def check_weights(folder: Path) -> str:
    """Check the weights file of a checkpoint and return its SHA-256.

    Raises:
        CheckpointError: as `read_meta`.
        DamagedError: the file is missing or has changed.
    """
    with _advised(folder):
        meta = _read_meta(folder)
        _verify(folder, meta, weights_name(meta))
    return meta["sha256"][weights_name(meta)]


def weights_name(meta: Mapping[str, Any]) -> str:
    """Return the name of the weights file of a checkpoint or an exported folder."""
    return HUB_WEIGHTS_FILE if HUB_WEIGHTS_FILE in meta["sha256"] else WEIGHTS_FILE


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the network's weights, with timm names, on the CPU.

    Raises:
        CheckpointError: as `read_meta`.
        DamagedError: the file is missing, has changed or is no `.safetensors` file.
        BackboneError: the backbone of a shipped detector is not cached, or not a tested one.
    """
    with _advised(folder):
        meta = _read_meta(folder)
        _verify(folder, meta, weights_name(meta))
        try:
            weights = load_file(folder / weights_name(meta))
        except SafetensorError as error:
            raise DamagedError(
                f"{folder / weights_name(meta)} is no readable .safetensors file ({error})"
            ) from error
    spec = backbone.spec_of(meta, str(folder / META_FILE))
    return backbone.read_backbone(spec, folder) | weights if spec else weights


def load_state(folder: Path, *, lazy: bool = False) -> dict[str, Any]:
    """Load the training state on the CPU. With `lazy`, tensors are read from the file on use.

    Raises:
        CheckpointError: the checkpoint has no training state, or the state is damaged.
    """
    path = folder / STATE_FILE
    if not path.exists():
        raise CheckpointError(f"{folder} has no {STATE_FILE}, so training cannot resume from it")
    with _advised(folder):
        _verify(folder, _read_meta(folder), STATE_FILE)
    try:
        return _interned(torch.load(path, map_location="cpu", weights_only=True, mmap=lazy))
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({reason_of(error)}); use a checkpoint of this program"
        ) from error


def _interned(value: Any) -> Any:
    """Intern the keys of nested dictionaries. torch stores a key object that several dictionaries
    share only once, so equal but distinct keys would give other bytes on the next save.
    """
    if isinstance(value, dict):
        return {
            sys.intern(key) if isinstance(key, str) else key: _interned(inner)
            for key, inner in value.items()
        }
    return [_interned(inner) for inner in value] if isinstance(value, list) else value


def checkpoints_of(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest step first; ignore other folders."""
    if is_partial(run):
        return []
    folders = (path.parent for path in run.glob(f"step_*/{META_FILE}"))
    named = {int(m[1]): path for path in folders if (m := STEP_FOLDER.fullmatch(path.name))}
    return [named[step] for step in sorted(named)]


def best_of(run: Path) -> Path | None:
    """Return the checkpoint with the highest selection figure (of equals the latest), or None."""
    return best_among(checkpoints_of(run))


def best_among(checkpoints: Sequence[Path]) -> Path | None:
    """Return the checkpoint with the highest selection figure (of equals the last), or None."""
    best, most = None, float("-inf")
    for folder in checkpoints:
        selection = read_meta(folder)["selection"]
        figure = float("-inf") if selection is None else selection
        if figure >= most:
            best, most = folder, figure
    return best


def checkpoint_at(path: Path) -> Path | None:
    """Return the checkpoint that a path names: itself, or the best one if `path` is a run."""
    return path if (path / META_FILE).exists() else best_of(path)


def refusal_of(folder: Path) -> str:
    """Return why the gate refused a checkpoint, in one line; empty if not refused."""
    return "; ".join(read_meta(folder).get("refused") or [])


def runs_below(runs: Path) -> list[Path]:
    """Return the runs with a checkpoint in `runs` and, as names may contain slashes, below it."""
    with_checkpoint: list[Path] = []
    for folder in sorted(path for path in runs.glob("*") if path.is_dir()):
        if folder.name.startswith(".") or is_partial(folder) or STEP_FOLDER.fullmatch(folder.name):
            continue
        with_checkpoint += [folder] if checkpoints_of(folder) else []
        if not folder.is_symlink():  # links may form a loop
            with_checkpoint += runs_below(folder)
    return with_checkpoint


def find(runs: Path, named: Path | None = None, *, shipped: bool = False) -> Path:
    """Return the checkpoint that the user means. `named` is a checkpoint, a run (its best one) or
    the name of a shipped detector. Without `named`: the best of the newest run below `runs` whose
    best checkpoint was not refused; without such a run, if `shipped`, the shipped detector.

    Raises:
        CheckpointError: there is no such checkpoint; the message says how to get one.
    """
    if named:
        own = backbone.DETECTORS / named
        best = checkpoint_at(named)
        if best is None:
            if len(named.parts) == 1 and (own / META_FILE).exists():
                return own
            raise CheckpointError(backbone.no_checkpoint(named))
        if reasons := refusal_of(best):
            log.warning("%s was refused: %s", best, reasons)
        return best

    def created(run: Path) -> int:
        return read_meta(checkpoints_of(run)[-1])["created_ns"]

    candidates = sorted(runs_below(runs), key=created, reverse=True)
    for best in filter(None, map(best_of, candidates)):
        if not (reasons := refusal_of(best)):
            return best
        log.warning("%s is not used, because it was refused: %s", best, reasons)
    default = backbone.DETECTORS / backbone.DEFAULT_DETECTOR
    if shipped and (default / META_FILE).exists():
        return default
    demo = f"see the whole flow with `{DEMO}` (then --runs demo/runs), " if IN_CHECKOUT else ""
    raise NoCheckpointError(
        f"no {'usable ' * bool(candidates)}checkpoint below {runs}; train one with "
        f"`{command('train')} --phase 1`, {demo}name one with --checkpoint FOLDER, or use the "
        "shipped one: `python -m model fetch`, then --checkpoint clip"
    )
