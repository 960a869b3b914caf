"""Open an image classifier of the Hugging Face Hub, or of a local folder, as a detector.

Main entries: `open_transformers(name, *, ...)` and `open_timm(name, *, ...)`, which use the library
of that name. All arguments but `name` may be left out:

- `name`: a text: a local folder, `OWNER/NAME` or `OWNER/NAME@REVISION`, without `hf:` or `timm:`;
  for `open_timm()` also timm's name of a network.
- `device`: `auto` (default), `cpu`, `cuda` or `cuda:N`.
- `fake_labels`: a sequence of the labels that mean AI-generated; if empty (default), the words of
  the labels decide.
- `threshold`: from 0 to 1. An image with this probability or more is "likely AI", any other "no
  sign of AI". None (default): 0.5, until a calibration is loaded (`model/adapters/calibration.py`),
  which may have "uncertain" verdicts.

Both return an `OtherDetector` (`model/adapters/detector.py`). Its `predict(images, batch_size)`
takes one image (a path, the bytes of a file, a Pillow image or a uint8 RGB array) and returns a
`Prediction` (name, probability of fake, verdict, error), or takes an iterable of images and returns
a list. Its `stream(images, batch_size)` takes an iterable and yields the predictions. `batch_size`
is the largest number of images that are scored together (default 32). An image that cannot be read
has an `error`, the verdict "unreadable" and the probability None. Its network is in a
`NetworkJudge`: `prepare(image)` converts a Pillow image to the network's input, and
`score(prepared)` converts a list of such inputs to the probabilities of AI-generated, float64 (B,).

They raise `DetectorError` if the classifier cannot be downloaded or opened or has no safetensors
file, if its labels do not say which of them mean AI-generated, or if a label of `fake_labels` does
not exist. `open_transformers()` also raises it if the library transformers is missing. They raise
`ValueError` for an impossible device or threshold; `DetectorError` is a `ValueError` too. Only
files that match `TAKEN` are downloaded: nothing is unpickled, and no code of a repository is run.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from escape import typed_reason_of
from installed import why_not_imported
from model.adapters.detector import DetectorError, OtherDetector, meta_of
from model.adapters.labels import fake_indices
from model.device import choose_device, keep_freed_memory
from model.inference.prediction import band_from
from sharding.hub import fetch_folder, hub_errors
from storage import parse_json, read_text, sha256_of

TAKEN = ("*.json", "*.safetensors")
"""Patterns of the files that are downloaded from a repository."""

MAX_LABELS = 100_000
"""Most labels of a classifier; ImageNet-21k has 21,843. Both libraries fill memory with names."""


@dataclass(frozen=True, eq=False)
class NetworkJudge:
    """A classifier as a `Judge`.

    `transform` converts an image to the network's input, float32 (3, H, W). `forward` converts a
    batch of inputs to logits, float (B, labels). `fake` are the indices of the labels that mean
    AI-generated. A single output is the logit of its label: its sigmoid is used.
    """

    net: nn.Module
    transform: Callable[[Image.Image], torch.Tensor]
    forward: Callable[[torch.Tensor], torch.Tensor]
    fake: Sequence[int]
    device: torch.device
    fixed_batches: bool = True

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Return the network's input for an image, float32 (3, H, W)."""
        return self.transform(image)

    def score(self, prepared: Sequence[torch.Tensor]) -> np.ndarray:
        """Return the probability of fake of each image, float64 (B,)."""
        with torch.inference_mode():
            logits = self.forward(torch.stack(list(prepared)).to(self.device)).double()
        if logits.shape[1] > 1:
            return logits.softmax(1)[:, list(self.fake)].sum(1).clamp(0, 1).cpu().numpy()
        of_label = logits[:, 0].sigmoid()
        return (of_label if self.fake else 1 - of_label).cpu().numpy()


def open_transformers(
    name: str, *, device: str = "auto", fake_labels: Sequence[str] = (),
    threshold: float | None = None,
) -> OtherDetector:  # fmt: skip
    """Open an image classifier with transformers. `name` is a local folder, or OWNER/NAME or
    OWNER/NAME@REVISION on the hub.

    Raises:
        DetectorError: transformers is not installed, the repository is not such a classifier, has
            no safetensors file or needs its own code, or its labels are not clear.
    """
    try:
        import transformers
    except ImportError as error:
        raise DetectorError(
            f"hf: needs the library transformers; {why_not_imported(error, 'detectors')}"
        ) from error
    transformers.utils.logging.disable_progress_bar()  # console.py shows the progress
    folder, revision = _files_of(name, name)
    config = _json_of(folder / "config.json", name)
    where = choose_device(device)
    if config.get("auto_map") and str(config.get("model_type")) not in transformers.CONFIG_MAPPING:
        raise DetectorError(
            f"{name} needs code of its repository, which is never run; export it to a format that "
            "needs no code, or write a Python file with `predict` for it"
        )
    if config.get("problem_type") == "multi_label_classification":
        raise DetectorError(
            f"{name} gives each label a probability of its own, so there is no single probability "
            "of AI-generated; write a Python file with `predict` that combines them"
        )
    if (count := config.get("num_labels")) is not None and not _is_count(count):
        raise DetectorError(
            f"{name} has num_labels {count!r:.20} in config.json, expected a whole number from 1 "
            f"to {MAX_LABELS:,}; correct it in a local copy of its folder"
        )
    common: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **common)
        net, loading = transformers.AutoModelForImageClassification.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **common
        )
        labels = {int(index): str(label) for index, label in net.config.id2label.items()}
    except Exception as error:  # a published configuration may be anything
        raise DetectorError(
            f"{name} is not an image classifier that transformers opens: {typed_reason_of(error)}"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        rest = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise DetectorError(
            f"{name} has no weights for {missing[0]}{rest}, so it is not a trained image "
            "classifier; name a trained one"
        )
    if ignored := [key for key in loading["unexpected_keys"] if key.startswith("timm_model.")]:
        raise DetectorError(
            f"{name} has weights that its network does not use, such as {ignored[0]}: transformers "
            "builds another network than the one that was trained; use its own program"
        )
    net.to(where, torch.float32)
    keep_freed_memory(where)

    def transform(image: Image.Image) -> torch.Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    judge = NetworkJudge(
        net, transform, lambda images: net(pixel_values=images).logits,
        fake_indices(labels, fake_labels, name), where,
    )  # fmt: skip
    return _detector("hf", name, (folder, revision), labels, judge, threshold)


def open_timm(
    name: str, *, device: str = "auto", fake_labels: Sequence[str] = (),
    threshold: float | None = None,
) -> OtherDetector:  # fmt: skip
    """Open an image classifier with timm. `name` is a local folder, OWNER/NAME on the hub, or NAME
    of timm's own weights there. The labels are `label_names` in `config.json`.

    Raises:
        DetectorError: as `open_transformers`.
    """
    import timm
    from timm.data import create_transform, resolve_data_config

    repository = name if "/" in name or Path(name).is_dir() else f"timm/{name}"
    folder, revision = _files_of(repository, name)
    config = _json_of(folder / "config.json", name)
    labels, count = _timm_labels(config, name)
    fake = fake_indices(labels, fake_labels, name)
    where = choose_device(device)
    try:
        net = timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=count)
        net.load_state_dict(load_file(_weights_of(folder, name)[0]))
        transform = create_transform(
            **resolve_data_config(pretrained_cfg=net.pretrained_cfg, model=net)
        )
    # timm checks some values with `assert`; values of a wrong type cause AttributeError.
    except (
        RuntimeError, ValueError, LookupError, TypeError, AssertionError, AttributeError,
        SafetensorError,
    ) as error:  # fmt: skip
        raise DetectorError(
            f"{name} is not a model that timm opens: {typed_reason_of(error)}"
        ) from error
    net.to(where).eval()
    keep_freed_memory(where)
    judge = NetworkJudge(net, transform, net, fake, where)
    return _detector("timm", name, (folder, revision), labels, judge, threshold)


def _timm_labels(config: Mapping[str, Any], name: str) -> tuple[dict[int, str], int]:
    """Return the labels and the number of outputs, from timm's `config.json`.

    Raises:
        DetectorError: a value is not of the type that timm writes, or out of range.
    """
    settings = config.get("pretrained_cfg", config)
    if not isinstance(settings, dict):
        raise DetectorError(
            f"{name} has pretrained_cfg {settings!r:.60} in config.json, expected an object of JSON"
        )
    names = settings.get("label_names") or config.get("label_names") or []
    count = settings.get("num_classes", config.get("num_classes", "none"))
    if isinstance(names, list) and count == "none":
        count = len(names)
    if not isinstance(names, list) or not _is_count(count):
        raise DetectorError(
            f"{name} has label_names {names!r:.60} and num_classes {count!r:.20} in config.json, "
            f"expected a list and a whole number from 1 to {MAX_LABELS:,}; correct them in a local "
            "copy of its folder"
        )
    return dict(enumerate(map(str, names or [f"LABEL_{i}" for i in range(count)]))), count


def _is_count(value: Any) -> bool:
    """Return whether a value of `config.json` is a number of labels."""
    return type(value) is int and 1 <= value <= MAX_LABELS


def _detector(
    kind: str, name: str, files: tuple[Path, str], labels: Mapping[int, str], judge: NetworkJudge,
    threshold: float | None,
) -> OtherDetector:  # fmt: skip
    folder, revision = files
    weights = _weights_of(folder, name)
    if len(weights) == 1:
        sha256 = sha256_of(weights[0])
    else:
        sha256 = hashlib.sha256("".join(map(sha256_of, weights)).encode()).hexdigest()
    fake = [labels[index] for index in judge.fake]
    shown = name if revision else folder.absolute().name
    meta = meta_of(kind, shown, revision=revision, sha256=sha256, fake_labels=fake)
    reason = f"{kind} on {judge.device}, AI-generated: {', '.join(fake) or 'the complement'}"
    return OtherDetector(Path(f"{kind}:{name}"), judge, meta, band_from(threshold), reason)


def _files_of(repository: str, name: str) -> tuple[Path, str]:
    """Download a repository if needed. Return the folder with its files, and the commit ("" for a
    local folder).

    Raises:
        DetectorError: the repository does not exist, cannot be downloaded, or has no safetensors
            file.
    """
    if Path(repository).is_dir():
        _weights_of(Path(repository), name)
        return Path(repository), ""
    from huggingface_hub.errors import HFValidationError

    owner, _, revision = repository.partition("@")
    try:
        folder = fetch_folder(owner, revision or None, TAKEN)
    except HFValidationError as error:
        raise DetectorError(
            f"{name} is neither a folder nor OWNER/NAME of a repository on the hub"
        ) from error
    except hub_errors() as error:
        raise DetectorError(
            f"{name} could not be downloaded from the hub ({typed_reason_of(error)}); check its "
            "name and the network, or name a local folder"
        ) from error
    _weights_of(folder, name)
    return folder, folder.name


def _weights_of(folder: Path, name: str) -> list[Path]:
    """Return the files with weights: `model.safetensors`, or else all shards, sorted by name.

    Raises:
        DetectorError: there are no safetensors files.
    """
    files = sorted(folder.glob("*.safetensors"))
    whole = [file for file in files if file.name == "model.safetensors"]
    if not files:
        raise DetectorError(
            f"{name} has no weights in safetensors; pickled weights can run code and are never "
            "opened; ask its owner for a model.safetensors"
        )
    return whole or files


def _json_of(path: Path, name: str) -> dict[str, Any]:
    try:
        values = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise DetectorError(
            f"{name} has no readable {path.name} ({typed_reason_of(error)})"
        ) from error
    if not isinstance(values, dict):
        raise DetectorError(f"{name} has a {path.name} that is no object of JSON: {values!r:.60}")
    return values
