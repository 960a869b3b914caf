"""Run a detector that was exported as ONNX (`python -m model export --onnx`) in ONNX Runtime,
without torch.

Main entry: `load_onnx(file, *, device, threshold)`.

- `file`: path of the `.onnx` file, `Path` or text.
- `device`: "auto" (the default: a GPU if ONNX Runtime supports one), "cpu", "cuda" or "cuda:N".
- `threshold`: a number from 0 to 1 that replaces the threshold of the file; then no verdict is
  "uncertain". None (the default): that of the file.

It returns an `OnnxDetector`. It raises `OnnxError` (a `ValueError`) if ONNX Runtime is missing, if
there is no such file, if ONNX Runtime cannot load it, if its metadata are missing or of another
version, or if its network has other inputs or outputs than an export. It raises another
`ValueError` for metadata that are no JSON, and for a device or threshold that is not possible.

The detector's `predict(images, batch_size)` takes one image and returns a `Prediction`, or takes an
iterable of images and returns a list. `stream(images, batch_size, start)` takes an iterable and
yields one `Prediction` at a time. An image is a path, the bytes of a file, a Pillow image, a uint8
array (height, width, 3) in RGB or (height, width) in gray, or an `ImageFile`.

- `batch_size`: the largest number of images that are scored together (default 32). The batches have
  1, 4, 16, ... images, then always `batch_size`.
- `start`: how many images at the beginning of its list the caller has left out (default 0). When
  the whole list is scored, a batch must begin at this position: 0, 1, 5, 21, 53, ... for a
  `batch_size` of 32. Else `ValueError` is raised.

A `Prediction` has the `name`, the `probability` of fake (0 to 1), the `verdict` ("no sign of AI",
"uncertain" or "likely AI"), and `error`, which is "". An unreadable image gets an `error`, the
verdict "unreadable" and the probability None. An image of another type raises `TypeError`, a wrong
array or a `batch_size` below 1 `ValueError`.

The metadata of the file (`META_KEYS`) contains the preprocessing, the threshold and the calibration
with the band of "uncertain" probabilities. The output `probability` of its network includes the
temperature. `preprocess(pixels, settings)` crops and resizes pixels, uint8 (height, width, 3), as
the `Preprocess` settings say, to the network's input, uint8 (*settings.shape, 3), with Pillow.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from devices import parse_device
from escape import text_fault
from installed import why_not_imported
from model.inference.prediction import (
    AnyDetector,
    Scored,
    Source,
    band_from,
    preprocess_ahead,
    threads,
)
from model.shipped.entries import Entries, checked_meta
from pipeline.augment import center_crop_params
from pipeline.preprocess import Preprocess
from sharding.format import CLASSES
from storage import parse_json, sha256_of

if TYPE_CHECKING:
    import onnxruntime

FORMAT_VERSION = 3

META_KEYS = (
    "format_version", "classes", "preprocess", "temperature", "threshold", "calibration",
    "data", "precision", "run", "step", "network", "license", "input", "outputs",
)  # fmt: skip
"""Keys of the file's metadata; each value is JSON text. A key that a checkpoint's `meta.json` also
has means the same here."""


ROUNDING = 1e-6
"""Distance from 0 and 1 at which a number still counts as a probability."""

_OUTPUTS = {"probability": ("batch",), "logits": ("batch", 2)}
"""Shapes of the network's outputs."""


class OnnxError(ValueError):
    """Raised for an ONNX file that cannot be used; the message says what to do."""


@dataclass(frozen=True, eq=False, repr=False)
class OnnxDetector(AnyDetector):
    """A loaded ONNX file, with the prediction methods of `model.inference.detector.ImageDetector`.

    `checkpoint` is the file. `meta` is its metadata, with the hash of the file as `sha256`. `asked`
    is a band (low, high) that replaces the one of the file. `reason` names the execution provider
    of ONNX Runtime. Pillow decodes the images, because DALI needs torch.
    """

    checkpoint: Path
    session: "onnxruntime.InferenceSession"
    preprocess: Preprocess
    meta: Mapping[str, Any]
    asked: tuple[float, float] | None
    reason: str
    backend: str = "pil"

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Return the network's input, uint8 (*shape, 3), for an image (height, width, 3) RGB."""
        return preprocess(pixels, self.preprocess)

    def _scored(self, files: Iterable[Source], batch_size: int, start: int) -> Iterator[Scored]:
        for names, pixels, failures in preprocess_ahead(
            files, self.preprocess_file, self.preprocess.shape, batch_size, start
        ):
            yield names, self.score(pixels), failures

    def score(self, pixels: np.ndarray) -> np.ndarray:
        """Return the probability of fake of preprocessed images, uint8 (B, height, width, 3):
        float32 (B,).

        Raises:
            OnnxError: the file gives a number outside 0 to 1, or not one for each image.
        """
        values = self._run("probability", pixels)
        # The sigmoid of ONNX Runtime can be slightly above 1. NaN is accepted.
        outside = values[(values < -ROUNDING) | (values > 1 + ROUNDING)]
        if len(outside):
            raise OnnxError(
                f"{self.checkpoint} gives the probability {outside[0]:g}, expected 0 to 1; export "
                "the detector again with `python -m model export --onnx`"
            )
        return values.clip(0, 1)

    def logits(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        """Return the logit of fake minus the logit of real of preprocessed images, before the
        temperature: float32 (B,).
        """
        real, fake = self._run("logits", np.stack(prepared)).T
        return fake - real

    def _run(self, output: str, pixels: np.ndarray) -> np.ndarray:
        values = self.session.run([output], {"images": pixels})[0]
        shape = (len(pixels), *_OUTPUTS[output][1:])
        if values.shape != shape:
            raise OnnxError(
                f"{self.checkpoint} gives {output} of shape {values.shape}, expected {shape}; "
                "export the detector again with `python -m model export --onnx`"
            )
        return values

    @property
    def fixed_batches(self) -> bool:
        """Whether the last bits of a score depend on the batch size: always True here."""
        return True


def preprocess(pixels: np.ndarray, settings: Preprocess) -> np.ndarray:
    """Crop and resize an upright RGB image, uint8 (height, width, 3), to uint8
    (*settings.shape, 3).

    Uses Pillow's resize, because `pipeline.pil` needs torch. Values differ by at most one level.
    """
    height, width = pixels.shape[:2]
    params = center_crop_params(settings, np.array([width]), np.array([height])).row(0)
    size, kind = (settings.crop_size,) * 2, Image.Resampling[settings.interpolation.upper()]
    return np.concatenate(
        [
            Image.fromarray(
                np.ascontiguousarray(pixels[top : top + height, left : left + width])
            ).resize(size, kind)
            for top, left, height, width in params.windows
        ]
    )


def load_onnx(
    file: Path | str, *, device: str = "auto", threshold: float | None = None
) -> OnnxDetector:
    """Open an exported detector. `device` is auto, cpu, or cuda (needs ONNX Runtime's GPU build).

    Raises:
        OnnxError: ONNX Runtime is not installed, or the file is not an ONNX export of this program.
        ValueError: the device is not available, or the threshold is outside 0 to 1.
    """
    asked = band_from(threshold)
    file = Path(file)
    session = _open(file, device)
    meta = _meta_of(session, file) | {"sha256": sha256_of(file)}
    settings = Preprocess(**meta["preprocess"])
    _check_graph(session, settings, file)
    reason = f"ONNX Runtime, {session.get_providers()[0]}"
    return OnnxDetector(file, session, settings, meta, asked, reason)


def _open(file: Path, device: str) -> "onnxruntime.InferenceSession":
    try:
        import onnxruntime
    except ImportError as error:
        raise OnnxError(
            f"an ONNX file needs the library onnxruntime; {why_not_imported(error, 'export')}"
        ) from error
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    if not file.is_file():
        raise OnnxError(f"there is no file {file}; `python -m model export --onnx` writes one")
    if not str(file).isascii() and str(file) != str(file).encode("utf-8", "replace").decode():
        raise OnnxError(f"ONNX Runtime cannot open a file name that is not UTF-8; rename {file}")
    options = onnxruntime.SessionOptions()
    # Set, because ONNX Runtime ignores the CPU limits of a container or of taskset.
    options.intra_op_num_threads = threads()
    try:
        return onnxruntime.InferenceSession(file, options, providers=_providers(device))
    except (errors.Fail, errors.InvalidProtobuf, errors.InvalidGraph, errors.NotImplemented,
            errors.InvalidArgument, errors.RuntimeException) as error:  # fmt: skip
        reason = " ".join(str(error).rpartition("failed:")[2].split())[:200]
        raise OnnxError(
            f"{file} cannot be opened as ONNX: {reason}; `python -m model export --onnx` writes one"
        ) from error


def _providers(device: str) -> list[str | tuple[str, dict[str, int]]]:
    """Return ONNX Runtime's execution providers for `device`, in order of preference. A numbered
    GPU is a tuple of the provider and its options.
    """
    import onnxruntime

    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    kind, number = parse_device(device)
    if kind == "cpu" or (kind == "auto" and cuda not in onnxruntime.get_available_providers()):
        return [cpu]
    if cuda not in onnxruntime.get_available_providers():
        raise ValueError(
            f"--device {device}, but this ONNX Runtime computes on the CPU only; its GPU build is "
            "the package onnxruntime-gpu"
        )
    return [cuda if number is None else (cuda, {"device_id": number}), cpu]


def _meta_of(session: "onnxruntime.InferenceSession", file: Path) -> dict[str, Any]:
    """Parse and check the metadata of a file."""
    texts = session.get_modelmeta().custom_metadata_map
    missing = [key for key in META_KEYS if key not in texts]
    if missing:
        raise OnnxError(
            f"{file} has no {', '.join(missing)} in its metadata, so it cannot be used; export the "
            "detector with `python -m model export --onnx`"
        )
    try:
        meta = {key: parse_json(texts[key]) for key in META_KEYS}
    except ValueError as error:
        raise OnnxError(
            f"{file} has metadata that are not JSON ({text_fault(error)}); export the detector "
            "again with `python -m model export --onnx`"
        ) from error
    if meta["format_version"] != FORMAT_VERSION:
        raise OnnxError(
            f"{file} has version {meta['format_version']}, expected {FORMAT_VERSION}; export the "
            "detector again with `python -m model export --onnx`"
        )
    if meta["classes"] != list(CLASSES):
        raise OnnxError(f"{file} has the classes {meta['classes']}, expected {list(CLASSES)}")
    try:
        return checked_meta(Entries, meta, str(file))
    except ValueError as error:
        raise OnnxError(
            f"{error} in its metadata; export the detector again with `python -m model export "
            "--onnx`"
        ) from error


def _check_graph(session: "onnxruntime.InferenceSession", settings: Preprocess, file: Path) -> None:
    """Check the names, types and shapes of the network's input and outputs.

    Raises:
        OnnxError: they differ from an export of this program.
    """
    inputs = {"images": ("tensor(uint8)", ("batch", *settings.shape, 3))}
    outputs = {name: ("tensor(float)", shape) for name, shape in _OUTPUTS.items()}
    for values, expected in ((session.get_inputs(), inputs), (session.get_outputs(), outputs)):
        actual = {value.name: (value.type, _sizes(value.shape)) for value in values}
        if actual != expected:
            raise OnnxError(
                f"{file} has {_described(actual)}, expected {_described(expected)}; export the "
                "detector with `python -m model export --onnx`"
            )


def _sizes(shape: Sequence[Any]) -> tuple[int | str, ...]:
    """Return the sizes of a shape, with "batch" for a size that is known only when the network
    runs.
    """
    return tuple(size if isinstance(size, int) else "batch" for size in shape)


def _described(values: Mapping[str, tuple[str, tuple[int | str, ...]]]) -> str:
    return ", ".join(f"{name}: {kind} {list(shape)}" for name, (kind, shape) in values.items())
