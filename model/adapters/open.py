"""Open any detector by its name: a checkpoint, an ONNX file or a third-party detector.

Main entry: `load_any(name, checkpoint, opening, *, device, backend, threshold, heatmap)`. The last
four, by keyword only, may be left out.

- `name` (text or None): the value of `--detector`: `hf:OWNER/NAME`, `timm:NAME`, `hf:FOLDER` or
  `timm:FOLDER` (a local folder), `FILE.py` (with a function `predict`), `FILE.onnx`, or a
  checkpoint, named as in `checkpoint`.
- `checkpoint` (`Path` or None): the value of `--checkpoint`: a checkpoint folder, a run's folder
  (its best checkpoint) or the name of a shipped detector. If `name` and `checkpoint` are None, the
  best checkpoint of the newest run is opened, or the shipped detector if there is no run.
- `opening`: `Opening(trust=False, fake_labels=(), runs=Path("runs"))`. `trust`: a Python file may
  run. `fake_labels`: the labels of an `hf:` or `timm:` detector that mean AI-generated; if empty,
  the words in its labels decide. `runs`: the folder of all runs and calibrations.
- `device`: `auto` (default), `cpu`, `cuda` or `cuda:N`.
- `backend`: `pil`, `dali` or `auto` (default), the decoder of the images; `dali` needs a
  checkpoint.
- `threshold`: a probability from 0 to 1 that replaces the threshold of the detector; then no
  verdict is "uncertain". None (default) keeps the detector's own threshold and band.
- `heatmap` (bool, default False): True only makes sure that the detector is a checkpoint, as
  heatmaps need one. The caller computes them with `heatmap()` of `model/inference/gradcam.py`.

It returns an `ImageDetector`, `OnnxDetector` or `OtherDetector`. An image is a path, the bytes of a
file, a Pillow image, a uint8 array (height, width, 3) in RGB or (height, width) in gray, or an
`ImageFile`. Methods:

- `predict(images, batch_size=32)` takes one image and returns a `Prediction`, or takes an iterable
  of images and returns a list.
- `stream(images, batch_size=32)` takes an iterable and yields the `Prediction`s one by one.

A `Prediction` has `name`, `probability` of fake (0 to 1), `verdict` ("no sign of AI" below the
detector's band, "uncertain" in it, "likely AI" from its upper end on) and `error` (""). An
unreadable image has the reason as `error`, the verdict "unreadable" and the probability None.

It raises `DetectorError` (a `ValueError`, of detector.py) if both `name` and `checkpoint` are
given, if `name` is an empty text, or if an option does not fit the kind. It raises it, too, for a
Python file or classifier that cannot be opened: see `open_file()` of python_file.py, and
`open_transformers()` and `open_timm()` of networks.py. It raises other kinds of `ValueError` for a
checkpoint or file that is at an address, missing, damaged or of another version, for a shipped
detector whose backbone was not fetched, and for a device, backend or threshold that is not
possible. It raises `OSError` for a file that cannot be read.

`kind_of(name)` returns the kind: hf, timm, file, onnx or checkpoint. `as_checkpoint(name,
checkpoint, opening)` returns the checkpoint that one of the two names means, as a `Path`, or None
if neither does. `open_other(name, opening, *, device, threshold)` opens a detector that is not a
checkpoint. Slow imports (torch, timm, transformers) happen only when needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from model.adapters.calibration import with_calibration
from model.adapters.detector import DetectorError, OtherDetector
from model.inference.prediction import band_from
from storage import local_path

if TYPE_CHECKING:
    from model.inference.onnx_detector import OnnxDetector
    from model.inference.prediction import AnyDetector
    from pipeline.loading import Backend

Kind: TypeAlias = Literal["hf", "timm", "file", "onnx", "checkpoint"]


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Options for opening a third-party detector.

    `trust` allows running a Python file. `fake_labels` are the labels that mean AI-generated.
    `runs` is the folder with stored calibrations.
    """

    trust: bool = False
    fake_labels: Sequence[str] = ()
    runs: Path = Path("runs")


def kind_of(name: str) -> Kind:
    """Return the kind of detector that a `--detector` name means; checkpoint is the default."""
    prefix, colon, rest = name.partition(":")
    if colon and prefix in ("hf", "timm"):
        model = rest.removeprefix("//")  # as in an address of data
        if not model or model != rest:
            known = f"{prefix}:{model or 'OWNER/NAME'}"
            raise DetectorError(f"{name} names no model; write {known}, or a folder")
        return "hf" if prefix == "hf" else "timm"
    suffix = Path(name).suffix.lower()
    if suffix == ".py":
        return "file"
    return "onnx" if suffix == ".onnx" else "checkpoint"


def load_any(
    name: str | None, checkpoint: Path | None, opening: Opening, *, device: str = "auto",
    backend: "Backend" = "auto", threshold: float | None = None, heatmap: bool = False,
) -> "AnyDetector":  # fmt: skip
    """Load the detector of `--detector` (`name`) or of `--checkpoint`. Without both, load the
    newest run, or the shipped detector if there is no run. `heatmap`: heatmaps are requested.

    Raises:
        DetectorError: both are given, or an option is not possible for this kind of detector.
        ValueError, OSError: as `open_other` and `model.load_detector`.
    """
    checkpoint = as_checkpoint(name, checkpoint, opening)
    if name and not checkpoint:
        if heatmap or backend == "dali":
            option = "--heatmap" if heatmap else "--backend dali"
            raise DetectorError(f"{option} is for a checkpoint; {name} is not a checkpoint")
        return open_other(name, opening, device=device, threshold=threshold)
    from model import load_detector

    return load_detector(
        checkpoint, runs=opening.runs, device=device, backend=backend, threshold=threshold
    )


def as_checkpoint(name: str | None, checkpoint: Path | None, opening: Opening) -> Path | None:
    """Return the checkpoint that `--detector` (`name`) or `--checkpoint` names. Return None if
    neither is given, or if `name` is another kind of detector.

    Raises:
        DetectorError: both are given, or an option is not possible for a checkpoint.
        ValueError: `name` is an address.
    """
    if name is not None and not name.strip():
        raise DetectorError("--detector names nothing; leave it out to use the newest run")
    if name and checkpoint:
        raise DetectorError("--detector and --checkpoint exclude each other; give one of them")
    if name and kind_of(name) != "checkpoint":
        return None
    if opening.trust or opening.fake_labels:
        option = "--trust" if opening.trust else "--fake-label"
        raise DetectorError(f"{option} is for a third-party detector; name one with --detector")
    return local_path(name) if name else checkpoint


def open_other(
    name: str, opening: Opening, *, device: str = "auto", threshold: float | None = None
) -> "OtherDetector | OnnxDetector":
    """Open a detector that is not a checkpoint.

    Raises:
        DetectorError: the detector cannot be used, or an option is not possible for its kind.
        ValueError: `name` is an address, or as `model.inference.onnx_detector.load_onnx`.
    """
    band_from(threshold)  # refuse a bad threshold before loading
    kind = kind_of(name)
    if opening.trust and kind != "file":
        raise DetectorError(f"--trust is for a Python file; {name} is not a Python file")
    if opening.fake_labels and kind not in ("hf", "timm"):
        raise DetectorError(
            f"--fake-label is for hf: and timm: detectors, which have labels; {name} has none"
        )
    if kind == "onnx":
        from model.inference.onnx_detector import load_onnx

        return load_onnx(local_path(name), device=device, threshold=threshold)
    if kind == "file":
        from model.adapters.python_file import open_file

        detector = open_file(local_path(name), trust=opening.trust, threshold=threshold)
    else:
        from model.adapters.networks import open_timm, open_transformers

        opened = open_transformers if kind == "hf" else open_timm
        detector = opened(
            name.partition(":")[2], device=device, fake_labels=opening.fake_labels,
            threshold=threshold,
        )  # fmt: skip
    return with_calibration(detector, opening.runs)
