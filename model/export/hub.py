"""Write a checkpoint as a folder for the Hugging Face Hub, and upload this folder.

Main entry: `write_hub(checkpoint, out, *, report, data, onnx)` writes the new folder `out` and
returns it.

- `checkpoint`: the checkpoint folder. All paths here are `Path`s.
- `out`: the new folder. An existing one must be empty.
- `report`: the checkpoint's `report.json`, whose figures the card shows, or None (default: no
  figures).
- `data`: the folder of the training sets, whose licenses the card lists (also a `UPath`), or None
  (default: not listed). A set that is missing, or differs from the one of the training, is not
  listed (in the second case with a warning).
- `onnx`: a folder of `export_onnx()`, whose files are copied to `out/onnx`, or None (default). No
  other file in it is copied.

The folder has `model.safetensors`, `meta.json` without private paths, and `README.md`, the model
card. If the recipe's `network.head` is timm's own head, it also has `config.json`, with which timm
and transformers load the weights. It is also a checkpoint: `python predict.py dir/ --checkpoint
FOLDER`.

`push(folder, repository, *, private)` uploads the folder to `repository` (OWNER/NAME), which is
created if needed (public unless `private=True`), and returns the URL of the commit. Log in before
with `hf auth login`, or set HF_TOKEN. It raises `HubError` if the folder is incomplete or the
upload fails.

Errors of `write_hub()`, of which all but `OSError` are `ValueError`s:

- `HubError`: `out` is not empty, `report` is no report of this checkpoint, or the weights cannot be
  written (such as on a full disk).
- `CheckpointError`: the checkpoint cannot be read. `ShardError`: the index of a set in `data` has
  an older format version.
- Another `ValueError`: the weights of the checkpoint do not fit its network, or the backbone of a
  shipped detector was not fetched.
- `OSError`: `report`, `data` or `onnx` cannot be read, or a file of `out` other than the weights
  cannot be written.

`preprocessing_of(net, preprocess)` returns a dict of the preprocessing in timm's terms (without a
detail crop), `sources_of(meta, data)` a dict, training set -> its data sources (None if not known),
and `read_report(path, meta)` a checked `report.json`. `refuse_if_there()` raises `HubError` if a
folder exists and is not empty.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired

import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from typing_extensions import TypedDict  # pydantic needs this one up to Python 3.11

import console
from checked import checked
from escape import reason_of, without_paths
from installed import command
from model.checkpoint import (
    HUB_WEIGHTS_FILE,
    META_FILE,
    CheckpointError,
    load_network,
    read_meta,
    seal,
    verify,
    weights_name,
)
from model.evaluation.report import REPORT_VERSION
from model.evaluation.scores import MEASURE_AGAIN, ReferenceReals, Subset
from model.export.card import card_of, is_plain
from model.export.license import license_of
from model.export.onnx import FILES, PARITY_FILE
from model.network import Detector
from model.shipped.backbone import with_backbone_inside
from model.shipped.calibration import Count, Share
from pipeline.preprocess import Preprocess
from sharding.format import CLASSES, INDEX_FILE, read_index
from sharding.hub import hub_errors, proxy_faults
from storage import AnyPath, atomic_folder, parse_json, read_text, sha256_of

CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
ONNX_FOLDER = "onnx"


class Figures(TypedDict):
    """Types of the figures of a report that the card shows."""

    reals: Count
    fakes: Count
    recall: Share | None
    false_positive_rate: Share | None
    auroc: Share | None
    intervals: dict[str, tuple[float, float]]


class SetFigures(TypedDict):
    """Types of the entries of a set that the card shows."""

    overall: Figures
    reference: Figures | None
    reference_reals: ReferenceReals | None
    note: str | None
    sources: NotRequired[dict[str, Figures]]
    generators: NotRequired[dict[str, Figures]]


class MeasuredFile(TypedDict):
    """Types of the entries of the measured detector that the export reads."""

    sha256: NotRequired[str]


class ReportEntries(TypedDict):
    """Types of the entries of a report that the export reads. `report/fields.py` has all."""

    run: str
    step: int
    detector: MeasuredFile
    threshold: Share
    subset: NotRequired[Subset | None]
    sets: dict[str, SetFigures]
    trained_on: list[str]
    maybe_trained_on: list[str]


class HubError(ValueError):
    """Raised for a folder that cannot be written or uploaded; the message says what to do."""


def write_hub(
    checkpoint: Path,
    out: Path,
    *,
    report: Path | None = None,
    data: AnyPath | None = None,
    onnx: Path | None = None,
) -> Path:
    """Write the new folder `out`, and return it.

    `report` is the checkpoint's `report.json`. `data` is the folder with the training sets; with it
    the card lists their licenses. `onnx` is a folder of `export_onnx`, whose files are copied; no
    other file in it may reach the hub.

    Raises:
        HubError: `out` exists and is not empty, the report is damaged or belongs to another
            checkpoint, or the weights could not be written (such as on a full disk).
    """
    refuse_if_there(out)
    net, preprocess, loaded = load_network(checkpoint)
    meta = with_backbone_inside(loaded)
    figures = read_report(report, meta) if report else None
    pretrained = {"tag": meta["recipe"]["name"], "license": license_of(meta).id}
    with atomic_folder(out) as partial:
        try:
            save_for_hf(
                net.backbone.to(memory_format=torch.contiguous_format),
                partial,
                model_config={"label_names": list(CLASSES), "pretrained_cfg": pretrained},
                data_config=preprocessing_of(net, preprocess),
                safe_serialization=True,
            )
        except SafetensorError as error:
            raise HubError(
                f"{out} could not be written ({error}); free space, or name another folder"
            ) from error
        if is_plain(meta):
            _let_transformers_in(partial / CONFIG_FILE)
        else:  # transformers would build another network from it
            (partial / CONFIG_FILE).unlink()
        seal(partial, without_paths(meta))
        if onnx:
            (partial / ONNX_FOLDER).mkdir()
            for name in (*FILES.values(), PARITY_FILE):
                if (onnx / name).exists():  # there may be no int8 file
                    shutil.copyfile(onnx / name, partial / ONNX_FOLDER / name)
        card = card_of(meta, figures, sources_of(meta, data), onnx=onnx is not None)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")
    return out


def _let_transformers_in(path: Path) -> None:
    """Remove `num_classes` from `model_args` in timm's config. TimmWrapper of transformers 5.24
    passes this value itself and fails on "multiple values". timm reads it from the top level.
    """
    config = parse_json(read_text(path))
    config.get("model_args", {}).pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def refuse_if_there(out: Path) -> None:
    """Check that `out` does not exist or is an empty folder.

    Raises:
        HubError: `out` is a file or a folder with content.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HubError(f"{out} exists already; name another folder, or remove it")


def preprocessing_of(net: Detector, preprocess: Preprocess) -> dict[str, Any]:
    """Return the preprocessing in timm's terms: resize the shorter side to
    `floor(size / crop_pct)`, then crop the center to `size`.
    """
    crop_pct = preprocess.crop_size / preprocess.resize_size
    while math.floor(preprocess.crop_size / crop_pct) < preprocess.resize_size:
        crop_pct = math.nextafter(crop_pct, 0)
    return {
        "input_size": (3, preprocess.crop_size, preprocess.crop_size),
        "interpolation": preprocess.interpolation,
        "crop_pct": crop_pct,
        "crop_mode": "center",
        "mean": tuple((net.mean / 255).flatten().tolist()),
        "std": tuple((net.std / 255).flatten().tolist()),
    }


def read_report(path: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Read `report.json` and check that it belongs to the checkpoint with this `meta`.

    Raises:
        HubError: the file is not a report, is damaged, or belongs to another checkpoint.
    """
    try:
        report = parse_json(read_text(path))
        version = report["report_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise HubError(f"{path} is not a report.json of `{command('evaluate')}`") from error
    if version != REPORT_VERSION:
        raise HubError(
            f"{path} has report version {version}, expected {REPORT_VERSION}; {MEASURE_AGAIN}"
        )
    try:
        checked(ReportEntries, report)
    except ValueError as error:
        raise HubError(f"{path} is damaged ({error}); {MEASURE_AGAIN}") from error
    measured, expected = (report["run"], report["step"]), (meta["recipe"]["name"], meta["step"])
    if measured != expected:
        raise HubError(
            f"{path} is of {measured[0]} step {measured[1]}, the checkpoint is {expected[0]} step "
            f"{expected[1]}; {_MEASURE}"
        )
    weights = meta["sha256"][weights_name(meta)]
    scored = report["detector"].get("sha256", "")
    if scored != weights:
        raise HubError(
            f"{path} is of another file of {measured[0]} step {measured[1]} (sha256 {scored[:12]}, "
            f"the checkpoint's weights have {weights[:12]}); {_MEASURE}"
        )
    return report


_MEASURE = f"measure this checkpoint with `{command('evaluate')} --checkpoint FOLDER --shards SET`"


def sources_of(meta: Mapping[str, Any], data: AnyPath | None) -> dict[str, dict[str, Any] | None]:
    """Return the sources of each training set that the detector was trained on, from its index.
    None for a set that is not below `data`, or whose index has another hash than at training.
    """
    recorded = meta["data"] or {}
    hashes, trained = recorded.get("set_sha256", {}), recorded.get("sources")
    sources: dict[str, dict[str, Any] | None] = {}
    for name in [*recorded.get("train", []), *recorded.get("replay", [])]:
        sources[name] = None
        index = None if data is None else data / name / INDEX_FILE
        if index is None or not index.exists():
            continue
        if sha256_of(index) == hashes.get(name):
            facts = read_index(data / name)["sources"]
            sources[name] = {n: of for n, of in facts.items() if trained is None or n in trained}
        else:
            console.log.warning(
                "%s is not the set that the checkpoint was trained on, so the model card does not "
                "list its sources", data / name,
            )  # fmt: skip
    return sources


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a folder of `write_hub` to `repository` (owner/name), which is created if needed.
    Return the URL of the commit.

    Raises:
        HubError: the folder is incomplete or damaged, or the upload failed.
    """
    needed = [HUB_WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, META_FILE]
    if (folder / META_FILE).is_file() and not is_plain(read_meta(folder)):
        needed.remove(CONFIG_FILE)
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise HubError(
            f"{folder} has no {', '.join(missing)}; remove it, and write it again with `python -m "
            f"model export --hub {folder}`"
        )
    try:
        verify(folder)
    except CheckpointError as error:
        raise HubError(f"{error}; write the folder again with `python -m model export`") from error
    from huggingface_hub import HfApi  # slow import, most of a second

    api = HfApi()
    try:
        with proxy_faults():
            api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder)
    except hub_errors() as error:
        # The hub's client may raise a RuntimeError that only names the file; its cause is useful.
        reason = reason_of(error.__cause__ or error)
        raise HubError(
            f"{folder} could not be uploaded to {repository} ({reason}); log in with "
            "`hf auth login`, or set HF_TOKEN"
        ) from error
    return done.commit_url
