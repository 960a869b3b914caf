"""Load a checkpoint as a detector that predicts images: used by `predict.py`, the web page and the
Python API.

    from model import load_detector
    print(load_detector().predict("photo.jpg").verdict)

Main entry: `load_detector(checkpoint, *, runs, device, backend, threshold)`. All arguments may be
left out.

- `checkpoint`: path of a checkpoint's folder or of a run (folder of a training; its best checkpoint
  is loaded), or the name of a shipped detector. None (the default): the newest run below `runs` is
  loaded, or, if there is no run, the default one of the shipped detectors.
- `runs`: path of the folder of all runs (default "runs").
- `device`: "auto" (the default: a GPU if there is one), "cpu", "cuda" or "cuda:N", or a
  `torch.device` of such a name.
- `backend`: what decodes the images: "dali", "pil" for Pillow, or "auto" (the default): DALI on a
  GPU if it is installed, else Pillow.
- `threshold`: a number from 0 to 1 that replaces the threshold of the checkpoint; then no verdict
  is *uncertain*. None (the default): that of the checkpoint.

It returns an `ImageDetector`. It raises `CheckpointError` or `BackboneError` if the checkpoint or
the backbone of a shipped detector cannot be used, and another `ValueError` for weights that do not
fit, or an impossible device, backend or threshold.

The detector's `predict(images, batch_size)` takes one image and returns a `Prediction`, or takes an
iterable of images and returns a list; `batch_size` is 32 by default. An image is a path, the bytes
of a file, a Pillow image, a uint8 array (height, width, 3) in RGB or (height, width) in gray, or an
`ImageFile`. A `Prediction` has the `name`, `probability` of fake (0 to 1), `verdict` ("no sign of
AI", "uncertain" or "likely AI"), and `error` (""); an unreadable image has the reason as `error`,
the verdict "unreadable" and the probability None. Another type raises TypeError, an array of
another shape or dtype ValueError.

`stream(images, batch_size, start)` takes an iterable, which may be endless, and yields one
`Prediction` at a time. The batches have 1, 4, 16, 64, ... images, but at most `batch_size`; with 32
they begin at 0, 1, 5, 21, 53, 85, ... To continue an interrupted list, pass the remaining images,
and as `start` (default 0) how many were done. A batch must begin at `start`, else ValueError.

`preprocess_file(image)` returns the network's input, uint8 (*shape, 3) with `shape` of
`detector.preprocess`, and raises `DecodeError` or OSError if the image cannot be read.
`score(pixels)` takes such inputs, (B, *shape, 3), and returns float64 probabilities (B,), NaN where
the network's output is not finite.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import console
from imaging.budget import LARGE_PIXELS
from imaging.decode import Encoded, as_is, decoded, png_of
from imaging.orientation import UPRIGHT
from model.checkpoint import CheckpointError, ReplacedError, find, load_network
from model.device import choose_device, choose_precision, keep_freed_memory
from model.inference.prediction import (
    AnyDetector,
    DecodedImage,
    Scored,
    Source,
    ahead,
    band_from,
    check_side,
    preprocess_ahead,
    threads,
)
from model.network import Detector
from model.score import evaluating, logits_of
from model.shipped.backbone import is_shipped
from model.shipped.meta import Meta
from model.verdict import probability
from pipeline import pil
from pipeline.augment import center_crop_params
from pipeline.batch import PLACEHOLDER, Request
from pipeline.loader import choose_backend
from pipeline.loading import Backend
from pipeline.preprocess import Preprocess
from storage import local_path


@dataclass(frozen=True, eq=False, repr=False)
class ImageDetector(AnyDetector):
    """A loaded checkpoint. Main method: `predict`. `preprocess_file` returns the network's input.

    `preprocess` and `meta` are read from the checkpoint. `backend` decodes the images; `reason`
    says why it was chosen. `asked` is a band (low, high) that replaces the one of the checkpoint.
    `lock` is held while the network computes: the hooks of a heatmap would otherwise read the
    features of another thread's image. Copies by `at_rates` share network and lock.
    """

    checkpoint: Path
    net: Detector
    preprocess: Preprocess
    meta: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype
    backend: str = "pil"
    reason: str = ""
    asked: tuple[float, float] | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    # Pickled for another process, which has its own copy of the network and needs its own lock.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock())

    def score(self, pixels: np.ndarray | torch.Tensor) -> np.ndarray:
        """Return the probability of fake of preprocessed images, uint8 (B, height, width, 3):
        float64 (B,), NaN where the network's output is not finite. Equal to `predict` to the last
        bit, for a batch of the same size.
        """
        images = torch.as_tensor(pixels, device=self.device).permute(0, 3, 1, 2)
        with self.lock, evaluating(self.net):
            logits = logits_of(self.net, images, self.device, self.dtype)
        return probability(logits.cpu().numpy(), self.meta["temperature"])

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Return the network's input, uint8 (*shape, 3), for an image (height, width, 3) RGB."""
        return pil.preprocess(pixels, self.preprocess)

    def _scored(self, files: Iterable[Source], batch_size: int, start: int) -> Iterator[Scored]:
        for names, pixels, failures in self._preprocessed(files, batch_size, start):
            yield names, self.score(pixels), failures

    def _preprocessed(
        self, files: Iterable[Source], batch_size: int, start: int
    ) -> Iterator[tuple[Sequence[str], np.ndarray | torch.Tensor, Mapping[int, str]]]:
        """Yield batches of preprocessed images: names, pixels uint8 (B, height, width, 3), and
        failures (row -> reason), whose rows are black. With a `batch_size` of 1 Pillow decodes,
        because building a DALI pipeline takes seconds on a GPU.
        """
        if self.backend != "dali" or batch_size < 2:
            shape = self.preprocess.shape
            yield from preprocess_ahead(files, self.preprocess_file, shape, batch_size, start)
            return
        from pipeline.dali import DaliBackend

        names: deque[Sequence[str]] = deque()

        def requests() -> Iterator[Request]:
            for of_group, encoded_files in ahead(files, self._for_dali, batch_size, start):
                names.append(of_group)
                yield self._request(encoded_files)

        with contextlib.closing(
            DaliBackend(self.preprocess.shape, batch_size, self.device, threads())
        ) as dali:
            for pixels in dali.run(requests()):
                yield names.popleft(), pixels.images, pixels.failures

    def _for_dali(self, file: Source) -> Encoded | bytes:
        """Return a JPEG for DALI to decode, or a PNG of the preprocessed image for any other file.

        DALI differs from Pillow on some files, decodes PNG and WebP on the CPU with fewer checks
        for damage, and would need too much memory for a batch of very large images.
        """
        if isinstance(file, DecodedImage):
            return png_of(self.preprocess_file(file), level=0)
        data = file.read()
        kept = as_is(data)
        if kept and kept.format == "JPEG" and kept.width * kept.height < LARGE_PIXELS:
            check_side(kept.width, kept.height)
            return kept
        with decoded(data) as pixels:
            return png_of(self.preprocess_file(DecodedImage(file.name, pixels)), level=0)

    def _request(self, encoded_files: Sequence[Any]) -> Request:
        """Build the request to DALI. A file without data is replaced by one black pixel."""
        failures = {
            row: encoded_file
            for row, encoded_file in enumerate(encoded_files)
            if isinstance(encoded_file, str)
        }
        rows, seen = [], []
        for row, encoded_file in enumerate(encoded_files):
            if isinstance(encoded_file, str):
                rows.append((*PLACEHOLDER, 1, 1))
            elif isinstance(encoded_file, bytes):
                seen.append(row)
                height, width = self.preprocess.shape
                rows.append((encoded_file, "PNG", UPRIGHT, width, height))
            else:
                rows.append(encoded_file)
        data, formats, orientations, widths, heights = map(list, zip(*rows, strict=True))
        params = center_crop_params(self.preprocess, np.array(widths), np.array(heights))
        size = self.preprocess.crop_size
        made = {"top": 0, "left": 0, "height": size, "width": size}  # PNGs: cropped already
        if self.preprocess.detail_crop:
            made |= {"detail_top": size, "detail_left": 0, "detail_side": size}
        for name, value in made.items():
            getattr(params, name)[seen] = value
        return Request(data, formats, orientations, params, failures)


RUNS = Path("runs")
"""Default folder of all runs. The folder need not exist."""


def load_detector(
    checkpoint: Path | str | None = None,
    *,
    runs: Path | str = RUNS,
    device: str | torch.device = "auto",
    backend: Backend = "auto",
    threshold: float | None = None,
) -> ImageDetector:
    """Load a detector.

    `checkpoint` is a checkpoint, a run (its best checkpoint is loaded) or the name of a shipped
    detector. Without `checkpoint`, the best checkpoint of the newest run below `runs` is loaded.
    Without any run, the shipped detector is loaded, and a log line says so.
    `threshold`, 0 to 1, replaces the one of the checkpoint; then no verdict is *uncertain*.
    For a band that keeps to error rates, call `at_rates(max_fpr=0.02)` of the result.

    Raises:
        CheckpointError: the checkpoint, or a folder `runs` other than `RUNS`, does not exist, or
            the checkpoint cannot be used.
        BackboneError: the backbone of a shipped detector is missing or is not the expected one.
        ValueError: the device or backend is not available, the threshold is outside 0 to 1, or
            `checkpoint` is an address.
    """
    asked = band_from(threshold)
    if not checkpoint and Path(runs) != RUNS and not Path(runs).exists():
        # Do not use the shipped detector if `runs` is a misspelled path.
        raise CheckpointError(
            f"there is no folder {runs} with runs; name a folder of trained runs, or leave it out "
            "to use the shipped detector"
        )
    named = local_path(checkpoint) if checkpoint else None
    where = choose_device(device)
    keep_freed_memory(where)
    dtype, _ = choose_precision("auto", where)
    chosen, reason = choose_backend(backend, where)
    folder, (net, preprocess, meta) = _newest(Path(runs), named)
    if not checkpoint and is_shipped(folder):
        console.log.info("no trained run below %s: using shipped detector %s", runs, folder.name)
    return ImageDetector(
        folder, net.to(where), preprocess, meta, where, dtype, chosen, reason, asked
    )


def _newest(runs: Path, named: Path | None) -> tuple[Path, tuple[Detector, Preprocess, Meta]]:
    """Find and load a checkpoint, up to four times if a running training replaces it meanwhile."""
    for _ in range(3):
        with contextlib.suppress(ReplacedError):
            return _load(runs, named)
    return _load(runs, named)


def _load(runs: Path, named: Path | None) -> tuple[Path, tuple[Detector, Preprocess, Meta]]:
    folder = find(runs, named, shipped=True)
    return folder, load_network(folder)
