"""Write the head (classifier) of a detector with a frozen backbone, to ship it without the
backbone.

Main entry: `save_head(checkpoint, target, backbone, *, report, data, left_out)` writes the new
folder `target` and returns it.

- `checkpoint`: the checkpoint folder (`Path`).
- `target`: the `Path` of the new folder. An existing one must be empty.
- `backbone`: a `BackboneSpec`, from `backbone_of(checkpoint)`. It lists the files that contain the
  backbone, each with its hash and download places. One of these files must be on this machine: in
  this project's cache of backbones (`fetch_backbone(backbone)` of `model/shipped/fetch.py`
  downloads it to there) or in the cache of the Hugging Face Hub.
- `report`: the `Path` of the checkpoint's `report.json`, whose figures the model card shows, or
  None (default).
- `data`: the `Path` (or `UPath`) of the folder of the training sets, whose sources the card lists,
  or None (default).
- `left_out`: the `Path` of a file of `write_new_kinds()` of `new_kinds.py`, the figures on sources
  left out of training, for the card, or None (default).

The folder has the head's weights (`weights.safetensors`, kilobytes), `meta.json` with the places
and hashes of the backbone (layout: `model/shipped/backbone.py`), and `README.md`, the model card.

Errors, all of them `ValueError`s except the last:

- `HeadError`: the backbone was trained too, its file is in neither cache, the file has other
  weights, or the head cannot be written (such as on a full disk).
- `HubError`: `target` is not empty, or `report` is no report of this checkpoint.
- `NewKindsError`: `left_out` holds no such figures.
- other `ValueError`: the checkpoint cannot be read, or the file in the cache is damaged.
- `OSError`: the file `report` or `left_out` cannot be read (such as a missing one), or the folder
  or another file in it cannot be written.

`backbone_of(checkpoint, hub)` finds the `BackboneSpec` in the checkpoint, which records the weights
that its training started from, or raises `HeadError`. `hub`, a `HubPlace` (repository, revision,
file) or None (default), is a place to download from first.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import recipes
from escape import without_paths
from model.checkpoint import META_FILE, WEIGHTS_FILE, read_meta, read_weights, seal
from model.export.card import card_of
from model.export.hub import (
    CARD_FILE,
    read_report,
    refuse_if_there,
    sources_of,
)
from model.export.license import first_of
from model.export.new_kinds import read_new_kinds
from model.network import build, head_prefixes, timm_license
from model.recipe import Network
from model.shipped.backbone import (
    KEY,
    KNOWN,
    BackboneFile,
    BackboneSpec,
    HubPlace,
    as_meta,
    cached_path,
    spec_of,
    verify_file,
)
from sharding.hub import in_hub_cache
from storage import AnyPath, atomic_folder, sha256_of


class HeadError(ValueError):
    """Raised for a checkpoint whose head cannot ship alone; the message says what to do."""


def save_head(
    checkpoint: Path,
    target: Path,
    backbone: BackboneSpec,
    *,
    report: Path | None = None,
    data: AnyPath | None = None,
    left_out: Path | None = None,
) -> Path:
    """Write the head of a checkpoint with a frozen backbone into the new folder `target`.

    `backbone` lists the sources of the backbone. One of its files must be in the cache, or in the
    hub's cache, and contain exactly the checkpoint's backbone weights; this file is recorded as
    tested. `report` is the checkpoint's `report.json`, `data` the folder with its training sets;
    the card shows both.

    Raises:
        HeadError: the backbone was trained too, none of its files is on this machine, no file has
            the weights on which the head was trained, or the head cannot be written.
        HubError: `target` is not empty, or the report is damaged or belongs to another checkpoint.
        NewKindsError: `left_out` holds no figures on sources left out of training.
    """
    refuse_if_there(target)
    meta = read_meta(checkpoint)
    figures = read_report(report, meta) if report else None
    new_kinds = read_new_kinds(left_out) if left_out else None
    network = recipes.build(Network, meta["recipe"]["network"], str(checkpoint / META_FILE))
    if not network.freeze_backbone:
        raise HeadError(
            f"{checkpoint} trained its backbone too, so its head is useless alone; write the whole "
            "network with --hub, or train with network.freeze_backbone"
        )
    heads = head_prefixes(build(network, pretrained=False, empty=True))
    weights = read_weights(checkpoint)
    head = {name: value for name, value in weights.items() if name.startswith(heads)}
    body = {name: value for name, value in weights.items() if name not in head}
    trained_on = _trained_on(body, backbone, checkpoint)
    spec = replace(backbone, tested={trained_on: {}, **backbone.tested})
    sources = sources_of(meta, data)
    shipped: dict[str, Any] = {**without_paths(meta), KEY: as_meta(spec)}
    with atomic_folder(target) as partial:
        try:
            save_file(head, partial / WEIGHTS_FILE)
        except SafetensorError as error:
            raise HeadError(
                f"{target} could not be written ({error}); free space, or name another folder"
            ) from error
        seal(partial, shipped)
        card = card_of(shipped, figures, sources, onnx=False, new_kinds=new_kinds)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")
    return target


def _trained_on(body: Mapping[str, torch.Tensor], backbone: BackboneSpec, checkpoint: Path) -> str:
    """Return the SHA-256 of the cached file that contains exactly the weights `body`.

    Raises:
        HeadError: no cached file contains these weights.
    """
    different = []
    for file in backbone.files:
        path = _path_of(file)
        if path is None:
            continue
        verify_file(path, file.sha256, "delete it and fetch it again")
        weights = load_file(path)
        others = [name for name in body if not _are_equal(weights.get(name), body[name])]
        if not others:
            return file.sha256
        different.append(f"{path.name[:16]}... differs in {len(others)} tensors, first {others[0]}")
    if different:
        raise HeadError(
            f"the backbone of {checkpoint} is not the one that would be downloaded "
            f"({'; '.join(different)}); train the head on the downloaded one"
        )
    known = backbone.name in [spec.name for spec in KNOWN]
    advice = (
        f"type `python -m model fetch {backbone.name}`"
        if known
        else "export on the machine that trained it, whose hub cache has the file"
    )
    raise HeadError(
        f"no file of the backbone {backbone.name} is on this machine to compare with; {advice}"
    )


def _path_of(file: BackboneFile) -> Path | None:
    """Return the path of a file in this project's cache, else in the hub's cache, else None."""
    path = cached_path(file.sha256)
    if path.is_file() or file.hub is None:
        return path if path.is_file() else None
    in_hub = in_hub_cache(file.hub.repository, file.hub.file, file.hub.revision)
    return in_hub if in_hub and sha256_of(in_hub) == file.sha256 else None


def _are_equal(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    return one is not None and one.dtype == other.dtype and torch.equal(one, other)


def backbone_of(checkpoint: Path, hub: HubPlace | None = None) -> BackboneSpec:
    """Return the sources of a checkpoint's backbone, from the record of its first weights.

    The backbone is a known file, the backbone of the shipped head from which training started, or
    timm's file in the hub's cache. `hub` is a location on the hub with the same bytes; it is tried
    first.

    Raises:
        HeadError: the record names another origin.
    """
    meta = read_meta(checkpoint)
    spec = spec_of(meta, str(checkpoint / META_FILE)) or _recorded(meta, checkpoint)
    if hub:
        spec = replace(spec, files=[replace(spec.files[0], hub=hub), *spec.files[1:]])
    return spec


def _recorded(meta: Mapping[str, Any], checkpoint: Path) -> BackboneSpec:
    first, name = first_of(meta.get("first_weights")), meta["recipe"]["network"]["name"]
    for spec in KNOWN:
        for file in spec.files:
            if first and first["sha256"] == file.sha256:
                return replace(spec, files=[file])
    if first and first["kind"] == "timm":
        return _of_timm(first["name"])
    began = f"{first['kind']} {first['name']}".strip() if first else "nothing that is recorded"
    raise HeadError(
        f"{checkpoint} began from {began}, which cannot be downloaded; train the head from "
        f"the file of `python -m model fetch {KNOWN[0].name}` (--init-from), or from timm's "
        f"weights of {name}"
    )


def _of_timm(name: str) -> BackboneSpec:
    """Return timm's weights as a backbone, from the hub's cache on this machine."""
    import timm

    config = timm.get_pretrained_cfg(name)
    repository, _, revision = (config.hf_hub_id if config else "").partition("@")
    file = "model.safetensors"
    path = in_hub_cache(repository, file, revision or None) if repository else None
    if path is None:
        raise HeadError(
            f"timm's {file} of {name} is not in the hub's cache, so its revision is not known; "
            "train on this machine, or copy that cache"
        )
    commit = path.parent.name  # snapshots/<commit>/model.safetensors
    place = HubPlace(repository=repository, revision=commit, file=file)
    return BackboneSpec(
        name=name,
        license=timm_license(name),
        files=[BackboneFile(sha256=sha256_of(path), hub=place)],
    )
