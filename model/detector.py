"""Image files in, verdicts out: what `predict.py`, the web page and a person's Python go through.

from model import load_detector

for result in load_detector().predict(["photo.jpg"]):
    print(result.name, result.probability, result.verdict)
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.checkpoint import find, load_network
from model.device import choose_device, choose_precision, keep_freed_memory
from model.network import Detector
from model.score import probability, score_batches
from pipeline import pil
from pipeline.augment import View, centre
from pipeline.batch import Batch
from sharding.decode import MAX_BYTES, prepare
from sharding.format import DecodeError

VERDICTS = tuple(f"likely {name}" for name in ("real", "AI"))
"""One per class, in the order of `CLASSES`."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """`probability` is that of fake (AI-generated), 0 to 1; None with an `error` instead."""

    name: str
    probability: float | None
    verdict: str
    error: str = ""


@dataclass(frozen=True, eq=False)
class ImageDetector:
    """A loaded checkpoint; `predict` is all there is to it."""

    checkpoint: Path
    net: Detector
    view: View
    meta: dict[str, Any]
    device: torch.device
    dtype: torch.dtype

    @property
    def threshold(self) -> float:
        """From this probability of fake on, an image is called AI-generated."""
        return float(self.meta["threshold"])

    def predict(
        self, images: Iterable[Path | str | bytes], batch_size: int = 32
    ) -> Iterator[Prediction]:
        """One prediction per image, in order; an unreadable one carries its reason.

        `images` are paths, or the bytes of files. They are read lazily, one batch at a time.
        """
        images = iter(images)
        number = 0
        with ThreadPoolExecutor() as pool:
            while group := list(islice(images, batch_size)):
                names = [_name_of(image, number + row) for row, image in enumerate(group)]
                views = list(pool.map(self._view, group))
                yield from self._predict_group(names, views)
                number += len(group)

    def _view(self, image: Path | str | bytes) -> np.ndarray | str:
        """What the network sees of an image, or the reason why it cannot be read."""
        try:
            pixels = prepare(_bytes_of(image)).pixels
        except (DecodeError, OSError) as error:
            return _one_line(error)
        height, width = pixels.shape[:2]
        view = torch.empty((self.view.size, self.view.size, 3), dtype=torch.uint8)
        pil.apply(pixels, centre(self.view, np.array([width]), np.array([height])).row(0), view)
        return view.numpy()

    def _predict_group(
        self, names: Sequence[str], views: Sequence[np.ndarray | str]
    ) -> Iterator[Prediction]:
        failures = {row: view for row, view in enumerate(views) if isinstance(view, str)}
        blank = np.zeros((self.view.size, self.view.size, 3), np.uint8)
        pixels = np.stack([blank if isinstance(view, str) else view for view in views])
        batch = Batch(
            images=torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2),
            labels=torch.zeros(len(views), dtype=torch.int64, device=self.device),
            valid=torch.tensor([row not in failures for row in range(len(views))]).to(self.device),
            samples=np.arange(len(views)),
            sources=np.zeros(len(views), np.int32),
            replayed=np.zeros(len(views), np.bool_),
            failures=failures,
        )
        for _, logits in score_batches(self.net, [batch], self.device, self.dtype):
            fake = probability(logits, self.meta["temperature"])
            for row, name in enumerate(names):
                if row in failures:
                    yield Prediction(
                        name=name, probability=None, verdict="unreadable", error=failures[row]
                    )
                else:
                    verdict = VERDICTS[int(fake[row] >= self.threshold)]
                    yield Prediction(name=name, probability=float(fake[row]), verdict=verdict)


def load_detector(
    checkpoint: Path | str | None = None, *, runs: Path | str = "runs", device: str = "auto"
) -> ImageDetector:
    """Load `checkpoint` (or the best one of that run), or the best one of the newest run in `runs`.

    Raises:
        CheckpointError: there is none, or it cannot be used.
    """
    folder = find(Path(runs), Path(checkpoint) if checkpoint else None)
    where = choose_device(device)
    keep_freed_memory(where)
    dtype, _ = choose_precision("auto", where)
    net, view, meta = load_network(folder)
    return ImageDetector(folder, net.to(where), view, meta, where, dtype)


def _bytes_of(image: Path | str | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    size = Path(image).stat().st_size
    if size > MAX_BYTES:
        raise DecodeError(f"{size:,} bytes, more than the limit of {MAX_BYTES:,}")
    return Path(image).read_bytes()


def _name_of(image: Path | str | bytes, number: int) -> str:
    return f"image {number}" if isinstance(image, bytes) else str(image)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
