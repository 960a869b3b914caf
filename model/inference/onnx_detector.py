"""An exported detector (`python -m model export --onnx`) under ONNX Runtime: the same answers as
`model.load_detector`, and no torch.

The file says everything about itself in its metadata: how an image is preprocessed (`preprocess`),
the temperature that is in its probability already, the threshold and the band. `META_KEYS` is the
list.
"""

import json
import sys
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from installed import install_extra
from model.inference.prediction import (
    AnyDetector,
    Picture,
    Pixels,
    Prediction,
    as_source,
    band_from,
    pixels_of,
    predictions,
    preprocess_ahead,
    threads,
)
from pipeline.augment import Preprocess, center_crop_params
from sharding.format import CLASSES
from storage import sha256_of

if TYPE_CHECKING:
    import onnxruntime

FORMAT_VERSION = 3

META_KEYS = (
    "format_version", "classes", "preprocess", "temperature", "threshold", "calibration",
    "data", "precision", "run", "step", "network", "license", "input", "outputs",
)  # fmt: skip
"""Entries of the file's metadata, each the JSON text of a value. Those that a checkpoint's
`meta.json` has too are named and mean as there."""


class OnnxError(ValueError):
    """An ONNX file that cannot be used; the message says what to do."""


@dataclass(frozen=True, eq=False, repr=False)
class OnnxDetector(AnyDetector):
    """A loaded ONNX file, with what `model.inference.detector.ImageDetector` offers for prediction.

    `meta` is the file's metadata with the hash of the file (`sha256`), which holds the weights;
    `asked` is a band (low, high) to decide by instead of its own.
    """

    checkpoint: Path
    session: "onnxruntime.InferenceSession"
    preprocess: Preprocess
    meta: dict[str, Any]
    asked: tuple[float, float] | None = None

    @property
    def backend(self) -> str:
        """What decodes the images; there is no other without torch."""
        return "pil"

    @property
    def reason(self) -> str:
        """What computes, as ONNX Runtime calls it."""
        return f"ONNX Runtime, {self.session.get_providers()[0]}"

    def stream(
        self, images: Iterable[Picture], batch_size: int = 32, start: int = 0
    ) -> Generator[Prediction, None, None]:
        """One prediction per image, in order; an unreadable one carries its reason. `start` as
        `ImageDetector.stream` has it.
        """
        files = map(as_source, images, range(sys.maxsize))
        for names, pixels, failures in preprocess_ahead(
            files, self.preprocess_file, self.preprocess.crop_size, batch_size, start
        ):
            yield from predictions(names, self.score(pixels).tolist(), failures, self.band)

    def preprocess_file(self, image: Picture | Pixels) -> np.ndarray:
        """What the network sees of an image: uint8 (size, size, 3) RGB.

        Raises:
            DecodeError, OSError: it cannot be read.
        """
        with pixels_of(image if isinstance(image, Pixels) else as_source(image)) as pixels:
            return preprocess(pixels, self.preprocess)

    def score(self, pixels: np.ndarray) -> np.ndarray:
        """The probability of fake of uint8 (B, size, size, 3) images, float32 (B,)."""
        return self.session.run(["probability"], {"images": pixels})[0]

    def logits(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        """The logit of fake minus that of real of what `preprocess_file` made, before the
        temperature: float32 (B,).
        """
        real, fake = self.session.run(["logits"], {"images": np.stack(prepared)})[0].T
        return fake - real

    @property
    def fixed_batches(self) -> bool:
        """The last bits of a score depend on how many images are scored together."""
        return True


def preprocess(pixels: np.ndarray, settings: Preprocess) -> np.ndarray:
    """What the network sees of an upright (height, width, 3) uint8 RGB image, by Pillow's resize:
    uint8 (size, size, 3), within one gray level of `pipeline.pil`, which needs torch.
    """
    height, width = pixels.shape[:2]
    params = center_crop_params(settings, np.array([width]), np.array([height])).row(0)
    crop = pixels[params.top : params.top + params.height, params.left : params.left + params.width]
    image = Image.fromarray(np.ascontiguousarray(crop))
    return np.asarray(
        image.resize(
            (settings.crop_size, settings.crop_size),
            Image.Resampling[settings.interpolation.upper()],
        )
    )


def load_onnx(
    file: Path | str, *, device: str = "auto", threshold: float | None = None
) -> OnnxDetector:
    """Open an exported detector; `device` is auto, cpu, or cuda with ONNX Runtime's GPU build.

    Raises:
        OnnxError: ONNX Runtime is missing, or the file is no ONNX or not one of this program.
        ValueError: a device that is not there, or a threshold outside 0 to 1.
    """
    asked = band_from(threshold)
    file = Path(file)
    session = _open(file, device)
    meta = _meta_of(session, file) | {"sha256": sha256_of(file)}
    return OnnxDetector(file, session, Preprocess(**meta["preprocess"]), meta, asked)


def _open(file: Path, device: str) -> "onnxruntime.InferenceSession":
    try:
        import onnxruntime
    except ImportError as error:
        raise OnnxError(
            f"an ONNX file needs the library onnxruntime; {install_extra('export')}"
        ) from error
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    if not file.is_file():
        raise OnnxError(f"there is no file {file}; `python -m model export --onnx` writes one")
    if not str(file).isascii() and str(file) != str(file).encode("utf-8", "replace").decode():
        raise OnnxError(f"ONNX Runtime opens no name that is not UTF-8: rename {file}")
    options = onnxruntime.SessionOptions()
    # Said outright, so that a container's or taskset's share is not taken for the whole machine.
    options.intra_op_num_threads = threads()
    try:
        return onnxruntime.InferenceSession(file, options, providers=_providers(device))
    except (errors.Fail, errors.InvalidProtobuf, errors.InvalidGraph, errors.NotImplemented,
            errors.InvalidArgument, errors.RuntimeException) as error:  # fmt: skip
        reason = " ".join(str(error).rpartition("failed:")[2].split())[:200]
        raise OnnxError(
            f"{file} cannot be opened as ONNX: {reason}; `python -m model export --onnx` writes one"
        ) from error


def _providers(device: str) -> list[str]:
    """ONNX Runtime's names of what to compute on, the first choice first."""
    import onnxruntime

    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    kind = device.partition(":")[0]
    if kind not in ("auto", "cpu", "cuda"):
        raise ValueError(f"ONNX Runtime is asked for auto, cpu or cuda, got {device!r}")
    if kind == "cpu" or (kind == "auto" and cuda not in onnxruntime.get_available_providers()):
        return [cpu]
    if cuda not in onnxruntime.get_available_providers():
        raise ValueError(
            f"--device {device}, but this ONNX Runtime computes on the CPU only; its GPU build is "
            "the package onnxruntime-gpu"
        )
    return [cuda, cpu]


def _meta_of(session: "onnxruntime.InferenceSession", file: Path) -> dict[str, Any]:
    """The parsed metadata of a file."""
    texts = session.get_modelmeta().custom_metadata_map
    missing = [key for key in META_KEYS if key not in texts]
    if missing:
        raise OnnxError(
            f"{file} does not say {', '.join(missing)} in its metadata, so it is not known how to "
            "feed it; export the detector with `python -m model export --onnx`"
        )
    meta = {key: json.loads(texts[key]) for key in META_KEYS}
    if meta["format_version"] != FORMAT_VERSION:
        raise OnnxError(
            f"{file} has version {meta['format_version']}, expected {FORMAT_VERSION}; export the "
            "detector again with `python -m model export --onnx`"
        )
    if tuple(meta["classes"]) != CLASSES:
        raise OnnxError(f"{file} knows {meta['classes']}, expected {list(CLASSES)}")
    return meta
